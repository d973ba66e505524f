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


def _mend_interpreter() -> None:
    """Make Triton's interpreter round to 16 bits as a GPU does: it cuts bfloat16 off, takes it for an integer next to
    float64 and in products of matrices. And a comparison of scalars, made a block, stays one of truth values, and
    the language is patched once a launch: again at every call of a function, it takes longer than most of them. And
    an array of one element is an index: Triton 3.5 and 3.6 leave it to NumPy, which refuses it from 2.4 on."""
    from triton.runtime import interpreter

    dtypes = {tl.bfloat16: torch.bfloat16, tl.float16: torch.float16, tl.float32: torch.float32,
              tl.float64: torch.float64}  # fmt: skip
    Handle, Builder = interpreter.TensorHandle, interpreter.InterpreterBuilder
    cast, dot = Builder.cast_impl, Builder.create_dot

    def as_torch(t) -> Tensor:
        array = np.ascontiguousarray(t.data).reshape(t.data.shape)
        bits = torch.from_numpy(array.view("int16") if t.dtype.scalar == tl.bfloat16 else array)
        return bits.view(torch.bfloat16) if t.dtype.scalar == tl.bfloat16 else bits

    def as_handle(t: Tensor, dtype) -> Handle:
        return Handle(t.view(torch.int16).numpy().view("uint16") if dtype == tl.bfloat16 else t.numpy(), dtype)

    def cast_impl(self, src, dst_type):
        source, wanted = src.dtype.scalar, dst_type.scalar
        if tl.bfloat16 not in (source, wanted):
            return cast(self, src, dst_type)
        if wanted not in dtypes:  # to an integer
            return cast(self, as_handle(as_torch(src).float(), tl.float32), dst_type)
        return as_handle(as_torch(src).to(dtypes[wanted]), wanted)

    def create_dot(self, a, b, d, *options):
        if a.dtype.scalar == tl.bfloat16:
            a, b = (cast_impl(self, t, tl.float32) for t in (a, b))
        return dot(self, a, b, d, *options)

    def create_splat(self, block_type, scalar):  # whose type is said to be that of the numbers compared
        return Handle(np.full(block_type.shape, scalar.data, scalar.data.dtype), scalar.dtype.scalar)

    patch_lang, patch_tensor = interpreter._patch_lang, interpreter._patch_lang_tensor

    def patch_once(fn):
        modules = [m for m in (tl, tl.core) if any(value is m for value in fn.__globals__.values())]
        return patch_lang(fn) if any(tl.core.is_builtin(m.load) for m in modules) else None

    def patch_index(tensor, *scope):
        patch_tensor(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())

    interpreter._patch_lang, interpreter._patch_lang_tensor = patch_once, patch_index
    Builder.cast_impl, Builder.create_dot, Builder.create_splat = cast_impl, create_dot, create_splat
    Builder.create_fp_to_fp = lambda self, src, dst_type, rounding: self.cast_impl(src, dst_type)


if INTERPRETED:
    _mend_interpreter()
