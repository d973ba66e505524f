"""What the tests of all ops ask about this one: see ops_cases.py."""

import torch
from ops_cases import STATES, Accesses, Call, apart, pieces

import flowkernels as fk
from flowkernels.runtime.backends import backend

CALLS = {
    "velocity_gram": Call(lambda v, x: fk.velocity_gram(v, x=x, times=4), ((4, 3, 5), (5, 3, 5)), converts=True),
}
TRITON_PTX = True
LARGE_BYTES = 2 + 2


def accesses():
    # the lower triangle of the result, once for each call
    yield Accesses(fk.velocity_gram, (torch.randn(40, 4096),), {}, {"gram[j * R + i] = sum": 4.0})


def guarded(page) -> None:
    for x_dtype, v_dtype in STATES:
        for n in range(1, 36):
            velocities = torch.arange(5).view(5, 1).expand(5, n).to(v_dtype)
            states = torch.zeros(6, n, dtype=x_dtype)
            assert fk.velocity_gram(page(velocities)).eq(n).all()
            gram = fk.velocity_gram(page(velocities), x=page(states), times=5)
            assert gram[4:, 4:].eq(n * torch.arange(5.0) * torch.arange(5.0)[:, None]).all()


def large(device, n: int, on: str = "cuda") -> float:
    """Three velocities of n elements together, more in all than 2^31."""
    D = n // 3 + 1
    v = torch.rand(3, 1, D, device=device, dtype=torch.bfloat16)
    with backend(on):
        got = fk.velocity_gram(v)
    truth = torch.zeros(2, 2, dtype=torch.float64, device=device)
    for p in pieces(D):
        rows = v[:, 0, p].double().diff(dim=0)
        truth += rows @ rows.T
    norms = truth.diagonal().sqrt()
    # relative to |a_i| |a_j|; allowed are 1e-5, which is 84 ulp, as much as 4 ulp are here
    return 4 / 84 * apart(got, truth, norms[:, None] * norms)
