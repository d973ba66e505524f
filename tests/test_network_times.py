"""The time that a network gets: formed in float64 and rounded once, in every stage."""

import copy

import pytest
import torch
from _flows import normal
from test_capture import aot_eager, host_cuda, no_loops  # noqa: F401
from torch import nn

import flowkernels as fk
from flowkernels import VelocityField
from flowkernels.velocity.protocol import resolve
from flowkernels.velocity.time_embedding import HasTimeEmbedding

STEPS = 1000
TABLE = normal(STEPS + 1, 3, seed=1)
NOISE = normal(4, 3)
# knots where a float32 1 - t, a thousandfold, falls short of the integer
SHORT = [k for k in range(1, STEPS) if int(STEPS * (1 - torch.tensor(k / STEPS))) != STEPS - k]
KNOTS = torch.tensor([0, *SHORT[::60], STEPS], dtype=torch.float64) / STEPS


def field_at(x, integers):
    return 0.5 * (2 * x).sin() + TABLE.to(x)[integers]


class Table(nn.Module):
    """A velocity that looks the integer part of its time up."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x, t):
        return field_at(x + self.weight.to(x.dtype), t.long())


class Guided(Table):
    def forward(self, x, t, y):
        return super().forward(x, t)


class Column(Table):
    def forward(self, x):
        return super().forward(x[:, :3], x[:, 3])


class Embedded(Table, HasTimeEmbedding):
    def time_embedding(self, t):
        return TABLE[t.long()]

    def forward(self, x, t, embedding=None):
        return 0.5 * (2 * (x + self.weight.to(x))).sin() + (
            self.time_embedding(t) if embedding is None else embedding
        ).to(x)


class Overridden(VelocityField):
    def call_network(self, x, t, kwargs):
        assert torch.compiler.is_compiling() or t.dtype == x.dtype
        return super().call_network(x, t, kwargs)


SCALE = dict(time_scale=STEPS)
BACK = SCALE | dict(reverse_time=True)
GUIDANCE = dict(guidance=2.0, conditioning={"y": torch.ones(1)}, unconditional={"y": torch.ones(1)})
FIELDS = {
    "reversed": lambda: VelocityField(Table(), **BACK),
    "forwards": lambda: VelocityField(Table(), **SCALE),
    "embedded": lambda: VelocityField(Embedded(), **BACK),
    "column": lambda: VelocityField(Column(), time_column=True, **BACK),
    "field in a field": lambda: VelocityField(VelocityField(Table(), **SCALE), reverse_time=True),
    "subclass": lambda: Overridden(Table(), **BACK),
    "guided": lambda: VelocityField(Guided(), **BACK, **GUIDANCE),
    "guided subclass": lambda: Overridden(Guided(), **BACK, **GUIDANCE),
}


class Exact(nn.Module):
    """The same in the library's convention, of float32 times."""

    def __init__(self, back):
        super().__init__()
        self.weight, self.back = nn.Parameter(torch.zeros(1)), back

    def forward(self, x, t):
        at = STEPS * (1 - t.double() if self.back else t.double())
        v = field_at(x + self.weight.to(x.dtype), (at + 1e-3).long())
        return -v if self.back else v


def verified(v):
    return fk.calibrate(v, NOISE, KNOTS, [3], verify_noise=NOISE + 1, effort="fit", progress=False).verified


def calibrated(velocity):
    return fk.calibrate(velocity, NOISE, KNOTS, [3], progress=False)


def compiled(velocity):
    torch._dynamo.reset()
    return torch.compile(lambda x: fk.sample(velocity, x, KNOTS), backend="eager", fullgraph=True)(NOISE)


def straightened(velocity):
    student = copy.deepcopy(velocity)
    schedule = fk.Schedule(KNOTS, KNOTS, tuple(range(len(KNOTS))))
    settings = dict(iterations=8, batch=16, ema=None, progress=False, lr=1e-3)
    return torch.tensor(fk.straighten(student, velocity, schedule, noise=NOISE, **settings).history["loss"])


STAGES = {
    "rollout": lambda v: fk.rollout(v, NOISE, STEPS).x,
    "sample": lambda v: fk.sample(v, NOISE, STEPS),
    "float64": lambda v: fk.sample(v, NOISE.double(), KNOTS),
    "solver": lambda v: fk.sample(v, NOISE, fk.Solver.adams_bashforth(KNOTS)),
    "heun": lambda v: fk.sample(v, NOISE, fk.Solver.heun(KNOTS)),
    "invert": lambda v: fk.invert(v, NOISE, fk.Solver.euler(KNOTS, inverse=True), resample_with=KNOTS).noise,
    "invert by a solver": lambda v: (
        fk.invert(v, NOISE, fk.Solver.adams_bashforth(KNOTS, inverse=True), round_trip=False).noise
    ),
    "compile": lambda v: fk.sample(v, NOISE, KNOTS, capture="compile"),
    "compiled solver": lambda v: fk.sample(v, NOISE, fk.Solver.heun(KNOTS), capture="compile"),
    "graph": lambda v: fk.sample(v, NOISE, KNOTS, capture="graph"),
    "in a compiled function": compiled,
    "calibrate": lambda v: calibrated(v).kept.x,
    "calibrate, verified": lambda v: torch.tensor([*verified(v)[3].values()]),
    "fit": lambda v: fk.fit_solver(v, calibrated(v), 3).coefficients,
    "polish": lambda v: fk.polish(v, calibrated(v), fk.Solver.euler(calibrated(v)[3]), iterations=1).coefficients,
    **{
        objective: lambda v, objective=objective: calibrated(v).find(3, objective=objective, velocity=v)[3].times
        for objective in ("student", "endpoint", "free")
    },
    "straighten": straightened,
    "called": lambda v: torch.stack(
        [v(NOISE, resolve(v).time_for(torch.full((4,), t, dtype=torch.float64), NOISE)) for t in KNOTS.tolist()]
    ),
}


@pytest.mark.filterwarnings("ignore:fit_solver", "ignore:verify_noise")
@pytest.mark.parametrize(
    ("stage", "name"),
    [
        *((stage, "reversed") for stage in STAGES if stage != "compiled solver"),
        *((stage, "subclass") for stage in STAGES if stage != "compile"),
        *((stage, name) for stage in ("heun", "graph", "in a compiled function") for name in list(FIELDS)[1:]),
    ],
)
def test_integers_of_time_are_those_of_the_knots(stage, name, aot_eager, host_cuda):  # noqa: F811
    got, expected = (STAGES[stage](v) for v in (FIELDS[name](), Exact(name != "forwards")))
    assert len(SHORT) > 100
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)
