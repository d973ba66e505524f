"""One Euler step of the flow, with classifier-free guidance and a low-precision copy for the next model call."""

import functools

import torch
from torch import Tensor

from flowkernels._checks import LOW, expect, expect_like, expect_low, expect_number, expect_out, expect_tensor
from flowkernels.ops._library import (
    DTYPE_CODES,
    direct,
    dispatch,
    fresh,
    is_plain,
    is_transformed,
    register,
    register_autograd,
    stream_of,
)
from flowkernels.ops.euler_step import reference


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
    """
    expect_tensor(x, "x", (torch.float32, torch.float64))
    allowed = (torch.float64,) if x.dtype == torch.float64 else (torch.float32, *LOW)
    expect_tensor(v, "v", allowed)
    expect_like(v, "v", x)
    h, guidance = expect_number(h, "h"), expect_number(guidance, "guidance")
    if v_uncond is not None:
        expect_tensor(v_uncond, "v_uncond", (v.dtype,))
        expect_like(v_uncond, "v_uncond", x)
    elif guidance != 1.0:
        expect(False, "guidance", "1 without v_uncond", guidance)
    wants_low = low is not None
    if wants_low:
        expect_low(low, x)

    functional = out is None and not isinstance(low, Tensor)
    if functional and (C := direct("euler_step", x, v, v_uncond)) is not None:
        new = fresh(torch.empty_like(x))
        copy = fresh(torch.empty_like(x, dtype=low)) if wants_low else None
        _launch(C, x, v, h, v_uncond, guidance, new, copy)
        return (new, copy) if wants_low else new
    if is_transformed():  # jvp, vmap and grad of torch.func go through torch's own rules
        written = out is not None or isinstance(low, Tensor)
        expect(not written, "out", "None, and low a dtype, inside torch.func's transforms", "a tensor to write to")
        new = reference.euler_step(x, v, h, v_uncond, guidance)
        return (new, new.to(low)) if wants_low else new
    if functional:
        new, copy = dispatch("euler_step", x, v, h, v_uncond, guidance, low)
        return (new, copy) if wants_low else new

    if out is None:
        out = torch.empty_like(x)
    expect_out(out, "out", x, (x.dtype,))
    if wants_low and not isinstance(low, Tensor):
        low = torch.empty_like(x, dtype=low)
    if torch.is_grad_enabled():
        for name, t in (("x", x), ("v", v), ("v_uncond", v_uncond), ("out", out), ("low", low)):
            expect(t is None or not t.requires_grad, name, "no gradient with out= or a tensor low=", "requires_grad")
    if (C := direct("euler_step_out", x, v, v_uncond, out, low)) is not None:
        _kernel_out(C, x, v, h, v_uncond, guidance, out, low)
    else:
        dispatch("euler_step_out", x, v, h, v_uncond, guidance, out, low)
    return (out, low) if wants_low else out


def stepper(x: Tensor):
    """`step(x, v, h, v_uncond, guidance, out)`: `euler_step` for one loop over checked arguments, gradients off.

    What does not change from step to step is decided here, once, from the loop's state x.
    """
    C = direct("euler_step_out", x)

    def step(x, v, h, v_uncond, guidance, out) -> Tensor:
        if C is not None and is_plain(v) and (v_uncond is None or is_plain(v_uncond)):
            _kernel_out(C, x, v, h, v_uncond, guidance, out, None)
        else:
            dispatch("euler_step_out", x, v, h, v_uncond, guidance, out, None)
        return out

    return step


def _contiguous(*tensors: Tensor | None) -> bool:
    for t in tensors:  # noqa: SIM110, a generator takes half a microsecond more
        if t is not None and not t.is_contiguous():
            return False
    return True


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
    """Elementwise on memory in storage order, where all tensors share one dense layout; on contiguous copies else.
    `where`: device and stream of CUDA kernels, none for those of the CPU."""
    if not _contiguous(x, v, v_uncond, out, low) and not dense_alike(x, v, v_uncond, out, low):
        return on_copies(functools.partial(_launch, C), x, v, h, v_uncond, guidance, out, low, *where)
    u_ptr = 0 if v_uncond is None else v_uncond.data_ptr()
    low_ptr, low_code = (0, 0) if low is None else (low.data_ptr(), DTYPE_CODES[low.dtype])
    pointers = x.data_ptr(), v.data_ptr(), u_ptr, out.data_ptr(), low_ptr
    codes = DTYPE_CODES[x.dtype], DTYPE_CODES[v.dtype], low_code
    C.euler_step(*pointers, *codes, x.numel(), h, guidance, *(where or (torch.get_num_threads(),)))


def _kernel_out(C, x, v, h, v_uncond, guidance, out, low, *where) -> None:
    _launch(C, x, v, h, v_uncond, guidance, out, low, *where)
    # autograd must see that these were written, as it does for torch's own operations
    torch.autograd.graph.increment_version(out if low is None else [out, low])


def _cuda(module, x, *args) -> tuple[Tensor, Tensor]:
    return _kernel(module, x, *args, *stream_of(x))


def _cuda_out(module, x, *args) -> None:
    _kernel_out(module, x, *args, *stream_of(x))


def _reference_out(x, v, h, v_uncond, guidance, out, low) -> None:
    new = reference.euler_step(x, v, h, v_uncond, guidance)
    out.copy_(new)
    if low is not None:
        low.copy_(new)


def _empty(x: Tensor, low: torch.dtype | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(0) if low is None else torch.empty_like(x, dtype=low)


def _kernel(C, x, v, h, v_uncond, guidance, low, *where) -> tuple[Tensor, Tensor]:
    new, copy = _empty(x, low)
    _launch(C, x, v, h, v_uncond, guidance, new, None if low is None else copy, *where)
    return new, copy


def _reference(x, v, h, v_uncond, guidance, low) -> tuple[Tensor, Tensor]:
    new = reference.euler_step(x, v, h, v_uncond, guidance)
    out, copy = _empty(x, low)
    out.copy_(new)
    return out, copy if low is None else copy.copy_(new)


def _fake(x, v, h, v_uncond, guidance, low) -> tuple[Tensor, Tensor]:
    return _empty(x, low)


def _fake_out(x, v, h, v_uncond, guidance, out, low) -> None:
    return None


_ARGS = "Tensor x, Tensor v, float h, Tensor? v_uncond, float guidance"
register(f"euler_step({_ARGS}, ScalarType? low) -> (Tensor, Tensor)", _kernel, _reference, _fake, _cuda)
register(
    f"euler_step_out({_ARGS}, Tensor(a!) out, Tensor(b!)? low) -> ()", _kernel_out, _reference_out, _fake_out, _cuda_out
)


def _setup_context(ctx, inputs, output) -> None:
    _, v, ctx.h, v_uncond, ctx.guidance, _ = inputs
    ctx.v_dtype, ctx.guided = v.dtype, v_uncond is not None
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, grad_low):
    if grad_low is not None and grad_low.numel():
        low = grad_low.to(grad.dtype if grad is not None else torch.float32)
        grad = low if grad is None else grad + low
    if grad is None:
        return (None,) * 6
    weight = ctx.guidance if ctx.guided else 1.0
    dv = (grad * (ctx.h * weight)).to(ctx.v_dtype)
    du = (grad * (ctx.h * (1 - weight))).to(ctx.v_dtype) if ctx.guided else None
    return grad, dv, None, du, None, None


register_autograd("euler_step", _backward, _setup_context)
