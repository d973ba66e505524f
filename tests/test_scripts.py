"""The scripts, those for a GPU as far as they go without one; and what a build needs."""

import ast
import contextlib
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tarfile
import types
from pathlib import Path

import cmake
import ninja
import pytest
import torch

import flowkernels as fk
from flowkernels.bench import suite, tables
from flowkernels.ops.public import OPS
from flowkernels.ops.samples import generator
from flowkernels.runtime import backends

ROOT = Path(__file__).parents[1]
PROFILE = ROOT / "scripts/profile_kernel.sh"


def run(*command, **environment):
    environment = os.environ | {"PYTHON": sys.executable} | environment
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120, env=environment)


@pytest.mark.parametrize("script", ["demo", "test", "test_pipelines", "test_seeds", "setup.sh", "profile_kernel.sh"])
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
        ([], f"expected an op, one of {' '.join(sorted(OPS))}"),
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
driver = runpy.run_path("scripts/profile_driver.py")
for sys.argv in (
    ["driver", "bellman", "K=100", "--device", "cpu", "--calls", "2"],
    ["driver", "bellman", "", "--device", "cpu"],
    ["driver", "bellman", "2000", "--device", "cpu"],
    ["driver", "euler_step", "33-float32-w3.5-low_bfloat16", "--device", "cpu"],
    ["driver", "bellman", "K=7", "--device", "cpu"],
):
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


# ---- a machine with a GPU and no network ----


def test_main_cases_are_profiled_in_one_process():
    _, *command = shlex.split(run(PROFILE, "--dry-run", "main").stdout)
    (kernels,) = (command[i + 1] for i, word in enumerate(command) if word == "--kernel-name")
    assert all(re.fullmatch(kernels.removeprefix("regex:"), f"{op}_kernel") for op in OPS)
    assert command[command.index("--profile-from-start") + 1] == "off"
    assert command[-2:] == [str(ROOT / "scripts/profile_driver.py"), "main"]
    assert "main: expected no case, got K=16" in run(PROFILE, "main", "K=16").stderr


def test_every_gpu_test_is_in_a_stage():
    files = runpy.run_path(str(ROOT / "scripts/test_gpu"))["FILES"]
    there = [path.stem.removeprefix("test_") for path in (ROOT / "tests/gpu").glob("test_*.py")]
    assert sorted(file for of_stage in files.values() for file in of_stage) == sorted(there)


@pytest.fixture(scope="module")
def copied_tree(tmp_path_factory):
    """What scripts/test_gpu needs of this tree, built, and no repository; its environment, in which whoever asks for a
    package or a repository leaves a file."""
    there = tmp_path_factory.mktemp("gpu") / "tree"
    ignored = shutil.ignore_patterns("__pycache__", "results", "fashion", "csrc")
    for folder in ("flowkernels", "benchmarks", "scripts", "tests"):
        shutil.copytree(ROOT / folder, there / folder, ignore=ignored)
    (there / "csrc").mkdir()
    shutil.copy(ROOT / "pyproject.toml", there)
    programs = there.parent / "programs"
    programs.mkdir()
    for name in ("pip", "pip3", "uv", "curl", "wget", "apt-get"):
        (programs / name).write_text(f"#!/bin/sh\ntouch {there.parent / 'asked'}\nexit 1\n")
        (programs / name).chmod(0o755)
    keep = {
        k: v for k, v in os.environ.items() if not k.startswith(("FLOWKERNELS", "TRITON", "PYTHON", "PYTEST", "PIP"))
    }
    return there, keep | {"PATH": f"{programs}:{os.environ['PATH']}", "PIP_NO_INDEX": "1", "CUDA_VISIBLE_DEVICES": ""}


def on_the_day(copied_tree, *arguments):
    there, environment = copied_tree
    command = [sys.executable, there / "scripts/test_gpu", *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, env=environment)


def test_the_day_of_the_gpu_is_rehearsed(copied_tree):
    """Up to what needs the GPU: with the Python and torch that are here, nothing asked for; stages are resumed."""
    there, _ = copied_tree
    done = on_the_day(copied_tree)
    assert done.returncode == 1
    assert (
        done.stderr
        == f"scripts/test_gpu: torch {torch.__version__} (CUDA {torch.version.cuda}) sees no CUDA GPU here\n"
    )
    assert not (there / "build").exists()

    stages = "--rehearse", "--no-build", "--stage", "sanitizer", "--stage", "bench"
    done = on_the_day(copied_tree, *stages)
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout
    assert "4 skipped" in said
    assert "bellman: K=100, N=1..10 (" in said
    assert re.findall(r"^test_gpu: (\w+: \w+)", said, re.MULTILINE) == ["sanitizer: passed", "bench: passed"]
    with tarfile.open(there / "build/gpu.tar.gz") as archive:
        names = set(archive.getnames())
    files = {"machine.json", "tree", "sanitizer/log", "sanitizer/results.jsonl", "bench/log", "bench/bellman.csv"}
    assert {f"gpu/{name}" for name in files} <= names

    results = there / "build/gpu/sanitizer/results.jsonl"
    kept = results.read_text().splitlines()
    results.write_text("\n".join(kept[:3]) + "\n")
    assert on_the_day(copied_tree, *stages[:4]).returncode == 0
    assert "3 deselected" in (there / "build/gpu/sanitizer/log").read_text()
    assert [json.loads(line)["test"] for line in results.open()] == [json.loads(line)["test"] for line in kept]
    assert not (there / ".venv").exists()
    assert not (there.parent / "asked").exists()

    report = [sys.executable, ROOT / "scripts/gpu_report", there / "build/gpu.tar.gz", "--out", there / "results"]
    done = run(*report)
    assert done.returncode == 0, done.stderr
    assert "4 rows of the benchmark, 4 tests, 0 launches profiled" in done.stdout


def test_what_another_tree_found_goes(copied_tree):
    there, _ = copied_tree
    out = there.parent / "other"
    (out / "bench").mkdir(parents=True)
    (out / "tree").write_text("another\n")
    for name in ("bench/bellman.csv", "notes"):
        (out / name).write_text("of another tree\n")
    program = "import runpy, pathlib, types\n"
    program += f"module = runpy.run_path({str(there / 'scripts/test_gpu')!r})\n"
    program += f"args = types.SimpleNamespace(out=pathlib.Path({str(out)!r}), rehearse=True)\n"
    program += "module['Run'](args, None).begin()\n"
    done = run(sys.executable, "-c", program)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in out.iterdir()) == ["notes", "tree"]


def gpu_report(*arguments):
    """The script in this process: it takes seconds to import torch."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["gpu_report", *map(str, arguments)])
        patch.setattr(sys, "path", [*sys.path])
        try:
            runpy.run_path(str(ROOT / "scripts/gpu_report"), run_name="__main__")
            status = 0
        except SystemExit as e:  # with a text, or a number
            status = 1 if isinstance(e.code, str) else e.code or 0
            print(e.code if isinstance(e.code, str) else "", file=err)
    return types.SimpleNamespace(returncode=status, stdout=out.getvalue(), stderr=err.getvalue())


LAUNCH = """\
  {kernel} (264, 1, 1)x(320, 1, 1), Context 1, Stream 7, Device 0, CC 9.0
    Section: GPU Speed Of Light Throughput
    ----------------------- ----------- ------------
    Metric Name             Metric Unit Metric Value
    ----------------------- ----------- ------------
    Elapsed Cycles                cycle      267,597
    DRAM Throughput                   %        19.40
    Duration                         {unit}       135.30
    ----------------------- ----------- ------------
    Section: Launch Statistics
    Registers Per Thread             register/thread              93
    Dynamic Shared Memory Per Block      Kbyte/block           68.16
    Waves Per SM                                                1.00
"""
GRAM = "void unnamed>::velocity_gram_increments_kernel<float, 0>(const T1 *, long, int, unnamed>::Cut, float *)"
PAIRS = "bellman_pairs_step_kernel(const double *, long, long, const long *)"


def test_profiles_and_tables_of_a_gpu(tmp_path):
    """A run of scripts/test_gpu as Nsight Compute and the benchmark write it."""
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, kernels, log in (
        (one, [GRAM], "velocity_gram, case K=100, n=100, D=3072, float32\n==PROF== Profiling one: 0%\n"),
        (two, [PAIRS, PAIRS], "bellman_pairs, case K=400, N=1..10\n" + 2 * "==PROF== Profiling k: 0%\n"),
    ):
        (folder / "profile").mkdir(parents=True)
        (folder / "bench").mkdir()
        (folder / "profile/main.txt").write_text("".join(LAUNCH.format(kernel=k, unit="ms") for k in kernels))
        (folder / "profile/log").write_text(log)
        machine = dict(device="NVIDIA H200", driver="580.1", date="2026-11-29", commit="c", cuda="13.0")
        (folder / "machine.json").write_text(json.dumps(machine))
        row = dict(entry="bellman", case="K=16", provider="flowkernels cuda", gate="ok", p50_us=len(kernels))
        tables.write_csv(folder / "bench/bellman.csv", [row])
    done = gpu_report(one, two, "--out", tmp_path / "results")
    assert done.returncode == 0, done.stderr
    results = tmp_path / "results/nvidia-h200-2026-11-29"
    found = tables.read_csv(results / "kernels.csv")
    assert [(row["op"], row["case"], row["launch"], row["kernel"]) for row in found] == [
        ("velocity_gram", "K=100, n=100, D=3072, float32", 0, "unnamed>::velocity_gram_increments_kernel<float, 0>"),
        ("bellman_pairs", "K=400, N=1..10", 0, "bellman_pairs_step_kernel"),
        ("bellman_pairs", "K=400, N=1..10", 1, "bellman_pairs_step_kernel"),
    ]
    assert {
        key: found[0][key] for key in ("us", "dram_percent", "registers", "dynamic_shared", "waves", "driver")
    } == dict(us=135300, dram_percent=19.4, registers=93, dynamic_shared=68160, waves=1, driver="580.1")
    assert tables.read_csv(results / "bellman.csv")[0]["p50_us"] == 2  # of the later archive
    assert "velocity_gram_increments_kernel" in done.stdout
    assert "not measured" in done.stdout

    (one / "pipeline").mkdir()
    (one / "pipeline/results.jsonl").write_text(json.dumps(dict(test="a", outcome="passed")) + '\n{"test": "b", "out')
    whole, cut, empty, other = (tmp_path / f"{name}.tar.gz" for name in ("whole", "cut", "empty", "other"))
    for path, folder in ((whole, one), (empty, None), (other, one / "bench")):
        with tarfile.open(path, "w:gz") as tar:
            if folder:
                tar.add(folder, "gpu")
    cut.write_bytes(whole.read_bytes()[:200])
    broken = [cut, empty, other, tmp_path / "nowhere.tar.gz", one / "bench", one / "machine.json"]
    done = gpu_report(*broken, whole, "--out", tmp_path / "of_whole")
    assert done.returncode == 1
    assert [line.split(": ")[1] for line in done.stderr.splitlines()] == list(map(str, broken))
    assert "1 rows of the benchmark, 1 tests, 1 launches profiled" in done.stdout

    (two / "profile/log").write_text("bellman, case K=16\n==PROF== Profiling k: 0%\n")
    done = gpu_report(two, "--out", tmp_path / "results")
    assert "differ in the ops profiled" in done.stderr
    assert {row["case"] for row in tables.read_csv(results / "kernels.csv")} == {""}


def imported(path):
    """The first names of what a file imports, relative imports aside."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.partition(".")[0]


def test_benchmarks_and_scripts_take_nothing_from_the_tests():
    files = [p for p in [*ROOT.glob("benchmarks/**/*.py"), *ROOT.glob("scripts/**/*")] if p.is_file()]
    files = [p for p in files if p.suffix == ".py" or p.read_bytes().startswith(b"#!/usr/bin/env python")]
    tests = {p.stem for p in ROOT.glob("tests/**/*.py")} | {"tests"}
    assert {"bellman.py", "gpu_model.py", "test_versions"} < {p.name for p in files}
    assert [(p.name, name) for p in files for name in imported(p) if name in tests] == []


# ---- what a build needs, and makes ----

LISTED = """
import json
from distutils.core import run_setup
command = run_setup("setup.py", stop_after="config").get_command_obj("build_py")
command.ensure_finalized()
command.build_lib = "wheel"
print(json.dumps(command.get_outputs(include_bytecode=False)))
"""


def test_what_a_wheel_carries():
    """Beside the compiled module: the package, and the suite of benchmarks with its checkpoints; nothing that trains,
    tests or makes pages."""
    command = [sys.executable, "-c", f"import setuptools\n{LISTED}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    found = {str(Path(path).relative_to("wheel")) for path in json.loads(done.stdout.splitlines()[-1])}
    files = {path for folder in ("flowkernels", "benchmarks") for path in (ROOT / folder).rglob("*") if path.is_file()}
    files = {str(path.relative_to(ROOT)) for path in files if path.suffix not in (".pyc", ".so", ".csv")}
    assert found == {re.sub("^benchmarks/", "flowkernels/_benchmarks/", path) for path in files}
    entries = {f"flowkernels/_benchmarks/{entry}.py" for entry in suite.entries()}
    assert len(entries) > len(OPS)
    assert entries < found
    assert {f"flowkernels/_benchmarks/fashion/{name}.safetensors" for name in ("fashion", "classifier")} < found


def configured(tmp_path, flags):
    """CMake on a compiler that says what these flags make of g++."""
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\nexec g++ {flags} "$@"\n')
    compiler.chmod(0o755)
    command = [Path(cmake.CMAKE_BIN_DIR) / "cmake", "-S", ROOT, "-B", tmp_path / "build", "-G", "Ninja"]
    command += [f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR) / 'ninja'}", f"-DCMAKE_CXX_COMPILER={compiler}"]
    return run(*command, "-DFLOWKERNELS_SANITIZE=address")


CLANG = "-D__clang__ -D__clang_major__={} -D__clang_minor__=0 -D__clang_patchlevel__=1"


@pytest.mark.parametrize(
    ("flags", "name"),
    [("-U__GNUC__ -D__GNUC__=10", "GNU 10."), (CLANG.format(12), "Clang 12.0.1")],
)
def test_a_compiler_out_of_range_is_refused(tmp_path, flags, name):
    done = configured(tmp_path, flags)
    assert done.returncode == 1
    said = " ".join(done.stderr.split())
    assert f"expected gcc >= 11 or clang >= 13, got {name}" in said
    assert "CXX=... names another" in said


@pytest.mark.parametrize("flags", ["-U__GNUC__ -D__GNUC__=11", CLANG.format(13)])
def test_the_oldest_compilers_are_taken(tmp_path, flags):
    done = configured(tmp_path, flags)
    assert done.returncode == 0, done.stderr


SETUP = """
import importlib, runpy, sys, unittest.mock
import setuptools
name, version = sys.argv.pop(1), sys.argv.pop(1)
importlib.import_module(name).__version__ = version
versions = {"cmake": "9.9.9", "ninja": "9.9.9", name: version}


def check_output(command, **_):
    return f"{versions[command[0].rpartition('/')[2]]}.git"


unittest.mock.patch("subprocess.check_output", check_output).start()
unittest.mock.patch("subprocess.check_call", lambda command: print(*command)).start()
sys.argv[:] = ["setup.py", "-q", "build_ext", "--build-lib", "build/unused"]
runpy.run_path("setup.py", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("name", "old", "oldest"),
    [("setuptools", "76.1", "77.0.1"), ("pybind11", "2.12.9", "2.13"), ("cmake", "3.23.5", "3.24"),
     ("ninja", "1.10.2", "1.11.1")],
)  # fmt: skip
def test_build_tools_that_are_too_old_are_named(tmp_path, name, old, oldest):
    """Without build isolation nobody else looks at pyproject.toml's list."""
    checkout = tmp_path / "checkout"
    (checkout / "flowkernels").mkdir(parents=True)
    for file in (
        "setup.py",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "flowkernels/_version.py",
    ):
        shutil.copy(ROOT / file, checkout / file)

    def build(version):
        command = [sys.executable, "-c", SETUP, name, version]
        return subprocess.run(command, capture_output=True, text=True, cwd=checkout, timeout=120)

    done = build(old)
    assert done.returncode == 1, done.stdout
    assert f"flowkernels: building needs {name} >= {oldest}, found {old}: pip install -U {name}" in done.stderr
    done = build(oldest)
    assert done.returncode == 0, done.stderr
    assert "--install" in done.stdout


def test_ranges_are_stated_once():
    """docs/versions.md says what pyproject.toml, CMakeLists.txt, the scripts and the backends ask for."""
    table = (ROOT / "docs/versions.md").read_text()
    stated = {}
    for line in table.splitlines():
        if found := re.match(r"\| ([^|]+?) \| (\d[\d.]*)", line):
            stated[found[1].lower()] = found[2]
    text = {name: (ROOT / name).read_text() for name in ("pyproject.toml", "CMakeLists.txt", "scripts/setup.sh")}
    declared = {}
    for name, oldest in re.findall(r'"(\w+)>=([\d.]+)"', text["pyproject.toml"]):
        declared.setdefault(name, oldest)  # what the extra for pipelines asks for is newer
    declared["python"] = re.search(r'requires-python = ">=([\d.]+)"', text["pyproject.toml"])[1]
    declared |= {"gcc": re.search(r"OLDEST_GNU (\d+)", text["CMakeLists.txt"])[1]}
    declared |= {"clang": re.search(r"OLDEST_Clang (\d+)", text["CMakeLists.txt"])[1]}
    declared |= {"nvcc": re.search(r"CUDA_COMPILER_VERSION VERSION_LESS ([\d.]+)\)", text["CMakeLists.txt"])[1]}
    for name in ("python", "torch", "triton", "numpy", "safetensors", "tqdm", "matplotlib", "diffusers", "setuptools",
                 "pybind11", "cmake", "ninja", "gcc", "clang", "nvcc"):  # fmt: skip
        assert stated[name] == declared[name], name
    assert stated["triton"] == ".".join(map(str, backends.OLDEST_TRITON))
    assert re.search(r"cmake_minimum_required\(VERSION ([\d.]+)\)", text["CMakeLists.txt"])[1] == stated["cmake"]
    comparable = [v.replace(".", ", ") for v in (stated["torch"], stated["python"])]
    assert [f"({v})" in text["scripts/setup.sh"] for v in comparable] == [True, True]


def test_versions_are_stated_once():
    """pre-commit has the tools of pyproject.toml's lint extra, CITATION.cff the package's version."""
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    lint = dict(re.findall(r'"([\w-]+)(?:\[\w+\])?==([\d.]+)"', (ROOT / "pyproject.toml").read_text()))
    assert re.findall(r"/(?:mirrors-)?(ruff|clang-format).*\n\s+rev: v(.*)", hooks) == [
        (tool, lint[tool]) for tool in ("ruff", "clang-format")
    ]
    assert re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1] == fk.__version__


def test_the_ends_of_the_ranges_are_listed():
    done = run(sys.executable, ROOT / "scripts/test_versions", "--list")
    assert done.returncode == 0, done.stderr
    assert [line.partition(":")[0] for line in done.stdout.splitlines()[:2]] == ["Python 3.10", "Python 3.13"]
    assert any(line.startswith(("g++", "c++")) for line in done.stdout.splitlines())
    assert os.access(ROOT / "scripts/test_versions", os.X_OK)


def test_figures_are_made(tmp_path):
    done = run(sys.executable, ROOT / "scripts/figures.py", "--out", tmp_path, "--samples", "48", "--grid", "16")
    assert done.returncode == 0, done.stderr
    made = sorted(path.name for path in tmp_path.iterdir())
    assert made == sorted(path.name for path in (ROOT / "docs/figures").iterdir())
