"""Ways of Python to read a number, and what changes it: a fused sampler notices."""
# ruff: noqa: F401  what the table names

import array
import collections
import contextvars
import ctypes
import enum
import functools
import importlib
import operator
import os
import sys
import threading
import types
import weakref

import numpy as np
import pytest
import torch
from test_fuse import noise, randomised
from test_fuse_mutations import Callable, Config, N, Slotted, closure, tools
from torch import nn

import flowkernels as fk
from flowkernels.runtime import watch as watch_module

KEPT = []


class Slotless:
    def __init__(self):
        self.gain = 1.0


SETTINGS = types.SimpleNamespace(gain=1.0)


class Mode(enum.Enum):
    ONE = 1.0


class Meta(type):
    gain = 1.0


class WithMeta(metaclass=Meta):
    pass


class Descriptor:
    def __init__(self):
        self.value = 1.0

    def __get__(self, owner, kind=None):
        return self.value


class Described:
    gain = Descriptor()


class Lazy:
    def __init__(self):
        self.held = {"gain": 1.0}

    def __getattr__(self, name):
        return self.held[name]


class Indexed:
    def __init__(self):
        self.values = [1.0]

    def __getitem__(self, i):
        return self.values[i]

    def __iter__(self):
        return iter(self.values)


class MyDict(dict):
    gain = 1.0


class MyList(list):
    pass


class Derived(Slotted):
    __slots__ = ("other",)


class MyTensor(torch.Tensor):
    pass


@functools.lru_cache
def cached(a):
    return a


@functools.singledispatch
def dispatched(a):
    return 1.0


class Partial:
    def by(self, gain):
        return gain

    one = functools.partialmethod(by, 1.0)


def decorated(f):
    @functools.wraps(f)
    def run(*args):
        return f(*args) * SETTINGS.gain

    return run


@decorated
def outer():
    return 1.0


def nested():
    def inner():
        return sum(SETTINGS.gain for _ in range(1))

    return inner()


def generator():
    yield SETTINGS.gain


VARIABLE = contextvars.ContextVar("variable", default=1.0)


@functools.cache
def cached_gain():
    return SETTINGS.gain


class Undo:
    def __init__(self, patch):
        self.patch, self.undo = patch, []

    def put_attr(self, thing, name, value):
        self.undo.append(functools.partial(setattr, thing, name, getattr(thing, name)))
        setattr(thing, name, value)


# `name | how it is made | how it is read | what changes it`, s being the network
TABLE = """
getattr by a computed name | s.gain = 1.0 | getattr(s, "".join(["ga", "in"])) | s.gain = 2.0
__dict__ | s.gain = 1.0 | s.__dict__["gain"] | s.gain = 2.0
vars | s.gain = 1.0 | vars(s)["gain"] | s.gain = 2.0
attrgetter | s.gain = 1.0 | operator.attrgetter("gain")(s) | s.gain = 2.0
eval | s.gain = 1.0 | eval("s.gain") | s.gain = 2.0
eval of a global | 0 | eval("SETTINGS.gain") | e.put_attr(SETTINGS, "gain", 2.0)
globals | 0 | globals()["SETTINGS"].gain | e.put_attr(SETTINGS, "gain", 2.0)
globals by a computed name | 0 | globals()["".join(["SET", "TINGS"])].gain | e.put_attr(SETTINGS, "gain", 2.0)
globals replaced | 0 | globals()["SETTINGS"].gain | setitem(globals(), "SETTINGS", types.SimpleNamespace(gain=2.0))
import in forward | 0 | __import__("tools").offset | setattr_(tools, "offset", 2.0)
import_module | 0 | importlib.import_module("tools").offset | setattr_(tools, "offset", 2.0)
sys.modules | 0 | sys.modules["tools"].offset | setattr_(tools, "offset", 2.0)
environment | 0 | float(os.environ.get("GAIN_OF_TEST", "1")) | e.patch.setenv("GAIN_OF_TEST", "2.0")
enum's attribute | Mode.ONE.gain = 1.0 | Mode.ONE.gain | Mode.ONE.gain = 2.0
weak reference | s.kept = Slotless(); s.ref = weakref.ref(s.kept) | s.ref().gain | s.kept.gain = 2.0
weak reference only | KEPT.append(Slotless()); s.ref = weakref.ref(KEPT[-1]) | s.ref().gain | KEPT[-1].gain = 2.0
WeakKeyDictionary | s.weak = weakref.WeakKeyDictionary(); s.weak[s.linear] = 1.0 | s.weak[s.linear] | s.weak[s.linear] = 2.0
WeakValueDictionary | KEPT.append(Slotless()); s.weak = weakref.WeakValueDictionary(a=KEPT[-1]) | s.weak["a"].gain | KEPT[-1].gain = 2.0
mapping proxy | s.under = {"gain": 1.0}; s.proxy = types.MappingProxyType(s.under) | s.proxy["gain"] | s.under["gain"] = 2.0
mapping proxy only | KEPT.append({"gain": 1.0}); s.proxy = types.MappingProxyType(KEPT[-1]) | s.proxy["gain"] | KEPT[-1]["gain"] = 2.0
thread local | s.local = threading.local(); s.local.gain = 1.0 | s.local.gain | s.local.gain = 2.0
context variable | s.variable = VARIABLE | s.variable.get() | VARIABLE.set(2.0)
chain map | s.chain = collections.ChainMap({}, {"gain": 1.0}) | s.chain["gain"] | s.chain["gain"] = 2.0
default dict | s.default = collections.defaultdict(lambda: 1.0); s.default["a"] = 1.0 | s.default["a"] | s.default["a"] = 2.0
default factory | s.default = collections.defaultdict(lambda: 1.0) | s.default.__missing__("b") * 0 + s.default.default_factory() | s.default.default_factory = lambda: 2.0
user dict | s.user = collections.UserDict(gain=1.0) | s.user["gain"] | s.user["gain"] = 2.0
named tuple | s.named = collections.namedtuple("P", "a")([1.0]) | s.named.a[0] | s.named.a[0] = 2.0
array.array | s.array = array.array("d", [1.0]) | s.array[0] | s.array[0] = 2.0
bytearray | s.bytes = bytearray([1]) | s.bytes[0] | s.bytes[0] = 2
memoryview | s.under = bytearray([1]); s.view = memoryview(s.under) | s.view[0] | s.view[0] = 2
ctypes | s.c = ctypes.c_double(1.0) | s.c.value | s.c.value = 2.0
ctypes array | s.c = (ctypes.c_double * 2)(1.0, 1.0) | s.c[0] | s.c[0] = 2.0
numpy's object array | s.array = np.array([[1.0], None], dtype=object) | s.array[0][0] | s.array[0][0] = 2.0
structured array | s.array = np.zeros(2, [("a", float)]); s.array["a"] = 1 | float(s.array["a"][0]) | s.array["a"][0] = 2
numpy scalar | s.gain = np.float64(1.0) | float(s.gain) | s.gain = np.float64(2.0)
0-d array | s.array = np.array(1.0) | float(s.array) | s.array[...] = 2.0
view of an array | s.under = np.ones(4); s.array = s.under[1:] | float(s.array[0]) | s.under[1] = 2.0
masked array | s.array = np.ma.array([1.0, 2.0]) | float(s.array.sum()) | s.array.mask = [True, False]
metaclass | 0 | WithMeta.gain | setattr_(Meta, "gain", 2.0)
descriptor | s.described = Described() | s.described.gain | e.put_attr(vars(Described)["gain"], "value", 2.0)
__getattr__ | s.lazy = Lazy() | s.lazy.gain | s.lazy.held["gain"] = 2.0
__getitem__ | s.indexed = Indexed() | s.indexed[0] | s.indexed.values[0] = 2.0
__iter__ | s.indexed = Indexed() | sum(s.indexed) | s.indexed.values.append(2.0)
dict with attributes | s.mine = MyDict(a=1.0) | s.mine.gain | s.mine.gain = 2.0
dict of one's own | s.mine = MyDict(a=1.0) | s.mine["a"] | s.mine["a"] = 2.0
list of one's own | s.mine = MyList([1.0]) | s.mine[0] | s.mine[0] = 2.0
slots of a subclass | s.slots = Derived(); s.slots.other = 1.0 | s.slots.other * s.slots.scale | s.slots.scale = 2.0
cached function | 0 | cached(1.0) * SETTINGS.gain | e.put_attr(SETTINGS, "gain", 2.0)
function behind a cache | s.f = functools.cache(lambda: SETTINGS.gain) | s.f.__wrapped__() | e.put_attr(SETTINGS, "gain", 2.0)
cache cleared and global | 0 | cached_gain() | (e.put_attr(SETTINGS, "gain", 2.0), cached_gain.cache_clear())
dispatch registered | 0 | dispatched(2) | dispatched.register(int, lambda a: 2.0)
partial method | 0 | Partial().one() | setattr_(Partial, "one", functools.partialmethod(Partial.by, 2.0))
decorated | 0 | outer() | e.put_attr(SETTINGS, "gain", 2.0)
nested function | 0 | nested() | e.put_attr(SETTINGS, "gain", 2.0)
generator function | 0 | next(generator()) | e.put_attr(SETTINGS, "gain", 2.0)
map | s.items = [1.0] | sum(map(float, s.items)) | s.items[0] = 2.0
sorted by a key | s.items, s.key = [1.0, 3.0], (lambda a: a) | sorted(s.items, key=s.key)[0] | s.key = lambda a: -a
reduce | s.items = [1.0, 3.0]; s.f = operator.add | functools.reduce(s.f, s.items) | s.f = operator.mul
bound builtin method | s.items = [1.0]; s.get = s.items.__getitem__; del s.items | s.get(0) | s.get.__self__[0] = 2.0
bound dict method | s.get = dict(a=1.0).get | s.get("a") | s.get.__self__["a"] = 2.0
method of an object | s.method = Callable().__call__ | s.method(1.0) | s.method.__self__.gain = 2.0
tensor's attribute | s.linear.weight.gain = 1.0 | s.linear.weight.gain | s.linear.weight.gain = 2.0
function's attribute | s.f = closure(1.0); s.f.gain = 1.0 | s.f.gain | s.f.gain = 2.0
module's attribute by name | s.sub = nn.Identity(); s.sub.gain = 1.0 | s.get_submodule("sub").gain | s.sub.gain = 2.0
training flag | s.sub = nn.Identity() | (2.0 if s.sub.training else 1.0) | s.sub.train()
requires_grad | 0 | (2.0 if s.linear.weight.requires_grad else 1.0) | s.linear.requires_grad_(False)
number of parameters | 0 | len(list(s.parameters())) | s.register_parameter("more", nn.Parameter(torch.zeros(1)))
number of buffers | 0 | 1 + len(dict(s.named_buffers())) | s.register_buffer("more", torch.zeros(1))
number of modules | 0 | len(list(s.modules())) | s.add_module("more", nn.Identity())
state dict | 0 | float(sum(v.abs().sum() for v in s.state_dict().values())) | s.linear.bias.add_(1)
persistent buffer | s.register_buffer("b", torch.ones(1)) | len(s.state_dict()) | s._non_persistent_buffers_set.add("b")
number of hooks | 0 | 1 + len(s.linear._forward_hooks) | s.linear.register_forward_hook(lambda m, a, out: None)
dtype of the default | 0 | (1.0 if torch.get_default_dtype() == torch.float32 else 2.0) | (torch.set_default_dtype(torch.float64), e.undo.append(lambda: torch.set_default_dtype(torch.float32)))
tensor in a list | s.items = [torch.ones(1)] | s.items[0] | s.items[0].mul_(2)
tensor in a dict's key | s.items = {torch.ones(1): 0} | next(iter(s.items)) | next(iter(s.items)).mul_(2)
tensor subclass | s.mine = torch.ones(1).as_subclass(MyTensor) | s.mine.as_subclass(torch.Tensor) | s.mine.mul_(2)
tensor of no dimension | s.mine = torch.tensor(1.0) | s.mine | s.mine.fill_(2)
item of a tensor | s.mine = torch.tensor(1.0) | s.mine.item() | s.mine.fill_(2)
tolist of a tensor | s.mine = torch.tensor([1.0]) | s.mine.tolist()[0] | s.mine.fill_(2)
numpy of a tensor | s.mine = torch.tensor([1.0]) | float(s.mine.numpy()[0]) | s.mine.fill_(2)
sparse tensor | s.mine = torch.eye(6).to_sparse() | s.mine.to_dense()[0, 0] | s.mine.mul_(2)
gradient | s.linear.weight.grad = torch.ones(6, 6) | s.linear.weight.grad[0, 0] | s.linear.weight.grad.mul_(2)
gradient's presence | 0 | (1.0 if s.linear.weight.grad is None else 2.0) | setattr(s.linear.weight, "grad", torch.ones(6, 6))
string formatted | s.table = {"a1": 1.0, "a2": 2.0}; s.i = 1 | s.table[f"a{s.i}"] | s.i = 2
match of a class | s.config = Config() | (2.0 if isinstance(s.config, Slotted) else 1.0) | s.config = Slotted()
length | s.items = [1.0] | len(s.items) | s.items.append(1.0)
"""  # noqa: E501
READERS = {line.split(" | ")[0]: line.split(" | ")[1:] for line in TABLE.strip().splitlines()}


SCOPE = {k: v for k, v in globals().items() if k not in ("pytest", "fk", "_watch")}  # of what a network's file has


def run(statement, **names):
    exec(statement, SCOPE, names)


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = randomised(nn.Linear(6, 6))

    def forward(self, x, t):
        return self.linear(x) * self.read(self)


def reader(setup, expression):
    net = Reader()
    run(setup, s=net)
    net.read = types.FunctionType(compile(f"lambda s: {expression}", "reader", "eval").co_consts[0], SCOPE)
    return net.eval()


# where code reads globals by any name, all of them may be more than can be looked at
MAY_BE_REFUSED = {
    "eval",
    "eval of a global",
    "globals",
    "globals by a computed name",
    "globals replaced",
    "sys.modules",
}


@pytest.mark.parametrize("name", READERS)
def test_reader(name, monkeypatch):
    setup, expression, change = READERS[name]
    net = reader(setup, expression)
    changes, x = Undo(monkeypatch), noise(2, 6)
    try:
        try:
            sampler = fk.fuse(net, N, shape=(6,))
        except fk.NotFusable as e:
            if name not in MAY_BE_REFUSED or "objects that a call could read" not in str(e):
                raise
            return
        before = fk.sample(net, x, N)
        sampler(x)
        assert not sampler.stale
        with torch.no_grad():
            run(change, e=changes, s=net, setitem=monkeypatch.setitem, setattr_=monkeypatch.setattr)
        watch = sampler._network.recorded.watch
        assert watch._find(watch._entries) == watch_module.changed_reference(watch._entries)
        expected = fk.sample(net, x, N)
        assert not torch.equal(before, expected)
        torch.testing.assert_close(sampler(x), expected, rtol=1e-4, atol=1e-4, check_dtype=False)
    finally:
        for undo in reversed(changes.undo):
            undo()


def test_parameters_without_values_are_looked_at_as_well():
    lazy = torch.nn.LazyLinear(4)
    watch = watch_module.Watch(lazy)
    assert watch.changed() is None
    lazy(torch.zeros(2, 3))
    assert watch.changed() is not None
