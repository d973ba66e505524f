"""Guidance by a function: wherever a weight goes, the same as the weight; where it cannot go, refused by name."""

import functools
import warnings

import pytest
import torch
from _flows import normal
from test_capture import aot_eager  # noqa: F401
from torch import nn

import flowkernels as fk
from flowkernels.calibration.calibration import Calibration
from flowkernels.velocity.identity import identity

W, LIMIT, QUIET = 2.5, 0.5, dict(progress=False)
NOISE, LABELS = normal(6, 4), normal(6, 4, seed=1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(9, 16), nn.Tanh(), nn.Linear(16, 4))

    def forward(self, x, t, y):
        return self.layers(torch.cat([x, y.to(x.dtype), t[:, None].to(x.dtype)], 1))


def by_weight(cond, uncond, t):
    return uncond + W * (cond - uncond)


def in_an_interval(cond, uncond, t):
    assert t.shape == (len(cond),)
    return torch.where(t[:, None] < LIMIT, by_weight(cond, uncond, t), cond)


def rescaled(cond, uncond, t, factor=0.7):
    v = by_weight(cond, uncond, t)
    dims = tuple(range(1, v.dim()))
    scaled = v * (cond.std(dims, keepdim=True) / v.std(dims, keepdim=True))
    return factor * scaled + (1 - factor) * v


def field(guidance, packed=True, **settings):
    none = {"y": torch.zeros(1, 4)}
    return fk.VelocityField(
        Net(), conditioning={"y": LABELS}, unconditional=none, guidance=guidance, packed=packed, **settings
    )


def compiled(velocity):
    return torch.compile(lambda x: fk.sample(velocity, x, 3), fullgraph=True, backend="eager")(NOISE)


def straightened(velocity):
    options = dict(noise=NOISE, grid=4, iterations=3, batch=4, **QUIET)
    return torch.cat(
        [p.flatten() for p in fk.straighten(None, velocity, fk.Schedule([0, 0.5, 1]), **options).student.parameters()]
    )


def jvp(velocity):
    def v(x):
        return velocity(x, torch.full((len(x),), 0.25))

    return torch.func.jvp(v, (NOISE,), (torch.ones_like(NOISE),))[1]


def vmapped(velocity):
    return torch.vmap(lambda x: velocity(x, torch.full((6,), 0.25)))(torch.stack([NOISE, NOISE + 1]))


STAGES = {
    "call": lambda v: v(NOISE, torch.linspace(0, 1, 6)),
    "sample": lambda v: fk.sample(v, NOISE, 4),
    "Adams-Bashforth": lambda v: fk.sample(v, NOISE, fk.Solver.adams_bashforth(4)),
    "in parts": lambda v: fk.calibrate(v, NOISE, 4, [2], chunk=4, **QUIET).cost,
    "velocities": lambda v: fk.rollout(v, NOISE, 4).v,
    "invert": lambda v: fk.invert(v, NOISE, 3).noise,
    "calibrate": lambda v: fk.calibrate(v, NOISE, 6, [2], **QUIET).cost,
    "straighten": straightened,
    "captured, compiled": lambda v: fk.sample(v, NOISE, 2, capture="compile"),
    "inside torch.compile": compiled,
    "jvp": jvp,
    "vmap": vmapped,
}


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "two calls"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_function_is_what_its_weight_is(stage, packed, request):
    if not packed:  # Inductor's code for one of them
        request.getfixturevalue("aot_eager")
    run = STAGES[stage]
    torch.testing.assert_close(run(field(by_weight, packed)), run(field(W, packed)), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("function", [in_an_interval, rescaled, functools.partial(rescaled, factor=0.2)])
def test_functions_of_the_time_and_of_norms(function, aot_eager):  # noqa: F811
    """Against a loop written by hand."""
    velocity, net, x = field(function), Net(), NOISE
    for i in range(4):
        t = torch.full((6,), i / 4)
        cond, uncond = net(x, t, LABELS), net(x, t, torch.zeros(6, 4))
        x = x + function(cond, uncond, t) / 4
    torch.testing.assert_close(fk.sample(velocity, NOISE, 4), x, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fk.sample(velocity, NOISE, 4, capture="compile"), x, rtol=1e-5, atol=1e-6)


def test_it_gets_the_state_s_dtype_and_times_of_the_library_s_convention():
    seen = []

    def function(cond, uncond, t):
        seen.append((cond.dtype, uncond.dtype, t.dtype, t.tolist()))
        return cond.bfloat16()

    net = Net().bfloat16()
    velocity = fk.VelocityField(
        net,
        **dict(conditioning={"y": LABELS}, unconditional={"y": torch.zeros(1, 4)}, guidance=function),
        **dict(dtype=torch.bfloat16, reverse_time=True, time_scale=1000.0, time_offset=3.0),
    )
    assert fk.rollout(velocity, NOISE, 4).v.dtype == torch.float32
    assert [s[:3] for s in seen] == [(torch.float32,) * 3] * 4
    assert [s[3] for s in seen] == [[i / 4] * 6 for i in range(4)]


def test_what_it_returns_is_looked_at():
    for function, error in ((lambda c, u, t: None, TypeError), (lambda c, u, t: c[:, :1], ValueError)):
        for use in (lambda v: v(NOISE, torch.zeros(6)), lambda v: fk.sample(v, NOISE, 2)):
            with pytest.raises(error, match=r"^guidance: expected a function \(cond, uncond, t\) -> v whose v is a "):
                use(field(function))


def test_kernels_refuse_it_by_name():
    """Where guidance joins the step, also if it comes later."""
    said = r"^guidance: expected a weight, in a fused (head|sampler).* got a function test_guidance.by_weight"
    with pytest.raises(fk.NotFusable, match=said):
        fk.fuse(field(by_weight), 3)
    with pytest.raises(ValueError, match=said):
        fk.fuse_head(field(by_weight))
    velocity = field(W)
    sampler, head = fk.fuse(velocity, 3), fk.fuse_head(velocity)
    sampler(NOISE), fk.sample(head, NOISE, 3)
    velocity.guidance = head.guidance = by_weight
    with pytest.raises(fk.NotFusable, match=said):
        sampler(NOISE)
    with pytest.raises(ValueError, match=said):
        fk.sample(head, NOISE, 3)


def test_what_a_record_says_of_it(tmp_path):
    """The qualified name; a function that has none of its own proves nothing, and another one is another velocity."""
    velocity = field(in_an_interval)
    cal = fk.calibrate(velocity, NOISE, 6, [2], **QUIET)
    assert cal.provenance["guidance"] == f"a function {__name__}.in_an_interval"
    assert cal.provenance["convention"]["guidance"] == cal.provenance["guidance"]
    cal.save(tmp_path / "a.boss.json")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Calibration.load(tmp_path / "a.boss.json", field(in_an_interval))
    assert identity(velocity).is_proven(cal.provenance)
    others = (by_weight, W, functools.partial(rescaled, factor=0.2), lambda cond, uncond, t: cond)
    for other in others:
        with pytest.warns(UserWarning, match="got another"):
            Calibration.load(tmp_path / "a.boss.json", field(other))
    partial = functools.partial(rescaled, factor=0.2)
    assert identity(field(partial)) == identity(field(functools.partial(rescaled, factor=0.2)))
    assert identity(field(partial)) != identity(field(functools.partial(rescaled, factor=0.3)))
    unknown = field(others[-1])
    assert "guidance" in identity(unknown).unknown
    assert not identity(unknown).is_proven(identity(unknown).provenance())
