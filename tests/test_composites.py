"""Students that are made of networks: what holds of each."""

import contextlib

import pytest
import torch
from _flows import RowField, normal
from torch import nn

import flowkernels as fk

QUIET = dict(progress=False)
SCHEDULE = fk.Schedule([0, 0.4, 1])


class Row(nn.Module):
    """A velocity of x and of a row a sample; of x and v0, joined, too."""

    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.tensor(0.7))

    def forward(self, x, t, rows):
        x = x[:, : rows.shape[1]] + x[:, rows.shape[1] :].sum(1, keepdim=True)
        return self.p * x + rows * t.to(x.dtype)[:, None]


MADE = {
    "blockwise": lambda of: fk.Blockwise([of(Row()), of(Row())], SCHEDULE),
    "acceleration": lambda of: fk.Acceleration(of(Row()), of(Row())),
    "noise": lambda of: fk.NoisePrediction(of(Row())),
}


def losses(student, target, batch):
    found = fk.StraightenLoss(SCHEDULE, target=target)(student, batch, torch.Generator().manual_seed(0))
    found.loss.backward()
    return [found.loss, *(p.grad for p in student.parameters())]


@pytest.mark.parametrize("around", ["networks", "fields"])
@pytest.mark.parametrize("target", MADE)
def test_conditioning_that_a_batch_carries(target, around):
    """Is as good as that of fields with a row for each sample."""
    knots, n = (3, 6) if target == "blockwise" else (2, 6)
    states, rows, sample = normal(knots, n, 4), normal(n, 4, seed=1), torch.tensor([5, 0, 2, 2])
    interval = torch.arange(4) % (knots - 1)
    of_field = MADE[target](lambda net: fk.VelocityField(net, conditioning={"rows": rows}))
    expected = losses(of_field, target, fk.BankBatch(states, interval, sample))
    field = fk.VelocityField if around == "fields" else (lambda net: net)
    batch = fk.BankBatch(states, interval, sample, conditioning={"rows": rows[sample]})
    found = losses(MADE[target](field), target, batch)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


AMBIENT = {
    "default float64": lambda: _default(torch.set_default_dtype, torch.float64, torch.float32),
    "default meta": lambda: torch.device("meta"),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@contextlib.contextmanager
def _default(setter, value, before):
    setter(value)
    try:
        yield
    finally:
        setter(before)


@pytest.mark.parametrize("state", AMBIENT)
@pytest.mark.parametrize("target", [*MADE, "annealed_reflow"])
def test_what_a_caller_has_set_does_not_count(target, state):
    """But for autocast, whose dtype the networks compute in; training and sampling."""
    rows, noise = normal(6, 4, seed=1), normal(6, 4)

    def of(net):
        return fk.VelocityField(net, conditioning={"rows": rows})

    def run(student):
        settings = dict(noise=noise, iterations=4, batch=4, lr=0.01, warmup=0, grid=[0, 0.2, 0.4, 0.7, 1], init="keep")
        result = fk.straighten(student, teacher, SCHEDULE, target=target, **settings, **QUIET)
        return result.history["loss"], fk.sample(result.student, noise, SCHEDULE)

    teacher = of(RowField())
    students = [MADE[target](of) if target in MADE else of(Row()) for _ in range(2)]
    loss, x1 = run(students[0])
    with AMBIENT[state]():
        found, x = run(students[1])
    near = dict(rel=0.1) if state == "autocast" else dict(rel=0)
    assert found == pytest.approx(loss, **near)
    torch.testing.assert_close(x, x1, rtol=0, atol=0.3 if state == "autocast" else 0)
    assert x.dtype == torch.float32


OTHERS = {  # settings of a run and the student, and of another
    "initial_speed": ("acceleration", dict(initial_speed=1.2), {}, r"initial_speed = 1.5.*got initial_speed = 1.2"),
    "compared": ("noise", dict(compared="noise"), {}, r"compared = 'data'.*got compared = 'noise'"),
    "path": ("noise", {}, dict(path="straight"), r"student = "),
}


@pytest.mark.parametrize("change", OTHERS)
def test_a_checkpoint_of_another_run(tmp_path, change):
    target, settings, made, message = OTHERS[change]

    def run(**given):
        net = MADE[target](lambda net: fk.VelocityField(net, conditioning={"rows": rows}))
        net.path = given.pop("path", getattr(net, "path", None))
        common = dict(noise=normal(4, 4), iterations=2, batch=4, grid=[0.1, 0.4, 1], init="keep", **QUIET)
        schedule = fk.Schedule([0.1, 0.4, 1])
        fk.straighten(net, teacher, schedule, target=target, checkpoint=tmp_path / "run.pt", **common, **given)

    rows = normal(4, 4, seed=1)
    teacher = fk.VelocityField(RowField(), conditioning={"rows": rows})
    run(**settings)
    run(**settings)
    with pytest.raises(ValueError, match=f"^checkpoint: expected one of this run .*{message}"):
        run(**made)
