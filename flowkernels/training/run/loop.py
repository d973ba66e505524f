"""The loop of a run: a batch of the bank, the loss of what is learned, a step, the average, the history.

A loop of a caller's own takes the same parts:

    bank = TrajectoryBank(velocity, objective, noise=shape).fill()
    for _ in range(iterations):
        objective(student, bank.sample(batch, generator), generator).loss.backward()
        ...
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from flowkernels.training.bank.batch import BankBatch
from flowkernels.training.run.descent import Descent
from flowkernels.training.run.held_out import HeldOut
from flowkernels.training.run.settings import Settings
from flowkernels.training.run.state import State
from flowkernels.training.run.watch import Watch
from flowkernels.training.students.modules import unsynchronised
from flowkernels.training.students.recomputed import recomputed
from flowkernels.training.students.student import trained_parameters


def train(state: State, settings: Settings, held_out: HeldOut) -> None:
    """The iterations from where the state is to `settings.iterations`, or until it is to stop, on its bank, which is
    rolled out.

    Nothing waits for a GPU but what the history, evaluations and checkpoints are read from.
    """
    state.student.train()
    bank, objective, team = state.bank, settings.objective, state.team
    team.begin()
    descent = Descent(state.optimizer, trained_parameters(state.student), settings.clip, state.iteration)
    left = range(state.iteration, settings.iterations)
    quiet = not settings.progress
    bar = tqdm(left, desc="straighten", disable=quiet, leave=False, initial=left.start, total=left.stop)
    with bar, recomputed(state.student, settings.gradient_checkpointing):
        watch = Watch(state, settings, held_out, bar)
        watch.begin()
        if watch.is_over() or not left:
            return
        state.go_on(settings)
        for it in bar:
            if settings.is_refreshed(it):
                bank.refresh(state.generator)
            if objective.needs_roll_out and settings.is_rolled_out(it):
                state.roll_out(objective, settings.checkpoint is not None)
            rate, loss = settings.rate(it) if state.scheduler is None else state.scheduler.rate(), None
            if state.scheduler is None:
                set_rate(state.optimizer, rate, state.shares)
            drawn = team.part(bank.sample(state.generator))
            descent.step(losses(state, settings, drawn))
            state.update_average()
            state.iteration = it + 1
            if settings.is_logged(it):
                loss, norm = descent.read()
                loss = state.log(regular=settings.is_regular(it), iteration=it, loss=loss, lr=rate, grad_norm=norm)
            if state.scheduler is not None:
                state.scheduler.step(loss if settings.is_regular(it) else None)
            if watch.after(it, descent):
                break
        watch.end()
    torch.clear_autocast_cache()


def losses(state: State, settings: Settings, drawn: BankBatch) -> Iterator[Tensor]:
    """The loss of a batch, in `settings.accumulate` parts that add up to it: of each the graph is there alone."""
    objective, done, n = settings.objective, state.iteration / settings.iterations, len(drawn.interval)
    parts, before = min(settings.accumulate, n), state.generator.get_state()
    for i in range(parts):
        start, stop = n * i // parts, n * (i + 1) // parts
        part = drawn if parts == 1 else drawn.split(start, stop)
        state.generator.set_state(before)  # each draws what the whole batch draws
        with unsynchronised(state.team.computes, i + 1 < parts):
            found = state.team.losses(part, state.generator, done)
            yield found.loss if parts == 1 else found.loss * ((stop - start) / n)
        state.count(objective.interval_of(part.interval), found.per_sample)


def set_rate(optimizer: torch.optim.Optimizer, rate: float, shares: Sequence[float]) -> None:
    """The learning rate of its groups, each its share, in the tensor where it is one: a compiled or captured step has
    its address."""
    for group, share in zip(optimizer.param_groups, shares, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate * share)
        else:
            group["lr"] = rate * share
