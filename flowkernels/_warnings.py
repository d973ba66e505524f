"""Warnings of the stages, which a stage that calls others may hold back."""

import contextlib
import contextvars
import warnings
from collections.abc import Iterator

import torch

_held: contextvars.ContextVar[dict[str, None] | None] = contextvars.ContextVar("flowkernels_warnings", default=None)


def warn(text: str, stacklevel: int) -> None:
    """`warnings.warn(text, UserWarning, stacklevel)` of the function that calls this; in `held_warnings` it waits."""
    held = None if torch.compiler.is_compiling() else _held.get()
    if held is None:
        warnings.warn(text, UserWarning, stacklevel=stacklevel + 1)
    else:
        held[text] = None


@contextlib.contextmanager
def held_warnings() -> Iterator[dict[str, None]]:
    """What stages warn of in the block, once each, in this thread: `warnings.catch_warnings` would change the filters
    of all threads, and two of them would not put back what was there."""
    held = {}
    token = _held.set(held)
    try:
        yield held
    finally:
        _held.reset(token)
