"""The straightening loss, forward and gradient, gathered from the bank."""

from collections.abc import Iterator

import torch

from flowkernels.bench.case import SMALL, Case, Small, Work, ours
from flowkernels.ops.segment_points.samples import places
from flowkernels.ops.straighten_loss import directly, reference, straighten_loss
from flowkernels.ops.straighten_loss.samples import Sample, gradient_error_and_bound
from flowkernels.runtime import backends


def by_autograd(v, bank, h, interval, sample, c):
    """What a careful trainer writes; the squared error and a mean, for torch to differentiate."""
    target = (bank[interval + 1, sample] - bank[interval, sample]) / h[interval][:, None]
    each = (v.float() - target).square().mean(1)
    return (each if c == 0 else (each + c * c).sqrt() - c).mean()


def cases(device) -> Iterator[Case]:
    def case(batch, D, loss="l2", dtype=torch.float32, **which):
        def make():
            g = torch.Generator().manual_seed(0)
            bank = torch.randn(5, 2 * batch, D, generator=g).to(device)
            interval, sample = (t.to(device) for t in places(5, 2 * batch, batch, g))
            h = torch.tensor([0.1, 0.2, 0.3, 0.4], device=device)
            v = torch.randn(batch, D, generator=g).to(device, dtype)
            c = 0.0 if loss == "l2" else 0.03
            compiled = torch.compile(by_autograd)

            def gradient(of):
                def run():
                    leaf = v.detach().requires_grad_()
                    of(leaf).backward()
                    return leaf.grad

                return run

            args = (bank, h, interval, sample)
            return Work(
                ours(gradient(lambda p: straighten_loss(p, *args, loss=loss).loss), device)
                | {
                    "torch eager": gradient(lambda p: by_autograd(p, *args, c)),
                    "torch compile": gradient(lambda p: compiled(p, *args, c)),
                },
                lambda got: gradient_error_and_bound(Sample("", (v, *args), dict(loss=loss)), got),
                moved=batch * D * (8 + 2 * v.element_size()),
            )

        curves = {"n * D, l2, float32": batch * D} if loss == "l2" and dtype == torch.float32 else {}
        return Case(f"n={batch}, D={D}, {loss}, {str(dtype)[6:]}", batch * D, make, **which, curves=curves)

    yield case(256, 64, quick=True)
    yield case(256, 3072)
    yield case(256, 3072, "huber")
    yield case(256, 3072, dtype=torch.bfloat16)
    yield case(16, 65536)
    yield case(256, 65536, main=True)
    yield case(256, 65536, "huber")
    yield case(256, 65536, dtype=torch.bfloat16)


def small(device) -> Small:
    states, place = torch.randn(5, 4, *SMALL[1:], device=device), torch.tensor([2], device=device)
    v, h = torch.randn(SMALL, device=device), torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64, device=device)
    args = (v, states, h, place, place)
    C, truth = backends.extension(), reference.straighten_loss(*args)[0].item()
    return Small(
        lambda: straighten_loss(*args).loss,
        lambda: directly(C, (), *args, None, 0.0, False)[0],
        lambda: by_autograd(v.flatten(1), states.flatten(2), h.float(), place, place, 0.0),
        lambda got: (abs(got.item() / truth - 1), 1e-5),
    )
