"""Which backend runs a call: the context, the environment, what is missing, and what the errors say."""

import asyncio
import logging
import os
import re
import subprocess
import sys
import threading

import _host_cuda
import pytest
import torch

import flowkernels as fk
from flowkernels.ops.euler_step import euler_step
from flowkernels.ops.public import OPS
from flowkernels.ops.samples import samples_of
from flowkernels.runtime import backends
from flowkernels.runtime.backends import BACKENDS, BackendError, backend, choose, explain, why_not

CACHES = (backends.extension, backends._load, backends._decide, backends._from_environment, backends.triton_error)


def forget():
    backends._warned.clear()
    for cached in CACHES:
        getattr(cached, "cache_clear", lambda: None)()


@pytest.fixture(autouse=True)
def nothing_asked_for(monkeypatch):
    monkeypatch.delenv("FLOWKERNELS_BACKEND", raising=False)
    forget()
    yield
    forget()


@pytest.fixture
def no_extension(monkeypatch):
    """The compiled module cannot be imported."""
    monkeypatch.setitem(sys.modules, "flowkernels._C", None)


@pytest.fixture
def calls(monkeypatch):
    """Counts the ops that reach the compiled module."""

    class Counting:
        seen = 0

        def __getattr__(self, name):
            Counting.seen += name.removesuffix("_plain") in OPS
            return getattr(module, name)

    module = backends.extension()
    monkeypatch.setattr(backends, "extension", Counting)
    backends.reader.cache_clear()
    yield Counting
    backends.reader.cache_clear()


def call_all():
    found = []
    for op in OPS:
        sample = next(s for s in samples_of(op).sample_inputs() if s.args[0].numel() > 30)
        result = getattr(fk, op)(*sample.args, **sample.kwargs)
        found += result if isinstance(result, tuple) else [result]
    return found


def test_auto_takes_the_kernels_for_cpu_tensors_and_the_reference_elsewhere():
    for op in OPS:
        assert choose(op, "cpu") == "cpu"
        assert choose(op, "cuda") == choose(op, "mps") == "reference"


def test_the_chosen_backend_is_the_one_that_runs(calls):
    call_all()
    assert calls.seen == len(OPS)
    with backend("cpu"):
        call_all()
    assert calls.seen == 2 * len(OPS)
    with backend("reference"):
        call_all()
    assert calls.seen == 2 * len(OPS)


def test_context_nests_and_ends():
    assert choose("bellman", "cpu") == "cpu"
    with backend("reference"):
        assert choose("bellman", "cpu") == "reference"
        with backend("cpu"):
            assert choose("bellman", "cpu") == "cpu"
        with backend("auto"):
            assert choose("bellman", "cpu") == "cpu"
        assert choose("bellman", "cpu") == "reference"
    assert choose("bellman", "cpu") == "cpu"
    with pytest.raises(KeyError), backend("reference"):
        raise KeyError
    assert choose("bellman", "cpu") == "cpu"


def test_context_belongs_to_its_thread_and_task():
    seen = []
    with backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(choose("bellman", "cpu")))
        thread.start()
        thread.join()

    async def task(name):
        with backend(name):
            await asyncio.sleep(0)
            return choose("bellman", "cpu")

    async def both():
        return await asyncio.gather(task("reference"), task("cpu"))

    assert seen == ["cpu"]
    assert asyncio.run(both()) == ["reference", "cpu"]


def test_environment_variable(monkeypatch, calls):
    monkeypatch.setenv("FLOWKERNELS_BACKEND", "reference")
    assert choose("bellman", "cpu") == "reference"
    call_all()
    assert calls.seen == 0
    with backend("cpu"):
        assert choose("bellman", "cpu") == "cpu"
    with backend("auto"):
        assert choose("bellman", "cpu") == "cpu"
    for name in ("auto", ""):
        monkeypatch.setenv("FLOWKERNELS_BACKEND", name)
        forget()
        assert choose("bellman", "cpu") == "cpu"


def test_unknown_names(monkeypatch):
    message = "expected one of auto, " + ", ".join(BACKENDS) + ", got 'fast'"
    with pytest.raises(BackendError, match="backend: " + message), backend("fast"):
        pass
    monkeypatch.setenv("FLOWKERNELS_BACKEND", "fast")
    with pytest.raises(BackendError, match="FLOWKERNELS_BACKEND: " + message):
        call_all()


@pytest.mark.parametrize("op", OPS)
def test_a_backend_that_cannot_run_the_device_raises(op):
    reason = f"{op}: backend 'cpu' was asked for, but the tensors are on cuda; move them to the CPU or use backend"
    for _ in range(2):  # an error is not remembered as a choice
        with backend("cpu"), pytest.raises(BackendError, match=reason):
            choose(op, "cuda")
    assert why_not("cpu", "cuda").startswith("the tensors are on cuda")
    for device in ("cpu", "cuda"):
        assert why_not("reference", device) is None


def test_without_the_compiled_module(no_extension):
    expected = "ModuleNotFoundError: .*flowkernels._C"
    assert backends.extension() is None
    with pytest.raises(AssertionError, match=expected):
        raise AssertionError(backends.extension_error())
    assert choose("euler_step", "cpu") == "reference"
    results = call_all()
    with backend("cpu"), pytest.raises(BackendError, match=r"the compiled module is missing \(" + expected):
        call_all()
    with backend("cpu"), pytest.raises(BackendError, match=r"reinstall flowkernels with a C\+\+ compiler"):
        choose("euler_step", "cpu")
    with backend("reference"):
        assert all(torch.equal(a, b) for a, b in zip(call_all(), results, strict=True))


def test_with_the_compiled_module():
    assert backends.extension_error() is None
    assert backends.extension().isa() in ("baseline", "avx2", "avx512", "avx512_bf16", "amx")
    assert why_not("cpu", "cpu") is None


def test_choices_are_logged_once_with_the_reason(caplog, no_extension):
    with caplog.at_level(logging.DEBUG, logger="flowkernels"):
        for _ in range(3):
            choose("bellman", "cpu")
        choose("euler_step", "cpu")
        with backend("reference"):
            choose("bellman", "cpu")
    told = [(r.levelname, r.getMessage()) for r in caplog.records if r.name == "flowkernels"]
    # what falls back is a warning, once for a kind of device
    assert [level for level, _ in told] == ["WARNING", "DEBUG", "DEBUG"]
    assert told[0][1].startswith("bellman on cpu: reference (not cpu: the compiled module is missing")
    assert told[1][1].startswith("euler_step on cpu: reference (not cpu: ")
    assert told[2][1] == "bellman on cpu: reference, as asked"


def test_explain_says_what_is_chosen_and_why(monkeypatch):
    assert explain("euler_step", "cpu") == "euler_step on cpu: cpu"
    with backend("reference"):
        assert explain("euler_step", "cpu") == "euler_step on cpu: reference, as asked"
    for device in ("mps", "cuda"):
        with _host_cuda.in_place(None):
            choice, told = choose("euler_step", device), explain("euler_step", device)
        assert told.startswith(f"euler_step on {device}: {choice} (not cuda: ")
    assert "; not triton: the tensors are on mps; move them to a GPU" in explain("euler_step", "mps")
    with backend("cpu"), pytest.raises(BackendError, match="the tensors are on mps"):
        explain("euler_step", "mps")
    with pytest.raises(ValueError, match=r"^op: expected one of flowkernels\.ops\.OPS, got 'eulerstep'"):
        explain("eulerstep", "cpu")


def test_kernels_for_the_host_run_only_where_backend_cuda_is_asked_for():
    with _host_cuda.in_place(_host_cuda.module()):
        assert backends.choose("bellman", "cpu") == "cpu"
        assert why_not("cuda", "cpu", "bellman") == "the tensors are on cpu; move them to a CUDA GPU"
        with backend("cuda"):
            assert backends.choose("bellman", torch.device("cpu")) == "cuda"
            assert explain("bellman", "cpu") == "bellman on cpu: cuda, as asked"
            assert backends.cuda_module() is _host_cuda.module()
        with _host_cuda.in_place(None), backend("cuda"), pytest.raises(BackendError, match="move them to a CUDA GPU"):
            backends.choose("bellman", "cpu")


class Gpu:
    """What torch says of a GPU that is not there."""

    def __init__(self, monkeypatch, *capabilities):
        monkeypatch.delenv("TRITON_INTERPRET")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capabilities[i])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"GPU {i}")


def test_triton_is_taken_where_the_cuda_kernels_cannot_run(monkeypatch):
    Gpu(monkeypatch, (9, 0), (7, 5))
    with _host_cuda.in_place(None):
        for op in OPS:
            assert choose(op, "cuda:0") == choose(op, torch.device("cuda", 0)) == choose(op, "cuda") == "triton"
            assert choose(op, "cuda:1") == "reference"
            assert re.match(rf"{op} on cuda:0: triton \(not cuda: [^;]*\)$", explain(op, "cuda:0"))
    assert "not triton: device 1 (GPU 1) has compute capability 7.5, less than 8.0" in explain("bellman", "cuda:1")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    backends._decide.cache_clear()
    assert choose("bellman", "cuda:0") == "reference"
    assert "not triton: TRITON_INTERPRET=1 has it interpreted" in explain("bellman", "cuda:0")


def test_each_gpu_is_judged_by_itself(monkeypatch):
    """One that the binaries are not for does not turn the CUDA kernels off for the others."""
    Gpu(monkeypatch, (9, 0), (7, 5))
    with _host_cuda.in_place(None):
        monkeypatch.setattr(backends.cuda_module(), "device_problem", lambda: "")
        assert [choose("bellman", f"cuda:{i}") for i in (0, 1)] == ["cuda", "reference"]


def test_triton_that_is_missing_old_or_not_interpreted(monkeypatch):
    x = torch.zeros(4)
    with monkeypatch.context() as patch:
        patch.delenv("TRITON_INTERPRET")
        reason = "the tensors are on cpu; move them to a GPU, or set TRITON_INTERPRET=1 to debug on the CPU"
        with backend("triton"), pytest.raises(BackendError, match=f"euler_step: backend 'triton' .*, but {reason}"):
            euler_step(x, x, 0.1)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "triton", None)
        with (
            backend("triton"),
            pytest.raises(BackendError, match=r"Triton cannot be imported \(.*\); pip install triton"),
        ):
            euler_step(x, x, 0.1)
    backends.triton_error.cache_clear()
    monkeypatch.setattr("triton.__version__", "3.4.0")
    assert why_not("triton", "cpu") == "Triton 3.4.0 is older than 3.5; pip install -U triton"


@pytest.mark.parametrize("value", ["1", "true", "ON", "0", "", "2"])
def test_whether_triton_interprets_is_read_as_triton_reads_it(monkeypatch, value):
    from triton import knobs

    monkeypatch.setenv("TRITON_INTERPRET", value)
    assert backends.triton_interpreted() == knobs.runtime.interpret
    assert (why_not("triton", "cpu") is None) == knobs.runtime.interpret


ROUNDED = """
import torch, flowkernels as fk
x = torch.full((4,), 1 + 2**-8 + 2**-20)
with fk.backend("triton"):
    low = fk.euler_step(x, x, 0.0, low=torch.bfloat16)[1]
assert torch.equal(low, x.bfloat16()), low
"""


def test_the_interpreter_is_mended_however_it_was_asked_for():
    env = os.environ | {"TRITON_INTERPRET": "true"}
    done = subprocess.run([sys.executable, "-c", ROUNDED], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


IMPORT = """
import sys
sys.modules["flowkernels._C"] = None
import flowkernels as fk
from flowkernels.runtime import backends
import torch
x = torch.arange(6.0).view(3, 2)
assert torch.equal(fk.euler_step(x, x, 0.5), 1.5 * x)
assert torch.equal(fk.velocity_gram(x), torch.full((2, 2), 8.0, dtype=torch.float64))
assert fk.bellman(torch.ones(3, 3, dtype=torch.float64), 2)[0][2, 2] == 2
assert "halted; None in sys.modules" in backends.extension_error()
assert not torch.cuda.is_initialized()
"""


def test_import_without_the_compiled_module():
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# CUDA kernels on a machine without a GPU

NO_DRIVER = r"CUDA: .* \(cudaError(InsufficientDriver|NoDevice)\)"


@pytest.fixture
def built():
    """The module of CUDA kernels as nvcc built it, in place of the one for the host."""
    with _host_cuda.in_place(None):
        yield backends.cuda_module()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: tests/gpu runs the kernels")
def test_cuda_kernels_without_a_driver(built):
    assert re.fullmatch(NO_DRIVER, built.device_problem())
    assert built.architectures.split(",")[0] == "80"
    x = torch.zeros(4)
    at = x.data_ptr()
    with pytest.raises(RuntimeError, match=NO_DRIVER):
        built.euler_step(at, at, 0, at, 0, 0, 0, 0, 4, 0.1, 1.0, 0, 0)
    reason = "euler_step: backend 'cuda' was asked for, but the tensors are on cpu; move them to a CUDA GPU"
    with backend("cuda"), pytest.raises(BackendError, match=reason):
        euler_step(x, x, 0.1)
    expected = rf"the driver shows no GPU that this build can use \({NO_DRIVER}\)"
    assert re.fullmatch(expected, why_not("cuda", "cuda", "euler_step"))
    assert choose("euler_step", "cuda") == "reference"
    assert why_not("triton", "cuda", "euler_step") == "torch sees no GPU"


def test_a_device_that_the_binaries_are_not_for(built, monkeypatch):
    monkeypatch.setattr(built, "device_problem", lambda: "")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "Old GPU")
    for capability, runs in {(7, 5): False, (8, 0): True, (8, 9): True, (9, 0): True, (12, 1): True}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i, c=capability: c)
        reason = why_not("cuda", "cuda", "euler_step")
        assert reason is None if runs else reason.startswith(r"device 0 (Old GPU) has none of the architectures 80,90a")
    assert [backends._has_code("90a", 9, minor) for minor in (0, 1)] == [True, False]


def test_a_build_without_nvcc(monkeypatch):
    class Extension:
        pass

    monkeypatch.setattr(backends, "extension", Extension)
    assert why_not("cuda", "cuda").startswith("this build has no CUDA kernels; reinstall flowkernels where nvcc 12.4")
