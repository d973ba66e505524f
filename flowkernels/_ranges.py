"""Named ranges around the ops, for profilers: "flowkernels::euler_step.cuda" is that op on that backend.

In torch.profiler they are events, in Nsight's tools NVTX ranges. Asked for by `with flowkernels.profile_ranges():` or
FLOWKERNELS_PROFILE=1, for the whole process; every call then goes through torch's dispatcher. A replayed CUDA graph has
none: its calls happened when it was recorded.
"""

import contextlib
import functools
import os
import threading
from collections.abc import Iterator

import torch

asked = os.environ.get("FLOWKERNELS_PROFILE") == "1"  # looked at by every call
_lock, _count = threading.Lock(), int(asked)


@contextlib.contextmanager
def profile_ranges() -> Iterator[None]:
    """Every op called inside the `with` block, from any thread, is a range to torch.profiler and to NVTX."""
    _add(1)
    try:
        yield
    finally:
        _add(-1)


def _add(n: int) -> None:
    global asked, _count
    with _lock:
        _count += n
        asked = _count > 0


@functools.cache
def _has_nvtx() -> bool:
    return torch.cuda.is_available()


@contextlib.contextmanager
def around(op: str, backend: str) -> Iterator[None]:
    name, nvtx = f"flowkernels::{op}.{backend}", _has_nvtx()
    with torch.profiler.record_function(name):
        if nvtx:
            torch.cuda.nvtx.range_push(name)
        try:
            yield
        finally:
            if nvtx:
                torch.cuda.nvtx.range_pop()
