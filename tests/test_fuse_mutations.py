"""Networks that change after they were fused: a sampler gives what the network gives now, or says why it can't.

Every kind of change is a line or function below, tried alone and in random sequences: FLOWKERNELS_MUTATIONS says how
many of these, for hours by hand. What no sampler can see is UNSEEN, and exactly that.
"""

import collections
import ctypes  # noqa: F401
import dataclasses
import functools
import os
import sys
import threading
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_fuse import noise, randomised
from torch import nn
from torch.nn.utils import prune  # noqa: F401

import flowkernels as fk
from flowkernels.runtime import watch as watch_module

DIM, OBS, WIDTH, N = 5, 3, 11, 2
SCALE, TABLE, ARRAY = 1.0, {"gain": 1.0, "list": [1.0, [2.0]]}, np.ones(WIDTH, np.float32)
CONSTANT = torch.ones(WIDTH)
tools = types.ModuleType("tools")  # somebody's own module
tools.offset, tools.inner = 0.25, types.SimpleNamespace(deep={"b": [0.5]})
sys.modules["tools"] = tools


def helper(h, factor=1.0, *, bias=0.0):
    return h * (factor * SCALE) + bias


def closure(start):
    value = start

    def apply(h):
        return h + value

    def change(new):
        nonlocal value
        value = new

    apply.change = change
    return apply


@dataclasses.dataclass
class Config:
    gain: float = 1.0
    names: list = dataclasses.field(default_factory=lambda: [1.0, 2.0])


class Slotted:
    __slots__ = ("scale",)

    def __init__(self):
        self.scale = 1.0


class Callable:
    shift = 0.125

    def __init__(self):
        self.gain = 1.0

    def __call__(self, h):
        return h * self.gain + self.shift


class Base(nn.Module):
    factor = 1.0

    def mix(self, h):
        return h * self.factor

    @staticmethod
    def fixed(h):
        return h + 0.5

    @classmethod
    def of_class(cls, h):
        return h * cls.factor

    @property
    def gain_of(self):
        return self._gain


class Block(Base):
    def __init__(self, act):
        super().__init__()
        self.linear, self.norm, self.act, self._gain = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), act, 1.0

    def forward(self, h):
        h = h + self.act(self.linear(self.norm(h)))
        return self.of_class(self.fixed(self.mix(h))) * self.gain_of


class Doubled(Block):
    def forward(self, h):
        return 2 * super().forward(h)


class Zoo(nn.Module):
    """A network that reads all that networks read."""

    def __init__(self, act, blocks):
        super().__init__()
        self.inp, self.out = nn.Linear(DIM + OBS + 1, WIDTH), nn.Linear(WIDTH, DIM)
        self.blocks = nn.ModuleList(Block(act()) for _ in range(blocks))
        self.normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))
        self.doubled = nn.Linear(WIDTH, WIDTH)
        torch.nn.utils.parametrize.register_parametrization(self.doubled, "weight", Times())
        self.leaky, self.drop, self.elu = nn.LeakyReLU(0.2), nn.Dropout(0.3), nn.ELU(0.7)
        self.film = nn.Sequential(nn.Linear(1, 6), nn.SiLU(), nn.Linear(6, WIDTH))
        self.register_buffer("scale", torch.ones(WIDTH))
        self.register_parameter("maybe", None)
        self.gain, self.flag, self.mode, self.order = 1.0, True, "sum", ["leaky", "elu"]
        self.pair, self.extra, self.function = (1.0, [0.5]), torch.zeros(WIDTH), F.softsign_like
        self.lookup = {"a": {"b": 1.0}}
        self.ordered = collections.OrderedDict(a=1.0, b=2.0)
        self.queue, self.chosen, self.array = collections.deque([1.0, 0.5]), {"film"}, np.ones(WIDTH, np.float32)
        self.config, self.slotted, self.callable = Config(), Slotted(), Callable()
        self.partial, self.closed, self.hidden = functools.partial(helper, factor=1.5), closure(0.25), [nn.Linear(6, 6)]
        self.namespace, self.bound = types.SimpleNamespace(gain=1.0), self.config.__class__(2.0)
        self.method = self.callable.__call__
        self.big, self.path = np.ones((200, 200)), None

    def forward(self, x, t, obs):
        time = self.film(t[:, None].to(x.dtype))
        h = self.inp(torch.cat([x, obs, t[:, None].to(x.dtype)], 1)) * self.gain
        for block in self.blocks:
            h = block(h)
        for name in self.order:
            h = getattr(self, name)(h)
        h = self.drop(self.doubled(self.normed(h))) * self.scale + (0 if self.maybe is None else self.maybe)
        h = helper(h) + time * (1 if "film" in self.chosen else 0)
        h = h * self.pair[1][0] + self.extra if self.flag else h
        h = h * self.lookup["a"]["b"] * (self.queue[0] * self.config.gain / self.slotted.scale) + self.config.names[1]
        for value in self.ordered.values():
            h = torch.tanh(h) * value
        h = self.partial(self.closed(self.callable(self.function(h)))) + torch.from_numpy(self.array) * ARRAY[0].item()
        h = h * self.namespace.gain + self.method(h) * self.bound.gain + CONSTANT * TABLE["gain"] + tools.offset
        h = h * TABLE["list"][1][0] * tools.inner.deep["b"][0] + float(self.big[150, 150])
        h = h * (1.0 if self.path is None else float(self.path.read_text())) * torch.get_num_threads()
        h = (h if self.mode == "sum" else -h) * float(os.getenv("FLOWKERNELS_GAIN", "1.0"))
        h = h + self.hidden[0](time[:, :6]).sum(1, keepdim=True)
        return self.out(torch.relu(h))


class Times(nn.Module):
    def __init__(self):
        super().__init__()
        self.by = 2.0

    def forward(self, w):
        return w * self.by


class Env:
    """A fused network, with what a change needs."""

    def __init__(self, seed, patch, path):
        torch.manual_seed(seed)
        g = np.random.default_rng(seed)
        act = [nn.SiLU, nn.GELU, nn.Tanh, nn.Mish, nn.SELU][int(g.integers(5))]
        self.patch, self.undo = patch, []
        self.net = randomised(Zoo(act, int(g.integers(1, 3))), seed)
        self.net.path = path
        path.write_text("1.0")
        settings = dict(reverse_time=bool(g.integers(2)), time_scale=float(g.choice([1.0, 3.0])))
        if g.integers(2):
            settings |= dict(guidance=1.5, unconditional={"obs": noise(1, OBS, seed=8)}, packed=bool(g.integers(2)))
        self.rows = int(g.choice([1, 4]))
        self.field = fk.VelocityField(self.net, conditioning={"obs": noise(self.rows, OBS, seed=9)}, **settings)
        self.x = noise(4, DIM, seed=seed)
        self.sampler = fk.fuse(self.field, N, shape=(DIM,))
        self.sampler(self.x)

    @property
    def block(self):
        return self.net.blocks[0]

    def put(self, items, i, value):
        self.undo.append(functools.partial(items.__setitem__, i, items[i]))
        items[i] = value

    def put_file(self, text):
        self.net.path.write_text(text)

    def fresh(self):
        return fk.sample(self.field, self.x, N)

    def is_right(self):
        """Whether the sampler gives what the network does."""
        expected = self.fresh()
        try:
            return bool(
                torch.allclose(self.sampler(self.x), expected, rtol=2e-4, atol=2e-4 * expected.abs().max().item())
            )
        except fk.NotFusable:
            return True


KINDS, UNSEEN, SAME_RESULT = {}, {}, set()


def kind(f):
    KINDS[f.__name__.strip("_")] = f
    return f


def lines(text, table=KINDS):
    """One kind a line, `name: statement`, on e (the environment), n (the network) and b (its first block)."""
    for line in filter(None, map(str.strip, text.splitlines())):
        name, statement = line.split(": ", 1)
        code = compile(statement, name, "exec")

        def change(e, code=code):
            with torch.no_grad():
                exec(code, globals(), dict(e=e, n=e.net, b=e.block, setitem=e.patch.setitem, setattr_=e.patch.setattr))

        table[name] = change


F.softsign_like = torch.tanh
lines(
    """
parameter in place: n.inp.weight.mul_(1.5)
parameter's elements: n.inp.weight[0, 0] += 3
bias in place: b.linear.bias.add_(1)
view of a parameter: n.inp.weight.view(-1)[:4].add_(2)
detached parameter: n.out.weight.detach().mul_(-1)
parameter replaced: n.inp.weight = nn.Parameter(n.inp.weight * 2)
parameter in _parameters: n.inp._parameters["weight"] = nn.Parameter(n.inp.weight * 2)
bias to None: n.inp.bias = None
parameter from None: n.maybe = nn.Parameter(torch.ones(WIDTH))
parameter's data replaced: n.inp.weight.data = n.inp.weight.data * 2
buffer in place: n.scale.mul_(2)
buffer replaced: n.scale = n.scale * 2
tensor attribute in place: n.extra.add_(1)
tensor attribute replaced: n.extra = torch.ones(WIDTH)
foreach: torch._foreach_mul_(list(n.parameters()), 1.1)
load_state_dict: n.load_state_dict({k: v * 1.1 for k, v in n.state_dict().items()})
load_state_dict assign: n.load_state_dict({k: v * 1.1 for k, v in n.state_dict().items()}, assign=True)
requires_grad and in place: (n.requires_grad_(False), n.out.weight.mul_(2))
half and back: n.half().float()
vector_to_parameters: nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(n.parameters()) * 1.1, n.parameters())
init: nn.init.normal_(n.out.weight)
swap_tensors: torch.utils.swap_tensors(n.scale, n.scale * 2)
set_: n.out.weight.set_(n.out.weight * 2)
copy_: n.out.weight.copy_(-n.out.weight)
float: n.gain = 0.5
bool: n.flag = False
string: n.mode = "difference"
order of a list: n.order.reverse()
list replaced: n.order = ["elu"]
list appended: n.order.append("leaky")
list in a tuple: n.pair[1][0] = 0.75
tuple replaced: n.pair = (1.0, [0.75])
dict: n.lookup["a"]["b"] = 2.0
dict updated: n.lookup.update(a={"b": 2.0})
ordered dict: n.ordered["a"] = 3.0
deque: n.queue.rotate(1)
set: n.chosen.clear()
set discarded: n.chosen.discard("film")
array in place: n.array[2] = 7
array replaced: n.array = n.array * 2
dataclass: n.config.gain = 2.0
list of a dataclass: n.config.names[1] = 5.0
object replaced: n.config = Config(3.0)
slot: n.slotted.scale = 2.0
attribute of a callable: n.callable.gain = 3.0
callable replaced: n.callable = lambda h: h * 2
shift of a callable: n.callable.shift = 1.0
partial replaced: n.partial = functools.partial(helper, factor=3.0)
partial's keywords: n.partial.keywords["factor"] = 3.0
partial's state: n.partial.__setstate__((helper, (), {"factor": 4.0}, {}))
closure cell: n.closed.change(2.0)
closure cell by hand: n.closed.__closure__[0].__setattr__("cell_contents", 2.0)
module in a list: n.hidden[0].weight.mul_(2)
module in a list replaced: n.hidden[0] = randomised(nn.Linear(6, 6), 3)
namespace: n.namespace.gain = 2.0
instance of a class: n.bound.gain = 3.0
function attribute: n.function = torch.relu
activation replaced: b.act = nn.ReLU()
activation's slope: n.leaky.negative_slope = 0.01
ELU's alpha: n.elu.alpha = 2.0
layer norm's eps: b.norm.eps = 10.0
submodule replaced: n.out = randomised(nn.Linear(WIDTH, DIM), 5)
submodule in _modules: n._modules["out"] = randomised(nn.Linear(WIDTH, DIM), 5)
module appended: n.blocks.append(randomised(Block(nn.ReLU()), 4))
module deleted: del n.blocks[0]
module inserted: n.film.insert(1, nn.Tanh())
forward hook: n.inp.register_forward_hook(lambda m, a, out: out * 2)
forward pre hook: n.out.register_forward_pre_hook(lambda m, a: (a[0] * 2,))
forward hook with kwargs: n.out.register_forward_hook(lambda m, a, k, out: out * 2, with_kwargs=True)
forward hook of the whole: n.register_forward_hook(lambda m, a, out: out * 2)
hook of a container: b.register_forward_pre_hook(lambda m, a: (a[0] + 1,))
parametrization: nn.utils.parametrize.register_parametrization(n.out, "weight", Times())
parametrization's attribute: n.doubled.parametrizations.weight[0].by = 3.0
parametrization removed: nn.utils.parametrize.remove_parametrizations(n.doubled, "weight", leave_parametrized=False)
weight_norm's magnitude: n.normed.parametrizations.weight.original0.mul_(2)
old weight_norm: nn.utils.weight_norm(n.out).weight_g.data.mul_(2)
pruning: prune.l1_unstructured(n.out, "weight", 0.5)
dropout on: n.train()
one dropout on: n.drop.train()
forward of an instance: n.out.forward = lambda h: h[:, :DIM] * 2
forward of a module: b.forward = types.MethodType(lambda self, h: h * 3, b)
class of a block: b.__class__ = Doubled
forward of a class: setattr_(Block, "forward", lambda self, h: h * 3)
method of a base class: setattr_(Base, "mix", lambda self, h: h * 3)
static method: setattr_(Base, "fixed", staticmethod(lambda h: h - 3))
class method: setattr_(Base, "of_class", classmethod(lambda cls, h: h * 5))
property: setattr_(Base, "gain_of", property(lambda self: 7.0))
property's value: b._gain = 2.0
class attribute: setattr_(Base, "factor", 2.0)
class attribute of a subclass: setattr_(Block, "factor", 2.0, raising=False)
attribute over the class's: b.factor = 2.0
method over the class's: b.mix = lambda h: h * 3
shift of a class: setattr_(Callable, "shift", 2.0)
call of a class: setattr_(Callable, "__call__", lambda self, h: h * 4)
code of a function: setattr_(helper, "__code__", (lambda h, factor=1.0, *, bias=0.0: h * 4).__code__)
defaults of a function: setattr_(helper, "__defaults__", (2.0,))
keyword defaults: setattr_(helper, "__kwdefaults__", {"bias": 2.0})
code of a forward: setattr_(Zoo.forward, "__code__", (lambda self, x, t, obs: self.out(self.inp(torch.cat([x, obs, t[:, None].to(x.dtype)], 1)))).__code__)
global function: setitem(globals(), "helper", lambda h, *a, **k: h * 5)
global number: setitem(globals(), "SCALE", 2.0)
global dict: setitem(TABLE, "gain", 2.0)
global nested list: setitem(TABLE, "list", [1.0, [3.0]])
global nested list in place: e.put(TABLE["list"][1], 0, 3.0)
global tensor: setitem(globals(), "CONSTANT", CONSTANT * 2)
global array: setitem(globals(), "ARRAY", ARRAY * 2)
attribute of a module of Python: setattr_(tools, "offset", 2.0)
deep in a module of Python: e.put(tools.inner.deep["b"], 0, 2.0)
function of torch: setattr_(torch, "tanh", torch.relu)
function of torch.nn.functional: setattr_(F, "leaky_relu", lambda h, *a: h * 3)
linear of torch: setattr_(nn.Linear, "forward", lambda self, h: F.linear(h, self.weight * 2, self.bias))
guidance: e.field.guidance = 3.0 if e.field.unconditional else 1.0
time_scale: e.field.time_scale = 5.0
sign: e.field.sign = -e.field.sign
reverse_time: e.field.reverse_time = not e.field.reverse_time
net of the field: e.field.net = randomised(Zoo(nn.Tanh, 1), 77)
conditioning in place: e.field.conditioning["obs"].mul_(-2)
conditioning replaced: e.field.conditioning["obs"] = e.field.conditioning["obs"] * -2
conditioning dict replaced: e.field.conditioning = {"obs": noise(1, OBS, seed=55)}
conditioning of one row: e.field.conditioning["obs"] = noise(1, OBS, seed=56)
conditioning of each: e.field.conditioning["obs"] = noise(4, OBS, seed=57)
conditioning's memory: e.field.conditioning["obs"].set_(e.field.conditioning["obs"] * 3)
unconditional: e.field.unconditional.update(obs=noise(1, OBS, seed=58)) if e.field.unconditional else n.out.weight.mul_(2)
unconditional given: (e.field.unconditional.update(obs=noise(1, OBS, seed=58)), setattr(e.field, "guidance", 2.0))
guidance off: (e.field.unconditional.clear(), setattr(e.field, "guidance", 1.0), n.out.weight.mul_(2))
call_network of the field: e.field.call_network = lambda x, t, kwargs, *a: x * 2
forward of the field: e.field.__class__ = Reversed
hook of the field: e.field.register_forward_hook(lambda m, a, out: out * 2)
"""  # noqa: E501
)


class Reversed(fk.VelocityField):
    def call_network(self, *args, **kwargs):
        return -super().call_network(*args, **kwargs)


@kind
def global_forward_hook(e):
    handle = nn.modules.module.register_module_forward_hook(lambda m, a, out: out * 2 if m is e.net.out else None)
    e.undo.append(handle.remove)


@kind
def global_forward_pre_hook(e):
    handle = nn.modules.module.register_module_forward_pre_hook(lambda m, a: (a[0] * 2,) if m is e.net.out else None)
    e.undo.append(handle.remove)


def stepped(make):
    def change(e):
        optimizer = make([p for p in e.net.parameters() if p.requires_grad])
        for p in e.net.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        for p in e.net.parameters():
            p.grad = None

    return change


OPTIMIZERS = {
    "Adam": torch.optim.Adam,
    "AdamW": torch.optim.AdamW,
    "SGD": torch.optim.SGD,
    "Adagrad": torch.optim.Adagrad,
}
for name, optimizer in OPTIMIZERS.items():
    for how in ("fused", "foreach"):
        KINDS[f"{name} {how}"] = stepped(functools.partial(optimizer, lr=0.1, **{how: True}))
KINDS["momentum fused"] = stepped(functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, fused=True))


def in_a_thread(change):
    def run(e):
        thread = threading.Thread(target=change, args=(e,))
        thread.start()
        thread.join()

    return run


for name in ("Adam fused", "parameter in place", "float", "forward hook"):
    KINDS[f"{name}, in another thread"] = in_a_thread(KINDS[name])


UNSEEN = {}
lines(
    """
written through numpy: n.inp.weight.detach().numpy()[:] *= 2
written through a pointer: ctypes.memset(n.inp.weight.data_ptr(), 0, n.inp.weight.nbytes)
written through .data: n.inp.weight.data.mul_(2)
written through dlpack: torch.from_dlpack(n.inp.weight.detach()).mul_(2)
an element in the middle of a large array: n.big[150, 150] = 9.0
a function of torch that a function of torch calls: setattr_(torch, "layer_norm", lambda h, *a: h * 3)
a file that forward reads: e.put_file("2.0")
the environment by os.getenv: e.patch.setenv("FLOWKERNELS_GAIN", "2.0")
a setting of torch: (e.undo.append(functools.partial(torch.set_num_threads, torch.get_num_threads())), torch.set_num_threads(5))
""",  # noqa: E501
    UNSEEN,
)


@pytest.fixture
def env(monkeypatch, tmp_path):
    made = []

    def make(seed):
        made.append(Env(seed, monkeypatch, tmp_path / str(len(made))))
        return made[-1]

    yield make
    for undo in (undo for e in made for undo in reversed(e.undo)):
        undo()


def watches_agree(e):
    """Whether the extension says what its reference does."""
    watch = e.sampler._network.recorded.watch
    return watch._find(watch._entries) == watch_module.changed_reference(watch._entries)


def test_nothing_has_changed(env):
    for seed in range(4):
        e = env(seed)
        for _ in range(3):
            recorded = e.sampler._network.recorded
            assert e.is_right()
            assert not e.sampler.stale
            assert e.sampler._network.recorded is recorded
            assert watches_agree(e)


@pytest.mark.parametrize("name", KINDS)
def test_mutation(name, env):
    e = env(sum(map(ord, name)))
    before = e.fresh()
    KINDS[name](e)
    assert watches_agree(e)
    random = e.net.training or e.net.drop.training
    assert random or not torch.equal(e.fresh(), before)
    assert e.is_right()
    assert e.is_right()


@pytest.mark.parametrize("name", UNSEEN)
def test_unseen(name, env):
    """Exactly what the documentation says that no sampler sees; and refresh() takes it in."""
    e = env(sum(map(ord, name)))
    before = e.fresh()
    UNSEEN[name](e)
    assert not torch.equal(e.fresh(), before)
    assert not e.sampler.stale
    assert not e.is_right()
    e.sampler.refresh()
    assert e.is_right()


def weights_made_in_inference_mode(e):
    with torch.inference_mode():
        e.net.extra = torch.zeros(WIDTH)
        e.sampler(e.x)
        e.net.extra.add_(1)


def by_the_function_of_an_optimiser(e):
    p = e.net.out.weight
    settings = dict(weight_decay=0.0, momentum=0.0, lr=1.0, dampening=0.0, nesterov=False, maximize=False)
    torch._fused_sgd_([p.detach()], [torch.ones_like(p)], [], **settings, is_first_step=True)


UNSEEN |= {f.__name__: f for f in (weights_made_in_inference_mode, by_the_function_of_an_optimiser)}
SEQUENCES = int(os.environ.get("FLOWKERNELS_MUTATIONS", "10"))


@pytest.mark.parametrize("seed", range(SEQUENCES))
def test_sequence(seed, env):
    """Several kinds after one another, some of them before the sampler is called again."""
    g, e, done = np.random.default_rng(seed), env(seed), []
    for _ in range(6):
        name = list(KINDS)[g.integers(len(KINDS))]
        try:
            KINDS[name](e)
            expected = e.fresh()
        except Exception:  # what an earlier change has taken away
            break
        done.append(name)
        if e.net.training or not expected.isfinite().all():
            break
        assert g.integers(2) or e.is_right(), done
    else:
        assert e.is_right(), done


def test_a_network_that_another_thread_changes_meanwhile():
    """The walk reads dicts that others may write: it tells a change, and never fails on one."""
    net, done, errors = nn.Sequential(Block(torch.tanh)), threading.Event(), []
    net.settings = {i: i for i in range(50)}

    def change():
        while not done.is_set():
            handles = [net.register_forward_hook(print) for _ in range(3)]
            net.settings.update({("new", i): object() for i in range(9)})
            net.extra, Block.extra = object(), object()
            for i in range(9):
                del net.settings["new", i]
            del net.extra, Block.extra
            for handle in handles:
                handle.remove()

    interval = sys.getswitchinterval()
    thread = threading.Thread(target=change)
    sys.setswitchinterval(1e-6)
    try:
        thread.start()
        for _ in range(200):
            try:
                watch_module.Watch(net)
            except RuntimeError as e:
                errors.append(e)
    finally:
        sys.setswitchinterval(interval)
        done.set()
        thread.join()
    assert not errors
    watch = watch_module.Watch(net)
    assert watch.changed() is None
    net.settings["new"] = 1
    assert "settings" in watch.changed()
