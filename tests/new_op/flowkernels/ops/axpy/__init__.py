"""A vector and a multiple of another, added."""

import torch
from flowkernels.ops.axpy import reference
from torch import Tensor

from flowkernels._checks import expect_like, expect_number, expect_tensor
from flowkernels.ops.library import direct, dispatch, register


def axpy(x: Tensor, y: Tensor, a: float) -> Tensor:
    """`x + a y`.

    Args:
        x: any shape, float32.
        y: of x's shape, float32.
        a: the factor.

    Returns:
        float32, contiguous. Not differentiable.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    expect_tensor(x, "x", (torch.float32,))
    expect_tensor(y, "y", (torch.float32,))
    expect_like(y, "y", x)
    a = expect_number(a, "a")
    x, y = x.detach(), y.detach()
    if (way := direct("axpy", x, y)) is not None:
        return _kernel(way[0], x, y, a, *way[1])
    return dispatch("axpy", x, y, a)


def _kernel(C, x: Tensor, y: Tensor, a: float, *where) -> Tensor:
    x, y, out = x.contiguous(), y.contiguous(), _fake(x, y, a)
    C.axpy(x.data_ptr(), y.data_ptr(), a, out.data_ptr(), x.numel(), *where)
    return out


def _reference(x: Tensor, y: Tensor, a: float) -> Tensor:
    return reference.axpy(x, y, a).contiguous()


def _fake(x: Tensor, y: Tensor, a: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


register("axpy(Tensor x, Tensor y, float a) -> Tensor", _kernel, _reference, _fake)
