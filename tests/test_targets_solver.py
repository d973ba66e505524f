"""Solver-aware straightening: from a fitted solver on, nearer to the teacher than BOSS with as many evaluations."""

import copy
import warnings

import pytest
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
        fitted = fk.fit_solver(field, cal, N, free_start=False)
    polished = fk.polish(field, cal, fitted, samples=256, iterations=20)
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
        if name == "fitted":  # a polished solver leaves training little, and the network is not always nearer after it
            assert trained.errors[1] < trained.errors[0]
    steps = fk.straighten(copy.deepcopy(start), field, fitted, target="solver", batch=32 * N, **RUN)
    found["fitted, step by step"] = error(steps.student, steps.solver)
    assert found["fitted, step by step"] < min(found["fitted"], found["boss"])
    assert found["fitted, trained"] < 0.7 * found["fitted"]
    assert found["polished"] < 0.4 * found["fitted"]
    assert found["polished, trained"] < 0.36 * found["boss"]


@pytest.mark.parametrize("target", ["endpoint", "solver"])
@pytest.mark.parametrize("resumed", [False, True], ids=["at once", "resumed"])
def test_a_student_that_got_worse_is_said(target, resumed, tmp_path):
    """On trajectories that it was not trained on, which no loss sees, and which are the errors' own."""
    field = GaussianMixtureVelocity(1.5 * normal(6, D), 0.6, range(1, 7))
    cal = fk.calibrate(field, normal(64, D, seed=1), GRID, [N], progress=False)
    solver = fk.Solver.adams_bashforth(cal[N])
    torch.manual_seed(0)
    start, noise, seen = Corrected(field), normal(64, D, seed=3), []
    run = RUN | dict(noise=noise, iterations=20, bank=64, lr=0.3, batch=8, ema=None, checkpoint=tmp_path / "run.pt")
    run["checkpoint_every"] = 5
    bank = fk.TrajectoryBank(field, solver, noise=noise, grid=GRID, progress=False).fill()

    def loss(v, wanted):
        seen.append(len(v))
        if resumed and len(seen) == 12:
            raise InterruptedError
        return (v - wanted).square().flatten(1).sum(1)

    def trained(student):
        return fk.straighten(student, field, solver, target=target, loss=loss, **run)

    if resumed:
        with pytest.raises(InterruptedError):
            trained(copy.deepcopy(start))
    with pytest.warns(UserWarning, match=f"^target='{target}': on 8 trajectories that were not trained on") as told:
        found = trained(copy.deepcopy(start))
    assert told[-1].filename == __file__
    x, ends = noise[56:], bank.ends(8).states[1]
    torch.testing.assert_close(ends, fk.sample(field, x, GRID))
    student = found.student.requires_grad_(False)
    rms = [
        (fk.sample(v, x, s) - ends).square().sum(1).mean().item() for v, s in ((start, solver), (student, found.solver))
    ]
    torch.testing.assert_close(torch.tensor(found.errors), torch.tensor(rms), rtol=1e-4, atol=0)
    assert found.errors[1] > found.errors[0]


def test_what_is_held_out_is_not_drawn():
    field = GaussianMixtureVelocity(1.5 * normal(6, D), 0.6, range(1, 7))
    bank = fk.TrajectoryBank(
        field, [fk.Schedule.uniform(2), fk.Schedule.uniform(4)], noise=(D,), size=24, grid=GRID, progress=False
    ).fill()
    drawn = {int(i) for _ in range(40) for i in bank.sample(16, schedule=2, held_out=10).sample}
    assert drawn == set(range(14))
    batch = bank.ends(10, 4)
    assert batch.sample.tolist() == list(range(14, 24))
    assert torch.equal(batch.states, bank.states(4)[[0, -1], 14:])
    assert batch.times == (0.0, 1.0)
