"""What every op's tests share, on the CPU and on a GPU."""

import torch


def tensors(result):
    return result if isinstance(result, tuple) else (result,)


def identical(a, b):
    """Equal bit for bit, NaN included."""
    return all(
        p.dtype == q.dtype
        and p.shape == q.shape
        and torch.equal(*(t.contiguous().view(-1).view(torch.uint8) for t in (p, q)))
        for p, q in zip(tensors(a), tensors(b), strict=True)
    )
