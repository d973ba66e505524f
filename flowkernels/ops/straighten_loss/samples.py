"""Sample inputs of `straighten_loss` and the error allowed on them, for its tests and its benchmark."""

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
    nearest,
    not_none,
    of_products,
    of_sum,
    rounding,
    step,
)
from flowkernels.ops.segment_points.samples import places, used
from flowkernels.ops.straighten_loss import StraightenLosses, reference


def sample_inputs() -> Iterator[Sample]:
    """Features around the vectors, the runs of 1,024 and the blocks of 16,384; fewer samples than threads, and more."""
    f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
    g = generator()

    def sample(shape, batch, loss="l2", v_dtype=f32, weighted=False, layout="contiguous", bank_layout="contiguous"):
        dtype = f64 if v_dtype == f64 else f32
        bank = torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
        v = torch.randn(batch, *shape[2:], generator=g, dtype=torch.float64).to(v_dtype)
        interval, s = places(shape[0], shape[1], batch, g)
        interval[: shape[0] - 1] = torch.arange(shape[0] - 1)  # each one once at least: opcheck compares no NaN
        h = torch.rand(shape[0] - 1, generator=g, dtype=torch.float64) + 0.25
        name = f"{'x'.join(map(str, shape))}-batch{batch}-{loss}-{str(v_dtype)[6:]}"
        kwargs = dict(loss=loss)
        if weighted:
            name, kwargs["weight"] = f"{name}-weighted", torch.rand(batch, generator=g, dtype=torch.float64)
        if layout != "contiguous" or bank_layout != "contiguous":
            name += f"-{layout}-{bank_layout}"
        return Sample(name, (arrange(v, layout), arrange(bank, bank_layout), h, interval, s), kwargs)

    for loss in ("l2", "huber"):
        for shape, batch in [((2, 1, 1), 1), ((4, 3, 15), 5), ((5, 4, 3, 4, 4), 7), ((3, 5, 65), 40)]:
            yield sample(shape, batch, loss)
        for shape, batch in [((3, 2, 1023), 3), ((3, 2, 1089), 2), ((3, 2, 16385), 3), ((2, 2, 33008), 1)]:
            yield sample(shape, batch, loss, weighted=True)
        yield sample((36, 2, 3), 2100, loss, weighted=True)  # the means: of chunks, and of groups of intervals
        for v_dtype in (f64, bf16, f16):
            yield sample((4, 3, 37), 6, loss, v_dtype, True)
            yield sample((2, 4, 3, 8, 8), 1, loss, v_dtype)
        for layouts in [("misaligned", "misaligned"), ("sliced", "permuted"), ("channels_last", "contiguous")]:
            yield sample((4, 3, 3, 5, 7), 9, loss, f32, True, *layouts)
        yield sample((4, 3, 5, 7), 9, loss, bf16, True, "expanded", "sliced")


def to_op(sample: Sample) -> tuple:
    return (*sample.args, sample.kwargs.get("weight"), _huber_c(sample), sample.args[0].requires_grad)


def from_op(args: tuple) -> Sample:
    v, bank, step_sizes, interval, s, weight, c, gradient = args
    kwargs = not_none(weight=weight, loss="huber" if c else "l2", huber_c=c or None)
    return Sample("from_op", (v.detach().requires_grad_(gradient), bank, step_sizes, interval, s), kwargs)


def parts(sample: Sample, got: StraightenLosses) -> Iterator[tuple[Sample, StraightenLosses]]:
    """The whole, with the part of the bank that is used."""
    v, bank, h, interval, s = sample.args
    smaller, where = used(bank, s)
    yield Sample(sample.id, (v, smaller, h, interval, where), sample.kwargs), got


def _huber_c(sample: Sample) -> float:
    return sample.kwargs.get("huber_c", 0.03) if sample.kwargs["loss"] == "huber" else 0.0


def _truth(sample: Sample) -> tuple[tuple, Tensor, Tensor]:
    """The arguments in twice the digits, `|v| + |target|` and the roundings of each sample's loss.

    A target and its difference from v pass through 5 roundings (difference, h, its inverse, product, difference). The
    square doubles that relative error of the sum of squares, `size` times as large where v and target nearly agree;
    the sum and six more operations, pseudo-Huber's among them, round beside it.
    """
    v, bank, h, interval, s = sample.args
    wide = lift(bank.dtype)
    args = wide(v), wide(bank), wide(h), interval, s
    error = absolute(reference.errors(*args))
    terms = absolute(v) + absolute(reference.errors(args[0] * 0.0, *args[1:]))
    size = terms.flatten(1).norm(dim=1) / error.flatten(1).norm(dim=1)
    return args, terms, 10 * size + of_products(terms[:1].numel()) + 6


def error_and_bound(sample: Sample, got: StraightenLosses) -> tuple[float, float]:
    """The relative error of a loss against twice its digits and what is allowed.

    Allowed are the roundings of the sample's loss (`_truth`), and in the means over samples those of the worst of them,
    2 of its weight, those of the sum and 1 of the division.
    """
    args, _, roundings = _truth(sample)
    weight, dtype = sample.kwargs.get("weight"), sample.args[1].dtype
    truth = reference.straighten_loss(*args, None if weight is None else lift(dtype)(weight), _huber_c(sample))
    bounds = roundings * torch.finfo(dtype).eps / 2
    means = (roundings.max().item() + of_sum(len(bounds)) + 3) * torch.finfo(dtype).eps / 2
    pairs = []
    for found, exact, bound in zip(got, truth, (means, bounds, means), strict=True):
        drawn = ~absolute(exact).isnan()  # an interval without samples has no mean
        if not torch.equal(found.isnan(), ~drawn):
            return math.inf, 0.0
        bound = bound[drawn] if isinstance(bound, Tensor) else bound
        pairs.append(compared(found[drawn], exact[drawn], absolute(exact)[drawn], bound))
    return nearest(*pairs)


def gradient_error_and_bound(sample: Sample, gradient: Tensor) -> tuple[float, float]:
    """The same for the gradient, relative to the scale of each sample's error terms `|v| + |target|`.

    Allowed are the 5 roundings of a sample's error, 6 of its factor, with pseudo-Huber those of the sample's loss,
    and that of the gradient in v's dtype, whose smallest numbers are half a step off.
    """
    args, terms, roundings = _truth(sample)
    (v, bank), weight, c = sample.args[:2], sample.kwargs.get("weight"), _huber_c(sample)
    truth = reference.gradient(*args, None if weight is None else lift(bank.dtype)(weight), c)
    error = absolute(reference.errors(*args)).flatten(1).norm(dim=1)
    each = -1, *[1] * (v.dim() - 1)
    scale = terms * (absolute(truth).flatten(1).norm(dim=1) / error).view(each)
    bound = (11 + (roundings.view(each) if c else 0.0)) * torch.finfo(bank.dtype).eps / 2
    if v.dtype != bank.dtype:
        bound = bound + rounding(1, v.dtype)
    return compared(gradient, truth, scale, bound, step(v.dtype) / 2)
