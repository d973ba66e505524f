"""One Euler step of the flow, with classifier-free guidance and a low-precision copy for the next model call."""

import functools

import torch
from torch import Tensor

from flowkernels._checks import expect, expect_like, expect_low, expect_number, expect_tensor
from flowkernels.ops._state_op import StateOp, gradient_of_state, velocity_dtypes
from flowkernels.ops.euler_step import reference
from flowkernels.ops.library import (
    DTYPE_CODES,
    direct,
    dispatch,
    is_plain,
    plain,
    register_autograd,
    stream_of,
    threads_or,
)
from flowkernels.runtime import backends


def euler_step(
    x: Tensor,
    v: Tensor,
    h: float,
    *,
    v_uncond: Tensor | None = None,
    guidance: float = 1.0,
    out: Tensor | None = None,
    low: torch.dtype | Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`x + h (v_uncond + w (v - v_uncond))`, or `x + h v` without `v_uncond`.

    The state stays in float32 whatever the model computes in (design: a bfloat16 state loses 4-5 % at 100 steps).

    Args:
        x: state, any shape, float32 or float64.
        v: velocity of x's shape: float32, bfloat16 or float16; float64 only with a float64 state.
        h: step size, in units of time.
        v_uncond: unconditional velocity of v's shape and dtype; then `v` is the conditional one.
        guidance: the guidance weight w; 1 means no guidance.
        out: where the new state goes. `out=x` steps in place; None allocates. Other overlap with an input is undefined.
        low: bfloat16 or float16 for a second output, the new state rounded for the next model call; or a tensor of
            that dtype and x's shape to write it to.

    Inside torch.func's transforms (jvp, vmap, grad) and forward-mode differentiation it runs as plain torch.

    Returns:
        The new state, in x's dtype; with `low`, the pair (state, copy). Differentiable in x, v and v_uncond unless
        `out` or a tensor `low` is given; asking for both raises.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Examples:
        >>> x, v = torch.zeros(2, 3), torch.ones(2, 3)
        >>> fk.euler_step(x, v, 0.5)
        tensor([[0.5000, 0.5000, 0.5000],
                [0.5000, 0.5000, 0.5000]])
        >>> x, low = fk.euler_step(x, v, 0.5, out=x, low=torch.bfloat16)  # in place, and rounded for the next call
    """
    if out is low is None and (C := plain("euler_step", x)) is not None and type(h) is type(guidance) is float:
        new = OP.made(x)
        if C.euler_step_plain(x, v, h, v_uncond, guidance, new, torch.is_grad_enabled(), torch.get_num_threads()):
            return new
    expect_tensor(x, "x", (torch.float32, torch.float64))
    expect_tensor(v, "v", velocity_dtypes(x))
    expect_like(v, "v", x)
    if type(h) is not float:
        h = expect_number(h, "h")
    if type(guidance) is not float:
        guidance = expect_number(guidance, "guidance")
    if v_uncond is not None:
        expect_tensor(v_uncond, "v_uncond", (v.dtype,))
        expect_like(v_uncond, "v_uncond", x)
    elif guidance != 1.0:
        expect(False, "guidance", "1 without v_uncond", guidance)
    if low is not None:
        expect_low(low, x)
    return OP.call((x, v, h, v_uncond, guidance), (x, v, v_uncond), out, low)


def stepper(x: Tensor):
    """`step(x, v, h, v_uncond, guidance, out)`: `euler_step` for one loop over checked arguments, gradients off.

    What does not change from step to step is decided here, once, from the loop's state x.
    """
    way, device = direct("euler_step_out", x), x.device
    C = None if way is None or way[1] else backends.reader()

    def step(x, v, h, v_uncond, guidance, out) -> Tensor:
        if C is not None and C.euler_step_plain(x, v, h, v_uncond, guidance, out, False, torch.get_num_threads()):
            torch.autograd.graph.increment_version(out)
        elif way is not None and is_plain(v, device) and (v_uncond is None or is_plain(v_uncond, device)):
            _launch(way[0], x, v, h, v_uncond, guidance, out, None, *(way[1] and stream_of(x)))
            torch.autograd.graph.increment_version(out)
        else:
            dispatch("euler_step_out", x, v, h, v_uncond, guidance, out, None)
        return out

    return step


def contiguous(x: Tensor, v: Tensor, v_uncond: Tensor | None, out: Tensor, low: Tensor | None) -> bool:
    if not (x.is_contiguous() and v.is_contiguous() and out.is_contiguous()):
        return False
    return (v_uncond is None or v_uncond.is_contiguous()) and (low is None or low.is_contiguous())


def dense_alike(x: Tensor, *others: Tensor | None) -> bool:
    """Whether all tensors share one dense layout, so that an elementwise kernel may run over them in storage order."""
    strides = x.stride()
    dense = torch.empty_like(x).stride() == strides  # empty_like keeps the strides of dense tensors only
    return dense and all(t is None or t.stride() == strides for t in others)


def on_copies(launch, x, v, h, v_uncond, guidance, out, low, *where) -> None:
    to, copy = (None if t is None else t.new_empty(x.shape) for t in (out, low))
    u = None if v_uncond is None else v_uncond.contiguous()
    launch(x.contiguous(), v.contiguous(), h, u, guidance, to, copy, *where)
    out.copy_(to)
    if low is not None:
        low.copy_(copy)


def _launch(C, x, v, h, v_uncond, guidance, out, low, *where) -> None:
    """Elementwise on memory in storage order, where all tensors share one dense layout; on contiguous copies else."""
    if not contiguous(x, v, v_uncond, out, low) and not dense_alike(x, v, v_uncond, out, low):
        return on_copies(functools.partial(_launch, C), x, v, h, v_uncond, guidance, out, low, *where)
    u_ptr = 0 if v_uncond is None else v_uncond.data_ptr()
    low_ptr, low_code = (0, 0) if low is None else (low.data_ptr(), DTYPE_CODES[low.dtype])
    pointers = x.data_ptr(), v.data_ptr(), u_ptr, out.data_ptr(), low_ptr
    codes = DTYPE_CODES[x.dtype], DTYPE_CODES[v.dtype], low_code
    C.euler_step(*pointers, *codes, x.numel(), h, guidance, *threads_or(where))


def _reference(*args) -> tuple[Tensor, None]:
    return reference.euler_step(*args), None


OP = StateOp(
    "euler_step",
    "Tensor x, Tensor v, float h, Tensor? v_uncond, float guidance",
    tensors=("x", "v", "v_uncond"),
    kernel=_launch,
    reference=_reference,
    layout=torch.preserve_format,
)


def _setup_context(ctx, inputs, output) -> None:
    _, v, ctx.h, v_uncond, ctx.guidance, _ = inputs
    ctx.v_dtype, ctx.guided = v.dtype, v_uncond is not None
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, grad_low):
    grad = gradient_of_state(grad, grad_low)
    if grad is None:
        return (None,) * 6
    weight = ctx.guidance if ctx.guided else 1.0
    dv = (grad * (ctx.h * weight)).to(ctx.v_dtype)
    du = (grad * (ctx.h * (1 - weight))).to(ctx.v_dtype) if ctx.guided else None
    return grad, dv, None, du, None, None


register_autograd("euler_step", _backward, _setup_context)
