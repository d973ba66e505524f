"""A schedule with times of the teacher's grid between its knots, for targets that are on its states there too."""

import torch

from flowkernels.schedule import Schedule
from flowkernels.training.bank.knots import knots_on_grid


def refined(schedule: Schedule, substeps: int) -> tuple[Schedule, tuple[int, ...]]:
    """Each interval in `substeps` steps, or in as many as the grid has there; without a grid, in equal ones. And which
    interval of the schedule each of them is in."""
    if substeps == 1:
        return schedule, tuple(range(schedule.steps))
    within: list[int] = []
    if schedule.grid is None:
        times = [schedule.times[:1]]
        for k, (start, end) in enumerate(zip(schedule.times[:-1], schedule.times[1:], strict=True)):
            between = torch.linspace(start, end, substeps + 1, dtype=torch.float64, device="cpu")[1:-1]
            times += [between, end[None]]
            within += [k] * substeps
        return Schedule(torch.cat(times)), tuple(within)
    places = list(schedule.indices[:1])
    for k in range(schedule.steps):
        first, last = schedule.indices[k : k + 2]
        parts = min(substeps, last - first)
        places += [first + round(i * (last - first) / parts) for i in range(1, parts + 1)]
        within += [k] * parts
    return Schedule(schedule.grid[places], schedule.grid, tuple(places)), tuple(within)


def on_grid(schedule: Schedule, grid) -> Schedule:
    """The schedule on a grid that is given, from which times between its knots are then taken; itself where none is."""
    if grid is None:
        return schedule
    fine, places = knots_on_grid(schedule, grid)
    return Schedule(fine[list(places)], fine, places, notes=schedule.notes)
