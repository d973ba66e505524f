"""`training_cost`: what a call of `straighten` would take."""

import inspect
from dataclasses import fields
from typing import Any

import torch
from torch import nn

from flowkernels._checks import expect, expect_bool
from flowkernels.schedule import Schedule
from flowkernels.solver import Solver
from flowkernels.training.run.cost import TrainingCost, cost_of
from flowkernels.training.run.optimizers import own_optimizer
from flowkernels.training.run.schedulers import Scheduler
from flowkernels.training.run.settings import Settings
from flowkernels.training.run.trajectories import trajectories_of
from flowkernels.training.straighten import straighten
from flowkernels.training.students.precision import expect_castable
from flowkernels.training.students.recomputed import recomputed
from flowkernels.training.students.student import expect_trainable_here, own_student, trained_parameters, try_student
from flowkernels.velocity.protocol import Velocity, as_given, resolve

OF_RUN = {f.name for f in fields(Settings) if f.init}


@torch.inference_mode(False)
def training_cost(
    student: nn.Module | None,
    velocity: Velocity | None,
    schedule: Schedule | Solver,
    *,
    measure: bool = True,
    **settings: Any,
) -> TrainingCost:
    """What `straighten` with the same arguments would take: calls of networks, evaluations, memory by part and time,
    before anything of it is done.

    Args:
        student, velocity, schedule: as for `straighten`. Nothing of them is changed.
        measure: try the student, or a copy of the teacher, on a part of a batch, forward and backward, twice: for the
            memory of what it keeps for the backward pass, and the time.
        settings: the other arguments of `straighten`; of `lora` and `group` only None.

    Returns:
        TrainingCost(counts, memory, seconds, iterations, assumptions), which prints itself: `counts.with_graph`,
        `counts.without_graph`, `counts.teacher` and `counts.bank` have `calls` and `evaluations`; memory is in bytes by
        part, of "activations" as counted in the trial, and None for an optimiser that does not tell before a step.

    The trial before a run and the polish of a solver after it are not counted.

    Raises:
        TypeError, ValueError: naming the argument, as `straighten`.

    Examples:
        >>> teacher = fk.VelocityField(torch.nn.Linear(3, 2), time_column=True)
        >>> settings = dict(noise=(2,), iterations=100, bank=256, batch=32, grid=20)
        >>> cost = fk.training_cost(None, teacher, fk.Schedule.uniform(4), **settings)
        >>> cost.counts.bank, cost.counts.with_graph
        (Count(calls=160, evaluations=5120), Count(calls=100, evaluations=3200))
        >>> cost.memory["bank"]  # 256 trajectories, 5 knots, 2 features of 4 bytes
        10240
    """
    expect_bool(measure, "measure")
    signature = inspect.signature(straighten)
    for name in settings:
        known = name in signature.parameters
        expect(known, name, "an argument of straighten", "another", TypeError)
    for name in ("lora", "group"):
        expect(settings.get(name) is None, name, "None, for a training_cost", settings.get(name))
    expect("iterations" in settings, "iterations", "a number of iterations", "none", TypeError)
    given = signature.bind(student, velocity, schedule, **settings)
    given.apply_defaults()
    asked = Settings(**{name: value for name, value in given.arguments.items() if name in OF_RUN})
    objective = asked.objective
    if velocity is not None:
        velocity = as_given(resolve(velocity).unfused())
    expect_trainable_here()
    student = own_student(student, velocity, objective.student_from)
    objective.expect_student(student)
    parameters = trained_parameters(student)
    expect_castable(parameters, asked.autocast)
    device = parameters[0].device
    trajectories = trajectories_of(asked, device, False)
    optimizer = own_optimizer(asked.optimizer, parameters, asked.lr)
    if asked.lr_scheduler is not None:
        Scheduler(asked.lr_scheduler, optimizer, asked.iterations)
    trial = None
    if measure:
        starts, conditioning = trajectories.first(asked.batch)
        part = -(-asked.batch // asked.accumulate)
        with torch.enable_grad(), recomputed(student, asked.gradient_checkpointing):
            trial = try_student(student, starts, trajectories.size, part, objective.tried, conditioning, passes=2)
    return cost_of(asked, student, trajectories, trial)
