"""The demo's report folder: figures, a self-contained page, the numbers as JSON. Whole or not there."""

import base64
import html
import io
import json
import math
import os
from pathlib import Path

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from torch import Tensor

from flowkernels.calibration.calibration import Calibration
from flowkernels.schedule import Schedule

FORMAT = "flowkernels.report"
FILES = {"report.html", "report.json", "schedule.boss.json", "samples.png", "student.safetensors"}
# Okabe and Ito's colours, told apart by colour-blind readers; each series has a marker and a line of its own as well
LOOK = {
    "uniform": dict(label="uniform", color="#d55e00", marker="s", markersize=7, markerfacecolor="none", linestyle="--"),
    "bellman": dict(label="Bellman", color="#0072b2", marker="o", markersize=5, linestyle="-"),
    "fitted": dict(label="fitted", color="#cc79a7", marker="D", markersize=5, linestyle=":"),
    "straightened": dict(label="straightened", color="#009e73", marker="*", markersize=11, linestyle="none"),
}
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "grid.color": "#dddddd",
    "legend.frameon": False,
}
HEAD = ["N", "uniform", "Bellman", "ratio", "uniform", "Bellman", "fitted", "straightened"]
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


# Figures


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure((width, height), layout="constrained")
    return figure, figure.add_subplot()


def _plain_log(ax: Axes, **labels: str) -> None:
    """A logarithmic y axis with plain numbers."""
    ax.set(yscale="log", **labels)
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.grid(axis="y")


def _schedules(results: dict, calibration: Calibration) -> Figure:
    """The knots of each schedule on the time axis."""
    steps = [row["steps"] for row in results["table"]]
    figure, ax = _figure(7, 0.7 + 0.42 * len(steps))
    for y, n in enumerate(steps):
        for name, schedule in (("uniform", Schedule.uniform(n)), ("bellman", calibration[n])):
            legend = dict(label=LOOK[name]["label"] if y == 0 else None, linestyle="none")
            ax.plot(schedule.times, [y] * (n + 1), **LOOK[name] | legend)
    ax.set(xlabel="time t (0 = noise, 1 = data)", ylabel="steps N", ylim=(len(steps) - 0.5, -0.5))
    ax.set_yticks(range(len(steps)), steps)
    ax.grid(axis="y")
    ax.tick_params("y", length=0)
    ax.spines["left"].set_visible(False)
    figure.legend(loc="outside upper right", ncols=2)
    return figure


def _costs(results: dict, calibration: Calibration) -> Figure:
    """The step costs as a map, with the path that Bellman's recursion takes through them."""
    times, plan = calibration.times.numpy(), calibration[results["settings"]["straighten"]]
    cost = calibration.cost.T.numpy()  # [k, j]: from t_j on the x axis, to t_k on the y axis
    seen = np.ma.masked_where(~(np.isfinite(cost) & (cost > 0)), cost)
    figure, ax = _figure(6, 4.8)
    edges = np.concatenate([times[:1], (times[1:] + times[:-1]) / 2, times[-1:]])  # cells centred on the knots
    norm = LogNorm(max(seen.min(), 1e-8 * seen.max()), seen.max())
    mesh = ax.pcolormesh(edges, edges, seen, norm=norm, cmap="viridis", rasterized=True)
    figure.colorbar(mesh, label="step cost c(j, k), mean squared error of the step", extend="min")
    for name, schedule in (("uniform", Schedule.uniform(plan.steps)), ("bellman", plan)):
        knots = np.repeat(schedule.times.numpy(), 2)  # a staircase: each corner off the diagonal is one step
        white = dict(color="white", clip_on=False, markevery=(1, 2), label=f"{LOOK[name]['label']}, N = {plan.steps}")
        ax.plot(knots[:-1], knots[1:], **LOOK[name] | white)
    ax.set(xlabel="step from time $t_j$", ylabel="step to time $t_k$", aspect="equal", xlim=(0, 1), ylim=(0, 1))
    ax.legend(loc="lower right", facecolor="#666666", frameon=True, framealpha=1, edgecolor="none", labelcolor="white")
    return figure


def _errors(results: dict) -> Figure:
    """Endpoint errors over the number of steps."""
    figure, ax = _figure(5, 3.2)
    for name, look in LOOK.items():
        rows = [row for row in results["table"] if f"error_{name}" in row]
        n, mean, spread = ([row[k] for row in rows] for k in ("steps", f"error_{name}", f"error_{name}_se"))
        ax.errorbar(n, mean, spread, capsize=2, **look)
    ax.set_xticks([row["steps"] for row in results["table"]])
    _plain_log(ax, xlabel="steps N (velocity evaluations)", ylabel="endpoint error, squared L2")
    ax.legend()
    return figure


def _loss(results: dict) -> Figure:
    """Training loss, as logged and averaged over 10 rows."""
    figure, ax = _figure(5, 3.2)
    iteration, loss = (np.array(results["history"][k]) for k in ("iteration", "loss"))
    colour, averaged = LOOK["straightened"]["color"], len(loss) >= 20
    ax.plot(iteration, loss, color=colour, alpha=0.35 if averaged else 1, label="one batch")
    if averaged:
        ax.plot(iteration[5:-4], np.convolve(loss, np.full(10, 0.1), "valid"), color=colour, label="mean of 10")
        ax.legend()
    _plain_log(ax, xlabel="iteration", ylabel="loss, squared velocity error / feature")
    return figure


def _samples(results: dict, pictures: dict[str, Tensor]) -> Figure:
    """One strip of images a sampler; a column is one noise."""
    s, row = results["settings"], _row(results)
    strips = {}
    for name, images in pictures.items():
        grey = (images[:, 0].clamp(-1, 1) + 1) / 2
        gap = max(1, grey.shape[-1] // 14)
        if name == "teacher":
            title = f"teacher, {s['grid']} steps"
        else:
            title = f"{LOOK[name]['label']}, {s['straighten']} steps: endpoint error {_number(row[f'error_{name}'])}"
        strips[title] = torch.nn.functional.pad(grey, (0, gap), value=1.0).permute(1, 0, 2).flatten(1)[:, :-gap]
    height, width = next(iter(strips.values())).shape
    figure = Figure((9, len(strips) * (9 * height / width + 0.32)), layout="constrained")
    for ax, (title, strip) in zip(figure.subplots(len(strips), squeeze=False)[:, 0], strips.items(), strict=True):
        ax.imshow(strip.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        ax.set_title(title)
        ax.set_axis_off()
    return figure


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _svg(figure: Figure) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="svg", dpi=200, metadata={"Date": None})
    return _data_uri(file.getvalue(), "svg+xml")


def draw(results: dict, calibration: Calibration, pictures: dict[str, Tensor], folder: Path) -> dict[str, str]:
    """Write samples.png into the folder. Returns the page's images as data URIs, by name.

    pictures: images `[n, 1, H, W]` in [-1, 1] of teacher, uniform, bellman, fitted and straightened, from equal noise.
    """
    with rc_context(STYLE):
        _samples(results, pictures).savefig(folder / "samples.png", dpi=150)
        return {
            "samples": _data_uri((folder / "samples.png").read_bytes(), "png"),
            "errors": _svg(_errors(results)),
            "schedules": _svg(_schedules(results, calibration)),
            "costs": _svg(_costs(results, calibration)),
            "loss": _svg(_loss(results)),
        }


# Numbers and the page


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:#.3g}".rstrip(".")


def _row(results: dict) -> dict:
    """The table's row of the N that is straightened."""
    return next(row for row in results["table"] if row["steps"] == results["settings"]["straighten"])


def _columns(results: dict) -> list[list[str]]:
    keys = ["cost_uniform", "cost_bellman", "ratio", *(f"error_{name}" for name in LOOK)]
    return [[str(row["steps"]), *(_number(row.get(k)) for k in keys)] for row in results["table"]]


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
    errors = ", ".join(f"<b>{_number(_row(results)[f'error_{k}'])}</b> {look['label']}" for k, look in LOOK.items())
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
also holds how errors carry on from step to step, so it need not be least. Fitted: a multistep solver on Bellman's
knots, fitted to the teacher without training. Straightened: the student on Bellman's schedule.</p>
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
