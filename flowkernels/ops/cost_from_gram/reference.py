"""`cost_from_gram` in plain torch."""

import torch
from torch import Tensor


def cost_from_gram(gram: Tensor, times: Tensor, states: bool = False) -> Tensor:
    """By prefix sums.

    With S(j, k) = sum_{j<m<k} (t_k - t_m) a_m, the residual of the step j -> k, and B(j, k) = sum_{j<m<=k} a_m:
    S(j, k+1) = S(j, k) + h_k B(j, k), so |S|^2, <S, B> and |B|^2 each follow from the last by adding along k.
    """
    K, times = len(times) - 1, times.to(gram.device)
    h = times.diff()
    A = gram.new_zeros(K + 1, K + 1)  # indexed by m = 1..K-1
    A[1:K, 1:K] = gram[: K - 1, : K - 1]
    inside = torch.ones(K + 1, K + 1, dtype=torch.bool, device=gram.device).triu(1)  # m < m', or j < k

    def tail_sums(rows: Tensor) -> Tensor:  # [j, k] = sum of rows m = j+1..k-1 in column k
        sums = torch.where(inside, rows, 0.0).flip(0).cumsum(0).flip(0)
        return torch.cat([sums[1:], gram.new_zeros(1, K + 1)])

    def along_k(steps: Tensor) -> Tensor:  # [j, k] = sum of steps[j, k'] over j < k' <= k
        return torch.where(inside, steps, 0.0).cumsum(1)

    def before(t: Tensor) -> Tensor:  # shift by one in k: entry [j, k] becomes that of [j, k-1]
        return torch.cat([gram.new_zeros(len(t), 1), t[:, :-1]], 1)

    h_last = torch.cat([gram.new_zeros(1), h])  # h_{k-1} at k
    BB = along_k(2 * tail_sums(A) + A.diagonal())  # |B(j, k)|^2
    SB = along_k(h_last * before(BB) + tail_sums((times[None, :] - times[:, None]) * A))  # <S(j, k), B(j, k)>
    SS = along_k(2 * h_last * before(SB) + h_last**2 * before(BB))  # |S(j, k)|^2
    if states:  # the residual is S(j, k) + (t_k - t_j) e_j
        E = gram.new_zeros(K + 1, K + 1)
        E[:K, 1:K] = gram[K - 1 :, : K - 1]  # <e_j, a_m> at [j, m]
        Be = along_k(E)
        Se = along_k(h_last * before(Be))
        span = times[None, :] - times[:, None]
        ee = torch.cat([gram.diagonal()[K - 1 :], gram.new_zeros(1)])[:, None]
        SS = SS + 2 * span * Se + span**2 * ee
    return torch.where(inside, SS.clamp_min(0), torch.inf)  # rounding may leave a residual of zero at -1e-17
