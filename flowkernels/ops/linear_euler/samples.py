"""Sample inputs of `linear_euler` and the error allowed on them, for its tests and its benchmark."""

import inspect
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from flowkernels.ops.linear_euler import reference
from flowkernels.ops.samples import (
    Sample,
    absolute,
    arrange,
    closeness,
    compared,
    generator,
    lift,
    not_none,
    of_state,
    of_sum,
    rounding,
    slices,
)

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
HEAD = tuple(inspect.signature(reference.head_velocity).parameters)[3:]  # of the arguments, those of the velocity


def make(
    shape,
    d,
    tokens=(),
    *,
    dtype=F32,
    parameters=None,
    options="",
    patch=None,
    order="pqc",
    extra=0,
    guidance=None,
    terms=0,
    x_scale=1.0,
    low=None,
    layout="contiguous",
    mean=0.0,
    seed=0,
) -> Sample:
    """x `[*shape]` and tokens of d features.

    parameters: dtype of the weights, the tokens' if None. options: of "bias", "norm", "affine", "scale", "shift" and
    "shared", one row of modulation for all samples. extra: channels that are no velocity. mean: of the tokens.
    """
    g = generator(seed)
    parameters, options = parameters or dtype, options.split()

    def randn(*size, dtype=parameters):
        return torch.randn(size, generator=g, dtype=F64).to(dtype)

    n = shape[0]
    m = n if guidance is None else 2 * n
    outputs = math.prod(shape[1:]) // max(1, math.prod(tokens)) or 5
    if patch:
        tokens, outputs = ((shape[2] // patch) * (shape[3] // patch),), (shape[1] + extra) * patch**2
    state = F64 if dtype == F64 else F32
    x = arrange(randn(*shape, dtype=state), layout)
    z = (3 * randn(m, *tokens, d, dtype=F64) + mean).to(dtype)
    weight = (randn(outputs, d, dtype=F64) / math.sqrt(d)).to(parameters)
    given = dict(patch=patch, guidance=guidance, low=low, order=None if order == "pqc" else order)
    if "bias" in options:
        given["bias"] = randn(outputs)
    if "norm" in options:
        given["norm"] = 1e-6
    if "affine" in options:
        given |= dict(norm_weight=1 + randn(d) / 4, norm_bias=randn(d))
    for name in {"scale", "shift"} & set(options):
        given[name] = arrange(randn(1 if "shared" in options else m, d) / 2, layout)
    if terms:
        given["history"] = [arrange(randn(*shape, dtype=dtype), layout) for _ in range(terms)]
        given["b"] = randn(terms, dtype=F64).tolist()
    if x_scale != 1:
        given["x_scale"] = x_scale
    name = f"{'x'.join(map(str, (*shape, '', *tokens, d)))}-{str(dtype)[6:]}"
    for part in (
        *options,
        *((f"patch{patch}{order}{'+' * bool(extra)}",) if patch else ()),
        *((f"guided{guidance:g}",) if guidance is not None else ()),
        *((f"terms{terms}",) if terms else ()),
        *((f"xscale{x_scale:g}",) if x_scale != 1 else ()),
        *((f"low_{str(low)[6:]}",) if low else ()),
        *((str(parameters)[6:] + "_weights",) if parameters != dtype else ()),
        *((layout,) if layout != "contiguous" else ()),
        *((f"mean{mean:g}",) if mean else ()),
    ):
        name += f"-{part}"
    weight, z = arrange(weight, layout), arrange(z, layout)
    return Sample(name, (x, z, weight, 0.375), {k: v for k, v in given.items() if v is not None})


def sample_inputs() -> Iterator[Sample]:
    """Features around the vectors, tokens around the tiles, outputs around the columns of a tile; every option."""
    for shape, d, tokens in [((0, 3), 4, ()), ((1, 1), 1, ()), ((2, 0), 3, (0,)), ((1, 64), 16, ()), ((5, 7), 15, ())]:
        yield make(shape, d, tokens)
    for shape, d, tokens in [((3, 6), 17, (2,)), ((33, 13), 33, ()), ((2, 65, 2), 64, (65,)), ((4, 18), 129, (3,))]:
        yield make(shape, d, tokens, options="bias")
    yield make((2, 5, 3, 4), 65, (5, 3), options="bias norm")
    yield make((1, 300), 40, (2,), options="bias norm affine")
    yield make((3, 64), 1152, (4,), options="norm scale shift")
    every = "bias norm affine scale shift"
    yield make((2, 4, 8, 12), 31, patch=2, options=every)
    yield make((2, 3, 6, 10), 48, patch=1, options="bias scale")
    yield make((1, 2, 9, 6), 20, patch=3, order="cpq", options="norm shift shared")
    yield make((3, 1, 2, 70), 20, patch=2, options="bias")
    for dtype in (F64, BF16, F16):
        yield make((5, 7), 15, dtype=dtype)
        yield make((2, 4, 6, 8), 70, dtype=dtype, patch=2, extra=4, guidance=4.0, options=every, low=BF16)
        yield make((2, 3, 4, 8), 64, dtype=dtype, patch=2, order="cpq", guidance=0.0, terms=3, options="norm")
        yield make((3, 30), 257, (5,), dtype=dtype, options="bias norm scale shift", low=F16)
    for dtype in (BF16, F16):
        yield make((2, 40), 130, (4,), dtype=dtype, parameters=F32, options=every)
    yield make((3, 4, 4, 4), 36, patch=2, extra=1, order="cpq", guidance=1.5, options=every, terms=1, low=F16)
    yield make((2, 10), 33, (2,), guidance=-2.0, options="bias", terms=2)
    for layout in ("misaligned", "sliced", "permuted"):
        yield make((2, 2, 4, 6), 18, patch=2, guidance=3.0, options="norm scale shift", terms=1, layout=layout)
        yield make((3, 12), 21, (4,), dtype=BF16, options="bias scale shift shared", low=BF16, layout=layout)
    for dtype in (F32, BF16):
        yield make((2, 24), 96, (6,), dtype=dtype, options="bias norm", mean=100.0)
    # many tokens of a sample, whose features a GPU takes in slices: rows and features past the last tile and chunk
    yield make((1, 65, 20), 136, (65,), dtype=BF16, options=every, low=F16)
    yield make((2, 4, 16, 16), 72, patch=2, guidance=4.0, options="bias norm scale shift", terms=1, low=BF16)
    yield make((1, 64, 5), 200, (64,), dtype=F16, options="norm shift shared", mean=100.0)
    yield make((1, 64, 3), 2112, (64,), dtype=BF16, parameters=F32, options="norm scale", mean=-30.0)
    yield make((1, 64, 70), 264, (64,), options="norm affine")
    yield make((2, 3, 16, 16), 64, dtype=BF16, patch=2, extra=1, order="cpq", guidance=0.5, options="scale")
    yield make((3, 12), 40, (4,), terms=2, x_scale=0.3, low=BF16)
    yield make((3, 12), 40, (4,), dtype=F64, terms=1, x_scale=-1.7)
    yield make((2, 2, 4, 6), 18, dtype=BF16, patch=2, guidance=3.0, x_scale=0.0)
    yield make((1, 64, 5), 200, (64,), dtype=F16, options="norm", terms=20, x_scale=-0.3)
    for modulation in ("shift", "scale"):  # with the affine map, whose parameters may be combined with it
        yield make((3, 12), 40, (4,), dtype=BF16, options=f"norm affine {modulation}")


def to_op(sample: Sample) -> tuple:
    (x, z, weight, h), k = sample.args, sample.kwargs
    names = ("bias", "norm", "norm_weight", "norm_bias", "scale", "shift", "patch")
    step = (k.get("order", "pqc"), k.get("guidance"), h, k.get("history", []), k.get("b", []))
    return (x, z, weight, *map(k.get, names), *step, k.get("x_scale", 1.0), k.get("low"))


def from_op(args: tuple) -> Sample:
    h, history, b, x_scale, low = args[12:]
    kwargs = dict(zip(HEAD, args[3:12], strict=True), history=history or None, b=b or None)
    return Sample("from_op", (*args[:3], h), not_none(**kwargs, x_scale=x_scale, low=low))


def parts(sample: Sample, got: Tensor | tuple[Tensor, Tensor]) -> Iterator[tuple[Sample, Tensor | tuple]]:
    (x, z, weight, h), k = sample.args, sample.kwargs
    n, guided, low = len(x), k.get("guidance") is not None, k.get("low")
    for piece in slices(n, z[:1].numel() + x[:1].numel()):

        def rows(t: Tensor, piece=piece) -> Tensor:
            return torch.cat([t[:n][piece], t[n:][piece]]) if guided else t[piece]

        kwargs = k | {name: rows(k[name]) for name in ("scale", "shift") if name in k and len(k[name]) > 1}
        if "history" in k:
            kwargs["history"] = [t[piece] for t in k["history"]]
        yield Sample(sample.id, (x[piece], rows(z), weight, h), kwargs), of_state(got, low is not None, piece)


def compiled_inputs() -> Iterator[Sample]:
    """Of all choices of types and options, each its own kernel in Triton, those that its targets are compiled for."""
    every = "bias norm affine scale shift"
    for dtype in (F32, BF16):
        yield make((2, 64), 64, dtype=dtype, options="bias norm scale shift")
    yield make((2, 4, 6, 8), 64, dtype=BF16, patch=2, guidance=4.0, options=every, terms=1, low=BF16)
    yield make((2, 3, 4, 8), 64, dtype=F16, parameters=F32, patch=2, order="cpq", guidance=0.5)
    yield make((5, 64), 64, dtype=F16, options="bias", low=F16)
    yield make((2, 4, 6, 8), 64, dtype=F64, patch=2, guidance=4.0, options=every, terms=1, low=BF16)


def error_and_bound(sample: Sample, got: Tensor | tuple[Tensor, Tensor]) -> tuple[float, float]:
    """The error of the new state against twice its digits and what is allowed, relative to the sum's terms.

    The terms are |x_scale x|, |b_i v_i|, and |h| times the products of |f| and |W| with guidance's |u| + |w| (|v| +
    |u|), where |f| counts what LayerNorm subtracts before it divides. Allowed are the roundings that one of them passes
    through (`_roundings`), and those of the sum of d products. Partial sums of terms of both signs wander by sqrt(d) of
    one while they grow evenly to their end: six standard deviations are 3 half-ulps of the terms' sizes and, in two
    lanes, sqrt(d) of the product itself. Where terms are not of that kind the reference in the same dtype shows it: if
    it takes more than half of what is allowed, twice what it takes is. The low-precision copy is to be the new state,
    rounded: anything else is an infinite error.
    """
    x, z, weight, h = sample.args
    given, low = dict(sample.kwargs), sample.kwargs.get("low")
    state, copy = got if low is not None else (got, None)
    if copy is not None and not torch.equal(copy, state.to(low)):
        return math.inf, 0.0
    if x.numel() == 0:
        return 0.0, 0.0
    history, b, x_scale = given.get("history", ()), given.get("b", ()), given.get("x_scale", 1.0)
    head = {k: given[k] for k in HEAD if k in given}

    def lifted(to: Callable) -> tuple:
        tensors = x, z, weight
        return *map(to, tensors), {k: to(v) if isinstance(v, Tensor) else v for k, v in head.items()}

    wide = lift(x.dtype)
    *of_head, options = lifted(wide)
    velocity = reference.head_velocity(*of_head, **options)
    truth = reference.linear_euler(of_head[0], velocity, h, [wide(t) for t in history], b, x_scale)
    *of_head, options = lifted(Tensor.double)
    size = _scale(*of_head, options)
    terms = [absolute(t) for t in history], [abs(c) for c in b], abs(x_scale)
    scale = reference.linear_euler(absolute(x), size, abs(h), *terms)
    w = options.pop("guidance", None)
    ends = reference.head_velocity(*of_head, **options).abs()
    ends = ends if w is None else _guided(ends, w)
    bound = rounding(_roundings(given) + of_sum(1 + len(b)), x.dtype)
    least = rounding(math.sqrt(weight.shape[1]), x.dtype) * abs(h) * ends

    expected = reference.linear_euler(x, reference.head_velocity(x, z, weight, **head), h, history, b, x_scale)
    factor = max(1.0, 2 * closeness(compared(expected, truth, scale, bound, least)))
    return compared(state, truth, scale, factor * bound, factor * least)


def _roundings(given: dict) -> int:
    """That a product f W passes through on its way into the state, and other half-ulps of its relative error."""
    return (
        (3 + 1 + 2)  # the sum of products (above); the product; h and the step
        + 4  # what a matrix unit leaves out of numbers in parts (csrc/linear_euler/cuda.cu): below 2^-22
        + 5 * ("norm" in given)  # difference, quotient, and three of the quotient's divisor
        + 4 * ("norm" in given)  # sums of its mean and squares, which average as that of products does
        + sum(name in given for name in ("norm_weight", "norm_bias", "shift", "bias"))
        + 2 * ("scale" in given)
        + 3 * ("guidance" in given)
    )


def _guided(v: Tensor, w: float) -> Tensor:
    """The sizes of guidance's terms, of those of its velocities."""
    v, u = v.chunk(2)
    return u + abs(w) * (v + u)


def of_velocity(sample: Sample) -> Sample:
    """The sample whose new state is the velocity of this one, that `velocity_out` stores: a step of 1 from 0."""
    x, z, weight, _ = sample.args
    head = {name: sample.kwargs[name] for name in HEAD if name in sample.kwargs}
    return Sample(sample.id, (torch.zeros_like(x), z, weight, 1.0), head)


def _scale(x: Tensor, z: Tensor, weight: Tensor, head: dict) -> Tensor:
    """|v| of absolute terms, in float64."""
    f = z.reshape(len(z), -1, z.shape[-1]).abs()
    terms = {k: v.abs() if isinstance(v, Tensor) else v for k, v in head.items()}
    if head.get("norm") is not None:
        spread = (z.reshape(f.shape).var(-1, unbiased=False, keepdim=True) + terms.pop("norm")).sqrt()
        f = (f + z.reshape(f.shape).mean(-1, keepdim=True).abs()) / spread
        f = f * terms.pop("norm_weight", 1) + terms.pop("norm_bias", 0)
    w = terms.pop("guidance", None)
    v = reference.head_velocity(x, f, weight.abs(), **terms)
    return v if w is None else _guided(v, w)
