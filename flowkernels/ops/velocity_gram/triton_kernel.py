"""`velocity_gram` in Triton.

A program takes one tile of the matrix, of the upper triangle, and one slice of the columns; increments are formed on
the way to tl.dot. A second kernel adds the slices in float64, in their order. Nothing is kept between tiles: of n tiles
along the matrix, n + 1 read each velocity, as the later and as the earlier of two neighbours, so 2 (n + 1) times. The
tiles of a slice run together, and all of those reads but the first are meant to find it in a cache. Rows from states
are formed by a kernel of their own, some columns at a time: in float64, and not once more for every tile.

Increments of float32 and shorter velocities are multiplied as float32. On tensor cores that is "tf32x3": each number is
split into two of 11 bits, a = hi + lo, and hi hi + hi lo + lo hi are added up; lo lo is below 2^-22 |a_i| |a_j|. The
unit truncates as it adds, so that its sums move on, after COLUMNS columns, to ordinary float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flowkernels.ops import triton_common
from flowkernels.ops.velocity_gram import _as_rows, _fake

# by the most rows for which a tile is used; its rows are M and N of tl.dot, COLUMNS is K. Twice the columns need all
# registers there are, and on sm_80 and sm_120 more
CONFIGS = {
    "velocity_gram_16": {"TILE": 16, "COLUMNS": 32, "num_warps": 1, "num_stages": 3},
    "velocity_gram_32": {"TILE": 32, "COLUMNS": 16, "num_warps": 2, "num_stages": 2},
    "velocity_gram_64": {"TILE": 64, "COLUMNS": 16, "num_warps": 4, "num_stages": 3},
    "velocity_gram_64_low": {"TILE": 64, "COLUMNS": 16, "num_warps": 4, "num_stages": 2},  # of 16-bit velocities
    "velocity_gram_double": {"TILE": 32, "COLUMNS": 16, "num_warps": 4, "num_stages": 1},
    "velocity_gram_rows": {"BLOCK": 512, "num_warps": 4},
    "velocity_gram_sum": {"ENTRIES": 256, "SLICES": 16, "num_warps": 4},
}
SEARCH = {
    "velocity_gram_16": {"COLUMNS": (32, 64), "num_warps": (1, 2), "num_stages": (2, 3, 4)},
    "velocity_gram_32": {"COLUMNS": (16, 32), "num_warps": (1, 2, 4), "num_stages": (2, 3, 4)},
    "velocity_gram_64": {"TILE": (32, 64), "COLUMNS": (16, 32), "num_warps": (4, 8), "num_stages": (2, 3, 4)},
    "velocity_gram_64_low": {"TILE": (32, 64), "COLUMNS": (16, 32), "num_warps": (4, 8), "num_stages": (2, 3, 4)},
    "velocity_gram_double": {"TILE": (16, 32, 64), "num_warps": (2, 4, 8), "num_stages": (1, 2, 3)},
    "velocity_gram_rows": {"BLOCK": (256, 512, 1024), "num_warps": (2, 4, 8)},
    "velocity_gram_sum": {"ENTRIES": (64, 128, 256), "SLICES": (8, 16, 32), "num_warps": (2, 4)},
}
WARPS = 12  # of a multiprocessor, about as many as the registers and the shared memory of all of them allow
BLOCKS = 512  # of COLUMNS each, in a slice, at most: float32 adds up that many sums well
ROWS = 32 << 20  # bytes of rows from states at a time, which a cache can hold


@triton.jit
def _pair(p):
    """The p-th tile of the upper triangle: (0, 0), (0, 1), (1, 1), (0, 2), .."""
    j = 0
    while p > j:
        j += 1
        p -= j
    return p, j


@triton.jit
def _rows(at, stride, c, mask, dtype: tl.constexpr, DIFFERENCES: tl.constexpr):
    """Columns c [1, columns] of the rows that begin `at` [rows, 1], or of what the next ones add to them."""
    here = at + c
    rows = tl.load(here, mask=mask, other=0.0).to(dtype)
    if DIFFERENCES:
        rows = tl.load(here + stride, mask=mask, other=0.0).to(dtype) - rows
    return rows


@triton.jit
def velocity_gram_kernel(
    v,  # [rows + 1, M] velocities, or without DIFFERENCES [rows, M]; rows `stride` apart
    stride,
    rows,
    M,
    columns,  # of a slice, a multiple of COLUMNS
    pairs,  # of tiles
    partial,  # [slices, pairs, TILE, TILE]
    DIFFERENCES: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    dtype: tl.constexpr = partial.dtype.element_ty
    program = tl.program_id(0)  # of one dimension, since others hold 65,535 programs at most
    i, j = _pair(program % pairs)
    own = tl.arange(0, TILE).to(tl.int64)[:, None]
    first = (program // pairs).to(tl.int64) * columns
    # the last row once more beyond it, for sums that nobody wants
    left = v + tl.minimum(i * TILE + own, rows - 1) * stride + first
    right = v + tl.minimum(j * TILE + own, rows - 1) * stride + first
    total = tl.zeros((TILE, TILE), dtype)
    for start in range(0, tl.minimum(columns, M - first).to(tl.int32), COLUMNS):
        c = start + tl.arange(0, COLUMNS)[None, :]
        mask = c < M - first
        a = _rows(left, stride, c, mask, dtype, DIFFERENCES)
        b = _rows(right, stride, c, mask, dtype, DIFFERENCES)
        # with the last argument the compiler leaves the products and `total` apart
        total += tl.dot(a, b.T, input_precision=PRECISION, out_dtype=dtype, max_num_imprecise_acc=COLUMNS)

    at = tl.arange(0, TILE)
    tl.store(partial + program.to(tl.int64) * (TILE * TILE) + at[:, None] * TILE + at[None, :], total)


@triton.jit
def velocity_gram_sum_kernel(
    partial,  # [slices, pairs, TILE, TILE]
    slices,
    rows,
    gram,  # [rows, rows]
    TILE,
    ENTRIES: tl.constexpr,
    SLICES: tl.constexpr,
):
    entry = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    entries = tl.num_programs(0).to(tl.int64) * ENTRIES
    sums = tl.zeros((SLICES, ENTRIES), tl.float64)
    for first in range(0, slices, SLICES):
        s = first + tl.arange(0, SLICES)[:, None]
        sums += tl.load(partial + s * entries + entry[None, :], mask=s < slices, other=0.0).to(tl.float64)
    total = tl.sum(sums, axis=0)

    i, j = _pair(tl.program_id(0) * ENTRIES // (TILE * TILE))
    row, column = i * TILE + entry % (TILE * TILE) // TILE, j * TILE + entry % TILE
    mask = (row <= column) & (column < rows)
    tl.store(gram + row * rows + column, total, mask=mask)
    tl.store(gram + column * rows + row, total, mask=mask)


@triton.jit
def _secant(x, stride, times, i, c, mask):
    state = tl.load(x + i * stride + c, mask=mask).to(tl.float64)
    step = tl.load(times + i + 1) - tl.load(times + i)
    return (tl.load(x + (i + 1) * stride + c, mask=mask).to(tl.float64) - state) / step


@triton.jit
def velocity_gram_rows_kernel(
    v,  # [K, M], rows `stride` apart
    stride,
    x,  # [K+1, M], rows `x_stride` apart
    x_stride,
    times,  # [K+1] float64
    K,
    M,
    rows,  # [2K-1, M], rows `rows_stride` apart: a_1 .. a_{K-1} of the secants, e_0 .. e_{K-1}
    rows_stride,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = c < M
    if row < K - 1:
        i = row + 1
        less = _secant(x, x_stride, times, row, c, mask)
    else:
        i = row - (K - 1)
        less = tl.load(v + i * stride + c, mask=mask).to(tl.float64)
    # in float64 until here: secants differ in few digits
    result = (_secant(x, x_stride, times, i, c, mask) - less).to(rows.dtype.element_ty)
    tl.store(rows + row * rows_stride + c, result, mask=mask)


def velocity_gram(v: Tensor, x: Tensor | None, times: Tensor | None) -> Tensor:
    gram = _fake(v, x, times)
    v, states, K, M, stride, x_stride = _as_rows(v, x)
    rows = len(gram)
    if rows == 0 or M == 0:
        return gram.zero_()
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    config, sums = (
        triton_common.config_of(CONFIGS, name)
        for name in (_kind(rows, v.dtype if x is None else dtype), "velocity_gram_sum")
    )
    tile = config["TILE"]
    tiles = triton.cdiv(rows, tile)
    pairs = tiles * (tiles + 1) // 2
    chunk = M if x is None else min(M, triton.cdiv(ROWS // dtype.itemsize, rows))
    slices, columns = _slices(v, chunk, pairs, config)
    chunk, all_slices = slices * columns, triton.cdiv(M, columns)
    partial = v.new_empty(all_slices, pairs, tile, tile, dtype=dtype)

    def add(rows_of, stride, M, first):
        at = first // columns
        args = (rows_of, stride, rows, M, columns, pairs, partial[at:])
        precision = "tf32x3" if dtype == torch.float32 and triton_common.target() == "cuda" else "ieee"
        grid = (pairs * triton.cdiv(M, columns),)
        constants = dict(DIFFERENCES=x is None, PRECISION=precision)
        triton_common.launch(velocity_gram_kernel, grid, *args, on=v, config=config, **constants)

    if x is None:
        add(v, stride, M, 0)
    else:
        knots = triton_common.knots_on(times, v.device)
        v, states = v.as_strided((K, M), (stride, 1)), states.as_strided((K + 1, M), (x_stride, 1))
        formed = v.new_empty(rows, chunk, dtype=dtype)
        block = triton_common.config_of(CONFIGS, "velocity_gram_rows")
        for first in range(0, M, chunk):
            width = min(chunk, M - first)
            args = (v[:, first:], stride, states[:, first:], x_stride, knots, K, width, formed, chunk)
            grid = (triton.cdiv(width, block["BLOCK"]), rows)
            triton_common.launch(velocity_gram_rows_kernel, grid, *args, on=v, config=block)
            add(formed, chunk, width, first)

    grid = (pairs * tile * tile // sums["ENTRIES"],)
    triton_common.launch(velocity_gram_sum_kernel, grid, partial, all_slices, rows, gram, tile, on=v, config=sums)
    return gram


def _kind(rows: int, dtype: torch.dtype) -> str:
    if dtype == torch.float64:
        return "velocity_gram_double"
    if rows > 32:
        return "velocity_gram_64" if dtype == torch.float32 else "velocity_gram_64_low"
    return f"velocity_gram_{16 if rows <= 16 else 32}"


def _slices(v: Tensor, M: int, pairs: int, config: dict) -> tuple[int, int]:
    """How many slices of M columns fill the device, and the columns of one."""
    processors = torch.cuda.get_device_properties(v.device).multi_processor_count if v.is_cuda else 1
    wanted = triton.cdiv(WARPS * processors, config["num_warps"] * pairs)
    blocks = triton.cdiv(M, config["COLUMNS"])
    columns = min(triton.cdiv(blocks, min(wanted, blocks)), BLOCKS) * config["COLUMNS"]
    return triton.cdiv(M, columns), columns
