"""The steps of a multistep solver, on the student's own states and the teacher's."""

import torch

from flowkernels.ops.segment_points import segment_points
from flowkernels.training.targets.base import Answer, Call

OWN = 0.25  # of the examples are on the student's own states, the others on the teacher's


def on_a_solver(call: Call) -> Answer:
    """The velocity that lands the solver on the teacher's next knot, after the student's own velocities so far."""
    (states, interval, sample), rolled = call.batch[:3], call.rolled_out
    own = call.uniform() < OWN
    x = segment_points(states, interval, sample)
    torch.where(own.view(-1, *[1] * (x.dim() - 1)), segment_points(rolled.states, interval, sample), x, out=x)
    return Answer(call.velocity(x, call.start), rolled.pairs, rolled.sizes, 2 * interval, sample)
