"""`evaluate_sampler`: plans beside each other, and beside a teacher, data and an adaptive method."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from flowkernels._casts import no_grad
from flowkernels._checks import (
    FLOATS,
    describe,
    expect,
    expect_bool,
    expect_callable,
    expect_int,
    expect_list,
    expect_mapping,
    expect_noise,
    expect_positive_int,
    expect_real,
    expect_seed,
    expect_shown,
    expect_takes,
    expect_values,
)
from flowkernels.evaluation.adaptive import TOLERANCES, torchdiffeq
from flowkernels.evaluation.distances import Features
from flowkernels.evaluation.evaluation import Evaluation, EvaluationRow
from flowkernels.evaluation.features import expect_features, features_of
from flowkernels.evaluation.images import RANGE, expect_range
from flowkernels.evaluation.likelihood import log_likelihood
from flowkernels.evaluation.measure import (
    COLUMNS,
    ENDPOINT,
    ENERGY,
    FRECHET,
    LIKELIHOOD,
    RK45,
    STRAIGHTNESS,
    Measure,
    PairDistance,
    fewest,
)
from flowkernels.evaluation.plans import NamedPlans, Planned, Plans, calibration_of, planned
from flowkernels.evaluation.straightness import sampled
from flowkernels.sampling.teacher_solver import heun
from flowkernels.schedule import Schedule
from flowkernels.solver import Solver, expect_solver
from flowkernels.velocity.evaluate import warn_if_training
from flowkernels.velocity.protocol import Called, Velocity, VelocityBase, resolve, rows_of_samples
from flowkernels.velocity.provenance import warn_of_another_pipeline

DEFAULT = (ENDPOINT, STRAIGHTNESS, ENERGY)
MOST_POINTS = 10_000
TEACHER_STEPS = 50  # of Heun's method, where there is no calibration to say


@no_grad
def evaluate_sampler(
    velocity: Velocity,
    plans: Plans | NamedPlans,
    noise: Tensor,
    *,
    columns: Sequence[str] = DEFAULT,
    teacher: Velocity | Tensor | None = None,
    teacher_solver: Schedule | Solver | int | None = None,
    data: Tensor | None = None,
    features: Features | str | None = None,
    value_range: Sequence[float] = RANGE,
    distances: Mapping[str, PairDistance] | None = None,
    points: int = 4,
    tolerances: Sequence[float] = TOLERANCES,
    chunk: int | None = None,
    seed: int = 0,
    keep_samples: bool = False,
    progress: bool = False,
) -> Evaluation:
    """Samplers beside each other, on the same noise: how far from the teacher they end, how straight the flow is along
    their states, and how far their samples are from data or the teacher's.

    Args:
        velocity: any velocity, as for `sample`, with its guidance and conditioning.
        plans: a Schedule, a Solver, N for N uniform Euler steps, or a Calibration, of which all its numbers of steps
            count, each with `best`; a list of these; or a dict from names to any of them, in which `(student, plans)`
            stands for another velocity. `cal.schedules` and `cal.solvers` are taken too.
        noise: `[n, *shape]`, other than what a calibration was made or a student was trained on; the states at the
            first time of the plans.
        columns: some of
            "endpoint": the distance to the teacher's sample of the same noise.
            "straightness": of each interval [t_a, t_b] of a plan's knots, with its own states x_a, x_b there,
            `|(x_b - x_a) / (t_b - t_a) - v(x_u, t_u)|^2` at `x_u = x_a + u (x_b - x_a)`, `t_u = t_a + u (t_b - t_a)`,
            the mean over u and samples: 0 where one Euler step is exact. Not of solvers without states at their knots.
            "energy", "frechet": distances between the set of samples and `data`, or the teacher's samples.
            "rk45": rows of torchdiffeq's dopri5 with the velocity (not a student's), and of each plan with how many
            evaluations that ends as near to the teacher. Needs torchdiffeq.
            "likelihood": `log_likelihood(velocity, data)` of each velocity, with its defaults.
        teacher: the velocity that the teacher's samples are made with, by default `velocity`; or these samples
            themselves `[n, *shape]`, of the same noise.
        teacher_solver: its steps, as a plan. None: those of the calibration among the plans, else of Heun's method on
            50 uniform steps, 100 evaluations.
        data: samples of the data, `[m, *shape]`; None takes the teacher's for distances.
        features: what distances are taken in: a callable samples `[n, *shape]` -> `[n, d]`, such as an Inception
            network's pooled layer; or that of a package, "clean-fid" or "torch-fidelity", of images `[n, 1 or 3, H, W]`
            (each downloads its weights at its first use). None: the samples' own space.
        value_range: (low, high) of images' values, for packages' features.
        distances: further columns by name: callables (samples, teacher's samples) -> `[n]`, of which the mean over
            samples is taken, such as `lpips.LPIPS()`.
        points: of u in each interval, by the midpoint rule. Each takes an evaluation of every sample and interval.
        tolerances: of dopri5, relative and absolute alike.
        chunk: samples evaluated at once; None evaluates all. It changes nothing but rounding.
        seed: of what "likelihood" draws.
        keep_samples: keep them, on their device, in the rows and as `teacher_samples`.
        progress: show a progress bar.

    Returns:
        Evaluation. A plan whose samples are not finite has a row that says in which sample and step.

    Raises:
        TypeError, ValueError: naming the argument, before any work; for NaN or Inf of the teacher, sample and step.
        ImportError: naming the package that a column or the features need.

    Source: Liu, Gong and Liu, Flow Straight and Fast (2023), S(Z), here of each interval by itself; Szekely and Rizzo,
    Energy statistics (2013); Heusel et al., GANs trained by a two time-scale update rule (2017), of the Frechet
    distance; Dormand and Prince, A family of embedded Runge-Kutta formulae (1980). docs/evaluating.md.

    Examples:
        >>> velocity, noise = (lambda x, t: x * t[:, None] ** 4), torch.randn(64, 2)
        >>> cal = fk.calibrate(velocity, torch.randn(64, 2), 20, [2, 4], progress=False)
        >>> found = fk.evaluate_sampler(velocity, {"uniform": [2, 4], "calibrated": cal}, noise)
        >>> [(row.name, row.steps) for row in found.rows]
        [('uniform', 2), ('uniform', 4), ('calibrated', 2), ('calibrated', 4)]
        >>> print(found.report())  # doctest: +ELLIPSIS
        samples: 64 ...
    """
    known, rows = resolve(velocity), planned(plans)
    wanted, pairs, ends = _expect_columns(columns), _expect_pairs(distances), expect_range(value_range)
    expect_noise(noise)
    given = _expect_samples(teacher, noise) if isinstance(teacher, Tensor) else None
    of_teacher = known if teacher is None or given is not None else resolve(teacher, "teacher")
    called = {"velocity": known, "teacher": of_teacher} | {f"plans[{row.name!r}]": row.velocity for row in rows}
    for name, one in called.items():
        if isinstance(one, Called):
            expect_takes(one.function, name, "a callable velocity(x, t)", noise, None)
    solver = _teacher_solver(teacher_solver, plans, rows, given is not None)
    velocities = _by_name(known, rows)
    _expect_data(data, noise, wanted, velocities)
    if features is not None:
        expect_features(features, noise, "noise")
    points = expect_int(points, "points", f"an integer from 1 to {MOST_POINTS:,}", 1, MOST_POINTS)
    tolerances = _expect_tolerances(tolerances)
    chunk = None if chunk is None else expect_positive_int(chunk, "chunk")
    seed, progress, keep = (
        expect_seed(seed),
        expect_bool(progress, "progress"),
        expect_bool(keep_samples, "keep_samples"),
    )
    tolerances = tolerances if RK45 in wanted else []
    if tolerances:
        torchdiffeq()
    for one in [of_teacher, *velocities.values()]:
        warn_if_training(one, stacklevel=4)
    for row in rows:
        warn_of_another_pipeline(row.plan, (row.velocity or known).provenance, stacklevel=4)
    space = None if features is None else features_of(features, noise.device, ends)

    to_sets = data is None and {ENERGY, FRECHET} & wanted
    if given is None and ({ENDPOINT, RK45} & wanted or pairs or to_sets):
        given, _ = sampled(of_teacher, solver, noise, chunk=chunk)
    measure = Measure(known, noise, wanted, pairs, points, chunk, keep, space, given, data)
    found, of_likelihood = [], velocities if LIKELIHOOD in wanted else {}
    total = len(rows) + len(tolerances) + len(of_likelihood)
    with tqdm(total=total, desc="evaluate_sampler", disable=not progress, leave=False) as bar:
        for row in rows:
            found.append(measure.row(row))
            bar.update()
        for tolerance in tolerances:
            found.append(measure.adaptive_row(tolerance, solver.times[0].item()))
            bar.update()
        likelihoods = {}
        for name, one in of_likelihood.items():
            likelihoods[name] = log_likelihood(one, data, chunk=chunk, seed=seed)
            bar.update()
    adaptive = found[len(rows) :]
    found = [replace(row, rk45_evaluations=fewest(row, adaptive)) for row in found[: len(rows)]] + adaptive
    told = _settings(noise, teacher, solver, data, features, wanted, points)
    return Evaluation(tuple(found), told, likelihoods, given if keep else None)


def _expect_columns(given) -> set[str]:
    expected = f"some of {list(COLUMNS)}"
    expect_shown(not isinstance(given, str), "columns", expected, given, TypeError)
    found = expect_list(given, "columns", expected, ordered=False)
    for name in found:
        expect_shown(isinstance(name, str) and name in COLUMNS, "columns", expected, name)
    return set(found)


def _expect_pairs(given) -> dict[str, PairDistance]:
    pairs = {} if given is None else dict(expect_mapping(given, "distances", "a dict of callables by name"))
    taken = {f.name for f in fields(EvaluationRow)}
    for name, function in pairs.items():
        expect_callable(function, f"distances[{name!r}]", "a callable (samples, teacher's samples) -> [n]")
        expect(name not in taken, "distances", "names that are no figure's", repr(name))
    return pairs


def _expect_samples(given: Tensor, noise: Tensor) -> Tensor:
    expect_values(given, "teacher", FLOATS)
    fits = given.shape == noise.shape and given.device == noise.device
    expect(fits, "teacher", f"a velocity, or samples of the noise's shape {list(noise.shape)} beside it", given)
    return expect_noise(given, "teacher")


def _expect_data(data, noise: Tensor, wanted: set[str], velocities: Mapping[str, VelocityBase]) -> None:
    if data is not None:
        expect_noise(data, "data")
        expect(data.shape[1:] == noise.shape[1:], "data", f"samples of the noise's shape {list(noise.shape[1:])}", data)
    if LIKELIHOOD in wanted:
        expect(data is not None, "data", "samples of the data, for 'likelihood'", "None")
        alike = (data.dtype == torch.float64) == (noise.dtype == torch.float64)
        expect(alike, "data", f"the noise's dtype, {noise.dtype}, for 'likelihood'", data)
        own = [name for one in velocities.values() for name in rows_of_samples(one, len(noise))]
        way_out = "a velocity without conditioning for each sample, for 'likelihood' (fk.log_likelihood has the data's)"
        expect(not own, "velocity", way_out, f"one with {own}")
    for name, samples in (("noise", noise), ("data", data)):
        few = FRECHET in wanted and samples is not None and len(samples) < 2
        expect(not few, name, "at least 2 samples for 'frechet'", samples)


def _expect_tolerances(given) -> list[float]:
    steps = expect_list(given, "tolerances", "positive numbers")
    expect(len(steps) > 0, "tolerances", "at least one positive number", given)
    return sorted({expect_real(t, "tolerances", "positive numbers", lambda a: a > 0) for t in steps}, reverse=True)


def _teacher_solver(given, plans: Plans | NamedPlans, rows: list[Planned], known: bool) -> Solver:
    """The teacher's steps, checked against the plans' first times."""
    expect(given is None or not known, "teacher_solver", "None with the teacher's samples", given)
    if given is not None:
        solver = expect_solver(given, "teacher_solver")
        expect(solver.reaches_data, "teacher_solver", "a solver from noise to data", given)
    elif known:
        solver = rows[0].solver  # for its first time alone
    else:
        calibration = calibration_of(plans)
        start = rows[0].solver.times[0].item()
        fine = torch.linspace(start, 1, TEACHER_STEPS + 1, dtype=torch.float64, device="cpu")
        solver = heun(fine) if calibration is None else calibration.teacher_solver
    first = solver.times[0].item()
    for row in rows:
        own = row.solver.times[0].item()
        expect(abs(own - first) <= 1e-9, "plans", f"plans from one first time, {first:.6g}", f"one from {own:.6g}")
    return solver


def _by_name(known: VelocityBase, rows: list[Planned]) -> dict[str, VelocityBase]:
    """Each velocity once."""
    found, name = {}, "velocity"
    while any(row.name == name and row.velocity is not None for row in rows):
        name = f"{name} of all"
    for row in rows:
        one = row.velocity or known
        if all(one is not other for other in found.values()):
            found[name if row.velocity is None else row.name] = one
    return found


def _settings(noise, teacher, solver: Solver, data, features, wanted: set[str], points: int) -> dict[str, Any]:
    """What the figures are of, in words."""
    told: dict[str, Any] = {"samples": len(noise)}
    evaluated = f"{solver.name}, {solver.steps} steps, {solver.evaluations} evaluations"
    told["teacher"] = "samples as given" if isinstance(teacher, Tensor) else evaluated
    if {ENERGY, FRECHET} & wanted:
        told["distances_to"] = "the teacher's samples" if data is None else f"{len(data)} samples of the data"
        told["distances_in"] = "the samples' own space" if features is None else describe(features)
    if STRAIGHTNESS in wanted:
        told["points_of_straightness"] = f"{points} an interval"
    return told
