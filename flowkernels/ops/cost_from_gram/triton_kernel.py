"""`cost_from_gram` in Triton."""

import triton
import triton.language as tl
from torch import Tensor

from flowkernels.ops import triton_common
from flowkernels.ops.cost_from_gram import _fake
from flowkernels.ops.triton_common import product

CONFIGS = {"cost_from_gram": {"BLOCK_M": 32, "BLOCK_K": 32, "num_warps": 4}}
SEARCH = {"cost_from_gram": {"BLOCK_M": (16, 32, 64), "BLOCK_K": (16, 32), "num_warps": (2, 4, 8)}}


@triton.jit
def _before(steps, BLOCK: tl.constexpr):
    """[k] = the sum of steps[k'] over k' < k."""
    i = tl.arange(0, BLOCK)
    return tl.sum(tl.where(i[:, None] < i[None, :], steps[:, None], 0.0), 0)


@triton.jit
def _last(values, BLOCK: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, BLOCK) == BLOCK - 1, values, 0.0), 0)


@triton.jit
def cost_from_gram_kernel(
    gram,  # [R, R], R = K - 1, or 2 K - 1 with states; float64, as everything here
    times,  # [K + 1]
    cost,  # [K + 1, K + 1]
    K,
    STATES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A program is a row j, and goes along k by the recursion of reference.py: with S(j, k) the residual of the step
    j -> k and B(j, k) the sum of a_m, j < m <= k, it carries BB = |B|^2, SB = <S, B> and SS = |S|^2."""
    j = tl.program_id(0).to(tl.int64)
    R = K - 1
    if STATES:
        R = 2 * K - 1
    row = cost + j * (K + 1)
    for start in range(0, j // BLOCK_K * BLOCK_K, BLOCK_K):
        tl.store(row + start + tl.arange(0, BLOCK_K), tl.full((BLOCK_K,), float("inf"), tl.float64))

    t_j = tl.load(times + j)
    BB = tl.zeros((), tl.float64)
    SB, SS, Be, Se = BB, BB, BB, BB  # at the last k of the block before
    for start in range(j // BLOCK_K * BLOCK_K, K + 1, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        is_step = (k > j) & (k <= K)
        has_a = is_step & (k < K)
        t_k = tl.load(times + k, mask=k <= K, other=0.0)
        h = tl.where(is_step, t_k - tl.load(times + k - 1, mask=is_step, other=0.0), 0.0)
        b = tl.zeros((BLOCK_K,), tl.float64)  # <B(j, k-1), a_k>
        s = tl.zeros((BLOCK_K,), tl.float64)  # <S(j, k), a_k>
        for first in range(j + 1, tl.minimum(start + BLOCK_K, K), BLOCK_M):
            m = (first + tl.arange(0, BLOCK_M))[:, None]
            a = tl.load(gram + (m - 1) * R + k - 1, mask=(m < k) & has_a, other=0.0)
            b += tl.sum(a, 0)
            s += tl.sum(product(t_k - tl.load(times + m, mask=m <= K, other=0.0), a), 0)
        square = tl.load(gram + (k - 1) * (R + 1), mask=has_a, other=0.0)

        BB_step = 2 * b + square
        BB_before = BB + _before(BB_step, BLOCK_K)
        SB_step = h * BB_before + s
        SB_before = SB + _before(SB_step, BLOCK_K)
        SS_step = 2 * h * SB_before + h * h * BB_before
        SS_here = SS + _before(SS_step, BLOCK_K) + SS_step
        BB = _last(BB_before + BB_step, BLOCK_K)
        SB = _last(SB_before + SB_step, BLOCK_K)
        SS = _last(SS_here, BLOCK_K)
        c = SS_here
        if STATES:  # the residual is S(j, k) + (t_k - t_j) e_j
            e = gram + (K - 1 + j) * R
            Be_step = tl.load(e + k - 1, mask=has_a, other=0.0)
            Be_before = Be + _before(Be_step, BLOCK_K)
            Se_step = h * Be_before
            Se_here = Se + _before(Se_step, BLOCK_K) + Se_step
            Be = _last(Be_before + Be_step, BLOCK_K)
            Se = _last(Se_here, BLOCK_K)
            span = t_k - t_j
            c += 2 * span * Se_here + span * span * tl.load(e + K - 1 + j, mask=j < K, other=0.0)
        # rounding may leave a residual of zero at -1e-17; NaN stays
        tl.store(row + k, tl.where(is_step, tl.where(c < 0, 0.0, c), float("inf")), mask=k <= K)


def cost_from_gram(gram: Tensor, times: Tensor, states: bool) -> Tensor:
    gram, times = gram.contiguous(), triton_common.knots_on(times, gram.device)
    cost, K = _fake(gram, times, states), len(times) - 1
    config = triton_common.config_of(CONFIGS, "cost_from_gram")
    triton_common.launch(cost_from_gram_kernel, (K + 1,), gram, times, cost, K, on=gram, config=config, STATES=states)
    return cost
