"""What a teacher's rollout has told of it: what objectives, fits and schedules are made from."""

from collections.abc import Sequence
from contextvars import ContextVar

import torch
from torch import Tensor

from flowkernels._checks import expect, expect_mapping, expect_times, expect_values
from flowkernels.calibration.sample_costs import SINGLES, SampleCosts
from flowkernels.runtime.ranks import Ranks
from flowkernels.sampling.rollout import Trajectory
from flowkernels.sampling.teacher_solver import teacher_solver_of
from flowkernels.schedule import forced_places

evaluating: ContextVar[Ranks | None] = ContextVar("flowkernels_ranks", default=None)


class Measured:
    """What is known of a teacher on a grid of K fine steps.

    times: the grid, float64 `[K+1]`. cost: the step costs E|e|^2, float64 `[K+1, K+1]`, Inf where k <= j.
    provenance: where all of it comes from (K, n, seed, dtype, shape, guidance, the model's hashes, library versions).
    gram: the mean Gram matrix of velocity increments, float64 `[K-1, K-1]` (`velocity_gram` divided by n), or None.
    teacher_solver: the teacher's steps, as the provenance names them. secants: whether they are not Euler's. Then gram
        is `[2K-1, 2K-1]`: of the increments of `u_i = (x_{i+1} - x_i) / h_i`, and after them of `e_j = u_j - v_j`; the
        error of the step j -> k, of increments alone for Euler's steps, has `(t_k - t_j) e_j` beside them
        (`cost_from_gram`, `states=secants`), and nothing may take `kept.v` for the secants of `kept.x`.
    kept: the teacher's trajectory of the first samples, states and velocities at the knots, where they are, or None.
    sample_costs: Gram matrices of groups of samples, or None.
    forced_knots: times of the grid that every schedule has as knots; `forced`, their places in it.

    Tensors are on the CPU, those of `kept` and `sample_costs` aside.
    """

    def __init__(
        self,
        times: Tensor,
        cost: Tensor,
        provenance: dict,
        gram: Tensor | None = None,
        *,
        norm_cost: Tensor | None = None,
        kept: Trajectory | None = None,
        sample_costs: SampleCosts | None = None,
        forced_knots: Sequence[float] | Tensor = (),
    ):
        self.times = times = expect_times(times, "times").clone()  # the caller may write to what it gave
        K = len(times) - 1
        expect_values(cost, "cost", (torch.float64,))
        expect(cost.shape == (K + 1, K + 1), "cost", f"shape {[K + 1, K + 1]}, a row for each knot", cost)
        expect_mapping(provenance, "provenance")
        self.forced = forced_places(forced_knots, times)
        self.teacher_solver = teacher_solver_of(provenance, times, self.forced)
        self.secants = not self.teacher_solver.is_euler
        if gram is not None:
            expect_values(gram, "gram", (torch.float64,))
            rows = 2 * K - 1 if self.secants else K - 1
            expect(gram.shape == (rows, rows), "gram", f"shape {[rows, rows]}", gram)
        self.cost, self.provenance, self.gram, self.kept, self.sample_costs = cost, provenance, gram, kept, sample_costs
        self._norm_cost = norm_cost
        self._of_kept: tuple | None = None  # the velocities and their version, and what was made of them

    @property
    def ranks(self) -> Ranks:
        """That evaluate for an objective, while it is sought in this thread."""
        return evaluating.get() or Ranks()

    @property
    def forced_knots(self) -> tuple[float, ...]:
        return tuple(self.times[list(self.forced)].tolist())

    def expect_forced(self, knots: Tensor, name: str) -> None:
        """Raise where a step between the knots of a schedule spans a forced one."""
        low, high = knots.min(), knots.max()
        for t in self.forced_knots:
            there = not low < t < high or bool(((knots - t).abs() <= 1e-9).any())
            got = f"{[round(knot, 6) for knot in knots.tolist()]}"
            expect(there, name, f"the forced knot {t:.6g} among the knots, as no step may span it", got)

    @property
    def single_costs(self) -> SampleCosts | None:
        """Step costs of single samples, of at most 512 of those kept (`SINGLES`); None without kept samples.

        Made at the first use, about 0.2 ms a sample, and anew where the velocities are others or were written to.
        """
        return None if self.kept is None else self._made_of_kept()[0]

    @property
    def norm_cost(self) -> Tensor | None:
        """Step costs like `cost` of E|e| in place of E|e|^2, the mean over `single_costs`.

        Without kept samples, what a file has of it, or None.
        """
        return self._norm_cost if self.kept is None else self._made_of_kept()[1]

    def _made_of_kept(self) -> tuple[SampleCosts, Tensor]:
        x, v = self.kept.x if self.secants else None, self.kept.v
        version = [object() if t.is_inference() else t._version for t in (x, v) if t is not None]
        if self._of_kept is None or self._of_kept[0] is not v or self._of_kept[1] != version:
            singles = SampleCosts(self.times, most=SINGLES, device=v.device, secants=self.secants)
            most = slice(singles.most)  # no more than groups of one
            singles.update(v[:, most], None if x is None else x[:, most])
            self._of_kept = v, version, singles, singles.norm_cost()
        return self._of_kept[2:]
