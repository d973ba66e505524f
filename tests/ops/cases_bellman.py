"""What the tests of all ops ask about this one: see ops_cases.py."""

import torch
from ops_cases import Accesses, Call

import flowkernels as fk

CALLS = {
    "bellman": Call(lambda cost: fk.bellman(cost.double(), 3), ((5, 5),), converts=True),
}
WAITS = "it reads one flag"
TRITON_PTX = True


def accesses():
    for n in (32, 136):  # in one block, and a launch for each step
        # columns begin and end where the triangle does, within a sector, and the tables are small
        yield Accesses(fk.bellman, (torch.rand(n, n, dtype=torch.float64), 4), {}, {"": 1.25})


def guarded(page) -> None:
    for K in range(1, 20):
        value, _ = fk.bellman(page(torch.ones(K + 1, K + 1, dtype=torch.float64)), K)
        assert value.diagonal().eq(torch.arange(K + 1)).all()
