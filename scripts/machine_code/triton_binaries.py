"""The binaries of the Triton kernels, compiled ahead of time for every target by triton_compile.py and read."""

import fcntl
import functools
import hashlib
import os
import pickle
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from machine_code.binaries import Kernel

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build/triton"


@functools.cache
def read(op: str) -> tuple[list[Kernel], list[dict]]:
    """The kernels that an op's sample inputs launch, for NVIDIA's targets, and what was compiled for all targets. Kept
    in build/ for as long as no source changes."""
    ops = ROOT / "flowkernels/ops"
    sources = [*sorted((ops / op).glob("*.py")), ops / "triton_common.py", ops / "samples.py"]
    sources += [HERE / f"{name}.py" for name in ("triton_compile", "triton_binaries", "binaries")]
    text = version("triton").encode() + b"".join(path.read_bytes() for path in sources)
    folder = BUILD / f"{op}-{hashlib.sha256(text).hexdigest()[:16]}"
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / f"{op}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "kernels.pickle").exists():
            environment = os.environ | {"TRITON_CACHE_DIR": str(BUILD / "cache")}
            command = [sys.executable, HERE / "triton_compile.py", op, "--out", folder]
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode:
                raise RuntimeError(done.stdout[-2000:] + done.stderr[-4000:])
    return pickle.loads((folder / "kernels.pickle").read_bytes())
