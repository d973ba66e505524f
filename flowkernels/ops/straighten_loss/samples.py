"""Sample inputs of `straighten_loss` and the error allowed on them, for its tests and its benchmark."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from flowkernels.ops._samples import Sample, arrange, not_none
from flowkernels.ops.segment_points.samples import places, used
from flowkernels.ops.straighten_loss import StraightenLoss, reference


def sample_inputs() -> Iterator[Sample]:
    """Features around the vectors, the runs of 1,024 and the blocks of 16,384; fewer samples than threads, and more."""
    f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
    g = torch.Generator().manual_seed(0)

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


def parts(sample: Sample, got: StraightenLoss) -> Iterator[tuple[Sample, StraightenLoss]]:
    """The whole, with the part of the bank that is used."""
    v, bank, h, interval, s = sample.args
    smaller, where = used(bank, s)
    yield Sample(sample.id, (v, smaller, h, interval, where), sample.kwargs), got


def _huber_c(sample: Sample) -> float:
    return sample.kwargs.get("huber_c", 0.03) if sample.kwargs["loss"] == "huber" else 0.0


def error_and_bound(sample: Sample, got: StraightenLoss) -> tuple[float, float]:
    """The largest relative error of any loss against float64, and the largest allowed.

    The relative error of a sum of squares is that of its terms: an error e that is the difference of larger terms
    carries theirs. Allowed: twice the error of the reference in the same dtype, plus, in ulp, 2 for the target and the
    difference, relative to their terms and doubled by the square, and 2 for the sum.
    """
    v, bank, h, interval, s = sample.args
    weight, c = sample.kwargs.get("weight"), _huber_c(sample)
    wide = (v.double(), bank.double(), h.double(), interval, s)
    truth = reference.straighten_loss(*wide, weight, c)
    target = reference.errors(torch.zeros_like(v).double(), *wide[1:])
    terms = (v.double().abs() + target.abs()).square().flatten(1).mean(1)
    size = (terms / reference.errors(*wide).square().flatten(1).mean(1)).sqrt().max().item()
    same_dtype = relative_error(reference.straighten_loss(v, bank, h, interval, s, weight, c), truth)
    return relative_error(got, truth), 2 * same_dtype + (4 * size + 2) * torch.finfo(bank.dtype).eps


def relative_error(got, truth) -> float:
    """The largest over losses, samples and intervals; intervals without samples are NaN in both, or it is infinite."""
    worst = 0.0
    for a, b in zip(got, truth, strict=True):
        if not torch.equal(a.isnan(), b.isnan()):
            return math.inf
        difference = ((a.double() - b).abs() / b.abs())[~b.isnan()]
        worst = max(worst, difference.max().item() if difference.numel() else 0.0)
    return worst if worst == worst else math.inf


def gradient_error_and_bound(sample: Sample, gradient: Tensor) -> tuple[float, float]:
    """The same for the gradient, relative to the scale of each sample's error terms `|v| + |target|`."""
    v, bank, h, interval, s = sample.args
    weight, c = sample.kwargs.get("weight"), _huber_c(sample)
    wide = (v.double(), bank.double(), h.double(), interval, s)
    truth = reference.gradient(*wide, weight, c)
    target = reference.errors(torch.zeros_like(v).double(), *wide[1:])
    ratio = truth.flatten(1).norm(dim=1) / reference.errors(*wide).flatten(1).norm(dim=1)
    scale = (v.double().abs() + target.abs()) * ratio.view(-1, *[1] * (v.dim() - 1))

    def error(g):
        worst = ((g.double() - truth).abs() / scale).max().item()
        return worst if worst == worst else math.inf

    bound = 2 * error(reference.gradient(*sample.args, weight, c)) + 4 * torch.finfo(bank.dtype).eps
    return error(gradient), bound + torch.finfo(v.dtype).eps / 2
