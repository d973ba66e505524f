"""The demo's report folder: a self-contained page, the numbers as JSON and as text."""

import html
import json
import math
import os
from pathlib import Path

from flowkernels.calibration.figure import LOOK
from flowkernels.cli.plot import number, straightened_row

FORMAT = "flowkernels.report"
FILES = {"report.html", "report.json", "schedule.boss.json", "samples.png", "student.safetensors"}
HEAD = ["N", "uniform", "Bellman", "ratio", "uniform", "Bellman", "solver", "straightened"]
CSS = """
:root { color-scheme: light }
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff;
       max-width: 62rem; margin: auto; padding: 1rem }
h1 { font-size: 1.5rem; margin: .5rem 0 } h2 { font-size: 1.1rem; margin: 0 0 .5rem }
figure, section { margin: 2rem 0 } img { max-width: 100%; height: auto; display: block }
figcaption, .note { color: #555; font-size: .9rem; margin-top: .4rem }
.wide { overflow-x: auto }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: 0 2rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #ddd }
thead th { font-weight: 600; white-space: nowrap } .group { text-align: center }
.facts { font-size: .9rem } .facts th { color: #555; white-space: nowrap }
.facts th, .facts td { text-align: left; font-weight: normal; overflow-wrap: anywhere; vertical-align: top }
@media (max-width: 40rem) { .wide th, .wide td { padding: .2rem .3rem; font-size: .8rem } }
"""


# The folder


def expect_report_folder(out: str | Path) -> Path:
    """`out` as an absolute path, if a report can go there: nothing, an empty folder or a previous report."""
    out = Path(out).resolve()
    if not (out.parent.is_dir() and os.access(out.parent, os.W_OK)):
        raise ValueError(f"out: expected a place in a folder that exists and can be written to, got {out.parent}")
    if out.exists():
        if not out.is_dir():
            raise ValueError(f"out: expected a folder, got the file {out}")
        foreign = sorted({p.name for p in out.iterdir()} - FILES)
        if foreign:
            raise ValueError(f"out: expected a new folder or a previous report, got {out} with {foreign[0]!r} in it")
    return out


# Numbers and the page


def _columns(results: dict) -> list[list[str]]:
    keys = ["cost_uniform", "cost_bellman", "ratio", *(f"error_{name}" for name in LOOK)]
    return [[str(row["steps"]), *(number(row.get(k)) for k in keys)] for row in results["table"]]


def table(results: dict) -> str:
    """The table of the demo as text."""
    lines = [f"{'':<5}{'step cost':<33}endpoint error"]
    for row in [HEAD, *_columns(results)]:
        line = "".join(f"{cell:>{width}}" for cell, width in zip(row, (3, 11, 11, 8, 11, 11, 11, 15), strict=True))
        lines.append(line.rstrip())
    return "\n".join(lines)


def write(results: dict, images: dict[str, str], folder: Path) -> None:
    """Write report.html and report.json into the folder."""
    history = results["history"]
    if "interval_loss" in history:  # JSON knows no NaN: null for an interval that was not drawn
        finite = [[None if math.isnan(v) else v for v in row] for row in history["interval_loss"]]
        results = results | {"history": history | {"interval_loss": finite}}
    (folder / "report.json").write_text(json.dumps(results, indent=1, allow_nan=False))
    (folder / "report.html").write_text(_page(results, images), encoding="utf-8")


def _page(results: dict, images: dict[str, str]) -> str:
    s, N = results["settings"], results["settings"]["straighten"]
    errors = ", ".join(
        f"<b>{number(straightened_row(results)[f'error_{k}'])}</b> {look['label']}" for k, look in LOOK.items()
    )
    rows = "\n".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in _columns(results))

    def figure(name: str, title: str, caption: str) -> str:
        image = f'<img src="{images[name]}" alt="{title}">'
        return f"<figure><h2>{title}</h2>{image}<figcaption>{caption}</figcaption></figure>"

    def facts(title: str, values: dict) -> str:
        cells = "".join(
            f"<tr><th>{html.escape(str(k).replace('_', ' '))}</th><td>{html.escape(_plain(v))}</td></tr>"
            for k, v in values.items()
        )
        return f"<section><h2>{title}</h2><table class=facts>{cells}</table></section>"

    figures = {
        "samples": figure(
            "samples", "Samples at equal noise", "One column is one noise; nothing was calibrated or trained on it."
        ),
        "errors": figure("errors", "Endpoint error", "Bars: one standard error of the mean."),
        "loss": figure("loss", "Straightening", f"Batches of {s['batch']} from {s['bank']} trajectories."),
        "schedules": figure("schedules", "Schedules", "Knots in time: one velocity evaluation at each but the last."),
        "costs": figure(
            "costs", "Step costs", f"Colour: every step of the fine grid. Markers: the {N} that a schedule takes."
        ),
    }
    tables = [
        facts("Time", {k: f"{v:.1f} s" for k, v in results["seconds"].items()}),
        facts("Settings", {"seed": results["seed"], **s}),
        facts("Versions and hardware", {**results["environment"], "finished": results["finished"]}),
        facts("Calibration", {k: v for k, v in results["provenance"].items() if k != "versions"}),
    ]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>flowkernels: {results["data"]}</title><style>{CSS}</style></head><body>
<h1>Few-step sampling of the {results["data"]} flow model</h1>
<p>Endpoint error with {N} steps: {errors}; the teacher takes {s["grid"]} steps.</p>
<section class="wide"><table><thead>
<tr><th></th><th class="group" colspan="3">step cost</th><th class="group" colspan="4">endpoint error</th></tr>
<tr><th>steps N</th>{"".join(f"<th>{name}</th>" for name in HEAD[1:])}</tr>
</thead><tbody>
{rows}
</tbody></table></section>
<p class="note">Step cost: sum over the schedule's steps of the mean squared error of one jump along the teacher's
trajectory; uniform knots are rounded to the teacher's grid. Endpoint error: mean over {s["held_out"]} held-out noises
of the squared L2 distance to the teacher's endpoint. Bellman's schedules have the least step cost; the endpoint error
also holds how errors carry on from step to step, so it need not be least. Solver: the best of all that the calibration
tried, without training. Straightened: a student trained with that solver, for where its samples end.</p>
{figures["samples"]}
<div class="pair">{figures["errors"]}{figures["loss"]}</div>
{figures["schedules"]}
{figures["costs"]}
<div class="pair">{"".join(tables)}</div>
</body></html>
"""


def _plain(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_plain(v) for v in value)
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
