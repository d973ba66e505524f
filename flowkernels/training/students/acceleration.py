"""`Acceleration`: an initial velocity and a constant acceleration, as one student."""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from flowkernels._checks import FLOATS, expect, expect_tensor, expect_text
from flowkernels.ops.euler_step import euler_step
from flowkernels.solver import Solver
from flowkernels.velocity.composite import Composite, answer_of, expect_state
from flowkernels.velocity.field import float64_device
from flowkernels.velocity.protocol import VelocityBase
from flowkernels.velocity.time_embedding import Embedding


class Acceleration(Composite):
    """Paths of constant acceleration: of a first network an initial velocity v0, of a second the acceleration a, given
    that. A path from x_a at the time t_a is `x_a + v0 (t - t_a) + a (t - t_a)^2 / 2`, and a step from t to t + h of it

        x + h (v0 + (t - t_a + h/2) a(x, t, v0)),    v0 of the noise, once

    `fk.sample(student, noise, schedule)` makes these steps, from the schedule's first knot t_a on; so do `fk.rollout`
    and what else runs a schedule. N steps are N + 1 evaluations. No velocity at one state and time is known of it, so
    that other solvers, `capture` and `fk.fuse` are refused. `straighten(target="acceleration")` trains both networks.

    Args:
        velocity: the first network, a velocity `net(x, t)` such as a `VelocityField`, with weights of its own.
        acceleration: the second, `net(x, t)` of x and v0 joined at dimension 1: of twice the channels, with an answer
            of x's shape, dv/dt. It may be a `VelocityField` as well; the conditioning of both follows the samples.
        v0_name: the name of the argument in which the second network takes v0, which is then not joined to x; None
            joins it.

    A call `student(x, t)` is v0, `student(x, t, v0)` the acceleration; x and v0 are `[n, *shape]`, t is `[n]`.

    Raises TypeError, ValueError, naming the argument. Source: constant acceleration flow (arXiv 2411.00322), checked
    against its public code.

    Examples:
        >>> first = fk.VelocityField(torch.nn.Linear(3, 2), time_column=True)
        >>> second = fk.VelocityField(torch.nn.Linear(5, 2), time_column=True)
        >>> student = fk.Acceleration(first, second)
        >>> fk.sample(student, torch.zeros(4, 2), [0, 0.5, 1]).shape
        torch.Size([4, 2])
    """

    def __init__(self, velocity: nn.Module, acceleration: nn.Module, *, v0_name: str | None = None):
        super().__init__()
        for name, net in (("velocity", velocity), ("acceleration", acceleration)):
            expect(isinstance(net, nn.Module), name, "an nn.Module", net, TypeError)
        own = {id(p) for p in velocity.parameters()}.isdisjoint(id(p) for p in acceleration.parameters())
        expect(own, "acceleration", "weights of its own", "parameters of the velocity's")
        if v0_name is not None:
            expect_text(v0_name, "v0_name", "the name of an argument, or None")
            expected = "None for an acceleration that is a VelocityField, whose conditioning is its own"
            expect(not isinstance(acceleration, VelocityBase), "v0_name", expected, v0_name)
        self.velocity, self.acceleration, self.v0_name = velocity, acceleration, v0_name

    def forward(self, x: Tensor, t: Tensor, v0: Tensor | None = None) -> Tensor:
        expect_state(x, t)
        if v0 is None:
            return answer_of(self.velocity, "velocity", x, x, t)
        expect_tensor(v0, "v0", FLOATS)
        expect(v0.shape == x.shape, "v0", f"x's shape {list(x.shape)}", v0)
        if self.v0_name is not None:
            return answer_of(self.acceleration, "acceleration", x, x, t, **{self.v0_name: v0})
        return answer_of(self.acceleration, "acceleration", x, torch.cat([x, v0.to(x.dtype)], 1), t)

    def velocities(
        self, x: Tensor, t: Tensor, embedding: Embedding | None = None
    ) -> tuple[Tensor, Tensor | None, float]:
        got = "an Acceleration, which makes its own steps on a schedule (fk.sample, capture=None)"
        expect(False, "velocity", "one that is known at a state and a time", got)

    def fused_steps(
        self, x: Tensor, solver: Solver, out: Tensor | None = None, keep: bool = False
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Its own steps on the knots of a schedule, with the mean velocities of each."""
        own = solver.is_euler and not solver.is_inverse
        expect(own, "schedule", "a schedule, for an Acceleration, whose steps are its own", solver)
        return self._steps(x, solver.times.tolist(), out, keep)

    def _steps(
        self, x: Tensor, times: list[float], out: Tensor | None, keep: bool
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        start = x.contiguous()
        x = start.clone() if out is None else out[0].copy_(start)

        def at(t: float) -> Tensor:
            return torch.full((len(x),), t, dtype=torch.float64, device=float64_device(x.device))

        v0 = self(x, at(times[0])).to(x.dtype, copy=True)  # x, which a network may answer with, is written to
        for k, (now, then) in enumerate(itertools.pairwise(times)):
            a = self(x, at(now), v0).to(x.dtype)
            v = torch.add(v0, a, alpha=(now + then) / 2 - times[0])
            x = euler_step(x, v, then - now, out=x if out is None else out[k + 1])
            yield x, v if keep else None

    def extra_repr(self) -> str:
        return "" if self.v0_name is None else f"v0_name={self.v0_name!r}"
