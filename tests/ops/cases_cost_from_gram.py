"""What the tests of all ops ask about this one: see ops_cases.py."""

import torch
from ops_cases import Accesses, Call

import flowkernels as fk

CALLS = {
    "cost_from_gram": Call(lambda gram: fk.cost_from_gram((gram + gram.T).double(), 4), ((3, 3),), converts=True),
}
TRITON_PTX = True


def accesses():
    gram, times = torch.eye(30, dtype=torch.float64), torch.linspace(0, 1, 32, dtype=torch.float64)
    # columns begin and end where the triangle does, within a sector
    yield Accesses(fk.cost_from_gram, (gram, times), {}, {"": 1.25, "double square": 4})  # it is on the diagonal


def guarded(page) -> None:
    for K in range(2, 20):
        gram = page(torch.ones(K - 1, K - 1, dtype=torch.float64))
        assert fk.cost_from_gram(gram, page(torch.linspace(0, 1, K + 1, dtype=torch.float64))).triu(2).isfinite().all()
