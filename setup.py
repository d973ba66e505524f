"""The packages, and flowkernels._C, which CMake and Ninja build; the rest of the metadata is in pyproject.toml."""

import ast
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
# what pyproject.toml says a build needs; without build isolation nobody else looks
REQUIRES = re.search(r"^requires = (\[.*?\])$", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)[1]
MINIMUM = dict(requirement.split(">=") for requirement in ast.literal_eval(REQUIRES))


def old(name: str, version: str) -> bool:
    numbers = [[int(n) for n in re.findall(r"\d+", v)[:3]] for v in (version, MINIMUM[name])]
    return numbers[0] < numbers[1]


def need(name: str, found: str):
    return sys.exit(f"flowkernels: building needs {name} >= {MINIMUM[name]}, found {found}: pip install -U {name}")


def package(name: str):
    """The module of that name, new enough."""
    try:
        module = importlib.import_module(name)
    except ImportError:
        need(name, "none")
    return need(name, module.__version__) if old(name, module.__version__) else module


def program(name: str) -> str:
    """The first cmake or ninja that is new enough: PATH first, then the one from PyPI."""
    candidates, found = [shutil.which(name)], "none"
    try:
        module = importlib.import_module(name)
        candidates.append(str(Path(module.CMAKE_BIN_DIR if name == "cmake" else module.BIN_DIR) / name))
    except ImportError:
        pass
    for path in filter(None, candidates):
        try:
            found = re.search(r"\d+\.\d+(\.\d+)?", subprocess.check_output([path, "--version"], text=True))[0]
        except (OSError, subprocess.CalledProcessError):
            continue
        if not old(name, found):
            return path
    return need(name, found)


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        pybind11 = package("pybind11")
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
            f"-DCMAKE_MAKE_PROGRAM={program('ninja')}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        cmake = program("cmake")
        subprocess.check_call([cmake, *configure])
        subprocess.check_call([cmake, "--build", str(tmp), "-j", jobs])
        subprocess.check_call([cmake, "--install", str(tmp)])


package("setuptools")
setup(
    # the benchmarks are a folder of the checkout, and in a wheel a package of ours
    package_dir={"flowkernels._benchmarks": "benchmarks"},
    packages=[
        *find_packages(include=["flowkernels", "flowkernels.*"]),
        *("flowkernels._benchmarks", "flowkernels._benchmarks.quality", "flowkernels._benchmarks.straightening"),
        *("flowkernels._benchmarks.straighten_loop", "flowkernels._benchmarks.many_devices"),
    ],
    ext_modules=[Extension("flowkernels._C", [])],
    cmdclass={"build_ext": CMakeBuild},
)
