"""The last layer of a velocity network with the step in its epilogue: the velocity never touches memory."""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flowkernels._checks import (
    expect,
    expect_like,
    expect_list,
    expect_low,
    expect_number,
    expect_positive_int,
    expect_shown,
    expect_tensor,
)
from flowkernels.ops._state_op import StateOp, velocity_dtypes
from flowkernels.ops.library import DTYPE_CODES, plain, threads_or
from flowkernels.ops.linear_euler import reference

ORDERS = ("pqc", "cpq")
ONE_OF_ORDERS = " or ".join(map(repr, ORDERS))
NAMES = ("bias", "norm_weight", "norm_bias", "scale", "shift")
TERMS = "a sequence, one entry for each term"


def linear_euler(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    h: float,
    *,
    bias: Tensor | None = None,
    norm: float | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    patch: int | None = None,
    order: str = "pqc",
    guidance: float | None = None,
    history: Sequence[Tensor] = (),
    b: Sequence[float] = (),
    x_scale: float = 1.0,
    out: Tensor | None = None,
    low: torch.dtype | Tensor | None = None,
    velocity_out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`x_scale * x + h v + sum_i b_i v_i` with the velocity head `v = place(f(z) W^T + bias)`, z read once.

    f is `LayerNorm(z)` with `norm`, then `f (1 + scale) + shift`, as in the final layers of DiT, SD3 and Flux; without
    any of these it is z.

    Args:
        x: state `[n, *shape]`, float32 or float64.
        z: tokens `[m, *tokens, d]` or `[m, d]`: float32, bfloat16 or float16; float64 with, and only with, a float64
            state. m is n, or 2n with guidance. Only the last dimension has to be contiguous.
        weight: `[outputs, d]`, in z's dtype or the state's, as are all the parameters that follow.
        h: step size, in units of time: the coefficient of the new velocity.
        bias: `[outputs]`.
        norm: the eps of a LayerNorm over d; None for none. The mean and the squares of deviations are taken in turn, in
            Triton together, by Welford's update.
        norm_weight: factors of its elementwise affine map, `[d]`.
        norm_bias: what that map adds, `[d]`.
        scale: modulation by `1 + scale`, `[m, d]`, or `[1, d]` for all samples.
        shift: what the modulation adds, as `scale`.
        patch: None if the outputs of a sample's tokens, in their order, are the state (Flux's packed latents, a plain
            Linear). Else the side p of the patches of which the tokens are: x is `[n, C, H, W]`, there are
            (H / p) (W / p) tokens, row by row, and each has p p C' outputs, C' >= C: the first C channels are the
            velocity (a DiT that learned sigma has twice as many).
        order: how a patch lies in the outputs of a token: "pqc", the channels next to each other (DiT, SD3, PixArt;
            `nhwpqc->nchpwq`), or "cpq", the pixels of a channel next to each other (CogView3, PRX; `nhwcpq->nchpwq`).
        guidance: the weight w of classifier-free guidance, `v = v_u + w (v_c - v_u)`: z holds the tokens of n
            conditional samples and then those of the n unconditional ones. None for none.
        history: earlier velocities of x's shape and one dtype (float32, bfloat16 or float16; float64 with a float64
            state): the other terms of a multistep update, as in `linear_update`.
        b: as many coefficients.
        x_scale: of x, as `scale` in `linear_update`; a float.
        out: where the new state goes. `out=x` steps in place; None allocates. Other overlap with an input is undefined.
        low: bfloat16 or float16 for a second output, the new state rounded for the next model call; or a tensor of
            that dtype and x's shape to write it to.
        velocity_out: a tensor of x's shape to store v in, guidance applied, of any dtype that `history` may have. It
            may be one of `history`, which is read first.

    It computes in the state's dtype. Without norm and modulation, subnormal bfloat16 tokens and weights count as zero
    on a CPU with AVX512-BF16. There are no gradients; asking for them raises. Inside torch.func's transforms and
    forward-mode differentiation it runs as plain torch.

    Returns:
        The new state, in x's dtype; with `low`, the pair (state, copy).

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Source: Peebles and Xie 2023 (adaLN and the final layer of DiT), with the update of `euler_step` and
    `linear_update`.

    Examples:
        >>> x, tokens = torch.zeros(4, 2), torch.randn(4, 16)
        >>> head = torch.nn.Linear(16, 2).requires_grad_(False)
        >>> step = fk.linear_euler(x, tokens, head.weight, 0.1, bias=head.bias)
        >>> torch.allclose(step, x + 0.1 * head(tokens), atol=1e-6)
        True
    """
    bare = norm is norm_weight is norm_bias is scale is shift is patch is guidance is out is low is velocity_out is None
    if bare and (C := plain("linear_euler", x)) is not None:
        alone = type(history) is type(b) is tuple and not history and not b and type(x_scale) is float and x_scale == 1
        if alone and type(h) is float and type(order) is str and order == "pqc":
            new = OP.made(x)
            gradients, threads = torch.is_grad_enabled(), torch.get_num_threads()
            if C.linear_euler_plain(x, z, weight, bias, h, new, gradients, threads):
                return new
    expect_tensor(x, "x", (torch.float32, torch.float64))
    expect(x.dim() >= 1, "x", "shape [n, *shape]", x)
    expect_tensor(z, "z", velocity_dtypes(x))
    guidance = None if guidance is None else expect_number(guidance, "guidance")
    expect_shown(isinstance(order, str) and order in ORDERS, "order", ONE_OF_ORDERS, order)
    _expect_shapes(x, z, weight, patch, guidance)
    m, d = len(z), z.shape[-1]
    parameters = (bias, norm_weight, norm_bias, scale, shift)
    for name, t in zip(NAMES, parameters, strict=True):
        if t is not None:
            rows = (m, d) if name in ("scale", "shift") else ()
            _expect_parameter(t, name, rows or (len(weight) if name == "bias" else d,), x, z)
    h = expect_number(h, "h")
    if norm is None:
        for name, t in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
            expect(t is None, name, "None without norm", t)
    else:
        norm = expect_number(norm, "norm")
    history, b = _expect_history(history, b, x)
    if type(x_scale) is not float:
        x_scale = expect_number(x_scale, "x_scale")
    expect_low(low, x)
    head = (x, z, weight, bias, norm, norm_weight, norm_bias, scale, shift, patch, order, guidance, h, history, b)
    return OP.call((*head, x_scale), (x, z, weight, *parameters, *history), out, low, (velocity_out,))


def _expect_parameter(t, name: str, shape: tuple[int, ...], x: Tensor, z: Tensor) -> None:
    """A parameter in z's dtype or the state's; of rows `[m, d]`, one may be for all."""
    dense = isinstance(t, Tensor) and t.layout is torch.strided and not t.is_nested
    if not dense or (t.dtype != z.dtype and t.dtype != x.dtype):
        expect_tensor(t, name, tuple(dict.fromkeys((z.dtype, x.dtype))))
    shared = len(shape) == 2 and t.shape == (1, shape[1])
    if (t.shape != shape and not shared) or t.device != x.device:
        either = f" or {[1, shape[1]]}" if len(shape) == 2 else ""
        expect(False, name, f"shape {list(shape)}{either} on {x.device}", t)


def _expect_shapes(x, z, weight, patch, guidance) -> None:
    """That the outputs of z's tokens are the state's elements."""
    if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.numel() == 0:
        expect(False, "weight", "a tensor of shape [outputs, d], not empty", expect_tensor(weight, "weight"))
    _expect_parameter(weight, "weight", weight.shape, x, z)
    outputs, d = weight.shape
    m = len(x) if guidance is None else 2 * len(x)
    if z.dim() < 2 or len(z) != m or z.shape[-1] != d or z.device != x.device:
        halves = "" if guidance is None else ": conditional and unconditional samples"
        expect(False, "z", f"shape [{m}, *tokens, {d}] on {x.device}{halves}", z)
    tokens, expected = math.prod(z.shape[1:-1]), math.prod(x.shape[1:])
    if patch is None:
        if tokens * outputs != expected:
            needed = f"as many outputs as make {expected} elements of a sample of {tokens} tokens"
            expect(False, "weight", needed, weight)
        return
    expect_positive_int(patch, "patch")
    expect(x.dim() == 4 and 0 not in x.shape[1:], "x", "shape [n, C, H, W], of patches", x)
    C, H, W = x.shape[1:]
    if H % patch or W % patch:
        expect(False, "x", f"a height and a width that are multiples of {patch}", x)
    if tokens != (H // patch) * (W // patch):
        expect(False, "z", f"{(H // patch) * (W // patch)} tokens a sample, patches of {patch} of {[H, W]}", z)
    if outputs % patch**2 or outputs < C * patch**2:
        expect(False, "weight", f"{C * patch**2} outputs, {C} channels of a patch, or those of more channels", weight)


def _expect_history(history, b, x) -> tuple[list[Tensor], list[float]]:
    if type(history) is tuple is type(b) and not history and not b:
        return [], []
    history, b = expect_list(history, "history", TERMS), expect_list(b, "b", TERMS)
    allowed = velocity_dtypes(x)
    if len(history) != len(b):
        if history:
            expect_like(expect_tensor(history[0], "history[0]", allowed), "history[0]", x)
        expect(False, "b", f"{len(history)} coefficients, one for each velocity", f"{len(b)}")
    for i, (term, factor) in enumerate(zip(history, b, strict=True)):
        expect_tensor(term, f"history[{i}]", allowed)
        allowed = (term.dtype,)
        expect_like(term, f"history[{i}]", x)
        b[i] = expect_number(factor, f"b[{i}]")
    return history, b


def _rows(t: Tensor | None) -> tuple[int, int, int]:
    """Address, type and the elements between rows, of which a shared one has none."""
    if t is None:
        return 0, 0, 0
    return t.data_ptr(), DTYPE_CODES[t.dtype], 0 if t.dim() < 2 or len(t) == 1 else t.stride(0)


def _dense(t: Tensor) -> Tensor:
    """With the elements of a row side by side."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _for_cuda(operands: list[Tensor | None], state: torch.dtype) -> list[Tensor | None]:
    """The weight and the parameters with d entries in one dtype, and their rows where the kernel can read four
    entries as one word: at multiples of its size, with zeros up to a multiple of 4. Those of most models are so."""
    weight, bias, *parameters = operands
    given = [weight, *(t for t in parameters if t is not None)]
    dtype = weight.dtype if all(t.dtype == weight.dtype for t in given) else state

    def readable(t):
        if t is None:
            return None
        t, d = t.to(dtype), t.shape[-1]
        apart = t.stride(0) if t.dim() == 2 and len(t) > 1 else 0
        if dtype == torch.float64 or (d % 4 == 0 == apart % 4 and t.data_ptr() % (4 * t.element_size()) == 0):
            return t
        padded = t.new_zeros(*t.shape[:-1], -(-d // 4) * 4)
        padded[..., :d] = t
        return padded

    return [readable(weight), bias, *map(readable, parameters)]


@functools.lru_cache(4096)
def _workspace_bytes(C, *args) -> int:
    return C.linear_euler_workspace(*args)


def _workspace(C, z, operands, norm, guidance, size, device) -> Tensor | None:
    """Memory for the sums of slices of the features, for a call whose features the CUDA kernels take so."""
    types = DTYPE_CODES[z.dtype], DTYPE_CODES[operands[0].dtype]
    plain = norm is None and operands[4] is operands[5] is None
    size = _workspace_bytes(C, size, *types, plain, guidance is not None, device)
    return z.new_empty(size, dtype=torch.uint8) if size else None


def _launch(C, x, z, weight, bias, norm, norm_weight, norm_bias, scale, shift, patch, order, guidance, h, history, b,
            x_scale, out, low, velocity_out, *where) -> None:  # fmt: skip
    if scale is not None and shift is not None and scale.dtype != shift.dtype:
        scale, shift = scale.to(x.dtype), shift.to(x.dtype)
    # tensors whose addresses are taken have names here, and so live until the call is over
    z = _dense(z if z.dim() < 4 else z.flatten(1, -2))
    T, token = (1, 0) if z.dim() == 2 else (z.shape[1], z.stride(1))
    size = (len(x), T, z.shape[-1], len(weight))
    operands = [t if t is None else _dense(t) for t in (weight, bias, norm_weight, norm_bias, scale, shift)]
    if where:
        operands = _for_cuda(operands, x.dtype)
        workspace = _workspace(C, z, operands, norm, guidance, size, where[0])
        where = (0 if workspace is None else workspace.data_ptr(), *where)
    x, history = x.contiguous(), [t.contiguous() for t in history]
    given = (out, low, velocity_out)
    to = [t if t is None or t.is_contiguous() else OP.empty(t) for t in given]
    pointers = (0 if t is None else t.data_ptr() for t in to)
    codes = (0 if t is None else DTYPE_CODES[t.dtype] for t in (x, history[0] if history else None, low, velocity_out))
    C.linear_euler(
        *(x.data_ptr(), (z.data_ptr(), DTYPE_CODES[z.dtype], z.stride(0)), token, *map(_rows, operands)),
        *([t.data_ptr() for t in history], b, *pointers, *codes),
        *(size, (0, 0, 0, 0) if patch is None else (patch, *x.shape[1:]), order == "cpq", norm, h, x_scale, guidance),
        *threads_or(where),
    )
    for t, written in zip(given, to, strict=True):
        if t is not written:
            t.copy_(written)


def _reference(*args) -> tuple[Tensor, Tensor]:
    velocity = reference.head_velocity(*args[:12])
    return reference.linear_euler(args[0], velocity, *args[12:]), velocity


_HEAD = (
    "Tensor x, Tensor z, Tensor weight, Tensor? bias, float? norm, Tensor? norm_weight, Tensor? norm_bias, "
    "Tensor? scale, Tensor? shift, int? patch, str order, float? guidance, float h, Tensor[] history, float[] b, "
    "float x_scale"
)
OP = StateOp(
    "linear_euler",
    _HEAD,
    tensors=("x", "z", "weight", *NAMES, "history"),
    many=True,
    kernel=_launch,
    reference=_reference,
    also="velocity_out",
    differentiable=False,
)
