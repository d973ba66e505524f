"""Step costs of single samples, and what their scatter says."""

import itertools
import json
import math
import warnings

import pytest
import torch
from _flows import ElementwiseField, Turning, even_grid, linear_field, normal, relative_error, uneven_grid

import flowkernels as fk
from flowkernels._files import sealed
from flowkernels.calibration import sample_costs
from flowkernels.calibration.sample_costs import SampleCosts
from flowkernels.evaluation import bootstrap
from flowkernels.models.bundled import BUNDLED

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
    got = torch.tensor(bootstrap.ends(values, tail), dtype=torch.float64)
    expected = values.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64), 1).T
    assert torch.allclose(got, expected, rtol=1e-12)


def test_tails_of_few_groups_are_those_of_students_t():
    """`Phi(-t sqrt(G / (G-1)))` with the 97.5 % quantiles of Student's t from tables."""
    for groups, t in ((6, 2.5706), (17, 2.1199), (32, 2.0395), (10**6, 1.96)):
        expected = torch.special.ndtr(torch.tensor(-t * (groups / (groups - 1)) ** 0.5, dtype=torch.float64)).item()
        assert bootstrap.tail_of(groups) == pytest.approx(expected, rel=0.02)


def test_samples_that_agree_need_no_more():
    samples, plans = samples_of(torch.ones(5, dtype=torch.float64))
    assert samples.with_intervals(plans)[2].samples_needed == 1
    straight = fk.calibrate(lambda x, t: torch.ones_like(x), normal(5, 3), 6, 2, **QUIET)[2]
    assert (straight.cost, straight.cost_interval, straight.samples_needed) == (0, (0, 0), 1)


def test_one_sample_has_no_interval():
    cal = fk.calibrate(linear_field(), normal(1, 4), 6, 2, **QUIET)
    assert (cal[2].cost_interval, cal[2].samples_needed) == (None, None)


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


class Bent(Sided):
    """With velocities of several directions, so that a fit's coefficients are no matter of rounding."""

    def forward(self, x, t):
        return super().forward(x, t) * (1 + x.square() / 10)


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
    told = [line.split() for line in str(bad).splitlines()[-5:-2]]  # what follows is the teacher's own error
    assert [line[-1] for line in told] == ["bellman", "uniform", "uniform"]
    assert told[2][1:3] == ["{:.4g}".format(bad.verified[5]["uniform"]),
                            "({:.3g}..{:.3g})".format(*bad.verified_interval[5]["uniform"])]  # fmt: skip
    assert again.best(3) == bad.best(3) == fk.Schedule.uniform(3)
    again.verified[5], again.verified_interval[5]["bellman"] = (
        dict(uniform=0.01234, bellman=1.234e-6),
        (1.23e-7, 1.23e-4),
    )
    assert len(str(again).splitlines()[-3].split()) == 7  # columns apart


@pytest.mark.parametrize("n", [10, 100, 5000])
def test_the_interval_of_a_mean_holds_it(n):
    """Of 200 draws about 95 %, and fewer of a heavy tail."""
    draws = normal(200, n, dtype=torch.float64)
    for values, mean, least in ((draws, 0.0, 0.91), (draws.exp(), math.exp(0.5), 0.8)):
        held = [low <= mean <= high for low, high in map(bootstrap.mean_interval, values)]
        assert least <= sum(held) / 200 <= 0.985
    assert bootstrap.mean_interval(draws[0, :1]) is None


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
    """Fits to samples that curve early, verified on samples of which nine in ten curve late: one helps there, and one
    does not."""
    velocity, noise, wrong = Bent(), normal(40, 2, dtype=torch.float64).abs() + 1, fk.Solver.euler(2)
    other = torch.cat([noise[:4] + 0.1, -1 - noise[4:]])
    with pytest.warns(UserWarning, match=r"^verify_noise: .*the fitted solver has a larger error .* for N = 8; use"):
        cal = fk.calibrate(velocity, noise, 20, [2, 8], verify_noise=other, effort="fit", chunk=16, **QUIET)
    assert sorted(cal.solvers) == [2, 8]
    for n, solver in cal.solvers.items():
        assert solver is next(c.plan for c in cal.tried[n] if isinstance(c.plan, fk.Solver))
        x1 = fk.sample(velocity, other, 20)
        error = (fk.sample(velocity, other, solver) - x1).square().sum(-1).mean().item()
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
