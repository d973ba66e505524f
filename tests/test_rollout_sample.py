"""Rolling out and sampling: the two loops agree bit for bit, and say what is wrong with their input."""

import itertools
import math
import warnings

import pytest
import torch
from _flows import (
    ConstantField,
    Counted,
    ElementwiseField,
    LinearField,
    digits_teacher,
    even_grid,
    linear_field,
    normal,
    uneven_grid,
)
from torch import nn

import flowkernels as fk
from flowkernels.models.bundled import BUNDLED
from flowkernels.models.networks import ResidualMLP
from flowkernels.schedule import Schedule


class LabelledMLP(nn.Module):
    """A small network with a class label, whose output is not zero."""

    def __init__(self, dim=9):
        super().__init__()
        self.body = ResidualMLP(dim, width=24, blocks=1, time_width=8)
        self.embed = nn.Embedding(4, dim)

    def forward(self, x, t, label):
        return self.body(x + self.embed(label).view(x.shape), t)


def labelled(seed=0):
    torch.manual_seed(seed)
    return LabelledMLP().eval()


def guided_field(packed, **settings):
    labels = torch.arange(7) % 3
    none = torch.full((1,), 3)
    return fk.VelocityField(
        labelled(),
        conditioning={"label": labels},
        unconditional={"label": none},
        guidance=2.5,
        packed=packed,
        **settings,
    )


def narrow_field(dtype):
    torch.manual_seed(1)
    return fk.VelocityField(ResidualMLP(64, width=32, blocks=1, time_width=8).to(dtype).eval(), dtype=dtype)


FLOWS = {
    "digits": (digits_teacher, normal(7, 1, 8, 8)),
    "network": (BUNDLED["digits"].load, normal(5, 1, 8, 8)),
    "float64": (linear_field, normal(7, 4, dtype=torch.float64)),
    "bfloat16 noise": (ElementwiseField, normal(3, 5, 7, dtype=torch.bfloat16)),
    "guided packed": (lambda: guided_field(True), normal(7, 9)),
    "guided in two calls": (lambda: guided_field(False), normal(7, 9)),
    "bfloat16 network": (lambda: narrow_field(torch.bfloat16), normal(7, 64)),
    "float16 network": (lambda: narrow_field(torch.float16), normal(7, 64)),
    "float64 noise, bfloat16 network": (lambda: narrow_field(torch.bfloat16), normal(3, 64, dtype=torch.float64)),
    "the state itself": (lambda: lambda x, t: x, normal(3, 5)),
    "a view of the state": (lambda: lambda x, t: x.transpose(1, 2), normal(3, 5, 5)),
    "an expanded view": (lambda: lambda x, t: x[:, :1].expand_as(x), normal(3, 5)),
    "one sample, one feature": (ElementwiseField, normal(1, 1)),
}


@pytest.mark.parametrize("grid", [even_grid(1), even_grid(10), uneven_grid(13)], ids=["K1", "even", "uneven"])
@pytest.mark.parametrize("flow", FLOWS)
def test_sampling_on_all_knots_is_the_teacher(flow, grid):
    make, noise = FLOWS[flow]
    velocity, kept = make(), noise.clone()
    K = len(grid) - 1
    traj = fk.rollout(velocity, noise, grid)
    assert traj.x.shape == (K + 1, *noise.shape)
    assert traj.v.shape == (K, *noise.shape)
    assert traj.x.dtype == (torch.float64 if noise.dtype == torch.float64 else torch.float32)
    assert torch.equal(traj.x[0], noise.to(traj.x.dtype))
    assert torch.equal(traj.times, grid)
    whole = fk.least_cost_schedules(fk.step_costs(traj.v, traj.times), traj.times, K)[K]
    for schedule in (whole, grid, grid.tolist(), Schedule(grid)):
        assert torch.equal(fk.sample(velocity, noise, schedule), traj.x[-1])
    assert torch.equal(noise, kept)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("flow", ["digits", "float64", "guided packed"])
def test_the_same_holds_on_each_backend(flow, backend):
    make, noise = FLOWS[flow]
    velocity = make()
    with fk.backend(backend):
        assert torch.equal(fk.sample(velocity, noise, 9), fk.rollout(velocity, noise, 9).x[-1])


def test_rollout_is_eulers_method():
    velocity, noise, times = ElementwiseField(), normal(6, 3, dtype=torch.float64), uneven_grid(20)
    traj = fk.rollout(velocity, noise, times)
    x = noise
    for i in range(20):
        t = times[i].expand(6)
        assert torch.equal(traj.v[i], velocity(traj.x[i], t))
        x = x + (times[i + 1] - times[i]) * velocity(x, t)
        assert torch.allclose(traj.x[i + 1], x, rtol=1e-13, atol=1e-13)


def test_uniform_forms_of_a_schedule():
    velocity, noise = ElementwiseField(), normal(4, 3)
    expected = fk.sample(velocity, noise, [0, 0.25, 0.5, 0.75, 1])
    for schedule in (4, Schedule.uniform(4), even_grid(4), torch.tensor([0, 0.25, 0.5, 0.75, 1])):
        assert torch.equal(fk.sample(velocity, noise, schedule), expected)
    assert torch.equal(fk.rollout(velocity, noise, 4).x[-1], expected)
    assert torch.equal(fk.rollout(velocity, noise, [0, 0.25, 0.5, 0.75, 1]).x[-1], expected)


def test_a_schedule_of_few_steps_calls_the_velocity_as_often():
    velocity = Counted(ElementwiseField())
    cal = fk.calibrate(velocity, normal(8, 3), grid=20, steps=[3], progress=False)
    assert velocity.calls == 20
    fk.sample(velocity, normal(2, 3), cal[3])
    assert velocity.calls == 23


def test_first_order_convergence():
    field, noise = linear_field(), normal(5, 4, dtype=torch.float64)
    exact = field.exact(noise)
    errors = [(fk.sample(field, noise, K) - exact).abs().max().item() for K in (50, 100, 200, 400)]
    for coarse, fine in itertools.pairwise(errors):
        assert 1.9 < coarse / fine < 2.1


def test_a_constant_velocity_is_exact_in_one_step():
    field, noise = ConstantField(torch.tensor([1.0, -2.0, 0.5])), torch.zeros(4, 3)
    assert torch.equal(fk.sample(field, noise, 1), field.velocity.detach().expand(4, 3))


def test_guidance_is_what_its_formula_says():
    guided = guided_field(True)
    noise, times = normal(7, 9), uneven_grid(6)
    traj = fk.rollout(guided, noise, times)
    for i in range(6):
        t = times[i].float().expand(7)
        cond = guided.net(traj.x[i], t, label=guided.conditioning["label"]).double()
        uncond = guided.net(traj.x[i], t, label=torch.full((7,), 3)).double()
        assert torch.allclose(traj.v[i].double(), uncond + 2.5 * (cond - uncond), rtol=1e-5, atol=1e-6)
    assert traj.v.dtype == torch.float32


def test_narrow_networks_keep_the_state_in_float32():
    traj = fk.rollout(narrow_field(torch.bfloat16), normal(4, 64), 5)
    assert (traj.x.dtype, traj.v.dtype) == (torch.float32, torch.bfloat16)
    x = traj.x[0].double()
    for i in range(5):
        x = x + 0.2 * traj.v[i].double()
    assert torch.allclose(traj.x[-1].double(), x, rtol=0, atol=1e-6 * x.abs().max().item())


def test_no_gradients_are_kept():
    field = linear_field()
    noise = normal(3, 4).requires_grad_()
    assert not fk.sample(field, noise, 3).requires_grad
    assert not fk.rollout(field, noise, 3).x.requires_grad
    assert field.matrix.grad is None


def test_progress_bar_changes_nothing(capsys):
    field, noise = linear_field(), normal(3, 4)
    assert torch.equal(fk.sample(field, noise, 3, progress=True), fk.sample(field, noise, 3))
    assert "sample" in capsys.readouterr().err


# ---- bad input: every stage says the same of the same mistake ----


def straighten(velocity, noise, grid=6):
    times = Schedule([0, 0.5, 1]) if isinstance(grid, int) and grid == 6 else Schedule([0, 1])
    student = LinearField(torch.eye(3))
    return fk.straighten(
        student, velocity, times, noise=noise, grid=grid, iterations=1, batch=4, init="keep", progress=False
    )


STAGES = {
    "rollout": lambda velocity, noise, grid=6: fk.rollout(velocity, noise, grid),
    "sample": lambda velocity, noise, grid=6: fk.sample(velocity, noise, grid),
    "calibrate": lambda velocity, noise, grid=6: fk.calibrate(velocity, noise, grid, 1, progress=False),
    "calibrate in chunks": lambda velocity, noise, grid=6: fk.calibrate(
        velocity, noise, grid, 1, chunk=2, progress=False
    ),
    "straighten": straighten,
}


def spoiled(value, sample):
    noise = normal(5, 3)
    noise[sample, 1] = value
    return noise


BAD_NOISE = {
    "array": (normal(5, 3).numpy(), TypeError, r"^noise: .*got ndarray"),
    "rank": (normal(5), ValueError, r"^noise: expected shape \[n, \*shape\] .*\[5\]"),
    "scalar": (torch.tensor(1.0), ValueError, r"^noise: expected shape"),
    "integers": (torch.ones(5, 3, dtype=torch.int64), TypeError, r"^noise: expected torch.float32.*got a torch.int64"),
    "complex": (torch.ones(5, 3, dtype=torch.complex64), TypeError, r"^noise: .*complex64"),
    "device": (torch.ones(5, 3, device="meta"), ValueError, r"^noise: .*CPU or a GPU.* on meta"),
    "no samples": (torch.ones(0, 3), ValueError, r"^noise: expected at least one sample .*\[0, 3\]"),
    "no features": (torch.ones(5, 0), ValueError, r"^noise: expected at least one .*feature.*\[5, 0\]"),
    "NaN": (spoiled(math.nan, 3), ValueError, r"^noise: expected finite values, got NaN or Inf in sample 3"),
    "Inf": (spoiled(math.inf, 4), ValueError, r"^noise: expected finite values, got NaN or Inf in sample 4"),
}


@pytest.mark.parametrize("bad", BAD_NOISE)
@pytest.mark.parametrize("stage", STAGES)
def test_bad_noise(stage, bad):
    noise, error, message = BAD_NOISE[bad]
    if stage == "straighten" and bad == "array":
        message = "^noise: "
    if stage == "straighten" and bad == "device":
        message = "^noise: .*meta"
    velocity = Counted(ElementwiseField())
    with pytest.raises(error, match=message):
        STAGES[stage](velocity, noise)
    assert velocity.calls == 0


BAD_GRIDS = {
    "equal times": ([0, 0.5, 0.5, 1], ValueError, r"strictly increasing times, got times\[1\] = 0.5, times\[2\] = 0.5"),
    "decreasing": ([1, 0.5, 0], ValueError, r"strictly increasing times"),
    "begins before 0": (
        [-0.1, 0.5, 1],
        ValueError,
        r"times from 0 \(noise\), or later, to 1 .*got times from -0.1 to 1",
    ),
    "ends after 1": (
        [0, 0.5, 1.1],
        ValueError,
        r"times from 0 \(noise\), or later, to 1 .*got times from 0 to 1.1",
    ),
    "NaN": ([0, math.nan, 1], ValueError, r"finite times"),
    "one time": ([0.0], ValueError, r".*at least two times"),
    "no times": ([], ValueError, r".*at least two times"),
    "two dimensions": ([[0, 1], [0, 1]], ValueError, r".*in one dimension"),
    "no steps": (0, ValueError, r"at least 1 step, got 0"),
    "negative": (-3, ValueError, r"at least 1 step, got -3"),
    "fraction": (2.5, ValueError, r"a number of steps or at least two times"),
    "word": ("ten", TypeError, r"a number of steps or a sequence of times"),
    "nothing": (object(), TypeError, r"a number of steps or a sequence of times"),
    "calibration": ({4: [0, 1]}, TypeError, r"a number of steps or a sequence of times, .*cal\[N\] or cal.best\(N\)"),
}


@pytest.mark.parametrize("bad", BAD_GRIDS)
@pytest.mark.parametrize("stage", STAGES)
def test_bad_grid(stage, bad):
    grid, error, message = BAD_GRIDS[bad]
    name = "schedule" if stage == "sample" else "grid"
    velocity = Counted(ElementwiseField())
    with pytest.raises(error, match=f"^{name}: expected {message}"):
        STAGES[stage](velocity, normal(5, 3), grid)
    assert velocity.calls == 0


@pytest.mark.parametrize(("steps", "message"), [(0, "at least 1, got 0"), (7, "at most K = 6, .*got 7")])
def test_bad_steps_before_the_rollout(steps, message):
    velocity = Counted(ElementwiseField())
    with pytest.raises(ValueError, match=f"^steps: expected {message}"):
        fk.calibrate(velocity, normal(5, 3), 6, [2, steps], progress=False)
    assert velocity.calls == 0


@pytest.mark.parametrize(("chunk", "error"), [(0, ValueError), (-1, ValueError), (2.0, TypeError)])
def test_bad_chunk_before_the_rollout(chunk, error):
    velocity = Counted(ElementwiseField())
    with pytest.raises(error, match=r"^chunk: expected"):
        fk.calibrate(velocity, normal(5, 3), 6, 2, chunk=chunk, progress=False)
    assert velocity.calls == 0


class Spoiling(nn.Module):
    """A velocity that is not finite for one sample from one step of a uniform grid on."""

    def __init__(self, noise, sample, step, K, value=math.nan):
        super().__init__()
        self.mark, self.time, self.value = noise[sample, 0].item(), step / K - 1e-6, value

    def forward(self, x, t):
        v = torch.zeros_like(x)  # so that the first feature keeps telling the samples apart
        hit = (x[:, 0] == self.mark) & (t > self.time)
        v[hit, 1] = self.value
        return v


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("sample", "step"), [(0, 0), (3, 2), (4, 5)])
@pytest.mark.parametrize("stage", STAGES)
def test_velocity_that_is_not_finite(stage, sample, step, value):
    noise = normal(5, 3)
    message = rf"^velocity: expected finite velocities, got NaN or Inf in sample {sample} at step {step} \(t = "
    with pytest.raises(ValueError, match=message):
        STAGES[stage](Spoiling(noise, sample, step, 6, value), noise)


@pytest.mark.parametrize("stage", STAGES)
def test_guided_velocity_that_is_not_finite(stage):
    noise = normal(5, 3)
    spoiling = Spoiling(noise, 2, 4, 6)
    field = fk.VelocityField(
        lambda x, t, on: torch.where(on[:, None], spoiling(x, t), torch.zeros_like(x)),
        **dict(conditioning={"on": torch.zeros(1, dtype=torch.bool)}, guidance=3.0),
        unconditional={"on": torch.ones(1, dtype=torch.bool)},
    )
    with pytest.raises(ValueError, match="sample 2 at step 4"):
        STAGES[stage](field, noise)


@pytest.mark.parametrize("stage", STAGES)
def test_state_that_overflows(stage):
    with pytest.raises(ValueError, match=r"^velocity: .*sample 0.*(overflow|at step)"):
        STAGES[stage](lambda x, t: 1e20 * x.abs() + 1e30, normal(5, 3))


BAD_VELOCITIES = {
    "fewer features": (lambda x, t: x[:, :2], ValueError, r"x's shape \[\d, 3\] .*t = 0, got .*\[\d, 2\]"),
    "another rank": (lambda x, t: x[..., None], ValueError, r"x's shape \[\d, 3\].*\[\d, 3, 1\]"),
    "fewer samples": (lambda x, t: x[1:], ValueError, r"x's shape"),
    "device": (lambda x, t: x.to("meta"), ValueError, r"on cpu.*on meta"),
    "not a tensor": (lambda x, t: x.tolist(), TypeError, r"a tensor of shape \[\d, 3\], got list"),
    "a tuple": (lambda x, t: (x,), TypeError, r"a tensor of shape \[\d, 3\], got tuple"),
    "nothing": (lambda x, t: None, TypeError, r"got NoneType"),
    "a pipeline": (
        type("DiffusionPipeline", (), {"__call__": lambda self, x, t: x})(),
        TypeError,
        r"pipeline_velocity\(pipe, prompt=prompts\) makes one of a pipeline, got DiffusionPipeline",
    ),
    "changes later": (lambda x, t: x if t[0] < 0.5 else x.sum(1), ValueError, r"x's shape .*t = 0.5, got"),
}


@pytest.mark.parametrize("bad", BAD_VELOCITIES)
@pytest.mark.parametrize("stage", STAGES)
def test_bad_velocity(stage, bad):
    velocity, error, message = BAD_VELOCITIES[bad]
    with pytest.raises(error, match=f"^velocity: expected .*{message}"):
        STAGES[stage](velocity, normal(5, 3))


@pytest.mark.parametrize("stage", STAGES)
def test_velocity_of_integers(stage):
    with pytest.raises(TypeError, match=r"torch.int64"):
        STAGES[stage](lambda x, t: x.long(), normal(5, 3))


class Dropping(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, t):
        return self.layer(x)


@pytest.mark.parametrize("wrap", [lambda net: net, fk.VelocityField], ids=["network", "field"])
@pytest.mark.parametrize(
    "layer", [nn.Dropout(0.5), nn.Dropout1d(0.5), nn.BatchNorm1d(3)], ids=lambda m: type(m).__name__
)
@pytest.mark.parametrize("stage", STAGES)
def test_training_mode_warns_at_the_caller(stage, layer, wrap):
    net = Dropping(layer).train()
    with pytest.warns(
        UserWarning, match=f"^velocity: expected a network in eval mode, got {type(layer).__name__}"
    ) as seen:
        STAGES[stage](wrap(net), normal(4, 3))
    assert len(seen) == 1
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        STAGES[stage](wrap(net.eval()), normal(4, 3))
        STAGES[stage](wrap(Dropping(nn.Dropout(0.0)).train()), normal(4, 3))


@pytest.mark.parametrize("stage", STAGES)
def test_the_network_keeps_its_mode(stage):
    net = Dropping(nn.Dropout(0.5)).eval()
    STAGES[stage](fk.VelocityField(net), normal(5, 3))
    assert not any(module.training for module in net.modules())


@pytest.mark.parametrize("wrap", [lambda net: net, fk.VelocityField], ids=["network", "field"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_stages_and_networks_write_to_is_theirs(wrap, dtype):
    """Steps of a number are made once for all calls: what a call hands out is not of them."""

    def velocity(x, t):
        return x * t.mul_(2)[:, None]

    def run():
        field = wrap(velocity)
        trajectory = fk.rollout(field, x, 5)
        trajectory.times.mul_(3)
        inversion = fk.invert(field, x, 5)
        return trajectory.x, trajectory.v, fk.sample(field, x, 5), inversion.noise, inversion.error

    x = normal(2, 3, dtype=dtype)
    before = run()
    assert all(map(torch.equal, run(), before))
    schedule = Schedule([0, 0.3, 1])
    fk.rollout(velocity, x, schedule).times.mul_(3)
    assert schedule.times.tolist() == [0, 0.3, 1]
