"""Schedules of every objective, against all paths of small grids and loops over knots, states and samples."""

import itertools
import math
import re
import warnings

import pytest
import torch
from _flows import Counted, ElementwiseField, Turning, even_grid, normal, uneven_grid

import flowkernels as fk
from flowkernels.calibration import gits_costs, objectives
from flowkernels.calibration.gits_costs import absolute_costs, deviation_costs
from flowkernels.calibration.objectives import OBJECTIVES
from flowkernels.calibration.pair_costs import pair_costs
from flowkernels.models.bundled import BUNDLED
from flowkernels.models.closed_form import GaussianMixtureVelocity

QUIET = dict(progress=False)


def paths(K, steps, forced=()):
    """All that have the forced knots."""
    found = [(0, *inner, K) for inner in itertools.combinations(range(1, K), steps - 1)]
    return [path for path in found if set(forced) <= set(path)]


def least(K, steps, cost, forced=()):
    """The path of least cost by trying all, and its cost."""
    costs = {path: cost(path) for path in paths(K, steps, forced)}
    best = min(costs, key=costs.get)
    return best, costs[best]


def calibrated(velocity, n=6, dim=3, K=7, forced=(), teacher="euler", **settings):
    """A calibration in float64 on an uneven grid, and the teacher's trajectory. forced: places of knots. teacher: its
    solver, of one evaluation a step where it is "adams"."""
    noise, times = normal(n, dim, dtype=torch.float64), uneven_grid(K)
    solver = fk.Solver.adams_bashforth(times, 2) if teacher == "adams" else teacher
    settings |= QUIET | {"forced_knots": times[list(forced)], "teacher_solver": solver}
    cal = fk.calibrate(velocity, noise, times, max(2, len(forced) + 1), **settings)
    return cal, fk.rollout(velocity, noise, cal.teacher_solver)


FORCED = pytest.mark.parametrize("forced", [(), (2, 5), (6,)], ids=str)
TEACHERS = pytest.mark.parametrize("teacher", ["euler", "heun", "adams"])


def from_the_line(y, x):
    """How far each of y `[n, d]` is from its sample's line from the noise to the end of x `[K+1, n, d]`."""
    found = []
    for i in range(y.shape[0]):
        along = x[-1, i] - x[0, i]
        part = (y[i] - x[0, i]) @ along / (along @ along)
        found.append((y[i] - x[0, i] - part * along).norm())
    return torch.stack(found)


def step_errors(trajectory, kind):
    """The cost of every step by loops over knots, from states: E|e|^2, or GITS's of a metric."""
    t, x, v = trajectory.times, trajectory.x, trajectory.v
    cost = torch.zeros(len(t), len(t), dtype=torch.float64)
    for j, k in itertools.combinations(range(len(t)), 2):
        end = x[j] + (t[k] - t[j]) * v[j]
        if kind == "dev":
            of = from_the_line(end, x) - from_the_line(x[k], x)
        else:
            of = (x[k] - end).norm(p=1 if kind == "l1" else 2, dim=1)
        cost[j, k] = (of.square() if kind == "squared" else of).mean()
    return cost


@FORCED
@pytest.mark.parametrize(
    ("objective", "kind", "gamma"),
    [("squared", "squared", 1.0), ("norm", "l2", 1.0), ("gits", "l2", 1.15), ("gits", "l2", 0.7), ("gits", "l1", 3.0),
     ("gits", "dev", 1.15), ("gits", "dev", 1.0)],
)  # fmt: skip
@TEACHERS
def test_sums_of_errors_against_all_paths(objective, kind, gamma, forced, teacher):
    cal, trajectory = calibrated(Turning(), forced=forced, teacher=teacher)
    options = {"metric": kind, "gamma": gamma} if objective == "gits" else {}
    before, own = sorted(cal), objective == "squared"
    e = step_errors(trajectory, kind)

    def cost(path):
        return sum(gamma**i * e[j, k].item() for i, (j, k) in enumerate(itertools.pairwise(path)))

    plans = cal.find(range(len(forced) + 1, 8), objective=objective, **options)
    for steps, schedule in plans.items():
        best, expected = least(7, steps, cost, forced)
        assert schedule.indices == best
        assert schedule.cost == pytest.approx(expected, rel=1e-9, abs=1e-12)
        even = fk.schedule.uniform_indices(cal.times, steps, forced)
        assert set(forced) <= set(even)
        assert schedule.uniform_cost == pytest.approx(cost(even), rel=1e-9, abs=1e-12)
        notes = {key: value for key, value in schedule.notes.items() if key != "teacher_solver"}
        assert notes == ({} if own else {"objective": objective, "evaluations": 0, **options})
        assert (schedule.cost_interval is None) == (objective == "gits")
    assert sorted(cal) == (list(plans) if own else before)  # only BOSS's are the calibration's own


def test_deviations_may_be_below_nought():
    """Steps whose ends are nearer to the line than the teacher's path, which bulges; and paths that are points."""
    bulge = lambda x, t: torch.stack([torch.ones_like(t), 10 * (1 - 2 * t) * (t > 0.1)], 1).to(x.dtype)  # noqa: E731
    cal = fk.calibrate(bulge, normal(3, 2, dtype=torch.float64), 10, 2, **QUIET)
    x, v = cal.kept.x, cal.kept.v
    cost = deviation_costs(cal.single_costs, x, v)
    inside = torch.ones(11, 11, dtype=torch.bool).triu(1)
    assert torch.allclose(cost[inside], step_errors(cal.kept, "dev")[inside], atol=1e-12)
    plan = cal.find(3, objective="gits")[3]
    assert plan.cost < 0
    assert plan.ratio is None
    still = fk.calibrate(lambda x, t: torch.zeros_like(x), normal(3, 2), 10, 2, **QUIET)
    assert still.find(2, objective="gits")[2].cost == 0


def test_absolute_errors_of_many_features(monkeypatch):
    """A sample at a time is what all at once are; states in float32, whose rounding is not in them."""
    velocity, noise = ElementwiseField(), normal(5, 7)
    cal = fk.calibrate(velocity, noise, 9, 2, **QUIET)
    wide = fk.rollout(velocity, noise.double(), 9)
    expected = step_errors(wide, "l1")
    found = absolute_costs(cal.kept.x, cal.kept.v, cal.times)
    monkeypatch.setattr(gits_costs, "PART_BYTES", 1)
    inside = torch.ones(10, 10, dtype=torch.bool).triu(1)
    assert torch.allclose(absolute_costs(cal.kept.x, cal.kept.v, cal.times), found, rtol=1e-12)
    assert torch.allclose(found[inside], expected[inside], rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("start", [0.0, 0.25])
@pytest.mark.parametrize("forced", [(), (3,), (5, 9)], ids=str)
def test_uniform_steps(start, forced):
    grid = torch.linspace(start, 1, 13, dtype=torch.float64)
    cal = fk.calibrate(Turning(), normal(4, 3, dtype=torch.float64), grid, 3, forced_knots=grid[list(forced)], **QUIET)
    plans = cal.find(range(len(forced) + 1, 13), objective="uniform")
    for n, plan in plans.items():
        expected = fk.Schedule.uniform(n, start, grid[list(forced)]).times
        assert torch.allclose(plan.times, expected, rtol=0, atol=1e-9)
        on_grid = all(((grid - t).abs() < 1e-6).any() for t in expected)
        assert (plan.indices is not None) == on_grid
        if not forced:
            assert on_grid == (12 % n == 0)
        if on_grid:
            assert torch.equal(plan.times, grid[list(plan.indices)])
            steps = [cal.cost[step].item() for step in itertools.pairwise(plan.indices)]
            assert plan.cost == plan.uniform_cost == pytest.approx(sum(steps), rel=1e-12)
        assert plan.notes == {"objective": "uniform", "evaluations": 0}
    assert sum(plan.indices is not None for plan in plans.values()) >= 2


def test_gits_weighs_by_default():
    cal, _ = calibrated(Turning())
    assert cal.find(3, objective="gits")[3].notes["gamma"] == 1.15
    assert cal.find(3, objective="gits")[3].cost == cal.find(3, objective="gits", gamma=1.15)[3].cost
    with pytest.raises(ValueError, match=r"^gamma: expected a positive, finite number, got 0"):
        cal.find(3, objective="gits", gamma=0)
    with pytest.raises(ValueError, match=r"^metric: expected one of \['dev', 'l1', 'l2'\], got l3"):
        cal.find(3, objective="gits", metric="l3")


def carried(velocity, trajectory):
    """E|(d x_K / d x_k) e|^2 of every step by the whole Jacobian of the way from knot k to the end, that of Euler's
    steps at the teacher's states."""
    t, x, v = trajectory.times, trajectory.x, trajectory.v
    K, cost = len(t) - 1, torch.zeros(len(t), len(t), dtype=torch.float64)
    for n in range(x.shape[1]):
        jacobian = torch.eye(x.shape[2], dtype=torch.float64)
        for k in range(K, 0, -1):
            if k < K:
                of = torch.autograd.functional.jacobian(lambda y, k=k: velocity(y[None], t[k : k + 1])[0], x[k, n])
                jacobian = jacobian @ (torch.eye(len(of), dtype=torch.float64) + (t[k + 1] - t[k]) * of)
            for j in range(k):
                e = x[k, n] - x[j, n] - (t[k] - t[j]) * v[j, n]
                cost[j, k] += (jacobian @ e).square().sum() / x.shape[1]
    return cost


@FORCED
@TEACHERS
def test_errors_carried_to_the_endpoint_against_all_paths(forced, teacher):
    """In one dimension a random sign tells all there is."""
    velocity = ElementwiseField()
    cal, trajectory = calibrated(velocity, dim=1, forced=forced, teacher=teacher)
    cost = carried(velocity, trajectory)
    assert not torch.allclose(cost, step_errors(trajectory, "squared"), rtol=0.1)
    for steps, schedule in cal.find(range(len(forced) + 1, 8), objective="endpoint", velocity=velocity).items():
        along = lambda path: sum(cost[j, k].item() for j, k in itertools.pairwise(path))  # noqa: E731
        best, expected = least(7, steps, along, forced)
        assert schedule.indices == best
        assert schedule.cost == pytest.approx(expected, rel=1e-9, abs=1e-20)
        notes = {"objective": "endpoint", "evaluations": 30, "samples": 6, "probes": 2}
        assert {key: schedule.notes[key] for key in notes} == notes


def test_errors_of_features_that_mix():
    """Many random signs find the mean to their standard error."""
    velocity = Turning()
    cal, trajectory = calibrated(velocity, n=20)
    cost = carried(velocity, trajectory)
    indices = cal.find(2, objective="endpoint", velocity=velocity, probes=400)[2].indices
    best, expected = least(7, 2, lambda path: sum(cost[j, k].item() for j, k in itertools.pairwise(path)))
    assert indices == best
    found = cal.find(2, objective="endpoint", velocity=velocity, probes=400)[2].cost
    assert found == pytest.approx(expected, rel=4 * (2 / 400 / 20) ** 0.5)  # 2 is the variance of a squared normal
    assert velocity.matrix.grad is None


def test_the_endpoint_needs_gradients():
    cal, _ = calibrated(Turning())

    @torch.no_grad()
    def without(x, t):
        return Turning()(x, t)

    def in_inference(x, t):
        with torch.inference_mode():
            return Turning()(x.detach(), t)

    for velocity in (without, in_inference):
        with pytest.raises(ValueError, match=r"^velocity: expected one with gradients, for objective 'endpoint'"):
            cal.find(2, objective="endpoint", velocity=velocity)


def test_a_fused_sampler_is_asked_for_its_velocity():
    net, noise = BUNDLED["digits"].load(), normal(4, 1, 8, 8)
    cal, plain = (fk.calibrate(v, noise, 6, 2, **QUIET) for v in (fk.fuse(net, 4, shape=(1, 8, 8)), net))
    fused = fk.fuse(net, 4, shape=(1, 8, 8))
    for objective in ("endpoint", "student", "oss", "free"):
        got, expected = (c.find([2, 3], objective=objective, velocity=v) for c, v in ((cal, fused), (plain, net)))
        assert all(torch.equal(got[n].times, expected[n].times) for n in (2, 3))


@pytest.mark.parametrize(("K", "forced"), [(1, ()), (2, ()), (3, ()), (3, (1,)), (7, ()), (7, (2, 5))])
@TEACHERS
def test_pairs_against_all_paths(K, forced, teacher):
    cal, trajectory = calibrated(Turning(), K=K, forced=forced, teacher=teacher) if K > 1 else (None, None)
    if cal is None:
        noise = normal(6, 3, dtype=torch.float64)
        cal, trajectory = fk.calibrate(Turning(), noise, 1, 1, **QUIET), fk.rollout(Turning(), noise, 1)
    t, x, v = trajectory.times, trajectory.x, trajectory.v

    def cost(path):
        e = x[path[1]] - x[0] - (t[path[1]] - t[0]) * v[0]
        total = e.square().sum(-1).mean()
        for i, j, k in zip(path, path[1:], path[2:], strict=False):
            h = t[k] - t[j]
            e = x[k] - x[j] - h * v[j] - h * h / (2 * (t[j] - t[i])) * (v[j] - v[i])
            total = total + e.square().sum(-1).mean()
        return total.item()

    for steps, solver in cal.find(range(len(forced) + 1, K + 1), objective="pairs").items():
        best, expected = least(K, steps, cost, forced)
        assert solver.notes["indices"] == list(best)
        rounding = 1e-20 if teacher == "euler" else 1e-15  # of terms of the order of one that cancel
        assert solver.notes["cost"] == pytest.approx(expected, rel=1e-9, abs=rounding)
        uniform = cost(fk.schedule.uniform_indices(t, steps, forced))
        assert solver.notes["uniform_cost"] == pytest.approx(uniform, rel=1e-9, abs=rounding)
        assert solver.notes["objective"] == "pairs"
        again = fk.Solver.adams_bashforth(t[list(best)])
        assert torch.equal(solver.coefficients, again.coefficients)
        assert torch.equal(solver.times, again.times)


@TEACHERS
def test_costs_of_pairs(teacher):
    cal, trajectory = calibrated(Turning(), K=12, teacher=teacher)
    t, x, v = trajectory.times, trajectory.x, trajectory.v
    found = pair_costs(cal.gram, t)
    for i, j, k in itertools.combinations(range(13), 3):
        h = t[k] - t[j]
        e = x[k] - x[j] - h * v[j] - h * h / (2 * (t[j] - t[i])) * (v[j] - v[i])
        assert found[i, j, k] == pytest.approx(e.square().sum(-1).mean().item(), rel=1e-9, abs=1e-15)


def test_pairs_says_where_eulers_steps_are_likely_to_be_better():
    """On modes far apart, where it is so on other noise; not on the digits."""
    means = normal(5, 13, seed=1) * 6 / 13**0.5
    far = GaussianMixtureVelocity(means, stds=0.1)
    noise, other = normal(64, 13), normal(128, 13, seed=1)
    cal = fk.calibrate(far, noise, 30, range(1, 9), **QUIET)
    with pytest.warns(UserWarning, match=r"^objective: Adams-Bashforth 2 \('pairs'\) is likely") as seen:
        plans = cal.find(range(1, 9), objective="pairs")
    assert seen[0].filename == __file__
    named = [int(n) for n in re.search(r"N = ([\d, ]+):", str(seen[0].message))[1].split(", ")]
    end = fk.sample(far, other, 30)
    error = lambda plan: (fk.sample(far, other, plan) - end).square().sum(1).mean()  # noqa: E731
    assert len(named) >= 3
    for n, plan in plans.items():
        assert plan.notes["squared_cost"] == cal[n].cost
        assert plan.notes["amplification"] == plan.amplification
        doubtful = plan.notes["cost"] > 2 * cal[n].cost
        assert (n in named) == doubtful
        if doubtful:
            assert error(plan) > error(cal[n])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fk.calibrate(BUNDLED["digits"].load(), normal(32, 1, 8, 8), 30, 2, **QUIET).find(range(1, 9), objective="pairs")
        fk.calibrate(far, noise[:16], 12, 2, effort="best", evaluations=12_000, **QUIET)  # which measures what it finds


def test_pairs_of_too_many_knots():
    gram = torch.zeros(1, 1, dtype=torch.float64).expand(644, 644)
    with pytest.raises(
        ValueError, match=r"^grid: expected costs of pairs of at most 2 GiB \(K = 644\), got K = 645: 2"
    ):
        pair_costs(gram, even_grid(645))


@FORCED
@pytest.mark.parametrize(
    ("objective", "teacher"), [("student", "euler"), ("student", "heun"), ("oss", "euler"), ("oss", "adams")]
)
def test_the_students_own_states(objective, teacher, forced):
    """The recursion as it is written, from the noise at the first knot or at any; and all paths where its choice is not
    greedy: two steps, or one to each of the forced knots and one more."""
    velocity, free = Turning(), objective == "oss"
    cal, trajectory = calibrated(velocity, forced=forced, teacher=teacher)
    t, x = trajectory.times, trajectory.x

    def step(z, j, k):
        return z + (t[k] - t[j]) * velocity(z, t[j].expand(len(z)))

    states = {(0, k): (x[0], None) for k in range(7 if free else 1)}  # (s, k): state, predecessor
    for s in range(1, 8):
        for k in range(s, 8):
            before = [f for f in forced if f < k]
            froms = [j for j in range(max([0, *before]), k) if (s - 1, j) in states]
            if s == 1 and before:  # from the noise, whatever the time that the velocity is told
                froms = []
            if not (reached := {j: step(states[s - 1, j][0], j, k) for j in froms}):
                continue
            j = min(reached, key=lambda j: (reached[j] - x[k]).square().sum(-1).mean().item())
            states[s, k] = reached[j].detach(), j
    counted = Counted(velocity)
    plans = cal.find(range(len(forced) + 1, 8), objective=objective, velocity=counted)
    evaluated = sum(k < 7 and s < 7 and (s > 0 or k < min([7, *forced])) for s, k in states)
    # a call for each round, and a look at whether rows may have times of their own: of four, and of all at the last
    assert counted.calls == 7 + 3 + 1
    assert {plan.notes["evaluations"] for plan in plans.values()} == {evaluated + 2}
    for steps, plan in plans.items():
        path = [7]
        for s in range(steps, 0, -1):
            path.insert(0, states[s, path[0]][1])
        if free:
            assert (plan.notes["evaluated"], plan.notes["indices"]) == (path[:-1], [0, *path[1:]])
            assert torch.equal(plan.model_times, t[path[:-1]])
            assert torch.equal(plan.times, t[[0, *path[1:]]])
        else:
            assert plan.indices == tuple(path)
        cost = plan.notes["cost"] if free else plan.cost
        error = (fk.sample(velocity, x[0], plan) - x[-1]).square().sum(-1).mean().item()
        assert cost == pytest.approx(error, rel=1e-9, abs=1e-20)
        alone = cal.find(steps, objective=objective, velocity=velocity)[steps]
        assert (alone.notes["cost"] if free else alone.cost) == pytest.approx(cost, rel=1e-9, abs=1e-20)
    if free:
        return
    for steps in (len(forced) + 1, 2) if len(forced) < 2 else (3,):
        end = lambda p: (fk.sample(velocity, x[0], t[list(p)]) - x[-1]).square().sum().item()  # noqa: E731
        best, expected = least(7, steps, end, forced)
        assert plans[steps].indices == best
        assert plans[steps].cost == pytest.approx(expected / 6, rel=1e-9)


@pytest.mark.parametrize(("forced", "teacher"), [((), "euler"), ((2, 5), "euler"), ((), "heun")])
def test_free_times_against_all_paths_and_times(forced, teacher):
    velocity, candidates = Turning(), (0.3, 0.0, 0.05)
    cal, trajectory = calibrated(velocity, forced=forced, teacher=teacher)
    t, x = trajectory.times, trajectory.x
    cost = {}
    for j, k in itertools.combinations(range(8), 2):
        for f in candidates:
            v = velocity(x[j], (t[j] + f * (1 - t[j])).expand(6))
            beyond = any(j < knot and t[j] + f * (1 - t[j]) > t[knot - 1] for knot in forced)
            cost[j, k, f] = math.inf if beyond else (x[k] - x[j] - (t[k] - t[j]) * v).square().sum(-1).mean().item()
    plans = cal.find(range(len(forced) + 1, 8), objective="free", velocity=velocity, candidates=candidates)
    for steps, solver in plans.items():
        tried = {
            (path, given): sum(cost[j, k, f] for (j, k), f in zip(itertools.pairwise(path), given, strict=True))
            for path in paths(7, steps, forced)
            for given in itertools.product(candidates, repeat=steps)
        }
        path, given = min(tried, key=tried.get)
        assert solver.notes["indices"] == list(path)
        assert solver.notes["cost"] == pytest.approx(tried[path, given], rel=1e-8, abs=1e-16)
        expected = torch.stack([t[j] + f * (1 - t[j]) for j, f in zip(path, given, strict=False)])
        moved = torch.tensor([cost[j, k, 0.0] > 1e-20 for j, k in itertools.pairwise(path)])
        assert torch.allclose(solver.model_times[moved], expected[moved], rtol=0, atol=1e-12)
        assert solver.notes["evaluations"] == 14 + 2  # of looks at rows of several times
    assert (plans[3].model_times > plans[3].times[:-1]).any()


@pytest.mark.parametrize("objective", ["endpoint", "student", "oss", "free"])
def test_conditioning_of_the_samples(objective):
    """Samples have the conditioning that they were calibrated with, be there more of it than is kept or used."""

    class Pushed(torch.nn.Module):
        def forward(self, x, t, push):
            return (3 * x + push * t[:, None]).sin() * push

    noise, push = normal(9, 3, dtype=torch.float64), normal(9, 3, seed=1, dtype=torch.float64).mul(2)
    field = fk.VelocityField(Pushed(), conditioning={"push": push}, unconditional={"push": push.flip(0)}, guidance=1.5)
    some = fk.VelocityField(
        Pushed(), conditioning={"push": push[:4]}, unconditional={"push": push.flip(0)[:4]}, guidance=1.5
    )
    whole = fk.calibrate(field, noise, 8, 2, max_regret=1e-9, **QUIET)
    expected = fk.calibrate(some, noise[:4], 8, 2, **QUIET).find([2, 3], objective=objective, velocity=some)
    got = whole.find([2, 3], objective=objective, velocity=field, samples=4, chunk=3)
    for n in (2, 3):
        assert torch.equal(got[n].times, expected[n].times)
        told = [{k: v for k, v in plans[n].notes.items() if "cost" not in k} for plans in (got, expected)]
        looks = 0 if objective == "endpoint" else 2  # at rows of several times, without a chunk
        assert told[0] | {"evaluations": told[0]["evaluations"] + looks} == told[1]


def test_an_objective_is_one_function(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "weighted", None)  # so that it goes again
    del OBJECTIVES["weighted"]

    @objectives.objective
    def weighted(cal, steps, *, late: float = 1.0):
        """Least sum of E|e|^2, later steps weighing more."""
        return fk.least_cost_schedules(cal.cost * (1 + late * cal.times), cal.times, steps)

    cal, trajectory = calibrated(Turning())
    e = step_errors(trajectory, "squared")
    best, cost = least(7, 3, lambda path: sum(e[j, k] * (1 + 5 * cal.times[k]) for j, k in itertools.pairwise(path)))
    found = cal.find(3, objective="weighted", velocity=Turning(), late=5.0)[3]
    assert found.indices == best
    assert found.cost == pytest.approx(float(cost), rel=1e-9)
    with pytest.raises(TypeError, match=r"^options: expected of \['late'\] for 'weighted', got \['early'\]"):
        cal.find(3, objective="weighted", early=2)
    assert 3 not in cal


@pytest.mark.parametrize("name", ["max", "squared", "path_of"])
def test_an_objective_hides_nothing(name):
    known, make = dict(OBJECTIVES), {}
    exec(f"def {name}(cal, steps): return {{}}", vars(objectives), make)
    with pytest.raises(ValueError, match=f"^objective: expected a name that is neither taken in .*, got {name}$"):
        objectives.objective(make[name])
    assert known == OBJECTIVES


def test_every_objective_is_told():
    for name, make in OBJECTIVES.items():
        assert f'"{name}"' in fk.Calibration.find.__doc__
        assert make.__doc__.startswith("Least ")


def test_bad_objectives(tmp_path):
    cal, _ = calibrated(Turning())
    with pytest.raises(ValueError, match=r"^objective: expected one of \['squared', 'norm', .*'free'.*\], got best"):
        cal.find(2, objective="best")
    with pytest.raises(TypeError, match=r"^options: expected of \['metric', 'gamma'\] for 'gits', got \['probes'\]"):
        cal.find(2, objective="gits", probes=2)
    with pytest.raises(TypeError, match=r"^options: expected none for 'squared', got \['gamma'\]"):
        cal.find(2, gamma=2)
    with pytest.raises(ValueError, match=r"^steps: expected at most K = 7"):
        cal.find(8, objective="norm")
    for objective in ("endpoint", "student", "oss", "free"):
        with pytest.raises(
            ValueError, match=rf"^velocity: expected the teacher, for objective '{objective}', got None"
        ):
            cal.find(2, objective=objective)
        with pytest.raises(ValueError, match=r"^samples: expected at least 1, got 0"):
            cal.find(2, objective=objective, velocity=Turning(), samples=0)
        with pytest.raises(ValueError, match=r"^chunk: expected at least 1, got 0"):
            cal.find(2, objective=objective, velocity=Turning(), chunk=0)
    for candidates in ((), (1.0,), (-0.1, 0.0)):
        with pytest.raises(ValueError, match=r"^candidates: expected some fractions, 0 <= f < 1"):
            cal.find(2, objective="free", velocity=Turning(), candidates=candidates)
    cal.save(tmp_path / "a.json")
    again, none = fk.Calibration.load(tmp_path / "a.json"), calibrated(Turning(), keep_bytes=0)[0]
    assert again.find(3, objective="norm")[3] == cal.find(3, objective="norm")[3]  # in the file
    with_l2 = dict(objective="gits", metric="l2")
    assert again.find(3, **with_l2)[3] == cal.find(3, **with_l2)[3]
    for metric in ("dev", "l1"):
        expected = (
            rf"^objective: expected .* keeps samples, for 'gits' with metric='{metric}' \(metric='l2' does without"
        )
        with pytest.raises(ValueError, match=expected):
            again.find(3, objective="gits", metric=metric)
    assert again.find(3, objective="pairs")[3].notes == cal.find(3, objective="pairs")[3].notes
    for lost, known in ((again, ("endpoint", "student", "free")), (none, ("norm", "gits", "student"))):
        for objective in known:
            with pytest.raises(ValueError, match=r"^objective: expected a calibration that keeps samples, for"):
                lost.find(2, objective=objective, **({} if objective in ("norm", "gits") else {"velocity": Turning()}))
