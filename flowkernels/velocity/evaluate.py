"""Evaluating a velocity at a time, with checks of what it returns."""

import torch
from torch import Tensor, nn

from flowkernels._checks import FLOATS, expect
from flowkernels._warnings import warn
from flowkernels.runtime.torch_private import BatchNorm, Dropout
from flowkernels.velocity.protocol import Velocity, VelocityBase, as_given
from flowkernels.velocity.time_embedding import Embedding


def evaluate(
    velocity: VelocityBase, x: Tensor, t: Tensor, embedding: Embedding | None = None
) -> tuple[Tensor, Tensor | None, float]:
    """`(v, v_uncond or None, guidance)` at one time t, `[n]`, for all samples, checked for shape.

    velocity: as `resolve` gives it. t: in float64, or as the velocity takes it. embedding: of that time, of one row;
    None leaves it to the network.
    """
    return checked(x, t, 0, *velocity.velocities(x, velocity.time_for(t, x), embedding))


def checked(
    x: Tensor, t: Tensor, i: int, v: Tensor, v_uncond: Tensor | None, weight: float
) -> tuple[Tensor, Tensor | None, float]:
    """What an evaluation of x at the time `t[i]` gave, checked for shape; in x's dtype, where one of the two is
    float64."""
    alike = v_uncond is None and type(v) is Tensor and v.dtype is x.dtype is torch.float32
    if alike and v.shape == x.shape and v.device == x.device:  # most
        return v, None, weight
    if not isinstance(v, Tensor):
        expect(False, "velocity", f"a tensor of shape {list(x.shape)}", type(v).__name__, TypeError)
    for part in (v, v_uncond):
        if part is not None and (part.shape != x.shape or part.device != x.device):
            expect(False, "velocity", f"x's shape {list(x.shape)} on {x.device}, at t = {t[i]:.6g}", part)
        if part is not None and (part.dtype not in FLOATS or part.dtype != v.dtype):
            expected = " or ".join(str(d) for d in FLOATS) if part is v else f"the conditional one's {v.dtype}"
            expect(False, "velocity", expected, part, TypeError)
    if x.dtype == torch.float64 and v.dtype != torch.float64:  # a float64 state with a narrower network
        v, v_uncond = v.double(), None if v_uncond is None else v_uncond.double()
    elif x.dtype == torch.float32 and v.dtype == torch.float64:
        v, v_uncond = v.float(), None if v_uncond is None else v_uncond.float()
    return v, v_uncond, weight


TRAINING = "velocity: expected a network in eval mode"


def warn_if_training(velocity: Velocity, stacklevel: int = 4) -> bool:
    """Dropout or batch statistics make a velocity random: warn if a network is left in training mode. Whether one is.

    The warning points at the caller of the stage that asks, below the frame of its `torch.no_grad` decorator.
    """
    velocity = as_given(velocity)
    if not isinstance(velocity, nn.Module):
        return False
    for name, module in velocity.named_modules():
        if not module.training:
            continue
        random = isinstance(module, Dropout) and module.p > 0
        if random or isinstance(module, BatchNorm):
            text = f"{TRAINING}, got {type(module).__name__} {name!r} in training mode; call .eval() first"
            warn(text, stacklevel)
            return True
    return False
