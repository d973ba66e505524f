"""What the scatter of samples says about costs: sums of groups of samples, and their bootstrap."""

import contextlib
import itertools
import math
from dataclasses import replace

import torch
from torch import Tensor

from flowkernels import ops
from flowkernels.runtime.backends import backend
from flowkernels.schedule import Schedule

GROUPS = 128  # of samples, at most, for the scatter of costs; merged in pairs when they are more
SINGLES = 512  # samples that E|e| is the mean of
GROUP_BYTES = 64 << 20  # of the costs of all groups: larger grids have fewer
PIECE_BYTES = 8 << 20  # of the Gram matrices that are copied from a GPU at once
RESAMPLES = 1000  # of a bootstrap interval
FEW_RESAMPLES = 100  # for what needs a Bellman table of each
WANTED_HALF_WIDTH = 0.02  # of the cost, for `Schedule.samples_needed`


class SampleCosts:
    """Squared step costs, summed over the samples of each of a number of groups.

    times: float64 `[K+1]`. size: samples of a group, at first: there are never more than `most` groups, which become
    half as many of twice the size when they would. The last one may have fewer. count: the samples so far. Large grids
    have fewer groups than asked for.
    """

    def __init__(self, times: Tensor, size: int = 1, most: int = GROUPS):
        K = len(times) - 1
        self.times, self.count, self.size, self._device = times, 0, size, torch.device("cpu")
        row, column = torch.triu_indices(K + 1, K + 1, 1, device="cpu")
        self._pairs = row * (K + 1) + column  # j < k, row by row
        self.most = min(most, max(32, GROUP_BYTES // (8 * len(row)) // 2 * 2))
        self._pieces_at_once = max(1, min(64, PIECE_BYTES // (8 * K * K)))
        self._sums = torch.empty(self.most, len(row), dtype=torch.float64, device="cpu")
        self._sizes = torch.zeros(self.most, dtype=torch.float64, device="cpu")

    @property
    def groups(self) -> int:
        return -(-self.count // self.size)

    @property
    def sums(self) -> Tensor:
        """Squared errors summed over each group's samples, float64 `[groups, pairs]`, pairs j < k row by row."""
        return self._sums[: self.groups]

    @property
    def sizes(self) -> Tensor:
        """Samples in each group, float64 `[groups]`."""
        return self._sizes[: self.groups]

    def norm_cost(self) -> Tensor:
        """`[K+1, K+1]`: entry [j, k] is the mean over samples, which must be groups of one, of the error |e| of the
        step j -> k; Inf where k <= j."""
        return self.matrix(self.sums.sqrt().mean(0))

    def matrix(self, pairs: Tensor) -> Tensor:
        """Costs `[pairs]` as a matrix `[K+1, K+1]`, Inf where k <= j."""
        knots = len(self.times)
        cost = torch.full((knots * knots,), torch.inf, dtype=torch.float64, device="cpu")
        cost[self._pairs] = pairs
        return cost.view(knots, knots)

    def update(self, v: Tensor) -> "SampleCosts":
        """Add samples by their velocities `[K, n, *shape]`, which are finite."""
        n, first, self._device = v.shape[1], 0, v.device
        while first < n:
            if self.count == self.most * self.size:
                self._merge()
            lengths = self._lengths(n - first)
            stop = first + sum(lengths)
            grams = [ops.velocity_gram(part) for part in v[:, first:stop].split(lengths, 1)]
            grams = grams if v.is_cpu else torch.stack(grams).cpu()
            with self._on_the_cpu():
                costs = [ops.cost_from_gram(gram, self.times).flatten()[self._pairs] for gram in grams]
            for length, cost in zip(lengths, costs, strict=True):
                group = self.count // self.size
                if self._sizes[group] == 0:
                    self._sums[group] = cost
                else:
                    self._sums[group] += cost
                self._sizes[group] += length
                self.count += length
            first = stop
        return self

    def _on_the_cpu(self):
        """A backend that is asked for is meant for where the velocities are; these costs, on the CPU, take any."""
        return contextlib.nullcontext() if self._device.type == "cpu" else backend("auto")

    def _lengths(self, n: int) -> list[int]:
        """The next parts of n samples whose Gram matrices are made, none in two groups."""
        found, seen, end = [], self.count, min(self.count + n, self.most * self.size)
        while seen < end and len(found) < self._pieces_at_once:
            found.append(min(self.size - seen % self.size, end - seen))
            seen += found[-1]
        return found

    def _merge(self) -> None:
        """Pairs of groups become one."""
        half = self.most // 2
        for t in (self._sums, self._sizes):
            t[:half] = t[0::2] + t[1::2]
        self._sizes[half:] = 0
        self.size *= 2

    def along(self, schedules: list[Schedule], norm: bool = False) -> Tensor:
        """What each schedule's steps cost, summed over the samples of each group, `[groups, schedules]`."""
        knots, found = len(self.times), []
        for schedule in schedules:
            j, k = (
                torch.tensor(side, device="cpu") for side in zip(*itertools.pairwise(schedule.indices), strict=True)
            )
            steps = self.sums[:, j * knots - j * (j + 1) // 2 + k - j - 1]
            found.append((steps.sqrt() if norm else steps).sum(1))
        return torch.stack(found, 1)

    def resampled(self, times: int) -> Tensor:
        """Weights `[times, groups]` of the groups' sums in the mean over a resample of all groups with replacement."""
        groups = self.groups
        picks = torch.randint(groups, (times, groups), generator=torch.Generator("cpu").manual_seed(0), device="cpu")
        weights = torch.zeros(times, groups, dtype=torch.float64, device="cpu")
        weights.scatter_add_(1, picks, torch.ones_like(weights))
        return weights / (weights @ self.sizes)[:, None]

    def regrets(self, schedules: dict[int, Schedule]) -> dict[int, float]:
        """How much more than the least cost each schedule costs, as a share of it, in 95 % of resamples at most; Inf
        for fewer than two groups."""
        if self.groups < 2:
            return dict.fromkeys(schedules, math.inf)
        weights, steps = self.resampled(FEW_RESAMPLES), list(schedules)
        costs = weights @ self.along(list(schedules.values()))
        with self._on_the_cpu():
            tables = (ops.bellman(self.matrix(w @ self.sums), max(steps))[0] for w in weights)
            least = torch.stack([table[steps, -1] for table in tables])
        regret = torch.where(costs > least, costs / least - 1, 0.0)
        return dict(zip(steps, regret.quantile(0.95, 0).tolist(), strict=True))

    def with_intervals(self, schedules: dict[int, Schedule], norm: bool = False) -> dict[int, Schedule]:
        """The schedules with the bootstrap interval of their cost; as they are where it cannot be known.

        norm: for costs E|e|, which need groups of one.
        """
        if self.groups < 2:
            return schedules
        means = self.resampled(RESAMPLES) @ self.along(list(schedules.values()), norm)
        ends = torch.tensor([0.025, 0.975], dtype=torch.float64, device="cpu")
        found = {}
        for (n, schedule), (low, high) in zip(schedules.items(), means.quantile(ends, 0).T.tolist(), strict=True):
            share = (high - low) / 2 / (WANTED_HALF_WIDTH * schedule.cost) if schedule.cost > 0 else 0.0
            needed = max(1, math.ceil(self.count * share**2))
            found[n] = replace(schedule, cost_interval=(low, high), samples_needed=needed)
        return found
