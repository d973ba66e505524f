"""Straight lines between the teacher's states: BOSS, rectified flow, distillation."""

from flowkernels.training.targets.base import Answer, Call


def straight_line(call: Call) -> Answer:
    """Neither the targets nor the states at the ends of the intervals are materialised."""
    return call.secant(call.velocity(*call.chord()))
