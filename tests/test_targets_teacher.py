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
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol / 10)


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
    "next_knot": ({}, 0.5),
    "next_knot, cauchy": (dict(loss="cauchy", huber_c=0.3), 0.5),
    "velocity_matching": ({}, 0.5),
}


@pytest.mark.parametrize("target", CURVED)
def test_a_curved_flow_is_learned(target):
    """In two steps, a network from scratch: on noise that it has not seen, closer than the teacher's own two."""
    settings, left = CURVED[target]
    grid, teacher, noise = torch.linspace(0, 1, 41, dtype=torch.float64), ring(), normal(512, 2, seed=9)
    schedule = fk.Schedule(grid[[0, 20, 40]], grid, (0, 20, 40))
    run = dict(noise=(2,), bank=2048, batch=256, iterations=700, lr=3e-3, warmup=20, ema=0.99)
    result = fk.straighten(MLP(), teacher, schedule, target=target.split(",")[0], **run, **settings, **QUIET)
    end = fk.rollout(teacher, noise, 40).x[-1]
    error, before = ((fk.sample(v, noise, schedule) - end).square().mean().sqrt() for v in (result.student, teacher))
    assert error < left * before


TARGETS = ("on_policy", "velocity_matching")  # which evaluate the teacher


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
    rows = normal(10, 3, seed=4)
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
        states = normal(len(objective.times), 10, 3, seed=2)
        objective.roll_out(student, states)
        losses.append(objective(student, fk.BankBatch(states, interval, sample), torch.Generator().manual_seed(0)))
    torch.testing.assert_close(losses[0].per_sample, losses[1].per_sample, rtol=1e-5, atol=1e-6)


# ---- along the teacher's trajectory ----

PLACES = (0, 2, 3, 8)  # of the knots on a grid of eighths: two, one and five steps
GRID = torch.arange(9, dtype=torch.float64) / 8
ON_GRID = fk.Schedule(GRID[list(PLACES)], GRID, PLACES)
TIMES = [0, 1 / 8, 2 / 8, 3 / 8, 5 / 8, 6 / 8, 1]  # at most three steps in each, and as many as there are
WITHIN = [0, 0, 1, 2, 2, 2]
WEIGHTING = [0.5, 3.0, 2.0]


def one(x, t):
    return x[None], torch.tensor([t], dtype=torch.float64)


def of_next_knot(net, teacher, states, i, s, t):
    """The jump of the student, and that from the next state."""
    end = ON_GRID.times[WITHIN[i] + 1].item()
    x, there = states[i, s], states[i + 1, s]
    jump = x + (end - TIMES[i]) * net(*one(x, TIMES[i]))[0]
    if TIMES[i + 1] == end:
        return jump, there
    return jump, (there + (end - TIMES[i + 1]) * net(*one(there, TIMES[i + 1]))[0]).detach()


def of_velocity_matching(net, teacher, states, i, s, t):
    """The mean velocity over the time left, and what its change along the teacher's makes of it."""
    end = ON_GRID.times[WITHIN[i] + 1].item()
    x = torch.lerp(states[i, s], states[i + 1, s], (t - TIMES[i]) / (TIMES[i + 1] - TIMES[i]))
    v, u, step = teacher(*one(x, t))[0], net(*one(x, t))[0], (end - t) / 20
    change = (net(*one(x + step * v, t + step))[0] - u) / step
    return u, (v + (end - t - step) * change).detach()


ALONG = {"next_knot": of_next_knot, "velocity_matching": of_velocity_matching}


@pytest.mark.parametrize("loss", ["l2", "cauchy"])
@pytest.mark.parametrize("target", ALONG)
def test_along_the_teacher_in_float64(target, loss):
    net, teacher = Student().double(), Student(seed=1).double().requires_grad_(False)
    settings = dict(target=target, substeps=3, loss=loss, huber_c=0.3, weighting=WEIGHTING)
    objective = fk.StraightenLoss(ON_GRID, teacher=teacher, **settings)
    assert objective.times.tolist() == TIMES
    assert objective.schedule.indices == (0, 1, 2, 3, 5, 6, 8)
    states = normal(7, 12, 3, seed=2, dtype=torch.float64)
    interval, sample = torch.arange(60) % 6, torch.arange(60) % 12
    seen = []
    hook = net.register_forward_hook(lambda module, args, v: seen.append((args[1], v.requires_grad)))
    found = objective(net, fk.BankBatch(states, interval, sample), torch.Generator().manual_seed(0))
    hook.remove()
    assert [graph for _, graph in seen] == [True, False]
    losses, within = [], torch.tensor(WITHIN)[interval]
    rtol = 1e-9 if target == "next_knot" else 20 * 2**-24  # times in float32, in a difference over a twentieth
    for i, s, t, each in zip(interval.tolist(), sample.tolist(), seen[0][0].tolist(), found.per_sample, strict=True):
        assert t == TIMES[i] if target == "next_knot" else TIMES[i] <= t <= TIMES[i + 1]
        answer, goal = ALONG[target](net, teacher, states, i, s, t)
        e = answer - goal
        losses.append(e.square().mean() if loss == "l2" else torch.log(1 + e.square() / (2 * 0.3**2)).mean())
        close(each, losses[-1].detach(), rtol)
    expected = sum(WEIGHTING[k] * each for k, each in zip(within.tolist(), losses, strict=True)) / 60
    close(found.loss, expected, rtol)
    for a, b in zip(gradients(net, found.loss), gradients(net, expected), strict=True):
        close(a, b, rtol)
    assert found.per_interval.shape == (3,)
    for k in range(3):
        close(found.per_interval[k], torch.stack(losses)[within == k].mean().detach(), rtol)
    ends = torch.stack([states[interval, sample], states[interval + 1, sample]])
    few = fk.BankBatch(ends, interval, sample, ends=True, size=12)
    again = objective(net, few, torch.Generator().manual_seed(0))
    for a, b in zip(found, again, strict=True):
        close(a, b)


class Mean(nn.Module):
    """Of x' = a x, the mean velocity over the time left: exactly, or by Euler steps of a twentieth of it each."""

    def __init__(self, a, ends, euler):
        super().__init__()
        self.a, self.ends, self.euler, self.one = a, ends, euler, nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x, t):
        left = torch.tensor([next((e for e in self.ends if e > s), 1.0) - s for s in t.tolist()])[:, None].double()
        if not self.euler:
            return self.one * torch.expm1(self.a * left) / left.clamp_min(1e-300) * x
        grown, rest = torch.ones_like(left), left.clone()
        for _ in range(1000):
            grown, rest = grown * (1 + self.a * rest / 20), rest * 0.95
        return self.one * torch.where(left > 1e-12, (grown - 1) / left, self.a) * x


@pytest.mark.parametrize("target", ALONG)
def test_what_has_no_loss(target):
    """The mean velocity over the time left, of the teacher's exact states or of its own Euler steps."""
    a = -1.7
    objective = fk.StraightenLoss(ON_GRID, target=target, substeps=3, teacher=lambda x, t: a * x)
    noise = normal(5, 2, dtype=torch.float64)
    states = torch.stack([noise * math.exp(a * t) for t in TIMES])
    batch = fk.BankBatch(states, torch.arange(30) % 6, torch.arange(30) % 5)
    net = Mean(a, ON_GRID.times[1:].tolist(), target == "velocity_matching")
    assert objective(net, batch, torch.Generator().manual_seed(0)).loss < 1e-12
    other = Mean(0.9 * a, ON_GRID.times[1:].tolist(), target == "velocity_matching")
    assert objective(other, batch, torch.Generator().manual_seed(0)).loss > 1e-5


def test_velocity_matching_in_autocast():
    """The difference is taken out of it: in bfloat16 it would be of the size of its rounding."""
    net, teacher = Student(seed=3), Student(seed=1).requires_grad_(False)
    objective = fk.StraightenLoss(
        ON_GRID,
        target="velocity_matching",
        teacher=teacher,
        loss=lambda v, w: seen.append(w) or (v - w).square().flatten(1).mean(1),
    )
    states, seen = normal(len(objective.times), 12, 3, seed=2), []
    batch = fk.BankBatch(states, torch.arange(60) % objective.schedule.steps, torch.arange(60) % 12)
    objective(net, batch, torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        found = objective(net, batch, torch.Generator().manual_seed(0))
    found.loss.backward()
    assert (seen[1] - seen[0]).abs().max() < 2**-6 * seen[0].abs().max()  # the teacher's own rounding
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        x, t = states[0, :60], torch.zeros(12)
        there = net(x, t + 0.0125) - net(x, t)
    assert not torch.allclose(there.float() / 0.0125, (net(x, t + 0.0125) - net(x, t)) / 0.0125, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("target", TARGETS)
def test_a_teacher_that_answers_in_bfloat16(target, dtype):
    """By its own dtype, or as all networks do in a caller's autocast: a target in the dtype of the states."""

    class Low(Student):
        def forward(self, x, t):
            return super().forward(x, t).to(dtype)

    objective = fk.StraightenLoss(ON_GRID, target=target, teacher=Low(seed=1))
    net, states = Student(seed=3), normal(len(objective.times), 12, 3, seed=2)
    objective.roll_out(net, states)
    batch = fk.BankBatch(states, torch.arange(60) % objective.schedule.steps, torch.arange(60) % 12)
    plain = objective(net, batch, torch.Generator().manual_seed(0)).loss
    plain.backward()
    with torch.autocast("cpu", torch.bfloat16):
        found = objective(net, batch, torch.Generator().manual_seed(0)).loss
    found.backward()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, plain, rtol=0.05, atol=0)


@pytest.mark.parametrize("target", ALONG)
def test_dropout_falls_alike(target):
    """In the evaluations that are compared, and the generators go on from the first."""
    masks = []

    class Dropping(Student):
        def forward(self, x, t):
            masks.append(nn.functional.dropout(torch.ones(6, 20), 0.5))
            return super().forward(x, t)

    objective = fk.StraightenLoss(ON_GRID, target=target, teacher=Student(seed=1))
    states = normal(len(objective.times), 6, 3)
    batch = fk.BankBatch(states, torch.arange(6), torch.arange(6))
    net = Dropping()
    torch.manual_seed(0)
    objective(net, batch, torch.Generator().manual_seed(0))
    assert len(masks) == 2
    assert torch.equal(*masks)
    after = torch.rand(4)
    torch.manual_seed(0)
    nn.functional.dropout(torch.ones(6, 20), 0.5)
    assert torch.equal(after, torch.rand(4))


@pytest.mark.parametrize("target", ALONG)
def test_the_states_between_the_knots(target):
    """From the grid that is given, else from the schedule's own; the history is of the schedule's intervals."""
    bank = []

    def teacher(x, t):
        bank.append(t[0].item())
        return -x

    def run(schedule, **settings):
        bank.clear()
        more = dict(noise=(3,), iterations=4, batch=8, bank=16, log_every=1, ema=None, target=target, weighting=[1, 2])
        return fk.straighten(Student(), teacher, schedule, **more | settings, **QUIET)

    halves = fk.Schedule([0, 0.5, 1])
    for schedule, grid in (
        (fk.Schedule(GRID[[0, 4, 8]], GRID, (0, 4, 8)), None),
        (halves, 8),
        (fk.Schedule(halves.times, halves.times, (0, 1, 2)), 8),
    ):
        result = run(schedule, grid=grid, substeps=3)
        assert all(len(row) == 2 for row in result.history["interval_loss"])
        assert all(math.isfinite(loss) for loss in result.history["loss"])
    with pytest.raises(ValueError, match=r"^grid: expected the teacher's fine grid"):
        run(halves)
    with pytest.raises(ValueError, match=r"^grid: expected a grid that contains every time"):
        run(halves, grid=7)
    with pytest.raises(ValueError, match=r"^weighting: expected 2 finite numbers"):
        run(halves, grid=8, weighting=[1] * 8)
    for bad, error in ((0, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match=r"^substeps: expected "):
            run(halves, grid=8, substeps=bad)
    objective = fk.StraightenLoss(halves, target=target, teacher=teacher, substeps=4)
    assert objective.times.tolist() == GRID.tolist()  # without a grid, equal ones
    assert fk.StraightenLoss(halves, substeps=4).times.tolist() == [0, 0.5, 1]
    with pytest.raises(ValueError, match=r"^t_sampling: expected .* or None with target='"):
        fk.StraightenLoss(halves, target=target, teacher=teacher, t_sampling="ten")
    with pytest.raises(ValueError, match=r"^states: expected \[9, n, \*shape\]"):
        objective(Student(), fk.BankBatch(normal(3, 8, 3), torch.arange(2), torch.arange(2)))


WRAPPED = {
    "compiled": lambda net: torch.compile(net, backend="eager"),
    "a compiled field": lambda net: fk.VelocityField(torch.compile(net, backend="eager")),
    "DataParallel": nn.DataParallel,
}


@pytest.mark.parametrize("wrap", WRAPPED)
@pytest.mark.parametrize("target", [*ALONG, "on_policy"])
def test_a_wrapped_student_learns_the_same(target, wrap):
    def run(student):
        settings = dict(noise=(3,), iterations=5, batch=8, bank=16, log_every=1, target=target, rollout_every=2)
        return fk.straighten(student, Student(seed=1).eval(), ON_GRID, init="keep", **settings, **QUIET).history[
            "grad_norm"
        ]

    assert run(WRAPPED[wrap](Student())) == run(Student())


@pytest.mark.parametrize("storage", ["device", "shared"])
@pytest.mark.parametrize("target", ALONG)
def test_a_bank_of_ones_own(target, storage):
    """It keeps the states between the knots where it is made for the loss's schedule; the examples are alike in all."""
    noise, teacher = normal(16, 3), Student(seed=1).eval()
    objective = fk.StraightenLoss(ON_GRID, target=target, teacher=teacher)
    run = dict(iterations=4, batch=8, log_every=1, target=target, init="keep", **QUIET)
    bank = fk.TrajectoryBank(teacher, objective.schedule, noise=noise, storage=storage, **QUIET)
    losses = fk.straighten(Student(), teacher, ON_GRID, bank=bank, noise=None, **run).history["loss"]
    assert losses == pytest.approx(fk.straighten(Student(), teacher, ON_GRID, noise=noise, **run).history["loss"])
    few = fk.TrajectoryBank(teacher, ON_GRID, noise=noise, **QUIET)
    with pytest.raises(ValueError, match=r"^bank: expected knots that the bank keeps, among "):
        fk.straighten(Student(), teacher, ON_GRID, bank=few, noise=None, **run)
