"""The Bellman recursion over pairs of knots, against torch and vectorised NumPy."""

from collections.abc import Iterator

import numpy as np
import torch

from flowkernels.bench.case import Case, Small, Work, kernel, ours
from flowkernels.ops.bellman_pairs import bellman_pairs, reference
from flowkernels.ops.bellman_pairs.samples import Sample, error_and_bound, make


def by_numpy(first: np.ndarray, cost: np.ndarray, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectorised over all three knots; argmin takes the first of equal ones."""
    n = len(first)
    value, parent = np.full((steps + 1, n, n), np.inf), np.full((steps + 1, n, n), -1)
    value[0, 0, 0] = 0
    value[1, 0, 1:] = first[1:]
    for s in range(2, steps + 1):
        total = value[s - 1][:, :, None] + cost
        parent[s] = total.argmin(0)
        value[s] = np.take_along_axis(total, parent[s][None], 0)[0]
        parent[s][value[s] == np.inf] = -1
    return torch.from_numpy(value), torch.from_numpy(parent)


def cases(device) -> Iterator[Case]:
    def case(K, steps, **which):
        def make_work():
            first, cost = (t.nan_to_num_(nan=torch.inf) for t in make(K + 1, torch.Generator().manual_seed(0)))
            there, arrays = [t.to(device) for t in (first, cost)], [t.numpy() for t in (first, cost)]
            calls = ours(lambda: bellman_pairs(*there, steps), device)
            calls["torch eager"] = lambda: reference.bellman_pairs(*there, steps)
            if device.type == "cpu":
                calls["numpy"] = lambda: by_numpy(*arrays, steps)
            triples = (K + 1) * K * (K - 1) / 6
            return Work(
                calls,
                lambda got: error_and_bound(Sample("", (first, cost, steps), {}), [t.cpu() for t in got]),
                moved=8 * triples + 16 * (steps + 1) * (K + 1) ** 2,
                flops=2 * (steps - 2) * triples,  # a sum and a comparison for each triple; step 2 has few
            )

        return Case(f"K={K}, N=1..{steps}", K**3, make_work, **which, curves={"K": K})

    yield case(16, 8)
    yield case(50, 10)
    yield case(100, 10, quick=True)
    yield case(200, 10)
    if device.type == "cuda":
        yield case(400, 10, main=True)


def small(device) -> Small:
    args = *(torch.rand(shape, dtype=torch.float64, device=device) for shape in ((11,), (11, 11, 11))), 4
    sample = Sample("", tuple(t.cpu() for t in args[:2]) + args[2:], {})
    return Small(
        lambda: bellman_pairs(*args),
        kernel("bellman_pairs", *args),
        lambda: reference.bellman_pairs(*args),
        lambda got: error_and_bound(sample, [t.cpu() for t in got]),
    )
