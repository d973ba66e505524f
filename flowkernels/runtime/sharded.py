"""Weights that are sharded over processes, as `torch.distributed.fsdp.fully_shard` has them: DTensors, and what other
tensors are to them. On every rank the same calls, in the same order: `whole` and `alike` wait for the others."""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from flowkernels.runtime.torch_private import tree_map

SHARDED, FSDP = "torch.distributed.tensor", "torch.distributed.fsdp"  # nothing is sharded where they are not imported


def is_sharded(t: Any) -> bool:
    found = sys.modules.get(SHARDED)
    return isinstance(t, Tensor) and found is not None and isinstance(t, found.DTensor)


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether it is a module of `fully_shard`, which has given it a class of its own."""
    kind = getattr(sys.modules.get(FSDP), "FSDPModule", None)
    return kind is not None and isinstance(module, kind)


def class_of(module: nn.Module) -> type:
    """Its class, of a module of `fully_shard` the one that it had before."""
    return type(module).__bases__[1] if is_fully_sharded(module) else type(module)


def reshard(module: nn.Module) -> None:
    """Let go of what the last evaluation has gathered: without a backward pass the parameters of `fully_shard`'s
    outermost module stay those gathered, which are not what is trained."""
    for part in module.modules():
        if is_fully_sharded(part):
            part.reshard()


@torch.no_grad()
def local(t: Tensor) -> Tensor:
    """What this process has of it, in the same memory; of a tensor that is not sharded all."""
    return t.to_local() if is_sharded(t) else t


@torch.no_grad()
def whole(t: Tensor) -> Tensor:
    """All of it, on the CPU where it is gathered; a tensor that is not sharded as it is."""
    return t.full_tensor().cpu() if is_sharded(t) else t


def whole_tree(values: Any) -> Any:
    """Containers with their tensors whole."""
    return tree_map(whole, values)


@torch.no_grad()
def alike(t: Any, like: Any) -> Any:
    """A tensor sharded as another, or whole as it is; what is no tensor as it is. Of a whole one the first rank's
    values are taken."""
    if not isinstance(t, Tensor) or not isinstance(like, Tensor):
        return t
    if not is_sharded(like):
        return whole(t)
    if is_sharded(t) and t.device_mesh == like.device_mesh and t.placements == like.placements:
        return t
    whole_one = whole(t).to(like.device)
    return sys.modules[SHARDED].distribute_tensor(whole_one, like.device_mesh, like.placements)
