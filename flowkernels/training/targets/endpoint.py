"""Where the steps of a solver end, back-propagated through all of them."""

import torch
from torch import Tensor

from flowkernels.ops.linear_update import linear_update
from flowkernels.ops.segment_points import segment_points
from flowkernels.training.targets.base import Answer, Call


def endpoint(call: Call) -> Answer:
    """The student's mean velocity along the solver's steps from the noise, with the graph of all its evaluations, is to
    be the secant: the solver is to end where the teacher does."""
    start = segment_points(call.states, call.places, call.columns)
    end = ends(call, start)
    size = call.size.to(start.dtype).view(-1, *[1] * (start.dim() - 1))
    return call.secant((end - start) / size)


def ends(call: Call, start: Tensor) -> Tensor:
    """Of the solver, from the states `[B, *shape]` at its first knot: as many evaluations of each as it has."""
    x, v, solver = start, [], call.solver
    for t, update in zip(solver.model_times.tolist(), solver.updates(), strict=True):
        now = torch.full((len(x),), t, dtype=torch.float64, device=x.device)
        v.append(call.velocity(x, now))
        begin = start if update.from_start else x
        x = linear_update(begin, [v[i] for i in update.which], list(update.factors), scale=update.scale)
    return x
