"""`linear_update` in plain torch."""

from collections.abc import Sequence

from torch import Tensor


def linear_update(x: Tensor, v: Sequence[Tensor], b: Sequence[float], scale: float = 1.0) -> Tensor:
    x = x if scale == 1 else scale * x
    for term, factor in zip(v, b, strict=True):
        x = x + factor * term.to(x.dtype)
    return x
