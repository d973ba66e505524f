"""Objectives of `Calibration.find`: what is least along the steps of a schedule or a solver.

To add one, write a function here:

1. `@objective def NAME(cal, steps, *, ...)`; its name is what `find(steps, objective="NAME")` takes. cal: a `Measured`,
   whose attributes are all there is to make it from. steps: the numbers of steps, rising. After them come the options
   that `find` hands through, with their defaults, each with its row in tests/_bad_calls.py (`options`); `velocity`,
   without one, for an objective that evaluates the teacher. A name that is taken, or a builtin's, is refused.
2. A docstring that says what is least, its options, its evaluations of each sample, and its source.
3. A table of costs `[K+1, K+1]`, entry [j, k] being that of the step from knot j to knot k, which
   `least_cost_schedules` makes schedules of, given `cal.forced_knots`, with `cost` and `uniform_cost`, the sums along
   each and along the uniform one; or a recursion of its own, on costs `without_spans`, whose paths `path_of` reads,
   with its own least value as `cost` and the same of the uniform path as `uniform_cost`, None where that takes
   evaluations that the recursion does not make (`student`). `find` refuses what lacks a forced knot.
4. The result {N: Schedule}, with `notes` that say the objective, its evaluations and its options (`_noted`); or
   {N: Solver}, whose notes say these, and `indices`, `cost` and `uniform_cost` too, which a Schedule has as its own.
5. Where it can be least for single samples too: a keyword `groups`, of `find(each=)`, and SampleSchedules for it.
6. Its name in `find`'s docstring, its formula in docs/mathematics.md, and a test in tests/test_objectives.py against
   all paths of a small grid.

In the docstrings e is the error of a step from a teacher's knot, `e_jk = x_k - x_j - (t_k - t_j) v_j`. Evaluations are
further ones of each of the `samples`, of which there are at most those kept.
"""

import builtins
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from flowkernels._checks import expect, expect_float64, expect_positive_int, expect_shown
from flowkernels._warnings import warn
from flowkernels.calibration.bellman import least_cost_schedules, path_of, without_spans
from flowkernels.calibration.each import Groups, all_of, costs_of_each, least_cost_of_each
from flowkernels.calibration.gits_costs import absolute_costs, deviation_costs
from flowkernels.calibration.measured import Measured
from flowkernels.calibration.pair_costs import pair_costs
from flowkernels.calibration.step_cost import StepCost
from flowkernels.ops.bellman_pairs import bellman_pairs
from flowkernels.sampling.sample_schedules import SampleSchedules
from flowkernels.sampling.teacher import Teacher, velocity_at
from flowkernels.schedule import Schedule, uniform_indices
from flowkernels.solver import Solver, adams_bashforth
from flowkernels.velocity.identity import warn_if_another
from flowkernels.velocity.protocol import Velocity, resolve

CANDIDATES = (0.0, 1 / 64, 1 / 32, 3 / 64, 3 / 32, 3 / 16)  # model times, in parts of what is left to t = 1

WORSE = 2.0  # times the cost of Euler's steps, beyond which "pairs" warns
ON_GRID = 1e-9  # of a time from a knot, as for forced knots

OBJECTIVES: dict[str, Callable] = {}


def objective(make: Callable) -> Callable:
    """Let `Calibration.find` know of it; ValueError for a name that would hide what others here call by it."""
    name = make.__name__
    free = not hasattr(builtins, name) and name not in make.__globals__ and name not in OBJECTIVES
    expect(free, "objective", "a name that is neither taken in its module nor a builtin", name)
    OBJECTIVES[name] = make
    return make


@objective
def squared(
    cal: Measured, steps: list[int], *, groups: Groups | None = None
) -> dict[int, Schedule] | dict[int, SampleSchedules]:
    """Least sum of E|e|^2. No evaluations.

    Source: BOSS (arXiv 2312.16414). Against its authors' code (github.com/nguyenngocbaocmt02/BOSS, commit 0c170f9):
    the same costs and paths, by an Euler teacher on a uniform grid there. Of paths of equal cost it takes others.
    """
    plans = least_cost_schedules(cal.cost, cal.times, steps, forced_knots=cal.forced_knots)
    if groups is not None:
        return least_cost_of_each(cal, steps, groups, costs_of_each(cal, groups), plans, "squared")
    return plans if cal.sample_costs is None else cal.sample_costs.with_intervals(plans)


@objective
def norm(
    cal: Measured, steps: list[int], *, groups: Groups | None = None
) -> dict[int, Schedule] | dict[int, SampleSchedules]:
    """Least sum of E|e|. No evaluations. BOSS's with the root of every sample's square, as "gits" of metric "l2" has it
    with a gamma of 1."""
    plans = _of_norms(cal, steps, "norm", 1.0)
    if groups is not None:
        return least_cost_of_each(cal, steps, groups, costs_of_each(cal, groups, norm=True), plans, "norm")
    return _noted(plans, "norm", 0)


@objective
def uniform(cal: Measured, steps: list[int]) -> dict[int, Schedule]:
    """Least longest step: N equal ones, with forced knots as equal as these let them be. No evaluations.

    On the grid where all its knots are, as of a uniform grid where N divides K, with the cost of BOSS's objective; else
    on no grid, as `Calibration.uniform`, and without one.
    """
    found = {}
    for n in steps:
        plan = Schedule.uniform(n, max(0.0, cal.times[0].item()), cal.forced_knots)
        away, places = (cal.times - plan.times[:, None]).abs().min(1)
        if away.max() <= ON_GRID:
            path = tuple(places.tolist())
            cost = sum(cal.cost[step].item() for step in itertools.pairwise(path))
            plan = Schedule(cal.times[places], cal.times, path, cost, cost)
        found[n] = plan
    return _noted(found, "uniform", 0)


@objective
def gits(cal: Measured, steps: list[int], *, metric: str = "dev", gamma: float = 1.15) -> dict[int, Schedule]:
    """Least sum of `gamma^i c_i`, i counting the steps. No evaluations.

    metric: what a step costs. "dev": by how much further its end is from the line between the noise and the teacher's
    sample than the teacher's own state at that knot, in the mean; below 0 where it is nearer. "l2": E|e|. "l1": the
    same in the sum over features of |e|. "dev" and "l1" need kept samples, of which at most 512 are used; "l2" is in a
    calibration's file.

    Source: GITS (On the Trajectory Regularity of ODE-based Diffusion Sampling, arXiv 2405.11326), whose recursion from
    the data end is `V[j][s] = min_i c_ji + gamma V[i][s-1]`. Against its authors' code
    (github.com/zju-pi/diff-sampler, commit 68d5ce4), whose defaults these are. There x is the variance-exploding path's
    of times sigma, of iPNDM's steps by default; here the flow's own of times t. Its analytical first step is left out.
    """
    known = ("dev", "l1", "l2")
    expect(isinstance(metric, str) and metric in known, "metric", f"one of {list(known)}", metric)
    if metric == "l2":
        plans = _of_norms(cal, steps, "gits", gamma)
    else:
        of = f"a calibration that keeps samples, for 'gits' with metric={metric!r} (metric='l2' does without)"
        expect(cal.kept is not None, "objective", of, "one of none")
        singles = cal.single_costs
        x, v = cal.kept.x[:, : singles.count], cal.kept.v[:, : singles.count]
        cost = deviation_costs(singles, x, v) if metric == "dev" else absolute_costs(x, v, cal.times, cal.secants)
        plans = least_cost_schedules(cost, cal.times, steps, gamma=gamma, forced_knots=cal.forced_knots)
    return _noted(plans, "gits", 0, metric=metric, gamma=gamma)


def _of_norms(cal: Measured, steps: list[int], name: str, gamma: float) -> dict[int, Schedule]:
    cost = cal.norm_cost
    expect(cost is not None, "objective", f"a calibration that keeps samples, for {name!r}", "one of none")
    plans = least_cost_schedules(cost, cal.times, steps, gamma=gamma, forced_knots=cal.forced_knots)
    has_intervals = gamma == 1 and cal.single_costs is not None
    return cal.single_costs.with_intervals(plans, norm=True) if has_intervals else plans


def _noted(plans: dict[int, Schedule], name: str, evaluations: int, **notes) -> dict[int, Schedule]:
    """With where they come from; evaluations: further ones, of each sample that they are made on."""
    notes = {"objective": name, "evaluations": evaluations, **notes}
    return {n: replace(schedule, notes=notes) for n, schedule in plans.items()}


def _samples(
    cal: Measured, velocity: Velocity | None, objective: str, samples: int, chunk: int | None
) -> tuple[Tensor, Tensor, Teacher]:
    """The states and velocities `[K+1, n, *shape]`, `[K, n, *shape]` of the first samples that a calibration keeps, and
    the teacher to evaluate on them."""
    expect(velocity is not None, "velocity", f"the teacher, for objective {objective!r}", "None")
    velocity = resolve(velocity).unfused()
    expect(cal.kept is not None, "objective", f"a calibration that keeps samples, for {objective!r}", "one of none")
    warn_if_another(velocity, cal.provenance, stacklevel=6)
    n = min(expect_positive_int(samples, "samples"), cal.kept.x.shape[1])
    chunk = None if chunk is None else expect_positive_int(chunk, "chunk")
    total = cal.provenance.get("n_given", cal.provenance["n"])
    return cal.kept.x[:, :n], cal.kept.v[:, :n], Teacher(velocity, total, chunk=chunk, ranks=cal.ranks)


def _evaluations_of_each(teacher: Teacher, x: Tensor) -> int:
    """A teacher's evaluations for each sample, those with it that `at_times` looks with."""
    return -(-teacher.evaluations // x.shape[1])


@torch.inference_mode(False)  # which enables gradients too
def _pulled(teacher: Teacher, x: Tensor, t: float, y: Tensor, h: float, first: int) -> Tensor:
    """`(1 + h dv/dx)^T y` at x, the states of the samples from `first` on, for each of the cotangents y
    `[probes, n, *shape]`."""
    found = y.clone()
    for rows, field in teacher.parts(len(x), first):
        here = x[rows].detach().clone().requires_grad_()
        try:
            v = velocity_at(field, here, t)
            grads = v.requires_grad and v.grad_fn is not None
        except RuntimeError as e:
            raise ValueError(f"velocity: expected one with gradients, for objective 'endpoint', got {e}") from e
        expect(grads, "velocity", "one with gradients, for objective 'endpoint'", "one without (torch.no_grad?)")
        for i, cotangent in enumerate(y[:, rows]):
            more = i + 1 < len(y)
            cotangent = cotangent.to(v.dtype)
            (grad,) = torch.autograd.grad(v, here, cotangent, retain_graph=more, allow_unused=True)
            if grad is not None:
                found[i, rows] += h * grad
    return found


@objective
def endpoint(
    cal: Measured,
    steps: list[int],
    *,
    velocity: Velocity | None,
    samples: int = 64,
    chunk: int | None = None,
    probes: int = 2,
) -> dict[int, Schedule]:
    """Least sum of `E|(d x_K / d x_k) e|^2`, each error as the teacher's flow carries it to t = 1, to first order.

    It is estimated with `probes` random signs, pulled back by Euler's steps at the teacher's states, which are its own
    where these are: (1 + 2 probes)(K - 1) evaluations, a vector-Jacobian product counted as two. The velocity must have
    gradients.
    """
    expect_positive_int(probes, "probes")
    x, v, teacher = _samples(cal, velocity, "endpoint", samples, chunk)
    K, n = len(cal.times) - 1, x.shape[1]
    draw = torch.Generator("cpu").manual_seed(0)
    y = torch.randint(2, (probes, *x[0].shape), generator=draw, device="cpu").to(x) * 2 - 1
    mine = cal.ranks.part(n)  # of several ranks each goes through its own samples
    sums = cal.ranks.total(
        cal.ranks.tried(lambda: _pulled_errors(cal, teacher, x[:, mine], v[:, mine], y[:, mine], mine.start))
    )
    plans = least_cost_schedules((sums / (probes * n)).cpu(), cal.times, steps, forced_knots=cal.forced_knots)
    return _noted(plans, "endpoint", (1 + 2 * probes) * (K - 1), samples=n, probes=probes)


def _pulled_errors(cal: Measured, teacher: Teacher, x: Tensor, v: Tensor, y: Tensor, first: int) -> Tensor:
    """Sums over samples and probes y `[probes, n, *shape]` of the squared error of a step, pulled back to its end."""
    K, h, t = len(cal.times) - 1, cal.times.diff().tolist(), cal.times[:-1].tolist()
    probes, n = y.shape[:2]
    times = cal.times.to(x.device)
    u, off = v.to(x.dtype), None
    if cal.secants:  # the increments are theirs, and e_j = u_j - v_j is in every step from j
        u = x.diff(dim=0) / times.diff().to(x.dtype).view(-1, *[1] * (x.dim() - 1))
        off = u - v
    a = u.diff(dim=0)
    inner = torch.zeros(K + 1, K + 1, probes, n, dtype=torch.float64, device=x.device)  # a_m . y_k at [m, k]
    beside = None if off is None else torch.zeros_like(inner)  # e_j . y_k at [j, k]
    for k in range(K, 0, -1):
        if k < K:
            y = _pulled(teacher, x[k], t[k], y, h[k], first)
        for p in range(probes):
            inner[1:k, k, p] = (a[: k - 1] * y[p]).flatten(2).sum(-1, dtype=torch.float64)
            if off is not None:
                beside[:k, k, p] = (off[:k] * y[p]).flatten(2).sum(-1, dtype=torch.float64)
    cost = torch.full((K + 1, K + 1), torch.inf, dtype=torch.float64, device=x.device)
    for k in range(1, K + 1):  # the error of the step j -> k is the sum over j < m < k of (t_k - t_m) a_m
        span = (times[k] - times[:k])[:, None, None]
        errors = (span * inner[:k, k]).flip(0).cumsum(0).flip(0)  # from m on
        errors = torch.cat([errors[1:], torch.zeros_like(errors[:1])])
        if off is not None:
            errors += span * beside[:k, k]
        cost[:k, k] = errors.square().sum((1, 2))
    return cost


@objective
def pairs(cal: Measured, steps: list[int]) -> dict[int, Solver]:
    """Least sum of E|e|^2 of Adams-Bashforth 2, exactly: a step's error depends on the knot before it too.

    No evaluations, but K^3 numbers. Returns solvers. A UserWarning names the N for which it is likely to be worse than
    Euler's steps: whose cost is more than twice the least one of these, `squared_cost` in notes.
    """
    expect(cal.gram is not None, "objective", "a calibration with its Gram matrix, for 'pairs'", "one of before that")
    times, K = cal.times, len(cal.times) - 1
    first = without_spans(cal.cost, cal.forced)[0].contiguous()
    cost = without_spans(pair_costs(cal.gram, times), cal.forced)
    value, parent = bellman_pairs(first, cost, max(steps))
    euler, found, worse = least_cost_schedules(cal.cost, times, steps, forced_knots=cal.forced_knots), {}, []
    for n in steps:
        before = int(value[n, :, K].argmin()) if n > 1 else 0
        path = path_of(parent, n, (before, K))

        def along(path: Sequence[int]) -> float:
            return first[path[1]].item() + sum(cost[path[i : i + 3]].item() for i in range(len(path) - 2))

        solver = adams_bashforth(Schedule(times[list(path)], times, path))
        notes = {
            "objective": "pairs",
            "evaluations": 0,
            "indices": list(path),
            "cost": value[n, before, K].item(),
            "uniform_cost": along(uniform_indices(times, n, cal.forced)),
            "squared_cost": euler[n].cost,
            "amplification": solver.amplification,
        }
        found[n] = replace(solver, notes=notes)
        if notes["cost"] > WORSE * euler[n].cost + 1e-12 * first[K].item():  # beyond rounding
            worse.append(str(n))
    if worse:
        warn(
            f"objective: Adams-Bashforth 2 ('pairs') is likely to be worse than Euler's steps ('squared') for N = "
            f"{', '.join(worse)}: its steps' errors cost more than {WORSE:g} times as much",
            stacklevel=4,
        )
    return found


@objective
def student(
    cal: Measured,
    steps: list[int],
    *,
    velocity: Velocity | None,
    samples: int = 64,
    chunk: int | None = None,
    groups: Groups | None = None,
) -> dict[int, Schedule] | dict[int, SampleSchedules]:
    """Least mean squared distance of the student's own state to the teacher's, knot by knot.

    The best predecessor of each knot is decided from the start on, a greedy choice and no optimum. About N K
    evaluations for the largest N, those of all knots that as many steps reach in one batch.

    Source: OSS (Optimal Stepsize for Diffusion Sampling, arXiv 2503.21774), with the first evaluation at the grid's
    first time, as a schedule has it: "oss" is free there, as the authors' code is.
    """
    x, _, teacher = _samples(cal, velocity, "student", samples, chunk)
    parent, errors, evaluations = _own_states(cal, steps, x, teacher, groups)
    if groups is not None:
        return _of_each(cal, groups.first(x.shape[1]), parent, errors, "student", evaluations)
    plans = {}
    for n in steps:
        path = path_of(parent[..., 0], n, (len(cal.times) - 1,))
        plans[n] = Schedule(cal.times[list(path)], cal.times, path, errors[n].item())
    return _noted(plans, "student", evaluations, samples=x.shape[1])


@objective
def oss(
    cal: Measured,
    steps: list[int],
    *,
    velocity: Velocity | None,
    samples: int = 64,
    chunk: int | None = None,
    groups: Groups | None = None,
) -> dict[int, Solver] | dict[int, SampleSchedules]:
    """Least mean squared distance of the student's own state to the teacher's, knot by knot, the first evaluation
    being of the noise as it is at whichever knot is best.

    The first step is of the length from that knot on: the way before it is not gone. Evaluations as for "student".
    Returns Euler solvers whose first model time is that knot, and `evaluated`, the places of all of these, in notes.

    Source: OSS (Optimal Stepsize for Diffusion Sampling, arXiv 2503.21774). Against its authors' code
    (github.com/bebebe666/OptimalSteps, commit ee35043) run with the mean over samples in place of one at a time, whose
    schedules it takes the median of. A path of N has N evaluations here; there a knot keeps the state of fewer where
    that is nearer, and the path that is read back is longer than the one whose error it was.
    """
    x, _, teacher = _samples(cal, velocity, "oss", samples, chunk)
    parent, errors, evaluations = _own_states(cal, steps, x, teacher, groups, free=True)
    if groups is not None:
        return _of_each(cal, groups.first(x.shape[1]), parent, errors, "oss", evaluations)
    found, K = {}, len(cal.times) - 1
    for n in steps:
        path = path_of(parent[..., 0], n, (K,))
        indices, times = (0, *path[1:]), cal.times[list(path)]
        notes = {
            "objective": "oss",
            "evaluations": evaluations,
            "samples": x.shape[1],
            "indices": list(indices),
            "evaluated": list(path[:-1]),
            "cost": errors[n].item(),
            "uniform_cost": None,
        }
        b = times.diff().expand(n, -1).tril()
        found[n] = Solver(cal.times[list(indices)], times[:-1], b, "euler, free start", notes)
    return found


def _of_each(
    cal: Measured, groups: Groups, parent: Tensor, errors: dict[int, Tensor], name: str, evaluations: int
) -> dict[int, SampleSchedules]:
    """Of each group the path of its own choices. Of "oss" it begins at the knot of the first evaluation, with the noise
    as the state there."""
    K, notes = len(cal.times) - 1, dict(objective=name, evaluations=evaluations, samples=len(groups.of))
    found = {}
    for n, of in errors.items():
        paths = [path_of(parent[..., group], n, (K,)) for group in range(groups.count)]
        times = torch.stack([cal.times[list(path)] for path in paths])
        found[n] = SampleSchedules(times, groups.names, of, notes=dict(notes))
    return found


def _own_states(
    cal: Measured, steps: list[int], x: Tensor, teacher: Teacher, groups: Groups | None = None, free: bool = False
) -> tuple[Tensor, dict[int, Tensor], int]:
    """(places of the knot before, for each group for `path_of`, `[N+1, K+1, groups]`; mean squared distances of the
    groups' ends by N; evaluations) of the student's own states, each s steps from the noise, with which the next ones
    are made.

    groups: of samples that decide by themselves; None is one of all. free: the first step may be from any knot, with
    the noise as the state there.
    """
    K, t = len(cal.times) - 1, cal.times[:-1].tolist()
    most, forced = max(steps), cal.forced
    groups = all_of(x.shape[1]) if groups is None else groups.first(x.shape[1])
    of, samples = groups.of.to(x.device), torch.arange(x.shape[1], device=x.device)
    furthest = [0, *forced, *[K] * most]  # that so many steps reach, none of which spans a forced knot
    z, error = torch.empty_like(x), torch.zeros(most + 1, K + 1, groups.count, dtype=torch.float64, device="cpu")
    z[:] = x[0]  # more than the first of which `free` asks
    parent = torch.zeros(most + 1, K + 1, groups.count, dtype=torch.int64, device="cpu")
    ahead = torch.empty_like(x)
    for s in range(1, most + 1):
        starts = range(furthest[1]) if s == 1 and free else range(s - 1, min(furthest[s - 1] + 1, K))
        v = teacher.at_times(z[starts.start : starts.stop], t[starts.start : starts.stop])
        for k in [K] if s == most and len(steps) == 1 else range(s, furthest[s] + 1):
            first, last = max([starts[0], *(f for f in forced if f < k)]), min(k, starts[-1] + 1)
            h = (cal.times[k] - cal.times[first:last]).to(x).view(-1, *[1] * (x.dim() - 1))
            reached = z[first:last] + h * v[first - starts[0] : last - starts[0]]
            errors = groups.means((reached - x[k]).square_().flatten(2).sum(-1, dtype=torch.float64))
            error[s, k], best = (found.cpu() for found in errors.min(0))
            parent[s, k], ahead[k] = best + first, reached[best.to(x.device)[of], samples]
        z, ahead = ahead, z
    return parent, {n: error[n, K] for n in steps}, _evaluations_of_each(teacher, x)


@objective
def free(
    cal: Measured,
    steps: list[int],
    *,
    velocity: Velocity | None,
    samples: int = 64,
    chunk: int | None = None,
    candidates: Sequence[float] = CANDIDATES,
) -> dict[int, Solver]:
    """Least sum of E|e|^2 where the velocity of a step from t may be asked for at later times `t + f (1 - t)`, f being
    the best of the candidates.

    The first knot's time is moved too, and none beyond the grid's last knot before a forced one. K evaluations for each
    candidate but 0. Returns Euler solvers with such model times.
    """
    x, kept, teacher = _samples(cal, velocity, "free", samples, chunk)
    expected = "some fractions, 0 <= f < 1"
    fractions = expect_float64(candidates, "candidates", expected)
    given = fractions.tolist() if fractions.dim() == 1 else []
    expect_shown(len(given) > 0 and all(0 <= c < 1 for c in given), "candidates", expected, candidates)
    tables = []
    for part in given:
        v = kept
        if part > 0:
            v = teacher.at_times(x[:-1], [t + part * (1 - t) for t in cal.times[:-1].tolist()])
        table = StepCost(cal.times, states=True, device=v.device).update(v, x).cost().cpu()
        at = cal.times[:-1] + part * (1 - cal.times[:-1])
        for f in cal.forced:  # somewhere after the knot before it begins another velocity
            table[:f][at[:f] > cal.times[f - 1]] = torch.inf
        tables.append(table)
    cost, which = torch.stack(tables).min(0)
    plans, found = least_cost_schedules(cost, cal.times, steps, forced_knots=cal.forced_knots), {}
    for n, schedule in plans.items():
        j, k = (list(side) for side in zip(*itertools.pairwise(schedule.indices), strict=True))
        part = torch.tensor(given, dtype=torch.float64, device="cpu")[which[j, k]]
        at = schedule.times[:-1] + part * (1 - schedule.times[:-1])
        notes = {
            "objective": "free",
            "evaluations": _evaluations_of_each(teacher, x),
            "samples": x.shape[1],
            "indices": list(schedule.indices),
            "cost": schedule.cost,
            "uniform_cost": schedule.uniform_cost,
            "candidates": given,
        }
        found[n] = replace(Solver.euler(schedule, model_times=at), name="euler, free times", notes=notes)
    return found
