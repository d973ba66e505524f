"""The Bellman recursion over step costs: the best N-step path for every N, from one table."""

import math

import torch
from torch import Tensor

from flowkernels._checks import expect, expect_number, expect_positive_int, expect_tensor
from flowkernels.ops.bellman import reference
from flowkernels.ops.library import direct, dispatch, plain, refused_place, register


def bellman(cost: Tensor, steps: int, carry: float = 1.0) -> tuple[Tensor, Tensor]:
    """Least cost of reaching each knot in exactly s steps, for s = 0..steps.

    `J(s, k) = min_j carry J(s-1, j) + c(j, k)`, `J(0, 0) = 0`. Ties go to the smaller j.

    Args:
        cost: float64 `[K+1, K+1]`; entry [j, k] is the cost of one step from knot j to knot k. Only k > j is read;
            +Inf there forbids the step. NaN or -Inf raise. To know of them a call on a GPU waits for the kernel; while
            a CUDA graph is captured it cannot, and then they make all values NaN and all parents -1.
        steps: the largest number of steps, 1..K.
        carry: what the cost so far is multiplied with at each step, finite and > 0: 1 / gamma discounts each step by
            gamma over the one before it. The product is rounded, then the sum.

    Returns:
        `(value, parent)`, both `[steps + 1, K+1]`: J in float64, Inf where a knot cannot be reached in s steps, and the
        index j that attains it in int64, -1 where there is none; on cost's device. Not differentiable.

    Source: BOSS (arXiv 2312.16414), equation of optimality in section 3; carry: GITS (arXiv 2405.11326).

    Examples:
        >>> inf = torch.inf
        >>> cost = torch.tensor([[inf, 1, 9], [inf, inf, 2], [inf, inf, inf]], dtype=torch.float64)
        >>> least, came_from = fk.bellman(cost, 2)
        >>> least[:, 2]  # of reaching the last knot in 0, 1 and 2 steps
        tensor([inf, 9., 3.], dtype=torch.float64)
    """
    numbers = type(steps) is int and type(carry) is float
    if numbers and (C := plain("bellman", cost)) is not None and cost.dim() == 2 and 0 < steps < cost.shape[0]:
        value, parent = _fake(cost, steps, carry)
        if C.bellman_plain(cost, steps, carry, value, parent):
            return value, parent
    expect_tensor(cost, "cost", (torch.float64,))
    expect(cost.dim() == 2 and cost.shape[0] == cost.shape[1] >= 2, "cost", "shape [K+1, K+1] with K >= 1", cost)
    steps = expect_positive_int(steps, "steps")
    expect(steps <= cost.shape[0] - 1, "steps", f"at most K = {cost.shape[0] - 1}", steps)
    carry = expect_number(carry, "carry")
    cost = cost.detach()
    if (way := direct("bellman", cost)) is not None:
        return _kernel(way[0], cost, steps, carry, *way[1])
    return dispatch("bellman", cost, steps, carry)


def _refuse(cost: Tensor, j: int, k: int) -> None:
    expect(False, "cost", "no NaN or -Inf above the diagonal", f"cost[{j}, {k}] = {cost[j, k].item()}")


def _expect_carry(carry: float) -> None:
    expect(0 < carry < math.inf, "carry", "a positive, finite number", carry)


def _kernel(C, cost: Tensor, steps: int, carry: float, *where) -> tuple[Tensor, Tensor]:
    _expect_carry(carry)
    cost, n = cost.contiguous(), cost.shape[0]
    value, parent = _fake(cost, steps, carry)
    arguments = cost.data_ptr(), n, steps, carry, value.data_ptr(), parent.data_ptr()
    bad = cost.new_empty((), dtype=torch.int64) if where else None
    if (place := refused_place(C.bellman, arguments, bad, where)) >= 0:
        _refuse(cost, *divmod(place, n))
    return value, parent


def _reference(cost: Tensor, steps: int, carry: float) -> tuple[Tensor, Tensor]:
    _expect_carry(carry)
    bad = (~(cost > -torch.inf)).triu(1)
    if bool(bad.any()):
        _refuse(cost, *bad.nonzero()[0].tolist())
    return reference.bellman(cost, steps, carry)


def _fake(cost: Tensor, steps: int, carry: float) -> tuple[Tensor, Tensor]:
    shape = (steps + 1, cost.shape[0])
    return cost.new_empty(*shape), cost.new_empty(*shape, dtype=torch.int64)


register("bellman(Tensor cost, int steps, float carry) -> (Tensor, Tensor)", _kernel, _reference, _fake)
