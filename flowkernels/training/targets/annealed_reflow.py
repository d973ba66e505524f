"""Rectified flow of pairs whose noise is fresh at first: into a student that does not start from the teacher."""

import math

import torch

from flowkernels.ops.segment_points import segment_points
from flowkernels.training.targets.base import Answer, Call

ANNEALED = 3 / 8  # of the training, after which the pairs are the bank's: theirs was 300,000 of 800,000 iterations


def annealed_reflow(call: Call) -> Answer:
    """On the lines from x0' = sqrt(1 - beta^2) x0 + beta z to x1, z new in each batch: with beta = 1 noise and data of
    no pair, as the flow itself was trained, with beta = 0 "reflow"."""
    beta = max(0.0, 1 - call.progress / ANNEALED)
    if beta == 0:
        return call.secant(call.velocity(*call.chord()))
    x0 = segment_points(call.states, call.places, call.columns)
    x1 = call.states[call.places + 1, call.columns]
    pairs = torch.stack([math.sqrt(1 - beta**2) * x0 + beta * call.normal(), x1])
    columns = torch.arange(len(x0), device=x0.device)
    places = torch.zeros_like(columns)
    u = call.u()
    v = call.velocity(
        segment_points(pairs, places, columns, u), call.start if u is None else call.start + u * call.size
    )
    return Answer(v, pairs, call.step_sizes[:1], places, columns)
