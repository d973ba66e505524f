"""The loop of a run: a batch of the bank, the loss of what is learned, a step, the average, the history.

A loop of a caller's own takes the same parts:

    noise = bank.draw(generator)
    bank.roll_out(noise)
    for _ in range(iterations):
        objective(student, bank.sample(generator), generator).loss.backward()
        ...
"""

import math

import torch
from torch import Tensor, nn
from tqdm import tqdm

from flowkernels._checks import expect
from flowkernels.training.settings import Settings
from flowkernels.training.state import State
from flowkernels.training.students import trained_parameters


def train(state: State, settings: Settings) -> None:
    """The iterations from where the state is to `settings.iterations`, on its bank, which is rolled out."""
    state.student.train()
    bank, objective = state.bank, settings.objective
    parameters = trained_parameters(state.student)
    left = range(state.iteration, settings.iterations)
    quiet = not settings.progress
    bar = tqdm(left, desc="straighten", disable=quiet, leave=False, initial=left.start, total=left.stop)
    with bar:
        for it in bar:
            if settings.is_refreshed(it):
                bank.roll_out(bank.draw(state.generator))
            if objective.needs_roll_out and settings.is_rolled_out(it):
                state.roll_out(objective, settings.checkpoint is not None)
            rate = settings.rate(it)
            for group in state.optimizer.param_groups:
                group["lr"] = rate
            drawn = bank.sample(state.generator)
            found = objective(state.student, drawn, state.generator, it / settings.iterations)
            loss, norm = descend(found.loss, state.optimizer, parameters, settings.clip, it)
            state.update_average()
            state.count(drawn.interval, found.per_sample)
            state.iteration = it + 1
            if settings.is_logged(it):
                state.log(iteration=it, loss=loss, lr=rate, grad_norm=norm)
                bar.set_postfix(loss=f"{loss:.4g}")
            if settings.is_saved(it):
                state.save(settings.checkpoint, stacklevel=5)
    torch.clear_autocast_cache()


def descend(
    loss: Tensor, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], clip: float | None, iteration: int
) -> tuple[float, float]:
    """One step down a loss `[]` along its gradient, whose norm is at most `clip`; (loss, norm before).

    ValueError, naming the iteration and before the weights change, for NaN or Inf in either.
    """
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(parameters, math.inf if clip is None else clip).item()
    value = loss.item()
    if not (math.isfinite(value) and math.isfinite(norm)):
        got = f"loss {value}, gradient norm {norm} at iteration {iteration}"
        expect(False, "student", "a finite loss and gradient (a smaller lr?)", got)
    optimizer.step()
    return value, norm
