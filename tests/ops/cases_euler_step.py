"""What the tests of all ops ask about this one: see ops_cases.py."""

import torch
from ops_cases import LOW, STATES, Accesses, Call, apart, pieces

import flowkernels as fk
from flowkernels.runtime.backends import backend

CALLS = {
    "euler_step": Call(
        lambda x, v, u: fk.euler_step(x, v, 0.25, v_uncond=u, guidance=2.0, low=torch.bfloat16), ((3, 5),) * 3
    ),
    "euler_step_out": Call(
        lambda x, v, out: fk.euler_step(x, v, 0.25, out=out, low=torch.bfloat16), ((3, 5),) * 3, written=(2,)
    ),
}
GRADIENTS = (0, 1, 3)
LARGE_BYTES = 4 + 2 + 4


def accesses():
    x, v, u = torch.randn(3, 4096)
    yield Accesses(fk.euler_step, (x, v, 0.1), {}, {})
    yield Accesses(fk.euler_step, (x.double(), v.double(), 0.1), dict(v_uncond=u.double(), guidance=2.0), {})
    yield Accesses(fk.euler_step, (x, v.bfloat16(), 0.1), dict(low=torch.bfloat16), {})


def guarded(page) -> None:
    for x_dtype, v_dtype in STATES:
        for n in range(1, 36):
            x, out = (page(torch.ones(n, dtype=x_dtype)) for _ in range(2))
            v, u = (page(torch.ones(n, dtype=v_dtype)) for _ in range(2))
            for low in LOW:
                low = page(torch.ones(n, dtype=low))
                fk.euler_step(x, v, 0.5, v_uncond=u, guidance=2.0, out=out, low=low)
                assert out.eq(1.5).all()


def large(device, n: int, on: str = "cuda") -> float:
    x, v = torch.rand(n, device=device), torch.rand(n, device=device, dtype=torch.bfloat16)
    with backend(on):
        out = fk.euler_step(x, v, 0.5)
    return max(apart(out[p], x[p].double() + 0.5 * v[p].double(), x[p] + v[p].float() + 1) for p in pieces(n))
