"""`linear_euler` in plain torch."""

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import layer_norm, linear


def unpatchify(v: Tensor, x: Tensor, p: int, order: str) -> Tensor:
    """Outputs of tokens `[m, T, outputs]` at their places in `[m, C, H, W]`, as x is; channels past C are left out."""
    C, H, W = x.shape[1:]
    v = v.unflatten(1, (H // p, W // p))
    if order == "pqc":
        v = v.unflatten(-1, (p, p, -1)).permute(0, 5, 1, 3, 2, 4)
    else:
        v = v.unflatten(-1, (-1, p, p)).permute(0, 3, 1, 4, 2, 5)
    return v[:, :C].reshape(len(v), C, H, W)


def head_velocity(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm: float | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    patch: int | None = None,
    order: str = "pqc",
    guidance: float | None = None,
) -> Tensor:
    """`place(f(z) W^T + bias)` with guidance applied, in x's shape and dtype."""
    parameters = (weight, bias, norm_weight, norm_bias, scale, shift)
    weight, bias, norm_weight, norm_bias, scale, shift = (t if t is None else t.to(x.dtype) for t in parameters)
    f = z.to(x.dtype).reshape(len(z), z.shape[1:-1].numel(), z.shape[-1])
    if norm is not None:
        f = layer_norm(f, f.shape[-1:], norm_weight, norm_bias, norm)
    if scale is not None:
        f = f * (1 + scale[:, None])
    if shift is not None:
        f = f + shift[:, None]
    v = linear(f, weight, bias)
    v = v.reshape(len(v), *x.shape[1:]) if patch is None else unpatchify(v, x, patch, order)
    if guidance is None:
        return v
    v, base = v.chunk(2) if len(v) else (v, v)
    return base + guidance * (v - base)


def linear_euler(
    x: Tensor,
    velocity: Tensor,
    h: float,
    history: Sequence[Tensor] = (),
    b: Sequence[float] = (),
    x_scale: float = 1.0,
) -> Tensor:
    """The update with the head's velocity."""
    x = (x if x_scale == 1 else x_scale * x) + h * velocity
    for term, factor in zip(history, b, strict=True):
        x = x + factor * term.to(x.dtype)
    return x
