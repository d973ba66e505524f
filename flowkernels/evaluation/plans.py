"""What `evaluate_sampler` is given to evaluate: plans, alone, of a calibration, in lists and by name."""

import numbers
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

from flowkernels._checks import MOST_STEPS, expect, expect_int, expect_list, expect_shown
from flowkernels.schedule import Schedule
from flowkernels.solver import Solver
from flowkernels.velocity.protocol import Velocity, VelocityBase, resolve


@runtime_checkable
class Calibrated(Protocol):
    """What is taken of a `Calibration`: the numbers of steps that it has plans for, and the best one of each."""

    @property
    def solvers(self) -> Mapping[int, Solver]: ...

    @property
    def teacher_solver(self) -> Solver: ...

    def best(self, steps: int) -> Schedule | Solver: ...

    def __iter__(self) -> Iterator[int]: ...


Plan: TypeAlias = Schedule | Solver | int
Plans: TypeAlias = Plan | Calibrated | Sequence[Plan] | Mapping[int, Schedule] | Mapping[int, Solver]
NamedPlans: TypeAlias = Mapping[str, Plans | tuple[Velocity, Plans]]

EXPECTED = "Schedules, Solvers, numbers of steps or a Calibration: one, a list, or a dict from names to any of them"
STEPS = f"numbers of steps from 1 to {MOST_STEPS:,}"


@dataclass(frozen=True)
class Planned:
    """One row: its name, the velocity (None: the one of all), and the steps."""

    name: str
    velocity: VelocityBase | None
    solver: Solver
    plan: Schedule | Solver


def planned(given: Plans | NamedPlans) -> list[Planned]:
    """All rows, in the order given, of a calibration in that of their numbers of steps."""
    rows = [*_rows(given, None, None)]
    expect(len(rows) > 0, "plans", "at least one plan", given)
    return rows


def calibration_of(given: Any) -> Calibrated | None:
    """The first calibration among plans."""
    if isinstance(given, Calibrated):
        return given
    values = given.values() if isinstance(given, Mapping) else given if isinstance(given, (list, tuple)) else ()
    return next((found for found in map(calibration_of, values) if found is not None), None)


def _rows(given: Any, name: str | None, velocity: VelocityBase | None) -> Iterator[Planned]:
    if isinstance(given, Calibrated):
        for steps in sorted({*given, *given.solvers}):
            yield from _rows(given.best(steps), "best" if name is None else name, velocity)
    elif isinstance(given, Schedule):
        yield Planned(name or "schedule", velocity, Solver.of(given), given)
    elif isinstance(given, Solver):
        expect(given.reaches_data, "plans", "solvers from noise to data", given)
        yield Planned(name or given.name, velocity, given, given)
    elif isinstance(given, numbers.Integral) and not isinstance(given, bool):
        schedule = Schedule.uniform(expect_int(given, "plans", STEPS, 1, MOST_STEPS))
        yield Planned(name or "uniform", velocity, Solver.of(schedule), schedule)
    elif isinstance(given, Mapping) and name is None and all(isinstance(key, str) for key in given):
        for key, value in given.items():
            expect(key != "", "plans", "names", "''")
            own, plans = _student(value, key)
            yield from _rows(plans, key, own)
    elif isinstance(given, Mapping):
        whole = all(isinstance(key, numbers.Integral) for key in given)
        expect_shown(whole and len(given) > 0, "plans", EXPECTED, given, TypeError)
        for value in given.values():
            yield from _rows(value, name, velocity)
    else:
        entries = None if isinstance(given, str) or callable(given) else expect_list(given, "plans", EXPECTED)
        expect_shown(entries is not None, "plans", EXPECTED, given, TypeError)
        for value in entries:
            single = isinstance(value, (Schedule, Solver, numbers.Integral, Calibrated))
            expect_shown(single, "plans", EXPECTED, value, TypeError)
            yield from _rows(value, name, velocity)


def _student(value: Any, name: str) -> tuple[VelocityBase | None, Any]:
    """(velocity, plans) of an entry by name."""
    if isinstance(value, tuple) and len(value) == 2 and callable(value[0]):
        return resolve(value[0], f"plans[{name!r}]"), value[1]
    return None, value
