"""Writes docs/quality.md and its plots from benchmarks/results/quality.csv.

    flowkernels bench quality --out benchmarks/results && python scripts/quality_report.py

What stands above the mark in docs/quality.md is written by hand and stays.
"""

import argparse
import csv
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import pages  # noqa: E402

from flowkernels.bench import suite  # noqa: E402

ROWS = suite.module("quality.rows").ROWS
ONE_CALL = [name for name in ("best", "fit") if name in ROWS]
GRADIENTS = ("ld3", "bespoke")
FREE = [name for name, row in ROWS.items() if row.known and not row.calibrated and name not in GRADIENTS]


class Results:
    """Figures of all seeds, by data set, row and N."""

    def __init__(self, rows: list[dict]):
        self.rows = rows
        self.by: dict[tuple, list[dict]] = {}
        for r in rows:
            self.by.setdefault((r["data"], r["row"], int(r["N"])), []).append(r)
        self.data = list(dict.fromkeys(r["data"] for r in rows))

    def values(self, data: str, row: str, N: int, key: str) -> list[float]:
        """Of every seed that has it."""
        return [float(r[key]) for r in self.by.get((data, row, N), []) if r[key] != ""]

    def mean(self, data: str, row: str, N: int, key: str) -> float:
        found = self.values(data, row, N, key)
        return statistics.fmean(found) if found else float("nan")

    def ratio(self, data: str, row: str, other: str, N: int, key: str) -> float:
        """One row's mean over another's, of the seeds that both have."""
        found = [{r["seed"]: float(r[key]) for r in self.by.get((data, name, N), [])} for name in (row, other)]
        seeds = found[0].keys() & found[1].keys()
        sums = [sum(values[seed] for seed in seeds) for values in found]
        return sums[0] / sums[1] if seeds else float("nan")

    def interval(self, data: str, row: str, other: str, N: int) -> tuple[float, float, float]:
        """The ratio of two rows' rms with its interval of 95 %: a bootstrap over parts of the held-out samples of all
        seeds, the same ones for both rows."""
        pairs = []
        for mine in self.by.get((data, row, N), []):
            theirs = [r for r in self.by.get((data, other, N), []) if r["seed"] == mine["seed"]]
            if theirs and mine.get("parts") and theirs[0].get("parts"):
                pairs += zip(*([float(p) for p in r["parts"].split()] for r in (mine, theirs[0])), strict=True)
        if not pairs:
            return (float("nan"),) * 3
        errors = np.array(pairs)
        drawn = errors[np.random.default_rng(0).integers(0, len(errors), (4000, len(errors)))].sum(1)
        low, high = np.quantile((drawn[:, 0] / drawn[:, 1]) ** 0.5, (0.025, 0.975))
        return (errors[:, 0].sum() / errors[:, 1].sum()) ** 0.5, low, high

    def names(self, data: str) -> list[str]:
        return [name for name in ROWS if any(d == data and r == name for d, r, _ in self.by)]

    def steps(self, data: str) -> list[int]:
        """The columns: N of the uniform row."""
        return sorted(N for d, r, N in self.by if d == data and r == "uniform")

    def best(self, data: str, N: int, key: str, but: Sequence[str] = ()) -> tuple[str, float]:
        """The row without training that is best."""
        names = [name for name in self.names(data) if not ROWS[name].trained and name not in but]
        found = {name: self.mean(data, name, N, key) for name in names}
        found = {name: value for name, value in found.items() if value == value}
        name = min(found, key=found.get, default="")
        return name, found.get(name, float("nan"))

    def teacher(self, data: str) -> float:
        """The teacher's own distance to data."""
        found = [r["teacher_distance_to_data"] for r in self.rows if r["data"] == data and r["row"] == "teacher"]
        found = [float(v) for v in found if v != ""]
        return statistics.fmean(found) if found else float("nan")


def read(path: Path) -> Results:
    with open(path, newline="") as f:
        return Results(list(csv.DictReader(f)))


def targets(r: Results) -> Iterator[tuple[str, str, str, bool | None]]:
    """(what, target, figure, met or None where it was not measured)."""

    def at_most(what: str, most: float, figure: float, row: str = ""):
        known = figure == figure
        return what, f"<= {most:.3g}", f"{figure:.3g} ({row})" if known else "", figure <= most if known else None

    for N, most in ((8, 1 / 12), (4, 1 / 3)):
        name, _ = r.best("fashion", N, "endpoint_error")
        ratio = r.ratio("fashion", name, "boss", N, "endpoint_error")
        yield at_most(f"fashion, N = {N}: endpoint error, of BOSS with Euler's", most, ratio, name)
    for N, most in ((8, 1.05), (6, 1.12)):
        name, distance = r.best("fashion", N, "distance_to_data")
        yield at_most(
            f"fashion, N = {N}: Frechet distance, of the teacher's", most, distance / r.teacher("fashion"), name
        )
    for N, most in ((8, 1 / 7), (4, 0.38)):
        name, _ = r.best("digits", N, "rms")
        ratio = r.ratio("digits", name, "boss", N, "rms")
        yield at_most(f"digits, N = {N}: rms, of BOSS with Euler's", most, ratio, name)
    for data, N, most in (
        *(("fashion", N, m) for N, m in ((3, 4.1), (4, 2.9), (8, 0.8))),
        ("digits", 4, 0.4),
        ("digits", 8, 0.065),
    ):
        rms = {name: r.mean(data, name, N, "rms") for name in ONE_CALL}
        found = [name for name in rms if rms[name] == rms[name]]
        name = found[0] if found else ""
        yield at_most(f"{data}, N = {N}: rms of one call", most, rms.get(name, float("nan")), name)
    for name in ONE_CALL[:1]:
        cells = [(low <= 1.05) for *_, low, _, _ in against_best(r, name)]
        of = f"{sum(cells)} of {len(cells)} cells of data set and N"
        yield (
            f"{name}: interval of its ratio to the best row reaches 1.05",
            "all cells",
            of if cells else "",
            all(cells) if cells else None,
        )
        worse = [row for row in stock_wins(r, name)]
        there = any(name in r.names(data) for data in r.data)
        yield (
            f"{name}: worse than uniform Euler or a stock sampler",
            "nowhere",
            f"{len(worse)} cells" if there else "",
            not worse if there else None,
        )
    lost = list(losses(r))
    for what, names in (("any row", list(ROWS)), ("fitted or polished", ["fitted", "fitted3", "polished"])):
        cells = sum(len(ns) for _, name, ns in lost if name in names)
        there = any(name in names and name != "uniform" for data in r.data for name in r.names(data))
        figure = f"{cells} cells of data set, row and N"
        yield f"worse than uniform Euler: {what}", "nowhere", figure if there else "", cells == 0 if there else None
    for data in r.data:
        steps = r.steps(data)
        K = max((N for d, name, N in r.by if d == data and name == "teacher"), default=0)
        for name in ("fitted", "fit"):
            own = [N for (d, n, N) in r.by if (d, n) == (data, name)]  # which may be more than others have
            spent = r.mean(data, name, steps[0], "calibration_evaluations") if steps else float("nan")
            what = f"{data}: {name}, calibration and fit of all N, evaluations a sample (K + 2 for each step of each N)"
            yield at_most(what, K + 2 * sum(own or steps), spent, name)


def against_best(r: Results, name: str) -> Iterator[tuple[str, int, str, float, float, float, float]]:
    """(data set, N, the best row beside one call's, ratio of rms, its interval, evaluations of one call in those of
    that row, if it is a fit by gradients) for N of 2 and more."""
    for data in r.data:
        for N in r.steps(data):
            if N < 2 or not r.values(data, name, N, "rms"):
                continue
            other, _ = r.best(data, N, "endpoint_error", but=ONE_CALL)
            ratio, low, high = r.interval(data, name, other, N)
            spent = r.ratio(data, name, other, N, "calibration_evaluations") if other in GRADIENTS else float("nan")
            if ratio == ratio:
                yield data, N, other, ratio, low, high, spent


def stock_wins(r: Results, name: str) -> Iterator[tuple[str, int, str, float, float, float]]:
    """(data set, N, the best row of those that need no calibration, ratio and interval) where one call is worse."""
    for data in r.data:
        for N in r.steps(data):
            found = {other: r.mean(data, other, N, "endpoint_error") for other in FREE}
            other = min((o for o in found if found[o] == found[o]), key=found.get, default="")
            if other and r.ratio(data, name, other, N, "endpoint_error") > 1 + 1e-4:
                yield data, N, other, *r.interval(data, name, other, N)


def peers_win(r: Results) -> Iterator[tuple[str, int, str, str, float, float, float]]:
    """(data set, N, the best row that is published elsewhere, the best of ours, ratio of ours to it with its interval)
    where the peer is better."""
    known = [name for name, row in ROWS.items() if row.known]
    for data in r.data:
        for N in r.steps(data):
            ours, mine = r.best(data, N, "endpoint_error", but=known)
            peer, theirs = r.best(data, N, "endpoint_error", but=[name for name in ROWS if name not in known])
            if ours and peer and mine > theirs * (1 + 1e-4):
                _, low, high = r.interval(data, ours, peer, N)
                yield data, N, peer, ours, (mine / theirs) ** 0.5, low, high


def one_call(r: Results) -> Iterator[str]:
    for name in ONE_CALL:
        rows = list(against_best(r, name))
        if not rows:
            continue
        yield f"\n## {ROWS[name].title} against the best row\n"
        yield (
            "Ratio of its rms to that of the row that is best by hand, gradient fits and stock samplers included, "
            "straightening left out; interval of 95 %, a bootstrap over held-out samples of all seeds. Where the best "
            "row is a fit by gradients: the evaluations of the one call, of that fit's.\n"
        )
        yield "| data | N | ratio | interval | best row | evaluations |"
        yield "|---" * 6 + "|"
        for data, N, other, ratio, low, high, spent in rows:
            share = f"{spent:.2g}" if spent == spent else ""
            yield f"| {data} | {N} | {ratio:.3g} | {low:.3g} to {high:.3g} | {ROWS[other].title} | {share} |"
        yield "\nStock samplers and schedules that need no calibration and are better than it:\n"
        yield from [
            f"- {data}, N = {N}: {ROWS[other].title}, by {ratio:.3g} ({low:.3g} to {high:.3g})"
            if ratio == ratio
            else f"- {data}, N = {N}: {ROWS[other].title} (of commits of before, whose rows have no parts)"
            for data, N, other, ratio, low, high in stock_wins(r, name)
        ] or ["None."]


def losses(r: Results) -> Iterator[tuple[str, str, dict[int, float]]]:
    """(data set, row, {N: endpoint error in uniform Euler's}) where a row is worse; equal to rounding is not."""
    for data in r.data:
        for name in r.names(data):
            ratios = {}
            for N in r.steps(data):
                ratio = r.ratio(data, name, "uniform", N, "endpoint_error")
                if ratio > 1 + 1e-4:
                    ratios[N] = ratio
            if ratios:
                yield data, name, ratios


def table(r: Results, data: str, key: str, costs: bool = False) -> Iterator[str]:
    """Means of the seeds, with half the range that they span; the best of each column is bold."""
    steps, names = r.steps(data), r.names(data)
    titles = ["row", *(f"N = {N}" for N in steps), *(["evaluations", "seconds"] if costs else [])]
    yield f"| {' | '.join(titles)} |"
    yield "|---" * len(titles) + "|"
    best = {}
    for N in steps:
        found = [m for name in names if (m := r.mean(data, name, N, key)) == m]
        best[N] = min(found, default=0) if len({f"{m:.3g}" for m in found}) > 1 else 0  # none where all are equal
    for name in names:
        cells = []
        for N in steps:
            values = r.values(data, name, N, key)
            if not values:
                cells.append("")
                continue
            mean, spread = statistics.fmean(values), (max(values) - min(values)) / 2
            text = f"{mean:.3g}" if mean < 1000 else f"{mean:.0f}"
            text = f"**{text}**" if mean <= best[N] * (1 + 1e-4) else text
            cells.append(f"{text} ± {spread:.1g}" if len(values) > 1 else text)
        if costs:
            mine = [x for d, n, x in r.by if d == data and n == name]
            spent = [r.mean(data, name, mine[0], f"calibration_{k}") for k in ("evaluations", "seconds")]
            cells += [f"{spent[0]:.0f}", f"{spent[1]:.2g}"]
        yield f"| {ROWS[name].title} | {' | '.join(cells)} |"


def section(r: Results, data: str, pictures: str) -> Iterator[str]:
    rows = [x for x in r.rows if x["data"] == data]
    yield f"\n## {data}\n\n![{data}]({pictures}/{data}.png)\n"
    for settings in dict.fromkeys(x["settings"] for x in rows):
        yield f"{settings}. Seeds: {', '.join(sorted({x['seed'] for x in rows}))}."
    for name in ("teacher", "float32 teacher"):
        K = next((N for d, n, N in r.by if d == data and n == name), 0)
        rms, notes = r.mean(data, name, K, "rms"), {x["notes"] for x in r.by.get((data, name, K), []) if x["notes"]}
        if rms == rms:
            yield f"{name.capitalize()} of K = {K}, rms: {rms:.3g}, {'; '.join(notes)}."
    yield "\nRms distance to the teacher's endpoint; evaluations a sample and seconds of the calibration:\n"
    yield from table(r, data, "rms", costs=True)
    metric = rows[0]["metric"]
    yield f"\n{metric.capitalize()} to the teacher's samples:\n"
    yield from table(r, data, "distance_to_teacher")
    if r.teacher(data) == r.teacher(data):
        yield f"\n{metric.capitalize()} to data; the teacher's own is {r.teacher(data):.4g}:\n"
        yield from table(r, data, "distance_to_data")
    notes = {x["row"]: x["notes"] for x in rows if x["notes"] and x["row"] in ROWS}
    yield ""
    yield from (f"- {ROWS[name].title}: {note}." for name, note in notes.items())
    seeds = {name: sorted({x["seed"] for x in rows if x["row"] == name}) for name in r.names(data)}
    most = max(map(len, seeds.values()))
    yield from (f"- {ROWS[name].title}: of seed {', '.join(s)} alone." for name, s in seeds.items() if len(s) < most)


def plot(r: Results, data: str, path: Path) -> None:
    """Quality against evaluations, and at one N against what the calibration cost."""
    panels = [("rms", "rms to the teacher's endpoint"), ("distance_to_data", "distance to data")]
    fig, axes = plt.subplots(1, 3, figsize=(15, 5))
    styles = {name: dict(color=plt.cm.tab20(i % 20), marker="osv^DPX"[i % 7]) for i, name in enumerate(ROWS)}
    for (key, label), panel in zip(panels, axes, strict=False):
        for name in r.names(data):
            points = sorted((N, r.mean(data, name, N, key)) for d, n, N in r.by if (d, n) == (data, name))
            points = [p for p in points if p[1] == p[1]]
            if points:
                titled = {"label": ROWS[name].title} if key == "rms" else {}
                panel.plot(*zip(*points, strict=True), "-", ms=4, lw=1, **titled, **styles[name])
        panel.set(xlabel="evaluations", ylabel=label, yscale="log", title=data)
    if r.teacher(data) == r.teacher(data):
        axes[1].axhline(r.teacher(data), color="k", lw=1, ls="--")
        axes[1].annotate(
            "teacher", (0.02, r.teacher(data)), xycoords=("axes fraction", "data"), va="bottom", fontsize=7
        )
    steps = r.steps(data)
    N = 8 if 8 in steps else steps[-1]
    for name in r.names(data):
        x, y = r.mean(data, name, N, "calibration_evaluations"), r.mean(data, name, N, "rms")
        if x == x and y == y:
            axes[2].plot(x, y, ms=6, ls="", **styles[name])
            axes[2].annotate(name, (x, y), xytext=(4, 2), textcoords="offset points", fontsize=6)
    axes[2].set_xscale("symlog", linthresh=10)
    axes[2].set(
        xlim=(-1, None), xlabel="calibration evaluations a sample", ylabel="rms", yscale="log", title=f"N = {N}"
    )
    axes[0].legend(fontsize=5, ncols=2)
    pages.save(fig, path)


def write(source: Path, page: Path) -> None:
    r = read(source)
    pictures = page.parent / page.stem
    pictures.mkdir(exist_ok=True)
    lines = [*pages.targets(targets(r)), "", "## Losses", ""]
    lines += [
        "Rows with a larger endpoint error (mean squared, mean of the seeds) than uniform Euler, and how large:",
        "",
    ]
    lines += [
        f"- {data}, {ROWS[name].title}: " + ", ".join(f"{ratio:.2f} at N = {N}" for N, ratio in ratios.items())
        for data, name, ratios in losses(r)
    ] or ["None."]
    lines += ["", "Rows published elsewhere that are better than every row of ours, and the ratio of rms:", ""]
    lines += [
        f"- {data}, N = {N}: {ROWS[peer].title}; the best of ours, {ROWS[ours].title}, has {ratio:.3g} times its rms"
        + (f" ({low:.3g} to {high:.3g})" if low == low else "")
        for data, N, peer, ours, ratio, low, high in peers_win(r)
    ] or ["None."]
    lines += one_call(r)
    for data in r.data:
        lines += section(r, data, pictures.name)
        plot(r, data, pictures / f"{data}.png")
    lines += pages.where_it_ran(r.rows)
    pages.write(page, "quality_report.py", lines, new="# Quality\n\n")
    print(f"{page}: {len(r.rows)} rows")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, default=ROOT / "benchmarks/results/quality.csv")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/quality.md")
    args = parser.parse_args()
    write(args.csv, args.page)


if __name__ == "__main__":
    main()
