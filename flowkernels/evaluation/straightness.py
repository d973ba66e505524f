"""Samples of a plan, and how straight the flow is along their states."""

import torch
from torch import Tensor

from flowkernels._checks import FlowError, expect
from flowkernels.sampling.loop import initial_state
from flowkernels.sampling.teacher import Teacher
from flowkernels.sampling.teacher_solver import KnotStates
from flowkernels.solver import Solver
from flowkernels.velocity.protocol import Velocity


def sampled(
    velocity: Velocity, solver: Solver, noise: Tensor, *, chunk: int | None = None, points: int = 0
) -> tuple[Tensor, Tensor | None]:
    """What `sample` makes of the noise `[n, *shape]`; and of each sample how far from straight each of the N intervals
    is, float64 `[n, N]` on the CPU, by as many `points`: None without points, and for a solver that has no states at
    its knots (`KnotStates`).

    ValueError for NaN or Inf, naming sample and step. Memory is that of `chunk` samples beside the samples' own.
    """
    teacher = Teacher(velocity, len(noise), solver=solver, chunk=chunk)
    at_knots = _states_at_knots(solver) if points else None
    ends, found = [], []
    for part in teacher.chunks(len(noise)):
        last, states = _steps(teacher, initial_state(noise[part]), part.start, at_knots)
        _expect_finite(last, part.start)
        ends.append(last)
        if states is not None:
            found.append(_unstraightness(teacher, states, solver.times, points, part.start))
    return torch.cat(ends), torch.cat(found) if found else None


def _states_at_knots(solver: Solver) -> dict[int, int] | None:
    """{how many evaluations lie before it: knot} of all knots but the first."""
    try:
        places = KnotStates.of(solver).places
    except ValueError:
        return None
    return {place: knot for knot, place in enumerate((*places, solver.evaluations)) if knot}


def _steps(
    teacher: Teacher, x: Tensor, first: int, at_knots: dict[int, int] | None
) -> tuple[Tensor, list[Tensor] | None]:
    """The last state of samples from `first` on, and those at the knots where they are asked for."""
    kept = None if at_knots is None else [x]
    if teacher.fused is not None:
        last, states, _ = teacher.fused_flow(x, first, states=kept is not None)
        if kept is not None:
            kept += [states[place] for place in at_knots]
        return last, kept
    last = x
    for i, (state, _) in enumerate(teacher.flow(x, first)):  # all of them in one buffer
        last = state
        if kept is not None and i + 1 in at_knots:
            kept.append(state.clone())
    return last, kept


def _unstraightness(teacher: Teacher, states: list[Tensor], times: Tensor, points: int, first: int) -> Tensor:
    """The mean over u of `|(x_b - x_a) / (t_b - t_a) - v(x_u, t_u)|^2` of each sample and interval, by the midpoint
    rule: float64 `[n, N]`."""
    found = []
    for k, (a, b) in enumerate(zip(times[:-1].tolist(), times[1:].tolist(), strict=True)):
        secant, total = (states[k + 1] - states[k]) / (b - a), 0.0
        for i in range(points):
            u = (i + 0.5) / points
            x = torch.lerp(states[k], states[k + 1], u)
            off = (secant - teacher.at(x, a + u * (b - a), first)).double().square().flatten(1).sum(1)
            _expect_finite(off[:, None], first, f" at t = {a + u * (b - a):.6g}, on the chord of step {k}")
            total = total + off / points
        found.append(total)
    return torch.stack(found, 1).cpu()


def _expect_finite(values: Tensor, first: int, where: str = "") -> None:
    bad = (~values.isfinite().flatten(1).all(1)).nonzero()
    got = f"NaN or Inf in sample {first + bad[0].item()}{where}" if len(bad) else ""
    expect(len(bad) == 0, "velocity", "finite velocities", got, FlowError)
