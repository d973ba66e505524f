"""The Gram matrix of velocity increments, over K, over n * D and over threads."""

from collections.abc import Iterator

import torch

from flowkernels.bench.case import SMALL, Case, Small, Work, kernel, ours
from flowkernels.ops.velocity_gram import velocity_gram
from flowkernels.ops.velocity_gram.samples import Sample, error_and_bound


def velocities(K: int, n: int, D: int, device, dtype=torch.float32) -> torch.Tensor:
    """`[K, n, D]` that change slowly along K, as a flow's do."""
    g = torch.Generator().manual_seed(0)
    v = torch.randn(n, D, generator=g).repeat(K, 1, 1)
    for k in range(1, K):
        v[k] = v[k - 1] + 0.1 * torch.randn(n, D, generator=g)
    return v.to(device, dtype)


def gram(v: torch.Tensor) -> torch.Tensor:
    """The best formulation in torch of equal accuracy: differences first, then one matrix product."""
    a = v.flatten(1).float().diff(dim=0)
    return (a @ a.T).double()


def cases(device) -> Iterator[Case]:
    def case(K, n, D, dtype=torch.float32, threads=None, **which):
        def make():
            v = velocities(K, n, D, device, dtype)
            compiled = torch.compile(gram)
            return Work(
                ours(lambda: velocity_gram(v), device)
                | {"torch eager": lambda: gram(v), "torch compile": lambda: compiled(v)},
                lambda got: error_and_bound(Sample("", (v,), {}), got),
                moved=v.nbytes,
                flops=K * (K - 1) * n * D,  # each pair of increments once
                unit=str(dtype)[6:],
            )

        name = f"K={K}, n={n}, D={D}, {str(dtype)[6:]}" + ("" if threads is None else f", {threads} threads")
        curves = {}
        if dtype == torch.float32 and threads is None and D == 3072:
            curves = ({"n * D, K=100": n * D} if K == 100 else {}) | ({"K, n * D=76800": K} if n == 25 else {})
        elif threads is not None:
            curves = {"threads, K=100, n * D=76800": threads}
        return Case(name, K * n * D, make, threads, **which, curves=curves)

    yield case(100, 100, 3072, quick=True, main=True)
    yield case(100, 100, 3072, torch.bfloat16, main=True)
    yield case(100, 100, 3072, torch.float16)
    yield case(256, 100, 3072)
    for n in (1, 10, 400):
        yield case(100, n, 3072, quick=n == 1)
    for K in (16, 32, 64, 100, 160, 256, 400):
        yield case(K, 25, 3072)
    yield case(50, 256, 64)
    for threads in (1, 2) if device.type == "cpu" else ():
        yield case(100, 25, 3072, threads=threads)


def small(device) -> Small:
    v = torch.randn(10, *SMALL, device=device)
    return Small(
        lambda: velocity_gram(v),
        kernel("velocity_gram", v, None, None),
        lambda: gram(v),
        lambda got: error_and_bound(Sample("", (v,), {}), got),
    )
