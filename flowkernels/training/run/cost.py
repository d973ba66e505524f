"""What a run takes: evaluations, memory and time, known beforehand."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from flowkernels._checks import LOW
from flowkernels.runtime.sharded import local
from flowkernels.training.objective import StraightenLoss
from flowkernels.training.run.bank import RunBank
from flowkernels.training.run.counts import (
    NONE,
    Counts,
    Guided,
    of_batch,
    of_measured,
    of_own_states,
    of_samples,
)
from flowkernels.training.run.descent import has_queue, skips
from flowkernels.training.run.held_out import HeldOut
from flowkernels.training.run.optimizers import own_optimizer
from flowkernels.training.run.pairs import RunPairs
from flowkernels.training.run.settings import Settings
from flowkernels.training.students.modules import trained_by_name
from flowkernels.training.students.trial import Trial
from flowkernels.velocity.field import VelocityField
from flowkernels.velocity.protocol import as_given, resolve

SMALL = 2**26  # bytes of weights that an optimiser is tried on


@dataclass(frozen=True)
class TrainingCost:
    """What a run of `straighten` takes.

    counts: calls of networks and evaluations of single samples: `with_graph` and `without_graph` of the student, of the
        `teacher` in the iterations, and for the `bank`.
    memory: bytes by part; None for one that is not known.
    seconds: of all that is counted; None where nothing was tried.
    iterations: as many as are counted. assumptions: what it holds under, in sentences.

    Examples:
        >>> teacher = fk.VelocityField(torch.nn.Linear(3, 2), time_column=True)
        >>> settings = dict(noise=(2,), iterations=100, bank=256, batch=32, grid=20)
        >>> cost = fk.training_cost(None, teacher, fk.Schedule.uniform(4), **settings, measure=False)
        >>> cost.memory["student"], cost.memory["gradients"]  # of 8 parameters, 4 bytes each
        (32, 32)
    """

    counts: Counts
    memory: dict[str, int | None]
    seconds: float | None
    iterations: int
    assumptions: tuple[str, ...] = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Of all parts that are known."""
        return sum(n for n in self.memory.values() if n is not None)

    @property
    def line(self) -> str:
        """In a line."""
        counts = self.counts
        beside = " beside activations" if self.memory["activations"] is None else ""
        told = f"{self.iterations:,} iterations, {in_bytes(self.nbytes)}{beside}"
        told += f", {counts.bank.evaluations + counts.teacher.evaluations:,} evaluations of the teacher"
        told += f", {counts.with_graph.evaluations:,} of the student with a gradient"
        if counts.without_graph.evaluations:
            told += f" and {counts.without_graph.evaluations:,} without"
        return told + ("" if self.seconds is None else f", about {in_time(self.seconds)}")

    def __str__(self) -> str:
        counts = self.counts
        rows = [
            ("teacher, for the bank", counts.bank),
            ("teacher, in iterations", counts.teacher),
            ("student, with a gradient", counts.with_graph),
            ("student, without", counts.without_graph),
        ]
        lines = [f"{self.iterations:,} iterations", f"  {'evaluations':<28}{'calls':>14}{'of samples':>18}"]
        lines += [f"  {name:<28}{calls:>14,}{samples:>18,}" for name, (calls, samples) in rows]
        lines.append(f"  {'memory':<28}{in_bytes(self.nbytes):>14}")
        lines += [f"    {name:<26}{'not known' if n is None else in_bytes(n):>14}" for name, n in self.memory.items()]
        lines.append(f"  {'time':<28}{'not tried' if self.seconds is None else 'about ' + in_time(self.seconds):>14}")
        return "\n".join([*lines, "assuming", *(f"  - {each}" for each in self.assumptions)])


def in_bytes(n: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n:.0f} B"


def in_time(seconds: float) -> str:
    if seconds >= 5400:
        return f"{seconds / 3600:.3g} h"
    return f"{seconds / 60:.3g} min" if seconds >= 90 else f"{seconds:.2g} s"


# ---- memory ----


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Each counted once, of sharded ones the shard."""
    return sum(local(t).nbytes for t in {id(t): t for t in tensors}.values())


def weights_of(module: object) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()] if isinstance(module, nn.Module) else []


def optimizer_nbytes(make: Callable | None, parameters: list[Tensor]) -> int | None:
    """Of the state that an optimiser has after a step of such parameters; None where that cannot be told."""
    if make is None:  # the run's own Adam, fused, which meta has not: two moments and a step of float32
        return sum(2 * p.nbytes + 4 for p in parameters)
    found = _state_nbytes(make, parameters, "meta")
    if found is None and sum(p.nbytes for p in parameters) < SMALL:  # one that looks at values
        found = _state_nbytes(make, parameters, "cpu")
    return found


def _state_nbytes(make: Callable, like: list[Tensor], device: str) -> int | None:
    parameters = [nn.Parameter(torch.zeros_like(p, device=device)) for p in like]
    try:
        optimizer = own_optimizer(make, parameters, 1e-3)
        for p in parameters:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    except Exception:  # whatever an optimiser does with weights that have no values
        return None
    return nbytes(t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor))


def memory_of(
    student: nn.Module,
    teacher: object,
    objective: StraightenLoss,
    *,
    optimizer: Callable | None,
    ema: float | None,
    bank_nbytes: int,
    state_nbytes: int,
    size: int,
    trial: Trial | None,
) -> dict[str, int | None]:
    """By part. state_nbytes: of a state; size: of the bank. Without a trial all weights are taken to have gradients."""
    own, trained = weights_of(student), [*trained_by_name(student).values()]
    ids = {id(t) for t in own}
    teachers = [] if teacher is None else weights_of(as_given(resolve(teacher).unfused()))
    found: dict[str, int | None] = {
        "student": nbytes(own),
        "teacher": nbytes(t for t in teachers if id(t) not in ids),
    }
    idle = frozenset() if trial is None else trial.idle
    moved = [p for p in trained if id(p) not in idle]
    found["gradients"] = nbytes(moved)
    found["optimizer"] = optimizer_nbytes(optimizer, [local(p) for p in moved])
    if ema is not None:
        found["average"] = sum(local(p).numel() * (4 if p.dtype in LOW else p.element_size()) for p in trained)
    if has_queue(trained[0].device):
        kept = _keeps(optimizer, trained)
        found["weights put back"] = None if kept is None else kept * nbytes(trained)
    found["bank"] = bank_nbytes
    if objective.needs_roll_out:
        N = objective.solver.steps
        found["student's own states"] = size * state_nbytes * (N + 1 + (2 * N if objective.refits else 0))
    found["activations"] = None if trial is None else trial.activations
    return found


def _unknown(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    raise NotImplementedError


def _keeps(make: Callable | None, parameters: list[nn.Parameter]) -> bool | None:
    """Whether weights are kept beside, on a GPU."""
    try:
        return not skips(own_optimizer(make, parameters, 1e-3))
    except Exception:  # as above
        return None


def seconds_of(counts: Counts, each: Counts, trial: Trial, batch: int) -> float:
    """By the time of a trial of some examples, where all evaluations take alike and a pass back as two."""
    return trial.seconds * counts.forwards / (each.forwards * trial.examples / batch)


def cost_of(
    settings: Settings,
    student: nn.Module,
    trajectories: RunBank | RunPairs,
    trial: Trial | None,
    begun: int = 0,
    asks: bool = True,
    ranks: int = 1,
) -> TrainingCost:
    """Of a run of these settings from an iteration on, which has made nothing of what it needs. asks: the settings'
    optimiser may be made, of weights without values. ranks: that share the time; evaluations are of all together."""
    objective, device, batch = settings.objective, next(student.parameters()).device, settings.batch
    left = range(begun, settings.iterations)
    guided = guided_of(settings.velocity, trajectories)
    in_autocast = settings.autocast is not None or torch.is_autocast_enabled(device.type)
    each = of_batch(objective, batch, settings.accumulate, guided, in_autocast)
    calls, evaluations = trajectories.to_roll_out(sum(map(settings.is_refreshed, left)))
    own = NONE
    if objective.needs_roll_out:
        own = of_own_states(objective, trajectories.size, batch).times(sum(map(settings.is_rolled_out, left)))
    counts = each.times(len(left)) + Counts(without_graph=own, bank=guided.of(calls, evaluations))
    held_out = HeldOut(trajectories, settings)
    if n := held_out.count:
        compared = of_samples(objective, held_out.solver, n, batch).times(1 if begun else 2)
        counts += Counts(without_graph=compared)
        if settings.evaluate_every is not None:
            rows = {it for it in range(begun, settings.iterations + 1) if it % settings.evaluate_every == 0}
            rows = rows - ({begun} if begun else set()) | {settings.iterations}
            measured = of_measured(objective, held_out.solver, n, batch, guided, in_autocast)
            counts += measured.times(len(rows))
    memory = memory_of(
        student,
        settings.velocity,
        objective,
        optimizer=settings.optimizer if asks or settings.optimizer is None else _unknown,
        ema=settings.ema,
        bank_nbytes=trajectories.nbytes,
        state_nbytes=trajectories.state_nbytes,
        size=trajectories.size,
        trial=trial,
    )
    seconds = None if trial is None else seconds_of(counts, each, trial, batch) / ranks
    return TrainingCost(counts, memory, seconds, len(left), assumed(settings, objective, guided, trial))


def guided_of(velocity: object, trajectories: RunBank | RunPairs) -> Guided:
    """What an evaluation of the teacher takes of its network."""
    field = None if velocity is None else resolve(velocity).unfused()
    given = isinstance(trajectories, RunBank) and trajectories.bank.guidance is not None
    if isinstance(field, VelocityField) and (field.is_guided or given):
        return Guided(1 if field.packed else 2, 2)
    return Guided()


def assumed(settings: Settings, objective: StraightenLoss, guided: Guided, trial: Trial | None) -> tuple[str, ...]:
    found = ["the trial of the student before the run, and the polish of a solver after it, are not counted"]
    if objective.target == "blockwise":
        found.append("calls are as many as networks, also where an interval is not drawn")
    if guided.evaluations > 1:
        found.append(f"an evaluation of the guided teacher is {guided.evaluations} of its network")
    found.append("what a step computes beside activations, gradients and weights is not in the memory")
    if settings.patience is not None:
        found.append("it does not stop before its iterations are done; the best weights are not in the memory")
    if settings.callbacks:
        found.append("callbacks are not counted")
    if trial is not None:
        found.append(f"{trial.examples} examples took {in_time(trial.seconds)} in a trial; all evaluations take alike")
        found.append("a pass back takes as long as two forwards")
    return tuple(found)
