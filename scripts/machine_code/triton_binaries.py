"""The binaries of the Triton kernels, compiled ahead of time for every target by triton_compile.py and read."""

import functools
import hashlib
import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path

from machine_code import binaries
from machine_code.binaries import Kernel

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build/triton"


@functools.cache
def compiler() -> ProcessPoolExecutor:
    """A process of its own, since Triton decides between its interpreter and its compiler when it is imported; one for
    all ops, since to start it takes seconds."""
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=before_triton)


def before_triton() -> None:
    """Sets up that process: it compiles whatever those who start it have set, with the shipped configurations on a
    machine with a GPU too, and ends with them even where they are killed."""
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()
    os.environ |= dict(TRITON_INTERPRET="0", FLOWKERNELS_TRITON_CONFIGS="", TRITON_CACHE_DIR=str(BUILD / "cache"))


def compile_op(op: str, out: Path) -> tuple[list[Kernel], list[dict]]:
    from machine_code import triton_compile

    return triton_compile.compile_op(op, out)


@functools.cache
def read(op: str) -> tuple[list[Kernel], list[dict]]:
    """The kernels that an op's sample inputs launch, for NVIDIA's targets, and what was compiled for all targets. Kept
    in build/ for as long as no source changes."""
    ops = ROOT / "flowkernels/ops"
    sources = [*sorted((ops / op).glob("*.py")), ops / "triton_common.py", ops / "samples.py"]
    sources += [HERE / f"{name}.py" for name in ("triton_compile", "triton_binaries", "binaries")]
    text = version("triton").encode() + b"".join(path.read_bytes() for path in sources)
    folder = BUILD / f"{op}-{hashlib.sha256(text).hexdigest()[:16]}"
    return binaries.kept(folder / "kernels.pickle", lambda: compiler().submit(compile_op, op, folder).result())
