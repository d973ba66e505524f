"""Paths of constant acceleration."""

import torch
from torch import Tensor, nn

from flowkernels._checks import expect
from flowkernels.ops.segment_points import segment_points
from flowkernels.training.students.acceleration import Acceleration
from flowkernels.training.targets.base import Call, Dense, dense


def acceleration(call: Call) -> Dense:
    """The initial velocity, `initial_speed` times the mean one, of the noise; and on the path that leads from the noise
    to the data with what was answered, its acceleration."""
    u = call.u()
    x0, t0 = segment_points(call.states, call.places, call.columns), call.start
    dx, size = call.states[call.places + 1, call.columns] - x0, _rows(call.size, x0)
    v0 = call.velocity(x0, t0)
    given = v0.detach().to(x0.dtype)
    needed = (given * -size).add_(dx).mul_(2 / size.square())
    tau = torch.zeros_like(call.size) if u is None else u * call.size
    x = x0.addcmul(given, _rows(tau, x0)).addcmul_(needed, _rows(tau.square() / 2, x0))
    del x0  # its memory
    a = call.velocity(x, t0 + tau, v0=given)
    initial = dx.mul_(call.settings["initial_speed"]).div_(size)
    wanted = torch.cat([initial, needed], 1)
    del x, given, dx, initial, needed  # their memory
    return dense(torch.cat([v0, a.to(v0.dtype)], 1), wanted, spare=True)


def _rows(value: Tensor, x: Tensor) -> Tensor:
    """A number for each example, in x's dtype."""
    return value.to(x.dtype).view(-1, *[1] * (x.dim() - 1))


def expect_acceleration(student: nn.Module) -> None:
    expected = "one with an acceleration head, fk.Acceleration(velocity, acceleration), for target='acceleration'"
    expect(isinstance(student, Acceleration), "student", expected, student, TypeError)
