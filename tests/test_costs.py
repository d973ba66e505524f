"""Step costs of single samples, objectives beyond the mean of squares, and what their scatter says."""

import itertools

import pytest
import torch
from _flows import ElementwiseField, even_grid, linear_field, normal, relative_error, uneven_grid

import flowkernels as fk
from flowkernels.costs import SampleCosts
from flowkernels.models import BUNDLED

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
    for row, length in zip(samples.sums, samples.sizes.int().tolist(), strict=True):
        expected = found[..., first : first + length].square().sum(-1)
        assert relative_error(samples.matrix(row), expected.where(expected > 1e-20, 0)) <= 1e-8
        first += length


def test_what_a_calibration_holds():
    velocity, noise, trajectory = flow()
    cal = fk.calibrate(velocity, noise, trajectory.times, [2, 3], **QUIET)
    expected = errors(trajectory).mean(-1)
    assert relative_error(cal.norm_cost, expected.where(expected > 1e-10, 0)) <= 1e-8
    a = trajectory.v.diff(dim=0).flatten(1)
    assert torch.allclose(cal.gram, a @ a.T / 7, rtol=1e-12)
    none = fk.calibrate(velocity, noise, trajectory.times, [2, 3], keep=0, **QUIET)
    assert (none.kept, none.norm_cost) == (None, None)
    few = fk.calibrate(velocity, noise, trajectory.times, [2, 3], keep=8 * 5 * 19 * 2, **QUIET)
    expected = errors(trajectory)[..., :2].mean(-1)
    assert relative_error(few.norm_cost, expected.where(expected > 1e-10, 0)) <= 1e-8


@pytest.mark.parametrize(
    "make", [BUNDLED["digits"].load, lambda: fk.fuse(BUNDLED["digits"].load(), 4, shape=(1, 8, 8))]
)
@pytest.mark.parametrize(("kept", "chunk"), [(9, None), (9, 4), (5, None), (5, 2), (5, 3), (0, 4)])
def test_kept_trajectories(make, kept, chunk):
    velocity, noise = make(), normal(9, 1, 8, 8)
    sample = 64 * 4 * (11 + 10)
    cal = fk.calibrate(velocity, noise, 10, 3, keep=kept * sample + sample // 2, chunk=chunk, **QUIET)
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
    with pytest.raises(TypeError, match=r"^keep: expected a number of bytes, got all"):
        fk.calibrate(velocity, noise, 4, 2, keep="all", **QUIET)
    with pytest.raises(ValueError, match=r"^keep: expected at least 0, got -1"):
        fk.calibrate(velocity, noise, 4, 2, keep=-1, **QUIET)


def samples_of(scales, K=6):
    """A calibration's parts for samples that are one flow, scaled: each sample's costs are its scale squared."""
    v = (ElementwiseField()(normal(1, 3, dtype=torch.float64), even_grid(K)[:-1, None]))[:, None] * scales[:, None]
    samples = SampleCosts(even_grid(K))
    samples.update(v)
    return samples, fk.bellman(fk.step_cost(v, K), K, [2, 3])


def test_bootstrap_covers_a_known_mean():
    """Squared scales of a chi-squared distribution: of 200 sets of 60 samples, about 190 intervals hold the mean, and
    the half-width is that of the normal approximation."""
    generator, held, enough, trials = torch.Generator().manual_seed(0), 0, [], 200
    unit = samples_of(torch.ones(1, dtype=torch.float64))[1][2].cost
    for _ in range(trials):
        squares = torch.randn(60, 4, generator=generator, dtype=torch.float64).square().mean(1)
        samples, schedules = samples_of(squares.sqrt())
        schedule = samples.with_intervals(schedules)[2]
        assert schedule.interval[0] < schedule.cost < schedule.interval[1]
        held += schedule.interval[0] <= unit <= schedule.interval[1]
        enough.append(schedule.enough)
    # 95 % less what 60 skewed samples take away, within 3 standard deviations of a binomial
    assert 0.93 - 3 * (0.95 * 0.05 / trials) ** 0.5 <= held / trials < 1
    # the variance of the mean of 4 squared normals is 1/2: half-width 1.96 (1/2 / n)^(1/2), 2 % at n = 4802
    assert 0.85 * 4802 <= sum(enough) / trials <= 1.1 * 4802


def test_bootstrap_is_the_same_again():
    scales = normal(30, dtype=torch.float64)
    first, second = (s.with_intervals(plans)[3] for s, plans in (samples_of(scales), samples_of(scales)))
    assert first.interval == second.interval
    assert first == samples_of(scales)[1][3]  # whose interval is not known
    assert f"interval=[{first.interval[0]:.4g}" in repr(first)


def test_intervals_of_norms():
    scales = normal(40, dtype=torch.float64).abs()
    samples, _ = samples_of(scales)
    plans = samples.with_intervals(fk.bellman(samples.norm_cost(), 6, [2]), norm=True)
    unit = samples_of(torch.ones(1, dtype=torch.float64))[0].norm_cost()
    one = sum(unit[j, k].item() for j, k in itertools.pairwise(plans[2].indices))
    assert plans[2].cost == pytest.approx(one * scales.mean().item(), rel=1e-9)
    low, high = plans[2].interval
    spread = 2 * 1.96 * one * scales.std(correction=0).item() / 40**0.5
    assert (high - low) == pytest.approx(spread, rel=0.1)


def test_samples_that_agree_need_no_more():
    samples, plans = samples_of(torch.ones(5, dtype=torch.float64))
    assert samples.with_intervals(plans)[2].enough == 1
    straight = fk.calibrate(lambda x, t: torch.ones_like(x), normal(5, 3), 6, 2, **QUIET)[2]
    assert (straight.cost, straight.interval, straight.enough) == (0, (0, 0), 1)


def test_one_sample_has_no_interval():
    cal = fk.calibrate(linear_field(), normal(1, 4), 6, 2, **QUIET)
    assert (cal[2].interval, cal[2].enough) == (None, None)
