"""Which of several plans for N steps is the best, by errors on samples that none of them was fitted to."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowkernels.calibration.sample_costs import mean_interval
from flowkernels.schedule import Schedule
from flowkernels.solver import Solver


@dataclass(frozen=True, eq=False)
class Candidate:
    """A plan that was tried.

    name: where it comes from, in a few words that no other has. errors: of each sample the squared L2 distance of its
    end to the teacher's, float64 `[n]`, of all candidates on the same samples in the same order; where the plan was
    fitted to a sample, that of a plan fitted without it (cross-validation). evaluations: of the network, all that it
    took, for each sample on average. seconds: that it took.
    """

    name: str
    plan: Schedule | Solver
    errors: Tensor
    evaluations: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class Choice:
    """The best of several candidates.

    best: its place among them. intervals: (low, high) of each one's mean error, 95 %. second: the place of the next
    best, None for one candidate. decided: whether the best is better than the next for certain (95 %).
    needed: how many samples would decide, at their scatter; None where it is decided or nothing would.
    """

    best: int
    intervals: tuple[tuple[float, float] | None, ...]
    second: int | None = None
    decided: bool = True
    needed: int | None = None


def choose(candidates: Sequence[Candidate]) -> Choice:
    """The least mean error, ties to the first."""
    means = torch.stack([c.errors.mean() for c in candidates])
    order = torch.argsort(means, stable=True).tolist()
    intervals = tuple(mean_interval(c.errors) for c in candidates)
    if len(candidates) == 1:
        return Choice(0, intervals)
    best, second = order[:2]
    behind = candidates[second].errors - candidates[best].errors
    between = mean_interval(behind)
    decided = between is not None and between[0] > 0
    needed = None
    if not decided and between is not None and behind.mean() > 0:
        half = (between[1] - between[0]) / 2
        needed = int(len(behind) * (half / behind.mean().item()) ** 2) + 1
    return Choice(best, intervals, second, decided, needed)
