"""The captured loop: compiled whole, and as a graph, recorded and replayed on the host by a stand-in for CUDA's."""

import contextlib
import functools
import gc
import inspect
import math
import threading
import types
import warnings
import weakref

import pytest
import torch
from _flows import ElementwiseField, LinearField, linear_field, normal
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention.flex_attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves, tree_map_only

import flowkernels as fk
from flowkernels.models.bundled import BUNDLED
from flowkernels.models.networks import DiT, ResidualMLP, UNet
from flowkernels.runtime import backends
from flowkernels.runtime.torch_private import uncompiled
from flowkernels.sampling import capture, state
from flowkernels.sampling import rollout as rollout_module
from flowkernels.sampling import sample as sample_module
from flowkernels.sampling.loop import initial_state, steps
from flowkernels.velocity.field import VelocityField
from flowkernels.velocity.time_embedding import HasTimeEmbedding

aten = torch.ops.aten
SYNCS = (aten._local_scalar_dense, aten.item, aten.is_nonzero, aten.nonzero, aten.equal)


class NoSync(TorchDispatchMode):
    """Raises where a GPU would have to be waited for."""

    supports_higher_order_operators = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if getattr(func, "overloadpacket", None) in SYNCS:
            raise RuntimeError(f"called a synchronizing operation, {func}")
        return func(*args, **(kwargs or {}))


# as if it were torch's own, whose frames an error does not name: a GPU's syncs raise in C++
_dispatch = inspect.unwrap(NoSync.__torch_dispatch__)
_dispatch.__code__ = _dispatch.__code__.replace(co_filename=torch.__file__)


class Outside:
    """A tensor that a graph reads and does not own: an address, which holds nothing."""

    def __init__(self, tensor):
        self.storage, self.dtype = StorageWeakRef(tensor.untyped_storage()), tensor.dtype
        self.place = tensor.storage_offset(), tensor.shape, tensor.stride()

    def __call__(self):
        assert not self.storage.expired(), f"a replay reads memory that is gone: {self.dtype} {list(self.place[1])}"
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.place)


class HostGraph:
    """What a CUDA graph does, on the host: the calls of aten, each on the memory that it was recorded on.

    It owns what was made meanwhile, its pool, and nothing else.
    """

    made = 0

    def __init__(self):
        self.calls, self.pool = [], {}
        HostGraph.made += 1

    def add(self, func, args, kwargs, out):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in given:
                self.pool[t.untyped_storage()._cdata] = t.untyped_storage()
        self.calls.append((func, *tree_map_only(torch.Tensor, self._kept, (args, kwargs, out))))

    def _kept(self, t):
        # an alias, which keeps the memory of now when the tensor is given other memory
        return t.detach() if t.untyped_storage()._cdata in self.pool else Outside(t)

    def replay(self):
        for call in self.calls:
            func, args, kwargs, out = tree_map_only(Outside, lambda t: t(), call)
            new = func(*args, **kwargs)
            for old, value in zip(tree_leaves(out), tree_leaves(new), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != value.data_ptr():
                    old.copy_(value)


class Recording(TorchDispatchMode):
    supports_higher_order_operators = True

    def __init__(self, graph, **settings):
        super().__init__()
        self.graph, self.eager = graph, uncompiled()  # a mode of the host's, not of a GPU's capture
        assert settings["capture_error_mode"] == "thread_local"

    def __enter__(self):
        self.eager.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.eager.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.graph.add(func, args, kwargs or {}, out)
        return out


class Event:
    """Passed at once, unless a test says that the GPU is slow."""

    passed = True

    def wait(self):
        pass

    def record(self):
        pass

    def query(self):
        return self.passed


@pytest.fixture
def host_cuda(monkeypatch):
    """Graphs on the host for everything that capture.py asks of torch.cuda."""
    syncs = contextlib.ExitStack()

    def set_sync_debug_mode(mode):
        warnings.warn("Synchronization debug mode is a prototype feature and does not", UserWarning, stacklevel=1)
        syncs.close()
        if mode == "error":
            syncs.enter_context(uncompiled())  # a mode of the host's, not of a GPU
            syncs.enter_context(NoSync())

    stream = types.SimpleNamespace(wait_stream=lambda other: None, record_event=Event)
    for name, value in dict(
        **dict(Stream=lambda priority: stream, current_stream=lambda: stream, stream=contextlib.nullcontext),
        **dict(device=contextlib.nullcontext, Event=Event, CUDAGraph=HostGraph),
        is_current_stream_capturing=lambda: False,
        graph=lambda graph, stream, **settings: Recording(graph, **settings),
        **dict(get_sync_debug_mode=lambda: 0, set_sync_debug_mode=set_sync_debug_mode),
    ).items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(capture, "choose", lambda mode, device: mode)
    monkeypatch.setattr(HostGraph, "made", 0)
    yield HostGraph
    capture.LOOPS.clear()
    for places in (capture.STREAMS, capture.LAST):
        places.clear()


@pytest.fixture(autouse=True)
def no_loops():
    capture.LOOPS.clear()
    yield
    capture.LOOPS.clear()
    assert not torch._C._len_torch_dispatch_stack()


@pytest.fixture
def aot_eager(monkeypatch):
    """The compiler's front end alone: the loop in one graph, without the minutes of code generation."""
    monkeypatch.setattr(capture, "COMPILER", "aot_eager")


def scrambled(net):
    """Weights away from their zero initialisation."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return net.eval()


class Labelled(nn.Module, HasTimeEmbedding):
    def __init__(self, dim=9):
        super().__init__()
        self.body, self.embed = ResidualMLP(dim, width=24, blocks=1, time_width=8), nn.Embedding(4, dim)

    def time_embedding(self, t):
        return self.body.time_embedding(t)

    def forward(self, x, t, label, embedding=None):
        return self.body(x + self.embed(label).view(x.shape), t, embedding)


def guided(packed=True, n=5, **settings):
    return VelocityField(
        scrambled(Labelled()),
        conditioning={"label": torch.arange(n) % 3},
        unconditional={"label": torch.full((1,), 3)},
        **dict(guidance=2.5, packed=packed, reverse_time=True, time_scale=0.8) | settings,
    )


def narrow_field():
    net = scrambled(ResidualMLP(9, width=24, blocks=1, time_width=8)).bfloat16()
    return VelocityField(net, dtype=torch.bfloat16)


VELOCITIES = {
    "digits": (BUNDLED["digits"].load, normal(3, 1, 8, 8), 2),
    "unet": (lambda: scrambled(UNet(widths=(8, 8, 8), time_width=8)), normal(2, 1, 8, 8), 2),
    "dit": (lambda: scrambled(DiT(size=4, width=16, blocks=2, heads=2)), normal(3, 1, 4, 4), [0, 0.2, 1]),
    "guided, packed": (guided, normal(5, 9), 2),
    "guided, two calls": (lambda: guided(packed=False), normal(5, 9), 2),
    "bfloat16 network": (narrow_field, normal(4, 9), 2),
    "float64": (linear_field, normal(7, 4, dtype=torch.float64), 5),
    "bfloat16 noise": (ElementwiseField, normal(3, 5, 7, dtype=torch.bfloat16), 2),
    "strided noise": (ElementwiseField, normal(4, 6, 3).transpose(0, 1), 2),
    "the state itself": (lambda: lambda x, t: x, normal(3, 5), 3),
    "a view of the state": (lambda: lambda x, t: x.transpose(1, 2), normal(3, 5, 5), 3),
    "writes to its input": (lambda: lambda x, t: x.mul_(0.5).sin(), normal(3, 5), 2),
}


def check(velocity, noise, schedule, mode, **tolerance):
    kept = noise.clone()
    expected, got = fk.sample(velocity, noise, schedule), fk.sample(velocity, noise, schedule, capture=mode)
    assert got.dtype == expected.dtype
    assert torch.equal(noise, kept)
    if tolerance:
        assert torch.allclose(got, expected, **tolerance)
    else:
        assert torch.equal(got, expected)
    return got


# ---- how often a call waits ----


class Waits(TorchDispatchMode):
    """Counts looks at values of what is made of a tensor, as those of a GPU that wait for it."""

    def __init__(self, noise):
        super().__init__()
        self.count, self.of = 0, {noise.untyped_storage()._cdata: noise}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        ours = any(t.untyped_storage()._cdata in self.of for t in given)
        self.count += ours and func.overloadpacket in SYNCS
        out = func(*args, **(kwargs or {}))
        if ours:
            made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
            self.of |= {t.untyped_storage()._cdata: t for t in made}
        return out


@pytest.fixture
def far(monkeypatch):
    """The CPU is a device that is waited for."""
    for module in (sample_module, rollout_module):
        monkeypatch.setattr(module, "is_waited_for", lambda t: True)
    monkeypatch.setattr(backends, "reader", lambda: None)  # whose memory C++ does not read


STAGES = {
    "sample": fk.sample,
    "captured": functools.partial(fk.sample, capture="graph"),
    "invert": functools.partial(fk.invert, round_trip=False),
    "round trip": fk.invert,
    "rollout": fk.rollout,
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", VELOCITIES)
def test_a_call_waits_once_and_not_at_all_without_checks(name, stage, far, host_cuda):
    make, noise, schedule = VELOCITIES[name]
    velocity, run = make(), STAGES[stage]
    run(velocity, noise, schedule)  # which records
    for options, expected in ({}, 2 if stage == "round trip" else 1), (dict(check=False), 0):
        if stage == "rollout" and options:
            continue
        with Waits(noise) as waits:
            run(velocity, noise, schedule, **options)
        assert waits.count == expected


def test_recording_warns_of_nothing(host_cuda):
    """Torch warns of the mode in which it looks for syncs."""
    name = next(iter(VELOCITIES))
    make, noise, schedule = VELOCITIES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fk.sample(make(), noise, schedule, capture="graph")
    assert host_cuda.made == 1


@pytest.mark.parametrize("capture", [None, "graph"])
def test_what_is_not_looked_at_shows(capture, far, host_cuda):
    noise = normal(3, 4)
    noise[1, 2] = math.nan
    with pytest.raises(ValueError, match=r"^noise: expected finite values, got NaN or Inf in sample 1"):
        fk.sample(linear_field(), noise, 2, capture=capture)
    got = fk.sample(linear_field(), noise, 2, capture=capture, check=False)
    assert torch.isnan(got).any(1).tolist() == [False, True, False]
    with pytest.raises(ValueError, match=r"^noise: expected finite values, got NaN or Inf in sample 1"):
        fk.rollout(linear_field(), noise, 2)
    with pytest.raises(ValueError, match=r"^data: expected finite values, got NaN or Inf in sample 1"):
        fk.invert(linear_field(), noise, 2)
    overflows = fk.sample(lambda x, t: x * 1e30, normal(3, 4), 4, capture=capture, check=False)
    assert not torch.isfinite(overflows).any()
    with pytest.raises(ValueError, match=r"^velocity: .* in sample 0"):
        fk.sample(lambda x, t: x * 1e30, normal(3, 4), 4, capture=capture)


# ---- both modes: nothing inside looks at a value ----


@pytest.mark.parametrize("name", VELOCITIES)
def test_the_loop_has_no_host_sync(name):
    make, noise, schedule = VELOCITIES[name]
    velocity = make()
    solver, x = fk.Solver.of(schedule), initial_state(noise)
    with torch.no_grad(), NoSync():
        *_, (got, _) = steps(velocity, x, solver)
    assert torch.allclose(got, fk.sample(velocity, noise, schedule), rtol=1e-5, atol=1e-6)
    with torch.no_grad(), NoSync(), pytest.raises(RuntimeError, match="synchronizing"):
        next(steps(looks, x, solver))


def test_what_runs_where():
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert [capture.choose(mode, cpu) for mode in (None, "auto", "compile")] == [None, None, "compile"]
    assert [capture.choose(mode, gpu) for mode in capture.MODES] == [None, "graph", "graph", "compile"]
    assert torch.equal(
        fk.sample(linear_field(), normal(3, 4), 3, capture="auto"), fk.sample(linear_field(), normal(3, 4), 3)
    )


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("graph", r"^capture: expected a CUDA GPU for 'graph'.*capture=None.*'compile'.*, got tensors on cpu"),
        ("jit", r"^capture: expected None, 'auto', 'graph' or 'compile', got jit"),
        (True, r"^capture: expected None, .*got True"),
    ],
)
def test_bad_modes(mode, message):
    def velocity(x, t):
        raise AssertionError("called")

    with pytest.raises(ValueError, match=message):
        fk.sample(velocity, normal(3, 4), 3, capture=mode)


# ---- torch.compile ----


@pytest.mark.parametrize("name", VELOCITIES)
def test_compiled_the_numbers_are_the_same(name, aot_eager):
    make, noise, schedule = VELOCITIES[name]
    with fk.backend("reference"):  # whose step is the compiled one; the kernel rounds guidance once less
        check(make(), noise, schedule, "compile")


def test_inductor():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 4))
    velocity = VelocityField(lambda x, t: net(x) * t[:, None], reverse_time=True)
    check(velocity, normal(5, 4), 3, "compile", rtol=1e-5, atol=1e-6)


def test_compiled_with_the_backend_asked_for(aot_eager):
    with fk.backend("cpu"):
        check(guided(), normal(5, 9), 2, "compile")  # bit for bit, guidance included: the same kernel


@pytest.mark.parametrize("asked", [False, True])
def test_compiled_an_update_is_torch_code_unless_a_backend_is_asked_for(asked, monkeypatch):
    called = []

    def compiler(graph, inputs):
        called.append(" ".join(str(node.target) for node in graph.graph.nodes))
        return graph

    monkeypatch.setattr(capture, "COMPILER", compiler)
    for plan in (2, fk.Solver.adams_bashforth(3)):
        with fk.backend("cpu") if asked else contextlib.nullcontext():
            check(guided(), normal(5, 9), plan, "compile", rtol=1e-5, atol=1e-5)
    assert [("euler_step" in names, "linear_update" in names) for names in called] == [(asked, False), (False, asked)]


def test_compiled_loops_see_what_changes(aot_eager):
    field, noise = guided(), normal(5, 9)
    body, close = field.net.body, dict(rtol=1e-5, atol=1e-5)
    results = [check(field, noise, 2, "compile", **close)]
    with torch.no_grad():
        body.input.weight.mul_(2)
    results.append(check(field, noise, 2, "compile", **close))
    body.input.weight = nn.Parameter(body.input.weight.detach().clone() / 3)
    results.append(check(field, noise, 2, "compile", **close))
    field.conditioning["label"].copy_(torch.tensor([2, 2, 1, 1, 0]))
    results.append(check(field, noise, 2, "compile", **close))
    field.conditioning["label"] = torch.tensor([1, 0, 0, 0, 0])
    results.append(check(field, noise, 2, "compile", **close))
    field.guidance = 1.5
    results.append(check(field, noise, 2, "compile", **close))
    assert all(not torch.allclose(a, b) for i, a in enumerate(results) for b in results[:i])


WORKS = [
    (normal(2, 4), 2),
    (normal(3, 4), 2),
    (normal(2, 4).double(), 2),
    (normal(2, 4), 3),
    (normal(2, 4), [0, 0.3, 1]),
]


def test_compiled_anew_for_another_shape_dtype_and_schedule(aot_eager):
    net, close = linear_field(), dict(rtol=1e-6, atol=1e-6)
    for count, (noise, schedule) in enumerate(WORKS, start=1):
        check(net, noise, schedule, "compile", **close)
        assert len(capture.LOOPS.loops) == count
    for noise, schedule in WORKS:
        check(net, noise, schedule, "compile", **close)
    assert len(capture.LOOPS.loops) == len(WORKS)


@pytest.fixture
def few_recompilations():
    """How many the compiler makes of one function before it gives up."""
    name = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    with torch._dynamo.config.patch({name: 2}):
        yield 2


def test_more_compiled_loops_than_the_compiler_makes_of_one_function(aot_eager, few_recompilations):
    net = linear_field()
    for n in range(1, 3 + few_recompilations):
        check(net, normal(n, 4), 1, "compile")


def test_compiled_loops_keep_no_network_alive(aot_eager):
    net = linear_field()
    gone = weakref.ref(net)
    fk.sample(net, normal(2, 4), 2, capture="compile")
    assert len(capture.LOOPS.loops) == 1
    del net
    gc.collect()
    assert gone() is None
    assert not capture.LOOPS.loops


def test_more_settings_than_the_compiler_makes_of_one_function(aot_eager, few_recompilations):
    field = guided()
    for _ in range(3 + few_recompilations):
        field.guidance += 0.5
        check(field, normal(5, 9), 1, "compile", rtol=1e-5, atol=1e-5)


def branches(x, t):
    if x.sum() > 0:
        return x
    return -x


def looks(x, t):
    return x * t[0].item()


@pytest.mark.parametrize("velocity", [branches, lambda x, t: print(end="") or x], ids=["branch", "print"])
def test_what_cannot_be_compiled_says_why(velocity, aot_eager):
    message = (
        r"^velocity: expected a network that torch.compile takes whole \(capture=None .*, got \w+: .* at .*test_capture"
    )
    with pytest.raises(RuntimeError, match=message) as error:
        fk.sample(velocity, normal(3, 4), 2, capture="compile")
    assert isinstance(error.value.__context__, torch._dynamo.exc.TorchDynamoException)


# ---- both: errors of the velocity are its own ----


@pytest.mark.parametrize("mode", ["compile", "graph"])
def test_errors_of_the_velocity(mode, aot_eager, host_cuda):
    with pytest.raises(ValueError, match=r"^velocity: expected x's shape \[3, 4\] on cpu, at t = 0, got"):
        fk.sample(lambda x, t: x[:, :1], normal(3, 4), 2, capture=mode)
    with pytest.raises(TypeError, match=r"^velocity: expected a tensor of shape \[3, 4\], got NoneType"):
        fk.sample(lambda x, t: None, normal(3, 4), 2, capture=mode)
    with pytest.raises(RuntimeError, match=r"cannot be multiplied"):
        fk.sample(linear_field(5), normal(3, 4), 2, capture=mode)
    assert not capture.LOOPS.loops


@pytest.mark.parametrize("mode", ["compile", "graph"])
def test_finite_or_named(mode, aot_eager, host_cuda):
    def spoils(x, t):
        bad = torch.where(x == x[1:2], math.nan, 0.0)
        return bad * (t > 0.4)[:, None]

    with pytest.raises(ValueError, match=r"^velocity: .*NaN or Inf in sample 1 at step 2 \(t = 0.5\)"):
        fk.sample(lambda x, t: torch.where(t[:, None] > 0.4, spoils(x, t), 0.0), normal(3, 4), 4, capture=mode)
    with pytest.raises(ValueError, match=r"^noise: expected finite values"):
        fk.sample(linear_field(), torch.full((3, 4), math.inf), 4, capture=mode)


class Slotted:
    __slots__ = ()

    def __call__(self, x, t):
        return x


class Flows:
    """Whose methods are velocities."""

    def out(self, x, t):
        return x * t[:, None]

    def back(self, x, t):
        return -x * t[:, None]


@pytest.mark.parametrize("mode", ["compile", "graph"])
def test_methods_of_one_object_have_loops_of_their_own(mode, aot_eager, host_cuda):
    flows, noise = Flows(), normal(4, 3)
    for velocity in (flows.out, flows.back, flows.out):
        torch.testing.assert_close(fk.sample(velocity, noise, 3, capture=mode), fk.sample(velocity, noise, 3))


@pytest.mark.parametrize("mode", ["compile", "graph"])
def test_a_velocity_without_weak_references(mode, aot_eager, host_cuda):
    with pytest.raises(TypeError, match=r"^velocity: expected a callable that can be weakly referenced.*Slotted"):
        fk.sample(Slotted(), normal(3, 4), 2, capture=mode)
    check(VelocityField(Slotted()), normal(3, 4), 2, mode)


# ---- the graph ----


@pytest.mark.parametrize("name", VELOCITIES)
def test_replayed_the_numbers_are_the_same(name, host_cuda):
    make, noise, schedule = VELOCITIES[name]
    velocity = make()
    first = check(velocity, noise, schedule, "graph")
    kept = first.clone()
    other = check(velocity, noise + 1, schedule, "graph")
    assert torch.equal(first, kept)  # memory of its own, which a replay does not write to
    assert not torch.equal(first, other)
    assert torch.equal(check(velocity, noise, schedule, "graph"), first)
    assert host_cuda.made == 1


def test_replays_call_no_python(host_cuda):
    calls = []

    def velocity(x, t):
        calls.append(1)
        return x.sin()

    fk.sample(velocity, normal(3, 4), 3, capture="graph")
    assert len(calls) == 4 * 3  # thrice to warm up, and the recording
    fk.sample(velocity, normal(3, 4, seed=1), 3, capture="graph")
    assert len(calls) == 12


def test_the_time_mlp_is_in_the_graph_once(host_cuda):
    net = BUNDLED["digits"].load()
    calls = []
    net.time.register_forward_hook(lambda *_: calls.append(1))
    fk.sample(net, normal(3, 1, 8, 8), 4, capture="graph")
    assert len(calls) == 4


def recorded(velocity, noise=None, schedule=2, made=None):
    """Graphs recorded by one more sample, whose numbers are right."""
    before = HostGraph.made
    check(velocity, normal(5, 9) if noise is None else noise, schedule, "graph", rtol=1e-6, atol=1e-6)
    return HostGraph.made - before


def test_values_in_place_are_picked_up(host_cuda):
    field = guided()
    assert recorded(field) == 1
    with torch.no_grad():
        for p in field.parameters():
            p.mul_(1.1)
    field.net.load_state_dict({k: v * 0.9 for k, v in field.net.state_dict().items()})
    field.conditioning["label"].add_(1).remainder_(3)
    assert recorded(field) == 0


def test_a_network_in_training_mode_is_warned_of_at_every_call(host_cuda, recwarn):
    class Net(LinearField):
        def __init__(self):
            super().__init__(torch.eye(4))
            self.drop = nn.Dropout()

    net, warned = Net().eval(), []
    warnings.simplefilter("always")
    for training in (False, True, True, False, True):
        recwarn.clear()
        fk.sample(net.train(training), normal(3, 4), 2, capture="graph")
        warned.append([w.filename for w in recwarn if "training mode" in str(w.message)])
    assert warned == [[], [__file__], [__file__], [], [__file__]]
    assert host_cuda.made == 2


def test_memory_that_moves_is_recorded_anew(host_cuda):
    field = guided()
    net = field.net
    net.register_buffer("shift", torch.zeros(9))
    recorded(field)
    changes = [
        lambda: setattr(net.body.input, "weight", nn.Parameter(net.body.input.weight.detach() * 2)),
        lambda: setattr(net.embed.weight, "data", net.embed.weight.data * 2),
        lambda: net.load_state_dict({k: v * 0.9 for k, v in net.state_dict().items()}, assign=True),
        lambda: field.conditioning.update(label=torch.tensor([2, 2, 1, 1, 0])),
        lambda: field.unconditional.update(label=torch.zeros(1, dtype=torch.long)),
        lambda: setattr(net, "shift", torch.ones(9)),
        lambda: setattr(field, "guidance", 1.5),
        lambda: setattr(field, "time_scale", 0.5),
        lambda: net.train(),
    ]
    for change in changes:
        kept = [p.detach() for p in net.parameters()]  # so that no address is taken again
        change()
        assert recorded(field) == 1
        assert recorded(field) == 0
        del kept


GLOBAL = LinearField(torch.eye(4))


def test_what_functions_hold(host_cuda):
    net, scale = linear_field(), [torch.ones(4)]
    holders = {
        "closure": lambda x, t: net(x, t),
        "global": lambda x, t: GLOBAL(x, t),
        "partial": functools.partial(lambda net, x, t: net(x, t), net),
        "default": lambda x, t, net=net: net(x, t),
        "list": lambda x, t: net(x, t) * scale[0],
        "method": net.forward,
    }
    for name, velocity in holders.items():
        module = GLOBAL if name == "global" else net
        noise = normal(3, 4)
        assert recorded(velocity, noise) == 1
        kept = module.matrix
        with torch.no_grad():
            module.matrix.mul_(1.1)
        assert recorded(velocity, noise) == 0
        module.matrix = nn.Parameter(module.matrix.detach() * 0.9)
        assert recorded(velocity, noise) == 1
        del kept
    scale.insert(0, torch.full((4,), 2.0))
    assert recorded(holders["list"], normal(3, 4)) == 1
    assert recorded(net.forward, normal(3, 4)) == 0  # made anew at every access


def test_a_network_that_changes_at_its_first_call(host_cuda):
    class Lazy(nn.Module):
        table = None

        def forward(self, x, t):
            if self.table is None:
                self.table = torch.linspace(0, 1, x.shape[1])
            return x * self.table

    net = Lazy()
    fk.sample(net, normal(3, 4), 2, capture="graph")
    fk.sample(net, normal(3, 4), 2, capture="graph")
    assert host_cuda.made == 1


def test_another_shape_dtype_and_schedule(host_cuda):
    net = linear_field()
    assert [recorded(net, noise, schedule) for noise, schedule in WORKS] == [1] * 5
    assert [recorded(net, noise, schedule) for noise, schedule in WORKS] == [0] * 5


def test_autocast_is_its_own_graph(host_cuda):
    net = BUNDLED["digits"].load()
    noise = normal(3, 1, 8, 8)
    plain = check(net, noise, 2, "graph")
    with torch.autocast("cpu", torch.bfloat16):
        narrow = check(net, noise, 2, "graph")
    assert not torch.equal(plain, narrow)
    assert torch.equal(fk.sample(net, noise, 2, capture="graph"), plain)
    assert host_cuda.made == 2


@contextlib.contextmanager
def set_to(module, name, value):
    before = getattr(module, name)
    setattr(module, name, value)
    yield
    setattr(module, name, before)


@contextlib.contextmanager
def default_dtype():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def hook_of_all_modules():
    hook = nn.modules.module.register_module_forward_hook(lambda module, args, out: 2 * out)
    yield
    hook.remove()


class Ambient(nn.Module):
    """Of what torch is set to."""

    def forward(self, x, t):
        third = torch.full((), 1.0) / 3
        return x * float(torch.backends.cudnn.allow_tf32) + third.double().to(x.dtype)


AMBIENT = {
    "the default dtype": default_dtype,
    "convolutions": lambda: set_to(torch.backends.cudnn, "allow_tf32", not torch.backends.cudnn.allow_tf32),
    "a hook of all modules": hook_of_all_modules,
}


@pytest.mark.parametrize("setting", AMBIENT)
def test_what_torch_is_set_to_is_its_own_graph(setting, host_cuda):
    net, noise = Ambient().eval(), normal(3, 1, 8, 8).double()
    plain = check(net, noise, 2, "graph")
    with AMBIENT[setting]():
        other = check(net, noise, 2, "graph")
    assert not torch.equal(plain, other)
    assert torch.equal(fk.sample(net, noise, 2, capture="graph"), plain)
    assert host_cuda.made == 2


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc], ids=str)
def test_the_memory_of_sparse_tensors_is_held(layout):
    matrix = torch.eye(4).to_sparse(layout=layout)
    with capture._Reads() as reads:
        torch.sparse.mm(matrix, torch.ones(4, 2))
    marks, storages = state._marks(matrix)
    assert state.SPARSE in [kind for kind, *_ in marks]
    assert storages
    assert storages <= set(reads.storages)


def test_inference_mode(host_cuda):
    net, noise = linear_field(), normal(3, 4)
    with torch.inference_mode():
        first = fk.sample(net, noise.clone(), 2, capture="graph")
    assert torch.equal(check(net, noise, 2, "graph"), first)
    assert host_cuda.made == 1


def test_bounded_and_the_least_recently_used_goes_first(host_cuda, monkeypatch):
    monkeypatch.setattr(capture, "SIZE", 3)
    net = linear_field()
    assert [recorded(net, normal(2, 4), N) for N in (1, 2, 3, 1, 4)] == [1, 1, 1, 0, 1]  # 2 had to go
    assert len(capture.LOOPS.loops) == 3
    assert [recorded(net, normal(2, 4), N) for N in (1, 3, 4, 2)] == [0, 0, 0, 1]


def test_a_graph_lives_as_long_as_its_velocity(host_cuda):
    field, other = guided(), linear_field()
    gone = weakref.ref(field.net)
    recorded(field), recorded(field, schedule=3), recorded(other.forward, normal(2, 4))
    del field
    gc.collect()
    assert gone() is None
    assert len(capture.LOOPS.loops) == 1
    del other
    gc.collect()
    assert not capture.LOOPS.loops


class Table:
    """Nothing that is looked at for changes."""

    def __init__(self, values):
        self.values = values


class Looking(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.table = nn.Linear(4, 4), Table(torch.full((4,), 2.0))

    def forward(self, x, t):
        return self.layer(x) * self.table.values


def test_memory_is_kept_for_a_graph_where_no_change_of_it_is_seen(host_cuda):
    net, noise = Looking(), normal(3, 4)
    first = check(net, noise, 2, "graph")
    net.table.values = torch.full((4,), 3.0)
    gc.collect()
    assert torch.equal(fk.sample(net, noise, 2, capture="graph"), first)  # as documented, but for no garbage
    assert host_cuda.made == 1


def test_memory_is_not_kept_for_a_graph_where_a_change_of_it_is_seen(host_cuda):
    net, noise = Looking(), normal(3, 4)
    check(net, noise, 2, "graph")
    old = StorageWeakRef(net.layer.weight.untyped_storage())
    net.layer.weight = nn.Parameter(net.layer.weight.detach() * 2)
    assert old.expired()
    check(net, noise, 2, "graph")
    assert host_cuda.made == 2


class Refusing(nn.Module):
    """A network that no mode may look at."""

    def __init__(self):
        super().__init__()
        self.layer, self.table = nn.Linear(4, 4), Table(torch.full((4,), 2.0))

    def forward(self, x, t):
        x = self.layer(x) * self.table.values
        if any(isinstance(mode, capture._Reads) for mode in _get_current_dispatch_mode_stack()):
            raise RuntimeError("out of memory, say")
        return x


def test_a_network_that_cannot_be_looked_at_is_recorded_all_the_same(host_cuda):
    net, noise = Refusing(), normal(3, 4)
    first = check(net, noise, 2, "graph")
    net.table.values = torch.full((4,), 3.0)  # of which the look has come to know
    gc.collect()
    assert torch.equal(fk.sample(net, noise, 2, capture="graph"), first)


def attends(x, t):
    return flex_attention(*[x[:, None]] * 3, score_mod=lambda score, *_: score.sin())[:, 0]


def test_operations_of_a_higher_order(host_cuda):
    check(attends, normal(1, 16, 16), 2, "graph")


DROPS = {
    "for newer ones": lambda made: fk.sample(linear_field(), normal(2, 4), 2, capture="graph"),
    "with its velocity": lambda made: made.clear(),
    "with all": lambda made: capture.LOOPS.clear(),
}


@pytest.mark.parametrize("drop", DROPS)
def test_a_dropped_graph_is_kept_until_its_replay_is_over(drop, host_cuda, monkeypatch):
    monkeypatch.setattr(capture, "SIZE", 1)
    monkeypatch.setattr(Event, "passed", False)
    made = [linear_field()]
    fk.sample(made[0], normal(2, 4), 2, capture="graph")
    graph = weakref.ref(next(iter(capture.LOOPS.loops.values()))[0])
    DROPS[drop](made)
    gc.collect()
    assert graph() is not None
    monkeypatch.setattr(Event, "passed", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)  # where a query would spoil a graph
    capture.LOOPS.drop_passed()
    assert graph() is not None
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    fk.sample(linear_field(), normal(2, 4), 3, capture="graph")
    gc.collect()
    assert graph() is None


def test_what_graphs_of_a_device_do_is_one_after_another(host_cuda, monkeypatch):
    """Their products share scratch memory, that of the stream on which they are recorded."""
    order = []
    monkeypatch.setattr(Event, "record", lambda event: order.append(("end", event)))
    monkeypatch.setattr(Event, "wait", lambda event: order.append(("wait", event)))
    nets = linear_field(), linear_field(seed=4)
    for net in (*nets, *nets):
        fk.sample(net, normal(3, 4), 2, capture="graph")
    waits = [event for what, event in order if what == "wait"]
    ends = [event for what, event in order if what == "end"]
    assert len(ends) == 4
    assert order[-4:] == [("wait", ends[1]), ("end", ends[2]), ("wait", ends[2]), ("end", ends[3])]
    assert ends[0] in waits  # of the first graph, by the recording of the second


def test_threads_share_a_graph(host_cuda):
    net = BUNDLED["digits"].load()
    noises = [normal(3, 1, 8, 8, seed=i) for i in range(4)]
    expected, wrong = [fk.sample(net, x, 3) for x in noises], []

    def work(i):
        for _ in range(5):
            if not torch.equal(fk.sample(net, noises[i], 3, capture="graph"), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert host_cuda.made == 1


@pytest.mark.parametrize(("velocity", "line"), [(branches, "if x.sum() > 0:"), (looks, "return x * t[0].item()")])
def test_a_sync_is_named(velocity, line, host_cuda):
    with pytest.raises(
        RuntimeError, match=r"^velocity: expected a network without host syncs .*, got RuntimeError: called a sync"
    ) as e:
        fk.sample(velocity, normal(3, 4), 2, capture="graph")
    message = str(e.value)
    assert message.endswith(f", `{line}`")
    assert f"at {__file__}:{velocity.__code__.co_firstlineno + 1}" in message
    assert "capture=None" in message
    assert "capture='compile'" in message
    assert not capture.LOOPS.loops


class Compiled(nn.Module):
    """A network with a compiled block, and how often what was compiled of it has run."""

    def __init__(self):
        super().__init__()
        self.runs = []
        block = nn.Sequential(nn.Linear(4, 8), nn.SiLU())
        self.block, self.head = torch.compile(block, backend=self._compiler), nn.Linear(8, 4)

    def _compiler(self, graph, inputs):
        def run(*args):
            self.runs.append(1)
            return graph(*args)

        return run

    def forward(self, x, t):
        return self.head(self.block(x))


LOOKERS = {
    "a graph": lambda net, x: fk.sample(net, x, 2, capture="graph"),
    "a fused head": lambda net, x: fk.sample(fk.fuse_head(net), x, 2),
    "a fused network": lambda net, x: fk.fuse(net, 2),
}


@pytest.mark.parametrize("looker", LOOKERS)
def test_what_was_compiled_stays_so(looker, host_cuda):
    torch._dynamo.reset()
    net, x = Compiled().eval(), normal(3, 4)
    with torch.no_grad():
        net(x, 0)
        LOOKERS[looker](net, x)
        net.runs.clear()
        net(x, 0)
    assert len(net.runs) == 1


# ---- guidance by a function ----


class Weighted:
    def __init__(self):
        self.weight = 2.0

    def __call__(self, cond, uncond, t):
        return uncond + self.weight * SETTINGS.factor * (cond - uncond)


SETTINGS = types.SimpleNamespace(factor=1.0)


@pytest.mark.parametrize("capture", ["graph", "compile"])
def test_captured_loops_notice_what_it_reads(capture, aot_eager, host_cuda, monkeypatch):
    """Its attributes, numbers in globals, and another function of the same name."""
    noise, guidance = normal(5, 9), Weighted()
    velocity = guided(guidance=guidance)

    def agrees(v):
        torch.testing.assert_close(
            fk.sample(v, noise, 2, capture=capture), fk.sample(v, noise, 2), rtol=1e-5, atol=1e-6
        )

    agrees(velocity)
    guidance.weight = 5.0
    agrees(velocity)
    monkeypatch.setattr(SETTINGS, "factor", 3.0)
    agrees(velocity)
    for w in (1.5, 4.0):
        velocity.guidance = lambda cond, uncond, t, w=w: uncond + w * (cond - uncond)
        agrees(velocity)


def test_a_graph_refuses_a_look_at_values(host_cuda):
    def function(cond, uncond, t):
        return cond if t[0] > 0.5 else uncond

    noise = normal(5, 9)
    with pytest.raises(RuntimeError, match=r"^velocity: expected a network without host syncs.*t\[0\] > 0.5"):
        fk.sample(guided(guidance=function), noise, 2, capture="graph")
