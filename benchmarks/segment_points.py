"""Points gathered from a bank of trajectories: the network's input in straightening."""

from collections.abc import Iterator

import torch

from flowkernels.bench.case import SMALL, Case, Small, Work, kernel, ours
from flowkernels.ops.segment_points import segment_points
from flowkernels.ops.segment_points.samples import Sample, error_and_bound, places


def by_lerp(bank, interval, sample, u):
    a = bank[interval, sample]
    return a if u is None else torch.lerp(a, bank[interval + 1, sample], u[:, None])


def cases(device) -> Iterator[Case]:
    def case(batch, D, on_segments=True, **which):
        def make():
            g = torch.Generator().manual_seed(0)
            bank = torch.randn(5, 2 * batch, D, generator=g).to(device)
            interval, sample = (t.to(device) for t in places(5, 2 * batch, batch, g))
            u = torch.rand(batch, generator=g).to(device) if on_segments else None
            compiled = torch.compile(by_lerp)
            args = (bank, interval, sample, u)
            return Work(
                ours(lambda: segment_points(*args), device)
                | {"torch eager": lambda: by_lerp(*args), "torch compile": lambda: compiled(*args)},
                lambda got: error_and_bound(Sample("", args, {}), got),
                moved=batch * D * 4 * (3 if on_segments else 2),
            )

        name = f"n={batch}, D={D}" + ("" if on_segments else ", u=0")
        return Case(name, batch * D, make, **which, curves={"n * D": batch * D} if on_segments else {})

    yield case(256, 64, quick=True)
    yield case(256, 3072)
    yield case(256, 3072, on_segments=False)
    yield case(256, 65536, main=True)


def small(device) -> Small:
    states, place = torch.randn(5, 4, *SMALL[1:], device=device), torch.tensor([2], device=device)
    args = (states, place, place, torch.tensor([0.3], device=device))
    sample = Sample("", args, {})
    return Small(
        lambda: segment_points(*args),
        kernel("segment_points", *args, torch.float32),
        lambda: by_lerp(states.flatten(2), *args[1:]).view(SMALL),
        lambda got: error_and_bound(sample, got),
    )
