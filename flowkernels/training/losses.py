"""Losses of a sample, which `StraightenLoss` takes by name: functions of velocities, of their targets, `[B, *shape]` in
the bank's dtype, and of a constant c, to `[B]`.

Those in `FUSED` are `straighten_loss`'s own, where the targets are secants of a bank; what is not is computed by rows
(by_rows.py), and a function of the caller's on the whole batch. Another is a row of `LOSSES`, with its source;
tests/test_straighten.py has each once more, in float64.
"""

from collections.abc import Callable

from torch import Tensor

from flowkernels.ops.straighten_loss.reference import per_sample

FUSED = ("l2", "huber")


def l2(v: Tensor, target: Tensor, c: float) -> Tensor:
    """`|e|^2 / D`."""
    return per_sample(v - target, 0.0)


def huber(v: Tensor, target: Tensor, c: float) -> Tensor:
    """`sqrt(|e|^2 / D + c^2) - c` (Song & Dhariwal 2023, arXiv 2310.14189, on the mean over features)."""
    return per_sample(v - target, c)


def huber_per_element(v: Tensor, target: Tensor, c: float) -> Tensor:
    """The mean over features of `sqrt(e^2 + c^2) - c`, written so that nothing cancels (Charbonnier et al. 1994)."""
    square = (v - target).square()
    return (square / ((square + c * c).sqrt() + c)).flatten(1).mean(1)


def cauchy(v: Tensor, target: Tensor, c: float) -> Tensor:
    """The mean over features of `log(1 + e^2 / (2 c^2))`, which hardly minds outliers: Cauchy's (Lorentz's) loss, used
    for consistency models of latents in arXiv 2502.01441."""
    return ((v - target) / c).square().div(2).log1p().flatten(1).mean(1)


LOSSES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "l2": l2,
    "huber": huber,
    "huber_per_element": huber_per_element,
    "cauchy": cauchy,
}
