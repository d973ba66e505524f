"""The torch.library namespace of the ops, and what their registrations share."""

import contextlib
import importlib

import torch

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


def is_transformed() -> bool:
    """Inside torch.func's transforms or forward-mode differentiation, for which the ops register no rules."""
    if torch.compiler.is_compiling():
        return False
    return torch.autograd.forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None
