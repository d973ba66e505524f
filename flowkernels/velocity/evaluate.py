"""Evaluating a velocity: by rows, at the times of its network, with embeddings made ahead."""

import torch
from torch import Tensor, nn

from flowkernels._checks import FLOATS, expect, expect_callable, expect_takes
from flowkernels._warnings import warn
from flowkernels.velocity.field import (
    OWN,
    VelocityField,
    _per_sample,
    embed_time,
    float64_device,
    is_called_whole,
    overridden,
    time_for,
)
from flowkernels.velocity.hashes import unwrapped
from flowkernels.velocity.time_embedding import Embedding, HasTimeEmbedding, _rows, _takes_embedding, expand_embedding


def velocity_rows(velocity, index: Tensor | slice, n: int):
    """`velocity` for the samples `index` of n; a callable without per-sample conditioning is itself."""
    if isinstance(velocity, VelocityField):
        return velocity.rows(index, n)
    inside = unwrapped(velocity)
    if isinstance(inside, VelocityField) and len(range(n)[index] if isinstance(index, slice) else index) < n:
        rows = sorted(k for k, v in inside.conditioning.items() if _per_sample(v, n))
        expected = "a VelocityField around the wrapped network, where conditioning has a row for each sample"
        expect(not rows, "velocity", expected, f"a {type(velocity).__name__} around a VelocityField with {rows}")
    return velocity


def expect_velocity(velocity, name: str = "velocity") -> None:
    """Something to call; whether it takes x and t is looked at where it does not (`evaluate`)."""
    expect_callable(velocity, name, "a callable velocity(x, t)")


def has_time_embedding(velocity) -> bool:
    """Whether the network says that it exposes its time embedding: `HasTimeEmbedding`."""
    if isinstance(velocity, VelocityField):  # conditioning of the name, if any, is the network's own
        known = "embedding" not in velocity.conditioning and has_time_embedding(velocity.net)
        return known and all(_takes_embedding(method) for method in overridden(velocity).values())
    method = getattr(velocity, "time_embedding", None) if isinstance(velocity, HasTimeEmbedding) else None
    if not callable(method) or isinstance(method, nn.Module):
        return False
    kind, own = type(velocity), getattr(velocity, "__dict__", ())
    if not isinstance(velocity, nn.Module):
        return _takes_embedding(kind.__call__)
    if "forward" in own or "__call__" in own:  # put over the class's
        return False
    passes = kind.__call__ is OWN["__call__"] or _takes_embedding(kind.__call__)
    return passes and _takes_embedding(kind.forward)


def time_embeddings(velocity, t: Tensor, x: Tensor) -> list[Embedding]:
    """The embedding at each of the times `[N]`, of one row each, from one call; x: the state."""
    return _rows(embed_time(velocity, t.clone(), x), len(t))


def model_times(velocity, times: Tensor, x: Tensor) -> Tensor:
    """The times of all evaluations `[M]`, float64 on the CPU, as a velocity takes them, for loops; without a sync."""
    if isinstance(velocity if torch.compiler.is_compiling() else unwrapped(velocity), VelocityField):
        return times.to(float64_device(x.device), non_blocking=True)
    return times.to(x.device, torch.float64 if x.dtype == torch.float64 else torch.float32, non_blocking=True)


def evaluate(velocity, x: Tensor, t: Tensor, embedding: Embedding | None = None) -> tuple[Tensor, Tensor | None, float]:
    """`(v, v_uncond or None, guidance)` at one time t, `[n]`, for all samples, checked for shape.

    t: in float64, or as the velocity takes it. embedding: of that time, of one row; None leaves it to the network.
    """
    t, given = time_for(velocity, t, x), () if embedding is None else (embedding,)
    if isinstance(velocity, VelocityField) and not is_called_whole(velocity):
        v, v_uncond = velocity.pair(x, t, *given)
        weight = velocity.guidance
    elif given:
        v, v_uncond, weight = velocity(x, t, embedding=expand_embedding(embedding, len(x))), None, 1.0
    else:
        v, v_uncond, weight = _called(velocity, x, t), None, 1.0
    if not isinstance(v, Tensor):
        expect(False, "velocity", f"a tensor of shape {list(x.shape)}", type(v).__name__, TypeError)
    for part in (v, v_uncond):
        if part is not None and (part.shape != x.shape or part.device != x.device):
            expect(False, "velocity", f"x's shape {list(x.shape)} on {x.device}, at t = {t[0]:.6g}", part)
        if part is not None and (part.dtype not in FLOATS or part.dtype != v.dtype):
            expected = " or ".join(str(d) for d in FLOATS) if part is v else f"the conditional one's {v.dtype}"
            expect(False, "velocity", expected, part, TypeError)
    if x.dtype == torch.float64 and v.dtype != torch.float64:  # a float64 state with a narrower network
        v, v_uncond = v.double(), None if v_uncond is None else v_uncond.double()
    elif x.dtype == torch.float32 and v.dtype == torch.float64:
        v, v_uncond = v.float(), None if v_uncond is None else v_uncond.float()
    return v, v_uncond, weight


def _called(velocity, x: Tensor, t: Tensor):
    try:
        return velocity(x, t)
    except TypeError:  # its own, unless it takes other arguments
        expect_takes(velocity, "velocity", "a callable velocity(x, t)", x, t)
        raise


TRAINING = "velocity: expected a network in eval mode"


def warn_if_training(velocity, stacklevel: int = 4) -> None:
    """Dropout or batch statistics make a velocity random: warn if a network is left in training mode.

    The warning points at the caller of the stage that asks, below the frame of its `torch.no_grad` decorator.
    """
    if not isinstance(velocity, nn.Module):
        return
    for name, module in velocity.named_modules():
        if not module.training:
            continue
        random = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
        if random or isinstance(module, nn.modules.batchnorm._BatchNorm):
            text = f"{TRAINING}, got {type(module).__name__} {name!r} in training mode; call .eval() first"
            return warn(text, stacklevel)
