"""What the ops' sample inputs share: one for each op in <op>/samples.py, for its tests and its benchmark.

Every samples.py has

    sample_inputs()               samples, whose arguments are those of the public function
    error_and_bound(sample, got)  the error of the function's result against float64, and what is allowed
    to_op(sample)                 the sample's arguments as the registered op takes them
    from_op(args)                 and back

and, where a check of large inputs as a whole would take too much memory or time, `parts(sample, got)`: smaller samples
and what the result has for them, which are checked one by one.

The truth is the reference called with twice the digits of the op's dtype (`lift`). What is allowed follows from the
arithmetic: the roundings that a term passes through, each off by half an ulp of what it rounds at most, times the size
of the terms. It holds for any order of the sums, so for every backend, instruction set and number of threads; the
reference in the op's own dtype, on whichever BLAS, is one more implementation that keeps it.

Random inputs are those of FLOWKERNELS_TEST_SEED, 0 where it is not set: scripts/test_seeds tries others.
"""

import dataclasses
import importlib
import math
import os
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowkernels.ops._wide import Wide

PART = 1 << 22  # elements, about, of one part of a large sample


def generator(seed: int = 0) -> torch.Generator:
    """Of the tests' random numbers: another one for each seed of FLOWKERNELS_TEST_SEED."""
    return torch.Generator().manual_seed(seed + 1_000_003 * int(os.environ.get("FLOWKERNELS_TEST_SEED") or 0))


class Sample(NamedTuple):
    id: str
    args: tuple
    kwargs: dict


def samples_of(op: str) -> ModuleType:
    """The op's samples.py."""
    return importlib.import_module(f"flowkernels.ops.{op}.samples")


def op_args(op: str, sample: Sample) -> tuple:
    """The sample's arguments as the registered op takes them; `straighten_loss` with its gradient."""
    args = samples_of(op).to_op(sample)
    return (*args[:-1], True) if op == "straighten_loss" else args


class Memories(NamedTuple):
    """What `moved` has moved."""

    tensors: dict[int, Tensor]  # by the identity of the old one
    storages: dict[int, Tensor]  # by the old address


def moved(value: Any, device: torch.device | str, memories: Memories | None = None) -> Any:
    """`value` with every tensor in it on the device, in memory laid out as it is here: offset, strides, what lies in
    between, and which tensors share it or are one. The memory is new, on the same device too."""
    memories = Memories({}, {}) if memories is None else memories
    if isinstance(value, Tensor):
        if id(value) not in memories.tensors:
            storage = value.untyped_storage()
            if storage.data_ptr() not in memories.storages or not storage.nbytes():
                flat = value.as_strided((storage.nbytes() // value.element_size(),), (1,), 0)
                memories.storages[storage.data_ptr()] = torch.empty_like(flat, device=device).copy_(flat)
            memory = memories.storages[storage.data_ptr()].view(value.dtype)
            memories.tensors[id(value)] = memory.as_strided(value.shape, value.stride(), value.storage_offset())
        return memories.tensors[id(value)]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(moved(v, device, memories) for v in value))
    if isinstance(value, (list, tuple)):
        return type(value)(moved(v, device, memories) for v in value)
    if isinstance(value, dict):
        return {k: moved(v, device, memories) for k, v in value.items()}
    if dataclasses.is_dataclass(value):
        parts = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **{k: moved(v, device, memories) for k, v in parts.items()})
    return value


def not_none(**kwargs) -> dict:
    """Those that are not None."""
    return {name: value for name, value in kwargs.items() if value is not None}


def lift(dtype: torch.dtype) -> Callable[[Tensor], Tensor | Wide]:
    """What makes a tensor one of twice the digits of an op in `dtype`: float64, or Wide."""
    return Wide.of if dtype == torch.float64 else Tensor.double


def absolute(t: Tensor | Wide) -> Tensor:
    """|t| in float64."""
    return (t.hi if isinstance(t, Wide) else t).double().abs()


def rounding(roundings: float, dtype: torch.dtype) -> float:
    """The relative error of a number that has passed through so many roundings, of half an ulp each at most."""
    error = roundings * torch.finfo(dtype).eps / 2
    return error / (1 - error)


def of_sum(n: int) -> float:
    """The roundings of a sum of n numbers, in any order, relative to the sum of their sizes.

    n at most. Each is off by at most half an ulp, evenly distributed about zero: its standard deviation is that over
    sqrt(3), that of n of them sqrt(n / 3). Six of those are allowed: one sum in 5e8 is off by more.
    """
    return min(n, 6 * math.sqrt(n / 3))


def of_products(n: int) -> float:
    """The same for a kernel's sum of n products, relative to the product of the vectors' lengths.

    Partial sums grow evenly, which takes another sqrt(3); it is made in two lanes at least, whose errors are
    independent, and after 1,024 products it moves on. Six standard deviations of that.
    """
    return min(n, math.sqrt(min(n, 1024)))


def compared(
    got: Tensor, truth: Tensor | Wide, scale: Tensor, bound: Tensor | float, least: Tensor | float = 0.0
) -> tuple[float, float]:
    """(error, bound) relative to the scale, at the element that is nearest to its bound.

    least: allowed of every element beside bound * scale: half a step of the dtype's smallest numbers, say.
    """
    if not got.numel():
        return 0.0, 0.0
    error = absolute(truth - got.double())
    allowed = (bound * scale + least).expand(error.shape)
    ratio = torch.where(error == 0, 0.0, error / allowed).flatten()
    at = ratio.nan_to_num(nan=math.inf).argmax()
    size = max(scale.expand(error.shape).flatten()[at].item(), torch.finfo(torch.float64).tiny)
    return (math.inf if ratio[at].isnan() else error.flatten()[at].item() / size), allowed.flatten()[at].item() / size


def nearest(*pairs: tuple[float, float]) -> tuple[float, float]:
    """Of several (error, bound), that which is nearest to its bound."""
    return max(pairs, key=closeness)


def closeness(pair: tuple[float, float]) -> float:
    error, bound = pair
    if not error <= bound:
        return math.inf
    return error / bound if bound else 0.0


def step(dtype: torch.dtype) -> float:
    """Between the smallest numbers."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


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
