"""Coordinate descent of a schedule's knots on the grid, on the endpoint error of Euler steps."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flowkernels.calibration.samples import Samples
from flowkernels.evaluation.endpoint import endpoint_error, endpoint_errors
from flowkernels.solver import Solver


def descended(
    data: Samples,
    fit: int,
    grid: Tensor,
    indices: Sequence[int],
    forced: Sequence[int],
    iterations: int,
    progress: Callable[[], object] = lambda: None,
) -> tuple[tuple[int, ...], Tensor]:
    """(places in the grid, errors of the samples that are not fitted) of the knots that are found from `indices`, on
    the first `fit` samples. Knots at `forced` stay."""
    begin, end = data.state(data.start[0]), data.state(-1)
    fitted, K = slice(fit), len(grid) - 1
    rounding = 1e-12 * endpoint_error(end, torch.zeros_like(end))

    def tried(indices, part: slice, past=()):
        v, x = data.teacher.run(Solver.euler(grid[list(indices)]), begin[part], past, part.start or 0)
        return v, endpoint_errors(x, end[part]).cpu()

    indices = list(indices)
    free = [i for i in range(1, len(indices) - 1) if indices[i] not in forced]
    v, errors = tried(indices, fitted)
    error, step = errors.mean().item(), max(1, K // 12)
    for _ in range(iterations):
        better = False
        for i in free:
            for move in (step, -step):
                other = [*indices[:i], indices[i] + move, *indices[i + 1 :]]
                if not other[i - 1] < other[i] < other[i + 1]:
                    continue
                found_v, errors = tried(other, fitted, [t[fitted] for t in v[:i]])
                found = errors.mean().item()
                if found < error - rounding:
                    indices, v, error, better = other, found_v, found, True
                    break
        progress()
        if not better:
            if step == 1:
                break
            step = max(1, step // 2)
    return tuple(indices), tried(indices, slice(fit, data.n))[1] if fit < data.n else errors[:0]
