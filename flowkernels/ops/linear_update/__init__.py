"""The update of a linear multistep sampler, in one pass over its velocities."""

from collections.abc import Sequence

import torch
from torch import Tensor

from flowkernels._checks import expect, expect_like, expect_list, expect_low, expect_number, expect_tensor
from flowkernels.ops._state_op import StateOp, gradient_of_state, velocity_dtypes
from flowkernels.ops.library import DTYPE_CODES, plain, register_autograd, threads_or
from flowkernels.ops.linear_update import reference

TERMS = "a sequence, one entry for each term"


def linear_update(
    x: Tensor,
    v: Sequence[Tensor],
    b: Sequence[float],
    *,
    scale: float = 1.0,
    out: Tensor | None = None,
    low: torch.dtype | Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`scale * x + sum_i b_i v_i`, every term read once and the sum kept in registers.

    Args:
        x: state, any shape, float32 or float64.
        v: one or more velocities of x's shape and one dtype: float32, bfloat16 or float16; float64 only with a
            float64 state.
        b: as many coefficients, in units of time.
        scale: of x; a float.
        out: where the new state goes. `out=x` updates in place; None allocates. Other overlap with an input is
            undefined.
        low: bfloat16 or float16 for a second output, the new state rounded for the next model call; or a tensor of
            that dtype and x's shape to write it to.

    Tensors that are not contiguous are copied first. Inside torch.func's transforms and forward-mode differentiation
    it runs as plain torch.

    Returns:
        The new state, in x's dtype; with `low`, the pair (state, copy). Differentiable in x and v unless `out` or a
        tensor `low` is given; asking for both raises.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Source: a linear multistep method written from its first state, `x_{k+1} = a_k x_0 + sum_{i<=k} b_{k,i} v_i`.

    Examples:
        >>> x, v, before = torch.zeros(1, 2), torch.ones(1, 2), torch.full((1, 2), 2.0)
        >>> fk.linear_update(x, [v, before], [0.75, -0.25])  # a step of 0.5 by Adams-Bashforth 2
        tensor([[0.2500, 0.2500]])
    """
    if out is low is None and (C := plain("linear_update", x)) is not None and type(scale) is float:
        new = OP.made(x)
        if C.linear_update_plain(x, v, b, scale, new, torch.is_grad_enabled(), torch.get_num_threads()):
            return new
    expect_tensor(x, "x", (torch.float32, torch.float64))
    v, b = expect_list(v, "v", TERMS), expect_list(b, "b", TERMS)
    expect(len(v) > 0, "v", "at least one velocity", "none")
    allowed = velocity_dtypes(x)
    if len(v) != len(b):
        expect_like(expect_tensor(v[0], "v[0]", allowed), "v[0]", x)  # which tells a v that is no list of velocities
        expect(False, "b", f"{len(v)} coefficients, one for each velocity", f"{len(b)}")
    for i, (term, factor) in enumerate(zip(v, b, strict=True)):
        dense = isinstance(term, Tensor) and term.layout is torch.strided and not term.is_nested
        if not dense or term.dtype not in allowed:
            expect_tensor(term, f"v[{i}]", allowed)
        allowed = (term.dtype,)
        if term.shape != x.shape or term.device != x.device:
            expect_like(term, f"v[{i}]", x)
        if type(factor) is not float:
            b[i] = expect_number(factor, f"b[{i}]")
    if low is not None:
        expect_low(low, x)
    if type(scale) is not float:
        scale = expect_number(scale, "scale")
    return OP.call((x, v, b, scale), (x, *v), out, low)


def adder(x: Tensor):
    """`add(x, v, b, scale, out)`: `linear_update` for one loop, of which x is the state."""
    C = plain("linear_update_out", x)

    def add(x, v, b, scale, out) -> Tensor:
        gradients, threads = torch.is_grad_enabled(), torch.get_num_threads()
        if C is not None and C.linear_update_plain(x, v, b, scale, out, gradients, threads):
            torch.autograd.graph.increment_version(out)
            return out
        return linear_update(x, v, b, scale=scale, out=out)

    return add


def _launch(C, x, v, b, scale, out, low, *where) -> None:
    x, v = x.contiguous(), [t.contiguous() for t in v]
    to = out if out.is_contiguous() else OP.empty(out)
    copy = low if low is None or low.is_contiguous() else OP.empty(low)
    copy_ptr, copy_code = (0, 0) if copy is None else (copy.data_ptr(), DTYPE_CODES[copy.dtype])
    codes = DTYPE_CODES[x.dtype], DTYPE_CODES[v[0].dtype], copy_code
    pointers = x.data_ptr(), [t.data_ptr() for t in v], b, scale, to.data_ptr(), copy_ptr
    C.linear_update(*pointers, *codes, x.numel(), *threads_or(where))
    if to is not out:
        out.copy_(to)
    if copy is not low:
        low.copy_(copy)


def _reference(*args) -> tuple[Tensor, None]:
    return reference.linear_update(*args), None


OP = StateOp(
    "linear_update",
    "Tensor x, Tensor[] v, float[] b, float scale",
    tensors=("x", "v"),
    many=True,
    kernel=_launch,
    reference=_reference,
)


def _setup_context(ctx, inputs, output) -> None:
    _, v, ctx.b, ctx.scale, _ = inputs
    ctx.dtypes = [t.dtype for t in v]
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, grad_low):
    grad = gradient_of_state(grad, grad_low)
    none = [None] * len(ctx.b)
    dx = grad if grad is None or (type(ctx.scale) is float and ctx.scale == 1) else grad * ctx.scale
    dv = none if grad is None else [(grad * b).to(dtype) for b, dtype in zip(ctx.b, ctx.dtypes, strict=True)]
    return dx, dv, none if isinstance(ctx.b[0], Tensor) else None, None, None


register_autograd("linear_update", _backward, _setup_context)
