"""The figures of the demo's report."""

import base64
import io
from pathlib import Path

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from torch import Tensor

from flowkernels.calibration.calibration import BELLMAN, FITTED, UNIFORM, Calibration

# Okabe and Ito's colours, told apart by colour-blind readers; each series has a marker and a line of its own as well
LOOK = {
    UNIFORM: dict(label="uniform", color="#d55e00", marker="s", markersize=7, markerfacecolor="none", linestyle="--"),
    BELLMAN: dict(label="Bellman", color="#0072b2", marker="o", markersize=5, linestyle="-"),
    FITTED: dict(label="fitted", color="#cc79a7", marker="D", markersize=5, linestyle=":"),
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


def number(value: float | None) -> str:
    return "" if value is None else f"{value:#.3g}".rstrip(".")


def straightened_row(results: dict) -> dict:
    """The table's row of the N that is straightened."""
    return next(row for row in results["table"] if row["steps"] == results["settings"]["straighten"])


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
        for name, schedule in ((UNIFORM, calibration.uniform(n)), (BELLMAN, calibration[n])):
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
    for name, schedule in ((UNIFORM, calibration.uniform(plan.steps)), (BELLMAN, plan)):
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
    s, row = results["settings"], straightened_row(results)
    strips = {}
    for name, images in pictures.items():
        grey = (images[:, 0].clamp(-1, 1) + 1) / 2
        gap = max(1, grey.shape[-1] // 14)
        if name == "teacher":
            title = f"teacher, {s['grid']} steps"
        else:
            title = f"{LOOK[name]['label']}, {s['straighten']} steps: endpoint error {number(row[f'error_{name}'])}"
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
