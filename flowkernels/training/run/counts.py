"""How often a run evaluates networks, counted beforehand."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from flowkernels.solver import Solver
from flowkernels.training.objective import StraightenLoss


class Count(NamedTuple):
    """calls: of a network. evaluations: of single samples in them."""

    calls: int
    evaluations: int

    def __add__(self, other: "Count") -> "Count":
        return Count(self.calls + other.calls, self.evaluations + other.evaluations)

    def times(self, n: int) -> "Count":
        return Count(n * self.calls, n * self.evaluations)


NONE = Count(0, 0)


@dataclass(frozen=True)
class Counts:
    """Of one part of a batch, or of a run: with_graph, of the student, as many of which go back; without_graph, of the
    student; teacher: in the iterations; bank: of the teacher, all refreshes included."""

    with_graph: Count = NONE
    without_graph: Count = NONE
    teacher: Count = NONE
    bank: Count = NONE

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    def times(self, n: int) -> "Counts":
        return Counts(*(getattr(self, name).times(n) for name in self.__dataclass_fields__))

    @property
    def forwards(self) -> float:
        """All evaluations, a pass back as two: in forwards of one sample."""
        others = self.without_graph.evaluations + self.teacher.evaluations + self.bank.evaluations
        return 3 * self.with_graph.evaluations + others


class Guided(NamedTuple):
    """What an evaluation of a teacher takes of its network."""

    calls: int = 1
    evaluations: int = 1

    def of(self, calls: int, samples: int) -> Count:
        return Count(self.calls * calls, self.evaluations * samples)


def of_part(objective: StraightenLoss, start: int, stop: int, of: int, guided: Guided, in_autocast: bool) -> Counts:
    """Of the examples from start to stop of a batch of so many. Calls of "blockwise" are an upper bound: it leaves out
    networks whose interval is not drawn; of "average_velocity", where its share of a batch is no whole number, the
    evaluations are within one example."""
    n, target = stop - start, objective.target
    graph, without, teacher = 1, 0, 0
    if target == "average_velocity":
        instantaneous = min(max(int(objective.instantaneous * of) - start, 0), n)
        later, split = n - instantaneous, objective.consistency == "split"
        without_graph = Count((1 + split) * (later > 0), (1 + split) * later)
        asked = [instantaneous] + [later] * (not split)  # of the teacher, where there is one
        calls = sum(k > 0 for k in asked) if objective.teacher is not None else 0
        return Counts(Count(1, n), without_graph, guided.of(calls, sum(asked) * (calls > 0)))
    if target == "endpoint":
        graph = objective.solver.evaluations
    elif target == "acceleration":
        graph = 2
    elif target == "blockwise":
        return Counts(Count(min(objective.knots.steps, n), n))
    elif target == "next_knot":
        without = 1
    elif target == "velocity_matching":
        without, teacher = 1 + in_autocast, 1
    elif target == "on_policy":
        teacher = 1
    return Counts(Count(graph, graph * n), Count(without, without * n), guided.of(teacher, teacher * n))


def of_samples(objective: StraightenLoss, solver: Solver, n: int, batch: int) -> Count:
    """Of the student, to make n samples on a solver, in batches."""
    calls = solver.evaluations + (objective.target == "acceleration")  # whose initial velocity is one more
    return Count(math.ceil(n / batch), n).times(calls)


def of_own_states(objective: StraightenLoss, n: int, batch: int) -> Count:
    """Of the student, to take its own states of n trajectories."""
    return Count(math.ceil(n / batch), n).times(objective.solver.steps - 1) if objective.needs_roll_out else NONE


def of_measured(
    objective: StraightenLoss, solver: Solver, n: int, batch: int, guided: Guided, in_autocast: bool
) -> Counts:
    """Of a measurement on n trajectories that are held out: samples, and the losses of all intervals."""
    J, found = len(objective.times) - 1, Counts()
    step = max(1, batch // J)
    for a in range(0, n, step):
        found += of_part(objective, a * J, min(a + step, n) * J, n * J, guided, in_autocast)
    own = of_samples(objective, solver, n, batch) + of_own_states(objective, n, batch)
    return Counts(NONE, found.with_graph + found.without_graph + own, found.teacher)


def of_batch(objective: StraightenLoss, batch: int, parts: int, guided: Guided, in_autocast: bool) -> Counts:
    found, parts = Counts(), min(parts, batch)
    for i in range(parts):
        found += of_part(objective, batch * i // parts, batch * (i + 1) // parts, batch, guided, in_autocast)
    return found
