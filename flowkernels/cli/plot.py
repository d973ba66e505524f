"""The figures of the demo's report."""

import base64
import io
from pathlib import Path

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from flowkernels.calibration.calibration import BELLMAN, UNIFORM, Calibration
from flowkernels.calibration.figure import LOOK, STYLE, costs, plain_log


def number(value: float | None) -> str:
    return "" if value is None else f"{value:#.3g}".rstrip(".")


def straightened_row(results: dict) -> dict:
    """The table's row of the N that is straightened."""
    return next(row for row in results["table"] if row["steps"] == results["settings"]["straighten"])


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure((width, height), layout="constrained")
    return figure, figure.add_subplot()


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
    figure, ax = _figure(6, 4.8)
    mesh = costs(ax, calibration, results["settings"]["straighten"])
    figure.colorbar(mesh, label="step cost c(j, k), mean squared error of the step", extend="min")
    return figure


def _errors(results: dict) -> Figure:
    """Endpoint errors over the number of steps."""
    figure, ax = _figure(5, 3.2)
    for name, look in LOOK.items():
        rows = [row for row in results["table"] if f"error_{name}" in row]
        n, mean, spread = ([row[k] for row in rows] for k in ("steps", f"error_{name}", f"error_{name}_se"))
        ax.errorbar(n, mean, spread, capsize=2, **look)
    ax.set_xticks([row["steps"] for row in results["table"]])
    plain_log(ax, xlabel="steps N (velocity evaluations)", ylabel="endpoint error, squared L2")
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
    plain_log(ax, xlabel="iteration", ylabel="loss, squared velocity error / feature")
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

    pictures: images `[n, 1, H, W]` in [-1, 1] of teacher, uniform, bellman, solver and straightened, from equal noise.
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
