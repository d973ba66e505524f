#!/usr/bin/env python
"""How far solvers end from the true solution that are fitted to a teacher of Euler's steps, and to one of Heun's at the
same price: the table in docs/choosing.md. `python scripts/teachers.py`; 3 minutes on one core."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

import flowkernels as fk
from flowkernels.models.bundled import BUNDLED
from flowkernels.models.closed_form import GaussianMixtureVelocity

FITTED, POLISHED, TESTED = 256, 128, 128
TEACHERS = {"Euler, K = 100": ("euler", 100), "Heun, K = 50": ("heun", 50)}


def normal(n: int, shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


def mixture(dim: int, modes: int, stds, seed: int) -> Callable[[torch.dtype], torch.nn.Module]:
    means = 1.5 * torch.randn(modes, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return lambda dtype: GaussianMixtureVelocity(means.to(dtype), stds).to(dtype)


FLOWS = {  # what makes the velocity in a dtype, the shape of a sample, steps of the true solution
    "digits": (lambda dtype: BUNDLED["digits"].load().to(dtype), (1, 8, 8), 300),
    "5 modes of std 0.3 in 13 dimensions": (mixture(13, 5, 0.3, 0), (13,), 1000),
    "5 modes of std 0.05 in 13 dimensions": (mixture(13, 5, 0.05, 0), (13,), 1000),
    "10 modes of std 0.5 in 50 dimensions": (mixture(50, 10, 0.5, 1), (50,), 1000),
    "4 modes of std 0.01 to 2 in 13 dimensions": (mixture(13, 4, [0.01, 0.1, 0.5, 2.0], 2), (13,), 1000),
}


def runge_kutta_4(velocity: Callable[[Tensor, Tensor], Tensor], x: Tensor, steps: int) -> Tensor:
    h = 1 / steps

    def v(x: Tensor, t: float) -> Tensor:
        return velocity(x, torch.full((len(x),), min(t, 1 - 1e-9), dtype=torch.float64))

    for i in range(steps):
        a = v(x, i * h)
        b = v(x + h / 2 * a, (i + 0.5) * h)
        c = v(x + h / 2 * b, (i + 0.5) * h)
        x = x + h / 6 * (a + 2 * b + 2 * c + v(x + h * c, (i + 1) * h))
    return x


def distance(x: Tensor, truth: Tensor) -> str:
    return f"{(x - truth).square().flatten(1).sum(1).mean().sqrt():.3g}"


@torch.no_grad()
def main() -> None:
    warnings.simplefilter("ignore")
    head = ["flow", "teacher", "its own error", "fit, N = 8", "polished", "fit, N = 4", "polished"]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for flow, (make, shape, steps) in FLOWS.items():
        velocity, noise, other = make(torch.float32), normal(FITTED, shape, 1), normal(TESTED, shape, 2)
        truth = runge_kutta_4(make(torch.float64), other.double(), steps)
        for name, (solver, K) in TEACHERS.items():
            cal = fk.calibrate(velocity, noise, K, [4, 8], teacher_solver=solver, progress=False)
            cells = [distance(fk.sample(velocity, other, cal.teacher_solver), truth)]
            for N in (8, 4):
                fit = fk.fit_solver(velocity, cal, N)
                for plan in (fit, fk.polish(velocity, cal, fit, samples=POLISHED)):
                    cells.append(distance(fk.sample(velocity, other, plan), truth))
            print(f"| {' | '.join([flow, name, *cells])} |", flush=True)


if __name__ == "__main__":
    main()
