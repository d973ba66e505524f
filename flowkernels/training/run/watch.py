"""What goes along with the iterations of a run: evaluations on what is held out, checkpoints, callbacks, and whether to
stop."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from flowkernels.training.run.descent import Descent
from flowkernels.training.run.events import TrainingEvent
from flowkernels.training.run.held_out import HeldOut, sampled, undisturbed
from flowkernels.training.run.settings import Settings
from flowkernels.training.run.state import State
from flowkernels.training.students.modules import load_weights, whole_state


class Watch:
    """Of a run whose bank is rolled out. What it measures and whom it tells changes nothing of the training: torch's
    generators, weights and modes are afterwards what they were."""

    def __init__(self, state: State, settings: Settings, held_out: HeldOut, bar: tqdm):
        self.state, self.settings, self.held_out, self.bar = state, settings, held_out, bar
        self.saved_at: int | None = None  # the iteration that is on the disk
        self._shown: dict[str, str] = {}

    def begin(self) -> None:
        """The first evaluation, of what the training begins with."""
        if self.state.evaluations is not None and self.state.iteration == 0:
            self._evaluate()

    def is_over(self) -> bool:
        """Whether the error on what is held out has not become less for long enough."""
        patience, found = self.settings.patience, self.state.evaluations
        return patience is not None and found is not None and found.since_best >= patience

    def after(self, it: int, descent: Descent) -> bool:
        """All that is due after an iteration; whether it was the last."""
        settings, state, told = self.settings, self.state, []
        last = it == settings.iterations - 1
        if settings.is_logged(it):
            told.append("log")
            self._show(loss=f"{state.history['loss'][-1]:.4g}")
        if state.evaluations is not None and (state.iteration % settings.evaluate_every == 0 or last):
            descent.read()
            self._evaluate()
            told.append("evaluate")
        last = last or self.is_over()
        if settings.checkpoint is not None and (settings.is_saved(it) or last):
            descent.read()
            told += ["checkpoint"] * self._save()
        if settings.callbacks and told:
            try:
                stop = self._tell(told)
            except BaseException:
                descent.read()
                self._save()
                raise
            if stop and not last:
                descent.read()
                self._stop()
                last = True
        return last

    def end(self) -> None:
        self._tell(["end"])

    def _stop(self) -> None:
        """As a callback asks: as if this iteration had been the last."""
        state = self.state
        if state.evaluations is not None and not state.evaluations.has(state.iteration):
            self._evaluate()
            self.saved_at = None
        self._save()

    def _save(self) -> bool:
        """Write a checkpoint, where there is to be one and it is not there already; whether it was written."""
        path, state = self.settings.checkpoint, self.state
        if path is None or self.saved_at == state.iteration:
            return False
        written = state.save(path, self.settings.keep_checkpoints, stacklevel=7)
        self.saved_at = state.iteration if written else None
        return written

    def _evaluate(self) -> None:
        state = self.state
        with as_returned(state) as student:
            found = self.held_out.measured(student, state.iteration)
        state.evaluations.add(found, lambda: weights_to_return(state))
        self._show(error=f"{found.endpoint_error:.4g}±{found.endpoint_stderr:.1g}")

    def _tell(self, kinds: list[str]) -> bool:
        """Call every callback; whether one asks to stop."""
        stop, known = False, self._known()
        for kind in kinds if self.settings.callbacks else ():
            for callback in self.settings.callbacks:
                with torch.enable_grad(), undisturbed(self.state.student):  # whatever it leaves on or off
                    stop = _is_true(callback(TrainingEvent(kind, **known))) or stop
        return any(self.state.team.ranks.of_each(stop)) if self.settings.callbacks else stop

    def _known(self) -> dict[str, Any]:
        state, settings = self.state, self.settings
        known: dict[str, Any] = dict(iteration=state.iteration, iterations=settings.iterations, student=state.student)
        known |= {name: column[-1] for name, column in state.history.items() if column and name != "iteration"}
        found = None if state.evaluations is None else state.evaluations.last
        if found is not None:
            known |= dict(endpoint_error=found.endpoint_error, endpoint_stderr=found.endpoint_stderr)
            known |= dict(held_out_loss=found.interval_loss, held_out_stderr=found.interval_stderr)
        there = settings.checkpoint is not None and settings.checkpoint.exists()
        known = {name: [*value] if isinstance(value, list) else value for name, value in known.items()}
        return known | dict(checkpoint=settings.checkpoint if there else None, make_samples=self._samples)

    @torch.no_grad()
    def _samples(self, count: int) -> Tensor:
        ends, held_out = self.held_out.some(count), self.held_out
        with as_returned(self.state) as student:
            return sampled(student, ends, held_out.size, held_out.solver)

    def _show(self, **values: str) -> None:
        self._shown |= values
        self.bar.set_postfix(self._shown)


def _is_true(answer: Any) -> bool:
    """True itself, or numpy's or torch's, which comparisons of their numbers make."""
    if isinstance(answer, Tensor):
        return answer.dtype == torch.bool and answer.numel() == 1 and bool(answer)
    return isinstance(answer, (bool, np.bool_)) and bool(answer)


@contextlib.contextmanager
def as_returned(state: State) -> Iterator[nn.Module]:
    """The student in eval mode with the weights that would be returned now; afterwards it is as it was."""
    student = state.student
    with undisturbed(student), state.averaged():
        yield student.eval()


def weights_to_return(state: State) -> dict[str, Any]:
    """Those, as a state dict of their own, on the CPU."""
    with state.averaged():
        weights = whole_state(state.student)
        return {key: value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)
                for key, value in weights.items()}  # fmt: skip


def result(state: State) -> nn.Module:
    """What is returned: the student of the last iteration, or with `patience` of the best evaluation."""
    trained, found = state.result(), state.evaluations
    if found is not None and not found.best_is_last:
        load_weights(trained, found.best["weights"])
    return trained
