"""Adapters: every option against a field known in closed form."""

import copy
import types

import pytest
import torch
from _flows import LinearField, linear_field, normal
from torch import nn

import flowkernels as fk
from flowkernels.velocity.field import VelocityField
from flowkernels.velocity.identity import parameter_hash


def velocity(x, t):
    """The field of the tests, dx/dt = x cos(3 t) + t."""
    s = t.view(-1, *[1] * (x.dim() - 1))
    return x * (3 * s).cos() + s


X = normal(6, 2, 3, dtype=torch.float64)
T = torch.linspace(0, 1, 6, dtype=torch.float64)


class Recorder(nn.Module):
    """Returns x times a scale and keeps what it was called with."""

    def __init__(self, result=lambda v: v):
        super().__init__()
        self.result, self.calls = result, []
        self.weight = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, x, t, **kwargs):
        self.calls.append((x, t, kwargs))
        return self.result(x * 2)


# ---- conventions ----


@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (1000.0, 0.0), (0.25, -3.0), (999 * 0.999, 0.999)])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("reverse", [False, True])
def test_time_and_sign(reverse, sign, scale, offset):
    def net(x, tau):  # the same flow in the network's own convention
        t = (tau - offset) / scale
        return sign * velocity(x, 1 - t if reverse else t)

    field = VelocityField(net, reverse_time=reverse, time_scale=scale, time_offset=offset, sign=sign)
    assert torch.allclose(field(X, T), velocity(X, T), rtol=1e-12, atol=1e-12)


def test_a_reversed_network_predicts_the_reversed_velocity():
    """Trained on sigma = 1 - t, a network predicts dx/dsigma = -dx/dt unless said otherwise."""
    field = VelocityField(lambda x, sigma: -velocity(x, 1 - sigma), reverse_time=True)
    assert torch.allclose(field(X, T), velocity(X, T))
    assert VelocityField(velocity).sign == 1


def test_the_same_samples_in_either_convention():
    net = linear_field()
    reversed_net = VelocityField(lambda x, tau: -net(x, 1 - tau / 1000), reverse_time=True, time_scale=1000)
    noise = normal(5, 4, dtype=torch.float64)
    assert torch.allclose(fk.sample(reversed_net, noise, 10), fk.sample(net, noise, 10), rtol=1e-12)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (dict(), [0, 1]),
        (dict(time_name="timestep"), [0, "timestep"]),
        (dict(x_name="hidden_states", time_name="timestep"), ["hidden_states", "timestep"]),
    ],
)
def test_keyword_names(names, expected):
    calls = []

    def net(*args, **kwargs):
        calls.append(dict(enumerate(args)) | kwargs)
        return calls[0][expected[0]]

    assert torch.equal(VelocityField(net, conditioning={"flag": True}, **names)(X, T), X)
    assert set(calls[0]) == {*expected, "flag"}
    assert torch.equal(calls[0][expected[1]], T)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda v: v,
        lambda v: (v,),
        lambda v: (v, "something else"),
        lambda v: types.SimpleNamespace(sample=v),
        lambda v: types.SimpleNamespace(sample=(v, None)),
    ],
    ids=["tensor", "1-tuple", "2-tuple", "sample", "sample tuple"],
)
def test_outputs(wrap):
    field = VelocityField(lambda x, t: wrap(velocity(x, t)))
    assert torch.equal(field(X, T), velocity(X, T))


def test_dtype():
    net = Recorder()
    field = VelocityField(net, dtype=torch.bfloat16)
    assert field(X.float(), T.float()).dtype == torch.bfloat16  # what the network returns
    x, t, _ = net.calls[0]
    assert x.dtype == torch.bfloat16
    assert t.dtype == torch.float32  # bfloat16 times would fall on 256 values
    VelocityField(net)(X.float(), T.float())
    assert net.calls[1][0].dtype == torch.float32


# ---- conditioning ----


def test_conditioning_per_sample_shared_and_plain():
    net = Recorder()
    conditioning = dict(
        rows=normal(6, 5),
        shared=normal(1, 4),
        scalar=torch.tensor(2.0),
        table=normal(9, 3),
        number=3.5,
        word="a",
        none=None,
    )
    VelocityField(net, conditioning=conditioning, shared=("table",))(X, T)
    seen = net.calls[0][2]
    assert set(seen) == set(conditioning)
    assert torch.equal(seen["rows"], conditioning["rows"])
    assert torch.equal(seen["shared"], conditioning["shared"].expand(6, 4))
    for key in ("scalar", "table", "number", "word", "none"):
        assert seen[key] is conditioning[key]


@pytest.mark.parametrize("index", [slice(1, 4), slice(5, 6), torch.tensor([3, 3, 0])], ids=["slice", "one", "index"])
def test_rows(index):
    rows, shared, table = normal(6, 5), normal(1, 4), normal(9, 3)
    field = VelocityField(
        lambda x, t, rows, shared, table, on: x * rows.sum(1)[:, None, None] * shared[0].sum() * table.sum() * on,
        conditioning=dict(rows=rows, shared=shared, table=table, on=1.0),
        shared=["table"],
    )
    part = field.rows(index, 6)
    assert torch.equal(part.conditioning["rows"], rows[index])
    assert part.conditioning["shared"] is shared
    assert part.conditioning["table"] is table
    assert torch.allclose(part(X[index], T[index]), field(X, T)[index])
    assert field.conditioning["rows"] is rows


@pytest.mark.parametrize("packed", [True, False])
def test_tensors_in_containers_follow_the_samples(packed):
    rows, one, table = normal(6, 3), normal(1, 3), normal(6, 2)
    given = dict(added={"y": [rows, one], "how": "so"}, tables=(table,))
    other = dict(added={"y": [-rows, -one], "how": "so"})
    calls = []

    def net(x, t, added, tables):
        calls.append(tables[0])
        first, second = added["y"]
        return x * (first + second)[:, None]

    field = VelocityField(net, conditioning=given, unconditional=other, guidance=3.0, packed=packed, shared=("tables",))
    expected = X * (5 * (rows + one))[:, None]
    assert torch.allclose(field(X, T), expected)
    index = torch.tensor([4, 0])
    assert torch.allclose(field.rows(index, 6)(X[index], T[index]), expected[index])
    assert all(tables is table for tables in calls)  # of as many rows as there are samples, and yet not per sample
    assert field.to(torch.float64).conditioning["added"]["y"][0].dtype == torch.float64


class Taking(nn.Module):
    def __init__(self):
        super().__init__()
        self.last = nn.Linear(3, 3).double()

    def forward(self, x, t, ids):
        return self.last(x)


@pytest.mark.parametrize("values", [normal(9, 3), [normal(9, 3)]], ids=["a tensor", "in a list"])
@pytest.mark.parametrize(
    "use",
    [
        lambda field: field(X, T),
        lambda field: field.rows(slice(0, 6), 6),
        lambda field: fk.calibrate(field, X, 3, [2], chunk=2, progress=False),
        lambda field: fk.fuse_head(field).pair(X, T),
    ],
    ids=["call", "rows", "in parts", "fused head"],
)
@pytest.mark.parametrize("which", ["conditioning", "unconditional"])
@pytest.mark.parametrize("packed", [True, False])
def test_other_numbers_of_rows_are_refused_by_name(which, packed, use, values):
    given = dict(conditioning={"ids": normal(6, 3)}, unconditional={"ids": normal(1, 3)})
    given[which] = {"ids": values}
    field = VelocityField(Taking(), **given, guidance=2.0, packed=packed)
    expected = r"(6|2) rows, one for each sample, or 1 \(shared=\('ids',\) for what is not per sample\)"
    with pytest.raises(ValueError, match=rf"^{which}\['ids'\]: expected {expected}, got .* of shape \[9, 3\]"):
        use(field)


def test_rows_keep_every_setting():
    net = Recorder()
    settings = dict(
        reverse_time=True, time_scale=7.0, sign=1, x_name="x", time_name="t", packed=False, dtype=torch.float64
    )
    conditioning, unconditional = {"y": normal(6, 1)}, {"y": torch.zeros(6, 1)}
    field = VelocityField(net, conditioning=conditioning, unconditional=unconditional, guidance=2.0, **settings)
    part = field.rows(slice(0, 2), 6)
    for name, value in settings.items():
        assert getattr(part, name) == value == getattr(field, name)
    assert part.net is net
    assert part.guidance == 2.0
    assert torch.equal(part.unconditional["y"], torch.zeros(2, 1))
    assert part.convention() == field.convention()


# ---- guidance ----


class Labelled(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x, t, label, scale=1.0):
        self.calls += 1
        return (x * label[:, None, None] + t[:, None, None]).sin() * scale


@pytest.mark.parametrize(
    "uncond", [torch.zeros(1), torch.zeros(6), torch.linspace(-1, 1, 6)], ids=["shared", "rows", "other rows"]
)
@pytest.mark.parametrize("cond", [torch.ones(1), torch.linspace(1, 2, 6)], ids=["shared", "rows"])
@pytest.mark.parametrize("weight", [0.0, 0.5, 3.0, -1.0])
def test_one_packed_call_equals_two(weight, cond, uncond):
    settings = dict(conditioning={"label": cond, "scale": 2.0}, unconditional={"label": uncond}, guidance=weight)
    one, two = Labelled(), Labelled()
    packed, separate = VelocityField(one, **settings), VelocityField(two, packed=False, **settings)
    plain = Labelled()
    v, v_uncond = plain(X, T, cond.expand(6), 2.0), plain(X, T, uncond.expand(6), 2.0)
    expected = v_uncond + weight * (v - v_uncond)
    assert torch.allclose(packed(X, T), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(packed(X, T), separate(X, T))
    assert (one.calls, two.calls) == (2, 2)  # two evaluations of one call, one of two
    for part, whole in zip(packed.pair(X, T), (v, v_uncond), strict=True):
        assert torch.equal(part, whole)


def test_weight_one_is_no_guidance():
    net = Labelled()
    field = VelocityField(net, conditioning={"label": torch.ones(6)})
    assert not field.is_guided
    assert field.pair(X, T)[1] is None
    assert torch.equal(field(X, T), net(X, T, torch.ones(6)))


@pytest.mark.parametrize("packed", [True, False])
def test_the_unconditional_call_keeps_the_other_arguments(packed):
    net = Recorder()
    table, words = normal(9, 2), ["a", "b"]
    field = VelocityField(
        net,
        **dict(conditioning=dict(y=torch.ones(1), table=table, words=words, scalar=torch.tensor(3.0))),
        shared=("table",),
        **dict(unconditional=dict(y=torch.zeros(1)), guidance=2.0, packed=packed),
    )
    field(X, T)
    assert len(net.calls) == (1 if packed else 2)
    for _, _, seen in net.calls:
        assert seen["table"] is table
        assert seen["words"] is words
        assert seen["scalar"] == 3.0
    labels = torch.cat([seen["y"] for _, _, seen in net.calls])
    assert labels.tolist() == [1.0] * 6 + [0.0] * 6


@pytest.mark.parametrize(
    ("cond", "uncond"),
    [
        (torch.ones(6), None),
        (None, torch.ones(6)),
        (torch.tensor(1.0), torch.tensor(0.0)),
        (torch.ones(6), torch.tensor(0.0)),
        (torch.ones(9), torch.zeros(9)),
        ("a cat", ""),
        (1.0, 0.0),
    ],
    ids=["no unconditional", "no conditional", "scalars", "mixed", "tables", "words", "numbers"],
)
def test_what_cannot_be_packed_says_so(cond, uncond):
    table = isinstance(cond, torch.Tensor) and cond.shape == (9,)
    settings = dict(conditioning={"y": cond}, unconditional={"y": uncond}, guidance=2.0, shared=("y",) * table)
    fits = isinstance(cond, torch.Tensor) and cond.dim()
    name = "unconditional" if fits else "conditioning"  # the one that has no rows for these samples
    expected = "the same for both, being shared" if table else "rows for 1 or 6 samples"
    with pytest.raises(ValueError, match=rf"^{name}\['y'\]: expected {expected}.*packed=False"):
        VelocityField(Recorder(), **settings)(X, T)
    net = Recorder()
    VelocityField(net, packed=False, **settings)(X, T)
    for (_, _, seen), value in zip(net.calls, (cond, uncond), strict=True):
        assert seen["y"] is value


def test_without_guidance():
    field = VelocityField(
        Labelled(), conditioning={"label": torch.ones(6)}, unconditional={"label": torch.zeros(1)}, guidance=4.0
    )
    alone = field.without_guidance()
    assert not alone.is_guided
    assert alone.net is field.net
    assert torch.equal(alone(X, T), field.pair(X, T)[0])
    assert field.guidance == 4.0


def test_guidance_in_the_dtype_of_the_state():
    class Narrow(nn.Module):
        def forward(self, x, t, y):
            return (x * y[:, None, None].to(x.dtype)).to(torch.bfloat16)

    field = VelocityField(
        Narrow(),
        conditioning={"y": torch.full((1,), 1.7)},
        unconditional={"y": torch.ones(1)},
        guidance=7.0,
        dtype=torch.bfloat16,
    )
    x = X.float()
    v, u = (part.float() for part in field.pair(x, T.float()))
    assert field(x, T.float()).dtype == torch.float32
    assert torch.equal(field(x, T.float()), u + 7.0 * (v - u))


# ---- as a module ----


def test_state_and_parameters_are_the_networks():
    net = linear_field()
    field = VelocityField(net, reverse_time=True)
    assert list(field.state_dict()) == ["net.matrix"]
    assert list(field.parameters()) == [net.matrix]
    other = VelocityField(linear_field(seed=8), reverse_time=True)
    other.load_state_dict(field.state_dict())
    assert torch.equal(other.net.matrix, net.matrix)
    assert list(VelocityField(velocity).parameters()) == []


def test_modes_propagate_to_the_network_and_only_when_asked():
    net = nn.Sequential(nn.Dropout(0.5)).eval()
    field = VelocityField(net, conditioning={"y": normal(6, 1)}, unconditional={"y": torch.zeros(1)}, guidance=2.0)
    assert not net[0].training
    for derived in (field.rows(slice(0, 2), 6), field.without_guidance()):
        assert derived.training == field.training
        assert not net[0].training
    field.train()
    assert net[0].training
    field.eval()
    assert not net[0].training
    assert not field.rows(slice(0, 2), 6).training


def test_deep_copies_are_apart():
    rows = normal(6, 1)
    field = VelocityField(linear_field(), conditioning={"y": rows}, time_scale=5.0)
    twin = copy.deepcopy(field)
    with torch.no_grad():
        twin.net.matrix.zero_()
    twin.conditioning["y"].zero_()
    assert field.net.matrix.abs().sum() > 0
    assert torch.equal(rows, normal(6, 1))
    assert twin.convention() == field.convention()


def test_gradients_flow():
    field = VelocityField(linear_field(), sign=-1)
    x = normal(5, 4, dtype=torch.float64).requires_grad_()
    field(x, torch.zeros(5, dtype=torch.float64)).sum().backward()
    assert torch.allclose(x.grad, -field.net.matrix.sum(0).expand(5, 4).detach())
    assert field.net.matrix.grad.abs().sum() > 0


def test_parameter_hash():
    net = LinearField(torch.eye(3))
    first = parameter_hash(net)
    assert first == parameter_hash(copy.deepcopy(net)) == parameter_hash(VelocityField(net))
    assert first != parameter_hash(LinearField(torch.eye(3).double()))
    assert first != parameter_hash(VelocityField(net, time_scale=2.0))
    assert first == parameter_hash(VelocityField(net, conditioning={"y": torch.ones(3)}))
    renamed = nn.Module()
    renamed.other = nn.Parameter(torch.eye(3))
    assert first != parameter_hash(renamed)
    assert parameter_hash(velocity) is None
    assert parameter_hash(VelocityField(velocity)) is None
    scalar = nn.Module()
    scalar.register_buffer("steps", torch.tensor(3))
    scalar.register_buffer("none", torch.zeros(0))
    assert len(parameter_hash(scalar)) == 64


# ---- errors ----


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(net=3), TypeError, r"^net: expected a callable net\(x, t\), got 3"),
        (dict(sign=0), ValueError, r"^sign: expected 1, -1 or None, got 0"),
        (dict(sign=2), ValueError, r"^sign: "),
        (dict(time_scale=0), ValueError, r"^time_scale: expected a positive number, got 0"),
        (dict(time_scale=-1000), ValueError, r"^time_scale: "),
        (dict(time_offset=float("nan")), ValueError, r"^time_offset: expected a finite number, got nan"),
        (dict(shared="y", conditioning={"y": 1}), TypeError, r"^shared: expected a tuple of names of conditioning"),
        (dict(shared=["z"], conditioning={"y": 1}), ValueError, r"^shared: expected keys of conditioning \['y'\], got"),
        (dict(guidance="7"), TypeError, r"^guidance: expected a finite weight or a function \(cond, uncond, t\) -> v"),
        (dict(guidance=nn.Identity()), TypeError, r"^guidance: expected a finite weight or a function"),
        (dict(guidance=torch.lerp), ValueError, r"^unconditional: expected a mapping with guidance, got None"),
        (dict(x_name="x"), ValueError, r"^time_name: expected a name as well, with x_name, got None"),
        (dict(guidance=2.0), ValueError, r"^unconditional: expected a mapping with guidance, got None"),
        (
            dict(conditioning={"y": 1}, unconditional={"label": 0}, guidance=2.0),
            *(ValueError, r"^unconditional: expected keys of conditioning \['y'\], got \['label'\]"),
        ),
    ],
)
def test_bad_settings(arguments, error, message):
    with pytest.raises(error, match=message):
        VelocityField(**(dict(net=velocity) | arguments))


@pytest.mark.parametrize("result", [None, 3.0, [], ("v",), types.SimpleNamespace(v=1)], ids=repr)
def test_bad_outputs(result):
    with pytest.raises(TypeError, match=r"^net: expected a tensor, a tuple of tensors or an object with .sample"):
        VelocityField(lambda x, t: result)(X, T)
    with pytest.raises(TypeError, match=r"^net: expected a tensor"):
        fk.sample(VelocityField(lambda x, t: result), X, 2)


def test_bad_shapes_through_guidance():
    field = VelocityField(
        lambda x, t, y: x[:, :1], conditioning={"y": torch.ones(1)}, unconditional={"y": torch.zeros(1)}, guidance=2.0
    )
    with pytest.raises(ValueError, match=r"^velocity: expected x's shape \[6, 2, 3\]"):
        fk.sample(field, X, 2)


def test_conditioning_follows_the_network_to_another_dtype():
    field = VelocityField(
        torch.nn.Linear(3, 3).double(),
        conditioning={"y": torch.ones(2, 3, dtype=torch.float64), "label": torch.tensor([1, 2])},
    ).to(torch.float32)
    assert next(field.parameters()).dtype == torch.float32
    assert field.conditioning["y"].dtype == torch.float32
    assert field.conditioning["label"].dtype == torch.int64
