"""Roll the teacher out on a fine grid; the steps of a schedule and of a solver."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from flowkernels._casts import no_grad
from flowkernels._checks import expect, expect_bool, expect_finite_flow, expect_noise, expect_room, expect_times
from flowkernels._guidance import guided
from flowkernels.fusion.sampler import FusedSampler
from flowkernels.ops.library import fresh
from flowkernels.sampling.loop import euler, initial_state
from flowkernels.solver import Solver
from flowkernels.velocity.evaluate import expect_velocity, warn_if_training


@dataclass(frozen=True)
class Trajectory:
    """A rolled-out flow: knots, states and velocities.

    times: float64 `[K+1]`. x: states `[K+1, n, *shape]`, float32 (float64 for float64 noise).
    v: velocities `[K, n, *shape]` in the dtype of the network's output; float32 when guided.
    """

    times: Tensor
    x: Tensor
    v: Tensor


@no_grad
def rollout(velocity, noise: Tensor, grid: int | Sequence[float] | Tensor, *, progress: bool = False) -> Trajectory:
    """Euler steps of `velocity` from `noise` on a fine grid, keeping every state and velocity.

    Args:
        velocity: callable `velocity(x, t)` with x `[n, *shape]`, t `[n]`; networks with another convention go through
            `VelocityField`. What a network computes from the time alone is computed once for all steps where it says
            how (`velocity_field.HasTimeEmbedding`). A `FusedSampler` makes all steps in one call, on a GPU without
            looking for NaN and Inf.
        noise: `[n, *shape]`, the state at t = 0.
        grid: K for K uniform steps, or K+1 increasing times from 0 to 1.
        progress: show a progress bar.

    Returns:
        Trajectory of K steps. Memory: 2K+1 states.

    Raises:
        TypeError, ValueError: naming the argument; for NaN or Inf, the sample and the step.
    """
    way_out = "a fine grid, on which the steps are Euler's (fk.sample runs a solver)"
    expect(not isinstance(grid, Solver), "grid", way_out, grid, TypeError)
    expect_velocity(velocity), expect_bool(progress, "progress")
    times = expect_times(grid, "grid")
    if isinstance(velocity, FusedSampler):
        _, x, v = velocity.on(times).run(noise, states=True, velocities=True)
        return Trajectory(times, x, v)
    x0 = initial_state(expect_noise(noise))
    warn_if_training(velocity)
    K = len(times) - 1
    expect_room(x0.nbytes * (2 * K + 1), "grid", "states and velocities", f"{K} steps")
    states = fresh(torch.empty(K + 1, *noise.shape, dtype=x0.dtype, device=x0.device))
    velocities = None
    steps = enumerate(euler(velocity, x0, times, out=states))
    for i, (_, v, v_uncond, w) in tqdm(steps, "rollout", K, disable=not progress, leave=False):
        v = v if v_uncond is None else guided(v, v_uncond, w, x0.dtype)
        if velocities is None:
            velocities = fresh(torch.empty(K, *v.shape, dtype=v.dtype, device=v.device))
        velocities[i] = v
    expect_finite_flow(states[-1], velocities, times)
    return Trajectory(times, states, velocities)
