"""Who observes the calls of the ops: profilers, and `record_calls` (ops/recorded_calls.py).

For profilers there are named ranges, "flowkernels::euler_step.cuda" is that op on that backend: in torch.profiler they
are events, in Nsight's tools NVTX ranges. Asked for by `with flowkernels.profile_ranges():` or FLOWKERNELS_PROFILE=1,
for the whole process. Where anybody observes, every call goes through torch's dispatcher. A replayed CUDA graph has no
calls: they happened when it was recorded.
"""

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator

import torch

present = os.environ.get("FLOWKERNELS_PROFILE") == "1"  # whether there are any; looked at by every call
_lock = threading.Lock()
_profilers = int(present)
_recorders: tuple[Callable, ...] = ()


@contextlib.contextmanager
def profile_ranges() -> Iterator[None]:
    """Every op called inside the `with` block, from any thread, is a range to torch.profiler and to NVTX.

    Examples:
        >>> with torch.profiler.profile() as profile, fk.profile_ranges():
        ...     x = fk.euler_step(torch.zeros(2), torch.ones(2), 0.5)
        >>> any(event.key == "flowkernels::euler_step.cpu" for event in profile.key_averages())
        True
    """
    _change(profilers=1)
    try:
        yield
    finally:
        _change(profilers=-1)


@contextlib.contextmanager
def recorded(see: Callable) -> Iterator[None]:
    """`see(op, args)` ahead of every call inside the `with` block, from any thread."""
    _change(come=see)
    try:
        yield
    finally:
        _change(gone=see)


def _change(profilers: int = 0, come: Callable | None = None, gone: Callable | None = None) -> None:
    global present, _profilers, _recorders
    with _lock:
        _profilers += profilers
        _recorders = tuple(r for r in (*_recorders, come) if r not in (None, gone))
        present = _profilers > 0 or len(_recorders) > 0


@functools.cache
def _has_nvtx() -> bool:
    return torch.cuda.is_available()


@contextlib.contextmanager
def around(op: str, backend: str, args: tuple) -> Iterator[None]:
    """What observers have around one call."""
    for see in _recorders:
        see(op, args)
    if _profilers == 0:
        yield
        return
    name, nvtx = f"flowkernels::{op}.{backend}", _has_nvtx()
    with torch.profiler.record_function(name):
        if nvtx:
            torch.cuda.nvtx.range_push(name)
        try:
            yield
        finally:
            if nvtx:
                torch.cuda.nvtx.range_pop()
