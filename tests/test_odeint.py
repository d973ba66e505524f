"""`integrations.torchdiffeq.odeint` beside torchdiffeq's own: signature, shapes, times, dtypes, gradients, refusals."""

import pytest
import torch
import torchdiffeq
from _flows import ElementwiseField, normal, uneven_grid
from torch import nn

import flowkernels as fk
from flowkernels import Schedule, Solver
from flowkernels.integrations.torchdiffeq import odeint

F64 = torch.float64


class Net(nn.Module):
    """As callers of odeint have them: (t, x), and t of no dimensions."""

    def __init__(self, dtype=F64):
        super().__init__()
        self.gain, self.seen = nn.Parameter(torch.tensor(0.7, dtype=dtype)), []

    def forward(self, t, x):
        self.seen.append((t.shape, t.dtype, x.dtype))
        return torch.tanh(self.gain * x) + t**2


@pytest.mark.parametrize("method", ["euler", "midpoint"])
@pytest.mark.parametrize("falls", [False, True], ids=["rising", "falling"])
@pytest.mark.parametrize("shape", [(), (3,), (4, 3), (2, 3, 2)], ids=len)
def test_fixed_steps_on_the_callers_times(method, falls, shape):
    """What torchdiffeq makes of the same times, every state, and its gradients."""
    make = getattr(Solver, method)
    y0, t = normal(*shape, dtype=F64) if shape else torch.tensor(0.3, dtype=F64), 0.2 + 0.5 * uneven_grid(5)
    y0, t = y0.requires_grad_(), t.flip(0) if falls else t
    found = []
    for solve in (odeint(make), torchdiffeq.odeint):
        net = Net()
        states = solve(net, y0, t, method=method, rtol=1e-3, atol=1e-3, options=None)
        assert states.shape == (6, *shape)
        found.append((states, *torch.autograd.grad(states.square().sum(), (y0, net.gain)), net.seen))
    (*got, seen), (*expected, theirs) = found
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert seen == theirs
    with torch.no_grad():
        off = odeint(make)(net, y0, t)
    assert torch.equal(off, got[0].detach())
    assert not off.requires_grad


def test_a_plan_of_its_own_times():
    """Its steps whatever lies between the ends; states between its knots are linear between them."""
    field, noise = ElementwiseField(), normal(4, 3, dtype=F64)
    plan = Schedule([0.0, 0.3, 0.7, 1.0])
    at = torch.tensor([0.0, 0.15, 0.3, 0.5, 0.99, 1.0], dtype=F64)
    knots = fk.rollout(field, noise, plan).x
    calls = []

    def func(t, x):
        calls.append(t.item())
        return field(x, t.expand(len(x)))

    for form in (plan, [0.0, 0.3, 0.7, 1.0], Solver.euler(plan)):
        calls.clear()
        got = odeint(form)(func, noise, at, method="dopri5", options={"step_size": 0.01})
        assert calls == [0.0, 0.3, 0.7]
        x0, x1, x2, x3 = knots
        expected = torch.stack([x0, (x0 + x1) / 2, x1, (x1 + x2) / 2, x2 + (x3 - x2) * 29 / 30, x3])
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    back = odeint(plan)(func, noise, at.flip(0)[[0, -1]])
    assert torch.equal(back[-1], fk.invert(field, noise, plan).noise)
    assert torch.equal(back[0], noise)
    solver = Solver.adams_bashforth(4, 3)
    got = odeint(solver)(func, noise, torch.linspace(0, 1, 16))
    torch.testing.assert_close(got[-1], fk.sample(field, noise, solver), rtol=1e-12, atol=1e-12)
    assert got.shape == (16, 4, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("of_t", [torch.float32, F64, torch.float16])
def test_dtypes(dtype, of_t):
    """y as y0, whatever the dtype of t; the state between is float32."""
    net = Net(torch.float32)
    y0 = normal(4, 3).to(dtype)
    states = odeint(8)(net, y0, torch.tensor([0, 0.5, 1], dtype=of_t))
    assert states.dtype == dtype
    assert {seen[2] for seen in net.seen} == {dtype}
    assert {seen[0] for seen in net.seen} == {torch.Size([])}
    wide = fk.sample(lambda x, t: net(t[0], x), y0.float(), 8)
    assert (states[-1].float() - wide).norm() <= 4 * torch.finfo(dtype).eps * wide.norm()


@pytest.mark.parametrize("tolerance", [1e-4, 1e-6])
def test_beside_dopri5(tolerance):
    """A solver of many steps ends where torchdiffeq's adaptive method does, within its tolerance."""
    net, noise, t = Net(), normal(6, 3, dtype=F64), torch.tensor([0.0, 1.0], dtype=F64)
    with torch.no_grad():
        exact = torchdiffeq.odeint(net, noise, t, method="dopri5", rtol=tolerance, atol=tolerance)[-1]
        ours = odeint(Solver.midpoint(200))(net, noise, t)[-1]
        fine = odeint(Solver.midpoint(800))(net, noise, t)[-1]
    assert (ours - fine).abs().max() < 1e-5
    assert (fine - exact).abs().max() < 10 * tolerance


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_func_that_writes_to_its_state(mode):
    """As clamps in place do: into the state, as torchdiffeq has it, or refused."""
    y0, t = 3 * normal(4, 3, dtype=F64), torch.linspace(0, 1, 5, dtype=F64)

    def func(t, y):
        return torch.cos(y.clamp_(-1, 1)) + t

    with mode():
        expected = torchdiffeq.odeint(func, y0.clone(), t, method="euler")[1:]
        torch.testing.assert_close(odeint(4)(func, y0.clone(), t)[1:], expected, rtol=1e-12, atol=1e-12)
        for plan, y in ((Solver.midpoint(4), y0), (4, y0.bfloat16())):
            with pytest.raises(ValueError, match=r"^func: expected one that leaves y as it is, .*got one that wrote"):
                odeint(plan)(func, y.clone(), t)


def test_refusals():
    net, y0, t = Net(), normal(2, 3, dtype=F64), torch.tensor([0.0, 0.5, 1.0])
    cases = {
        "y0: expected a torch.Tensor, got tuple": lambda: odeint(2)(net, (y0, y0), t),
        "y0: expected torch.float32 or": lambda: odeint(2)(net, y0 * 1j, t),
        "event_fn: expected None": lambda: odeint(2)(net, y0, t, event_fn=lambda t, y: y),
        "t: expected times that only rise, or only fall": lambda: odeint(2)(net, y0, torch.tensor([0.0, 0.5, 0.5])),
        "t: expected at least two times": lambda: odeint(2)(net, y0, torch.tensor([0.0])),
        "t: expected a torch.Tensor": lambda: odeint(2)(net, y0, [0.0, 1.0]),
        "t: expected times from 0 to 1, those of Solver": lambda: odeint(2)(net, y0, torch.tensor([0.1, 1.0])),
        "t: expected times from 0 to 1, those of": lambda: odeint(Solver.heun(2))(net, y0, torch.tensor([1.0, 0.0])),
        "schedule: expected times from 0": lambda: odeint(Solver.midpoint)(net, y0, torch.tensor([0.0, 2.0])),
        "plan: expected what makes a Solver": lambda: odeint(lambda times: 3)(net, y0, t),
        "plan: expected strictly increasing": lambda: odeint([0, 0.5, 0.5, 1]),
        "func: expected a callable": lambda: odeint(2)(3, y0, t),
        r"func: expected a callable func\(t, y\), got .*too many": lambda: odeint(2)(lambda y: -y, y0, t),
    }
    for message, call in cases.items():
        with pytest.raises((TypeError, ValueError), match=f"^{message}"):
            call()
    assert not net.seen
    with pytest.raises(ValueError, match=r"^func: expected y0's shape \[2, 3\], got"):
        odeint(2)(lambda t, y: y[0], y0, t)
