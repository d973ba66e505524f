"""The steps of a multistep solver, each by itself, on the student's own states and the teacher's."""

from flowkernels.training.targets.base import Answer, Call
from flowkernels.training.targets.own_states import own_or_teachers


def on_a_solver(call: Call) -> Answer:
    """The velocity that lands the solver on the teacher's next knot, after the student's own velocities so far."""
    interval, columns = call.batch.interval, call.batch.columns
    v = call.velocity(own_or_teachers(call), call.start)
    return Answer(v, call.rolled_out.pairs, call.rolled_out.step_sizes, 2 * interval, columns)
