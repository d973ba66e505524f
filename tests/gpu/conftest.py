"""Tests on a CUDA GPU. Without one all are skipped; with one the CUDA kernels are those of this build. A test with a
parameter `on` needs that backend instead."""

import time

import _host_cuda
import pytest
import torch

from flowkernels.runtime import backends


def pytest_addoption(parser):
    parser.addoption("--gpu-minutes", type=float, help="tests of tests/gpu that would begin later are skipped")


def pytest_configure(config):
    config.gpu_start = time.monotonic()


@pytest.fixture(autouse=True, scope="session")
def cuda_on_the_host():
    """In place of the kernels compiled for the host, which the other tests have for backend "cuda"."""


@pytest.fixture(autouse=True)
def gpu(request):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    minutes = request.config.getoption("--gpu-minutes", None)
    if minutes is not None and time.monotonic() - request.config.gpu_start > 60 * minutes:
        pytest.skip(f"the {minutes:g} minutes of --gpu-minutes are over")
    on = getattr(request.node, "callspec", None)
    on = "cuda" if on is None else on.params.get("on", "cuda")
    if on == "triton" and backends.triton_interpreted():
        pytest.skip("Triton's kernels are interpreted here; scripts/test_gpu has them compiled (TRITON_INTERPRET=0)")
    with _host_cuda.in_place(None):  # which tests before these may have set
        if reason := backends.why_not(on, "cuda"):
            pytest.fail(f"there is a GPU, but {reason}")
        yield torch.device("cuda", torch.cuda.current_device())
        torch.cuda.synchronize()  # an error of a kernel belongs to the test that launched it
