"""The straightening loss, its gradient in the same pass, and the losses of samples and intervals."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from flowkernels._checks import FLOATS, expect, expect_number, expect_tensor
from flowkernels.ops.library import (
    CPU,
    DTYPE_CODES,
    direct,
    dispatch,
    fresh,
    is_batched,
    is_transformed,
    plain,
    register,
    register_autograd,
    stream_of,
    threads_or,
)
from flowkernels.ops.segment_points import expect_bank, refuse_place
from flowkernels.ops.segment_points.reference import expect_places
from flowkernels.ops.straighten_loss import reference
from flowkernels.runtime.torch_private import DelayedError, graph_is_kept


class StraightenLosses(NamedTuple):
    """loss: mean over samples of weight * loss, differentiable in v. per_sample: `[B]`, unweighted. per_interval:
    `[N]`, the mean of its samples' losses, NaN where none was drawn. All in the bank's dtype."""

    loss: Tensor
    per_sample: Tensor
    per_interval: Tensor


def straighten_loss(
    v: Tensor,
    bank: Tensor,
    step_sizes: Tensor,
    interval: Tensor,
    sample: Tensor,
    *,
    weight: Tensor | None = None,
    loss: str = "l2",
    huber_c: float = 0.03,
) -> StraightenLosses:
    """How far a student's velocities are from the straight line between the teacher's states at two knots.

    With `x_a = bank[i, s]`, `x_b = bank[i+1, s]` and `e = v - (x_b - x_a) / h_i`, the loss of a sample is `|e|^2 / D`,
    or pseudo-Huber `sqrt(|e|^2 / D + c^2) - c`; D is the number of features, so that the learning rate does not depend
    on it. Neither the states nor the target are materialised: they are gathered as the error is summed, and where v
    needs a gradient it is written in the same pass.

    Args:
        v: the student's velocities `[B, *shape]`, float32, bfloat16 or float16 (float64 with a float64 bank).
        bank: the teacher's states at the knots `[N+1, n, *shape]`, float32 or float64; copied first unless contiguous,
            and so is v.
        step_sizes: h, `[N]`, floating point.
        interval: i, int64 `[B]`, 0..N-1. sample: s, int64 `[B]`, 0..n-1.
        weight: factors on the samples' losses, floating point `[B]`; None weighs all alike.
        loss: "l2" or "huber". huber_c: the constant c of the latter, > 0.

    Inside torch.func's transforms and forward-mode differentiation it runs as plain torch.

    Returns:
        StraightenLosses(loss, per_sample, per_interval); only `loss` has a gradient, and only in v.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; for an index outside the bank also
            its place. The kernels of a GPU, for which a training step would have to wait, make NaN of that sample's
            loss and gradient instead, and so of `loss`.

    Source: BOSS (arXiv 2312.16414), straightening; pseudo-Huber as in Song & Dhariwal 2023 (arXiv 2310.14189),
    equation 7, on the mean over features.

    Examples:
        >>> bank = torch.tensor([[[0.0]], [[1.0]], [[4.0]]])  # three knots of one sample; the secants are 2 and 6
        >>> v = torch.tensor([[2.0], [5.0]], requires_grad=True)
        >>> interval, sample = torch.tensor([0, 1]), torch.tensor([0, 0])
        >>> found = fk.straighten_loss(v, bank, torch.tensor([0.5, 0.5]), interval, sample)
        >>> found.per_sample
        tensor([0., 1.])
        >>> found.loss.backward()
    """
    huber = type(loss) is str and loss == "huber"
    constant = type(huber_c) is float and (0 < huber_c < math.inf if huber else type(loss) is str and loss == "l2")
    C = plain("straighten_loss", bank) if constant and type(interval) is Tensor else None
    if C is not None and bank.dim() > 2 and interval.dim() == 1 and plain("straighten_loss", v) is not None:
        gradient = torch.is_grad_enabled() and v.requires_grad
        losses = bank.new_empty(()), bank.new_empty(interval.shape[0]), bank.new_empty(bank.shape[0] - 1)
        grad = torch.empty_like(v, memory_format=torch.contiguous_format) if gradient else None
        args = v, bank, step_sizes, interval, sample, weight, huber_c if huber else 0.0, *losses, grad
        if C.straighten_loss_plain(*args, torch.get_num_threads()):
            return StraightenLosses(_Given.apply(v, (losses[0], grad)) if gradient else losses[0], *losses[1:])
    expect_bank(bank, interval, sample)
    wide = bank.dtype == torch.float64
    expect_tensor(v, "v", (torch.float64,) if wide else (torch.float32, torch.bfloat16, torch.float16))
    if v.shape[1:] != bank.shape[2:] or len(v) != len(interval) or v.device != bank.device:
        expect(False, "v", f"shape {[len(interval), *bank.shape[2:]]} on {bank.device}", v)
    _expect_vector(step_sizes, "step_sizes", len(bank) - 1, v)
    if weight is not None:
        _expect_vector(weight, "weight", len(interval), v)
    expect(isinstance(loss, str) and loss in ("l2", "huber"), "loss", "'l2' or 'huber'", loss)
    huber_c = expect_number(huber_c, "huber_c")
    expect(loss == "l2" or 0 < huber_c < math.inf, "huber_c", "a positive number", huber_c)
    c = float(huber_c) if loss == "huber" else 0.0

    bank, step_sizes = bank.detach(), step_sizes.detach()
    weight = None if weight is None else weight.detach()
    if is_transformed():
        if not (is_batched(interval) or is_batched(sample)):  # whose values cannot be looked at
            refuse_place(expect_places(interval, sample, bank), bank, interval, sample)
        return StraightenLosses(*reference.straighten_loss(v, bank, step_sizes, interval, sample, weight, c))
    args = (v, bank, step_sizes, interval, sample, weight, c)
    gradient = torch.is_grad_enabled() and v.requires_grad
    if (way := direct("straighten_loss", *args[:-1], gradient=True)) is not None:
        mean, others = _Direct.apply(*way, *args) if gradient else directly(*way, *args, False)[:2]
        return StraightenLosses(mean, *others.split([len(v), len(bank) - 1]))
    return StraightenLosses(*dispatch("straighten_loss", *args, gradient)[:3])


def _expect_vector(t, name: str, length: int, v: Tensor) -> None:
    expect_tensor(t, name, FLOATS)
    if t.shape != (length,) or t.device != v.device:
        expect(False, name, f"shape [{length}] on {v.device}", t)


def _launch(C, v, bank, step_sizes, interval, sample, weight, huber_c, losses, grad, *where) -> None:
    """losses: the addresses of the loss, of those of the B samples and of those of the N intervals, float64 on the CPU
    and of the bank's dtype on a GPU; grad: a tensor, or None."""
    v, bank, interval, sample = v.contiguous(), bank.contiguous(), interval.contiguous(), sample.contiguous()
    if where:
        step_sizes, weight = step_sizes.to(bank.dtype), None if weight is None else weight.to(bank.dtype)
    else:
        step_sizes, weight = step_sizes.double(), None if weight is None else weight.double()
    step_sizes, weight = step_sizes.contiguous(), None if weight is None else weight.contiguous()
    (knots, n), B, D = bank.shape[:2], v.shape[0], math.prod(v.shape[1:])
    size = C.straighten_loss_partials(B, D, knots) if where else 0
    partial = bank.new_empty(size) if size else None
    bad = C.straighten_loss(
        *(v.data_ptr(), bank.data_ptr(), step_sizes.data_ptr(), interval.data_ptr(), sample.data_ptr()),
        *(0 if weight is None else weight.data_ptr(), huber_c, DTYPE_CODES[v.dtype], DTYPE_CODES[bank.dtype]),
        *(knots, n, B, D, *losses, 0 if grad is None else grad.data_ptr()),
        *(0 if partial is None else partial.data_ptr(), *threads_or(where)),
    )
    if not where:
        refuse_place(bad, bank, interval, sample)


def _kernel(C, v, bank, step_sizes, interval, sample, weight, huber_c, gradient, *where) -> tuple[Tensor, ...]:
    args = v, bank, step_sizes, interval, sample, weight, huber_c
    if where:
        *losses, grad = _fake(*args, gradient)
        _launch(C, *args, [t.data_ptr() for t in losses], grad if gradient else None, *where)
        return *losses, grad
    mean, others, grad = directly(C, where, *args, gradient)
    # each apart: outputs of an op may not share memory
    losses = mean.clone(), *(t.clone() for t in others.split([v.shape[0], bank.shape[0] - 1]))
    return *losses, v.new_empty(0) if grad is None else grad


def directly(
    C, where, v, bank, step_sizes, interval, sample, weight, huber_c, gradient
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The loss, those of samples and then of intervals in one tensor, and the gradient if wanted."""
    v, B = v.contiguous(), v.shape[0]
    dtype, device = (bank.dtype, bank.device) if where else (torch.float64, CPU)
    results = torch.empty(B + bank.shape[0], dtype=dtype, device=device)
    at, each = results.data_ptr(), results.element_size()
    losses = at, at + each, at + each * (B + 1)
    grad = fresh(torch.empty_like(v)) if gradient else None
    _launch(C, v, bank, step_sizes, interval, sample, weight, huber_c, losses, grad, *where)
    results = results.to(bank.dtype)
    return results[0], results[1:], grad


def _reference(v, bank, step_sizes, interval, sample, weight, huber_c, gradient) -> tuple[Tensor, ...]:
    refuse_place(expect_places(interval, sample, bank), bank, interval, sample)
    args = (v, bank, step_sizes, interval, sample, weight, huber_c)
    grad = reference.gradient(*args).contiguous() if gradient else v.new_empty(0)
    return (*reference.straighten_loss(*args), grad)


def _fake(v, bank, step_sizes, interval, sample, weight, huber_c, gradient) -> tuple[Tensor, ...]:
    grad = torch.empty_like(v, memory_format=torch.contiguous_format) if gradient else v.new_empty(0)
    return bank.new_empty(()), bank.new_empty(v.shape[0]), bank.new_empty(bank.shape[0] - 1), grad


register(
    "straighten_loss(Tensor v, Tensor bank, Tensor step_sizes, Tensor interval, Tensor sample, Tensor? weight, "
    "float huber_c, bool gradient) -> (Tensor, Tensor, Tensor, Tensor)",
    _kernel,
    _reference,
    _fake,
)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(output[3])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


class _Direct(torch.autograd.Function):
    """The kernel with its gradient, past the dispatcher; of all results the first is differentiated."""

    @staticmethod
    def forward(ctx, C, where, *args):
        mean, others, gradient = directly(C, where, *args, True)
        ctx.C, ctx.on_gpu, ctx.is_scaled = C, bool(where), False
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(others)
        ctx.set_materialize_grads(False)
        return mean, others

    @staticmethod
    def backward(ctx, grad, _):
        scaled = _scaled_on_gpu if ctx.on_gpu else _scaled
        return (None, None, *_backward(ctx, grad, scaled=scaled)[:-1])


class _Given(torch.autograd.Function):
    """A loss and its gradient that are there already."""

    @staticmethod
    def forward(ctx, v, given):
        loss, gradient = given
        ctx.save_for_backward(gradient)
        ctx.set_materialize_grads(False)
        return loss

    @staticmethod
    def backward(ctx, grad):
        C = None if torch.is_grad_enabled() else plain("straighten_loss", grad)
        if C is not None and C.is_one(grad) and not graph_is_kept():  # as in `_scaled`, in less time
            return *ctx.saved_tensors, None
        return _backward(ctx, grad)[:2]


def _scaled(ctx, grad: Tensor) -> Tensor:
    """The gradient that forward has left, times `grad`."""
    (gradient,) = ctx.saved_tensors
    known = not is_batched(grad) and grad.is_cpu and direct("straighten_loss", grad, gradient=True)
    if known and not graph_is_kept() and grad.item() == 1:  # what a kept one holds is not given away
        return gradient
    # in grad's dtype: a gradient scaler's 65,536 is more than float16 holds
    return (gradient.to(grad.dtype) * grad).to(gradient.dtype)


def _scaled_on_gpu(ctx, grad: Tensor) -> Tensor:
    """The same in place, without waiting for `grad`: where it is 1, and it mostly is, nothing is moved. A graph that is
    kept may be gone through again, and keeps what it has."""
    if ctx.is_scaled:  # by a backward that some hook has stopped before torch freed the graph
        raise RuntimeError("straighten_loss: backward a second time, where the first did not have retain_graph=True")
    (gradient,) = ctx.saved_tensors
    if graph_is_kept() or is_batched(grad) or not direct("straighten_loss", grad, gradient, gradient=True):
        return _scaled(ctx, grad)
    if not gradient.is_contiguous():  # what hooks have made of it
        return _scaled(ctx, grad)
    ctx.is_scaled = True
    codes = DTYPE_CODES[gradient.dtype], DTYPE_CODES[grad.dtype]
    ctx.C.straighten_loss_scale(gradient.data_ptr(), grad.data_ptr(), *codes, gradient.numel(), *stream_of(grad))
    return gradient


def _backward(ctx, grad, *_, scaled=_scaled):
    if grad is None:
        return (None,) * 8
    gradient = scaled(ctx, grad)
    if torch.is_grad_enabled():  # create_graph: the second derivative is not there, and is not to be taken for zero
        message = "straighten_loss: its gradient is not differentiable; ops.straighten_loss.reference is, twice"
        gradient = gradient if gradient.requires_grad else gradient.detach().requires_grad_()
        gradient = DelayedError(message, 1)(gradient)
    return (gradient, *(None,) * 7)


register_autograd("straighten_loss", _backward, _setup_context)
