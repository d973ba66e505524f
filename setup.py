"""Builds flowkernels._C with CMake and Ninja; the rest of the metadata is in pyproject.toml."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
MINIMUM_CMAKE = (3, 24)
BENCH = (ROOT / "flowkernels/bench.py").read_text()
ENTRIES = ast.literal_eval(re.search(r"^ENTRIES = (\(.*?\))$", BENCH, re.DOTALL | re.MULTILINE)[1])


def cmake() -> str:
    """The first cmake that is new enough: PATH first, then the one from PyPI."""
    candidates = [shutil.which("cmake")]
    try:
        import cmake as pypi

        candidates.append(str(Path(pypi.CMAKE_BIN_DIR) / "cmake"))
    except ImportError:
        pass
    for path in filter(None, candidates):
        try:
            words = subprocess.check_output([path, "--version"], text=True).split()
        except (OSError, subprocess.CalledProcessError):
            continue
        if tuple(int(p) for p in words[2].split(".")[:2]) >= MINIMUM_CMAKE:
            return path
    sys.exit("flowkernels: building needs cmake >= 3.24: pip install cmake")


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        import pybind11

        out = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        # setuptools would build an editable install in a folder of its own: here, a later install or wheel compiles
        # only what has changed. What CMake found for the earlier one, such as a compiler or none, is found anew.
        tmp = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        for compilers in tmp.glob("CMakeFiles/[0-9]*"):
            shutil.rmtree(compilers)
        (tmp / "CMakeCache.txt").unlink(missing_ok=True)
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        configure = [
            *("-S", str(ROOT), "-B", str(tmp), "-G", "Ninja"),
            f"-DCMAKE_INSTALL_PREFIX={out}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        subprocess.check_call([cmake(), *configure])
        subprocess.check_call([cmake(), "--build", str(tmp), "-j", jobs])
        subprocess.check_call([cmake(), "--install", str(tmp)])


class BuildPy(build_py):
    """Adds what lives in benchmarks/: the fashion checkpoints, beside the script that trains them, and the suite."""

    def run(self):
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "flowkernels", "data")
            self.mkpath(str(target))
            for name in ("fashion", "classifier"):
                file = f"{name}.safetensors"
                self.copy_file(str(ROOT / "benchmarks/fashion" / file), str(target / file))
            suite = Path(self.build_lib, "flowkernels", "_benchmarks")
            self.mkpath(str(suite))
            for name in ("__init__", *ENTRIES, "quality", "datasets", "metrics"):
                self.copy_file(str(ROOT / f"benchmarks/{name}.py"), str(suite / f"{name}.py"))


setup(ext_modules=[Extension("flowkernels._C", [])], cmdclass={"build_ext": CMakeBuild, "build_py": BuildPy})
