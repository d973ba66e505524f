"""Step costs of all pairs of knots from the Gram matrix."""

from collections.abc import Iterator

import torch

from flowkernels.bench.case import Case, Small, Work, kernel, ours
from flowkernels.ops.cost_from_gram import cost_from_gram, reference
from flowkernels.ops.cost_from_gram.samples import Sample, error_and_bound


def inputs(K: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.randn(K - 1, 2 * K, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)
    return rows @ rows.T, torch.linspace(0, 1, K + 1, dtype=torch.float64)


def cases(device) -> Iterator[Case]:
    def case(K, **which):
        def make():
            gram, times = inputs(K, device)
            compiled = torch.compile(reference.cost_from_gram)
            sample, on_device = Sample("", (gram.cpu(), times), dict(states=False)), times.to(device)
            return Work(
                ours(lambda: cost_from_gram(gram, times), device)
                | {
                    "torch eager": lambda: reference.cost_from_gram(gram, on_device),
                    "torch compile": lambda: compiled(gram, on_device),
                },
                lambda got: error_and_bound(sample, got.cpu()),
                moved=2 * gram.nbytes,
            )

        return Case(f"K={K}", K * K, make, **which, curves={"K": K})

    yield case(16)
    yield case(50)
    yield case(100, quick=True)
    yield case(256, main=True)


def small(device) -> Small:
    matrix, times = inputs(10, device)
    on_device = times.to(device)
    sample = Sample("", (matrix.cpu(), times), dict(states=False))
    return Small(
        lambda: cost_from_gram(matrix, times),
        kernel("cost_from_gram", matrix, times, False),
        lambda: reference.cost_from_gram(matrix, on_device),
        lambda got: error_and_bound(sample, got.cpu()),
    )
