"""`flowkernels bench`, or `python -m flowkernels.bench`: the cases asked for, timed and tabled."""

import argparse
import functools
import math
import traceback
from collections.abc import Callable

import torch

from flowkernels import _options
from flowkernels._files import expect_target, write_or_keep
from flowkernels.bench import suite
from flowkernels.bench.case import Case
from flowkernels.bench.harness import Shares, measure, pinned, rows
from flowkernels.bench.tables import print_case, print_summary, write_csv
from flowkernels.bench.timers import timer
from flowkernels.runtime import backends, environment


def add_arguments(add: Callable) -> None:
    """The options of `flowkernels bench`."""
    which = f"which of {', '.join(suite.entries())}; all if none is given; or quality"
    add("entries", nargs="*", metavar="ENTRY", help=which)
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
    unknown = not quality and sorted(set(args.entries) - set(suite.entries()))
    if unknown:
        raise ValueError(f"ENTRY: expected one of {', '.join(suite.entries())}, got {', '.join(unknown)}")
    if args.out is not None and not args.out.is_dir():
        raise ValueError(f"--out: expected a folder that exists, got {args.out}")
    if args.out is not None and not args.list:
        for entry in args.entries or suite.entries():
            expect_target(args.out / f"{entry}.csv", "--out")
    if quality:
        with pinned(args.threads):
            return suite.module("quality.command").run(args)
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
    with pinned(args.threads):
        return _run(args, device)


def _chosen(args: argparse.Namespace, device: torch.device) -> dict[str, list[Case]]:
    """The cases asked for, by entry; with a limit of time the quick ones, which matter most, first."""
    found = {}
    for entry in args.entries or suite.entries():
        found[entry] = [c for c in suite.cases(entry, device) if args.match in c.name and (c.quick or not args.quick)]
        if args.minutes < math.inf:
            found[entry].sort(key=lambda case: not case.quick)
    return found


def _measured(entry: str, case: Case, clock, threads: int, args: argparse.Namespace) -> list[dict]:
    """The case's rows; its inputs are made here and gone afterwards."""
    torch.set_num_threads(threads)
    torch.compiler.reset()
    work = case.make()
    measured = measure(work, clock, threads, min(1.0, args.seconds) if args.quick else args.seconds)
    return [row | {"threads": threads} for row in rows(entry, case, work, *measured)]


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
            try:
                of_case = [row | source for row in _measured(entry, case, clock, threads, args)]
            except Exception:
                print(f"\n{entry}: {case.name} failed\n{traceback.format_exc()}", flush=True)
                failed = True
                continue
            failed |= any(row["gate"] != "ok" for row in of_case if row["provider"].startswith("flowkernels"))
            print_case(of_case, clock.titles)
            results += of_case
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
