"""The torch.library namespace of the ops, and what their registrations share."""

import contextlib
import importlib

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack as dispatch_modes
from torch.autograd import _profiler_enabled as _profiling

from flowkernels import backends

with contextlib.suppress(ImportError):
    importlib.import_module("flowkernels._C")  # now, not at the first call: it has to know of forks before they happen

LIBRARY = torch.library.Library("flowkernels", "DEF")
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # csrc/common/dtype.h


def register(schema: str, kernel, reference, fake) -> None:
    """Define an op: `kernel(C, *args)` runs on the compiled module, `reference(*args)` on torch."""
    name = schema.split("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    def run(*args):
        if backends.choose(name, args[0].device.type) == "cpu":
            return kernel(backends.extension(), *args)
        return reference(*args)

    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flowkernels::{name}", fake, lib=LIBRARY)


def direct(op: str, *tensors: Tensor | None, gradient: bool = False):
    """The compiled module, if the call may go straight to it; None if torch's dispatcher has something to do.

    It has under a compiler, a mode, a transform or a profiler, and for tensors that are a subclass, live elsewhere,
    carry a pending negation, or need a gradient (unless the caller sees to that). Otherwise it would only cost time:
    about 40 us a call, and 300 us where there is a gradient.
    """
    if torch.compiler.is_compiling() or dispatch_modes() or _profiling() or _is_transformed():
        return None
    grad = not gradient and torch.is_grad_enabled()
    for t in tensors:
        if t is not None and (type(t) is not Tensor or not t.is_cpu or t.is_neg() or (grad and t.requires_grad)):
            return None
    return backends.extension() if backends.choose(op, "cpu") == "cpu" else None


def is_transformed() -> bool:
    """Inside torch.func's transforms or forward-mode differentiation, for which the ops register no rules."""
    return not torch.compiler.is_compiling() and _is_transformed()


def _is_transformed() -> bool:
    return torch.autograd.forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None
