"""Tests on a CUDA GPU. Without one all are skipped; with one the CUDA kernels are those of this build. A test with a
parameter `on` needs that backend instead."""

import json
import time
from pathlib import Path

import _host_cuda
import pytest
import torch

from flowkernels.runtime import backends


def pytest_addoption(parser):
    parser.addoption("--gpu-minutes", type=float, help="tests of tests/gpu that would begin later are skipped")
    parser.addoption("--gpu-results", help="file of outcomes, a line of JSON each; tests that it has are not run again")


def pytest_configure(config):
    config.gpu_start = time.monotonic()
    path = config.getoption("--gpu-results", None)
    if path is None:
        return
    if hasattr(config, "workerinput"):  # a process of several: what the one that started it has read
        config.gpu_done = config.workerinput["gpu_done"]
        return
    path = Path(path)
    lines = path.read_text().splitlines() if path.exists() else ()
    config.gpu_done = {found["test"]: found["outcome"] for found in map(json.loads, lines)}
    config.pluginmanager.register(Results(path))


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    node.workerinput["gpu_done"] = getattr(node.config, "gpu_done", {})


def pytest_collection_modifyitems(config, items):
    done = getattr(config, "gpu_done", {})
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
    items[:] = [item for item in items if item.nodeid not in done]


class Results:
    """Writes what comes of each test at once, so that it is there whatever becomes of the run."""

    def __init__(self, path: Path):
        self.path = path

    def pytest_runtest_logreport(self, report):
        failed_around = report.when != "call" and report.failed
        skipped = report.when == "setup" and report.skipped
        if report.when != "call" and not failed_around and not skipped:
            return
        why = report.longrepr[2] if report.skipped else report.longreprtext.rpartition("\nE ")[2][:300]
        if report.skipped and NO_TIME in why:
            return
        found = dict(test=report.nodeid, outcome=report.outcome, seconds=round(report.duration, 2), why=why)
        with open(self.path, "a") as file:
            print(json.dumps(found), file=file)


NO_TIME = "minutes of --gpu-minutes are over"


@pytest.fixture(autouse=True, scope="session")
def cuda_on_the_host():
    """In place of the kernels compiled for the host, which the other tests have for backend "cuda"."""


@pytest.fixture(autouse=True)
def gpu(request):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    minutes = request.config.getoption("--gpu-minutes", None)
    if minutes is not None and time.monotonic() - request.config.gpu_start > 60 * minutes:
        pytest.skip(f"the {minutes:g} {NO_TIME}")
    on = getattr(request.node, "callspec", None)
    on = "cuda" if on is None else on.params.get("on", "cuda")
    if on == "triton" and backends.triton_interpreted():
        pytest.skip("Triton's kernels are interpreted here; scripts/test_gpu has them compiled (TRITON_INTERPRET=0)")
    with _host_cuda.in_place(None):  # which tests before these may have set
        if reason := backends.why_not(on, "cuda"):
            pytest.fail(f"there is a GPU, but {reason}")
        yield torch.device("cuda", torch.cuda.current_device())
        torch.cuda.synchronize()  # an error of a kernel belongs to the test that launched it
