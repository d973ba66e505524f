"""Seconds and memory of work, parts of which are looked at with the clock stopped."""

import ctypes
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PROCESS = Path("/proc/self")


@dataclass
class Clock:
    """Runs inside of `with clock:`, as often as that is.

    wall: seconds by the wall. processor: seconds of all threads of the process, which other processes do not stretch.
    """

    wall: float = 0.0
    processor: float = 0.0

    def __enter__(self) -> "Clock":
        self._began = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *error) -> None:
        self.wall += time.perf_counter() - self._began[0]
        self.processor += time.process_time() - self._began[1]

    def now(self) -> tuple[float, float]:
        """What it shows (wall, processor), while it runs."""
        wall, processor = self._began
        return self.wall + time.perf_counter() - wall, self.processor + time.process_time() - processor

    def add(self, other: "Clock") -> None:
        """What another showed, to a clock that stands still."""
        self.wall += other.wall
        self.processor += other.processor


class Memory:
    """The peak of the process's resident memory above what it is now, in megabytes; None where Linux does not tell."""

    def __init__(self):
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # what is freed and still held would not show again
        self._before = None
        with suppress(OSError):
            (PROCESS / "clear_refs").write_text("5")  # the peak is what is there now
            self._before = self._kilobytes("VmRSS")

    def peak(self) -> float | None:
        return None if self._before is None else (self._kilobytes("VmHWM") - self._before) / 1024

    def _kilobytes(self, name: str) -> int:
        return int(re.search(rf"^{name}:\s+(\d+)", (PROCESS / "status").read_text(), re.MULTILINE)[1])
