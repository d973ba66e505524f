"""A calibration as a picture: `plot`, and the panels and looks that other figures share."""

import math
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import AutoLocator, LogLocator, NullFormatter

from flowkernels._checks import expect, expect_positive_int
from flowkernels._files import expect_target, whole_file
from flowkernels.calibration.calibration import BELLMAN, CHOICES, FITTED, UNIFORM, Calibration

# Okabe and Ito's colours, told apart by colour-blind readers; each series has a marker and a line of its own as well
LOOK = {
    UNIFORM: dict(label="uniform", color="#d55e00", marker="s", markersize=7, markerfacecolor="none", linestyle="--"),
    BELLMAN: dict(label="Bellman", color="#0072b2", marker="o", markersize=5, linestyle="-"),
    FITTED: dict(label="solver", color="#cc79a7", marker="D", markersize=5, linestyle=":"),
    "straightened": dict(label="straightened", color="#009e73", marker="*", markersize=11, linestyle="none"),
}
STOCK = {
    "shift 3 (SD3)": dict(color="#777777", linestyle="-", marker="^", markersize=4, linewidth=1),
    "cosine": dict(color="#777777", linestyle=":", marker="v", markersize=4, linewidth=1.2),
    "linear-quadratic": dict(color="#777777", linestyle="-.", marker="x", markersize=4, linewidth=1),
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
SUFFIXES = (".png", ".svg", ".pdf")


def plot(calibration: Calibration, path: str | Path | None = None, *, steps: int | None = None) -> Figure:
    """A calibration at a glance: the sigmas of N steps beside those of stock schedules, the costs of all steps with the
    path that is taken through them, and the error of every number of steps.

    Args:
        calibration: from `calibrate` or a file.
        path: a .png, .svg or .pdf to write as well.
        steps: the N that is shown; None takes 4, or the middle one where there is no 4.

    Returns:
        matplotlib's Figure, to be changed or shown. Its panels: sigma against the step, of uniform steps, of the
        schedule, and of three that pipelines come with, each by its formula: shifted by 3 (SD3), cosine, and
        linear-quadratic; the step costs (white where a step is forbidden); the verified endpoint errors with their
        intervals of 95 %, or where nothing was verified the costs with theirs.

    Raises:
        TypeError, ValueError: naming the argument.
        FileNotFoundError, IsADirectoryError, PermissionError: where `path` cannot be written.

    Examples:
        >>> velocity, noise = (lambda x, t: x * t[:, None] ** 4), torch.randn(64, 2)
        >>> cal = fk.calibrate(velocity, noise, grid=20, steps=[2, 4], verify_noise=noise + 1, progress=False)
        >>> figure = fk.plot(cal, "plot.png")
        >>> [ax.get_xlabel() for ax in figure.axes[:3]]
        ['step', 'from time $t_j$', 'steps N']
    """
    expect(isinstance(calibration, Calibration), "calibration", "a Calibration", calibration, TypeError)
    N = _shown(calibration, steps)
    if path is not None:
        expect_picture(path)
    with rc_context(STYLE):
        figure = Figure((13, 4.3), layout="constrained")
        left, middle, right = figure.subplots(1, 3, width_ratios=[1, 1.12, 1])
        figure.get_layout_engine().set(w_pad=0.12)
        figure.suptitle(_told(calibration), x=0.005, ha="left", fontsize=10, fontweight="bold")
        _sigmas(left, calibration, N)
        mesh = costs(middle, calibration, N)
        middle.set_title(f"Cost of every step, and the paths of N = {N}")
        if mesh is not None:
            figure.colorbar(mesh, ax=middle, label="mean squared error of the step", extend="min", pad=0.02)
        _errors(right, calibration, N)
        if path is not None:
            write(figure, path)
    return figure


def expect_picture(path: str | Path, name: str = "path") -> Path:
    """Where a picture can be written, as an absolute path."""
    target = expect_target(path, name)
    expect(Path(path).suffix in SUFFIXES, name, f"a file name ending in {' or '.join(SUFFIXES)}", str(path))
    return target


def write(figure: Figure, path: str | Path) -> None:
    """Whole or not at all."""
    suffix = Path(path).suffix[1:]
    undated = {} if suffix == "png" else {"metadata": {"Date" if suffix == "svg" else "CreationDate": None}}
    with rc_context(STYLE), whole_file(path) as partial, open(partial, "wb") as file:
        figure.savefig(file, format=suffix, dpi=150, **undated)


def stock_sigmas(steps: int) -> dict[str, np.ndarray]:
    """Sigmas `[steps + 1]` of schedules that pipelines come with, from 1 to 0, by name.

    Shifted: 3 u / (1 + 2 u) of uniform u (Esser et al., arXiv 2403.03206). Cosine: the cosine schedule's ratio of noise
    to data on the straight path, sigma / (1 - sigma) = tan(pi u / 2). Linear-quadratic: half of the steps to t = 0.025,
    the others on a parabola to 1 with no corner between (Polyak et al., Movie Gen, arXiv 2410.13720).
    """
    u = np.linspace(1, 0, steps + 1)
    sine, cosine = np.sin(u * np.pi / 2), np.cos(u * np.pi / 2)
    half, i, early = steps // 2, np.arange(steps + 1.0), 0.025
    t = i
    if half:
        past = i - half
        curve = (1 - early - early / half * past[-1]) / past[-1] ** 2
        t = early / half * i + curve * np.where(past > 0, past, 0) ** 2
    found = (3 * u / (1 + 2 * u), sine / (sine + cosine), 1 - t)
    return dict(zip(STOCK, found, strict=True))


def plain_log(ax: Axes, **labels: str) -> None:
    """A logarithmic y axis with plain numbers."""
    ax.set(yscale="log", **labels)
    low, high = np.log10(ax.get_ylim())
    few = AutoLocator() if high - low < 1 else LogLocator(subs=(1, 2, 5))
    ax.yaxis.set_major_locator(few if high - low < 5 else LogLocator())
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.grid(axis="y")


def costs(ax: Axes, calibration: Calibration, steps: int) -> QuadMesh | None:
    """The step costs as a map, with the paths of uniform steps and of the schedule; None where none costs anything."""
    times, plan = calibration.times.numpy(), calibration[steps]
    cost = calibration.cost.T.numpy()  # [k, j]: from t_j on the x axis, to t_k on the y axis
    seen = np.ma.masked_where(~(np.isfinite(cost) & (cost > 0)), cost)
    edges = np.concatenate([times[:1], (times[1:] + times[:-1]) / 2, times[-1:]])  # cells centred on the knots
    mesh = None
    if seen.count():
        norm = LogNorm(max(seen.min(), 1e-8 * seen.max()), seen.max())
        mesh = ax.pcolormesh(edges, edges, seen, norm=norm, cmap="viridis", rasterized=True)
    for name, schedule in ((UNIFORM, calibration.uniform(steps)), (BELLMAN, plan)):
        knots = np.repeat(schedule.times.numpy(), 2)  # a staircase: each corner off the diagonal is one step
        white = dict(color="white", clip_on=False, markevery=(1, 2), label=f"{LOOK[name]['label']}, N = {steps}")
        ax.plot(knots[:-1], knots[1:], **LOOK[name] | white)
    ends = times[[0, -1]]
    ax.set(xlabel="from time $t_j$", ylabel="to time $t_k$", aspect="equal", xlim=ends, ylim=ends)
    ax.legend(loc="lower right", facecolor="#666666", frameon=True, framealpha=1, edgecolor="none", labelcolor="white")
    return mesh


def _shown(calibration: Calibration, steps: int | None) -> int:
    there = sorted(calibration)
    expect(len(there) > 0, "calibration", "a calibration with a schedule", calibration)
    if steps is None:
        return 4 if 4 in there else there[len(there) // 2]
    expect_positive_int(steps, "steps")
    expect(steps in there, "steps", f"one of {there}", steps)
    return steps


def _told(calibration: Calibration) -> str:
    """What it is of, in a line."""
    known = calibration.provenance
    pipeline = known.get("pipeline") if isinstance(known.get("pipeline"), dict) else {}
    size = [str(pipeline[k]) for k in ("width", "height", "num_frames") if pipeline.get(k) is not None]
    said = [str(pipeline["pipeline"])] if "pipeline" in pipeline else []
    said += [" x ".join(size)] if size else []
    solver = calibration.teacher_solver
    of = "" if solver.is_euler else f" of {solver.name}"
    said += [f"teacher of {solver.steps} steps{of}"]
    said += [f"{known['n']} noises"] if known.get("n") is not None else []
    return "   ·   ".join(said)


def _sigmas(ax: Axes, calibration: Calibration, N: int) -> None:
    """sigma against the step, beside what pipelines come with."""
    plan, solver, steps = calibration[N], calibration.solvers.get(N), range(N + 1)
    for name, sigmas in stock_sigmas(N).items():
        ax.plot(steps, sigmas, label=name, zorder=1, **STOCK[name])
    ax.plot(steps, calibration.uniform(N).sigmas, **LOOK[UNIFORM])
    ax.plot(steps, plan.sigmas, **LOOK[BELLMAN] | dict(linewidth=2.5, markersize=6, zorder=3))
    if solver is not None and solver.steps == N and not np.array_equal(solver.times, plan.times):
        ax.plot(steps, 1 - solver.times, **LOOK[FITTED])
    if N <= 10:
        below = dict(xytext=(-5, -11), textcoords="offset points", ha="right", color=LOOK[BELLMAN]["color"])
        for i, sigma in enumerate(plan.sigmas.tolist()[:-1]):
            ax.annotate(f"{sigma:.3g}", (i, sigma), **below)
    for t in calibration.forced_knots:
        ax.axhline(1 - t, color="black", linewidth=0.8, linestyle=(0, (1, 3)), label=f"forced knot, {1 - t:.3g}")
    ax.set(xlabel="step", ylabel="sigma", xlim=(-0.17 * N, 1.05 * N), ylim=(-0.03, 1.08), title=f"Sigmas of N = {N}")
    ax.set_xticks(range(0, N + 1, max(1, math.ceil(N / 10))))
    ax.legend(loc="lower left")
    ax.grid(axis="y")


def _errors(ax: Axes, calibration: Calibration, N: int) -> None:
    """Verified endpoint errors over the numbers of steps; where nothing was verified, those of what was tried, or
    costs."""
    names = {}
    if calibration.verified:
        title, label = "Verified endpoint error", "mean squared distance to the teacher's samples"
        intervals = calibration.verified_interval
        series = {
            name: [
                (n, of[name], intervals.get(n, {}).get(name))
                for n, of in sorted(calibration.verified.items())
                if of.get(name, 0) > 0
            ]
            for name in CHOICES
        }
    elif calibration.tried:
        title, label = "Error by cross-validation", "mean squared distance to the teacher's samples"
        series = {}
        for name in (UNIFORM, BELLMAN):
            known = [(n, c) for n, of in sorted(calibration.tried.items()) for c in of if c.name == name]
            series[name] = [(n, c.error, c.interval) for n, c in known if c.error > 0]
        series[FITTED] = [(n, of[0].error, of[0].interval) for n, of in sorted(calibration.tried.items()) if of]
        series[FITTED] = [point for point in series[FITTED] if point[1] > 0]
        names = {FITTED: {"label": "the best of what was tried"}}
    else:
        title, label = "Cost (no error was verified)", "sum of the mean squared errors of the steps"
        plans = sorted(calibration.items())
        series = {
            UNIFORM: [(n, s.uniform_cost, None) for n, s in plans if s.uniform_cost and math.isfinite(s.uniform_cost)],
            BELLMAN: [(n, s.cost, s.cost_interval) for n, s in plans if s.cost],
        }
    ax.axvline(N, color="#dddddd", linewidth=6, zorder=0)
    own = calibration.teacher_error
    if (calibration.verified or calibration.tried) and own is not None and own.error > 0:
        ax.axhline(own.error, color="black", linewidth=0.8, linestyle=(0, (1, 3)), label="the teacher's own error")
    there = sorted({n for points in series.values() for n, _, _ in points})
    for i, (name, points) in enumerate(series.items()):
        if points:
            n, mean, ends = zip(*points, strict=True)
            beside = np.array(n) + 0.07 * (i - 1)  # intervals do not hide one another
            low, high = np.transpose([(m - e[0], e[1] - m) if e else (0, 0) for m, e in zip(mean, ends, strict=True)])
            ax.errorbar(beside, mean, np.clip([low, high], 0, None), capsize=2.5, **LOOK[name] | names.get(name, {}))
    plain_log(ax, xlabel="steps N", ylabel=label, title=f"{title}, bars: 95 %")
    if there:
        ax.set(xticks=there, xlim=(there[0] - 0.5, there[-1] + 0.5))
        ax.legend()
