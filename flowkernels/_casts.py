"""What a caller's `torch.autocast` keeps: weights as they were cast at their first use in it."""

import functools
from collections.abc import Callable
from typing import TypeVar

import torch

F = TypeVar("F", bound=Callable)


def no_grad(stage: F) -> F:
    """`torch.no_grad()` of a stage that runs networks: casts of weights as they were before it are not used in it, and
    those made in it, some without a graph, are not left to the caller."""

    @functools.wraps(stage)
    def run(*args, **kwargs):
        with torch.no_grad():
            if torch.compiler.is_compiling():  # which casts on its own
                return stage(*args, **kwargs)
            torch.clear_autocast_cache()
            try:
                return stage(*args, **kwargs)
            finally:
                torch.clear_autocast_cache()

    return run
