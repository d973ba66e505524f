"""`euler_step` in Triton."""

import triton
import triton.language as tl

from flowkernels.ops import triton_common
from flowkernels.ops.euler_step import OP, contiguous, dense_alike, on_copies
from flowkernels.ops.triton_common import convert, scalar

# four elements a thread: 16 bytes of a float32 state, and no exchange between threads next to 16-bit velocities
CONFIGS = {"euler_step": {"BLOCK": 512, "num_warps": 4}}
SEARCH = {"euler_step": {"BLOCK": (512, 1024, 2048, 4096), "num_warps": (2, 4, 8)}}


@triton.jit
def _elements(x, v, v_uncond, h, guidance, out, low, i, mask):
    state = tl.load(x + i, mask=mask)
    dtype: tl.constexpr = state.dtype
    velocity = tl.load(v + i, mask=mask).to(dtype)
    if v_uncond is not None:
        base = tl.load(v_uncond + i, mask=mask).to(dtype)
        velocity = base + scalar(guidance, dtype) * (velocity - base)
    state += scalar(h, dtype) * velocity
    tl.store(out + i, state, mask=mask)
    if low is not None:
        tl.store(low + i, convert(state, low.dtype.element_ty), mask=mask)


@triton.jit
def euler_step_kernel(
    x,  # [n] float32 or float64
    v,  # [n]
    v_uncond,  # [n] or None
    h,
    guidance,
    out,  # [n], x's type
    low,  # [n] or None
    n,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    i = first + tl.arange(0, BLOCK)
    if first + BLOCK <= n:  # without a mask its accesses are wide, whatever n is
        _elements(x, v, v_uncond, h, guidance, out, low, i, None)
    else:
        _elements(x, v, v_uncond, h, guidance, out, low, i, i < n)


def _launch(x, v, h, v_uncond, guidance, out, low) -> None:
    if not contiguous(x, v, v_uncond, out, low) and not dense_alike(x, v, v_uncond, out, low):
        return on_copies(_launch, x, v, h, v_uncond, guidance, out, low)
    if (n := x.numel()) == 0:
        return
    config = triton_common.config_of(CONFIGS, "euler_step")
    numbers = (triton_common.parts(h, x.dtype), triton_common.parts(guidance, x.dtype))
    grid = (triton.cdiv(n, config["BLOCK"]),)
    triton_common.launch(euler_step_kernel, grid, x, v, v_uncond, *numbers, out, low, n, on=x, config=config)


euler_step, euler_step_out = OP.on_triton(_launch)
