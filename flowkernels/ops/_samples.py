"""What the ops' sample inputs share: one for each op in <op>/samples.py, for its tests and its benchmark."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Sample(NamedTuple):
    id: str
    args: tuple
    kwargs: dict


def arrange(t: Tensor, layout: str) -> Tensor:
    """The values of `t` in another memory layout ("expanded" repeats one sample). Memory in between holds NaN."""
    if layout == "contiguous":
        return t.contiguous()
    if layout == "misaligned":
        return t.new_full((t.numel() + 1,), math.nan)[1:].view(t.shape).copy_(t)
    if layout == "sliced":
        return t.new_full((*t.shape[:-1], t.shape[-1] + 3), math.nan)[..., 1:-2].copy_(t)
    if layout == "permuted":
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "reversed":
        return t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim())))
    if layout == "channels_last":
        return t.flatten(0, -4).contiguous(memory_format=torch.channels_last).unflatten(0, t.shape[:-3])
    if layout == "expanded":
        return t[..., :1, :].expand_as(t)
    raise ValueError(f"layout: unknown {layout!r}")
