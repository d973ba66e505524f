"""Where on an interval a student is trained: u, 0 at its first knot and 1 at its last.

Each is the inverse of a distribution function, of p uniform in [0, 1): one draw a sample, in the same order for all.
Another is a row of `T_SAMPLINGS`, with its source; tests/test_straighten.py holds each to its density.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

A = 4.0  # of the U, as in its paper


def uniform(p: Tensor) -> Tensor:
    """Piecewise rectified flow; on the one interval [0, 1] rectified flow (arXiv 2209.03003)."""
    return p


def u_shaped(p: Tensor) -> Tensor:
    """Density proportional to `e^(a u) + e^(a (1-u))`, a = 4, most at both ends: improved rectified flow (arXiv
    2405.20320), whose own code mirrors half of what it draws from e^(a u)."""
    return (0.5 + torch.asinh((2 * p - 1) * math.sinh(A / 2)) / A).clamp(0, 1)


def ten(p: Tensor) -> Tensor:
    """Density proportional to `10^(1-u)`, most at the noise: Simple ReFlow (arXiv 2410.07815), whose t = 1 - u is 0 at
    the data."""
    return -torch.log10(1 - 0.9 * p)


START = "start"  # u = 0, nothing drawn: BOSS as published (arXiv 2312.16414)
T_SAMPLINGS: dict[str, Callable[[Tensor], Tensor] | None] = {
    START: None,
    "uniform": uniform,
    "u_shaped": u_shaped,
    "ten": ten,
}
