"""Inversion: a schedule or a solver run from data to noise, for editing, with the error of the way back."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from flowkernels._casts import no_grad
from flowkernels._checks import expect, expect_bool, expect_noise
from flowkernels.fusion.sampler import FusedSampler
from flowkernels.sampling.loop import plan_of
from flowkernels.sampling.sample import run
from flowkernels.schedule import Schedule
from flowkernels.solver import Solver


@dataclass(frozen=True)
class Inversion:
    """The noise of data.

    noise: `[n, *shape]`, float32 (float64 for float64 data).
    error: squared distance of each sample from what the noise is made into again, float64 `[n]`; None without
        `round_trip`.
    evaluations: of the velocity, a sample, those of the way back not counted.
    """

    noise: Tensor
    error: Tensor | None
    evaluations: int


@no_grad
def invert(
    velocity,
    data: Tensor,
    schedule: Schedule | Solver | int | Sequence[float] | Tensor,
    *,
    round_trip: bool = True,
    forward: Schedule | Solver | int | Sequence[float] | Tensor | None = None,
    capture: str | None = None,
    progress: bool = False,
) -> Inversion:
    """The noise that a flow makes the data of: its steps from t = 1 to t = 0.

    Args:
        velocity: as for `sample`, with its guidance and conditioning; a `FusedSampler` or fused head as well.
        data: `[n, *shape]`, the state at t = 1.
        schedule: a Schedule, N for N uniform steps, or N+1 increasing times from 0 to 1: Euler steps on the same knots
            from the last to the first, each with the velocity at the knot that it leaves. Or a Solver that is made
            for inversion (`inverse=True`).
        round_trip: sample from the noise again, and report the error.
        forward: what samples on the way back, as `sample` takes it. None: the schedule itself. A solver of other than
            Euler steps does not know its counterpart, so that it has to be given.
        capture, progress: as for `sample`.

    The first evaluation is at t = 1. Velocities that are not defined there, such as `models.EmpiricalVelocity`, need
    other times: `Solver.euler(schedule, model_times=..., inverse=True)`.

    Returns:
        Inversion.

    Raises:
        TypeError, ValueError: naming the argument; for NaN or Inf, the sample and the step.
        RuntimeError: for a velocity that cannot be captured, what stopped it.

    Source: DDIM inversion (Song, Meng and Ermon, Denoising Diffusion Implicit Models, 2021, section 4.3), of a flow:
    Liu, Gong and Liu, Flow Straight and Fast (rectified flow), 2023.
    """
    round_trip = expect_bool(round_trip, "round_trip")
    if isinstance(schedule, Solver):
        expected = "a solver from data to noise (Solver.adams_bashforth(..., inverse=True), fit_solver(inverse=True))"
        expect(schedule.is_inverse, "schedule", expected, schedule)
    backward = isinstance(forward, Solver) and forward.is_inverse
    expect(not backward, "forward", "a solver from noise to data", forward)
    expect(round_trip or forward is None, "forward", "None without round_trip", forward)
    plan = plan_of(schedule)
    if isinstance(plan, Tensor):
        plan = plan if isinstance(schedule, Solver) else plan.flip(0)
        forward = plan.flip(0) if forward is None else forward
    expected = "a schedule or solver for the way back of this solver, or round_trip=False"
    expect(forward is not None or not round_trip, "forward", expected, "None")
    back = plan_of(forward, "forward") if round_trip else None
    if isinstance(velocity, FusedSampler):  # which would speak of noise
        expect_noise(data, "data")
    noise = run(velocity, data, plan, capture, progress, "data", "invert")
    error = None
    if round_trip:
        again = run(velocity, noise, back, capture, progress, "noise", "round trip")
        error = (again.double() - data.double()).flatten(1).square().sum(1)
    return Inversion(noise, error, len(plan) - 1 if isinstance(plan, Tensor) else plan.evaluations)
