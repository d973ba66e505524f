"""Which of several plans for N steps is the best, by errors on samples that none of them was fitted to."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowkernels._checks import expect
from flowkernels.evaluation.bootstrap import MOST_GROUPS, ends, mean_interval, resampled_sums, tail_of
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
    best, None for one candidate. ratio: (low, high) of the best's root mean squared distance over the next one's, 95 %,
    as the same samples make it. decided: whether that is below 1. needed: about how many samples would decide between
    the two, at their scatter; None where it is decided or nothing would. n: of how many samples this is.
    """

    best: int
    intervals: tuple[tuple[float, float] | None, ...]
    second: int | None = None
    decided: bool = True
    needed: int | None = None
    ratio: tuple[float, float] | None = None
    n: int = 0

    def __str__(self) -> str:
        if self.second is None:
            return f"the only one, on {self.n} samples"
        if self.ratio is None:
            return f"undecided on {self.n} samples"
        low, high = self.ratio
        found = f"{low:.2f} to {high:.2f} of the next one's rms distance"
        if self.decided:
            return f"{found}, on {self.n} samples"
        return f"undecided on {self.n} samples, {found}" + (f"; {self.needed} may decide" if self.needed else "")


def choose(candidates: Sequence[Candidate]) -> Choice:
    """The least mean error, by which few samples may decide nothing: a few large errors make most of it. So of those
    whose mean is larger by no more than half a standard error of the difference, on the same samples, it is the one of
    least mean distance (`sqrt(error)`), which depends less on these. Ties go to the first.

    With more samples standard errors vanish and the mean decides. Errors that are NaN count as infinite. ValueError for
    no candidates, and for errors of different samples.

    Of 16 plans for each N = 2 to 8 of five models, the one chosen on n = 16, 32 and 64 of many samples had an rms on
    all of them 12, 7 and 6 % above the least, by the mean alone as well, and 19, 17 and 12 % by the mean of a quarter
    of the n. Where all plans have one heavy tail that is a fifth to a third less than by the mean alone; where the
    better ones have heavier bodies and lighter tails it is more, up to twice as much. Medians, logarithms and means
    without the largest 5 or 10 % are worse than the mean on the models, however many samples there are.
    """
    expect(len(candidates) > 0, "candidates", "one or more", "none")
    errors = torch.stack([c.errors.detach().to("cpu", torch.float64) for c in candidates])
    errors = torch.where(errors.isnan(), torch.inf, errors)
    intervals, n = tuple(mean_interval(e) for e in errors), errors.shape[1]
    best = _least(errors)
    if len(candidates) == 1:
        return Choice(best, intervals, n=n)
    rest = [i for i in range(len(candidates)) if i != best]
    second = rest[_least(errors[rest])]
    ratio = _ratio_interval(errors[best], errors[second])
    decided, needed = ratio is not None and ratio[1] < 1, None
    if not decided and ratio is not None and ratio[0] > 0 and ratio[1] < math.inf:
        means = errors[best].mean().item(), errors[second].mean().item()
        half, apart = math.log(ratio[1] / ratio[0]) / 2, 0.0
        if min(means) > 0 and max(means) / min(means) < math.inf:  # errors may be of the size of rounding
            apart = math.log(means[0] / means[1]) / 2
        needed = math.ceil(n * (half / apart) ** 2) + 1 if abs(apart) > 1e-6 and half < math.inf else None
    return Choice(best, intervals, second, decided, needed, ratio, n)


MOST = 1e100  # a ratio beyond which it is infinite: of resamples that have none of what is not 0
UNDECIDED = 0.5  # standard errors of a difference, within which means do not decide


def _least(errors: Tensor) -> int:
    """The best of errors `[c, n]`, as `choose` has it."""
    means, n = errors.mean(1), errors.shape[1]
    least = means.argmin()
    if n < 2 or not torch.isfinite(means[least]):
        return int(least)
    behind = errors - errors[least]
    near = behind.mean(1) <= UNDECIDED * behind.std(1) / n**0.5  # not what is infinite: NaN
    near[least] = True
    return int(torch.where(near, errors.sqrt().mean(1), torch.inf).argmin())


def _ratio_interval(errors: Tensor, others: Tensor) -> tuple[float, float] | None:
    """The bootstrap interval of 95 % of `sqrt(mean(errors) / mean(others))`, both of the same samples; None of fewer
    than two, or where both are 0 or infinite."""
    if len(errors) < 2:
        return None
    if bool(torch.isfinite(errors).all()) and not bool(torch.isfinite(others).all()):
        return 0.0, 0.0
    sums = resampled_sums(torch.stack([errors, others], 1))
    ratios = (sums[:, 0] / sums[:, 1]).sqrt()
    if bool(ratios.isnan().any()):
        return None
    ((low, high),) = ends(ratios.clamp_max(MOST)[None], tail_of(min(len(errors), MOST_GROUPS)))
    return low, high if high < MOST else math.inf
