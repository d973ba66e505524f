"""Sample inputs of `cost_from_gram` and the error allowed on them, for its tests and its benchmark."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from flowkernels.ops._wide import Wide
from flowkernels.ops.samples import Sample, arrange, compared, generator, nearest, of_sum, rounding, slices


def weights(times: Wide, states: bool, starts: slice = slice(None)) -> Wide:
    """`[K+1, K+1, R]`: the residual of the step j -> k as a combination of the rows a_m, e_j. starts: which j."""
    K = len(times) - 1
    j, k, m = torch.meshgrid(torch.arange(K + 1)[starts], torch.arange(K + 1), torch.arange(1, K), indexing="ij")
    a = (times[k] - times[m]) * ((j < m) & (m < k)).double()
    if not states:
        return a
    span = (times[None, :] - times[starts, None])[:, :, None]
    return torch.cat([a, span * torch.eye(K + 1, K, dtype=torch.float64)[starts, None, :]], 2)


def sample_inputs() -> Iterator[Sample]:
    """Knots around the vectors; smooth increments and independent ones; layouts that are copied first."""
    g = generator()

    def sample(K, states=False, smooth=False, layout="contiguous"):
        rows = torch.randn(2 * K - 1 if states else K - 1, 3 * K, generator=g, dtype=torch.float64)
        rows = rows.cumsum(0) if smooth else rows
        h = torch.rand(K, generator=g, dtype=torch.float64) + 0.5
        times = torch.cat([torch.zeros(1, dtype=torch.float64), h.cumsum(0) / h.sum()])
        gram = rows @ rows.T / 3
        kind = ("-states" if states else "") + ("-smooth" if smooth else "")
        kind += "" if layout == "contiguous" else f"-{layout}"
        return Sample(f"{K}{kind}", (arrange(gram, layout), times), dict(states=states))

    for K in (1, 2, 3, 4, 8, 9, 17, 32, 65):
        yield sample(K)
    for K in (1, 2, 9, 33):
        yield sample(K, states=True)
    yield sample(40, smooth=True)
    yield sample(20, states=True, smooth=True)
    for layout in ("misaligned", "sliced", "permuted"):
        yield sample(9, states=True, layout=layout)


def to_op(sample: Sample) -> tuple:
    return (*sample.args, sample.kwargs["states"])


def from_op(args: tuple) -> Sample:
    *of_function, states = args
    return Sample("from_op", tuple(of_function), dict(states=states))


def error_and_bound(sample: Sample, got: Tensor) -> tuple[float, float]:
    """The error against the quadratic form itself, in twice the digits, relative to the sum of the sizes of its terms.

    Allowed are the roundings of a term on its way through the recursion: 6 of its factors, differences of times, and
    of their products, and those of the sums along three recurrences of K steps each that lead from it to the cost.
    """
    gram, times = (t.cpu() for t in sample.args)
    inside = torch.ones(len(times), len(times), dtype=torch.bool).triu(1)
    if not bool((got.cpu()[~inside] == torch.inf).all()):
        return math.inf, 0.0
    bound = rounding(6 + of_sum(3 * (len(times) - 1)), torch.float64)
    pairs = []
    for starts in slices(len(times), len(times) * len(gram)):
        w = weights(Wide.of(times), sample.kwargs["states"], starts)
        truth = (w @ Wide.of(gram) * w).sum(2)
        truth = truth * (truth.hi > 0)  # of the Gram matrix as it was rounded, which may be below zero
        scale = (w.hi @ gram.abs() * w.hi).sum(2)
        within = inside[starts]
        pairs.append(compared(got.cpu()[starts][within], truth[within], scale[within], bound))
    return nearest(*pairs)
