"""What the tests of all ops ask about this one: see ops_cases.py."""

import torch
from ops_cases import Accesses, Call

import flowkernels as fk

CALLS = {"axpy": Call(lambda x, y: fk.axpy(x, y, 0.5), ((3, 5), (3, 5)))}


def accesses():
    yield Accesses(fk.axpy, (*torch.randn(2, 4096), 0.5), {}, {})


def guarded(page) -> None:
    for n in range(1, 36):
        x, y = (page(torch.ones(n)) for _ in range(2))
        assert fk.axpy(x, y, 0.5).eq(1.5).all()
