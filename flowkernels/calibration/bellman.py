"""`least_cost_schedules`: the schedules of least cost, by dynamic programming."""

import itertools
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from flowkernels._checks import FLOATS, expect, expect_real, expect_times, expect_values
from flowkernels.ops.bellman import bellman
from flowkernels.schedule import Schedule, expect_steps, forced_places, uniform_indices


def least_cost_schedules(
    cost: Tensor,
    times: int | Sequence[float] | Tensor,
    steps: int | Iterable[int] = range(1, 11),
    *,
    gamma: float = 1.0,
    forced_knots: Sequence[float] | Tensor = (),
) -> dict[int, Schedule]:
    """The schedule of least total cost for each number of steps N, all from one table.

    Args:
        cost: float64 `[K+1, K+1]` from `step_costs`; Inf above the diagonal forbids a step. The tables are made on its
            device, and what the schedules need of them is copied to the CPU.
        times: the K+1 knots.
        steps: the numbers of steps wanted, each 1..K.
        gamma: what every step weighs more than the one before it: the cost of a schedule is the sum of
            `gamma^i c_i` over its steps i = 0..N-1 (GITS, arXiv 2405.11326).
        forced_knots: times of the grid that are to be knots of every schedule: no step spans one.

    Returns:
        {N: Schedule}. Ties go to the smaller knot. No schedule costs more than the uniform one on the same grid (with
        forced knots: equal steps between these, `Schedule.uniform`).

    Raises:
        ValueError: also if no path of N allowed steps exists, as of fewer than forced knots take.

    Examples:
        >>> trajectory = fk.rollout(lambda x, t: x * t[:, None] ** 4, torch.randn(64, 2), 4)
        >>> cost = fk.step_costs(trajectory.v, trajectory.times)
        >>> fk.least_cost_schedules(cost, trajectory.times, [2])[2].times
        tensor([0.0000, 0.7500, 1.0000], dtype=torch.float64)
    """
    t = expect_times(times, "times")
    expect_values(cost, "cost", FLOATS)
    expect(tuple(cost.shape) == (len(t), len(t)), "cost", f"shape [{len(t)}, {len(t)}], one row a knot", cost)
    forced = forced_places(forced_knots, t)
    wanted = expect_steps(steps, len(t) - 1, len(forced))
    gamma = expect_real(gamma, "gamma", "a positive, finite number", lambda a: a > 0 and 1 / a < math.inf)
    allowed = without_spans(cost.double(), forced)
    value, parent = (table.cpu() for table in bellman(allowed, max(wanted), 1 / gamma))
    even = {n: uniform_indices(t, n, forced) for n in wanted}
    j, k = zip(*(step for n in wanted for step in itertools.pairwise(even[n])), strict=True)
    uniform_costs = iter(cost[list(j), list(k)].tolist())  # one copy for all of them
    schedules = {}
    for n in wanted:
        expect(bool(value[n, -1] < torch.inf), "cost", f"a path of {n} steps of finite cost", "none")
        indices = path_of(parent, n, (len(t) - 1,))
        uniform_cost = sum(gamma**i * c for i, c in enumerate(itertools.islice(uniform_costs, n)))
        least = value[n, -1].item() * gamma ** (n - 1)  # the recursion's last step weighs 1
        schedules[n] = Schedule(t[list(indices)], t, indices, least, uniform_cost)
    return schedules


def without_spans(cost: Tensor, forced: Sequence[int]) -> Tensor:
    """Costs `[..., K+1, K+1]` of steps with Inf for those that span a forced knot, of which these are the places in the
    grid."""
    cost = cost.clone() if len(forced) else cost
    for f in forced:
        cost[..., :f, f + 1 :] = torch.inf
    return cost


def path_of(parent: Tensor, steps: int, end: Sequence[int]) -> tuple[int, ...]:
    """The knots of a path of N steps, N + 1 of them, read back from its end.

    Args:
        parent: int64 `[N+1, K+1]`: entry [s, k] is the knot before k on the best path of s steps to it. Or
            `[N+1, K+1, K+1]`: entry [s, j, k] is the one before j on the best path of s steps whose last is j -> k.
        steps: N.
        end: as many of its last knots as an entry is of: one, or two.
    """
    path = list(end)
    for s in range(steps, len(end) - 1, -1):
        path.insert(0, int(parent[(s, *path[: len(end)])]))
    return tuple(path)
