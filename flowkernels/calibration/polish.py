"""`polish`: all coefficients of a solver by least squares on the endpoint, or the knots of a schedule."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from flowkernels._casts import no_grad
from flowkernels._checks import expect, expect_bool, expect_positive_int, expect_real
from flowkernels.calibration.calibration import Calibration
from flowkernels.calibration.fit import HELD_OUT, held_out_last, place_on_grid, schedule_on_grid
from flowkernels.calibration.samples import Samples, folds_of
from flowkernels.evaluation.endpoint import endpoint_error, endpoint_errors
from flowkernels.ops.linear_update import linear_update
from flowkernels.ops.velocity_gram import velocity_gram
from flowkernels.sampling.teacher import Teacher
from flowkernels.schedule import Schedule
from flowkernels.solver import Solver
from flowkernels.velocity.protocol import Velocity, resolve

ITERATIONS = 6  # of a polish, at most

Plan = TypeVar("Plan", Solver, Schedule)  # what is given is what comes back


@no_grad
def polish(
    velocity: Velocity,
    calibration: Calibration,
    start: Plan,
    *,
    samples: int = 512,
    iterations: int = ITERATIONS,
    held_out: float = HELD_OUT,
    noise: Tensor | None = None,
    teacher: Velocity | None = None,
    chunk: int | None = None,
    progress: bool = False,
) -> Plan:
    """Lower the endpoint error itself, from a solver or schedule that is good already. No gradients are taken.

    A Solver: all its coefficients and model times, by Levenberg and Marquardt's damped least squares on the endpoint's
    residuals, whose derivatives are finite differences. A Schedule: its knots, by coordinate descent on the grid with
    Euler steps. A part of the samples is held out and decides which iterate is returned.

    Args:
        velocity: the teacher that the calibration was made with; with `teacher`, a student of it.
        calibration: from `calibrate`, with the teacher's trajectories that it keeps.
        start: a Solver, of noise to data or back, or a Schedule on the calibration's grid. One whose times begin later
            than the grid is for the teacher's states at its first knot, which the grid must have. Forced knots of the
            calibration stay, and evaluations on their sides of these.
        samples: at most as many of those that the calibration keeps, held-out ones among them.
        iterations: at most as many.
        held_out: the part of the samples that decides.
        noise: `[n, *shape]`, to roll the teacher out anew: for a calibration from a file.
        teacher: what the calibration was made with, where `velocity` is another.
        chunk: samples evaluated at once; None evaluates all.
        progress: show a progress bar.

    Returns:
        What was given, with other numbers; as it was where nothing is better on the held-out samples. A Solver's notes
        tell the endpoint error before and after, "polish", and "evaluations", made for each sample on average.

    Cost: for a solver of M evaluations M (M+1)(M+2)/6 a fitted sample and iteration (120 for M = 8; a coefficient is
    tried from its evaluation on), and 1 to 6 M of each sample; a schedule of N steps takes up to some 8 N^2 a sample.
    Memory: a state of a chunk's samples for each coefficient and time, M (M+3) / 2, beside M of all samples.

    Source: arXiv 2403.01329 (Bespoke solvers) for the free coefficients and times; More, The Levenberg-Marquardt
    algorithm (1978), for the scaled damping.

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
    held_out = expect_real(held_out, "held_out", "a part between 0 and 1", lambda a: 0 < a < 1)
    expect_bool(progress, "progress")
    if isinstance(start, Schedule):
        place = schedule_on_grid(calibration, start.steps, start).indices[0]
    else:
        place = place_on_grid(calibration, start.times.min().item(), "start", start)
        calibration.expect_forced(start.times, "start")
    data = Samples.of(velocity, calibration, noise, chunk, most=samples, start=place, teacher=teacher)
    order, fitted = held_out_last(data.n, held_out)
    data = data.in_order(order)
    with tqdm(total=iterations, desc="polish", disable=not progress, leave=False) as bar:
        if isinstance(start, Schedule):
            return _descend(data, fitted, calibration, start, iterations, bar)
        return _least_squares(data, fitted, calibration.times, calibration.forced, start, iterations, bar)


DAMPING = 1e-3  # of the first step, in parts of the size of each unknown
DIFFERENCE = 0.02  # of coefficients and times, for derivatives: beyond the rounding of a network in bfloat16


@no_grad
def polish_on(velocity: Velocity, solver: Solver, ends: Tensor, grid: Tensor, chunk: int | None) -> Solver:
    """What `polish` finds for a velocity, with a solver from noise to data; or that solver, unless its errors on the
    held-out samples are larger by more than a standard error: a few large ones make most of their mean.

    ends: the teacher's states at its beginning and its end, `[2, n, *shape]`, n >= 2. grid: the teacher's times.
    """
    n = ends.shape[1]
    teacher = Teacher(resolve(velocity).unfused(), n, chunk=chunk)
    order, fitted = held_out_last(n, HELD_OUT)
    data = Samples(teacher, ends, (0, solver.times[0].item()), folds_of(n)).in_order(order)
    with tqdm(disable=True) as bar:
        found = _least_squares(data, fitted, grid, (), solver, ITERATIONS, bar)
    rest = [data.state(place)[fitted:] for place in (0, -1)]
    before, after = (endpoint_errors(data.teacher.run(s, rest[0], (), fitted)[1], rest[1]) for s in (solver, found))
    gain = before - after
    sure = len(gain) > 1 and gain.mean() > gain.std() / len(gain) ** 0.5
    return found if sure else solver


def _least_squares(
    data: Samples, fitted: int, grid: Tensor, forced: Sequence[int], solver: Solver, iterations: int, bar
) -> Solver:
    place, first = data.start
    begin, end = (data.state(i) for i in ((-1, place) if solver.is_inverse else (place, -1)))
    given = solver
    limits, by = _limits(grid.tolist(), forced, solver, first), DIFFERENCE * (1 - first)
    fit, rest = slice(fitted), slice(fitted, data.n)

    def errors(x):
        return endpoint_error(x[fit], end[fit]), endpoint_error(x[rest], end[rest])

    v, x = data.teacher.run(solver, begin)
    error, held = errors(x)
    best, before, damping = (held, solver), held, DAMPING
    for _ in range(iterations):
        parts = data.teacher.chunks(fitted)
        gram = sum(_jacobian_gram(data, solver, begin, end, v, part, limits, by) for part in parts)
        S, s = gram[:-1, :-1], gram[:-1, -1]
        if not torch.isfinite(gram).all():  # beside the teacher's times the velocity may not be defined
            break
        size = torch.where(S.diagonal() > 0, S.diagonal().sqrt(), 1.0)
        S, s, eye = S / size / size[:, None], s / size, torch.eye(len(s), dtype=torch.float64, device="cpu")
        for _ in range(6):
            tried = _moved(solver, torch.linalg.solve(S + damping * eye, s) / size, limits)
            tried_v, tried_x = data.teacher.run(tried, begin)
            found = errors(tried_x)
            if found[0] < error:  # NaN is not
                break
            damping = max(10 * damping, 1e-4)
        else:
            break
        gain = 1 - found[0] / error
        solver, v, (error, held), damping = tried, tried_v, found, max(damping / 5, 1e-6)
        best = min(best, (held, solver), key=lambda b: b[0])
        bar.update()
        if gain < 3e-3:
            break
    if best[1] is given:
        return given
    known = {k: v for k, v in given.notes.items() if k != "held_out"}  # which were the given solver's errors
    notes = {"polish": [before, best[0]], "evaluations": data.evaluations}
    return replace(best[1], name=f"{given.name.removesuffix(POLISHED)}{POLISHED}", notes=known | notes)


POLISHED = ", polished"


def _places(M: int) -> list[tuple[int, int | None]]:
    """What a solver of M evaluations can change, in order: of each its time (i, None), and its coefficients (i, l)."""
    return [(i, where) for i in range(M) for where in (None, *range(i + 1))]


def _limits(grid: list[float], forced: Sequence[int], solver: Solver, first: float) -> list[tuple[float, float]]:
    """Between which times each evaluation stays: where the teacher was evaluated, on its side of every forced knot."""
    t = solver.model_times.tolist()
    found = []
    for now in t:
        low = max([min(first, *t), *(grid[f] for f in forced if grid[f] <= now)])
        high = min([max(grid[-2], *t), *(max(grid[f - 1], now) for f in forced if grid[f] > now)])
        found.append((low, high))
    return found


def _difference(t: float, low: float, high: float, by: float) -> float:
    """By how much a time is changed for a derivative: up, or down where there is more room; 0 where there is none."""
    up, down = high - t, t - low
    step = min(by, up) if up >= by or up >= down else -min(by, down)
    return step if abs(step) > by / 16 else 0.0


def _moved(solver: Solver, by: Tensor, limits: list[tuple[float, float]]) -> Solver:
    t, b = solver.model_times.clone(), solver.coefficients.clone()
    for (i, where), change in zip(_places(len(t)), by.tolist(), strict=True):
        if where is None:
            t[i] = min(max(t[i].item() + change, limits[i][0]), limits[i][1])
        else:
            b[i, where] += change
    return replace(solver, model_times=t, coefficients=b)


def _jacobian_gram(
    data, solver: Solver, begin, end, v: list[Tensor], part: slice, limits: list[tuple[float, float]], size: float
) -> Tensor:
    """The Gram matrix of the endpoint's derivatives and of its residual, over the samples `part`. size: of what
    coefficients and times are changed by for them."""
    start, M, places = begin[part], solver.evaluations, _places(solver.evaluations)
    v = [t[part] for t in v]
    x = linear_update(start, v, solver.coefficients[-1].tolist(), scale=solver.start_coefficients[-1].item())
    rows = start.new_zeros(len(places) + 2, *start.shape)  # their sums, whose increments `velocity_gram` multiplies
    for row, (i, where) in enumerate(places):
        if i == M - 1 and where is not None:
            derivative = v[where]
        elif (step := size if where is not None else _difference(solver.model_times[i].item(), *limits[i], size)) == 0:
            derivative = torch.zeros_like(start)
        else:
            by = torch.zeros(len(places), dtype=torch.float64, device="cpu")
            by[row] = step
            past = v[:i] if where is None else v[: i + 1]
            _, moved = data.teacher.run(_moved(solver, by, limits), start, past, part.start or 0)
            derivative = moved.sub_(x).div_(step)
        torch.add(rows[row], derivative, out=rows[row + 1])
    torch.sub(end[part], x, out=rows[-1]).add_(rows[-2])
    return velocity_gram(rows).cpu()


def _descend(data: Samples, fitted: int, calibration: Calibration, given: Schedule, iterations: int, bar) -> Schedule:
    begin, end, grid = data.state(data.start[0]), data.state(-1), calibration.times
    plan, fit, K = schedule_on_grid(calibration, given.steps, given), slice(fitted), len(grid) - 1
    rounding = 1e-12 * endpoint_error(end, torch.zeros_like(end))

    def at(indices) -> Schedule:
        return Schedule(grid[list(indices)], grid, tuple(indices))

    def tried(indices, part: slice, past=()):
        v, x = data.teacher.run(Solver.euler(at(indices)), begin[part], past, part.start or 0)
        return v, endpoint_error(x, end[part])

    indices = list(plan.indices)
    free = [i for i in range(1, plan.steps) if indices[i] not in calibration.forced]
    v, error = tried(indices, fit)
    step = max(1, K // 12)
    for _ in range(iterations):
        better = False
        for i in free:
            for move in (step, -step):
                other = [*indices[:i], indices[i] + move, *indices[i + 1 :]]
                if not other[i - 1] < other[i] < other[i + 1]:
                    continue
                found_v, found = tried(other, fit, [t[fit] for t in v[:i]])
                if found < error - rounding:
                    indices, v, error, better = other, found_v, found, True
                    break
        bar.update()
        if not better:
            if step == 1:
                break
            step = max(1, step // 2)
    rest = slice(fitted, data.n)
    if tuple(indices) == plan.indices or tried(indices, rest)[1] >= tried(plan.indices, rest)[1]:
        return given
    pairs = list(itertools.pairwise(indices))
    cost = sum(calibration.cost[j, k].item() for j, k in pairs)
    whole = indices[0] == 0 and plan.steps in calibration
    even = calibration[plan.steps].uniform_cost if whole else None
    return replace(at(indices), cost=cost, uniform_cost=even)
