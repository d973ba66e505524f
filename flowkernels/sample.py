"""Sample on a schedule: the Euler loop of the rollout, keeping only the state."""

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from flowkernels._checks import expect_noise, expect_times
from flowkernels.rollout import euler, expect_finite_flow, initial_state, replay
from flowkernels.schedule import Schedule
from flowkernels.velocity_field import warn_if_training


@torch.no_grad()
def sample(
    velocity, noise: Tensor, schedule: Schedule | int | Sequence[float] | Tensor, *, progress: bool = False
) -> Tensor:
    """Samples at t = 1: one Euler step from each knot of the schedule to the next.

    Args:
        velocity: callable `velocity(x, t)`, as for `rollout`; guidance of a `VelocityField` is fused into the step.
        noise: `[n, *shape]`.
        schedule: a Schedule, N for N uniform steps, or N+1 increasing times from 0 to 1.
        progress: show a progress bar.

    Returns:
        `[n, *shape]`, float32 (float64 for float64 noise). On all knots of a rollout's grid this is its last state,
        bit for bit.

    Raises:
        TypeError, ValueError: naming the argument; for NaN or Inf, the sample and the step.
    """
    times = schedule.times if isinstance(schedule, Schedule) else expect_times(schedule, "schedule")
    x0 = initial_state(expect_noise(noise))
    warn_if_training(velocity)
    steps = euler(velocity, x0, times, keep=False)
    for step in tqdm(steps, "sample", len(times) - 1, disable=not progress, leave=False):
        x1 = step[0]
    expect_finite_flow(x1, replay(velocity, x0, times), times)
    return x1
