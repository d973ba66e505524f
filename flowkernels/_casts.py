"""What a caller's `torch.autocast` keeps: weights as they were cast at their first use in it."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
import torch

F = TypeVar("F", bound=Callable)


@contextlib.contextmanager
def without_gradients() -> Iterator[None]:
    """`torch.no_grad()` of a block that runs networks: casts of weights as they were before it are not used in it, and
    those made in it, some without a graph, are not left to the caller."""
    with torch.no_grad():
        torch.clear_autocast_cache()
        try:
            yield
        finally:
            torch.clear_autocast_cache()


def no_grad(stage: F) -> F:
    """`without_gradients` of a whole stage; `torch.no_grad()` alone in torch.compile, which casts on its own. One
    that is called with `differentiable=True` runs as its caller has it."""

    @functools.wraps(stage)
    def run(*args, **kwargs):
        wanted = kwargs.get("differentiable", False)  # which the stage checks
        if isinstance(wanted, (bool, np.bool_)) and wanted:
            return stage(*args, **kwargs)
        with torch.no_grad():
            if torch.compiler.is_compiling():
                return stage(*args, **kwargs)
            torch.clear_autocast_cache()
            try:
                return stage(*args, **kwargs)
            finally:
                torch.clear_autocast_cache()

    return run
