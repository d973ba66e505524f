"""Step costs of all pairs of knots from one Gram matrix of velocity increments."""

import torch
from torch import Tensor

from flowkernels._checks import expect, expect_bool, expect_tensor, expect_times
from flowkernels.ops.cost_from_gram import reference
from flowkernels.ops.library import direct, plain, register, uploaded


def cost_from_gram(gram: Tensor, times: Tensor, *, states: bool = False) -> Tensor:
    """All step costs `c(j, k)` from the mean Gram matrix of increments, in K^2 operations.

    Args:
        gram: float64, what `velocity_gram` returns divided by the number of samples: `[K-1, K-1]`, or `[2K-1, 2K-1]`
            with `states`. Symmetric: of the increments only the upper triangle and the diagonal are read.
        times: the K+1 knots; on the CPU they are copied to gram's device at every call.
        states: whether `velocity_gram` was given states.

    Returns:
        float64 `[K+1, K+1]` on gram's device: entry [j, k], k > j, is the mean over samples of
        `|x_k - x_j - (t_k - t_j) v_j|^2`; Inf where k <= j. NaN and Inf spread to the costs that they are part of. Not
        differentiable.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Source: docs/mathematics.md; the cost is that of BOSS (arXiv 2312.16414, section 3).

    Examples:
        >>> v = torch.randn(4, 8, 2)  # four fine steps of eight samples
        >>> times = torch.linspace(0, 1, 5, dtype=torch.float64)
        >>> cost = fk.cost_from_gram(fk.velocity_gram(v) / 8, times)
        >>> torch.allclose(cost, fk.step_costs(v, times))
        True
    """
    C = plain("cost_from_gram", gram)
    known = C is not None and type(times) is Tensor and type(states) is bool and times.layout is torch.strided
    if known and times.dim() == 1 and gram.dtype is torch.float64:
        cost = _fake(gram, times, states)
        if C.cost_from_gram_plain(gram, times, states, cost):
            return cost
    expect_tensor(gram, "gram", (torch.float64,))
    t, states = expect_times(times, "times"), expect_bool(states, "states")
    rows = 2 * len(t) - 3 if states else len(t) - 2
    if gram.shape != (rows, rows):
        expect(False, "gram", f"shape [{rows}, {rows}], for {len(t)} knots", gram)
    gram = gram.detach()
    if (way := direct("cost_from_gram", gram, host=t)) is not None:
        return _kernel(way[0], gram, t, states, *way[1])
    return torch.ops.flowkernels.cost_from_gram(gram, t, states)


def _kernel(C, gram: Tensor, times: Tensor, states: bool, *where) -> Tensor:
    if where and times.is_cpu:
        times = uploaded(C, times, gram, where)
    gram, times = gram.contiguous(), times.contiguous()
    cost = _fake(gram, times, states)
    C.cost_from_gram(gram.data_ptr(), times.data_ptr(), len(times) - 1, states, cost.data_ptr(), *where)
    return cost


def _fake(gram: Tensor, times: Tensor, states: bool) -> Tensor:
    return gram.new_empty(times.shape[0], times.shape[0])


register("cost_from_gram(Tensor gram, Tensor times, bool states) -> Tensor", _kernel, reference.cost_from_gram, _fake,
         host=("times",))  # fmt: skip
