"""The CUDA kernels compiled for the host (csrc/host_cuda), built once into build/host_cuda."""

import fcntl
import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUILD = Path(os.environ.get("FLOWKERNELS_HOST_CUDA_BUILD") or ROOT / "build/host_cuda")


@functools.cache
def module(name: str = "host_cuda"):
    """`host_cuda`, or `host_cuda_checked`, which finds races, accesses out of bounds and reads of nothing."""
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
        for command in (configure, [cmake_bin, "--build", BUILD, "--target", name]):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stdout[-8000:] + done.stderr[-4000:])
    (path,) = BUILD.glob(f"{name}.*.so")
    spec = importlib.util.spec_from_file_location(name, path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded
