"""The state of a run: all that a checkpoint keeps, so that a resumed run is the uninterrupted one, bit for bit."""

import contextlib
import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowkernels.runtime.sharded import whole_tree
from flowkernels.training.objective import StraightenLoss
from flowkernels.training.run import team_checkpoint
from flowkernels.training.run.average import average_of, completed
from flowkernels.training.run.bank import RunBank
from flowkernels.training.run.checkpoint import (
    BANK_DRAWN,
    BEGAN_AT,
    HISTORY,
    LR_SCHEDULER,
    ROLLED_OUT,
    checks_of,
    expect_optimizer_state,
    load_optimizer_state,
    write_checkpoint,
)
from flowkernels.training.run.evaluations import EVALUATIONS, Evaluations
from flowkernels.training.run.numbered import keep_numbered
from flowkernels.training.run.optimizers import shares_of_rate
from flowkernels.training.run.pairs import RunPairs
from flowkernels.training.run.random_states import global_rng, restore_global_rng
from flowkernels.training.run.schedulers import Scheduler
from flowkernels.training.run.settings import Settings
from flowkernels.training.run.team import Team
from flowkernels.training.students.modules import copied, load_weights, plain_state, whole_state
from flowkernels.training.students.student import trained_parameters


class State:
    """What an iteration changes.

    student, optimizer: what is trained, and how. average: of the student's weights, None without `ema`.
    generator: on the CPU, of noise, places and what targets draw. bank: of which the state before its noise was drawn
        is kept, not the trajectories.
    iteration: iterations done. history: columns of `Straightened.history`. totals, counts: float32 `[N]` where the
        student is, the losses of each interval since the last row, and their number.
    scheduler: of the learning rate; None where the settings have it.
    shares: of the learning rate, for each of the optimiser's groups.
    in_place: the averaged weights come back in the student itself, as of one that shares weights with its teacher.
    steps: N. setting: what a resumed run must share, in plain values.
    rolled_out: the weights with which the student's own samples were taken last; None where none are, or not kept.
    began_at: how far the student's samples were from the teacher's before it was trained; None where nobody asks.
    evaluations: what was measured meanwhile; None where nothing is.
    """

    def __init__(
        self,
        student: nn.Module,
        optimizer: torch.optim.Optimizer,
        bank: RunBank | RunPairs,
        setting: dict[str, Any],
        *,
        steps: int,
        ema: float | None,
        seed: int,
        team: Team,
        scheduler: Scheduler | None = None,
        evaluations: Evaluations | None = None,
        in_place: bool = False,
    ):
        self.student, self.optimizer, self.bank, self.setting = student, optimizer, bank, setting
        self.team, self.scheduler = team, scheduler
        self.shares = shares_of_rate(optimizer)
        self.average, self.in_place = average_of(student, optimizer, ema), in_place or ema is None
        self.generator = torch.Generator().manual_seed(seed)
        self.iteration, self.history = 0, {name: [] for name in HISTORY}
        self.rolled_out: dict[str, Any] | None = None
        self.began_at: float | None = None
        self.evaluations = evaluations
        device = trained_parameters(student)[0].device
        self.totals, self.counts = torch.zeros(2, steps, dtype=torch.float32, device=device)
        self._intervals = torch.arange(steps, device=device)[:, None]

    def roll_out(self, objective: StraightenLoss, keep: bool) -> None:
        """Take the student's own samples of the bank. keep: its weights, for a checkpoint."""
        self._roll_out(objective)
        self.rolled_out = copy.deepcopy(self._weights()) if keep else None

    def _weights(self) -> dict[str, Any]:
        return plain_state(self.student) if self.team.is_given else whole_state(self.student)

    def _roll_out(self, objective: StraightenLoss) -> None:
        objective.roll_out(self.bank.learner(self.student), self.bank.states, self.bank.batch)

    def update_average(self) -> None:
        if self.average is not None:
            self.average.update()

    @torch.no_grad()
    def count(self, interval: Tensor, losses: Tensor) -> None:
        """Add the losses `[B]` of samples of the intervals `[B]`: as sums, whose order a GPU does not change."""
        of = self._intervals == interval
        self.totals += torch.where(of, losses.float(), 0).sum(1)
        self.counts += of.sum(1)

    def log(self, *, loss: float, regular: bool = True, **row: float) -> float:
        """A row of the history, with the losses of the intervals since the last; its loss, that of all ranks. A row
        that is not regular, at the end, goes where the run goes on: their sums stay."""
        totals, counts = self.totals, self.counts
        if not self.team.ranks.is_alone:
            total, totals, counts = self.team.summed(torch.tensor(loss, dtype=torch.float64), totals, counts)
            loss = total.item() / self.team.ranks.size
        row |= {"loss": loss, "interval_loss": (totals / counts).float().cpu().tolist()}
        for name, entry in row.items():
            self.history[name].append(entry)
        if regular:
            self.totals.zero_(), self.counts.zero_()
        return loss

    def go_on(self, settings: Settings) -> None:
        """From the end of a run that was to be shorter: without what such a one says at its end alone."""
        if self.history["iteration"] and not settings.is_regular(self.history["iteration"][-1]):
            for column in self.history.values():
                column.pop()
        if self.evaluations is not None:
            self.evaluations.go_on()

    def averaged(self) -> contextlib.AbstractContextManager:
        """The student with its averaged weights, where there are some, in a block; then with its own again."""
        return contextlib.nullcontext() if self.average is None else self.average.applied()

    def result(self) -> nn.Module:
        """The student in eval mode, where there are averaged weights a copy with these: the student itself, with them,
        where it is not to be copied or cannot be."""
        if self.average is None:
            return self.student.eval()
        result = self.student
        if not self.in_place:
            with contextlib.suppress(ValueError):
                result = copied(self.student)
        self.average.put(result)
        return result.eval()

    def contents(self) -> dict[str, Any]:
        """What a checkpoint holds; with a group, of sharded tensors this rank's part."""
        sharded = self.team.is_given
        more = {ROLLED_OUT: self.rolled_out, BANK_DRAWN: self.bank.drawn, BEGAN_AT: self.began_at}
        more[LR_SCHEDULER] = None if self.scheduler is None else self.scheduler.contents()
        more[EVALUATIONS] = None if self.evaluations is None else self.evaluations.contents()
        student, average = self._weights(), None if self.average is None else self.average.state_dict(sharded)
        return {
            "setting": self.setting,
            "iteration": self.iteration,
            "history": self.history,
            "bank_noise": self.bank.noise_hash,
            "student": student,
            "optimizer": self.optimizer.state_dict() if sharded else whole_tree(self.optimizer.state_dict()),
            "average": average if sharded or average is None else completed(average, student),
            "bank_rng": self.bank.rng,
            "rng": self.generator.get_state(),
            "global_rng": global_rng(),
            "totals": self.totals.cpu(),
            "counts": self.counts.cpu(),
        } | {key: value for key, value in more.items() if value is not None}

    def save(self, path: Path, keep: int | None, stacklevel: int) -> bool:
        """Write a checkpoint, whether it could be; where that fails, as on a full disk, what is in memory is worth more
        than an error. keep: how many numbered ones stay beside it, None all, 1 none."""
        written = False
        try:
            if self.team.is_given:
                team_checkpoint.write(path, self.iteration, self.contents(), self.team.ranks, keep)
            else:
                write_checkpoint(path, self.contents())
                written = True
                if keep != 1:
                    keep_numbered(path, self.iteration, keep)
        except Exception as e:
            failed = "numbered beside the others" if written else "written"
            told = f"checkpoint: iteration {self.iteration} could not be {failed} ({type(e).__name__}: {e}); {path}"
            kept = "has it" if written else "is kept" if path.exists() else "was not made"
            warnings.warn(f"{told} {kept}; the training goes on", UserWarning, stacklevel=stacklevel)
            return written
        return True

    def load(self, saved: Mapping[str, Any], path: Path) -> None:
        """Go on from a checkpoint of this run, its generator where the bank's noise is drawn from again; ValueError,
        naming it, where the optimiser's state or the average is none that a run makes."""
        with checks_of(path):
            varies = () if self.scheduler is None else self.scheduler.varies
            expect_optimizer_state(saved["optimizer"], self.optimizer, trained_parameters(self.student), varies)
            if self.average is not None:
                self.average.expect(saved["average"], self.student, saved["iteration"])
                self.average.load_state_dict(saved["average"])
            load_weights(self.student, saved["student"])
            load_optimizer_state(self.optimizer, saved["optimizer"])
            if self.scheduler is not None:
                self.scheduler.load(saved[LR_SCHEDULER])
            self.rolled_out, self.began_at = saved.get(ROLLED_OUT), saved.get(BEGAN_AT)
            if self.evaluations is not None:
                self.evaluations.load(saved[EVALUATIONS])
        self.iteration, self.history = saved["iteration"], saved["history"]
        self.totals.copy_(saved["totals"]), self.counts.copy_(saved["counts"])
        self.generator.set_state(saved["bank_rng"])

    def roll_out_again(self, objective: StraightenLoss) -> None:
        """What the checkpoint's run last took, of the bank that is there again."""
        now = copy.deepcopy(plain_state(self.student))
        load_weights(self.student, self.rolled_out)
        self._roll_out(objective)
        load_weights(self.student, now)

    def load_random_states(self, saved: Mapping[str, Any]) -> None:
        """Those of the checkpoint's last iteration, once the bank is there again."""
        self.generator.set_state(saved["rng"])
        restore_global_rng(saved["global_rng"])
