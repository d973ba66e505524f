"""What a fused head is proven for: networks that do more behind their last Linear, that look at values, and networks
that change afterwards are refused or right, never silently wrong; and other threads are left alone."""

import copy
import io
import pickle
import threading
import types

import pytest
import torch
from _flows import normal
from _transformers import TRANSFORMERS, field_of
from test_fuse_head import Perceptron, close, hooks
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

import flowkernels as fk


class Behind(Perceptron):
    """The network with something done to its velocity: `behind(net, v, x, t)`."""

    def __init__(self, behind):
        super().__init__()
        self.behind, self.options = behind, {}
        self.register_buffer("buffer", torch.zeros(4, 12))

    def forward(self, x, t):
        return self.behind(self, super().forward(x, t), x, t)


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Adapted(nn.Linear):
    """A layer with an update of low rank, which is zero at first."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.down, self.up = nn.Linear(sizes[0], 4, bias=False), nn.Linear(4, sizes[1], bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return super().forward(x) + self.up(self.down(x))


def set_item(v, at, value):
    v[at] = value
    return v


def keep(net, v):
    net.last = v
    return v


def count(net, v):
    net.calls = getattr(net, "calls", 0) + 1
    return 2 * v if net.calls > 9 else v


def swallow(v):
    try:
        return v.clamp(-50, 50)
    except Exception:
        return v


@torch.jit.script
def scripted(v: torch.Tensor, late: torch.Tensor) -> torch.Tensor:
    return 2 * v if bool(late.any()) else v


MORE = {
    "clamp": lambda net, v, x, t: v.clamp(-50, 50),
    "clamp in place": lambda net, v, x, t: v.clamp_(-50, 50),
    "through .data": lambda net, v, x, t: (v.data.clamp_(-50, 50), v)[1],
    "scale": lambda net, v, x, t: 1.0001 * v,
    "tanh of a large range": lambda net, v, x, t: 1e4 * (v / 1e4).tanh(),
    "a gate in time": lambda net, v, x, t: torch.where(t[:, None] > 0.9, 2 * v, v),
    "nothing of the state": lambda net, v, x, t: v + 0 * x,
    "norm": lambda net, v, x, t: v / v.norm(dim=1, keepdim=True).clamp(min=1e6) * 1e6,
    "samples in a circle": lambda net, v, x, t: torch.cat([v[1:], v[:1]]),
    "to integers": lambda net, v, x, t: v.int().float(),
    "rounded": lambda net, v, x, t: v.bfloat16().float(),
    "refused, and caught": lambda net, v, x, t: swallow(v),
    "an entry set": lambda net, v, x, t: set_item(v, (slice(None), 0), 0.0),
    "vmap": lambda net, v, x, t: torch.vmap(lambda a: a.clamp(-50, 50))(v),
    "compiled": lambda net, v, x, t: torch.compile(lambda a: a.clamp(-50, 50), backend="eager")(v),
    "numpy": lambda net, v, x, t: torch.from_numpy(v.numpy().clip(-50, 50)),
    "kept": lambda net, v, x, t: keep(net, v),
    "written to a buffer": lambda net, v, x, t: (net.buffer.copy_(v), v)[1],
    "calls counted": lambda net, v, x, t: count(net, v),
}


@pytest.mark.parametrize(("name", "inference"), [(name, i % 2 == 0) for i, name in enumerate(MORE)])
def test_more_than_the_head_is_refused(name, inference):
    net = Behind(MORE[name]).eval()
    with (
        torch.inference_mode(inference),
        pytest.raises(ValueError, match=r"^(head 'layers.4' of Behind|velocity): exp"),
    ):
        fk.sample(fk.fuse_head(net), normal(4, 12), 4)
    assert not hooks(net)


MOVED = {
    "a copy": lambda net, v, x, t: v.clone(),
    "parts together": lambda net, v, x, t: torch.cat(v.chunk(2, 1), 1),
    "there and back": lambda net, v, x, t: v.view(4, 3, 4).transpose(1, 2).contiguous().transpose(1, 2).reshape(4, 12),
    "features reordered": lambda net, v, x, t: v.view(4, 3, 4).transpose(1, 2).reshape(4, 12),
    "features backwards": lambda net, v, x, t: v.flip(1),
    "negated": lambda net, v, x, t: -v,
    "negated twice": lambda net, v, x, t: v.neg().neg(),
    "in float64": lambda net, v, x, t: v.double(),
    "dropout in eval mode": lambda net, v, x, t: F.dropout(v, 0.5, net.training),
    "vmap": lambda net, v, x, t: torch.vmap(lambda a: a.reshape(-1))(v),
    "a counter behind": lambda net, v, x, t: (net.buffer.add_(1), v)[1],
    "another call of it": lambda net, v, x, t: net.layers[4](net.layers[:4](torch.cat([x, t[:, None]], 1))),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", MOVED)
def test_what_only_moves_is_fused(name, inference):
    net, noise = Behind(MOVED[name]).eval(), 30 * normal(4, 12)
    with torch.inference_mode(inference):
        close(fk.sample(fk.fuse_head(net), noise, 4), fk.sample(net, noise, 4), 2e-6)


READS = {  # late: whether it is later than something
    "if": lambda v, x, late: 2 * v if late.any() else v,
    "item": lambda v, x, late: 2 * v if late[0].item() else v,
    "tolist": lambda v, x, late: 2 * v if late.tolist()[0] else v,
    "an index": lambda v, x, late: 2 * v if (1, 2)[late[0].long()] == 2 else v,
    "a mask": lambda v, x, late: 2 * v if len(x[late]) else v,
    "TorchScript": lambda v, x, late: scripted(v, late),
}


@pytest.mark.parametrize("name", READS)
def test_what_depends_on_values(name):
    """Each step shows what it does: right as long as the velocity is the outputs, and refused at the step where it is
    not, even if none but this one does otherwise."""
    noise = normal(4, 12)

    def behind(begin, end):
        return Behind(lambda net, v, x, t: READS[name](v, x, (t > begin) & (t < end))).eval()

    net = behind(0.9, 1)
    close(fk.sample(fk.fuse_head(net), noise, 4), fk.sample(net, noise, 4), 2e-6)
    for begin, end in ((0.7, 1), (0.4, 0.6)):
        with pytest.raises(fk.NotFusable, match=r"^head 'layers.4' of Behind: expected .* \(mul\)"):
            fk.sample(fk.fuse_head(behind(begin, end)), noise, 4)


def test_ways_that_depend_on_values():
    """Moves in another way at some steps, and for other shapes: each is proven when it comes."""
    net = Behind(lambda net, v, x, t: v.flip(1) if (t > 0.4).any() and len(x) == 4 else v).eval()
    fused = fk.fuse_head(net)
    for n in (4, 5):
        close(fk.sample(fused, normal(n, 12), 4), fk.sample(net, normal(n, 12), 4), 2e-6)
    assert len(fused.proven.places) == 3


def test_patches_by_other_operations():
    class Patches(nn.Module):
        def __init__(self, place):
            super().__init__()
            self.embed, self.head, self.place = nn.Conv2d(3, 16, 2, stride=2), nn.Linear(16, 12), place

        def forward(self, x, t):
            tokens = (self.embed(x) + t.view(-1, 1, 1, 1)).flatten(2).transpose(1, 2).sin()
            return self.place(self.head(tokens).transpose(1, 2))

    noise = normal(2, 3, 6, 6)
    for place in (lambda v: F.pixel_shuffle(v.unflatten(2, (3, 3)), 2), lambda v: F.fold(v, (6, 6), 2, stride=2)):
        net = Patches(place).eval()
        fused = fk.fuse_head(net)
        close(fk.sample(fused, noise, 3), fk.sample(net, noise, 3), 2e-6)
        assert [(p.patch, p.order) for p in fused.proven.places.values()] == [(2, "cpq")]
    net = Patches(lambda v: F.fold(v.repeat(1, 1, 25 // 9 + 1)[..., :25], (6, 6), 2)).eval()
    with pytest.raises(ValueError, match=r"^head 'head' of Patches"):
        fk.sample(fk.fuse_head(net), noise, 3)


def train(net):
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) / 8)


def call_with(net, factor):
    net.forward = types.MethodType(lambda self, x, t: factor * type(self).forward(self, x, t), net)


CHANGES = {
    "weights": train,
    "a weight replaced": lambda net: setattr(net.layers[4], "weight", nn.Parameter(normal(12, 40, seed=3))),
    "no bias": lambda net: setattr(net.layers[4], "bias", None),
    "a parametrization": lambda net: parametrize.register_parametrization(net.layers[4], "weight", Double()),
    "weight_norm": lambda net: train(parametrizations.weight_norm(net.layers[4])),
    "another Linear": lambda net: net.layers.__setitem__(4, nn.Linear(40, 12)),
    "a block replaced": lambda net: net.layers.__setitem__(2, nn.Linear(40, 40)),
    "an activation behind": lambda net: net.layers.append(nn.Tanh()),
    "the head in a Sequential": lambda net: net.layers.__setitem__(4, nn.Sequential(net.layers[4], nn.Tanh())),
    "the head adapted": lambda net: (net.layers.__setitem__(4, Adapted(40, 12)), train(net)),
    "class of the head": lambda net: setattr(net.layers[4], "__class__", Doubled),
    "forward of the head": lambda net: setattr(
        net.layers[4], "forward", lambda z: 2 * F.linear(z, net.layers[4].weight)
    ),
    "forward of the network": lambda net: call_with(net, 2),
    "a hook of the head": lambda net: net.layers[4].register_forward_hook(lambda m, a, out: 2 * out),
    "a hook before the head": lambda net: net.layers[4].register_forward_pre_hook(lambda m, a: (2 * a[0],)),
    "a hook of a block": lambda net: net.layers[1].register_forward_hook(lambda m, a, out: 2 * out),
    "a hook around the head": lambda net: net.layers.register_forward_hook(lambda m, a, out: 2 * out),
    "a hook of the network": lambda net: net.register_forward_hook(lambda m, a, out: 2 * out),
    "a hook before the network": lambda net: net.register_forward_pre_hook(lambda m, a: (2 * a[0], a[1])),
    "an attribute": lambda net: setattr(net, "behind", lambda net, v, x, t: 2 * v),
    "an option": lambda net: net.options.update(scale=2.0),
    "training": lambda net: net.train(),
    "compiled": lambda net: net.compile(backend="eager"),
}


def optional(net, v, x, t):
    v = net.options["scale"] * v if "scale" in net.options else v
    return 2 * v if net.training else v


@pytest.mark.parametrize("name", CHANGES)
def test_changes_after_the_first_run(name):
    """Right, or refused; and the velocity is another one, so that what was there before would be seen."""
    net, noise = Behind(optional).eval(), 3 * normal(4, 12)
    fused = fk.fuse_head(net)
    before = fk.sample(fused, noise, 4)
    CHANGES[name](net)
    expected = fk.sample(net, noise, 4)
    assert name == "compiled" or (before - expected).norm() > 1e-4 * expected.norm()
    try:
        got = fk.sample(fused, noise, 4)
    except ValueError as e:
        assert str(e).startswith(("velocity: expected a", "head 'layers.4"))  # noqa: PT017
    else:
        close(got, expected, 2e-6)


def test_hooks_of_all_modules():
    net, noise = Perceptron().eval(), normal(4, 12)
    fused = fk.fuse_head(net)
    expected = fk.sample(fused, noise, 3)
    handle = nn.modules.module.register_module_forward_hook(lambda m, a, out: 2 * out if m is net.layers[4] else None)
    try:
        with pytest.raises(ValueError, match=r"^head 'layers.4' of Perceptron: expected .*\(mul\)"):
            fk.sample(fused, noise, 3)
    finally:
        handle.remove()
    assert torch.equal(fk.sample(fused, noise, 3), expected)


def twice_as_fast(net):
    forward = net.forward

    def call(*args, **kwargs):
        v = forward(*args, **kwargs)
        return 2 * (v if isinstance(v, torch.Tensor) else v[0])

    net.forward = call


def adapt(linear):
    """As adapters are put into a layer: an update of low rank beside its own forward."""
    down, up, forward = nn.Linear(linear.in_features, 2), nn.Linear(2, linear.out_features), linear.forward
    linear.adapter = nn.Sequential(down, up).requires_grad_(False)
    linear.forward = lambda z: forward(z) + linear.adapter(z)


CHANGED_TRANSFORMERS = {  # the network, its last linear layer, and the module at which the final layer begins
    "a hook of the head": lambda net, head, norm: head.register_forward_hook(lambda m, a, out: 2 * out),
    "a hook before the head": lambda net, head, norm: head.register_forward_pre_hook(lambda m, a: (2 * a[0],)),
    "a hook of the norm": lambda net, head, norm: norm.register_forward_hook(lambda m, a, out: 2 * out),
    "a hook before the norm": lambda net, head, norm: norm.register_forward_pre_hook(lambda m, a: (a[0].sin(), *a[1:])),
    "forward of the head": lambda net, head, norm: setattr(head, "forward", lambda z: 2 * F.linear(z, head.weight)),
    "forward of the norm": lambda net, head, norm: setattr(norm, "forward", lambda z, *a: 2 * z),
    "forward": lambda net, head, norm: twice_as_fast(net),
    "class of the norm": lambda net, head, norm: setattr(norm, "__class__", nn.Identity),
    "class of the head": lambda net, head, norm: setattr(head, "__class__", Doubled),
    "eps": lambda net, head, norm: [setattr(m, "eps", 0.5) for m in norm.modules() if hasattr(m, "eps")],
    "weights": lambda net, head, norm: train(net),
    "an adapter": lambda net, head, norm: adapt(head),
    "a parametrization": lambda net, head, norm: parametrize.register_parametrization(head, "weight", Double()),
    "dropout in training": lambda net, head, norm: head.register_forward_hook(lambda m, a, out: F.dropout(out, 0.5)),
    "no bias": lambda net, head, norm: setattr(head, "bias", None),
    "a weight replaced": lambda net, head, norm: setattr(head, "weight", nn.Parameter(head.weight.flip(0))),
}


@pytest.mark.parametrize(("place", "name"), list(enumerate(TRANSFORMERS)), ids=TRANSFORMERS)
def test_changed_transformers(place, name):
    """Three changes of each family, in turn: right, or refused."""
    for i in range(place, place + 3 * 5, 5):
        field, noise = field_of(name, 2)
        fused, net = fk.fuse_head(field), field.net
        before = fk.sample(fused, noise, 2)
        change = list(CHANGED_TRANSFORMERS)[i % len(CHANGED_TRANSFORMERS)]
        CHANGED_TRANSFORMERS[change](net, *map(net.get_submodule, (fused.layer.linear, fused.layer.stop)))
        try:
            got = fk.sample(fused, noise, 2)
        except fk.NotFusable as e:
            assert str(e).startswith(f"head '{fused.layer.linear}")  # noqa: PT017
        except TypeError:  # the network's own
            with pytest.raises(TypeError):
                fk.sample(field, noise, 2)
        else:
            expected = fk.sample(field, noise, 2)
            assert (before - expected).norm() > 1e-4 * expected.norm() or (change == "eps" and name == "auraflow")
            close(got, expected, 2e-6)


class Static(nn.Module):
    """Its trunk writes to the same memory at every call, as a CUDA graph does; behind a LayerNorm, a gate."""

    def __init__(self, gate):
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(12, 40), nn.LayerNorm(40), nn.Linear(40, 12)
        self.gate = gate
        self.register_buffer("memory", torch.zeros(4, 40))

    def forward(self, x, t, shift):
        self.memory.copy_(self.body(x + shift).sin())
        return self.head(self.norm(self.memory) * self.gate)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("gate", [1.25, 1e-5])
def test_static_memory_and_gates(gate, packed):
    """A gate that 1 + scale would round is left to the network."""
    net = Static(gate).eval()
    if packed:
        net.memory = torch.zeros(8, 40)
    given = dict(conditioning=dict(shift=normal(1, 12)), unconditional=dict(shift=normal(1, 12, seed=2)))
    field = fk.VelocityField(net, guidance=3.0, packed=packed, **given)
    fused, noise = fk.fuse_head(field), normal(4, 12)
    close(fk.sample(fused, noise, 4), fk.sample(field, noise, 4), 2e-6)
    assert fused.layer.stop == ("norm" if gate == 1.25 else "head")
    got, expected = fk.rollout(fused, noise, 3), fk.rollout(field, noise, 3)
    close(got.v, expected.v, 2e-6)


class Residual(nn.Module):
    """The features end with the state, which a step writes over; at some times it is negated."""

    def __init__(self):
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(12, 12), nn.LayerNorm(12), nn.Linear(12, 12)

    def forward(self, x, t):
        v = self.head(self.norm(self.body(x)) * (1 + t[:, None]) + x)
        return -v if (t > 0.4).all() else v


@pytest.mark.parametrize("plan", [6, fk.Solver.adams_bashforth(6, 3)], ids=["euler", "multistep"])
def test_features_of_the_state_and_signs_that_change(plan):
    net, noise = Residual().eval(), normal(4, 12)
    fused = fk.fuse_head(net)
    close(fk.sample(fused, noise, plan), fk.sample(net, noise, plan), 2e-6)
    got, expected = fk.rollout(fused, noise, 6), fk.rollout(net, noise, 6)
    close(got.x, expected.x, 2e-6)
    close(got.v, expected.v, 2e-6)
    assert fused.layer.stop == "norm"
    assert {p.sign for p in fused.proven.places.values()} == {1, -1}


class Overwrites(Perceptron):
    def forward(self, x, t):
        z = self.layers[:4](torch.cat([x, t[:, None]], 1))
        v = self.layers[4](z)
        if (t > 0.4).any() and (t < 0.6).all():  # at no time of the proof
            z.mul_(2)
        return v


def test_what_the_final_layer_reads_is_written_to():
    with pytest.raises(fk.NotFusable, match=r"^head 'layers.4' of Overwrites: .*writes to what its"):
        fk.sample(fk.fuse_head(Overwrites().eval()), normal(4, 12), 4)


def test_compiled_moves():
    """Of parts behind the final layer that are compiled: right, or refused."""
    net, noise = Behind(lambda net, v, x, t: flip(v)).eval(), normal(4, 12)
    flip = torch.compile(lambda v: v.flip(1), backend="eager")
    try:
        got = fk.sample(fk.fuse_head(net), noise, 4)
    except fk.NotFusable:
        pass
    else:
        close(got, fk.sample(net, noise, 4), 2e-6)


def test_the_cost_of_a_calibration():
    """Of a head that clamps what few noises reach: refused, where it used to report another network's cost."""
    net = Behind(MORE["clamp"]).eval()
    with pytest.raises(
        ValueError, match=r"does more with the velocity than to move it \(clamp\), in <lambda> at test_fuse"
    ):
        fk.calibrate(fk.fuse_head(net), normal(4, 12), 6, 3, progress=False)


class Coded(torch.Tensor):
    """As quantized weights are: a class of its own."""


def coded(linear):
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Coded))
    return linear


NAMED = {
    "an adapter": (lambda linear: Adapted(40, 12), r"\(add\), in forward at .* of a Adapted"),
    "another class": (lambda linear: Doubled(40, 12), r"\(mul\), in forward at .* of a Doubled"),
    "a coded weight": (coded, r"has a Coded of torch.float32 for a parameter of its final layer.* of a Linear"),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_head_of_another_class(name):
    net = Perceptron().eval()
    make, said = NAMED[name]
    net.layers[4] = make(net.layers[4])
    with pytest.raises(fk.NotFusable, match=rf"^head 'layers.4.*' of Perceptron: expected .*{said}"):
        fk.sample(fk.fuse_head(net), normal(4, 12), 2)


class Own(fk.VelocityField):
    def network_time(self, t):
        return t**2


def test_fields_with_an_evaluation_of_their_own():
    field = fk.VelocityField(Perceptron().eval())
    field.pair = lambda x, t: (2 * field.call_network(x, t, {}), None)
    hooked = fk.VelocityField(Perceptron().eval())
    hooked.register_forward_hook(lambda m, a, out: 2 * out)
    for velocity in (Own(Perceptron().eval()), field, hooked):
        with pytest.raises(ValueError, match=r"^velocity: expected a VelocityField's own evaluation"):
            fk.fuse_head(velocity)


# ---- threads ----


def test_other_threads_are_left_alone():
    """Four threads call the network itself, while four step it to its head and prove it again and again."""
    net = Behind(lambda net, v, x, t: v).eval()
    x, t, noise = normal(4, 12), torch.full((4,), 0.5), normal(4, 12, seed=1)
    with torch.no_grad():
        expected = net(x, t)
    fused, stepped, end, failed = fk.fuse_head(net), fk.sample(net, noise, 6), threading.Event(), []

    def call():
        with torch.no_grad():
            while not end.is_set():
                if not torch.equal(net(x, t), expected):
                    failed.append("another result")

    def step():
        for i in range(12):
            close(fk.sample(fused if i % 3 else fk.fuse_head(net, "layers.4"), noise, 6), stepped, 2e-6)

    def guarded(work):
        def run():
            try:
                work()
            except BaseException as e:
                failed.append(repr(e))

        return threading.Thread(target=run)

    callers, steppers = [guarded(call) for _ in range(4)], [guarded(step) for _ in range(4)]
    for thread in callers + steppers:
        thread.start()
    for thread in steppers:
        thread.join()
    end.set()
    for thread in callers:
        thread.join()
    assert not failed
    assert not hooks(net)


def test_a_fused_head_inside_a_network():
    """The inner head's end is not taken for the outer one's, though both are the same Linear."""
    shared, noise = Perceptron().eval(), normal(4, 12)
    inner, once = fk.fuse_head(shared), fk.Solver.euler(1)
    start = fk.sample(inner, noise, once)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared = shared

        def forward(self, x, t):
            ((start, _),) = inner.fused_steps(noise, once)
            return self.shared(start + x, t)

    expected = fk.sample(lambda x, t: shared(start + x, t), noise, 3)
    close(fk.sample(fk.fuse_head(Outer(), "shared.layers.4"), noise, 3), expected, 2e-6)


# ---- copies ----


def through_a_file(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_a_file])
def test_copies_are_of_a_network_of_their_own(copied):
    """Of a head that has run, and of modules that hold one."""
    fused, noise = fk.fuse_head(Perceptron().eval()), normal(4, 12)
    expected = fk.sample(fused, noise, 3)
    policy = copied(nn.ModuleDict({"velocity": fused, "other": nn.Linear(2, 2)}))
    other = policy["velocity"]
    assert torch.equal(fk.sample(other, noise, 3), expected)
    assert other.net is not fused.net
    train(other.net)
    close(fk.sample(other, noise, 3), fk.sample(other.net, noise, 3), 2e-6)
    assert torch.equal(fk.sample(fused, noise, 3), expected)
