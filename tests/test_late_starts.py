"""Schedules and grids that begin after t = 0, with the state there: what a flow that is translated in time gives, at
every stage, is what the flow itself gives; and schedules that begin within a grid."""

import copy
import itertools
import warnings

import pytest
import torch
from _flows import ElementwiseField, normal, uneven_grid
from torch import nn

import flowkernels as fk
from flowkernels.calibration.objectives import OBJECTIVES
from flowkernels.models.bundled import BUNDLED
from flowkernels.training.bank.knots import knots_on_grid

F64 = torch.float64
QUIET = dict(progress=False)
K, N, START = 12, 4, 0.3
NOISE, OTHER = normal(16, 3, dtype=F64), normal(8, 3, seed=1, dtype=F64)


class Later(nn.Module):
    """The flow of a field on [0, 1], on [start, 1]."""

    def __init__(self, field, start: float):
        super().__init__()
        self.field, self.start = field, start
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x, t):
        return self.gain * self.field(x, (t - self.start) / (1 - self.start)) / (1 - self.start)


class Flow:
    """A flow on [start, 1], with a grid of K steps, and its calibration. rate: what its velocities are of those of the
    one from 0."""

    def __init__(self, start: float):
        # a plain function, of which nothing is known, so that fits evaluate all that they need
        net = Later(ElementwiseField(), start)
        self.net, self.velocity, self.rate = net, lambda x, t: net(x, t), 1 / (1 - start)
        self.grid = start + (1 - start) * uneven_grid(K)
        self.grid[-1] = 1
        self.plan = fk.Schedule(self.grid[[0, 2, 5, 9, K]])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            self.cal = fk.calibrate(
                self.velocity, NOISE, self.grid, [2, N], verify_noise=OTHER, effort="fit", max_regret=1e-9, **QUIET
            )

    def unit(self, times):
        """Times of [start, 1] as those of [0, 1]."""
        return 1 - (1 - times) * self.rate

    def told(self, plan):
        """What a plan is, in times of [0, 1] and apart from the rate of velocities."""
        if isinstance(plan, fk.Solver):
            return [self.unit(plan.times), self.unit(plan.model_times), plan.coefficients * self.rate]
        return [self.unit(plan.times), *(torch.tensor(c) for c in (plan.cost, plan.uniform_cost) if c is not None)]


def bank_of(f: Flow):
    return fk.TrajectoryBank(f.velocity, f.plan, noise=NOISE, grid=f.grid, chunk=5, **QUIET).fill().states()


def first_loss(f: Flow):
    options = dict(iterations=1, batch=16, log_every=1, init="keep", grid=f.grid, t_sampling="uniform", **QUIET)
    history = fk.straighten(copy.deepcopy(f.net), f.velocity, f.plan, noise=NOISE.float(), **options).history
    return torch.tensor(history["loss"]) / f.rate**2


def trajectory(f: Flow):
    found = fk.rollout(f.velocity, NOISE, f.grid)
    return [f.unit(found.times), found.x, found.v / f.rate]


def costs(f: Flow):
    found = fk.rollout(f.velocity, NOISE, f.grid)
    table = fk.step_costs(found.v, f.grid)
    return [table, fk.step_costs(found.v, f.grid, found.x), f.unit(fk.least_cost_schedules(table, f.grid, N)[N].times)]


def compiled(f: Flow):
    sample = torch.compile(lambda x: fk.sample(f.net, x, f.plan), backend="eager", fullgraph=True)
    return [sample(NOISE), fk.sample(f.net, NOISE, f.plan, capture=None)]


def calibration(f: Flow):
    cal = f.cal
    errors = [[cal.verified[n][k] for k in ("uniform", "bellman", "fitted")] for n in (2, N)]
    plans = [part for n in (2, N) for plan in cal.choices(n).values() for part in f.told(plan)]
    return [f.unit(cal.times), cal.cost.triu(2), cal.gram / f.rate**2, torch.tensor(errors), *plans]


def back(f: Flow):
    plain = fk.invert(f.velocity, OTHER, f.plan)
    solver = fk.invert(f.velocity, OTHER, fk.Solver.heun(f.plan, inverse=True), resample_with=f.plan)
    return [plain.noise, plain.error, solver.noise, solver.error]


def loaded(f: Flow, path="late.boss.json"):
    f.cal.save(path)
    again = fk.Calibration.load(path)
    assert again.times[0] == f.grid[0]
    assert torch.equal(again.best(N).times, f.cal.best(N).times)
    return [part for n in (2, N) for plan in (again[n], again.solvers[n]) for part in f.told(plan)]


STAGES = {
    "sample": lambda f: fk.sample(f.velocity, NOISE, f.plan),
    **{
        name: lambda f, make=make: fk.sample(f.velocity, NOISE, make(f.plan))
        for name, make in {"ab3": lambda p: fk.Solver.adams_bashforth(p, 3), "heun": fk.Solver.heun}.items()
    },
    "compiled": compiled,
    "rollout": trajectory,
    "costs": costs,
    "invert": back,
    "calibrate": calibration,
    "file": loaded,
    "fit": lambda f: f.told(fk.fit_solver(f.velocity, f.cal, N)),
    "fit inverse": lambda f: f.told(fk.fit_solver(f.velocity, f.cal, N, inverse=True)),
    "fit noise": lambda f: f.told(fk.fit_solver(f.velocity, f.cal, N, noise=OTHER)),
    "polish solver": lambda f: f.told(fk.polish(f.velocity, f.cal, f.cal.solvers[2], iterations=2)),
    "polish schedule": lambda f: f.told(fk.polish(f.velocity, f.cal, f.plan)),
    "bank": bank_of,
    "straighten": first_loss,
}
for objective in OBJECTIVES:
    given = {} if objective in ("squared", "norm", "gits", "pairs") else {"net": True}
    STAGES[objective] = lambda f, o=objective, g=given: f.told(
        f.cal.find(3, objective=o, **({"velocity": f.net} if g else {}))[3]
    )


@pytest.fixture(scope="module")
def flows():
    return Flow(0.0), Flow(START)


@pytest.mark.filterwarnings("ignore:(velocity|fit_solver).*:UserWarning")
@pytest.mark.parametrize("stage", list(STAGES))
def test_a_translated_flow(flows, stage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected, got = (STAGES[stage](f) for f in flows)
    tolerance = dict(rtol=1e-4, atol=1e-6) if stage in ("straighten", "polish solver") else dict(rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(got, expected, **tolerance)


def test_euler_by_hand():
    """Samplers of every kind against a loop in float64, from the state at t = 0.3."""
    net, noise, times = BUNDLED["digits"].load(), normal(3, 1, 8, 8), [0.3, 0.35, 0.6, 1.0]
    wide, x = BUNDLED["digits"].load().double(), noise.double()
    for begin, end in itertools.pairwise(times):
        x = x + (end - begin) * wide(x, torch.full((3,), begin, dtype=F64))
    samplers = {
        "sample": lambda: fk.sample(net, noise, times),
        "fused": lambda: fk.fuse(net, times, shape=(1, 8, 8))(noise),
        "fused, on another": lambda: fk.sample(fk.fuse(net, 4, shape=(1, 8, 8)), noise, times),
        "head": lambda: fk.sample(fk.fuse_head(net), noise, times),
        "there and back": lambda: fk.sample(net, fk.rollout(net, noise, times).x[0], fk.Schedule(times)),
    }
    with torch.no_grad():
        for name, sampler in samplers.items():
            torch.testing.assert_close(sampler().double(), x, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.filterwarnings("ignore:(velocity|fit_solver).*:UserWarning")
def test_a_schedule_that_begins_within_the_grid(flows):
    """Fits, polish and the bank take the teacher's states there: what a calibration that begins there gives."""
    f, first = flows[0], 3
    late = f.grid[first:]
    plan = fk.Schedule(late[[0, 2, 4, -1]])
    begun = f.cal.kept.x[first]
    cal = fk.calibrate(f.velocity, begun, late, 3, **QUIET)
    pairs = {
        "fit": lambda c: fk.fit_solver(f.velocity, c, 3, schedule=plan),
        "back": lambda c: fk.fit_solver(f.velocity, c, 3, schedule=plan, inverse=True),
        "schedule": lambda c: fk.polish(f.velocity, c, plan),
        "solver": lambda c: fk.polish(f.velocity, c, fk.Solver.heun(plan), iterations=1),
    }
    for name, make in pairs.items():
        got, expected = (f.told(make(c)) for c in (f.cal, cal))
        for a, b in zip(got, expected, strict=False):  # the uniform cost is of the whole grid
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10, msg=name)
    bank = fk.TrajectoryBank(f.velocity, plan, noise=NOISE, grid=f.grid, chunk=7, **QUIET).fill()
    assert torch.equal(bank.states(), f.cal.kept.x[[3, 5, 7, K]])


def test_schedules_that_no_grid_has(flows):
    """Beginning before the grid, or apart from it, or at several times."""
    early, late = flows
    for start in (early.plan, fk.Schedule([0.31, 1.0]), fk.Solver.heun(early.plan), fk.Solver.heun([0.31, 1.0])):
        with pytest.raises(ValueError, match=r"^start: expected knots on the calibration's grid, got S"):
            fk.polish(late.velocity, late.cal, start)
    plans = [fk.Schedule(early.grid[[i, 5, K]]) for i in (0, 1)]
    with pytest.raises(ValueError, match=r"^schedule: expected schedules that begin at one time, got beginnings at"):
        fk.fit_solver(early.velocity, early.cal, 2, schedule=plans)
    with pytest.raises(ValueError, match=r"^grid: expected a grid that contains every time of the schedule"):
        knots_on_grid(early.plan, late.grid)
    late.cal.solvers[3] = fk.Solver.heun(3)
    with pytest.raises(
        ValueError, match=r"^solvers.3: expected a solver of the grid's times, from 0.3, got one from 0"
    ):
        late.cal.save("late.boss.json")
    del late.cal.solvers[3]
    for given, end in ((-0.1, 1.0), (0.1, 1.1)):
        message = r"^schedule: expected times from 0 \(noise\), or later, to 1 \(data\), or before, got times from"
        with pytest.raises(ValueError, match=message):
            fk.sample(early.velocity, NOISE, [given, 0.5, end])
