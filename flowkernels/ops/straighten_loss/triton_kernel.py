"""`straighten_loss` in Triton.

A program holds the errors of a sample that is not too long, or of several short ones, until their sums are there, and
writes the gradient in the same pass. A longer sample is cut in parts: the gradient of the squared error is written as
they are summed, that of pseudo-Huber needs the sum first, and forms the errors again.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from flowkernels.ops import triton_common
from flowkernels.ops.segment_points.triton_kernel import place
from flowkernels.ops.straighten_loss import _fake
from flowkernels.ops.triton_common import product, scalar

HELD = ("straighten_loss_short", "straighten_loss_medium", "straighten_loss_held")  # by rising COLS, the most features
MOST_PARTS, SMALLEST_PART = 1024, 2048  # programs enough for the largest devices, with work enough for each

CONFIGS = {
    "straighten_loss_short": {"ROWS": 8, "COLS": 64, "num_warps": 4},
    "straighten_loss_medium": {"ROWS": 1, "COLS": 1024, "num_warps": 4},
    "straighten_loss_held": {"ROWS": 1, "COLS": 4096, "num_warps": 8},
    "straighten_loss_part": {"BLOCK": 1024, "num_warps": 4},
    "straighten_loss_join": {"BLOCK": MOST_PARTS, "num_warps": 4},
    "straighten_loss_gradient": {"BLOCK": 1024, "num_warps": 4},
    "straighten_loss_mean": {"BLOCK": 1024, "num_warps": 4},
}
SEARCH = {
    "straighten_loss_short": {"ROWS": (4, 8, 16, 32), "num_warps": (2, 4, 8)},
    "straighten_loss_medium": {"ROWS": (1, 2, 4), "num_warps": (2, 4, 8)},
    "straighten_loss_held": {"num_warps": (4, 8, 16)},
    "straighten_loss_part": {"BLOCK": (512, 1024, 2048), "num_warps": (2, 4, 8)},
    "straighten_loss_gradient": {"BLOCK": (512, 1024, 2048), "num_warps": (2, 4, 8)},
}


@triton.jit
def _divide(a, b):  # Triton's own division of float32 is off by an ulp or two
    if b.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def _root(x):
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def _place(interval, sample, step_sizes, row, B, knots, samples):
    """For each row of the batch the row of x_a in the bank, 1 / h (NaN if nowhere), and whether the bank has them."""
    i, start, inside = place(interval, sample, row, B, knots, samples)
    h = tl.load(step_sizes + i, mask=inside, other=float("nan"))
    return start, _divide(tl.full((), 1, h.dtype), h), inside


@triton.jit
def _errors(v, bank, at, row, col, mask, samples, D):
    """`v - (x_b - x_a) / h` in the columns of the mask, else 0; NaN in rows that are nowhere in the bank."""
    start, inverse, inside = at
    first, second = bank + start * D + col, bank + (start + samples) * D + col
    target = tl.load(second, mask=mask & inside) - tl.load(first, mask=mask & inside)
    velocity = tl.load(v + row * D + col, mask=mask).to(target.dtype)
    return tl.where(mask, velocity - target * inverse, 0)


@triton.jit
def _sample_loss(sum, features, c):
    """From the sum of a sample's squared errors; with c > 0 pseudo-Huber, written so that nothing cancels."""
    square = _divide(sum, scalar(features, sum.dtype))
    return tl.where(c > 0, _divide(square, _root(square + c * c) + c), square)


@triton.jit
def _share(weight, row, mask, elements, dtype: tl.constexpr):
    """Of a row in the mean over all elements."""
    w = tl.full((), 1, dtype) if weight is None else tl.load(weight + row, mask=mask)
    return _divide(w, scalar(elements, dtype))


@triton.jit
def _add(total, lost, x):
    """A sum with what its roundings lose."""
    new = total + x
    added = new - total
    return new, lost + ((total - (new - added)) + (x - added))


@triton.jit
def _sum(total, lost):
    return tl.sum(tl.where(lost == lost, total + lost, total))  # Inf has lost NaN


@triton.jit
def straighten_loss_held_kernel(
    v,  # [B, D]
    bank,  # [knots, samples, D] float32 or float64
    step_sizes,  # [knots - 1], the bank's type
    interval,  # [B] int64
    sample,  # [B] int64
    weight,  # [B] of the bank's type, or None
    huber_c,  # 0: squared error
    features,  # D as a number
    elements,  # B D as a number
    per_sample,  # [B] out, the bank's type
    gradient,  # [B, D] out, v's type, or None
    knots,
    samples,
    B,
    D,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    dtype: tl.constexpr = bank.dtype.element_ty
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    col = tl.arange(0, COLS)[None, :]
    mask = (row < B) & (col < D)
    at = _place(interval, sample, step_sizes, row, B, knots, samples)
    e = _errors(v, bank, at, row, col, mask, samples, D)
    c = scalar(huber_c, dtype)
    loss = _sample_loss(tl.sum(product(e, e), 1, keep_dims=True), features, c)
    tl.store(per_sample + row, loss, mask=row < B)
    if gradient is not None:
        share = _share(weight, row, row < B, elements, dtype)
        scale = tl.where(c > 0, _divide(share, loss + c), 2 * share)
        tl.store(gradient + row * D + col, (scale * e).to(gradient.dtype.element_ty), mask=mask)


@triton.jit
def straighten_loss_part_kernel(
    v,  # [B, D]
    bank,  # [knots, samples, D]
    step_sizes,  # [knots - 1]
    interval,  # [B]
    sample,  # [B]
    weight,  # [B] or None
    huber_c,
    features,
    elements,
    sums,  # [B, parts] out; unused with one part
    per_sample,  # [B] out, with one part
    gradient,  # [B, D] out, of the squared error, or None
    knots,
    samples,
    B,
    D,
    parts,
    part,  # elements of each but the last, a multiple of BLOCK
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = bank.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    row, begin = program // parts, program % parts * part
    at = _place(interval, sample, step_sizes, row, B, knots, samples)
    scale = 2 * _share(weight, row, row < B, elements, dtype)
    total, lost = tl.zeros((BLOCK,), dtype), tl.zeros((BLOCK,), dtype)
    for first in range(begin, tl.minimum(begin + part, D), BLOCK):
        col = first + tl.arange(0, BLOCK)
        e = _errors(v, bank, at, row, col, col < D, samples, D)
        total, lost = _add(total, lost, e * e)
        if gradient is not None:
            tl.store(gradient + row * D + col, (scale * e).to(gradient.dtype.element_ty), mask=col < D)
    sum = _sum(total, lost)
    if parts == 1:
        tl.store(per_sample + row, _sample_loss(sum, features, scalar(huber_c, dtype)))
    else:
        tl.store(sums + program, sum)


@triton.jit
def straighten_loss_join_kernel(
    sums,  # [B, parts]
    huber_c,
    features,
    per_sample,  # [B] out
    parts,
    BLOCK: tl.constexpr,  # at least as many
):
    row, part = tl.program_id(0), tl.arange(0, BLOCK)
    sum = tl.sum(tl.load(sums + row * parts + part, mask=part < parts, other=0))
    tl.store(per_sample + row, _sample_loss(sum, features, scalar(huber_c, sum.dtype)))


@triton.jit
def straighten_loss_gradient_kernel(
    v,  # [B, D]
    bank,  # [knots, samples, D]
    step_sizes,  # [knots - 1]
    interval,  # [B]
    sample,  # [B]
    weight,  # [B] or None
    huber_c,
    elements,
    per_sample,  # [B]
    gradient,  # [B, D] out
    knots,
    samples,
    B,
    D,
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = bank.dtype.element_ty
    chunks = tl.cdiv(D, BLOCK)
    program = tl.program_id(0).to(tl.int64)
    row, col = program // chunks, program % chunks * BLOCK + tl.arange(0, BLOCK)
    at = _place(interval, sample, step_sizes, row, B, knots, samples)
    e = _errors(v, bank, at, row, col, col < D, samples, D)
    share = _share(weight, row, row < B, elements, dtype)
    scale = _divide(share, tl.load(per_sample + row) + scalar(huber_c, dtype))
    tl.store(gradient + row * D + col, (scale * e).to(gradient.dtype.element_ty), mask=col < D)


@triton.jit
def straighten_loss_mean_kernel(
    per_sample,  # [B]
    interval,  # [B]
    weight,  # [B] or None
    loss,  # [] out
    per_interval,  # [knots - 1] out
    knots,
    B,
    BLOCK: tl.constexpr,
):
    """A program for the mean over each interval's samples, and the last for the weighted one over all."""
    dtype: tl.constexpr = per_sample.dtype.element_ty
    own = tl.program_id(0)
    total, lost, count = tl.zeros((BLOCK,), dtype), tl.zeros((BLOCK,), dtype), tl.zeros((BLOCK,), tl.int32)
    for first in range(0, B, BLOCK):
        row = first + tl.arange(0, BLOCK)
        x = tl.load(per_sample + row, mask=row < B, other=0)
        if own < knots - 1:
            mine = tl.load(interval + row, mask=row < B, other=-1) == own
        else:
            mine = row < B
            if weight is not None:
                x *= tl.load(weight + row, mask=mine, other=0)
        total, lost = _add(total, lost, tl.where(mine, x, 0))
        count += mine.to(tl.int32)
    mean = _divide(_sum(total, lost), tl.sum(count).to(dtype))  # 0 / 0 is the NaN of an interval that was not drawn
    if own < knots - 1:
        tl.store(per_interval + own, mean)
    else:  # no choice of pointers: Triton 3.6 does not compile one for AMD
        tl.store(loss, mean)


def straighten_loss(v, bank, step_sizes, interval, sample, weight, huber_c, gradient) -> tuple[Tensor, ...]:
    v, bank, interval, sample = v.contiguous(), bank.contiguous(), interval.contiguous(), sample.contiguous()
    step_sizes = step_sizes.to(bank.dtype).contiguous()
    weight = None if weight is None else weight.to(bank.dtype).contiguous()
    loss, each, means, grad = _fake(v, bank, step_sizes, interval, sample, weight, huber_c, gradient)
    (knots, samples), B, D = bank.shape[:2], len(v), math.prod(v.shape[1:])
    c, features, elements = (triton_common.parts(float(number), bank.dtype) for number in (huber_c, D, B * D))
    inputs, sizes = (v, bank, step_sizes, interval, sample, weight), (knots, samples, B, D)

    def launch(kernel, name, programs, *args):
        triton_common.launch(kernel, (programs,), *args, on=v, config=triton_common.config_of(CONFIGS, name))

    held = next((name for name in HELD if triton_common.config_of(CONFIGS, name)["COLS"] >= D), None)
    if B == 0:
        pass
    elif held:
        rows = triton_common.config_of(CONFIGS, held)["ROWS"]
        out = (each, grad if gradient else None)
        launch(straighten_loss_held_kernel, held, triton.cdiv(B, rows), *inputs, c, features, elements, *out, *sizes)
    else:
        parts = max(1, min(MOST_PARTS // B, D // SMALLEST_PART))
        block = triton_common.config_of(CONFIGS, "straighten_loss_part")["BLOCK"]
        part = triton.cdiv(triton.cdiv(D, parts), block) * block
        sums = bank.new_empty(B * parts) if parts > 1 else None
        out = (sums, each, grad if gradient and huber_c == 0 else None)
        numbers = (c, features, elements)
        name = "straighten_loss_part"
        launch(straighten_loss_part_kernel, name, B * parts, *inputs, *numbers, *out, *sizes, parts, part)
        if parts > 1:
            launch(straighten_loss_join_kernel, "straighten_loss_join", B, sums, c, features, each, parts)
        if gradient and huber_c > 0:
            name = "straighten_loss_gradient"
            programs = B * triton.cdiv(D, triton_common.config_of(CONFIGS, name)["BLOCK"])
            launch(straighten_loss_gradient_kernel, name, programs, *inputs, c, elements, each, grad, *sizes)
    launch(straighten_loss_mean_kernel, "straighten_loss_mean", knots, each, interval, weight, loss, means, knots, B)
    return loss, each, means, grad
