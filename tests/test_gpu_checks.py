"""The checks of tests/gpu, run on the CPU: on the kernels compiled for the host, and on stand-ins for torch.cuda's
graphs, streams and watch of syncs. A check that could not fail would say nothing, so each is also seen to fail."""

import contextlib
import functools
import os
import subprocess
import sys
import types
from pathlib import Path

import _gpu_checks as checks
import _gpu_pipeline
import ops_cases
import pytest
import torch
from _contract import tensors
from test_capture import HostGraph, Recording
from torch.utils._pytree import tree_map_only

import flowkernels as fk
from flowkernels.ops import triton_common
from flowkernels.ops.public import OPS
from flowkernels.runtime import environment
from flowkernels.runtime.backends import CUDA_OPS, backend

CPU = torch.device("cpu")
HERE = Path(__file__).parent
EACH = pytest.mark.parametrize("op", [op for op in OPS if op in CUDA_OPS])
KEPT = 6  # samples of each op


class Graph(HostGraph):
    """Replays on the kernels that it was recorded on."""

    on = "cuda"

    def replay(self):
        with backend(self.on):
            super().replay()


@pytest.fixture(autouse=True)
def few_samples(monkeypatch):
    every = checks.samples
    monkeypatch.setattr(checks, "samples", lambda op: every(op)[:: max(1, len(every(op)) // KEPT)])


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    """What the checks ask of torch.cuda."""
    stream = types.SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None)
    for name, value in dict(
        **dict(Stream=lambda device: stream, current_stream=lambda device: stream, stream=contextlib.nullcontext),
        **dict(CUDAGraph=Graph, graph=lambda graph, **settings: Recording(graph, **settings)),
        **dict(set_sync_debug_mode=lambda mode: None, _sleep=lambda cycles: None),
    ).items():
        monkeypatch.setattr(torch.cuda, name, value)


# ---- the checks ----

CHECKS = [checks.float64, checks.same_bits, checks.graph, checks.no_wait, checks.other_stream]


@EACH
@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)
def test_the_kernels_on_the_host_pass(op, check):
    assert check(op, CPU) == []


@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)
def test_checks_run_the_kernels_in_triton(check, monkeypatch):
    """Those of one op, interpreted: test_contract.py has all."""
    monkeypatch.setattr(Graph, "on", "triton")
    launch, launched = triton_common.launch, []

    def record(*args, **options):
        launched.append(1)
        launch(*args, **options)

    monkeypatch.setattr(triton_common, "launch", record)
    assert check("euler_step", CPU, "triton") == []
    assert len(launched) >= KEPT - 2  # all but the empty ones


@pytest.mark.parametrize("op", checks.LARGE)
def test_large_ones_in_triton(op):
    assert ops_cases.of(op).large(CPU, 10_003, "triton") <= 4


def with_kernel(monkeypatch, change):
    """Every call of a kernel goes through `change(result)`."""
    for name in ("call", "bare"):
        kernel = getattr(checks, name)
        monkeypatch.setattr(checks, name, lambda *args, kernel=kernel: change(kernel(*args)))


def test_a_wrong_result_is_found(monkeypatch):
    with_kernel(monkeypatch, lambda found: tuple(t + 1e-3 for t in found) if type(found) is tuple else found + 1e-3)
    found = checks.float64("euler_step", CPU)
    assert len(found) >= KEPT - 2  # all but the empty ones
    assert " > " in found[0]


def test_results_that_vary_are_found(monkeypatch):
    calls = []

    def vary(found):
        calls.append(1)
        return tuple(t + len(calls) for t in tensors(found))

    with_kernel(monkeypatch, vary)
    assert len(checks.same_bits("euler_step", CPU)) >= KEPT - 2
    assert len(checks.graph("euler_step", CPU)) >= KEPT - 2
    assert len(checks.other_stream("euler_step", CPU)) >= KEPT - 2


def test_a_result_that_is_not_written_is_found(monkeypatch):
    with_kernel(monkeypatch, lambda found: torch.empty(3))
    assert len(checks.same_bits("euler_step", CPU)) >= KEPT - 2


def test_a_graph_that_keeps_its_first_inputs_is_found(monkeypatch):
    class Stuck(HostGraph):
        def replay(self):
            pass

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Stuck)
    found = checks.graph("euler_step", CPU)
    assert found
    assert all(line.endswith("the replay does not see new values") for line in found)


def test_a_wait_is_named(monkeypatch):
    watching = []

    def waits(found):
        if watching and watching[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation\nand more")
        return found

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", watching.append)
    with_kernel(monkeypatch, waits)
    found = checks.no_wait("euler_step", CPU)
    assert len(found) >= KEPT
    assert found[0].endswith(": called a synchronizing CUDA operation")
    assert watching[-1] == "default"


@pytest.mark.parametrize("op", [op for op in checks.LARGE if op in CUDA_OPS])
def test_large(op):
    assert ops_cases.of(op).large(CPU, 10_003, "cuda") <= 4


@pytest.mark.parametrize("op", [op for op in checks.LARGE if op in CUDA_OPS])
def test_large_ones_that_are_wrong_are_found(op, monkeypatch):
    kernel = getattr(fk, op)
    wrong = functools.partial(tree_map_only, torch.Tensor, lambda t: t * 1.001)
    monkeypatch.setattr(fk, op, lambda *args, **options: wrong(kernel(*args, **options)))
    assert ops_cases.of(op).large(CPU, 10_003, "cuda") > 4


@pytest.mark.parametrize("stage", _gpu_pipeline.STAGES)
def test_pipeline(stage):
    _gpu_pipeline.STAGES[stage](CPU)


# ---- what runs them ----


def test_the_program_for_compute_sanitizer():
    command = [sys.executable, str(HERE / "gpu/every_op.py"), "euler_step", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["euler_step: ran"]


def test_the_table():
    found = checks.table([
        ("tests/gpu/test_ops.py::test_float64[bellman]", "passed"),
        ("tests/gpu/test_ops.py::test_graph[bellman]", "failed"),
        ("tests/gpu/test_ops.py::test_float64[euler_step]", "skipped"),
        ("tests/gpu/test_captured_graph.py::test_no_host_sync[unet]", "passed"),
        ("tests/gpu/test_captured_graph.py::test_no_host_sync[dit]", "passed"),
        ("tests/gpu/test_captured_graph.py::test_no_host_sync[digits]", "failed"),
    ]).splitlines()  # fmt: skip
    assert [line.split() for line in found] == [
        ["op", "float64", "graph"],
        ["bellman", "ok", "FAILED"],
        ["euler_step", "skipped", "-"],
        ["test_captured_graph:", "no_host_sync", "2", "passed,", "1", "failed"],
    ]


def test_the_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    known = dict(device="A GPU", driver="580.1", cuda="13.0", torch="2", flowkernels="1", commit="c", date="2026-01-02")
    monkeypatch.setattr(environment, "provenance", lambda device: known)
    assert checks.machine() == (
        "device A GPU | driver 580.1 | cuda 13.0 | torch 2 | flowkernels 1 | commit c | date 2026-01-02"
    )


def run_pytest(folder, *options, path=""):
    variables = os.environ | {"PYTHONPATH": f"{HERE.parent}:{path}"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=folder, env=variables)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_all_of_it_is_skipped_for_one_reason():
    done = run_pytest(HERE.parent, "tests/gpu", "--gpu-minutes", "9")
    assert done.returncode == 0, done.stdout
    reasons = [line for line in done.stdout.splitlines() if line.startswith("SKIPPED")]
    assert reasons
    assert all(line.endswith("needs a CUDA GPU") for line in reasons)
    assert "failed" not in done.stdout
    assert "passed" not in done.stdout


SEEMING_GPU = """
def pytest_collection_finish(session):
    import _gpu_checks, torch
    torch.cuda.is_available, torch.cuda.current_device = lambda: True, lambda: 0
    _gpu_checks.machine = lambda: ""
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_triton_in_the_interpreter_is_no_test_of_a_gpu(tmp_path, monkeypatch):
    (tmp_path / "seeming_gpu.py").write_text(SEEMING_GPU)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    options = ("-p", "seeming_gpu", "-k", "bellman and triton")
    done = run_pytest(HERE.parent, "tests/gpu/test_ops.py", *options, path=tmp_path)
    assert done.returncode == 0, done.stdout
    skipped = [line for line in done.stdout.splitlines() if line.startswith("SKIPPED")]
    assert skipped
    assert all("scripts/test_gpu has them compiled (TRITON_INTERPRET=0)" in line for line in skipped)
    assert "bellman, triton  " in done.stdout  # in the table
