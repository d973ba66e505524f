"""`VelocityField.check`: what is wrong in a convention is named."""

import warnings

import pytest
import torch
from _flows import normal
from torch import nn

import flowkernels as fk

X = normal(5, 4, seed=2)
LIU = dict(time_scale=999 * 0.999, time_offset=0.999)
THOUSANDTHS = dict(reverse_time=True, time_scale=1000, sign=-1)
FREE = dict(conditioning={"y": torch.ones(1, 1)}, unconditional={"y": torch.zeros(1, 1)})


class Net(nn.Module):
    """Sinusoids of the time, as transformers have them."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(20, 32), nn.SiLU(), nn.Linear(32, 4)).to(dtype)

    def forward(self, x, t, y=1.0):
        angles = t[:, None] * torch.exp(-1.15 * torch.arange(8))
        z = torch.cat([x, angles.sin().to(x.dtype), angles.cos().to(x.dtype)], 1)
        return self.layers(z.to(self.layers[0].weight.dtype)) + y


def field(**settings):
    return fk.VelocityField(Net(), **settings)


@pytest.mark.parametrize("settings", [{}, THOUSANDTHS, LIU, dict(FREE, guidance=2.5), dict(dtype=torch.bfloat16)])
def test_the_right_convention_agrees(settings):
    net = Net(settings.get("dtype", torch.float32))
    velocity = fk.VelocityField(net, **settings)
    for reference in (lambda x, t: velocity(x, t), velocity, fk.VelocityField(net, **settings)):
        assert velocity.check(reference, X) <= 1e-5


@pytest.mark.parametrize(
    ("right", "given", "said"),
    [
        (THOUSANDTHS, dict(reverse_time=True, sign=1), r"time_scale=1000 and sign is reversed \(sign=-1\)"),
        (THOUSANDTHS, dict(reverse_time=True, time_scale=999), r"time_scale=1000"),
        (THOUSANDTHS, dict(time_scale=1000, sign=-1), r"reverse_time=True and sign=-1"),
        (THOUSANDTHS, {}, r"reverse_time=True, time_scale=1000 and sign is reversed \(sign=-1\)"),
        ({}, THOUSANDTHS, r"reverse_time=False, time_scale=1 and sign is reversed \(sign=1\)"),
        ({}, dict(time_offset=0.5), r"time_offset=0"),
        (LIU, dict(time_scale=999), r"time_scale=998.001 and time_offset=0.999"),
        (dict(time_scale=1000, time_offset=0.25), dict(time_scale=1000), r"time_offset=0.25"),
        (dict(FREE, guidance=3.0, sign=-1), dict(FREE, guidance=3.0), r"sign is reversed \(sign=-1\)"),
        (
            dict(FREE, guidance=lambda c, u, t: u + t[:, None] * (c - u), time_scale=1000),
            dict(FREE, guidance=lambda c, u, t: u + t[:, None] * (c - u)),
            "time_scale=1000",
        ),
    ],
)
def test_what_is_wrong_is_named(right, given, said):
    message = rf"^velocity: expected the reference's .*; velocity agrees with the reference if {said}$"
    with pytest.raises(ValueError, match=message):
        field(**given).check(field(**right), X)


@pytest.mark.parametrize("raised", [ValueError, IndexError])
def test_a_network_may_refuse_other_times(raised):
    """As those on a path of diffusion do, and embeddings of steps: the conventions that it takes are compared."""
    net = Net()

    def strict(x, t):
        if (t > 1).any():
            raise raised("t")
        return net(x, t)

    message = r"velocity agrees with the reference if sign is reversed \(sign=1\)$"
    with pytest.raises(ValueError, match=message):
        fk.VelocityField(strict, sign=-1).check(fk.VelocityField(strict), X)
    with pytest.raises(raised, match=r"^t$"):
        fk.VelocityField(strict, time_scale=1000).check(fk.VelocityField(net), X)


def test_what_is_no_convention_is_not_taken_for_one():
    other = field(conditioning={"y": torch.full((1, 1), 3.0)})
    with pytest.raises(ValueError, match=r"agrees with no other sign.*conditioning, guidance, weights, dtype or x may"):
        field().check(other, X)
    with pytest.raises(ValueError, match=r"^reference: expected x's shape \[5, 4\]"):
        field().check(lambda x, t: x[:, :1], X)
    with pytest.raises(ValueError, match=r"^reference: expected velocities that are not all 0"):
        field().check(lambda x, t: x * 0, X)
    with pytest.raises(ValueError, match=r"^x: expected a state"):
        field().check(lambda x, t: x)
    with pytest.warns(UserWarning, match="hardly depends on the time"):
        fk.VelocityField(lambda x, t: x).check(lambda x, t: x, X)


def test_a_reference_with_noise_of_its_own():
    class Reference(fk.VelocityBase):
        def __call__(self, x, t):
            return Net()(x, t)

        def noise(self, n):
            return normal(n, 4)

    y = torch.ones(7)[:, None]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert field(conditioning={"y": y}).check(Reference()) <= 1e-5
