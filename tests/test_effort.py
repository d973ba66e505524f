"""What `calibrate(effort=)` tries, within which budget, and what is the best of it."""

import contextlib
import re
import warnings
from dataclasses import replace

import pytest
import torch
from _flows import normal

import flowkernels as fk
from flowkernels.calibration import effort as module
from flowkernels.calibration.neighbours import merged, split
from flowkernels.calibration.progress import Progress
from flowkernels.calibration.selection import Candidate
from flowkernels.calibration.tried import plan_hash, ranked

K, STEPS, BUDGET = 12, [1, 2, 3], 40_000
QUIET = dict(progress=False)


class Counted:
    """A curved flow that counts single samples; `at` is called with each time."""

    def __init__(self, at=lambda t: None):
        self.samples, self.at = 0, at

    def __call__(self, x, t):
        self.samples += len(x)
        self.at(t[0].item())
        return torch.tanh(2 * x.roll(1, 1)) * (1 + torch.cos(6 * t[:, None])) - 0.5 * x


def calibrated(velocity=None, n=32, **options):
    noise = options.pop("noise", normal(n, 3, dtype=torch.float64))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fk.calibrate(velocity or Counted(), noise, **dict(grid=K, steps=STEPS) | QUIET | options)


def figures(cal):
    entries = ("name", "error", "interval", "samples", "evaluations", "failed", "decided", "needed")
    return {n: [[repr(getattr(c, entry)) for entry in entries] for c in of] for n, of in cal.tried.items()}


def counted(cal):
    """The evaluations that it says, without those of vector-Jacobian products, each of which is two."""
    skipped = cal.provenance["effort"].get("skipped", {})
    products = 0 if "knots of endpoint" in skipped else 4 * (K - 1) * cal.provenance["effort"]["samples"]
    return cal.provenance["effort"]["evaluations"] - products


@pytest.fixture(scope="module")
def best():
    velocity = Counted()
    return calibrated(velocity, effort="best", evaluations=BUDGET), velocity.samples


@pytest.mark.parametrize("steps", [STEPS, [2, 7], [K]])
@pytest.mark.parametrize("n", [2, 9, 32])
def test_a_fit_takes_what_it_says(n, steps):
    velocity = Counted()
    cal = calibrated(velocity, n, steps=steps, effort="fit")
    more = 0 if n >= 8 else 8 * sum(steps)  # two samples at least judge
    assert velocity.samples <= n * (K + 2 * sum(steps)) + more
    assert cal.provenance["effort"]["evaluations"] == velocity.samples
    for N in steps:
        names = {c.name for c in cal.tried[N]}
        known = {"uniform", "bellman", "bellman, fitted", "uniform, adams-bashforth 2", "bellman, adams-bashforth 2"}
        assert {"uniform"} <= names <= known
        assert plan_hash(cal.best(N)) == plan_hash(cal.tried[N][0].plan)


def test_errors_are_those_of_the_plans(best):
    """Of what was fitted to no sample."""
    cal, _ = best
    x0, x1 = cal.kept.x[0], cal.kept.x[-1]
    for N, of in cal.tried.items():
        for c in of:
            if "fitted" not in c.name and "refined" not in c.name:
                error = (fk.sample(Counted(), x0, c.plan) - x1).square().sum(1)
                there = ~c.errors.isnan()
                torch.testing.assert_close(c.errors[there], error[there])
                assert c.error == pytest.approx(error[there].mean().item())
                assert there.sum() == c.samples >= 8
            assert fk.Solver.of(c.plan).evaluations == N


def test_the_best_is_none_of_the_losers(best):
    """By the samples that judged both, and on other noise."""
    cal, made = best
    other = normal(256, 3, seed=5, dtype=torch.float64)
    x1 = fk.sample(Counted(), other, K)
    for N in STEPS:
        first, *rest = cal.tried[N]
        assert cal.best(N) is first.plan
        for c in rest:
            rows = ~(c.errors.isnan() | first.errors.isnan())
            baselines = "uniform", "uniform, adams-bashforth 2", "bellman, fitted"
            if c.name in baselines or c.name.startswith("stock"):
                assert first.errors[rows].mean() <= c.errors[rows].mean()
        error = {name: (fk.sample(Counted(), other, plan) - x1).square().sum(1).mean() for name, plan in
                 {"best": cal.best(N), "uniform": N, "bellman": cal[N]}.items()}  # fmt: skip
        assert error["best"] < min(error["uniform"], error["bellman"])
    assert any("refined" in c.name for c in cal.tried[3])
    assert any("free start" in c.name for c in cal.tried[3])
    assert counted(cal) == made


def test_report_and_file(best, tmp_path):
    cal, _ = best
    cal.save(tmp_path / "a.json")
    again = fk.Calibration.load(tmp_path / "a.json")
    assert figures(again) == figures(cal)
    assert again.report() == cal.report()
    assert str(again) == str(cal)
    for N in STEPS:
        assert fk.Solver.of(again.best(N)).to_dict() == fk.Solver.of(cal.best(N)).to_dict()
    lines = cal.report().splitlines()
    assert len(str(cal).splitlines()) < 20 < len(lines)
    for N in STEPS:
        (marked,) = [line for line in lines if line.startswith(f"{N:>3} *")]
        assert cal.tried[N][0].name in marked
        assert f"{cal.tried[N][0].error ** 0.5:.4g}" in marked


def test_a_number_of_steps_of_which_nothing_is_left(best):
    cal, failed = calibrated(effort="fit"), replace(best[0].tried[2][0], failed="ValueError: no")
    cal.tried = {1: [], 2: [failed], 3: cal.tried[3]}
    cal.solvers.clear()
    for N in (1, 2):
        assert torch.equal(cal.best(N).times, cal[N].times)
    assert "failed: ValueError: no" in cal.report()
    assert re.search(r"(?m)^  2         -      1  -$", str(cal))


def test_an_unknown_number_of_steps_says_what_there_is(best):
    with pytest.raises(KeyError, match=r"expected one of \[1, 2, 3\], got 5; .*fit_solver\(velocity, cal, 5\)"):
        best[0].best(5)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.8])
def test_a_budget_is_kept(share):
    n, least = 16, 16 * (K + 2 * sum(STEPS))
    velocity, budget = Counted(), int(least + share * 30_000)
    cal = calibrated(velocity, n, effort="best", evaluations=budget)
    assert velocity.samples == counted(cal)
    assert cal.provenance["effort"]["evaluations"] <= max(budget, least)
    assert all(cal.tried[N][0].error == cal.tried[N][0].error for N in STEPS)
    assert "no budget" in cal.report()


def test_minutes_are_a_budget():
    velocity = Counted()
    cal = calibrated(velocity, effort="best", minutes=1e-6)
    assert {c.name for c in cal.tried[3]} >= {"uniform", "bellman, fitted"}
    assert not any("refined" in c.name for c in cal.tried[3])
    assert cal.teacher_error is None  # which takes time too
    assert velocity.samples <= 32 * (K + 2 * sum(STEPS))


def test_what_takes_longer_than_the_rollout_is_known_by_its_kind():
    cal, budget = calibrated(), module.Budget.of(None, 10)
    search = module.Search(Counted(), cal, 32, Progress(None, {}, None, {}), budget, 0, 0.1)
    for kind, at_most in {"refine": 6000, "stock": 6000}.items():
        assert search.affords(0.9 * at_most, kind, kind)
        assert not search.affords(1.1 * at_most, kind, kind)
    search.task(3, "stock", lambda: [Candidate("a", cal.uniform(3), torch.zeros(32), evaluations=10.0)])
    made, seconds = search.took["stock"]
    assert (made, list(search.took)) == (10.0, ["stock"])
    assert seconds >= 0
    search.took = {"refine": (10.0, 50.0)}
    assert not search.affords(200, "refine", "refine")
    assert search.affords(100, "refine", "refine")
    assert search.affords(200, "stock", "stock")


class Stopped(Exception):
    pass


@pytest.mark.parametrize("error", [Stopped, KeyboardInterrupt])
def test_interrupted_it_goes_on_to_the_same(best, error, tmp_path):
    whole, made = best
    left = made // 3

    class Limited(Counted):
        def __call__(self, x, t):
            v = super().__call__(x, t)
            if self.samples > left:
                raise error
            return v

    path, velocity = tmp_path / "c.safetensors", Limited()
    with contextlib.suppress(Stopped):
        cal = calibrated(velocity, effort="best", evaluations=BUDGET, checkpoint=path)
        assert error is KeyboardInterrupt  # which ends it with what there is
        assert cal.provenance["effort"]["skipped"]["the rest"] == "interrupted"
        assert cal.best(3) is cal.tried[3][0].plan
    velocity.samples = -(10**9)
    again = calibrated(velocity, effort="best", evaluations=BUDGET, checkpoint=path)
    assert velocity.samples + 10**9 < 0.8 * made
    for N in STEPS:  # to the rounding of sums, which memory that lies otherwise changes
        assert [c.name for c in again.tried[N]] == [c.name for c in whole.tried[N]]
        for entry in ("error", "evaluations", "samples"):
            expected = [getattr(c, entry) for c in whole.tried[N]]
            assert [getattr(c, entry) for c in again.tried[N]] == pytest.approx(expected, rel=1e-9, nan_ok=True)


@pytest.mark.parametrize("error", [None, RuntimeError, KeyError, AssertionError])
def test_what_fails_is_listed(error):
    """Without gradients, and where the velocity is not defined between the times of the grid: NaN, or it raises."""

    def velocity(x, t):
        with torch.no_grad():
            on_grid = (t * K - (t * K).round()).abs() < 1e-6
            if error is not None and not on_grid.all():
                raise error("no such time")
            return torch.where(on_grid[:, None], Counted()(x, t), torch.nan)

    cal = calibrated(velocity, grid=K, steps=[5], effort="best", evaluations=20_000)
    failed = {c.name: c.failed for c in cal.tried[5] if c.failed is not None}
    assert ("NaN" if error is None else f"{error.__name__}: ") in failed["uniform"]
    assert "gradients" in cal.provenance["effort"]["skipped"]["knots of endpoint"]
    assert cal.tried[5][0].failed is None
    assert cal.teacher_error is None
    assert "failed: " in cal.report()
    assert torch.isfinite(fk.sample(velocity, cal.kept.x[0], cal.best(5))).all()


@pytest.mark.parametrize(
    "options",
    [
        dict(velocity=lambda x, t: torch.zeros_like(x)),
        dict(velocity=lambda x, t: torch.ones_like(x), n=2),
        dict(grid=[0.2, 0.3, 0.45, 0.6, 0.8, 1.0]),
        dict(grid=6, steps=[2, 3, 6], forced_knots=[0.5]),
        dict(grid=3, steps=[1, 2, 3]),
        dict(grid=4, steps=[2], teacher_solver="heun"),
        dict(velocity=fk.VelocityField(lambda x, t, c: c * torch.tanh(x), conditioning=dict(c=normal(32, 3)))),
        dict(velocity=fk.VelocityField(lambda x, t, c: -c * x, conditioning=dict(c=torch.ones(1, 1)), guidance=2.0,
                                       unconditional=dict(c=torch.zeros(1, 1)))),
    ],
    ids=["zero", "constant", "late", "forced", "K", "heun", "conditioning", "guidance"],
)  # fmt: skip
def test_every_kind_of_calibration(options):
    cal = calibrated(**dict(effort="best", evaluations=8_000) | options)
    other = normal(32, 3, seed=9, dtype=torch.float64)
    velocity = options.get("velocity", Counted())
    for N in cal:
        plan = cal.best(N)
        assert fk.Solver.of(plan).evaluations == N
        assert abs(plan.times[0] - cal.times[0]) < 1e-9
        cal.expect_forced(plan.times, "plan")
        assert torch.isfinite(fk.sample(velocity, other, plan)).all()
        assert cal.tried[N][0].error <= min(c.error for c in cal.tried[N] if c.name == "uniform") + 1e-12


def test_split_and_merged_steps():
    field, x0 = Counted(), normal(4, 3, dtype=torch.float64)
    b, a = torch.rand(3, 3, dtype=torch.float64).tril(), torch.tensor([0.9, 1.1, 0.7], dtype=torch.float64)
    solver = fk.Solver([0, 0.3, 0.5, 1], [0, 0.25, 0.55], b, start_coefficients=a)
    more = split(solver)
    assert more.evaluations == more.steps == 4
    torch.testing.assert_close(more.times, torch.tensor([0, 0.3, 0.5, 0.75, 1], dtype=torch.float64))
    torch.testing.assert_close(fk.sample(field, x0, more), fk.sample(field, x0, solver))
    found = merged(more)
    assert sorted(found) == [1, 2, 3]
    assert all(s.evaluations == s.steps == 3 for s in found.values())
    assert sorted(merged(more, [0.5])) == [1, 3]
    constant = fk.Solver.adams_bashforth([0, 0.3, 0.5, 1], 3)
    for s in (split(constant), *merged(constant).values()):
        torch.testing.assert_close(fk.sample(lambda x, t: torch.ones_like(x), x0, s), x0 + 1)


def test_what_few_samples_judged_is_compared_on_those():
    """A candidate with a few lucky samples is not the best by their smaller mean."""
    plan, nan = fk.Schedule.uniform(1), float("nan")
    whole = Candidate("whole", plan, torch.tensor([1.0, 1.0, 9.0, 9.0, 9.0, 9.0], dtype=torch.float64))
    some = Candidate("some", plan, torch.tensor([2.0, 2.0, nan, nan, nan, nan], dtype=torch.float64))
    assert [c.name for c in ranked([some, whole])] == ["whole", "some"]
    assert [c.samples for c in ranked([some, whole])] == [6, 2]
    better = Candidate("better", plan, torch.tensor([0.5, 0.5, nan, nan, nan, nan], dtype=torch.float64))
    assert ranked([some, whole, better])[0].name == "better"


def test_errors_of_the_size_of_rounding_decide_nothing():
    """Whose ratio may be infinite."""
    plan = fk.Schedule.uniform(1)
    large = torch.tensor([1e-32, 1e-30], dtype=torch.float64)
    small = torch.tensor([5e-324, 0.0], dtype=torch.float64)
    first, second = ranked([Candidate("a", plan, large), Candidate("b", plan, small)])
    assert (first.name, second.name) == ("b", "a")
    assert first.needed is None or first.needed > 0


def test_a_price_is_said_first(capsys):
    calibrated(n=8, steps=[2], effort="best", evaluations=2_000, progress=True)
    assert re.search(r"calibrate: up to 1,[89]\d\d evaluations of single samples more, about", capsys.readouterr().err)


def test_budgets_of_other_efforts_are_refused():
    with pytest.raises(ValueError, match=r"^evaluations: expected None, except with effort='best', got 10"):
        calibrated(effort="fit", evaluations=10)
    with pytest.raises(ValueError, match=r"^minutes: expected None, except with effort='best', got 1"):
        calibrated(minutes=1)
    with pytest.raises(ValueError, match=r"^evaluations: expected at least 768, .*, got 10"):
        calibrated(effort="best", evaluations=10)
    with pytest.raises(ValueError, match=r"^effort: expected .*'best'"):
        calibrated(effort="most")
    assert module.EFFORTS == ("schedule", "fit", "best")
