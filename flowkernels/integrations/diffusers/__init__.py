"""Diffusers' pipelines: the door, which holds public names alone. Nothing of diffusers is imported before it is asked
for: the class that derives from one of its own is made in scheduler.py, where it is first needed."""

from flowkernels.integrations.diffusers.pipeline import pipeline_velocity
from flowkernels.integrations.diffusers.scheduler import solver_scheduler
from flowkernels.integrations.diffusers.sigmas import sigmas_for

__all__ = ["pipeline_velocity", "sigmas_for", "solver_scheduler"]


def __getattr__(name: str):
    """A pipeline that is loaded, or unpickled, looks here for its scheduler's class and for the class of all
    schedulers, which tells diffusers how to load one."""
    if name == "SolverScheduler":
        from flowkernels.integrations.diffusers.scheduler import scheduler_class

        return scheduler_class()
    if name == "SchedulerMixin":
        from diffusers import SchedulerMixin

        return SchedulerMixin
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
