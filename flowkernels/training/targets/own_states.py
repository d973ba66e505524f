"""The student's own states on the steps of a solver, which targets are on beside the teacher's."""

import torch
from torch import Tensor, nn

from flowkernels.ops.linear_update import linear_update
from flowkernels.ops.segment_points import segment_points
from flowkernels.sampling.teacher import Teacher
from flowkernels.solver import Solver
from flowkernels.training.targets.base import Call, RolledOut

OWN = 0.25  # of the examples are on the student's own states, the others on the teacher's


def own_or_teachers(call: Call) -> Tensor:
    """The states `[B, *shape]` at the examples' knots."""
    states, interval, columns = call.batch.states, call.batch.interval, call.batch.columns
    own = call.uniform() < OWN
    x, there = (segment_points(at, interval, columns) for at in (call.rolled_out.states, states))
    return torch.where(own.view(-1, *[1] * (x.dim() - 1)), x, there, out=x)


def own_states(student: nn.Module, solver: Solver, states: Tensor, chunk: int | None, pairs: bool) -> RolledOut:
    """From the teacher's states at the knots of a solver of one evaluation a step `[N+1, n, *shape]`: N - 1 evaluations
    a sample. pairs: those of the steps are wanted too."""
    N, n, at, b = solver.steps, states.shape[1], solver.model_times.tolist(), solver.coefficients.tolist()
    knots, own, a = states.detach(), torch.empty_like(states), solver.start_coefficients.tolist()
    own[0], own[N] = knots[0], knots[N]
    ends = knots.new_empty(2 * N, *knots.shape[1:]) if pairs else None
    if pairs:
        ends[1::2] = knots[1:]
    teacher = Teacher(student, n, chunk=chunk)
    for rows in teacher.chunks(n):
        start, v = knots[0, rows], []
        for k in range(N):
            if pairs:
                ends[2 * k, rows] = linear_update(start, v, b[k][:k], scale=a[k]) if k else a[0] * start
            if k < N - 1:
                v.append(teacher.at(own[k, rows], at[k], rows.start))
                own[k + 1, rows] = linear_update(start, v, b[k][: k + 1], scale=a[k])
    return RolledOut(own, states, ends, _sizes(solver, states))


def unmoved(states: Tensor, solver: Solver) -> RolledOut:
    """What would be rolled out of states that do not move, to try a target on."""
    return RolledOut(states, states, states[:1].expand(2 * solver.steps, *states.shape[1:]), _sizes(solver, states))


def _sizes(solver: Solver, states: Tensor) -> Tensor:
    """b[k,k], at the places 2k of the pairs."""
    return solver.coefficients.diagonal().repeat_interleave(2)[:-1].to(states.device)
