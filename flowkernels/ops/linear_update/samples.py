"""Sample inputs of `linear_update` and the error allowed on them, for its tests and its benchmark."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from flowkernels.ops.linear_update import reference
from flowkernels.ops.samples import (
    Sample,
    absolute,
    arrange,
    compared,
    generator,
    lift,
    not_none,
    of_state,
    of_sum,
    pieces,
    rounding,
    step,
)


def sample_inputs() -> Iterator[Sample]:
    """Numbers of terms from one, sizes around the vectors and the four of them that are summed at once."""
    f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
    g = generator()

    def sample(shape, terms, v_dtype, low=None, layout="contiguous", scale=1.0):
        x, *v = (torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(terms + 1))
        x = arrange(x.to(f64 if v_dtype == f64 else f32), layout)
        v = [arrange(t.to(v_dtype), layout) for t in v]
        b = torch.randn(terms, generator=g, dtype=torch.float64).tolist()
        name = f"{'x'.join(map(str, shape)) or 'scalar'}-terms{terms}-{str(v_dtype)[6:]}"
        name += "" if layout == "contiguous" else f"-{layout}"
        name += "" if low is None else f"-low_{str(low)[6:]}"
        name += "" if scale == 1 else f"-scale{scale:g}"
        return Sample(name, (x, v, b), not_none(low=low) | ({} if scale == 1 else dict(scale=scale)))

    for shape, terms in [((), 1), ((0,), 2), ((1,), 16), ((3, 0), 1), ((17,), 1), ((15,), 3), ((63,), 4), ((64,), 1)]:
        yield sample(shape, terms, f32)
    for shape, terms in [((65,), 2), ((127,), 5), ((2, 3, 7, 5), 8), ((16385,), 3), ((5, 6561), 16), ((129,), 40)]:
        yield sample(shape, terms, f32)
    for v_dtype in (f64, bf16, f16):
        yield sample((5, 13), 3, v_dtype)
        yield sample((67,), 4, v_dtype, low=bf16)
        yield sample((129,), 2, v_dtype, low=f16)
    for layout in ("misaligned", "sliced", "permuted", "channels_last", "expanded"):
        yield sample((2, 3, 5, 7), 3, f32, bf16, layout)
    yield sample((2, 3, 5, 7), 3, bf16, bf16, "channels_last")
    for scale, shape, terms, v_dtype in [(0.3, (67,), 4, f32), (0.3, (5, 13), 3, f64), (-1.7, (129,), 40, bf16)]:
        yield sample(shape, terms, v_dtype, bf16, scale=scale)
    yield sample((65,), 1, f16, scale=0.0)
    yield sample((2, 3, 5, 7), 3, f32, f16, "permuted", scale=-0.3)


def to_op(sample: Sample) -> tuple:
    return (*sample.args, sample.kwargs.get("scale", 1.0), sample.kwargs.get("low"))


def from_op(args: tuple) -> Sample:
    *of_function, scale, low = args
    return Sample("from_op", tuple(of_function), dict(scale=scale, **not_none(low=low)))


def parts(sample: Sample, got: Tensor | tuple[Tensor, Tensor]) -> Iterator[tuple[Sample, Tensor | tuple]]:
    x, v, b = sample.args
    low = sample.kwargs.get("low")
    for piece in pieces(x.shape):
        part = x[piece], [t[piece] for t in v], b
        yield Sample(sample.id, part, sample.kwargs), of_state(got, low is not None, piece)


def error_and_bound(sample: Sample, got: Tensor | tuple[Tensor, Tensor]) -> tuple[float, float]:
    """The error of the new state against twice its digits and what is allowed, relative to |scale x| + sum |b_i v_i|.

    Allowed are the roundings of a coefficient, or of the scale, and its product, and of the sum, and as many of the
    smallest numbers. The low-precision copy is to be the new state, rounded: anything else is an infinite error.
    """
    x, v, b = sample.args
    low, scale = sample.kwargs.get("low"), sample.kwargs.get("scale", 1.0)
    state, copy = got if low is not None else (got, None)
    if copy is not None and not torch.equal(copy, state.to(low)):
        return math.inf, 0.0
    wide = lift(x.dtype)
    truth = reference.linear_update(wide(x), [wide(t) for t in v], b, scale)
    size = reference.linear_update(absolute(x), [absolute(t) for t in v], [abs(factor) for factor in b], abs(scale))
    bound = rounding(2 + of_sum(len(b)), x.dtype)
    return compared(state, truth, size, bound, 2 * (len(b) + (scale != 1)) * step(x.dtype) / 2)
