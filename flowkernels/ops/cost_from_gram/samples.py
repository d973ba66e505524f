"""Sample inputs of `cost_from_gram` and the error allowed on them, for its tests and its benchmark."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from flowkernels.ops._samples import Sample, arrange, slices
from flowkernels.ops.cost_from_gram import reference


def weights(times: Tensor, states: bool, starts: slice = slice(None)) -> Tensor:
    """`[K+1, K+1, R]`: the residual of the step j -> k as a combination of the rows a_m, e_j. starts: which j."""
    K = len(times) - 1
    j, k, m = torch.meshgrid(torch.arange(K + 1)[starts], torch.arange(K + 1), torch.arange(1, K), indexing="ij")
    a = torch.where((j < m) & (m < k), times[k] - times[m], 0.0)
    if not states:
        return a
    span = (times[None, :] - times[starts, None])[:, :, None]
    return torch.cat([a, span * torch.eye(K + 1, K, dtype=torch.float64)[starts, None, :]], 2)


def sample_inputs() -> Iterator[Sample]:
    """Knots around the vectors; smooth increments and independent ones; layouts that are copied first."""
    g = torch.Generator().manual_seed(0)

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
    """The largest error against the quadratic form itself, relative to the sum of the sizes of its terms.

    Both are sums in float64 of at most R^2 terms, in another order. Allowed: twice the error of the reference, plus an
    ulp for each of the 2 K additions that a term goes through in the recursion, which grow like their square root, and
    4 for its factors.
    """
    gram, times = sample.args

    def form(of: Callable[[Tensor], Tensor]) -> Tensor:
        found = []
        for starts in slices(len(times), len(times) * len(gram)):
            w = of(weights(times, sample.kwargs["states"], starts))
            found.append((w @ of(gram) * w).sum(2))
        return torch.cat(found)

    truth = form(lambda t: t)
    scale = form(torch.abs).clamp(min=torch.finfo(torch.float64).tiny)
    inside = torch.ones_like(truth, dtype=torch.bool).triu(1)

    def error(cost):
        if not bool((cost[~inside] == torch.inf).all()):
            return math.inf
        worst = ((cost - truth).abs() / scale)[inside].max().item()
        return worst if worst == worst else math.inf

    bound = 2 * error(reference.cost_from_gram(gram, times, **sample.kwargs))
    return error(got), bound + (4 + math.sqrt(2 * len(times))) * torch.finfo(torch.float64).eps
