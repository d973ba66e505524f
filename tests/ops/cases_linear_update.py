"""What the tests of all ops ask about this one: see ops_cases.py."""

import torch
from ops_cases import LOW, STATES, Accesses, Call, apart, pieces

import flowkernels as fk
from flowkernels.runtime.backends import backend

CALLS = {
    "linear_update": Call(
        lambda x, v, w: fk.linear_update(x, [v, w], [0.5, 2.0], scale=-2.0, low=torch.bfloat16), ((3, 5),) * 3
    ),
    "linear_update_out": Call(
        lambda x, v, out: fk.linear_update(x, [v], [0.5], out=out, low=torch.bfloat16), ((3, 5),) * 3, written=(2,)
    ),
}
GRADIENTS = (0, 1)
LARGE_BYTES = 4 + 2 + 4


def accesses():
    x, *v = torch.randn(6, 4096)
    b = [0.1, 0.2, 0.3, 0.4, 0.5]
    yield Accesses(fk.linear_update, (x, v, b), {}, {})
    # A thread that takes 16 bytes of bfloat16 takes 32 of float32, in two requests that share every sector. Two groups
    # of elements a thread, as euler_step has, would be in each of the sums over terms, and the state is one of many.
    halves = {"load_vector(sum, x + at)": 2.0, "store_vector(out + at, sum)": 2.0}
    yield Accesses(fk.linear_update, (x, [t.bfloat16() for t in v], b), dict(low=torch.bfloat16), halves)


def guarded(page) -> None:
    for x_dtype, v_dtype in STATES:
        for n in range(1, 36):
            x, out = (page(torch.ones(n, dtype=x_dtype)) for _ in range(2))
            v, u = (page(torch.ones(n, dtype=v_dtype)) for _ in range(2))
            for low in LOW:
                fk.linear_update(x, [v, u, v], [0.25, 0.5, -0.25], out=out, low=page(torch.ones(n, dtype=low)))
                assert out.eq(1.5).all()


def large(device, n: int, on: str = "cuda") -> float:
    x, v = torch.rand(n, device=device), torch.rand(n, device=device, dtype=torch.bfloat16)
    with backend(on):
        out = fk.linear_update(x, [v, v], [0.5, -0.25], scale=0.75)
    return max(apart(out[p], 0.75 * x[p].double() + 0.25 * v[p].double(), x[p] + v[p].float() + 1) for p in pieces(n))
