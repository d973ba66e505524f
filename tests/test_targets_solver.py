"""Solver-aware straightening: from a fitted solver on, nearer to the teacher than BOSS with as many evaluations."""

import copy
import warnings

import torch
from _flows import normal
from torch import nn

import flowkernels as fk
from flowkernels.models.closed_form import GaussianMixtureVelocity

N, GRID, D = 4, 20, 13
RUN = dict(noise=(D,), init="keep", iterations=100, bank=1024, lr=1e-3, warmup=10, ema=0.95, grid=GRID, progress=False)


class Corrected(nn.Module):
    """A mixture's velocity plus a network, zero at first."""

    def __init__(self, field):
        super().__init__()
        self.field = field
        self.net = nn.Sequential(nn.Linear(D + 1, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, D))
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, x, t):
        return self.field(x, t) + self.net(torch.cat([x, t[:, None]], 1))


def test_it_is_nearer_than_boss_and_than_the_solver_untrained():
    """The mean squared distance to the teacher's ends, from noise that none has seen."""
    field = GaussianMixtureVelocity(1.5 * normal(6, D), 0.6, range(1, 7))
    cal = fk.calibrate(field, normal(256, D, seed=1), GRID, [N], progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        fitted = fk.fit_solver(field, cal, N)
    polished = fk.polish(field, cal, fitted, samples=256, iterations=3)
    torch.manual_seed(0)
    start, held_out = Corrected(field), normal(1024, D, seed=2)
    ends = fk.sample(field, held_out, GRID)

    def error(student, plan):
        return (fk.sample(student.requires_grad_(False), held_out, plan) - ends).square().sum(1).mean().item()

    boss = fk.straighten(copy.deepcopy(start), field, cal[N], batch=32 * N, **RUN)
    found = {"boss": error(boss.student, cal[N]), "fitted": error(field, fitted), "polished": error(field, polished)}
    for name, solver in (("fitted", fitted), ("polished", polished)):
        trained = fk.straighten(copy.deepcopy(start), field, solver, target="endpoint", batch=32, **RUN)
        found[f"{name}, trained"] = error(trained.student, trained.solver)
    steps = fk.straighten(copy.deepcopy(start), field, fitted, target="solver", batch=32 * N, **RUN)
    found["fitted, step by step"] = error(steps.student, steps.solver)
    assert found["fitted, step by step"] < min(found["fitted"], found["boss"])
    assert found["fitted, trained"] < 0.7 * found["fitted"]
    assert found["polished, trained"] < 0.8 * found["polished"]
    assert found["polished, trained"] < 0.36 * found["boss"]
