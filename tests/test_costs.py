"""Step costs of single samples, objectives beyond the mean of squares, and what their scatter says."""

import itertools
import json
import math
import re
import warnings

import pytest
import torch
from _flows import Counted, ElementwiseField, even_grid, linear_field, normal, relative_error, uneven_grid

import flowkernels as fk
from flowkernels._files import sealed
from flowkernels.calibration import gits_costs, objectives, sample_costs
from flowkernels.calibration.gits_costs import absolute_costs, deviation_costs
from flowkernels.calibration.objectives import OBJECTIVES
from flowkernels.calibration.pair_costs import pair_costs
from flowkernels.calibration.sample_costs import SampleCosts
from flowkernels.models.bundled import BUNDLED
from flowkernels.models.closed_form import GaussianMixtureVelocity

QUIET = dict(progress=False)


def errors(trajectory):
    """|x_k - x_j - (t_k - t_j) v_j| of every sample from its states, `[K+1, K+1, n]`, zero where k <= j."""
    t, x, v = trajectory.times, trajectory.x.double().flatten(2), trajectory.v.double().flatten(2)
    found = torch.zeros(len(t), len(t), x.shape[1], dtype=torch.float64)
    for j, k in itertools.combinations(range(len(t)), 2):
        found[j, k] = (x[k] - x[j] - (t[k] - t[j]) * v[j]).norm(dim=-1)
    return found


def flow(n=7, dim=5, K=9, seed=0):
    """A curved flow in float64, rolled out, and its velocity."""
    velocity, noise = ElementwiseField(), normal(n, dim, seed=seed, dtype=torch.float64)
    return velocity, noise, fk.rollout(velocity, noise, uneven_grid(K))


@pytest.mark.parametrize(("size", "most"), [(1, 64), (3, 64), (1, 8), (2, 4)])
@pytest.mark.parametrize("parts", [(23,), (1, 2, 5, 15), (9, 14)], ids=str)
def test_costs_of_groups(size, most, parts):
    """Whatever the groups are, they hold all samples once; two become one where there would be too many."""
    _, _, trajectory = flow(n=23)
    samples = SampleCosts(trajectory.times, size, most)
    for v in trajectory.v.split(parts, 1):
        samples.update(v)
    found, first = errors(trajectory), 0
    assert samples.count == samples.sizes.sum() == 23
    assert samples.groups == len(samples.sizes) <= most
    assert samples.size == {(1, 64): 1, (3, 64): 3, (1, 8): 4, (2, 4): 8}[size, most]
    for gram, length in zip(samples.grams, samples.sizes.int().tolist(), strict=True):
        expected = found[..., first : first + length].square().sum(-1)
        assert relative_error(fk.cost_from_gram(gram, trajectory.times), expected.where(expected > 1e-20, 0)) <= 1e-8
        first += length
    expected = errors(trajectory).square().mean(-1)
    assert relative_error(samples.cost(), expected.where(expected > 1e-20, 0)) <= 1e-8


@pytest.mark.parametrize("norm", [False, True])
def test_costs_along_schedules(norm):
    _, _, trajectory = flow(n=5)
    samples = SampleCosts(trajectory.times).update(trajectory.v)
    schedules = list(fk.least_cost_schedules(samples.cost(), trajectory.times, range(1, 10)).values())
    found, error = samples.along(schedules, norm), errors(trajectory)
    assert found.shape == (5, 9)
    for schedule, cost in zip(schedules, found.T, strict=True):
        steps = torch.stack([error[step] for step in itertools.pairwise(schedule.indices)])
        assert torch.allclose(cost, (steps if norm else steps.square()).sum(0), rtol=1e-8, atol=1e-12)


def test_velocities_whose_squares_overflow():
    velocity = lambda x, t: (1e200 * t[:, None]).expand_as(x)  # noqa: E731
    with pytest.raises(ValueError, match=r"^velocity: expected velocities whose squared .* finite, got an overflow"):
        fk.calibrate(velocity, normal(3, 2, dtype=torch.float64), 4, 2, **QUIET)


def test_what_a_calibration_holds():
    velocity, noise, trajectory = flow()
    cal = fk.calibrate(velocity, noise, trajectory.times, [2, 3], **QUIET)
    expected = errors(trajectory).mean(-1)
    assert relative_error(cal.norm_cost, expected.where(expected > 1e-10, 0)) <= 1e-8
    a = trajectory.v.diff(dim=0).flatten(1)
    assert torch.allclose(cal.gram, a @ a.T / 7, rtol=1e-12)
    none = fk.calibrate(velocity, noise, trajectory.times, [2, 3], keep_bytes=0, **QUIET)
    assert (none.kept, none.norm_cost) == (None, None)
    few = fk.calibrate(velocity, noise, trajectory.times, [2, 3], keep_bytes=8 * 5 * 19 * 2, **QUIET)
    expected = errors(trajectory)[..., :2].mean(-1)
    assert relative_error(few.norm_cost, expected.where(expected > 1e-10, 0)) <= 1e-8


@pytest.mark.parametrize(
    "make", [BUNDLED["digits"].load, lambda: fk.fuse(BUNDLED["digits"].load(), 4, shape=(1, 8, 8))]
)
@pytest.mark.parametrize(("kept", "chunk"), [(9, None), (9, 4), (5, None), (5, 2), (5, 3), (0, 4)])
def test_kept_trajectories(make, kept, chunk):
    velocity, noise = make(), normal(9, 1, 8, 8)
    sample = 64 * 4 * (11 + 10)
    cal = fk.calibrate(velocity, noise, 10, 3, keep_bytes=kept * sample + sample // 2, chunk=chunk, **QUIET)
    whole = fk.calibrate(velocity, noise, 10, 3, **QUIET)
    assert torch.allclose(cal.cost[:, 2:], whole.cost[:, 2:], rtol=1e-4)
    if kept == 0:
        assert cal.kept is None
        return
    expected = fk.rollout(velocity, noise, 10)
    assert torch.equal(cal.kept.times, cal.times)
    assert cal.kept.x.shape == (11, kept, 1, 8, 8)
    assert cal.kept.v.shape == (10, kept, 1, 8, 8)
    assert torch.allclose(cal.kept.x, expected.x[:, :kept], atol=1e-5)
    assert torch.allclose(cal.kept.v, expected.v[:, :kept], atol=1e-4)


def test_kept_by_default_and_in_the_dtypes_of_a_rollout():
    velocity, noise, trajectory = flow()
    kept = fk.calibrate(velocity, noise, trajectory.times, 2, **QUIET).kept
    assert torch.equal(kept.x, trajectory.x)
    assert torch.equal(kept.v, trajectory.v)
    with pytest.raises(TypeError, match=r"^keep_bytes: expected a number of bytes, got all"):
        fk.calibrate(velocity, noise, 4, 2, keep_bytes="all", **QUIET)
    with pytest.raises(ValueError, match=r"^keep_bytes: expected at least 0, got -1"):
        fk.calibrate(velocity, noise, 4, 2, keep_bytes=-1, **QUIET)


def samples_of(scales, K=6):
    """A calibration's parts for samples that are one flow, scaled: each sample's costs are its scale squared."""
    v = (ElementwiseField()(normal(1, 3, dtype=torch.float64), even_grid(K)[:-1, None]))[:, None] * scales[:, None]
    samples = SampleCosts(even_grid(K))
    samples.update(v)
    return samples, fk.least_cost_schedules(fk.step_costs(v, K), K, [2, 3])


def test_bootstrap_covers_a_known_mean():
    """Squared scales of a chi-squared distribution: of 100 sets of 60 samples, about 95 intervals hold the mean, and
    the half-width is that of the normal approximation."""
    generator, held, enough, trials = torch.Generator().manual_seed(0), 0, [], 100
    unit = samples_of(torch.ones(1, dtype=torch.float64))[1][2].cost
    for _ in range(trials):
        squares = torch.randn(60, 4, generator=generator, dtype=torch.float64).square().mean(1)
        samples, schedules = samples_of(squares.sqrt())
        schedule = samples.with_intervals(schedules)[2]
        assert schedule.cost_interval[0] < schedule.cost < schedule.cost_interval[1]
        held += schedule.cost_interval[0] <= unit <= schedule.cost_interval[1]
        enough.append(schedule.samples_needed)
    # 95 % less what 60 skewed samples take away, within 3 standard deviations of a binomial
    assert 0.93 - 3 * (0.95 * 0.05 / trials) ** 0.5 <= held / trials < 1
    # the variance of the mean of 4 squared normals is 1/2: half-width 1.96 (1/2 / n)^(1/2), 2 % at n = 4802
    assert 0.85 * 4802 <= sum(enough) / trials <= 1.1 * 4802


def test_bootstrap_is_the_same_again():
    scales = normal(30, dtype=torch.float64)
    first, second = (s.with_intervals(plans)[3] for s, plans in (samples_of(scales), samples_of(scales)))
    assert first.cost_interval == second.cost_interval
    assert first == samples_of(scales)[1][3]  # whose interval is not known
    assert f"cost_interval=[{first.cost_interval[0]:.4g}" in repr(first)


def test_intervals_of_norms():
    scales = normal(40, dtype=torch.float64).abs()
    samples, _ = samples_of(scales)
    plans = samples.with_intervals(fk.least_cost_schedules(samples.norm_cost(), 6, [2]), norm=True)
    unit = samples_of(torch.ones(1, dtype=torch.float64))[0].norm_cost()
    one = sum(unit[j, k].item() for j, k in itertools.pairwise(plans[2].indices))
    assert plans[2].cost == pytest.approx(one * scales.mean().item(), rel=1e-9)
    low, high = plans[2].cost_interval
    spread = 2 * 1.96 * one * scales.std(correction=0).item() / 40**0.5
    assert (high - low) == pytest.approx(spread, rel=0.1)


@pytest.mark.parametrize("tail", [0.0, 0.0107, 0.025, 0.25])
def test_quantiles_without_a_sort(tail):
    values = normal(3, 201, dtype=torch.float64)
    got = torch.tensor(sample_costs.ends(values, tail), dtype=torch.float64)
    expected = values.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64), 1).T
    assert torch.allclose(got, expected, rtol=1e-12)


def test_tails_of_few_groups_are_those_of_students_t():
    """`Phi(-t sqrt(G / (G-1)))` with the 97.5 % quantiles of Student's t from tables."""
    for groups, t in ((6, 2.5706), (17, 2.1199), (32, 2.0395), (10**6, 1.96)):
        expected = torch.special.ndtr(torch.tensor(-t * (groups / (groups - 1)) ** 0.5, dtype=torch.float64)).item()
        assert sample_costs.tail_of(groups) == pytest.approx(expected, rel=0.02)


def test_samples_that_agree_need_no_more():
    samples, plans = samples_of(torch.ones(5, dtype=torch.float64))
    assert samples.with_intervals(plans)[2].samples_needed == 1
    straight = fk.calibrate(lambda x, t: torch.ones_like(x), normal(5, 3), 6, 2, **QUIET)[2]
    assert (straight.cost, straight.cost_interval, straight.samples_needed) == (0, (0, 0), 1)


def test_one_sample_has_no_interval():
    cal = fk.calibrate(linear_field(), normal(1, 4), 6, 2, **QUIET)
    assert (cal[2].cost_interval, cal[2].samples_needed) == (None, None)


def paths(K, steps, forced=()):
    """All that have the forced knots."""
    found = [(0, *inner, K) for inner in itertools.combinations(range(1, K), steps - 1)]
    return [path for path in found if set(forced) <= set(path)]


def least(K, steps, cost, forced=()):
    """The path of least cost by trying all, and its cost."""
    costs = {path: cost(path) for path in paths(K, steps, forced)}
    best = min(costs, key=costs.get)
    return best, costs[best]


class Turning(torch.nn.Module):
    """A curved field whose features act on each other."""

    def __init__(self, dim=3):
        super().__init__()
        self.matrix = torch.nn.Parameter(normal(dim, dim, seed=4, dtype=torch.float64))

    def forward(self, x, t):
        s = t.to(x.dtype)[:, None]
        return (2 * x @ self.matrix.T + 3 * s).sin() + 4 * s * s


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
        assert schedule.notes == ({} if own else {"objective": objective, "evaluations": 0, **options})
        assert (schedule.cost_interval is None) == (objective == "gits")
    assert sorted(cal) == (list(plans) if own else before)  # only BOSS's are the calibration's own


# what `get_dp_list` of github.com/zju-pi/diff-sampler, gits-main (commit 68d5ce4), gave for `Turning` on an even grid
# of 12 steps from normal(6, 3), its Euler teacher's times being 1 - t and its denoiser x + (1 - t) v; and its
# `cost_mat` from the noise to the end
GITS = {
    "dev": (0.9892837056387864,
            [[0, 12], [0, 8, 12], [0, 7, 9, 12], [0, 7, 9, 11, 12], [0, 6, 8, 10, 11, 12], [0, 6, 8, 9, 10, 11, 12],
             [0, 5, 7, 8, 9, 10, 11, 12], [0, 5, 6, 7, 8, 9, 10, 11, 12]]),
    "l1": (3.0975593206826315,
           [[0, 12], [0, 9, 12], [0, 8, 10, 12], [0, 8, 10, 11, 12], [0, 7, 9, 10, 11, 12], [0, 3, 7, 9, 10, 11, 12],
            [0, 3, 6, 8, 9, 10, 11, 12], [0, 3, 6, 7, 8, 9, 10, 11, 12]]),
    "l2": (1.916694851250148,
           [[0, 12], [0, 9, 12], [0, 8, 10, 12], [0, 7, 9, 11, 12], [0, 7, 9, 10, 11, 12], [0, 3, 7, 9, 10, 11, 12],
            [0, 3, 6, 8, 9, 10, 11, 12], [0, 3, 6, 7, 8, 9, 10, 11, 12]]),
}  # fmt: skip


@pytest.mark.parametrize("metric", GITS)
def test_gits_is_its_authors(metric):
    cal = fk.calibrate(Turning(), normal(6, 3, dtype=torch.float64), 12, 2, **QUIET)
    whole, knots = GITS[metric]
    plans = cal.find(range(1, 9), objective="gits", metric=metric)
    assert [list(plan.indices) for plan in plans.values()] == knots
    assert plans[1].cost == pytest.approx(whole, rel=1e-9)
    if metric == "dev":  # their defaults
        assert cal.find(range(1, 9), objective="gits") == plans


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
    assert not torch.allclose(cost, errors(trajectory).square().mean(-1), rtol=0.1)
    for steps, schedule in cal.find(range(len(forced) + 1, 8), objective="endpoint", velocity=velocity).items():
        along = lambda path: sum(cost[j, k].item() for j, k in itertools.pairwise(path))  # noqa: E731
        best, expected = least(7, steps, along, forced)
        assert schedule.indices == best
        assert schedule.cost == pytest.approx(expected, rel=1e-9, abs=1e-20)
        assert schedule.notes == {"objective": "endpoint", "evaluations": 30, "samples": 6, "probes": 2}


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
    assert {plan.notes["evaluations"] for plan in plans.values()} == {evaluated}
    assert counted.calls == 7 + 3  # a call for each round, and a look at whether rows may have times of their own
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


# what `search_OSS` of github.com/bebebe666/OptimalSteps (commit ee35043) gave for `Turning` on these grids from
# normal(6, 3), all samples as the channels of one image, its indices counted from the noise; and the errors of
# `infer_OSS` on them
OSS = {
    "uneven": (
        uneven_grid(7),
        [[4], [1, 4], [1, 4, 5], [0, 2, 4, 5], [0, 1, 3, 4, 5], [0, 1, 3, 4, 5, 6]],
        [1.152637508763223, 0.4025295307741658, 0.18862716200248317, 0.11070750707254547, 0.03856967087990557,
         0.00787576427672348],
    ),
    "even": (
        even_grid(12),
        [[8], [3, 9], [2, 7, 10], [2, 6, 9, 11], [1, 4, 6, 8, 10], [1, 4, 6, 8, 10, 11], [1, 4, 6, 8, 9, 10, 11],
         [0, 2, 4, 6, 8, 9, 10, 11]],
        [1.4862455447553886, 0.6592206392528983, 0.2929328968639871, 0.17047612402061987, 0.08539886657490685,
         0.0411760481393481, 0.025108242035531733, 0.022838953081857623],
    ),
}  # fmt: skip


@pytest.mark.parametrize("grid", OSS)
def test_oss_is_its_authors(grid):
    times, paths, ends = OSS[grid]
    cal = fk.calibrate(Turning(), normal(6, 3, dtype=torch.float64), times, 2, **QUIET)
    plans = cal.find(range(1, len(paths) + 1), objective="oss", velocity=Turning())
    assert [plan.notes["evaluated"] for plan in plans.values()] == paths
    assert [plan.notes["cost"] for plan in plans.values()] == pytest.approx(ends, rel=1e-9)


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
        assert solver.notes["evaluations"] == 14
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
        assert told[0] == told[1]


def test_an_objective_is_one_function(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "weighted", None)  # so that it goes again
    del OBJECTIVES["weighted"]

    @objectives.objective
    def weighted(cal, steps, *, late: float = 1.0):
        """Least sum of E|e|^2, later steps weighing more."""
        return fk.least_cost_schedules(cal.cost * (1 + late * cal.times), cal.times, steps)

    cal, trajectory = calibrated(Turning())
    e = errors(trajectory).square().mean(-1)
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


class Scattered(torch.nn.Module):
    """Each sample curves at a time of its own, and as much as a heavy-tailed draw of its own."""

    def forward(self, x, t):
        curve = torch.exp(2 * x[:, 0] - ((t.to(x.dtype) - torch.special.ndtr(x[:, 1])) / 0.1) ** 2)
        return torch.stack([torch.zeros_like(curve), torch.zeros_like(curve), curve], 1)


def easy(x, t):
    return 4 * (t * t)[:, None].to(x.dtype).expand_as(x) + 0.01 * x


def test_until_the_schedules_are_stable():
    noise = normal(300, 3, dtype=torch.float64)
    cal = fk.calibrate(easy, noise, 12, [2, 4], max_regret=0.02, **QUIET)
    told = {k: cal.provenance[k] for k in ("n", "n_given", "max_regret", "stopped")}
    assert told == {"n": 32, "n_given": 300, "max_regret": 0.02, "stopped": "schedules stable"}
    assert cal.kept.x.shape[1] == cal.sample_costs.count == 32
    first = fk.calibrate(easy, noise[:32], 12, [2, 4], **QUIET)
    assert torch.allclose(cal.cost[:, 2:], first.cost[:, 2:], rtol=1e-10)
    hard = fk.calibrate(Scattered(), noise, 12, [2, 4], max_regret=0.02, **QUIET)
    assert hard.provenance["n"] == 300
    assert hard.provenance["stopped"] == "all samples used"
    # with a wider margin it stops between
    between = fk.calibrate(Turning(), noise, 12, [2, 4], max_regret=1e-3, **QUIET)
    assert 32 < between.provenance["n"] < 300
    for bad, error in ((0, ValueError), (-1.0, ValueError), (float("nan"), ValueError), ("soon", TypeError)):
        with pytest.raises(error, match=r"^max_regret: expected a"):
            fk.calibrate(easy, noise, 12, 2, max_regret=bad, **QUIET)


def test_regret_by_hand():
    samples, schedules = samples_of(normal(40, dtype=torch.float64))
    assert max(samples.regrets(schedules).values()) <= 1e-12  # all samples agree
    cal = fk.calibrate(Scattered(), normal(60, 3, dtype=torch.float64), 12, [2, 4], **QUIET)
    samples = cal.sample_costs
    weights = samples.resampled(sample_costs.FEW_RESAMPLES)
    for steps, regret in samples.regrets(dict(cal)).items():
        found = []
        for w in weights:
            cost = fk.cost_from_gram((w[:, None, None] * samples.grams).sum(0), cal.times)
            best = fk.least_cost_schedules(cost, cal.times, steps)[steps].cost
            found.append(sum(cost[j, k].item() for j, k in itertools.pairwise(cal[steps].indices)) / best - 1)
        assert regret == pytest.approx(torch.tensor(found, dtype=torch.float64).quantile(0.95).item(), rel=1e-6)
        assert regret > 0.1


class Sided(torch.nn.Module):
    """Positive samples curve early, negative ones late."""

    def forward(self, x, t):
        s = t.to(x.dtype)[:, None]
        return torch.where(x[:, :1] > 0, torch.exp(-8 * s), torch.exp(-8 * (1 - s))).expand_as(x)


def test_verified_on_other_noise(tmp_path):
    noise = normal(40, 2, dtype=torch.float64).abs() + 1
    velocity = Sided()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        good = fk.calibrate(velocity, noise, 30, [1, 3, 5], verify_noise=noise[:7] + 1, chunk=3, **QUIET)
    with pytest.warns(
        UserWarning, match=r"^verify_noise: .*the Bellman schedule has a larger .* for N = 3, 5; use"
    ) as seen:
        bad = fk.calibrate(velocity, noise, 30, [1, 3, 5], verify_noise=-3 - noise, **QUIET)
    assert seen[0].filename == __file__
    assert [good.best(n) == good[n] for n in (1, 3, 5)] == [True] * 3
    assert [bad.best(n) == bad[n] for n in (1, 3, 5)] == [True, False, False]
    for cal, other in ((good, noise[:7] + 1), (bad, -3 - noise)):
        x1 = fk.sample(velocity, other, cal.times)
        for n in (1, 3, 5):
            tried = {"uniform": n, "bellman": cal[n]}
            error = {
                name: (fk.sample(velocity, other, schedule) - x1).square().sum(-1).mean().item()
                for name, schedule in (tried | {"best": cal.best(n)}).items()
            }
            assert cal.verified[n] == pytest.approx({name: error[name] for name in tried}, rel=1e-9)
            assert error["best"] <= error["uniform"]
            for name, (low, high) in cal.verified_interval[n].items():
                assert low < error[name] < high or (error[name] == low == high == 0)
    bad.save(tmp_path / "a.json")
    again = fk.Calibration.load(tmp_path / "a.json")
    assert (again.verified, again.verified_interval) == (bad.verified, bad.verified_interval)
    assert str(again) == str(bad)
    told = [line.split() for line in str(bad).splitlines()[-3:]]
    assert [line[-1] for line in told] == ["bellman", "uniform", "uniform"]
    assert told[2][1:3] == ["{:.4g}".format(bad.verified[5]["uniform"]),
                            "({:.3g}..{:.3g})".format(*bad.verified_interval[5]["uniform"])]  # fmt: skip
    assert again.best(3) == bad.best(3) == fk.Schedule.uniform(3)
    again.verified[5], again.verified_interval[5]["bellman"] = (
        dict(uniform=0.01234, bellman=1.234e-6),
        (1.23e-7, 1.23e-4),
    )
    assert len(str(again).splitlines()[-1].split()) == 7  # columns apart


@pytest.mark.parametrize("n", [10, 100, 5000])
def test_the_interval_of_a_mean_holds_it(n):
    """Of 200 draws about 95 %, and fewer of a heavy tail."""
    draws = normal(200, n, dtype=torch.float64)
    for values, mean, least in ((draws, 0.0, 0.91), (draws.exp(), math.exp(0.5), 0.8)):
        held = [low <= mean <= high for low, high in map(sample_costs.mean_interval, values)]
        assert least <= sum(held) / 200 <= 0.985
    assert sample_costs.mean_interval(draws[0, :1]) is None


def test_a_fused_sampler_is_verified():
    net, noise, other = BUNDLED["digits"].load(), normal(40, 1, 8, 8), normal(5, 1, 8, 8, seed=1)
    settings = dict(grid=10, steps=[2, 3], max_regret=0.5, verify_noise=other, chunk=16) | QUIET
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fused, plain = (fk.calibrate(v, noise, **settings) for v in (fk.fuse(net, 4, shape=(1, 8, 8)), net))
    assert fused.provenance["n"] == plain.provenance["n"] == 32
    assert fused.kept.x.shape == plain.kept.x.shape
    for n in (2, 3):
        assert fused[n].indices == plain[n].indices
        assert fused.verified[n] == pytest.approx(plain.verified[n], rel=1e-4)


def test_noise_to_verify_on():
    noise = normal(6, 2)
    with pytest.raises(
        ValueError, match=r"^verify_noise: expected other noise than the calibration's, got the same values"
    ):
        fk.calibrate(Sided(), noise, 5, 2, verify_noise=noise[:3].clone(), **QUIET)
    with pytest.raises(ValueError, match=r"^verify_noise: expected noise of shape \[m, 2\] on cpu"):
        fk.calibrate(Sided(), noise, 5, 2, verify_noise=normal(6, 3), **QUIET)
    with pytest.raises(TypeError, match=r"^verify_noise: expected a torch.Tensor"):
        fk.calibrate(Sided(), noise, 5, 2, verify_noise=7, **QUIET)


def as_version_1(card, entries):
    """Files as they were: other names of a schedule's entries, hashes of what was verified in a table of their own, at
    first not that of "uniform", and before that none."""
    of_version_1 = ("format", "provenance", "times", "solvers", "cost", "gram", "norm_cost")
    former = {k: card[k] for k in of_version_1} | {"version": 1}
    names = {"indices": "indices", "cost": "cost", "uniform_cost": "uniform_cost"}
    names |= {"cost_interval": "interval", "samples_needed": "enough"}
    former["schedules"] = {n: {new: s[old] for old, new in names.items()} for n, s in card["schedules"].items()}
    verified = card["verified"]
    verified = {n: {name: of[name] for name in ("uniform", "bellman", "fitted")} for n, of in verified.items()}
    former["verified"] = {n: {name: e["error"] for name, e in of.items()} for n, of in verified.items()}
    if "verified_as" in entries:
        hashes = {n: {name: e["sha256"] for name, e in of.items()} for n, of in verified.items()}
        former["verified_as"] = {
            n: {k: v for k, v in of.items() if k in (*entries, "bellman", "fitted")} for n, of in hashes.items()
        }
    return former


def test_fitted_solvers_are_verified(tmp_path):
    """Fits to samples that curve early, verified on samples that curve late: one helps there, and one does not."""
    velocity, noise, wrong = Sided(), normal(40, 2, dtype=torch.float64).abs() + 1, fk.Solver.euler(2)
    with pytest.warns(UserWarning, match=r"^verify_noise: .*the fitted solver has a larger error .* for N = 8; use"):
        cal = fk.calibrate(velocity, noise, 20, [2, 8], verify_noise=-1 - noise, effort="fit", chunk=16, **QUIET)
    assert sorted(cal.solvers) == [2, 8]
    for n, solver in cal.solvers.items():
        assert solver is next(c.plan for c in cal.tried[n] if isinstance(c.plan, fk.Solver))
        x1 = fk.sample(velocity, -1 - noise, 20)
        error = (fk.sample(velocity, -1 - noise, solver) - x1).square().sum(-1).mean().item()
        assert cal.verified[n]["fitted"] == pytest.approx(error, rel=1e-9)
        assert sorted(cal.verified[n]) == sorted(cal.verified_as[n]) == sorted(cal.choices(n))
        assert {"bellman", "fitted", "uniform"} <= set(cal.verified[n])
    for n in (2, 8):
        assert cal.best(n) is cal.choices(n)[min(cal.verified[n], key=cal.verified[n].get)]
    cal.save(tmp_path / "a.json")
    again = fk.Calibration.load(tmp_path / "a.json")
    assert again.best(2).to_dict() == cal.best(2).to_dict()
    for n in (2, 8):
        assert [(c.name, c.error, c.interval, c.samples) for c in again.tried[n]] == [
            (c.name, c.error, c.interval, c.samples) for c in cal.tried[n]
        ]
    assert again.report() == cal.report()
    for entries in ({}, {"verified_as"}, {"verified_as", "uniform"}):
        former = as_version_1(json.loads((tmp_path / "a.json").read_text()), entries)
        (tmp_path / "b.json").write_text(json.dumps(sealed(former)))
        before = fk.Calibration.load(tmp_path / "b.json")
        assert before.best(2).to_dict() == cal.solvers[2].to_dict()
        assert before.best(8) == cal.uniform(8)
        assert before.tried == {}
        assert before.verified == {
            n: {k: e for k, e in of.items() if k in ("uniform", "bellman", "fitted")} for n, of in cal.verified.items()
        }
        assert (before[8].cost_interval, before[8].samples_needed) == (cal[8].cost_interval, cal[8].samples_needed)
    cal.verified.clear()
    assert cal.best(8) is cal.tried[8][0].plan
    cal.solvers[8] = fk.Solver.heun(8)
    assert cal.best(8) is cal.solvers[8]  # what is not verified is the user's word
    cal.solvers.clear(), cal.tried.clear()
    assert cal.best(2) is cal[2]
    with pytest.raises(KeyError, match="find"):
        cal.best(5)
    cal.solvers[5] = wrong
    assert cal.best(5) is wrong
    with pytest.raises(ValueError, match=r"^keep_bytes: expected two samples whose trajectories are kept, .*, got 0"):
        fk.calibrate(velocity, noise, 20, 2, effort="fit", keep_bytes=0, **QUIET)


def test_norms_on_grids_whose_costs_take_much_memory():
    """Groups of one sample are as many as memory allows, and no fewer samples are merged into them."""
    cal = fk.calibrate(Turning(), normal(300, 3, dtype=torch.float64), 300, 2, **QUIET)
    n = cal.single_costs.count
    assert 32 <= n < 300
    x, v = cal.kept.x[:, :n].double(), cal.kept.v[:, :n].double()
    for j, k in [(0, 300), (0, 50), (120, 299)]:
        e = x[k] - x[j] - (cal.times[k] - cal.times[j]) * v[j]
        assert cal.norm_cost[j, k].item() == pytest.approx(e.norm(dim=1).mean().item(), rel=1e-4)


@pytest.mark.parametrize("chunk", [None, 5, 16])
def test_verified_with_conditioning_of_each_sample(chunk):
    velocity = fk.VelocityField(lambda x, t, c: -x * c, conditioning=dict(c=torch.linspace(1, 2, 20)[:, None]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Bellman's schedule is no better here
        cal = fk.calibrate(velocity, normal(20, 2), 10, 2, verify_noise=normal(8, 2, seed=1), chunk=chunk, **QUIET)
    first = fk.VelocityField(lambda x, t, c: -x * c, conditioning=dict(c=torch.linspace(1, 2, 20)[:8, None]))
    noise = normal(8, 2, seed=1)
    expected = (fk.sample(first, noise, 2) - fk.sample(first, noise, 10)).square().sum(1).mean().item()
    assert cal.verified[2]["uniform"] == pytest.approx(expected, rel=1e-4)


def test_schedules_without_costs_are_saved_and_shown(tmp_path):
    cal = fk.calibrate(Turning(), normal(6, 3, dtype=torch.float64), 7, 2, **QUIET)
    cal.schedules.update(cal.find(2, objective="student", velocity=Turning()))
    assert "nan" in str(cal)
    cal.save(tmp_path / "a.json")
    assert fk.Calibration.load(tmp_path / "a.json")[2] == cal[2]


def test_warnings_of_a_calibration_point_at_its_caller():
    net = torch.nn.ModuleDict(dict(unused=torch.nn.Dropout(0.5)))
    net.forward = lambda x, t: -x
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fk.calibrate(lambda x, t: torch.ones_like(x), normal(8, 2), 6, (2, 3), effort="fit", **QUIET)
        assert not caught  # Euler is exact, and so is the fit
        fk.calibrate(
            fk.VelocityField(net), normal(8, 2), 6, (2, 3), effort="fit", verify_noise=normal(8, 2, seed=1), **QUIET
        )
    assert {w.filename for w in caught} == {__file__}
    assert sum("eval mode" in str(w.message) for w in caught) == 1
