"""The benchmark harness: `flowkernels bench`, or `python -m flowkernels.bench`. The entries are in benchmarks/.

Providers of one piece of work are timed in turns, in an order that rotates, together with what the machine can do at
most at that moment: the memory's bandwidth and the multiply-adds of its cores, or a GPU's copies and matrix products.
Ratios and percentages are medians over rounds of values taken within one round, since a shared machine is faster in one
second than in the next. How a GPU is measured is in _timers.py.
"""

import argparse
import contextlib
import csv
import functools
import importlib
import importlib.util
import math
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from flowkernels import _options
from flowkernels._files import expect_target, whole_file, write_or_keep
from flowkernels._timers import CudaEvents, WallClock, timer
from flowkernels.runtime import backends, environment

ENTRIES = (
    "velocity_gram",
    "cost_from_gram",
    "step_cost",
    "bellman",
    "bellman_pairs",
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
    *("looped_us", "driver", "cuda", "clocks"),  # of a GPU
)


@dataclass(frozen=True)
class Work:
    """One piece of work, on inputs that exist.

    calls: provider -> a call of it; "flowkernels ..." are ours, "torch ..." the peers that ratios are taken to.
    check: (error, bound) of a call's result; more than the bound, or NaN, and no speed is printed.
    moved: bytes that must be read and written. flops: operations that must be done, 0 where that says nothing.
    unit: the matrix products that `flops` are compared with on a GPU, a key of _timers.UNITS.
    """

    calls: Mapping[str, Callable[[], Any]]
    check: Callable[[Any], tuple[float, float]]
    moved: float = 0
    flops: float = 0
    unit: str = "float32"


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


def interpreted(backend: str) -> bool:
    """Whether it is Triton's interpreter, whose speed says nothing."""
    return backend == "triton" and backends.triton_interpreted()


def ours(call: Callable[[], Any], device: torch.device) -> dict[str, Callable[[], Any]]:
    """A provider for each of our backends that can run on the device: the automatic choice, then the others."""
    chosen, *others = [b for b in backends.BACKENDS if backends.why_not(b, device) is None and not interpreted(b)]

    def on(name: str) -> Callable[[], Any]:
        def run():
            with backends.backend(name):
                return call()

        return run

    return {f"flowkernels {chosen}": call} | {f"flowkernels {b}": on(b) for b in others}


# Measuring


@dataclass
class Measured:
    """What one provider did: seconds of each round, and the machine's ceilings in the same rounds."""

    error: float
    bound: float
    extra_mb: float = math.nan
    seconds: list[float] = field(default_factory=list)
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
        error, bound = work.check(call())
        measured[name] = Measured(error, bound)
        if not measured[name].ok:
            continue
        loops[name], cost[name] = clock.plan(call)
        measured[name].extra_mb = clock.extra_memory(call)
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
            if m.looped:
                row["looped_us"] = 1e6 * statistics.median(m.looped)
            if work.moved:
                row["gb_s"] = work.moved * statistics.median(rate) / 1e9
                row["stream_percent"] = 100 * work.moved * _paired(rate, stream)
            if work.flops:
                row["gflop_s"] = work.flops * statistics.median(rate) / 1e9
                row["fma_percent"] = 100 * work.flops * _paired(rate, fma)
        yield row


# What it prints and writes


def _cell(value: Any) -> str:
    if value == "" or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 1000 else f"{value:.0f}"


def print_case(results: list[dict], titles: tuple[str, str] = WallClock.titles) -> None:
    """titles: what the bandwidth and the operations are percentages of."""
    first = results[0]
    print(f"\n{first['entry']}: {first['case']} ({first['threads']} threads)")
    columns = {"p50 us": "p50_us", "p20": "p20_us", "p80": "p80_us"}
    if any(row["looped_us"] != "" for row in results):
        columns["in a loop"] = "looped_us"
    columns |= {"x best torch": "ratio", "GB/s": "gb_s", titles[0]: "stream_percent", "GFLOP/s": "gflop_s"}
    columns |= {titles[1]: "fma_percent", "extra MB": "extra_mb"}
    print(f"  {'':<24}" + "".join(f"{t:>13}" for t in columns) + "  gate")
    for row in results:
        gate = "ok" if row["gate"] == "ok" else f"RED {row['error']:.2g} > {row['bound']:.2g}"
        cells = "".join(f"{_cell(row[k]):>13}" for k in columns.values())
        print(f"  {row['provider']:<24}{cells}  {gate}", flush=True)


PEERS = {"x eager": "torch eager", "x compile": "torch compile", "x loop": "published loop"}


def print_summary(results: list[dict], titles: tuple[str, str]) -> None:
    """One line a case: our default call, how many times as long its peers take, and how near it is to the limits."""
    if not results:
        return
    name = 2 + max(len(f"{row['entry']}: {row['case']}") for row in results)
    columns = ("ours us", "in a loop", *PEERS, *titles)
    print(f"\n{'':<{name}}" + "".join(f"{c:>11}" for c in columns) + "  gate")
    for key in dict.fromkeys((row["entry"], row["case"]) for row in results):
        of = {row["provider"]: row for row in results if (row["entry"], row["case"]) == key}
        ours_of = [row for name, row in of.items() if name.startswith("flowkernels")]
        mine = ours_of[0]
        times = [of.get(peer, {}).get("p50_us", "") for peer in PEERS.values()]
        known = mine["p50_us"] != ""
        ratios = [t / mine["p50_us"] if known and t != "" else "" for t in times]
        cells = [mine["p50_us"], mine["looped_us"], *ratios, mine["stream_percent"], mine["fma_percent"]]
        gates = "ok" if all(row["gate"] == "ok" for row in ours_of) else "RED"
        print(f"{': '.join(key):<{name}}" + "".join(f"{_cell(c):>11}" for c in cells) + f"  {gates}", flush=True)


def write_csv(path: Path, results: list[dict]) -> None:
    with whole_file(path) as partial, open(partial, "w", newline="") as f:
        writer = csv.DictWriter(f, FIELDS)
        writer.writeheader()
        for row in results:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def add_arguments(add: Callable) -> None:
    """The options of `flowkernels bench`."""
    add("entries", nargs="*", metavar="ENTRY", help=f"which of {', '.join(ENTRIES)}; all if none is given; or quality")
    add("--device", default="cpu", help="torch device")
    add("--threads", type=_options.integer(1, 4096), default=torch.get_num_threads(), help="threads of a CPU run")
    add("--quick", action="store_true", help="a few small cases, a second each")
    add("--seconds", type=_options.above_0, help="time for each case; 6, on a GPU 0.5")
    add(
        "--minutes",
        type=_options.above_0,
        help="for the whole run, shared out; other cases are left out; none, on a GPU 9",
    )
    add("--match", default="", help="only cases whose name contains this")
    add("--out", type=_options.path, help="folder for one CSV file an entry; none is written if not given")
    add("--list", action="store_true", help="print the names of the cases and stop")
    of_quality = "of `bench quality`, the benchmark of samples"
    add("--data", help=f"which of digits, fashion, mixture2, mixture64, such as digits,fashion; {of_quality}")
    add("--rows", help=f"which of its rows, such as uniform,boss; {of_quality}")
    add("--seeds", type=_options.positive, help=f"3, with --quick 1; {of_quality}")


def run(args: argparse.Namespace) -> int:
    """Run the entries asked for; 1 if a gate of ours was red or a case failed."""
    quality = args.entries[:1] == ["quality"]
    alone = [name for name in ("data", "rows", "seeds") if getattr(args, name) is not None]
    if quality and (args.entries[1:] or args.match or args.seconds is not None or args.device != "cpu"):
        raise ValueError("quality: expected no other ENTRY, --match, --seconds or --device, got one")
    if alone and not quality:
        raise ValueError(f"--{alone[0]}: expected the ENTRY quality, got {', '.join(args.entries) or 'none'}")
    unknown = not quality and sorted(set(args.entries) - set(ENTRIES))
    if unknown:
        raise ValueError(f"ENTRY: expected one of {', '.join(ENTRIES)}, got {', '.join(unknown)}")
    if args.threads < 1:
        raise ValueError(f"--threads: expected at least 1, got {args.threads}")
    if args.out is not None and not args.out.is_dir():
        raise ValueError(f"--out: expected a folder that exists, got {args.out}")
    if args.out is not None and not args.list:
        for entry in args.entries or ENTRIES:
            expect_target(args.out / f"{entry}.csv", "--out")
    for option in ("seconds", "minutes", "seeds"):
        value = getattr(args, option)
        if value is not None and not value > 0:
            raise ValueError(f"--{option}: expected more than 0, got {value}")
    if quality:
        with _pinned(args.threads):
            return importlib.import_module(f"{suite().__name__}.quality").run(args)
    try:
        device = torch.zeros(1, device=args.device).device
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"--device: expected a device of this torch build, got {args.device!r} ({e})") from e
    if device.type == "cuda" and (reason := backends.why_not("cuda", "cuda")):
        raise ValueError(f"--device: expected a GPU that our kernels run on, got {args.device!r}: {reason}")
    if args.seconds is None:
        args.seconds = 0.5 if environment.is_gpu(device) else 6.0
    if args.minutes is None:
        args.minutes = 9.0 if environment.is_gpu(device) else math.inf
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


def _chosen(args: argparse.Namespace, device: torch.device) -> dict[str, list[Case]]:
    """The cases asked for, by entry; with a limit of time the quick ones, which matter most, first."""
    found = {}
    for entry in args.entries or ENTRIES:
        found[entry] = [c for c in cases(entry, device) if args.match in c.name and (c.quick or not args.quick)]
        if args.minutes < math.inf:
            found[entry].sort(key=lambda case: not case.quick)
    return found


def _run(args: argparse.Namespace, device: torch.device) -> int:
    chosen = _chosen(args, device)
    if args.list:
        for entry, found in chosen.items():
            for case in found:
                print(f"{entry}: {case.name}")
        return 0
    source, failed = environment.provenance(device), False
    print(" | ".join(f"{k} {v}" for k, v in source.items() if v))
    clock, everything, left_out = timer(device), [], []
    shares = Shares(args.minutes, {entry: len(found) for entry, found in chosen.items()})
    for entry, found in chosen.items():
        results = []
        shares.begin(entry)
        for case in found:
            threads = case.threads or args.threads
            if threads > args.threads:
                continue
            if shares.spent():
                left_out.append(f"{entry}: {case.name}")
                continue
            torch.set_num_threads(threads)
            torch._dynamo.reset()
            try:
                work = case.make()
                measured = measure(work, clock, threads, min(1.0, args.seconds) if args.quick else args.seconds)
            except Exception:
                print(f"\n{entry}: {case.name} failed\n{traceback.format_exc()}", flush=True)
                failed = True
                continue
            rows_of_case = [row | source | {"threads": threads} for row in rows(entry, case, work, *measured)]
            failed |= any(row["gate"] != "ok" for row in rows_of_case if row["provider"].startswith("flowkernels"))
            print_case(rows_of_case, clock.titles)
            results += rows_of_case
            del work, measured
        everything += results
        if args.out is not None and results:
            write_or_keep(args.out / f"{entry}.csv", "--out", functools.partial(write_csv, results=results))
            print(f"{args.out / entry}.csv: {len(results)} rows")
    if left_out:
        print(f"\nleft out, {args.minutes:g} minutes being over (--minutes): " + "; ".join(left_out))
    if environment.is_gpu(device):
        print_summary(everything, clock.titles)
        print(clock.limits())
        print(" | ".join(source[k] for k in ("device", "driver", "cuda", "torch", "date") if source[k]))
    return int(failed)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m flowkernels.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser.add_argument)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
