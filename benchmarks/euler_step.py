"""One Euler step: guidance, a float32 state, and a bfloat16 copy for the next model call."""

from collections.abc import Iterator

import torch

from flowkernels.bench.case import SMALL, Case, Small, Work, ours
from flowkernels.ops.euler_step import euler_step, stepper
from flowkernels.ops.euler_step.samples import Sample, error_and_bound

H, W = 0.05, 4.0


def in_pieces(args: list[torch.Tensor], results: list[torch.Tensor], check) -> tuple[float, float]:
    """The largest error, in units of its bound, over pieces that fit beside each other in float64."""
    worst, size = 0.0, 1 << 20
    for i in range(0, args[0].numel(), size):
        error, bound = check([t[i : i + size] for t in args], [t[i : i + size] for t in results])
        worst = max(worst, error / bound if error == error else float("inf"))
    return worst, 1.0


def guided(x, v, u):
    new = torch.add(x, torch.lerp(u.float(), v.float(), W), alpha=H)
    return new, new.bfloat16()


def guided_into(x, v, u, out, low):
    torch.add(x, torch.lerp(u.float(), v.float(), W), alpha=H, out=out)
    return out, low.copy_(out)


def guided_into_for_compiler(x, v, u, out, low):
    new = guided(x, v, u)
    return out.copy_(new[0]), low.copy_(new[1])


def plain(x, v):
    return torch.add(x, v, alpha=H)


def cases(device) -> Iterator[Case]:
    def randn(n, count, dtype):
        return [torch.randn(n, device=device).to(dtype) for _ in range(count)]

    def with_guidance(n, given=False, **which):
        """given: into tensors that exist, as a sampler's loop does; else the results are allocated."""

        def make():
            (x,), (v, u) = randn(n, 1, torch.float32), randn(n, 2, torch.bfloat16)
            to = (torch.zeros_like(x), torch.zeros_like(v)) if given else ()
            compiled = torch.compile(guided_into_for_compiler if given else guided)
            out, low = to or (None, torch.bfloat16)

            def check(got):
                return in_pieces(
                    [x, v, u],
                    list(got),
                    lambda a, r: error_and_bound(
                        Sample("", (*a[:2], H), dict(v_uncond=a[2], guidance=W, low=torch.bfloat16)), tuple(r)
                    ),
                )

            return Work(
                ours(lambda: euler_step(x, v, H, v_uncond=u, guidance=W, out=out, low=low), device)
                | {
                    "torch eager": lambda: (guided_into if given else guided)(x, v, u, *to),
                    "torch compile": lambda: compiled(x, v, u, *to),
                },
                check,
                moved=n * (4 + 2 + 2 + 4 + 2),
            )

        name = f"{n >> 10} Ki elements, guided, bfloat16 velocities and copy" + (", given" if given else "")
        curves = {"elements, guided, given": n} if given else {"elements, guided, allocated": n}
        return Case(name, n, make, **which, curves=curves)

    def in_float32(n, **which):
        def make():
            x, v = randn(n, 2, torch.float32)
            compiled = torch.compile(plain)
            return Work(
                ours(lambda: euler_step(x, v, H), device)
                | {"torch eager": lambda: plain(x, v), "torch compile": lambda: compiled(x, v)},
                lambda got: in_pieces([x, v], [got], lambda a, r: error_and_bound(Sample("", (*a, H), {}), r[0])),
                moved=12 * n,
            )

        return Case(f"{n >> 10} Ki elements, float32", n, make, **which, curves={"elements, float32, allocated": n})

    for log in (12, 16, 20, 24, 26):
        yield with_guidance(1 << log, given=True, quick=log == 20, main=log == 26)
    for log in (20, 26):
        yield with_guidance(1 << log)
    for log in (16, 20, 24):
        yield in_float32(1 << log, main=log == 24)


def small(device) -> Small:
    x, v, out = (torch.randn(SMALL, device=device) for _ in range(3))
    sample, inner = Sample("", (x, v, H), {}), stepper(x)
    return Small(
        lambda: euler_step(x, v, H),
        lambda: inner(x, v, H, None, 1.0, out),
        lambda: plain(x, v),
        lambda got: error_and_bound(sample, got),
    )
