"""What a stock scheduler of diffusers is to be handed so that it runs a schedule."""

import copy
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from flowkernels._checks import describe, expect, expect_real
from flowkernels.schedule import Schedule
from flowkernels.solver import Solver, expect_solver

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

WITHIN = 1e-6  # of a sigma: what float32 leaves of it after the shift and back
BY_NUMBER = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


def sigmas_for(
    schedule: Schedule | Solver | int | Sequence[float] | torch.Tensor,
    scheduler: "SchedulerMixin",
    *,
    mu: float | None = None,
) -> list[float]:
    """The sigmas that a stock FlowMatchEulerDiscreteScheduler is to be handed so that its steps are the schedule's:

        pipe(prompt, sigmas=sigmas_for(cal[4], pipe.scheduler))

    It shifts what it is handed and appends the last 0. A schedule's own `sigmas` would run as another schedule in any
    pipeline that shifts.

    Args:
        schedule: what `fk.sample` takes, of Euler steps; other solvers need `solver_scheduler`.
        scheduler: the pipeline's. Its shift is undone, static (`shift`) or dynamic, exponential or linear; where it
            inverts sigmas (`invert_sigmas`) it does so to these too.
        mu: of a scheduler with `use_dynamic_shifting` what the pipeline gives it, which comes from the size of the
            image: most pipelines compute it as `calculate_shift(image_seq_len, ...)` in their own module.

    Returns:
        N numbers, each a float32 exactly, falling, without the last 0. The scheduler runs them within 1e-6 of the
        schedule's own, which has been tried on a copy of it.

    Raises:
        TypeError, ValueError: naming the argument, where this scheduler cannot run the schedule: it takes no sigmas or
            makes other steps, chooses sigmas by their number (Karras, exponential, beta), ends at another sigma
            (`shift_terminal`), or two of them are the same after rounding.

    Examples:
        >>> from diffusers import FlowMatchEulerDiscreteScheduler
        >>> sd3 = FlowMatchEulerDiscreteScheduler(shift=3.0)
        >>> sd3.set_timesteps(sigmas=sigmas_for([0, 0.1, 0.3, 0.6, 1], sd3))
        >>> sd3.sigmas
        tensor([1.0000, 0.9000, 0.7000, 0.4000, 0.0000])
    """
    solver = expect_solver(schedule, "schedule")
    euler = solver.is_euler and solver.reaches_data
    expect(euler, "schedule", "Euler steps to t = 1; solver_scheduler takes others", solver)
    _expect_euler(scheduler)
    config = scheduler.config
    dynamic = config.get("use_dynamic_shifting", False)
    shift = shift_of(config, mu, scheduler.shift)
    wanted = 1 - solver.times[:-1]
    end = config.get("shift_terminal")
    ends = not end or abs(float(wanted[-1]) - end) < WITHIN
    expect(ends, "scheduler", f"one that may end at sigma {float(wanted[-1]):g}", f"shift_terminal={end}")
    sigmas = before_shift(wanted, shift).numpy().astype(np.float32)
    expect(bool((np.diff(sigmas) < 0).all()), "schedule", "sigmas that are apart in float32, before the shift", solver)
    tried = copy.deepcopy(scheduler)
    tried.set_timesteps(sigmas=sigmas.tolist(), **({"mu": mu} if dynamic else {}))
    known = solver.times if config.get("invert_sigmas", False) else 1 - solver.times
    away = float((tried.sigmas.double().cpu() - known).abs().max()) if len(tried.sigmas) == len(known) else math.inf
    expect(away <= WITHIN, "scheduler", f"one that runs the schedule within {WITHIN:g}", f"{away:.2g} away from it")
    return sigmas.tolist()


def shift_of(config: Mapping, mu: float | None, static: float) -> float:
    """The shift s of a scheduler with this config, s sigma / (1 + (s - 1) sigma). static: without dynamic shifting."""
    dynamic, linear = config.get("use_dynamic_shifting", False), config.get("time_shift_type") == "linear"
    if mu is not None:
        fits = (lambda m: m > 0) if linear else (lambda m: abs(m) < 50)  # of which exp is a float32
        mu = expect_real(mu, "mu", "a positive number" if linear else "a number from -50 to 50", fits)
    expected = "the shift that the pipeline gives to a scheduler with use_dynamic_shifting; a calibration of "
    expected += 'pipeline_velocity has it: cal.provenance["pipeline"]["mu"]'
    expect(mu is not None or not dynamic, "mu", expected, mu)
    shift = (mu if linear else math.exp(mu)) if dynamic else static
    expect(shift > 0, "scheduler", "a positive shift", shift)
    return shift


def static_shift(scheduler) -> float | None:
    """That of a scheduler now, which `set_shift` leaves out of its config; None where it has none."""
    config = scheduler.config
    has_own = isinstance(getattr(type(scheduler), "shift", None), property) and "solvers" not in config
    return scheduler.shift if has_own else config.get("shift", config.get("flow_shift"))


def before_shift(sigma: torch.Tensor, shift: float) -> torch.Tensor:
    return sigma / (sigma + shift * (1 - sigma))


def _expect_euler(scheduler) -> None:
    names, expected = {kind.__name__ for kind in type(scheduler).__mro__}, "a FlowMatchEulerDiscreteScheduler"
    expect("SchedulerMixin" in names, "scheduler", expected, describe(scheduler), TypeError)
    stock = "FlowMatchEulerDiscreteScheduler" in names and "SolverScheduler" not in names
    expect(stock, "scheduler", f"{expected}; solver_scheduler replaces others", type(scheduler).__name__)
    takes = "sigmas" in inspect.signature(scheduler.set_timesteps).parameters
    expect(takes, "scheduler", "one whose set_timesteps takes sigmas", type(scheduler).__name__)
    for name in BY_NUMBER:
        expect(not scheduler.config.get(name, False), "scheduler", f"one without {name}", f"{name}=True")
