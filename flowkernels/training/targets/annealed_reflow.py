"""Rectified flow of pairs whose noise is fresh at first: into a student that does not start from the teacher."""

import math

from flowkernels.ops.segment_points import segment_points
from flowkernels.training.targets.base import Answer, Call, Dense, dense

ANNEALED = 3 / 8  # of the training, after which the pairs are the bank's: theirs was 300,000 of 800,000 iterations


def annealed_reflow(call: Call) -> Answer | Dense:
    """On the lines from x0' = sqrt(1 - beta^2) x0 + beta z to x1, z new in each batch: with beta = 1 noise and data of
    no pair, as the flow itself was trained, with beta = 0 "reflow"."""
    beta = max(0.0, 1 - call.progress / ANNEALED)
    if beta == 0:
        return call.secant(call.velocity(*call.chord()))
    x = segment_points(call.states, call.places, call.columns).mul_(math.sqrt(1 - beta**2))
    x.add_(call.normal(), alpha=beta)
    secant = call.states[call.places + 1, call.columns].sub_(x)
    u, t = call.u(), call.start
    if u is not None:
        x.addcmul_(secant, u.to(x.dtype).view(-1, *[1] * (x.dim() - 1)))
        t = t + u * call.size
    v = call.velocity(x, t)
    return dense(v, secant.div_(call.step_sizes[0]), spare=True)
