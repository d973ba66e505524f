"""`bellman_pairs` in plain torch."""

import torch
from torch import Tensor


def later(n: int, device: torch.device) -> Tensor:
    """Where i < j < k in `[n, n, n]`."""
    above = torch.ones(n, n, dtype=torch.bool, device=device).triu(1)
    return above[:, :, None] & above


def bellman_pairs(first: Tensor, cost: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    n = len(first)
    value = torch.full((steps + 1, n, n), torch.inf, dtype=torch.float64, device=cost.device)
    parent = torch.full((steps + 1, n, n), -1, dtype=torch.int64, device=cost.device)
    value[0, 0, 0] = 0
    value[1, 0, 1:] = first[1:]
    cost = torch.where(later(n, cost.device), cost, torch.inf)
    for s in range(2, steps + 1):
        total = torch.where(cost < torch.inf, value[s - 1][:, :, None] + cost, torch.inf)
        value[s] = total.min(dim=0).values
        # the smallest i that attains the minimum; torch.min promises none of several
        smallest = (total == value[s]).to(torch.int8).argmax(dim=0)
        parent[s] = torch.where(value[s] < torch.inf, smallest, -1)
    return value, parent
