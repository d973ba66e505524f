"""The Bellman recursion over pairs of knots: the best N-step path for every N of a method that looks back one step."""

import torch
from torch import Tensor

from flowkernels._checks import expect, expect_positive_int, expect_tensor
from flowkernels.ops.bellman_pairs import reference
from flowkernels.ops.library import direct, fresh, plain, refused_place, register


def bellman_pairs(first: Tensor, cost: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Least cost of having any two knots as the last two after exactly s steps, for s = 0..steps.

    `V(s, j, k) = min_{i<j} V(s-1, i, j) + c(i, j, k)` and `V(1, 0, k) = first(k)`. Ties go to the smaller i. It is
    `bellman` where the cost of a step depends on the knot before it too, as that of a two-step method does
    (Adams-Bashforth 2). The last of N steps of least cost comes from `j = argmin(value[N, :, K])`, the one before it
    from `parent[N, j, K]`.

    Args:
        first: float64 `[K+1]`; entry k >= 1 is the cost of a first step from knot 0 to knot k, +Inf forbids it. Entry 0
            is not read.
        cost: float64 `[K+1, K+1, K+1]`; entry [i, j, k], i < j < k, is the cost of the step from knot j to knot k where
            the step before came from knot i. Nothing else is read; +Inf there forbids the step. NaN or -Inf in what
            is read of the two, by any number of steps, raise. To know of them a call on a GPU waits for the kernel;
            while a CUDA graph is captured it cannot, and then they make all values NaN and all parents -1.
        steps: the largest number of steps, 1..K.

    Returns:
        `(value, parent)`, both `[steps + 1, K+1, K+1]`: entry [s, j, k] is V in float64, Inf where no path of s steps
        ends with that from j to k, and the knot i before them in int64, -1 where there is none, as for s = 1.
        `value[0]` is 0 at [0, 0] and Inf elsewhere. On cost's device. Not differentiable.

    Source: the recursion of BOSS (arXiv 2312.16414), section 3, over states of two knots.

    Examples:
        >>> inf = torch.inf
        >>> first = torch.tensor([inf, 1, 9], dtype=torch.float64)
        >>> cost = torch.full((3, 3, 3), inf, dtype=torch.float64)
        >>> cost[0, 1, 2] = 2.0  # of the step from knot 1 to 2 after one from 0 to 1
        >>> least, came_from = fk.bellman_pairs(first, cost, 2)
        >>> float(least[2, 1, 2])
        3.0
    """
    C = plain("bellman_pairs", cost)
    if C is not None and type(steps) is int and cost.dim() == 3 and 0 < steps < cost.shape[0]:
        value, parent = map(fresh, _fake(first, cost, steps))
        if C.bellman_pairs_plain(first, cost, steps, value, parent):
            return value, parent
    expect_tensor(first, "first", (torch.float64,))
    expect_tensor(cost, "cost", (torch.float64,))
    n = cost.shape[0] if cost.dim() else 0
    expect(cost.shape == (n, n, n) and n >= 2, "cost", "shape [K+1, K+1, K+1] with K >= 1", cost)
    expect(
        first.shape == (n,) and first.device == cost.device, "first", f"shape [{n}] on {cost.device}, as cost", first
    )
    steps = expect_positive_int(steps, "steps")
    expect(steps <= n - 1, "steps", f"at most K = {n - 1}", steps)
    first, cost = first.detach(), cost.detach()
    if (way := direct("bellman_pairs", first, cost)) is not None:
        return _kernel(way[0], first, cost, steps, *way[1])
    return torch.ops.flowkernels.bellman_pairs(first, cost, steps)


def _refuse(first: Tensor, cost: Tensor, place: int) -> None:
    """place: in `first`, or so many after its end in `cost`."""
    n = len(first)
    if place < n:
        expect(False, "first", "no NaN or -Inf after the first entry", f"first[{place}] = {first[place].item()}")
    i, j, k = (place - n) // n**2, (place - n) // n % n, place % n
    expect(False, "cost", "no NaN or -Inf where i < j < k", f"cost[{i}, {j}, {k}] = {cost[i, j, k].item()}")


def _kernel(C, first: Tensor, cost: Tensor, steps: int, *where) -> tuple[Tensor, Tensor]:
    first, cost, n = first.contiguous(), cost.contiguous(), first.shape[0]
    value, parent = map(fresh, _fake(first, cost, steps))
    arguments = first.data_ptr(), cost.data_ptr(), n, steps, value.data_ptr(), parent.data_ptr()
    bad = cost.new_empty((), dtype=torch.int64) if where else None
    if (place := refused_place(C.bellman_pairs, arguments, bad, where)) >= 0:
        _refuse(first, cost, place)
    return value, parent


def _reference(first: Tensor, cost: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    n = len(first)
    bad = torch.cat([~(first > -torch.inf), (~(cost > -torch.inf) & reference.later(n, cost.device)).flatten()])
    bad[0] = False
    if bool(bad.any()):
        _refuse(first, cost, int(bad.nonzero()[0]))
    return reference.bellman_pairs(first, cost, steps)


def _fake(first: Tensor, cost: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    shape = (steps + 1, *cost.shape[:2])
    return cost.new_empty(*shape), cost.new_empty(*shape, dtype=torch.int64)


register("bellman_pairs(Tensor first, Tensor cost, int steps) -> (Tensor, Tensor)", _kernel, _reference, _fake)
