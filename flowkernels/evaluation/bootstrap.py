"""Intervals of 95 % of means over samples, by bootstrap."""

import math

import torch
from torch import Tensor

RESAMPLES = 1000
MOST_GROUPS = 512  # of samples that are drawn together, where there are more samples


def tail_of(groups: int) -> float:
    """The share of resamples beyond each end of an interval of 95 %: 2.5 %, less what few groups ask for, whose
    resamples spread too little and whose mean is Student's t (the expanded percentile interval; Hesterberg, What
    Teachers Should Know About the Bootstrap, 2015)."""
    z, freedom = 1.959964, groups - 1
    t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    return math.erfc(t * math.sqrt(groups / freedom / 2)) / 2


def mean_interval(values: Tensor) -> tuple[float, float] | None:
    """The bootstrap interval of 95 % of the mean of `values [n]`, always of the same resamples; None of fewer than two
    values."""
    if len(values) < 2:
        return None
    values = values.detach().to("cpu", torch.float64)
    sums = resampled_sums(torch.stack([values, torch.ones_like(values)], 1))
    ((low, high),) = ends((sums[:, 0] / sums[:, 1])[None], tail_of(min(len(values), MOST_GROUPS)))
    return low, high


def resampled_sums(values: Tensor) -> Tensor:
    """The sums over n samples of `values [n, c]`, in `RESAMPLES` resamples with replacement, always the same ones of as
    many samples, or of groups of them."""
    groups = values.tensor_split(min(len(values), MOST_GROUPS))
    sums = torch.stack([group.sum(0) for group in groups])
    shape, generator = (RESAMPLES, len(groups)), torch.Generator("cpu").manual_seed(0)
    return sums[torch.randint(len(groups), shape, generator=generator, device="cpu")].sum(1)


def ends(values: Tensor, tail: float) -> list[list[float]]:
    """The quantiles of each row at `tail` and `1 - tail`, without sorting what lies between."""
    place = tail * (values.shape[1] - 1)
    whole = int(place)
    outer = [values.topk(whole + 2, largest=largest).values for largest in (False, True)]
    return torch.stack([torch.lerp(v[:, whole], v[:, whole + 1], place - whole) for v in outer], 1).tolist()
