"""Which of the teacher's states a bank keeps: the knots of one schedule, or of several."""

import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowkernels._checks import expect, expect_list, expect_shown, expect_times
from flowkernels.sampling.teacher_solver import ENTRY, EULER, expect_teacher_solver
from flowkernels.schedule import Schedule, first_from, forced_places
from flowkernels.solver import Solver
from flowkernels.velocity.protocol import VelocityBase

SCHEDULES = "a Schedule, a Solver, a StraightenLoss, or several of them"


def knots_on_grid(schedule: Schedule, grid) -> tuple[Tensor, tuple[int, ...]]:
    """The teacher's fine grid, the schedule's own where `grid` is None, and the places of the schedule's knots in it;
    ValueError or TypeError, naming `grid`, where there is none or it misses a knot."""
    if grid is None:
        expect(
            schedule.grid is not None,
            "grid",
            "the teacher's fine grid, such as 100 or cal.times, for a schedule that has none",
            "None",
        )
        return schedule.grid, schedule.indices
    fine = expect_times(grid, "grid")
    distance, nearest = (fine[None] - schedule.times[:, None]).abs().min(1)
    if bool((distance >= 1e-9).any()):
        knot, near = (float(of[distance.argmax()]) for of in (schedule.times, fine[nearest]))
        got = f"{len(fine) - 1} steps without {knot:.9g} (the nearest is {near:.9g})"
        expect(False, "grid", "a grid that contains every time of the schedule", got)
    return fine, tuple(nearest.tolist())


def noted_teacher(plan: Any) -> Any:
    """The teacher's solver that a schedule, a solver or a loss's was calibrated with, as its notes say; None is Euler's
    steps, or nothing that is known."""
    return getattr(plan, "notes", {}).get(ENTRY) if isinstance(plan, (Schedule, Solver)) else getattr(plan, ENTRY, None)


def schedule_of(plan: Any, name: str = "schedules") -> Schedule:
    """The knots of a schedule, a solver, or of what a `StraightenLoss` is for."""
    plan = getattr(plan, "schedule", plan)
    if isinstance(plan, Solver) and plan.reaches_data:
        plan = Schedule(plan.times)
    expect(isinstance(plan, Schedule), name, SCHEDULES, plan, TypeError)
    return plan


@dataclass(frozen=True)
class Knots:
    """grid: the teacher's fine grid, float64 `[K+1]`. places: of the states that are kept in it, rising. schedules:
    what they are the knots of. noted: the teachers' solvers that these were calibrated with, each once."""

    grid: Tensor
    places: tuple[int, ...]
    schedules: tuple[Schedule, ...]
    noted: tuple[Any, ...] = ()

    @classmethod
    def of(cls, schedules: Any, grid: Any = None) -> "Knots":
        """One schedule or several, a calibration's among them, on one grid."""
        if isinstance(schedules, Mapping):
            schedules = list(schedules.values())
        one = isinstance(schedules, (Schedule, Solver)) or hasattr(schedules, "schedule")
        several = [schedules] if one else expect_list(schedules, "schedules", SCHEDULES)
        expect(len(several) > 0, "schedules", SCHEDULES, "none")
        plans, places, fine = [schedule_of(plan) for plan in several], set(), None
        for plan in plans:
            own, indices = knots_on_grid(plan, grid)
            expected = "schedules of one grid, or the teacher's fine grid that has the knots of all (grid=)"
            expect(fine is None or torch.equal(own, fine), "schedules", expected, f"another grid of {plan}")
            fine = own
            places.update(indices)
        noted: list[Any] = []
        for plan in several:
            if (teacher := noted_teacher(plan)) not in noted:
                noted.append(teacher)
        return cls(fine, tuple(sorted(places)), tuple(plans), tuple(noted))

    def teacher_solver(self, given: str | Solver | None, velocity: VelocityBase) -> Solver:
        """The teacher's on the grid: given, or None for what the schedules were calibrated with."""
        if given is None:
            told = "schedules that were calibrated with one teacher's solver, or teacher_solver="
            expect(len(self.noted) < 2, "schedules", told, f"{len(self.noted)} solvers")
            given = (*self.noted, None)[0] or EULER
            if isinstance(given, Mapping):
                given = Solver.from_dict({**given, "notes": {}})
        forced = forced_places(first_from(velocity.forced_knots, self.grid), self.grid)
        return expect_teacher_solver(given, self.grid, forced)

    @property
    def times(self) -> Tensor:
        """Of the states that are kept, float64 `[M]`."""
        return self.grid[list(self.places)]

    def choose(self, wanted: Any, name: str = "schedule") -> tuple[int, ...]:
        """The places among the states kept of one of the schedules, by its number of steps, or of the knots of any
        Schedule, Solver or loss that are kept; None is the one schedule that there is."""
        told = f"one of the bank's schedules, of {', '.join(str(s.steps) for s in self.schedules)} steps"
        found = self.schedules
        if isinstance(wanted, numbers.Integral) and not isinstance(wanted, bool):
            found = tuple(s for s in self.schedules if s.steps == wanted)
        elif wanted is not None:
            found = (schedule_of(wanted, name),)
        alike = len(found) > 0 and all(torch.equal(s.times, found[0].times) for s in found)
        expect_shown(alike, name, told, wanted)
        distance, nearest = (self.times[None] - found[0].times[:, None]).abs().min(1)
        expected = f"knots that the bank keeps, among {[round(t, 6) for t in self.times.tolist()]}"
        expect(bool((distance < 1e-9).all()), name, expected, found[0])
        return tuple(nearest.tolist())
