"""`step_costs` and StepCost: the costs of all steps, from one Gram matrix of velocity increments."""

from collections.abc import Sequence

import torch
from torch import Tensor

from flowkernels._checks import FLOATS, expect, expect_bool, expect_device, expect_room, expect_times, expect_values
from flowkernels.ops.cost_from_gram import cost_from_gram
from flowkernels.ops.velocity_gram import velocity_gram
from flowkernels.runtime.ranks import Group, Ranks


class StepCost:
    """Step costs of a teacher, accumulated over chunks of samples.

        costs = StepCost(times)
        for chunk in chunks: costs.update(chunk.v)
        c = costs.cost()

    The whole state is `costs.state`, one float64 vector `(sum of Gram matrices, number of samples)`. To combine
    devices, `torch.distributed.all_reduce(costs.state)` and nothing else; in one process, `costs.merge(other)`.

    Args:
        times: K for a uniform grid, or K+1 increasing times, from 0 or later to 1.
        states: True if `update` is given states that are not Euler steps of the velocities.
        device: where the accumulated Gram matrix lives, and the costs that `cost()` makes of it; best where the
            velocities are. None is the CPU.

    Examples:
        >>> costs = fk.StepCost(4)
        >>> for part in torch.randn(3, 4, 8, 2):  # the velocities `[K, n, *shape]` of three chunks of samples
        ...     _ = costs.update(part)
        >>> costs.cost().shape
        torch.Size([5, 5])
    """

    def __init__(
        self,
        times: int | Sequence[float] | Tensor,
        *,
        states: bool = False,
        device: torch.device | str | int | None = None,
    ):
        self.times = expect_times(times, "times").clone()  # the caller may write to what it gave
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
        gram = velocity_gram(v.double(), x=x, times=self.times) if self.states else velocity_gram(v)
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
        return cost_from_gram(self.gram / count, self.times, states=self.states)


def step_costs(
    v: Tensor, times: int | Sequence[float] | Tensor, x: Tensor | None = None, *, group: Group | None = None
) -> Tensor:
    """Cost of every possible step, the mean squared error of one jump `t_j -> t_k`.

    `c(j, k) = mean over samples |x_k - x_j - (t_k - t_j) v_j|^2`, the norm over all features.

    Args:
        v: velocities `[K, n, *shape]`, float32, float64, bfloat16 or float16.
        times: the K+1 knots (or K for a uniform grid).
        x: states `[K+1, n, *shape]`, where they are not the Euler steps of `v` on `times`.
        group: a `torch.distributed.ProcessGroup` whose processes all make this call, each with samples of its own: the
            costs are those of all samples, equal on all.

    Returns:
        float64 `[K+1, K+1]` on v's device, Inf where k <= j.

    Source: BOSS (arXiv 2312.16414), the objective of its dynamic programme.

    Examples:
        >>> trajectory = fk.rollout(lambda x, t: torch.ones_like(x), torch.randn(64, 2), 4)
        >>> float(fk.step_costs(trajectory.v, trajectory.times)[0, 4])  # a straight flow: one step costs nothing
        0.0
    """
    expect_values(v, "v", FLOATS)
    ranks = Ranks(group)
    with ranks.together("step_costs"):
        costs = StepCost(times, states=x is not None, device=v.device).update(v, x)
        ranks.expect_same({"times": costs.times.tolist(), "x": x is not None})
        costs.state = ranks.total(costs.state)
        return costs.cost()
