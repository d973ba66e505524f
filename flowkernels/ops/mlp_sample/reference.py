"""The reference of `mlp_sample`: its layers one after another, its steps one after another."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from flowkernels.solver import Update

NORMS: dict[str, Callable[..., Tensor]] = {"layer_norm": F.layer_norm, "rms_norm": F.rms_norm}
COMBINED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "multiply": torch.mul,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
}

ACTIVATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "none": lambda y, alpha: y,
    "relu": lambda y, alpha: y.relu(),
    "leaky_relu": lambda y, alpha: F.leaky_relu(y, alpha),
    "silu": lambda y, alpha: F.silu(y),
    "gelu": lambda y, alpha: F.gelu(y),
    "gelu_tanh": lambda y, alpha: F.gelu(y, approximate="tanh"),
    "elu": lambda y, alpha: F.elu(y, alpha),
    "tanh": lambda y, alpha: y.tanh(),
    "sigmoid": lambda y, alpha: y.sigmoid(),
    "mish": lambda y, alpha: F.mish(y),
    "softplus": lambda y, alpha: F.softplus(y, threshold=50.0),
    "at_least": lambda y, alpha: y.clamp(min=alpha),
    "at_most": lambda y, alpha: y.clamp(max=alpha),
}


def velocity(
    x: Tensor, layers: Sequence, step: int, weights: torch.dtype | None, norms: dict[str, Callable] = NORMS
) -> Tensor:
    """The last value: v `[n, D]` at one step.

    weights: what weights and inputs of linear layers are rounded to. norms: bounds are made of some with errors.
    """
    values = [x]

    def read(source) -> Tensor:
        return values[source.value].narrow(1, source.first, source.width)

    def row(table: Tensor) -> Tensor:
        return table[step if len(table) > 1 else 0].to(x.dtype)

    for layer in layers:
        y = read(layer.source)
        if layer.map == "linear":
            weight = layer.weight if weights is None else layer.weight.to(weights)
            y = (y if weights is None else y.to(weights).to(x.dtype)) @ weight.to(x.dtype).T
        elif layer.map in norms:
            y = norms[layer.map](y, y.shape[1:], eps=layer.eps)
        y = y if layer.scale is None else y * row(layer.scale)
        for table in (layer.shift, layer.shift_each):
            y = y if table is None else y + row(table)
        y = layer.gain * ACTIVATIONS[layer.activation](y, layer.alpha)
        if layer.other is not None:
            y = COMBINED[layer.combine](read(layer.other), y)
        y = y.expand(len(x), -1)
        if layer.first:
            values[-1] = torch.cat([values[-1], y], 1)
        else:
            values.append(y)
    return values[-1]


def mlp_sample(x, step_sizes, layers, unconditional, guidance, weights, *norms) -> tuple[Tensor, Tensor, Tensor]:
    """(the state after all steps, the states `[N+1, n, D]`, the velocities `[N, n, D]`). step_sizes: or updates."""
    states, velocities = [x], []
    start = x
    for step, update in enumerate(step_sizes):
        v = velocity(x, layers, step, weights, *norms)
        if unconditional is not None:
            u = velocity(x, unconditional, step, weights, *norms)
            v = u + guidance * (v - u)
        velocities.append(v)
        if isinstance(update, tuple):
            from_start, which, factors, scale = Update(*update)
            x = scale * (start if from_start else x)
            for i, factor in zip(which, factors, strict=True):
                x = x + factor * velocities[i]
        else:
            x = x + update * v
        states.append(x)
    return x, torch.stack(states), torch.stack(velocities) if velocities else x.new_empty(0, *x.shape)
