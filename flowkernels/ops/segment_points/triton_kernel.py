"""`segment_points` in Triton."""

import triton
import triton.language as tl
from torch import Tensor

from flowkernels.ops import triton_common
from flowkernels.ops.segment_points import _fake
from flowkernels.ops.triton_common import convert

# rows of few features share a program, four elements a thread; longer ones are cut in chunks
CONFIGS = {
    "segment_points_short": {"ROWS": 8, "COLS": 64, "num_warps": 4},
    "segment_points": {"ROWS": 1, "COLS": 1024, "num_warps": 4},
}
SEARCH = {
    "segment_points_short": {"ROWS": (4, 8, 16, 32), "num_warps": (2, 4, 8)},
    "segment_points": {"COLS": (512, 1024, 2048, 4096), "num_warps": (2, 4, 8)},
}


@triton.jit
def place(interval, sample, row, B, knots, samples):
    """For each row of a batch its interval, the row of x_a in the bank, and whether there are such; 0 if not."""
    i = tl.load(interval + row, mask=row < B, other=-1)
    s = tl.load(sample + row, mask=row < B, other=-1)
    inside = (i >= 0) & (i < knots - 1) & (s >= 0) & (s < samples)
    i = tl.where(inside, i, 0)
    return i, tl.where(inside, i * samples + s, 0), inside


# Masks cost no width: where D is a multiple of 16 they are known to be the same for neighbours, and elsewhere rows do
# not begin at multiples of a vector.
@triton.jit
def segment_points_kernel(
    bank,  # [knots, samples, D] float32 or float64
    interval,  # [B] int64
    sample,  # [B] int64
    u,  # [B] of the bank's type, or None: x_a itself
    out,  # [B, D] of the bank's type, bfloat16 or float16
    knots,
    samples,
    B,
    D,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    chunks = tl.cdiv(D, COLS)
    program = tl.program_id(0).to(tl.int64)
    row = program // chunks * ROWS + tl.arange(0, ROWS)
    col = program % chunks * COLS + tl.arange(0, COLS)[None, :]
    _, start, inside = place(interval, sample, row, B, knots, samples)
    mask = inside[:, None] & (col < D)
    first, second = bank + start[:, None] * D + col, bank + (start + samples)[:, None] * D + col
    point = tl.load(first, mask=mask, other=float("nan"))  # what is nowhere is NaN
    if u is not None:
        p = tl.load(u + row, mask=row < B)[:, None]
        point += p * (tl.load(second, mask=mask) - point)
    tl.store(out + row[:, None] * D + col, convert(point, out.dtype.element_ty), mask=(row < B)[:, None] & (col < D))


def segment_points(bank, interval, sample, u, dtype) -> Tensor:
    bank, interval, sample = bank.contiguous(), interval.contiguous(), sample.contiguous()
    u = None if u is None else u.to(bank.dtype).contiguous()
    out = _fake(bank, interval, sample, u, dtype)
    if out.numel() == 0:
        return out
    (knots, samples), B = bank.shape[:2], len(interval)
    D = out.numel() // B
    config = triton_common.config_of(CONFIGS, "segment_points_short")
    if config["COLS"] < D:
        config = triton_common.config_of(CONFIGS, "segment_points")
    grid = (triton.cdiv(B, config["ROWS"]) * triton.cdiv(D, config["COLS"]),)
    sizes = (knots, samples, B, D)
    triton_common.launch(segment_points_kernel, grid, bank, interval, sample, u, out, *sizes, on=bank, config=config)
    return out
