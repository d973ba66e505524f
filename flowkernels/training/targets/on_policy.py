"""The teacher's velocity where the student's own steps lead."""

from flowkernels.training.targets.base import Call, Dense, dense
from flowkernels.training.targets.own_states import own_or_teachers


def on_policy(call: Call) -> Dense:
    """At a time drawn on the interval, on the student's Euler step from its first knot."""
    x = own_or_teachers(call)
    v, u = call.velocity(x, call.start), call.u()
    moved = call.size.new_zeros(len(v)) if u is None else u * call.size
    there = x + moved.to(x.dtype).view(-1, *[1] * (x.dim() - 1)) * v.detach()
    return dense(v, call.teachers_velocity(there.to(x.dtype), call.start + moved))
