"""What the tests of all ops ask about this one: see ops_cases.py."""

import torch
from ops_cases import Accesses, Call

import flowkernels as fk

CALLS = {
    "bellman_pairs": Call(
        lambda first, cost: fk.bellman_pairs(first.double(), cost.double(), 3), ((5,), (5, 5, 5)), converts=True
    ),
}
WAITS = "it reads one flag"
TRITON_PTX = True


def accesses():
    for n in (32, 64):  # in one block, and a launch for each step
        first, cost = (torch.rand((n,) * d, dtype=torch.float64) for d in (1, 3))
        yield Accesses(fk.bellman_pairs, (first, cost, 4), {}, {"": 1.25})  # as those of bellman


def guarded(page) -> None:
    for K in range(1, 20):
        first, cost = (torch.ones((K + 1,) * d, dtype=torch.float64) for d in (1, 3))
        value, _ = fk.bellman_pairs(page(first), page(cost), K)
        assert value[range(1, K + 1), range(K), range(1, K + 1)].eq(torch.arange(1, K + 1)).all()
