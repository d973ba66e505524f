"""Step costs from Gram matrices, and schedules of least cost from step costs."""

import itertools
import math
import numbers
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flowkernels import ops
from flowkernels._checks import (
    FLOATS,
    expect,
    expect_bool,
    expect_device,
    expect_int,
    expect_list,
    expect_mapping,
    expect_positive_int,
    expect_real,
    expect_room,
    expect_shown,
    expect_times,
    expect_values,
)


@dataclass(frozen=True)
class Schedule:
    """The knots of an N-step sampler.

    times: float64 `[N+1]`, from 0 (noise) to 1 (data).
    grid: float64 `[K+1]`, the fine grid they were chosen from; None for times that come from no grid.
    indices: the knots' places in the grid; None without a grid.
    cost: sum of the step costs along the schedule; uniform_cost: of the uniform schedule on the same grid.
    interval: bootstrap interval of 95 % of its cost over samples. enough: the number of samples with which the
        interval's half-width would be 2 % of the cost. Both None where unknown.
    notes: where it comes from, such as the objective and the evaluations it took.

    Schedules are equal whatever their interval, enough and notes.
    """

    times: Tensor
    grid: Tensor | None = None
    indices: tuple[int, ...] | None = None
    cost: float | None = None
    uniform_cost: float | None = None
    interval: tuple[float, float] | None = None
    enough: int | None = None
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
        if self.interval is not None:
            checked["interval"] = _expect_interval(self.interval)
        if self.enough is not None:
            checked["enough"] = expect_int(self.enough, "enough", "a number of samples, at least 1", 1)
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @classmethod
    def uniform(cls, steps: int) -> "Schedule":
        """N equal steps, on no grid."""
        return cls(expect_times(expect_positive_int(steps, "steps"), "steps"))

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
        """1 - t, float64 `[N+1]`, from 1 to 0.

        Diffusers' `FlowMatchEulerDiscreteScheduler(shift=1.0)` takes `sigmas[:-1].tolist()`: it appends the 0 itself,
        and any other shift moves them.
        """
        return 1 - self.times

    @property
    def ratio(self) -> float | None:
        """cost / uniform_cost, at most 1 for a schedule of least cost; 1 where both are zero."""
        if self.cost is None or self.uniform_cost is None:
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
        if self.interval is not None:
            known += f", interval=[{self.interval[0]:.4g}, {self.interval[1]:.4g}], enough={self.enough}"
        return f"Schedule(steps={self.steps}, times=[{knots}]{known})"


def _expect_places(indices, times: Tensor, grid: Tensor) -> tuple[int, ...]:
    """The places of the times in the grid, as Python's integers."""
    fits = isinstance(indices, Sequence) and len(indices) == len(times)
    fits = fits and all(isinstance(i, numbers.Integral) and 0 <= i < len(grid) for i in indices)
    places = tuple(map(int, indices)) if fits else ()
    fits = fits and torch.equal(grid[list(places)], times)
    expect_shown(fits, "indices", f"the places of the {len(times)} times in the grid", indices)
    return places


def _expect_interval(ends) -> tuple[float, float]:
    expected = "two finite numbers, the lower one first"
    two = isinstance(ends, Sequence) and not isinstance(ends, str) and len(ends) == 2
    expect_shown(two, "interval", expected, ends, TypeError)
    low, high = (expect_real(end, "interval", expected) for end in ends)
    expect_shown(low <= high, "interval", expected, ends)
    return low, high


def uniform_indices(times: Tensor, steps: int) -> tuple[int, ...]:
    """The grid's knots nearest to 0, 1/N, ..., 1, kept strictly increasing."""
    K = len(times) - 1
    even = torch.linspace(0, 1, steps + 1, dtype=torch.float64, device="cpu")
    nearest = (times[None] - even[:, None]).abs().argmin(1).tolist()
    nearest[0], nearest[-1] = 0, K
    for i in range(1, steps):  # on a grid with large gaps two may share a knot
        nearest[i] = max(nearest[i], nearest[i - 1] + 1)
    for i in range(steps - 1, -1, -1):
        nearest[i] = min(nearest[i], nearest[i + 1] - 1, K - (steps - i))
    return tuple(nearest)


class StepCost:
    """Step costs of a teacher, accumulated over chunks of samples.

        costs = StepCost(times)
        for chunk in chunks: costs.update(chunk.v)
        c = costs.cost()

    The whole state is `costs.state`, one float64 vector `(sum of Gram matrices, number of samples)`. To combine
    devices, `torch.distributed.all_reduce(costs.state)` and nothing else; in one process, `costs.merge(other)`.

    Args:
        times: K for a uniform grid, or K+1 increasing times from 0 to 1.
        states: True if `update` is given states that are not Euler steps of the velocities.
        device: where the accumulated Gram matrix lives, and the costs that `cost()` makes of it; best where the
            velocities are. None is the CPU.
    """

    def __init__(self, times: int | Sequence[float] | Tensor, *, states: bool = False, device=None):
        self.times = expect_times(times, "times")
        self.states, device = expect_bool(states, "states"), expect_device(device) or "cpu"
        K = len(self.times) - 1
        self._rows = 2 * K - 1 if states else K - 1
        expect_room(8 * self._rows**2, "times", "step costs", f"{K} steps")
        self.state = torch.zeros(self._rows**2 + 1, dtype=torch.float64, device=device)

    @property
    def gram(self) -> Tensor:
        """Sum over samples of the Gram matrix of increments (a view of `state`)."""
        return self.state[:-1].view(self._rows, self._rows)

    @property
    def count(self) -> int:
        """Number of samples so far."""
        return int(self.state[-1].item())

    def update(self, v: Tensor, x: Tensor | None = None) -> "StepCost":
        """Add samples: velocities `[K, n, *shape]`, with `states=True` also states `[K+1, n, *shape]`.

        Raises ValueError naming sample and step if a velocity or state is NaN or Inf; nothing is added then.
        """
        K = len(self.times) - 1
        expect_values(v, "v", FLOATS)
        expect(v.dim() >= 3, "v", "velocities of shape [K, n, *shape]", v)
        expect(len(v) == K, "v", f"K = {K} velocities, one for each step of times", v)
        expect(v.numel() > 0, "v", "at least one sample and one feature", v)
        expect(
            (x is not None) == self.states, "x", "states" if self.states else "None, unless made with states=True", x
        )
        if x is not None:
            expect_values(x, "x", FLOATS)
        # secants carry the rounding of the states, which only float64 sums cancel again
        gram = ops.velocity_gram(v.double(), x=x, times=self.times) if self.states else ops.velocity_gram(v)
        # A[m, m] sees v_m and v_{m-1}, so a finite Gram matrix means finite velocities; K = 1 has no increments
        if not (torch.isfinite(gram).all() and (K > 1 or torch.isfinite(v).all())):
            for name, value in (("v", v), ("x", x)):
                if value is not None and not torch.isfinite(value).all():
                    step, n = (~torch.isfinite(value.flatten(2)).all(2)).nonzero()[0].tolist()
                    expect(False, name, "finite values", f"NaN or Inf in sample {n} at step {step}")
            expect(False, "v", "velocities whose squared increments are finite", "an overflow")
        self.gram.add_(gram.to(self.state.device))
        self.state[-1] += v.shape[1]
        return self

    def merge(self, other: "StepCost") -> "StepCost":
        """Add another accumulator's samples to this one's."""
        same = isinstance(other, StepCost) and self.states == other.states and torch.equal(self.times, other.times)
        expect(same, "other", "a StepCost on the same times and of the same kind", other)
        self.state.add_(other.state.to(self.state.device))
        return self

    def cost(self) -> Tensor:
        """Step costs `[K+1, K+1]` in float64 on the state's device: entry [j, k], k > j, is
        `c(j, k) = mean over samples |x_k - x_j - (t_k - t_j) v_j|^2`; Inf where k <= j."""
        count = self.count
        expect(count > 0, "StepCost", "at least one update", "none")
        return ops.cost_from_gram(self.gram / count, self.times, states=self.states)


def step_cost(v: Tensor, times: int | Sequence[float] | Tensor, x: Tensor | None = None) -> Tensor:
    """Cost of every possible step, the mean squared error of one jump `t_j -> t_k`.

    `c(j, k) = mean over samples |x_k - x_j - (t_k - t_j) v_j|^2`, the norm over all features.

    Args:
        v: velocities `[K, n, *shape]`, float32, float64, bfloat16 or float16.
        times: the K+1 knots (or K for a uniform grid).
        x: states `[K+1, n, *shape]`, where they are not the Euler steps of `v` on `times`.

    Returns:
        float64 `[K+1, K+1]` on v's device, Inf where k <= j.

    Source: BOSS (arXiv 2312.16414), the objective of its dynamic programme.
    """
    expect_values(v, "v", FLOATS)
    return StepCost(times, states=x is not None, device=v.device).update(v, x).cost()


def bellman(
    cost: Tensor,
    times: int | Sequence[float] | Tensor,
    steps: int | Iterable[int] = range(1, 11),
    *,
    gamma: float = 1.0,
) -> dict[int, Schedule]:
    """The schedule of least total cost for each number of steps N, all from one table.

    Args:
        cost: float64 `[K+1, K+1]` from `step_cost`; Inf above the diagonal forbids a step. The tables are made on its
            device, and what the schedules need of them is copied to the CPU.
        times: the K+1 knots.
        steps: the numbers of steps wanted, each 1..K.
        gamma: what every step weighs more than the one before it: the cost of a schedule is the sum of
            `gamma^i c_i` over its steps i = 0..N-1 (GITS, arXiv 2405.11326).

    Returns:
        {N: Schedule}. Ties go to the smaller knot. No schedule costs more than the uniform one on the same grid.

    Raises:
        ValueError: also if no path of N allowed steps exists.
    """
    t = expect_times(times, "times")
    expect_values(cost, "cost", FLOATS)
    expect(tuple(cost.shape) == (len(t), len(t)), "cost", f"shape [{len(t)}, {len(t)}], one row a knot", cost)
    wanted = expect_steps(steps, len(t) - 1)
    gamma = expect_real(gamma, "gamma", "a positive, finite number", lambda a: a > 0 and 1 / a < math.inf)
    value, parent = (table.cpu() for table in ops.bellman(cost.double(), max(wanted), 1 / gamma))
    even = {n: uniform_indices(t, n) for n in wanted}
    j, k = zip(*(step for n in wanted for step in itertools.pairwise(even[n])), strict=True)
    uniform_costs = iter(cost[list(j), list(k)].tolist())  # one copy for all of them
    schedules = {}
    for n in wanted:
        expect(bool(value[n, -1] < torch.inf), "cost", f"a path of {n} steps of finite cost", "none")
        path = [len(t) - 1]
        for s in range(n, 0, -1):
            path.append(int(parent[s, path[-1]]))
        indices = tuple(reversed(path))
        uniform_cost = sum(gamma**i * c for i, c in enumerate(itertools.islice(uniform_costs, n)))
        least = value[n, -1].item() * gamma ** (n - 1)  # the recursion's last step weighs 1
        schedules[n] = Schedule(t[list(indices)], t, indices, least, uniform_cost)
    return schedules


def expect_steps(steps: int | Iterable[int], K: int) -> list[int]:
    """The wanted numbers of steps, each an integer in 1..K."""
    one = isinstance(steps, (numbers.Integral, str))
    expect_shown(not isinstance(steps, Tensor), "steps", "a number of steps or several", steps, TypeError)
    several = [steps] if one else expect_list(steps, "steps", "a number of steps or several", ordered=False)
    wanted = sorted({expect_positive_int(n, "steps") for n in several})
    expect(len(wanted) > 0, "steps", "at least one number of steps", "none")
    expect(wanted[-1] <= K, "steps", f"at most K = {K}, the steps of the grid", wanted[-1])
    return wanted
