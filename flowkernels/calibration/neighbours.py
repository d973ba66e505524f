"""Solvers of one evaluation more or fewer than another, to be refined."""

from collections.abc import Iterable

import torch
from torch import Tensor

from flowkernels.solver import Solver


def is_multistep(solver: Solver) -> bool:
    """Whether it makes one evaluation a step, from noise to data: only these are split and merged."""
    return solver.evaluations == solver.steps and not solver.is_inverse


def split(solver: Solver) -> Solver:
    """With an evaluation more, in the middle of its widest step, whose velocity counts nothing yet: the samples are the
    same."""
    times, at, a, b = solver.times, solver.model_times, solver.start_coefficients, solver.coefficients
    M = len(at)
    bounds = torch.cat([at, times[-1:]])
    i = int(bounds.diff().argmax())
    before = (a[i - 1], b[i - 1]) if i else (torch.ones_like(a[0]), torch.zeros_like(b[0]))
    rows = torch.cat([b[:i], (before[1] + b[i])[None] / 2, b[i:]])
    columns = torch.cat([rows[:, : i + 1], torch.zeros(M + 1, 1, dtype=b.dtype, device="cpu"), rows[:, i + 1 :]], 1)
    starts = torch.cat([a[:i], (before[0] + a[i])[None] / 2, a[i:]])
    middle = (bounds[i] + bounds[i + 1]) / 2
    knots = torch.cat([times[: i + 1], (times[i] + times[i + 1])[None] / 2, times[i + 1 :]])
    model_times = torch.cat([at[: i + 1], middle[None], at[i + 1 :]])
    return Solver(knots, model_times, columns, "split", start_coefficients=starts)


def merged(solver: Solver, kept: Iterable[float] = ()) -> dict[int, Solver]:
    """By the evaluation that is left out, those with one fewer, whose velocity the one before it stands in for; `kept`
    are knots that stay."""
    times, at, a, b = solver.times, solver.model_times, solver.start_coefficients, solver.coefficients
    found = {}
    for i in range(1, len(at)):
        if any(abs(times[i].item() - t) <= 1e-9 for t in kept):
            continue
        rows = [k for k in range(len(at)) if k != i - 1]  # the one before is that of the state that is evaluated
        columns = b[rows].clone()
        columns[:, i - 1] += columns[:, i]
        others = [k for k in range(len(at)) if k != i]
        knots = torch.cat([times[:i], times[i + 1 :]])
        found[i] = Solver(knots, _without(at, i), columns[:, others], "merged", start_coefficients=a[rows])
    return found


def _without(t: Tensor, i: int) -> Tensor:
    return torch.cat([t[:i], t[i + 1 :]])
