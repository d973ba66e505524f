"""What a network changes about its VelocityField in the middle of a loop counts from the next step on."""

import contextlib
from unittest import mock

import pytest
import torch
from torch import nn

import flowkernels as fk

N, CHANGED_AT = 5, 2


class Net(nn.Module):
    """Changes something, once, as it is called a number of times."""

    def __init__(self, change):
        super().__init__()
        self.change, self.calls, self.times, self.patches = change, 0, [], contextlib.ExitStack()
        self.__dict__["field"] = fk.VelocityField(self)  # no submodule, being around this one

    def forward(self, x, t=None, y=None):
        self.calls += 1
        if self.calls == CHANGED_AT:
            self.change(self.field, self.patches)
        self.times.append(None if t is None else t.clone())
        t = torch.zeros(len(x)) if t is None else t
        v = torch.sin(3 * x) + t[:, None].to(x.dtype) * x
        return v if y is None else v + y[:, None]


def setting(**values):
    def change(field, patches):
        for name, value in values.items():
            setattr(field, name, value)

    return change


def doubled(module, args, out):
    return 2 * out


def of_class(name):
    def change(field, patches):
        own = getattr(fk.VelocityField, name)
        patched = lambda self, *args, **kwargs: 2 * own(self, *args, **kwargs)  # noqa: E731
        patches.enter_context(mock.patch.object(fk.VelocityField, name, patched))

    return change


def of_object(field, patches):
    own = field.call_network
    field.call_network = lambda *args, **kwargs: 2 * own(*args, **kwargs)


def another_net(field, patches):
    class Other(nn.Module):
        def forward(self, x, t):
            return x * t[:, None]

    field.net = Other()


def guided(field, patches):
    field.guidance, field.unconditional = 2.0, {"y": torch.ones(1)}


CHANGES = {
    "nothing": setting(),
    "scale": setting(time_scale=3.0),
    "offset": setting(time_offset=0.25),
    "direction": setting(reverse_time=True),
    "sign": setting(sign=-1),
    "dtype": setting(dtype=torch.float64),
    "conditioning": setting(conditioning={"y": torch.ones(3)}),
    "entry": lambda field, patches: field.conditioning.update(y=torch.ones(3)),
    "names": setting(x_name="x", time_name="t"),
    "network": another_net,
    "wrapped": lambda field, patches: setattr(field, "net", nn.DataParallel(field.net)),
    "velocity": lambda field, patches: setattr(field, "net", fk.VelocityField(field.net, time_scale=2.0)),
    "guidance": guided,
    "hook": lambda field, patches: field.register_forward_hook(doubled),
    "earlier hook": lambda field, patches: field.register_forward_pre_hook(lambda module, args: (2 * args[0], args[1])),
    "hook of the network": lambda field, patches: field.net.register_forward_hook(doubled),
    "method": of_object,
    "class's call": of_class("call_network"),
    "class's forward": of_class("forward"),
}


@pytest.mark.parametrize("stage", ["sample", "rollout", "invert", "solver"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_counts_from_the_next_step_on(change, stage):
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    inverse = stage == "invert"
    solver = fk.Solver.adams_bashforth(N, 2) if stage == "solver" else fk.Solver.euler(N, inverse=inverse)

    def run(loop):
        net = Net(CHANGES[change]).eval()
        with net.patches:
            return loop(net.field.eval(), x), net.times

    def by_hand(field, x):
        """Each step by a call of the field, which holds nothing from one to the next."""
        first, past = x, []
        for update, t in zip(solver.updates(), solver.model_times, strict=True):
            with torch.no_grad():
                past.append(field(x, t.expand(len(x)).clone()).to(x.dtype))
            v, b = [past[k] for k in update.which], list(update.factors)
            begin = first if update.from_start else x
            x = fk.euler_step(begin, v[0], b[0]) if stage != "solver" else fk.linear_update(begin, v, b)
        return x

    loops = dict(
        sample=lambda field, x: fk.sample(field, x, N),
        rollout=lambda field, x: fk.rollout(field, x, N).x[-1],
        invert=lambda field, x: fk.invert(field, x, N, round_trip=False).noise,
        solver=lambda field, x: fk.sample(field, x, solver),
    )
    got, times = run(loops[stage])
    expected, expected_times = run(by_hand)
    assert len(times) == len(expected_times)
    assert all(map(torch.equal, times, expected_times))
    if change == "guidance":  # joined with the step, in another order
        torch.testing.assert_close(got, expected)
    else:
        assert torch.equal(got, expected)


@pytest.mark.parametrize("field", [dict(), dict(time_scale=1000.0, reverse_time=True), dict(time_column=True)])
def test_times_are_the_networks_to_write_to(field):
    def net(x, t=None):
        t = x[:, -1] if t is None else t
        x = x[:, :2] * (1 + t[:, None] / 1000)
        t.fill_(torch.nan)
        return x

    solver, x = fk.Solver.euler(3), torch.ones(2, 2)
    before = solver.times.clone()
    first = fk.sample(fk.VelocityField(net, **field), x, solver)
    assert torch.equal(first, fk.sample(fk.VelocityField(net, **field), x, solver))
    assert first.isfinite().all()
    assert torch.equal(solver.times, before)
    assert torch.equal(fk.sample(net, x, 3), fk.sample(net, x, 3))


def test_a_number_of_steps_has_times_of_its_own():
    x = torch.ones(1, 2)
    trajectory = fk.rollout(lambda x, t: -x, x, 3)
    trajectory.times.fill_(torch.nan)
    sampler = fk.fuse(nn.Sequential(nn.Linear(3, 4), nn.SiLU(), nn.Linear(4, 2)).eval(), 3)
    fk.sample(sampler, x, 3), sampler.on(5).times.fill_(torch.nan)
    assert fk.sample(lambda x, t: -x, x, 3).isfinite().all()
    assert fk.sample(lambda x, t: -x, x, 5).isfinite().all()
    with torch.inference_mode():
        fk.sample(lambda x, t: -x, x, 7)
    assert not fk.Solver.of(7).times.is_inference()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_finite_values_are_told_from_sums_that_overflow(dtype, value):
    large = torch.full((3, 4), torch.finfo(dtype).max, dtype=dtype)
    assert fk.sample(lambda x, t: torch.zeros_like(x), large, 2).isfinite().all()
    bad = large.clone()
    bad[1, 2] = value
    with pytest.raises(ValueError, match="noise: expected finite values, got NaN or Inf in sample 1"):
        fk.sample(lambda x, t: torch.zeros_like(x), bad, 2)
    bad[0] = -bad[1]  # infinities of both signs, whose sum is NaN
    with pytest.raises(ValueError, match="noise: expected finite values, got NaN or Inf in sample 0"):
        fk.sample(lambda x, t: torch.zeros_like(x), bad, 2)
