"""The settings of a run of `straighten`: each with its check, in one place."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowkernels._checks import (
    expect,
    expect_bool,
    expect_choice,
    expect_int,
    expect_path,
    expect_positive_int,
    expect_real,
    expect_seed,
    expect_takes,
)
from flowkernels._files import expect_target
from flowkernels.runtime.ranks import Ranks
from flowkernels.schedule import Schedule
from flowkernels.solver import Solver
from flowkernels.training.bank.knots import knots_on_grid, noted_teacher
from flowkernels.training.bank.starts import Noise
from flowkernels.training.bank.trajectory_bank import TrajectoryBank
from flowkernels.training.objective import Loss, StraightenLoss, TSampling
from flowkernels.training.pairs.pairs import Pairs
from flowkernels.training.refined import on_grid
from flowkernels.training.run.events import TrainingEvent, expect_callbacks
from flowkernels.training.run.optimizers import OPTIMIZER
from flowkernels.training.run.pairs import PairsSource, are_pairs, expect_pairs
from flowkernels.training.run.schedulers import DECAY, WARMUP, expect_scheduler
from flowkernels.training.run.team_checkpoint import expect_folder
from flowkernels.training.students.lora import Lora, expect_lora, lora_identity
from flowkernels.training.students.precision import expect_autocast
from flowkernels.training.targets.table import has_states_between
from flowkernels.velocity.protocol import Velocity, resolve

Check = Callable[[Any, str], Any]  # of (value, name), to the value as it is kept


def _or_none(check: Check) -> Check:
    return lambda value, name: None if value is None else check(value, name)


def _choice(*names: str) -> Check:
    return lambda value, name: expect_choice(value, name, names)


def _real(expected: str, ok: Callable[[float], bool]) -> Check:
    """Plain numbers: a checkpoint with numpy's would not load."""
    return lambda value, name: expect_real(value, name, expected, ok)


def _expect_optimizer(value, name: str):
    if not (isinstance(value, type) and issubclass(value, torch.optim.Optimizer)):
        expect_takes(value, name, OPTIMIZER, [])
    return value


def _expect_checkpoint(value, name: str) -> Path:
    path = expect_path(value, name)
    expect(path.parent.is_dir(), name, "a path in a folder that exists", str(path))
    return path


def _expect_bank(value, name: str) -> int | TrajectoryBank | PairsSource:
    if isinstance(value, TrajectoryBank):
        return value
    return expect_pairs(value, name) if are_pairs(value) else expect_positive_int(value, name)


CHECKS: dict[str, Check] = {
    "iterations": expect_positive_int,
    "batch": expect_positive_int,
    "bank": _expect_bank,
    "refresh": _or_none(expect_positive_int),
    "refresh_fraction": _real("a number in (0, 1]", lambda a: 0 < a <= 1),
    "rollout_every": expect_positive_int,
    "lr": _real("a positive number", lambda a: a > 0),
    "optimizer": _or_none(_expect_optimizer),
    "warmup": lambda value, name: expect_int(value, name, "a number of iterations", 0),
    "decay": _choice("cosine", "none"),
    "clip": _or_none(_real("a positive number or None", lambda a: a > 0)),
    "ema": _or_none(_real("a number in [0, 1) or None", lambda a: 0 <= a < 1)),
    "seed": expect_seed,
    "log_every": expect_positive_int,
    "autocast": expect_autocast,
    "accumulate": expect_positive_int,
    "gradient_checkpointing": expect_bool,
    "lr_scheduler": _or_none(expect_scheduler),
    "lora": _or_none(lambda value, name: expect_lora(value)),
    "checkpoint": _or_none(_expect_checkpoint),
    "checkpoint_every": expect_positive_int,
    "resume": expect_bool,
    "progress": expect_bool,
    "held_out": _or_none(lambda value, name: expect_int(value, name, "a number of trajectories", 0)),
    "evaluate_every": _or_none(expect_positive_int),
    "patience": _or_none(expect_positive_int),
    "callbacks": expect_callbacks,
    "keep_checkpoints": _or_none(expect_positive_int),
}


SHARED = (
    "batch",
    "bank",
    "refresh",
    "refresh_fraction",
    "rollout_every",
    "lr",
    "warmup",
)  # by a run that is resumed
SHARED += ("decay", "clip", "ema", "seed", "log_every", "accumulate", "held_out", "evaluate_every")


@dataclass(frozen=True, kw_only=True, eq=False)
class Settings:
    """What `straighten` is told: its arguments of the same names, checked as they are set; TypeError or ValueError
    names the argument.

    objective: the loss that schedule, target, t_sampling, loss, huber_c, weighting and substeps make.
    grid: kept as the teacher's fine grid, float64 `[K+1]`. group: the ranks that the run is shared by.
    noise: of it only what goes with the others is looked at here; the bank checks it.
    """

    velocity: Velocity | None
    schedule: Schedule | Solver
    grid: Any  # given as a number of steps, times, or None
    noise: Noise | None
    iterations: int
    batch: int
    bank: int | TrajectoryBank | PairsSource
    refresh: int | None
    target: str
    t_sampling: TSampling | None
    loss: Loss | None
    huber_c: float
    weighting: Any
    consistency: str
    instantaneous: float
    lr: float
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None
    warmup: int
    decay: str
    clip: float | None
    ema: float | None
    seed: int
    log_every: int
    checkpoint: Path | None
    checkpoint_every: int
    resume: bool
    progress: bool
    rollout_every: int = 50
    substeps: int = 4
    initial_speed: float = 1.5
    refresh_fraction: float = 1.0
    compared: str = "data"
    autocast: torch.dtype | None = None
    accumulate: int = 1
    gradient_checkpointing: bool = False
    lr_scheduler: Callable[[torch.optim.Optimizer], Any] | None = None
    held_out: int | None = None
    evaluate_every: int | None = None
    patience: int | None = None
    callbacks: tuple[Callable[[TrainingEvent], Any], ...] = ()
    keep_checkpoints: int | None = 1
    lora: Lora | None = None
    group: Ranks | None = None
    objective: StraightenLoss = field(init=False)

    def __post_init__(self):
        checked = {name: check(getattr(self, name), name) for name, check in CHECKS.items()}
        learned = ("target", "loss", "huber_c", "weighting", "t_sampling", "substeps", "initial_speed", "compared")
        learned += ("consistency", "instantaneous")
        settings = {name: getattr(self, name) for name in learned}
        pairs = are_pairs(self.bank)
        if not (pairs and self.velocity is None):
            resolve(self.velocity)
        schedule, given = self.schedule, isinstance(self.bank, TrajectoryBank)
        if has_states_between(self.target) and isinstance(schedule, Schedule) and not pairs:
            schedule = on_grid(schedule, self.bank.grid if given else self.grid)
        objective = StraightenLoss(schedule, teacher=self.velocity, **settings)
        objective.autocast = checked["autocast"]
        checked["objective"] = objective
        derived = objective.target == "average_velocity" and objective.consistency == "derivative"
        expected = "False with consistency='derivative', which differentiates the student in forward mode"
        expect(not (derived and checked["gradient_checkpointing"]), "gradient_checkpointing", expected, True)
        for name, default in (("warmup", WARMUP), ("decay", DECAY)):
            own = self.lr_scheduler is not None and checked[name] != default
            expect(not own, name, f"{default!r} with an lr_scheduler, which takes its place", checked[name])
        if given or pairs:
            for name, value in (("noise", self.noise), ("grid", self.grid)):
                expect(value is None, name, "None with a bank that has its own", value)
        else:
            expect(self.noise is not None, "noise", "a tensor, a shape or a function, without a bank", "None")
        expect(not pairs or self.refresh is None, "refresh", "None, for pairs", self.refresh)
        if pairs:
            checked["grid"] = objective.times
        else:
            checked["grid"] = self.bank.grid if given else knots_on_grid(objective.schedule, self.grid)[0]
        if self.refresh is not None:
            fixed = isinstance(self.noise, Tensor)
            expect(not fixed, "noise", "a shape or a function, with refresh", self.noise)
            expect(not given or self.bank.is_drawn, "bank", "one that draws noise or data, with refresh", self.bank)
        if self.patience is not None:
            expect(self.evaluate_every is not None, "evaluate_every", "a number, with patience", "None")
        if self.keep_checkpoints != 1:
            expect(checked["checkpoint"] is not None, "checkpoint", "a file, with keep_checkpoints", "None")
        if checked["checkpoint"] is not None and self.group is None:
            expect_target(checked["checkpoint"], "checkpoint")
        elif checked["checkpoint"] is not None:
            expect_folder(checked["checkpoint"], "checkpoint")
        checked["progress"] &= self.group is None or self.group.is_first
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @property
    def carries_conditioning(self) -> bool:
        """Whether batches give the student conditioning, as far as is known."""
        if isinstance(self.bank, TrajectoryBank):
            return self.bank.carries_conditioning
        return bool(self.bank.conditioning) if isinstance(self.bank, Pairs) else are_pairs(self.bank)

    def rate(self, iteration: int) -> float:
        """The learning rate of an iteration: linear warm-up, then the decay."""
        if iteration < self.warmup:
            return self.lr * ((iteration + 1) / self.warmup)
        if self.decay == "none":
            return self.lr
        angle = math.pi * (iteration - self.warmup) / max(1, self.iterations - self.warmup)
        return self.lr * (0.5 * (1 + math.cos(angle)))

    def is_logged(self, iteration: int) -> bool:
        """Whether the history has a row of it; the last may have one that a longer run would not."""
        return self.is_regular(iteration) or iteration == self.iterations - 1

    def is_regular(self, iteration: int) -> bool:
        """Whether the history has a row of it however many iterations there are."""
        return iteration % self.log_every == 0

    def is_saved(self, iteration: int) -> bool:
        """Whether a checkpoint is written after it."""
        due = (iteration + 1) % self.checkpoint_every == 0 or iteration == self.iterations - 1
        return self.checkpoint is not None and due

    def is_refreshed(self, iteration: int) -> bool:
        """Whether the bank is made anew before it."""
        return self.refresh is not None and iteration > 0 and iteration % self.refresh == 0

    def is_rolled_out(self, iteration: int) -> bool:
        """Whether the student's own samples are taken anew before it."""
        return iteration % self.rollout_every == 0 or self.is_refreshed(iteration)

    def identity(self) -> dict[str, Any]:
        """What determines the result, in plain values: what a resumed run must share.

        A field with a default is left out at it: of what came later, checkpoints of before it say nothing either.
        """
        found = {"times": self.objective.times.tolist(), "grid": self.grid.tolist()} | self.objective.identity()
        if (teacher := noted_teacher(self.schedule)) is not None:
            found["teacher_solver"] = teacher
        if self.autocast is not None:
            found["autocast"] = str(self.autocast)
        if self.lora is not None:
            found["lora"] = lora_identity(self.lora)
        defaults = {f.name: f.default for f in fields(self)}
        if self.patience is not None:  # with which the best weights are kept; for how long may change
            found["patience"] = True
        return found | {name: value for name in SHARED if (value := getattr(self, name)) != defaults[name]}
