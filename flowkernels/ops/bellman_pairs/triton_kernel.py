"""`bellman_pairs` in Triton: a launch for each step, since a step needs all values of the step before."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flowkernels.ops import triton_common
from flowkernels.ops.bellman_pairs import _fake, _refuse

CONFIGS = {
    "bellman_pairs_check": {"BLOCK_I": 16, "BLOCK_K": 64, "num_warps": 4},
    "bellman_pairs_step": {"BLOCK_I": 32, "BLOCK_K": 32, "num_warps": 4},
}
SEARCH = {
    "bellman_pairs_check": {"BLOCK_I": (8, 16, 32), "BLOCK_K": (32, 64, 128), "num_warps": (2, 4, 8)},
    "bellman_pairs_step": {"BLOCK_I": (16, 32, 64), "BLOCK_K": (16, 32, 64), "num_warps": (2, 4, 8)},
}
NONE = torch.iinfo(torch.int64).max


@triton.jit
def bellman_pairs_check_kernel(
    first,  # [n]
    cost,  # [n, n, n]
    value,  # [2, n, n], of no step and one
    parent,  # [2, n, n], of no step and one
    bad,  # [n, ceil(n / BLOCK_I)], by j and block of i: the first place of what is read with NaN or -Inf
    n,
    none,
    BLOCK_I: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    j, block = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    i = (block * BLOCK_I + tl.arange(0, BLOCK_I))[:, None]
    is_number = tl.load(first + j) > float("-inf")
    place = tl.where(is_number | (j == 0) | (block > 0), none, j)
    # pairs (i, j) begin before j, and no step of theirs ends before j + 1
    for start in range(j + 1, tl.where(block * BLOCK_I < j, n, 0), BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        at = (i * n + j) * n + k
        c = tl.load(cost + at, mask=(i < j) & (k < n), other=0.0)
        place = tl.minimum(place, tl.min(tl.where(c > float("-inf"), none, n + at)))
    tl.store(bad + j * tl.num_programs(1) + block, place)
    for start in range(0, tl.where(block == 0, n, 0), BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        at, none_yet = j * n + k, tl.full((BLOCK_K,), -1, tl.int64)
        one_step = tl.load(first + k, mask=(j == 0) & (k > 0) & (k < n), other=float("inf"))
        tl.store(value + at, tl.where(at == 0, 0.0, float("inf")), mask=k < n)
        tl.store(value + n * n + at, one_step, mask=k < n)
        tl.store(parent + at, none_yet, mask=k < n)
        tl.store(parent + n * n + at, none_yet, mask=k < n)


# one kernel for all steps, whose planes begin anywhere
@triton.jit(do_not_specialize=["begin", "end"], do_not_specialize_on_alignment=["before", "value", "parent"])
def bellman_pairs_step_kernel(
    cost,  # [n, n, n]
    before,  # [n, n], the values of the step before
    value,  # [n, n]
    parent,  # [n, n]
    n,
    begin,  # the step before can have reached the pairs (i, j), begin <= i < end
    end,
    BLOCK_I: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    k = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    j = tl.program_id(1).to(tl.int64)
    best = tl.full((BLOCK_K,), float("inf"), tl.float64)
    best_i = tl.full((BLOCK_K,), -1, tl.int64)
    last = tl.where(tl.max(k) > j, tl.minimum(j, end), 0)
    for start in range(begin, last, BLOCK_I):
        i = (start + tl.arange(0, BLOCK_I)).to(tl.int64)[:, None]
        is_step = (i < last) & (j < k) & (k < n)
        reached = tl.load(before + i * n + j, mask=i < last, other=float("inf"))
        total = reached + tl.load(cost + (i * n + j) * n + k, mask=is_step, other=float("inf"))
        least = tl.min(total, 0)
        least_i = tl.min(tl.where(total == least, i, n), 0)  # ties go to the smaller i
        best_i = tl.where(least < best, least_i, best_i)
        best = tl.minimum(least, best)
    tl.store(value + j * n + k, best, mask=k < n)
    tl.store(parent + j * n + k, best_i, mask=k < n)


def bellman_pairs(first: Tensor, cost: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    first, cost, n = first.contiguous(), cost.contiguous(), len(first)
    config = triton_common.config_of(CONFIGS, "bellman_pairs_check")
    grid = (n, triton.cdiv(n, config["BLOCK_I"]))
    (value, parent), places = _fake(first, cost, steps), cost.new_empty(grid, dtype=torch.int64)
    args = first, cost, value, parent, places, n, NONE
    triton_common.launch(bellman_pairs_check_kernel, grid, *args, on=cost, config=config)
    bad = places.amin()
    captured = triton_common.is_captured(cost)
    if not captured and (place := bad.item()) != NONE:
        _refuse(first, cost, place)

    config = triton_common.config_of(CONFIGS, "bellman_pairs_step")
    grid = (triton.cdiv(n, config["BLOCK_K"]), n)
    for s in range(2, steps + 1):
        planes = value[s - 1], value[s], parent[s]
        # a pair (0, j) ends one step and no other; knot i > 0 is at most the i-th of a path
        reached = (0, 1) if s == 2 else (s - 2, n)
        triton_common.launch(bellman_pairs_step_kernel, grid, cost, *planes, n, *reached, on=cost, config=config)
    if captured:
        refused = bad != NONE
        value.masked_fill_(refused, torch.nan)
        parent.masked_fill_(refused, -1)
    return value, parent
