"""Knots that every schedule has, beyond the recursions (tests/test_objectives.py tries all paths of these)."""

import itertools

import pytest
import torch
from _flows import ElementwiseField, normal, uneven_grid

import flowkernels as fk
from flowkernels.calibration.objectives import OBJECTIVES

F64 = torch.float64
K, FORCED = 24, (9, 15)
GRID = uneven_grid(K)
NOISE = normal(24, 3, dtype=F64)
QUIET = dict(progress=False)


class TwoNetworks(fk.VelocityBase):
    """One field before a time, and another from it on."""

    forced_knots = tuple(GRID[list(FORCED)].tolist())
    field = ElementwiseField()

    def __call__(self, x, t):
        return self.field(x, t) if t[0] < self.forced_knots[0] else 2 - 3 * self.field(x, t)


@pytest.fixture(scope="module")
def cal():
    return fk.calibrate(TwoNetworks(), NOISE, GRID, [3, 4, 6], effort="fit", verify_noise=NOISE.flip(0) + 1e-3, **QUIET)


def test_a_velocity_announces_them(cal, tmp_path):
    velocity = TwoNetworks()
    assert cal.forced_knots == velocity.forced_knots
    cal.save(tmp_path / "c.json")
    again = fk.Calibration.load(tmp_path / "c.json")
    assert again.forced_knots == cal.forced_knots
    assert again.find(5)[5] == cal.find(5)[5]
    assert fk.calibrate(velocity, NOISE, GRID, 1, forced_knots=(), **QUIET).forced_knots == ()


def test_every_plan_has_them(cal):
    forced = set(cal.forced_knots)
    plans = [plan for n in cal for plan in (*cal.choices(n).values(), cal.best(n))]
    none = fk.Calibration(cal.times, cal.cost, {}, cal.provenance, kept=cal.kept, forced_knots=cal.forced_knots)
    plans += [fk.fit_solver(TwoNetworks(), none, n, inverse=n > 3) for n in (3, 4)]
    ends = GRID[[i - 1 for i in cal[4].indices[1:]]]
    for start in (cal[4], fk.Solver.heun(cal[4]), fk.Solver.euler(cal[6]), fk.Solver.euler(cal[4], model_times=ends)):
        plans.append(polished := fk.polish(TwoNetworks(), cal, start, iterations=8))
        if isinstance(start, fk.Solver):  # each evaluation stays with its network
            for knot in cal.forced_knots:
                assert torch.equal(polished.model_times < knot, start.model_times < knot)
    for plan in plans:
        assert forced <= set(plan.times.tolist())


def test_equal_steps_between_them():
    """As many in each interval as leave the longest step as short as can be: against all ways to share them out."""
    for start, forced, N in ((0.0, [0.1, 0.5], 7), (0.2, [0.25], 4), (0.0, [0.7, 0.6, 0.6], 3)):
        times = fk.Schedule.uniform(N, start, forced).times
        ends = torch.tensor([start, *sorted(set(forced)), 1], dtype=F64)
        assert set(ends.tolist()) <= set(times.tolist())
        shares = [s for s in itertools.product(range(1, N), repeat=len(ends) - 1) if sum(s) == N]
        longest = min((ends.diff() / torch.tensor(s)).max() for s in shares)
        assert times.diff().max() == pytest.approx(longest.item(), rel=1e-12)
    assert torch.equal(fk.Schedule.uniform(5).times, torch.linspace(0, 1, 6, dtype=F64))


def test_schedules_without_them_are_refused(cal, monkeypatch):
    velocity, plan = TwoNetworks(), fk.Schedule(GRID[[0, 9, 12, K]])
    without = r"expected the forced knot 0\.\d+ among the knots, as no step may span it, got \[0.0, "
    for call in (
        lambda: fk.fit_solver(velocity, cal, 3, schedule=plan),
        lambda: fk.polish(velocity, cal, plan),
        lambda: fk.polish(velocity, cal, fk.Solver.heun(plan)),
    ):
        with pytest.raises(ValueError, match=rf"^(schedule|start): {without}"):
            call()
    late = fk.Schedule(GRID[[15, 19, K]])  # which has them behind it
    assert torch.equal(fk.fit_solver(velocity, cal, 2, schedule=late).times, late.times)

    def forgets(cal, steps):
        return fk.least_cost_schedules(cal.cost, cal.times, steps)

    monkeypatch.setitem(OBJECTIVES, "forgets", forgets)
    with pytest.raises(ValueError, match=rf"^objective: {without}"):
        cal.find(3, objective="forgets")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (dict(steps=2), r"^steps: expected at least 3, one more than forced_knots, got 2"),
        (dict(forced_knots=[0.5]), r"^forced_knots: expected times of the grid, got 0.5, whose nearest one is 0\.\d+ "),
        (dict(forced_knots=0.5), r"^forced_knots: expected a sequence of finite times, got 0.5"),
        (dict(forced_knots=[float("nan")]), r"^forced_knots: expected a sequence of finite times"),
    ],
)
def test_bad_forced_knots(options, told):
    with pytest.raises(ValueError, match=told):
        fk.calibrate(TwoNetworks(), NOISE, GRID, **{"steps": 4, **options})
    assert fk.calibrate(TwoNetworks(), NOISE, GRID, 1, forced_knots=[0, 1], **QUIET).forced == ()  # its ends


def test_stable_schedules_have_them():
    """What is looked at for `max_regret` has them too: a regret against schedules that span them would never end."""
    noise = normal(200, 3, seed=2, dtype=F64) / 50
    cal = fk.calibrate(TwoNetworks(), noise, GRID, [3, 4], max_regret=0.05, **QUIET)
    assert cal.provenance["n"] < 200
    free = fk.calibrate(TwoNetworks(), noise, GRID, [3, 4], forced_knots=(), **QUIET)
    assert free[3].cost < 0.9 * cal[3].cost
