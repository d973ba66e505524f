"""Classifier-free guidance."""

from torch import Tensor


def guided(v: Tensor, v_uncond: Tensor | None, guidance: float, dtype) -> Tensor:
    """Classifier-free guidance `v_uncond + w (v - v_uncond)`, computed in `dtype`."""
    if v_uncond is None:
        return v.to(dtype)
    base = v_uncond.to(dtype)
    return base + guidance * (v.to(dtype) - base)
