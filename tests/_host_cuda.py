"""The CUDA kernels compiled for the host (csrc/host_cuda), built once into build/host_cuda."""

import ctypes
import fcntl
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

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
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stdout[-8000:] + done.stderr[-4000:])
    (path,) = BUILD.glob(f"{name}.*.so")
    spec = importlib.util.spec_from_file_location(name, path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


class PtxLibrary:
    """The kernels of a PTX text, translated and compiled, to be launched by name."""

    def __init__(self, text: str, folder: Path):
        sources = [ROOT / "csrc/host_cuda" / name for name in ("emulation.cpp", "ptx.cpp")]
        name = hashlib.sha256(text.encode()).hexdigest()[:16]  # a library is loaded once for each file name
        ptx, cpp, library = (folder / f"{name}.{ending}" for ending in ("ptx", "cpp", "so"))
        ptx.write_text(text)
        translate = [sys.executable, ROOT / "csrc/host_cuda/ptx_to_cpp.py", ptx, cpp]
        compile_ = ["g++", "-std=gnu++17", "-O1", "-march=x86-64-v3", "-ffp-contract=off", "-w", "-fPIC", "-shared"]
        compile_ += ["-I", ROOT / "csrc", "-o", library, cpp, *sources, "-ldl", "-lpthread"]
        for command in (translate, compile_):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stderr[-4000:])
        self.launcher = ctypes.CDLL(library).host_cuda_ptx_launch
        self.launcher.restype = ctypes.c_char_p

    def launch(self, name: str, grid: tuple, block: tuple, shared: int, *arguments):
        """Arguments: numpy arrays, whose addresses are passed, and ctypes values."""
        values = [ctypes.c_void_p(a.ctypes.data) if hasattr(a, "ctypes") else a for a in arguments]
        addresses = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        grid, block = ((ctypes.c_uint * 3)(*size, *(1,) * (3 - len(size))) for size in (grid, block))
        error = self.launcher(
            name.encode(), grid, block, ctypes.c_size_t(shared), addresses, ctypes.c_size_t(len(values))
        )
        if error:
            raise RuntimeError(error.decode())
