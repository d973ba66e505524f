"""The Bellman recursion, against torch and vectorised NumPy."""

from collections.abc import Iterator

import numpy as np
import torch

from flowkernels.bench.case import Case, Small, Work, kernel, ours
from flowkernels.ops.bellman import bellman, reference
from flowkernels.ops.bellman.samples import Sample, error_and_bound


def by_numpy(cost: np.ndarray, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectorised over both knots; argmin takes the first of equal ones."""
    n = len(cost)
    value, parent = np.full((steps + 1, n), np.inf), np.full((steps + 1, n), -1)
    value[0, 0] = 0
    for s in range(1, steps + 1):
        total = value[s - 1][:, None] + cost
        parent[s] = total.argmin(0)
        value[s] = total[parent[s], np.arange(n)]
        parent[s][value[s] == np.inf] = -1
    return torch.from_numpy(value), torch.from_numpy(parent)


def cases(device) -> Iterator[Case]:
    def case(K, steps, **which):
        def make():
            g = torch.Generator().manual_seed(0)
            cost = torch.rand(K + 1, K + 1, generator=g, dtype=torch.float64)
            cost = torch.where(torch.ones(K + 1, K + 1, dtype=torch.bool).triu(1), cost, torch.inf)
            on_device, array = cost.to(device), cost.numpy()
            calls = ours(lambda: bellman(on_device, steps), device)
            calls["torch eager"] = lambda: reference.bellman(on_device, steps)
            if device.type == "cpu":
                calls["numpy"] = lambda: by_numpy(array, steps)
            return Work(
                calls,
                lambda got: error_and_bound(Sample("", (cost, steps), {}), [t.cpu() for t in got]),
                moved=cost.nbytes,
                flops=2 * steps * K * (K + 1) / 2,  # a sum and a comparison for each pair
            )

        return Case(f"K={K}, N=1..{steps}", K * K, make, **which, curves={"K": K})

    yield case(16, 8)
    yield case(50, 10)
    yield case(100, 10, quick=True)
    yield case(400, 10)
    yield case(1000, 20, main=True)


def small(device) -> Small:
    cost = torch.rand(11, 11, dtype=torch.float64, device=device)
    sample = Sample("", (cost.cpu(), 4), {})
    return Small(
        lambda: bellman(cost, 4),
        kernel("bellman", cost, 4, 1.0),
        lambda: reference.bellman(cost, 4),
        lambda got: error_and_bound(sample, [t.cpu() for t in got]),
    )
