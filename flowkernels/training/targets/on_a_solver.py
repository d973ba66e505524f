"""The steps of a multistep solver, on the student's own states and the teacher's."""

import torch

from flowkernels.ops.segment_points import segment_points
from flowkernels.training.targets.base import Answer, Call

OWN = 0.25  # of the examples are on the student's own states, the others on the teacher's


def on_a_solver(call: Call) -> Answer:
    """The velocity that lands the solver on the teacher's next knot, after the student's own velocities so far."""
    states, interval, sample = call.batch[:3]
    own = call.uniform() < OWN
    x = (segment_points(at, interval, sample) for at in (call.rolled_out.states, states))
    x = torch.where(own.view(-1, *[1] * (states.dim() - 2)), *x)
    sizes = call.solver.coefficients.diagonal().repeat_interleave(2)[:-1].to(states.device)
    return Answer(call.velocity(x, call.start), call.rolled_out.pairs, sizes, 2 * interval, sample)
