"""Every op's kernels on a GPU, in CUDA and in Triton; what is checked is in tests/_gpu_checks.py."""

import _gpu_checks as checks
import ops_cases
import pytest
import torch

from flowkernels.ops.public import OPS


def each(ops):
    """Of each op, on each backend."""
    named = {"cuda": "{}", "triton": "{}, triton"}
    found = [pytest.param(op, on, id=name.format(op)) for on, name in named.items() for op in ops]
    return pytest.mark.parametrize(("op", "on"), found)


EACH = each(OPS)


@EACH
def test_float64(op, on, gpu):
    assert checks.float64(op, gpu, on) == []


@EACH
def test_same_bits(op, on, gpu):
    assert checks.same_bits(op, gpu, on) == []


@EACH
def test_graph(op, on, gpu):
    assert checks.graph(op, gpu, on) == []


@EACH
def test_no_wait(op, on, gpu):
    if op in checks.WAITS:
        pytest.skip(checks.WAITS[op])
    assert checks.no_wait(op, gpu, on) == []


@EACH
def test_other_stream(op, on, gpu):
    assert checks.other_stream(op, gpu, on) == []


@EACH
def test_other_device(op, on, gpu):
    """The current device is another one than the tensors'."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    assert checks.float64(op, torch.device("cuda", 1 - gpu.index), on) == []


@each(checks.LARGE)
def test_large(op, on, gpu):
    """More than 2^31 elements."""
    cases, n = ops_cases.of(op), (1 << 31) + 3
    torch.cuda.empty_cache()
    needed = n * cases.LARGE_BYTES + (8 << 30)  # and what is compared, in pieces
    if torch.cuda.mem_get_info(gpu)[0] < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free memory")
    try:
        assert cases.large(gpu, n, on) <= 4
    finally:
        torch.cuda.empty_cache()
