"""`axpy` in plain torch."""

from torch import Tensor


def axpy(x: Tensor, y: Tensor, a: float) -> Tensor:
    return x + a * y
