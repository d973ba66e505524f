"""`fit_solver`: a solver fitted to a teacher in closed form, from one pass of evaluations."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from flowkernels._checks import expect, expect_bool, expect_int, expect_positive_int, expect_real
from flowkernels._warnings import warn
from flowkernels.calibration.agreed import expect_agreed_fit
from flowkernels.calibration.bellman import least_cost_schedules
from flowkernels.calibration.calibration import Calibration
from flowkernels.calibration.samples import FOLDS, Samples
from flowkernels.calibration.selection import Candidate, choose
from flowkernels.calibration.stepwise import fit_steps
from flowkernels.evaluation.bootstrap import mean_interval
from flowkernels.runtime.ranks import Group, by_ranks, ranks_of
from flowkernels.schedule import Schedule
from flowkernels.solver import Solver, adams_bashforth
from flowkernels.velocity.protocol import Velocity

RIDGES = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # from what the sums of the Gram matrix are good for
EULER, ADAMS, FITTED = "euler", "adams-bashforth 2", "fitted"


@by_ranks
def fit_solver(
    velocity: Velocity,
    calibration: Calibration,
    steps: int,
    *,
    schedule: Schedule | Sequence[Schedule] | None = None,
    noise: Tensor | None = None,
    folds: int = FOLDS,
    order: int | None = None,
    ridge: float | None = None,
    free_start: bool | None = None,
    inverse: bool = False,
    teacher: Velocity | None = None,
    chunk: int | None = None,
    group: Group | None = None,
) -> Solver:
    """The multistep solver whose states are, by least squares, the teacher's at the knots. No training.

    One pass of N evaluations: at every step the student's own velocities so far, and perhaps x_0, are fitted to the
    teacher's state at the next knot, and with these coefficients the samples go on. How many past velocities take part,
    how far the coefficients may leave those of Adams-Bashforth (the ridge), and whether that of x_0 is free are chosen
    at each step by cross-validation, which takes no evaluation: Gram matrices of folds add. In the end it decides
    between the fit, Adams-Bashforth 2 and Euler on the same knots.

    Args:
        velocity: the teacher that the calibration was made with; with `teacher`, a student of it, such as
            `straighten` returns: the solver takes the student's velocities to the teacher's states.
        calibration: from `calibrate`, with the teacher's trajectories that it keeps.
        steps: N.
        schedule: the knots, a Schedule; None takes the calibration's own for N. Its first knot is one of the
            calibration's grid, where a fit begins at the teacher's states. Between two knots of the grid the teacher's
            state is on the line through theirs, so that `Schedule.uniform(N)` may have any N. Of several, such as
            `[cal.find(N, objective=o, velocity=velocity)[N] for o in ("squared", "norm", "endpoint")]`, a fit
            is made on each, and the best of them is returned.
        noise: `[n, *shape]`, to roll the teacher out anew, which takes its evaluations again: for a calibration from a
            file, which keeps no trajectories.
        folds: of the cross-validation, at least 2; the i-th sample's is i modulo `folds`.
        order: the most past velocities of a step; None tries up to all of them.
        ridge: how the departure from Adams-Bashforth is weighed, relative to the velocities' own size; None tries
            1e-7 to 1 and Adams-Bashforth itself.
        free_start: whether the coefficients of x_0 are fitted too; False leaves them at 1, None tries both.
        inverse: a solver from data to noise, fitted to the teacher's states in turn.
        teacher: what the calibration was made with, where `velocity` is another.
        chunk: samples evaluated at once; None evaluates all.
        group: a `torch.distributed.ProcessGroup` whose processes all make this call, each evaluating its part of the
            samples: `calibrate`.

    Returns:
        Solver, the best of the three methods. Its notes: "held_out", the endpoint error of each (mean squared L2
        distance to the teacher's endpoint) on the samples that all three were run on, the fit's by coefficients fitted
        without a sample's fold; "samples", how many were fitted and how many that were; "error" and "interval", of the
        solver on all samples and of 95 %; "orders" and "ridges" of the steps; and "evaluations", how many were made
        for each sample on average.

    Raises:
        TypeError, ValueError: naming the argument. A UserWarning says where the fit is not the best and what is
            returned instead.

    Cost: 2N evaluations a sample at most, of which N - 1 fit and the others run Euler and Adams-Bashforth 2 on as many
    samples as they are enough for, half of them or more; for each further schedule N. The first velocities are the
    calibration's where weights, attributes and conditioning are for certain
    those that it was made with (their hashes take about as long as reading them); else, as for a plain function, they
    are evaluated, once. Memory: N + 3 states of all samples.

    Source: docs/mathematics.md. The Gram matrix of velocity increments gives the normal equations of every step.

    Examples:
        >>> velocity, noise = (lambda x, t: x * t[:, None] ** 4), torch.randn(64, 2)
        >>> cal = fk.calibrate(velocity, noise, grid=20, steps=[2], progress=False)
        >>> solver = fk.fit_solver(velocity, cal, 2)
        >>> x1 = fk.sample(velocity, noise, solver)
    """
    several = isinstance(schedule, Sequence) and not isinstance(schedule, (str, bytes))
    expect(not several or len(schedule) > 0, "schedule", "at least one schedule", schedule)
    plans = [schedule_on_grid(calibration, steps, s, between=True) for s in (schedule if several else [schedule])]
    starts = sorted({plan.times[0].item() for plan in plans})
    expect(len(starts) == 1, "schedule", "schedules that begin at one time", f"beginnings at {starts}")
    folds = expect_int(folds, "folds", "an integer of at least 2", 2)
    order = None if order is None else expect_positive_int(order, "order")
    if ridge is not None:
        ridge = expect_real(ridge, "ridge", "a finite number of at least 0", lambda a: a >= 0)
    free_start = None if free_start is None else expect_bool(free_start, "free_start")
    inverse = expect_bool(inverse, "inverse")
    place = place_on_grid(calibration, starts[0], "schedule", plans[0])
    ranks = ranks_of(group)
    settings = dict(steps=steps, schedule=plans, folds=folds, order=order, ridge=ridge, free_start=free_start)
    expect_agreed_fit(ranks, velocity, calibration, noise, chunk, teacher, inverse=inverse, **settings)
    data = Samples.of(velocity, calibration, noise, chunk, folds=folds, start=place, teacher=teacher, ranks=ranks)
    return calibration.marked(ranks.from_first(_best_fit(data, plans, order, ridge, free_start, inverse)))


WAYS = {"": (False,), ", free start": (False, True)}  # of fits: whether x_0's coefficient is free, to choose from


def fit_candidates(
    data: Samples,
    plans: Mapping[str, Schedule | Solver],
    *,
    order: int | None = None,
    ridge: float | None = None,
    inverse: bool = False,
    ways: Mapping[str, Sequence[bool]] = WAYS,
) -> list[Candidate]:
    """The fits on the knots of several plans, which begin where the data does, with errors of cross-validation.

    order, ridge: as `fit_solver` has them. ways: of fits on the same knots, by what is added to their names.
    """
    ridges, found = (*RIDGES, math.inf) if ridge is None else (max(ridge, RIDGES[0]),), []
    for name, plan in plans.items():
        knots = plan.times.sort().values
        begins = abs(knots[0].item() - data.start[1]) <= 1e-9
        expect(begins, "plans", f"plans that begin at {data.start[1]:g}, as the samples do", plan)
        knots, most = knots.flip(0) if inverse else knots, len(knots) - 1
        for added, free_start in ways.items():
            begun, made = time.perf_counter(), data.evaluations
            fit = fit_steps(data, knots, min(order or most, most), ridges, free_start, FITTED)
            taken = data.evaluations - made, time.perf_counter() - begun
            found.append(Candidate(f"{name}, {FITTED}{added}", fit.solver, fit.errors, *taken))
    return found


def _best_fit(
    data: Samples,
    plans: list[Schedule],
    order: int | None,
    ridge: float | None,
    free_start: bool | None,
    inverse: bool,
) -> Solver:
    """The best of the fits on several schedules and of the methods on its knots, and a warning where it is no fit."""
    allowed = data.teacher.evaluations + 2 * plans[0].steps * data.n * len(plans)
    ways = {"": (False, True) if free_start is None else (free_start,)}
    named = {str(i): plan for i, plan in enumerate(plans)}
    fits = fit_candidates(data, named, order=order, ridge=ridge, inverse=inverse, ways=ways)
    best = choose(fits).best
    plan, fit = plans[best], fits[best]
    methods = {ADAMS: adams_bashforth(plan, 2, inverse=inverse), EULER: Solver.euler(plan, inverse=inverse)}
    each = data.n if plan.steps == 1 else (allowed - data.teacher.evaluations) // (2 * (plan.steps - 1))
    places = torch.arange(m := min(data.n, max(2, each)), device="cpu") * data.n // m
    some = data.in_order(places)
    start, end = (some.state_at(t) for t in fit.plan.times[[0, -1]].tolist())
    tried = [replace(fit, name=FITTED, errors=fit.errors[places])]
    for name, solver in methods.items():
        tried.append(Candidate(name, solver, some.errors_of(solver, start, end, [some.velocity_at_start(inverse)])))
    data.teacher.evaluations = some.teacher.evaluations
    rounding = 1e-12 * end.double().square().flatten(1).sum(1).mean().item()  # below it a fit is as good as any
    found = tried[choose([replace(c, errors=c.errors.clamp_min(rounding)) for c in tried]).best]
    errors = {c.name: c.errors.mean().item() for c in tried}
    if found.name != FITTED:
        warn(
            f"fit_solver: the fit for N = {plan.steps} is not better than {found.name} on {m} samples that were not "
            f"fitted (endpoint error {errors[FITTED]:.4g}, {errors[found.name]:.4g}); returning {found.name}",
            stacklevel=4,
        )
    of = fit.errors if found.name == FITTED else found.errors
    interval = mean_interval(of)
    notes = {"held_out": errors, "samples": [data.n, m], "error": of.mean().item(), "interval": list(interval)}
    return replace(found.plan, notes=fit.plan.notes | notes | {"evaluations": data.evaluations})


def schedule_on_grid(
    calibration: Calibration,
    steps: int,
    schedule: Schedule | None = None,
    between: bool = False,
    name: str = "schedule",
) -> Schedule:
    """A schedule of N steps, on the calibration's grid; None takes its own, or else one of least cost.

    between: whether those after the first may be between knots of the grid, on which the schedule then is not. name: of
    the argument that the schedule is.
    """
    expect(isinstance(calibration, Calibration), "calibration", "a Calibration", calibration, TypeError)
    K = len(calibration.times) - 1
    expect_positive_int(steps, "steps")
    expect(steps <= K, "steps", f"at most K = {K}, the steps of the grid", steps)
    if schedule is None:
        if steps in calibration:
            return calibration[steps]
        cost, times, forced = calibration.cost, calibration.times, calibration.forced_knots
        return least_cost_schedules(cost, times, steps, forced_knots=forced)[steps]
    expect(isinstance(schedule, Schedule), name, "a Schedule", schedule, TypeError)
    expect(schedule.steps == steps, name, f"a schedule of {steps} steps", schedule)
    if between and bool(((calibration.times - schedule.times[:, None]).abs().min(1).values > 1e-9).any()):
        place_on_grid(calibration, schedule.times[0].item(), name, schedule)
        calibration.expect_forced(schedule.times, name)
        return Schedule(schedule.times)
    indices = tuple(place_on_grid(calibration, t, name, schedule) for t in schedule.times.tolist())
    times = calibration.times[list(indices)]
    expect(len(set(indices)) == len(indices), name, "knots on the calibration's grid", schedule)
    calibration.expect_forced(times, name)
    return Schedule(times, calibration.times, indices)


def place_on_grid(calibration: Calibration, t: float, name: str, given: Schedule | Solver) -> int:
    """Of a knot, in the calibration's grid."""
    expect(isinstance(calibration, Calibration), "calibration", "a Calibration", calibration, TypeError)
    distance, place = (calibration.times - t).abs().min(0)
    expect(bool(distance <= 1e-9), name, "knots on the calibration's grid", given)
    return int(place)
