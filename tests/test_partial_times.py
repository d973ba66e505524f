"""Times that end before the data, begin after the noise, or fall: each part of the way is what the whole way is made
of, and where a stage needs the whole way it says so before any work."""

import pytest
import torch
from _flows import Counted, ElementwiseField, digits, normal
from _transformers import field_of
from test_capture import aot_eager, no_loops  # noqa: F401

import flowkernels as fk
from flowkernels import Schedule, Solver
from flowkernels.models.bundled import BUNDLED

F64 = torch.float64
PARTS = ([0.0, 0.15, 0.4], [0.4, 0.7], [0.7, 0.8, 1.0])
WHOLE = [0.0, 0.15, 0.4, 0.7, 0.8, 1.0]
FORMS = {
    "list": list,
    "tensor": torch.tensor,
    "float64": lambda times: torch.tensor(times, dtype=F64),
    "euler": Solver.euler,
    "midpoint": Solver.midpoint,
    "heun": lambda times: Solver.midpoint(times) if len(times) == 2 else Solver.heun(times),
}


def in_parts(sample, noise, form=list, parts=PARTS):
    x = noise
    for times in parts:
        x = sample(x, form(times))
    return x


@pytest.mark.parametrize("form", FORMS)
def test_parts_make_the_whole(form):
    field, noise, make = ElementwiseField(), normal(5, 3, dtype=F64), FORMS[form]
    got = in_parts(lambda x, plan: fk.sample(field, x, plan), noise, make)
    if form in ("list", "euler", "float64"):
        assert torch.equal(got, fk.sample(field, noise, WHOLE))
    elif form != "heun":  # whose last step is Euler's on each part
        torch.testing.assert_close(got, fk.sample(field, noise, make(WHOLE)), rtol=1e-6, atol=1e-7)
    rolled = in_parts(lambda x, plan: fk.rollout(field, x, plan).x[-1], noise, make)
    torch.testing.assert_close(rolled, got, rtol=1e-13, atol=1e-13)


def test_every_sampler_takes_parts(aot_eager):  # noqa: F811
    """Beside the plain loop on the same parts: fused, with a fused head, compiled by capture, and inside a compiler."""
    net, noise = BUNDLED["digits"].load(), digits()[:4]
    field, image = field_of("sd3", 2, guidance=2.0)
    fused, head = fk.fuse(net, WHOLE, shape=(1, 8, 8)), fk.fuse_head(field)
    compiled = torch.compile(lambda x, plan: fk.sample(net, x, plan), backend="eager", fullgraph=True)
    pairs = {
        "fused": (lambda x, plan: fk.sample(fused, x, plan), net, noise),
        "fused on a part": (lambda x, plan: fk.fuse(net, plan, shape=(1, 8, 8))(x), net, noise),
        "head": (lambda x, plan: fk.sample(head, x, plan), field, image),
        "captured": (lambda x, plan: fk.sample(net, x, plan, capture="compile"), net, noise),
        "compiled": (lambda x, plan: compiled(x, torch.tensor(plan, dtype=F64)), net, noise),
    }
    for name, (sampler, plain, x) in pairs.items():
        with torch.no_grad():
            expected = fk.sample(plain, x, WHOLE)
            got = in_parts(sampler, x)
        assert (got - expected).norm() <= 1e-5 * expected.norm(), name


@pytest.mark.parametrize("falls", [False, True], ids=["rising", "falling"])
def test_back_by_parts(falls):
    field, data = ElementwiseField(), normal(5, 3, dtype=F64)
    expected, x = fk.invert(field, data, WHOLE), data
    for times in reversed(PARTS):
        found = fk.invert(field, x, times[::-1] if falls else times)
        assert (found.error > 0).all()
        x = found.noise
    assert torch.equal(x, expected.noise)
    assert torch.equal(fk.invert(field, data, WHOLE[::-1]).error, expected.error)
    for make in (Solver.midpoint, Solver.euler, Solver.heun, Solver.adams_bashforth):
        one, other = (make(times, inverse=True) for times in (WHOLE, WHOLE[::-1]))
        assert one.to_dict() == other.to_dict()


def test_midpoint_goes_back_where_it_came_from():
    field, noise = ElementwiseField(), normal(5, 3, dtype=F64)
    x = fk.sample(field, noise, Solver.midpoint(torch.linspace(0.2, 0.6, 65, dtype=F64)))
    back = Solver.midpoint(torch.linspace(0.2, 0.6, 65), inverse=True)
    found = fk.invert(field, x, back, resample_with=Solver.midpoint(torch.linspace(0.2, 0.6, 65)))
    torch.testing.assert_close(found.noise, noise, rtol=1e-4, atol=1e-5)
    assert found.error.max() < 1e-9


FALLING = r"^{}: expected strictly increasing times t = 1 - sigma \(fk.invert goes back from data\), got times"
REFUSALS = {
    "sample": (lambda v, x, c: fk.sample(v, x, [1, 0.5, 0]), FALLING.format("schedule")),
    "rollout": (lambda v, x, c: fk.rollout(v, x, [1, 0.5, 0]), FALLING.format("grid")),
    "Schedule": (lambda v, x, c: Schedule([1, 0.5, 0]), FALLING.format("times")),
    "fuse": (lambda v, x, c: fk.fuse(v, [1, 0.5, 0], shape=(3,)), FALLING.format("schedule")),
    "invert": (lambda v, x, c: fk.invert(v, x, 3, resample_with=[1, 0.5, 0]), FALLING.format("resample_with")),
    "backwards": (
        lambda v, x, c: fk.rollout(v, x, Solver.euler(3, inverse=True)),
        "^grid: expected a solver from noise to data, got Solver",
    ),
    "elsewhere": (
        lambda v, x, c: fk.invert(v, x, [0.5, 1], resample_with=4),
        "^resample_with: expected times from 0.5 to 1, where the inversion ends and begins, got Solver",
    ),
}
PARTIAL = Solver.midpoint([0.0, 0.25, 0.5])
WHOLE_ALONE = {
    "schedule": (
        lambda v, x, c: Schedule([0, 0.5]),
        r"^times: expected times from 0 .*, or later, to 1 \(data\)",
    ),
    "calibrate": (lambda v, x, c: fk.calibrate(v, x, [0, 0.25, 0.5], 1), "^grid: expected times from 0"),
    "teacher": (lambda v, x, c: fk.calibrate(v, x, 2, 1, teacher_solver=PARTIAL), "^teacher_solver: expected a solver"),
    "costs": (lambda v, x, c: fk.step_costs(x[None].repeat(2, 1, 1), [0, 0.2, 0.5]), "^times: expected times from 0"),
    "bank": (lambda v, x, c: fk.TrajectoryBank(v, PARTIAL, noise=x, grid=4), "^schedules: expected"),
    "loss": (
        lambda v, x, c: fk.StraightenLoss(PARTIAL, target="solver"),
        "^schedule: expected a solver from noise",
    ),
    "export": (lambda v, x, c: fk.export(PARTIAL, "diffusers"), "^plan: expected"),
    "exported knots": (
        lambda v, x, c: fk.export(PARTIAL, "comfy", knots_only=True),
        "^plan: expected a solver from",
    ),
    "evaluate": (
        lambda v, x, c: fk.evaluate_sampler(v, PARTIAL, noise=x),
        "^plans: expected solvers from noise",
    ),
    "reference": (
        lambda v, x, c: fk.evaluate_sampler(v, 2, noise=x, teacher_solver=PARTIAL),
        "^teacher_solver: expected a solver from noise to data",
    ),
    "likelihood": (
        lambda v, x, c: fk.log_likelihood(v, x, Solver.midpoint([0, 0.5], inverse=True)),
        "^solver: expected a solver from data, at t = 1, to noise, at t = 0",
    ),
    "pairs": (
        lambda v, x, c: fk.forward_pairs(v, x, [0, 0.5]),
        "^schedule: expected times that end at 1, where",
    ),
    "polish": (lambda v, x, c: fk.polish(v, c, PARTIAL), "^start: expected a solver from noise to data, or from data"),
    "polish back": (
        lambda v, x, c: fk.polish(v, c, Solver.midpoint([0, 0.25, 0.5], inverse=True)),
        "^start: expected a solver from noise to data, or from data to noise, got Solver",
    ),
}


@pytest.fixture(scope="module")
def calibration():
    return fk.calibrate(ElementwiseField(), normal(8, 3), 4, 2, progress=False)


@pytest.mark.parametrize("name", [*REFUSALS, *WHOLE_ALONE])
def test_refusals(name, calibration):
    velocity = Counted(ElementwiseField())
    call, message = (REFUSALS | WHOLE_ALONE)[name]
    with pytest.raises((ValueError, TypeError), match=message):
        call(velocity, normal(8, 3), calibration)
    assert velocity.calls == 0


def test_a_card_does_not_keep_one(calibration, tmp_path):
    calibration.solvers[2] = PARTIAL
    with pytest.raises(
        ValueError, match=r"^solvers.2: expected a solver of the grid's times, from 0, got one from 0 to"
    ):
        calibration.save(tmp_path / "x.boss.json")
    del calibration.solvers[2]
