"""The scripts for a GPU, as far as they go without one."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flowkernels.ops import OPS
from flowkernels.ops._samples import generator

ROOT = Path(__file__).parents[1]
PROFILE = ROOT / "scripts/profile_kernel.sh"


def run(*command, **environment):
    environment = os.environ | {"PYTHON": sys.executable} | environment
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120, env=environment)


@pytest.mark.parametrize("script", ["demo", "test", "test_gpu", "test_seeds", "setup.sh", "profile_kernel.sh"])
def test_syntax(script):
    done = run("bash", "-n", ROOT / "scripts" / script)
    assert (done.returncode, done.stderr) == (0, "")
    assert script == "setup.sh" or os.access(ROOT / "scripts" / script, os.X_OK)


@pytest.mark.parametrize("op", OPS)
def test_a_dry_run_prints_the_command(op):
    done = run(PROFILE, "--dry-run", "-o", "a file", op, "K=100, n=1")
    assert done.returncode == 0, done.stderr
    variable, *command = shlex.split(done.stdout)
    assert variable == "FLOWKERNELS_PROFILE=1"
    assert command[:2] == ["ncu", "--set"]
    assert command[command.index("--kernel-name") + 1] == f"regex:.*{op}_.*"
    assert command[command.index("-o") + 1] == "a file"
    assert command[-4:] == [sys.executable, str(ROOT / "scripts/profile_driver.py"), op, "K=100, n=1"]


def test_launches_are_settings():
    command = shlex.split(run(PROFILE, "--dry-run", "bellman", SKIP="5", COUNT="1").stdout)
    assert command[command.index("--launch-skip") + 1] == "5"
    assert command[command.index("--launch-count") + 1] == "1"
    assert command[-1] == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected an op, one of velocity_gram"),
        (["gram"], "got gram"),
        (["--fast", "bellman"], "unknown option --fast"),
        (["bellman", "K=100,", "N=1..10"], "got 3 arguments"),
        (["-o"], "-o: expected a file"),
    ],
)
def test_bad_input(arguments, message):
    done = run(PROFILE, *arguments)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]


@pytest.mark.skipif(shutil.which("ncu") is not None, reason="there is an ncu")
def test_without_ncu():
    done = run(PROFILE, "bellman")
    if Path("/usr/local/cuda/bin/ncu").exists():
        pytest.skip("there is an ncu")
    assert done.returncode == 1
    assert "ncu is not on the PATH" in done.stderr


def test_without_a_gpu(tmp_path):
    ncu = tmp_path / "ncu"
    ncu.write_text("#!/bin/sh\necho ncu was run\n")
    ncu.chmod(0o755)
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = run(PROFILE, "bellman", PATH=path, PYTHON=str(python))
    assert done.returncode == 1
    assert "has no torch that sees a CUDA GPU" in done.stderr
    assert "ncu was run" not in done.stdout
    python.write_text("#!/bin/sh\nexit 0\n")
    done = run(PROFILE, "bellman", PATH=path, PYTHON=str(python))
    assert done.returncode == 0
    assert "ncu was run" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("wrote profile-bellman.ncu-rep")


DRIVER = """
import runpy, sys
from flowkernels import ops
driver = runpy.run_path("scripts/profile_driver.py")
for sys.argv in (
    ["driver", "bellman", "K=100", "--device", "cpu", "--calls", "2"],
    ["driver", "bellman", "", "--device", "cpu"],
    ["driver", "bellman", "2000", "--device", "cpu"],
    ["driver", "euler_step", "33-float32-w3.5-low_bfloat16", "--device", "cpu"],
    ["driver", "bellman", "K=7", "--device", "cpu"],
):
    driver["_gpu_checks"].call = lambda op, sample: getattr(ops, op)(*sample.args, **sample.kwargs)
    driver["main"]()
"""


def test_what_is_profiled():
    done = subprocess.run([sys.executable, "-c", DRIVER], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.stdout.splitlines() == [
        "bellman, case K=100, N=1..10: 2 calls on cpu",
        "bellman, case K=16, N=1..8: 8 calls on cpu",
        "bellman, case K=50, N=1..10: 8 calls on cpu",
        "euler_step, sample 33-float32-w3.5-low_bfloat16: 8 calls on cpu",
    ]
    assert done.returncode == 1
    assert "bellman: no sample has the id 'K=7', and no case has it in its name:\n  K=16, N=1..8" in done.stderr


def test_other_seeds(monkeypatch):
    """One run of a few tests; and other numbers by the variable that it sets."""
    tests = "tests/ops/test_contract.py", "-k", "float64 and euler_step-33 and cpu"
    done = run(sys.executable, ROOT / "scripts/test_seeds.py", "--seeds", "7-7", *tests)
    assert done.returncode == 0, done.stdout + done.stderr
    first, op, last = done.stdout.splitlines()
    assert re.fullmatch(r"FLOWKERNELS_TEST_SEED=7: \d+ passed", first)
    assert re.fullmatch(r"euler_step +\d+ compared, at most 0\.\d\d of the bound", op)
    assert last == "1 runs, 0 with failures"
    same = torch.rand(3, generator=generator(5))
    monkeypatch.setenv("FLOWKERNELS_TEST_SEED", "7")
    assert not torch.equal(torch.rand(3, generator=generator(5)), same)
