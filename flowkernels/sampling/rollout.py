"""Roll the teacher out on a fine grid: every state and velocity is kept."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from flowkernels._casts import no_grad
from flowkernels._checks import (
    expect,
    expect_bool,
    expect_finite,
    expect_finite_flow,
    expect_noise,
    expect_room,
    is_waited_for,
)
from flowkernels.ops.library import fresh, is_finite, is_plain_state
from flowkernels.sampling.loop import initial_state, shares_solvers, steps
from flowkernels.sampling.teacher import Teacher
from flowkernels.sampling.teacher_solver import KnotStates
from flowkernels.schedule import Schedule
from flowkernels.solver import Solver, expect_solver
from flowkernels.velocity.evaluate import warn_if_training
from flowkernels.velocity.protocol import Velocity, VelocityBase, resolve


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
def rollout(
    velocity: Velocity,
    noise: Tensor,
    grid: int | Sequence[float] | Tensor | Schedule | Solver,
    *,
    progress: bool = False,
) -> Trajectory:
    """Euler steps of `velocity` from `noise` on a fine grid, keeping every state and velocity; or a solver's steps.

    Args:
        velocity: callable `velocity(x, t)` with x `[n, *shape]`, t `[n]`; networks with another convention go through
            `VelocityField`. What a network computes from the time alone is computed once for all steps where it says
            how (`fk.HasTimeEmbedding`). A `FusedSampler` makes all steps in one call, on a GPU without
            looking for NaN and Inf.
        noise: `[n, *shape]`, the state at the grid's first time.
        grid: K for K uniform steps from 0 to 1, or K+1 increasing times in [0, 1], or a Schedule, which has them. Or a
            Solver from noise to data of K steps, of whose states those at its knots are kept, and the velocities there:
            where it makes no evaluation of one at the knot's time, as it may with model times of its own, one more.
            Costs and fits take trajectories that end at 1.
        progress: show a progress bar.

    Returns:
        Trajectory of K steps. Memory: 2K+1 states; a FusedSampler's of a solver, all of its M evaluations beside them.

    Raises:
        TypeError, ValueError: naming the argument; for NaN or Inf, the sample and the step.

    Examples:
        >>> trajectory = fk.rollout(lambda x, t: -x, torch.ones(1, 2), 4)
        >>> trajectory.x.shape, trajectory.v.shape
        (torch.Size([5, 1, 2]), torch.Size([4, 1, 2]))
    """
    known = resolve(velocity)
    expect_bool(progress, "progress")
    solver = expect_solver(grid, "grid", shared=shares_solvers(known))
    if isinstance(grid, Solver):
        expect(not solver.is_inverse, "grid", "a solver from noise to data", solver)
        if not solver.is_euler:
            return _at_knots(known, noise, solver, progress)
    fused = known.fused_run(solver)
    if fused is not None:
        _, x, v = fused.run(noise, states=True, velocities=True)
        return Trajectory(solver.times.clone(), x, v)
    if is_plain_state(noise):  # most: what follows, in less time
        x0 = noise
    else:
        x0 = initial_state(expect_noise(noise, look=False))
        if not is_waited_for(x0):
            expect_finite(noise, "noise")
    warn_if_training(velocity)
    K = solver.steps
    expect_room(x0.nbytes * (2 * K + 1), "grid", "states and velocities", f"{K} steps")
    states = fresh(torch.empty(K + 1, *noise.shape, dtype=x0.dtype, device=x0.device))
    velocities = None
    made = enumerate(steps(known, x0, solver, out=states, keep=True))
    for i, (_, v) in tqdm(made, "rollout", K, leave=False) if progress else made:
        if velocities is None:
            velocities = fresh(torch.empty(K, *v.shape, dtype=v.dtype, device=v.device))
        velocities[i] = v
    if not is_finite(states[-1]):
        expect_finite(noise, "noise")
        expect_finite_flow(states[-1], velocities, solver.times)
    return Trajectory(solver.times.clone(), states, velocities)


def _at_knots(velocity: VelocityBase, noise: Tensor, solver: Solver, progress: bool) -> Trajectory:
    knots = KnotStates.of(solver, "grid")
    teacher, x0, N = Teacher(velocity, len(expect_noise(noise)), solver=solver), initial_state(noise), solver.steps
    warn_if_training(velocity, stacklevel=5)
    expect_room(x0.nbytes * (2 * N + 1), "grid", "states and velocities", f"{N} steps")
    states = fresh(torch.empty(N + 1, *noise.shape, dtype=x0.dtype, device=x0.device))

    def made_for(v: Tensor) -> Tensor:
        return fresh(torch.empty(N, *v.shape, dtype=v.dtype, device=v.device))

    with tqdm(total=knots.evaluations, desc="rollout", disable=not progress, leave=False) as bar:
        velocities = knots.fill(teacher, x0, 0, states, made_for, bar.update)
    return Trajectory(solver.times.clone(), states, velocities)
