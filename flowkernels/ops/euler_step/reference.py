"""`euler_step` in plain torch."""

from torch import Tensor


def guided(v: Tensor, v_uncond: Tensor | None, guidance: float, dtype) -> Tensor:
    """Classifier-free guidance `v_uncond + w (v - v_uncond)`, computed in `dtype`."""
    if v_uncond is None:
        return v.to(dtype)
    base = v_uncond.to(dtype)
    return base + guidance * (v.to(dtype) - base)


def euler_step(x: Tensor, v: Tensor, h: float, v_uncond: Tensor | None = None, guidance: float = 1.0) -> Tensor:
    return x + h * guided(v, v_uncond, guidance, x.dtype)
