"""The student's own samples on a solver, which targets are on beside the teacher's states."""

import torch
from torch import Tensor, nn

from flowkernels.ops.linear_update import linear_update
from flowkernels.sampling.teacher import Teacher
from flowkernels.solver import Solver
from flowkernels.training.targets.base import RolledOut


def sizes_of(solver: Solver, device: torch.device) -> Tensor:
    """What its steps multiply their last velocities by, b[k,k], at the places of `RolledOut.pairs`."""
    return solver.coefficients.diagonal().repeat_interleave(2)[:-1].to(device)


def rolled_out(student: nn.Module, solver: Solver, knots: Tensor, of: Tensor, chunk: int | None) -> RolledOut:
    """From the teacher's states at the solver's knots `[N+1, n, *shape]`: N - 1 evaluations a sample."""
    N, n, at = solver.steps, knots.shape[1], solver.model_times.tolist()
    b, teacher = solver.coefficients.tolist(), Teacher(student, n, chunk=chunk)
    own, pairs = torch.empty_like(knots), knots.new_empty(2 * N, *knots.shape[1:])
    own[N], pairs[1::2] = knots[N], knots[1:]
    for rows in teacher.chunks(n):
        start, v = knots[0, rows], []
        for k in range(N):
            own[k, rows] = x = linear_update(start, v, b[k - 1][:k]) if k else start
            pairs[2 * k, rows] = linear_update(start, v, b[k][:k]) if k else start
            if k < N - 1:
                v.append(teacher.at(x, at[k], rows.start))
    return RolledOut(own, pairs, of, sizes_of(solver, knots.device))
