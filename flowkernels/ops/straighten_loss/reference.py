"""`straighten_loss` in plain torch."""

import torch
from torch import Tensor


def secants(bank: Tensor, step_sizes: Tensor, interval: Tensor, sample: Tensor) -> Tensor:
    """`(x_b - x_a) / h`, `[B, *shape]`, in the bank's dtype."""
    h = step_sizes.to(bank.dtype)[interval].view(-1, *[1] * (bank.dim() - 2))
    return (bank[interval + 1, sample] - bank[interval, sample]) / h


def errors(v: Tensor, bank: Tensor, step_sizes: Tensor, interval: Tensor, sample: Tensor) -> Tensor:
    """`v - (x_b - x_a) / h`, in the bank's dtype."""
    return v.to(bank.dtype) - secants(bank, step_sizes, interval, sample)


def per_sample(error: Tensor, huber_c: float) -> Tensor:
    """`|e|^2 / D`, or with c > 0 pseudo-Huber: `sqrt(|e|^2 / D + c^2) - c`, written so that nothing cancels."""
    square = error.square().flatten(1).mean(1)
    return square if huber_c == 0 else square / ((square + huber_c**2).sqrt() + huber_c)


def straighten_loss(
    v: Tensor,
    bank: Tensor,
    step_sizes: Tensor,
    interval: Tensor,
    sample: Tensor,
    weight: Tensor | None = None,
    huber_c: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(mean weighted loss, loss per sample `[B]`, mean loss per interval `[N]`); differentiable by torch."""
    each = per_sample(errors(v, bank, step_sizes, interval, sample), huber_c)
    return means(each, weight, interval, len(bank) - 1)


def means(each: Tensor, weight: Tensor | None, interval: Tensor, intervals: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of the samples' losses `[B]`: (their weighted mean, they, their means by interval)."""
    loss = (each if weight is None else weight.to(each.dtype) * each).mean()
    sums = each.new_zeros(intervals).index_add(0, interval, each)
    counts = each.new_zeros(intervals).index_add(0, interval, torch.ones_like(each))
    return loss, each, sums / counts


def gradient(
    v: Tensor, bank: Tensor, step_sizes: Tensor, interval: Tensor, sample: Tensor, weight: Tensor | None, huber_c: float
) -> Tensor:
    """Of the mean weighted loss with respect to v, in v's dtype."""
    e = errors(v, bank, step_sizes, interval, sample)
    n, features = len(v), e[:1].numel()
    factor = e.new_ones(n) if weight is None else weight.to(e.dtype)
    factor = 2 * factor if huber_c == 0 else factor / (per_sample(e, huber_c) + huber_c)
    return (e * (factor / (max(n, 1) * max(features, 1))).view(-1, *[1] * (v.dim() - 1))).to(v.dtype)
