"""Jumps to an interval's end that are to be the same from each of the teacher's states on the way."""

import torch
from torch import Tensor

from flowkernels.ops.segment_points import segment_points
from flowkernels.training.targets.base import Call, Dense, dense

STEP = 0.05  # of the time left, over which a change is taken: over less, the ripples of a network are what is seen


def next_knot(call: Call) -> Dense:
    """To where the student's velocity leads from a state it is to lead from the one before; the last is there."""
    states, places, columns = call.states, call.places, call.columns
    x, there = segment_points(states, places, columns), states[places + 1, columns]
    then = call.times[call.batch.interval + 1]
    v, v_there = call.velocities((x, call.start), (there, then))
    left = _like(call.end - then, x)
    v_there = torch.where(left > 0, v_there, 0)
    jump = torch.addcmul(there, left, v_there)
    del there, v_there  # their memory
    return dense(torch.addcmul(x, _like(call.end - call.start, x), v), jump, spare=True)


def velocity_matching(call: Call) -> Dense:
    """The student's velocity is a mean over the time left, and changes on the teacher's way as such a mean does."""
    x, t = call.chord()
    teachers = call.teachers_velocity(x, t)
    step = STEP * (call.end - t)
    here, there = (x, t), (x + _like(step, x) * teachers, t + step)
    # of bfloat16 a difference would not be left
    others = (here, there) if call.in_autocast(x) else (there,)
    v, *found = call.velocities(here, *others, exact=True)
    before, after = (v.detach(), *found)[-2:]
    change = after - before
    del here, there, others, found, after, before  # their memory
    return dense(v, torch.add(teachers, change, alpha=1 / STEP - 1), spare=True)


def _like(times: Tensor, x: Tensor) -> Tensor:
    """`[B]` in x's dtype, to multiply `[B, *shape]` with."""
    return times.to(x.dtype).view(-1, *[1] * (x.dim() - 1))
