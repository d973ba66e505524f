"""The average velocity from any time to any later one: of a student of two times, for any number of steps."""

import torch
from torch import Tensor, nn

from flowkernels._casts import no_grad
from flowkernels._checks import expect
from flowkernels.ops.straighten_loss.reference import secants
from flowkernels.schedule import Schedule
from flowkernels.training.students.average_velocity import AverageVelocity
from flowkernels.training.students.student import student_derivative
from flowkernels.training.targets.base import Call, Dense, dense


def average_velocity(call: Call) -> Dense:
    """On the chords of the examples' intervals at t, to s uniform between t and the last knot; of some s = t."""
    x, t = call.chord()
    s = t + call.uniform() * (call.times[-1] - t)
    begin, _, of = call.part
    share = call.settings["instantaneous"] * of
    first = int(
        share + torch.rand((), generator=call.generator, dtype=torch.float32, device="cpu").item()
    )  # that many of the batch, on average
    first = min(max(first - begin, 0), len(t))
    between = call.uniform()
    s = torch.cat([t[:first], s[first:]])
    now, later = call.examples(slice(0, first)), call.examples(slice(first, None))
    targets = [_velocity(now, x[:first], t[:first])] if first else []
    if first < len(t):
        consistent = CONSISTENT[call.settings["consistency"]]
        targets.append(consistent(later, x[first:], t[first:], s[first:], between[first:]))
    return dense(call.velocity(x, t, s=s), torch.cat(targets), spare=True)


def _velocity(call: Call, x: Tensor, t: Tensor) -> Tensor:
    """The teacher's, where it is there; else that along the chord, whose mean over the chords through x is a flow's."""
    if call.teacher is not None:
        return call.teachers_velocity(x, t).to(x.dtype)
    return secants(call.states, call.step_sizes, call.places, call.columns)


@no_grad
def _split(call: Call, x: Tensor, t: Tensor, s: Tensor, part: Tensor) -> Tensor:
    """The student's own displacements by way of a time between, which add up (SplitMeanFlow)."""
    r = torch.lerp(t, s, part.to(t.dtype))
    first = call.velocity(x, t, s=r)
    second = call.velocity(x + _rows(r - t, x) * first, r, s=s)
    return _rows(part, x) * first + _rows(1 - part, x) * second


def _derivative(call: Call, x: Tensor, t: Tensor, s: Tensor, part: Tensor) -> Tensor:
    """From the derivative of (s - t) u in t along the flow, which is -v (MeanFlow)."""
    v = _velocity(call, x, t)
    whose = call.batch.sample, call.samples, call.batch.conditioning
    return v + _rows(s - t, x) * student_derivative(call.student, x, t, s, v, *whose, call.autocast)


CONSISTENT = {"split": _split, "derivative": _derivative}
CONSISTENCIES = tuple(CONSISTENT)


def _rows(factor: Tensor, x: Tensor) -> Tensor:
    """A number for each example, to multiply with x `[B, *shape]`."""
    return factor.to(x.dtype).view(-1, *[1] * (x.dim() - 1))


def expect_two_times(student: nn.Module) -> None:
    expected = "two times, an AverageVelocity (AverageVelocity.from_velocity(teacher), or around a network of your own)"
    expect(isinstance(student, AverageVelocity), "student", expected, student, TypeError)


def of_two_times(teacher: nn.Module, schedule: Schedule) -> nn.Module:
    return AverageVelocity.of_network(teacher)
