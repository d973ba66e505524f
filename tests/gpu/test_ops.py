"""Every op's CUDA kernel on a GPU; what is checked is in tests/_gpu_checks.py."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

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


TOOLS = {"memcheck": ("--leak-check=no",), "racecheck": (), "initcheck": (), "synccheck": ()}


@pytest.mark.parametrize("tool", TOOLS)
def test_sanitizer(tool, gpu):
    program = shutil.which("compute-sanitizer")
    if program is None:
        pytest.skip("compute-sanitizer is not on the PATH; it comes with the CUDA toolkit")
    script = Path(__file__).with_name("every_op.py")
    command = [program, f"--tool={tool}", *TOOLS[tool], "--error-exitcode=9", sys.executable, str(script)]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # every tensor ends where its memory ends
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=150)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
