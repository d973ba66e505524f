"""Every op's CUDA kernel on a GPU; what is checked is in tests/_gpu_checks.py."""

import _gpu_checks as checks
import pytest
import torch

from flowkernels.ops import OPS

EACH = pytest.mark.parametrize("op", OPS)


@EACH
def test_float64(op, gpu):
    assert checks.float64(op, gpu) == []


@EACH
def test_same_bits(op, gpu):
    assert checks.same_bits(op, gpu) == []


@EACH
def test_graph(op, gpu):
    assert checks.graph(op, gpu) == []


@EACH
def test_no_wait(op, gpu):
    if op in checks.WAITS:
        pytest.skip(checks.WAITS[op])
    assert checks.no_wait(op, gpu) == []


@EACH
def test_other_stream(op, gpu):
    assert checks.other_stream(op, gpu) == []


@EACH
def test_other_device(op, gpu):
    """The current device is another one than the tensors'."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    assert checks.float64(op, torch.device("cuda", 1 - gpu.index)) == []


@pytest.mark.parametrize("op", checks.LARGE)
def test_large(op, gpu):
    """More than 2^31 elements."""
    check, each = checks.LARGE[op]
    n = (1 << 31) + 3
    torch.cuda.empty_cache()
    needed = n * each + (8 << 30)  # and what is compared, in pieces
    if torch.cuda.mem_get_info(gpu)[0] < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free memory")
    try:
        assert check(gpu, n) <= 4
    finally:
        torch.cuda.empty_cache()
