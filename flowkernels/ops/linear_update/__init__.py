"""The update of a linear multistep sampler, in one pass over its velocities."""

from collections.abc import Sequence

import torch
from torch import Tensor

from flowkernels._checks import (
    LOW,
    expect,
    expect_like,
    expect_list,
    expect_low,
    expect_number,
    expect_out,
    expect_tensor,
)
from flowkernels.ops._library import (
    DTYPE_CODES,
    direct,
    dispatch,
    fresh,
    is_transformed,
    register,
    register_autograd,
    stream_of,
)
from flowkernels.ops.linear_update import reference

TERMS = "a sequence, one entry for each term"


def linear_update(
    x: Tensor,
    v: Sequence[Tensor],
    b: Sequence[float],
    *,
    out: Tensor | None = None,
    low: torch.dtype | Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`x + sum_i b_i v_i`, every term read once and the sum kept in registers.

    Args:
        x: state, any shape, float32 or float64.
        v: one or more velocities of x's shape and one dtype: float32, bfloat16 or float16; float64 only with a
            float64 state.
        b: as many coefficients, in units of time.
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

    Source: a linear multistep method written from its first state, `x_{k+1} = x_0 + sum_{i<=k} b_{k,i} v_i`.
    """
    expect_tensor(x, "x", (torch.float32, torch.float64))
    v, b = expect_list(v, "v", TERMS), expect_list(b, "b", TERMS)
    expect(len(v) > 0, "v", "at least one velocity", "none")
    allowed = (torch.float64,) if x.dtype == torch.float64 else (torch.float32, *LOW)
    if len(v) != len(b):
        expect_like(expect_tensor(v[0], "v[0]", allowed), "v[0]", x)  # which tells a v that is no list of velocities
        expect(False, "b", f"{len(v)} coefficients, one for each velocity", f"{len(b)}")
    for i, (term, factor) in enumerate(zip(v, b, strict=True)):
        if not isinstance(term, Tensor) or term.dtype not in allowed or term.layout is not torch.strided:
            expect_tensor(term, f"v[{i}]", allowed)
        allowed = (term.dtype,)
        if term.shape != x.shape or term.device != x.device:
            expect_like(term, f"v[{i}]", x)
        if type(factor) is not float:
            b[i] = expect_number(factor, f"b[{i}]")
    wants_low = low is not None
    if wants_low:
        expect_low(low, x)

    functional = out is None and not isinstance(low, Tensor)
    if functional and (C := direct("linear_update", x, *v)) is not None:
        new, copy = _empty(x), _empty(x, low) if wants_low else None
        _launch(C, x, v, b, new, copy)
        return (new, copy) if wants_low else new
    if is_transformed():
        written = out is not None or isinstance(low, Tensor)
        expect(not written, "out", "None, and low a dtype, inside torch.func's transforms", "a tensor to write to")
        new = reference.linear_update(x, v, b)
        return (new, new.to(low)) if wants_low else new
    if functional:
        new, copy = dispatch("linear_update", x, v, b, low)
        return (new, copy) if wants_low else new

    out = _empty(x) if out is None else out
    expect_out(out, "out", x, (x.dtype,))
    if wants_low and not isinstance(low, Tensor):
        low = _empty(x, low)
    if torch.is_grad_enabled():
        named = [("x", x), ("out", out), ("low", low), *((f"v[{i}]", term) for i, term in enumerate(v))]
        for name, t in named:
            expect(t is None or not t.requires_grad, name, "no gradient with out= or a tensor low=", "requires_grad")
    if (C := direct("linear_update_out", x, *v, out, low)) is not None:
        _kernel_out(C, x, v, b, out, low)
    else:
        dispatch("linear_update_out", x, v, b, out, low)
    return (out, low) if wants_low else out


def _empty(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Contiguous, as the kernel writes."""
    return fresh(torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format))


def _launch(C, x, v, b, out, low, *where) -> None:
    """`where`: device and stream of CUDA kernels, none for those of the CPU."""
    x, v = x.contiguous(), [t.contiguous() for t in v]
    to = out if out.is_contiguous() else _empty(out)
    copy = low if low is None or low.is_contiguous() else _empty(low)
    copy_ptr, copy_code = (0, 0) if copy is None else (copy.data_ptr(), DTYPE_CODES[copy.dtype])
    codes = DTYPE_CODES[x.dtype], DTYPE_CODES[v[0].dtype], copy_code
    pointers = x.data_ptr(), [t.data_ptr() for t in v], b, to.data_ptr(), copy_ptr
    C.linear_update(*pointers, *codes, x.numel(), *(where or (torch.get_num_threads(),)))
    if to is not out:
        out.copy_(to)
    if copy is not low:
        low.copy_(copy)


def _kernel_out(C, x, v, b, out, low, *where) -> None:
    _launch(C, x, v, b, out, low, *where)
    torch.autograd.graph.increment_version(out if low is None else [out, low])


def _cuda(module, x, *args) -> tuple[Tensor, Tensor]:
    return _kernel(module, x, *args, *stream_of(x))


def _cuda_out(module, x, *args) -> None:
    _kernel_out(module, x, *args, *stream_of(x))


def _kernel(C, x, v, b, low, *where) -> tuple[Tensor, Tensor]:
    new, copy = _fake(x, v, b, low)
    _launch(C, x, v, b, new, None if low is None else copy, *where)
    return new, copy


def _reference(x, v, b, low) -> tuple[Tensor, Tensor]:
    new, copy = _fake(x, v, b, low)
    new.copy_(reference.linear_update(x, v, b))
    return new, copy if low is None else copy.copy_(new)


def _reference_out(x, v, b, out, low) -> None:
    out.copy_(reference.linear_update(x, v, b))
    if low is not None:
        low.copy_(out)


def _fake(x, v, b, low) -> tuple[Tensor, Tensor]:
    return _empty(x), x.new_empty(0) if low is None else _empty(x, low)


def _fake_out(x, v, b, out, low) -> None:
    return None


register("linear_update(Tensor x, Tensor[] v, float[] b, ScalarType? low) -> (Tensor, Tensor)",
         _kernel, _reference, _fake, _cuda)  # fmt: skip
register("linear_update_out(Tensor x, Tensor[] v, float[] b, Tensor(a!) out, Tensor(b!)? low) -> ()",
         _kernel_out, _reference_out, _fake_out, _cuda_out)  # fmt: skip


def _setup_context(ctx, inputs, output) -> None:
    _, v, ctx.b, _ = inputs
    ctx.dtypes = [t.dtype for t in v]
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, grad_low):
    if grad_low is not None and grad_low.numel():
        low = grad_low.to(grad.dtype if grad is not None else torch.float32)
        grad = low if grad is None else grad + low
    none = [None] * len(ctx.b)
    dv = none if grad is None else [(grad * b).to(dtype) for b, dtype in zip(ctx.b, ctx.dtypes, strict=True)]
    return grad, dv, none if isinstance(ctx.b[0], Tensor) else None, None


register_autograd("linear_update", _backward, _setup_context)
