"""Writes docs/straightening.md from benchmarks/results/straightening.csv, and what an iteration costs from
straighten_loop.csv beside it.

    flowkernels bench straightening --out benchmarks/results && python scripts/straightening_report.py

What stands above the mark in docs/straightening.md is written by hand and stays.
"""

import argparse
import csv
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import pages  # noqa: E402

from flowkernels.bench import suite  # noqa: E402

ROWS = suite.module("straightening.rows").ROWS
reached, curve, BASELINES = (
    getattr(suite.module("straightening.reached"), n) for n in ("reached", "curve", "BASELINES")
)


class Results:
    """Figures of all seeds, by data set, row, N and iterations."""

    def __init__(self, rows: list[dict]):
        self.rows = rows
        self.data = list(dict.fromkeys(r["data"] for r in rows))
        self.by: dict[tuple, list[dict]] = {}
        for r in rows:
            self.by.setdefault((r["data"], r["row"], int(r["N"]), int(r["iterations"])), []).append(r)

    def names(self, data: str) -> list[str]:
        return [name for name in ROWS if any(d == data and r == name for d, r, _, _ in self.by)]

    def steps(self, data: str) -> list[int]:
        return sorted({N for d, _, N, _ in self.by if d == data})

    def most(self, data: str, name: str) -> int:
        """The iterations of the row as the others have them."""
        return max((i for d, r, _, i in self.by if (d, r) == (data, name)), default=0)

    def mean(self, data: str, name: str, N: int, key: str, iterations: int | None = None) -> float:
        iterations = self.most(data, name) if iterations is None else iterations
        found = [float(r[key]) for r in self.by.get((data, name, N, iterations), []) if r[key] != ""]
        return statistics.fmean(found) if found else float("nan")


def read(path: Path) -> list[dict]:
    """The rows of a file; none where there is no file."""
    if not path.exists():
        return []
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def figure(value: float, form: str = ".3g") -> str:
    return "" if value != value else f"{value:{form}}" if abs(value) < 1000 else f"{value:.0f}"


def best_solver(r: Results, data: str, N: int, key: str) -> tuple[str, float]:
    """The row of targets "solver" and "endpoint" that ends nearest to the teacher."""
    found = {name: r.mean(data, name, N, "rms") for name in r.names(data) if name.startswith(("solver", "endpoint"))}
    found = {name: rms for name, rms in found.items() if rms == rms}
    name = min(found, key=found.get, default="")
    return name, r.mean(data, name, N, key) if name else float("nan")


def targets(r: Results) -> Iterator[tuple[str, str, str, bool | None]]:
    """(what, target, figure, met or None where it was not measured)."""

    def at_most(what: str, most: float, value: float, how: str):
        known = value == value
        return what, f"<= {most:g}", f"{value:.3g} ({how})" if known else "", value <= most if known else None

    for data, N, most in (("fashion", 4, 0.6), ("digits", 4, 0.7)):
        name, rms = best_solver(r, data, N, "rms")
        yield at_most(f"{data}, N = {N}: rms, of `boss`'s with Euler", most, rms / r.mean(data, "boss", N, "rms"), name)
    for what, key, most in (("rms", "rms", 1.15), ("memory", "memory_mb", 0.6)):
        share = r.mean("fashion", "lora", 4, key) / r.mean("fashion", "boss", 4, key)
        yield at_most(f"fashion, N = 4: {what} of LoRA, of all weights'", most, share, "boss")
    name, distance = best_solver(r, "fashion", 4, "distance_to_data")
    teacher = [float(x["teacher_distance_to_data"]) for x in r.rows if x["data"] == "fashion" and x["row"] == name]
    share = distance / teacher[0] if teacher else float("nan")
    yield at_most("fashion, N = 4: Frechet distance to data, of the teacher's", 1.1, share, name)
    found = list(reached(r.rows))
    for data in ("fashion", "digits"):
        quickest = next((x for x in found if (x.data, x.N, x.baseline) == (data, 4, "published")), None)
        share, how = float("nan"), ""
        if quickest:
            share, how = quickest.share(), f"{described(quickest)}; of the processor's {quickest.share(1):.2g}"
        yield at_most(f"{data}, N = 4: time to the published procedure's error, of its own", 0.2, share, how)


def described(x) -> str:
    return f"{x.row}, {x.iterations} iterations" if x.iterations else x.row


def times(r: Results) -> Iterator[str]:
    """The quickest way to each baseline's error, with and without training; where there is none, that too."""
    yield "| model, N | baseline | its rms | seconds (processor) | row | rms | seconds (processor) | of its time |"
    yield "|---|---|---|---|---|---|---|---|"
    found = list(reached(r.rows))
    for base in (x for x in r.rows if x["row"] in BASELINES):
        mine = [x for x in found if (x.data, x.seed, x.N, x.baseline) == (*which(base), base["row"])]
        ways = [next((x for x in mine if ROWS[x.row].trained is trained), None) for trained in (False, True)]
        head = f"| {base['data']}, {base['N']} | {ROWS[base['row']].title}, {base['iterations']} iterations "
        for trained, x in zip((False, True), ways, strict=True):
            if x is None:
                kind = "with training" if trained else "without training"
                yield f"{head}| {float(base['rms']):.3g} | | none {kind} | | | **never** |"
                continue
            theirs, ours = (f"{wall:.3g} ({processor:.3g})" for wall, processor in (x.theirs, x.ours))
            share = f"{x.share():.2g} ({x.share(1):.2g})"
            yield f"{head}| {x.error:.3g} | {theirs} | {described(x)} | {x.rms:.3g} | {ours} | {share} |"


def which(row: dict) -> tuple[str, str, int]:
    return row["data"], row["seed"], int(row["N"])


def table(r: Results, data: str, key: str) -> Iterator[str]:
    """A row for each target as it is trained in full; the best of each column is bold."""
    steps, names = r.steps(data), r.names(data)
    yield f"| row | {' | '.join(f'N = {N}' for N in steps)} |"
    yield "|---" * (len(steps) + 1) + "|"
    values = {(name, N): r.mean(data, name, N, key) for name in names for N in steps}
    best = {N: min((v for (_, n), v in values.items() if n == N and v == v), default=None) for N in steps}
    for name in names:
        cells = (figure(values[name, N]) for N in steps)
        cells = (f"**{c}**" if c and values[name, N] == best[N] else c for c, N in zip(cells, steps, strict=True))
        yield f"| {ROWS[name].title} | {' | '.join(cells)} |"


def costs(r: Results, data: str) -> Iterator[str]:
    """Of N = 4, or what there is next to it."""
    yield "| row | evaluations, thousands | seconds | of processor | an iteration, ms | of processor | memory, MB |"
    yield "|---|---|---|---|---|---|---|"
    for name in r.names(data):
        N = min((n for d, m, n, _ in r.by if (d, m) == (data, name)), key=lambda n: abs(n - 4))
        of = lambda key, name=name, N=N: r.mean(data, name, N, key)  # noqa: E731
        cells = [figure(of("evaluations") / 1000), figure(of("seconds")), figure(of("processor_seconds"))]
        cells += [figure(1000 * of(key)) for key in ("iteration_seconds", "iteration_processor_seconds")]
        title = ROWS[name].title + ("" if N == 4 else f" (N = {N})")
        yield f"| {title} | {' | '.join([*cells, figure(of('memory_mb'))])} |"


def losses(r: Results) -> Iterator[str]:
    """Where training did not pay, or the baseline ended nearer."""
    for data in r.data:
        for N in r.steps(data):
            untrained = {n: r.mean(data, n, N, "rms") for n in r.names(data) if not ROWS[n].trained}
            known = {n: v for n, v in untrained.items() if v == v}
            if not known:
                continue
            best = min(known, key=known.get)
            worse = {n: r.mean(data, n, N, "rms") / known[best] for n in r.names(data) if ROWS[n].trained}
            worse = {n: ratio for n, ratio in worse.items() if ratio > 1}
            if worse:
                told = ", ".join(f"{n} {ratio:.2f}" for n, ratio in sorted(worse.items(), key=lambda x: x[1]))
                yield f"- {data}, N = {N}, rms over that of the best row without training ({best}): {told}"


def section(r: Results, data: str) -> Iterator[str]:
    rows = [x for x in r.rows if x["data"] == data]
    yield f"\n## {data}\n"
    for settings in dict.fromkeys(x["settings"] for x in rows):
        most = max(int(x["iterations"]) for x in rows if x["settings"] == settings)
        yield f"{settings}; {most} iterations. Seeds: {', '.join(sorted({x['seed'] for x in rows}))}."
    beside = sum(float(x["seconds"]) > 1.5 * float(x["processor_seconds"]) for x in rows)
    if beside:
        yield f"{beside} of {len(rows)} rows ran beside other work: their seconds are above 1.5 times the processor's."
    yield "\nRms distance to the teacher's endpoint:\n"
    yield from table(r, data, "rms")
    metric = rows[0]["metric"]
    yield f"\n{metric.capitalize()} to the teacher's samples:\n"
    yield from table(r, data, "distance_to_teacher")
    own = [float(x["teacher_distance_to_data"]) for x in rows if x["teacher_distance_to_data"] != ""]
    if own:
        yield f"\n{metric.capitalize()} to data; the teacher's own is {own[0]:.4g}:\n"
        yield from table(r, data, "distance_to_data")
    yield "\nWhat N = 4 takes:\n"
    yield from costs(r, data)
    shorter = [
        (name, i) for name in r.names(data) for i in sorted({i for d, n, _, i in r.by if (d, n) == (data, name)})
    ]
    shorter = [(name, i) for name, i in shorter if i < r.most(data, name)]
    if shorter:
        yield "\nFewer iterations, each a run of its own whose rate falls to zero; rms, and seconds of N = 4:\n"
        yield f"| row | iterations | {' | '.join(f'N = {N}' for N in r.steps(data))} | seconds |"
        yield "|---|---" + "|---" * len(r.steps(data)) + "|---|"
        for name, i in shorter:
            cells = [figure(r.mean(data, name, N, "rms", i)) for N in r.steps(data)]
            yield f"| {ROWS[name].title} | {i} | {' | '.join(cells)} | {figure(r.mean(data, name, 4, 'seconds', i))} |"


def iteration(rows: list[dict]) -> Iterator[str]:
    """Of each network the parts of an iteration, as `flowkernels bench straighten_loop` has them."""
    if not rows:
        return
    runs: dict[str, dict[str, dict]] = {}
    for row in rows:
        runs.setdefault(f"{row['data']}, batch {row['batch']}, threads {row['threads']}", {})[row["part"]] = row
    yield "\n## What an iteration costs\n"
    yield "Of target `boss`, all else as `fk.straighten` has it by default, in milliseconds: the mean over the middle"
    yield "half of the iterations, of the quickest run. The look for a loss or gradient that is not finite is in"
    yield "`gradient norm`.\n"
    yield f"| part | {' | '.join(runs)} |"
    yield "|---" * (len(runs) + 1) + "|"
    for part in dict.fromkeys(row["part"] for row in rows):
        cells = (f"{figure(float(of[part]['ms']))} ({float(of[part]['share']):.1%})" for of in runs.values())
        yield f"| {part} | {' | '.join(cells)} |"
    whole = (figure(float(next(iter(of.values()))["iteration_ms"])) for of in runs.values())
    yield f"| **all** | {' | '.join(whole)} |"


def write(source: Path, page: Path) -> None:
    r, loop = Results(read(source)), read(source.with_name("straighten_loop.csv"))
    lines = [*pages.targets(targets(r)), "", "## Time to an error", ""]
    lines += [*times(r), "", "## Losses", "", *(list(losses(r)) or ["None."])]
    for data in r.data:
        lines += section(r, data)
    lines += iteration(loop)
    lines += pages.where_it_ran([*r.rows, *loop])
    pages.write(page, "straightening_report.py", lines, new="# Straightening\n\n")
    print(f"{page}: {len(r.rows)} rows")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, default=ROOT / "benchmarks/results/straightening.csv")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/straightening.md")
    args = parser.parse_args()
    write(args.csv, args.page)


if __name__ == "__main__":
    main()
