"""Sample inputs of `velocity_gram` and the error allowed on them, for its tests and its benchmark."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from flowkernels.ops._samples import Sample, arrange, not_none, slices
from flowkernels.ops.velocity_gram import reference


def _inputs(shape: tuple, dtype: torch.dtype, states: bool, generator: torch.Generator) -> tuple:
    """Velocities that change slowly along K, and states that follow them nearly; the shape is v's."""

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    v = (randn(*shape[1:]) + 0.1 * randn(*shape).cumsum(0)).to(dtype)
    if not states:
        return v, None, None
    h = torch.rand(shape[0], generator=generator, dtype=torch.float64) + 0.5
    times = torch.cat([torch.zeros(1, dtype=torch.float64), h.cumsum(0) / h.sum()])
    moves = times.diff().view(-1, *[1] * len(shape[1:])) * (v.double() + 0.1 * randn(*shape))
    x = torch.cat([torch.zeros_like(moves[:1]), moves.cumsum(0)]) + randn(*shape[1:])
    return v, x.to(torch.float64 if dtype == torch.float64 else torch.float32), times


def sample_inputs() -> Iterator[Sample]:
    """Rows around multiples of the 4-row and 2- or 6-column tiles, columns around the vector and the chunk."""
    f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
    g = torch.Generator().manual_seed(0)

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
    """The largest error of `got` against float64, and the largest allowed, both relative to |a_i| |a_j|.

    Allowed: twice the error of the reference in the same dtype, plus in ulp of the dtype that it accumulates in: 2 for
    the two increments and their product, which round to half an ulp each; and for the sum three standard deviations.
    A lane that adds m products is off by about sqrt(m) / 4 half-ulps, `lanes` of them together by sqrt(columns) /
    (4 lanes); the least vector has 2 lanes, and after a chunk of 1,024 columns the sum moves on. What the matrix unit
    leaves out of many columns (csrc/velocity_gram/amx.cpp), products of the low bits of two rows, is allowed as it is.

    What is needed in float64 is summed over pieces of the columns.
    """
    v, x, times = *sample.args, sample.kwargs.get("x"), sample.kwargs.get("times")
    columns = [t if t is None else t.flatten(1) for t in (v, x)]
    pieces = list(slices(columns[0].shape[1], len(v)))

    def summed(gram: Callable[[Tensor, Tensor | None], Tensor]) -> Tensor:
        return sum(gram(*(t if t is None else t[:, piece] for t in columns)) for piece in pieces)

    truth = summed(lambda v, x: reference.velocity_gram(v.double(), None if x is None else x.double(), times))
    norms = truth.diagonal().sqrt()
    scale = (norms[:, None] * norms).clamp(min=torch.finfo(torch.float64).tiny)

    def error(gram):
        worst = ((gram - truth).abs() / scale).max().item() if gram.numel() else 0.0
        return worst if worst == worst else math.inf

    ulp = torch.finfo(torch.float64 if v.dtype == torch.float64 else torch.float32).eps
    floor = 2 + 3 / 16 * math.sqrt(min(v[0].numel(), 1024))
    dropped = 0.0
    if x is None and v.dtype != torch.float64 and len(v) > 64 and v[0].numel() >= 4096:

        def left_out(v: Tensor, _) -> Tensor:
            rows = reference.increments(v, None, None)
            low = rows.double() - rows.bfloat16().double()
            return low @ low.T

        dropped = (summed(left_out).fill_diagonal_(0).abs() / scale).max().item()
    return error(got), 2 * error(reference.velocity_gram(v, x, times)) + floor * ulp + dropped
