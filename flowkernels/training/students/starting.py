"""Weights that a student starts from, under names that are not its own: of layers with adapters of peft's, and of
weights that a network computes from others, as weight_norm does."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from flowkernels.training.students.adapters import adapter_layers
from flowkernels.training.students.modules import (
    expect_weights,
    load_weights,
    plain_name,
    plain_state,
    without_prefix,
)
from flowkernels.velocity.hashes import class_name, unwrapped

EXTRA = "_extra_state"  # of modules with get_extra_state
OLD = "torch.nn.utils.weight_norm.WeightNorm"  # a hook, of before there were parametrizations
BASE = "base_layer."  # of peft's layers, what an adapter is added to


def start_from(net: nn.Module, state: Mapping[str, Any], name: str, source: nn.Module | None = None) -> None:
    """Load a state dict; ValueError, naming the argument, where it does not fit. What is the student's alone stays:
    adapters, and state that is no tensor.

    source: the module whose state it is, where there is one.
    """
    if isinstance(state, Mapping) and without_prefix(net, state).keys() != plain_state(net).keys():
        net = unwrapped(net)
        state = _in_names_of(net, _computed(source, without_prefix(net, state)))
    expect_weights(net, state, name)
    load_weights(net, state)


@torch.no_grad()
def _computed(source: nn.Module | None, state: Mapping[str, Any]) -> dict[str, Any]:
    """With weights in the place of those that they are computed from."""
    found = dict(state)
    for key, parts, compute, _ in _computed_weights(source) if source is not None else ():
        if all(part in found for part in parts):
            found[key] = compute()
            for part in [other for other in found if other in parts or other.startswith(f"{_list_of(key)}.")]:
                del found[part]
    return found


@torch.no_grad()
def _in_names_of(net: nn.Module, found: dict[str, Any]) -> dict[str, Any]:
    own = plain_state(net)
    layers = [f"{plain_name(net, name)}." for name in adapter_layers(net)]
    for key, value in own.items():
        layer = next((prefix for prefix in layers if key.startswith(prefix)), None)
        base = None if layer is None else layer + key.removeprefix(layer + BASE)
        if key in found:
            continue
        if base in found:
            found[key] = found.pop(base)
        elif layer is not None or _is_extra(key):
            found[key] = value
    for key, parts, _, invert in _computed_weights(net):
        if isinstance(found.get(key), Tensor) and key not in own:
            value = invert(found.pop(key).to(own[parts[0]]))
            found |= dict(zip(parts, [value] if isinstance(value, Tensor) else value, strict=True))
            found |= {other: own[other] for other in own.keys() - found.keys() if other.startswith(f"{_list_of(key)}.")}
    return {key: value for key, value in found.items() if key in own or not _is_extra(key)}


def _is_extra(key: Any) -> bool:
    return str(key).rpartition(".")[2] == EXTRA


def _list_of(key: str) -> str:
    """Where a module has the parametrizations of a weight."""
    before, dot, name = key.rpartition(".")
    return f"{before}{dot}parametrizations.{name}"


def _computed_weights(net: nn.Module) -> Iterator[tuple]:
    """Of each weight that is computed: its name, names of what it is computed from, how, and how to go back."""
    for path, part in net.named_modules():
        prefix = f"{plain_name(net, path)}." if path else ""
        if parametrize.is_parametrized(part):
            for name, through in part.parametrizations.items():
                parts = [f"original{i}" for i in range(through.ntensors)] if not through.is_tensor else ["original"]
                names = [f"{_list_of(prefix + name)}.{each}" for each in parts]
                if all(hasattr(each, "right_inverse") for each in through):
                    yield prefix + name, names, through.forward, lambda w, through=through: _inverted(through, w)
        for hook in part._forward_pre_hooks.values():
            if class_name(type(hook)) == OLD:
                compute = lambda hook=hook, part=part: hook.compute_weight(part)  # noqa: E731
                invert = lambda w, dim=hook.dim: (torch.norm_except_dim(w, 2, dim), w)  # noqa: E731
                yield prefix + hook.name, [f"{prefix}{hook.name}_{each}" for each in "gv"], compute, invert


def _inverted(through: nn.Module, value: Any) -> Any:
    for each in reversed(through):
        value = each.right_inverse(value)
    return value
