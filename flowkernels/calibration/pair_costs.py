"""The errors of Adams-Bashforth 2 steps between all triples of knots, from one Gram matrix."""

import torch
from torch import Tensor

from flowkernels._checks import expect
from flowkernels.ops.cost_from_gram import cost_from_gram

PAIRS_BYTES = 2 << 30  # of the costs of all pairs of steps


def pair_costs(gram: Tensor, times: Tensor) -> Tensor:
    """The error of a variable-step Adams-Bashforth 2 step from knot j to knot k after one from knot i to knot j.

    `c(i, j, k) = mean |x_k - x_j - h v_j - h^2 / (2 (t_j - t_i)) (v_j - v_i)|^2` with `h = t_k - t_j`.

    Args:
        gram: the mean Gram matrix of increments, float64 `[K-1, K-1]`; of states that are not Euler steps
            `[2K-1, 2K-1]`, of the increments of secants u and of what these are off by, e = u - v (`velocity_gram`).
        times: float64 `[K+1]`.

    Returns:
        float64 `[K+1, K+1, K+1]` on the CPU, of which entries i < j < k count.
    """
    K = len(times) - 1
    needed = 8 * (K + 1) ** 3
    expect(needed <= PAIRS_BYTES, "grid", "costs of pairs of at most 2 GiB (K = 644)", f"K = {K}: {needed / 2**30:.1f}")
    secants = len(gram) != K - 1
    A, across = (torch.zeros(K + 1, K + 1, dtype=torch.float64, device="cpu") for _ in range(2))
    A[1:K, 1:K] = across[1:K, 1:K] = gram[: K - 1, : K - 1]
    if secants:  # <b_m, b_m'> and <b_m, a_m'> of the velocities' own increments, b_m = a_m - (e_m - e_{m-1})
        own = torch.eye(K - 1, 2 * K - 1, dtype=torch.float64, device="cpu")
        own[:, K - 1 :] = torch.eye(K, dtype=torch.float64, device="cpu").diff(dim=0).neg()
        A[1:K, 1:K], across[1:K, 1:K] = own @ gram @ own.T, own @ gram[:, : K - 1]
    h = times[None, :] - times[:, None]
    # S(j, k) = x_k - x_j - h u_j = sum of (t_k - t_m) a_m over j < m < k, B(i, j) = v_j - v_i = sum of b_m over
    # i < m <= j. First <b_i, S(j, k)> at [i, j, k], then <B(i, j), S(j, k)>: sums of what comes later
    c = across[:, :, None] * h.clamp_min(0)
    later = torch.zeros_like(c[:, 0])
    for j in range(K, -1, -1):
        here = c[:, j].clone()
        c[:, j] = later
        later += here
    later.zero_()
    for i in range(K, -1, -1):
        c[i, :i] = 0  # j < i
        here = c[i].clone()
        c[i] = later
        later += here

    inside = torch.ones_like(A).triu(1)

    def between(t: Tensor) -> Tensor:  # [m, j] -> [i, j]: the sum over i < m <= j
        sums = (t * (inside + torch.eye(len(t), dtype=t.dtype, device="cpu"))).flip(0).cumsum(0).flip(0)
        return torch.cat([sums[1:], torch.zeros_like(sums[:1])])

    before = between(A * inside)  # sum of A[m, j] over i < m < j
    BB = ((2 * before + A.diagonal()) * inside).cumsum(1)
    if secants:  # h e_j beside S(j, k)
        off = torch.zeros_like(A)
        off[1:K, :K] = own @ gram[:, K - 1 :]
        c.addcmul_(between(off)[:, :, None], h)
    SS = cost_from_gram(gram, times, states=secants)
    for i in range(K + 1):
        f = h[i + 1 :].square() / (2 * h[i, i + 1 :, None])
        c[i, : i + 1] = torch.inf
        c[i, i + 1 :] = (SS[i + 1 :] - 2 * f * c[i, i + 1 :] + f.square() * BB[i, i + 1 :, None]).clamp_min_(0)
    return c
