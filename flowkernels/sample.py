"""Sample on a schedule: the Euler loop of the rollout, keeping only the state."""

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from flowkernels import capture as captured
from flowkernels._checks import expect_finite_flow, expect_noise, expect_times
from flowkernels.fuse import FusedSampler
from flowkernels.rollout import euler, initial_state, replay
from flowkernels.schedule import Schedule
from flowkernels.velocity_field import warn_if_training


@torch.no_grad()
def sample(
    velocity,
    noise: Tensor,
    schedule: Schedule | int | Sequence[float] | Tensor,
    *,
    capture: str | None = None,
    progress: bool = False,
) -> Tensor:
    """Samples at t = 1: one Euler step from each knot of the schedule to the next.

    Args:
        velocity: callable `velocity(x, t)`, as for `rollout`; guidance of a `VelocityField` is fused into the step. A
            `FusedSampler` makes all steps in one call.
        noise: `[n, *shape]`.
        schedule: a Schedule, N for N uniform steps, or N+1 increasing times from 0 to 1.
        capture: how the N steps run.
            None: a Python loop.
            "graph": one CUDA graph of the whole loop, on a GPU. It is recorded at the first call and replayed after;
            recorded anew when times, shape, dtype or device change, and when tensors of the velocity (parameters,
            buffers, conditioning) move to other memory or its settings change. Values written into that memory are
            picked up.
            "compile": the unrolled loop through `torch.compile(fullgraph=True)`. Every number of steps, schedule,
            shape and dtype compiles anew, which takes seconds to minutes and grows with N.
            "auto": "graph" on a GPU; None on a CPU, where there is nothing to record and a compilation has to pay off.
            The last 16 recorded loops are kept, none longer than its velocity. A velocity that looks at values on
            the host can be neither recorded nor compiled. What a graph does not see: changes inside objects that are
            no tensors, modules, functions or short containers.
        progress: show a progress bar; a captured loop, which is one call, has none.

    Returns:
        `[n, *shape]`, float32 (float64 for float64 noise). On all knots of a rollout's grid this is its last state,
        bit for bit; captured, to rounding.

    Raises:
        TypeError, ValueError: naming the argument; for NaN or Inf, the sample and the step.
        RuntimeError: for a velocity that cannot be captured, what stopped it.
    """
    times = schedule.times if isinstance(schedule, Schedule) else expect_times(schedule, "schedule")
    if isinstance(velocity, FusedSampler):
        return velocity.on(times)(noise)
    x0 = initial_state(expect_noise(noise))
    mode = captured.choose(capture, x0.device)
    warn_if_training(velocity)
    if mode is not None:
        x1 = captured.run(mode, velocity, x0, times)
    else:
        steps = euler(velocity, x0, times, keep=False)
        for step in tqdm(steps, "sample", len(times) - 1, disable=not progress, leave=False):
            x1 = step[0]
    expect_finite_flow(x1, replay(velocity, x0, times), times)
    return x1
