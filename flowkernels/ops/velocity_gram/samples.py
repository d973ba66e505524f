"""Sample inputs of `velocity_gram` and the error allowed on them, for its tests and its benchmark."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from flowkernels.ops._wide import Wide
from flowkernels.ops.samples import (
    Sample,
    absolute,
    arrange,
    compared,
    generator,
    lift,
    not_none,
    of_products,
    rounding,
    slices,
    step,
)
from flowkernels.ops.velocity_gram import reference


def _inputs(shape: tuple, dtype: torch.dtype, states: bool, g: torch.Generator) -> tuple:
    """Velocities that change slowly along K, and states that follow them nearly; the shape is v's."""

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    v = (randn(*shape[1:]) + 0.1 * randn(*shape).cumsum(0)).to(dtype)
    if not states:
        return v, None, None
    h = torch.rand(shape[0], generator=g, dtype=torch.float64) + 0.5
    times = torch.cat([torch.zeros(1, dtype=torch.float64), h.cumsum(0) / h.sum()])
    moves = times.diff().view(-1, *[1] * len(shape[1:])) * (v.double() + 0.1 * randn(*shape))
    x = torch.cat([torch.zeros_like(moves[:1]), moves.cumsum(0)]) + randn(*shape[1:])
    return v, x.to(torch.float64 if dtype == torch.float64 else torch.float32), times


def sample_inputs() -> Iterator[Sample]:
    """Rows around multiples of the 4-row and 2- or 6-column tiles, columns around the vector and the chunk."""
    f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
    g = generator()

    def sample(shape, dtype, states=False, layout="contiguous", x_layout="contiguous"):
        v, x, times = _inputs(shape, dtype, states, g)
        name = f"{'x'.join(map(str, shape))}-{str(dtype)[6:]}"
        if layout != "contiguous" or x_layout != "contiguous":
            name += f"-{layout}"
        if x is None:
            return Sample(name, (arrange(v, layout),), {})
        return Sample(f"{name}-states-{x_layout}", (arrange(v, layout),), dict(x=arrange(x, x_layout), times=times))

    for shape in [(1, 2, 3), (2, 1, 1), (4, 0, 8), (4, 1, 15), (5, 4, 4), (6, 1, 17), (7, 3, 21), (8, 5, 13)]:
        yield sample(shape, f32)
    for shape in [(9, 3, 341), (13, 4, 256), (14, 5, 205), (25, 3, 683), (26, 5, 819)]:
        yield sample(shape, f32)
    for shape, dtype in [((66, 2, 2051), f32), ((82, 1, 4096), bf16), ((97, 3, 1401), f16)]:  # for the matrix unit
        yield sample(shape, dtype)
    for dtype in (f64, bf16, f16):
        for shape in [(2, 1, 1), (6, 3, 11), (8, 2, 1, 8), (14, 5, 205)]:
            yield sample(shape, dtype)
    for layout in ("misaligned", "sliced", "permuted", "reversed", "channels_last", "expanded"):
        yield sample((7, 3, 5, 3, 11), f32, layout=layout)
    for layout in ("misaligned", "sliced", "channels_last"):
        yield sample((7, 3, 5, 3, 11), bf16, layout=layout)

    for shape in [(1, 1, 1), (2, 0, 3), (2, 3, 5), (3, 1, 16), (7, 5, 205)]:
        yield sample(shape, f32, states=True)
    for dtype in (f64, bf16, f16):
        yield sample((4, 3, 43), dtype, states=True)
    for layout, x_layout in [("channels_last", "contiguous"), ("sliced", "misaligned"), ("expanded", "permuted")]:
        yield sample((4, 3, 5, 3, 11), f32, states=True, layout=layout, x_layout=x_layout)


def to_op(sample: Sample) -> tuple:
    return (*sample.args, sample.kwargs.get("x"), sample.kwargs.get("times"))


def from_op(args: tuple) -> Sample:
    v, x, times = args
    return Sample("from_op", (v,), not_none(x=x, times=times))


def error_and_bound(sample: Sample, got: Tensor) -> tuple[float, float]:
    """The error of `got` against twice its digits and what is allowed, both relative to |a_i| |a_j|."""
    if not got.numel():
        return 0.0, 0.0
    truth, scale, allowed = truth_and_allowed(sample)
    return compared(got, truth, scale, 0.0, allowed)


def truth_and_allowed(sample: Sample) -> tuple[Tensor | Wide, Tensor, Tensor]:
    """The truth, |a_i| |a_j|, and what an entry may be off by.

    In half-ulps of the dtype that sums are made in: 2 of the two increments; those of the sum of products
    (`of_products`), in float64 also of a sum over runs of 1,024 columns; and products of the smallest numbers. Rows
    from states are formed in float64 with four roundings of their secants, which may be much larger than the rows.

    A matrix unit (velocity_gram/cuda.cu, triton_kernel.py) takes numbers in two parts of 11 bits, which leaves 3
    half-ulps out of a product, and cuts instead of rounding, groups of 8 products and the sum so far. Of 32 columns'
    four groups of high parts that takes 4 half-ulps on average of a sum that has grown to a quarter, a half, three
    quarters and all of it, and of each of 12 groups one half-ulp of the sum, half of it there on average: 16 in all.
    What that of AMX leaves out of many columns (velocity_gram/amx.cpp), products of the low bits of two rows, is
    allowed as it is.

    Truth is summed over pieces of the columns.
    """
    v, x, times = *sample.args, sample.kwargs.get("x"), sample.kwargs.get("times")
    v, x = (t if t is None else t.flatten(1) for t in (v, x))
    columns, wide = v.shape[1], lift(v.dtype)
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    on_amx = x is None and dtype == torch.float32 and len(v) > 64 and columns >= 4096
    truth, dropped, subtracted = 0.0, 0.0, 0.0
    for piece in slices(columns, len(v)):
        from_states = (None, None) if x is None else (wide(x[:, piece]), wide(times))
        truth = reference.velocity_gram(wide(v[:, piece]), *from_states) + truth
        if x is not None:
            subtracted = _subtracted(v[:, piece].double(), x[:, piece].double(), times) + subtracted
        if on_amx:
            rows = reference.increments(v[:, piece], None, None)
            low = rows.double() - rows.bfloat16().double()
            dropped = low @ low.T + dropped
    roundings = 2 + of_products(columns)
    if dtype == torch.float64:
        roundings += 2 * math.sqrt(columns // 1024)
    elif x is None:
        roundings += 3 + min(16, 3 + columns / 2)
    norms = absolute(truth).diagonal().sqrt()
    scale = norms[:, None] * norms
    allowed = rounding(roundings, dtype) * scale + columns * step(dtype) / 2
    if x is not None:
        off = rounding(4, torch.float64) * subtracted.sqrt()
        allowed = allowed + off[:, None] * norms + norms[:, None] * off + off[:, None] * off
    return truth, scale, allowed + dropped.fill_diagonal_(0).abs() if on_amx else allowed


def _subtracted(v: Tensor, x: Tensor, times: Tensor) -> Tensor:
    """The squared length, for each row from states, of the sizes of what is subtracted in it."""
    secants = x.diff(dim=0).abs() / times.diff().to(x.device)[:, None]
    return torch.cat([secants[1:] + secants[:-1], secants + v.abs()]).square().sum(1)
