"""Straightening: what it learns, from which inputs, and that no interruption changes the result."""

import dataclasses
import functools
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from _flows import (
    ConstantField,
    ElementwiseField,
    RowField,
    even_grid,
    normal,
    uneven_grid,
)
from torch import nn

import flowkernels as fk
from flowkernels._files import SUM
from flowkernels.models.bundled import BUNDLED
from flowkernels.models.networks import ResidualMLP
from flowkernels.schedule import Schedule
from flowkernels.training import straighten as straighten_module
from flowkernels.training.bank.batch import generator_on
from flowkernels.training.run import settings as settings_module
from flowkernels.training.run.average import Average
from flowkernels.training.run.bank import RunBank
from flowkernels.training.run.checkpoint import read_checkpoint, write_checkpoint
from flowkernels.training.run.settings import SHARED, Settings
from flowkernels.training.students.modules import architecture
from flowkernels.training.targets.table import TARGETS

QUIET = dict(progress=False)


def schedule_on(grid, *indices):
    return Schedule(grid[list(indices)], grid, indices)


class Recorder(nn.Module):
    """A student that keeps its inputs and answers with one trainable number."""

    def __init__(self, answer=0.0):
        super().__init__()
        self.answer, self.inputs = nn.Parameter(torch.tensor(answer)), []

    def forward(self, x, t, **kwargs):
        self.inputs.append((x.clone(), t.clone(), kwargs))
        return self.answer.expand_as(x)


def recorded(velocity, schedule, noise, iterations=1, answer=0.0, **settings):
    """The student's inputs over some iterations at a learning rate that moves nothing, and the history."""
    student = Recorder(answer)
    settings = dict(iterations=iterations, batch=32, lr=1e-30, log_every=1, ema=None) | settings
    result = fk.straighten(student, velocity, schedule, noise=noise, **settings, **QUIET)
    return student.inputs, result.history


def small_net(seed=0, dropout=0.0):
    torch.manual_seed(seed)
    net = ResidualMLP(4, width=16, blocks=1, time_width=8)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return DropoutNet(net, dropout) if dropout else net


class DropoutNet(nn.Module):
    def __init__(self, net, p):
        super().__init__()
        self.net, self.drop = net, nn.Dropout(p)

    def forward(self, x, t):
        return self.net(self.drop(x), t)


# ---- what it learns ----


def test_a_few_steps_come_close_to_the_teacher():
    """On the shipped digits model: far closer than the schedule alone, on noise it has not seen."""
    teacher = BUNDLED["digits"].load()
    cal = fk.calibrate(teacher, normal(128, 1, 8, 8), 20, 4, **QUIET)
    noise = normal(256, 1, 8, 8, seed=99)
    target = fk.rollout(teacher, noise, 20).x[-1]

    def error(velocity, schedule):
        return (fk.sample(velocity, noise, schedule) - target).square().mean().item()

    settings = dict(noise=(1, 8, 8), bank=512, iterations=150, batch=128, lr=5e-4, warmup=10, ema=0.98)
    result = fk.straighten(None, teacher, cal[4], **settings, **QUIET)
    before, after = error(teacher, cal[4]), error(result.student, cal[4])
    assert after < 0.5 * before
    losses = result.history["loss"]
    assert losses[-1] < 0.5 * losses[0]


class Rational(nn.Module):
    """w x / (1 + c t): straight lines to (1 + w) x where c = w."""

    def __init__(self):
        super().__init__()
        self.w, self.c = (nn.Parameter(torch.zeros(())) for _ in range(2))

    def forward(self, x, t):
        return self.w * x / (1 + self.c * t[:, None])


class Affine(nn.Module):
    """(p + q t) x."""

    def __init__(self, p=0.0, q=0.0):
        super().__init__()
        self.p, self.q = nn.Parameter(torch.tensor(p)), nn.Parameter(torch.tensor(q))

    def forward(self, x, t):
        return (self.p + self.q * t[:, None]) * x


TWO = [0.0, 0.4, 1.0]
LEARNED = {  # target, its settings, a student that can, and the plans on which that is exact afterwards
    "boss": (Affine, schedule_on(even_grid(20), 0, 8, 20), {}, [TWO]),
    "boss, cauchy": (Affine, schedule_on(even_grid(20), 0, 8, 20), dict(loss="cauchy", huber_c=0.3), [TWO]),
    "distill": (Affine, schedule_on(even_grid(20), 0, 8, 20), dict(loss="huber_per_element"), [1]),
    "reflow": (Rational, schedule_on(even_grid(20), 0, 8, 20), {}, [1, 3]),
    "reflow, improved": (Rational, 2, dict(t_sampling="u_shaped", loss="huber_per_element", huber_c=0.1), [1, 3]),
    "reflow, simple": (Rational, 2, dict(t_sampling="ten"), [1, 3]),
    "reflow, own": (Rational, 2, dict(t_sampling=lambda n, g: torch.rand(n, generator=g) ** 2,
                                      loss=lambda v, target: (v - target).abs().flatten(1).mean(1)), [1, 3]),
    "solver": (Affine, fk.Solver.adams_bashforth(TWO), dict(rollout_every=5), []),
    "solver, of Euler": (Affine, fk.Solver.euler(TWO), dict(rollout_every=5, loss="huber", weighting=[1, 2]), [TWO]),
    "endpoint": (Affine, fk.Solver.adams_bashforth(TWO), {}, []),
    "endpoint, of two stages": (Affine, fk.Solver.heun(TWO), dict(loss="l2"), []),
}  # fmt: skip


@pytest.mark.parametrize("case", LEARNED)
def test_a_flow_that_can_be_learned_is_learned(case):
    """x' = 0.8 x: the student ends where the teacher does, on the plans for which it was trained."""
    make, schedule, settings, plans = LEARNED[case]
    schedule = schedule if not isinstance(schedule, int) else Schedule.uniform(schedule)
    noise, grid = normal(64, 2), even_grid(20)
    iterations = 200 if isinstance(schedule, fk.Solver) else 500
    settings = dict(iterations=iterations, batch=64, lr=0.1, warmup=0, clip=None, ema=None, grid=grid) | settings
    target, teacher = case.split(",")[0], Affine(0.8).eval()
    result = fk.straighten(make(), teacher, schedule, noise=noise, init="keep", target=target, **settings, **QUIET)
    assert (result.solver is None) == (target not in ("solver", "endpoint"))
    x1 = fk.rollout(teacher, noise, grid).x[-1]
    solvers = [schedule, result.solver] if result.solver is not None else []
    for plan in [*plans, *solvers]:
        assert torch.allclose(fk.sample(result.student, noise, plan), x1, rtol=2e-3, atol=2e-3)


def test_a_straight_flow_is_learned_before_it_starts():
    teacher = ConstantField(torch.tensor([0.5, -1.25, 2.0, 0.0]))  # exact in float32, as are the knots and the noise
    noise = (16 * normal(20, 4)).round() / 16
    settings = dict(noise=noise, iterations=5, batch=16, init="teacher", log_every=1)
    result = fk.straighten(None, teacher, schedule_on(even_grid(8), 0, 2, 3, 8), **settings, **QUIET)
    assert result.history["loss"] == [0.0] * 5
    assert torch.equal(result.student.velocity, teacher.velocity)


# ---- what it trains on ----


@pytest.mark.parametrize("grid", [even_grid(20), uneven_grid(20)], ids=["even", "uneven"])
def test_the_inputs_are_the_teachers_knots(grid):
    teacher, noise, places = ElementwiseField(), normal(24, 3), (0, 3, 11, 20)
    schedule = schedule_on(grid, *places)
    states = fk.rollout(teacher, noise, grid).x
    inputs, _ = recorded(teacher, schedule, noise, iterations=6, batch=50)
    seen = set()
    for x, t, _ in inputs:
        for row, time in zip(x, t, strict=True):
            interval = int((schedule.times[:-1].float() == time).nonzero())
            match = (states[places[interval]] == row).all(1)
            assert match.sum() == 1
            seen.add((interval, int(match.nonzero())))
    assert {i for i, _ in seen} == {0, 1, 2}
    assert {s for _, s in seen} == set(range(24))


DENSITIES = {  # of u, up to a factor, as the papers have them
    "uniform": lambda u: np.ones_like(u),
    "u_shaped": lambda u: np.exp(4 * u) + np.exp(4 * (1 - u)),
    "ten": lambda u: 10 ** (1 - u),
    "own": lambda u: 2 * u,
}
OWN = dict(own=lambda n, generator: torch.rand(n, generator=generator).sqrt())


@pytest.mark.parametrize("name", DENSITIES)
def test_u_lies_on_the_chords_with_its_density(name):
    grid, places = uneven_grid(20), (0, 4, 9, 20)
    teacher, noise, schedule = ElementwiseField(), normal(12, 5), schedule_on(grid, *places)
    states = fk.rollout(teacher, noise, grid).x.double()
    inputs, _ = recorded(teacher, schedule, noise, iterations=6, batch=100, t_sampling=OWN.get(name, name))
    us = []
    for x, t, _ in inputs:
        for row, time in zip(x.double(), t.double(), strict=True):
            i = int((schedule.times[1:-1] <= time).sum())
            a, b = schedule.times[i], schedule.times[i + 1]
            u = (time - a) / (b - a)
            chord = torch.lerp(states[places[i]], states[places[i + 1]], u)
            assert (chord - row).abs().amax(1).min() < 1e-5
            us.append(u.item())
    at = np.linspace(0, 1, 10001)
    below = np.concatenate([[0], np.cumsum(DENSITIES[name](at[1:] / 2 + at[:-1] / 2))])
    expected = np.interp(np.sort(us), at, below / below[-1])
    distance = np.abs(expected - (np.arange(len(us)) + 0.5) / len(us)).max()
    assert distance < 1.63 / math.sqrt(len(us))  # Kolmogorov and Smirnov's, at 1 %


def matched(inputs, schedule, states, places):
    """For each input of the first iteration: its interval and the two ends of its chord, in float64."""
    x, t, _ = inputs[0]
    rows = []
    for row, time in zip(x, t, strict=True):
        i = int((schedule.times[:-1].float() == time).nonzero())
        s = int((states[places[i]] == row).all(1).nonzero())
        rows.append((i, states[places[i], s].double(), states[places[i + 1], s].double()))
    return rows


def per_sample(loss, error, c):
    """The losses of a sample, as the papers have them."""
    mse = error.square().mean()
    return {
        "l2": mse,
        "huber": (mse + c * c).sqrt() - c,
        "huber_per_element": ((error.square() + c * c).sqrt() - c).mean(),
        "cauchy": torch.log(1 + error.square() / (2 * c * c)).mean(),
        "own": error.abs().max(),
    }[loss].item()


OWN_LOSS = dict(own=lambda v, target: (v - target).abs().flatten(1).amax(1))


@pytest.mark.parametrize("weight", [None, [1.0, 0.0, 2.5], "per_sample_normalised", "adaptive"], ids=str)
@pytest.mark.parametrize("loss", ["l2", "huber", "huber_per_element", "cauchy", "own"])
def test_the_loss_in_float64(loss, weight):
    grid, places, c = uneven_grid(20), (0, 4, 9, 20), 0.3
    teacher, noise, schedule = ElementwiseField(), normal(12, 5), schedule_on(grid, *places)
    states = fk.rollout(teacher, noise, grid).x
    settings = dict(loss=OWN_LOSS.get(loss, loss), huber_c=c, weighting=weight)
    inputs, history = recorded(teacher, schedule, noise, answer=0.7, **settings)
    losses, intervals, slopes = [], [], []
    for i, a, b in matched(inputs, schedule, states, places):
        secant = (b - a) / (schedule.times[i + 1] - schedule.times[i])
        losses.append(per_sample(loss, 0.7 - secant, c))
        slopes.append((per_sample(loss, 0.7 + 1e-6 - secant, c) - per_sample(loss, 0.7 - 1e-6 - secant, c)) / 2e-6)
        intervals.append(i)
    if weight == "per_sample_normalised":
        factors = [1 / each for each in losses]
    elif weight == "adaptive":
        factors = [1 / (each + 1e-3 / 5) for each in losses]
    else:
        factors = [(weight or [1.0] * 3)[i] for i in intervals]
    expected = np.mean([w * each for w, each in zip(factors, losses, strict=True)])
    assert history["loss"][0] == pytest.approx(expected, rel=1e-5)
    slope = np.mean([w * each for w, each in zip(factors, slopes, strict=True)])
    assert history["grad_norm"][0] == pytest.approx(abs(slope), rel=1e-4)
    for i, found in enumerate(history["interval_loss"][0]):
        assert found == pytest.approx(np.mean([e for j, e in zip(intervals, losses, strict=True) if j == i]), rel=1e-5)


@pytest.mark.parametrize("settings", [{}, dict(t_sampling="uniform", loss="huber"), dict(loss="cauchy")], ids=str)
def test_the_ends_of_the_intervals_are_enough(settings):
    """Of a bank that is elsewhere; weights of the examples count like those of intervals."""
    states, interval = normal(4, 9, 5), torch.tensor([0, 2, 1, 2, 0, 0])
    sample, weight = torch.tensor([8, 0, 3, 3, 1, 7]), torch.tensor([0.5, 2, 0, 1, 3, 1])
    ends = torch.stack([states[interval, sample], states[interval + 1, sample]])
    objective = fk.StraightenLoss(fk.Schedule([0, 0.2, 0.7, 1]), **settings, weighting=[1, 3, 0.5])
    net = Affine(0.7, -0.4)
    whole, few = (
        objective(net, batch, torch.Generator().manual_seed(0))
        for batch in (
            fk.BankBatch(states, interval, sample, weight=weight),
            fk.BankBatch(ends, interval, sample, ends=True, weight=weight, size=9),
        )
    )
    for name in whole._fields:
        torch.testing.assert_close(getattr(few, name), getattr(whole, name), rtol=1e-6, atol=1e-7)
    factors = weight.double() * torch.tensor([1, 3, 0.5]).double()[interval]
    expected = (factors * whole.per_sample.double()).mean().item()
    assert whole.loss.item() == pytest.approx(expected, rel=1e-6)


BAD_BATCHES = {
    "ends of others": (
        dict(states=torch.ones(2, 5, 3), ends=True),
        r"^states: expected \[2, 6, ",
    ),
    "no example": (
        dict(interval=torch.arange(0), sample=torch.arange(0)),
        r"^interval: expected at least one example",
    ),
    "interval": (dict(interval=torch.full((6,), 3)), r"^interval: expected indices from 0 to 2, got 3"),
    "interval from the end": (
        dict(states=torch.ones(2, 6, 3), interval=torch.full((6,), -1), ends=True),
        r"^interval: expected indices from 0 to 2, got -1",
    ),
    "sample": (dict(sample=torch.full((6,), 9)), r"^sample: expected indices from 0 to 8, got 9"),
    "size": (dict(size=0), r"^size: expected at least 1, got 0"),
    "samples beyond the size": (dict(size=3), r"^sample: expected indices from 0 to 2, got 5"),
    "weights too few": (dict(weight=torch.ones(4)), r"^weight: expected \[6\]"),
    "weight NaN": (dict(weight=torch.full((6,), torch.nan)), r"^weight: expected finite factors >= 0"),
    "weight below 0": (dict(weight=-torch.ones(6)), r"^weight: expected finite factors >= 0"),
    "conditioning": (dict(conditioning=[torch.ones(6)]), r"^conditioning: expected a dict with names as keys"),
    "no tensor": (dict(conditioning={"y": 3}), r"^conditioning\['y'\]: expected a tensor with 6 rows, .* got 3"),
    "rows": (dict(conditioning={"y": torch.ones(5)}), r"^conditioning\['y'\]: expected a tensor with 6 rows"),
    "guidance alone": (dict(guidance="w"), r"^guidance: expected None, or a name of the batch's conditioning"),
    "guidance": (
        dict(guidance="w", conditioning={"y": torch.ones(6)}),
        r"^guidance: expected None, or a name of conditioning \['y'\], got w",
    ),
}


@pytest.mark.parametrize("bad", BAD_BATCHES)
def test_bad_batches(bad):
    change, message = BAD_BATCHES[bad]
    batch = fk.BankBatch(torch.ones(4, 9, 3), torch.arange(6) % 3, torch.arange(6))._replace(**change)
    with pytest.raises((TypeError, ValueError), match=message):
        fk.StraightenLoss(fk.Schedule([0, 0.2, 0.7, 1]))(Affine(0.7, -0.4), batch)


def own_velocities(net, solver, start):
    """Of a student on a solver, in float64, and the states where it has them."""
    v, x = [], [start]
    for k in range(solver.steps):
        v.append(net(x[-1], solver.times[k].expand(len(start))))
        added = sum(b * each for b, each in zip(solver.coefficients[k].tolist(), v, strict=False))
        x.append(solver.start_coefficients[k] * start + added)
    return x, v


@pytest.mark.parametrize("a", [(1, 1, 1), (0.8, 0, -0.7)])
@pytest.mark.parametrize("loss", ["l2", "cauchy"])
def test_the_loss_of_a_solvers_steps_in_float64(loss, a):
    """The velocity that lands the solver on the teacher's next knot, on the student's own states and the teacher's."""
    noise, solver = normal(12, 5), fk.Solver.adams_bashforth([0, 0.3, 0.7, 1], 3)
    solver = dataclasses.replace(solver, start_coefficients=a)
    states = torch.stack([noise, *(normal(12, 5, seed=k) for k in (1, 2, 3))])
    student = DropoutNet(Affine(0.7, -0.4), 0.5)
    objective = fk.StraightenLoss(solver, target="solver", loss=loss, huber_c=0.3)
    interval, sample = torch.arange(60) % 3, torch.arange(60) % 12
    batch = fk.BankBatch(states, interval, sample)
    with pytest.raises(ValueError, match=r"^batch: expected the states that `roll_out` was given last"):
        objective(student, batch)
    objective.roll_out(student, states, chunk=5)
    assert student.training
    student, seen = student.eval(), []
    student.register_forward_hook(lambda net, args, v: seen.append((args[0].double(), v.double())))
    found = objective(student, batch, torch.Generator().manual_seed(0))
    assert len(seen) == 1
    double = DropoutNet(Affine(0.7, -0.4).double(), 0.5).eval()
    with torch.no_grad():
        x, v = own_velocities(double, solver, states[0].double())
    own, b = 0, solver.coefficients
    for row, answer, k, s, each in zip(*seen[0], interval, sample, found.per_sample, strict=True):
        is_own = (row - x[k][s]).abs().max() < 1e-5
        assert is_own or (row - states[k, s]).abs().max() < 1e-6
        own += bool(is_own and k > 0)  # of the first knots all are both
        past = sum((b[k, i] * v[i][s] for i in range(k)), a[k] * states[0, s].double())
        goal = (states[k + 1, s].double() - past) / b[k, k]
        assert each.item() == pytest.approx(per_sample(loss, answer - goal, 0.3), rel=1e-4)
    assert 3 <= own <= 20  # a quarter of 40
    means = [found.per_sample[interval == i].mean() for i in range(3)]
    torch.testing.assert_close(found.per_interval, torch.stack(means))


def end_of_a_solver(net, solver, start):
    """As its definition reads."""
    x, v = start, []
    for i, t in enumerate(solver.model_times):
        v.append(net(x, t.expand(len(start))))
        x = solver.start_coefficients[i] * start + sum(solver.coefficients[i, j] * v[j] for j in range(i + 1))
    return x


SOLVERS = {
    "all before": fk.Solver([0.1, 0.4, 1], [0.1, 0.3, 0.5], [[0.3, 0, 0], [0.5, -0.2, 0], [0.1, 0.6, 0.2]]),
    "no last": fk.Solver([0, 1], [0, 0.5], [[0.3, 0], [1, 0]]),
    "Heun": fk.Solver.heun([0, 0.3, 1]),
    "free start": dataclasses.replace(fk.Solver.heun([0, 0.3, 1]), start_coefficients=[0.8, 0, -0.7]),
}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("loss", [None, "l2", "cauchy"])
def test_the_loss_of_a_solvers_end_in_float64(loss, solver):
    """Of its end, with the gradient through all its evaluations, in the student's own mode."""
    solver, states = SOLVERS[solver], torch.stack([normal(12, 4), normal(12, 4, seed=1)])
    net, sample = small_net(2).double(), torch.arange(20) * 5 % 12
    objective, seen = fk.StraightenLoss(solver, target="endpoint", loss=loss, huber_c=0.3), []
    hook = net.register_forward_hook(lambda net, args, v: seen.append(net.training))
    found = objective(net, fk.BankBatch(states.double(), torch.zeros(20, dtype=torch.int64), sample))
    found.loss.backward()
    hook.remove()
    assert seen == [True] * solver.evaluations
    gradients = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    x0, x1 = states.double()[:, sample]
    e = (end_of_a_solver(net, solver, x0) - x1) / (1 - solver.times[0])
    square = e.square()
    each = {
        None: (square.mean(1) + 0.09).sqrt() - 0.3,
        "l2": square.mean(1),
        "cauchy": torch.log(1 + square / 0.18).mean(1),
    }[loss]
    each.mean().backward()
    torch.testing.assert_close(found.per_sample, each.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.loss, each.mean(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.per_interval, each.mean().detach()[None], rtol=1e-9, atol=1e-12)
    for a, p in zip(gradients, net.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-8, atol=1e-12)


def test_conditioning_follows_the_samples():
    rows = normal(10, 3, seed=4)
    teacher = fk.VelocityField(RowField(), conditioning={"rows": rows})
    noise, schedule = normal(10, 3), schedule_on(even_grid(8), 0, 8)
    student = Recorder()
    field = fk.VelocityField(student, conditioning={"rows": rows, "shared": torch.ones(1, 2)})
    fk.straighten(field, teacher, schedule, noise=noise, iterations=3, batch=16, init="keep", **QUIET)
    for x, _, seen in student.inputs:
        picks = (x[:, None] == noise[None]).all(2).float().argmax(1)
        assert torch.equal(x, noise[picks])
        assert torch.equal(seen["rows"], rows[picks])
        assert seen["shared"].shape == (16, 2)


def test_the_teacher_of_each_sample_is_its_own():
    """Straight trajectories with a velocity a sample: the student that knows it has no loss."""
    rows = (8 * normal(10, 3, seed=4)).round() / 8
    teacher = fk.VelocityField(RowField(), conditioning={"rows": rows})

    class Knowing(RowField):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(1))

        def forward(self, x, t, rows):
            return super().forward(x, t, rows) + self.shift

    student = fk.VelocityField(Knowing(), conditioning={"rows": rows})
    noise = (8 * normal(10, 3)).round() / 8
    settings = dict(noise=noise, iterations=3, batch=7, init="keep", log_every=1)  # 10 samples in chunks of 7
    result = fk.straighten(student, teacher, schedule_on(even_grid(8), 0, 3, 8), **settings, **QUIET)
    assert result.history["loss"] == [0.0] * 3


def test_refresh_draws_new_noise():
    drawn = []

    def noise(n, generator):
        drawn.append(torch.randn(n, 3, generator=generator))
        return drawn[-1]

    inputs, _ = recorded(
        ElementwiseField(), schedule_on(even_grid(4), 0, 4), noise, iterations=6, bank=20, refresh=2, batch=8
    )
    assert len(drawn) == 3
    assert not torch.equal(drawn[0], drawn[1])
    for it, (x, _, _) in enumerate(inputs):
        assert (x[:, None] == drawn[it // 2][None]).all(2).any(1).all()


def test_a_shape_means_standard_normal_noise():
    inputs, _ = recorded(
        ElementwiseField(), schedule_on(even_grid(4), 0, 4), (2, 3), iterations=1, bank=500, batch=2000
    )
    x = inputs[0][0]
    assert x.shape == (2000, 2, 3)
    assert x.mean().abs() < 0.1
    assert x.var().item() == pytest.approx(1, abs=0.1)
    assert len(x.flatten(1).unique(dim=0)) <= 500


def test_seeds():
    def first(seed):
        inputs, _ = recorded(ElementwiseField(), schedule_on(even_grid(6), 0, 3, 6), (3,), seed=seed)
        return inputs[0][0]

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


def test_a_schedule_without_a_grid_needs_one():
    teacher, noise, grid = ElementwiseField(), normal(6, 3), [0, 0.1, 0.25, 0.5, 0.7, 1]
    inputs, _ = recorded(teacher, Schedule([0, 0.25, 1]), noise, grid=grid)
    states = fk.rollout(teacher, noise, grid).x
    for x, t in zip(*inputs[0][:2], strict=True):
        assert (states[0 if t == 0 else 2] == x).all(1).any()


# ---- training ----


def test_learning_rate_and_history():
    teacher = small_net()
    settings = dict(noise=(4,), iterations=21, warmup=5, lr=1e-2, log_every=4, bank=16, batch=8)
    result = fk.straighten(None, teacher, schedule_on(even_grid(4), 0, 2, 4), **settings, **QUIET)
    history = result.history
    assert history["iteration"] == [0, 4, 8, 12, 16, 20]
    assert all(len(column) == 6 for column in history.values())
    expected = [
        1e-2 * ((it + 1) / 5 if it < 5 else 0.5 * (1 + math.cos(math.pi * (it - 5) / 16)))
        for it in history["iteration"]
    ]
    assert history["lr"] == pytest.approx(expected)
    assert all(len(row) == 2 for row in history["interval_loss"])
    assert all(norm > 0 for norm in history["grad_norm"])
    settings = dict(noise=(4,), iterations=3, warmup=0, decay="none", lr=1e-2, log_every=1, bank=16, batch=8)
    flat = fk.straighten(None, teacher, schedule_on(even_grid(4), 0, 2, 4), **settings, **QUIET)
    assert flat.history["lr"] == [1e-2] * 3


def test_clipping_bounds_the_step():
    def moved(clip):
        student = ConstantField(torch.zeros(3))
        teacher, schedule = ConstantField(torch.full((3,), 100.0)), schedule_on(even_grid(4), 0, 4)
        settings = dict(noise=(3,), iterations=1, warmup=0, bank=8, batch=8, clip=clip, ema=None, init="keep", lr=1.0)
        sgd = functools.partial(torch.optim.SGD, lr=0.0)
        fk.straighten(student, teacher, schedule, optimizer=sgd, **settings, **QUIET)
        return student.velocity.norm().item()

    assert moved(0.25) == pytest.approx(0.25, rel=1e-4)
    assert moved(None) == pytest.approx(200 / 3 * math.sqrt(3), rel=1e-4)  # the gradient of the mean over features


def test_averaged_weights():
    """The returned weights are the moving average of the trained ones, whose decay grows as (1 + n) / (10 + n)."""
    trail = []

    class Following(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            trail.append(self.param_groups[0]["params"][0].detach().clone())

    def train(ema):
        student = ConstantField(torch.zeros(3))
        teacher, schedule = ConstantField(torch.ones(3)), schedule_on(even_grid(4), 0, 4)
        settings = dict(noise=(3,), iterations=30, warmup=0, bank=8, batch=8, lr=0.05, init="keep", ema=ema)
        following = functools.partial(Following, lr=0.0)
        result = fk.straighten(student, teacher, schedule, optimizer=following, **settings, **QUIET)
        return student, result.student

    student, last = train(None)
    assert last is student
    assert torch.equal(last.velocity, trail[-1])
    trail.clear()
    student, averaged = train(0.9)
    assert averaged is not student
    assert not averaged.training
    average = trail[0].double()
    for n, weights in enumerate(trail[1:], start=1):
        average = torch.lerp(weights.double(), average, min(0.9, (1 + n) / (10 + n)))
    assert torch.allclose(averaged.velocity.double(), average, rtol=1e-5)
    assert torch.equal(student.velocity, trail[-1])


OWN_STEPS = {
    "acceleration": lambda: fk.Acceleration(*(fk.VelocityField(nn.Linear(k, 2), time_column=True) for k in (3, 5))),
    "noise": lambda: fk.NoisePrediction(fk.VelocityField(nn.Linear(3, 2), time_column=True)),
    "average_velocity": lambda: fk.AverageVelocity.from_velocity(ResidualMLP(2, 8, 1, 8)),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("own", OWN_STEPS)
def test_students_with_steps_of_their_own_learn_by_their_own_target(own, target):
    """Another would train a part of them, or a velocity that nothing samples."""
    schedule = fk.Schedule([0, 0.5, 1])
    schedule = fk.Solver.euler(schedule) if target in ("solver", "endpoint") else schedule
    objective = fk.StraightenLoss(schedule, target=target, teacher=lambda x, t: -x)
    if own == target:
        objective.expect_student(OWN_STEPS[own]())
        return
    with pytest.raises(TypeError, match=r"^student: expected "):
        objective.expect_student(OWN_STEPS[own]())


COMPOSITES = {
    "straight noise": lambda: fk.NoisePrediction(OWN_STEPS["noise"]().net, "straight"),
    "blockwise": lambda: fk.Blockwise(OWN_STEPS["noise"]().net, fk.Schedule([0, 0.5, 1])),
    "acceleration": OWN_STEPS["acceleration"],
}


@pytest.mark.parametrize("kind", COMPOSITES)
def test_times_that_a_student_cannot_have(kind):
    student, x = COMPOSITES[kind](), torch.ones(4, 2)
    for t in (torch.ones(3), torch.tensor(0.5), torch.ones(4, 1)):
        with pytest.raises(ValueError, match=r"^t: expected \[4\], a time for each sample, got a torch.float32 tensor"):
            student(x, t)
    assert student(x[:0], torch.ones(0)).shape == (0, 2)
    wrong = {"straight noise": (0.0, "times after 0"), "blockwise": (1.5, r"times in \[0, 1\]")}
    if kind in wrong:
        t, expected = wrong[kind]
        with pytest.raises(ValueError, match=rf"^t: expected {expected}.*, got {t:g}$"):
            student(x, torch.tensor([0.5, t, 0.5, 0.5]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_average_of_low_precision_moves(dtype):
    """By steps that are less than the rounding of its weights, of which the sum is not."""
    net = nn.Linear(20, 30).to(dtype)
    average = Average(net, 0.999)
    by_hand = [p.detach().double() for p in net.parameters()]
    for n in range(3000):
        with torch.no_grad():
            for p in net.parameters():
                p.fill_(1 + n % 7 / 16)
        average.update()
        rate = min(0.999, (1 + n) / (10 + n)) if n else 0
        by_hand = [rate * a + (1 - rate) * p.double() for a, p in zip(by_hand, net.parameters(), strict=True)]
    for own, expected in zip(average.weights.values(), by_hand, strict=True):
        torch.testing.assert_close(own.double(), expected.detach(), rtol=1e-5, atol=0)


def test_a_checkpoint_of_before_whose_average_is_of_low_precision_goes_on(tmp_path):
    class Low(Affine):
        def forward(self, x, t):
            return super().forward(x.bfloat16(), t.bfloat16())

    path, schedule = tmp_path / "run.pt", schedule_on(even_grid(20), 0, 20)
    settings = dict(noise=(3,), iterations=20, warmup=0, bank=8, batch=8, init="keep", checkpoint=path)
    run = lambda: fk.straighten(Low().bfloat16(), Affine(0.5, 1.0), schedule, **settings, **QUIET).student  # noqa: E731
    first = run()
    saved = read_checkpoint(path)
    assert saved["average"]["module.p"].dtype == torch.float32
    average = {k: v.bfloat16() if v.is_floating_point() else v for k, v in saved["average"].items()}
    write_checkpoint(path, {k: v for k, v in saved.items() if k != SUM} | {"average": average})
    again = run()
    assert again.p.dtype == torch.bfloat16
    assert again.p.item() == first.p.item() != 0


@pytest.mark.parametrize("ema", [None, 0.9])
def test_the_teacher_is_never_touched(ema):
    teacher = small_net().eval()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    settings = dict(noise=(4,), iterations=10, bank=16, batch=8, refresh=4, lr=0.01, ema=ema)
    result = fk.straighten(None, teacher, schedule_on(even_grid(8), 0, 2, 8), **settings, **QUIET)
    for key, value in teacher.state_dict().items():
        assert torch.equal(value, before[key])
    assert all(p.grad is None for p in teacher.parameters())
    assert not teacher.training
    assert not {id(p) for p in teacher.parameters()} & {id(p) for p in result.student.parameters()}
    assert not torch.equal(result.student.output.weight, teacher.output.weight)
    assert not result.student.training


def test_a_student_on_the_memory_of_the_teachers_weights_is_refused():
    """As `assign=True` makes it: a step of one would be one of the other. Frozen weights may be shared so."""
    teacher, student, schedule = small_net(), small_net(1), schedule_on(even_grid(8), 0, 2, 8)
    student.load_state_dict(teacher.state_dict(), assign=True)
    settings = dict(noise=(4,), iterations=1, bank=16, batch=8, init="keep", **QUIET)
    with pytest.raises(
        ValueError, match=r"^student: expected weights of its own .*got \d+ parameters of the teacher's"
    ):
        fk.straighten(student, teacher, schedule, **settings)
    student.requires_grad_(False)
    student.output.weight = nn.Parameter(teacher.output.weight.detach().clone())
    fk.straighten(student, teacher, schedule, **settings)


class Labelled(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mix = nn.Embedding(3, 4), nn.Linear(4, 4)

    def forward(self, x, t, label):
        return self.mix(x + self.embed(label))


def test_guidance_is_distilled_into_an_unguided_student():
    teacher = fk.VelocityField(
        Labelled(),
        conditioning={"label": torch.arange(12) % 2},
        unconditional={"label": torch.tensor([2])},
        guidance=3.0,
    )
    noise, schedule = normal(12, 4), schedule_on(even_grid(8), 0, 4, 8)
    start = fk.straighten(None, teacher, schedule, noise=noise, iterations=1, lr=1e-30, ema=None, **QUIET)
    assert isinstance(start.student, fk.VelocityField)
    assert not start.student.is_guided
    for key, value in teacher.net.state_dict().items():
        assert torch.equal(start.student.net.state_dict()[key], value)
    result = fk.straighten(
        None, teacher, schedule, noise=noise, iterations=200, batch=24, lr=1e-2, warmup=0, ema=None, **QUIET
    )
    target = fk.rollout(teacher, noise, 8).x[-1]
    errors = [(fk.sample(v, noise, schedule) - target).square().mean() for v in (start.student, result.student)]
    assert errors[1] < 0.2 * errors[0]
    assert teacher.guidance == 3.0


# ---- where the student starts ----


def starting_weights(student, teacher, init):
    settings = dict(noise=(4,), iterations=1, lr=1e-30, bank=4, batch=4, ema=None, init=init, **QUIET)
    return fk.straighten(student, teacher, schedule_on(even_grid(4), 0, 4), **settings).student


def test_init_variants():
    teacher, other = small_net(1), small_net(2)
    weights = {k: v.clone() for k, v in other.state_dict().items()}

    def equal(net, state):
        return all(torch.equal(value, state[key]) for key, value in net.state_dict().items())

    for init in (None, "teacher"):
        assert equal(starting_weights(small_net(3), teacher, init), teacher.state_dict())
        assert equal(starting_weights(None, teacher, init), teacher.state_dict())
    assert equal(starting_weights(small_net(2), teacher, "keep"), weights)
    assert equal(starting_weights(small_net(3), teacher, weights), weights)
    assert equal(starting_weights(None, teacher, weights), weights)
    assert equal(starting_weights(small_net(2), ElementwiseField(), None), weights)  # a teacher without any
    assert equal(
        starting_weights(fk.VelocityField(small_net(3)), fk.VelocityField(teacher), None).net, teacher.state_dict()
    )
    assert equal(other, weights)


@pytest.mark.parametrize("init", [None, "teacher", "state"])
def test_weights_that_do_not_fit(init):
    teacher = small_net()
    student = ResidualMLP(4, width=8, blocks=1, time_width=8)
    before = {k: v.clone() for k, v in student.state_dict().items()}
    name = "init" if init == "state" else "student"
    with pytest.raises(ValueError, match=rf"^{name}: expected weights that fit the student.* of shape .* for "):
        starting_weights(student, teacher, teacher.state_dict() if init == "state" else init)
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
    with pytest.raises(ValueError, match=r"^init: expected weights that fit the student.*shape none"):
        starting_weights(small_net(), teacher, {})


# ---- checkpoints ----

RUN = dict(iterations=24, bank=24, batch=8, lr=1e-2, warmup=4, log_every=3, noise=(4,), seed=3, **QUIET)
SOLVER = dict(schedule=fk.Solver.adams_bashforth(even_grid(6)[[0, 2, 6]]), target="solver", grid=6, rollout_every=6)
ENDPOINT = SOLVER | dict(target="endpoint")
VARIANTS = {
    "plain": {},
    "refresh": dict(refresh=5),
    "refresh at the checkpoint": dict(refresh=7),
    "uniform u": dict(t_sampling="uniform"),
    "no average": dict(ema=None),
    "fixed bank": dict(noise=normal(24, 4, seed=8)),
    "reflow": dict(target="reflow", t_sampling="ten", weighting="per_sample_normalised"),
    "distill": dict(target="distill", loss="cauchy"),
    "acceleration": dict(target="acceleration", initial_speed=1.2, init="keep"),
    "noise": dict(target="noise", compared="noise", loss="huber_per_element", init="keep"),
    "annealed": dict(target="annealed_reflow"),
    "blockwise": dict(target="blockwise", t_sampling="uniform"),
    "functions": dict(
        t_sampling=lambda n, g: torch.rand(n, generator=g), loss=lambda v, w: (v - w).abs().flatten(1).amax(1)
    ),
    "next_knot": dict(target="next_knot", substeps=3, loss="cauchy", weighting=[1.0, 2.0], refresh=5),
    "velocity_matching": dict(target="velocity_matching"),
    "on_policy": dict(target="on_policy", rollout_every=6),
    "on_policy, refreshed": dict(target="on_policy", rollout_every=4, refresh=5, t_sampling="u_shaped", loss="cauchy"),
    "solver": SOLVER,
    "solver, refreshed": SOLVER | dict(rollout_every=4, refresh=5),
    "endpoint": ENDPOINT,
    "endpoint, refreshed": ENDPOINT | dict(refresh=5, loss="cauchy"),
    "huber and weights": dict(loss="huber", weighting=[1.0, 2.0], refresh=4, t_sampling="uniform"),
    "momentum": dict(optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
}

STUDENT_OF = {  # that variants train
    "acceleration": lambda net: fk.Acceleration(net, Scaled()),
    "noise": lambda net: fk.NoisePrediction(net),
    "blockwise": lambda net: fk.Blockwise(net, schedule_on(even_grid(6), 0, 2, 6)),
}
TWICE = dict.fromkeys(  # evaluations of the student an iteration
    ("acceleration", "next_knot", "velocity_matching", "endpoint", "endpoint, refreshed"), 2
)


class Scaled(nn.Module):
    """Of x and what is joined to it."""

    def __init__(self):
        super().__init__()
        self.p, self.q = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(0.1))

    def forward(self, x, t):
        x, v0 = x.chunk(2, 1)
        return self.p * x + self.q * v0


class Stopped(Exception):
    pass


def stop_after(calls, how=Stopped):
    """A pre-forward hook that raises on a later call in training mode."""
    left = [calls]

    def hook(module, _):
        left[0] -= module.training
        if left[0] < 0:
            raise how

    return hook


def same_result(a, b):
    there = b.student.state_dict()
    weights = all(
        torch.equal(v, there[k]) if isinstance(v, torch.Tensor) else repr(v) == repr(there[k])
        for k, v in a.student.state_dict().items()
    )
    return weights and json.dumps(a.history) == json.dumps(b.history)  # NaN equals NaN here


def trained(student=None, torch_seed=7, **settings):
    torch.manual_seed(torch_seed)
    settings = RUN | dict(schedule=schedule_on(even_grid(6), 0, 2, 6)) | settings
    return fk.straighten(student or small_net(1), small_net(0).eval(), **settings)


@pytest.mark.parametrize(
    ("variant", "dropout"),
    [(name, 0.3) for name in VARIANTS] + [(name, 0.0) for name in ("plain", "refresh", "solver")],  # with another init
)
def test_resuming_is_bit_for_bit(tmp_path, variant, dropout):
    def student(seed):
        return STUDENT_OF.get(variant, lambda net: net)(small_net(seed, dropout))

    init = dict(init="keep") if dropout else {}
    settings = VARIANTS[variant] | init
    whole = trained(student(1), **settings)
    path = tmp_path / "run.pt"
    settings |= dict(checkpoint=path, checkpoint_every=7)
    for calls in (11, 10):  # a trial, then stopped in iterations 10 and 16, after checkpoints at 7 and 14
        net = student(5 if path.exists() else 1)  # its weights are the checkpoint's on resuming
        net.register_forward_pre_hook(stop_after(calls * TWICE.get(variant, 1)))
        with pytest.raises(Stopped):
            trained(net, **settings)
        assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]
    resumed = trained(student(6), torch_seed=1234, **settings)
    assert same_result(whole, resumed)
    again = trained(student(6), **settings)  # a finished run is only loaded
    assert same_result(whole, again)


def test_checkpoints_do_not_change_the_run(tmp_path):
    assert same_result(trained(), trained(checkpoint=tmp_path / "run.pt", checkpoint_every=1))


def test_starting_anew(tmp_path):
    path = tmp_path / "run.pt"
    trained(checkpoint=path, iterations=3)
    assert same_result(trained(checkpoint=path, resume=False), trained())
    assert same_result(trained(checkpoint=str(path)), trained())


def test_ctrl_c_leaves_a_checkpoint_that_resumes(tmp_path):
    path = tmp_path / "run.pt"
    student = small_net(1)
    student.register_forward_pre_hook(stop_after(13, KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        trained(student, checkpoint=path, checkpoint_every=5)
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]
    assert torch.load(path, weights_only=True)["iteration"] == 10
    assert same_result(trained(checkpoint=path, checkpoint_every=5), trained())


@pytest.mark.parametrize("failing", ["half written", "rename"])
def test_a_crash_while_writing_leaves_the_last_checkpoint(tmp_path, monkeypatch, failing):
    path = tmp_path / "run.pt"
    saves, whole_save, whole_replace = [0], torch.save, Path.replace

    def save(state, target):
        saves[0] += Path(target).suffix == ".partial"  # a trial of the format is none
        if failing == "half written" and saves[0] == 3:
            Path(target).write_bytes(b"PK half")
            raise KeyboardInterrupt
        whole_save(state, target)

    def replace(self, target):
        if failing == "rename" and saves[0] == 3:
            raise KeyboardInterrupt
        return whole_replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        patch.setattr(Path, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            trained(checkpoint=path, checkpoint_every=5)
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]
    assert torch.load(path, weights_only=True)["iteration"] == 10
    assert same_result(trained(checkpoint=path, checkpoint_every=5), trained())


def test_kill_in_the_middle(tmp_path):
    """kill -9 in an iteration, and again while a checkpoint is being written."""
    path = tmp_path / "run.pt"
    program = """
        import os, signal, sys
        sys.path.insert(0, sys.argv[1])
        import torch
        torch.set_num_threads(1)
        from test_straighten import small_net, trained

        def die(*_):
            os.kill(os.getpid(), signal.SIGKILL)

        def hook(*_):
            calls[0] += 1
            if calls[0] == 13:
                die()

        def save(state, target):
            whole_save(state, target)
            if state["iteration"] == 15:
                os.truncate(target, 1000)
                die()

        calls, whole_save = [0], torch.save
        for where in ("iteration", "write"):  # each in a process that begins with what is imported here
            child = os.fork()
            if not child:
                student = small_net(1, 0.2)
                if where == "iteration":
                    student.register_forward_pre_hook(hook)
                else:
                    torch.save = save
                trained(student, checkpoint=sys.argv[2], checkpoint_every=5, refresh=6, init="keep")
                os._exit(0)
            _, ended = os.waitpid(child, 0)
            print(where, os.WTERMSIG(ended), torch.load(sys.argv[2], weights_only=True)["iteration"])
    """
    torch.set_num_threads(1)  # as there: OpenMP has one thread in a process that was forked
    command = [sys.executable, "-c", textwrap.dedent(program), str(Path(__file__).parent), str(path)]
    done = subprocess.run(command, timeout=120, capture_output=True, env=os.environ, text=True)
    assert done.stdout == f"iteration {signal.SIGKILL:d} 10\nwrite {signal.SIGKILL:d} 10\n", done.stderr
    assert torch.load(path, weights_only=True)["iteration"] == 10
    settings = dict(checkpoint_every=5, refresh=6, init="keep")
    resumed = trained(small_net(4, 0.2), checkpoint=path, **settings)
    assert same_result(resumed, trained(small_net(1, 0.2), **settings))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(lr=2e-2), r"lr = 0.02.*got lr = 0.01"),
        (dict(held_out=3), r"held_out = 3.*got held_out = 'nothing'"),
        (dict(t_sampling="uniform"), r"t_sampling = 'uniform'.*got t_sampling = 'start'"),
        (dict(bank=25), r"bank = 25.*got bank = 24"),
        (dict(seed=4), r"seed = 4.*got seed = 3"),
        (dict(weighting=[1, 2]), r"weighting = \[1.0, 2.0\].*got weighting = None"),
        (dict(ema=None), r"ema = None.*got ema = 0.999"),
        (dict(noise=(4, 1)), r"noise = '\[4, 1\]'.*got noise = "),
        (dict(noise=torch.ones(24, 4), seed=3), r"noise = '\[24, 4\] \w+'.*got noise = "),
    ],
)
def test_a_checkpoint_of_another_run(tmp_path, change, message):
    path = tmp_path / "run.pt"
    trained(checkpoint=path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"^checkpoint: expected one of this run .*{message}"):
        trained(checkpoint=path, **change)
    assert path.read_bytes() == before


def test_a_setting_that_came_later(tmp_path, monkeypatch):
    """Checkpoints of before it go on with its default, and one that states it with no other value."""

    @dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
    class Later(Settings):
        power: float = 2.0

    def resumed(path, run, **change):
        with monkeypatch.context() as patch:
            if run is not Settings:
                patch.setattr(settings_module, "SHARED", (*SHARED, "power"))
            patch.setattr(straighten_module, "Settings", functools.partial(run, **change))
            return trained(checkpoint=path)

    before, after = tmp_path / "before.pt", tmp_path / "after.pt"
    result = trained(checkpoint=before)
    assert same_result(resumed(before, Later), result)
    with pytest.raises(
        ValueError, match=r"^checkpoint: expected one of this run \(power = 3.0\).*got power = 'nothing'"
    ):
        resumed(before, Later, power=3.0)
    resumed(after, Later, power=3.0)
    assert same_result(resumed(after, Later, power=3.0), result)
    for run in (Later, Settings):
        with pytest.raises(ValueError, match=r"^checkpoint: expected one of this run .*got power = 3.0"):
            resumed(after, run)


def test_a_checkpoint_of_before_names_were_changed(tmp_path):
    path, settings = tmp_path / "run.pt", dict(t_sampling="uniform", weighting=[1.0, 2.0], checkpoint_every=10)
    student = small_net(1)
    student.register_forward_pre_hook(stop_after(15))
    with pytest.raises(Stopped):
        trained(student, checkpoint=path, **settings)
    saved = {k: v for k, v in read_checkpoint(path).items() if k not in ("format", "version")}
    saved["setting"]["u"], saved["setting"]["weight"] = (saved["setting"].pop(k) for k in ("t_sampling", "weighting"))
    write_checkpoint(path, saved)
    with pytest.raises(ValueError, match=r"t_sampling = 'start'.*got t_sampling = 'uniform'"):
        trained(checkpoint=path, weighting=[1.0, 2.0])
    assert same_result(trained(checkpoint=path, **settings), trained(**settings))


def test_a_checkpoint_of_another_teacher_or_schedule(tmp_path):
    path = tmp_path / "run.pt"
    trained(checkpoint=path)
    settings = RUN | dict(checkpoint=path)
    with pytest.raises(ValueError, match=r"^checkpoint: .*teacher = "):
        fk.straighten(small_net(1), small_net(9), schedule_on(even_grid(6), 0, 2, 6), **settings)
    with pytest.raises(ValueError, match=r"^checkpoint: .*times = "):
        fk.straighten(small_net(1), small_net(0), schedule_on(even_grid(6), 0, 3, 6), **settings)
    with pytest.raises(ValueError, match=r"^checkpoint: expected weights that fit the student"):
        trained(ResidualMLP(4, 8, 1, 8), checkpoint=path, init="keep")


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.99])
def test_truncated_checkpoint(tmp_path, kept):
    path = tmp_path / "run.pt"
    trained(checkpoint=path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(
        ValueError, match=r"^checkpoint: expected a training checkpoint, .*run.pt is not one, or damaged \(.*truncated"
    ):
        trained(checkpoint=path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weight": torch.ones(2)}, "truncated or not one"),
        (torch.ones(2), "truncated or not one"),
        ({"format": "another"}, "a file of format 'flowkernels.straighten', got .* of format 'another'"),
        ({"format": "flowkernels.straighten", "version": 3}, "version 1 or 2, got .* of version 3"),
    ],
)
def test_foreign_checkpoint(tmp_path, content, message):
    path = tmp_path / "run.pt"
    torch.save(content, path)
    with pytest.raises(ValueError, match=f"^checkpoint: expected .*{message}"):
        trained(checkpoint=path)


def test_checkpoint_in_a_missing_folder(tmp_path):
    with pytest.raises(ValueError, match=r"^checkpoint: expected a path in a folder that exists"):
        trained(checkpoint=tmp_path / "missing" / "run.pt")


def test_settings_as_numpy_numbers_resume(tmp_path):
    path = tmp_path / "run.pt"
    settings = dict(lr=np.float64(1e-2), ema=np.float32(0.5), clip=np.float64(1), warmup=np.int64(4), checkpoint=path)
    first = trained(**settings)
    assert same_result(trained(**settings), first)


# ---- students and optimisers of all kinds ----


class Normed(nn.Module):
    """A network with a norm of its weights, used before: of the old kinds, which hold what they compute."""

    def __init__(self, norm, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.last = norm(nn.Linear(4, 8)), nn.Linear(8, 4)
        self(torch.ones(2, 4), torch.zeros(2))

    def forward(self, x, t):
        return self.last(torch.tanh(self.first(x)))


class Extra(nn.Module):
    def __init__(self, state, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.net, self.state = small_net(seed), state

    def forward(self, x, t):
        return self.net(x, t)

    def get_extra_state(self):
        return self.state

    def set_extra_state(self, state):
        self.state = state


def old(norm):
    def make(layer):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return norm(layer)

    return make


STUDENTS = {
    "weight_norm": lambda seed: Normed(old(nn.utils.weight_norm), seed),
    "spectral_norm": lambda seed: Normed(old(nn.utils.spectral_norm), seed),
    "weight_norm, parametrised": lambda seed: Normed(nn.utils.parametrizations.weight_norm, seed),
    "spectral_norm, parametrised": lambda seed: Normed(nn.utils.parametrizations.spectral_norm, seed),
    "extra state": lambda seed: Extra({"of": [1, 2.5, "x"], "kept": torch.arange(3)}, seed),
    "compiled": lambda seed: torch.compile(small_net(seed), backend="eager"),
    "compiled in place": lambda seed: compiled_in_place(small_net(seed)),
    "a compiled block": lambda seed: DropoutNet(torch.compile(small_net(seed), backend="eager"), 0.0),
    "a compiled field": lambda seed: fk.VelocityField(torch.compile(small_net(seed), backend="eager")),
    "DataParallel": lambda seed: nn.DataParallel(small_net(seed)),
}


def compiled_in_place(net):
    net.compile(backend="eager")
    return net


@pytest.mark.parametrize("ema", [None, 0.9])
@pytest.mark.parametrize("kind", STUDENTS)
def test_students(kind, ema, tmp_path):
    """They train, are copied, and resume bit for bit; those that wrap a network as that network does."""
    path, make = tmp_path / "run.pt", STUDENTS[kind]
    settings = dict(init="keep", ema=ema, iterations=9, checkpoint_every=3)
    schedule, teacher = schedule_on(even_grid(6), 0, 2, 6), small_net(0).eval()

    def run(student, **more):
        return fk.straighten(student, teacher, schedule, **(RUN | settings | more))

    whole = run(make(1))
    student = make(1)
    student.register_forward_pre_hook(stop_after(6 if ema is None or "ompiled" not in kind else 5))
    with pytest.raises(Stopped):
        run(student, checkpoint=path)
    resumed = run(make(5), checkpoint=path)
    assert same_result(whole, resumed)
    copied = fk.straighten(None, make(2).eval(), schedule, **(RUN | settings))
    assert all(map(math.isfinite, copied.history["loss"]))
    if "compiled" in kind or kind == "DataParallel":
        plain = {"a compiled block": DropoutNet(small_net(1), 0.0), "a compiled field": fk.VelocityField(small_net(1))}
        assert run(plain.get(kind, small_net(1))).history == whole.history
        saved = torch.load(path, weights_only=True)["student"]
        assert not any("_orig_mod" in key or key.startswith("module.") for key in saved)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module."])
def test_a_state_dict_of_a_wrapped_network(prefix):
    state = {f"{prefix}{key}": value for key, value in small_net(2).state_dict().items()}
    found = starting_weights(small_net(3), small_net(1), state)
    assert all(torch.equal(v, small_net(2).state_dict()[k]) for k, v in found.state_dict().items())


class OtherShape(ConstantField):
    def forward(self, x, t):
        return super().forward(x, t)[:, :2]


class Detached(ConstantField):
    def forward(self, x, t):
        return super().forward(x, t).detach()


class Integers(ConstantField):
    def forward(self, x, t):
        return super().forward(x, t).long()


def of_inference_mode():
    with torch.inference_mode():
        return small_net(1)


FIRST = {
    "another shape": (dict(student=OtherShape(torch.zeros(4))), r"^student: expected a velocity of x's shape"),
    "no gradient": (dict(student=Detached(torch.zeros(4))), r"^student: expected a velocity with a gradient"),
    "integers": (dict(student=Integers(torch.zeros(4))), r"^student: expected a velocity with a gradient"),
    "inference mode": (dict(student=of_inference_mode()), r"^student: expected weights made outside of torch.inf"),
    "no values": (dict(student=small_net().to("meta")), r"^student: expected weights .*on the meta device"),
    "a wrapped field": (
        dict(student=nn.DataParallel(fk.VelocityField(small_net()))),
        r"^student: expected VelocityField\(torch.compile\(net\), ...\)",
    ),
    "other parameters": (
        dict(optimizer=lambda p: torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)),
        r"^optimizer: expected a function that returns a torch.optim.Optimizer .*got one of 1 other parameters",
    ),
    "not initialised": (dict(student=nn.LazyLinear(4)), r"^student: expected weights .*not initialised"),
    "losses of nothing": (dict(loss=lambda v, w: v.mean()), r"^loss: expected a function .* one loss for each sample"),
    "a loss of numbers": (dict(loss=lambda v, w: v.detach()[:, 0]), r"^loss: expected a function differentiable in v"),
    "a closure": (dict(optimizer=torch.optim.LBFGS), r"^optimizer: expected one whose step takes no closure"),
    "sparse gradients": (
        dict(optimizer=torch.optim.SparseAdam),
        r"^optimizer: expected one for gradients that are not",
    ),
    "no optimiser": (dict(optimizer=lambda p: None), r"^optimizer: "),
    "state that is no data": (dict(student=Extra(threading.Lock(), 1)), r"^(checkpoint|student): expected a "),
    "state of an object": (dict(student=Extra(Path("x"), 1)), r"^checkpoint: expected a student and an optimiser"),
    "integers for weights": (
        dict(init={k: v.long() for k, v in small_net().state_dict().items()}),
        r"^init: expected weights that fit .* of torch.int64 for torch.float32",
    ),
}


@pytest.mark.parametrize("first", FIRST)
def test_what_can_fail_is_tried_before_the_teacher_runs(first, tmp_path):
    change, message = FIRST[first]
    calls = []

    def teacher(x, t):
        calls.append(1)
        return x

    settings = dict(student=small_net(1), init="keep", checkpoint=tmp_path / "run.pt") | change
    student = settings.pop("student")
    with pytest.raises((ValueError, TypeError), match=message):
        fk.straighten(student, teacher, schedule_on(even_grid(6), 0, 2, 6), **(RUN | settings))
    assert calls == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("state", [nn.utils.parametrize.cached, torch.autograd.forward_ad.dual_level])
def test_states_in_which_nothing_can_be_trained(state):
    with state(), pytest.raises(ValueError, match=r"^student: expected training outside of .*(cached|dual_level)"):
        trained()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("file write failed")])
def test_a_full_disk_does_not_end_the_training(error, tmp_path, monkeypatch):
    path, whole_save = tmp_path / "run.pt", torch.save

    def save(state, target):
        if Path(target).suffix == ".partial" and state["iteration"] > 10:
            Path(target).write_bytes(b"PK half")
            raise error
        whole_save(state, target)

    monkeypatch.setattr(torch, "save", save)
    told = r"^checkpoint: iteration \d+ could not be written \(.*\); .*run.pt is kept"
    with pytest.warns(UserWarning, match=told) as seen:
        result = trained(checkpoint=path, checkpoint_every=5)
    assert {w.filename for w in seen} == {__file__}
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]
    assert torch.load(path, weights_only=True)["iteration"] == 10
    assert same_result(result, trained())
    assert same_result(trained(checkpoint=path, checkpoint_every=5), result)


# ---- what a resumed run shares ----


def rows_field(value, **settings):
    rows = torch.full((24, 4), value)
    return fk.VelocityField(RowField(), conditioning={"rows": rows}, **settings)


UNCHANGED = small_net(0).eval()
GUIDED = dict(unconditional={"rows": torch.zeros(1, 4)})
FIXED = dict(noise=normal(24, 4), init="keep")
CHANGES = {
    "conditioning": (dict(velocity=rows_field(1.0)), dict(velocity=rows_field(2.0)), "teacher_field"),
    "guidance": (
        *(dict(velocity=rows_field(1.0, guidance=g, **GUIDED)) for g in (2.0, 3.0)),
        "teacher|teacher_field",
    ),
    "unconditional": (
        dict(velocity=rows_field(1.0, guidance=2.0, **GUIDED)),
        dict(velocity=rows_field(1.0, guidance=2.0, unconditional={"rows": torch.ones(1, 4)})),
        "teacher_field",
    ),
    "noise": (FIXED, FIXED | dict(noise=normal(24, 4, seed=2)), "noise"),
    "optimiser": ({}, dict(optimizer=lambda p: torch.optim.SGD(p, lr=0.1)), "optimizer"),
    "its settings": (
        *(dict(optimizer=lambda p, b=b: torch.optim.Adam(p, lr=0.1, betas=(b, 0.9))) for b in (0.8, 0.9)),
        "optimizer",
    ),
    "dropout": (dict(student=lambda s: DropoutNet(small_net(s), 0.1)),
                dict(student=lambda s: DropoutNet(small_net(s), 0.2)), "student"),
    "the student's time": (dict(student=lambda s: fk.VelocityField(small_net(s))),
                           dict(student=lambda s: fk.VelocityField(small_net(s), time_scale=2)), "student_field"),
}  # fmt: skip


def part_of_a_run(path, student=small_net, velocity=UNCHANGED, **settings):
    settings = RUN | dict(init="keep", iterations=4, checkpoint=path) | settings
    return fk.straighten(student(1), velocity, schedule_on(even_grid(6), 0, 2, 6), **settings)


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_with_another(change, tmp_path):
    first, then, key = CHANGES[change]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        part_of_a_run(tmp_path / "run.pt", **FIXED | first)
        part_of_a_run(tmp_path / "run.pt", **FIXED | first)
    with pytest.raises(ValueError, match=rf"^checkpoint: expected one of this run \(({key}) = .*run.pt"):
        part_of_a_run(tmp_path / "run.pt", **FIXED | then)


def test_a_noise_function_is_told_by_what_it_draws(tmp_path):
    def draws(scale):
        return lambda n, generator: scale * torch.randn(n, 4, generator=generator)

    student, path = small_net(1), tmp_path / "run.pt"
    student.register_forward_pre_hook(stop_after(8))
    with pytest.raises(Stopped):
        trained(student, checkpoint=path, checkpoint_every=3, noise=draws(1.0), refresh=4)
    with pytest.raises(ValueError, match=r"^noise: expected a function that draws what it drew before"):
        trained(small_net(1), checkpoint=path, noise=draws(2.0), refresh=4)
    resumed = trained(small_net(1), checkpoint=path, checkpoint_every=3, noise=draws(1.0), refresh=4)
    assert same_result(resumed, trained(noise=draws(1.0), refresh=4))


def test_a_teacher_that_cannot_be_read_is_told(tmp_path):
    settings = dict(velocity=lambda x, t: -x)
    part_of_a_run(tmp_path / "run.pt", **settings)
    told = r"^checkpoint: expected the teacher that .*run.pt was made with, .* unknown"
    with pytest.warns(UserWarning, match=told) as seen:
        part_of_a_run(tmp_path / "run.pt", **settings)
    assert [w.filename for w in seen] == [__file__]


@pytest.mark.parametrize("wrap", [lambda net: torch.compile(net, backend="eager"), nn.DataParallel, fk.VelocityField])
def test_a_wrapped_teacher_is_the_same(wrap, tmp_path):
    part_of_a_run(tmp_path / "run.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        part_of_a_run(tmp_path / "run.pt", velocity=wrap(UNCHANGED))


def test_classes_of_the_package_keep_their_names_in_files():
    """A run goes on from a checkpoint of before its student's classes moved to other modules."""
    assert architecture(fk.VelocityField(ResidualMLP(4, 8, 1, 8))) == "1951b10f58678e93"


# ---- its parts ----


LOOPS = {
    "start": (schedule_on(even_grid(6), 0, 2, 6), dict(loss="huber", huber_c=0.1)),
    "uniform": (schedule_on(even_grid(6), 0, 2, 6), dict(t_sampling="uniform", weighting=[2.0, 0.5])),
    "reflow": (schedule_on(even_grid(6), 0, 2, 6), dict(target="reflow", loss="cauchy")),
    "solver": (SOLVER["schedule"], dict(target="solver")),
}


@pytest.mark.parametrize("case", LOOPS)
def test_a_loop_of_ones_own(case):
    """The bank and the loss in a bare loop of torch make the weights that `straighten` makes."""
    schedule, learned = LOOPS[case]
    settings = dict(iterations=8, bank=24, batch=8, seed=3, grid=6, **learned)
    teacher = small_net(0).eval()
    more = dict(noise=(4,), init="keep", ema=None, clip=None, warmup=0, decay="none", lr=0.1, optimizer=torch.optim.SGD)
    result = fk.straighten(small_net(1), teacher, schedule, **more, **settings, **QUIET)
    student, generator = small_net(1).train(), torch.Generator().manual_seed(3)
    objective = fk.StraightenLoss(schedule, **learned)
    rest = dict(fraction=1.0, seed=3, device=torch.device("cpu"), progress=False)
    bank = RunBank.of(24, teacher, objective, noise=(4,), grid=even_grid(6), batch=8, **rest)
    bank.draw(generator)
    bank.roll_out()
    objective.roll_out(student, bank.states)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    for _ in range(8):
        optimizer.zero_grad()
        objective(student, bank.sample(generator), generator).loss.backward()
        optimizer.step()
    there = result.student.state_dict()
    assert all(torch.equal(value, there[key]) for key, value in student.state_dict().items())


def test_what_a_gpu_draws_follows_from_the_generator_on_the_cpu():
    """Here a second device of the same kind stands for it: its draws, in turn, from seeds that a checkpoint keeps."""
    device, generator = torch.device("cpu:0"), torch.Generator().manual_seed(3)

    def drawn():
        return torch.randint(1000, (64,), generator=generator_on(device, generator)).tolist()

    state, first, second = generator.get_state(), drawn(), drawn()
    assert first != second
    generator.set_state(state)
    assert [drawn(), drawn()] == [first, second]
    assert generator_on(torch.device("cpu"), generator) is generator


# ---- bad input ----


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_the_iteration(value, tmp_path):
    path = tmp_path / "run.pt"

    class Failing(ConstantField):
        calls = 0

        def forward(self, x, t):
            self.calls += 1
            return super().forward(x, t) * (value if self.calls == 7 else 1)

    student = Failing(torch.zeros(4))
    with pytest.raises(ValueError, match=r"^student: expected a finite loss and gradient.*at iteration 6"):
        trained(student, init="keep", checkpoint=path, checkpoint_every=5)
    assert all(torch.isfinite(p).all() for p in student.parameters())
    assert torch.load(path, weights_only=True)["iteration"] == 5


def test_a_gradient_that_is_not_finite_names_the_iteration():
    class Steep(ConstantField):
        def forward(self, x, t):
            return super().forward(x, t) + (self.velocity - self.velocity.detach()).abs().sqrt()

    with pytest.raises(ValueError, match=r"^student: .*gradient norm (inf|nan) at iteration 0"):
        trained(Steep(torch.zeros(4)), init="keep")


@pytest.mark.parametrize(
    "answer", [lambda x: x[:, :1], lambda x: (x,), lambda x: None], ids=["shape", "tuple", "nothing"]
)
def test_a_student_that_returns_something_else(answer):
    class Wrong(ConstantField):
        def forward(self, x, t):
            return answer(super().forward(x, t))

    with pytest.raises(ValueError, match=r"^student: expected a velocity of x's shape \[8, 4\], got "):
        trained(Wrong(torch.zeros(4)), init="keep")


TEACHER = small_net(0).eval()
BAD = {
    "schedule": (dict(schedule=4), TypeError, r"^schedule: expected a Schedule, such as cal\[4\]: .*, got 4"),
    "no grid": (dict(schedule=Schedule.uniform(2)), ValueError, r"^grid: expected the teacher's fine grid"),
    "grid misses a knot": (dict(grid=7), ValueError, r"^grid: expected a grid that contains every time"),
    "iterations": (dict(iterations=0), ValueError, r"^iterations: expected at least 1, got 0"),
    "fraction": (dict(iterations=1.5), TypeError, r"^iterations: expected an integer, got 1.5"),
    "batch": (dict(batch=0), ValueError, r"^batch: "),
    "bank": (dict(bank=-1), ValueError, r"^bank: "),
    "log_every": (dict(log_every=0), ValueError, r"^log_every: "),
    "checkpoint_every": (dict(checkpoint_every=0), ValueError, r"^checkpoint_every: "),
    "refresh": (dict(refresh=0), ValueError, r"^refresh: "),
    "refresh of a tensor": (
        dict(refresh=2, noise=torch.ones(3, 4)),
        ValueError,
        r"^noise: expected a shape or a function",
    ),
    "target": (dict(target="best"), ValueError, r"^target: expected 'boss', 'reflow', .*, got best"),
    "t_sampling": (dict(t_sampling="end"), ValueError, r"^t_sampling: expected 'start', .* or 'ten', got end"),
    "t_sampling of a target": (
        dict(target="distill", t_sampling="uniform"),
        ValueError,
        r"^t_sampling: expected 'start' or None with target='distill', got uniform",
    ),
    "t_sampling too many": (
        dict(t_sampling=lambda n, g: torch.zeros(n + 1)),
        ValueError,
        r"^t_sampling: expected a function that returns n = 2 numbers in \[0, 1\]",
    ),
    "t_sampling outside": (dict(t_sampling=lambda n, g: torch.ones(n) + 1), ValueError, r"^t_sampling: .* in \[0, 1\]"),
    "t_sampling of nothing": (dict(t_sampling=lambda: 0), TypeError, r"^t_sampling: expected .* \(n, generator\)"),
    "loss": (dict(loss="l3"), ValueError, r"^loss: expected 'l2', 'huber', 'huber_per_element' or 'cauchy', got l3"),
    "loss of one": (dict(loss=lambda v: v), TypeError, r"^loss: expected .* a function \(v, target\)"),
    "rollout_every": (dict(rollout_every=0), ValueError, r"^rollout_every: "),
    "a solver": (dict(schedule=SOLVER["schedule"]), TypeError, r"^schedule: expected a Schedule, .*target='solver'"),
    "no solver": (dict(target="solver"), TypeError, r"^schedule: expected a Solver, .* for target='solver', got Sched"),
    "a solver to noise": (
        ENDPOINT | dict(schedule=fk.Solver.heun([0, 1 / 3, 1], inverse=True)),
        ValueError,
        r"^schedule: expected a solver from noise to data",
    ),
    "a solver of two stages": (
        SOLVER | dict(schedule=fk.Solver.heun([0, 1 / 3, 1])),
        ValueError,
        r"^schedule: expected a solver of one evaluation a step",
    ),
    "a solver that skips": (
        SOLVER | dict(schedule=fk.Solver([0, 1 / 3, 1], [0, 1 / 3], [[0.3, 0], [1, 0]])),
        ValueError,
        r"^schedule: expected a solver each of whose steps takes its last velocity",
    ),
    "a solver's grid": (SOLVER | dict(grid=None), ValueError, r"^grid: expected the teacher's fine grid"),
    "one sample for a solver": (SOLVER | dict(bank=1), ValueError, r"^bank: expected at least 2 "),
    "huber_c": (dict(huber_c=0), ValueError, r"^huber_c: expected a positive number, got 0"),
    "decay": (dict(decay="step"), ValueError, r"^decay: "),
    "lr": (dict(lr=0.0), ValueError, r"^lr: expected a positive number, got 0.0"),
    "lr nan": (dict(lr=math.nan), ValueError, r"^lr: "),
    "warmup": (dict(warmup=-1), ValueError, r"^warmup: "),
    "clip": (dict(clip=0.0), ValueError, r"^clip: expected a positive number or None"),
    "ema": (dict(ema=1.0), ValueError, r"^ema: expected a number in \[0, 1\) or None, got 1.0"),
    "seed": (dict(seed=0.5), TypeError, r"^seed: expected an integer, got 0.5"),
    "weights too few": (dict(weighting=[1.0]), ValueError, r"^weighting: expected 2 finite numbers >= 0"),
    "negative weight": (dict(weighting=[1.0, -1.0]), ValueError, r"^weighting: "),
    "weights of 0": (dict(weighting=[0.0, 0.0]), ValueError, r"^weighting: expected 2 .* >= 0 and not all 0"),
    "weight nan": (dict(weighting=[1.0, math.nan]), ValueError, r"^weighting: "),
    "init": (dict(init="random"), ValueError, r"^init: expected 'teacher', 'keep', a state dict or None"),
    "noise": (dict(noise=4), TypeError, r"^noise: expected a tensor, a shape or a function"),
    "noise of no dimension": (dict(noise=()), ValueError, r"^noise: expected a shape of at least one dimension"),
    "noise of size zero": (dict(noise=(0, 4)), ValueError, r"^noise: expected a shape .* each >= 1"),
    "noise function": (dict(noise=lambda n, g: torch.ones(n + 1, 4)), ValueError, r"^noise: .*returns n = 24 samples"),
    "noise function of NaN": (
        dict(noise=lambda n, g: torch.full((n, 4), math.nan)),
        ValueError,
        r"^noise\(n, generator\): expected finite values",
    ),
    "student": (dict(student=lambda x, t: x), TypeError, r"^student: expected an nn.Module or None"),
    "student without weights": (dict(student=ElementwiseField(), init="keep"), ValueError, r"^student: .*trainable"),
    "student is the teacher": (dict(student=TEACHER), ValueError, r"^student: expected weights of its own"),
    "student inside the teacher": (
        dict(student=TEACHER, velocity=fk.VelocityField(TEACHER)),
        ValueError,
        r"^student: expected weights of its own",
    ),
    "nothing to copy": (dict(student=None, velocity=lambda x, t: x), ValueError, r"^student: expected a module"),
    "no weights to start from": (
        dict(init="teacher", velocity=ElementwiseField()),
        ValueError,
        r"^init: .*with weights",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input(bad):
    change, error, message = BAD[bad]
    settings = RUN | dict(student=small_net(1), velocity=TEACHER, schedule=schedule_on(even_grid(6), 0, 2, 6)) | change
    calls = []
    hook = nn.modules.module.register_module_forward_pre_hook(lambda module, _: calls.append(module))
    try:
        with pytest.raises(error, match=message):
            fk.straighten(**settings)
    finally:
        hook.remove()
    assert calls == []
