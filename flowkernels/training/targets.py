"""What a student learns: `StraightenLoss`, from a batch of a bank to the losses.

A target turns a batch into an `Example`: the student's inputs, and the pairs of states whose secants are its
velocities. Another is

1. a row of `TARGETS`: how examples are made, and what of the schedule they are made on;
2. a paragraph in the docstring of `StraightenLoss`, with its source; cli/main.py offers it where a calibration is all
   that it needs; docs/mathematics.md, "Straightening", has the formula;
3. in tests/test_straighten.py its formula once more, in float64, its resuming in `VARIANTS`, and a flow that it learns.

A setting that only one target has is an argument of `StraightenLoss` and `straighten`, with a default, and is in
`StraightenLoss.identity` where it differs from that: a checkpoint of a run with another is refused, and those of before
go on. A loss or a distribution of times is a row of its own table: losses.py, t_sampling.py.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flowkernels._casts import no_grad
from flowkernels._checks import (
    FLOATS,
    describe,
    expect,
    expect_choice,
    expect_float64,
    expect_positive_int,
    expect_real,
    expect_takes,
    expect_tensor,
    one_of,
)
from flowkernels.ops.linear_update import linear_update
from flowkernels.ops.segment_points import expect_bank, segment_points
from flowkernels.ops.straighten_loss import StraightenLosses, straighten_loss
from flowkernels.ops.straighten_loss.reference import means, secants
from flowkernels.sampling.teacher import Teacher
from flowkernels.schedule import Schedule
from flowkernels.solver import Solver
from flowkernels.training.bank import BankBatch, generator_on
from flowkernels.training.losses import FUSED, LOSSES
from flowkernels.training.students import student_velocity
from flowkernels.training.t_sampling import START, T_SAMPLINGS

NORMALISED = "per_sample_normalised"
LEAST = 1e-12  # that a sample's loss is divided by
OWN = 0.25  # of the examples of "solver" are on the student's own states, the others on the teacher's

TSampling = str | Callable[[int, torch.Generator], Tensor]
Loss = str | Callable[[Tensor, Tensor], Tensor]


class Example(NamedTuple):
    """What the student is given, x `[B, *shape]` at t `[B]`, and what it is to answer, `(pairs[i+1, s] - pairs[i, s]) /
    step_sizes[i]` of the places i `[B]`."""

    x: Tensor
    t: Tensor
    pairs: Tensor
    step_sizes: Tensor
    places: Tensor


class RolledOut(NamedTuple):
    """A student's own samples on a solver: x_k, k < N, and last the teacher's, `[N+1, n, *shape]`; and of each step the
    pair `x_0 + sum_{i<k} b[k,i] v_i`, the teacher's state at its end, `[2N, n, *shape]`. of: the teacher's states."""

    states: Tensor
    pairs: Tensor
    of: Tensor


@dataclass(frozen=True)
class Target:
    """A row of `TARGETS`.

    make: (loss, batch, generator on the CPU) -> Example. whole: on one interval, from the schedule's first knot to its
        last. t_sampling: where none is asked for. only: and no other is taken. solver: for a Solver, on the student's
        own states.
    """

    make: Callable[["StraightenLoss", BankBatch, torch.Generator], Example]
    whole: bool = False
    t_sampling: str = START
    only: bool = False
    solver: bool = False


def straight_line(loss: "StraightenLoss", batch: BankBatch, generator: torch.Generator) -> Example:
    """Neither the targets nor the states at the ends of the intervals are materialised."""
    states, interval, sample = batch
    times, step_sizes = loss.tables(states.device)[:2]
    u, t = loss.draw(len(interval), generator, states.device), times[interval]
    if u is not None:
        t = t + u * step_sizes[interval]
    return Example(segment_points(states, interval, sample, u), t, states, step_sizes, interval)


def on_a_solver(loss: "StraightenLoss", batch: BankBatch, generator: torch.Generator) -> Example:
    """The student's own states, and the teacher's in between."""
    states, interval, sample = batch
    times, step_sizes = loss.tables(states.device)[:2]
    rolled = loss.rolled_out
    if rolled is None or rolled.of is not states:
        expect(False, "batch", "the states that `roll_out` was given last", "others")
    own = _uniform(len(interval), generator, states.device) < OWN
    x = (segment_points(at, interval, sample) for at in (rolled.states, states))
    x = torch.where(own.view(-1, *[1] * (states.dim() - 2)), *x)
    return Example(x, times[interval], rolled.pairs, step_sizes, 2 * interval)


TARGETS: dict[str, Target] = {
    "boss": Target(straight_line),
    "reflow": Target(straight_line, whole=True, t_sampling="uniform"),
    "distill": Target(straight_line, whole=True, only=True),
    "solver": Target(on_a_solver, only=True, solver=True),
}


class StraightenLoss(nn.Module):
    """How far a student is from what it is to learn of the teacher's trajectories, for a loop of one's own.

    The student is evaluated once, on points drawn from a bank of the teacher's states at the knots. What its velocity v
    is compared with is `(x_b - x_a) / (t_b - t_a)`, of the states at the ends of an interval: at
    `t = t_a + u (t_b - t_a)` and `x = (1-u) x_a + u x_b`. Targets:

    - "boss": the schedule's intervals, at u = 0: BOSS (arXiv 2312.16414). With `t_sampling="uniform"` piecewise
      rectified flow.
    - "reflow": one interval, from the schedule's first knot to its last: rectified flow (arXiv 2209.03003), of pairs of
      noise and the teacher's data. With `t_sampling="u_shaped"` and `loss="huber"`, `huber_c = 0.00054 sqrt(D)` of D
      features, improved rectified flow (arXiv 2405.20320; its LPIPS is a `loss` of your own); with `t_sampling="ten"`
      and `weighting="per_sample_normalised"` Simple ReFlow (arXiv 2410.07815).
    - "distill": the same interval, at u = 0: one step from noise to data, InstaFlow's second stage (arXiv 2309.06380).
    - "solver": for a multistep `Solver` in place of the schedule. At step k, on the student's own state x_k as well as
      the teacher's, the velocity that lands the solver on the teacher's next knot: `(x_b - x_0 - sum_{i<k} b[k,i] v_i)
      / b[k,k]`, with the student's own v_i. They are those of the last `roll_out`, and have no gradient. Of Euler steps
      it is "boss" on the student's own states. Source: docs/mathematics.md, "Straightening".

    Args:
        schedule: a Schedule, such as `cal[4]`; for target="solver" a Solver, such as `fk.fit_solver(teacher, cal, 4)`,
            of one evaluation a step, at the step's first knot.
        target: what is learned, a name of those above.
        loss: of a sample, with e = v - target of D features and c = `huber_c`: "l2", `|e|^2 / D`; "huber", the
            pseudo-Huber `sqrt(|e|^2 / D + c^2) - c`; "huber_per_element", the mean over features of `sqrt(e^2 + c^2) -
            c`; "cauchy", that of `log(1 + e^2 / (2 c^2))`; or a function (v, target) -> `[B]` of `[B, *shape]` in the
            bank's dtype, differentiable in v. The first two are `fk.straighten_loss`, with the gradient in the same
            pass and no target in memory; the others are plain torch.
        huber_c: the constant c.
        weighting: factors on the losses of intervals, N numbers ("reflow" and "distill" have one interval);
            "per_sample_normalised", one over the loss of the sample, which makes a mean of 1 and lets all samples pull
            alike (Simple ReFlow); None weighs all alike.
        t_sampling: the distribution of u: "start", 0; "uniform"; "u_shaped", density `e^(4u) + e^(4(1-u))`; "ten",
            density `10^(1-u)`; or a function (n, generator) -> u `[n]` in [0, 1], the generator where the states are.
            None takes the target's own, "start" or "uniform"; "distill" and "solver" take no other.

    schedule: the Schedule at whose knots the bank's states are to be: that given, or its ends ("reflow", "distill").
    times: those knots, float64 `[N+1]`, on the CPU.

    Raises TypeError, ValueError, naming the argument. It has no weights of its own (a module that is `loss` keeps its);
    what it needs is copied to a bank's device once, and nothing waits for a GPU.

    Examples:
        >>> teacher, student = (lambda x, t: -x), fk.VelocityField(torch.nn.Linear(3, 2), time_column=True)
        >>> loss = fk.StraightenLoss(fk.Schedule([0, 0.5, 1]), t_sampling="uniform")
        >>> states = fk.rollout(teacher, torch.randn(16, 2), 20).x[[0, 10, 20]]  # at the knots
        >>> batch = fk.BankBatch(states, torch.randint(2, (8,)), torch.randint(16, (8,)))
        >>> loss(student, batch).loss.backward()
    """

    def __init__(
        self,
        schedule: Schedule | Solver,
        *,
        target: str = "boss",
        loss: Loss = "l2",
        huber_c: float = 0.03,
        weighting: Sequence[float] | Tensor | str | None = None,
        t_sampling: TSampling | None = None,
    ):
        super().__init__()
        expect_choice(target, "target", tuple(TARGETS))
        self.target, self._row = target, TARGETS[target]
        self.solver = _expect_solver(schedule) if self._row.solver else None
        self.schedule = _knots(schedule, self._row) if self.solver is None else Schedule(self.solver.times)
        self.loss = _expect_loss(loss)
        self.huber_c = expect_real(huber_c, "huber_c", "a positive number", _is_squared)
        self.weighting = weighting if _is(weighting, NORMALISED) else _expect_weighting(weighting, self.schedule.steps)
        self.t_sampling = _expect_t_sampling(t_sampling, self._row, target)
        self.rolled_out: RolledOut | None = None
        self._tables: dict[torch.device, tuple[Tensor, Tensor, Tensor | None]] = {}

    @property
    def times(self) -> Tensor:
        return self.schedule.times

    @property
    def needs_roll_out(self) -> bool:
        """Whether its examples are on the student's own states."""
        return self._row.solver

    def forward(
        self, student: nn.Module, batch: BankBatch, generator: torch.Generator | None = None
    ) -> StraightenLosses:
        """The losses of a batch.

        Args:
            student: of convention `student(x, t)`, or a `VelocityField`, whose conditioning follows the samples.
            batch: (states, interval, sample), a `BankBatch` or a tuple of its parts; states at `times`.
            generator: what is drawn, on the CPU (on a GPU by a generator there, of a seed that this one draws); None is
                torch's own.

        Returns:
            StraightenLosses(loss, per_sample, per_interval): the weighted mean, differentiable in the student's
            weights; the losses of the examples `[B]` and their means by interval `[N]`, unweighted.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        batch = self._expect_batch(student, batch)
        known = generator is None or isinstance(generator, torch.Generator)
        expect(known, "generator", "a torch.Generator or None", generator, TypeError)
        states, _, sample = batch
        example = self._row.make(self, batch, torch.default_generator if generator is None else generator)
        v = student_velocity(student, example.x, example.t, sample, states.shape[1])
        return self._losses(v, example, batch.interval, sample)

    def _losses(self, v: Tensor, example: Example, interval: Tensor, sample: Tensor) -> StraightenLosses:
        _, _, pairs, step_sizes, places = example
        if not self.is_fused:
            target = secants(pairs, step_sizes, places, sample)
            each = self.each(v.to(target.dtype), target)
            return StraightenLosses(*means(each, self._weight(each, interval), interval, self.schedule.steps))
        fused = functools.partial(straighten_loss, loss=self.loss, huber_c=self.huber_c)
        known = None
        if _is(self.weighting, NORMALISED):
            with torch.no_grad():
                known = fused(v, pairs, step_sizes, places, sample).per_sample
        found = fused(v, pairs, step_sizes, places, sample, weight=self._weight(known, interval))
        if len(found.per_interval) > self.schedule.steps:  # there is none between the pairs of steps
            found = StraightenLosses(found.loss, found.per_sample, found.per_interval[::2])
        return found

    def _weight(self, each: Tensor | None, interval: Tensor) -> Tensor | None:
        """The factors on the samples' losses, `[B]`."""
        if each is not None and _is(self.weighting, NORMALISED):
            return each.detach().clamp_min(LEAST).reciprocal()
        weight = self.tables(interval.device)[2]
        return None if weight is None else weight[interval]

    @property
    def is_fused(self) -> bool:
        """Whether the loss is one that `straighten_loss` computes."""
        return isinstance(self.loss, str) and self.loss in FUSED

    def each(self, v: Tensor, target: Tensor) -> Tensor:
        """The losses `[B]` of velocities against targets `[B, *shape]`, in plain torch."""
        if isinstance(self.loss, str):
            return LOSSES[self.loss](v, target, self.huber_c)
        each = self.loss(v, target)
        expected = f"a function (v, target) that returns [{len(v)}], one loss for each sample"
        if not isinstance(each, Tensor) or each.shape != (len(v),) or each.dtype not in FLOATS:
            expect(False, "loss", expected, describe(each))
        expect(each.requires_grad or not v.requires_grad, "loss", "a function differentiable in v", "one that is not")
        return each.to(target.dtype)

    @torch.inference_mode(False)
    @no_grad
    def roll_out(self, student: nn.Module, states: Tensor, chunk: int | None = None) -> None:
        """Take the student's own samples on the solver, of target="solver": before the first batch, and once in a while
        as the student changes. It is evaluated in eval mode, N - 1 times a sample. Other targets need none.

        Args:
            student: as for a batch.
            states: the bank's, `[N+1, n, *shape]`: those of the batches that follow. Beside them 3N + 1 states of all
                samples are kept.
            chunk: samples evaluated at once; None evaluates all.
        """
        self._expect_states(student, states)
        if not self.needs_roll_out:
            return
        if chunk is not None:
            expect_positive_int(chunk, "chunk")
        modes = {part: part.training for part in student.modules()}
        student.eval()
        try:
            self.rolled_out = self._rolled_out(student, states.detach(), states, chunk)
        finally:
            for part, training in modes.items():
                part.training = training

    def _rolled_out(self, student: nn.Module, knots: Tensor, of: Tensor, chunk: int | None) -> RolledOut:
        N, n, at = self.schedule.steps, knots.shape[1], self.solver.model_times.tolist()
        b, teacher = self.solver.coefficients.tolist(), Teacher(student, n, chunk=chunk)
        own, pairs = torch.empty_like(knots), knots.new_empty(2 * N, *knots.shape[1:])
        own[N], pairs[1::2] = knots[N], knots[1:]
        for rows in teacher.chunks(n):
            start, v = knots[0, rows], []
            for k in range(N):
                own[k, rows] = x = linear_update(start, v, b[k - 1][:k]) if k else start
                pairs[2 * k, rows] = linear_update(start, v, b[k][:k]) if k else start
                if k < N - 1:
                    v.append(teacher.at(x, at[k], rows.start))
        return RolledOut(own, pairs, of)

    def draw(self, n: int, generator: torch.Generator, device: torch.device) -> Tensor | None:
        """u `[n]`, on a device; None where it is 0 everywhere."""
        if _is(self.t_sampling, START):
            return None
        if isinstance(self.t_sampling, str):
            return T_SAMPLINGS[self.t_sampling](_uniform(n, generator, device))
        return _expect_u(self.t_sampling(n, generator_on(device, generator)), n).detach().to(device)

    def tables(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        """(times, step sizes of the pairs, float64; weights of the intervals, float32, or None), on a device."""
        if device not in self._tables:
            sizes = self.times.diff()
            if self.solver is not None:
                sizes = self.solver.coefficients.diagonal().repeat_interleave(2)[:-1]
            weight = self.weighting if isinstance(self.weighting, Tensor) else None
            self._tables[device] = (
                self.times.to(device),
                sizes.to(device),
                None if weight is None else weight.to(device),
            )
        return self._tables[device]

    def identity(self) -> dict[str, Any]:
        """What determines it, in plain values, for checkpoints; of functions only that they are some."""
        found = {"loss": _name(self.loss), "huber_c": self.huber_c, "t_sampling": _name(self.t_sampling)}
        found["weighting"] = self.weighting.tolist() if isinstance(self.weighting, Tensor) else self.weighting
        if self.target != "boss":  # of which checkpoints of before there were others say nothing
            found["target"] = self.target
        if self.solver is not None:
            found["solver"] = self.solver.coefficients.tolist()
        return found

    def extra_repr(self) -> str:
        return f"steps={self.schedule.steps}, " + ", ".join(f"{k}={v!r}" for k, v in self.identity().items())

    def _expect_batch(self, student, batch) -> BankBatch:
        whole = isinstance(batch, tuple) and len(batch) == 3
        expect(whole, "batch", "a BankBatch, (states, interval, sample)", batch, TypeError)
        self._expect_states(student, batch[0])
        expect_bank(*batch)
        return BankBatch(*batch)

    def _expect_states(self, student, states) -> None:
        expect(isinstance(student, nn.Module), "student", "an nn.Module", student, TypeError)
        expect_tensor(states, "states", (torch.float32, torch.float64))
        if states.dim() < 3 or len(states) != len(self.times):
            knots = [round(t, 4) for t in self.times.tolist()]
            expect(False, "states", f"[{len(knots)}, n, *shape], at the knots {knots}", states)


def _uniform(n: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """In [0, 1), float32 `[n]`."""
    return torch.rand(n, generator=generator_on(device, generator), dtype=torch.float32, device=device)


def _is(value, name: str) -> bool:
    return isinstance(value, str) and value == name


def _name(value) -> str:
    return value if isinstance(value, str) else "function"


def _is_squared(c: float) -> bool:
    """Whether c^2 is a positive number in float32, in which a GPU computes the loss: with Inf nothing is trained."""
    return c > 0 and 1e-38 < c * c < 3e38


def _knots(schedule, row: Target) -> Schedule:
    expected = "a Schedule, such as cal[4]: a student learns Euler steps (of a solver: target='solver')"
    expect(isinstance(schedule, Schedule), "schedule", expected, schedule, TypeError)
    if not row.whole:
        return schedule
    ends = None if schedule.grid is None else (schedule.indices[0], schedule.indices[-1])
    return Schedule(schedule.times[[0, -1]], schedule.grid, ends)


def _expect_solver(solver) -> Solver:
    expected = "a Solver, such as fit_solver(teacher, cal, 4), for target='solver'"
    expect(isinstance(solver, Solver), "schedule", expected, solver, TypeError)
    expect(not solver.is_inverse, "schedule", "a solver from noise to data", solver)
    at_knots = torch.equal(solver.model_times, solver.times[:-1])
    expect(at_knots, "schedule", "a solver of one evaluation a step, at its first knot", solver)
    b = solver.coefficients.diagonal().abs()
    expect(bool((b > 1e-6 * b.max()).all()), "schedule", "a solver each of whose steps takes its last velocity", solver)
    return solver


def _expect_loss(loss) -> Loss:
    names = one_of(LOSSES)
    if isinstance(loss, str):
        return expect_choice(loss, "loss", tuple(LOSSES))
    expect_takes(loss, "loss", f"{names} or a function (v, target)", None, None)
    return loss


def _expect_weighting(value, steps: int) -> Tensor | None:
    if value is None:
        return None
    expected = f"{steps} finite numbers >= 0, one for each interval, {NORMALISED!r} or None"
    if isinstance(value, str):
        expect(False, "weighting", expected, value)
    weight = expect_float64(value, "weighting", expected).float()
    ok = weight.shape == (steps,) and bool((weight >= 0).all()) and bool(torch.isfinite(weight).all())
    expect(ok, "weighting", expected, weight)
    return weight


def _expect_t_sampling(value, row: Target, target: str) -> TSampling:
    if value is None:
        return row.t_sampling
    if row.only:
        expect(_is(value, row.t_sampling), "t_sampling", f"{row.t_sampling!r} or None with target={target!r}", value)
    if isinstance(value, str):
        return expect_choice(value, "t_sampling", tuple(T_SAMPLINGS))
    expected = f"{one_of(T_SAMPLINGS)} or a function (n, generator)"
    expect_takes(value, "t_sampling", expected, 2, None)
    _expect_u(value(2, torch.Generator().manual_seed(0)), 2)
    return value


def _expect_u(u, n: int) -> Tensor:
    """What a function of the caller's has drawn; values are looked at where nothing has to be waited for."""
    expected = f"a function that returns n = {n} numbers in [0, 1]"
    if not isinstance(u, Tensor) or u.shape != (n,) or u.dtype not in FLOATS:
        expect(False, "t_sampling", expected, describe(u))
    if u.is_cpu and not bool(((u >= 0) & (u <= 1)).all()):
        expect(False, "t_sampling", expected, u)
    return u
