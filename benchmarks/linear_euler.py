"""The velocity head with the step: final layers as DiT, SD3 and Flux have them, and a plain Linear."""

from collections.abc import Iterator

import torch
from torch.nn import functional as F

from flowkernels.bench.case import Case, Small, Work, kernel, ours
from flowkernels.ops.linear_euler import linear_euler
from flowkernels.ops.linear_euler.samples import Sample, error_and_bound

H, W = 0.05, 4.0


def head(x, z, weight, bias, scale, shift, patch, guidance):
    """What a model and its sampler do one after the other: in the network's dtype up to the velocity."""
    if scale is not None:
        z = F.layer_norm(z, z.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    v = F.linear(z, weight, bias)
    if patch is not None:
        C, height, width = x.shape[1:]
        v = v.reshape(-1, height // patch, width // patch, patch, patch, C)
        v = torch.einsum("nhwpqc->nchpwq", v).reshape(-1, C, height, width)
    else:
        v = v.reshape(-1, *x.shape[1:])
    if guidance is not None:
        v, base = v.float().chunk(2)
        v = torch.lerp(base, v, guidance)
    return torch.add(x, v, alpha=H)


def cases(device) -> Iterator[Case]:
    def case(name, shape, tokens, d, outputs, dtype, patch=None, guidance=None, modulated=True, **which):
        m = shape[0] * (1 if guidance is None else 2)

        def make():
            def randn(*size):
                return torch.randn(size, device=device).to(dtype)

            x, z = torch.randn(shape, device=device), randn(m, tokens, d)
            weight, bias = randn(outputs, d) / d**0.5, randn(outputs)
            scale, shift = (randn(m, d) / 2, randn(m, d)) if modulated else (None, None)
            given = dict(bias=bias, scale=scale, shift=shift, patch=patch, guidance=guidance)
            given |= dict(norm=1e-6) if modulated else {}
            args = (x, z, weight, bias, scale, shift, patch, guidance)
            compiled = torch.compile(head, dynamic=False)

            def check(got):
                peer = isinstance(got, tuple)
                error, bound = error_and_bound(Sample("", (x, z, weight, H), given), got[0] if peer else got)
                # torch rounds every operation of the head to the network's dtype: a few half-ulps of the same terms
                return error, max(bound, 4 * H * torch.finfo(dtype).eps) if peer else bound

            return Work(
                ours(lambda: linear_euler(x, z, weight, H, **given), device)
                | {"torch eager": lambda: (head(*args),), "torch compile": lambda: (compiled(*args),)},
                check,
                moved=z.nbytes + weight.nbytes + 2 * x.nbytes,
                flops=2 * m * tokens * d * outputs,
                unit=str(dtype)[6:],
            )

        return Case(f"{name}, {str(dtype)[6:]}", m * tokens * d, make, **which)

    for dtype in (torch.float32, torch.bfloat16):
        size = dict(tokens=1024, d=1152, outputs=16, patch=2, guidance=W)
        size |= dict(quick=True, main=dtype == torch.float32)
        yield case("1,024 tokens of 1,152 -> 4 channels of 2x2, guided", (1, 4, 64, 64), dtype=dtype, **size)
    for dtype in (torch.float32, torch.bfloat16):
        yield case("4,096 tokens of 3,072 -> 64", (1, 4096, 64), 4096, 3072, 64, dtype, main=dtype == torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16):
        yield case("Linear 512 -> 64, 256 samples", (256, 64), 1, 512, 64, dtype, modulated=False)


def small(device) -> Small:
    x, z, weight = (torch.randn(size, device=device) for size in ((1, 64), (1, 16), (64, 16)))
    sample = Sample("", (x, z, weight, H), {})
    inner = kernel("linear_euler", x, z, weight, *[None] * 7, "pqc", None, H, [], [], 1.0, None)
    return Small(
        lambda: linear_euler(x, z, weight, H),
        lambda: inner()[0],
        lambda: head(x, z, weight, *[None] * 5),
        lambda got: error_and_bound(sample, got),
    )
