"""`segment_points` in plain torch."""

import torch
from torch import Tensor


def segment_points(bank: Tensor, interval: Tensor, sample: Tensor, u: Tensor | None = None) -> Tensor:
    a = bank[interval, sample]
    if u is None:
        return a
    return a + u.to(bank.dtype).view(-1, *[1] * (a.dim() - 1)) * (bank[interval + 1, sample] - a)


def expect_places(interval: Tensor, sample: Tensor, bank: Tensor) -> int:
    """The first entry whose interval or sample is not in the bank, or -1. Torch's own indexing wraps around."""
    bad = (interval < 0) | (interval > len(bank) - 2) | (sample < 0) | (sample >= bank.shape[1])
    return int(bad.to(torch.int8).argmax()) if bool(bad.any()) else -1
