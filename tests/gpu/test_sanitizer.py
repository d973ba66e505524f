"""Every op's CUDA kernels under NVIDIA's compute-sanitizer; the slowest tests, and so the last ones."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = {"memcheck": ("--leak-check=no",), "racecheck": (), "initcheck": (), "synccheck": ()}


@pytest.mark.parametrize("tool", TOOLS)
def test_sanitizer(tool, gpu):
    program = shutil.which("compute-sanitizer")
    if program is None:
        pytest.skip("compute-sanitizer is not on the PATH; it comes with the CUDA toolkit")
    script = Path(__file__).with_name("every_op.py")
    command = [program, f"--tool={tool}", *TOOLS[tool], "--error-exitcode=9", sys.executable, str(script)]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # every tensor ends where its memory ends
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
