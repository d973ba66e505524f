"""Classifier-free guidance: by a weight, or by a function of the two velocities."""

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor

from flowkernels._checks import expect

GuidanceFunction: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]  # (cond, uncond, t) -> v
Guidance: TypeAlias = float | GuidanceFunction


def guided(v: Tensor, v_uncond: Tensor | None, guidance: float, dtype) -> Tensor:
    """Classifier-free guidance `v_uncond + w (v - v_uncond)`, computed in `dtype`."""
    if v_uncond is None:
        return v.to(dtype)
    base = v_uncond.to(dtype)
    return base + guidance * (v.to(dtype) - base)


def guided_by(function: GuidanceFunction, v: Tensor, v_uncond: Tensor, t: Tensor, x: Tensor) -> Tensor:
    """What a function of guidance makes of the velocities of x at times t `[n]`: all in the state's dtype."""
    for part in (v, v_uncond):
        expect(part.shape == x.shape, "velocity", f"x's shape {list(x.shape)}", part)
    made = function(v.to(x.dtype), v_uncond.to(x.dtype), t)
    expected = f"a function (cond, uncond, t) -> v whose v is a tensor of their shape {list(x.shape)}"
    expect(isinstance(made, Tensor), "guidance", expected, made, TypeError)
    expect(made.shape == x.shape and made.device == x.device, "guidance", f"{expected} on {x.device}", made)
    return made.to(x.dtype)


def told(guidance: Any) -> float | str:
    """Guidance in a record: the weight, or the name of the function."""
    if not callable(guidance):
        return guidance
    while isinstance(guidance, functools.partial):
        guidance = guidance.func
    named = guidance if hasattr(guidance, "__qualname__") else type(guidance)
    return f"a function {named.__module__}.{named.__qualname__}"


def expect_weight(guidance: Any, what: str, way_out: str) -> None:
    """Raise for a function, where only a weight can be part of a kernel."""
    expect(not callable(guidance), "guidance", f"a weight, in {what} ({way_out})", told(guidance))
