"""Schedules of single samples, or of groups of them, such as of each prompt: `Calibration.find(each=)`."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowkernels._checks import expect
from flowkernels.calibration.bellman import least_cost_schedules
from flowkernels.calibration.measured import Measured
from flowkernels.calibration.step_cost import StepCost
from flowkernels.sampling.sample_schedules import Name, SampleSchedules, expect_names
from flowkernels.schedule import Schedule


@dataclass(frozen=True)
class Groups:
    """Samples in groups.

    of: the group of each of n samples, int64 `[n]`. count: the number of groups. names: of these, in order of their
    first samples; None: each sample is its own.
    """

    of: Tensor
    count: int
    names: tuple[Name, ...] | None = None

    def rows(self, group: int) -> Tensor:
        return (self.of == group).nonzero().flatten()

    def first(self, n: int) -> "Groups":
        """Of the first n samples."""
        of = self.of[:n]
        if self.names is None:
            return Groups(of, len(of))
        lacking = [name for i, name in enumerate(self.names) if not (of == i).any()]
        expect(not lacking, "samples", "so many that each condition has one", f"{n}, without one of {lacking}")
        return Groups(of, self.count, self.names)

    def means(self, errors: Tensor) -> Tensor:
        """Of errors of samples `[..., n]` the mean over each group, `[..., groups]`."""
        if self.count == 1:
            return errors.mean(-1, keepdim=True)
        if self.names is None:
            return errors
        of = self.of.to(errors.device)
        sums = errors.new_zeros(*errors.shape[:-1], self.count).index_add_(-1, of, errors)
        return sums / of.bincount(minlength=self.count)


def all_of(n: int) -> Groups:
    """One group of n samples."""
    return Groups(torch.zeros(n, dtype=torch.int64, device="cpu"), 1, ("all",))


def groups_of(each: Any, cal: Measured) -> Groups:
    """What `find` takes as `each`, of a calibration's kept samples."""
    wanted = "a calibration that keeps samples, for a schedule for each"
    expect(cal.kept is not None, "each", wanted, "one of none")
    n = cal.kept.x.shape[1]
    if each is True:
        return Groups(torch.arange(n, device="cpu"), n)
    names = expect_names(each, "each")
    expect(len(names) == n, "each", f"True, or the conditions of the {n} kept samples, one for each", f"{len(names)}")
    places = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return Groups(torch.tensor([places[name] for name in names], device="cpu"), len(places), tuple(places))


def least_cost_of_each(
    cal: Measured, steps: list[int], groups: Groups, costs: Iterable[Tensor], shared: dict[int, Schedule], name: str
) -> dict[int, SampleSchedules]:
    """Schedules of least cost by the step costs `[K+1, K+1]` of each group; shared: those of all samples."""
    own: dict[int, list[Schedule]] = {n: [] for n in steps}
    of_shared: dict[int, list[float]] = {n: [] for n in steps}
    for cost in costs:
        for n, plan in least_cost_schedules(cost, cal.times, steps, forced_knots=cal.forced_knots).items():
            own[n].append(plan)
            of_shared[n].append(sum(cost[step].item() for step in itertools.pairwise(shared[n].indices)))
    found = {}
    for n, plans in own.items():
        times = torch.stack([plan.times for plan in plans])
        cost = [plan.cost for plan in plans]
        notes = dict(objective=name, evaluations=0, samples=len(groups.of))
        found[n] = SampleSchedules(times, groups.names, cost, shared[n], of_shared[n], notes)
    return found


def costs_of_each(cal: Measured, groups: Groups, norm: bool = False) -> Iterable[Tensor]:
    """The step costs E|e|^2 of each group, or E|e|."""
    x, v = cal.kept.x, cal.kept.v

    def cost(rows: Tensor) -> Tensor:
        of = StepCost(cal.times, states=cal.secants, device=v.device)
        return of.update(v[:, rows], x[:, rows] if cal.secants else None).cost().cpu()

    for group in range(groups.count):
        rows = groups.rows(group)
        yield torch.stack([cost(row).sqrt() for row in rows.split(1)]).mean(0) if norm else cost(rows)
