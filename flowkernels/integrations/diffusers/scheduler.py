"""Solvers as a scheduler of diffusers' pipelines."""

import functools
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from flowkernels._checks import expect, expect_positive_int
from flowkernels.ops.linear_update import linear_update
from flowkernels.schedule import Schedule
from flowkernels.solver import Solver, expect_solver, last_uses

if TYPE_CHECKING:
    from diffusers import FlowMatchEulerDiscreteScheduler


def solver_scheduler(
    solver: Solver | Schedule | int | Sequence[float] | torch.Tensor, num_train_timesteps: int = 1000
) -> "FlowMatchEulerDiscreteScheduler":
    """A scheduler for diffusers' flow-matching pipelines (SD3, Flux and others), in place of their
    FlowMatchEulerDiscreteScheduler, from which it is derived:

        pipe.scheduler = solver_scheduler(cal[8])
        pipe(prompt, num_inference_steps=8)

    Args:
        solver: a Solver from noise to data, or what `fk.sample` takes as a schedule. Pipelines are to be asked for as
            many `num_inference_steps` as it has evaluations; sigmas and shifts that they bring along give way to its
            own times.
        num_train_timesteps: what the network is called with is as many times `1 - t`.

    The state is kept in float32 between steps, where the pipeline hands back what it was given, and steps go on from
    what it hands back where it has changed it. An image as the start (strength below 1) needs a solver that looks back
    at no velocity before it, such as Euler steps. `save_config` keeps the whole solver, and a pipeline that is saved
    with it can be loaded. Pipelines whose own scheduler inverts its sigmas (`invert_sigmas`: Mochi, LongCat-AudioDiT)
    have a network whose time runs the other way, which this one does not give: they are refused.

    Examples:
        >>> scheduler = solver_scheduler(fk.Solver.adams_bashforth(8, order=2))
        >>> scheduler.set_timesteps(8)
        >>> len(scheduler.timesteps)
        8
    """
    expect_positive_int(num_train_timesteps, "num_train_timesteps")
    solver = expect_solver(solver, "solver")
    expect(not solver.is_inverse, "solver", "a solver from noise to data", solver)
    return _scheduler_class()(solver.to_dict(), num_train_timesteps)


def __getattr__(name: str):
    """`SolverScheduler`, made where it is asked for: it takes diffusers to be there. A pipeline that is loaded looks
    here for the class and for that of schedulers, which tells it how to load one."""
    if name == "SolverScheduler":
        return _scheduler_class()
    if name == "SchedulerMixin":
        from diffusers import SchedulerMixin

        return SchedulerMixin
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


INVERTED = ("MochiPipeline", "LongCatAudioDiTPipeline")


def _inverted_pipeline(scheduler) -> str | None:
    """The pipeline that is calling the scheduler's method, if it is one of those that invert sigmas: nothing else
    tells a scheduler where it is used."""
    frame = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        inverted = [kind.__name__ for kind in type(caller).__mro__ if kind.__name__ in INVERTED]
        if inverted and caller.scheduler is scheduler:
            return inverted[0]
        frame = frame.f_back
    return None


@functools.cache
def _scheduler_class() -> type:
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.configuration_utils import register_to_config
    from diffusers.schedulers.scheduling_utils import SchedulerOutput

    class SolverScheduler(FlowMatchEulerDiscreteScheduler):
        """The steps of a Solver, given as its dict; `solver_scheduler` makes it."""

        __qualname__ = "SolverScheduler"
        init_noise_sigma = 1.0

        @register_to_config
        def __init__(
            self,
            solver: dict,
            num_train_timesteps: int = 1000,
            use_flow_sigmas: bool = True,
            invert_sigmas: bool = False,
            stochastic_sampling: bool = False,
        ):
            for name, value in dict(invert_sigmas=invert_sigmas, stochastic_sampling=stochastic_sampling).items():
                expect(not value, name, "False: the steps are the solver's, from sigma 1 to 0", value)
            super().__init__(num_train_timesteps=num_train_timesteps)
            self.solver = Solver.from_dict(solver)
            self._updates = self.solver.updates(chained=True)  # a pipeline may change the state between steps
            self._last = last_uses(self._updates)
            self.set_timesteps()

        def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None) -> None:
            """Begin; sigmas and mu are taken for their number alone."""
            solver, M = self.solver, self.solver.evaluations
            inverted = _inverted_pipeline(self)
            expected = "a pipeline whose network's time runs from num_train_timesteps down to 0"
            expect(inverted is None, "scheduler", expected, f"{inverted}, whose own scheduler has invert_sigmas=True")
            given = num_inference_steps if sigmas is None else len(sigmas)
            expect(given in (None, M), "num_inference_steps", f"{M}, the evaluations of {solver!r}", given)
            t = solver.model_times
            known = solver.times if solver.steps == M else torch.cat([t, t.new_ones(1)])  # of the states
            self.num_inference_steps = M
            self.sigmas = (1 - known).float().to(device)
            self.timesteps = (self.config.num_train_timesteps * (1 - t)).float().to(device)
            self._step_index = self._begin_index = None
            self._past, self._state, self._given, self._version = {}, None, None, 0

        def index_for_timestep(self, timestep, schedule_timesteps=None) -> int:
            timesteps = self.timesteps if schedule_timesteps is None else schedule_timesteps
            return int((timesteps - timestep).abs().argmin())

        def step(self, model_output, timestep, sample, generator=None, return_dict: bool = True):
            if self.step_index is None:
                self._init_step_index(timestep)
                begin = self.step_index
                back = any(min(update.which) < begin for update in self._updates[begin:])
                way_out = "0, or a solver that looks back at no velocity before it (Euler's steps)"
                expect(not back, "begin_index", f"{way_out}, for a start within {self.solver!r}", begin)
            i, M = self.step_index, self.solver.evaluations
            expect(i < M, "step", f"{M} steps after set_timesteps", "one more")
            dtype = torch.float64 if sample.dtype == torch.float64 else torch.float32
            x = (self._state if self._is_as_given(sample) else sample).to(dtype)
            v = model_output.to(dtype) if torch.float64 in (dtype, model_output.dtype) else model_output
            self._past[i] = v.clone() if self._last[i] > i else v  # a pipeline may give the next in the same memory
            _, which, factors = self._updates[i]
            x = linear_update(x, [self._past[k] for k in which], [-b for b in factors])  # noise - data: -dx/dt
            self._past = {k: past for k, past in self._past.items() if self._last[k] > i}
            new = x.to(model_output.dtype)
            self._state, self._given = x, new
            self._version = None if new.is_inference() else new._version
            self._step_index += 1
            return SchedulerOutput(prev_sample=new) if return_dict else (new,)

        def _is_as_given(self, sample) -> bool:
            """Whether it is the last step's result, and nobody has written to it since."""
            return sample is self._given and self._version is not None and sample._version == self._version

    return SolverScheduler
