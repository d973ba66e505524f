"""How a case is measured.

Providers of one piece of work are timed in turns, in an order that rotates, together with what the machine can do at
most at that moment: the memory's bandwidth and the multiply-adds of its cores, or a GPU's copies and matrix products.
Ratios and percentages are medians over rounds of values taken within one round, since a shared machine is faster in one
second than in the next. How a GPU is measured is in timers.py.
"""

import contextlib
import math
import os
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from flowkernels.bench.case import Case, Work
from flowkernels.bench.tables import FIELDS
from flowkernels.bench.timers import CudaEvents, WallClock


@dataclass
class Measured:
    """What one provider did: seconds of each round; and of its first call, its check and its warming up, `began`."""

    error: float
    bound: float
    began: float = math.nan
    extra_mb: float = math.nan
    seconds: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    looped: list[float] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return self.error <= self.bound


def measure(work: Work, clock: WallClock | CudaEvents, threads: int, budget: float, limits: bool = True):
    """Gate, warm up and time all providers in turns for about `budget` seconds; at least three rounds.

    limits: whether what the machine can do at most is measured as well, in every round.
    """
    measured, loops, cost = {}, {}, {}
    for name, call in work.calls.items():
        start = time.monotonic()
        error, bound = work.check(call())
        measured[name] = Measured(error, bound)
        if not measured[name].ok:
            continue
        loops[name], cost[name] = clock.plan(call)
        measured[name].extra_mb = clock.extra_memory(call)
        measured[name].began = time.monotonic() - start
    names = [name for name in work.calls if measured[name].ok]
    slow = {name for name in names if cost[name] > budget / 8}
    each = sum(cost[name] for name in names if name not in slow) + (0.02 if limits else 1e-6)
    rounds = max(3, min(200, int(budget / each)))
    stream, fma = [], []
    for r in range(rounds):
        if limits:
            stream.append(clock.bandwidth(threads))
            fma.append(clock.operations(threads, work.unit))
        for k in range(len(names)):
            name = names[(k + r) % len(names)]
            if name not in slow or r < 3:
                measured[name].seconds.append(clock.seconds(work.calls[name], loops[name]))
                if (host := clock.host(work.calls[name], min(5, loops[name]))) is not None:
                    measured[name].host.append(host)
                if (looped := clock.looped(work.calls[name], cost[name] / loops[name])) is not None:
                    measured[name].looped.append(looped)
    return measured, stream, fma


def _percentile(values: list[float], q: float) -> float:
    values = sorted(values)
    return values[min(len(values) - 1, int(q * len(values)))]


def _paired(a: list[float], b: list[float]) -> float:
    return statistics.median(x / y for x, y in zip(a, b, strict=False)) if a and b else math.nan


def rows(entry: str, case: Case, work: Work, measured: dict[str, Measured], stream, fma) -> Iterator[dict]:
    """One row of results for each provider; without figures where the gate is red."""
    peers = {name: m for name, m in measured.items() if name.startswith("torch") and m.seconds}
    best = min(peers, key=lambda name: statistics.median(peers[name].seconds), default=None)
    for name, m in measured.items():
        row = dict.fromkeys(FIELDS, "")
        row |= dict(entry=entry, case=case.name, size=case.size, provider=name, error=m.error, bound=m.bound)
        row |= dict(gate="ok" if m.ok else "RED", rounds=len(m.seconds), extra_mb=m.extra_mb)
        if m.seconds:
            rate = [1 / s for s in m.seconds]
            row |= {f"p{q}_us": 1e6 * _percentile(m.seconds, q / 100) for q in (20, 50, 80)}
            row["best_torch"] = best or ""
            if best:
                row["ratio"] = _paired(peers[best].seconds, m.seconds)
            row["began_s"] = m.began
            if m.host:
                row["host_us"] = 1e6 * statistics.median(m.host)
            if m.looped:
                row["looped_us"] = 1e6 * statistics.median(m.looped)
            if work.moved:
                row["gb_s"] = work.moved * statistics.median(rate) / 1e9
                row["stream_percent"] = 100 * work.moved * _paired(rate, stream)
            if work.flops:
                row["gflop_s"] = work.flops * statistics.median(rate) / 1e9
                row["fma_percent"] = 100 * work.flops * _paired(rate, fma)
        yield row


@contextlib.contextmanager
def pinned(threads: int) -> Iterator[None]:
    """As many threads, on the same cores for every provider; as before afterwards."""
    before = torch.get_num_threads()
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else None
    try:
        if cores is not None:
            os.sched_setaffinity(0, sorted(cores)[:threads])
        torch.set_num_threads(threads)
        yield
    finally:
        torch.set_num_threads(before)
        if cores is not None:
            os.sched_setaffinity(0, cores)


class Shares:
    """The time of a run, shared out: an entry gets of what is left in proportion to its cases, and keeps none of it.

    An entry's cases come in order, the quick ones first, until its share is spent. A case that has begun goes on.
    """

    def __init__(self, minutes: float, cases: Mapping[str, int]):
        self.end, self.left = time.monotonic() + 60 * minutes, dict(cases)
        self.entry_end = self.end

    def begin(self, entry: str) -> None:
        now, all_left = time.monotonic(), sum(self.left.values())
        self.entry_end = now + (self.end - now) * self.left.pop(entry) / max(1, all_left)

    def spent(self) -> bool:
        return time.monotonic() >= self.entry_end
