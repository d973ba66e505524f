"""What a VelocityField's subclass, or one object, overrides is what every stage evaluates."""

import functools
import types

import pytest
import torch
from _flows import ConstantField, normal
from _pairs import pairs
from test_capture import aot_eager, host_cuda, no_loops  # noqa: F401
from torch import nn

import flowkernels as fk
from flowkernels import VelocityField
from flowkernels.sampling import capture
from flowkernels.velocity.protocol import resolve
from flowkernels.velocity.time_embedding import HasTimeEmbedding

NOISE, LABELS = normal(12, 3), normal(12, 3, seed=1)
QUIET = dict(progress=False)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        with torch.no_grad():
            self.layer.weight.copy_(normal(3, 3, seed=2))
            self.layer.bias.copy_(normal(3, seed=3))

    def forward(self, x, t, y):
        return torch.sin(self.layer(x)) + y * t[:, None]


class Call(VelocityField):
    def call_network(self, x, t, kwargs):
        return 3 * super().call_network(x, t, kwargs)


class Pair(VelocityField):
    def pair(self, x, t):
        return tuple(None if v is None else 3 * v for v in super().pair(x, t))


class Forward(VelocityField):
    def forward(self, x, t):
        return 3 * super().forward(x, t)


class WholeCall(VelocityField):
    def __call__(self, x, t):
        return 3 * super().__call__(x, t)


def bound(field):
    field.forward = types.MethodType(lambda self, x, t: 3 * VelocityField.forward(self, x, t), field)
    return field


def partial(field):
    field.forward = functools.partial(lambda self, x, t: 3 * VelocityField.forward(self, x, t), field)
    return field


def hooked(field):
    field.register_forward_hook(lambda module, args, out: 3 * out)
    return field


def prehooked(field):
    field.net.register_forward_hook(lambda module, args, out: 3 * out)
    return field


OVERRIDES = {
    "call_network": Call,
    "pair": Pair,
    "forward": Forward,
    "__call__": WholeCall,
    "forward of one object": lambda *args, **kwargs: bound(VelocityField(*args, **kwargs)),
    "forward as a partial": lambda *args, **kwargs: partial(VelocityField(*args, **kwargs)),
    "a hook": lambda *args, **kwargs: hooked(VelocityField(*args, **kwargs)),
    "a hook of the network": lambda *args, **kwargs: prehooked(VelocityField(*args, **kwargs)),
}


class Tripled(Net):
    def forward(self, x, t, y):
        return 3 * super().forward(x, t, y)


STAGES = {
    "rollout": lambda v: fk.rollout(v, NOISE, 6).x,
    "sample": lambda v: fk.sample(v, NOISE, 6),
    "solver": lambda v: fk.sample(v, NOISE, fk.Solver.heun(3)),
    "invert": lambda v: fk.invert(v, NOISE, 6, round_trip=False).noise,
    "rows": lambda v: v.rows(torch.arange(5), 12)(NOISE[:5], torch.full((5,), 0.3)),
    "rows of rows": lambda v: fk.sample(v.rows(slice(0, 8), 12).rows(slice(2, 5), 8), NOISE[2:5], 3),
    "calibrate": lambda v: fk.calibrate(v, NOISE, 6, 2, chunk=5, **QUIET).cost.triu(1)[:, 1:].nan_to_num(posinf=0),
    "fit": lambda v: fk.fit_solver(v, fk.calibrate(v, NOISE, 6, 2, **QUIET), 2, chunk=5).coefficients,
    "student": lambda v: (
        fk.calibrate(v, NOISE, 6, 2, **QUIET).find(2, objective="student", velocity=v, chunk=5)[2].times
    ),
    "graph": lambda v: fk.sample(v, NOISE, 2, capture="graph"),
    "compile": lambda v: fk.sample(v, NOISE, 2, capture="compile"),
    "straighten": lambda v: torch.tensor(
        fk.straighten(
            None,
            v,
            fk.calibrate(v, NOISE, 6, 2, **QUIET)[2],
            **dict(noise=NOISE, iterations=3, batch=8, ema=None),
            **QUIET,
        ).history["loss"]
    ),
}
PLAIN = dict(conditioning={"y": LABELS})
GUIDED = PLAIN | dict(unconditional={"y": torch.zeros(1, 3)}, guidance=2.0)


@pytest.mark.filterwarnings("ignore:fit_solver")
@pytest.mark.parametrize("name", OVERRIDES)
@pytest.mark.parametrize("stage", STAGES)
def test_stages_evaluate_what_is_overridden(stage, name, aot_eager, host_cuda):  # noqa: F811
    torch._dynamo.reset()
    settings = PLAIN if stage == "straighten" else GUIDED
    expected = STAGES[stage](VelocityField(Tripled(), **settings))
    got = STAGES[stage](OVERRIDES[name](Net(), **settings))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OVERRIDES)
def test_fused_or_refused(name):
    """What fuses a network with the steps takes it as it is evaluated, or says that it does not."""

    class Time(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x, t):
            return self.layer(x)

    torch.manual_seed(0)
    field = OVERRIDES[name](Time())
    expected = fk.sample(field, NOISE, 4)
    for fuse in (lambda: fk.fuse(field, 4, shape=(3,)), lambda: fk.fuse_head(field)):
        try:
            fused = fuse()
            got = fused(NOISE) if isinstance(fused, fk.FusedSampler) else fk.sample(fused, NOISE, 4)
        except ValueError:
            with pytest.raises(ValueError, match=r"^(velocity|head 'layer' of Time): expected "):
                fk.sample(fuse(), NOISE, 4)
            continue
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_replaced_settings_keep_what_a_subclass_holds():
    class Held(VelocityField):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.register_buffer("scale", torch.tensor(2.0))
            self.words, self.gain = ["a"], 5

    field = Held(Net(), **GUIDED)
    for other in (field.rows(slice(0, 2), 12), field.without_guidance()):
        assert type(other) is Held
        assert other.scale is field.scale
        assert (other.gain, other.words) == (5, ["a"])
        assert other.net is field.net
        other.register_buffer("more", torch.zeros(1))
        other.conditioning["y"] = None
        assert "more" not in dict(field.named_buffers())
        assert torch.equal(field.conditioning["y"], LABELS)
    assert not field.without_guidance().is_guided
    assert field.is_guided


def test_rows_of_a_field_inside():
    inner = VelocityField(Net(), conditioning={"y": LABELS})
    outer = VelocityField(inner, reverse_time=True, sign=1)
    rows = torch.tensor([3, 1])
    part, whole = outer.rows(rows, 12), outer(NOISE, torch.full((12,), 0.3))
    torch.testing.assert_close(part(NOISE[rows], torch.full((2,), 0.3)), whole[rows])
    assert torch.equal(inner.conditioning["y"], LABELS)


def test_rows_of_a_compiled_field():
    field = torch.compile(VelocityField(Net(), conditioning={"y": LABELS}), backend="eager")
    with pytest.raises(ValueError, match=r"^velocity: expected a VelocityField around the wrapped network.*\['y'\]"):
        fk.calibrate(field, NOISE, 4, 2, chunk=5, **QUIET)
    torch._dynamo.reset()


def test_a_compiled_field_is_no_more_compiled_when_rows_are_taken():
    field = VelocityField(Net(), conditioning={"y": LABELS})
    field.compile(backend="eager")
    t = torch.full((2,), 0.3)
    torch.testing.assert_close(field.rows(slice(2, 4), 12)(NOISE[2:4], t), field.net(NOISE[2:4], t, LABELS[2:4]))


# ---- the time embedding ----


class Words(nn.Module):
    """Its embedding is of words, whatever it can make of times."""

    def time_embedding(self, t):
        raise AssertionError

    def forward(self, x, t, embedding=None):
        assert embedding is None
        return x


class Says(Words, HasTimeEmbedding):
    def time_embedding(self, t):
        return t

    def forward(self, x, t, embedding=None):
        return x * (t if embedding is None else embedding)[:, None]


class Without(Says):
    def forward(self, x, t):
        return x


class Inner(VelocityField):
    def forward(self, x, t):
        return super().forward(x, t)


class Own(VelocityField):
    def time_embedding(self, t):
        return super().time_embedding(t) + 1


@pytest.mark.parametrize(
    ("velocity", "says"),
    [(Words(), 0), (Says(), 1), (Without(), 0), (VelocityField(Says()), 1), (Inner(Says()), 0), (Own(Says()), 1)],
    ids=["by the name", "by the protocol", "overridden", "field", "forward of a subclass", "embedding of a subclass"],
)
def test_time_embeddings_are_opted_into(velocity, says):
    assert resolve(velocity).has_time_embedding() == says
    expected = torch.stack([(1 + (t + isinstance(velocity, Own)) / 3) for t in torch.tensor([0, 1 / 3, 2 / 3])]).prod()
    got = fk.sample(velocity, NOISE, 3)
    if type(velocity) not in (Words, Without):
        torch.testing.assert_close(got, NOISE * expected)


# ---- captured loops ----

CHANGES = {
    "hook": lambda net: net.register_forward_hook(lambda module, args, out: 2 * out),
    "pre-hook": lambda net: net.register_forward_pre_hook(lambda module, args: (2 * args[0], *args[1:])),
    "hook inside": lambda net: net.layer.register_forward_hook(lambda module, args, out: 2 * out),
    "number": lambda net: setattr(net, "gain", 2.0),
    "function": lambda net: setattr(net, "act", torch.cos),
    "forward": lambda net: setattr(net, "forward", lambda x, t: x),
    "module": lambda net: setattr(net, "layer", nn.Linear(3, 3)),
    "weights": lambda net: net.layer.weight.data.mul_(2),
    "list": lambda net: net.numbers.append(2.0),
    "dict": lambda net: net.settings.update(b=2.0),
}


class Changing(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.gain, self.act, self.numbers, self.settings = (
            nn.Linear(3, 3),
            1.0,
            torch.sin,
            [1.0],
            {"a": 1.0},
        )

    def forward(self, x, t):
        return self.act(self.layer(x)) * self.gain * sum(self.numbers) * sum(self.settings.values())


@pytest.mark.parametrize(("change", "mode", "kind"), pairs(CHANGES, ["graph", "compile"], ["network", "field"]))
def test_captured_loops_are_of_what_is_there(change, mode, kind, aot_eager, host_cuda):  # noqa: F811
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = Changing()
    velocity = VelocityField(net) if kind == "field" else net
    before = fk.sample(velocity, NOISE, 2, capture=mode)
    CHANGES[change](net)
    got = fk.sample(velocity, NOISE, 2, capture=mode)
    torch.testing.assert_close(got, fk.sample(velocity, NOISE, 2), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(got, before)


@pytest.mark.parametrize("mode", ["graph", "compile"])
def test_captured_loops_see_hooks_of_a_field(mode, aot_eager, host_cuda):  # noqa: F811
    field = VelocityField(ConstantField(torch.ones(3)))
    assert torch.allclose(fk.sample(field, NOISE, 2, capture=mode), NOISE + 1)
    field.register_forward_hook(lambda module, args, out: 2 * out)
    assert torch.allclose(fk.sample(field, NOISE, 2, capture=mode), NOISE + 2)
    assert len(capture.LOOPS.loops) == 2
