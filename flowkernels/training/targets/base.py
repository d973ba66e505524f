"""What a target is, and what it is given."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flowkernels._checks import expect
from flowkernels.ops.library import no_autocast
from flowkernels.ops.segment_points import segment_points
from flowkernels.ops.straighten_loss.reference import secants
from flowkernels.schedule import Schedule
from flowkernels.solver import Solver
from flowkernels.training.bank.batch import BankBatch, generator_on, uniform
from flowkernels.training.students.acceleration import Acceleration
from flowkernels.training.students.average_velocity import AverageVelocity
from flowkernels.training.students.noise_prediction import NoisePrediction
from flowkernels.training.students.student import student_velocity, teacher_velocity
from flowkernels.training.t_sampling import START
from flowkernels.velocity.protocol import Velocity


class RolledOut(NamedTuple):
    """A student's own samples on a solver: x_k, k < N, and last the teacher's, `[N+1, n, *shape]`. of: the teacher's
    states. pairs, step_sizes: of each step `a[k] x_0 + sum_{i<k} b[k,i] v_i` and the teacher's state at its
    end, `[2N, n, *shape]`, and b[k,k], float64 `[2N-1]`, at the places 2k; None where they are not wanted."""

    states: Tensor
    of: Tensor
    pairs: Tensor | None
    step_sizes: Tensor | None


class Answer(NamedTuple):
    """What the student answered, `[B, *shape]` with its graph, and what it should have: the secants `(pairs[i+1, s] -
    pairs[i, s]) / step_sizes[i]` of the places i and columns s, `[B]`. weight: factors on the losses `[B]`, or None.
    A `Dense` has the target itself."""

    v: Tensor
    pairs: Tensor
    step_sizes: Tensor
    places: Tensor
    columns: Tensor
    weight: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """That of the targets and losses."""
        return self.pairs.dtype

    def target(self, rows: slice = slice(None)) -> Tensor:
        """Of some of the samples, `[m, *shape]`."""
        return secants(self.pairs, self.step_sizes, self.places[rows], self.columns[rows])


class Dense(NamedTuple):
    """What the student answered, and the target `[B, *shape]`. spare: whether its memory may be written to."""

    v: Tensor
    targets: Tensor
    weight: Tensor | None
    spare: bool

    @property
    def dtype(self) -> torch.dtype:
        return self.targets.dtype

    def target(self, rows: slice = slice(None)) -> Tensor:
        return self.targets[rows]


@dataclass(frozen=True)
class Call:
    """One batch of a `StraightenLoss`, as a target sees it.

    states `[M, n, *shape]`, places and columns `[B]`: an example's interval is from `states[place, column]` to
    `states[place + 1, column]`; step_sizes float64 `[M-1]`, by place. start, size: the time at which it begins and how
    long it is, float64 `[B]`; end: that of the schedule's interval, which begins before and ends later where the bank
    has states between the knots. batch: what was given; its intervals and samples are those of the bank, whose times
    are `times`.
    solver: what "solver" and "endpoint" are given, Euler's of the schedule for others. rolled_out: the student's own
    samples on it, of the last `StraightenLoss.roll_out`; None before, and of targets that need none.
    progress: how much of the training is done, in [0, 1], where a target needs it. settings: those that one target
    alone has, by the names of arguments of `StraightenLoss`. autocast: of the student's evaluations.
    """

    student: nn.Module
    states: Tensor
    places: Tensor
    columns: Tensor
    step_sizes: Tensor
    start: Tensor
    size: Tensor
    end: Tensor
    batch: BankBatch
    generator: torch.Generator
    draw_u: Callable[[int, torch.Generator, torch.device], Tensor | None]
    times: Tensor
    solver: Solver
    teacher: Velocity | None
    rolled_out: RolledOut | None
    progress: float | None
    settings: Mapping[str, Any]
    autocast: torch.dtype | None = None

    @property
    def samples(self) -> int:
        """n of the bank."""
        return self.batch.states.shape[1] if self.batch.size is None else self.batch.size

    def velocity(self, x: Tensor, t: Tensor, **given: Any) -> Tensor:
        """The student's, `[B, *shape]`, with its graph. given: further arguments, of a student that takes them."""
        whose = self.batch.sample, self.samples, self.batch.conditioning
        return student_velocity(self.student, x, t, *whose, self.autocast, **given)

    def in_autocast(self, x: Tensor) -> bool:
        """Whether the student is evaluated in it, by the run or by the caller's context."""
        return self.autocast is not None or torch.is_autocast_enabled(x.device.type)

    def velocities(
        self, first: tuple[Tensor, Tensor], *others: tuple[Tensor, Tensor], exact: bool = False
    ) -> list[Tensor]:
        """The student's at several (x, t), the first with its graph and the others without one. What it draws, as
        dropout does, falls alike in all, as consistency models have it (arXiv 2303.01469). exact: the others in its own
        precision, out of a caller's autocast."""
        x = first[0]
        devices = [x.device] if x.device.type == "cuda" else []
        before = _random_states(devices)
        found = [self.velocity(*first)]
        drawn = any(not torch.equal(a, b) for a, b in zip(before, _random_states(devices), strict=True))
        for other in others:
            apart = torch.random.fork_rng(devices) if drawn else nullcontext()
            with torch.no_grad(), no_autocast(x) if exact else nullcontext(), apart:
                if drawn:
                    torch.set_rng_state(before[0])
                    for device, state in zip(devices, before[1:], strict=True):
                        torch.cuda.set_rng_state(state, device)
                found.append((replace(self, autocast=None) if exact else self).velocity(*other))
        return found

    def teachers_velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """The teacher's, with guidance, `[B, *shape]`."""
        given = self.batch.conditioning, self.batch.guidance
        return teacher_velocity(self.teacher, x, t, self.batch.sample, self.samples, *given)

    def examples(self, rows: slice) -> "Call":
        """That of some of the examples."""
        parts = {name: getattr(self, name)[rows] for name in ("places", "columns", "start", "size", "end")}
        return replace(self, batch=self.batch.examples(rows), **parts)

    @property
    def part(self) -> tuple[int, int, int]:
        """(start, stop, of): which of a batch's examples these are."""
        return self.batch.part or (0, len(self.places), len(self.places))

    def drawn(self, draw: Callable[[int], Tensor | None]) -> Tensor | None:
        """Of what is drawn for all examples of the batch, that of these."""
        start, stop, of = self.part
        found = draw(of)
        return found if found is None or (start, stop) == (0, of) else found[start:stop]

    def u(self) -> Tensor | None:
        """Where on its interval each example is, `[B]` in [0, 1]; None where all are at its start."""
        return self.drawn(lambda n: self.draw_u(n, self.generator, self.states.device))

    def uniform(self) -> Tensor:
        """In [0, 1), float32 `[B]`."""
        return self.drawn(lambda n: uniform(n, self.generator, self.states.device))

    def normal(self) -> Tensor:
        """Standard normal, a state for each example `[B, *shape]`."""
        device, generator = self.states.device, generator_on(self.states.device, self.generator)
        of = dict(generator=generator, dtype=self.states.dtype, device=device)
        return self.drawn(lambda n: torch.randn(n, *self.states.shape[2:], **of))

    def chord(self) -> tuple[Tensor, Tensor]:
        """(x, t): points on the lines between the ends of the examples' intervals, at u."""
        u = self.u()
        t = self.start if u is None else self.start + u * self.size
        return segment_points(self.states, self.places, self.columns, u), t

    def secant(self, v: Tensor) -> Answer:
        """That v should be the secant of the examples' intervals."""
        return Answer(v, self.states, self.step_sizes, self.places, self.columns)


def _random_states(devices: Sequence[torch.device]) -> list[Tensor]:
    """Of torch's own generators, of the CPU and of GPUs, for none of which is waited."""
    return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)]


def dense(v: Tensor, target: Tensor, weight: Tensor | None = None, spare: bool = False) -> Dense:
    """That v should be a target `[B, *shape]`, which has no gradient. spare: it is nobody else's, and may be
    overwritten."""
    return Dense(v, target.detach(), weight, spare)


def expect_velocity(student: nn.Module) -> None:
    """A student of one state and time: others make steps of their own of what they learn, by a target of their own."""
    own = {"acceleration": Acceleration, "noise": NoisePrediction, "average_velocity": AverageVelocity}
    target = next((name for name, kind in own.items() if isinstance(student, kind)), None)
    is_one = getattr(student, "path", "") == "straight" or getattr(student, "knots", None) is not None
    expect(target is None or is_one, "student", f"a velocity (x, t), or target={target!r}", student, TypeError)


@dataclass(frozen=True)
class Target:
    """A row of `TARGETS`.

    answer: what the student is asked, and what it should answer.
    whole: on one interval, from the schedule's first knot to its last. t_sampling: where none is asked for. only: and
    no other is taken.
    loss: where none is asked for.
    between: on the teacher's states between the knots too.
    solver: takes a Solver in place of the schedule. own: on the student's own states, by `roll_out`.
    from_noise: the schedule has to begin at 0.
    teacher: evaluates the teacher. progress: needs to know how much of the training is done.
    expect_student: raises for a student that lacks what it needs, naming it. made: of a copy of the teacher and the
    schedule, the student where none is given; None: that copy.
    """

    answer: Callable[[Call], Answer | Dense]
    whole: bool = False
    t_sampling: str = START
    only: bool = False
    loss: str = "l2"
    between: bool = False
    solver: bool = False
    own: bool = False
    from_noise: bool = False
    teacher: bool = False
    progress: bool = False
    expect_student: Callable[[nn.Module], None] = expect_velocity
    made: Callable[[nn.Module, Schedule], nn.Module] | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the student is a velocity like any other, for a schedule."""
        return not self.solver and self.expect_student is expect_velocity
