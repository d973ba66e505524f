"""Watching a training: what is held out and measured, the best weights, callbacks, numbered checkpoints, and runs that
go on after their end."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from _flows import even_grid, normal
from test_optimizers import ScheduleFree
from test_straighten import (
    SOLVER,
    STUDENT_OF,
    VARIANTS,
    Stopped,
    same_result,
    schedule_on,
    small_net,
    stop_after,
    trained,
)
from torch import nn

import flowkernels as fk
from flowkernels.training.run import state
from flowkernels.training.run.bank import RunBank
from flowkernels.training.run.held_out import HeldOut
from flowkernels.training.run.numbered import numbered

F64 = torch.float64
QUIET = dict(progress=False)
PLAN = schedule_on(even_grid(6), 0, 2, 6)
PAIRS = fk.Pairs(normal(2, 24, 4, seed=5))
OF_PAIRS = dict(noise=None, target="reflow")


def pairs_of(n, generator):
    return fk.Pairs(torch.randn(2, n, 4, generator=generator))


WATCHED = {name: VARIANTS[name] for name in VARIANTS} | {
    "pairs": OF_PAIRS | dict(bank=PAIRS),
    "a function's pairs": OF_PAIRS | dict(bank=pairs_of),
    "average_velocity": dict(target="average_velocity"),
    "schedule-free": dict(optimizer=ScheduleFree),
}


def student_of(variant, seed=1, dropout=0.0):
    made = STUDENT_OF | {"average_velocity": fk.AverageVelocity.of_network}
    return made.get(variant, lambda net: net)(small_net(seed, dropout))


def same(a, b):
    return same_result(a, b) and json.dumps([a.evaluations, a.best]) == json.dumps([b.evaluations, b.best])


# ---- what is measured ----


@pytest.mark.parametrize("variant", WATCHED)
def test_watching_changes_nothing(variant, tmp_path):
    """With dropout, and a callback that draws, and puts the student into eval mode."""
    dropout = 0.0 if variant in ("acceleration", "average_velocity", "blockwise") else 0.3
    settings = WATCHED[variant] | dict(init="keep", held_out=5, iterations=12)
    plain = trained(student_of(variant, dropout=dropout), **settings)
    kinds = []

    def look(event):
        kinds.append(event.kind)
        torch.randn(3)
        event.student.eval()
        assert event.samples(4).shape == (4, 4)

    more = dict(evaluate_every=5, callbacks=[look], checkpoint=tmp_path / "run.pt", keep_checkpoints=2)
    watched = trained(student_of(variant, dropout=dropout), **settings, **more)
    assert same_result(plain, watched)
    assert watched.evaluations["iteration"] == [0, 5, 10, 12]
    assert kinds.count("evaluate") == 3
    assert plain.errors == watched.errors
    assert all(math.isfinite(e) and e > 0 for e in watched.evaluations["endpoint_error"])


class Counting(nn.Module):
    """Whose output follows how often it was called, in eval mode too."""

    def __init__(self):
        super().__init__()
        self.net = small_net(0)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("expanded", torch.zeros(1).expand(3))

    def forward(self, x, t):
        self.calls += 1
        return self.net(x, t) + 1e-3 * self.calls


def test_buffers_that_change_in_eval_mode_are_put_back():
    tell = dict(callbacks=[lambda event: event.student(normal(2, 4), torch.zeros(2)).sum().item()])
    settings = dict(init="keep", held_out=6, ema=None)
    alone, watched = (trained(Counting(), **settings, **how) for how in ({}, dict(evaluate_every=5) | tell))
    assert same_weights(alone.student, watched.student)
    assert alone.student.calls == watched.student.calls


class Overflowing(nn.Module):
    """Whose samples are not finite, before iteration 10."""

    def __init__(self):
        super().__init__()
        self.net = small_net(0)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, t):
        self.calls += self.training
        return self.net(x, t) * (1 if self.training or self.calls > 11 else torch.nan)


def test_a_student_whose_first_samples_are_not_finite(tmp_path):
    settings = dict(init="keep", held_out=6, evaluate_every=4, patience=6, ema=None, decay="none")
    whole = trained(Overflowing(), **settings)
    for iterations in (8, 24):
        resumed = trained(Overflowing(), **settings, iterations=iterations, checkpoint=tmp_path / "run.pt")
    assert json.dumps([resumed.errors, resumed.evaluations]) == json.dumps([whole.errors, whole.evaluations])
    assert [math.isnan(e) for e in whole.evaluations["endpoint_error"][:4]] == [True, True, True, False]
    assert math.isnan(whole.errors[0])
    assert whole.best >= 12


def test_the_numbers_are_those_of_what_is_returned():
    """Once more by a loop in float64, on the weights that are returned: the errors, the losses of each interval, and
    their standard errors."""
    teacher, noise = small_net(0).double().eval(), normal(24, 4, seed=6).double()
    result = fk.straighten(
        small_net(2).double(),
        teacher,
        PLAN,
        noise=noise,
        iterations=8,
        batch=8,
        held_out=7,
        evaluate_every=3,
        progress=False,
    )
    states = fk.rollout(teacher, noise[-7:], even_grid(6)).x[[0, 2, 6]]
    times, net = PLAN.times, result.student
    x, losses = states[0], []
    with torch.no_grad():
        for k, h in enumerate(times.diff()):
            t = times[k].expand(7)
            x = x + h * net(x, t)
            losses.append((net(states[k], t) - (states[k + 1] - states[k]) / h).square().mean(1))
    each = torch.stack([(x - states[-1]).square().sum(1), *losses])
    mean, stderr = each.mean(1), each.std(1) / 7**0.5
    found = {name: column[-1] for name, column in result.evaluations.items()}
    assert found["iteration"] == 8
    for names, expected in (
        (("endpoint_error", "interval_loss"), mean),
        (("endpoint_stderr", "interval_stderr"), stderr),
    ):
        got = torch.tensor([found[names[0]], *found[names[1]]], dtype=F64)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    assert result.errors == (result.evaluations["endpoint_error"][0], found["endpoint_error"])


SLICED = {
    "boss": dict(t_sampling="uniform"),
    "annealed_reflow": {},
    "velocity_matching": dict(substeps=2),
    "on_policy": {},
    "solver": dict(schedule=SOLVER["schedule"]),
}


@pytest.mark.parametrize("target", SLICED)
def test_slices_of_what_is_held_out_are_the_whole(target):
    """What the losses draw goes with the trajectory, whatever part of them is measured; and the states that a target
    keeps for the training stay."""
    settings = SLICED[target]
    schedule, more = settings.get("schedule", PLAN), {k: v for k, v in settings.items() if k != "schedule"}
    teacher, student = small_net(0).eval(), small_net(1).eval()
    objective = fk.StraightenLoss(schedule, target=target, teacher=teacher, **more)
    how = dict(noise=(4,), grid=even_grid(6), batch=5, fraction=1.0, held_out=9, seed=3, progress=False)
    bank = RunBank.of(24, teacher, objective, device=torch.device("cpu"), **how)
    bank.draw(torch.Generator().manual_seed(3))
    bank.roll_out()
    if objective.needs_roll_out:
        objective.roll_out(student, bank.states)
    before = objective.rolled_out
    held_out = HeldOut(bank, SimpleNamespace(objective=objective, seed=3, schedule=schedule, group=None))
    whole = held_out.interval_losses(student)
    assert whole.shape == (objective.knots.steps, 9)
    assert objective.rolled_out is before
    parts = [slice(0, 1), slice(1, 7), slice(7, 9)]
    losses = torch.cat([held_out.interval_losses(student, rows) for rows in parts], 1)
    torch.testing.assert_close(losses, whole, rtol=1e-4, atol=1e-7)
    errors = torch.cat([held_out.endpoint_errors(student, rows=rows) for rows in parts])
    torch.testing.assert_close(errors, held_out.endpoint_errors(student), rtol=1e-4, atol=1e-7)


def test_pairs_held_out_are_not_trained_on():
    """Those of a function are beside its batches; the last ones are never drawn."""
    aside = fk.Pairs(normal(2, 24, 4, seed=5), weight=torch.arange(1.0, 25.0))
    seen = {int(i) for s in range(60) for i in aside.batch(8, torch.Generator().manual_seed(s), held_out=5).sample}
    assert seen == set(range(19))
    assert aside.batch(held_out=5).sample.tolist() == list(range(19))
    result = trained(**OF_PAIRS, bank=aside, held_out=5, evaluate_every=24, ema=None)
    ends = fk.sample(result.student, aside.noise[-5:], PLAN)
    error = (ends - aside.data[-5:]).double().square().sum(1).mean().item()
    assert math.isclose(result.evaluations["endpoint_error"][-1], error, rel_tol=1e-6)


def test_each_interval_of_some_trajectories():
    bank = fk.TrajectoryBank(
        small_net(0).eval(), [PLAN, schedule_on(even_grid(6), 0, 3, 6)], noise=(4,), size=24, **QUIET
    )
    for store in (bank.fill(), fk.TrajectoryBank(small_net(0).eval(), PLAN, noise=(4,), size=24, **QUIET).fill()):
        batch = store.each(5, 8, PLAN)
        assert batch.interval.tolist() == [0, 1] * 3
        assert batch.sample.tolist() == [5, 5, 6, 6, 7, 7]
        states = store.states(PLAN)
        first = batch.states[0] if batch.ends else batch.states[batch.interval, batch.sample]
        assert torch.equal(first, states[batch.interval, batch.sample])


# ---- the best weights ----


STOPPING = dict(held_out=6, evaluate_every=3, iterations=60, lr=0.05, warmup=0, decay="none", init="keep")


@pytest.mark.parametrize("ema", [None, 0.5])
def test_patience_returns_the_best_weights(tmp_path, ema):
    path = tmp_path / "run.pt"
    settings = STOPPING | dict(checkpoint=path, ema=ema)
    stopped = trained(**settings, patience=2)
    errors, done = (stopped.evaluations[name] for name in ("endpoint_error", "iteration"))
    best = errors.index(min(errors))
    assert 0 < best == len(errors) - 3
    assert done[-1] < 60
    assert stopped.best == done[best]
    short = trained(**STOPPING | dict(iterations=stopped.best), ema=ema)
    assert same_weights(short.student, stopped.student)
    assert stopped.errors[1] == errors[best]
    assert same(trained(**settings, patience=2), stopped)  # a run that has stopped is only loaded
    longer = trained(**settings, patience=4)
    path.unlink()
    assert same(trained(**settings, patience=4), longer)
    assert len(longer.history["loss"]) > len(stopped.history["loss"])
    with pytest.raises(ValueError, match=r"^checkpoint: expected one of this run .*got patience = True"):
        trained(**settings)


def same_weights(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("variant", ["plain", "refresh", "solver, refreshed", "pairs"])
def test_resuming_is_bit_for_bit(tmp_path, variant):
    path = tmp_path / "run.pt"
    more = dict(held_out=6, evaluate_every=4, patience=3, lr=0.03, checkpoint_every=3, keep_checkpoints=2, init="keep")
    settings = WATCHED[variant] | more
    whole = trained(small_net(1, 0.3), **settings, checkpoint=tmp_path / "whole.pt")
    for calls in (9, 7):
        net = small_net(5 if path.exists() else 1, 0.3)
        net.register_forward_pre_hook(stop_after(calls))
        with pytest.raises(Stopped):
            trained(net, **settings, checkpoint=path)
    assert same(trained(small_net(6, 0.3), torch_seed=99, **settings, checkpoint=path), whole)
    assert [*numbered(path)] == [*numbered(tmp_path / "whole.pt")]


# ---- a run that goes on after its end ----


@pytest.mark.parametrize("variant", ["plain", "refresh", "on_policy", "endpoint", "pairs"])
def test_a_finished_run_is_extended(tmp_path, variant):
    """With a constant learning rate it is the longer one, bit for bit, rows and all; after a callback's stop too."""
    settings = WATCHED[variant] | dict(decay="none", held_out=6, evaluate_every=7, patience=9, log_every=4)
    whole = trained(**settings, iterations=31)
    path = tmp_path / "run.pt"
    settings |= dict(checkpoint=path)
    first = trained(**settings, iterations=11)
    assert first.history["iteration"] == [0, 4, 8, 10]
    assert first.evaluations["iteration"] == [0, 7, 11]
    assert same(trained(**settings, iterations=11), first)
    second = trained(**settings, iterations=31, callbacks=[lambda event: event.iteration > 20])
    assert second.evaluations["iteration"] == [0, 7, 14, 21]
    assert same(trained(**settings, iterations=31), whole)
    with pytest.raises(ValueError, match=r"^checkpoint: expected at most iterations = 30, .*got one after 31"):
        trained(**settings, iterations=30)


def test_the_best_of_an_extended_run(tmp_path):
    """The end of the shorter run may be the best there is; the longer one never looks there."""
    settings = STOPPING | dict(iterations=38, patience=99, ema=None)
    errors = trained(**settings | dict(evaluate_every=1)).evaluations["endpoint_error"]
    best = errors.index(min(errors))
    assert 0 < best < 38
    every = next(k for k in (2, 3, 5, 7) if best % k)
    settings |= dict(evaluate_every=every)
    whole = trained(**settings)
    assert whole.best % every == 0
    short = trained(**settings | dict(iterations=best), checkpoint=tmp_path / "run.pt")
    assert short.best == best
    assert same(trained(**settings, checkpoint=tmp_path / "run.pt"), whole)


def test_the_learning_rate_of_an_extended_run(tmp_path):
    """From there on it is that of the whole length."""
    settings = dict(checkpoint=tmp_path / "run.pt", log_every=1, warmup=4)
    trained(**settings, iterations=10)
    rates = [trained(**settings, iterations=n).history["lr"] for n in (10, 20)]
    cosine = [1e-2 * 0.5 * (1 + math.cos(math.pi * (it - 4) / 16)) for it in range(10, 20)]
    assert rates[1] == pytest.approx([*rates[0], *cosine], rel=1e-12)
    assert rates[0][-1] < rates[1][10]


# ---- callbacks ----


def test_what_callbacks_are_told(tmp_path):
    events, path = [], tmp_path / "run.pt"
    settings = dict(
        held_out=6, evaluate_every=6, checkpoint=path, checkpoint_every=8, log_every=4, ema=None, iterations=12
    )
    result = trained(**settings, callbacks=[events.append])
    told = [(event.kind, event.iteration) for event in events]
    expected = [("log", 1), ("log", 5), ("evaluate", 6), ("checkpoint", 8), ("log", 9)]
    assert told == [*expected, ("log", 12), ("evaluate", 12), ("checkpoint", 12), ("end", 12)]
    last = events[-1]
    assert (last.loss, last.lr, last.grad_norm) == tuple(result.history[n][-1] for n in ("loss", "lr", "grad_norm"))
    assert last.endpoint_error == result.evaluations["endpoint_error"][-1]
    assert events[0].endpoint_error == result.evaluations["endpoint_error"][0]
    assert events[0].checkpoint is None
    assert last.checkpoint == path
    assert last.student is result.student
    assert set(events[0].scalars) == {"loss", "lr", "grad_norm", "interval_loss/0", "interval_loss/1"}
    assert set(events[2].scalars) == {"endpoint_error", "endpoint_stderr", "held_out_loss/0", "held_out_loss/1"}
    assert last.scalars == {}
    torch.testing.assert_close(last.samples(3), last.samples(9)[:3])


@pytest.mark.parametrize("kind", [bool, np.bool_, torch.tensor])
def test_a_callback_stops_the_training(tmp_path, kind):
    path = tmp_path / "run.pt"
    stop = lambda event: kind(event.iteration == 10)  # noqa: E731
    result = trained(callbacks=[stop], checkpoint=path, held_out=6, evaluate_every=50)
    assert torch.load(path, weights_only=True)["iteration"] == 10
    assert result.evaluations["iteration"] == [0, 10]
    assert same_weights(result.student, trained(checkpoint=path, iterations=10, held_out=6, evaluate_every=50).student)


def test_a_callback_that_changes_modes_changes_nothing():
    def careless(event):
        torch.set_grad_enabled(False)
        event.student.eval()
        torch.manual_seed(event.iteration)
        event.interval_loss.clear()
        event.held_out_loss.clear()
        return [True]  # not True

    settings = dict(held_out=6, evaluate_every=5)
    assert same(trained(callbacks=[careless], **settings), trained(**settings))
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_callback_that_fails_loses_nothing(tmp_path, error):
    path = tmp_path / "run.pt"

    def failing(event):
        if event.iteration == 10:
            raise error("of a logger")

    settings = dict(held_out=6, evaluate_every=10, checkpoint=path)
    with pytest.raises(error, match="of a logger"):
        trained(callbacks=[failing], **settings)
    assert torch.load(path, weights_only=True)["iteration"] == 10
    assert same(trained(**settings), trained(held_out=6, evaluate_every=10))


# ---- numbered checkpoints ----


def test_numbered_checkpoints(tmp_path):
    path = tmp_path / "run.pt"
    others = [tmp_path / name for name in ("run-1.pt", "run-000003.pt.txt", "other-000003.pt")]
    for other in others:
        other.write_text("another's")
    settings = dict(checkpoint=path, checkpoint_every=5)
    expected = trained(**settings, keep_checkpoints=3)
    assert [*numbered(path)] == [15, 20, 24]
    assert all(other.read_text() == "another's" for other in others)
    whole = path.read_bytes()
    assert numbered(path)[24].read_bytes() == whole
    assert torch.load(numbered(path)[15], weights_only=True)["iteration"] == 15
    with pytest.raises(ValueError, match=r"^checkpoint: expected a name without numbered .*run-000015.pt"):
        trained(**settings, keep_checkpoints=3, resume=False)
    path.unlink()
    assert same(trained(**settings, keep_checkpoints=None), expected)  # from the last of them
    path.write_bytes(whole[:1000])
    with pytest.raises(
        ValueError,
        match=r"^checkpoint: .*run.pt is not one, or damaged.*; the one before it, .*run-000024.pt, is whole: of it",
    ):
        trained(**settings, keep_checkpoints=3)
    path.unlink()
    numbered(path)[24].write_bytes(whole[:1000])
    with pytest.raises(
        ValueError, match=r"run-000024.pt is not one, or damaged.*; the one before it, .*run-000020.pt, is"
    ):
        trained(**settings, keep_checkpoints=3)
    numbered(path)[24].unlink()
    assert same(trained(**settings, keep_checkpoints=None), expected)
    assert [*numbered(path)] == [15, 20, 24]


def test_a_checkpoint_that_gets_no_number_is_there(tmp_path, monkeypatch):
    def full(*args):
        raise OSError("disk full")

    monkeypatch.setattr(state, "keep_numbered", full)
    path = tmp_path / "run.pt"
    told = r"^checkpoint: iteration \d+ could not be numbered beside the others \(OSError: disk full\); .*run.pt has it"
    kinds = []
    with pytest.warns(UserWarning, match=told):
        trained(checkpoint=path, keep_checkpoints=2, callbacks=[lambda event: kinds.append(event.kind)])
    assert torch.load(path, weights_only=True)["iteration"] == 24
    assert "checkpoint" in kinds


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(held_out=24), r"^held_out: expected fewer than the 24 trajectories"),
        (
            dict(held_out=1, evaluate_every=3),
            r"^held_out: expected at least 2 trajectories or pairs, with evaluate_every",
        ),
        (dict(evaluate_every=3), r"^held_out: expected at least 2 .*got 0"),
        (dict(patience=3), r"^evaluate_every: expected a number, with patience"),
        (dict(keep_checkpoints=3), r"^checkpoint: expected a file, with keep_checkpoints"),
        (dict(callbacks=print), r"^callbacks: expected a list of functions of one TrainingEvent"),
        (dict(callbacks=[lambda: None]), r"^callbacks: expected functions of one TrainingEvent"),
    ],
)
def test_settings_that_do_not_go_together(change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        trained(**change)


def test_checkpoints_are_evaluated_as_the_students_were(tmp_path):
    path, noise, teacher = tmp_path / "run.pt", normal(12, 4, seed=9), small_net(0).eval()
    settings = dict(decay="none", held_out=6)
    result = trained(**settings, checkpoint=path, checkpoint_every=10, keep_checkpoints=None)
    student = small_net(8)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    how = dict(teacher_solver=6, columns=["endpoint", "straightness"])
    found = fk.evaluate_checkpoints(path, student, teacher, {2: PLAN}, noise, **how)
    assert [row.name for row in found.rows] == ["iteration 10", "iteration 20", "iteration 24"]
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())
    for row, iterations in zip(found.rows, (10, 20, 24), strict=True):
        then = trained(**settings, iterations=iterations).student
        (same_row,) = fk.evaluate_sampler(teacher, {row.name: (then, PLAN)}, noise, **how).rows
        assert row == same_row
        ends = fk.sample(teacher, noise, 6)
        rms = (fk.sample(then, noise, PLAN) - ends).double().square().sum(1).mean().sqrt().item()
        assert math.isclose(row.rms, rms, rel_tol=1e-5)
    assert same_weights(then, result.student)
    (last,) = fk.evaluate_checkpoints([path], student, teacher, PLAN, noise, keep_samples=True, **how).rows
    assert last.samples.shape == noise.shape
    other = tmp_path / "other run.pt"
    trained(**settings, seed=1, checkpoint=other)
    with pytest.raises(
        ValueError, match=r"^checkpoint: expected files of one training, got two of iteration 24 .*other"
    ):
        fk.evaluate_checkpoints([path, other], student, teacher, PLAN, noise, **how)
    damaged = path.read_bytes()[:1000]
    path.unlink()
    path.write_bytes(damaged)
    for bad, message in ((path, "run.pt is not one, or damaged"), (tmp_path / "other.pt", "other.pt, none of which")):
        with pytest.raises(ValueError, match=rf"^checkpoint: expected .*{message}"):
            fk.evaluate_checkpoints(bad, student, teacher, PLAN, noise, **how)
