"""A new op, added to a copy of the tree by the steps of CONTRIBUTING.md, "Adding an op": what tests/new_op holds, and a
line in each of three files. The copy compiles the new op's kernels alone: what CMake finds are the folders."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NEW = Path(__file__).parent / "new_op"
LINES = {  # file: a line that is there, and the one that comes after it
    "flowkernels/ops/public.py": (
        "from flowkernels.ops.mlp_sample import mlp_sample as mlp_sample",
        "from flowkernels.ops.axpy import axpy as axpy",
    ),
    "docs/backends.md": ("| op | computes |", "| `axpy` | `x + a y` | | no |"),
    "tests/_bad_calls.py": (
        "def _ops() -> None:",
        '    place("axpy", fk.axpy, x=(lambda: rand(3), is_dense(F32), "y"), y=(lambda: rand(3), is_dense(F32)), '
        "a=(0.5, is_number))",
    ),
}


def add_lines(tree: Path) -> None:
    for name, (before, line) in LINES.items():
        text = (tree / name).read_text()
        (found,) = re.findall(rf"^{re.escape(before)}.*\n(?:\|---.*\n)?", text, re.MULTILINE)
        (tree / name).write_text(text.replace(found, f"{found}{line}\n"))


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    tree = tmp_path_factory.mktemp("tree")
    left_out = shutil.ignore_patterns("__pycache__", "*.so", "results", "fashion", "new_op")
    for name in ("flowkernels", "benchmarks", "scripts", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=left_out)
    others = [path.parent.name for path in (ROOT / "csrc").glob("*/cpu.cpp")]
    shutil.copytree(ROOT / "csrc", tree / "csrc", ignore=shutil.ignore_patterns(*others))
    (tree / "docs").mkdir()
    for name in ("CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "docs/backends.md"):
        shutil.copy(ROOT / name, tree / name)
    shutil.copytree(NEW, tree, dirs_exist_ok=True)
    add_lines(tree)
    flags = "-DFLOWKERNELS_CUDA=OFF -DCMAKE_CXX_FLAGS_RELEASE=-O0"  # of all but the kernels
    run(tree, "setup.py", "build_ext", "--inplace", CMAKE_ARGS=flags)
    return tree


def run(tree: Path, *command: str, **environment: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(tree), "MAX_JOBS": "2"} | environment
    environment.pop("FLOWKERNELS_HOST_CUDA_BUILD", None)
    done = subprocess.run(
        [sys.executable, *command], cwd=tree, capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


def test_the_tests_of_all_ops_have_it_and_pass(tree):
    """On every backend: CPU, CUDA on the host, Triton's interpreter, reference."""
    files = ["test_axpy", "test_contract", "test_direct", "test_triton_host"]
    out = run(tree, "-m", "pytest", "-n", "0", "-k", "axpy", *(f"tests/ops/{name}.py" for name in files))
    (passed,) = re.findall(r"^(\d+) passed", out, re.MULTILINE)
    assert int(passed) > 100


LISTED = """
import sys
sys.path[:0] = ["scripts", "tests"]
import torch
import _bad_calls
from flowkernels.ops.public import OPS
from flowkernels.bench import suite
from flowkernels.ops.library import KERNELS
from flowkernels.runtime import backends
from machine_code import rules

assert "axpy" in OPS
assert "axpy" in KERNELS
assert "axpy" in backends.CUDA_OPS
assert "axpy" in suite.entries()
assert "axpy, one 8x8 image" in [case.name for case in suite.cases("overhead", torch.device("cpu"))]
assert "axpy_kernel" in [rule.name for rule in rules.cuda()]
assert len(rules.triton("axpy")) == 1
assert rules.floors()["axpy"][0].bytes() == 3 << 20
_bad_calls._ops()
assert "axpy" in [place.name for place in _bad_calls.PLACES]
"""


def test_the_lists_have_it(tree):
    run(tree, "-c", LISTED)
    profile = ["bash", "scripts/profile_kernel.sh", "--dry-run", "axpy"]
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(profile, cwd=tree, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "profile-axpy" in done.stdout
