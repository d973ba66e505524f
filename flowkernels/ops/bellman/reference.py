"""`bellman` in plain torch."""

import torch
from torch import Tensor


def bellman(cost: Tensor, steps: int, carry: float = 1.0) -> tuple[Tensor, Tensor]:
    n = cost.shape[0]
    value = torch.full((steps + 1, n), torch.inf, dtype=torch.float64, device=cost.device)
    parent = torch.full((steps + 1, n), -1, dtype=torch.int64, device=cost.device)
    value[0, 0] = 0
    later = torch.ones(n, n, dtype=torch.bool, device=cost.device).triu(1)
    cost = torch.where(later, cost, torch.inf)
    for s in range(1, steps + 1):
        total = torch.where(cost < torch.inf, carry * value[s - 1][:, None] + cost, torch.inf)
        value[s] = total.min(dim=0).values
        # the smallest j that attains the minimum; torch.min promises none of several
        first = (total == value[s]).to(torch.int8).argmax(dim=0)
        parent[s] = torch.where(value[s] < torch.inf, first, -1)
    return value, parent
