"""What the ops' sample inputs share: one for each op in <op>/samples.py, for its tests and its benchmark.

Every samples.py has

    sample_inputs()               samples, whose arguments are those of the public function
    error_and_bound(sample, got)  the error of the function's result against float64, and what is allowed
    to_op(sample)                 the sample's arguments as the registered op takes them
    from_op(args)                 and back

and, where a check of large inputs as a whole would take too much memory or time, `parts(sample, got)`: smaller samples
and what the result has for them, which are checked one by one.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

PART = 1 << 22  # elements, about, of one part of a large sample


class Sample(NamedTuple):
    id: str
    args: tuple
    kwargs: dict


def not_none(**kwargs) -> dict:
    """Those that are not None."""
    return {name: value for name, value in kwargs.items() if value is not None}


def slices(n: int, each: int) -> Iterator[slice]:
    """range(n) in pieces of no more than PART elements where it has `each` for every entry; one if n is 0."""
    step = max(1, PART // max(1, each))
    for begin in range(0, max(n, 1), step):
        yield slice(begin, begin + step)


def pieces(shape: torch.Size) -> Iterator[tuple[slice, ...]]:
    """A tensor in pieces of about PART elements, each an index into it, along its longest dimension."""
    if not shape:
        yield ()
        return
    longest = max(range(len(shape)), key=lambda d: shape[d])
    for piece in slices(shape[longest], math.prod(shape) // max(1, shape[longest])):
        yield (*(slice(None),) * longest, piece)


def of_state(got, wants_low: bool, piece):
    """`got[piece]` of an update's result: a state, or the pair of it and its low-precision copy."""
    return tuple(t[piece] for t in got) if wants_low else got[piece]


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
