"""The teacher's states at the knots, a chunk of trajectories at a time: from noise, or back from data."""

from collections.abc import Collection, Iterator, Mapping

from torch import Tensor

from flowkernels._checks import expect_finite_flow
from flowkernels.sampling import loop
from flowkernels.sampling.teacher import Teacher
from flowkernels.sampling.teacher_solver import KnotStates
from flowkernels.solver import Solver
from flowkernels.training.bank.knots import Knots
from flowkernels.training.students.student import expect_takes_conditioning
from flowkernels.velocity.field import VelocityField
from flowkernels.velocity.protocol import Velocity, VelocityBase, as_given, resolve


class TeacherStates:
    """Rolls the teacher out.

    Args:
        velocity: the teacher; of conditioning of its own with a row for each of `size` trajectories, each takes its
        own. knots: at which states are asked for.
        size: of all trajectories.
        solver: the teacher's on the grid, from its first time; None goes back from data at the last one, by Heun's.
        guidance: the name of the conditioning that is the teacher's weight of guidance.
        given: names of conditioning that is given with each chunk, in the place of its own; None where they are not
            known before that.
    """

    def __init__(
        self,
        velocity: Velocity,
        knots: Knots,
        size: int,
        chunk: int,
        solver: Solver | None,
        guidance: str | None,
        given: Collection[str] | None,
    ):
        self.velocity, self.knots, self.size, self.backward = resolve(velocity), knots, size, solver is None
        self.guidance = guidance
        self.solver = Solver.heun(knots.grid, inverse=True) if solver is None else solver
        self._at: dict[int, int] = {}  # behind how many evaluations which of the knots is reached
        if solver is not None:
            behind = [*range(solver.steps)] if solver.is_euler else [*KnotStates.of(solver).places]
            behind.append(solver.evaluations)
            self._at = {behind[k]: i for i, k in enumerate(knots.places)}
        if given is not None:  # that its conditioning has as many rows
            self.velocity.unfused().without_conditioning(given).rows(slice(0, min(chunk, size)), size)
        self._teacher = None if solver is None else Teacher(self.velocity, size, solver=self.solver, chunk=chunk)

    @property
    def evaluations(self) -> int:
        """Of a chunk."""
        return self.solver.evaluations

    @property
    def is_fused(self) -> bool:
        """Whether kernels make all steps at once."""
        return self._teacher is not None and self._teacher.fused is not None

    def flow(self, x: Tensor, rows: slice, conditioning: Mapping[str, Tensor]) -> Iterator[tuple[int | None, Tensor]]:
        """(place among the knots, or None where there is no knot, state) behind each evaluation and before the first,
        of the trajectories `rows` from their states x; a state is good until the next one."""
        if self.backward:
            return self._backward(self._field(rows, conditioning), x, rows.start)
        if conditioning:
            return self._forward(Teacher(self._field(rows, conditioning), len(x), solver=self.solver), x, 0)
        return self._forward(self._teacher, x, rows.start)

    def back(self, x: Tensor, rows: slice, conditioning: Mapping[str, Tensor]) -> Tensor:
        """The data that Heun's method makes of the states at the grid's first time."""
        for step in loop.steps(self._field(rows, conditioning), x, Solver.heun(self.knots.grid)):
            x, _ = step
        return x

    def _forward(self, teacher: Teacher, x: Tensor, first: int) -> Iterator[tuple[int | None, Tensor]]:
        at = self._at
        if teacher.fused is not None:
            _, states, _ = teacher.fused_flow(x, first, states=True)
            yield from ((at.get(k), x) for k, x in enumerate(states))
            return
        yield at.get(0), x
        yield from ((at.get(k), x) for k, (x, _) in enumerate(teacher.flow(x, first), start=1))

    def _backward(self, field: VelocityBase, x: Tensor, first: int) -> Iterator[tuple[int | None, Tensor]]:
        K, last = len(self.knots.grid) - 1, self.solver.evaluations - 1
        at = {k: i for i, k in enumerate(self.knots.places)}
        yield at.get(K), x
        for i, (state, _) in enumerate(loop.steps(field, x, self.solver)):  # two evaluations a step, one of the last
            made = 0 if i == last else K - (i + 1) // 2 if i % 2 else None
            yield None if made is None else at.get(made), state
        known = loop.velocities_along(field, x, self.solver)
        expect_finite_flow(state, known, self.solver.model_times, first=first, what="evaluation")

    def _field(self, rows: slice, conditioning: Mapping[str, Tensor]) -> VelocityBase:
        """The velocity of some trajectories."""
        field = self.velocity.unfused().without_conditioning(conditioning).rows(rows, self.size)
        if not conditioning:
            return field
        given = dict(conditioning)
        weight = None if self.guidance is None else given.pop(self.guidance)
        field = VelocityField.of(as_given(field)).with_conditioning(given, weight)
        expect_takes_conditioning(field, given, "velocity")
        return field
