"""`fit_solver`: a solver fitted to a teacher in closed form, from one pass of evaluations."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from flowkernels._casts import no_grad
from flowkernels._checks import expect, expect_bool, expect_finite_flow, expect_positive_int, expect_real
from flowkernels._warnings import warn
from flowkernels.calibration.bellman import least_cost_schedules
from flowkernels.calibration.calibration import Calibration
from flowkernels.calibration.samples import Samples
from flowkernels.evaluation.endpoint import endpoint_error
from flowkernels.ops.linear_update import linear_update
from flowkernels.ops.velocity_gram import velocity_gram
from flowkernels.schedule import Schedule
from flowkernels.solver import Solver, adams_bashforth, polynomial_weights
from flowkernels.velocity.protocol import Velocity

RIDGES = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # from what the sums of the Gram matrix are good for
HELD_OUT = 0.25  # the part of the samples that decides
EULER, ADAMS, FITTED = "euler", "adams-bashforth 2", "fitted"


@no_grad
def fit_solver(
    velocity: Velocity,
    calibration: Calibration,
    steps: int,
    *,
    schedule: Schedule | Sequence[Schedule] | None = None,
    noise: Tensor | None = None,
    held_out: float = HELD_OUT,
    order: int | None = None,
    ridge: float | None = None,
    inverse: bool = False,
    teacher: Velocity | None = None,
    chunk: int | None = None,
) -> Solver:
    """The multistep solver whose states are, by least squares, the teacher's at the knots. No training.

    One pass of N evaluations: at every step the student's own velocities so far are fitted to the teacher's state at
    the next knot, and with these coefficients the samples go on. A part of them is held out. At each step it decides
    how many past velocities take part and how far the coefficients may leave those of Adams-Bashforth (the ridge); in
    the end it decides between the fit, Adams-Bashforth 2 and Euler on the same knots.

    Args:
        velocity: the teacher that the calibration was made with; with `teacher`, a student of it, such as
            `straighten` returns: the solver takes the student's velocities to the teacher's states.
        calibration: from `calibrate`, with the teacher's trajectories that it keeps.
        steps: N.
        schedule: the knots, a Schedule on the calibration's grid; None takes the calibration's own for N. One that
            begins later than the grid is fitted from the teacher's states at its first knot. Of several,
            such as `[cal.find(N, objective=o, velocity=velocity)[N] for o in ("squared", "norm", "endpoint")]`, a fit
            is made on each, and the one with the least error on the held-out samples is returned.
        noise: `[n, *shape]`, to roll the teacher out anew, which takes K more evaluations: for a calibration from a
            file, which keeps no trajectories.
        held_out: the part of the samples that decides and is not fitted.
        order: the most past velocities of a step; None tries up to all of them.
        ridge: how the departure from Adams-Bashforth is weighed, relative to the velocities' own size; None tries
            1e-7 to 1 and Adams-Bashforth itself.
        inverse: a solver from data to noise, fitted to the teacher's states in turn.
        teacher: what the calibration was made with, where `velocity` is another.
        chunk: samples evaluated at once; None evaluates all.

    Returns:
        Solver, of the best of the three methods on the held-out samples. Its notes: "held_out", the endpoint error of
        each (mean squared L2 distance to the teacher's endpoint), "samples" fitted and held out, "orders" and "ridges"
        of the steps, and "evaluations", how many were made for each sample on average.

    Raises:
        TypeError, ValueError: naming the argument. A UserWarning says where the fit is not the best and what is
            returned instead.

    Cost: N - 1 evaluations a sample, and 2 (N - 1) of each held-out sample; at an inverse solver N and 2 N. As many for
    each schedule. The first velocities are the calibration's where weights, attributes and conditioning are for certain
    those that it was made with (their hashes take about as long as reading them); else, as for a plain function, they
    are evaluated, once. Memory: N + 2 states of all samples.

    Source: docs/mathematics.md. The Gram matrix of velocity increments gives the normal equations of every step.

    Examples:
        >>> velocity, noise = (lambda x, t: x * t[:, None] ** 4), torch.randn(64, 2)
        >>> cal = fk.calibrate(velocity, noise, grid=20, steps=[2], progress=False)
        >>> solver = fk.fit_solver(velocity, cal, 2)
        >>> x1 = fk.sample(velocity, noise, solver)
    """
    several = isinstance(schedule, Sequence) and not isinstance(schedule, (str, bytes))
    expect(not several or len(schedule) > 0, "schedule", "at least one schedule", schedule)
    plans = [schedule_on_grid(calibration, steps, s) for s in (schedule if several else [schedule])]
    starts = sorted({plan.times[0].item() for plan in plans})
    expect(len(starts) == 1, "schedule", "schedules that begin at one time", f"beginnings at {starts}")
    held_out = expect_real(held_out, "held_out", "a part between 0 and 1", lambda a: 0 < a < 1)
    order = steps if order is None else min(expect_positive_int(order, "order"), steps)
    if ridge is not None:
        ridge = expect_real(ridge, "ridge", "a finite number of at least 0", lambda a: a >= 0)
    ridges = (*RIDGES, math.inf) if ridge is None else (max(ridge, RIDGES[0]),)
    inverse = expect_bool(inverse, "inverse")
    start = plans[0].indices[0]
    data = Samples.of(velocity, calibration, noise, chunk, start=start, teacher=teacher)
    return calibration.marked(_best_fit(data, held_out, plans, order, ridges, inverse))


def fit_solvers(velocity: Velocity, calibration: Calibration, steps: Iterable[int], chunk: int) -> dict[int, Solver]:
    """What `fit_solver` finds for numbers of steps, of the very velocity that the calibration was made with just now:
    its first velocities are the calibration's, whether it has hashes or not."""
    found = {}
    for N in steps:
        data = Samples.of(velocity, calibration, None, chunk, proven=True)
        found[N] = _best_fit(data, HELD_OUT, [schedule_on_grid(calibration, N)], N, (*RIDGES, math.inf), False)
    return found


def _best_fit(
    data: Samples, held_out: float, plans: list[Schedule], order: int, ridges: tuple[float, ...], inverse: bool
) -> Solver:
    """The best on the held-out samples of the fits on several schedules, and a warning where it is no fit."""
    places, fitted = held_out_last(data.n, held_out)
    data = data.in_order(places)
    found = [_fit(data, fitted, plan, order, ridges, inverse) for plan in plans]
    solver = min(found, key=lambda s: s.notes["held_out"][s.name])
    errors = solver.notes["held_out"]
    if solver.name != FITTED:
        warn(
            f"fit_solver: the fit for N = {solver.steps} is not better than {solver.name} on the "
            f"{data.n - fitted} held-out samples (endpoint error {errors[FITTED]:.4g}, "
            f"{errors[solver.name]:.4g}); returning {solver.name}",
            stacklevel=4,
        )
    samples = [fitted, data.n - fitted]
    return replace(solver, notes=solver.notes | {"samples": samples, "evaluations": data.evaluations})


def _fit(data: Samples, fitted: int, plan: Schedule, order: int, ridges: tuple[float, ...], inverse: bool) -> Solver:
    """The best of the three methods on these knots."""
    n = data.n
    indices, knots = plan.indices, plan.times
    if inverse:
        indices, knots = indices[::-1], knots.flip(0)
    goals = [data.state(i) for i in indices]
    x, N, h = goals[0], plan.steps, knots.diff().tolist()
    # increments of these rows: the first velocity, what velocities change by, and what Euler leaves to be explained
    rows = x.new_zeros(N + 2, *x.shape)
    coefficients, chosen = torch.zeros(N, N, dtype=torch.float64, device="cpu"), []
    for k in range(N):
        known = k == 0 and not inverse  # the teacher's own there
        rows[k + 1] = data.velocity_at_start() if known else data.teacher.at(x, knots[k].item())
        expect_finite_flow(rows[k + 1], [rows[k + 1]], knots[k:])
        torch.sub(goals[k + 1], x, out=rows[k + 2]).div_(h[k])
        grams = [velocity_gram(rows[: k + 3, part]).cpu() for part in (slice(fitted), slice(fitted, n))]
        orders = range(1, min(order, k + 1) + 1)
        tried = itertools.chain.from_iterable(_step(grams, knots[: k + 2], p, ridges) for p in orders)
        _, weights, p, r = min(tried, key=lambda found: found[0])
        chosen.append((p, None if r == math.inf else r))
        coefficients[k] = coefficients[k - 1] if k else 0
        coefficients[k, k - p + 1 : k + 1] += h[k] * weights
        x = linear_update(goals[0], list(rows[1 : k + 2]), coefficients[k, : k + 1].tolist())

    solvers = {
        EULER: Solver.euler(plan, inverse=inverse),
        ADAMS: adams_bashforth(plan, 2, inverse=inverse),
        FITTED: Solver(knots, knots[:-1], coefficients, FITTED),
    }
    errors = {FITTED: endpoint_error(x[fitted:], goals[-1][fitted:])}
    past = () if inverse else (data.velocity_at_start()[fitted:],)
    for name in (EULER, ADAMS):
        _, ends = data.teacher.run(solvers[name], goals[0][fitted:], past, fitted)
        errors[name] = endpoint_error(ends, goals[-1][fitted:])
    rounding = 1e-12 * endpoint_error(goals[-1], torch.zeros_like(goals[-1]))
    best = min((FITTED, ADAMS, EULER), key=lambda name: errors[name] + (name != FITTED) * rounding)
    orders, found_ridges = zip(*chosen, strict=True)
    notes = {"held_out": errors, "orders": list(orders), "ridges": list(found_ridges)}
    return replace(solvers[best], notes=notes)


def _step(
    grams: list[Tensor], knots: Tensor, p: int, ridges: Sequence[float]
) -> Iterator[tuple[float, Tensor, int, float]]:
    """(held-out squared error, weights [p] of the last p velocities, p, ridge) of the step to the last of the knots.

    grams: of the increments v_0, v_1 - v_0, ..., v_k - v_{k-1}, r - v_k, with r the velocity that would reach the
    teacher's state; of the samples that are fitted and of those held out.

    The unknowns are the departures from Adams-Bashforth of order min(p, 3) of the factors of v_k, v_k - v_{k-1}, ...:
    differences keep what velocities that nearly agree would cancel, and the ridge is relative to the size of each.
    """
    k = len(knots) - 2
    q = min(p, 3)
    adams = torch.zeros(p, dtype=torch.float64, device="cpu")
    adams[p - q :] = polynomial_weights(knots[k - q + 1 : k + 1], knots[k], knots[k + 1]) / (knots[k + 1] - knots[k])
    # rows of `basis` in increments: v_k, then v_m - v_{m-1} for m = k-p+2..k, then what Adams-Bashforth leaves
    basis = torch.zeros(p + 1, k + 2, dtype=torch.float64, device="cpu")
    basis[0, : k + 1] = 1
    basis[1:p, k - p + 2 : k + 1] = torch.eye(p - 1, dtype=torch.float64, device="cpu")
    basis[p, k + 1] = 1
    basis[p, k - p + 2 : k + 1] = adams[:-1].cumsum(0)
    (S, s, _), (held_S, held_s, rest) = ((t[:p, :p], t[:p, p], t[p, p]) for t in (basis @ g @ basis.T for g in grams))
    size = S.diagonal().sqrt()
    size = torch.where(size > 0, size, 1.0)  # no velocity, nothing to fit: it stays Adams-Bashforth
    S, s, eye = S / size / size[:, None], s / size, torch.eye(p, dtype=torch.float64, device="cpu")
    for ridge in ridges:
        change = torch.linalg.solve(S + ridge * eye, s) / size if ridge < math.inf else torch.zeros_like(size)
        error = rest - 2 * change @ held_s + change @ held_S @ change
        weights = adams.clone()
        weights[-1] += change[0]
        weights[1:] += change[1:]
        weights[:-1] -= change[1:]
        yield error.item(), weights, p, ridge


def held_out_last(n: int, part: float) -> tuple[list[int], int]:
    """The places of n >= 2 samples, those that are held out last, and how many are not.

    One in every so many is held out, of the first samples as of all, so that a polish holds out what a fit did.
    """
    held = [int((i + 1) * part) > int(i * part) for i in range(n)]
    held[-1] |= not any(held)
    held[0] &= not all(held)
    return sorted(range(n), key=held.__getitem__), n - sum(held)


def schedule_on_grid(calibration: Calibration, steps: int, schedule: Schedule | None = None) -> Schedule:
    """A schedule of N steps, on the calibration's grid; None takes its own, or else one of least cost."""
    expect(isinstance(calibration, Calibration), "calibration", "a Calibration", calibration, TypeError)
    K = len(calibration.times) - 1
    expect_positive_int(steps, "steps")
    expect(steps <= K, "steps", f"at most K = {K}, the steps of the grid", steps)
    if schedule is None:
        if steps in calibration:
            return calibration[steps]
        cost, times, forced = calibration.cost, calibration.times, calibration.forced_knots
        return least_cost_schedules(cost, times, steps, forced_knots=forced)[steps]
    expect(isinstance(schedule, Schedule), "schedule", "a Schedule", schedule, TypeError)
    expect(schedule.steps == steps, "schedule", f"a schedule of {steps} steps", schedule)
    indices = tuple(place_on_grid(calibration, t, "schedule", schedule) for t in schedule.times.tolist())
    times = calibration.times[list(indices)]
    expect(len(set(indices)) == len(indices), "schedule", "knots on the calibration's grid", schedule)
    calibration.expect_forced(times, "schedule")
    return Schedule(times, calibration.times, indices)


def place_on_grid(calibration: Calibration, t: float, name: str, given: Schedule | Solver) -> int:
    """Of a knot, in the calibration's grid."""
    expect(isinstance(calibration, Calibration), "calibration", "a Calibration", calibration, TypeError)
    distance, place = (calibration.times - t).abs().min(0)
    expect(bool(distance <= 1e-9), name, "knots on the calibration's grid", given)
    return int(place)
