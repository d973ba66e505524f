"""A loss in plain torch with its gradient in the same pass, some samples at a time: beside the gradient nothing of a
batch's size is there, however many steps the loss takes."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from flowkernels.runtime.torch_private import DelayedError, graph_is_kept

PARTS = 16  # of a batch, at most
LEAST = {"cpu": 2**12}  # elements of a part
LEAST_ON_GPU = 2**20  # for which launching a few more kernels takes longer

Losses = Callable[[Tensor, slice], Tensor]  # of the velocities `[m, *shape]` of some samples, `[m]`
Weights = Callable[[Tensor, slice], Tensor | None]  # of those losses, `[m]`


def losses_by_rows(
    v: Tensor, losses: Losses, weights: Weights, dtype: torch.dtype, spare: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(mean of weight * loss `[]`, differentiable in v once; the losses `[B]`), in dtype.

    v: `[B, *shape]`. spare: memory of v's shape that is no longer needed afterwards, which the gradient may take.
    """
    if not (torch.is_grad_enabled() and v.requires_grad):
        return _computed(v, losses, weights, dtype, None)
    return _ByRows.apply(v, losses, weights, dtype, spare)


class _ByRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v, losses, weights, dtype, spare):
        fits = spare is not None and spare.dtype == v.dtype and spare.shape == v.shape and spare.is_contiguous()
        gradient = spare if fits else torch.empty_like(v, memory_format=torch.contiguous_format)
        mean, each = _computed(v, losses, weights, dtype, gradient)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(each)
        ctx.set_materialize_grads(False)
        return mean, each

    @staticmethod
    def backward(ctx, grad, _):
        if grad is None:
            return (None,) * 5
        (gradient,) = ctx.saved_tensors
        if graph_is_kept():
            gradient = (gradient.to(grad.dtype) * grad.detach()).to(gradient.dtype)
        elif not (grad.is_cpu and grad.item() == 1):
            with torch.no_grad():
                gradient.mul_(grad)
        if torch.is_grad_enabled():  # create_graph: the second derivative is not there, and is not to be taken for zero
            message = "losses by rows: their gradient is not differentiable; a loss that is a function is, twice"
            gradient = DelayedError(message, 1)(gradient.detach().requires_grad_())
        return gradient, None, None, None, None


def _computed(v: Tensor, losses: Losses, weights: Weights, dtype: torch.dtype, gradient: Tensor | None):
    """And with `gradient` that of the mean, in it."""
    v, B = v.detach(), len(v)
    each, weighted = v.new_empty(B, dtype=dtype), v.new_empty(B, dtype=dtype)
    for rows in _parts(v):
        part = v[rows].requires_grad_(gradient is not None)
        with torch.set_grad_enabled(gradient is not None):
            found = losses(part, rows)
        each[rows] = found.detach()
        weight = weights(each[rows], rows)
        weighted[rows] = each[rows] if weight is None else weight.to(dtype) * each[rows]
        if gradient is not None:
            factor = (torch.ones_like(found) if weight is None else weight.to(found.dtype)) / B
            (gradient[rows],) = torch.autograd.grad(found, part, factor)
    return weighted.mean(), each


def _parts(v: Tensor) -> Iterator[slice]:
    B, features = len(v), max(v[:1].numel(), 1)
    size = max(-(-B // PARTS), LEAST.get(v.device.type, LEAST_ON_GPU) // features, 1)
    return (slice(i, min(i + size, B)) for i in range(0, B, size))
