"""Roll the teacher out on a fine grid."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from flowkernels._checks import expect_finite_flow, expect_noise, expect_times
from flowkernels.fuse import FusedSampler
from flowkernels.fuse_head import FusedHead
from flowkernels.ops._library import fresh
from flowkernels.ops.euler_step import stepper
from flowkernels.ops.euler_step.reference import guided
from flowkernels.velocity_field import evaluate, has_time_embedding, time_embeddings, times_of, warn_if_training


@dataclass(frozen=True)
class Trajectory:
    """A rolled-out flow: knots, states and velocities.

    times: float64 `[K+1]`. x: states `[K+1, n, *shape]`, float32 (float64 for float64 noise).
    v: velocities `[K, n, *shape]` in the dtype of the network's output; float32 when guided.
    """

    times: Tensor
    x: Tensor
    v: Tensor


def initial_state(noise: Tensor) -> Tensor:
    """The state in float32, whatever the model computes in; float64 noise stays float64."""
    return noise if noise.dtype == torch.float64 else noise.float()


def step_times(times: Tensor, x: Tensor) -> Tensor:
    """The times of all steps `[N]` where the state x is, in the dtype that networks get them in; without a sync."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return times[:-1].to(x.device, dtype, non_blocking=True)


def euler(
    velocity, x: Tensor, times: Tensor, out: Tensor | None = None, keep: bool = True
) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None, float]]:
    """Euler steps on `times`; yields (new state, v, v_uncond, guidance) for each step.

    The state is stepped in place in a buffer of its own, or into the rows of `out` `[K+1, n, *shape]`. Without `keep`
    v may be None: nobody wants it.
    """
    if isinstance(velocity, FusedHead):
        yield from velocity.euler_steps(x, times.tolist(), out, keep)
        return
    knots, t = times.tolist(), step_times(times, x)
    embeddings = time_embeddings(velocity, t) if has_time_embedding(velocity) else [None] * len(t)
    x = x.clone(memory_format=torch.contiguous_format) if out is None else out[0].copy_(x)
    step, begin, end = stepper(x), x.data_ptr(), x.data_ptr() + x.nbytes
    for i, (now, embedding) in enumerate(zip(times_of(t, len(x)), embeddings, strict=True)):
        v, v_uncond, w = evaluate(velocity, x, now, embedding)
        if out is None:  # a velocity that is a view of the state would change with it
            v = v.clone() if begin <= v.data_ptr() < end else v
            if v_uncond is not None and begin <= v_uncond.data_ptr() < end:
                v_uncond = v_uncond.clone()
        x = step(x, v, knots[i + 1] - knots[i], v_uncond, w, x if out is None else out[i + 1])
        yield x, v, v_uncond, w


def replay(velocity, x: Tensor, times: Tensor) -> Iterator[Tensor]:
    """The velocities of the Euler steps from x on `times`, guidance applied."""
    for _, v, v_uncond, w in euler(velocity, x, times):
        yield guided(v, v_uncond, w, x.dtype)


@torch.no_grad()
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
    times = expect_times(grid, "grid")
    if isinstance(velocity, FusedSampler):
        _, x, v = velocity.on(times).run(noise, states=True, velocities=True)
        return Trajectory(times, x, v)
    x0 = initial_state(expect_noise(noise))
    warn_if_training(velocity)
    K = len(times) - 1
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
