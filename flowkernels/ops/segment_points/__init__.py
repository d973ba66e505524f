"""Points on segments of a bank of trajectories: the network's input in straightening."""

import math

import torch
from torch import Tensor

from flowkernels._checks import expect, expect_tensor
from flowkernels.ops.library import DTYPE_CODES, direct, fresh, plain, register, threads_or
from flowkernels.ops.segment_points import reference


def segment_points(
    bank: Tensor, interval: Tensor, sample: Tensor, u: Tensor | None = None, *, dtype: torch.dtype | None = None
) -> Tensor:
    """`x_a + u (x_b - x_a)`, with `x_a = bank[i, s]` and `x_b = bank[i+1, s]` gathered by index, in one pass.

    Args:
        bank: states at the knots `[N+1, n, *shape]`, float32 or float64; copied first unless contiguous.
        interval: i, int64 `[B]`, 0..N-1. sample: s, int64 `[B]`, 0..n-1.
        u: places on the segments, floating point `[B]`, 0 at x_a and 1 at x_b; None means x_a everywhere.
        dtype: of the result: the bank's (None), bfloat16 or float16, for a network that computes in it.

    Returns:
        `[B, *shape]`, contiguous. Not differentiable.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; for an index outside the bank also
            its place. The kernels of a GPU, for which the call would have to wait, make NaN of such a point instead.

    Source: piecewise rectified flow; with u = 0 the input of BOSS (arXiv 2312.16414). docs/mathematics.md.

    Examples:
        >>> bank = torch.tensor([[[0.0]], [[1.0]], [[4.0]]])  # three knots of one sample
        >>> interval, sample = torch.tensor([0, 1]), torch.tensor([0, 0])
        >>> fk.segment_points(bank, interval, sample, torch.tensor([0.5, 0.5]))
        tensor([[0.5000],
                [2.5000]])
    """
    if type(interval) is Tensor and (C := plain("segment_points", bank)) is not None:
        known = dtype is None or dtype is torch.bfloat16 or dtype is torch.float16 or dtype is bank.dtype
        if known and bank.dim() > 2 and interval.dim() == 1:
            out = fresh(_fake(bank, interval, sample, u, bank.dtype if dtype is None else dtype))
            if C.segment_points_plain(bank, interval, sample, u, out, torch.get_num_threads()):
                return out
    expect_bank(bank, interval, sample)
    if u is not None:
        expect_tensor(u, "u", (torch.float32, torch.float64, torch.bfloat16, torch.float16))
        if u.shape != interval.shape or u.device != bank.device:
            expect(False, "u", f"[{len(interval)}] on {bank.device}", u)
        u = u.detach()
    if dtype is not None and not any(dtype is d for d in (bank.dtype, torch.bfloat16, torch.float16)):
        expect(False, "dtype", f"None, {bank.dtype}, torch.bfloat16 or torch.float16", dtype, TypeError)
    dtype = bank.dtype if dtype is None else dtype
    bank = bank.detach()
    if (way := direct("segment_points", bank, interval, sample, u)) is not None:
        return _kernel(way[0], bank, interval, sample, u, dtype, *way[1])
    return torch.ops.flowkernels.segment_points(bank, interval, sample, u, dtype)


def expect_bank(bank, interval, sample) -> None:
    """A bank of states and the places in it; the values of the indices are looked at by the op."""
    expect_tensor(bank, "bank", (torch.float32, torch.float64))
    expect(bank.dim() >= 3 and bank.shape[0] >= 2, "bank", "shape [N+1, n, *shape] with N >= 1", bank)
    for name, index in (("interval", interval), ("sample", sample)):
        expect_tensor(index, name, (torch.int64,))
        if index.dim() != 1 or index.device != bank.device:
            expect(False, name, f"shape [B] on {bank.device}", index)
    if interval.shape != sample.shape:
        expect(False, "sample", f"shape {list(interval.shape)}, one for each interval", sample)


def refuse_place(place: int, bank: Tensor, interval: Tensor, sample: Tensor) -> None:
    """Raise for the entry that the kernel found outside the bank, if any."""
    if place < 0:
        return
    i, s = interval[place].item(), sample[place].item()
    inside = 0 <= i < len(bank) - 1
    name, most, got = ("sample", bank.shape[1], s) if inside else ("interval", len(bank) - 1, i)
    expect(False, name, f"indices from 0 to {most - 1}", f"{got} at {name}[{place}]")


def _kernel(C, bank, interval, sample, u, dtype, *where) -> Tensor:
    bank, interval, sample = bank.contiguous(), interval.contiguous(), sample.contiguous()
    if u is not None:
        u = (u.to(bank.dtype) if where else u.double()).contiguous()
    out = fresh(_fake(bank, interval, sample, u, dtype))
    knots, n = bank.shape[:2]
    bad = C.segment_points(
        *(bank.data_ptr(), interval.data_ptr(), sample.data_ptr(), 0 if u is None else u.data_ptr(), out.data_ptr()),
        *(DTYPE_CODES[bank.dtype], DTYPE_CODES[dtype], knots, n, len(interval), math.prod(bank.shape[2:])),
        *threads_or(where),
    )
    if not where:
        refuse_place(bad, bank, interval, sample)
    return out


def _reference(bank, interval, sample, u, dtype) -> Tensor:
    refuse_place(reference.expect_places(interval, sample, bank), bank, interval, sample)
    return reference.segment_points(bank, interval, sample, u).to(dtype).contiguous()


def _fake(bank, interval, sample, u, dtype) -> Tensor:
    # here and in other fakes: len() would make a number of a size that a compiler keeps open
    return bank.new_empty(interval.shape[0], *bank.shape[2:], dtype=dtype)


register("segment_points(Tensor bank, Tensor interval, Tensor sample, Tensor? u, ScalarType dtype) -> Tensor",
         _kernel, _reference, _fake)  # fmt: skip
