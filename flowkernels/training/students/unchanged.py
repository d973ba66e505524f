"""Passes through a student that leave it as it was."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from flowkernels.runtime.sharded import local, reshard
from flowkernels.training.students.modules import unwrapped
from flowkernels.velocity.hashes import MACHINERY

PLAIN = (Tensor, bool, int, float, complex, str, type(None))  # attributes in which a module counts and keeps
CONTAINERS = (list, dict, set)


@contextlib.contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """A block of forward and backward passes, after which gradients, buffers, modes and what modules hold, in tensors,
    numbers and containers of their own, are as they were. Gradients begin at none. Parameters are not looked at."""
    modes = [(part, part.training) for part in module.modules()]
    gradients = [(p, p.grad) for p in module.parameters()]
    values = {id(b): (b, b.detach().clone()) for b in module.buffers()}
    buffers = [(part, dict(part._buffers)) for part in module.modules()]
    # numbers of DistributedDataParallel, a wrapper, are its reducer's
    held = [(part, *_attributes(part)) for part in module.modules() if unwrapped(part) is part]
    for p, _ in gradients:
        p.grad = None
    try:
        yield
    finally:
        reshard(module)
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
