"""Constant acceleration flow: its loss, its steps, and what one of them reaches."""

import copy
import functools
import math

import pytest
import torch
from _flows import RowField, normal
from torch import nn

import flowkernels as fk
from flowkernels.models.closed_form import GaussianMixtureVelocity

QUIET = dict(progress=False)


class First(nn.Module):
    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.tensor(0.7))

    def forward(self, x, t):
        return self.p * x + t.to(x.dtype)[:, None]


class Second(nn.Module):
    """Of x and v0, joined or by name."""

    def __init__(self):
        super().__init__()
        self.p, self.q, self.r = (nn.Parameter(torch.tensor(value)) for value in (-0.4, 1.1, 0.3))

    def forward(self, x, t, start=None):
        x, v0 = x.chunk(2, 1) if start is None else (x, start)
        return self.p * x + self.q * v0 + self.r * t.to(x.dtype)[:, None]


@pytest.mark.parametrize("v0_name", [None, "start"])
@pytest.mark.parametrize("times", [[0, 0.3, 1], [0.2, 1]], ids=["from 0", "from 0.2"])
@pytest.mark.parametrize("t_sampling", [None, "start"])
def test_the_loss_in_float64(t_sampling, times, v0_name):
    """On x_t = (1 - s^2) x0 + s^2 x1 + v0 (s - s^2), s the part of the interval, as the paper has it; v0 and a of that
    time are T and T^2 times those of the schedule's."""
    states, sample, h = normal(2, 9, 3), torch.tensor([8, 0, 3, 3, 1, 7]), 1.3
    student = fk.Acceleration(First(), Second(), v0_name=v0_name)
    settings = dict(t_sampling=t_sampling, initial_speed=h)
    objective = fk.StraightenLoss(fk.Schedule(times), target="acceleration", **settings)
    batch = fk.BankBatch(states, torch.zeros(6, dtype=torch.int64), sample)
    found = objective(student, batch, torch.Generator().manual_seed(3))
    found.loss.backward()
    first, second, total = copy.deepcopy(student.velocity).double(), copy.deepcopy(student.acceleration).double(), 0
    first.zero_grad(), second.zero_grad()
    u = torch.zeros(6) if t_sampling else torch.rand(6, generator=torch.Generator().manual_seed(3))
    start, T = times[0], 1 - times[0]
    for i, j in enumerate(sample.tolist()):
        x0, x1, s = states[0, j].double()[None], states[1, j].double()[None], u[i].double()
        v0 = first(x0, torch.tensor([start], dtype=torch.float64))
        fixed = v0.detach() * T
        x = (1 - s**2) * x0 + s**2 * x1 + fixed * (s - s**2)
        a = second(*((torch.cat([x, fixed / T], 1),) if v0_name is None else (x,)), (start + s * T)[None],
                   **({} if v0_name is None else {v0_name: fixed / T}))  # fmt: skip
        errors = torch.cat([v0 - h * (x1 - x0) / T, a - 2 * (x1 - x0 - fixed) / T**2])
        assert found.per_sample[i].item() == pytest.approx(errors.square().mean().item(), rel=1e-4)
        total = total + errors.square().mean() / 6
    total.backward()
    assert found.loss.item() == pytest.approx(total.item(), rel=1e-5)
    for p, q in zip(student.parameters(), [*first.parameters(), *second.parameters()], strict=True):
        assert p.grad.item() == pytest.approx(q.grad.item(), rel=1e-3, abs=1e-6)


class Known(nn.Module):
    """Of pairs (x, 3 x - 1), T apart: the initial velocity h (x1 - x0) / T."""

    def __init__(self, h, T):
        super().__init__()
        self.h, self.T = h, T

    def forward(self, x, t):
        return self.h * (2 * x - 1) / self.T


class Constant(nn.Module):
    """2 (x1 - x0 - v0 T) / T^2, from v0."""

    def __init__(self, h, T):
        super().__init__()
        self.h, self.T = h, T

    def forward(self, x, t, v0):
        return (2 / self.h - 2) * v0 / self.T


@pytest.mark.parametrize("h", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("plan", [1, 3, [0, 0.2, 0.25, 1], [0.2, 0.3, 1]], ids=str)
def test_the_steps_are_the_paths_own(plan, h):
    """Any number of them ends at the data, and each state is on the path."""
    begin = 0 if isinstance(plan, int) else plan[0]
    student = fk.Acceleration(Known(h, 1 - begin), Constant(h, 1 - begin), v0_name="v0")
    noise = normal(5, 2).double()
    states, x1 = fk.rollout(student, noise, plan), 3 * noise - 1
    for s, x in zip((states.times - begin) / (1 - begin), states.x, strict=True):
        path = (1 - s**2) * noise + s**2 * x1 + h * (x1 - noise) * (s - s**2)
        torch.testing.assert_close(x, path, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(fk.sample(student, noise, plan), x1, rtol=1e-12, atol=1e-12)


def test_an_answer_that_is_the_state_is_copied():
    """The state is stepped in place."""

    class Same(nn.Module):
        def forward(self, x, t):
            return x

    noise = normal(4, 2)
    found = fk.sample(fk.Acceleration(Same(), Second()), noise, 2)
    expected = fk.sample(fk.Acceleration(Copied(), Second()), noise, 2)
    assert torch.equal(found, expected)


class Copied(nn.Module):
    def forward(self, x, t):
        return x.clone()


def test_conditioning_is_that_of_each_sample():
    rows, noise = normal(9, 3, seed=4), normal(9, 3)

    class Both(RowField):
        def forward(self, x, t, rows):
            x, v0 = x.chunk(2, 1)
            return super().forward(x, t, rows) + v0

    def student(rows):
        nets = (fk.VelocityField(net, conditioning={"rows": rows}) for net in (RowField(), Both()))
        return fk.Acceleration(*nets)

    grid = torch.linspace(0, 1, 4, dtype=torch.float64)
    bank = fk.TrajectoryBank(student(rows), fk.Schedule(grid), noise=noise, grid=grid, chunk=4, progress=False)
    found = bank.fill().states()
    for i in range(9):
        expected = fk.rollout(student(rows[i : i + 1]), noise[i : i + 1], grid).x
        torch.testing.assert_close(found[:, i : i + 1], expected, rtol=0, atol=1e-6)


def turned(x, t):
    """By a half: all lines from noise to data cross at the middle."""
    return math.pi * torch.stack([-x[:, 1], x[:, 0]], 1)


def network(inputs):
    return fk.VelocityField(nn.Sequential(nn.Linear(inputs + 1, 32), nn.SiLU(), nn.Linear(32, 2)), time_column=True)


def test_crossing_pairs_are_learned():
    """On noise it has not seen, with one step and with more; a rectified flow does not know at the middle where to."""
    torch.manual_seed(0)
    noise, settings = normal(256, 2, seed=99), dict(noise=normal(512, 2), batch=128, warmup=10, ema=0.97, grid=50)
    straight = functools.partial(fk.straighten, velocity=turned, schedule=fk.Schedule([0, 1]), **settings, **QUIET)
    paths = fk.Acceleration(Affine(2), Affine(4))
    paths = straight(paths, target="acceleration", lr=0.03, iterations=250).student
    lines = straight(network(2), target="reflow", lr=0.01, iterations=250).student
    x1 = fk.rollout(turned, noise, 50).x[-1]

    def error(net, N):
        return ((fk.sample(net, noise, N) - x1).square().mean() / x1.square().mean()).item()

    assert max(error(paths, N) for N in (1, 2, 4)) < 1e-3
    assert min(error(lines, N) for N in (2, 4)) > 0.1


class Affine(nn.Module):
    def __init__(self, inputs):
        super().__init__()
        self.map = nn.Linear(inputs, 2)

    def forward(self, x, t):
        return self.map(x)


def test_what_is_refused():
    teacher = GaussianMixtureVelocity(normal(2, 2), 0.3)
    settings = dict(noise=(2,), iterations=1, batch=4, bank=4, grid=4, target="acceleration", **QUIET)
    with pytest.raises(TypeError, match=r"^student: expected one with an acceleration head, fk.Acceleration"):
        fk.straighten(network(2), teacher, fk.Schedule([0, 1]), **settings)
    student, noise = fk.Acceleration(First(), Second()), normal(4, 2)
    with pytest.raises(ValueError, match=r"^schedule: expected a schedule, for an Acceleration"):
        fk.sample(student, noise, fk.Solver.heun(2))
    with pytest.raises(ValueError, match=r"^schedule: expected a schedule, for an Acceleration"):
        fk.invert(student, noise, 2)
    with pytest.raises(ValueError, match=r"^velocity: expected one that is known at a state and a time"):
        fk.sample(student, noise, 2, capture="compile")
    with pytest.raises(ValueError, match=r"^acceleration: expected an answer of x's shape \[4, 2\]"):
        fk.sample(fk.Acceleration(First(), First()), noise, 2)
    with pytest.raises(ValueError, match=r"^acceleration: expected weights of its own"):
        fk.Acceleration(net := First(), net)
    with pytest.raises(ValueError, match=r"^v0_name: expected None for an acceleration that is a VelocityField"):
        fk.Acceleration(First(), fk.VelocityField(Second()), v0_name="start")
