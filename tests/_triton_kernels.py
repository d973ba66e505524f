"""Kernels that use of Triton what the ops' kernels do, or may: for tests of the translator (_triton_ptx.py).

Each of CASES returns an error and its bound.
"""

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from flowkernels.ops._wide import Wide
from flowkernels.ops.samples import absolute, generator, lift, of_products, rounding

f64, f32, bf16, f16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
EPS = {dtype: torch.finfo(dtype).eps for dtype in (f64, f32, bf16, f16)}


@triton.jit
def combine(x, vs, h, low, out, n, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    sum = tl.load(x + i, mask=mask).to(DTYPE)
    for k in tl.static_range(len(vs)):
        sum += tl.full((), h[k], DTYPE) * tl.load(vs[k] + i, mask=mask, eviction_policy="evict_last").to(DTYPE)
    tl.store(out + i, sum.to(out.dtype.element_ty), mask=mask)
    tl.store(low + i, sum.to(low.dtype.element_ty), mask=mask, eviction_policy="evict_first")


@triton.jit
def functions(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    v = tl.load(x + i, mask=mask, other=1.0)
    size = tl.abs(v)
    tl.store(out + i, tl.exp(-size), mask=mask)
    tl.store(out + n + i, tl.sqrt_rn(size), mask=mask)
    tl.store(out + 2 * n + i, tl.math.erf(v), mask=mask)
    tl.store(out + 3 * n + i, tl.log(size + 1), mask=mask)
    tl.store(out + 4 * n + i, libdevice.tanh(v), mask=mask)
    tl.store(out + 5 * n + i, v * tl.sigmoid(v), mask=mask)
    tl.store(out + 6 * n + i, tl.math.rsqrt(size + 1), mask=mask)
    tl.store(out + 7 * n + i, tl.where(v > 0, tl.minimum(v, 1.0), tl.maximum(v, -2.0)), mask=mask)
    tl.store(out + 8 * n + i, tl.cos(1e6 * v), mask=mask)  # from a table of the digits of 2 / pi
    tl.store(out + 9 * n + i, tl.div_rn(tl.floor(v), size + 1), mask=mask)
    tl.store(out + 10 * n + i, tl.exp(v.to(tl.float64)).to(tl.float32), mask=mask)


@triton.jit
def low_arithmetic(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    mask = i < n
    a, b = tl.load(x + i, mask=mask), tl.load(y + i, mask=mask)
    tl.store(out + i, a * b + a, mask=mask)
    tl.store(out + n + i, a - b, mask=mask)
    tl.store(out + 2 * n + i, tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL), mask=mask)
    tl.store(out + 3 * n + i, tl.where(a < b, -a, tl.abs(b)), mask=mask)
    tl.store(out + 4 * n + i, tl.maximum(a, b), mask=mask)


@triton.jit
def lesser(v, i, w, j):
    less = (v < w) | ((v == w) & (i < j))
    return tl.where(less, v, w), tl.where(less, i, j)


@triton.jit
def rows(x, sums, scan, where, n, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    sum = tl.zeros((BLOCK,), sums.dtype.element_ty)
    best, at = tl.full((), float("inf"), sums.dtype.element_ty), tl.full((), -1, tl.int32)
    first = 0
    while first < n:
        v = tl.load(x + row * n + first + i, mask=first + i < n, other=float("inf")).to(best.dtype)
        least, place = tl.reduce((v, first + i), 0, lesser)
        at = tl.where(least < best, place, at)
        best = tl.minimum(best, least)
        sum += tl.where(first + i < n, v, 0)
        first += BLOCK
    tl.store(sums + row, tl.sum(sum))
    tl.store(where + row, at)
    v = tl.load(x + row * n + i, mask=i < n, other=0).to(best.dtype)
    tl.store(scan + row * BLOCK + i, tl.cumsum(v, 0))
    tl.debug_barrier()
    turned = tl.load(scan + row * BLOCK + BLOCK - 1 - i)
    tl.debug_barrier()
    tl.store(scan + row * BLOCK + i, turned + 1)
    tl.atomic_add(sums + tl.num_programs(0), tl.sum(sum))
    tl.atomic_max(where + tl.num_programs(0), tl.argmax(v, 0).to(tl.int32))


@triton.jit
def products(
    a,  # [M, K]
    b,  # [N, K], or with ALONG_N [K, N]
    out,
    M,
    N,
    K,
    ALONG_N: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    m, n = tl.program_id(0) * BM + tl.arange(0, BM)[:, None], tl.program_id(1) * BN + tl.arange(0, BN)[None, :]
    sum = tl.zeros((BM, BN), out.dtype.element_ty)
    for first in tl.range(0, K, BK, num_stages=STAGES):
        across, down = first + tl.arange(0, BK)[None, :], first + tl.arange(0, BK)[:, None]
        x = tl.load(a + m * K + across, mask=(m < M) & (across < K), other=0.0)
        at = down * N + n if ALONG_N else n * K + down
        y = tl.load(b + at, mask=(n < N) & (down < K), other=0.0)
        sum = tl.dot(x, y, sum, input_precision=PRECISION, out_dtype=sum.dtype)
    tl.store(out + m * N + n, sum, mask=(m < M) & (n < N))


@triton.jit
def overrun(x, out, BLOCK: tl.constexpr):
    tl.store(out + tl.arange(0, BLOCK), tl.load(x + tl.arange(0, BLOCK)))


def randn(*shape, dtype=f32, seed=0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=f64).to(dtype)


def worst(got: Tensor, truth: Tensor | Wide, scale: Tensor | float = 1.0) -> float:
    """NaN and Inf have to be where they are in the truth."""
    nearest = truth.hi if isinstance(truth, Wide) else truth
    same = (
        (got.double() == truth) | (got.isnan() & truth.isnan()) if nearest is truth else got.isnan() & nearest.isnan()
    )
    error = torch.where(same, 0.0, absolute(truth - got.double()) / scale).max().item()
    return error if error == error else math.inf


def case_combine(dtype):
    n = 1000
    x, v, w = randn(n, dtype=dtype), randn(n, dtype=dtype, seed=1), randn(n, dtype=bf16, seed=2)
    x[:3] = torch.tensor([math.nan, math.inf, -math.inf])
    out, low = torch.empty(n, dtype=dtype), torch.empty(n, dtype=bf16)
    numbers = tl.float64 if dtype == f64 else tl.float32
    combine[(4,)](x, (v, w), (0.5, -0.25), low, out, n, numbers, 256)
    kept = [not_finite(got[:3], x[:3]) for got in (out, low)]
    x, v, w, out, low = (t[3:] for t in (x, v, w, out, low))
    wide = lift(dtype)
    truth = wide(x) + 0.5 * wide(v) - 0.25 * wide(w)
    size = absolute(x) + 0.5 * absolute(v) + 0.25 * absolute(w)  # of which each of two sums rounds to half an ulp
    return max(*kept, worst(out, truth, size) / EPS[dtype], worst(low, truth, size) / EPS[bf16]), 1


def not_finite(got: Tensor, expected: Tensor) -> float:
    return 0 if torch.equal(got.double().nan_to_num(7.0), expected.double().nan_to_num(7.0)) else math.inf


def case_functions():
    n = 500
    x = 3 * randn(n)
    out = torch.empty(11, n)
    functions[(4,)](x, out, n, 128)
    v = x.double()
    size = v.abs()
    truth = [(-size).exp(), size.sqrt(), v.erf(), size.log1p(), v.tanh(), v * v.sigmoid(), (size + 1).rsqrt()]
    truth += [v.clamp(-2, 1), (1e6 * x).double().cos(), (v.floor() / (size + 1)), v.exp()]
    return worst(out, truth := torch.stack(truth), truth.abs() + 0.1) / EPS[f32], 8


def case_low_arithmetic(dtype):
    n = 100
    a, b = randn(n, dtype=dtype), randn(n, dtype=dtype, seed=1)
    b[0] = math.nan
    out = torch.empty(5, n, dtype=dtype)
    low_arithmetic[(1,)](a, b, out, n, 128)
    x, y = a.double(), b.double()
    truth = [x * y + x, x - y, torch.minimum(x, y), torch.where(x < y, -x, y.abs()), torch.fmax(x, y)]
    product = (x * y).abs() + x.abs()  # rounded, and its sum with x
    return worst(out, torch.stack(truth), torch.stack([product, x.abs() + y.abs(), *[x.abs()] * 3])) / EPS[dtype], 1


def case_rows(dtype, num_warps):
    count, n, block = 3, 700, 512
    x = randn(count, n, dtype=dtype)
    x[1, 690] = x[1, 30] = -9  # a tie
    out = f64 if dtype == f64 else f32
    sums, scan = torch.zeros(count + 1, dtype=out), torch.empty(count, block, dtype=out)
    where = torch.zeros(count + 1, dtype=torch.int32)
    rows[(count,)](x, sums, scan, where, n, block, num_warps=num_warps)
    v = x.double()
    places = [*v.argmin(1), v[:, :block].argmax(1).max()]
    wrong = 0 if [int(p) for p in places] == where.tolist() else math.inf
    v = lift(out)(x)
    truth = torch.cat([v.sum(1), v.sum(1).sum(0)[None]])
    running = v[:, :block] @ lift(out)(torch.ones(block, block).triu())
    error = max(worst(sums, truth), worst(scan, running.flip(1) + 1.0))
    # sums in a tree: of 2^k numbers they are about 2^(k/2) in size, and six standard deviations of their roundings
    # 2.5 sqrt(n) ulp; sums may be half as large again
    return max(wrong, error / (EPS[out] * math.sqrt(n))), 4


def case_products(dtype, precision, stages, along_n, shape=(70, 50, 90), num_warps=4):
    M, N, K = shape
    a, b, out = randn(M, K, dtype=dtype), randn(N, K, dtype=dtype, seed=1), f64 if dtype == f64 else f32
    got = torch.full((M, N), math.nan, dtype=out)
    tiles = (64, 32, 32)
    grid = (triton.cdiv(M, tiles[0]), triton.cdiv(N, tiles[1]))
    numbers = (along_n, precision, stages, *tiles)
    products[grid](a, b.T.contiguous() if along_n else b, got, M, N, K, *numbers, num_warps=num_warps)
    x, y = lift(out)(a), lift(out)(b)
    error = worst(got, x @ y.T, absolute(x).norm(dim=1)[:, None] * absolute(y).norm(dim=1))
    # both numbers cut to the parts that are multiplied; what velocity_gram's samples allow of sums and matrix units
    cut = 4 * {"tf32": 2**-11, "bf16x3": 2**-17}.get(precision, 0.0)
    on_unit = 19 if "x3" in precision else 13 if precision != "ieee" or dtype in (bf16, f16) else 0
    return error, cut + rounding(of_products(K) + on_unit, out)


def case_overrun():
    x, out = torch.zeros(100), torch.zeros(128)
    try:
        overrun[(1,)](x, out, 128)
    except RuntimeError as e:
        found = "_triton_kernels.py" in str(e) and "in no tensor of the launch; 400 bytes from the start" in str(e)
        return (0 if found else math.inf), 0
    return math.inf, 0


CASES = {"functions": case_functions, "overrun": case_overrun}
CASES |= {f"combine-{str(t)[6:]}": functools.partial(case_combine, t) for t in EPS}
CASES |= {f"low-{str(t)[6:]}": functools.partial(case_low_arithmetic, t) for t in (bf16, f16)}
CASES |= {f"rows-{str(t)[6:]}-{w}": functools.partial(case_rows, t, w) for t, w in [(f32, 4), (f64, 2), (bf16, 8)]}
for arguments in [
    *((bf16, "ieee", 1, False), (bf16, "ieee", 3, True), (f16, "ieee", 2, False), (f64, "ieee", 2, False)),
    *((f32, "tf32", 1, True), (f32, "tf32x3", 4, False), (f32, "ieee", 2, False), (f32, "bf16x3", 1, False)),
]:
    CASES["-".join(map(str, ("products", *arguments))).replace("torch.", "")] = functools.partial(
        case_products, *arguments
    )
