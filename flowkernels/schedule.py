"""Schedules: the knots of N steps, and what is known of their cost."""

import itertools
import math
import numbers
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from flowkernels._checks import (
    expect,
    expect_float64,
    expect_int,
    expect_list,
    expect_mapping,
    expect_positive_int,
    expect_real,
    expect_shown,
    expect_times,
)


@dataclass(frozen=True)
class Schedule:
    """The knots of an N-step sampler.

    times: float64 `[N+1]`, from 0 (noise), or later, to 1 (data). A schedule that begins later, as published tables
        do whose first sigma is below 1, begins with the state there: where a stage takes noise, it is that state.
    grid: float64 `[K+1]`, the fine grid they were chosen from; None for times that come from no grid.
    indices: the knots' places in the grid; None without a grid.
    cost: sum of the step costs along the schedule; uniform_cost: of the uniform schedule on the same grid.
    cost_interval: bootstrap interval of 95 % of its cost over samples. samples_needed: the number of samples with which
        the interval's half-width would be 2 % of the cost. Both None where unknown.
    notes: where it comes from, such as the objective and the evaluations it took.

    Schedules are equal whatever their cost_interval, samples_needed and notes.

    Examples:
        >>> schedule = fk.Schedule([0, 0.7, 1])
        >>> schedule.steps, schedule.sigmas
        (2, tensor([1.0000, 0.3000, 0.0000], dtype=torch.float64))
    """

    times: Tensor
    grid: Tensor | None = None
    indices: tuple[int, ...] | None = None
    cost: float | None = None
    uniform_cost: float | None = None
    cost_interval: tuple[float, float] | None = None
    samples_needed: int | None = None
    notes: dict = field(default_factory=dict)

    def __post_init__(self):
        checked = {"times": expect_times(self.times, "times"), "notes": dict(expect_mapping(self.notes, "notes"))}
        together = (self.grid is None) == (self.indices is None)
        expect(together, "indices", "the knots' places with a grid, and None without", self.indices)
        if self.grid is not None:
            checked["grid"] = expect_times(self.grid, "grid")
            checked["indices"] = _expect_places(self.indices, checked["times"], checked["grid"])
        if self.cost is not None:
            checked["cost"] = expect_real(self.cost, "cost")
        if self.uniform_cost is not None:
            known = "a number, Inf where a step is forbidden"
            checked["uniform_cost"] = expect_real(
                self.uniform_cost, "uniform_cost", known, lambda c: c > -math.inf, False
            )
        if self.cost_interval is not None:
            checked["cost_interval"] = _expect_interval(self.cost_interval)
        if self.samples_needed is not None:
            checked["samples_needed"] = expect_int(
                self.samples_needed, "samples_needed", "a number of samples, at least 1", 1
            )
        for name, value in checked.items():  # tensors of its own: the caller may write to what it gave
            object.__setattr__(self, name, value.clone() if isinstance(value, Tensor) else value)

    @classmethod
    def uniform(cls, steps: int, start: float = 0.0, forced_knots: Sequence[float] | Tensor = ()) -> "Schedule":
        """N equal steps from `start` to 1, on no grid.

        forced_knots: times between, to be knots of it: the steps are equal between two of them, of which each has as
        many as leave the longest step as short as can be. ValueError for fewer steps than they take.
        """
        even = expect_times(expect_positive_int(steps, "steps"), "steps")
        start = expect_real(start, "start", "a time, 0 <= start < 1", lambda t: 0 <= t < 1)
        forced = sorted(set(_expect_forced(forced_knots).tolist()))
        if not start and not forced:
            return cls(even)
        expect(all(start < t < 1 for t in forced), "forced_knots", f"times between {start:g} and 1", forced)
        _expect_enough(steps, len(forced))
        knots, ends = [], torch.tensor([start, *forced, 1], dtype=torch.float64, device="cpu")
        for (begin, end), n in zip(itertools.pairwise(ends), _shares(ends, steps), strict=True):
            knots.append(torch.linspace(begin, end, n + 1, dtype=torch.float64, device="cpu")[:-1])
        return cls(torch.cat([*knots, ends[-1:]]))

    @property
    def steps(self) -> int:
        """N, the number of velocity evaluations (NFE)."""
        return len(self.times) - 1

    @property
    def step_sizes(self) -> Tensor:
        """float64 `[N]`."""
        return self.times.diff()

    @property
    def sigmas(self) -> Tensor:
        """1 - t, float64 `[N+1]`, from 1, or less, to 0.

        Samplers that shift what they are handed, as most of diffusers' do, run another schedule on them:
        `flowkernels.integrations.diffusers.sigmas_for` undoes it.
        """
        return 1 - self.times

    @property
    def ratio(self) -> float | None:
        """cost / uniform_cost, at most 1 for a schedule of least cost; 1 where both are zero. None where one is unknown
        or below 0, as sums of differences may be."""
        if self.cost is None or self.uniform_cost is None or min(self.cost, self.uniform_cost) < 0:
            return None
        return self.cost / self.uniform_cost if self.uniform_cost > 0 else 1.0

    def __eq__(self, other) -> bool:
        if not isinstance(other, Schedule):
            return NotImplemented
        grids = (self.grid is None) == (other.grid is None) and (
            self.grid is None or torch.equal(self.grid, other.grid)
        )
        mine, theirs = ((s.indices, s.cost, s.uniform_cost) for s in (self, other))
        return torch.equal(self.times, other.times) and grids and mine == theirs

    def __hash__(self) -> int:
        return hash((tuple(self.times.tolist()), self.indices))

    def __repr__(self) -> str:
        knots = ", ".join(f"{t:.3g}" for t in self.times)
        costs = {"cost": self.cost, "uniform_cost": self.uniform_cost}
        known = "".join(f", {name}={c:.4g}" for name, c in costs.items() if c is not None)
        if self.cost_interval is not None:
            low, high = self.cost_interval
            known += f", cost_interval=[{low:.4g}, {high:.4g}], samples_needed={self.samples_needed}"
        return f"Schedule(steps={self.steps}, times=[{knots}]{known})"


def _expect_places(indices, times: Tensor, grid: Tensor) -> tuple[int, ...]:
    """The places of the times in the grid, as Python's integers."""
    fits, knots = isinstance(indices, Sequence) and len(indices) == len(times), grid.tolist()
    fits = fits and all(isinstance(i, (int, numbers.Integral)) and 0 <= i < len(knots) for i in indices)
    places = tuple(map(int, indices)) if fits else ()
    fits = fits and [knots[i] for i in places] == times.tolist()
    expect_shown(fits, "indices", f"the places of the {len(times)} times in the grid", indices)
    return places


def _expect_interval(ends) -> tuple[float, float]:
    expected = "two finite numbers, the lower one first"
    two = isinstance(ends, Sequence) and not isinstance(ends, str) and len(ends) == 2
    expect_shown(two, "cost_interval", expected, ends, TypeError)
    low, high = (expect_real(end, "cost_interval", expected) for end in ends)
    expect_shown(low <= high, "cost_interval", expected, ends)
    return low, high


def _shares(ends: Tensor, steps: int, most: Sequence[int] | None = None) -> list[int]:
    """How many of N steps each of the intervals between `ends` has: the longest step is as short as can be. most: that
    an interval has room for."""
    lengths, shares = ends.diff().tolist(), [1] * (len(ends) - 1)
    for _ in range(steps - len(shares)):
        room = [i for i, n in enumerate(shares) if most is None or n < most[i]]
        shares[max(room, key=lambda i: lengths[i] / shares[i])] += 1
    return shares


def uniform_indices(times: Tensor, steps: int, forced: Sequence[int] = ()) -> tuple[int, ...]:
    """The grid's knots nearest to those of N equal steps, kept strictly increasing; with forced ones, by their places,
    equal between these."""
    ends = [0, *forced, len(times) - 1]
    found = [0]
    for (a, b), n in zip(itertools.pairwise(ends), _shares(times[ends], steps, np.diff(ends).tolist()), strict=True):
        found += [a + i for i in _evenly(times[a : b + 1], n)[1:]]
    return tuple(found)


def _evenly(times: Tensor, steps: int) -> list[int]:
    K = len(times) - 1
    even = torch.linspace(times[0], times[-1], steps + 1, dtype=torch.float64, device="cpu")
    nearest = (times[None] - even[:, None]).abs().argmin(1).tolist()
    nearest[0], nearest[-1] = 0, K
    for i in range(1, steps):  # on a grid with large gaps two may share a knot
        nearest[i] = max(nearest[i], nearest[i - 1] + 1)
    for i in range(steps - 1, -1, -1):
        nearest[i] = min(nearest[i], nearest[i + 1] - 1, K - (steps - i))
    return nearest


def _expect_forced(forced_knots) -> Tensor:
    forced, expected = expect_float64(forced_knots, "forced_knots", "a sequence of times"), "a sequence of finite times"
    expect(forced.dim() == 1 and bool(torch.isfinite(forced).all()), "forced_knots", expected, forced_knots)
    return forced


def forced_places(forced_knots: Sequence[float] | Tensor, times: Tensor) -> tuple[int, ...]:
    """The places of forced knots in a grid, rising; its ends, which every schedule has, are left out."""
    forced = _expect_forced(forced_knots)
    distance, nearest = (times - forced[:, None]).abs().min(1)
    for t, away, k in zip(forced.tolist(), distance.tolist(), nearest.tolist(), strict=True):
        got = f"{t:.9g}, whose nearest one is {times[k]:.9g} (put it into the grid)"
        expect(away < 1e-9, "forced_knots", "times of the grid", got)
    return tuple(k for k in sorted(set(nearest.tolist())) if 0 < k < len(times) - 1)


def first_from(knots: Sequence[float], times: Tensor) -> list[float]:
    """The first time of a grid that is not before each knot, of those within the grid."""
    at = torch.searchsorted(times, torch.tensor(knots, dtype=torch.float64, device="cpu") - 1e-9)
    return [times[i].item() for t, i in zip(knots, at.tolist(), strict=True) if times[0] < t <= times[-1]]


def _expect_enough(steps: int, forced: int) -> None:
    expect(steps > forced, "steps", f"at least {forced + 1}, one more than forced_knots", steps)


def expect_steps(steps: int | Iterable[int], K: int, forced: int = 0) -> list[int]:
    """The wanted numbers of steps, each an integer in 1..K, and more than there are forced knots."""
    one = isinstance(steps, (numbers.Integral, str))
    expect_shown(not isinstance(steps, Tensor), "steps", "a number of steps or several", steps, TypeError)
    several = [steps] if one else expect_list(steps, "steps", "a number of steps or several", ordered=False)
    wanted = sorted({expect_positive_int(n, "steps") for n in several})
    expect(len(wanted) > 0, "steps", "at least one number of steps", "none")
    expect(wanted[-1] <= K, "steps", f"at most K = {K}, the steps of the grid", wanted[-1])
    _expect_enough(wanted[0], forced)
    return wanted
