"""The CUDA kernels compiled for the host (csrc/host_cuda), built once into build/host_cuda."""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch

from flowkernels.runtime import backends

ROOT = Path(__file__).parents[1]
BUILD = Path(os.environ.get("FLOWKERNELS_HOST_CUDA_BUILD") or ROOT / "build/host_cuda")


def nvcc() -> str:
    if not (path := os.environ.get("CUDACXX") or shutil.which("nvcc")):
        raise RuntimeError("no nvcc on the PATH, nor in CUDACXX: tests of GPU code need it, of version 12.4 or newer")
    return path


@functools.cache
def module(name: str = "host_cuda"):
    """`host_cuda`; `host_cuda_checked`, which finds races, accesses out of bounds and reads of nothing; or
    `host_cuda_ptx`, which runs the PTX of the kernels instead."""
    import cmake
    import ninja
    import pybind11

    BUILD.mkdir(parents=True, exist_ok=True)
    cmake_bin = Path(cmake.CMAKE_BIN_DIR) / "cmake"
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        configure = [cmake_bin, "-S", ROOT, "-B", BUILD, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"]
        configure += [f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR) / 'ninja'}", f"-DPython_EXECUTABLE={sys.executable}"]
        configure += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", "-DFLOWKERNELS_CUDA=OFF"]
        configure += [f"-DFLOWKERNELS_NVCC={nvcc()}"] if name == "host_cuda_ptx" else []
        for command in (configure, [cmake_bin, "--build", BUILD, "--target", name]):
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"CXX": "g++"})
            if done.returncode:
                raise RuntimeError(done.stdout[-8000:] + done.stderr[-4000:])
    (path,) = BUILD.glob(f"{name}.*.so")
    spec = importlib.util.spec_from_file_location(name, path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


BUILT = backends.choose, backends.cuda_module


@contextlib.contextmanager
def in_place(kernels):
    """Inside the `with` block backend "cuda", where it is asked for, is this module of kernels compiled for the host,
    and takes CPU tensors; with None it is again what the build has. "auto" leaves it alone."""

    def choose(op, device):
        on_host = backends.requested() == "cuda" and torch.device(device).type == "cpu"
        return "cuda" if on_host else BUILT[0](op, device)

    chosen, module = BUILT if kernels is None else (choose, lambda: kernels)
    with mock.patch.object(backends, "choose", chosen), mock.patch.object(backends, "cuda_module", module):
        yield


@functools.cache
def _ptx_folder() -> Path:
    """Where libraries of PTX texts are kept, for these sources of the translator and of the emulation."""
    sources = sorted([*(ROOT / "csrc/host_cuda").iterdir(), *(ROOT / "csrc/common").glob("*.h")])
    folder = BUILD / "ptx" / hashlib.sha256(b"".join(s.read_bytes() for s in sources)).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _compile(name: str, source: Path, *flags: str | Path) -> Path:
    """What g++ makes of that, as a file of that folder, unless it is there."""
    folder = _ptx_folder()
    path = folder / name
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        made = path.with_suffix(f".{os.getpid()}")
        command = ["g++", "-std=gnu++17", "-march=x86-64-v3", "-ffp-contract=off", "-w", "-fPIC"]
        command += ["-I", folder, "-I", ROOT / "csrc", "-o", made, source, *flags]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-4000:])
        made.replace(path)
    return path


@functools.cache
def _ptx_runtime() -> ctypes.CDLL:
    """The emulation, for all libraries of PTX texts; and for their compilation its header."""
    source = ROOT / "csrc/host_cuda"
    path = _compile("runtime.so", source / "emulation.cpp", source / "ptx.cpp", "-O3", "-shared", "-ldl", "-lpthread")
    _compile("host_cuda/ptx.h.gch", source / "ptx.h", "-O0", "-x", "c++-header")
    runtime = ctypes.CDLL(path)
    runtime.host_cuda_ptx_kernel.restype = ctypes.c_void_p
    runtime.host_cuda_ptx_launch.restype = ctypes.c_char_p
    return runtime


def ptx_order(order: str = "forward", async_lazy: bool = True):
    """In which order threads and blocks of PTX kernels run from now on, and whether cp.async lands late or at once."""
    number = ("forward", "reverse", "random").index(order)
    _ptx_runtime().host_cuda_ptx_options(number, ctypes.c_uint64(1), ctypes.c_bool(async_lazy))


@functools.cache  # a library that is loaded already does not register its kernels again
def _ptx_kernels(text: str) -> dict[str, ctypes.c_void_p]:
    name = hashlib.sha256(text.encode()).hexdigest()[:32] + ".so"
    runtime, library = _ptx_runtime(), _ptx_folder() / name
    if not library.exists():
        with tempfile.TemporaryDirectory() as folder:
            ptx, cpp = Path(folder, "kernel.ptx"), Path(folder, "kernel.cpp")
            ptx.write_text(text)
            translate = [sys.executable, ROOT / "csrc/host_cuda/ptx_to_cpp.py", ptx, cpp]
            done = subprocess.run(translate, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stderr[-4000:])
            _compile(name, cpp, "-O0", "-shared", _ptx_folder() / "runtime.so")
    ctypes.CDLL(library)  # registers its kernels
    names = re.findall(r"\.entry\s+([\w$]+)", text)
    return {name: ctypes.c_void_p(runtime.host_cuda_ptx_kernel(name.encode())) for name in names}


class PtxLibrary:
    """The kernels of a PTX text, translated and compiled, to be launched by name."""

    def __init__(self, text: str):
        self.kernels = _ptx_kernels(text)

    def launch(self, name: str, grid: tuple, block: tuple, shared: int, *arguments, memory=()):
        """Arguments: numpy arrays, whose addresses are passed, and ctypes values. The kernel may access these arrays,
        and `memory`: pairs of an address and a number of bytes."""
        arrays = [a for a in arguments if hasattr(a, "ctypes")]
        memory = [*memory, *((a.ctypes.data, a.nbytes) for a in arrays)]
        values = [ctypes.c_void_p(a.ctypes.data) if hasattr(a, "ctypes") else a for a in arguments]
        pointers, sizes = ctypes.c_void_p * len(values), ctypes.c_size_t * len(values)
        starts, bytes_ = ctypes.c_void_p * len(memory), ctypes.c_size_t * len(memory)
        grid, block = ((ctypes.c_uint * 3)(*size, *(1,) * (3 - len(size))) for size in (grid, block))
        error = _ptx_runtime().host_cuda_ptx_launch(
            *(self.kernels[name], grid, block, ctypes.c_size_t(shared)),
            *(pointers(*map(ctypes.addressof, values)), sizes(*map(ctypes.sizeof, values))),
            ctypes.c_size_t(len(values)),
            *(starts(*(m[0] for m in memory)), bytes_(*(m[1] for m in memory)), ctypes.c_size_t(len(memory))),
        )
        if error:
            raise RuntimeError(error.decode())
