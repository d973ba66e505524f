"""A velocity that is none of the library's own goes through every stage by what it says of itself."""

import inspect
import warnings

import pytest
import torch
from test_capture import aot_eager  # noqa: F401
from torch import Tensor, nn

import flowkernels as fk
from flowkernels.velocity.hashes import tensors_hash
from flowkernels.velocity.protocol import as_given, resolve
from flowkernels.velocity.provenance import Identity

N, D = 24, 3
NOISE = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
CENTRES = torch.randn(N, D, generator=torch.Generator().manual_seed(1))


class Towards(fk.VelocityBase):
    """A velocity with a centre for each sample and guidance, that is neither a module nor a VelocityField."""

    def __init__(self, centres: Tensor, guidance: float = 1.5, scale: float = 0.7):
        self.centres, self.guidance, self.scale = centres, guidance, scale

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        v, v_uncond, w = self.velocities(x, t)
        return v_uncond + w * (v - v_uncond)

    def velocities(self, x, t, embedding=None):
        assert len(x) == len(self.centres) == len(t)
        assert t.dtype == torch.float32
        pull = torch.tanh(self.scale * (self.centres - x)) * (1 + t[:, None])
        return pull, torch.tanh(-self.scale * x), self.guidance

    def rows(self, index, n):
        assert len(range(n)[index] if isinstance(index, slice) else index) <= n == len(self.centres)
        return Towards(self.centres[index], self.guidance, self.scale)

    def without_guidance(self):
        return Towards(self.centres, 1.0, self.scale)

    def identify(self, weights=True):
        return Identity(
            parameters=tensors_hash({"guidance": self.guidance, "scale": self.scale}) if weights else None,
            attributes=tensors_hash({"class": "Towards"}),
            conditioning={"centres": tensors_hash({"": self.centres})},
        )

    def convention(self):
        return {"guidance": self.guidance}


class Network(nn.Module):
    """The same as a network, of which the field makes the guidance."""

    def forward(self, x, t, centres, pulled):
        return torch.tanh(0.7 * (centres - x)) * (1 + pulled * t[:, None])


def field(guidance: float = 1.5) -> fk.VelocityField:
    given = dict(centres=CENTRES, pulled=torch.ones(N, 1)), dict(centres=torch.zeros(N, D), pulled=torch.zeros(N, 1))
    return fk.VelocityField(Network(), conditioning=given[0], unconditional=given[1], guidance=guidance, packed=False)


def stranger() -> Towards:
    return Towards(CENTRES)


def calibrated(velocity, **options) -> fk.Calibration:
    return fk.calibrate(velocity, NOISE, 12, [2, 3], chunk=10, progress=False, **options)


def trained(velocity, schedule) -> Tensor:
    torch.manual_seed(0)
    student = fk.VelocityField(nn.Sequential(nn.Linear(D + 1, 8), nn.Tanh(), nn.Linear(8, D)), time_column=True)
    options = dict(noise=NOISE, iterations=4, batch=4, progress=False, ema=None)
    net = fk.straighten(student, velocity, schedule, **options).student
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def polished(velocity, plan: int) -> Tensor:
    cal = calibrated(velocity)
    start = cal[2] if plan == 0 else fk.fit_solver(velocity, cal, 2, chunk=10)
    found = fk.polish(velocity, cal, start, iterations=2, chunk=10)
    return found.times if plan == 0 else found.coefficients


STAGES = {
    "rollout": lambda v: fk.rollout(v, NOISE, 5).v,
    "sample": lambda v: fk.sample(v, NOISE, 4),
    "sample by a solver": lambda v: fk.sample(v, NOISE, fk.Solver.adams_bashforth(4)),
    "sample, compiled": lambda v: fk.sample(v, NOISE, 3, capture="compile"),
    "sample in a compiled function": lambda v: torch.compile(fk.sample, fullgraph=True)(v, NOISE, 3),
    "invert": lambda v: fk.invert(v, NOISE, 4).noise,
    "calibrate": lambda v: calibrated(v).cost,
    "calibrate with fits": lambda v: calibrated(v, effort="fit").solvers[2].coefficients,
    "calibrate, verified": lambda v: torch.tensor([*calibrated(v, verify_noise=NOISE.flip(0)).verified[2].values()]),
    "objective endpoint": lambda v: calibrated(v).find([2], objective="endpoint", velocity=v, chunk=10)[2].times,
    "objective student": lambda v: calibrated(v).find([2], objective="student", velocity=v, chunk=10)[2].times,
    "objective free": lambda v: calibrated(v).find([2], objective="free", velocity=v, chunk=10)[2].model_times,
    "fit_solver": lambda v: fk.fit_solver(v, calibrated(v), 3, chunk=10).coefficients,
    "polish a schedule": lambda v: polished(v, 0),
    "polish a solver": lambda v: polished(v, 1),
    "straighten": lambda v: trained(v, calibrated(v)[2]),
}


@pytest.mark.filterwarnings("ignore:verify_noise")
@pytest.mark.parametrize("stage", STAGES)
def test_a_stranger_does_what_a_field_does(stage, aot_eager):  # noqa: F811
    found, expected = STAGES[stage](stranger()), STAGES[stage](field())
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-5)


def test_provenance_says_what_the_stranger_says_of_itself(tmp_path):
    calibrated(stranger()).save(tmp_path / "calibration.json")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cal = fk.Calibration.load(tmp_path / "calibration.json", velocity=stranger())
    assert cal.provenance["parameters_sha256"] == stranger().identify().parameters
    assert cal.provenance["convention"] == {"guidance": 1.5}
    assert cal.provenance["guidance"] == 1.5
    with pytest.warns(UserWarning, match="velocity: expected the model .*parameters"):
        fk.fit_solver(Towards(CENTRES, scale=0.6), calibrated(stranger()), 2)
    with pytest.warns(UserWarning, match="velocity: expected the model .*conditioning 'centres'"):
        fk.fit_solver(Towards(CENTRES + 1), calibrated(stranger()), 2)


class Bare(fk.VelocityBase):
    """A velocity that says nothing beside its call."""

    def __call__(self, x, t):
        return torch.cos(3 * x) + t[:, None]


class BareModule(nn.Linear, fk.VelocityBase):
    """The same as a module."""

    def forward(self, x, t):
        return super().forward(x) + t[:, None]


@pytest.mark.filterwarnings("ignore:fit_solver")
@pytest.mark.parametrize("made", [Bare, lambda: BareModule(D, D)], ids=["callable", "module"])
def test_what_is_not_said_is_as_of_any_callable(made):
    velocity = made()
    own, plain = (fk.calibrate(v, NOISE, 12, [2], progress=False) for v in (velocity, lambda x, t: velocity(x, t)))
    assert own.cost.equal(plain.cost)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "velocity:")
        fk.fit_solver(velocity, own, 2)
    hashes = own.provenance["parameters_sha256"], own.provenance["attributes_sha256"]
    assert all(h is not None for h in hashes) == isinstance(velocity, nn.Module)


def test_a_velocity_with_a_run_of_its_own_is_run():
    runs = []

    class Run(Towards):
        def fused_run(self, plan):
            return lambda noise: runs.append(plan) or noise + 1

    assert fk.sample(Run(CENTRES), NOISE, 4).equal(NOISE + 1)
    assert len(runs) == 1


def test_resolving_is_done_once():
    plain, own = torch.sin, stranger()
    resolved = resolve(plain)
    assert resolve(resolved) is resolved
    assert as_given(resolved) is plain
    assert resolve(own) is own
    assert as_given(own) is own
    with pytest.raises(TypeError, match=r"student: expected a callable velocity\(x, t\), got 3"):
        resolve(3, "student")


PUBLIC = ("calibrate", "fit_solver", "fuse", "fuse_head", "invert", "polish", "rollout", "sample", "straighten")


@pytest.mark.parametrize("name", PUBLIC)
def test_every_stage_says_what_it_takes(name):
    takes = fk.Velocity | None if name == "straighten" else fk.Velocity  # none, where the bank is of pairs
    assert inspect.signature(getattr(fk, name)).parameters["velocity"].annotation == takes
