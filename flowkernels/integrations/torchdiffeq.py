"""torchdiffeq's `odeint`, by our solvers: for samplers that call it by a name in their module.

    import rectified_flow_pytorch.rectified_flow as host
    from flowkernels.integrations.torchdiffeq import odeint

    host.odeint = odeint(cal.best(4))   # RectifiedFlow.sample() takes 4 evaluations, whatever `steps` and `method` say

Nothing of torchdiffeq is imported. docs/integrations/ode-libraries.md says what ran.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flowkernels._checks import FLOATS, expect, expect_callable, expect_takes, expect_tensor, expect_values
from flowkernels.sampling.loop import initial_state, steps
from flowkernels.sampling.teacher_solver import KnotStates
from flowkernels.schedule import Schedule
from flowkernels.solver import Solver, expect_solver
from flowkernels.velocity.protocol import resolve

__all__ = ("odeint",)

WITHIN = 1e-6  # of times in float32
LEAVES = "one that leaves y as it is, with several evaluations a step or in low precision"


def odeint(
    plan: Schedule | Solver | int | Sequence[float] | Tensor | Callable[..., Solver],
) -> Callable[..., Tensor]:
    """A function that is called as `torchdiffeq.odeint` is, and makes a plan's steps.

    Args:
        plan: a Schedule, N uniform steps, times or a Solver, whose own times are run whatever lies between the first
            and the last of the caller's `t`. Falling `t` runs a Schedule or times back, and takes a Solver made for
            inversion. Or what makes a solver of the caller's `t`, with `inverse=True` where that falls, such as
            `fk.Solver.adams_bashforth` or `fk.Solver.midpoint`.

    Returns:
        `odeint(func, y0, t, *, rtol, atol, method, options)`: func(t, y) is called with t of no dimensions, float32 or
        float64 for float64 states, and y as y0; the states at `t`, `[len(t), *y0.shape]` in y0's dtype, y0 the first.
        Those between two knots are linear between them, as torchdiffeq's fixed steps have them. What chooses its
        method, steps and tolerances is taken and not looked at. The state is kept in float32, or float64 for float64.
        Gradients go through as through torchdiffeq's, where they are on. What func writes into y, as a clamp in place
        does, is written into the state of a solver of one evaluation a step, and refused with others, and in low
        precision, whose states these copies are not; in inference mode each y is compared for it.

    Raises:
        TypeError, ValueError: naming the argument; for a tuple of states, events, complex numbers, or `t` from and to
            other times than the plan's.

    Source: the interface is that of torchdiffeq 0.2.5 (Chen, 2018).

    Examples:
        >>> solve = odeint(fk.Solver.midpoint)
        >>> solve(lambda t, y: 2 * t * y, torch.ones(2), torch.tensor([0.0, 1.0]), method="dopri5")
        tensor([[1., 1.],
                [2., 2.]])
    """
    if callable(plan) and not isinstance(plan, (Schedule, Solver)):
        expect_callable(plan, "plan", "a plan, or what makes a Solver of times")
    else:
        plan = plan if isinstance(plan, Schedule) else expect_solver(plan, "plan")

    def solve(
        func: Callable[[Tensor, Tensor], Tensor],
        y0: Tensor,
        t: Tensor,
        *,
        rtol: Any = None,
        atol: Any = None,
        method: str | None = None,
        options: Any = None,
        event_fn: None = None,
    ) -> Tensor:
        expect_takes(func, "func", "a callable func(t, y)", t, y0)
        expect_values(y0, "y0", FLOATS)
        expect(y0.numel() > 0, "y0", "at least one number", y0)
        expect(event_fn is None, "event_fn", "None: the steps are the plan's", event_fn)
        wanted = _times_of(t)
        solver = _solver_of(plan, wanted)
        state = y0 if y0.dim() > 1 else y0.reshape(1, -1)

        def velocity(x: Tensor, now: Tensor) -> Tensor:
            y = x.reshape(y0.shape).to(y0.dtype)
            wrote = _watched(y) if y.dtype != x.dtype or solver.evaluations != solver.steps else None
            v = func(now[0], y)
            expect(wrote is None or not wrote(), "func", LEAVES, "one that wrote to it")
            expect_tensor(v, "func", FLOATS)
            expect(v.shape == y0.shape, "func", f"y0's shape {list(y0.shape)}", v)
            return v.reshape(x.shape)

        at, states = _knots(velocity, state, solver, torch.is_grad_enabled(), len(wanted) > 2)
        rows = [y0, *(_between(at, states, time).to(y0.dtype).reshape(y0.shape) for time in wanted[1:])]
        return torch.stack(rows)

    return solve


def _watched(y: Tensor) -> Callable[[], bool]:
    """Tells whether y has been written to since."""
    if y.is_inference():  # whose writes are not counted
        kept = y.clone()
        return lambda: not torch.equal(kept, y)
    version = y._version
    return lambda: y._version != version


def _times_of(t: Tensor) -> list[float]:
    expect_values(t, "t", FLOATS)
    expect(t.dim() == 1 and len(t) > 1, "t", "at least two times in one dimension", t)
    times = t.detach().double().tolist()
    signs = {(b > a) - (b < a) for a, b in itertools.pairwise(times)}
    expect(signs in ({1}, {-1}), "t", "times that only rise, or only fall", times)
    return times


def _solver_of(plan: Any, times: list[float]) -> Solver:
    """The plan's steps from the first time to the last."""
    falls = times[0] > times[-1]
    if not isinstance(plan, (Schedule, Solver)):
        made = plan(times[::-1] if falls else times, **({"inverse": True} if falls else {}))
        expect(isinstance(made, Solver), "plan", "what makes a Solver of times", made, TypeError)
        plan = made
    elif isinstance(plan, Schedule) or (falls and plan.is_euler and not plan.is_inverse):
        plan = Solver.euler(plan.times, inverse=falls)
    ends = plan.times[[0, -1]].tolist()
    meets = all(abs(a - b) <= WITHIN for a, b in zip(ends, (times[0], times[-1]), strict=True))
    expected = f"times from {ends[0]:.6g} to {ends[1]:.6g}, those of {plan!r}"
    expect(meets, "t", expected, f"{times[0]:.6g} to {times[-1]:.6g}")
    return plan


def _knots(
    velocity: Callable, state: Tensor, solver: Solver, differentiable: bool, inner: bool
) -> tuple[list[float], list[Tensor]]:
    """Times and states: those at all knots, or at the first and the last."""
    places = {solver.evaluations: -1}
    if inner:
        places |= {i: j for j, i in enumerate(KnotStates.of(solver, "plan").places) if j}
    x0 = initial_state(state)
    found = [x0]
    for i, (x, _) in enumerate(steps(resolve(velocity), x0, solver, differentiable=differentiable), 1):
        if i in places:
            found.append(x if differentiable else x.clone())
    return (solver.times if inner else solver.times[[0, -1]]).tolist(), found


def _between(at: list[float], states: list[Tensor], time: float) -> Tensor:
    """The state at a time, linear between the two knots around it."""
    for (a, x), (b, y) in zip(zip(at, states, strict=True), zip(at[1:], states[1:], strict=True), strict=False):
        if abs(time - b) <= WITHIN:
            return y
        if min(a, b) < time < max(a, b):
            return torch.lerp(x, y, (time - a) / (b - a))
    return states[-1]
