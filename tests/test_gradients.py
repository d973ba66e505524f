"""Gradients through `sample(differentiable=True)`: those of a loop written in torch, in its memory, or a clear word."""

import itertools

import pytest
import torch
from _flows import ElementwiseField, LinearField, normal
from _transformers import field_of
from test_solver_sampling import SOLVERS, guided
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import flowkernels as fk
from flowkernels import Solver
from flowkernels.models.bundled import BUNDLED

F64 = torch.float64
PLANS = {"euler": Solver.of([0.0, 0.3, 1.0]), "partial": Solver.midpoint([0.2, 0.5]), **SOLVERS}


class Curved(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([0.7, -0.4, 1.1], dtype=F64))

    def forward(self, x, t, shift=None):
        return torch.tanh(self.gain * x) + t[:, None] ** 2 + (0 if shift is None else shift)


def by_hand(velocity, noise, plan):
    """The formula with torch's operations, every state from the first one."""
    solver = Solver.of(plan)
    start = x = noise
    seen = []
    rows = solver.model_times.tolist(), solver.start_coefficients.tolist(), solver.coefficients.tolist()
    for t, a, row in zip(*rows, strict=True):
        seen.append(velocity(x, torch.full((len(x),), t, dtype=x.dtype)))
        x = a * start + sum(b * v for b, v in zip(row, seen, strict=False) if b)
    return x


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", PLANS)
def test_of_noise_parameters_and_conditioning(name, backend):
    net, shift = Curved(), normal(2, 3, seed=1, dtype=F64).requires_grad_()
    noise = normal(2, 3, dtype=F64).requires_grad_()

    def sampled(x, gain, shift):
        field = fk.VelocityField(lambda x, t, s: torch.func.functional_call(net, {"gain": gain}, (x, t, s)),
                                 conditioning={"s": shift})  # fmt: skip
        return fk.sample(field, x, PLANS[name], differentiable=True)

    with fk.backend(backend):
        assert gradcheck(sampled, (noise, net.gain, shift))
        assert gradgradcheck(sampled, (noise, net.gain, shift))
        got = torch.autograd.grad(sampled(noise, net.gain, shift).square().sum(), (noise, net.gain, shift))
    expected = by_hand(lambda x, t: net(x, t, shift), noise, PLANS[name])
    expected = torch.autograd.grad(expected.square().sum(), (noise, net.gain, shift))
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", PLANS)
def test_guided(name, packed):
    field, noise = guided(packed).double(), normal(5, 9, dtype=F64).requires_grad_()
    wanted = [noise, *field.parameters()]
    made = (fk.sample(field, noise, PLANS[name], differentiable=True), by_hand(field, noise, PLANS[name]))
    got, expected = (torch.autograd.grad(x.square().sum(), wanted) for x in made)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "autocast"])
def test_networks_with_a_time_embedding(dtype):
    net, noise = BUNDLED["digits"].load(), normal(2, 1, 8, 8)
    for plan in (3, Solver.adams_bashforth(3)):
        found = []
        for sampler in (lambda x, p: fk.sample(net, x, p, differentiable=True), lambda x, p: by_hand(net, x, p)):
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                loss = sampler(noise, plan).square().mean()
            found.append(torch.autograd.grad(loss, list(net.parameters())))
        for got, expected in zip(*found, strict=True):
            rounding = 1e-5 if dtype is None else 2e-2
            assert (got - expected).norm() <= rounding * expected.norm() + 1e-8


def saved_bytes(call):
    """What autograd keeps, each memory once."""
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t, t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = call()
    parameters = {p.untyped_storage().data_ptr() for p in NET.parameters()}
    return sum(size for at, (_, size) in kept.items() if at not in parameters), result


NET = BUNDLED["digits"].load()


def test_memory_is_a_plain_loops():
    noise, times = normal(4, 1, 8, 8), torch.linspace(0, 1, 7, dtype=F64)

    def loop():
        x = noise
        for begin, end in itertools.pairwise(times.tolist()):
            x = x + (end - begin) * NET(x, torch.full((4,), begin))
        return x

    plain, x = saved_bytes(loop)
    ours, y = saved_bytes(lambda: fk.sample(NET, noise, times, differentiable=True))
    less, z = saved_bytes(
        lambda: fk.sample(lambda x, t: checkpoint(NET, x, t, use_reentrant=False), noise, times, differentiable=True)
    )
    assert ours <= 1.01 * plain
    assert less < plain / 20
    grads = [torch.autograd.grad(state.square().sum(), list(NET.parameters())) for state in (x, y, z)]
    for a, b, c in zip(*grads, strict=True):
        for other in (b, c):
            assert (other - a).norm() <= 1e-5 * a.norm() + 1e-8


def test_where_there_are_none():
    """Without the argument, and where the caller has gradients off; the samples are the same."""
    net, noise = Curved(), normal(2, 3, dtype=F64).requires_grad_()
    plain = fk.sample(net, noise, 3)
    assert not plain.requires_grad
    with torch.no_grad():
        off = fk.sample(net, noise, 3, differentiable=True)
    with torch.inference_mode():
        inferred = fk.sample(net, noise, 3, differentiable=True)
    on = fk.sample(net, noise, 3, differentiable=True, capture="auto", progress=True)
    assert on.requires_grad
    assert not off.requires_grad
    for x in (off, inferred, on.detach()):
        assert torch.equal(x, plain)
    assert fk.sample(net, noise.detach(), 3, differentiable=True).requires_grad  # of its parameters


def test_noise_is_left_as_it_is():
    net = Curved()
    for noise in (normal(2, 3, dtype=F64).requires_grad_(), normal(2, 3).requires_grad_()):
        kept = noise.detach().clone()
        fk.sample(lambda x, t: net(x.double(), t.double()).to(x.dtype), noise, 2, differentiable=True).sum().backward()
        assert torch.equal(noise.detach(), kept)
        assert noise.grad.shape == noise.shape


def test_refusals():
    net, noise = LinearField(torch.eye(3)), normal(4, 3)
    field, image = field_of("sd3", 2)
    head = fk.fuse_head(field)
    mlp = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 3))
    fused = fk.fuse(fk.VelocityField(mlp, time_column=True), 2)
    own = fk.Acceleration(ElementwiseField(), nn.Linear(6, 3))
    for velocity in (fused, own, head):
        with pytest.raises(
            ValueError, match=r"^velocity: expected one that gradients go through \(differentiable=True"
        ):
            fk.sample(velocity, image if velocity is head else noise, 2, differentiable=True)
    for capture in ("graph", "compile"):
        with pytest.raises(ValueError, match=r"^capture: expected None with differentiable=True, got"):
            fk.sample(net, noise, 2, capture=capture, differentiable=True)
    for given in (1, "yes", None):
        with pytest.raises(TypeError, match=r"^differentiable: expected True or False, got"):
            fk.sample(net, noise, 2, differentiable=given)
    with pytest.raises(ValueError, match=r"^differentiable: expected False for a schedule for each sample"):
        fk.sample(net, noise, fk.SampleSchedules([[0, 0.5, 1]] * 4), differentiable=True)
    compiled = torch.compile(lambda x: fk.sample(net, x, 2, differentiable=True), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"differentiable: expected False inside torch.compile"):
        compiled(noise)


def test_what_is_not_finite_is_named():
    gain = torch.ones(3, requires_grad=True)

    def spoiled(x, t):
        return torch.where((t[:, None] >= 0.5) & (torch.arange(len(x))[:, None] == 1), torch.nan, gain * x)

    for plan in (4, Solver.adams_bashforth(4)):
        with pytest.raises(ValueError, match=r"^velocity: .*NaN or Inf in sample 1 at step 2 \(t = 0.5\)"):
            fk.sample(spoiled, normal(4, 3), plan, differentiable=True)


def test_transforms_of_torch_func():
    net, noise, tangent = Curved(), normal(2, 3, dtype=F64), normal(2, 3, seed=2, dtype=F64)

    def sampled(x):
        return fk.sample(net, x, Solver.adams_bashforth(3), check=False, differentiable=True)

    _, pushed = torch.func.jvp(sampled, (noise,), (tangent,))
    whole = torch.autograd.functional.jacobian(lambda x: by_hand(net, x, Solver.adams_bashforth(3)), noise)
    torch.testing.assert_close(pushed, torch.einsum("abcd,cd->ab", whole, tangent), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(torch.func.jacrev(sampled)(noise), whole, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("differentiable", [False, True])
@pytest.mark.parametrize("plan", [3, Solver.adams_bashforth(3), Solver.heun(3)], ids=["euler", "multistep", "heun"])
def test_inside_vmap(plan, differentiable):
    """Over samples, over parameters, and back; where values cannot be looked at, NaN shows."""
    net, noise = Curved(), normal(4, 3, dtype=F64)
    run = dict(differentiable=differentiable)
    expected = fk.sample(net, noise, plan)
    each = torch.vmap(lambda x: fk.sample(net, x[None], plan, **run)[0])
    torch.testing.assert_close(each(noise), expected, rtol=1e-12, atol=1e-13)
    many = {name: torch.stack([value, 2 * value]).detach() for name, value in net.named_parameters()}

    def of(parameters):
        return fk.sample(lambda x, t: torch.func.functional_call(net, parameters, (x, t)), noise, plan, **run)

    torch.testing.assert_close(torch.vmap(of)(many)[0], expected, rtol=1e-12, atol=1e-13)
    back = torch.vmap(lambda x: fk.invert(net, x[None], 3, round_trip=False).noise[0])(noise)
    torch.testing.assert_close(back, fk.invert(net, noise, 3).noise, rtol=1e-12, atol=1e-13)
    noise[1] = torch.nan
    assert each(noise).isnan().any(1).tolist() == [False, True, False, False]
