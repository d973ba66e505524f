"""Sample inputs of `euler_step` and the error allowed on them, for its tests and its benchmark."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from flowkernels.ops.euler_step import reference
from flowkernels.ops.samples import (
    Sample,
    absolute,
    arrange,
    compared,
    generator,
    lift,
    not_none,
    of_state,
    pieces,
    rounding,
    step,
)


def sample_inputs() -> Iterator[Sample]:
    """Sizes around the vectors of 4, 8 and 16 lanes and around the 16,384 elements of a thread."""
    f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
    g = generator()

    def sample(shape, v_dtype, guidance=None, low=None, layouts=("contiguous",) * 3):
        x, v, u = (torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(3))
        x = arrange(x.to(f64 if v_dtype == f64 else f32), layouts[0])
        v, u = arrange(v.to(v_dtype), layouts[1]), arrange(u.to(v_dtype), layouts[2])
        name = f"{'x'.join(map(str, shape)) or 'scalar'}-{str(v_dtype)[6:]}"
        if set(layouts) != {"contiguous"}:
            name += "-" + "-".join(dict.fromkeys(layouts))
        kwargs = {}
        if guidance is not None:
            name, kwargs = f"{name}-w{guidance}", dict(v_uncond=u, guidance=guidance)
        if low is not None:
            name, kwargs = f"{name}-low_{str(low)[6:]}", dict(kwargs, low=low)
        return Sample(name, (x, v, 0.37), kwargs)

    for shape in [(), (0,), (1,), (3,), (4,), (15,), (16,), (17,), (3, 0, 5), (2, 3, 7, 5), (16385,), (5, 6561)]:
        yield sample(shape, f32)
    yield sample((33,), f32, 3.5, bf16)
    yield sample((0,), bf16, 3.5, bf16)
    for v_dtype in (f64, bf16, f16):
        yield sample((1,), v_dtype)
        yield sample((5, 13), v_dtype, 7.5)
        yield sample((31,), v_dtype, low=bf16)
        yield sample((33,), v_dtype, -1.5, f16)
    yield sample((16385,), bf16, 2.0, bf16)

    same = ["misaligned", "sliced", "permuted", "channels_last"]
    for layouts in [(s, s, s) for s in same] + [
        ("contiguous", "permuted", "contiguous"),
        ("channels_last", "contiguous", "channels_last"),
        ("permuted", "expanded", "sliced"),
        ("expanded", "misaligned", "expanded"),
    ]:
        yield sample((2, 3, 5, 7), f32, 2.0, bf16, layouts)
    for layouts in [("misaligned",) * 3, ("sliced", "channels_last", "permuted")]:
        yield sample((2, 3, 5, 7), bf16, 2.0, bf16, layouts)


def to_op(sample: Sample) -> tuple:
    k = sample.kwargs
    return (*sample.args, k.get("v_uncond"), k.get("guidance", 1.0), k.get("low"))


def from_op(args: tuple) -> Sample:
    x, v, h, v_uncond, guidance, low = args
    return Sample("from_op", (x, v, h), not_none(v_uncond=v_uncond, guidance=guidance, low=low))


def parts(sample: Sample, got: Tensor | tuple[Tensor, Tensor]) -> Iterator[tuple[Sample, Tensor | tuple]]:
    x, v, h = sample.args
    u, low = sample.kwargs.get("v_uncond"), sample.kwargs.get("low")
    for piece in pieces(x.shape):
        kwargs = sample.kwargs if u is None else sample.kwargs | dict(v_uncond=u[piece])
        yield Sample(sample.id, (x[piece], v[piece], h), kwargs), of_state(got, low is not None, piece)


def error_and_bound(sample: Sample, got: Tensor | tuple[Tensor, Tensor]) -> tuple[float, float]:
    """The error of the new state against twice its digits and what is allowed, relative to the formula's terms.

    The terms are `|x| + |h| (|u| + |w| (|v| + |u|))`. Allowed are the roundings that one of them passes through, 3 (h
    in the state's dtype, product, sum) or with guidance 7 (w, difference, product and sum more), and as many of the
    smallest numbers. The low-precision copy is to be the new state, rounded: anything else is an infinite error.
    """
    x, v, h = sample.args
    u, w, low = (sample.kwargs.get(k) for k in ("v_uncond", "guidance", "low"))
    w = 1.0 if w is None else w
    state, copy = got if low is not None else (got, None)
    if copy is not None and not torch.equal(copy, state.to(low)):
        return math.inf, 0.0
    wide = [None if t is None else lift(x.dtype)(t) for t in (x, v, u)]
    truth = reference.euler_step(wide[0], wide[1], h, wide[2], w)
    base = 0.0 if u is None else absolute(u)
    scale = absolute(x) + abs(h) * (base + abs(w) * (absolute(v) + base))
    roundings = 3 if u is None else 7
    return compared(state, truth, scale, rounding(roundings, x.dtype), roundings * step(x.dtype) / 2)
