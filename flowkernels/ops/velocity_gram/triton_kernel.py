"""`velocity_gram` in Triton.

A program takes one tile of the matrix, of the upper triangle, and one slice of the columns; a second kernel adds the
slices in float64, in their order. Nothing is kept between the tiles: with n tiles along the matrix a velocity is read
by n + 1 of them, and as the later and the earlier of two neighbours, so 2 (n + 1) times. Programs are ordered so that
the tiles of a slice run together, and all but one of those reads find it in a cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flowkernels.ops import _triton
from flowkernels.ops.velocity_gram import _as_rows, _fake

# by the most rows for which a tile is used; its rows are M and N of tl.dot, COLUMNS is K. Twice the columns need all
# registers there are, and on sm_80 and sm_120 more
CONFIGS = {
    "velocity_gram_16": {"TILE": 16, "COLUMNS": 32, "num_warps": 1, "num_stages": 3},
    "velocity_gram_32": {"TILE": 32, "COLUMNS": 16, "num_warps": 2, "num_stages": 3},
    "velocity_gram_64": {"TILE": 64, "COLUMNS": 16, "num_warps": 4, "num_stages": 3},
    "velocity_gram_double": {"TILE": 32, "COLUMNS": 16, "num_warps": 4, "num_stages": 2},
    "velocity_gram_sum": {"ENTRIES": 256, "SLICES": 16, "num_warps": 4},
}
SEARCH = {
    "velocity_gram_16": {"COLUMNS": (32, 64), "num_warps": (1, 2), "num_stages": (2, 3, 4)},
    "velocity_gram_32": {"COLUMNS": (16, 32), "num_warps": (1, 2, 4), "num_stages": (2, 3, 4)},
    "velocity_gram_64": {"TILE": (32, 64), "COLUMNS": (16, 32), "num_warps": (4, 8), "num_stages": (2, 3, 4)},
    "velocity_gram_double": {"TILE": (16, 32, 64), "num_warps": (2, 4), "num_stages": (2, 3)},
    "velocity_gram_sum": {"ENTRIES": (64, 256), "SLICES": (8, 16, 32), "num_warps": (2, 4)},
}
WARPS = 12  # of a multiprocessor, as many as the registers and the shared memory of all of them allow
BLOCKS = 512  # of COLUMNS each, in a slice, at most


@triton.jit
def _pair(p):
    """The p-th tile of the upper triangle: (0, 0), (0, 1), (1, 1), (0, 2), .."""
    j = 0
    while p > j:
        j += 1
        p -= j
    return p, j


@triton.jit
def _of_velocities(rows, stride, c, mask, dtype: tl.constexpr):
    """a_1, a_2, .. at columns c [1, columns]; rows [rows, 1] point to the earlier of each one's two velocities."""
    earlier = tl.load(rows + c, mask=mask, other=0.0).to(dtype)
    return tl.load(rows + stride + c, mask=mask, other=0.0).to(dtype) - earlier


@triton.jit
def _of_states(v, stride, x, x_stride, times, K, row, c, mask, dtype: tl.constexpr):
    """a_1 .. a_{K-1} of the secants, then e_0, e_1, .. In float64, as secants differ in few digits."""
    is_e = row >= K - 1
    i = tl.where(is_e, row - (K - 1), row + 1)
    j = tl.maximum(i - 1, 0)
    t = tl.load(times + i)
    state = tl.load(x + i * x_stride + c, mask=mask, other=0.0).to(tl.float64)
    after = tl.load(x + (i + 1) * x_stride + c, mask=mask, other=0.0).to(tl.float64)
    before = tl.load(x + j * x_stride + c, mask=mask, other=0.0).to(tl.float64)
    velocity = tl.load(v + i * stride + c, mask=mask, other=0.0).to(tl.float64)
    secant = (after - state) / (tl.load(times + i + 1) - t)
    last = (state - before) / (t - tl.load(times + j))
    return (secant - tl.where(is_e, velocity, last)).to(dtype)


@triton.jit
def velocity_gram_kernel(
    v,  # [K, M], rows `stride` apart
    stride,
    x,  # [K+1, M] states, rows `x_stride` apart, or None
    x_stride,
    times,  # [K+1] float64, with x
    K,
    M,
    columns,  # of a slice, a multiple of COLUMNS
    partial,  # [slices, pairs of tiles, TILE, TILE]
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    dtype: tl.constexpr = partial.dtype.element_ty
    i, j = _pair(tl.program_id(0))
    rows = K - 1 if x is None else 2 * K - 1
    own = tl.arange(0, TILE).to(tl.int64)[:, None]
    left = tl.minimum(i * TILE + own, rows - 1)  # beyond the last row it once more, for sums that nobody wants
    right = tl.minimum(j * TILE + own, rows - 1)

    first = tl.program_id(1).to(tl.int64) * columns
    last = tl.minimum(first + columns, M)
    c = first + tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros((TILE, TILE), dtype)
    for block in range(tl.cdiv(last - first, COLUMNS)):
        mask = c < M
        if x is None:
            a = _of_velocities(v + left * stride, stride, c, mask, dtype)
            b = _of_velocities(v + right * stride, stride, c, mask, dtype)
        else:
            a = _of_states(v, stride, x, x_stride, times, K, left, c, mask, dtype)
            b = _of_states(v, stride, x, x_stride, times, K, right, c, mask, dtype)
        total += tl.dot(a, b.T, input_precision=PRECISION, out_dtype=dtype, max_num_imprecise_acc=COLUMNS)
        c += COLUMNS

    tile = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    at = tl.arange(0, TILE)
    tl.store(partial + tile * (TILE * TILE) + at[:, None] * TILE + at[None, :], total)


@triton.jit
def velocity_gram_sum_kernel(
    partial,  # [slices, pairs of tiles, TILE, TILE]
    slices,
    rows,
    gram,  # [rows, rows]
    TILE: tl.constexpr,
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


def velocity_gram(v: Tensor, x: Tensor | None, times: Tensor | None) -> Tensor:
    gram = _fake(v, x, times)
    v, states, K, M, stride, x_stride = _as_rows(v, x)
    rows = len(gram)
    if rows == 0 or M == 0:
        return gram.zero_()
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    config = _triton.config_of(CONFIGS, _kind(rows, dtype))
    tiles = triton.cdiv(rows, config["TILE"])
    pairs = tiles * (tiles + 1) // 2
    slices, columns = _slices(v, M, pairs, config)
    partial = v.new_empty(slices, pairs, config["TILE"], config["TILE"], dtype=dtype)
    numbers = (stride, states, x_stride, _knots(times, v), K, M, columns)
    precision = "tf32x3" if dtype == torch.float32 and _triton.target() == "cuda" else "ieee"
    _triton.launch(
        velocity_gram_kernel, (pairs, slices), v, *numbers, partial, on=v, config=config, PRECISION=precision
    )
    sums = _triton.config_of(CONFIGS, "velocity_gram_sum")
    grid = (partial[0].numel() // sums["ENTRIES"],)
    _triton.launch(velocity_gram_sum_kernel, grid, partial, slices, rows, gram, on=v, config=sums, TILE=config["TILE"])
    return gram


def _kind(rows: int, dtype: torch.dtype) -> str:
    if dtype == torch.float64:
        return "velocity_gram_double"
    return f"velocity_gram_{16 if rows <= 16 else 32 if rows <= 32 else 64}"


def _slices(v: Tensor, M: int, pairs: int, config: dict) -> tuple[int, int]:
    """How many slices of the columns fill the device, and the columns of one, no more than float32 adds up well."""
    processors = torch.cuda.get_device_properties(v.device).multi_processor_count if v.is_cuda else 1
    wanted = triton.cdiv(WARPS * processors, config["num_warps"] * pairs)
    blocks = triton.cdiv(M, config["COLUMNS"])
    columns = min(triton.cdiv(blocks, min(wanted, blocks)), BLOCKS) * config["COLUMNS"]
    return triton.cdiv(M, columns), columns


def _knots(times: Tensor | None, v: Tensor) -> Tensor | None:
    """The times on v's device. They travel as arguments of launches: nothing waits, and a graph can hold it."""
    if times is None:
        return None
    knots = torch.zeros(len(times), dtype=torch.float64, device=v.device)
    torch._foreach_add_(knots.unbind(), times.tolist())
    return knots
