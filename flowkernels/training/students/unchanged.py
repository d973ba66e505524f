"""Passes through a student that leave it as it was."""

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flowkernels.runtime.sharded import local, reshard
from flowkernels.runtime.torch_private import NOT_IN_STATE
from flowkernels.training.students.modules import unwrapped
from flowkernels.velocity.hashes import MACHINERY

PLAIN = (Tensor, bool, int, float, complex, str, type(None))  # attributes in which a module counts and keeps
CONTAINERS = (list, dict, set)


@contextlib.contextmanager
def unchanged(module: nn.Module) -> Iterator[list[str]]:
    """A block of forward and backward passes, after which gradients, buffers, modes and what modules hold, in tensors,
    numbers and containers of their own, are as they were. Gradients begin at none. Parameters are not looked at. What
    it is given is then the names of the buffers of state dicts that the passes changed."""
    changed: list[str] = []
    modes = [(part, part.training) for part in module.modules()]
    gradients = [(p, p.grad) for p in module.parameters()]
    values = {id(b): (b, b.detach().clone()) for b in module.buffers()}
    buffers = [(part, dict(part._buffers)) for part in module.modules()]
    # numbers of DistributedDataParallel, a wrapper, are its reducer's
    held = [(part, *_attributes(part)) for part in module.modules() if unwrapped(part) is part]
    for p, _ in gradients:
        p.grad = None
    try:
        yield changed
    finally:
        reshard(module)
        changed += _changed(module, buffers, values)
        for p, gradient in gradients:
            p.grad = gradient
        for part, plain, contents in held:
            _put_back(part, plain, contents)
        for part, before in buffers:
            part._buffers.clear(), part._buffers.update(before)
        with torch.no_grad():
            for buffer, before in values.values():
                if not torch.equal(local(buffer), local(before)):  # BatchNorm's do not count their versions
                    buffer.copy_(before)
        for part, mode in modes:
            part.training = mode


def _changed(
    module: nn.Module,
    buffers: Sequence[tuple[nn.Module, dict[str, Tensor | None]]],
    values: Mapping[int, tuple[Tensor, Tensor]],
) -> Iterator[str]:
    """Of the buffers as they were, those that are not so."""
    names = {id(part): f"{name}." if name else "" for name, part in module.named_modules()}
    for part, before in buffers:
        for name, buffer in before.items():
            now, kept = part._buffers.get(name), name not in getattr(part, NOT_IN_STATE)
            same = buffer is None or (now is not None and _equal(now, values[id(buffer)][1]))
            if kept and not same:
                yield names.get(id(part), "") + name


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.device == b.device and torch.equal(local(a), local(b))


def _attributes(part: nn.Module) -> tuple[dict[str, Any], list[tuple[Any, Any]]]:
    """Its plain attributes, and its containers with what is in them."""
    own = {name: value for name, value in vars(part).items() if name not in MACHINERY}
    plain = {name: value for name, value in own.items() if isinstance(value, PLAIN)}
    return plain, [(value, copy.copy(value)) for value in own.values() if type(value) in CONTAINERS]


def _put_back(part: nn.Module, plain: dict[str, Any], contents: list[tuple[Any, Any]]) -> None:
    attributes = vars(part)
    for name in [name for name in _attributes(part)[0] if name not in plain]:
        del attributes[name]
    attributes.update(plain)
    for value, before in contents:
        value.clear()
        value.extend(before) if isinstance(value, list) else value.update(before)
