"""Diffusers' pipelines: the door, which holds public names alone. Nothing of diffusers is imported before it is asked
for: the classes that derive from its own are made in the files beside this one, where they are first needed."""

from flowkernels.integrations.diffusers.scheduler import solver_scheduler

__all__ = ["solver_scheduler"]
