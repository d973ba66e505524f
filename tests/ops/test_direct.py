"""`library.direct`: past torch's dispatcher where it has nothing to do, through it where it has."""

import itertools
import sys

import ops_cases
import pytest
import torch
from ops_cases import PLACES
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import flowkernels as fk
from flowkernels.ops import library
from flowkernels.ops.euler_step import euler_step
from flowkernels.ops.linear_update import linear_update
from flowkernels.ops.public import OPS
from flowkernels.ops.samples import generator
from flowkernels.ops.segment_points import segment_points
from flowkernels.ops.straighten_loss import straighten_loss
from flowkernels.runtime.backends import BACKENDS, backend

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


CALLS = {name: call for op in OPS for name, call in ops_cases.of(op).CALLS.items()}
EVERY = pytest.mark.parametrize("op", CALLS)
ASKING = [m for m in sys.modules.values() if m.__name__.startswith("flowkernels.ops.") and hasattr(m, "direct")]
ASKING.remove(library)
PLAIN = [m for m in sys.modules.values() if m.__name__.startswith("flowkernels.ops.") and hasattr(m, "plain")]
PLAIN.remove(library)
DIFFERENTIABLE = [op for op in OPS if hasattr(ops_cases.of(op), "GRADIENTS")]


def inputs(op):
    """Whole numbers from 1: exact, and steps that are not zero."""
    g = generator(0)
    return [torch.randint(1, 9, shape, generator=g).float() for shape in CALLS[op].shapes]


def call(op, tensors=None):
    return CALLS[op].run(*(inputs(op) if tensors is None else tensors))


def parts(result):
    return result if isinstance(result, tuple) else (result,)


def same(a, b):
    return all(
        type(p) is type(q) and p.dtype == q.dtype and torch.equal(p, q) for p, q in zip(parts(a), parts(b), strict=True)
    )


class Told:
    """The compiled module, of which the calls `<op>_plain` that were made are kept."""

    def __init__(self, C, answers):
        self.C, self.answers = C, answers

    def __getattr__(self, name):
        call = getattr(self.C, name)

        def told(*args):
            made = call(*args)
            if made and name.endswith("_plain"):
                self.answers.append(self.C)
            return made

        return told


@pytest.fixture(autouse=True)
def taken(monkeypatch):
    """What `direct` answered: True for the way past the dispatcher, as calls on plain tensors take it unasked."""
    answers = []

    def plain(*args, plain=library.plain):
        return None if (C := plain(*args)) is None else Told(C, answers)

    for module in PLAIN:
        monkeypatch.setattr(module, "plain", plain)

    def recorded(*args, direct=library.direct, **kwargs):
        answers.append(direct(*args, **kwargs))
        return answers[-1]

    for module in ASKING:
        monkeypatch.setattr(module, "direct", recorded)
    return answers


class Way:
    """Whether the calls inside went past the dispatcher."""

    def __init__(self, answers):
        self.answers, self.start = answers, len(answers)

    def __call__(self):
        answers = [a is not None for a in self.answers[self.start :]]
        self.start = len(self.answers)
        assert len(set(answers)) == 1
        return "direct" if answers[0] else "dispatcher"


@pytest.fixture
def way(taken):
    return Way(taken)


@pytest.fixture(params=["cpu", "cuda"])
def on(request):
    """The kernels of the CPU, or of a GPU, compiled for the host."""
    with backend(request.param):
        yield request.param


@EVERY
def test_the_same_results_both_ways(op, on, way, monkeypatch):
    expected = call(op)
    assert way() == "direct"
    for module in ASKING:
        monkeypatch.setattr(module, "direct", lambda *_, **__: None)
    for module in PLAIN:
        monkeypatch.setattr(module, "plain", lambda *_: None)
    got = call(op)
    assert same(got, expected)
    assert [t.stride() for t in parts(got)] == [t.stride() for t in parts(expected)]
    with backend("reference"):
        torch.testing.assert_close(parts(call(op)), parts(expected))


@EVERY
def test_the_reference_when_asked_for(op, way):
    with backend("reference"):
        call(op)
    assert way() == "dispatcher"


REGISTERED = [name for op in OPS for name in (op, f"{op}_out") if name in library.TENSORS]


@pytest.mark.parametrize("op", REGISTERED)
def test_tensors_on_another_device_are_refused(op, monkeypatch):
    """A kernel would read their addresses on its own. The meta device stands for a GPU."""
    here, there = torch.zeros(2, dtype=F64), torch.zeros(2, dtype=F64, device="meta")
    (first, _, _), *others = library.TENSORS[op]
    assert first == 0
    for i, name, on_host in others:
        for x, t in ((here, there), (there, here)):
            args = [x] * (1 + max(at for at, *_ in others))
            args[i] = [x, t] if name in ("v", "history", "tensors") and op != "euler_step" else t
            if on_host and t is here:
                library.expect_places(op, args)
                continue
            with pytest.raises(ValueError, match=f"^{name}: expected a tensor on {x.device}.*, got .* on {t.device}"):
                library.expect_places(op, args)
    asked = []
    monkeypatch.setattr(library, "expect_places", lambda *args: asked.append(args[0]))
    if op in CALLS:
        with Seen():
            call(op)
        assert asked == [op]


def test_times_that_the_host_reads():
    v, x, times = torch.randn(3, 2, 4), torch.randn(4, 2, 4), torch.zeros(4, dtype=F64, device="meta")
    for where in ((), (0, 0)):
        with pytest.raises(ValueError, match="times: expected a tensor on the CPU"):
            library.KERNELS["velocity_gram"](None, v, x, times, *where)


# ---- what the dispatcher has to see ----


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


@EVERY
def test_dispatch_modes(op, on, way):
    expected, _ = call(op), way()
    with Seen() as mode:
        got = call(op)
    assert way() == "dispatcher"
    assert f"flowkernels.{op}.default" in mode.ops
    assert same(got, expected)


@EVERY
def test_fake_tensors(op, way):
    expected, _ = call(op), way()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        got = call(op, [mode.from_tensor(t) for t in inputs(op)])
    assert way() == "dispatcher"
    for fake, real in zip(parts(got), parts(expected), strict=True):
        assert isinstance(fake, FakeTensor)
        assert (fake.shape, fake.dtype) == (real.shape, real.dtype)


@EVERY
def test_the_profiler_shows_the_op(op, on, way):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call(op)
    assert way() == "dispatcher"
    assert f"flowkernels::{op}" in [e.key for e in profile.key_averages()]
    call(op)
    assert way() == "direct"


@EVERY
def test_compiled_graphs_hold_the_op(op):
    graphs = []

    def keep(graph, _):
        graphs.append(str(graph.code))
        return graph

    torch._dynamo.reset()
    got = torch.compile(CALLS[op].run, fullgraph=True, backend=keep)(*inputs(op))
    assert len(graphs) == 1
    assert f"flowkernels.{op}(" in graphs[0]
    assert same(got, call(op))


@EVERY
def test_traced_graphs_hold_the_op(op):
    traced = make_fx(CALLS[op].run)(*inputs(op))
    assert f"flowkernels.{op}.default" in traced.code
    other = [t.flip(-1) for t in inputs(op)]
    assert same(traced(*(t.clone() for t in other)), call(op, other))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("op", ["euler_step", "linear_euler", "linear_update", "segment_points"])
def test_torchscript_traces_hold_the_op(op):
    traced = torch.jit.trace(CALLS[op].run, tuple(inputs(op)), check_trace=False)
    other = [t.flip(-1) for t in inputs(op)]
    assert same(traced(*other), call(op, other))


def test_a_trace_with_the_gradient():
    """Backward looks at the number that arrives where it may; a tracer has none."""
    v, bank, h, _ = inputs("straighten_loss")

    def gradient(v):
        v = v.detach().requires_grad_()
        return torch.autograd.grad(straighten_loss(v, bank, h, *PLACES).loss, v)[0]

    assert torch.equal(make_fx(gradient)(v)(2 * v), gradient(2 * v))


# ---- what the tensors are ----


class Mine(torch.Tensor):
    pass


@EVERY
def test_subclasses(op, on, way):
    expected, _ = call(op), way()
    for i in range(len(CALLS[op].shapes)):
        tensors = inputs(op)
        tensors[i] = tensors[i].as_subclass(Mine)
        got = call(op, tensors)
        assert all(
            torch.equal(a.as_subclass(torch.Tensor), b) for a, b in zip(parts(got), parts(expected), strict=True)
        )
        assert way() == "dispatcher"


@EVERY
def test_parameters(op):
    expected = call(op)
    got = call(op, [torch.nn.Parameter(t, requires_grad=False) for t in inputs(op)])
    assert same(tuple(t.detach() for t in parts(got)), parts(expected))


@EVERY
@pytest.mark.parametrize("kind", ["neg view", "imaginary part of a conjugate", "zeros without memory"])
def test_tensors_whose_memory_is_not_their_values(op, kind, on, way):
    """Negated views as `x.conj().imag` makes them; zeros as forward-mode differentiation does."""
    for i in set(range(len(CALLS[op].shapes))) - set(CALLS[op].written):
        tensors = inputs(op)
        t = tensors[i] = torch.zeros_like(tensors[i]) if kind.startswith("zeros") else tensors[i]
        expected = call(op, [t.clone() for t in tensors])
        assert way() == "direct"
        if kind == "neg view":
            tensors[i] = torch._neg_view(-t)
        elif kind.startswith("imaginary"):
            tensors[i] = torch.complex(t, -t).conj().imag
        else:
            tensors[i] = torch._efficientzerotensor(t.shape)
        assert tensors[i].is_neg() or tensors[i]._is_zerotensor()
        got = call(op, tensors)
        assert way() == "dispatcher" or CALLS[op].converts
        torch.testing.assert_close(parts(got), parts(expected), rtol=0, atol=0, equal_nan=True)


def test_negated_places():
    bank, u = inputs("segment_points")
    i, s = (torch._neg_view(-t) for t in PLACES)
    assert torch.equal(segment_points(bank, i, s, u), segment_points(bank, *PLACES, u))
    v, bank, h, _ = inputs("straighten_loss")
    assert same(straighten_loss(v, bank, h, i, s), straighten_loss(v, bank, h, *PLACES))


@pytest.mark.parametrize(
    ("op", "target"),
    [
        *itertools.product(("euler_step", "linear_update"), ("out", "low")),
        *itertools.product(("linear_euler",), ("out", "low", "velocity_out")),
    ],
)
def test_negated_views_are_not_written_to(op, target):
    """A view that torch negates when it is read, as the imaginary part of a conjugate is."""
    x, weight = torch.ones(2, 4), torch.ones(2, 3)
    args = dict(
        euler_step=(x, x, 0.5), linear_update=(x, [x], [0.5]), linear_euler=(x, torch.ones(2, 2, 3), weight, 0.5)
    )
    memory = torch.zeros(2, 4, dtype=torch.float16 if target == "low" else torch.float32)
    with pytest.raises((TypeError, ValueError), match=rf"^{target}: expected a tensor that is not a negated view"):
        getattr(fk, op)(*args[op], **{target: torch._neg_view(memory)})
    assert not memory.any()


# ---- autograd ----


@EVERY
def test_tensors_that_need_a_gradient(op, on, way):
    expected, _ = call(op), way()
    for i in range(len(CALLS[op].shapes)):
        tensors = inputs(op)
        tensors[i].requires_grad_()
        with torch.no_grad():
            assert same(call(op, tensors), expected)
            assert way() == "direct"
        if CALLS[op].written or op == "linear_euler" or op == "mlp_sample":  # which has none
            with pytest.raises(ValueError, match="expected no gradient"):
                call(op, tensors)
            assert op != "linear_euler" or way() == "dispatcher"  # it looks for them once the direct way is not taken
        elif op in DIFFERENTIABLE:
            got = call(op, tensors)
            own_gradient = op == "straighten_loss"  # which sees to it itself, and only in v
            assert way() == ("direct" if own_gradient else "dispatcher")
            assert parts(got)[0].requires_grad == (i == 0 or not own_gradient)
        else:
            assert not any(t.requires_grad for t in parts(call(op, tensors)))
            assert way() == "direct"


@EVERY
@pytest.mark.parametrize("name", BACKENDS)
def test_inference_mode(op, name):
    expected = call(op)
    outside = inputs(op)
    versions = [t._version for t in outside]
    with torch.inference_mode(), backend(name):
        got = call(op, outside)
        own = call(op)
        assert all(t.is_inference() for t in parts(own))
        torch.testing.assert_close([t.clone() for t in parts(own)], list(parts(got)), rtol=0, atol=0)
        torch.testing.assert_close([t.clone() for t in parts(got)], list(parts(expected)))
    changed = [i for i, t in enumerate(outside) if t._version != versions[i]]
    assert changed == list(CALLS[op].written)


def test_inference_tensors_outside_inference_mode():
    """They are read like any other, beside one that needs a gradient too: nothing of them is kept for it."""
    with torch.inference_mode():
        v, *rest = inputs("straighten_loss")
    expected = call("straighten_loss")
    assert same(call("straighten_loss", [v, *rest]), expected)
    leaf = inputs("straighten_loss")[0].requires_grad_()
    call("straighten_loss", [leaf, *rest]).loss.backward()
    assert leaf.grad.any()


@pytest.mark.parametrize("op", ["euler_step", "linear_update", "straighten_loss"])
def test_forward_mode_differentiation(op, way):
    tensors = inputs(op)
    with forward_ad.dual_level():
        tangent = torch.ones_like(tensors[0])
        result = parts(call(op, [forward_ad.make_dual(tensors[0], tangent), *tensors[1:]]))[0]
        assert not way.answers or way() == "dispatcher"
        primal, got = forward_ad.unpack_dual(result)
    torch.testing.assert_close(primal, parts(call(op))[0])
    leaf = tensors[0].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(parts(call(op, [leaf, *tensors[1:]]))[0].sum(), leaf)
    torch.testing.assert_close(got.sum(), (gradient * tangent).sum())


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(
    "op", ["velocity_gram", "euler_step", "linear_euler", "linear_update", "segment_points", "straighten_loss"]
)
def test_vmap(op):
    """Over the last tensor; the ops without a rule are called once for each."""
    *rest, last = inputs(op)
    many = torch.stack([last, last + 1])
    got = torch.func.vmap(lambda t: call(op, [*rest, t]))(many)
    expected = [parts(call(op, [*rest, t])) for t in many]
    for i, t in enumerate(parts(got)):
        torch.testing.assert_close(t, torch.stack([e[i] for e in expected]), equal_nan=True)


# ---- autocast and the default device ----


@EVERY
def test_autocast(op, way):
    expected, _ = call(op), way()
    with torch.autocast("cpu", dtype=BF16):
        assert same(call(op), expected)
    assert way() == "direct"


def test_autocast_around_a_training_step():
    """The network answers in bfloat16, the states stay as they are, and gradients come back in the weights' dtype."""
    bank, u = inputs("segment_points")
    h = inputs("straighten_loss")[2]
    net = torch.nn.Linear(5, 5)
    with torch.autocast("cpu", dtype=BF16):
        x = segment_points(bank, *PLACES, u)
        v = net(x)
        loss = straighten_loss(v, bank, h, *PLACES).loss
        state = linear_update(euler_step(x, v.detach(), 0.5), [v.detach()], [0.5])
    loss.backward()
    assert (x.dtype, v.dtype, loss.dtype, state.dtype) == (F32, BF16, F32, F32)
    assert net.weight.grad.dtype == F32
    assert net.weight.grad.isfinite().all()
    torch.testing.assert_close(state, x + v.detach().float())


@EVERY
@pytest.mark.parametrize("grad", [False, True])
def test_the_default_device_does_not_matter(op, grad):
    """As `torch.set_default_device` sets it: results are on the device of the inputs."""
    expected = call(op)
    tensors = inputs(op)
    if grad and op in DIFFERENTIABLE:
        tensors[0].requires_grad_()
    with torch.device("meta"):
        got = call(op, tensors)
        assert same(tuple(t.detach() for t in parts(got)), parts(expected))
        if tensors[0].requires_grad:
            parts(got)[0].sum().backward()
            assert tensors[0].grad.device.type == "cpu"


def test_the_default_device_and_strides():
    x, v = (t.T for t in inputs("euler_step")[:2])
    with torch.device("meta"):
        got = euler_step(x, v.contiguous(), 0.25, low=BF16)
    assert same(got, euler_step(x, v, 0.25, low=BF16))


def test_several_reasons_at_once(way):
    """A mode inside a profiler inside inference mode, and back."""
    with torch.inference_mode(), torch.profiler.profile(), Seen() as mode:
        call("linear_update_out")
    assert way() == "dispatcher"
    assert "flowkernels.linear_update_out.default" in mode.ops
    call("linear_update_out")
    assert way() == "direct"
