"""The student's own states on a schedule's steps, which targets are on beside the teacher's."""

import torch
from torch import Tensor, nn

from flowkernels.ops.euler_step import euler_step
from flowkernels.sampling.teacher import Teacher


def own_states(student: nn.Module, times: list[float], states: Tensor, chunk: int | None) -> Tensor:
    """From the teacher's states at the knots `[N+1, n, *shape]` the student's by Euler's steps, the last the teacher's:
    N - 1 evaluations a sample."""
    n, own = states.shape[1], torch.empty_like(states)
    own[0], own[-1] = states[0], states[-1]
    teacher = Teacher(student, n, chunk=chunk)
    for rows in teacher.chunks(n):
        for k in range(len(times) - 2):
            v = teacher.at(own[k, rows], times[k], rows.start)
            own[k + 1, rows] = euler_step(own[k, rows], v, times[k + 1] - times[k])
    return own
