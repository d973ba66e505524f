"""Which backend runs a call, and why.

`auto` takes the first that can run the call: on a GPU the CUDA kernels, then those in Triton, for CPU tensors the
compiled CPU kernels, and then the torch reference, of which it warns once for each kind of device. A backend that is
asked for (`with backend("cpu")`, or FLOWKERNELS_BACKEND) and cannot run the call raises. `explain` says why; decisions
are logged at DEBUG level, and remembered (what a call spends on it: docs/performance.md).
"""

import contextlib
import contextvars
import functools
import importlib.machinery
import importlib.util
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from flowkernels._checks import describe, expect, expect_shown

BACKENDS = ("cuda", "triton", "cpu", "reference")
# that of torch 2.9: 3.4 has no tl.dot of float64, 3.3 no types as constants, 3.2 no tuples. For AMD's GPUs it does not
# compile linear_euler of float64
OLDEST_TRITON = (3, 5)
CUDA_OPS: set[str] = set()  # registered with a CUDA kernel
HAS_RUN = {  # where each backend's kernels have been run and compared with float64, in every test run
    "cuda": "compiled for the host, and as PTX on the host; tests/gpu on an H200, 2026-11-29",
    "triton": "in Triton's interpreter; PTX of the Gram, the reductions and the loss on the host; on the same H200",
    "cpu": "x86-64: baseline, AVX2, AVX-512, AMX",
    "reference": "x86-64",
}
log = logging.getLogger("flowkernels")


class BackendError(RuntimeError):
    """A backend that was asked for cannot run the call."""


@functools.cache
def extension():
    """The compiled module, or None; `extension_error()` says why not."""
    return _load()[0]


@functools.cache
def reader():
    """The compiled module, where it reads torch's tensors itself (csrc/tensors.h): from torch 2.10 on; or None."""
    read = getattr(extension(), "read_tensors_of", None)
    return extension() if read is not None and read(torch.Tensor, torch.nn.Parameter) else None


def extension_error() -> str | None:
    """Why the compiled module is missing, or None."""
    return _load()[1]


@functools.cache
def _load():
    try:
        module = importlib.import_module("flowkernels._C")
    except ImportError as e:
        return None, f"{type(e).__name__}: {e}"
    if not _ours(path := getattr(module, "__file__", __file__)):
        return None, f"{path} belongs to another installation"
    try:
        module.isa()
    except RuntimeError as e:  # FLOWKERNELS_ISA names a set that is unknown or that the processor lacks
        raise BackendError(str(e)) from None
    return module, None


def _ours(path: str) -> bool:
    """Whether the compiled module lies beside this file. An editable install of another checkout offers its own."""
    return Path(path).parent == Path(__file__).parents[1]


def _way_out() -> str:
    """What brings the compiled module back; from a checkout that was not built, perhaps the installation it hides."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / "CMakeLists.txt").exists():
        return "reinstall flowkernels with a C++ compiler"
    elsewhere = [path for path in sys.path if Path(path).resolve() != folder]
    hidden = importlib.machinery.PathFinder.find_spec("flowkernels", elsewhere)
    start = f"start Python elsewhere to use {Path(hidden.origin).parent}, or " if hidden and hidden.origin else ""
    return (
        f"flowkernels comes from the checkout {folder}, which is not built for this Python: "
        f"{start}reinstall flowkernels with a C++ compiler: pip install -e {folder}"
    )


def not_built() -> str | None:
    """What an import says where there is no compiled module, or None. It is looked for and not loaded."""
    found = importlib.util.find_spec("flowkernels._C")
    if found and _ours(found.origin):
        return None
    return f"flowkernels._C, the compiled module, is missing: on the CPU ops take the slow reference. {_way_out()}"


def cuda_module():
    """The module of CUDA kernels, or None where this build has none."""
    return getattr(extension(), "cuda", None)


def _why_not_cuda(device: torch.device, op: str | None) -> str | None:
    if device.type != "cuda":
        return f"the tensors are on {device.type}; move them to a CUDA GPU"
    module = getattr(extension(), "cuda", None)
    if module is None:
        return "this build has no CUDA kernels; reinstall flowkernels where nvcc 12.4 or newer is on the PATH"
    if problem := module.device_problem():
        return f"the driver shows no GPU that this build can use ({problem})"
    i = device.index or 0
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


@functools.cache
def triton_error() -> str | None:
    """Why Triton cannot be used, or None. Imports it."""
    try:
        triton = importlib.import_module("triton")
    except ImportError as e:
        return f"Triton cannot be imported ({type(e).__name__}: {e}); pip install triton"
    if tuple(int(n) for n in triton.__version__.split(".")[:2]) < OLDEST_TRITON:
        return f"Triton {triton.__version__} is older than {'.'.join(map(str, OLDEST_TRITON))}; pip install -U triton"
    return None


@functools.cache
def triton_op(op: str):
    """The function of a registered op on its Triton kernels."""
    folder = op.removesuffix("_out")
    return getattr(importlib.import_module(f"flowkernels.ops.{folder}.triton_kernel"), op)


def triton_interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on the CPU: slow, and only where they are asked for."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")  # as Triton reads it


def _why_not_triton(device: torch.device) -> str | None:
    if device.type != "cuda" and not (triton_interpreted() and device.type == "cpu"):
        return f"the tensors are on {device.type}; move them to a GPU, or set TRITON_INTERPRET=1 to debug on the CPU"
    if problem := triton_error():
        return problem
    if device.type == "cuda":
        if not torch.cuda.is_available():
            return "torch sees no GPU"
        i = device.index or 0
        if torch.version.hip is None and (capability := torch.cuda.get_device_capability(i)) < (8, 0):
            name = torch.cuda.get_device_name(i)
            return f"device {i} ({name}) has compute capability {'.'.join(map(str, capability))}, less than 8.0"
    return None


class _UnknownBackend(BackendError, ValueError):
    """A name that no backend has."""


def _checked(name: str | None, source: str) -> str | None:
    if name is None or (isinstance(name, str) and name in ("", "auto")):
        return None
    if not isinstance(name, str) or name not in BACKENDS:
        raise _UnknownBackend(f"{source}: expected one of auto, {', '.join(BACKENDS)}, got {describe(name)}")
    return name


_requested: contextvars.ContextVar[str | None] = contextvars.ContextVar("flowkernels_backend", default=None)


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the ops inside the `with` block on this backend: "auto", "cuda", "triton", "cpu" or "reference".

    Examples:
        >>> with fk.backend("reference"):
        ...     fk.euler_step(torch.zeros(2), torch.ones(2), 0.5)
        tensor([0.5000, 0.5000])
    """
    token = _requested.set(_checked(name, "backend") or "auto")
    try:
        yield
    finally:
        _requested.reset(token)


def why_not(name: str, device: torch.device | str, op: str | None = None) -> str | None:
    """Why the backend cannot run this op (or any) on tensors of this device, or None if it can."""
    device = torch.device(device)
    if name == "reference":
        return None
    if name == "cuda":
        return _why_not_cuda(device, op)
    if name == "triton":
        return _why_not_triton(device)
    if device.type != "cpu":
        return f"the tensors are on {device.type}; move them to the CPU or use backend 'reference'"
    if extension() is None:
        return f"the compiled module is missing ({extension_error()}); {_way_out()}"
    return None


def choose(op: str, device: torch.device | str) -> str:
    """The backend for one call of `op` on tensors of this device."""
    return _decide(op, device, _requested.get() or _from_environment())


def explain(op: str, device: torch.device | str) -> str:
    """Which backend runs `op` on tensors of this device, and why not one that comes before it: a line to read.

    Raises BackendError, as the call would, where a backend was asked for that cannot run it.

    Examples:
        >>> print(fk.explain("euler_step", "cpu"))
        euler_step on cpu: cpu
    """
    known = isinstance(op, str) and hasattr(torch.ops.flowkernels, op)
    expect_shown(known, "op", "one of flowkernels.ops.OPS", op)
    try:
        device = torch.device(device)
    except Exception as e:  # RuntimeError or TypeError
        expect(False, "device", "a torch device, or its name", f"{describe(device)} ({str(e).splitlines()[0]:.120})")
    if asked():
        return f"{op} on {device}: {choose(op, device)}, as asked"
    choice, reasons = _first(op, torch.device(device))
    return f"{op} on {device}: {choice}{_because(reasons)}"


def requested() -> str:
    """What `backend` or FLOWKERNELS_BACKEND asks for: the name of a backend, or "auto"."""
    return _requested.get() or _from_environment()


def asked() -> bool:
    """Whether a backend was asked for."""
    return requested() != "auto"


@functools.cache
def _from_environment() -> str:
    """What FLOWKERNELS_BACKEND asks for; read once a process."""
    return _checked(os.environ.get("FLOWKERNELS_BACKEND"), "FLOWKERNELS_BACKEND") or "auto"


@functools.cache
def _decide(op: str, device: torch.device | str, name: str) -> str:
    where = torch.device(device)
    if name != "auto":
        if reason := why_not(name, where, op):
            raise BackendError(f"{op}: backend {name!r} was asked for, but {reason}")
        log.debug("%s on %s: %s, as asked", op, device, name)
        return name
    choice, reasons = _first(op, where)
    slow = choice == "reference" and where.type not in _warned
    log.log(logging.WARNING if slow else logging.DEBUG, "%s on %s: %s%s", op, device, choice, _because(reasons))
    if slow:
        _warned.add(where.type)
    return choice


_warned: set[str] = set()  # kinds of devices on which an op was left to the reference


def _first(op: str, device: torch.device) -> tuple[str, list[str]]:
    """What "auto" takes, and why none before it. Of kernels for a GPU, those compiled for one."""
    reasons = []
    for name in ("cpu", "reference") if device.type == "cpu" else ("cuda", "triton", "reference"):
        reason = why_not(name, device, op)
        if name == "triton" and reason is None and triton_interpreted():
            reason = "TRITON_INTERPRET=1 has it interpreted"
        if reason is None:
            break
        reasons.append(f"not {name}: {reason}")
    return name, reasons


def _because(reasons: list[str]) -> str:
    return f" ({'; '.join(reasons)})" if reasons else ""
