"""`StraightenLoss`: how far a student is from what it is to learn, from a batch of a bank."""

import functools
from collections.abc import Callable, Sequence
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
    expect_mapping,
    expect_positive_int,
    expect_real,
    expect_takes,
    expect_tensor,
    one_of,
)
from flowkernels.ops.library import is_transformed
from flowkernels.ops.segment_points import expect_bank
from flowkernels.ops.straighten_loss import StraightenLosses, straighten_loss
from flowkernels.ops.straighten_loss.reference import means
from flowkernels.schedule import Schedule
from flowkernels.solver import Solver
from flowkernels.training.bank.batch import BankBatch, generator_on, uniform
from flowkernels.training.bank.knots import noted_teacher
from flowkernels.training.by_rows import losses_by_rows
from flowkernels.training.losses import FUSED, LOSSES
from flowkernels.training.refined import refined
from flowkernels.training.students.precision import autocast
from flowkernels.training.t_sampling import START, T_SAMPLINGS
from flowkernels.training.targets.average_velocity import CONSISTENCIES
from flowkernels.training.targets.base import Answer, Call, Dense, RolledOut, Target
from flowkernels.training.targets.noise import COMPARED
from flowkernels.training.targets.own_states import own_states, unmoved
from flowkernels.training.targets.table import TARGETS
from flowkernels.velocity.protocol import Velocity, resolve

NORMALISED, ADAPTIVE = BY_LOSS = ("per_sample_normalised", "adaptive")  # weightings that the losses determine


class Tables(NamedTuple):
    """What is looked up, on a device. times, step_sizes: of the bank's intervals, float64 `[M+1]`, `[M]`; ends, within:
    the times at which the schedule's intervals end that these are in, float64, and which they are, int64 `[M]`. weight:
    of the schedule's intervals, float32 `[N]`, or None."""

    times: Tensor
    step_sizes: Tensor
    weight: Tensor | None
    ends: Tensor
    within: Tensor


OF_ONE = ("initial_speed", "compared", "consistency", "instantaneous")  # settings of one target
LEAST = 1e-12  # that a sample's loss is divided by
ADDED = 1e-3  # to a sample's squared error, over all features

TSampling = str | Callable[[int, torch.Generator], Tensor]
Loss = str | Callable[[Tensor, Tensor], Tensor]


class StraightenLoss(nn.Module):
    """How far a student is from what it is to learn of the teacher's trajectories, for a loop of one's own.

    The student is evaluated, once with its graph ("endpoint": on all steps), on points drawn from a bank of the
    teacher's states at the knots. What its velocity v is compared with is `(x_b - x_a) / (t_b - t_a)`, of the states at
    the ends of an interval: at `t = t_a + u (t_b - t_a)` and `x = (1-u) x_a + u x_b`. Targets:

    - "boss": the schedule's intervals, at u = 0: BOSS (arXiv 2312.16414). With `t_sampling="uniform"` piecewise
      rectified flow.
    - "reflow": one interval, from the schedule's first knot to its last: rectified flow (arXiv 2209.03003), of pairs of
      noise and the teacher's data, or of `fk.Pairs`. With `t_sampling="u_shaped"` and `loss="huber"`, of D features
      with `huber_c = 0.00054 sqrt(D)`, improved rectified flow (arXiv 2405.20320; its LPIPS, of images, is left out);
      with `t_sampling="ten"` and `weighting="per_sample_normalised"` Simple ReFlow (arXiv 2410.07815).
    - "distill": the same interval, at u = 0: one step from noise to data, InstaFlow's second stage (arXiv 2309.06380).
    - "annealed_reflow": "reflow" into a smaller student, which does not start from the teacher: the pairs' noise x_0 is
      at first exchanged for fresh noise z, by degrees no longer: `sqrt(1 - beta^2) x_0 + beta z`, beta falling evenly
      from 1 at the start of the training to 0 at 3/8 of it (`progress`). x_0 and z are standard normal noise, and the
      schedule begins at 0. Source: SlimFlow (arXiv 2407.12718), checked against its public code, in whose command the
      pairs are the teacher's after 300,000 of 800,000 iterations.
    - "acceleration": of a `fk.Acceleration` on the same interval, of length T: of noise x_a an initial velocity v_0,
      that it be h (x_b - x_a) / T, h the `initial_speed`; and at u on the path that v_0 as it was answered, without a
      gradient, and `a = 2 (x_b - x_a - v_0 T) / T^2` make, `x = x_a + v_0 (t - t_a) + a (t - t_a)^2 / 2`, that
      acceleration. The loss is of both, joined at dimension 1 (of "l2" their mean). Source: constant acceleration flow
      (arXiv 2411.00322), checked against its public code, in which T is 1 and the networks are trained one after the
      other; it trains the first at all t, where sampling asks it of the noise alone, as this does.
    - "noise": of a `fk.NoisePrediction` on the same interval: on its path, `x = alpha(t) x_b + sigma(t) e` at u, the
      noise e with which the path begins at x_a, `e = (x_a - alpha(t_a) x_b) / sigma(t_a)`. The loss compares the noise,
      or the data that follow, `(x - sigma e) / alpha` with x_b, which counts high noise more (`compared`). Source:
      Rectified Diffusion (arXiv 2410.07303), checked against its public code, which compares data, with the loss
      "huber_per_element" and `huber_c = 0.001`; e is the pairs' noise itself there, and its path does not quite begin
      at it.
    - "blockwise": the schedule's intervals as "boss" has them, of a `fk.Blockwise`, a network for each.
    - "average_velocity": of a student of two times (`fk.AverageVelocity`), the average velocity u(x, t, s) from t to a
      later s, for any number of steps. t on the schedule's intervals, x on the chords between the teacher's states, s
      uniform from t to the last knot. A share `instantaneous` of the examples has s = t, where u is the velocity: the
      teacher's with guidance or, without a teacher, the secant of the interval, whose mean over the chords through x is
      the velocity of a flow with the same states at the knots, as a whole. The others' target, without gradients, is by
      `consistency`:
      "split", `((r - t) u(x, t, r) + (s - r) u(x_r, r, s)) / (s - t)` with x_r = x + (r - t) u(x, t, r) and r uniform
      between, of the student's own: two evaluations more. SplitMeanFlow (arXiv 2507.16884). Or
      "derivative", `v + (s - t) (v . du/dx + du/dt)` with the velocity v, by forward-mode differentiation of the
      student: MeanFlow (arXiv 2505.13447), whose time runs from data to noise, and whose weighting is "adaptive".
      Both were checked against public code of others (zhuyu-cs/MeanFlow, primepake/splitmeanflow), where both times are
      drawn alike and sorted. "split" needs no derivatives, and runs away with "adaptive". "derivative" asks how fast
      the network changes in time: one whose embedding has sinusoids of a thousand t does much faster than its flow, and
      then needs "adaptive" or a small learning rate.
    - "solver": for a multistep `Solver` in place of the schedule. At step k, on the student's own state x_k as well as
      the teacher's, the velocity that lands the solver on the teacher's next knot: `(x_b - a[k] x_0 - sum_{i<k} b[k,i]
      v_i) / b[k,k]`, with the student's own v_i. They are those of the last `roll_out`, and have no gradient. Of Euler
      steps it is "boss" on the student's own states. Source: docs/mathematics.md, "Straightening".
    - "endpoint": for any `Solver`, the whole of its steps: they are to end where the teacher does. The student is
      evaluated as often as the solver has it, each time on its own state and after its own velocities, and the gradient
      goes back through all of it: `(x_N - x_0) / (t_N - t_0)` is what is compared, with x_N the solver's end. An
      iteration takes as many evaluations, and as much memory, as of another target with as many times the samples. It
      is best begun with a solver fitted to the teacher's ends (`fk.polish`), on a large bank: it learns more of each
      pair than others do. Source: docs/mathematics.md, "Straightening".
    - "on_policy": the teacher's velocity where the student's own step leads. From a state x_a at the interval's start,
      with v = student(x_a, t_a): `teacher(x_a + u h v, t_a + u h)`, h = t_b - t_a, at u uniform; that point has no
      gradient. One evaluation of the teacher an example. A quarter of the x_a are the student's own states, of the last
      `roll_out`, the others the teacher's. What is learned is the teacher's mean velocity along the student's own step:
      not the secant but an implicit step of second order (of x' = a x the trapezoidal rule). Source: pi-Flow's L2
      imitation (arXiv 2510.14974), checked against its public code. There a network's one output is a policy, a
      velocity that changes within the interval, which is compared at 2 or 4 points; the way to these alternates with
      the teacher's steps, whose share, in some of its configurations, falls to 0 in training. Here it is constant
      within the interval, one point is drawn, and the way is the student's alone.
    - "next_knot": f(x, t) = x + (t_b - t) student(x, t), of a state x of the teacher at a time t of the interval,
      against f of the teacher's next state, which is taken as a constant and at the interval's end is x_b: consistency
      of the trajectory up to the next knot (TCD, arXiv 2402.19159; on one interval LCM, arXiv 2310.04378). The loss,
      mostly "cauchy" or "huber_per_element", is of states, not of velocities. The bank has the states of `substeps`
      steps an interval; no teacher is evaluated, and the student twice, once without gradients. Checked against the
      public code of PCM (arXiv 2405.18407) for flow models: N such intervals, where one step of the teacher's from
      noised data takes the place of the next state. The constant is of the student's own weights there too, not, as LCM
      has it, of an average of them.
    - "velocity_matching": the student's velocity as the mean over the time left, x + (t_b - t) student(x, t) = x_b, by
      what that demands of its change du/dt on the teacher's way: `teacher(x, t) + (t_b - t) du/dt`, a constant
      (MDT-dist, arXiv 2509.04406). x is drawn uniformly between two of the teacher's states, of `substeps` steps an
      interval. du/dt is a difference of the student's own, over a twentieth of the time left along the teacher's
      velocity, without autocast; the factor `0.95 (t_b - t)` in front of it makes the end of such Euler steps of the
      teacher what is learned, exactly. One evaluation of the teacher an example; of the student a second, in autocast a
      third, without gradients. Checked against the public code ("discrete"): differences over 0.01 of the one interval
      [0, 1], from noised data, made stable by shortening du/dt to a norm below 1, with which another velocity is
      learned; here the longer difference is what makes it stable. Its second loss, velocity distillation, is not here.

    Args:
        schedule: a Schedule, such as `cal[4]`; for target="solver" a Solver of one evaluation a step, at its first
            knot, such as `fk.fit_solver(teacher, cal, 4)`; for "endpoint" any, such as `fk.polish` finds from that.
        target: what is learned, a name of those above.
        loss: of a sample, with e = v - target of D features and c = `huber_c`: "l2", `|e|^2 / D`; "huber", the
            pseudo-Huber `sqrt(|e|^2 / D + c^2) - c`; "huber_per_element", the mean over features of `sqrt(e^2 + c^2) -
            c`; "cauchy", that of `log(1 + e^2 / (2 c^2))`; or a function (v, target) -> `[B]` of `[B, *shape]` in the
            bank's dtype, differentiable in v. The first two are `fk.straighten_loss`, with the gradient in the same
            pass and no target in memory; the next are too, by some samples at a time
            in plain torch; a function has all. None takes the target's own: "l2", of "endpoint"
            "huber", since the errors of ends are heavy-tailed.
        huber_c: the constant c.
        weighting: factors on the losses of intervals, N numbers ("reflow", "distill" and "endpoint" have one);
            "per_sample_normalised", one over the loss of the sample, which makes a mean of 1 and lets all samples pull
            alike (Simple ReFlow); "adaptive", one over the loss and 0.001 / D, which of "l2" is
            `|e|^2 / (|e|^2 + 0.001)`, MeanFlow's, and lets go of samples that are learned; None weighs all alike.
        t_sampling: the distribution of u: "start", 0; "uniform"; "u_shaped", density `e^(4u) + e^(4(1-u))`; "ten",
            density `10^(1-u)`; or a function (n, generator) -> u `[n]` in [0, 1], the generator where the states are.
            None takes the target's own, "start" or "uniform"; "distill", "next_knot", "velocity_matching", "solver" and
            "endpoint" take no other.
        consistency: of "average_velocity", "split" or "derivative". instantaneous: its share of examples whose two
            times are one, in [0, 1].
        substeps: of target="next_knot" and "velocity_matching": the steps of the teacher's in each interval, at whose
            ends the bank has states: of the schedule's grid, which may have fewer, or equal ones where it has none. A
            `TrajectoryBank` of them is made for `schedule`, below.
        initial_speed: of target="acceleration", the initial velocity over the mean one: 1 is a straight line, above it
            the path slows down.
        compared: of target="noise", what the loss compares, "data" or "noise".
        teacher: the velocity that made the bank, for a target that evaluates it; no other looks at it. Its weights are
            not the loss's.

    teacher_solver: what the notes of the schedule name as the teacher's solver, for a bank; None is Euler's steps.
    schedule: the Schedule at whose knots the bank's states are to be: that given, its ends ("reflow", "distill",
        "endpoint"), or that with its substeps. times: those knots, float64 `[N+1]`, on the CPU; with substeps `[M+1]`,
        and the `interval` of a batch is one of M.
    knots: the Schedule of N steps that is learned, whose intervals `weighting` and `per_interval` are of.
    autocast: the dtype in which the student is evaluated by torch.autocast, the teacher and the loss not; None, as it
        is at first, is as the caller's context has it.

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
        loss: Loss | None = None,
        huber_c: float = 0.03,
        weighting: Sequence[float] | Tensor | str | None = None,
        t_sampling: TSampling | None = None,
        consistency: str = "split",
        instantaneous: float = 0.5,
        substeps: int = 4,
        initial_speed: float = 1.5,
        compared: str = "data",
        teacher: Velocity | None = None,
    ):
        super().__init__()
        expect_choice(target, "target", tuple(TARGETS))
        self.target, self._row = target, TARGETS[target]
        # in a tuple, since its weights are not the loss's
        self._teacher = (_expect_teacher(teacher, self._row, target),)
        takes_solver = self._row.solver
        self.substeps = expect_positive_int(substeps, "substeps")
        plan = Schedule(_expect_solver(schedule, self._row, target).times) if takes_solver else schedule
        self.knots = _knots(plan, self._row, target)
        self.schedule, self.within = refined(self.knots, self.substeps if self._row.between else 1)
        self.solver = schedule if takes_solver else Solver.euler(self.knots)
        self.teacher_solver = noted_teacher(schedule)
        self.loss = self._row.loss if loss is None else _expect_loss(loss)
        self.huber_c = expect_real(huber_c, "huber_c", "a positive number", _is_squared)
        self.weighting = weighting if _is_one(weighting, BY_LOSS) else _expect_weighting(weighting, self.knots.steps)
        self.t_sampling = _expect_t_sampling(t_sampling, self._row, target)
        self.initial_speed = expect_real(initial_speed, "initial_speed", "a finite number")
        self.compared = expect_choice(compared, "compared", COMPARED)
        self.consistency = expect_choice(consistency, "consistency", CONSISTENCIES)
        self.instantaneous = expect_real(
            instantaneous, "instantaneous", "a share of the examples, in [0, 1]", lambda a: 0 <= a <= 1
        )
        self.rolled_out: RolledOut | None = None
        self.autocast: torch.dtype | None = None
        self._tables: dict[torch.device, Tables] = {}

    @property
    def times(self) -> Tensor:
        return self.schedule.times

    @property
    def teacher(self) -> Velocity | None:
        return self._teacher[0]

    @property
    def needs_roll_out(self) -> bool:
        """Whether its examples are on the student's own states."""
        return self._row.own

    @property
    def refits(self) -> bool:
        """Whether the student is sampled with a solver that is fitted to it afterwards."""
        return self._row.solver

    @property
    def is_one_step(self) -> bool:
        """Whether what is learned is a step, or a solver, from the first knot to the last, and nothing else."""
        return self._row.whole and self._row.only

    def expect_student(self, student: nn.Module) -> None:
        """Raise for what is no module, or one that lacks what the target needs."""
        expect(isinstance(student, nn.Module), "student", "an nn.Module", student, TypeError)
        self._row.expect_student(student)

    @property
    def makes_student(self) -> bool:
        """Whether `student_from` makes another network of the teacher's."""
        return self._row.made is not None

    def student_from(self, copied: nn.Module) -> nn.Module:
        """The student that a copy of the teacher becomes."""
        return copied if self._row.made is None else self._row.made(copied, self.knots)

    def forward(
        self,
        student: nn.Module,
        batch: BankBatch,
        generator: torch.Generator | None = None,
        progress: float | None = None,
    ) -> StraightenLosses:
        """The losses of a batch.

        Args:
            student: of convention `student(x, t)`, or a `VelocityField`, whose conditioning follows the samples.
            batch: a `BankBatch`, or its first parts (states, interval, sample); states at `times`.
            generator: what is drawn, on the CPU (on a GPU by a generator there, of a seed that this one draws); None is
                torch's own.
            progress: how much of the training is done, from 0 to 1, for a target that changes with it.

        Returns:
            StraightenLosses(loss, per_sample, per_interval): the weighted mean, differentiable in the student's
            weights; the losses of the examples `[B]` and their means by interval `[N]`, unweighted.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        batch = self._expect_batch(student, batch)
        known = generator is None or isinstance(generator, torch.Generator)
        expect(known, "generator", "a torch.Generator or None", generator, TypeError)
        if self._row.progress:
            progress = expect_real(progress, "progress", "a number in [0, 1]", lambda p: 0 <= p <= 1)
        generator = torch.default_generator if generator is None else generator
        call = self._call(student, batch, generator, progress, self._expect_rolled_out(batch))
        return self._losses(self._row.answer(call), batch)

    def _call(
        self,
        student: nn.Module,
        batch: BankBatch,
        generator: torch.Generator,
        progress: float | None,
        rolled: RolledOut | None,
    ) -> Call:
        states, interval, sample = batch[:3]
        tables = self.tables(states.device)
        times, sizes = tables.times, tables.step_sizes
        start, size = times[interval], sizes[interval]
        places, columns = interval, batch.columns
        if batch.ends:  # of each example a column of two states, one after the other
            states = states.transpose(0, 1).reshape(2 * len(interval), 1, *states.shape[2:])
            places, columns = 2 * torch.arange(len(interval), device=interval.device), torch.zeros_like(sample)
            sizes = size.repeat_interleave(2)[:-1]
        return Call(
            student=student,
            states=states,
            places=places,
            columns=columns,
            step_sizes=sizes,
            start=start,
            size=size,
            end=tables.ends[interval],
            batch=batch,
            generator=generator,
            draw_u=self.draw,
            times=times,
            solver=self.solver,
            teacher=self.teacher,
            rolled_out=rolled,
            progress=progress,
            settings={name: getattr(self, name) for name in OF_ONE},
            autocast=self.autocast,
        )

    def tried(
        self, student: nn.Module, x: Tensor, sample: Tensor, n: int, conditioning: dict[str, Tensor] | None = None
    ) -> Tensor:
        """The mean loss of states `[m, *shape]` that do not move, the first of n samples, at the samples `[B]`, to see
        whether it can be computed; nothing is kept."""
        N = self.schedule.steps
        states = x.expand(N + 1, *x.shape)
        rolled = unmoved(states, self.solver) if self.needs_roll_out else None
        interval = torch.arange(len(sample), device=x.device) % N
        batch = self._expect_batch(student, BankBatch(states, interval, sample, size=n, conditioning=conditioning))
        call = self._call(student, batch, torch.Generator(), 0.0, rolled)
        return self._losses(self._row.answer(call), batch).loss

    def _expect_rolled_out(self, batch: BankBatch) -> RolledOut | None:
        if not self.needs_roll_out:
            return None
        expected = "the states that `roll_out` was given last"
        expect(not batch.ends, "batch", expected, "the ends of intervals alone")
        if self.rolled_out is None or self.rolled_out.of is not batch.states:
            expect(False, "batch", expected, "others")
        return self.rolled_out

    def _losses(self, answer: Answer | Dense, batch: BankBatch) -> StraightenLosses:
        v, interval, N = answer.v, self.interval_of(batch.interval), self.knots.steps
        factors = [f for f in (answer.weight, batch.weight) if f is not None]
        if self.is_fused and isinstance(answer, Answer):
            return self._fused(answer, interval, factors)
        if not isinstance(self.loss, str) or is_transformed() or torch.compiler.is_compiling():
            each = self.each(v.to(answer.dtype), answer.target())
            weight = self._weight(each, interval, factors, v[:1].numel())
            return StraightenLosses(*means(each, weight, interval, N))

        def losses(part: Tensor, rows: slice) -> Tensor:
            return self.each(part.to(answer.dtype), answer.target(rows))

        def weights(each: Tensor, rows: slice) -> Tensor | None:
            return self._weight(each, interval[rows], [f[rows] for f in factors], v[:1].numel())

        spare = answer.targets if isinstance(answer, Dense) and answer.spare else None
        loss, each = losses_by_rows(v, losses, weights, answer.dtype, spare)
        with torch.no_grad():
            return StraightenLosses(loss, each, means(each, None, interval, N)[2])

    def _fused(self, answer: Answer, interval: Tensor, factors: Sequence[Tensor]) -> StraightenLosses:
        v, pairs, step_sizes, places, columns, _ = answer
        fused = functools.partial(straighten_loss, loss=self.loss, huber_c=self.huber_c)
        known = None
        if _is_one(self.weighting, BY_LOSS):
            with torch.no_grad():
                known = fused(v, pairs, step_sizes, places, columns).per_sample
        weight = self._weight(known, interval, factors, v[:1].numel())
        found = fused(v, pairs, step_sizes, places, columns, weight=weight)
        if places is not interval:  # the op's means are by place
            with torch.no_grad():
                found = StraightenLosses(*found[:2], means(found.per_sample, None, interval, self.knots.steps)[2])
        return found

    def _weight(self, each: Tensor | None, interval: Tensor, factors: Sequence[Tensor], features: int) -> Tensor | None:
        """The factors on the samples' losses, `[B]`."""
        if each is not None and _is(self.weighting, NORMALISED):
            factors = [each.detach().clamp_min(LEAST).reciprocal(), *factors]
        if each is not None and _is(self.weighting, ADAPTIVE):
            factors = [(each.detach() + ADDED / max(features, 1)).reciprocal(), *factors]
        weight = self.tables(interval.device).weight
        if weight is not None:
            factors = [weight[interval], *factors]
        return functools.reduce(torch.mul, factors) if factors else None

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
        """Take the student's own samples, of target="on_policy" by Euler's steps and of "solver" on the solver: before
        the first batch, and once in a while as the student changes. It is evaluated in eval mode, N - 1 times a sample.
        Other targets need none.

        Args:
            student: as for a batch.
            states: the bank's, `[N+1, n, *shape]`: those of the batches that follow. Beside them N + 1 states of all
                samples are kept, of "solver" 3N + 1.
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
            with autocast(self.autocast, states.device):
                self.rolled_out = own_states(student, self.solver, states, chunk, pairs=self.refits)
        finally:
            for part, training in modes.items():
                part.training = training

    def draw(self, n: int, generator: torch.Generator, device: torch.device) -> Tensor | None:
        """u `[n]`, on a device; None where it is 0 everywhere."""
        if _is(self.t_sampling, START):
            return None
        if isinstance(self.t_sampling, str):
            return T_SAMPLINGS[self.t_sampling](uniform(n, generator, device))
        return _expect_u(self.t_sampling(n, generator_on(device, generator)), n).detach().to(device)

    def interval_of(self, interval: Tensor) -> Tensor:
        """The schedule's intervals, 0..N-1, that intervals of the bank are in."""
        return self.tables(interval.device).within[interval] if self._row.between else interval

    def tables(self, device: torch.device) -> Tables:
        if device not in self._tables:
            weight = self.weighting if isinstance(self.weighting, Tensor) else None
            within = torch.tensor(self.within, dtype=torch.int64, device="cpu")
            self._tables[device] = Tables(
                self.times.to(device),
                self.times.diff().to(device),
                None if weight is None else weight.to(device),
                self.knots.times[1:][within].to(device),
                within.to(device),
            )
        return self._tables[device]

    def identity(self) -> dict[str, Any]:
        """What determines it, in plain values, for checkpoints; of functions only that they are some."""
        found = {"loss": _name(self.loss), "huber_c": self.huber_c, "t_sampling": _name(self.t_sampling)}
        found["weighting"] = self.weighting.tolist() if isinstance(self.weighting, Tensor) else self.weighting
        if self.target != "boss":  # of which checkpoints of before there were others say nothing
            found["target"] = self.target
        if self.target == "average_velocity":
            found |= {name: getattr(self, name) for name in ("consistency", "instantaneous")}
        if self._row.between and self.substeps != 4:
            found["substeps"] = self.substeps
        if self.target == "acceleration":
            found["initial_speed"] = self.initial_speed
        if self.target == "noise":
            found["compared"] = self.compared
        if self.refits:
            found["solver"] = [self.solver.coefficients.tolist(), self.solver.model_times.tolist()]
            if not self.solver.keeps_start:
                found["solver"].append(self.solver.start_coefficients.tolist())
        return found

    def extra_repr(self) -> str:
        return f"steps={self.knots.steps}, " + ", ".join(f"{k}={v!r}" for k, v in self.identity().items())

    def _expect_batch(self, student, batch) -> BankBatch:
        whole = isinstance(batch, BankBatch) or (isinstance(batch, tuple) and len(batch) == 3)
        expect(whole, "batch", "a BankBatch, (states, interval, sample)", batch, TypeError)
        batch = BankBatch(*batch)
        if batch.times is not None:
            _expect_knots(batch.times, self.times.tolist())
        self._expect_states(student, batch.states, batch.ends)
        expect_bank(*batch[:3])
        examples, weight = len(batch.interval), batch.weight
        if batch.ends and batch.states.shape[1] != examples:
            expect(False, "states", f"[2, {examples}, *shape], the ends of {examples} intervals", batch.states)
        if weight is not None and (not isinstance(weight, Tensor) or weight.shape != (examples,)):
            expect(False, "weight", f"[{examples}], a factor for each example, or None", weight)
        expect(examples > 0, "interval", "at least one example", batch.interval)
        if batch.conditioning is not None:
            _expect_conditioning(batch.conditioning, examples, batch.guidance)
        elif batch.guidance is not None:
            expect(False, "guidance", "None, or a name of the batch's conditioning", batch.guidance)
        size = batch.states.shape[1] if batch.size is None else expect_positive_int(batch.size, "size")
        if batch.states.is_cpu:  # elsewhere values would have to be waited for
            _expect_inside(batch.interval, len(self.times) - 1, "interval")
            if not batch.ends or batch.size is not None:
                _expect_inside(batch.sample, size, "sample")
            if batch.first and not batch.ends:
                _expect_inside(batch.columns, batch.states.shape[1], "sample - first")
            if weight is not None and not bool((torch.isfinite(weight) & (weight >= 0)).all()):
                expect(False, "weight", "finite factors >= 0", weight)
        return batch

    def _expect_states(self, student, states, ends: bool = False) -> None:
        self.expect_student(student)
        expect_tensor(states, "states", (torch.float32, torch.float64))
        if states.dim() < 3 or len(states) != (2 if ends else len(self.times)):
            knots = [round(t, 4) for t in self.times.tolist()]
            expected = "[2, B, *shape], the ends" if ends else f"[{len(knots)}, n, *shape], at the knots {knots}"
            expect(False, "states", expected, states)


def _expect_inside(index: Tensor, count: int, name: str) -> None:
    least, most = (end.item() for end in index.aminmax())
    if least < 0 or most >= count:
        expect(False, name, f"indices from 0 to {count - 1}", f"{least if least < 0 else most}")


def _expect_conditioning(conditioning, examples: int, guidance) -> None:
    for key, rows in expect_mapping(conditioning, "conditioning").items():
        if not isinstance(rows, Tensor) or rows.dim() == 0 or len(rows) != examples:
            expected = f"a tensor with {examples} rows, one for each example"
            expect(False, f"conditioning[{key!r}]", expected, describe(rows))
    if guidance is not None and not (isinstance(guidance, str) and guidance in conditioning):
        expect(False, "guidance", f"None, or a name of conditioning {sorted(conditioning)}", guidance)


def _is(value, name: str) -> bool:
    return isinstance(value, str) and value == name


def _is_one(value, names: Sequence[str]) -> bool:
    return isinstance(value, str) and value in names


def _name(value) -> str:
    return value if isinstance(value, str) else "function"


def _is_squared(c: float) -> bool:
    """Whether c^2 is a positive number in float32, in which a GPU computes the loss: with Inf nothing is trained."""
    return c > 0 and 1e-38 < c * c < 3e38


def _knots(schedule, row: Target, target: str) -> Schedule:
    expected = "a Schedule, such as cal[4]: a student learns Euler steps (of a solver: target='solver')"
    expect(isinstance(schedule, Schedule), "schedule", expected, schedule, TypeError)
    begins = schedule.times[0].item()
    noise = f"one that begins at 0, with noise, for target={target!r}"
    expect(begins == 0 or not row.from_noise, "schedule", noise, f"one at {begins:.6g}")
    if not row.whole:
        return schedule
    ends = None if schedule.grid is None else (schedule.indices[0], schedule.indices[-1])
    return Schedule(schedule.times[[0, -1]], schedule.grid, ends)


def _expect_knots(times: Sequence[float], wanted: Sequence[float]) -> None:
    """That a batch's intervals are between the loss's knots: with ends alone its states do not tell."""
    if len(times) == len(wanted) and all(abs(a - b) < 1e-9 for a, b in zip(times, wanted, strict=True)):
        return
    mine, others = ([round(t, 6) for t in knots] for knots in (wanted, times))
    expected = f"intervals between {mine}, this loss's knots: bank.sample(n, schedule=loss)"
    expect(False, "batch", expected, f"one between {others}")


def _expect_solver(solver, row: Target, target: str) -> Solver:
    expected = f"a Solver, such as fit_solver(teacher, cal, 4), for target={target!r}"
    expect(isinstance(solver, Solver), "schedule", expected, solver, TypeError)
    expect(solver.reaches_data, "schedule", "a solver from noise to data", solver)
    if row.own:  # step by step
        other = "; target='endpoint' takes any"
        at_knots = torch.equal(solver.model_times, solver.times[:-1])
        expect(at_knots, "schedule", f"a solver of one evaluation a step, at its first knot{other}", solver)
        b = solver.coefficients.diagonal().abs()
        takes_last = bool((b > 1e-6 * b.max()).all())
        expect(takes_last, "schedule", f"a solver each of whose steps takes its last velocity{other}", solver)
    return solver


def _expect_teacher(teacher, row: Target, target: str) -> Velocity | None:
    if teacher is None:
        expect(not row.teacher, "teacher", f"the velocity that target={target!r} evaluates", "None")
        return None
    resolve(teacher, "teacher")  # raises for what is no velocity
    return teacher


def _expect_loss(loss) -> Loss:
    names = one_of(LOSSES)
    if isinstance(loss, str):
        return expect_choice(loss, "loss", tuple(LOSSES))
    expect_takes(loss, "loss", f"{names} or a function (v, target)", None, None)
    return loss


def _expect_weighting(value, steps: int) -> Tensor | None:
    if value is None:
        return None
    expected = f"{steps} finite numbers >= 0 and not all 0, one for each interval, {one_of((*BY_LOSS, None))}"
    if isinstance(value, str):
        expect(False, "weighting", expected, value)
    weight = expect_float64(value, "weighting", expected).float()
    ok = weight.shape == (steps,) and bool((weight >= 0).all() and torch.isfinite(weight).all() and weight.any())
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
