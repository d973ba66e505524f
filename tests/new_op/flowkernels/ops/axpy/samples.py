"""Inputs of `axpy` and the error allowed on them."""

from collections.abc import Iterator

import torch
from flowkernels.ops.axpy import reference

from flowkernels.ops.samples import Sample, arrange, compared, generator, rounding, step


def sample_inputs() -> Iterator[Sample]:
    g = generator()
    for shape in ((0,), (1,), (3, 5), (7, 31), (2, 64), (65, 3), (255,), (256,), (257,), (1000,)):
        yield Sample(str(shape), (torch.randn(shape, generator=g), torch.randn(shape, generator=g), 0.37), {})
    sliced = (arrange(torch.randn(4, 6, generator=g), "sliced") for _ in range(2))
    yield Sample("sliced", (*sliced, -2.5), {})


def error_and_bound(sample: Sample, got: torch.Tensor) -> tuple[float, float]:
    x, y, a = sample.args
    scale = x.double().abs() + abs(a) * y.double().abs()
    return compared(got, reference.axpy(x.double(), y.double(), a), scale, rounding(3, x.dtype), step(x.dtype))


def to_op(sample: Sample) -> tuple:
    return sample.args


def from_op(args: tuple) -> Sample:
    return Sample("", tuple(args), {})
