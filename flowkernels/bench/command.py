"""`flowkernels bench`, or `python -m flowkernels.bench`: the cases asked for, timed and tabled."""

import argparse
import functools
import math
import time
import traceback
from collections.abc import Callable

import torch

from flowkernels import _options
from flowkernels._files import expect_target, write_or_keep
from flowkernels.bench import suite
from flowkernels.bench.case import Case, is_kernel
from flowkernels.bench.harness import measure, pinned, rows
from flowkernels.bench.tables import FIELDS, print_case, print_summary, read_csv, write_csv
from flowkernels.bench.timers import timer
from flowkernels.runtime import backends, environment

ALONE = ("quality", "straightening", "straighten_loop")  # with a command and options of their own
OPTIONS = dict(data=ALONE, rows=ALONE[:2], seeds=ALONE[:2], steps=ALONE[1:2], iterations=ALONE[1:])


def add_arguments(add: Callable) -> None:
    """The options of `flowkernels bench`."""
    which = f"which of {', '.join(suite.entries())}; all if none is given; or one of {', '.join(ALONE)}, by itself"
    add("entries", nargs="*", metavar="ENTRY", help=which)
    add("--device", default="cpu", help="torch device")
    add("--threads", type=_options.integer(1, 4096), default=torch.get_num_threads(), help="threads of a CPU run")
    add("--quick", action="store_true", help="a few small cases, a second each")
    add("--seconds", type=_options.above_0, help="time for each case; 6, on a GPU 0.5")
    add(
        "--minutes",
        type=_options.above_0,
        help="for the whole run, the main cases first; other cases are left out; none, on a GPU 9",
    )
    add("--match", default="", help="only cases whose name contains this")
    of_others = "in which the rows of other processors stay"
    add(
        "--out", type=_options.path, help=f"folder for one CSV file an entry, {of_others}; none is written if not given"
    )
    add("--resume", action="store_true", help="keep the cases that --out has of this commit and device already")
    add("--list", action="store_true", help="print the names of the cases and stop")
    alone = "of `bench quality` and `bench straightening`, the benchmarks of samples and of training"
    add("--data", help=f"which data sets, such as digits,fashion; {alone}, and of `bench straighten_loop`")
    add("--rows", help=f"which of its rows, such as uniform,boss; {alone}")
    add("--seeds", type=_options.positive, help=f"3, with --quick 1; of training 1; {alone}")
    of_training = "of `bench straightening`"
    add("--steps", help=f"which N, such as 2,4; {of_training}")
    add(
        "--iterations",
        help=f"which numbers of iterations, such as 100,1500; {of_training}, and of `bench straighten_loop` one",
    )


def run(args: argparse.Namespace) -> int:
    """Run the entries asked for; 1 if a gate of our kernels was red or a case failed."""
    alone = args.entries[0] if args.entries and args.entries[0] in ALONE else None
    if alone and (args.entries[1:] or args.match or args.seconds is not None or args.device != "cpu"):
        raise ValueError(f"{alone}: expected no other ENTRY, --match, --seconds or --device, got one")
    for name, entries in OPTIONS.items():
        if getattr(args, name) is not None and alone not in entries:
            expected = f"the ENTRY {' or '.join(entries)}"
            raise ValueError(f"--{name}: expected {expected}, got {', '.join(args.entries) or 'none'}")
    unknown = not alone and sorted(set(args.entries) - set(suite.entries()))
    if unknown:
        raise ValueError(f"ENTRY: expected one of {', '.join(suite.entries())}, got {', '.join(unknown)}")
    if args.out is not None and not args.out.is_dir():
        raise ValueError(f"--out: expected a folder that exists, got {args.out}")
    if args.resume and (args.out is None or alone):
        raise ValueError(f"--resume: expected --out, and no ENTRY {alone or ' or '.join(ALONE)}")
    if args.out is not None and not args.list:
        for entry in args.entries or suite.entries():
            expect_target(args.out / f"{entry}.csv", "--out")
    if alone:
        with pinned(args.threads):
            return suite.module(f"{alone}.command").run(args)
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
    """The cases asked for, by entry."""
    found = {}
    for entry in args.entries or suite.entries():
        found[entry] = [c for c in suite.cases(entry, device) if args.match in c.name and (c.quick or not args.quick)]
    return found


def _in_order(chosen: dict[str, list[Case]], limited: bool) -> list[tuple[str, Case]]:
    """Entry and case, in turn. Where time is limited the main cases of all entries come first, then the quick ones,
    then of each entry one after the other."""
    found = [(i, entry, case) for entry, cases in chosen.items() for i, case in enumerate(cases)]
    if limited:
        found.sort(key=lambda f: (not f[2].main, not f[2].quick, 0 if f[2].main or f[2].quick else f[0]))
    return [(entry, case) for _, entry, case in found]


def _there(args: argparse.Namespace, source: dict) -> tuple[dict[str, list[dict]], dict[str, list[dict]]]:
    """Of each entry, the rows in --out of other processors, which stay; and with --resume those of this one, version
    and commit, which need not be measured again."""
    others, done = {}, {}
    for entry in args.entries or suite.entries():
        path = args.out / f"{entry}.csv"
        rows = read_csv(path) if path.exists() else []
        for row in rows:
            if unknown := [str(key) for key in row if key not in FIELDS]:
                raise ValueError(f"--out: expected {path} with columns of this version, got {', '.join(unknown)}")
        others[entry] = [r for r in rows if r.get("processor") != source["processor"]]
        same = ("device", "processor", "flowkernels", "commit")
        done[entry] = [r for r in rows if args.resume and all(r.get(k) == source[k] for k in same)]
    return others, done


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
    clock, left_out, end = timer(device), [], time.monotonic() + 60 * args.minutes
    others, done = _there(args, source) if args.out is not None else ({}, {})
    results = {entry: [] for entry in chosen} | done
    there = {(entry, row["case"]) for entry, rows in results.items() for row in rows}
    for entry, case in _in_order(chosen, args.minutes < math.inf):
        threads = case.threads or args.threads
        if threads > args.threads or (entry, case.name) in there:
            continue
        if time.monotonic() >= end:
            left_out.append(f"{entry}: {case.name}")
            continue
        try:
            of_case = [row | source for row in _measured(entry, case, clock, threads, args)]
        except Exception:
            print(f"\n{entry}: {case.name} failed\n{traceback.format_exc()}", flush=True)
            failed = True
            continue
        print_case(of_case, clock.titles)
        results[entry] += of_case
        if args.out is not None:
            everyone = others[entry] + results[entry]
            write_or_keep(args.out / f"{entry}.csv", "--out", functools.partial(write_csv, results=everyone))
    everything = [row for of_entry in results.values() for row in of_entry]
    failed |= any(row["gate"] != "ok" for row in everything if is_kernel(row["provider"]))
    if args.out is not None:
        for entry, of_entry in results.items():
            if of_entry:
                beside = f", beside {len(others[entry])} of other processors" if others[entry] else ""
                print(f"{args.out / entry}.csv: {len(of_entry)} rows{beside}")
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
