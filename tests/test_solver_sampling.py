"""Sampling with solvers: plain, captured, compiled and with a fused head, against the definition in float64."""

import itertools
import math
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from _flows import ConstantField, Counted, ElementwiseField, linear_field, normal, uneven_grid
from _pairs import pairs
from _transformers import field_of
from test_capture import Labelled, aot_eager, host_cuda, narrow_field, no_loops, scrambled  # noqa: F401
from test_fuse_head import PROOF, Counting, Perceptron
from test_fuse_head import Late as HeadLate
from torch import nn

import flowkernels as fk
from flowkernels import Schedule, Solver, VelocityField
from flowkernels.models.bundled import BUNDLED
from flowkernels.models.networks import ResidualMLP
from flowkernels.sampling import capture, loop
from flowkernels.sampling.teacher import Teacher
from flowkernels.velocity.time_embedding import HasTimeEmbedding

BF16, F64 = torch.bfloat16, torch.float64


def dense(M=5, seed=0):
    """Every coefficient is there, as a fit makes them: each state from the first."""
    b = normal(M, M, seed=seed, dtype=F64).tril() / M
    return Solver(uneven_grid(M), uneven_grid(M)[:-1], b, "dense")


def free(M=5, seed=0):
    """A dense one with a free coefficient of the first state."""
    return replace(dense(M, seed), start_coefficients=[0.9, 1.3, -0.2, 0.6, 0.8][:M])  # one of which grows sixfold


SOLVERS = {
    "other times": Solver.euler(uneven_grid(5), model_times=[0.1, 0.2, 0.2, 0.4, 0.9]),
    "ab2": Solver.adams_bashforth(uneven_grid(5), 2),
    "ab3": Solver.adams_bashforth(uneven_grid(5), 3),
    "heun": Solver.heun(uneven_grid(4)),
    "dense": dense(),
    "free start": free(),
}
EACH = pytest.mark.parametrize("name", SOLVERS)


def definition(velocity, noise, solver):
    """The solver's formula on a state in float64, every state from the first one; velocities as the network gives them
    on the state in its own dtype."""
    start = x = noise.double()
    seen, dtype = [], F64 if noise.dtype == F64 else torch.float32
    with torch.no_grad():
        rows = solver.model_times.tolist(), solver.start_coefficients.tolist(), solver.coefficients
        for t, a, row in zip(*rows, strict=True):
            given = x.to(dtype), torch.full((len(x),), t, dtype=dtype)
            if isinstance(velocity, VelocityField) and velocity.is_guided:
                v, u = (part.double() for part in velocity.pair(*(g.clone() for g in given)))
                seen.append(u + velocity.guidance * (v - u))
            else:
                seen.append(velocity(*(g.clone() for g in given)).double().clone())
            x = a * start + sum(b * v for b, v in zip(row.tolist(), seen, strict=False))
    return x


def guided(packed=True, dtype=None, n=5):
    net = scrambled(Labelled())
    return VelocityField(
        net if dtype is None else net.to(dtype),
        conditioning={"label": torch.arange(n) % 3},
        unconditional={"label": torch.full((1,), 3)},
        **dict(guidance=2.5, packed=packed, reverse_time=True, time_scale=0.8, dtype=dtype),
    )


class Same(nn.Module):
    """Every velocity in the same memory, as from a recorded graph."""

    def __init__(self):
        super().__init__()
        self.register_buffer("out", torch.empty(3, 5))

    def forward(self, x, t):
        return self.out.copy_(ElementwiseField()(x, t))


CLOSE = dict(rtol=2e-5, atol=2e-6)
VELOCITIES = {
    "elementwise": (ElementwiseField, normal(3, 5), CLOSE),
    "network": (BUNDLED["digits"].load, normal(3, 1, 8, 8), CLOSE),
    "embedded": (lambda: scrambled(ResidualMLP(9, width=24, blocks=1, time_width=8)), normal(4, 9), CLOSE),
    "guided": (guided, normal(5, 9), CLOSE),
    "guided in two calls": (lambda: guided(False), normal(5, 9), CLOSE),
    "guided bfloat16": (lambda: guided(dtype=BF16), normal(5, 9), dict(rtol=0.02, atol=0.02)),
    "bfloat16": (narrow_field, normal(4, 9), dict(rtol=0.02, atol=0.02)),
    "float64": (linear_field, normal(7, 4, dtype=F64), dict(rtol=1e-13, atol=1e-13)),
    "float64, bfloat16 network": (narrow_field, normal(4, 9, dtype=F64), dict(rtol=0.02, atol=0.02)),
    "bfloat16 noise": (ElementwiseField, normal(3, 5, dtype=BF16), CLOSE),
    "strided noise": (ElementwiseField, normal(4, 6, 3).transpose(0, 1), CLOSE),
    "the state itself": (lambda: lambda x, t: x, normal(3, 5), CLOSE),
    "the state itself later": (lambda: lambda x, t: x.sin() if t[0] < 0.3 else x, normal(3, 5), CLOSE),
    "a view of the state": (lambda: lambda x, t: x.transpose(1, 2), normal(3, 5, 5), CLOSE),
    "an expanded view": (lambda: lambda x, t: x[:, :1].expand_as(x), normal(3, 5), CLOSE),
    "its own memory": (Same, normal(3, 5), CLOSE),
    "parameters": (lambda: ConstantField(torch.arange(5.0)), normal(3, 5), CLOSE),
}


@EACH
@pytest.mark.parametrize("kind", VELOCITIES)
def test_samples_are_the_formulas(kind, name):
    make, noise, close = VELOCITIES[kind]
    velocity, solver, kept = make(), SOLVERS[name], noise.clone()
    got = fk.sample(velocity, noise, solver)
    assert got.dtype == (F64 if noise.dtype == F64 else torch.float32)
    torch.testing.assert_close(got.double(), definition(velocity, noise, solver), **close)
    assert torch.equal(noise, kept)
    assert torch.equal(fk.sample(velocity, noise, solver, progress=True), got)


@pytest.mark.parametrize("backend", ["cpu", "reference", "cuda"])
def test_on_each_backend(backend):
    for kind, name in itertools.product(("guided", "elementwise"), ("ab2", "dense", "free start")):
        make, noise, close = VELOCITIES[kind]
        velocity = make()
        with fk.backend(backend):
            got = fk.sample(velocity, noise, SOLVERS[name])
        torch.testing.assert_close(got.double(), definition(velocity, noise, SOLVERS[name]), **close)


def test_euler_is_the_schedules_own_bit_for_bit():
    for times in (uneven_grid(6), uneven_grid(1)):
        for solver in (Solver.euler(times), Solver.adams_bashforth(times, 1), Solver.of(Schedule(times))):
            for kind in ("network", "guided", "bfloat16", "float64", "its own memory"):
                make, noise, _ = VELOCITIES[kind]
                velocity = make()
                assert torch.equal(fk.sample(velocity, noise, solver), fk.sample(velocity, noise, times))


def test_as_many_evaluations_as_it_says():
    for solver in SOLVERS.values():
        velocity = Counted(ElementwiseField())
        fk.sample(velocity, normal(2, 3), solver)
        assert velocity.calls == solver.evaluations


def test_times_and_embeddings_are_those_of_the_model():
    times, rows = [], []

    class Net(nn.Module, HasTimeEmbedding):
        def time_embedding(self, t):
            times.append(t)
            return 10 * t

        def forward(self, x, t, embedding=None):
            rows.append((t, embedding))
            return x

    solver = SOLVERS["other times"]
    fk.sample(Net(), normal(2, 3), solver)
    assert len(times) == 1
    assert torch.equal(times[0], solver.model_times.float())
    for (t, embedding), expected in zip(rows, solver.model_times.float(), strict=True):
        assert torch.equal(t, expected.expand(2))
        assert torch.equal(embedding, 10 * expected.expand(2))


@pytest.fixture
def updates(monkeypatch):
    """(velocities, whether it writes in place) of every call of `linear_update`, and of those by `adder`."""
    calls, op, of_loop = [], loop.linear_update, loop.adder

    def counted(x, v, b, **kwargs):
        calls.append(([t.dtype for t in v], "out" in kwargs))
        return op(x, v, b, **kwargs)

    def counting(x):
        add = of_loop(x)

        def counted(x, v, b, scale, out):
            calls.append(([t.dtype for t in v], True))
            return add(x, v, b, scale, out)

        return counted

    monkeypatch.setattr(loop, "linear_update", counted)
    monkeypatch.setattr(loop, "adder", counting)
    return calls


def test_what_guidance_costs(updates):
    """Nothing in steps of a solver's own velocities alone, whose op applies it; two terms of the update where a
    velocity is used once; else one pass of its own, all after it on its result."""
    noise = normal(5, 9)
    fk.sample(guided(), noise, SOLVERS["other times"])
    assert not updates
    fk.sample(guided(), noise, SOLVERS["ab2"])
    combined = ([torch.float32] * 2, False)
    expected = [combined, ([torch.float32], True), *[combined, ([torch.float32] * 2, True)] * 3]
    assert updates == [*expected, ([torch.float32] * 3, True)]
    updates.clear()
    fk.sample(guided(dtype=BF16), noise, SOLVERS["ab2"])  # an update has velocities of one dtype
    combined = ([BF16] * 2, False)
    assert updates == [combined, ([torch.float32], True), *[combined, ([torch.float32] * 2, True)] * 4]


@pytest.mark.parametrize("buffers", [1, 2, 3])
def test_networks_that_use_memory_again(buffers):
    """Of their outputs, after one evaluation or after several; whichever velocities a solver keeps."""
    memory, calls = [torch.empty(5, 3) for _ in range(buffers)], itertools.count()

    def velocity(x, t):
        return memory[next(calls) % buffers].copy_(-x * (1 + t)[:, None])

    late = Solver([0, 0.25, 0.5, 1], [0, 0.25, 0.5], [[0.25, 0, 0], [0, 0.5, 0], [0, 0.3, 0.6]])
    noise = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    for solver in (late, Solver.adams_bashforth(6, 3), dense()):
        expected = definition(lambda x, t: -x * (1 + t)[:, None], noise, solver)
        torch.testing.assert_close(fk.sample(velocity, noise, solver).double(), expected.double(), rtol=1e-5, atol=1e-5)


def test_velocities_are_let_go():
    """No more of them are alive than later updates read."""
    alive, most = [], []

    def velocity(x, t):
        most.append(sum(v() is not None for v in alive))
        v = x.sin()
        alive.append(weakref.ref(v))
        return v

    fk.sample(velocity, normal(2, 3), Solver.adams_bashforth(8, 2))
    assert max(most) <= 2
    assert len(most) == 8


def test_no_gradients():
    field = linear_field()
    noise = normal(3, 4).requires_grad_()
    for name in SOLVERS:
        assert not fk.sample(field, noise, SOLVERS[name]).requires_grad
    assert field.matrix.grad is None


# ---- captured ----


KINDS = ["elementwise", "embedded", "guided", "guided bfloat16", "float64", "a view of the state", "its own memory"]


@pytest.mark.parametrize(
    ("kind", "mode"),
    [*((kind, "graph") for kind in KINDS), *((kind, "compile") for kind in ("guided", "its own memory"))],
)
def test_captured(kind, mode, aot_eager, host_cuda):  # noqa: F811
    make, noise, close = VELOCITIES[kind]
    velocity = make()
    for solver in (Solver.adams_bashforth(uneven_grid(3)), dense(3), free(3)):
        for x in (noise, 2 * noise):
            got = fk.sample(velocity, x, solver, capture=mode)
            torch.testing.assert_close(got.double(), definition(velocity, x, solver), **close)


def test_compiled_with_a_backend(aot_eager):  # noqa: F811
    make, noise, close = VELOCITIES["guided"]
    velocity = make()
    with fk.backend("cpu"):
        got = fk.sample(velocity, noise, SOLVERS["ab3"], capture="compile")
    torch.testing.assert_close(got.double(), definition(velocity, noise, SOLVERS["ab3"]), **close)
    assert torch.equal(
        fk.sample(velocity, noise, SOLVERS["ab3"], capture="auto"), fk.sample(velocity, noise, SOLVERS["ab3"])
    )


@pytest.mark.parametrize("mode", ["compile", "graph"])
def test_a_recorded_loop_is_of_the_whole_solver(mode, aot_eager, host_cuda):  # noqa: F811
    """Not of its knots alone: others of the same times and of the same coefficients are others."""
    net, noise, times = linear_field(), normal(3, 4), uneven_grid(3)
    clocked = VelocityField(lambda x, t: net(x, t) * (1 + t[:, None]))
    b = Solver.euler(times).coefficients
    solvers = [times, Solver.adams_bashforth(times, 2), Solver.adams_bashforth(times, 3), dense(3)]
    solvers += [replace(dense(3), start_coefficients=a) for a in ([1, 1, 0.5], [1, 0.5, 1])]
    solvers += [Solver(times, times[1:], b), Solver(times, times[1:] - 0.01, b), Solver(times, times[:-1], 1.1 * b)]
    results = [fk.sample(clocked, noise, s, capture=mode) for s in solvers]
    assert len(capture.LOOPS.loops) == len(solvers)
    for got, solver in zip(results, solvers, strict=True):
        assert torch.allclose(got, fk.sample(clocked, noise, solver), rtol=1e-5, atol=1e-6)
        assert torch.equal(fk.sample(clocked, noise, Solver.of(solver), capture=mode), got)
    assert len(capture.LOOPS.loops) == len(solvers)
    assert not any(torch.allclose(a, b, rtol=1e-4) for a, b in itertools.combinations(results, 2))


# ---- inside torch.compile ----


def test_inside_torch_compile():
    """Unrolled: another solver of the same form is the same graph, with dynamic sizes."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(fk.sample, fullgraph=True, dynamic=True, backend=backend)
    for kind, solvers in {
        "guided": [SOLVERS["ab2"], Solver.adams_bashforth(5, 2), dense(3)],
        "float64": [dense(3), dense(3, seed=1), Solver.euler(3), free(3), free(3, seed=1)],
    }.items():
        make, noise, close = VELOCITIES[kind]
        velocity = make()
        for solver in solvers:
            got = compiled(velocity, noise, solver)
            torch.testing.assert_close(got.double(), definition(velocity, noise, solver), **close)
    assert len(graphs) == 5


def test_inside_torch_compile_with_constants():
    torch._dynamo.reset()
    compiled = torch.compile(fk.sample, fullgraph=True, dynamic=False, backend="eager")
    make, noise, close = VELOCITIES["elementwise"]
    velocity = make()
    for solver in (Solver.adams_bashforth(3, 2), Solver.adams_bashforth(uneven_grid(3), 2), SOLVERS["other times"]):
        got = compiled(velocity, noise, solver)
        torch.testing.assert_close(got.double(), definition(velocity, noise, solver), **close)


# ---- fused heads ----


@pytest.fixture
def steps(monkeypatch):
    return Counting(monkeypatch).calls


@EACH
@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_fused_heads(kind, name, steps):
    field, noise = field_of(kind, 3, guidance=3.0)
    got = fk.sample(fk.fuse_head(field), noise, SOLVERS[name])
    assert len(steps) == PROOF + SOLVERS[name].evaluations
    expected = fk.sample(field, noise, SOLVERS[name])
    assert (got - expected).norm() <= 4e-6 * expected.norm()
    terms = [1 + len(s.get("history", ())) for s in steps[PROOF:]]
    assert terms == [len({i, *which}) for i, (_, which, *_) in enumerate(SOLVERS[name].updates())]


@EACH
@pytest.mark.parametrize("sign", [1, -1])
def test_fused_linear_heads(name, sign):
    net, noise = scrambled(Perceptron()), normal(7, 3, 4)
    field = VelocityField(net, sign=sign, reverse_time=sign == -1)
    expected = definition(field, noise, SOLVERS[name])
    got = fk.sample(fk.fuse_head(field), noise, SOLVERS[name])
    assert (got - expected).norm() <= 4e-6 * expected.norm()


def test_velocities_of_a_fused_head_are_handed_on():
    """In the library's sign, whatever the network's, and with those that are kept for later as they were."""
    net, noise = scrambled(Perceptron()), normal(7, 3, 4)
    field = VelocityField(net, sign=-1)
    with torch.no_grad():
        flows = [loop.steps(v, noise, SOLVERS["ab2"], keep=True) for v in (fk.fuse_head(field), field)]
        for (x, v), (expected_x, expected_v) in zip(*flows, strict=True):
            torch.testing.assert_close(x, expected_x, **CLOSE)
            torch.testing.assert_close(v, expected_v, **CLOSE)


def test_a_fused_head_without_a_trunk():
    """What its Linear reads is the state that the step writes."""

    class Field(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(12, 12)

        def forward(self, x, t):
            return self.net(x)

    for dtype, tolerance in ((None, 2e-6), (BF16, 0.02)):
        field, noise = VelocityField(Field().to(dtype or torch.float32), dtype=dtype), normal(5, 12)
        for solver in SOLVERS.values():
            expected = definition(field, noise, solver)
            got = fk.sample(fk.fuse_head(field), noise, solver)
            assert (got - expected).norm() <= tolerance * expected.norm()


# ---- a free coefficient of the first state, in every way ----


def by_scheduler(velocity, noise, solver):
    from diffusers import FlowMatchEulerDiscreteScheduler

    from flowkernels.integrations.diffusers import solver_scheduler

    scheduler, x = solver_scheduler(solver, like=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1)), noise
    for t in scheduler.timesteps:
        x = scheduler.step(-velocity(x, (1 - t).expand(len(x))), t, x).prev_sample
    return x


def in_graph(velocity, noise, solver):
    torch._dynamo.reset()
    return torch.compile(fk.sample, fullgraph=True, backend="eager")(velocity, noise, solver)


WAYS = {
    "sample": fk.sample,
    "rollout": lambda *given: fk.rollout(*given).x[-1],
    "graph": lambda *given: fk.sample(*given, capture="graph"),
    "compile": lambda *given: fk.sample(*given, capture="compile"),
    "in a compiled function": in_graph,
    "fused head": lambda velocity, *given: fk.sample(fk.fuse_head(velocity), *given),
    "rollout of a fused head": lambda velocity, *given: fk.rollout(fk.fuse_head(velocity), *given).x[-1],
    "teacher": lambda velocity, noise, solver: Teacher(velocity, len(noise)).run(solver, noise)[1],
    "scheduler": by_scheduler,
    "export": lambda velocity, noise, solver: definition(velocity, noise, Tables(**fk.export(solver, "numpy"))),
    "invert": lambda *given: fk.invert(*given, round_trip=False).noise,
    "invert by a fused head": lambda velocity, *given: (
        fk.invert(fk.fuse_head(velocity), *given, round_trip=False).noise
    ),
}


class Tables(SimpleNamespace):
    """Of an export, in torch."""

    def __init__(self, **tables):
        super().__init__(**{name: torch.from_numpy(t) for name, t in tables.items()})


STARTS = [(0.9, 1.3, -0.2, 0.6, 0.8), (1, 1, 1, 1, 0.7), (0.5, 0.5, 0.5, 0.5, 0)]


@pytest.mark.parametrize(("way", "name", "starts"), pairs(WAYS, ["dense", "ab2"], STARTS), ids=str)
def test_a_free_start_in_every_way(way, name, starts, aot_eager, host_cuda):  # noqa: F811
    net, noise, solver = scrambled(Perceptron()), normal(7, 3, 4), replace(SOLVERS[name], start_coefficients=starts)
    if "invert" in way:
        solver = replace(solver, times=solver.times.flip(0), model_times=1 - solver.model_times)
    field = VelocityField(net, reverse_time=True, sign=-1)
    expected = definition(field, noise, solver)
    got = WAYS[way](field, noise, solver)
    torch.testing.assert_close(got.double(), expected, **CLOSE)


# ---- errors ----


class Late(nn.Module):
    """NaN for one sample from one evaluation on."""

    def __init__(self, sample, evaluation):
        super().__init__()
        self.sample, self.evaluation, self.calls = sample, evaluation, 0

    def forward(self, x, t):
        v = torch.zeros_like(x)
        if self.calls % 5 >= self.evaluation:
            v[self.sample, 1] = math.nan
        self.calls += 1
        return v


@pytest.mark.parametrize("name", ["ab2", "dense", "other times"])
def test_what_is_not_finite_names_sample_and_step(name):
    for sample, step in ((0, 0), (2, 3), (1, 4)):
        t = SOLVERS[name].model_times[step]
        message = rf"^velocity: .*NaN or Inf in sample {sample} at step {step} \(t = {t:.6g}\)"
        with pytest.raises(ValueError, match=message):
            fk.sample(Late(sample, step), normal(3, 4), SOLVERS[name])


def test_of_two_stages_the_evaluation_is_named():
    solver = Solver.heun(3)
    with pytest.raises(ValueError, match=r"in sample 1 at evaluation 3 \(t = 0.666667\)"):
        fk.sample(Late(1, 3), normal(3, 4), solver)


def test_not_finite_with_a_fused_head():
    t = SOLVERS["ab2"].model_times[3].item()
    with pytest.raises(ValueError, match=r"NaN or Inf in sample 2 at step 3 \(t = "):
        fk.sample(fk.fuse_head(HeadLate(t - 1e-3).eval()), normal(4, 12), SOLVERS["ab2"])


def test_a_state_that_overflows():
    with pytest.raises(ValueError, match=r"^velocity: .*sample 0.*(overflow|at step)"):
        fk.sample(lambda x, t: 1e20 * x.abs() + 1e30, normal(3, 4), SOLVERS["ab2"])


def test_what_takes_no_solver():
    velocity, noise = Counted(ElementwiseField()), normal(3, 4)
    with pytest.raises(ValueError, match=r"^schedule: expected a solver from noise to data \(fk.invert runs it\), got"):
        fk.sample(velocity, noise, Solver.heun(3, inverse=True))
    with pytest.raises(ValueError, match=r"^grid: expected a solver from noise to data, got"):
        fk.rollout(velocity, noise, Solver.heun(3, inverse=True))
    with pytest.raises(TypeError, match=r"^schedule: expected a Schedule.*target='solver'\), got Solver"):
        fk.straighten(None, velocity, SOLVERS["ab2"], noise=noise, iterations=1)
    assert velocity.calls == 0
    with pytest.raises(ValueError, match=r"^velocity: expected x's shape .* at t = 0.1, got"):
        fk.sample(lambda x, t: x[:, :1], noise, SOLVERS["other times"])


def test_training_mode_warns_at_the_caller():
    net = nn.Sequential(nn.Dropout(0.5)).train()
    with pytest.warns(UserWarning, match="eval mode") as seen:
        fk.sample(lambda_of(net), normal(3, 4), SOLVERS["ab2"])
    assert seen[0].filename == __file__


def lambda_of(net):
    class Field(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, t):
            return self.net(x)

    return Field().train()
