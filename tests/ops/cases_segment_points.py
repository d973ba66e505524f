"""What the tests of all ops ask about this one: see ops_cases.py."""

import torch
from ops_cases import PLACES, STATES, Accesses, Call, apart, pieces, places

import flowkernels as fk
from flowkernels.runtime.backends import backend

CALLS = {
    "segment_points": Call(lambda bank, u: fk.segment_points(bank, *PLACES, u), ((4, 3, 5), (4,))),
}
LARGE_BYTES = 4 + 2


def accesses():
    for dtype in (torch.float32, torch.bfloat16):
        yield Accesses(fk.segment_points, places(), dict(dtype=dtype), {})


def guarded(page) -> None:
    for x_dtype, _ in STATES:
        for n in range(1, 36):
            bank = page(torch.arange(4.0).view(2, 2, 1).expand(2, 2, n).to(x_dtype))
            for where in (None, torch.tensor([0.0, 0.5])):
                points = fk.segment_points(bank, torch.tensor([0, 0]), torch.tensor([1, 0]), where)
                assert points.eq(torch.tensor([[1.0], [0.0 if where is None else 1.0]])).all()


def large(device, n: int, on: str = "cuda") -> float:
    """A bank of n elements or more, read at its end."""
    D = n // 6 + 1
    bank = torch.rand(3, 2, D, device=device)
    last, u = torch.tensor([1], device=device), torch.tensor([0.25], device=device)
    with backend(on):
        out = fk.segment_points(bank, last, last, u)[0]
    a, b = bank[1, 1], bank[2, 1]
    return max(apart(out[p], a[p].double() + 0.25 * (b[p].double() - a[p].double()), a[p] + b[p]) for p in pieces(D))
