"""Guided sampling of a diffusion transformer in N = 4 steps: as it is, with `fuse_head`, and compiled whole.

By depth: of a shallow network the final layer and the step are much of the work, of a deep one next to nothing.
"""

from collections.abc import Iterator

import torch
from torch import nn

import flowkernels as fk
from flowkernels.bench.case import Case, Work, ours
from flowkernels.models.networks import DiT

N, GUIDANCE, SHAPE, WIDTH = 4, 3.0, (16, 32, 32), 192


class Conditional(nn.Module):
    """A transformer with something to be guided by."""

    def __init__(self, blocks: int):
        super().__init__()
        torch.manual_seed(0)
        self.net = DiT(SHAPE[0], SHAPE[-1], 2, width=WIDTH, blocks=blocks)
        with torch.no_grad():
            for p in self.net.parameters():
                p.add_(0.02 * torch.randn_like(p))  # no layer at zero

    def forward(self, x, t, condition):
        return self.net(x + condition, t)


def by_hand(net, x0: torch.Tensor, conditions: torch.Tensor, compiled: bool):
    """Transformer, guidance and step as one function."""

    def step(x, t):
        v, base = net(torch.cat([x, x]), t, conditions).chunk(2)
        return x + (base + GUIDANCE * (v - base)) / N

    step = torch.compile(step) if compiled else step

    @torch.no_grad()
    def loop():
        x = x0
        for i in range(N):
            x = step(x, torch.full((2 * len(x),), i / N, device=x.device, dtype=x.dtype))
        return x

    return loop


def cases(device) -> Iterator[Case]:
    def case(blocks, n, **which):
        def make():
            net = Conditional(blocks).eval().to(device)
            generator = torch.Generator().manual_seed(0)
            x0, *conditions = (torch.randn(n, *SHAPE, generator=generator).to(device) for _ in range(3))
            guided = dict(guidance=GUIDANCE, conditioning=dict(condition=conditions[0]))
            velocity = fk.VelocityField(net, **guided, unconditional=dict(condition=conditions[1]))
            both = torch.cat(conditions)
            truth = by_hand(net.double(), x0.double(), both.double(), compiled=False)()
            net.float()
            size, fused = truth.abs().max().item(), fk.fuse_head(velocity)
            calls = {"flowkernels fused head": lambda: fk.sample(fused, x0, N)}
            calls |= ours(lambda: fk.sample(velocity, x0, N), device)
            calls["torch compile"] = by_hand(net, x0, both, compiled=True)
            calls["torch eager"] = by_hand(net, x0, both, compiled=False)
            # the network's own rounding, carried over the steps
            return Work(calls, lambda got: ((got - truth).abs().max().item() / size, 1e-4))

        return Case(f"DiT of {blocks} blocks, n={n}, N={N}", n, make, **which)

    yield case(0, 2, quick=True)
    yield case(1, 2, main=True)
    yield case(4, 2)
    yield case(12, 2)
