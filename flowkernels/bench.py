"""The benchmark harness: `flowkernels bench`, or `python -m flowkernels.bench`. The entries are in benchmarks/.

Providers of one piece of work are timed in turns, in an order that rotates, together with what the machine can do at
most at that moment: the memory's bandwidth and the multiply-adds of its cores. Ratios and percentages are medians over
rounds of values taken within one round, since a shared machine is faster in one second than in the next.
"""

import argparse
import contextlib
import csv
import ctypes
import gc
import importlib
import importlib.util
import math
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from flowkernels import backends
from flowkernels._files import whole_file
from flowkernels._version import __version__

ENTRIES = (
    "velocity_gram",
    "cost_from_gram",
    "step_cost",
    "bellman",
    "euler_step",
    "linear_euler",
    "linear_update",
    "segment_points",
    "straighten_loss",
    "mlp_sample",
    "overhead",
    "captured_loop",
    "stages",
)
FIELDS = (
    *("entry", "case", "size", "provider", "gate", "error", "bound", "p20_us", "p50_us", "p80_us", "rounds"),
    *("ratio", "best_torch", "gb_s", "gflop_s", "stream_percent", "fma_percent", "extra_mb"),
    *("device", "threads", "isa", "cpu", "torch", "python", "flowkernels", "commit", "date"),
)


@dataclass(frozen=True)
class Work:
    """One piece of work, on inputs that exist.

    calls: provider -> a call of it; "flowkernels ..." are ours, "torch ..." the peers that ratios are taken to.
    check: (error, bound) of a call's result; more than the bound, or NaN, and no speed is printed.
    moved: bytes that must be read and written. flops: operations that must be done, 0 where that says nothing.
    """

    calls: Mapping[str, Callable[[], Any]]
    check: Callable[[Any], tuple[float, float]]
    moved: float = 0
    flops: float = 0


@dataclass(frozen=True)
class Case:
    """A named piece of work of `size` elements; `make` puts its inputs together.

    curves: the plots that it is a point of: what runs along the axis -> its place there.
    """

    name: str
    size: float
    make: Callable[[], Work]
    threads: int | None = None
    quick: bool = field(default=False, kw_only=True)  # in the quick selection
    curves: Mapping[str, float] = field(default_factory=dict, kw_only=True)


def suite():
    """The package of entries: the checkout's benchmarks/ folder, which a wheel carries as flowkernels/_benchmarks."""
    name = "flowkernels._benchmarks"
    with contextlib.suppress(ModuleNotFoundError):
        return importlib.import_module(name)
    folder = Path(__file__).parents[1] / "benchmarks"
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def cases(entry: str, device: torch.device) -> list[Case]:
    return list(importlib.import_module(f"{suite().__name__}.{entry}").cases(device))


def ours(call: Callable[[], Any], device: torch.device) -> dict[str, Callable[[], Any]]:
    """A provider for each of our backends that can run on the device: the automatic choice, then the others."""
    chosen, *others = [b for b in backends.BACKENDS if backends.why_not(b, device.type) is None]

    def on(name: str) -> Callable[[], Any]:
        def run():
            with backends.backend(name):
                return call()

        return run

    return {f"flowkernels {chosen}": call} | {f"flowkernels {b}": on(b) for b in others}


# Measuring


class Ceilings:
    """Bandwidth and multiply-adds of this machine, measured by kernels of ours."""

    def __init__(self, device: torch.device):
        self.device, self.C = device, backends.extension()
        n = 1 << (25 if device.type == "cpu" else 28)
        self.arrays = [torch.ones(n, device=device) for _ in range(3)]

    def bandwidth(self, threads: int) -> float:
        """Bytes a second of `out = a + s b` on arrays larger than the caches."""
        a, b, out = self.arrays
        start = time.perf_counter()
        if self.device.type == "cpu" and self.C is not None:
            self.C.triad(a.data_ptr(), b.data_ptr(), 3.0, out.data_ptr(), a.numel(), threads)
        else:
            torch.add(a, b, alpha=3.0, out=out)
            _wait(self.device)
        return 12 * a.numel() / (time.perf_counter() - start)

    def multiply_adds(self, threads: int) -> float:
        """float32 operations a second, two for a multiply-add; NaN where there is no kernel for it."""
        if self.device.type != "cpu" or self.C is None:
            return math.nan
        start = time.perf_counter()
        done = self.C.multiply_adds(200_000, threads)
        return done / (time.perf_counter() - start)


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _time(call: Callable[[], Any], loops: int, device: torch.device) -> float:
    start = time.perf_counter()
    for _ in range(loops):
        call()
    _wait(device)
    return (time.perf_counter() - start) / loops


def extra_memory(call: Callable[[], Any], device: torch.device) -> float:
    """Peak MB beyond inputs and result while `call` runs; NaN where the system does not tell."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        return (torch.cuda.max_memory_allocated(device) - before - _bytes(result)) / 1e6
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before = _status("VmRSS")
        result = call()
        return max(0.0, _status("VmHWM") - before - _bytes(result)) / 1e6
    except (OSError, AttributeError):
        return math.nan


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {key}")


def _bytes(result: Any) -> int:
    if isinstance(result, torch.Tensor):
        return result.nbytes
    return sum(map(_bytes, result)) if isinstance(result, (tuple, list)) else 0


@dataclass
class Measured:
    """What one provider did: seconds of each round, and the machine's ceilings in the same rounds."""

    error: float
    bound: float
    extra_mb: float = math.nan
    seconds: list[float] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return self.error <= self.bound


def measure(work: Work, device: torch.device, threads: int, ceilings: Ceilings, budget: float):
    """Gate, warm up and time all providers in turns for about `budget` seconds; at least three rounds."""
    measured, loops, cost = {}, {}, {}
    for name, call in work.calls.items():
        error, bound = work.check(call())
        measured[name] = Measured(error, bound)
        if not measured[name].ok:
            continue
        once = min(_time(call, 1, device) for _ in range(2))
        loops[name] = max(1, min(10_000, math.ceil(1e-3 / max(once, 1e-7))))
        cost[name] = once * loops[name]
        measured[name].extra_mb = extra_memory(call, device)
    names = [name for name in work.calls if measured[name].ok]
    slow = {name for name in names if cost[name] > budget / 8}
    each = sum(cost[name] for name in names if name not in slow) + 0.02
    rounds = max(3, min(200, int(budget / each)))
    stream, fma = [], []
    for r in range(rounds):
        stream.append(ceilings.bandwidth(threads))
        fma.append(ceilings.multiply_adds(threads))
        for k in range(len(names)):
            name = names[(k + r) % len(names)]
            if name not in slow or r < 3:
                measured[name].seconds.append(_time(work.calls[name], loops[name], device))
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
            if work.moved:
                row["gb_s"] = work.moved * statistics.median(rate) / 1e9
                row["stream_percent"] = 100 * work.moved * _paired(rate, stream)
            if work.flops:
                row["gflop_s"] = work.flops * statistics.median(rate) / 1e9
                row["fma_percent"] = 100 * work.flops * _paired(rate, fma)
        yield row


def provenance(device: torch.device) -> dict:
    """What every row says of where it comes from."""
    from flowkernels.demo import environment

    e = environment()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{e['cpu']}, {e['cores']} cores",
        **dict(isa=e["instruction_set"], cpu=e["cpu"], torch=e["torch"], python=e["python"], flowkernels=__version__),
        **dict(commit=_commit(), date=datetime.now(timezone.utc).date().isoformat()),
    }


def _commit() -> str:
    """Of the checkout that this file is in; "+" for changes on top; "" for an installed package."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return ""
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.check_output([*git, "rev-parse", "--short", "HEAD"], text=True).strip()
        changed = subprocess.check_output([*git, "status", "--porcelain", "-uno", "--", "csrc", "flowkernels"])
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head + ("+" if changed else "")


# What it prints and writes


def _cell(value: Any) -> str:
    if value == "" or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 1000 else f"{value:.0f}"


def print_case(results: list[dict]) -> None:
    first = results[0]
    print(f"\n{first['entry']}: {first['case']} ({first['threads']} threads)")
    titles = ("p50 us", "p20", "p80", "x best torch", "GB/s", "% stream", "GFLOP/s", "% FMA", "extra MB")
    keys = ("p50_us", "p20_us", "p80_us", "ratio", "gb_s", "stream_percent", "gflop_s", "fma_percent", "extra_mb")
    print(f"  {'':<24}" + "".join(f"{t:>13}" for t in titles) + "  gate")
    for row in results:
        gate = "ok" if row["gate"] == "ok" else f"RED {row['error']:.2g} > {row['bound']:.2g}"
        print(f"  {row['provider']:<24}" + "".join(f"{_cell(row[k]):>13}" for k in keys) + f"  {gate}", flush=True)


def write_csv(path: Path, results: list[dict]) -> None:
    with whole_file(path) as partial, open(partial, "w", newline="") as f:
        writer = csv.DictWriter(f, FIELDS)
        writer.writeheader()
        for row in results:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def add_arguments(add: Callable) -> None:
    """The options of `flowkernels bench`."""
    add("entries", nargs="*", metavar="ENTRY", help=f"which of {', '.join(ENTRIES)}; all if none is given")
    add("--device", default="cpu", help="torch device")
    add("--threads", type=int, default=torch.get_num_threads(), help="threads of a CPU run")
    add("--quick", action="store_true", help="a few small cases, a second each")
    add("--seconds", type=float, default=6.0, help="time for each case")
    add("--match", default="", help="only cases whose name contains this")
    add("--out", type=Path, help="folder for one CSV file an entry; none is written if not given")
    add("--list", action="store_true", help="print the names of the cases and stop")


def run(args: argparse.Namespace) -> int:
    """Run the entries asked for; 1 if a gate of ours was red or a case failed."""
    unknown = sorted(set(args.entries) - set(ENTRIES))
    if unknown:
        raise ValueError(f"ENTRY: expected one of {', '.join(ENTRIES)}, got {', '.join(unknown)}")
    if args.threads < 1:
        raise ValueError(f"--threads: expected at least 1, got {args.threads}")
    if args.out is not None and not args.out.is_dir():
        raise ValueError(f"--out: expected a folder that exists, got {args.out}")
    try:
        device = torch.zeros(1, device=args.device).device
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"--device: expected a device of this torch build, got {args.device!r} ({e})") from e
    with _pinned(args.threads):
        return _run(args, device)


@contextlib.contextmanager
def _pinned(threads: int) -> Iterator[None]:
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


def _run(args: argparse.Namespace, device: torch.device) -> int:
    source, failed = provenance(device), False
    ceilings = None if args.list else Ceilings(device)
    if not args.list:
        print(" | ".join(f"{k} {v}" for k, v in source.items() if v))
    for entry in args.entries or ENTRIES:
        results = []
        for case in cases(entry, device):
            if args.match not in case.name or (args.quick and not case.quick):
                continue
            if args.list:
                print(f"{entry}: {case.name}")
                continue
            threads = case.threads or args.threads
            if threads > args.threads:
                continue
            torch.set_num_threads(threads)
            torch._dynamo.reset()
            try:
                work = case.make()
                measured = measure(work, device, threads, ceilings, 1.0 if args.quick else args.seconds)
            except Exception:
                print(f"\n{entry}: {case.name} failed\n{traceback.format_exc()}", flush=True)
                failed = True
                continue
            found = [row | source | {"threads": threads} for row in rows(entry, case, work, *measured)]
            failed |= any(row["gate"] != "ok" for row in found if row["provider"].startswith("flowkernels"))
            print_case(found)
            results += found
            del work, measured
        if args.out is not None and results:
            write_csv(args.out / f"{entry}.csv", results)
            print(f"{args.out / entry}.csv: {len(results)} rows")
    return int(failed)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m flowkernels.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser.add_argument)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
