"""`velocity_gram` in plain torch."""

import torch
from torch import Tensor


def increments(v: Tensor, x: Tensor | None, times: Tensor | None) -> Tensor:
    """The rows whose Gram matrix is wanted, `[K-1, M]`, or `[2K-1, M]` with states: a_1..a_{K-1}, e_0..e_{K-1}."""
    v = v.flatten(1)
    if v.dtype in (torch.bfloat16, torch.float16):
        v = v.float()
    if x is None:
        return v.diff(dim=0)
    # in float64 whatever the input: secants of neighbouring steps nearly agree
    h = times.diff().to(x.device)[:, None]
    secants = x.flatten(1).double().diff(dim=0) / h
    return torch.cat([secants.diff(dim=0), secants - v.double()]).to(v.dtype)


def velocity_gram(v: Tensor, x: Tensor | None = None, times: Tensor | None = None) -> Tensor:
    rows = increments(v, x, times)
    return (rows @ rows.T).double()
