"""The precision in which a student is evaluated while it is trained."""

import contextlib
from collections.abc import Iterable

import torch
from torch import Tensor

from flowkernels._checks import expect, expect_dtype


def expect_autocast(value, name: str) -> torch.dtype | None:
    """torch.bfloat16 or None. Of float16 gradients below 6e-8 are lost, which needs a scaled loss."""
    if value is torch.float16:
        expected = "torch.bfloat16 or None (the gradients of float16 would need a scaled loss)"
        expect(False, name, expected, value)
    return expect_dtype(value, name, (torch.bfloat16, None))


def expect_castable(parameters: Iterable[Tensor], dtype: torch.dtype | None, name: str = "autocast") -> None:
    """That autocast does something to a student: not to weights of float64, nor on a device that has none."""
    if dtype is None:
        return
    for p in parameters:
        expect(p.dtype != torch.float64, name, "None, for a student of float64, which autocast leaves as it is", dtype)
        known = torch.amp.is_autocast_available(p.device.type)
        expect(known, name, f"None, on {p.device.type}, which has no autocast", dtype)


def autocast(dtype: torch.dtype | None, device: torch.device):
    """`torch.autocast` in it, also in a caller's own; None leaves a caller's as it is."""
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype)
