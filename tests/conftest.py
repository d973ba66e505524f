import gc
import os

# before torch: idle threads sleep, since on a busy machine spinning ones hold back those that work
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# before triton: its kernels run in the interpreter (scripts/test_gpu turns that off)
os.environ.setdefault("TRITON_INTERPRET", "1")

import _gpu_checks
import _host_cuda
import hypothesis
import pytest
import torch

# test_new_op.py runs what is in the one, in a copy of the tree; scripts/test_pipelines runs the other
collect_ignore = ["new_op", "pipelines"]

# the same examples every time, but where scripts/test_seeds asks for others
fixed = not os.environ.get("FLOWKERNELS_TEST_SEED")
hypothesis.settings.register_profile("flowkernels", deadline=None, max_examples=40, derandomize=fixed)
hypothesis.settings.load_profile("flowkernels")


def pytest_addoption(parser):
    parser.addoption(
        "--exhaustive",
        action="store_true",
        help="all combinations where tests take pairs of choices (_pairs.py)",
    )


def pytest_configure(config):
    if config.getoption("exhaustive"):
        os.environ["FLOWKERNELS_EXHAUSTIVE"] = "1"  # tests are parametrised as their files are imported


def pytest_collection_finish(session):
    """What is there by now stays: collections of garbage need not look at thousands of tests each time."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(trylast=True)  # after the fixtures of a file are gone
def pytest_runtest_teardown(item, nextitem):
    """So does what a file leaves: torch's compiler by itself holds more objects than all tests."""
    if nextitem is None or nextitem.path != item.path:
        gc.collect()
        gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def cuda_on_the_host():
    """Backend "cuda" is, where a test asks for it, the CUDA kernels compiled for the host. scripts/test_versions asks
    for none, and does without."""
    if os.environ.get("FLOWKERNELS_HOST_CUDA") == "0":
        yield
        return
    with _host_cuda.in_place(_host_cuda.module()):
        yield


@pytest.fixture(autouse=True)
def two_threads():
    """Two threads whatever the machine has, so that every run splits the work in the same parts. scripts/test_seeds
    tries one."""
    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("FLOWKERNELS_TEST_THREADS") or 2))
    yield
    torch.set_num_threads(before)


@pytest.hookimpl(wrapper=True, tryfirst=True)  # after all that pytest itself prints
def pytest_sessionfinish(session):
    """A table of what tests/gpu found. Here, since of two processes that run tests the one that prints does not load
    tests/gpu/conftest.py."""
    outcome = yield
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    results = list(getattr(session.config, "gpu_done", {}).items())  # of an earlier run
    for kind in ("passed", "failed", "error", "skipped"):
        for report in reporter.stats.get(kind, ()) if reporter else ():
            ours = "tests/gpu/" in getattr(report, "nodeid", "")
            if ours and (report.when == "call" or kind in ("error", "skipped")):
                results.append((report.nodeid, "failed" if kind == "error" else kind))
    if results and torch.cuda.is_available():
        reporter.section("on the GPU")
        reporter.write_line(_gpu_checks.table(sorted(results)))
        reporter.write_line(_gpu_checks.machine())
    return outcome
