"""Sample inputs of `bellman` and the error allowed on them, for its tests and its benchmark."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from flowkernels.ops.bellman import reference
from flowkernels.ops.samples import Sample, generator


def _costs(n: int, g: torch.Generator) -> Tensor:
    """Random costs `[n, n]`; on and below the diagonal, which is not read, NaN."""
    cost = torch.rand(n, n, generator=g, dtype=torch.float64)
    return torch.where(torch.ones(n, n, dtype=torch.bool).triu(1), cost, math.nan)


def sample_inputs() -> Iterator[Sample]:
    """Knots around the vector lengths 2, 4 and 8; ties, forbidden steps, and layouts that are copied first."""
    g = generator()
    small, large = [(2, 1), (3, 2), (4, 1), (8, 7), (9, 4), (16, 15), (17, 3), (33, 20)], [(65, 64), (101, 10)]
    for n, steps in (*small, *large, (129, 6), (150, 3)):  # the last two are more than a GPU holds at once
        yield Sample(f"{n}-steps{steps}", (_costs(n, g), steps), {})
    for n, steps, carry in [(9, 8, 0.7), (65, 20, 1 / 0.9), (18, 17, 1e-3)]:
        yield Sample(f"{n}-steps{steps}-carry{carry:.2g}", (_costs(n, g), steps), dict(carry=carry))
    yield Sample("17-ties", ((4 * _costs(17, g)).floor(), 16), {})
    cost = _costs(17, g)
    yield Sample("17-forbidden", (cost.masked_fill(cost < 0.7, math.inf), 16), {})
    yield Sample("17-unreachable", (torch.full((17, 17), math.inf, dtype=torch.float64), 16), {})
    yield Sample("17-constant-expanded", (torch.ones(1, 1, dtype=torch.float64).expand(17, 17), 16), {})
    yield Sample("17-transposed", (_costs(17, g).t().contiguous().t(), 16), {})
    wide = torch.full((17, 21), math.nan, dtype=torch.float64)
    yield Sample("17-sliced", (wide[:, 1:18].copy_(_costs(17, g)), 16), {})
    flat = torch.full((17 * 17 + 1,), math.nan, dtype=torch.float64)
    yield Sample("17-misaligned", (flat[1:].view(17, 17).copy_(_costs(17, g)), 16), {})


def to_op(sample: Sample) -> tuple:
    return (*sample.args, sample.kwargs.get("carry", 1.0))


def from_op(args: tuple) -> Sample:
    return Sample("from_op", tuple(args[:2]), dict(carry=args[2]))


def error_and_bound(sample: Sample, got: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """How many entries differ from the reference's, and none: products, sums and minima round alike everywhere."""
    value, parent = reference.bellman(*sample.args, **sample.kwargs)
    return float((got[0] != value).sum() + (got[1] != parent).sum()), 0.0
