"""Which backend runs a call, and why.

`auto` takes the CUDA kernels for tensors on an NVIDIA GPU, the compiled CPU kernels for CPU tensors, and the torch
reference elsewhere. A backend that is asked for
(`with backend("cpu")`, or FLOWKERNELS_BACKEND) and cannot run the call raises. Decisions are logged at DEBUG level.
"""

import contextlib
import contextvars
import functools
import importlib
import logging
import os

BACKENDS = ("cuda", "cpu", "reference")
CUDA_OPS: set[str] = set()  # registered with a CUDA kernel
log = logging.getLogger("flowkernels")


class BackendError(RuntimeError):
    """A backend that was asked for cannot run the call."""


@functools.cache
def extension():
    """The compiled module, or None; `extension_error()` says why not."""
    return _load()[0]


def extension_error() -> str | None:
    """Why the compiled module is missing, or None."""
    return _load()[1]


@functools.cache
def _load():
    try:
        module = importlib.import_module("flowkernels._C")
    except ImportError as e:
        return None, f"{type(e).__name__}: {e}"
    try:
        module.isa()
    except RuntimeError as e:  # FLOWKERNELS_ISA names a set that is unknown or that the processor lacks
        raise BackendError(str(e)) from None
    return module, None


@functools.cache
def cuda_module():
    """The module of CUDA kernels, or None where this build has none."""
    return _host_cuda or getattr(extension(), "cuda", None)


_host_cuda = None


@contextlib.contextmanager
def host_cuda(module):
    """For tests: inside the `with` block backend "cuda" is this module, whose kernels are compiled for the host (see
    csrc/host_cuda) and take CPU tensors. "auto" leaves it alone."""
    global _host_cuda
    before, _host_cuda = _host_cuda, module
    cuda_module.cache_clear(), _decide.cache_clear()
    try:
        yield
    finally:
        _host_cuda = before
        cuda_module.cache_clear(), _decide.cache_clear()


def _why_not_cuda(device: str, op: str | None) -> str | None:
    if device != "cuda":
        return f"the tensors are on {device}; move them to a CUDA GPU"
    module = getattr(extension(), "cuda", None)
    if module is None:
        return "this build has no CUDA kernels; reinstall flowkernels where nvcc 12.4 or newer is on the PATH"
    if problem := module.device_problem():
        return f"the driver shows no GPU that this build can use ({problem})"
    import torch

    for i in range(torch.cuda.device_count()):
        if not _has_code(module.architectures, *torch.cuda.get_device_capability(i)):
            return (
                f"device {i} ({torch.cuda.get_device_name(i)}) has none of the architectures {module.architectures}; "
                "reinstall flowkernels with CMAKE_ARGS=-DFLOWKERNELS_CUDA_ARCHS=..."
            )
    return None if op is None or op in CUDA_OPS else "it has no CUDA kernel"


def _has_code(architectures: str, major: int, minor: int) -> bool:
    """Whether a device of this compute capability runs binaries for one of the architectures ("80,90a"): they run on
    the same major version from their minor one on, or with a letter on theirs alone."""
    for arch in architectures.split(","):
        number = int(arch.rstrip("af"))
        if number // 10 == major and (number % 10 == minor if arch.endswith("a") else number % 10 <= minor):
            return True
    return False


def _checked(name: str | None, source: str) -> str | None:
    if name in (None, "", "auto"):
        return None
    if name not in BACKENDS:
        raise BackendError(f"{source}: expected one of auto, {', '.join(BACKENDS)}, got {name!r}")
    return name


_requested: contextvars.ContextVar[str | None] = contextvars.ContextVar("flowkernels_backend", default=None)


@contextlib.contextmanager
def backend(name: str):
    """Run the ops inside the `with` block on this backend: "auto", "cuda", "cpu" or "reference"."""
    token = _requested.set(_checked(name, "backend") or "auto")
    try:
        yield
    finally:
        _requested.reset(token)


def why_not(name: str, device: str, op: str | None = None) -> str | None:
    """Why the backend cannot run this op (or any) on tensors of this device type, or None if it can."""
    if name == "reference":
        return None
    if name == "cuda":
        return _why_not_cuda(device, op)
    if device != "cpu":
        return f"the tensors are on {device}; move them to the CPU or use backend 'reference'"
    if extension() is None:
        return f"the compiled module is missing ({extension_error()}); reinstall flowkernels with a C++ compiler"
    return None


def choose(op: str, device: str) -> str:
    """The backend for one call of `op` on tensors of this device type."""
    return _decide(op, device, _requested.get() or _from_environment())


def asked() -> bool:
    """Whether a backend was asked for, by `backend` or by FLOWKERNELS_BACKEND."""
    return (_requested.get() or _from_environment()) != "auto"


@functools.cache
def _from_environment() -> str:
    """What FLOWKERNELS_BACKEND asks for; read once a process."""
    return _checked(os.environ.get("FLOWKERNELS_BACKEND"), "FLOWKERNELS_BACKEND") or "auto"


@functools.cache
def _decide(op: str, device: str, requested: str) -> str:
    if requested != "auto":
        if requested == "cuda" and device == "cpu" and _host_cuda is not None:
            return requested
        if reason := why_not(requested, device, op):
            raise BackendError(f"{op}: backend {requested!r} was asked for, but {reason}")
        log.debug("%s on %s: %s, as asked", op, device, requested)
        return requested
    reasons = []
    for name in BACKENDS if device == "cuda" else BACKENDS[1:]:
        if (reason := why_not(name, device, op)) is None:
            log.debug("%s on %s: %s%s", op, device, name, f" ({'; '.join(reasons)})" if reasons else "")
            return name
        reasons.append(f"not {name}: {reason}")
    raise BackendError(f"{op}: no backend can run it: {'; '.join(reasons)}")
