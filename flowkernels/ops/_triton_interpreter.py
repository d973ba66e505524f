"""Triton's interpreter, made to compute as a GPU does."""

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter


def mend() -> None:
    """Make Triton's interpreter round to 16 bits as a GPU does: it cuts bfloat16 off, takes it for an integer next to
    float64 and in products of matrices. And a comparison of scalars, made a block, stays one of truth values, and
    the language is patched once a launch: again at every call of a function, it takes longer than most of them. And
    an array of one element is an index: Triton 3.5 and 3.6 leave it to NumPy, which refuses it from 2.4 on."""
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
