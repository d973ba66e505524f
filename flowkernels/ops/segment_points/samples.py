"""Sample inputs of `segment_points` and the error allowed on them, for its tests and its benchmark."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from flowkernels.ops.samples import (
    Sample,
    absolute,
    arrange,
    compared,
    generator,
    lift,
    not_none,
    rounding,
    slices,
    step,
)
from flowkernels.ops.segment_points import reference


def places(knots: int, n: int, batch: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random intervals and samples, `[batch]` each."""
    return torch.randint(knots - 1, (batch,), generator=g), torch.randint(n, (batch,), generator=g)


def sample_inputs() -> Iterator[Sample]:
    """Features around the vectors and the 16,384 elements of a block; repeated places; no u, and u at both ends."""
    f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
    g = generator()

    def sample(shape, batch, u=None, dtype=None, bank_dtype=f32, layout="contiguous"):
        bank = arrange(torch.randn(shape, generator=g, dtype=torch.float64).to(bank_dtype), layout)
        interval, s = places(shape[0], max(shape[1], 1), batch, g)
        where = None if u is None else torch.rand(batch, generator=g, dtype=torch.float64).to(u)
        if where is not None and batch > 2:
            where[0], where[1] = 0, 1
        name = f"{'x'.join(map(str, shape))}-batch{batch}-{str(bank_dtype)[6:]}-u_{str(u)[6:] or 'none'}"
        name += "" if dtype is None else f"-to_{str(dtype)[6:]}"
        name += "" if layout == "contiguous" else f"-{layout}"
        return Sample(name, (bank, interval, s, where), {} if dtype is None else dict(dtype=dtype))

    for shape, batch in [((2, 1, 1), 1), ((3, 2, 0), 4), ((3, 2, 5), 0), ((4, 3, 15), 5), ((5, 4, 16), 7)]:
        yield sample(shape, batch)
        yield sample(shape, batch, f32)
    for shape, batch in [((3, 5, 2, 3, 3), 40), ((3, 2, 16383), 2), ((3, 2, 16385), 3), ((2, 2, 33008), 1)]:
        yield sample(shape, batch, f32)
    yield sample((5, 7, 3, 8, 8), 33, f64)
    for dtype in (bf16, f16):
        yield sample((4, 3, 37), 6, f32, dtype)
        yield sample((4, 3, 64), 6, None, dtype)
        yield sample((4, 3, 64), 6, f32, dtype)
        yield sample((4, 3, 37), 6, dtype, dtype, f64)
    yield sample((4, 3, 37), 6, f64, None, f64)
    for layout in ("misaligned", "sliced", "permuted", "expanded"):
        yield sample((4, 3, 5, 7), 9, f32, layout=layout)


def to_op(sample: Sample) -> tuple:
    bank, interval, s, u = (*sample.args, None)[:4]
    return (bank, interval, s, u, sample.kwargs.get("dtype") or bank.dtype)


def from_op(args: tuple) -> Sample:
    *of_function, dtype = args
    return Sample("from_op", tuple(of_function), not_none(dtype=dtype if dtype != args[0].dtype else None))


def used(bank: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """The bank with those of its samples alone that are used, and their new places."""
    kept, places = s.unique(return_inverse=True)
    return bank[:, kept], places


def parts(sample: Sample, got: Tensor) -> Iterator[tuple[Sample, Tensor]]:
    bank, interval, s, u = sample.args
    for piece in slices(len(s), len(bank) * math.prod(bank.shape[2:])):
        smaller, places = used(bank, s[piece])
        args = smaller, interval[piece], places, None if u is None else u[piece]
        yield Sample(sample.id, args, sample.kwargs), got[piece]


def error_and_bound(sample: Sample, got: Tensor) -> tuple[float, float]:
    """The error against twice the digits and what is allowed, relative to `|x_a| + u (|x_a| + |x_b|)`.

    Allowed are four roundings in the bank's dtype, of u, the difference, the product and the sum; without u none. A
    result of lower precision adds its own, and half a step of its smallest numbers.
    """
    bank, interval, s, u = sample.args
    dtype = sample.kwargs.get("dtype") or bank.dtype
    if got.dtype != dtype or not got.is_contiguous():
        return math.inf, 0.0
    wide = lift(bank.dtype)
    truth = reference.segment_points(wide(bank), interval, s, None if u is None else wide(u))
    a, b = absolute(bank[interval, s]), absolute(bank[interval + 1, s])
    scale = a if u is None else a + absolute(u).view(-1, *[1] * (a.dim() - 1)) * (a + b)
    bound, least = (0.0, 0.0) if u is None else (rounding(4, bank.dtype), 4 * step(bank.dtype) / 2)
    if dtype != bank.dtype:
        bound, least = bound + (1 + bound) * rounding(1, dtype), least + step(dtype) / 2
    return compared(got, truth, scale, bound, least)
