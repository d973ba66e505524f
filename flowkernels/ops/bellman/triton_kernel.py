"""`bellman` in Triton. A step needs all values of the step before: where one program can hold the costs it makes all
steps, and otherwise each step is a launch."""

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from flowkernels.ops import triton_common
from flowkernels.ops.bellman import _expect_carry, _fake, _refuse
from flowkernels.ops.triton_common import product

HELD = ("bellman_32", "bellman_64")
CONFIGS = {
    "bellman_32": {"BLOCK": 32, "num_warps": 4},
    "bellman_64": {"BLOCK": 64, "num_warps": 8},
    "bellman_check": {"BLOCK": 128, "num_warps": 4},
    "bellman_step": {"BLOCK_J": 32, "BLOCK_K": 32, "num_warps": 4},
}
SEARCH = {
    "bellman_32": {"num_warps": (1, 2, 4)},
    "bellman_64": {"num_warps": (4, 8, 16)},
    "bellman_check": {"BLOCK": (64, 128, 256), "num_warps": (1, 2, 4)},
    "bellman_step": {"BLOCK_J": (16, 32, 64), "BLOCK_K": (16, 32, 64), "num_warps": (2, 4, 8)},
}
NONE = torch.iinfo(torch.int64).max


@triton.jit(do_not_specialize=["carry", "steps"])
def bellman_kernel(
    cost,  # [n, n]
    value,  # [steps + 1, n]
    parent,  # [steps + 1, n]
    bad,  # [1], the first place above the diagonal with NaN or -Inf; all values are NaN and all parents -1 then
    carry,  # the bits of a factor on the values of the step before
    n,
    steps,
    none,
    BLOCK: tl.constexpr,
):
    knot = tl.arange(0, BLOCK)
    j, k = knot[:, None], knot[None, :]
    c = tl.load(cost + j * n + k, mask=(j < k) & (k < n), other=float("inf"))
    place = tl.min(tl.min(tl.where(c > float("-inf"), none, (j * n + k).to(tl.int64)), 0), 0)
    tl.store(bad, place)
    refused = place != none
    factor = tl.full((), carry, tl.int64).to(tl.float64, bitcast=True)
    best = tl.where(knot == 0, 0.0, float("inf")).to(tl.float64)
    best_j = tl.full((BLOCK,), -1, tl.int32)
    for s in range(steps + 1):
        if s > 0:
            total = tl.where(c < float("inf"), product(best, factor)[:, None] + c, float("inf"))  # from -Inf too
            best, best_j = tl.min(total, 0, return_indices=True)  # ties go to the smaller j
            best_j = tl.where(best < float("inf"), best_j, -1)
        tl.store(value + s * n + knot, tl.where(refused, float("nan"), best), mask=knot < n)
        tl.store(parent + s * n + knot, tl.where(refused, -1, best_j), mask=knot < n)


@triton.jit
def bellman_check_kernel(
    cost,  # [n, n]
    value,  # [n], of no step
    parent,  # [n], of no step
    bad,  # [n], by row: the first place above the diagonal with NaN or -Inf
    n,
    none,
    BLOCK: tl.constexpr,
):
    j = tl.program_id(0).to(tl.int64)
    tl.store(value + j, tl.where(j == 0, 0.0, float("inf")))
    tl.store(parent + j, -1)
    first = tl.full((), none, tl.int64)
    for start in range(j + 1, n, BLOCK):
        k = start + tl.arange(0, BLOCK)
        c = tl.load(cost + j * n + k, mask=k < n, other=0.0)
        first = tl.minimum(first, tl.min(tl.where(c > float("-inf"), none, j * n + k)))
    tl.store(bad + j, first)


# one kernel for all steps, whose rows begin anywhere
@triton.jit(do_not_specialize=["carry", "first"], do_not_specialize_on_alignment=["before", "value", "parent"])
def bellman_step_kernel(
    cost,  # [n, n]
    before,  # [n], the values of the step before
    carry,  # the bits of a factor on them
    value,  # [n]
    parent,  # [n]
    n,
    first,  # the first knot that the step before can have reached
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    k = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    factor = tl.full((), carry, tl.int64).to(tl.float64, bitcast=True)
    best = tl.full((BLOCK_K,), float("inf"), tl.float64)
    best_j = tl.full((BLOCK_K,), -1, tl.int64)
    for start in range(first, tl.minimum(tl.max(k), n - 1), BLOCK_J):
        j = (start + tl.arange(0, BLOCK_J)).to(tl.int64)[:, None]
        is_step = (j < k) & (k < n)
        reached = tl.load(before + j, mask=j < n, other=float("inf"))
        total = product(reached, factor) + tl.load(cost + j * n + k, mask=is_step, other=float("inf"))
        least = tl.min(total, 0)
        least_j = tl.min(tl.where(total == least, j, n), 0)  # ties go to the smaller j
        best_j = tl.where(least < best, least_j, best_j)
        best = tl.minimum(least, best)
    tl.store(value + k, best, mask=k < n)
    tl.store(parent + k, best_j, mask=k < n)


def bellman(cost: Tensor, steps: int, carry: float) -> tuple[Tensor, Tensor]:
    _expect_carry(carry)
    cost, n = cost.contiguous(), cost.shape[0]
    (value, parent), captured = _fake(cost, steps, carry), triton_common.is_captured(cost)
    (bits,) = struct.unpack("q", struct.pack("d", carry))  # which may be no float32

    def look(bad: Tensor) -> None:
        if not captured and (place := bad.item()) != NONE:
            _refuse(cost, *divmod(place, n))

    if held := next((name for name in HELD if triton_common.config_of(CONFIGS, name)["BLOCK"] >= n), None):
        bad, config = cost.new_empty((), dtype=torch.int64), triton_common.config_of(CONFIGS, held)
        args = cost, value, parent, bad, bits, n, steps, NONE
        triton_common.launch(bellman_kernel, (1,), *args, on=cost, config=config)
        look(bad)
        return value, parent

    places = cost.new_empty(n, dtype=torch.int64)
    config = triton_common.config_of(CONFIGS, "bellman_check")
    triton_common.launch(bellman_check_kernel, (n,), cost, value, parent, places, n, NONE, on=cost, config=config)
    bad = places.amin()
    look(bad)
    config = triton_common.config_of(CONFIGS, "bellman_step")
    grid = (triton.cdiv(n, config["BLOCK_K"]),)
    for s in range(1, steps + 1):
        rows = value[s - 1], bits, value[s], parent[s]
        triton_common.launch(bellman_step_kernel, grid, cost, *rows, n, s - 1, on=cost, config=config)
    if captured:
        refused = bad != NONE
        value.masked_fill_(refused, torch.nan)
        parent.masked_fill_(refused, -1)
    return value, parent
