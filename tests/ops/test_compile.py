"""`torch.compile(fullgraph=True, dynamic=True)`: one graph, the same for other step sizes and numbers of steps."""

import pytest
import torch
from _contract import identical
from _pairs import pairs
from torch import nn

import flowkernels as fk
from flowkernels._checks import _uniform
from flowkernels.ops.euler_step import euler_step
from flowkernels.ops.library import NUMBERS
from flowkernels.ops.linear_euler import linear_euler
from flowkernels.ops.linear_update import linear_update
from flowkernels.ops.public import OPS
from flowkernels.ops.samples import generator, op_args
from flowkernels.ops.segment_points import segment_points
from flowkernels.ops.straighten_loss import straighten_loss
from flowkernels.runtime.backends import BACKENDS, backend
from flowkernels.schedule import Schedule
from flowkernels.velocity.field import VelocityField
from flowkernels.velocity.time_embedding import HasTimeEmbedding

from test_contract import CASES, DIFFERENTIABLE, with_gradient  # isort: skip

BF16, F64 = torch.bfloat16, torch.float64


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=generator(seed)).to(dtype)


def compiled_once(function, calls, compiler="aot_eager"):
    """The results of the calls, of which the first alone may compile."""
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=compiler)
    results = [compiled(*calls[0])]
    with torch._dynamo.config.patch(error_on_recompile=True):
        results += [compiled(*args) for args in calls[1:]]
    return results


# ---- the ops: numbers ----

NUMBERED = [(4, 0.1, 2.0), (4, 0.2, 3.5), (5, 1 / 3, 0.5), (9, -0.4, 1.0)]
AS_NUMBERS = pytest.mark.parametrize("number", [float, torch.tensor], ids=["float", "tensor"])


def step(x, v, u, h, w):
    return euler_step(x, v, h, v_uncond=u, guidance=w, low=BF16)


def plain_step(x, v, u, h, w):
    return euler_step(x, v, h) + euler_step(x, u, 2 * h - w)  # arithmetic of the caller's


def step_in_place(x, v, u, h, w):
    return euler_step(x.clone(), v, h, v_uncond=u, guidance=w, out=x)


def update(x, v, u, h, w):
    return linear_update(x, [v, u, v], [h, w, 0.5], scale=w, low=BF16)


def update_in_place(x, v, u, h, w):
    return linear_update(x, [v, u], [h, 3 * w], out=x)


def head(x, v, u, h, w):
    return linear_euler(x, torch.cat([v, u]), v.T @ u, h, guidance=w, norm=1e-5, history=[v], b=[w], x_scale=h)


STEPS = step, plain_step, step_in_place, update, update_in_place, head


@pytest.mark.parametrize(("function", "name", "number"), pairs(STEPS, BACKENDS, [float, torch.tensor]))
def test_numbers_stay_open(function, name, number):
    calls = [(*(randn(n, 8, seed=s) for s in range(3)), number(h), number(w)) for n, h, w in NUMBERED]
    with backend(name):
        expected = [function(*(a.clone() if isinstance(a, torch.Tensor) else a for a in args)) for args in calls]
        got = compiled_once(function, calls)
    assert all(identical(a, b) for a, b in zip(got, expected, strict=True))


@AS_NUMBERS
@pytest.mark.parametrize("function", [step, plain_step, update])
def test_gradients_with_open_numbers(function, number):
    def gradients(function):
        def run(n, h, w):
            leaves = [randn(n, 8, seed=s).requires_grad_() for s in range(3)]
            out = function(*leaves, number(h), number(w))
            sum(t.float().square().sum() for t in (out if isinstance(out, tuple) else (out,))).backward()
            return tuple(t.grad for t in leaves)

        return run

    torch._dynamo.reset()
    run = gradients(torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager"))
    first = run(*NUMBERED[0])
    with torch._dynamo.config.patch(error_on_recompile=True):
        got = [first, *(run(*args) for args in NUMBERED[1:])]
    assert all(identical(a, gradients(function)(*args)) for a, args in zip(got, NUMBERED, strict=True))


def test_whole_numbers_and_numbers_that_are_not_finite():
    x, v = randn(3, 5), randn(3, 5, seed=1)
    for h in (0, 1, 3, float("nan"), float("inf")):
        torch._dynamo.reset()
        compiled = torch.compile(euler_step, fullgraph=True, dynamic=True, backend="aot_eager")
        assert identical(compiled(x, v, h), euler_step(x, v, h))


def test_constants_are_numbers_of_the_graph():
    """A tensor on the CPU would keep the graph of a GPU from being captured."""
    graphs = []

    def keep(graph, _):
        graphs.append(graph.code)
        return graph

    torch._dynamo.reset()
    x = randn(3, 5)
    torch.compile(lambda x: euler_step(x, x, 0.25), fullgraph=True, dynamic=True, backend=keep)(x)
    assert "flowkernels.euler_step(" in graphs[-1]
    assert ", 0.25, None, " in graphs[-1]
    assert "tensor" not in graphs[-1]


def test_step_with_inductor():
    calls = [(*(randn(n, 8, seed=s) for s in range(3)), h, w) for n, h, w in NUMBERED]
    got = compiled_once(step, calls, "inductor")
    assert all(identical(a, step(*args)) for a, args in zip(got, calls, strict=True))


@pytest.mark.parametrize("op", sorted(set(NUMBERS) & set(OPS)))
def test_opcheck_with_numbers_as_tensors(op):
    of_op = [s for o, s in CASES if o == op]
    for sample in of_op[:: max(1, len(of_op) // 6)]:
        args = op_args(op, sample)
        args = [with_gradient(a) if i in DIFFERENTIABLE.get(op, ()) else a for i, a in enumerate(args)]
        for i, kind in enumerate(NUMBERS[op]):
            if kind.startswith("float") and args[i] is not None:
                tensors = [torch.tensor(float(a), dtype=F64) for a in (args[i] if kind == "float[]" else [args[i]])]
                args[i] = tensors if kind == "float[]" else tensors[0]
        torch.library.opcheck(getattr(torch.ops.flowkernels, op).tensor, tuple(args))


# ---- a step of straightening ----


@pytest.mark.parametrize("loss", ["l2", "huber"])
def test_a_straightening_step_for_any_number_of_steps(loss):
    """Points, network, loss and backward, for other N, samples, batches, step sizes and constants of the loss."""
    net, twin = (nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 6)) for _ in "ab")
    twin.load_state_dict(net.state_dict())

    def forward(net, bank, h, i, s, u, c):
        x = segment_points(bank, i, s, u)
        return straighten_loss(net(x), bank, h, i, s, loss=loss, huber_c=c)

    def training(forward, net, N, n, batch, c):
        g = generator(N)
        bank, h = torch.randn(N + 1, n, 6, generator=g), torch.rand(N, generator=g, dtype=F64) + 0.2
        i, s = (torch.randint(m, (batch,), generator=g) for m in (N, n))
        got = forward(net, bank, h, i, s, torch.rand(batch, generator=g), c)
        net.zero_grad()
        got.loss.backward()
        return tuple(t.detach() for t in got) + tuple(p.grad.clone() for p in net.parameters())

    torch._dynamo.reset()
    compiled = torch.compile(forward, fullgraph=True, dynamic=True, backend="aot_eager")
    runs = [(4, 11, 16, 0.03), (2, 9, 20, 0.1), (7, 12, 16, 0.03), (10, 23, 31, 0.5)]
    first = training(compiled, net, *runs[0])
    with torch._dynamo.config.patch(error_on_recompile=True):
        got = [first, *(training(compiled, net, *run) for run in runs[1:])]
    for result, run in zip(got, runs, strict=True):
        torch.testing.assert_close(result, training(forward, twin, *run), equal_nan=True)


# ---- the sampling loop ----


class Conditioned(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(7, 9), nn.LayerNorm(9), nn.LeakyReLU(0.1), nn.Linear(9, 6))

    def forward(self, x, t, y=None):
        v = self.layers(torch.cat([x, t[:, None].to(x.dtype)], 1))
        return v if y is None else v + y[:, None]


class Embedded(nn.Module, HasTimeEmbedding):
    def __init__(self):
        super().__init__()
        self.embed, self.layer = nn.Linear(1, 6), nn.Linear(6, 6)

    def time_embedding(self, t):
        return {"t": (self.embed(t[:, None]).sin(),)}

    def forward(self, x, t, embedding=None):
        embedding = self.time_embedding(t) if embedding is None else embedding
        return self.layer(x + embedding["t"][0])


def guided(w, packed):
    y, none = torch.ones(1), torch.zeros(1)
    kwargs = dict(conditioning=dict(y=y), unconditional=dict(y=none), guidance=w, packed=packed)
    return VelocityField(Conditioned().eval(), reverse_time=True, time_scale=10.0, **kwargs)


def velocity(kind):
    torch.manual_seed(0)
    if kind == "function":
        return lambda x, t: x * t[:, None]
    if kind.startswith("guided"):
        return guided(2.5, kind == "guided")
    return (Embedded() if kind == "embedded" else Conditioned()).eval()


def knots(*times):
    return torch.tensor(times, dtype=F64)


SCHEDULES = {
    "numbers": [3, 2, 7],
    "tensors": [knots(0, 0.3, 0.5, 1), knots(0, 0.6, 1), torch.linspace(0, 1, 13, dtype=F64)],
    "schedules": [Schedule(knots(0, 0.3, 0.5, 1)), Schedule(knots(0, 0.7, 1)), Schedule(_uniform(8))],
}


def check_samples(velocities, schedules, dtype=torch.float32, compiler="aot_eager"):
    """Numbers of samples that no schedule has knots of: the compiler takes equal sizes for one."""
    calls = [
        (v, randn(21 + i, 6, seed=i, dtype=dtype), s)
        for i, (v, s) in enumerate(zip(velocities, schedules, strict=True))
    ]
    got = compiled_once(fk.sample, calls, compiler)
    for result, args in zip(got, calls, strict=True):
        expected = fk.sample(*args)
        assert result.dtype == expected.dtype
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    return got


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        *(("network", form) for form in SCHEDULES),
        ("guided", "schedules"),
        ("guided in two calls", "tensors"),
        ("embedded", "numbers"),
        ("function", "numbers"),
    ],
)
def test_the_whole_loop_for_any_number_of_steps(kind, form):
    schedules = SCHEDULES[form]
    check_samples([velocity(kind)] * len(schedules), schedules)


@pytest.mark.parametrize(("name", "dtype"), [("reference", torch.float32), ("cpu", BF16), ("cuda", F64)])
def test_the_loop_on_every_backend(name, dtype):
    net = Conditioned().eval().to(F64 if dtype == F64 else torch.float32)
    with backend(name):
        check_samples([net] * 2, [3, 5], dtype)


def test_the_loop_with_other_guidance():
    fields = [guided(w, True) for w in (2.5, 1.5, 7.0)]
    for field in fields[1:]:
        field.net = fields[0].net
    check_samples(fields, [3, 4, 5])


@pytest.mark.parametrize(("kind", "specialize"), [("linear", False), ("guided", True)])
def test_the_loop_with_inductor(kind, specialize):
    """Which of torch 2.13 does not take numbers of a network's, such as LayerNorm's eps, in a loop and left open."""
    net = nn.Linear(6, 6)
    field = (lambda x, t: net(x) * t[:, None]) if kind == "linear" else velocity(kind)
    with torch._dynamo.config.patch(specialize_float=specialize):
        check_samples([field] * 2, [2, 5], compiler="inductor")


def test_uniform_times():
    for n in (1, 2, 3, 10, 15, 100, 999):
        torch.testing.assert_close(_uniform(n), torch.linspace(0, 1, n + 1, dtype=F64), rtol=0, atol=2.3e-16)


@pytest.mark.parametrize(
    ("make", "kwargs", "message"),
    [
        (lambda: velocity("network"), dict(capture="compile"), "capture: expected None or 'auto' inside torch.compile"),
        (lambda: fk.fuse(velocity("network"), 3, shape=(6,)), {}, "velocity: expected a network inside torch.compile"),
    ],
    ids=["captured", "fused"],
)
def test_what_does_not_go_into_a_compiled_loop_is_named(make, kwargs, message):
    torch._dynamo.reset()
    compiled = torch.compile(fk.sample, fullgraph=True, dynamic=True, backend="aot_eager")
    with pytest.raises(torch._dynamo.exc.TorchDynamoException, match=message):
        compiled(make(), randn(21, 6), 3, **kwargs)
