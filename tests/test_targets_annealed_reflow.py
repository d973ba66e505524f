"""SlimFlow's annealed pairs: fresh noise at first, the teacher's at last."""

import copy
import math

import pytest
import torch
from _flows import normal
from torch import nn

import flowkernels as fk
from flowkernels.models.closed_form import GaussianMixtureVelocity
from flowkernels.models.networks import ResidualMLP

QUIET = dict(progress=False)


class Affine(nn.Module):
    def __init__(self):
        super().__init__()
        self.p, self.q = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.tensor(-0.4))

    def forward(self, x, t):
        return (self.p + self.q * t.to(x.dtype)[:, None]) * x


BETAS = {0.0: 1.0, 0.15: 0.6, 0.3: 0.2, 0.375: 0.0, 0.5: 0.0, 1.0: 0.0}


@pytest.mark.parametrize("ends", [False, True], ids=["bank", "ends"])
@pytest.mark.parametrize("t_sampling", [None, "start"])
@pytest.mark.parametrize("progress", BETAS)
def test_the_loss_in_float64(progress, t_sampling, ends):
    """From the formulas of the paper, with what was drawn drawn again, one example after the other."""
    states, sample = normal(2, 9, 5), torch.tensor([8, 0, 3, 3, 1, 7])
    batch = fk.BankBatch(states, torch.zeros(6, dtype=torch.int64), sample)
    if ends:
        batch = batch._replace(states=states[:, sample], ends=True, size=9)
    objective = fk.StraightenLoss(fk.Schedule([0, 0.2, 1]), target="annealed_reflow", t_sampling=t_sampling)
    net, generator = Affine(), torch.Generator().manual_seed(3)
    found = objective(net, batch, generator, progress)
    found.loss.backward()
    twin, drawn, total = copy.deepcopy(net).double(), torch.Generator().manual_seed(3), 0
    twin.zero_grad()
    beta = BETAS[progress]
    z = torch.randn(6, 5, generator=drawn) if beta else torch.zeros(6, 5)
    u = torch.zeros(6) if t_sampling == "start" else torch.rand(6, generator=drawn)
    for i, s in enumerate(sample.tolist()):
        x0 = math.sqrt(1 - beta * beta) * states[0, s].double() + beta * z[i].double()
        x1, t = states[1, s].double(), u[i].double()
        loss = (twin(((1 - t) * x0 + t * x1)[None], t[None]) - (x1 - x0)).square().mean()
        assert found.per_sample[i].item() == pytest.approx(loss.item(), rel=1e-5)
        total = total + loss / 6
    total.backward()
    assert found.loss.item() == pytest.approx(total.item(), rel=1e-5)
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert p.grad.item() == pytest.approx(q.grad.item(), rel=1e-4, abs=1e-6)


def test_a_smaller_student_learns():
    """Six modes, by a network of a thousand weights that starts from none of the teacher's: its one step ends nearer to
    the teacher's data than four of the teacher's own, on noise it has not seen."""
    torch.manual_seed(0)
    teacher = GaussianMixtureVelocity(2 * normal(6, 2, seed=5), 0.3)
    student = ResidualMLP(2, width=32, blocks=1, time_width=16)
    settings = dict(iterations=500, batch=256, lr=5e-3, warmup=10, ema=0.98, grid=50, init="keep", **QUIET)
    schedule, noise = fk.Schedule([0, 1]), normal(1024, 2, seed=99)
    result = fk.straighten(student, teacher, schedule, noise=normal(2048, 2), target="annealed_reflow", **settings)
    x1 = fk.rollout(teacher, noise, 50).x[-1]
    four, one = (
        (fk.sample(velocity, noise, N) - x1).square().mean() for velocity, N in ((teacher, 4), (result.student, 1))
    )
    assert one < 0.7 * four


def test_what_it_needs():
    schedule = fk.Schedule([0.1, 0.5, 1])
    with pytest.raises(ValueError, match=r"^schedule: expected one that begins at 0, with noise, .*got one at 0.1"):
        fk.StraightenLoss(schedule, target="annealed_reflow")
    objective = fk.StraightenLoss(fk.Schedule([0, 1]), target="annealed_reflow")
    batch = fk.BankBatch(normal(2, 4, 3), torch.zeros(4, dtype=torch.int64), torch.arange(4))
    for progress, error in ((None, TypeError), (1.5, ValueError)):
        with pytest.raises(error, match=r"^progress: expected a number in \[0, 1\]"):
            objective(Affine(), batch, None, progress)
