"""Makes the figures of docs/mathematics.md, from the bundled digits model.

python scripts/figures.py [--out FOLDER] [--samples n] [--grid K]
"""

import argparse
from pathlib import Path

import numpy as np
import pages
import torch
from matplotlib import pyplot
from matplotlib.colors import LogNorm

import flowkernels as fk
from flowkernels.evaluation.endpoint import endpoint_error
from flowkernels.models.bundled import BUNDLED

ROOT = Path(__file__).parents[1]


def costs(cal: fk.Calibration, cost: torch.Tensor, N: int):
    """Every step's cost, and two paths through them."""
    figure, axes = pyplot.subplots(figsize=(6.2, 4.6))
    grid = cal[N].grid
    shown = cost.triu(2).where(cost.isfinite(), 0.0).numpy()
    image = axes.pcolormesh(grid, grid, np.where(shown > 0, shown, np.nan)[:-1, :-1], norm=LogNorm(), cmap="viridis")
    uniform = fk.Schedule.uniform(N).times
    for times, colour, name in ((uniform, "white", "uniform"), (cal[N].times, "tab:red", "least cost")):
        path = [(times[i], times[i + 1]) for i in range(N)]
        axes.plot([b for _, b in path], [a for a, _ in path], "o-", color=colour, mec="black", label=f"{name}, N = {N}")
    axes.set(xlabel="to t_k", ylabel="from t_j", title="cost c(j, k) of a step of the digits model")
    axes.legend(loc="upper left")
    figure.colorbar(image, label="mean squared distance to the teacher's state")
    return figure


def errors(cal: fk.Calibration, velocity, held_out: torch.Tensor, grid: int):
    """What is minimised, and what is wanted."""
    steps, teacher = sorted(cal), fk.sample(velocity, held_out, grid)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8.4, 3.4))
    left.semilogy(steps, [cal[N].uniform_cost for N in steps], "o-", label="uniform")
    left.semilogy(steps, [cal[N].cost for N in steps], "o-", label="least cost")
    left.set(xlabel="steps N", title="sum of step costs: what Bellman minimises")
    samplers = {
        "uniform": lambda N: N,
        "least cost": lambda N: cal[N],
        "least cost, Adams-Bashforth 2": lambda N: fk.Solver.adams_bashforth(cal[N], 2),
        "fitted": lambda N: fk.fit_solver(velocity, cal, N),
    }
    for name, sampler in samplers.items():
        found = [endpoint_error(fk.sample(velocity, held_out, sampler(N)), teacher) for N in steps]
        right.semilogy(steps, found, "o-", label=name)
    right.set(xlabel="steps N", title="endpoint error: what is wanted")
    for axes in (left, right):
        axes.legend(fontsize=8)
    return figure


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/figures")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--grid", type=int, default=100)
    args = parser.parse_args(argv)
    args.out.mkdir(exist_ok=True)
    model = BUNDLED["digits"]
    velocity = model.load()
    noise, held_out = torch.randn(2, args.samples, *model.shape, generator=torch.Generator().manual_seed(0))
    cal = fk.calibrate(velocity, noise, grid=args.grid, steps=range(2, 11), progress=False)
    cost = fk.step_costs(fk.rollout(velocity, noise, args.grid).v, args.grid)
    pages.save(costs(cal, cost, 4), args.out / "costs.png")
    pages.save(errors(cal, velocity, held_out, args.grid), args.out / "errors.png")


if __name__ == "__main__":
    main()
