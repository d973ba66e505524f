"""`axpy` in Triton."""

import triton
import triton.language as tl
from flowkernels.ops.axpy import _fake
from torch import Tensor

from flowkernels.ops import triton_common

CONFIGS = {"axpy": {"BLOCK": 1024, "num_warps": 4}}
SEARCH = {"axpy": {"BLOCK": (512, 1024, 2048), "num_warps": (2, 4, 8)}}


@triton.jit
def axpy_kernel(x, y, a, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n) + a * tl.load(y + i, mask=i < n), mask=i < n)


def axpy(x: Tensor, y: Tensor, a: float) -> Tensor:
    x, y, out = x.contiguous(), y.contiguous(), _fake(x, y, a)
    if n := x.numel():
        config = triton_common.config_of(CONFIGS, "axpy")
        triton_common.launch(axpy_kernel, (triton.cdiv(n, config["BLOCK"]),), x, y, a, out, n, on=x, config=config)
    return out
