"""What the tests of all ops ask about this one: see ops_cases.py."""

import torch
from ops_cases import PLACES, STATES, Accesses, Call, apart, pieces, places

import flowkernels as fk
from flowkernels.runtime.backends import backend

CALLS = {
    "straighten_loss": Call(
        lambda v, bank, h, w: fk.straighten_loss(v, bank, h, *PLACES, weight=w), ((4, 5), (4, 3, 5), (3,), (4,))
    ),
}
GRADIENTS = (0,)
TRITON_PTX = True
LARGE_BYTES = 4 + 4


def accesses():
    bank, interval, sample, u = places()
    yield Accesses(fk.straighten_loss, (torch.randn(4, 1024), bank, u, interval, sample), {}, {})


def guarded(page) -> None:
    for x_dtype, v_dtype in STATES:
        for n in range(1, 36):
            bank = page(torch.arange(4.0).view(2, 2, 1).expand(2, 2, n).to(x_dtype))
            for loss in ("l2", "huber"):
                rows = page(torch.full((2, n), 3.0).to(v_dtype))
                place = torch.tensor([0, 0]), torch.tensor([1, 0])
                got = fk.straighten_loss(rows, bank, torch.ones(1), *place, loss=loss, huber_c=1.0)
                assert got.per_sample.sub(1 if loss == "l2" else 2**0.5 - 1).abs().max() < 1e-6


def large(device, n: int, on: str = "cuda") -> float:
    D = n // 6 + 1
    bank, v = torch.rand(3, 2, D, device=device), torch.rand(1, D, device=device).requires_grad_()
    last, h = torch.tensor([1], device=device), torch.tensor([0.5, 0.5], device=device)
    with backend(on):
        fk.straighten_loss(v, bank, h, last, last).loss.backward()
    a, b, p = bank[1, 1], bank[2, 1], v.detach()[0]

    def piece(s):
        expected = (p[s].double() - (b[s].double() - a[s].double()) / 0.5) * 2  # the mean over D comes last
        return apart(v.grad[0, s].double() * D, expected, p[s] + 2 * (a[s] + b[s]) + 1)

    return max(map(piece, pieces(D)))
