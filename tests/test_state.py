"""What a recorded loop has taken in of a velocity: every change of it is seen, by the extension and without it."""

import collections
import functools
import gc
import types
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import return_and_correct_aliasing

from flowkernels.runtime import backends
from flowkernels.sampling import state as state_module
from flowkernels.sampling.state import LONGEST, State, holds_reference
from flowkernels.velocity.field import VelocityField


class Opaque:
    def __init__(self):
        self.inside = 1

    def method(self, x, t):
        return x


class Slotted:
    __slots__ = ("inside",)


class Twice(torch.Tensor):
    """A tensor made of another one."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner, meta, size, stride):
        return Twice(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func, kinds, args=(), kwargs=None):
        kwargs = kwargs or {}
        plain = torch.utils._pytree.tree_map_only(Twice, lambda t: t.inner, (args, kwargs))
        out = torch.utils._pytree.tree_map_only(torch.Tensor, Twice, func(*plain[0], **plain[1]))
        return return_and_correct_aliasing(func, args, kwargs, out)


class Raising:
    """As proxies do of what is not there."""

    @property
    def __class__(self):
        raise RuntimeError("no class")


class Linear(nn.Linear):
    def forward(self, x):
        return -super().forward(x)


Named = collections.namedtuple("Named", "first")
GLOBAL, LATER, INSIDE = nn.Linear(2, 2), None, nn.Linear(2, 2)


def of_inner_globals(x):
    return sum(INSIDE(x) for _ in range(2))


def of_globals(x):
    return GLOBAL(x) if LATER is None else LATER(x)


def closing_over(value):
    def inner(x, default=None, *, keyword=None):
        return value(x)

    return inner


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(2, 3), nn.BatchNorm1d(3)
        self.register_buffer("shift", torch.zeros(2, 3))
        self.gain, self.name, self.nothing, self.dtype = 1.5, "a", None, torch.float32
        self.numbers, self.pair, self.names = [1.0, torch.ones(2)], (1, torch.ones(3)), {"a", "b"}
        self.settings = {"a": torch.ones(4), "b": [1]}
        self.order = collections.OrderedDict(a=1, b=2)
        self.long, self.empty = list(range(LONGEST + 1)), []
        self.shared = self.settings["b"]
        self.opaque, self.slotted = Opaque(), Slotted()
        self.act, self.globally = closing_over(nn.Linear(1, 1)), of_globals
        self.part = functools.partial(self.act, torch.ones(5), keyword=torch.ones(6))
        self.method = self.layer.forward
        self.twice, self.sparse, self.rows = (
            Twice(torch.ones(2)),
            torch.eye(2).to_sparse(),
            torch.eye(2).to_sparse_csr(),
        )
        self.complex, self.zero, self.nan = torch.ones(2, dtype=torch.complex64), 0.0, float("nan")
        self.nested, self.lazy = torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]), [nn.LazyLinear(2)]
        self.keys, self.named = {1000: 1, (2000, "b"): 2}, Named([1])
        self.proxy, self.inside = weakref.proxy(self.opaque), of_inner_globals
        self.__dict__.update(raising=Raising(), gone=weakref.proxy(Opaque()))


def made():
    net = Net()
    return VelocityField(
        net,
        conditioning={"label": torch.zeros(3), "how": "so"},
        unconditional={"label": torch.zeros(1)},
        guidance=2.5,
    )


def attribute(name, value):
    return lambda field: setattr(field.net, name, value)


def anew(name):
    """Another object, at the same address if Python so likes."""

    def change(field):
        kind = type(getattr(field.net, name))
        delattr(field.net, name)
        setattr(field.net, name, kind())

    return change


def reordered(field):
    field.net.order.move_to_end("a")


def renamed(field):
    field.conditioning["other"] = field.conditioning.pop("label")


def with_data(change):
    def write(field):
        field.net.layer.weight.data = change(field.net.layer.weight.data)

    return write


def in_place_dtype(field):
    """A narrower type in the same memory."""
    weight = field.net.layer.weight
    weight.data = weight.data.view(torch.float16)[:, : weight.shape[1]].as_strided(weight.shape, weight.stride())


def global_one(name, value):
    return lambda field: globals().__setitem__(name, value)


CHANGES = {
    "a parameter replaced": lambda f: setattr(f.net.layer, "weight", nn.Parameter(torch.ones(3, 2))),
    "its data replaced": with_data(torch.clone),
    "its layout": with_data(lambda t: t.as_strided((3, 2), (1, 3))),
    "its shape": with_data(lambda t: t[:2]),
    "its dtype": with_data(torch.Tensor.half),
    "its dtype, in the same memory": in_place_dtype,
    "a state dict assigned": lambda f: f.load_state_dict(
        {k: v.clone() for k, v in f.state_dict().items()}, assign=True
    ),
    "a buffer replaced": attribute("shift", torch.zeros(2, 3)),
    "a buffer resized": lambda f: f.net.shift.resize_(3, 2),
    "a buffer less": lambda f: f.net.norm.register_buffer("running_mean", None),
    "a submodule replaced": attribute("layer", nn.Linear(2, 3)),
    "a submodule more": attribute("more", nn.ReLU()),
    "a submodule less": lambda f: delattr(f.net, "norm"),
    "the network replaced": lambda f: setattr(f, "net", Net()),
    "a conditioning entry replaced": lambda f: f.conditioning.update(label=torch.zeros(3)),
    "a conditioning entry set": lambda f: f.conditioning.update(how="not so"),
    "a conditioning entry more": lambda f: f.conditioning.update(more=1),
    "a conditioning entry renamed": renamed,
    "an unconditional entry replaced": lambda f: f.unconditional.update(label=torch.zeros(1)),
    "the guidance": lambda f: setattr(f, "guidance", 3.5),
    "the time's scale": lambda f: setattr(f, "time_scale", 1000.0),
    "the field's dtype": lambda f: setattr(f, "dtype", torch.bfloat16),
    "train()": lambda f: f.eval().train() if not f.training else f.eval(),
    "train() of one module": lambda f: f.net.norm.eval(),
    "a hook": lambda f: f.net.layer.register_forward_hook(lambda *args: None),
    "a hook before": lambda f: f.net.layer.register_forward_pre_hook(lambda *args: None),
    "a hook of the field": lambda f: f.register_forward_hook(lambda *args: None),
    "a number": attribute("gain", 2.5),
    "a number of another type": attribute("gain", 1),
    "a text": attribute("name", "b"),
    "something for None": attribute("nothing", 0),
    "a dtype": attribute("dtype", torch.float64),
    "an attribute more": attribute("further", 1),
    "an attribute less": lambda f: delattr(f.net, "gain"),
    "a number in a list": lambda f: f.net.numbers.__setitem__(0, 2.0),
    "a tensor in a list": lambda f: f.net.numbers.__setitem__(1, torch.ones(2)),
    "a longer list": lambda f: f.net.numbers.append(1),
    "a list that is empty no more": lambda f: f.net.empty.append(1),
    "a long list's length": lambda f: f.net.long.append(1),
    "another tuple": attribute("pair", (1, torch.ones(3))),
    "an element of a set": lambda f: f.net.names.add("c"),
    "an entry of a dict": lambda f: f.net.settings.update(a=torch.ones(4)),
    "an order": reordered,
    "a list held twice": lambda f: f.net.shared.append(2),
    "another list where one was held twice": attribute("shared", [1]),
    "another object": anew("opaque"),
    "another object without weak references": anew("slotted"),
    "another function": attribute("act", closing_over(nn.Linear(1, 1))),
    "a function's code": lambda f: setattr(f.net.act, "__code__", closing_over(0).__code__.replace(co_name="other")),
    "a function's default": lambda f: setattr(f.net.act, "__defaults__", (1,)),
    "a function's keyword default": lambda f: setattr(f.net.act, "__kwdefaults__", {"keyword": torch.ones(1)}),
    "what a function closes over": lambda f: setattr(f.net.act.__closure__[0], "cell_contents", nn.Linear(1, 1)),
    "nothing that a function closes over": lambda f: delattr(f.net.act.__closure__[0], "cell_contents"),
    "a module that a function names": global_one("GLOBAL", nn.Linear(2, 2)),
    "a module that a function will name": global_one("LATER", nn.Linear(2, 2)),
    "a global less": lambda f: globals().pop("LATER"),
    "another partial": lambda f: setattr(f.net, "part", functools.partial(f.net.act)),
    "a partial's keyword": lambda f: f.net.part.keywords.update(keyword=torch.ones(6)),
    "another method": lambda f: setattr(f.net, "method", f.net.norm.forward),
    "a tensor inside a tensor": lambda f: setattr(f.net.twice, "inner", torch.ones(2)),
    "a sparse tensor": attribute("sparse", torch.eye(2).to_sparse()),
    "a sparse tensor's memory": lambda f: f.net.sparse.add_(torch.ones(2, 2).to_sparse()),
    "a compressed tensor's memory": lambda f: f.net.rows.resize_as_sparse_(torch.ones(3, 3).to_sparse_csr()),
    "a compressed tensor": attribute("rows", None),
    "a conjugate in the same memory": lambda f: setattr(f.net, "complex", f.net.complex.conj()),
    "a negative in the same memory": lambda f: setattr(f.net, "shift", torch._neg_view(f.net.shift)),
    "nested tensors": attribute("nested", None),
    "weights yet to be made": lambda f: f.net.lazy[0](torch.ones(1, 2)),
    "a module's class": lambda f: setattr(f.net.layer, "__class__", Linear),
    "the sign of zero": attribute("zero", -0.0),
    "nothing for an object": attribute("opaque", None),
    "nothing for a function": attribute("act", None),
    "inside a named tuple": lambda f: f.net.named.first.append(1),
    "another proxy": attribute("proxy", weakref.proxy(GLOBAL)),
    "a function's attribute": lambda f: setattr(f.net.act, "gain", 2.0),
    "a module that a function inside a function names": global_one("INSIDE", nn.Linear(2, 2)),
}


def backward_hook(field):
    field.net.layer.register_full_backward_hook(lambda *args: None)


SAME = {
    "values": lambda f: [p.data.mul_(2) for p in f.parameters()],
    "a state dict": lambda f: f.load_state_dict({k: v + 1 for k, v in f.state_dict().items()}),
    "values of conditioning": lambda f: f.conditioning["label"].add_(1),
    "keys of a dict": attribute("keys", {int("1000"): 1, (int("2000"), "b"): 2}),
    "no number": attribute("nan", float("nan")),
    "an equal number": lambda f: setattr(f, "guidance", float("2.5")),
    "an equal text": attribute("name", "".join(["a"])),
    "a gradient": lambda f: setattr(f.net.layer.weight, "grad", torch.ones(3, 2)),
    "no gradient": lambda f: f.requires_grad_(False),
    "a hook that comes and goes": lambda f: f.net.layer.register_forward_hook(lambda *args: None).remove(),
    "a hook of the backward": backward_hook,
    "the inside of an object": lambda f: setattr(f.net.opaque, "inside", 2),
    "an entry of a long list": lambda f: f.net.long.__setitem__(0, -1),
}


@pytest.fixture(autouse=True)
def globals_as_they_were():
    kept = dict(GLOBAL=GLOBAL, LATER=LATER, INSIDE=INSIDE)
    yield
    globals().update(kept)


def ways(state):
    built = [state.holds] if backends.extension() else []
    return [*built, functools.partial(holds_reference, state.marks)]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change):
    field = made()
    state = State(field)
    assert [holds(field) for holds in ways(state)] == [True] * len(ways(state))
    CHANGES[change](field)
    assert [holds(field) for holds in ways(state)] == [False] * len(ways(state))
    assert State(field).holds(field)


@pytest.mark.parametrize("change", SAME)
def test_what_a_replay_reads_itself_or_not_at_all_is_no_change(change):
    field = made()
    state = State(field)
    SAME[change](field)
    assert [holds(field) for holds in ways(state)] == [True] * len(ways(state))


@pytest.mark.parametrize(
    "velocity",
    [
        closing_over(nn.Linear(1, 1)),
        functools.partial(nn.Linear(1, 1), torch.ones(1)),
        nn.Linear(1, 1).forward,
        Opaque().method,
        types.SimpleNamespace(matrix=torch.ones(2)),
        Net(),
    ],
    ids=["function", "partial", "method", "method of an object", "object", "module"],
)
def test_velocities_of_all_kinds(velocity):
    state = State(velocity)
    assert [holds(velocity) for holds in ways(state)] == [True] * len(ways(state))
    (velocity.__self__ if isinstance(velocity, types.MethodType) else velocity).further = torch.ones(2)
    assert [holds(velocity) for holds in ways(state)] == [False] * len(ways(state))


def test_all_parts_of_a_module_are_looked_at():
    net = nn.Sequential(*(nn.Linear(1, 1) for _ in range(LONGEST + 1)))
    state = State(net)
    assert [holds(net) for holds in ways(state)] == [True] * len(ways(state))
    net[-1].weight = nn.Parameter(torch.ones(1, 1))
    assert [holds(net) for holds in ways(state)] == [False] * len(ways(state))


def test_an_extension_of_other_marks_reads_none(monkeypatch):
    """One that was built before the marks became what they are."""
    if (C := backends.extension()) is None:
        pytest.skip("no extension")
    assert C.state_form == state_module.FORM
    monkeypatch.setattr(state_module, "FORM", C.state_form + 1)
    monkeypatch.setattr(C, "state_holds", lambda *args: pytest.fail("read"))
    field = made()
    assert State(field).holds(field)


def test_another_velocity_is_another():
    state = State(made())
    for other in (made(), made().net, closing_over(1), functools.partial(print), object(), None, 1, {}, [1], "a"):
        assert [holds(other) for holds in ways(state)] == [False] * len(ways(state))


def test_a_circle():
    net = Net()
    net.settings["self"] = net.settings
    net.back = [net]
    state = State(net)
    assert [holds(net) for holds in ways(state)] == [True] * len(ways(state))
    net.back.append(1)
    assert [holds(net) for holds in ways(state)] == [False] * len(ways(state))


def test_a_state_keeps_nothing_alive():
    field = made()
    field.net.layer.register_forward_hook(functools.partial(print, field.net))
    field.net.back = [field]
    gone = [weakref.ref(t) for t in (field, field.net, field.net.layer.weight, field.net.opaque)]
    state = State(field)
    assert state.holds(field)
    del field
    gc.collect()
    assert [ref() for ref in gone] == [None] * 4
