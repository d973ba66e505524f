"""`linear_euler` in Triton.

Memory bound on z. LayerNorm's statistics are one pass over the tokens, the product is another, from the caches. Tensor
cores multiply 16-bit numbers: float32 is cut into bfloat16 parts that add up to it exactly, on every GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flowkernels.ops import triton_common
from flowkernels.ops.linear_euler import OP, _dense
from flowkernels.ops.triton_common import convert, product, scalar

# ROWS of tokens, with guidance half of them unconditional, and BLOCK_D features at a time: each warp multiplies its own
# of them. Few rows: there are to be programs for every multiprocessor. One configuration for each size of weights.
CONFIGS = {
    "linear_euler": {"ROWS": 16, "BLOCK_D": 128, "num_warps": 4, "num_stages": 2},
    "linear_euler_float32": {"ROWS": 16, "BLOCK_D": 128, "num_warps": 8, "num_stages": 2},
    "linear_euler_float64": {"ROWS": 16, "BLOCK_D": 128, "num_warps": 8, "num_stages": 1},
}
SEARCH = {  # a warp's features are at least 16
    "linear_euler": {"ROWS": (16, 32), "BLOCK_D": (128, 256), "num_warps": (2, 4, 8), "num_stages": (1, 2, 3)},
    "linear_euler_float32": {"ROWS": (16, 32), "BLOCK_D": (128, 256), "num_warps": (4, 8), "num_stages": (1, 2, 3)},
    "linear_euler_float64": {"BLOCK_D": (64, 128), "num_warps": (2, 4, 8)},
}
OF_WEIGHTS = {torch.float32: "linear_euler_float32", torch.float64: "linear_euler_float64"}
MOST_OUTPUTS = {2: 64, 4: 32, 8: 32}  # of a program, by the size of weights: those of float32 are three numbers each
MOST_TERMS = 8  # of the history


@triton.jit
def _quotient(a, b):
    if a.dtype == tl.float32:
        return tl.div_rn(a, b)  # of float32, `/` is an approximation
    return a / b


@triton.jit
def _statistics(
    z,  # [ROWS, 1] pointers to rows
    d,
    eps,
    dtype: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """LayerNorm's mean of the rows, and 1 / their deviation: of each lane's features as they come, by Welford's update,
    which subtracts a mean before it squares, and from the lanes' those of the rows."""
    lane = tl.arange(0, BLOCK_D)[None, :]
    mean = tl.zeros((z.shape[0], BLOCK_D), dtype)
    square = tl.zeros((z.shape[0], BLOCK_D), dtype)
    steps = tl.zeros((1, 1), dtype)
    for first in tl.range(0, d, BLOCK_D, num_stages=4):
        steps += 1
        share = _quotient(tl.full(steps.shape, 1, dtype), steps)
        within = first + lane < d
        v = tl.load(z + first + lane, mask=within, other=0).to(dtype)
        deviation = tl.where(within, v - mean, 0)
        mean += deviation * share
        square += deviation * (v - mean)
    count = ((d - lane + BLOCK_D - 1) // BLOCK_D).to(dtype)
    features = tl.full((z.shape[0], 1), d, dtype)
    center = _quotient(tl.sum(product(mean, count), axis=1, keep_dims=True), features)
    mean -= center
    variance = _quotient(tl.sum(square + count * mean * mean, axis=1, keep_dims=True), features) + scalar(eps, dtype)
    deviation = tl.sqrt_rn(variance) if dtype == tl.float32 else tl.sqrt(variance)
    return center, _quotient(tl.full(deviation.shape, 1, dtype), deviation)


@triton.jit
def _parts(v):
    """bfloat16 numbers that add up to v, its upper 8 bits first: three of float32, two of float16."""
    COUNT: tl.constexpr = 1 if v.dtype == tl.bfloat16 else 2 if v.dtype == tl.float16 else 3
    v = v.to(tl.float32)
    parts = ()
    for _ in tl.static_range(COUNT):
        bits = v.to(tl.uint32, bitcast=True)
        parts += ((bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True),)
        v -= (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return parts


@triton.jit
def _add_product(
    sums,  # [GROUPS, ROWS, BLOCK_O]
    f,  # [GROUPS, ROWS, BLOCK_D / GROUPS]
    w,  # [GROUPS, BLOCK_D / GROUPS, BLOCK_O]
):
    """sums + f w, of parts that are not below 2^-22 of the first."""
    total = tl.zeros(sums.shape, sums.dtype)
    if f.dtype == w.dtype and f.dtype != tl.float32:
        total = tl.dot(f, w, total, out_dtype=sums.dtype)
    else:
        fs, ws = _parts(f), _parts(w)
        for order in tl.static_range(2, -1, -1):  # the small ones first
            for i in tl.static_range(len(fs)):
                if order >= i and order - i < len(ws):
                    total = tl.dot(fs[i], ws[order - i], total)
    # Tensor cores round their sums toward zero: those of these features are added to the others by an addition that
    # rounds to nearest. Written as `+` it would become a part of the product.
    return tl.fma(total, tl.full(sums.shape, 1, sums.dtype), sums)


@triton.jit(do_not_specialize=["n", "T", "C", "H", "W"])
def linear_euler_kernel(
    x,  # [n, T * outputs], or [n, C, H, W] with patches; float32 or float64
    z,  # [m, T, d], m = n or with guidance 2n
    z_sample,  # elements between samples
    z_token,  # and between tokens
    weight,  # [outputs, d]
    weight_row,  # elements between rows
    bias,  # [outputs] or None
    eps,  # of LayerNorm, or None
    scale,  # [m, d] or None: f (one + scale) + shift
    scale_row,  # elements between rows, of which a shared one has none
    shift,  # [m, d], None without scale
    shift_row,
    one,  # or 0
    guidance,  # or None
    h,
    history,  # of x's shape
    b,  # a number for each
    x_scale,  # of x, or None: a product with 1 could be contracted with the sum
    out,  # of x's shape and type
    low,  # of x's shape, or None
    velocity,  # of x's shape, or None; may be one of history
    n,
    T,
    d,
    outputs,
    C,
    H,
    W,
    PATCH: tl.constexpr,  # side of the patches, or None
    ORDER: tl.constexpr,  # "pqc" or "cpq"
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INDEX: tl.constexpr,  # type of the number of a token
    GROUPS: tl.constexpr,  # of the features: a warp's own
    BLOCK_O: tl.constexpr,
):
    dtype: tl.constexpr = x.dtype.element_ty
    BLOCK_T: tl.constexpr = ROWS if guidance is None else ROWS // 2
    n, T = n.to(INDEX), T.to(INDEX)
    first_token = tl.program_id(0).to(INDEX) * BLOCK_T
    tokens = n * T
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)[None, :]

    # rows of conditional tokens, then of the same unconditional ones; past the last token: it once more
    row = tl.arange(0, ROWS)[:, None]
    token = tl.minimum(first_token + row % BLOCK_T, tokens - 1)
    sample = (token // T + row // BLOCK_T * n).to(tl.int64)
    z += sample * z_sample + (token % T).to(tl.int64) * z_token
    if scale is not None:
        scale += sample * scale_row
        shift += sample * shift_row
    weight += o.to(tl.int64) * weight_row
    if eps is not None:
        mean, inverse = _statistics(z, d, eps, dtype, BLOCK_D)

    sums = tl.zeros((GROUPS, ROWS, BLOCK_O), dtype)
    group = tl.arange(0, GROUPS)[:, None, None] * (BLOCK_D // GROUPS)
    member = tl.arange(0, BLOCK_D // GROUPS)
    for first in range(0, d, BLOCK_D):
        i = first + group + member[None, None, :]
        f = tl.load(z[None, :, :] + i, mask=i < d, other=0)
        if eps is not None:
            f = (f.to(dtype) - mean[None, :, :]) * inverse[None, :, :]
        if scale is not None:
            factor = scalar(one, dtype) + tl.load(scale[None, :, :] + i, mask=i < d, other=0).to(dtype)
            f = f.to(dtype) * factor + tl.load(shift[None, :, :] + i, mask=i < d, other=0).to(dtype)
        i = first + group + member[None, :, None]
        w = tl.load(weight[None, :, :] + i, mask=(i < d) & (o < outputs)[None, :, :], other=0)
        sums = _add_product(sums, f, w)
    v = tl.sum(sums, axis=0)
    if bias is not None:
        v += tl.load(bias + o, mask=o < outputs, other=0).to(dtype)
    if guidance is not None:
        v, base = tl.split(v.reshape(2, BLOCK_T, BLOCK_O).permute(1, 2, 0))
        v = base + scalar(guidance, dtype) * (v - base)

    # where the outputs lie in the state
    token = first_token + tl.arange(0, BLOCK_T)[:, None]
    exists = (token < tokens) & (o < outputs)
    if PATCH is None:
        at = token.to(tl.int64) * outputs + o
    else:
        if ORDER == "cpq":
            channel, p, q = o // (PATCH * PATCH), o // PATCH % PATCH, o % PATCH
        else:
            channels = outputs // (PATCH * PATCH)
            channel, p, q = o % channels, o // channels // PATCH, o // channels % PATCH
        exists &= channel < C
        across = W.to(INDEX) // PATCH
        down, right = token % T // across * PATCH + p, token % T % across * PATCH + q
        at = (((token // T).to(tl.int64) * C + channel) * H + down) * W + right

    state = tl.load(x + at, mask=exists, other=0)
    if x_scale is not None:
        state *= scalar(x_scale, dtype)
    state += scalar(h, dtype) * v
    for k in tl.static_range(len(history)):
        state += scalar(b[k], dtype) * tl.load(history[k] + at, mask=exists, other=0).to(dtype)
    tl.debug_barrier()  # all threads have read x and the history, which may be what is written
    tl.store(out + at, state, mask=exists)
    if low is not None:
        tl.store(low + at, convert(state, low.dtype.element_ty), mask=exists)
    if velocity is not None:
        tl.store(velocity + at, v.to(velocity.dtype.element_ty), mask=exists)


def _launch(x, z, weight, bias, norm, norm_weight, norm_bias, scale, shift, patch, order, guidance, h, history, b,
            x_scale, out, low, velocity_out) -> None:  # fmt: skip
    if x.numel() == 0:
        return
    z = _dense(z if z.dim() < 4 else z.flatten(1, -2))
    T, z_token = (1, 0) if z.dim() == 2 else (z.shape[1], z.stride(1))
    weight, bias = _dense(weight), bias if bias is None else _dense(bias)
    scale, shift, one = _modulation(x.dtype, norm_weight, norm_bias, scale, shift)
    x_scale = None if x_scale == 1 else x_scale
    if x_scale is not None and len(history) > MOST_TERMS:
        x, x_scale = x_scale * x, None
    for term, factor in zip(history[MOST_TERMS:], b[MOST_TERMS:], strict=True):
        x = torch.add(x, term, alpha=factor)
    x, dtype = x.contiguous(), x.dtype
    history = tuple(t.contiguous() for t in history[:MOST_TERMS])
    given = (out, low, velocity_out)
    to = [t if t is None or t.is_contiguous() else OP.empty(t) for t in given]

    def numbers(value):
        return None if value is None else triton_common.parts(value, dtype)

    config = triton_common.config_of(CONFIGS, OF_WEIGHTS.get(weight.dtype, "linear_euler"))
    (n, d), outputs = (len(x), z.shape[-1]), len(weight)
    block = min(MOST_OUTPUTS[weight.element_size()], max(16, triton.next_power_of_2(outputs)))
    index = tl.int32 if 2 * n * T + 64 < 2**31 else tl.int64  # a division of the latter is a call of a function
    halves = 1 if guidance is None else 2
    grid = (triton.cdiv(halves * n * T, config["ROWS"]), triton.cdiv(outputs, block))
    triton_common.launch(
        linear_euler_kernel, grid, x, z, z.stride(0), z_token, weight, weight.stride(0), bias, numbers(norm),
        scale, _row(scale), shift, _row(shift), numbers(one), numbers(guidance), numbers(h), history,
        tuple(map(numbers, b[:MOST_TERMS])), numbers(x_scale), *to, n, T, d, outputs,
        *((0, 0, 0) if patch is None else x.shape[1:]),
        on=x, config=config, PATCH=patch, ORDER=order, INDEX=index, GROUPS=config["num_warps"], BLOCK_O=block,
    )  # fmt: skip
    for t, written in zip(given, to, strict=True):
        if t is not written:
            t.copy_(written)


linear_euler, linear_euler_out = OP.on_triton(_launch)


def _row(t: Tensor | None) -> int:
    """Elements from one row of modulation to the next, of which a shared one has none."""
    return 0 if t is None or len(t) == 1 else t.stride(0)


def _modulation(dtype, norm_weight, norm_bias, scale, shift) -> tuple[Tensor | None, Tensor | None, float]:
    """scale, shift and one such that LayerNorm's affine map and the modulation after it are `f (one + scale) + shift`:
    the affine map as a row of modulation, with both a row of their product for every sample."""
    one = 1.0
    if norm_weight is not None or norm_bias is not None:
        gain = 1.0 if scale is None else 1 + scale.to(dtype)
        if norm_bias is not None:
            norm_bias = norm_bias[None] if scale is None else norm_bias * gain
            shift = norm_bias if shift is None else norm_bias.to(dtype) + shift
        if norm_weight is not None:
            one, scale = 0.0, norm_weight[None] if scale is None else norm_weight * gain
    if scale is None and shift is None:
        return None, None, one
    scale, shift = (torch.zeros_like(other[:1]) if t is None else t for t, other in ((scale, shift), (shift, scale)))
    return _dense(scale), _dense(shift), one
