"""The loop: steps of a schedule or solver from noise to data."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flowkernels._checks import expect_times
from flowkernels._guidance import guided
from flowkernels.fusion.head import FusedHead
from flowkernels.ops import linear_update
from flowkernels.ops.euler_step import stepper
from flowkernels.schedule import Schedule
from flowkernels.solver import Solver
from flowkernels.velocity.evaluate import evaluate, has_time_embedding, model_times, time_embeddings
from flowkernels.velocity.time_embedding import times_of


def initial_state(noise: Tensor) -> Tensor:
    """The state in float32, whatever the model computes in; float64 noise stays float64."""
    return noise if noise.dtype == torch.float64 else noise.float()


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
    knots, t = times.tolist(), model_times(velocity, times[:-1], x)
    embeddings = time_embeddings(velocity, t, x) if has_time_embedding(velocity) else [None] * len(t)
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


class Update(NamedTuple):
    """What a loop does after an evaluation: `state + sum of factors * velocities`."""

    first: bool  # the state that the loop began with, else the one that was evaluated
    which: tuple[int, ...]
    factors: tuple[float, ...]
    kept: bool  # a later update reads the new velocity
    done: tuple[int, ...]  # velocities that none does any more


def updates_of(solver: Solver) -> tuple[Update, ...]:
    """The update after each evaluation."""
    found = solver.updates()
    last = {i: i for i in range(len(found))}
    for i, (_, which, _) in enumerate(found):
        last.update((j, max(last[j], i)) for j in which)
    return tuple(
        Update(first and i > 0, tuple(which), tuple(b), last[i] > i, tuple(j for j in last if last[j] == i))
        for i, (first, which, b) in enumerate(found)
    )


class Velocities:
    """The velocities that later updates of a solver read, copied: a network may use the memory of its output again, as
    a CUDA graph does. The compiler takes out copies that are not needed."""

    def __init__(self):
        self.kept: dict[int, Tensor] = {}

    def add(self, i: int, update: Update, x: Tensor, v: Tensor, v_uncond: Tensor | None, w: float):
        """(v, v_uncond) of evaluation i, to use in its update. Guidance is applied here to what is read again, and
        where the update has other terms of another dtype."""
        compiled = torch.compiler.is_compiling()
        if v_uncond is not None and (update.kept or (v.dtype != x.dtype and len(update.which) > 1)):
            if compiled:
                v = guided(v, v_uncond, w, x.dtype)
            else:  # in one pass
                v = linear_update(v_uncond.to(x.dtype), (v, v_uncond), (w, -w))
            v_uncond = None
        elif compiled:
            v = v.clone() if update.kept else v
        else:
            v = v.clone(memory_format=torch.contiguous_format) if update.kept or _share_storage(v, x) else v
            if v_uncond is not None and _share_storage(v_uncond, x):
                v_uncond = v_uncond.clone()
        self.kept[i] = v
        return v, v_uncond

    def terms(self, i: int, update: Update, v_uncond: Tensor | None, w: float) -> tuple[list[Tensor], list[float]]:
        """What the update of evaluation i adds up; velocities that no later one reads are let go."""
        v, b = [], []
        for j, factor in zip(update.which, update.factors, strict=True):
            guided_here = j == i and v_uncond is not None
            v += [self.kept[j], v_uncond] if guided_here else [self.kept[j]]
            b += [factor * w, factor * (1 - w)] if guided_here else [factor]
        for j in update.done:
            del self.kept[j]
        return v, b


def _share_storage(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def solve(
    velocity, x: Tensor, solver: Solver, keep: bool = False
) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None, float]]:
    """The evaluations of a solver, as `euler` yields its steps; the state is a buffer of the loop's own."""
    updates = updates_of(solver)
    if isinstance(velocity, FusedHead):
        yield from velocity.fused_steps(x, solver.model_times.tolist(), updates, keep=keep)
        return
    t = model_times(velocity, solver.model_times, x)
    embeddings = time_embeddings(velocity, t, x) if has_time_embedding(velocity) else [None] * len(t)
    start, past = x.contiguous(), Velocities()
    x = start.clone()
    for i, (update, now, embedding) in enumerate(zip(updates, times_of(t, len(x)), embeddings, strict=True)):
        v, v_uncond, w = evaluate(velocity, x, now, embedding)
        v, v_uncond = past.add(i, update, x, v, v_uncond, w)
        x = linear_update(start if update.first else x, *past.terms(i, update, v_uncond, w), out=x)
        yield x, v, v_uncond, w


def plan_of(schedule: Schedule | Solver | int | Sequence[float] | Tensor, name: str = "schedule") -> Tensor | Solver:
    """What a loop runs: times, on which the steps are Euler's, or a solver of other steps."""
    if isinstance(schedule, Solver) and not schedule.is_euler:
        return schedule
    return schedule.times if isinstance(schedule, (Schedule, Solver)) else expect_times(schedule, name)


def flow(velocity, x: Tensor, plan: Tensor | Solver, keep: bool = False):
    """The steps of a plan, as `euler` yields them."""
    return solve(velocity, x, plan, keep) if isinstance(plan, Solver) else euler(velocity, x, plan, keep=keep)


def replay(velocity, x: Tensor, plan: Tensor | Solver) -> Iterator[Tensor]:
    """The velocities of the plan's steps from x, guidance applied."""
    for _, v, v_uncond, w in flow(velocity, x, plan, keep=True):
        yield guided(v, v_uncond, w, x.dtype)
