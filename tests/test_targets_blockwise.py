"""A network for each interval: which one a time goes to, and what it learns."""

import copy

import pytest
import torch
from _flows import RowField, even_grid, normal, uneven_grid
from test_straighten import small_net
from torch import nn

import flowkernels as fk
from flowkernels.models.networks import ResidualMLP

QUIET = dict(progress=False)
KNOTS = [0.0, 0.3, 0.7, 1.0]


class Constant(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value, self.times = nn.Parameter(torch.tensor(float(value))), []

    def forward(self, x, t, scale=1.0):
        self.times.append(t)
        return self.value * scale * torch.ones_like(x)


def constants(n=3):
    return [Constant(k + 1) for k in range(n)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_time_goes_to_its_network(dtype):
    """At a knot, which float32 may have rounded down, to the one that begins there; the last time to the last."""
    blocks = fk.Blockwise(constants(), fk.Schedule(KNOTS))
    t = torch.tensor([0.7, 0.0, 1.0, 0.2999, 0.3, 0.69, 0.31], dtype=dtype)
    scale = torch.arange(1, 8, dtype=dtype)[:, None]
    v = blocks(torch.zeros(7, 2, dtype=dtype), t, scale=scale)
    expected = torch.tensor([3.0, 1, 3, 1, 2, 2, 2], dtype=dtype)[:, None] * scale
    assert torch.equal(v, expected.expand(7, 2))
    assert blocks.forced_knots == (0.3, 0.7)
    for t in (-1e-3, 1.001, float("nan")):
        with pytest.raises(ValueError, match=r"^t: expected times in \[0, 1\], that of the networks"):
            blocks(torch.zeros(1, 2), torch.tensor([t]))


def test_conditioning_is_that_of_each_sample():
    """In the fields of the networks and around them, in mixed batches and in parts of the samples."""
    rows, noise = normal(9, 3, seed=4), normal(9, 3)
    field = fk.VelocityField(RowField(), reverse_time=True, time_scale=1000, conditioning={"rows": rows})
    blocks, t = fk.Blockwise(field, fk.Schedule(KNOTS)), torch.arange(9) / 8
    assert all(net.conditioning["rows"] is rows for net in blocks.networks)
    torch.testing.assert_close(blocks(noise, t), field(noise, t), rtol=0, atol=1e-6)
    part = torch.tensor([7, 2, 4])
    torch.testing.assert_close(blocks.rows(part, 9)(noise[part], t[part]), field(noise, t)[part], rtol=0, atol=1e-6)
    around = fk.VelocityField(fk.Blockwise(RowField(), fk.Schedule(KNOTS)), conditioning={"rows": rows})
    plain = fk.VelocityField(RowField(), conditioning={"rows": rows})
    torch.testing.assert_close(around(noise, t), plain(noise, t), rtol=0, atol=1e-6)
    for grid in (torch.tensor(KNOTS, dtype=torch.float64), even_grid(8)):
        bank = fk.TrajectoryBank(blocks, fk.Schedule(grid), noise=noise, grid=grid, chunk=4, progress=False)
        torch.testing.assert_close(bank.fill().states(), fk.rollout(field, noise, grid).x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("t_sampling", [None, "uniform", lambda n, generator: torch.ones(n)])
def test_the_loss_in_float64(t_sampling):
    """Each example by the network of its own interval, also at the interval's end; the gradients are its own."""
    schedule, states = fk.Schedule(KNOTS), normal(4, 12, 5)
    interval, sample = torch.arange(24) % 3, torch.arange(24) % 12
    blocks = fk.Blockwise([small_net_5(k) for k in range(3)], schedule)
    objective = fk.StraightenLoss(schedule, target="blockwise", t_sampling=t_sampling, weighting=[1, 2, 0.5])
    found = objective(blocks, fk.BankBatch(states, interval, sample), torch.Generator().manual_seed(1))
    found.loss.backward()
    u = torch.zeros(24)
    if t_sampling == "uniform":
        u = torch.rand(24, generator=torch.Generator().manual_seed(1))
    elif t_sampling is not None:
        u = torch.ones(24)
    twins, total = [copy.deepcopy(net).double() for net in blocks.networks], 0
    for i, (k, s) in enumerate(zip(interval.tolist(), sample.tolist(), strict=True)):
        a, b, w = states[k, s].double(), states[k + 1, s].double(), u[i].double()
        v = twins[k](((1 - w) * a + w * b)[None], (KNOTS[k] + w * (KNOTS[k + 1] - KNOTS[k]))[None])
        loss = (v - (b - a) / (KNOTS[k + 1] - KNOTS[k])).square().mean()
        assert found.per_sample[i].item() == pytest.approx(loss.item(), rel=2e-4)
        total = total + [1, 2, 0.5][k] * loss / 24
    total.backward()
    assert found.loss.item() == pytest.approx(total.item(), rel=1e-4)
    for net, twin in zip(blocks.networks, twins, strict=True):
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            if q.grad is not None:
                torch.testing.assert_close(p.grad.double(), q.grad, rtol=2e-3, atol=1e-4)


def small_net_5(seed):
    torch.manual_seed(seed)
    net = ResidualMLP(5, width=16, blocks=1, time_width=8)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net


def test_it_learns_what_one_network_cannot():
    """Of networks that know no time; the other intervals' are left alone by a weighting of 0."""

    class Factor(nn.Module):
        def __init__(self):
            super().__init__()
            self.p = nn.Parameter(torch.zeros(()))

        def forward(self, x, t):
            return self.p * x

    def teacher(x, t):
        return 2 * t[:, None] * x

    grid, noise = even_grid(20), normal(64, 2)
    schedule = fk.Schedule(grid[[0, 6, 14, 20]], grid, (0, 6, 14, 20))
    settings = dict(noise=noise, iterations=250, batch=64, lr=0.05, warmup=0, ema=None, **QUIET)
    x1 = fk.rollout(teacher, noise, grid).x[-1]
    one = fk.straighten(Factor(), teacher, schedule, **settings).student
    settings |= dict(target="blockwise")
    many = fk.straighten(fk.Blockwise(Factor(), schedule), teacher, schedule, **settings).student
    errors = [(fk.sample(net, noise, schedule) - x1).square().mean().item() for net in (one, many)]
    assert errors[1] < 1e-5 < 1e-2 < errors[0]
    only = fk.straighten(fk.Blockwise(Factor(), schedule), teacher, schedule, weighting=[0, 1, 0], **settings).student
    assert [net.p.item() != 0 for net in only.networks] == [False, True, False]
    assert only.networks[1].p.item() == pytest.approx(many.networks[1].p.item(), rel=1e-3)


def test_copies_of_the_teacher_start_where_it_is():
    teacher = fk.VelocityField(small_net(), guidance=2.0, conditioning={}, unconditional={}).eval()
    schedule, grid = fk.Schedule(KNOTS), sorted({*KNOTS, *uneven_grid(6).tolist()})
    settings = dict(noise=(4,), iterations=1, batch=8, bank=8, lr=1e-30, grid=grid, ema=None, **QUIET)
    for student in (None, fk.Blockwise(fk.VelocityField(small_net(3)), schedule)):
        result = fk.straighten(student, teacher, schedule, target="blockwise", **settings).student
        assert isinstance(result, fk.Blockwise)
        assert len(result.networks) == 3
        for field in result.networks:
            for key, value in teacher.net.state_dict().items():
                assert torch.equal(field.net.state_dict()[key], value)
    whole = fk.straighten(None, result, schedule, target="blockwise", init=result.state_dict(), **settings).student
    assert whole.state_dict().keys() == result.state_dict().keys()


def wrong(what):
    schedule = fk.Schedule(KNOTS)
    return {
        "one network": (small_net(), TypeError, r"student: expected a Blockwise for target='blockwise'"),
        "others": (fk.Blockwise(small_net(), fk.Schedule([0, 0.3, 0.6, 1])), ValueError,
                   r"student: expected a Blockwise on the knots \[0.0, 0.3, 0.7, 1.0\], got one of 3 networks, on"),
        "fewer": (fk.Blockwise(small_net(), fk.Schedule([0, 0.3, 1])), ValueError, r"student: .*got one of 2 networks"),
        "a field": (fk.VelocityField(fk.Blockwise(small_net(), schedule), reverse_time=True), ValueError,
                    r"student: expected a Blockwise that is given the time as it is"),
    }[what]  # fmt: skip


@pytest.mark.parametrize("what", ["one network", "others", "fewer", "a field"])
def test_students_that_are_none(what):
    """Before the teacher is evaluated."""
    student, error, message = wrong(what)

    def teacher(x, t):
        raise AssertionError("evaluated")

    settings = dict(noise=(4,), iterations=1, grid=10, bank=8, batch=8, **QUIET)
    with pytest.raises(error, match=message):
        fk.straighten(student, teacher, fk.Schedule(KNOTS), target="blockwise", **settings)


def test_networks_that_do_not_fit():
    schedule, net = fk.Schedule(KNOTS), small_net()
    for networks, message in (
        (constants(2), r"^networks: expected 3 modules, one for each interval, or one to copy, got 2"),
        ([net, net, small_net(1)], r"^networks: expected weights of their own for each"),
    ):
        with pytest.raises(ValueError, match=message):
            fk.Blockwise(networks, schedule)
    with pytest.raises(TypeError, match=r"^networks: expected 3 modules"):
        fk.Blockwise([net, 1, 2], schedule)
    with pytest.raises(fk.NotFusable):
        fk.fuse(fk.Blockwise(net, schedule), schedule)
