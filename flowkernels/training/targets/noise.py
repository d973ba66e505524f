"""Noise, of pairs that match."""

import torch
from torch import Tensor, nn

from flowkernels._checks import expect
from flowkernels.ops.segment_points import segment_points
from flowkernels.training.students.noise_prediction import NoisePrediction
from flowkernels.training.targets.base import Call, Dense, dense

COMPARED = ("data", "noise")


def noise(call: Call) -> Dense:
    """On the student's path through the state at the first knot to the data, the noise at its other end: as it is, or
    by the data that follow from it."""
    path, u = call.student.coefficients, call.u()
    begins = call.solver.times[0].item()
    straight = call.student.path == "straight"
    expected = "one that begins after 0, for target='noise' on a straight path: there noise tells nothing of the data"
    expect(not (straight and begins == 0), "schedule", expected, f"one at {begins:.6g}")
    x0, x1 = segment_points(call.states, call.places, call.columns), call.states[call.places + 1, call.columns]
    alpha, sigma = (_rows(part, x0) for part in path(call.start))
    e = x0.addcmul_(x1, alpha, value=-1).div_(sigma)
    t = call.start if u is None else call.start + u * call.size
    alpha, sigma = (_rows(part, x0) for part in path(t))
    x = torch.mul(x1, alpha).addcmul_(e, sigma)
    if call.settings["compared"] == "noise":
        del x0, x1  # their memory
        return dense(call.velocity(x, t, noise=True), e, spare=True)
    del x0, e  # their memory
    found = call.velocity(x, t, noise=True) * -sigma
    found = found + x
    return dense(found / alpha, x1, spare=True)


def _rows(value: Tensor, x: Tensor) -> Tensor:
    """A number for each example, in x's dtype."""
    return value.to(x.device, x.dtype).view(-1, *[1] * (x.dim() - 1))


def expect_noise_prediction(student: nn.Module) -> None:
    expected = "one that predicts noise, fk.NoisePrediction(net), for target='noise'"
    expect(isinstance(student, NoisePrediction), "student", expected, student, TypeError)
