"""What the Triton kernels of the ops share.

An op's kernels are in <op>/triton_kernel.py: `CONFIGS`, the shipped configuration of each kernel; `SEARCH`, what
`flowkernels tune` tries instead; the kernels; and for each registered op a function of its name and arguments.

Python hands floats to a kernel as float32, under torch.compile as float64: kernels make of them what they compute in,
with `scalar`. Products and sums are contracted into fused multiply-adds, at every launch and on purpose: it is one
rounding less, and Triton's own default (TRITON_DEFAULT_FP_FUSION) is about to change.
"""

import contextlib
import ctypes
import math
from collections.abc import Iterator

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from flowkernels.ops import tuned
from flowkernels.ops.library import is_captured  # noqa: F401, of ops that report a NaN
from flowkernels.runtime.backends import triton_interpreted
from flowkernels.runtime.torch_private import add_each_

INTERPRETED = triton_interpreted()


def launch(kernel, grid: tuple[int, ...], *args, on: Tensor, config: dict, **constants) -> None:
    """Run a kernel on the device and the current stream of the tensor `on`.

    config: num_warps, num_stages and block sizes, from `config_of`; constants: other compile-time arguments.
    """
    if on.is_cuda and on.get_device() != torch.cuda.current_device():
        with torch.cuda.device(on.device):
            return launch(kernel, grid, *args, on=on, config=config, **constants)
    with np.errstate(all="ignore") if INTERPRETED else contextlib.nullcontext():  # NaN and Inf are values
        kernel[grid](*args, **constants, **config, enable_fp_fusion=True)


def config_of(configs: dict[str, dict], kernel: str) -> dict:
    """The configuration of a kernel: what `flowkernels tune` found for the current GPU, else the shipped one."""
    for kernels in _watching:
        kernels.add(kernel)
    if _configs is not None:
        return _configs.get(kernel, configs[kernel])
    if INTERPRETED or not torch.cuda.is_initialized():
        return configs[kernel]
    return tuned.of_device(torch.cuda.current_device()).get(kernel, configs[kernel])


_configs: dict[str, dict] | None = None  # for every thread: autograd has its own
_watching: list[set[str]] = []


@contextlib.contextmanager
def use(configs: dict[str, dict]) -> Iterator[None]:
    """For tuning: kernels have these configurations inside the `with` block, the others their shipped ones."""
    global _configs
    before, _configs = _configs, configs
    try:
        yield
    finally:
        _configs = before


@contextlib.contextmanager
def watch() -> Iterator[set[str]]:
    """The kernels that have been asked for since the `with` block began."""
    kernels = set()
    _watching.append(kernels)
    try:
        yield kernels
    finally:
        _watching.pop()


def target() -> str:
    """What kernels are compiled for: "cuda" or "hip"; the interpreter is taken for a CUDA GPU."""
    return "cuda" if INTERPRETED else triton.runtime.driver.active.get_current_target().backend


def parts(value: float, dtype: torch.dtype) -> tuple[float, ...]:
    """A number for a kernel that computes in `dtype`: itself, or in float64 three float32 that add up to it."""
    if dtype != torch.float64:
        return (value,)
    first = ctypes.c_float(value).value
    if not math.isfinite(first):
        return first, 0.0, 0.0
    second = ctypes.c_float(value - first).value
    return first, second, value - first - second


def on_device(values: list, dtype: torch.dtype, device: torch.device) -> Tensor:
    """These numbers in the memory of a device. They travel as arguments of launches: nothing waits, and a graph can
    hold it."""
    found = torch.zeros(len(values), dtype=dtype, device=device)
    if values:
        add_each_(list(found.unbind()), values)
    return found


def knots_on(times: Tensor, device: torch.device) -> Tensor:
    """Float64 times in the memory of a device: those that are there stay there, unread."""
    return times.contiguous() if times.device == device else on_device(times.tolist(), torch.float64, device)


@triton.jit
def scalar(parts, dtype: tl.constexpr):
    """The number of which these are the `parts`."""
    value = tl.full((), parts[0], dtype)
    for i in tl.static_range(1, len(parts)):
        value += tl.full((), parts[i], dtype)
    return value


@triton.jit
def product(x, y):
    """x y, rounded, for `tl.sum`. A plain product would be contracted with the first sum of two lanes, in each lane its
    own, and leave them with different results, of which any may be the one that is stored."""
    return tl.fma(x, y, tl.zeros_like(x))


@triton.jit
def convert(x, dtype: tl.constexpr):
    """x in another type; from float64 to 16 bits through float32, as in torch."""
    if x.dtype == tl.float64 and dtype.primitive_bitwidth == 16:
        x = x.to(tl.float32)
    return x.to(dtype)


if INTERPRETED:
    from flowkernels.ops._triton_interpreter import mend

    mend()
