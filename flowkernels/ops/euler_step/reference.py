"""`euler_step` in plain torch."""

from torch import Tensor

from flowkernels._guidance import guided


def euler_step(x: Tensor, v: Tensor, h: float, v_uncond: Tensor | None = None, guidance: float = 1.0) -> Tensor:
    return x + h * guided(v, v_uncond, guidance, x.dtype)
