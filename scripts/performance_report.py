"""Writes docs/performance.md and its plots from benchmarks/results/*.csv, a part for each kind of processor in them.

    flowkernels bench --out benchmarks/results && python scripts/performance_report.py

What stands above the mark in docs/performance.md is written by hand and stays, and a run on one kind of processor
leaves the rows of the others in the files.
"""

import argparse
import csv
import re
import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import pages  # noqa: E402

from flowkernels.bench.suite import cases, entries  # noqa: E402
from flowkernels.bench.tables import TEXT  # noqa: E402
from flowkernels.ops.public import OPS  # noqa: E402

WITHOUT = "flowkernels without activations"
READ = "a loop that reads the weights"
OURS, EAGER, COMPILED = "flowkernels cpu", "torch eager", "torch compile"
HEAD = "1,024 tokens of 1,152 -> 4 channels of 2x2, guided, float32"
GRAM, GUIDED = "K=100, n=100, D=3072", "Ki elements, guided, bfloat16 velocities and copy, given"


def read(folder: Path) -> list[dict]:
    rows = []
    for entry in entries():
        path = folder / f"{entry}.csv"
        if path.exists():
            with open(path, newline="") as f:
                rows += list(csv.DictReader(f))
    for row in rows:
        for key in row.keys() - TEXT:
            try:
                row[key] = float(row[key])
            except ValueError:
                continue
    return rows


class Results:
    """Figures by entry, case and provider."""

    def __init__(self, rows: list[dict]):
        self.rows = {(r["entry"], r["case"], r["provider"]): r for r in rows}

    def get(self, entry: str, case: str, provider: str = OURS) -> dict:
        return self.rows.get((entry, case, provider), {})

    def times(self, entry: str, case: str, peer: str) -> float:
        """How many times as long the peer takes, by medians."""
        mine, theirs = self.get(entry, case).get("p50_us", ""), self.get(entry, case, peer).get("p50_us", "")
        return theirs / mine if mine != "" and theirs != "" else float("nan")


def targets(r: Results):
    """(what, target, figure, met)."""

    def at_least(what, least, figure, unit="x"):
        return what, f">= {least:g}{unit}", f"{figure:.3g}{unit}", figure >= least

    def at_most(what, most, figure, unit):
        return what, f"<= {most:g}{unit}", f"{figure:.3g}{unit}", figure <= most

    def value(entry, case, key, provider=OURS):
        found = r.get(entry, case, provider).get(key, "")
        return float("nan") if found == "" else found

    f32 = f"{GRAM}, float32"
    yield at_least(f"step cost, {GRAM}: over the best torch", 9, value("step_cost", f32, "ratio"))
    yield at_least("... over the published loop", 400, r.times("step_cost", f32, "published loop"))
    yield at_most("... relative error to float64", 1e-5, value("step_cost", f32, "error"), "")
    yield at_most("... extra memory", 8, value("step_cost", f32, "extra_mb"), " MB")
    big = value("velocity_gram", "K=256, n=100, D=3072, float32", "fma_percent")
    yield at_least("velocity_gram, K=256: of the FMA peak", 80, big, " %")
    yield at_least("... K=100: of the FMA peak", 75, value("velocity_gram", f32, "fma_percent"), " %")
    gram = [value("velocity_gram", f"{GRAM}, {d}", "p50_us") for d in ("float32", "bfloat16")]
    yield at_most("... K=100, bfloat16 over float32 input, time", 1, gram[1] / gram[0], "x")
    yield at_most("bellman, K=100, N=1..10", 200, value("bellman", "K=100, N=1..10", "p50_us"), " us")
    yield at_least("bellman, K=1000, N=1..20: over NumPy", 10, r.times("bellman", "K=1000, N=1..20", "numpy"))
    pairs = value("bellman_pairs", "K=100, N=1..10", "p50_us")
    yield at_most("bellman_pairs, K=100, N=1..10", 200_000, pairs, " us")
    step = f"{1 << 16} {GUIDED}"
    yield at_least(
        "euler_step, 64 Mi, guided, bfloat16: of the stream", 85, value("euler_step", step, "stream_percent"), " %"
    )
    yield at_least("... over eager", 3, r.times("euler_step", step, EAGER))
    yield at_least("... over torch.compile", 1.3, r.times("euler_step", step, COMPILED))
    for D in (3072, 65536):
        case = f"n=256, D={D}, l2, float32"
        yield at_least(f"straighten_loss, D={D}: over eager autograd", 3, r.times("straighten_loss", case, EAGER))
        yield at_least("... over torch.compile", 1.5, r.times("straighten_loss", case, COMPILED))
    update = value("linear_update", "4096 Ki elements, 16 terms, float32", "stream_percent")
    yield at_least("linear_update, 16 terms of 4 Mi: of the stream", 85, update, " %")
    mlp = "64 -> 256 x 3 -> 64, N=8, n="
    yield at_least(f"mlp_sample, {mlp}1: over eager", 10, r.times("mlp_sample", f"{mlp}1, float32 weights", EAGER))
    for n, least in ((1, 10), (4, 8), (16, 5.5), (64, 2.6), (256, 2.6), (1024, 2.6)):
        figure = r.times("mlp_sample", f"{mlp}{n}, float32 weights", COMPILED)
        yield at_least(f"... n={n}: over torch.compile of the loop", least, figure)
    wide = mlp.replace("256", "512") + "1, float32 weights"
    figure = 100 * r.times("mlp_sample", wide, READ)
    yield at_least("... width 512, n=1: of the rate of a loop that reads the weights", 80, figure, " %")
    for n in (64, 256, 1024):
        figure = r.times("mlp_sample", f"{mlp}{n}, bfloat16 weights", COMPILED)
        yield at_least(f"... n={n}, bfloat16 weights: over the same", 4, figure)
    for n in (256, 1024):
        figure = r.times("mlp_sample", f"{mlp}{n}, bfloat16 weights", f"{COMPILED}, bfloat16")
        yield at_least(f"... n={n}, bfloat16 weights: over torch.compile in bfloat16", 1.4, figure)
    for dtype in ("float32", "bfloat16"):
        for n in (64, 256, 1024):
            case = f"{mlp}{n}, {dtype} weights"
            without = value("mlp_sample", case, "p50_us", WITHOUT) / value("mlp_sample", case, "p50_us")
            yield at_most(f"... n={n}, {dtype} weights: the activations' share", 15, 100 * (1 - without), " %")
    figure = r.times("mlp_sample", "digits model, rollout, K=100, n=512", COMPILED)
    yield at_least("... digits model, rollout of K=100, n=512: over torch.compile", 3, figure)
    figure = r.times("linear_euler", HEAD, EAGER)
    yield at_least("linear_euler, 1,024 tokens x 1,152 -> 16, a guided pair: over eager", 1.5, figure)
    figure = r.times("linear_euler", HEAD.replace("float32", "bfloat16"), COMPILED)
    yield at_least("... in bfloat16: over torch.compile", 2.2, figure)
    for provider in ("flowkernels callable", "flowkernels VelocityField"):
        for n in (1, 16, 256):
            case = f"sample, 3 -> 64 -> 2, n={n}, N=8"
            of = value("overhead", case, "p50_us", provider) / value("overhead", case, "p50_us", EAGER)
            yield at_most(f"fk.sample, {case[8:]}, {provider[12:]}: over a plain loop", 1.05, of, "x")
    for op in OPS:
        case = f"{op}, one 8x8 image"
        yield at_most(f"{op}, 8x8 image: public function", 10, value("overhead", case, "p50_us"), " us")
        yield at_most("... inner call", 3, value("overhead", case, "p50_us", "flowkernels inner call"), " us")


LAYERS = {
    "public function": OURS,
    "by the dispatcher": "flowkernels by the dispatcher",
    "our stages' call": "flowkernels inner call",
    "bare binding": "flowkernels bare binding",
    "torch eager, the same work": EAGER,
}


def layers(r: Results):
    """What a call of each op costs, layer by layer: medians, in microseconds."""
    yield f"| op on one 8x8 image, us | {' | '.join(LAYERS)} |"
    yield "|---" * (len(LAYERS) + 1) + "|"
    for op in OPS:
        figures = [r.get("overhead", f"{op}, one 8x8 image", p).get("p50_us", "") for p in LAYERS.values()]
        yield f"| {op} | {' | '.join(map(cell, figures))} |"
    choice = r.get("overhead", "choice of a backend", "flowkernels choice").get("p50_us", "")
    yield f"\nThe choice of a backend, part of all but the last two: {cell(choice)} us where it was made before."


def cell(value, digits=3) -> str:
    if value == "" or value != value:
        return ""
    return f"{value:.{digits}g}" if abs(value) < 1000 else f"{value:,.0f}"


def side_by_side(found: dict[str, Results]):
    """The targets, with a column for each processor."""
    columns = [list(targets(r)) for r in found.values()]
    yield f"| | target | {' | '.join(found)} |"
    yield "|---" * (len(found) + 2) + "|"
    for of in zip(*columns, strict=True):
        what, target, *_ = of[0]
        figures = ("" if "nan" in figure else figure if met else f"**{figure}**" for *_, figure, met in of)
        yield f"| {what} | {target} | {' | '.join(figures)} |"


def faster(rows: list[dict]) -> list[str]:
    """The cases in which a peer is faster."""
    return [
        f"- {r['entry']}, {r['case']}: {r['best_torch']} takes {r['ratio']:.2f} of our time"
        for r in rows
        if r["provider"] == OURS and r["ratio"] != "" and r["ratio"] < 1
    ] or ["Nowhere."]


def tables(rows: list[dict], plots: str):
    """A table for each entry, every provider's row in it."""
    for entry in dict.fromkeys(r["entry"] for r in rows):
        yield f"\n#### {entry}\n\n![{entry}]({plots}/{entry}.png)\n"
        titles = ("case", "threads", "provider", "p50 us", "p20", "p80", "x best torch")
        titles += ("GB/s", "% stream", "GFLOP/s", "% FMA", "extra MB")
        yield f"| {' | '.join(titles)} |"
        yield "|---" * len(titles) + "|"
        last = None
        for r in (r for r in rows if r["entry"] == entry):
            keys = (
                "p50_us",
                "p20_us",
                "p80_us",
                "ratio",
                "gb_s",
                "stream_percent",
                "gflop_s",
                "fma_percent",
                "extra_mb",
            )
            figures = [cell(r[k]) for k in keys]
            if r["gate"] != "ok":
                figures[0] = f"no speed: error {r['error']:.2g} > {r['bound']:.2g}"
            name = r["case"] if r["case"] != last else ""
            last = r["case"]
            yield f"| {name} | {r['threads']:.0f} | {r['provider']} | {' | '.join(figures)} |"


def plot(entry: str, rows: list[dict], path: Path) -> None:
    """Time along the entry's curves, or of every case; and the roofline, or bandwidth where no operations count."""
    rows = [r for r in rows if r["entry"] == entry and r["p50_us"] != ""]
    known = [r for r in rows if r["gb_s"] != "" and r["stream_percent"]]
    curves = {case.name: case.curves for case in cases(entry, torch.device("cpu"))}
    axes = list(dict.fromkeys(axis for case in curves.values() for axis in case)) or [None]
    fig, panels = plt.subplots(
        1, len(axes) + bool(known), figsize=(4.6 * (len(axes) + bool(known)), 3.8), squeeze=False
    )
    providers = list(dict.fromkeys(r["provider"] for r in rows))
    for axis, panel in zip(axes, panels[0], strict=False):
        for provider in providers:
            mine = [r for r in rows if r["provider"] == provider]
            if axis is None:
                panel.plot([r["p50_us"] for r in mine], [r["case"] for r in mine], "o", label=provider)
                continue
            points = sorted((c[axis], r["p50_us"]) for r in mine if axis in (c := curves.get(r["case"], {})))
            if points:
                panel.plot(*zip(*points, strict=True), "o-", label=provider, ms=4, lw=1)
        if axis is None:
            panel.set(xscale="log", xlabel="microseconds", title=entry)
        else:
            panel.set(xscale="log", yscale="log", xlabel=axis, ylabel="microseconds", title=entry)
        panel.legend(fontsize=7)
    if known:
        limits(known, providers, panels[0][-1])
    pages.save(fig, path)


def limits(rows: list[dict], providers: list[str], panel) -> None:
    """Where the providers stand below what the machine can do."""
    streams = sorted(100 * r["gb_s"] / r["stream_percent"] for r in rows)
    stream = streams[len(streams) // 2]
    if any(r["gflop_s"] != "" for r in rows):
        rows = [r for r in rows if r["gflop_s"] != ""]
        peaks = sorted(100 * r["gflop_s"] / r["fma_percent"] for r in rows)
        peak = peaks[len(peaks) // 2]
        x = [0.1, peak / stream, 300]
        panel.plot(x, [min(peak, stream * a) for a in x], "k-", lw=1, label=f"{stream:.0f} GB/s, {peak:.0f} GFLOP/s")
        panel.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="GFLOP/s", title="roofline")
        at = [lambda r: r["gflop_s"] / r["gb_s"], lambda r: r["gflop_s"]]
    else:
        panel.axhline(stream, color="k", lw=1, label=f"stream {stream:.0f} GB/s")
        panel.set(xscale="log", xlabel="size", ylabel="GB/s that must move", title="bandwidth")
        at = [lambda r: r["size"], lambda r: r["gb_s"]]
    for provider in providers:
        points = [(at[0](r), at[1](r)) for r in rows if r["provider"] == provider]
        if points:
            panel.plot(*zip(*points, strict=True), "o", label=provider, ms=4)
    panel.legend(fontsize=7)


def folder_of(processor: str) -> str:
    """The folder of a processor's plots, beside the page."""
    return "performance/" + re.sub(r"[^a-z0-9]+", "-", processor.lower()).strip("-")


def write(results: Path, page: Path, plots: bool = True) -> None:
    rows = read(results)
    of = {p: [r for r in rows if r["processor"] == p] for p in dict.fromkeys(r["processor"] for r in rows)}
    found = {processor: Results(mine) for processor, mine in of.items()}
    lines = ["## Targets", "", "What is missed is bold; what was not measured, empty.", "", *side_by_side(found)]
    lines += ["", "## Where a peer is faster"]
    for processor, mine in of.items():
        lines += ["", f"### {processor}: where a peer is faster", "", *faster(mine)]
    lines += ["", "## What a call costs, by layer"]
    for processor, r in found.items():
        lines += ["", f"### {processor}: a call by layer", "", *layers(r)]
    lines += ["", "## Every case"]
    for processor, mine in of.items():
        keys = ("device", "isa", "torch", "python", "flowkernels", "commit", "date")
        sources = dict.fromkeys(", ".join(f"{k} {r[k]}" for k in keys) for r in mine)
        lines += ["", f"### {processor}: every case", "", *(f"{s}." for s in sources)]
        lines += tables(mine, folder_of(processor))
    pages.write(page, "performance_report.py", lines)
    for processor, mine in of.items() if plots else ():
        folder = page.parent / folder_of(processor)
        folder.mkdir(parents=True, exist_ok=True)
        for entry in dict.fromkeys(r["entry"] for r in mine):
            plot(entry, mine, folder / f"{entry}.png")
    print(f"{page}: {', '.join(f'{len(mine)} rows of {p}' for p, mine in of.items())}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results", help="folder of CSV files")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/performance.md")
    args = parser.parse_args()
    write(args.results, args.page)


if __name__ == "__main__":
    main()
