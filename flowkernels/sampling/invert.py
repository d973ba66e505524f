"""Inversion: a schedule or a solver run from data to noise, for editing, with the error of the way back."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from flowkernels._casts import no_grad
from flowkernels._checks import expect, expect_bool, expect_noise
from flowkernels.sampling.loop import shares_solvers
from flowkernels.sampling.sample import run
from flowkernels.schedule import Schedule
from flowkernels.solver import Solver, expect_inverse, expect_solver
from flowkernels.velocity.protocol import Velocity, resolve


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
    velocity: Velocity,
    data: Tensor,
    schedule: Schedule | Solver | int | Sequence[float] | Tensor,
    *,
    round_trip: bool = True,
    resample_with: Schedule | Solver | int | Sequence[float] | Tensor | None = None,
    capture: str | None = None,
    check: bool = True,
    progress: bool = False,
) -> Inversion:
    """The noise that a flow makes the data of: its steps from t = 1 to t = 0, or from the last time of a schedule to
    its first, with the states there for data and noise.

    Args:
        velocity: as for `sample`, with its guidance and conditioning; a `FusedSampler` or fused head as well.
        data: `[n, *shape]`, the state at the schedule's last time.
        schedule: a Schedule, N for N uniform steps, or N+1 times in [0, 1], increasing as for `sample` or falling as
            they are run: Euler steps on these knots from the last to the first, each with the velocity at the knot that
            it leaves. Or a Solver that is made for inversion (`inverse=True`).
        round_trip: sample from the noise again, and report the error.
        resample_with: what samples on the way back, as `sample` takes it, from where the inversion ends to where it
            begins. None: the schedule itself. A solver of other than Euler steps does not know its counterpart, so that
            it has to be given.
        capture: as for `sample`.
        check: as for `sample`.
        progress: as for `sample`.

    The first evaluation is at the last time. Velocities that are not defined at t = 1, such as
    `models.closed_form.EmpiricalVelocity`, need other times: `Solver.euler(schedule, model_times=..., inverse=True)`.

    Returns:
        Inversion.

    Raises:
        TypeError, ValueError: naming the argument; for NaN or Inf, the sample and the step.
        RuntimeError: for a velocity that cannot be captured, what stopped it.

    Source: DDIM inversion (Song, Meng and Ermon, Denoising Diffusion Implicit Models, 2021, section 4.3), of a flow:
    Liu, Gong and Liu, Flow Straight and Fast (rectified flow), 2023.

    Examples:
        >>> inversion = fk.invert(lambda x, t: -x, torch.ones(1, 2), 100)
        >>> torch.allclose(inversion.noise, torch.full((1, 2), torch.e), rtol=0.01)
        True
    """
    round_trip = expect_bool(round_trip, "round_trip")
    known = resolve(velocity)
    shared = shares_solvers(known)
    solver = expect_inverse(schedule, shared=shared)
    backward = isinstance(resample_with, Solver) and resample_with.is_inverse
    expect(not backward, "resample_with", "a solver from noise to data", resample_with)
    expect(round_trip or resample_with is None, "resample_with", "None without round_trip", resample_with)
    if round_trip and resample_with is None and (not isinstance(schedule, Solver) or solver.is_euler):
        resample_with = schedule if type(schedule) is int else solver.times.flip(0)
    expected = "a schedule or solver for the way back of this solver, or round_trip=False"
    expect(resample_with is not None or not round_trip, "resample_with", expected, "None")
    back = expect_solver(resample_with, "resample_with", shared=shared) if round_trip else None
    if back is not None:
        (begin, *_, end), (start, *_, stop) = solver.times.tolist(), back.times.tolist()
        meets = max(abs(start - end), abs(stop - begin)) <= 1e-9
        expected = f"times from {end:.6g} to {begin:.6g}, where the inversion ends and begins"
        expect(meets, "resample_with", expected, back)
    if known.fused_run(solver) is not None:  # which would speak of noise
        expect_noise(data, "data", look=expect_bool(check, "check"))
    noise = run(known, data, solver, capture, check, progress, "data", "invert")
    error = None
    if back is not None:
        again = run(known, noise, back, capture, check, progress, "noise", "round trip")
        error = (again.double() - data.double()).flatten(1).square().sum(1)
    return Inversion(noise, error, solver.evaluations)
