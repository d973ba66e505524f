"""The teacher's velocity where the student's own steps lead."""

import torch

from flowkernels.ops.segment_points import segment_points
from flowkernels.training.targets.base import Answer, Call, dense

OWN = 0.25  # of the examples begin on the student's own states, the others on the teacher's


def on_policy(call: Call) -> Answer:
    """At a time drawn on the interval, on the student's Euler step from its first knot."""
    states, interval, sample = call.batch[:3]
    own = call.uniform() < OWN
    x = (segment_points(at, interval, sample) for at in (call.rolled_out.states, states))
    x = torch.where(own.view(-1, *[1] * (states.dim() - 2)), *x)
    v, u = call.velocity(x, call.start), call.u()
    moved = call.size.new_zeros(len(v)) if u is None else u * call.size
    there = x + moved.to(x.dtype).view(-1, *[1] * (x.dim() - 1)) * v.detach()
    return dense(v, call.teachers_velocity(there.to(x.dtype), call.start + moved))
