"""Sample inputs of `bellman_pairs` and the error allowed on them, for its tests and its benchmark."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from flowkernels.ops.bellman_pairs import reference
from flowkernels.ops.samples import Sample, arrange, generator


def make(n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random costs of first steps `[n]` and of others `[n, n, n]`; where they are not read, NaN."""
    first = torch.rand(n, generator=g, dtype=torch.float64)
    cost = torch.rand(n, n, n, generator=g, dtype=torch.float64)
    first[0] = math.nan
    return first, cost.masked_fill_(~reference.later(n, cost.device), math.nan)


def sample_inputs() -> Iterator[Sample]:
    """Knots around the vector lengths 2, 4 and 8; ties, forbidden steps, and layouts that are copied first."""
    g = generator()
    sizes = [(9, 4), (2, 1), (3, 2), (4, 1), (4, 3), (8, 7), (16, 9), (17, 3), (18, 6), (33, 7), (40, 3)]
    for n, steps in sizes:
        yield Sample(f"{n}-steps{steps}", (*make(n, g), steps), {})
    yield Sample("17-ties", (*((4 * t).floor() for t in make(17, g)), 16), {})
    yield Sample("17-forbidden", (*(t.masked_fill(t < 0.7, math.inf) for t in make(17, g)), 16), {})
    yield Sample("17-unreachable", (*(t.masked_fill(t >= 0, math.inf) for t in make(17, g)), 16), {})
    first, cost = make(11, g)
    ones = torch.ones(1, 1, 1, dtype=torch.float64)
    yield Sample("11-constant-expanded", (ones[0, 0].expand(11), ones.expand(11, 11, 11), 10), {})
    for layout in ("permuted", "reversed", "sliced", "misaligned"):
        moved = first if layout in ("permuted", "reversed") else arrange(first, layout)
        yield Sample(f"11-{layout}", (moved, arrange(cost, layout), 10), {})


def to_op(sample: Sample) -> tuple:
    return sample.args


def from_op(args: tuple) -> Sample:
    return Sample("from_op", tuple(args), {})


def error_and_bound(sample: Sample, got: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """How many entries differ from the reference's, and none: a sum of two and a minimum round alike everywhere."""
    value, parent = reference.bellman_pairs(*sample.args)
    return float((got[0] != value).sum() + (got[1] != parent).sum()), 0.0
