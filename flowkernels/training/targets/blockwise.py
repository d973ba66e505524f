"""A network for each interval."""

import torch
from torch import nn

from flowkernels._checks import describe, expect
from flowkernels.schedule import Schedule
from flowkernels.training.students.blockwise import NEAR, Blockwise
from flowkernels.training.students.modules import unwrapped
from flowkernels.training.targets.base import Answer, Call
from flowkernels.velocity.field import VelocityField


def blockwise(call: Call) -> Answer:
    """The secants of the intervals, each asked of its own network."""
    knots, wanted = Blockwise.of(call.student).knots, call.solver.times.tolist()
    same = len(knots) == len(wanted) and all(abs(a - b) < 1e-9 for a, b in zip(knots, wanted, strict=True))
    expected = f"a Blockwise on the knots {_times(wanted)}"
    expect(same, "student", expected, f"one of {len(knots) - 1} networks, on {_times(knots)}")
    x, t = call.chord()
    last = call.start + call.size - 2 * NEAR  # what is asked at the end of an interval is not the next one's
    return call.secant(call.velocity(x, torch.minimum(t, last)))


def _times(knots) -> list[float]:
    return [round(t, 4) for t in knots]


def expect_blockwise(student: nn.Module) -> None:
    expected = "a Blockwise for target='blockwise' (None: copies of the teacher)"
    expect(Blockwise.of(student) is not None, "student", expected, describe(student), TypeError)
    field = VelocityField.of(unwrapped(student))
    as_it_is = (field.reverse_time, field.time_scale, field.time_offset) == (False, 1, 0)
    expected = "a Blockwise that is given the time as it is (the fields of its networks convert it)"
    expect(as_it_is, "student", expected, f"{field.convention()}")


def in_blocks(student: nn.Module, schedule: Schedule) -> nn.Module:
    """One made of copies of a network, unless it is one."""
    return student if Blockwise.of(student) is not None else Blockwise(student, schedule)
