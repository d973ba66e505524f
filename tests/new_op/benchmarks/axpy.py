"""`x + a y`, beside torch."""

from collections.abc import Iterator

import torch
from flowkernels.ops.axpy import axpy
from flowkernels.ops.axpy.samples import error_and_bound

from flowkernels.bench.case import SMALL, Case, Small, Work, kernel, ours
from flowkernels.ops.samples import Sample


def cases(device) -> Iterator[Case]:
    def make():
        x, y = torch.randn(2, 1 << 18, device=device)
        sample = Sample("", (x.cpu(), y.cpu(), 0.5), {})
        calls = ours(lambda: axpy(x, y, 0.5), device) | {"torch eager": lambda: torch.add(x, y, alpha=0.5)}
        return Work(calls, lambda got: error_and_bound(sample, got.cpu()), moved=12 * x.numel())

    yield Case("256 Ki elements", 1 << 18, make, quick=True, main=True)


def small(device) -> Small:
    x, y = (torch.randn(SMALL, device=device) for _ in range(2))
    sample = Sample("", (x.cpu(), y.cpu(), 0.5), {})
    return Small(
        lambda: axpy(x, y, 0.5),
        kernel("axpy", x, y, 0.5),
        lambda: torch.add(x, y, alpha=0.5),
        lambda got: error_and_bound(sample, got.cpu()),
    )
