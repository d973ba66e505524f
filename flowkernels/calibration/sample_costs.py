"""Step costs from the Gram matrices of groups of samples: of their sum, and what their scatter says, by bootstrap."""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from flowkernels._checks import expect, expect_values
from flowkernels.calibration.bellman import without_spans
from flowkernels.evaluation.bootstrap import RESAMPLES, ends, tail_of
from flowkernels.ops.bellman import bellman
from flowkernels.ops.cost_from_gram import cost_from_gram
from flowkernels.ops.velocity_gram import velocity_gram
from flowkernels.schedule import Schedule

GROUPS = 64  # of samples, at most; merged in pairs when they are more
SINGLES = 512  # samples that E|e| is the mean of
GROUP_BYTES = 128 << 20  # of the Gram matrices of all groups: larger grids have fewer
FEW_RESAMPLES = 100  # for what needs a Bellman table of each
WANTED_HALF_WIDTH = 0.02  # of the cost, for `Schedule.samples_needed`


def group_size(n: int) -> int:
    """Samples of a group, of n in all: of 32 to 64 groups where each has 6 or more, whose Gram matrix then costs little
    more than their part of all; of 16 and more else, if there are as many samples."""
    return max(1, min(n // 16, max(6, n // 32)))


class SampleCosts:
    """Gram matrices of velocity increments, summed over the samples of each of a number of groups.

    times: float64 `[K+1]`. size: samples of a group, at first: there are never more than `most` groups, which become
    half as many of twice the size when they would. Some may have fewer: the last one, and what `joined` brings. count:
    the samples so far. Large grids have fewer groups than asked for. device: where the velocities are, and all that is
    made of them. secants: whether states are told too, which are not Euler steps of the velocities: the increments are
    those of their secants, and K rows e_j follow (`velocity_gram`).
    """

    def __init__(self, times: Tensor, size: int = 1, most: int = GROUPS, device="cpu", secants: bool = False):
        rows = 2 * len(times) - 3 if secants else len(times) - 2
        self.times, self.size, self._sizes, self.secants = times, size, [], secants
        self.most = min(most, max(32, GROUP_BYTES // (8 * max(1, rows) ** 2) // 2 * 2))
        self._grams = torch.empty(self.most, rows, rows, dtype=torch.float64, device=device)
        self._total = torch.zeros(rows, rows, dtype=torch.float64, device=device)

    @classmethod
    def joined(cls, parts: Sequence["SampleCosts"]) -> "SampleCosts":
        """The samples of several, on the same times, on the first one's device: each brings its groups, which become
        fewer where they are too many."""
        first = parts[0]
        found = cls(first.times, max(part.size for part in parts), GROUPS, first._total.device, first.secants)
        grams = torch.cat([part.grams.to(first._total.device) for part in parts])
        sizes = [size for part in parts for size in part._sizes]
        while len(sizes) > found.most:
            grams, sizes = _paired(grams, sizes)
            found.size *= 2
        found._grams[: len(sizes)], found._sizes = grams, sizes
        found._total = sum(part._total.to(first._total.device) for part in parts)
        return found

    def state(self) -> dict[str, Tensor]:
        """What `set_state` goes on from: tensors, on their device."""
        sizes = torch.tensor([self.size, *self._sizes], dtype=torch.int64, device="cpu")
        return {"grams": self.grams, "total": self._total, "sizes": sizes}

    def set_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from another's samples, of the same times and `most`; ValueError for what is no such state."""
        grams, total = (expect_values(state[name], name, (torch.float64,)) for name in ("grams", "total"))
        size, *sizes = expect_values(state["sizes"], "sizes", (torch.int64,)).tolist()
        fits = grams.shape == (len(sizes), *self._total.shape) and total.shape == self._total.shape
        expect(fits and len(sizes) <= self.most, "grams", f"at most {self.most} groups on these times", grams)
        expect(all(0 < s <= size for s in sizes), "sizes", "sizes of the groups", sizes)
        self._grams[: len(sizes)], self._total, self.size, self._sizes = grams, total.to(self._total), size, sizes

    @property
    def count(self) -> int:
        return sum(self._sizes)

    @property
    def groups(self) -> int:
        return len(self._sizes)

    @property
    def grams(self) -> Tensor:
        """Sums over each group's samples, float64 `[groups, K-1, K-1]`, of secants `[groups, 2K-1, 2K-1]`."""
        return self._grams[: self.groups]

    @property
    def sizes(self) -> Tensor:
        """Samples in each group, float64 `[groups]`."""
        return torch.tensor(self._sizes, dtype=torch.float64, device=self._grams.device)

    @property
    def gram(self) -> Tensor:
        """The mean over all samples, float64 `[K-1, K-1]` or `[2K-1, 2K-1]`."""
        return self._total / self.count

    def cost(self) -> Tensor:
        """The step costs of all samples, as `StepCost.cost` makes them. ValueError for increments whose squares
        overflow."""
        gram = self.gram
        finite = bool(torch.isfinite(gram).all())
        expect(finite, "velocity", "velocities whose squared increments are finite", "an overflow")
        return cost_from_gram(gram, self.times, states=self.secants)

    def norm_cost(self) -> Tensor:
        """`[K+1, K+1]` on the CPU: entry [j, k] is the mean over samples, which must be groups of one, of the error |e|
        of the step j -> k; Inf where k <= j."""
        costs = (cost_from_gram(gram, self.times, states=self.secants).sqrt() for gram in self.grams)
        return (sum(costs) / self.count).cpu()

    def update(self, v: Tensor, x: Tensor | None = None) -> "SampleCosts":
        """Add samples by their velocities `[K, n, *shape]`, which are finite; x: for secants, their states
        `[K+1, n, *shape]`."""
        pieces = self.pieces(v.shape[1])
        return self.add(self.grams_of(v, pieces, x), pieces)

    def pieces(self, n: int) -> list[int]:
        """How many of the next n samples, in turn, come to one group each."""
        found, left, size, groups = [], n, self.size, self.groups
        room = size - self._sizes[-1] if self._sizes else 0
        while left:
            if room <= 0:
                if groups == self.most:
                    groups, size = groups - groups // 2, 2 * size
                groups, room = groups + 1, size
            found.append(min(room, left))
            left, room = left - found[-1], room - found[-1]
        return found

    def grams_of(self, v: Tensor, pieces: Sequence[int], x: Tensor | None = None) -> Iterator[Tensor]:
        """Of the samples of each piece the Gram matrix, of velocities, and for secants states, as `update` takes."""
        first = 0
        for piece in pieces:
            rows = slice(first, first + piece)
            # secants carry the rounding of the states, which only float64 sums cancel again
            more = {} if x is None else {"x": x[:, rows], "times": self.times}
            yield velocity_gram(v[:, rows] if x is None else v[:, rows].double(), **more)
            first += piece

    def add(self, grams: Iterable[Tensor], pieces: Sequence[int]) -> "SampleCosts":
        """The next samples by their Gram matrices, of `pieces` or of parts of these."""
        for gram, piece in zip(grams, pieces, strict=True):
            there = self._sizes[-1] if self._sizes and self._sizes[-1] < self.size else 0
            if not there:
                if self.groups == self.most:
                    pairs, self._sizes = _paired(self._grams, self._sizes)
                    self._grams[: len(pairs)] = pairs
                    self.size *= 2
                self._sizes.append(0)
            group = self.groups - 1
            self._grams[group] = self._grams[group] + gram if there else gram
            self._total += gram
            self._sizes[-1] += piece
        return self

    def along(self, schedules: list[Schedule], norm: bool = False) -> Tensor:
        """What each schedule's steps cost, summed over the samples of each group, `[groups, schedules]`.

        norm: for costs E|e|, which need groups of one.
        """
        most, m = max(schedule.steps for schedule in schedules), torch.arange(1, len(self.times) - 1, device="cpu")
        pairs = [[*itertools.pairwise(s.indices), *[(0, 0)] * (most - s.steps)] for s in schedules]
        j, k = torch.tensor(pairs, device="cpu").movedim(2, 0)[..., None]
        weights = (self.times[k] - self.times[m]) * ((j < m) & (m < k))  # of the increments in the error of each step
        if self.secants:  # and of what the secant is off by at its first knot
            at = torch.arange(len(self.times) - 1, device="cpu")
            weights = torch.cat([weights, (self.times[k] - self.times[j]) * (j == at)], -1)
        weights = weights.to(self._grams.device)  # [schedules, most, rows], zero where a schedule has fewer steps
        if norm:
            w = weights.flatten(0, 1).T
            squares = ((self.grams @ w) * w).sum(1).clamp_min_(0)
            return squares.sqrt_().view(-1, len(schedules), most).sum(2)
        # the error's square is a quadratic form, and those of a schedule's steps add up to one
        forms = (weights.mT @ weights).flatten(1)
        return (forms @ self.grams.flatten(1).T).clamp_min_(0).T

    def resampled(self, times: int) -> Tensor:
        """Weights `[times, groups]` of the groups' sums in the mean over a resample of all groups with replacement."""
        groups = self.groups
        picks = torch.randint(groups, (times, groups), generator=torch.Generator("cpu").manual_seed(0), device="cpu")
        picks += torch.arange(0, times * groups, groups, device="cpu")[:, None]
        counts = picks.flatten().bincount(minlength=times * groups).view(times, groups)
        weights = counts.to(self._grams.device, torch.float64)
        return weights / (weights @ self.sizes)[:, None]

    def regrets(self, schedules: dict[int, Schedule], forced: Sequence[int] = ()) -> dict[int, float]:
        """How much more than the least cost each schedule costs, as a share of it, in 95 % of resamples at most; Inf
        for fewer than two groups. forced: the places of knots that every schedule has."""
        if self.groups < 2:
            return dict.fromkeys(schedules, math.inf)
        weights, steps = self.resampled(FEW_RESAMPLES), list(schedules)
        costs = weights @ self.along(list(schedules.values()))
        resamples = (weights @ self.grams.flatten(1)).unflatten(1, self._grams.shape[1:])
        of = dict(states=self.secants)
        costs_of = (without_spans(cost_from_gram(gram, self.times, **of), forced) for gram in resamples)
        least = torch.stack([bellman(cost, max(steps))[0][steps, -1] for cost in costs_of])
        regret = torch.where(costs > least, costs / least - 1, 0.0)
        return dict(zip(steps, regret.quantile(0.95, 0).tolist(), strict=True))

    def with_intervals(self, schedules: dict[int, Schedule], norm: bool = False) -> dict[int, Schedule]:
        """The schedules with the bootstrap interval of their cost; as they are where it cannot be known.

        norm: for costs E|e|, which need groups of one.
        """
        if self.groups < 2:
            return schedules
        means = self.along(list(schedules.values()), norm).T @ self.resampled(RESAMPLES).T
        found = {}
        for (n, schedule), (low, high) in zip(schedules.items(), ends(means, tail_of(self.groups)), strict=True):
            share = (high - low) / 2 / (WANTED_HALF_WIDTH * schedule.cost) if schedule.cost > 0 else 0.0
            needed = max(1, math.ceil(self.count * share**2))
            found[n] = replace(schedule, cost_interval=(low, high), samples_needed=needed)
        return found


def _paired(grams: Tensor, sizes: list[int]) -> tuple[Tensor, list[int]]:
    """Pairs of groups as one; of an odd number the last stays as it is."""
    half = len(sizes) // 2
    pairs = torch.cat([grams[0 : 2 * half : 2] + grams[1 : 2 * half : 2], grams[2 * half : len(sizes)]])
    return pairs, [sum(sizes[i : i + 2]) for i in range(0, len(sizes), 2)]
