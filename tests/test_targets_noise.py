"""Rectified Diffusion: noise prediction on pairs that match, and its path's own steps."""

import copy
import math

import pytest
import torch
from _flows import RowField, normal
from torch import nn

import flowkernels as fk
from flowkernels.models.closed_form import GaussianMixtureVelocity

QUIET = dict(progress=False)
PATHS = ("variance_preserving", "straight")


def alpha_sigma(path, t):
    """Of a number; the diffusion's by its integral, in ten thousand steps of the middle."""
    if path == "straight":
        return t, 1 - t
    s, n = 1 - t, 10_000
    integral = sum(0.85 + (12 - 0.85) * s * (k + 0.5) / n for k in range(n)) * s / n
    alpha = math.exp(-integral / 2)
    return alpha, math.sqrt(1 - alpha * alpha)


class Affine(nn.Module):
    def __init__(self):
        super().__init__()
        self.p, self.q = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.tensor(-0.4))

    def forward(self, x, t):
        return (self.p + self.q * t.to(x.dtype)[:, None]) * x


@pytest.mark.parametrize("compared", ["data", "noise"])
@pytest.mark.parametrize(
    ("path", "start"), [("variance_preserving", 0), ("variance_preserving", 0.2), ("straight", 0.2)]
)
@pytest.mark.parametrize("t_sampling", [None, "start"])
def test_the_loss_in_float64(t_sampling, path, start, compared):
    states, sample = normal(2, 9, 3), torch.tensor([8, 0, 3, 3, 1, 7])
    student = fk.NoisePrediction(Affine(), path)
    settings = dict(t_sampling=t_sampling, compared=compared)
    objective = fk.StraightenLoss(fk.Schedule([start, 0.6, 1]), target="noise", **settings)
    batch = fk.BankBatch(states, torch.zeros(6, dtype=torch.int64), sample)
    found = objective(student, batch, torch.Generator().manual_seed(3))
    found.loss.backward()
    twin, total = copy.deepcopy(student.net).double(), 0
    twin.zero_grad()
    u = torch.zeros(6) if t_sampling else torch.rand(6, generator=torch.Generator().manual_seed(3))
    for i, j in enumerate(sample.tolist()):
        first, data = states[0, j].double(), states[1, j].double()
        alpha, sigma = alpha_sigma(path, start)
        e = (first - alpha * data) / sigma
        t = start + u[i].item() * (1 - start)
        alpha, sigma = alpha_sigma(path, t)
        x = alpha * data + sigma * e
        answer = twin(x[None], torch.tensor([t], dtype=torch.float64))[0]
        error = answer - e if compared == "noise" else (x - sigma * answer) / alpha - data
        assert found.per_sample[i].item() == pytest.approx(error.square().mean().item(), rel=1e-4, abs=1e-9)
        total = total + error.square().mean() / 6
    total.backward()
    assert found.loss.item() == pytest.approx(total.item(), rel=1e-4)
    for p, q in zip(student.parameters(), twin.parameters(), strict=True):
        assert p.grad.item() == pytest.approx(q.grad.item(), rel=1e-3, abs=1e-6)


class Known(nn.Module):
    """Of pairs of noise e and data 3 e - 1."""

    def __init__(self, path):
        super().__init__()
        self.path = path

    def forward(self, x, t):
        alpha, sigma = alpha_sigma(self.path, t[0].item())
        return (x + alpha) / (3 * alpha + sigma)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("plan", [[0.1, 1], [0.1, 0.3, 0.35, 1]], ids=str)
def test_the_steps_are_the_paths_own(plan, path):
    """Any number of them ends at the data, and each state is on the path, curved or straight."""
    student, e = fk.NoisePrediction(Known(path), path), normal(5, 2).double()
    x = [a * (3 * e - 1) + s * e for a, s in (alpha_sigma(path, t) for t in plan)]
    found = fk.rollout(student, x[0], plan)
    torch.testing.assert_close(found.x, torch.stack(x), rtol=1e-7, atol=1e-7)
    for k, v in enumerate(found.v):
        torch.testing.assert_close(v, (x[k + 1] - x[k]) / (plan[k + 1] - plan[k]), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(fk.sample(student, x[0], plan), 3 * e - 1, rtol=1e-7, atol=1e-7)


def test_conditioning_is_that_of_each_sample():
    rows, noise, grid = normal(9, 3, seed=4), normal(9, 3), torch.linspace(0, 1, 4, dtype=torch.float64)

    def student(rows):
        return fk.NoisePrediction(fk.VelocityField(RowField(), conditioning={"rows": rows}))

    bank = fk.TrajectoryBank(student(rows), fk.Schedule(grid), noise=noise, grid=grid, chunk=4, progress=False)
    found = bank.fill().states()
    for i in range(9):
        expected = fk.rollout(student(rows[i : i + 1]), noise[i : i + 1], grid).x
        torch.testing.assert_close(found[:, i : i + 1], expected, rtol=1e-5, atol=1e-5)


def test_a_student_learns_to_sample_in_few_steps():
    """Six modes, on noise that it has not seen: two of its steps end nearer than four of the teacher's."""
    torch.manual_seed(0)
    teacher = GaussianMixtureVelocity(2 * normal(6, 2, seed=5), 0.3)
    net = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))
    student = fk.NoisePrediction(fk.VelocityField(net, time_column=True))
    settings = dict(iterations=400, batch=256, lr=5e-3, warmup=10, ema=0.98, grid=50, init="keep", **QUIET)
    settings |= dict(loss="huber_per_element", huber_c=0.1, noise=normal(2048, 2))
    noise = normal(1024, 2, seed=99)
    x1 = fk.rollout(teacher, noise, 50).x[-1]

    def error(velocity, N):
        return (fk.sample(velocity, noise, N) - x1).square().mean().item()

    before = error(student, 2)
    result = fk.straighten(student, teacher, fk.Schedule([0, 1]), target="noise", **settings).student
    assert error(result, 2) < min(0.75 * error(teacher, 4), 0.1 * before)
    assert error(result, 4) < error(result, 2) < error(result, 1)


def test_what_is_refused():
    teacher, noise = GaussianMixtureVelocity(normal(2, 2), 0.3), normal(4, 2)
    settings = dict(noise=(2,), iterations=1, batch=4, bank=4, grid=4, target="noise", init="keep", **QUIET)
    with pytest.raises(TypeError, match=r"^student: expected one that predicts noise, fk.NoisePrediction"):
        fk.straighten(Affine(), teacher, fk.Schedule([0, 1]), **settings)
    plain, curved = fk.NoisePrediction(Affine(), "straight"), fk.NoisePrediction(Affine())
    with pytest.raises(ValueError, match=r"^schedule: expected one that begins after 0, for target='noise'"):
        fk.straighten(plain, teacher, fk.Schedule([0, 1]), **settings)
    with pytest.raises(ValueError, match=r"^schedule: expected times after 0, where noise tells nothing"):
        fk.sample(plain, noise, 2)
    late = fk.Schedule([0.1, 0.5, 1])
    expected = fk.sample(plain, noise, late)
    torch.testing.assert_close(fk.sample(plain, noise, late, capture="compile"), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"^schedule: expected a schedule, for a NoisePrediction"):
        fk.sample(curved, noise, fk.Solver.heun(2))
    with pytest.raises(ValueError, match=r"^velocity: expected one that is known at a state and a time"):
        fk.sample(curved, noise, 2, capture="compile")
    with pytest.raises(ValueError, match=r"^velocity: expected one that is known at a state and a time"):
        curved(noise, torch.ones(4))
