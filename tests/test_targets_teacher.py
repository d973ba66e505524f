"""Targets that evaluate the teacher, or follow it from one state to the next: their losses in float64, as the papers
have them, and flows that they learn."""

import itertools
import math

import pytest
import torch
from _flows import LinearField, normal
from torch import nn

import flowkernels as fk
from flowkernels.models.closed_form import GaussianMixtureVelocity

KNOTS = [0.0, 0.25, 0.75, 1.0]  # which are numbers in float32, the dtype of times
QUIET = dict(progress=False)


class Student(nn.Module):
    """A small curved field, with a row of conditioning where one is given."""

    def __init__(self, features=3, width=8, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.last = nn.Linear(features + 1, width), nn.Linear(width, features)

    def forward(self, x, t, rows=0.0):
        return self.last(torch.tanh(self.first(torch.cat([x + rows, t[:, None].to(x)], 1))))


class Seen:
    """A velocity that keeps what it was asked."""

    def __init__(self, velocity):
        self.velocity, self.asked = velocity, []

    def __call__(self, x, t):
        self.asked.append((x.detach().clone(), t.detach().clone()))
        return self.velocity(x, t)


def close(found, expected, rtol=1e-9):
    torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-12)


def euler_states(net, start):
    """The states of a student's own Euler steps at the knots, from the noise."""
    x = [start]
    for a, b in itertools.pairwise(KNOTS):
        x.append(x[-1] + (b - a) * net(x[-1], torch.full((len(start),), a, dtype=torch.float64)))
    return x


def gradients(net, loss):
    return torch.autograd.grad(loss, list(net.parameters()))


@pytest.mark.parametrize("loss", ["l2", "cauchy"])
def test_on_policy_in_float64(loss):
    """From its own states or the teacher's, the teacher's velocity along its own step."""
    net, teacher = Student().double(), Seen(Student(seed=1).double().requires_grad_(False))
    states = normal(4, 12, 3, seed=2, dtype=torch.float64)
    interval, sample = torch.arange(60) % 3, torch.arange(60) % 12
    weighting = [1.0, 0.0, 2.5]
    objective = fk.StraightenLoss(
        fk.Schedule(KNOTS), target="on_policy", teacher=teacher, loss=loss, huber_c=0.3, weighting=weighting
    )
    batch = fk.BankBatch(states, interval, sample)
    with pytest.raises(ValueError, match=r"^batch: expected the states that `roll_out` was given last"):
        objective(net, batch)
    objective.roll_out(net, states, chunk=5)
    seen = []
    hook = net.register_forward_hook(lambda module, args, v: seen.append(args[0]))
    found = objective(net, batch, torch.Generator().manual_seed(0))
    hook.remove()
    assert len(seen) == len(teacher.asked) == 1
    with torch.no_grad():
        x = euler_states(net, states[0])
    own, us, losses = 0, [], []
    there, times = teacher.asked[0]
    for i, (k, s) in enumerate(zip(interval.tolist(), sample.tolist(), strict=True)):
        is_own = torch.allclose(seen[0][i], x[k][s], rtol=1e-9)
        at = x[k][s] if is_own else states[k, s]
        own += is_own and k > 0  # of the first knots all are both
        h, t = KNOTS[k + 1] - KNOTS[k], torch.tensor([KNOTS[k]], dtype=torch.float64)
        us.append((times[i].item() - KNOTS[k]) / h)
        v = net(at[None], t)[0]
        close(there[i], at + us[-1] * h * v.detach(), 1e-6)
        e = v - teacher.velocity(there[i : i + 1], times[i : i + 1])[0]
        losses.append(e.square().mean() if loss == "l2" else torch.log(1 + e.square() / (2 * 0.3**2)).mean())
        close(found.per_sample[i], losses[-1].detach())
    assert 3 <= own <= 20  # a quarter of 40
    assert min(us) < 0.1
    assert max(us) > 0.9
    expected = sum(weighting[k] * each for k, each in zip(interval.tolist(), losses, strict=True)) / 60
    close(found.loss, expected)
    for a, b in zip(gradients(net, found.loss), gradients(net, expected), strict=True):
        close(a, b)


class Rates(nn.Module):
    """(p + q t) x."""

    def __init__(self):
        super().__init__()
        self.p, self.q = (nn.Parameter(torch.zeros(())) for _ in range(2))

    def forward(self, x, t):
        return (self.p + self.q * t[:, None]) * x


def test_on_policy_learns_the_trapezoidal_rule():
    """Of x' = a x: v = a (x + h v / 2), at each interval's start."""
    a, knots = 0.8, [0.0, 0.4, 1.0]
    teacher = LinearField(a * torch.eye(2))
    settings = dict(noise=normal(64, 2), iterations=600, batch=256, lr=0.05, warmup=0, ema=0.95, grid=20)
    result = fk.straighten(Rates(), teacher, fk.Schedule(knots), target="on_policy", init="keep", **settings, **QUIET)
    for t, h in ((0.0, 0.4), (0.4, 0.6)):
        rate = (result.student.p + result.student.q * t).item()
        assert rate == pytest.approx(a / (1 - a * h / 2), rel=5e-3)
        assert (1 + h * rate) == pytest.approx((1 + a * h / 2) / (1 - a * h / 2), rel=2e-3)


def ring():
    """Eight modes on a circle."""
    angles = torch.arange(8) * math.pi / 4
    return GaussianMixtureVelocity(2 * torch.stack([angles.cos(), angles.sin()], 1), 0.2)


class MLP(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Linear(3, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)]
        self.net = nn.Sequential(*layers)

    def forward(self, x, t):
        return self.net(torch.cat([x, t[:, None].to(x)], 1))


CURVED = {  # target, its settings, and of the teacher's own error in as many steps what is left
    "on_policy": (dict(rollout_every=20), 0.5),
}


@pytest.mark.parametrize("target", CURVED)
def test_a_curved_flow_is_learned(target):
    """In two steps, a network from scratch: on noise that it has not seen, closer than the teacher's own two."""
    settings, left = CURVED[target]
    grid, teacher, noise = torch.linspace(0, 1, 41, dtype=torch.float64), ring(), normal(512, 2, seed=9)
    schedule = fk.Schedule(grid[[0, 20, 40]], grid, (0, 20, 40))
    run = dict(noise=(2,), bank=2048, batch=256, iterations=800, lr=3e-3, warmup=20, ema=0.99)
    result = fk.straighten(MLP(), teacher, schedule, target=target, **run, **settings, **QUIET)
    end = fk.rollout(teacher, noise, 40).x[-1]
    error, before = ((fk.sample(v, noise, schedule) - end).square().mean().sqrt() for v in (result.student, teacher))
    assert error < left * before


TARGETS = ("on_policy",)


@pytest.mark.parametrize("target", TARGETS)
def test_a_loss_without_its_teacher(target):
    with pytest.raises(
        ValueError, match=rf"^teacher: expected the velocity that target='{target}' evaluates, got None"
    ):
        fk.StraightenLoss(fk.Schedule(KNOTS), target=target)
    with pytest.raises(TypeError, match=r"^teacher: expected a callable velocity"):
        fk.StraightenLoss(fk.Schedule(KNOTS), target=target, teacher=3)


@pytest.mark.parametrize("target", TARGETS)
def test_the_teacher_is_guided_and_of_each_sample(target):
    """With conditioning and guidance that follow the samples, as in the formula written out for each sample alone."""
    rows, states = normal(10, 3, seed=4), normal(4, 10, 3, seed=2)
    net = Student(seed=1).requires_grad_(False)
    field = dict(conditioning={"rows": rows}, unconditional={"rows": torch.zeros(1, 3)}, guidance=2.5)
    interval, sample = torch.arange(24) % 3, torch.tensor([3, 9, 0, 9] * 6)
    student = fk.VelocityField(Student(), conditioning={"rows": rows})
    losses = []
    for guided in (True, False):
        teachers = [fk.VelocityField(net, **field)]
        if not guided:  # the same of each sample, as a function that looks its rows up

            def teacher(x, t):
                there = rows[sample] if len(x) == len(sample) else rows
                return net(x, t) + 2.5 * (net(x, t, there) - net(x, t))

            teachers = [teacher]
        objective = fk.StraightenLoss(fk.Schedule(KNOTS), target=target, teacher=teachers[0])
        objective.roll_out(student, states)
        losses.append(objective(student, fk.BankBatch(states, interval, sample), torch.Generator().manual_seed(0)))
    torch.testing.assert_close(losses[0].per_sample, losses[1].per_sample, rtol=1e-5, atol=1e-6)
