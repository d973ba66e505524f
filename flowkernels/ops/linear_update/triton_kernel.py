"""`linear_update` in Triton."""

import triton
import triton.language as tl

from flowkernels.ops import triton_common
from flowkernels.ops.linear_update import OP
from flowkernels.ops.triton_common import convert, scalar

TERMS = 8  # of a launch; more go through memory again
# four elements a thread: 16 bytes of a float32 state, and no exchange between threads next to 16-bit velocities
CONFIGS = {"linear_update": {"BLOCK": 512, "num_warps": 4}}
SEARCH = {"linear_update": {"BLOCK": (512, 1024, 2048, 4096), "num_warps": (2, 4, 8)}}


@triton.jit
def _elements(x, v, b, scale, out, low, i, mask):
    state = tl.load(x + i, mask=mask)
    if scale is not None:
        state *= scalar(scale, state.dtype)
    for t in tl.static_range(len(v)):
        state += scalar(b[t], state.dtype) * tl.load(v[t] + i, mask=mask).to(state.dtype)
    tl.store(out + i, state, mask=mask)
    if low is not None:
        tl.store(low + i, convert(state, low.dtype.element_ty), mask=mask)


@triton.jit
def linear_update_kernel(
    x,  # [n] float32 or float64
    v,  # tuple of [n], one for each term
    b,  # tuple of as many numbers
    scale,  # of x, or None: a product with 1 could be contracted with the sum
    out,  # [n], x's type; may be x
    low,  # [n] or None
    n,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    i = first + tl.arange(0, BLOCK)
    if first + BLOCK <= n:  # without a mask its accesses are wide, whatever n is
        _elements(x, v, b, scale, out, low, i, None)
    else:
        _elements(x, v, b, scale, out, low, i, i < n)


def _launch(x, v, b, scale, out, low) -> None:
    if (n := x.numel()) == 0:
        return
    x, v = x.contiguous(), [t.contiguous() for t in v]
    to = out if out.is_contiguous() else OP.empty(out)
    copy = low if low is None or low.is_contiguous() else OP.empty(low)
    config = triton_common.config_of(CONFIGS, "linear_update")
    grid = (triton.cdiv(n, config["BLOCK"]),)
    numbers = [triton_common.parts(factor, x.dtype) for factor in b]
    scale = None if scale == 1 else triton_common.parts(scale, x.dtype)
    for first in range(0, len(v), TERMS):
        terms = slice(first, first + TERMS)
        state, last = to if first else x, copy if first + TERMS >= len(v) else None
        of_state = None if first else scale
        arguments = (state, tuple(v[terms]), tuple(numbers[terms]), of_state, to, last, n)
        triton_common.launch(linear_update_kernel, grid, *arguments, on=x, config=config)
    if to is not out:
        out.copy_(to)
    if copy is not low:
        low.copy_(copy)


linear_update, linear_update_out = OP.on_triton(_launch)
