"""Sampling in N = 8 steps: the loop in Python, captured, and by hand; with and without `HasTimeEmbedding`."""

from collections.abc import Iterator

import torch

import flowkernels as fk
from flowkernels.bench.case import Case, Work, ours
from flowkernels.models.bundled import BUNDLED
from flowkernels.models.networks import DiT

N = 8


def dit() -> DiT:
    """Not trained, but with no layer at zero."""
    torch.manual_seed(0)
    net = DiT()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return net.eval()


def by_hand(net, x0: torch.Tensor):
    @torch.no_grad()
    def loop():
        x = x0
        for i in range(N):
            x = x + net(x, torch.full((len(x),), i / N, device=x.device)) / N
        return x

    return loop


def cases(device) -> Iterator[Case]:
    def case(name, model, shape, n, *, compiled, **which):
        def make():
            net = model().to(device)
            x0 = torch.randn(n, *shape, generator=torch.Generator().manual_seed(0)).to(device)
            truth = fk.sample(net.double(), x0.double(), N)
            net.float()
            size = truth.abs().max().item()

            def hidden(x, t):  # the same network, its time embedding out of sight
                return net(x, t)

            calls = ours(lambda: fk.sample(net, x0, N), device)
            calls["flowkernels unhooked"] = lambda: fk.sample(hidden, x0, N)
            if device.type == "cuda":
                calls["flowkernels graph"] = lambda: fk.sample(net, x0, N, capture="graph")
                calls["flowkernels graph, unchecked"] = lambda: fk.sample(net, x0, N, capture="graph", check=False)
            if compiled:
                calls["flowkernels compile"] = lambda: fk.sample(net, x0, N, capture="compile")
                calls["torch compile"] = by_hand(torch.compile(net), x0)  # of the network, called in a loop
            calls["torch eager"] = by_hand(net, x0)
            # the network's own rounding, carried over the steps
            return Work(calls, lambda got: ((got - truth).abs().max().item() / size, 1e-4))

        return Case(f"{name}, n={n}, N={N}", n, make, **which)

    digits, fashion = BUNDLED["digits"], BUNDLED["fashion"]
    yield case("DiT", dit, (1, 8, 8), 1, compiled=False, quick=True, main=True)
    yield case("DiT", dit, (1, 8, 8), 64, compiled=False)
    yield case("residual MLP", digits.load, digits.shape, 1, compiled=True)
    yield case("residual MLP", digits.load, digits.shape, 64, compiled=True)
    yield case("UNet", fashion.load, fashion.shape, 4, compiled=True)
