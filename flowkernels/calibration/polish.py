"""`polish`: all coefficients of a solver by least squares on the endpoint, or the knots of a schedule."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from flowkernels._casts import no_grad
from flowkernels._checks import expect, expect_bool, expect_positive_int
from flowkernels.calibration.agreed import expect_agreed_fit
from flowkernels.calibration.calibration import Calibration
from flowkernels.calibration.fit import place_on_grid, schedule_on_grid
from flowkernels.calibration.knots import descended
from flowkernels.calibration.refine import ITERATIONS, ROBUST_FIRST, SQUARED, Refinement, halves, own_errors, refine
from flowkernels.calibration.samples import Samples, folds_of
from flowkernels.calibration.selection import Candidate, choose
from flowkernels.runtime.ranks import Group, by_ranks, ranks_of
from flowkernels.sampling.teacher import Teacher
from flowkernels.schedule import Schedule
from flowkernels.solver import Solver
from flowkernels.velocity.protocol import Velocity, resolve

Plan = TypeVar("Plan", Solver, Schedule)  # what is given is what comes back


@by_ranks
def polish(
    velocity: Velocity,
    calibration: Calibration,
    start: Plan,
    *,
    samples: int = 512,
    iterations: int = ITERATIONS,
    robust: bool = False,
    start_coefficients: bool = False,
    noise: Tensor | None = None,
    teacher: Velocity | None = None,
    chunk: int | None = None,
    progress: bool = False,
    group: Group | None = None,
) -> Plan:
    """Lower the endpoint error itself, from a solver or schedule that is good already. No gradients are taken.

    A Solver: all its coefficients and model times, by Levenberg and Marquardt's damped least squares on the endpoint's
    residuals, whose derivatives are finite differences. A Schedule: its knots, by coordinate descent on the grid with
    Euler steps. Each half of the samples is held out from what the other half makes of the start; that decides whether
    anything but the start is returned, which then comes from all samples.

    Args:
        velocity: the teacher that the calibration was made with; with `teacher`, a student of it.
        calibration: from `calibrate`, with the teacher's trajectories that it keeps.
        start: a Solver, of noise to data or back, or a Schedule on the calibration's grid. One whose times begin later
            than the grid is for the teacher's states at its first knot, which the grid must have. Forced knots of the
            calibration stay, and evaluations on their sides of these.
        samples: at most as many of those that the calibration keeps.
        iterations: at most as many, of each half; of a solver, an iteration is as many evaluations as derivatives of
            all samples of the half and six runs take, and in the end a third as many are of all samples.
        robust: of a solver, begin with weights that leave out samples far off, and end with none; tried beside the
            squared distance throughout.
        start_coefficients: of a solver, free its coefficients of x_0 too; tried beside the others.
        noise: `[n, *shape]`, to roll the teacher out anew: for a calibration from a file.
        teacher: what the calibration was made with, where `velocity` is another.
        chunk: samples evaluated at once; None evaluates all.
        progress: show a progress bar.
        group: a `torch.distributed.ProcessGroup` whose processes all make this call, each evaluating its part of the
            samples: `calibrate`.

    Returns:
        What was given, with other numbers; as it was where nothing is better on held-out samples. A Solver's notes tell
        the endpoint error before and after, "polish", and "evaluations", made for each sample on average.

    Cost: derivatives for a solver of M evaluations take J = M (M+1)(M+2)/6 of a sample (120 for M = 8; a coefficient is
    tried from its evaluation on), M (M-1)/2 more with those of x_0. A refinement takes at most some 4/3 iterations
    (J + 6 M) a sample, `robust` and `start_coefficients` as much again, and both four times as much. Steps are made of
    derivatives of an eighth of the samples while these are good for all, then of all samples', which are corrected by
    what steps find between them. A schedule of N steps takes up to some 16 N^2 a sample.
    Memory: states of a chunk's samples for each coefficient and time, M (M+3) / 2, or of all samples where that is at
    most 256 MB, and twice as many while they are multiplied; M states of all samples beside.

    Source: arXiv 2403.01329 (Bespoke solvers) for the free coefficients and times; More, The Levenberg-Marquardt
    algorithm (1978), for the scaled damping; Holland and Welsch, Robust regression using iteratively reweighted
    least-squares (1977); Broyden, A class of methods for solving nonlinear simultaneous equations (1965).

    Examples:
        >>> velocity, noise = (lambda x, t: x * t[:, None] ** 4), torch.randn(64, 2)
        >>> cal = fk.calibrate(velocity, noise, grid=20, steps=[2], progress=False)
        >>> solver = fk.polish(velocity, cal, fk.fit_solver(velocity, cal, 2))
        >>> x1 = fk.sample(velocity, noise, solver)
    """
    expect(isinstance(start, (Solver, Schedule)), "start", "a Solver or a Schedule", start, TypeError)
    expect_positive_int(samples, "samples")
    expect(samples >= 2, "samples", "at least 2, one to hold out", samples)
    expect_positive_int(iterations, "iterations")
    expect_bool(robust, "robust"), expect_bool(start_coefficients, "start_coefficients")
    expect_bool(progress, "progress")
    ranks = ranks_of(group)
    settings = dict(samples=samples, iterations=iterations, robust=robust, start_coefficients=start_coefficients)
    expect_agreed_fit(ranks, velocity, calibration, noise, chunk, teacher, start=start, **settings)
    if isinstance(start, Schedule):
        place = schedule_on_grid(calibration, start.steps, start, name="start").indices[0]
    else:
        begins, ends = start.times[[0, -1]].sort().values.tolist()
        expect(abs(ends - 1) <= 1e-9, "start", "a solver from noise to data, or from data to noise", start)
        place = place_on_grid(calibration, begins, "start", start)
        calibration.expect_forced(start.times, "start")
    data = Samples.of(velocity, calibration, noise, chunk, most=samples, start=place, teacher=teacher, ranks=ranks)
    weights = (SQUARED, ROBUST_FIRST) if robust else (SQUARED,)
    ways = [Refinement(w, free, iterations) for free in range(1 + start_coefficients) for w in weights]
    with tqdm(
        total=3 * iterations if isinstance(start, Schedule) else None,
        desc="polish",
        disable=not progress or not ranks.is_first,
        leave=False,
    ) as bar:
        if isinstance(start, Schedule):
            found = _knots_moved(data, calibration, start, iterations, bar.update)
        else:
            found = _polished(data, calibration.times, calibration.forced, start, ways, bar.update)[0]
    return start if found is start else ranks.from_first(found)


def _polished(
    data: Samples,
    grid: Tensor,
    forced: Sequence[int],
    given: Solver,
    ways: Sequence[Refinement],
    progress: Callable[[], object] = lambda: None,
) -> tuple[Solver, Tensor, Tensor]:
    """(the best of a solver and what is made of it, errors of the given one, errors of the best)."""
    before = own_errors(data, given)
    tried = [Candidate(given.name, given, before)]
    if torch.isfinite(before).all():
        tried += refine(data, [given], grid, forced=forced, refinements=ways, progress=progress)
    best = tried[choose(tried).best]
    if best.plan is given:
        return given, before, before
    errors = ("held_out", "samples", "error", "interval")  # which were the given solver's
    known = {k: v for k, v in given.notes.items() if k not in errors}
    notes = {"polish": [before.mean().item(), best.errors.mean().item()], "evaluations": data.evaluations}
    name = f"{given.name.removesuffix(POLISHED)}{POLISHED}"
    return replace(best.plan, name=name, notes=known | notes), before, best.errors


POLISHED = ", polished"


@no_grad
def polish_on(velocity: Velocity, solver: Solver, ends: Tensor, grid: Tensor, chunk: int | None) -> Solver:
    """What `polish` finds for a velocity, with a solver from noise to data; or that solver, unless its errors on the
    held-out samples are larger by more than a standard error: a few large ones make most of their mean.

    ends: the teacher's states at its beginning and its end, `[2, n, *shape]`, n >= 2. grid: the teacher's times.
    """
    n = ends.shape[1]
    teacher, start = Teacher(resolve(velocity).unfused(), n, chunk=chunk), (0, solver.times[0].item())
    data = Samples(teacher, ends, start, folds_of(n), grid[[0, -1]])
    found, before, after = _polished(data, grid, (), solver, [Refinement()])
    gain = before - after
    return found if gain.mean() > gain.std() / n**0.5 else solver


def _knots_moved(data: Samples, calibration: Calibration, given: Schedule, iterations: int, progress) -> Schedule:
    """The knots of a schedule by coordinate descent, or as they were where that is no better on held-out halves."""
    grid, forced = calibration.times, calibration.forced
    indices, errors = schedule_on_grid(calibration, given.steps, given).indices, own_errors(data, Solver.euler(given))
    held_out = torch.empty_like(errors)
    for mine, other in halves(data):
        part = data.in_order([*mine, *other])
        _, held_out[other] = descended(part, len(mine), grid, indices, forced, iterations, progress)
    found, _ = descended(data, data.n, grid, indices, forced, iterations, progress)
    if found == indices or not held_out.mean() < errors.mean():
        return given
    cost = sum(calibration.cost[j, k].item() for j, k in itertools.pairwise(found))
    whole = found[0] == 0 and given.steps in calibration
    even = calibration[given.steps].uniform_cost if whole else None
    return Schedule(grid[list(found)], grid, found, cost=cost, uniform_cost=even)
