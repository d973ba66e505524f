"""How the benchmark measures: `WallClock` on the CPU, `CudaEvents` on a GPU.

One interface: `plan` says how many calls make one measurement, `seconds` makes it, `host` is what a call costs the host
and `looped` times calls back to back where `seconds` does neither, `extra_memory` is the peak beyond inputs and result,
and `bandwidth` and `operations` are what the machine can do at most.
"""

import contextlib
import ctypes
import functools
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from flowkernels.runtime import backends

# of torch.matmul: the operands, their size, and whether float32 may go through TF32
UNITS = {
    "float32": (torch.float32, 4096, "highest"),
    "tf32": (torch.float32, 8192, "high"),
    "bfloat16": (torch.bfloat16, 8192, "highest"),
    "float16": (torch.float16, 8192, "highest"),
}


class WallClock:
    """Calls by the clock, one after the other; a device other than the CPU is waited for after the last.

    Bandwidth and multiply-adds are those of kernels of ours.
    """

    titles = "% stream", "% FMA"

    def __init__(self, device: torch.device):
        self.device, self.C = device, backends.extension()

    @functools.cached_property
    def arrays(self) -> list[torch.Tensor]:
        n = 1 << (25 if self.device.type == "cpu" else 28)
        return [torch.ones(n, device=self.device) for _ in range(3)]

    def plan(self, call: Callable[[], Any]) -> tuple[int, float]:
        """How many calls make one measurement, and the seconds that it takes."""
        once = min(self.seconds(call, 1) for _ in range(2))
        loops = max(1, min(10_000, math.ceil(1e-3 / max(once, 1e-7))))
        return loops, once * loops

    def seconds(self, call: Callable[[], Any], loops: int) -> float:
        start = time.perf_counter()
        for _ in range(loops):
            call()
        self._wait()
        return (time.perf_counter() - start) / loops

    def host(self, call: Callable[[], Any], calls: int = 1) -> float | None:
        """None: `seconds` is that already."""
        return None

    def looped(self, call: Callable[[], Any], once: float) -> float | None:
        """None: `seconds` is that already."""
        return None

    def bandwidth(self, threads: int) -> float:
        """Bytes a second of `out = a + s b` on arrays larger than the caches."""
        a, b, out = self.arrays
        start = time.perf_counter()
        if self.device.type == "cpu" and self.C is not None:
            self.C.triad(a.data_ptr(), b.data_ptr(), 3.0, out.data_ptr(), a.numel(), threads)
        else:
            torch.add(a, b, alpha=3.0, out=out)
            self._wait()
        return 12 * a.numel() / (time.perf_counter() - start)

    def operations(self, threads: int, unit: str) -> float:
        """float32 operations a second, two for a multiply-add; NaN where there is no kernel for it."""
        if self.device.type != "cpu" or self.C is None:
            return math.nan
        start = time.perf_counter()
        done = self.C.multiply_adds(200_000, threads)
        return done / (time.perf_counter() - start)

    def extra_memory(self, call: Callable[[], Any]) -> float:
        """Peak MB beyond inputs and result while `call` runs; NaN where the system does not tell."""
        gc.collect()
        try:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
            before = _status("VmRSS")
            result = call()
            return max(0.0, _status("VmHWM") - before - _bytes(result)) / 1e6
        except (OSError, AttributeError):
            return math.nan

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)


class CudaEvents:
    """Each call between two events on the stream, in a cold cache: a buffer larger than the L2 is written before it, as
    often as it takes until the host has queued the call. So launches take no part in `seconds`, the time of the device,
    unless they are more than a GPU queues or the call waits for the GPU itself.

    `host` is how long a call keeps the host, with nothing queued before it; `looped` what it costs with its launches,
    by the clock, back to back on a warm cache: about the longer of the two. Bandwidth is that of a copy on the device,
    operations those of torch.matmul.
    """

    titles = "% copy", "% matmul"
    COPIED = 512 << 20  # bytes
    OVERWRITTEN = 256 << 20  # bytes, if the L2 is no larger than half of it
    MOST_WRITES = 200  # before a call: some 10 ms; a GPU queues about 1,000 launches

    def __init__(self, device: torch.device):
        self.device = device
        l2 = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
        self.other = self._empty(max(self.OVERWRITTEN, 2 * l2))
        self.source, self.target = self._empty(self.COPIED).zero_(), self._empty(self.COPIED)
        self.matrices: dict[str, tuple] = {}

    def plan(self, call: Callable[[], Any]) -> tuple[int, float]:
        def by_the_clock() -> float:
            start = time.perf_counter()
            self.seconds(call, 1)
            return time.perf_counter() - start

        once = min(by_the_clock() for _ in range(2))
        loops = max(3, min(20, math.ceil(5e-3 / max(once, 1e-7))))
        return loops, once * loops

    def seconds(self, call: Callable[[], Any], loops: int) -> float:
        writes = min(self.MOST_WRITES, 1 + math.ceil(1.5 * self.host(call) / self.write))

        def before():
            for _ in range(writes):
                self.other.zero_()

        return statistics.median(self._events(call, loops, before))

    @functools.cached_property
    def write(self) -> float:
        """Seconds of one writing of the buffer."""
        return statistics.median(self._events(self.other.zero_, 5))

    def host(self, call: Callable[[], Any], calls: int = 1) -> float | None:
        """Seconds until a call returns; the median of so many, each with nothing queued before it."""
        found = []
        with torch.cuda.device(self.device):
            for _ in range(calls):
                torch.cuda.synchronize(self.device)
                start = time.perf_counter()
                call()
                found.append(time.perf_counter() - start)
        return statistics.median(found)

    def looped(self, call: Callable[[], Any], once: float) -> float | None:
        """None for calls that take so long that their launch says nothing."""
        if once > 2e-3:
            return None
        loops = max(3, min(100, math.ceil(2e-3 / max(once, 1e-7))))
        with torch.cuda.device(self.device):
            torch.cuda.synchronize(self.device)
            start = time.perf_counter()
            for _ in range(loops):
                call()
            torch.cuda.synchronize(self.device)
            return (time.perf_counter() - start) / loops

    def bandwidth(self, threads: int) -> float:
        """Bytes a second of a copy, read and written."""
        return 2 * self.COPIED / statistics.median(self._events(lambda: self.target.copy_(self.source), 3))

    def operations(self, threads: int, unit: str) -> float:
        """Operations a second of a matrix product, two for a multiply-add."""
        dtype, n, precision = UNITS[unit]
        with _float32_products(precision):
            if unit not in self.matrices:
                a, b = (torch.randn(n, n, device=self.device).to(dtype) for _ in "ab")
                self.matrices[unit] = a, b, torch.mm(a, b)
            a, b, out = self.matrices[unit]
            return 2 * n**3 / statistics.median(self._events(lambda: torch.mm(a, b, out=out), 3))

    def limits(self) -> str:
        """All that is measured of the machine, in words."""
        rates = ", ".join(f"{unit} {self.operations(1, unit) / 1e12:.3g}" for unit in UNITS)
        return f"copy {self.bandwidth(1) / 1e9:.3g} GB/s | torch.matmul {rates} TFLOP/s"

    def extra_memory(self, call: Callable[[], Any]) -> float:
        """Peak MB beyond inputs and result while `call` runs, of what torch allocates."""
        gc.collect()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        result = call()
        return (torch.cuda.max_memory_allocated(self.device) - before - _bytes(result)) / 1e6

    def _empty(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def _events(self, call: Callable, loops: int, before: Callable = lambda: None) -> list[float]:
        """Seconds of each of the calls, `before` run ahead of each."""
        with torch.cuda.device(self.device):
            pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(loops)]
            for start, end in pairs:
                before()
                start.record()
                call()
                end.record()
            torch.cuda.synchronize(self.device)
            # events tick in half microseconds
            return [max(start.elapsed_time(end) / 1e3, 5e-7) for start, end in pairs]


def timer(device: torch.device) -> WallClock | CudaEvents:
    return (CudaEvents if device.type == "cuda" else WallClock)(device)


@contextlib.contextmanager
def _float32_products(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {key}")


def _bytes(result: Any) -> int:
    if isinstance(result, torch.Tensor):
        return result.nbytes
    return sum(map(_bytes, result)) if isinstance(result, (tuple, list)) else 0
