"""`flowkernels bench straighten_loop`: what an iteration of `straighten` costs, by its parts.

    flowkernels bench straighten_loop --out benchmarks/results && python scripts/straightening_report.py
    flowkernels bench straighten_loop --data digits --threads 1 --iterations 500

The bundled networks are trained on batches of 64 as `straighten` trains them by default; the clock is read at the
edges of each part, about twenty times an iteration, and no other work is added. Networks take turns, in `ROUNDS` runs
of each; the run with the shortest iteration is written. A network that the CSV file has is measured again.
"""

import argparse
from dataclasses import dataclass

from flowkernels.models.bundled import BUNDLED

from ..quality.command import Results, names_of, source_of
from ..straightening.command import numbers
from .shares import PARTS, shares

ROUNDS = 3
FIELDS = ("data", "part", "ms", "share", "iteration_ms", "batch", "iterations", "rounds")
FIELDS += ("hardware", "versions", "threads", "commit", "date")
KEY = ("data", "part", "threads")


@dataclass(frozen=True)
class Sizes:
    """Examples of a batch, trajectories of the bank, iterations of a run."""

    iterations: int
    batch: int = 64
    bank: int = 128


SIZES = {"digits": Sizes(1000), "fashion": Sizes(60)}
QUICK = {name: Sizes(8, batch=8, bank=16) for name in SIZES}


def measured(name: str, sizes: Sizes) -> dict[str, float]:
    model = BUNDLED[name]
    settings = dict(batch=sizes.batch, bank=sizes.bank, iterations=sizes.iterations)
    return shares(model.load(), model.load(), model.shape, **settings)


def rows_of(name: str, sizes: Sizes, rounds: int, seconds: dict[str, float]) -> list[dict]:
    whole = sum(seconds.values())
    of_all = dict(iteration_ms=1000 * whole, batch=sizes.batch, iterations=sizes.iterations, rounds=rounds)
    parts = {part: dict(ms=1000 * seconds[part], share=seconds[part] / whole) for part in PARTS}
    return [dict(data=name, part=part) | figures | of_all for part, figures in parts.items()]


def print_rows(rows: list[dict]) -> None:
    first = rows[0]
    print(f"\n{first['data']}, batch {first['batch']}: an iteration takes {first['iteration_ms']:.3f} ms")
    for row in rows:
        print(f"  {row['part']:<16}{row['ms']:10.3f} ms {row['share']:8.2%}")


def run(args: argparse.Namespace) -> int:
    """Always 0: there is no gate."""
    names = names_of(args.data, SIZES, "--data") if args.data else (["digits"] if args.quick else list(SIZES))
    iterations = numbers(args.iterations, "--iterations")
    if len(iterations) > 1 or (iterations and iterations[0] < 4):
        raise ValueError(f"--iterations: expected one number, at least 4, for straighten_loop, got {args.iterations}")
    if args.minutes is not None:
        raise ValueError(f"--minutes: expected none for straighten_loop (--iterations), got {args.minutes:g}")
    if args.list:
        for name in names:
            print(f"straighten_loop: {name}")
        return 0
    source = source_of(args.threads)
    sizes = {name: (QUICK if args.quick else SIZES)[name] for name in names}
    if iterations:
        sizes = {name: Sizes(iterations[0], of.batch, of.bank) for name, of in sizes.items()}
    rounds = 1 if args.quick else ROUNDS
    best: dict[str, dict[str, float]] = {}
    for _ in range(rounds):
        for name in names:
            seconds = measured(name, sizes[name])
            best[name] = min(best.get(name, seconds), seconds, key=lambda parts: sum(parts.values()))
    results = Results(args.out / "straighten_loop.csv" if args.out else None, FIELDS, KEY)
    for name in names:
        rows = rows_of(name, sizes[name], rounds, best[name])
        print_rows(rows)
        results.add([row | source for row in rows])
    if args.out:
        print(f"{results.path}: {len(results.rows)} rows")
    return 0
