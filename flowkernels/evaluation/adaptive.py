"""An adaptive Runge-Kutta method beside fixed steps: torchdiffeq's dopri5, with its evaluations counted."""

import torch
from torch import Tensor

from flowkernels._checks import FlowError, expect
from flowkernels.sampling.loop import initial_state
from flowkernels.sampling.teacher import Teacher
from flowkernels.velocity.protocol import Velocity

METHOD = "dopri5"
TOLERANCES = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 1e-4, 1e-5)  # relative and absolute
ENDS = ("underflow in dt", "non-finite values in state")  # assertions of torchdiffeq's own


def torchdiffeq():
    """The package, which is imported here alone; ImportError that names it where it is not there."""
    try:
        import torchdiffeq

        return torchdiffeq
    except ImportError as e:
        package = "torchdiffeq for columns=('rk45', ..) (pip install torchdiffeq)"
        expect(False, "columns", package, f"{type(e).__name__}: {e}", ImportError)


def adaptive(
    velocity: Velocity, noise: Tensor, tolerance: float, start: float = 0.0, chunk: int | None = None
) -> tuple[Tensor, int]:
    """The samples of dopri5 (Dormand and Prince's Runge-Kutta 5(4) pair, `RK45` of scipy) with this relative and
    absolute tolerance, and its evaluations of each sample.

    The size of steps is chosen for all samples together, by the root mean square of the errors of all of them, as
    torchdiffeq does; chunks are of evaluations alone, and change nothing.
    """
    teacher, calls = Teacher(velocity, len(noise), chunk=chunk), 0

    def derivative(t: Tensor, x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return teacher.at(x, t.item())

    x = initial_state(noise).contiguous()
    times = torch.tensor([start, 1.0], dtype=torch.float64, device=x.device)
    expected = f"finite velocities that {METHOD} can follow"
    try:
        states = torchdiffeq().odeint(derivative, x, times, rtol=tolerance, atol=tolerance, method=METHOD)
    except AssertionError as e:
        told = next((end for end in ENDS if f"{e}".startswith(end)), None)
        if told is None:  # the velocity's own
            raise
        raise FlowError(f"velocity: expected {expected}, got {told}") from e
    expect(bool(states[-1].isfinite().all()), "velocity", expected, "NaN or Inf", FlowError)
    return states[-1], calls
