"""The multistep update `scale * x + sum b_i v_i`."""

from collections.abc import Iterator

import torch

from flowkernels.bench.case import SMALL, Case, Small, Work, kernel, ours
from flowkernels.ops.linear_update import linear_update
from flowkernels.ops.linear_update.samples import Sample, error_and_bound

from .euler_step import in_pieces


def in_place(x, v, b, scale=1.0):
    out = x.clone() if scale == 1 else scale * x
    for term, factor in zip(v, b, strict=True):
        out.add_(term, alpha=factor)
    return out


def as_sum(x, v, b, scale=1.0):
    x = x if scale == 1 else scale * x
    for term, factor in zip(v, b, strict=True):
        x = x + factor * term
    return x


def cases(device) -> Iterator[Case]:
    def case(n, terms, dtype=torch.float32, scale=1.0, **which):
        def make():
            x, *v = (torch.randn(n, device=device) for _ in range(terms + 1))
            v, b = [t.to(dtype) for t in v], [(-1) ** i / (i + 1) for i in range(terms)]
            compiled = torch.compile(as_sum)

            def check(got):
                def error(a, r):
                    return error_and_bound(Sample("", (a[0], a[1:], b), dict(scale=scale)), r[0])

                return in_pieces([x, *v], [got], error)

            return Work(
                ours(lambda: linear_update(x, v, b, scale=scale), device)
                | {"torch eager": lambda: in_place(x, v, b, scale), "torch compile": lambda: compiled(x, v, b, scale)},
                check,
                moved=n * (8 + terms * v[0].element_size()),
            )

        curves = {"elements of all terms, float32": n * terms} if dtype == torch.float32 and scale == 1 else {}
        name = f"{n >> 10} Ki elements, {terms} terms, {str(dtype)[6:]}" + (f", scale {scale:g}" if scale != 1 else "")
        return Case(name, n * terms, make, **which, curves=curves)

    yield case(1 << 22, 16, main=True)
    yield case(1 << 22, 16, torch.bfloat16, main=True)
    yield case(1 << 24, 4)
    yield case(1 << 20, 16)
    yield case(1 << 20, 4, scale=0.7)
    yield case(1 << 18, 4, quick=True)
    yield case(1 << 16, 8)


def small(device) -> Small:
    x, *v = (torch.randn(SMALL, device=device) for _ in range(5))
    b = [0.1, -0.2, 0.3, 0.4]
    sample = Sample("", (x, v, b), {})
    inner = kernel("linear_update", x, v, b, 1.0, None)
    return Small(
        lambda: linear_update(x, v, b),
        lambda: inner()[0],
        lambda: in_place(x, v, b),
        lambda got: error_and_bound(sample, got),
    )
