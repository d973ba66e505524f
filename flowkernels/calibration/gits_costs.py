"""Step costs of GITS's other metrics: sums of absolute errors, and deviations from the line from noise to end."""

import torch
from torch import Tensor

from flowkernels.calibration.sample_costs import SampleCosts
from flowkernels.ops.cost_from_gram import cost_from_gram

PART_BYTES = 64 << 20  # of the states of the samples whose errors are formed at once


def absolute_costs(x: Tensor, v: Tensor, times: Tensor, secants: bool = False) -> Tensor:
    """The mean over samples of the sum of `|e|` over features, of each step j -> k: float64 `[K+1, K+1]` on the CPU,
    Inf where k <= j.

    x, v: a teacher's states `[K+1, n, *shape]` and velocities `[K, n, *shape]`. times: float64 `[K+1]`. secants:
    whether the states are not Euler steps of the velocities, whose rounding the errors are else free of.
    """
    K, n = len(times) - 1, v.shape[1]
    t, cost = times.to(v.device)[:, None, None], torch.zeros(K + 1, K + 1, dtype=torch.float64, device=v.device)
    part = max(1, PART_BYTES // (16 * (K + 1) * max(1, v[0, 0].numel())))
    for begin in range(0, n, part):
        u = v[:, begin : begin + part].flatten(2).double()
        if secants:
            path = x[:, begin : begin + part].flatten(2).double()
        else:
            path = torch.cat([torch.zeros_like(u[:1]), (t.diff(dim=0) * u).cumsum(0)])
        for j in range(K if secants else K - 1):
            first = j + 1 if secants else j + 2  # after a step of Euler's own there is no error
            e = path[first:] - path[j] - (t[first:] - t[j]) * u[j]
            cost[j, first:] += e.abs().flatten(1).sum(1)
    return _of_steps(cost / n)


def deviation_costs(singles: SampleCosts, x: Tensor, v: Tensor) -> Tensor:
    """The mean over samples of `|d(x_j + (t_k - t_j) v_j)| - |d(x_k)|`, of each step j -> k, where d(y) is the part of
    `y - x_0` that is orthogonal to the line from x_0 to x_K: float64 `[K+1, K+1]` on the CPU, Inf where k <= j. Below 0
    where steps end nearer to the line than the teacher's.

    singles: the Gram matrices of the samples, groups of one, whose states and velocities are x and v.
    """
    times, device = singles.times, v.device
    K, grams = len(times) - 1, singles.grams
    chord = (x[K] - x[0]).flatten(1).double()
    chord /= chord.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)  # of none: 0
    along = torch.stack([(row.flatten(1).double() * chord).sum(1) for row in v])  # [K, n]
    rows = along
    if singles.secants:
        rows = torch.stack([(row.flatten(1).double() * chord).sum(1) for row in x])
        rows = rows.diff(dim=0) / times.diff().to(device)[:, None]
    toward = rows.diff(dim=0)  # of the increments
    off = rows - along if singles.secants else None
    t = times.to(device)
    later = (t[:, None] - t[None, 1:K]).clamp_min_(0)  # t_k - t_m at [k, m]: what a_m adds to the state at k
    span = t[None, :] - t[:, None]
    # x_k less the point of the line at t_k: the broken line of these turns that is 0 at both ends
    bent = later - (t[:, None] - t[0]) * (t[K] - t[None, 1:K]) / (t[K] - t[0])
    bent[0] = bent[K] = 0

    def after(terms: Tensor) -> Tensor:  # [k, m] -> [j, k]: the sum over m > j
        sums = terms.flip(1).cumsum(1).flip(1).T
        return torch.cat([sums, sums.new_zeros(2, K + 1)])

    total = torch.zeros(K + 1, K + 1, dtype=torch.float64, device=device)
    for i, gram in enumerate(grams):
        on = bent @ gram[: K - 1, : K - 1]  # <d_k, a_m>
        square, turn = (on * bent).sum(1), bent @ toward[:, i]
        mixed, ahead = after(later * on), after(later * toward[:, i])  # <d_k, e_jk>, and e_jk along the line
        if off is not None:
            mixed[:K] += span[:K] * (bent @ gram[: K - 1, K - 1 :]).T
            ahead[:K] += span[:K] * off[:, i, None]
        e = cost_from_gram(gram, times, states=singles.secants)
        reached = (square - 2 * mixed + e - (turn - ahead).square()).clamp_min_(0).sqrt_()
        total += reached - (square - turn.square()).clamp_min_(0).sqrt_()
    return _of_steps(total / len(grams))


def _of_steps(cost: Tensor) -> Tensor:
    inside = torch.ones_like(cost, dtype=torch.bool).triu(1)
    return torch.where(inside, cost, torch.inf).cpu()
