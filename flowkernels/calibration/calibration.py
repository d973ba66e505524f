"""Calibration, what `calibrate` returns."""

import inspect
import json
import math
import numbers
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowkernels._checks import (
    describe,
    expect,
    expect_int,
    expect_list,
    expect_noise,
    expect_path,
    expect_positive_int,
    expect_shown,
)
from flowkernels._files import (
    SUM,
    damaged,
    digest,
    expect_target,
    expect_unchanged,
    read_json,
    sealed,
    warn_of_no_sum,
    whole_file,
)
from flowkernels.calibration.agreed import expect_agreed_fit
from flowkernels.calibration.bellman import least_cost_schedules
from flowkernels.calibration.card import (
    BELLMAN,
    CHOICES,
    EDITED,
    FITTED,
    UNIFORM,
    as_version_3,
    calibration_of,
    expect_version,
    written,
)
from flowkernels.calibration.each import groups_of
from flowkernels.calibration.measured import Measured, evaluating
from flowkernels.calibration.objectives import OBJECTIVES
from flowkernels.calibration.sample_costs import SampleCosts
from flowkernels.calibration.teacher_error import SAMPLES, TeacherError, teacher_error
from flowkernels.calibration.tried import PIPELINE, Tried, plan_hash, table
from flowkernels.ops.cost_from_gram import cost_from_gram
from flowkernels.runtime.ranks import Group, Ranks, by_ranks, ranks_of
from flowkernels.sampling.rollout import Trajectory
from flowkernels.sampling.sample_schedules import SampleSchedules
from flowkernels.sampling.teacher_solver import ENTRY, entry_of
from flowkernels.schedule import Schedule, expect_steps
from flowkernels.solver import Solver
from flowkernels.velocity.identity import warn_if_another
from flowkernels.velocity.protocol import Velocity, resolve
from flowkernels.velocity.provenance import INDIFFERENT

EACH = "groups"  # the keyword of objectives that have a schedule for each
OTHERS = 4  # of what was tried, beside uniform steps, the Bellman schedule and the solver, that may be verified


class Calibration(Measured, Mapping):
    """The schedules of a model, by number of steps: `cal[4]`.

    What was measured is in `Measured`'s attributes, of which the file keeps times, forced_knots, cost, norm_cost,
    provenance and gram (files of before there was a Gram matrix have none), and `kept` and sample_costs are in memory
    only. Beside it there are dicts, all of them in the file, into which a caller may put what is to be kept:

    schedules: {N: Schedule}. solvers: {N: Solver}, the best one that `calibrate` has tried, or what a caller puts in.

    tried: {N: [Tried]}, all that `calibrate` has tried with `effort="fit"` or "best", the best first: each with its
    name, plan, mean squared distance to the teacher's samples with interval, evaluations and seconds. A file keeps all
    of it but the errors of single samples.

    verified: {N: {"uniform": e, "bellman": e, "fitted": e, ..}}, where `calibrate` was given noise to verify on: the
    mean squared distance to the teacher's samples of `choices`. verified_interval: the same of (low, high), the
    bootstrap interval of 95 % of that mean over the noises; of what was verified on one noise, and in files of before
    there were any, nothing.

    verified_as: {N: {"uniform": h, "bellman": h, "fitted": h, ..}}, hashes of what was verified; what is there now may
    be another.

    teacher_error: how far the teacher itself ends from a finer solution, a `TeacherError`, where `measure_teacher` has
    found it; None. No error in `verified` tells of less.

    Examples:
        >>> velocity, noise = (lambda x, t: x * t[:, None] ** 4), torch.randn(64, 2)
        >>> cal = fk.calibrate(velocity, noise, grid=20, steps=[2, 4], progress=False)
        >>> cal.save("model.boss.json")
        >>> fk.Calibration.load("model.boss.json")[4].times.equal(cal[4].times)
        True
    """

    def __init__(
        self,
        times: Tensor,
        cost: Tensor,
        schedules: dict[int, Schedule],
        provenance: dict | None = None,
        gram: Tensor | None = None,
        solvers: dict[int, Solver] | None = None,
        verified: dict[int, dict[str, float]] | None = None,
        verified_as: dict[int, dict[str, str]] | None = None,
        *,
        verified_interval: dict[int, dict[str, tuple[float, float]]] | None = None,
        tried: dict[int, list[Tried]] | None = None,
        teacher_error: TeacherError | None = None,
        norm_cost: Tensor | None = None,
        kept: Trajectory | None = None,
        sample_costs: SampleCosts | None = None,
        forced_knots: Sequence[float] | Tensor = (),
    ):
        provenance = {} if provenance is None else provenance
        rest = dict(norm_cost=norm_cost, kept=kept, sample_costs=sample_costs, forced_knots=forced_knots)
        super().__init__(times, cost, provenance, gram, **rest)
        self.schedules = schedules
        self.solvers = {} if solvers is None else solvers
        self.tried = {} if tried is None else tried
        self.verified = {} if verified is None else verified
        self.verified_as = {} if verified_as is None else verified_as
        self.verified_interval = {} if verified_interval is None else verified_interval
        known = teacher_error is None or isinstance(teacher_error, TeacherError)
        expect(known, "teacher_error", "a TeacherError or None", teacher_error, TypeError)
        self.teacher_error = teacher_error
        tables = dict.fromkeys(("verified", "verified_as", "verified_interval"), Mapping)
        for name, of in {"schedules": Schedule, "solvers": Solver, **tables}.items():
            entries, expected = getattr(self, name), f"a dict from numbers of steps to {of.__name__}s"
            known = isinstance(entries, Mapping) and all(isinstance(v, of) for v in entries.values())
            expect_shown(known, name, expected, entries, TypeError)
            for n in entries:
                expect_int(n, name, expected, 1)
        expected = "a dict from numbers of steps to lists of Tried"
        known = isinstance(self.tried, Mapping) and all(isinstance(v, list) for v in self.tried.values())
        known = known and all(isinstance(c, Tried) for of in self.tried.values() for c in of)
        expect_shown(known, "tried", expected, self.tried, TypeError)

    @classmethod
    def merge(cls, calibrations: Iterable["Calibration"]) -> "Calibration":
        """One calibration from those of parts of the noise, such as of several machines: that of one call with all.

        Args:
            calibrations: of the same velocity, guidance and grid, each of other noise; from files too, which know all
                but the scatter of samples. Where samples have conditioning or prompts of their own, each of the
                velocity of its rows, such as `velocity.rows(slice(32, 64), 64)`.

        Returns:
            Calibration, with schedules of all numbers of steps that one of them has. Costs are those of one call, to
            1e-12 in float64; in float32 to the rounding of the sums, about 1e-7. Intervals need calibrations in memory,
            as does `kept`: the trajectories of the first ones, up to where one does not keep all of its samples.
            Solvers, what was tried, verified errors and the teacher's own are of one part each, and left out:
            `fit_solver` and `measure_teacher` make them anew.

        Raises:
            TypeError, ValueError: naming what differs, or the two whose noise is the same.

        Examples:
            >>> velocity, noise = (lambda x, t: x * t[:, None] ** 4), torch.randn(64, 2)
            >>> parts = [fk.calibrate(velocity, part, 20, [2], progress=False) for part in noise.split(16)]
            >>> fk.Calibration.merge(parts).provenance["n"]
            64
        """
        parts = expect_list(calibrations, "calibrations", "some Calibrations", ordered=False)
        known = len(parts) > 0 and all(isinstance(part, Calibration) for part in parts)
        expected = "some Calibrations, of files what Calibration.load makes of each"
        expect_shown(known, "calibrations", expected, calibrations, TypeError)
        provenance = _merged_provenance([part.provenance for part in parts])
        first, sizes = parts[0], [part.provenance["n"] for part in parts]
        for part in parts:
            expect(torch.equal(part.times, first.times), "calibrations", "one grid", "others")
            expect(part.gram is not None, "calibrations", "Gram matrices", "one without, from an older file")
            same = part.forced_knots == first.forced_knots
            expect(same, "calibrations", f"the same forced knots, {first.forced_knots}", part.forced_knots)
        gram = sum(part.gram * n for part, n in zip(parts, sizes, strict=True)) / sum(sizes)
        norms, in_memory = [part.norm_cost for part in parts], [part.sample_costs for part in parts]
        norm_cost = None
        if all(norm is not None for norm in norms):
            norm_cost = sum(norm * n for norm, n in zip(norms, sizes, strict=True)) / sum(sizes)
        cost = cost_from_gram(gram, first.times, states=first.secants)
        wanted = sorted(set().union(*parts))
        schedules = least_cost_schedules(cost, first.times, wanted, forced_knots=first.forced_knots)
        costs = None
        if all(part is not None for part in in_memory):
            costs = SampleCosts.joined(in_memory)
            schedules = costs.with_intervals(schedules)
        known = dict(kept=_joined_trajectories(parts), sample_costs=costs, forced_knots=first.forced_knots)
        return cls(first.times, cost, schedules, provenance, gram, norm_cost=norm_cost, **known)

    def __getitem__(self, steps: int) -> Schedule:
        known = isinstance(steps, numbers.Integral) and not isinstance(steps, bool) and steps in self.schedules
        if not known:  # KeyError for all of them, which a Mapping's `in` takes for an answer
            got = describe(steps)
            raise KeyError(f"steps: expected one of {sorted(self.schedules)}, got {got}; find({got}) adds it")
        return self.marked(self.schedules[steps])

    def __iter__(self) -> Iterator[int]:
        return iter(self.schedules)

    def __len__(self) -> int:
        return len(self.schedules)

    def marked(self, plan: Schedule | Solver | SampleSchedules) -> Schedule | Solver | SampleSchedules:
        """With the settings of the pipeline that it is for, if there is one, in its notes, where `sample` looks, and
        the teacher's solver, if it is not Euler's, where a bank of the teacher's trajectories does."""
        if PIPELINE in self.provenance:
            plan.notes.setdefault(PIPELINE, self.provenance[PIPELINE])
        if self.secants:
            own = self.provenance[ENTRY] if len(self.forced) == 0 else entry_of(self.teacher_solver)[ENTRY]
            plan.notes.setdefault(ENTRY, own)
        return plan

    @by_ranks
    def find(
        self,
        steps: int | Iterable[int],
        *,
        objective: str = "squared",
        velocity: Velocity | None = None,
        each: bool | Sequence[str | int] | Tensor = False,
        group: Group | None = None,
        **options: Any,
    ) -> dict[int, Schedule] | dict[int, Solver] | dict[int, SampleSchedules]:
        """Schedules or solvers for numbers of steps, by an objective of choice; all of one call from one table. They
        begin where the grid does, and have its forced knots.

        Args:
            steps: the numbers of steps N wanted, each 1..K.
            objective: what is least along the steps: a function of `flowkernels.calibration.objectives` by its name,
                "squared" (BOSS), "norm", "gits", "endpoint", "pairs", "student", "oss", "free" or "uniform". Their
                docstrings say what each is, which options it has and what it costs.
            velocity: the teacher, for objectives that evaluate it (a `FusedSampler`'s own velocity is used).
            each: a schedule for every kept sample in place of one for all: True, each by its own costs, as OSS has it
                (arXiv 2503.21774); or the conditions of the kept samples, such as their prompts or labels, texts or
                integers: one for each condition, of the mean over its samples. By "squared", "norm", "student" and
                "oss", without a group. What is found of a sample's own noise holds for that noise; that of a condition
                for others too, by as much as docs/choosing.md measures.
            group: a `torch.distributed.ProcessGroup` whose processes all make this call, each evaluating its part of
                the samples: `calibrate`.
            options: those of the objective. Of those that evaluate, `samples` (the first ones; 64) and `chunk`, how
                many rows are evaluated at once (all samples; of "student", "oss" and "free" those of several times, up
                to 2.5 MiB of states).

        Returns:
            {N: Schedule} or, of "pairs", "oss" and "free", {N: Solver}; with `each` {N: SampleSchedules}. Those of
            other objectives than "squared" say in their `notes` the objective, its evaluations of each sample, and of
            solvers the cost; a Schedule's cost is in terms of its objective. The schedules of "squared" for all samples
            are added to this calibration's.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        wanted = expect_steps(steps, len(self.times) - 1, len(self.forced))
        known = isinstance(objective, str) and objective in OBJECTIVES
        expect(known, "objective", f"one of {list(OBJECTIVES)}", objective)
        make = OBJECTIVES[objective]
        allowed = list(inspect.signature(make).parameters)[2:]
        has_each = EACH in allowed
        allowed = [option for option in allowed if option != EACH]
        unknown, expected = sorted(set(options) - set(allowed)), f"of {allowed}" if allowed else "none"
        expect(not unknown, "options", f"{expected} for {objective!r}", f"{unknown}", TypeError)
        if "velocity" in allowed:
            options["velocity"] = velocity
        if each is not False:
            able = [name for name, of in OBJECTIVES.items() if EACH in inspect.signature(of).parameters]
            expect(has_each, "objective", f"one of {able} for a schedule for each sample", objective)
            expect(group is None, "group", "None for a schedule for each sample", group)
            options[EACH] = groups = groups_of(each, self)
            if "samples" in allowed:
                options.setdefault("samples", len(groups.of))
        ranks = ranks_of(group)
        if velocity is not None and not isinstance(group, Ranks):
            expect_agreed_fit(
                ranks, velocity, self, None, None, steps=wanted, objective=objective, options=str(options)
            )
        token = evaluating.set(ranks)
        try:
            plans = make(self, wanted, **options)
        finally:
            evaluating.reset(token)
        plans = ranks.from_first(plans)
        for plan in plans.values():
            for times in plan.times if isinstance(plan, SampleSchedules) else [plan.times]:
                self.expect_forced(times, "objective")
        if objective == "squared" and each is False:
            self.schedules.update(plans)
        return {n: self.marked(plan) for n, plan in plans.items()}

    @by_ranks
    def measure_teacher(
        self,
        velocity: Velocity,
        *,
        samples: int = SAMPLES,
        noise: Tensor | None = None,
        chunk: int | None = None,
        group: Group | None = None,
    ) -> TeacherError:
        """The teacher's own error at t = 1, which is a floor under every error measured against it; `teacher_error`
        from then on, and in the file.

        Args:
            velocity: the teacher (a `FusedSampler`'s own velocity is used).
            samples: of how many of the first kept ones, or of `noise`. A few of them may have most of the error: of 16
                digits it was 0.046 (root mean square), of 128 it was 0.225.
            noise: `[n, *shape]`, for a calibration that keeps no trajectories: the teacher is rolled out on it anew.
            chunk: samples evaluated at once; None evaluates all.
            group: a `torch.distributed.ProcessGroup` whose processes all make this call, each evaluating its part of
                the samples: `calibrate`.

        Returns:
            TeacherError. By Euler's steps the distance to Heun's method on the same grid, 2K evaluations a sample;
            else to Heun's on a grid of half its steps, 4K. Of "heun" itself a solution of twice the steps tells how
            fast these converge (K more, of a grid that can be halved), by which the distance is extrapolated.

        Raises:
            TypeError, ValueError: naming the argument.

        Source: Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, chapter II.4 (Richardson).

        Examples:
            >>> velocity, noise = (lambda x, t: x * t[:, None] ** 4), torch.randn(64, 2)
            >>> cal = fk.calibrate(velocity, noise, 20, [2], teacher_solver="heun", progress=False)
            >>> cal.measure_teacher(velocity).error < 1e-4
            True
        """
        velocity, kept, known = resolve(velocity).unfused(), self.kept, self.provenance
        samples = expect_positive_int(samples, "samples")
        chunk = None if chunk is None else expect_positive_int(chunk, "chunk")
        if noise is None:
            wanted = "one that keeps trajectories (noise= rolls the teacher out anew)"
            expect(kept is not None, "calibration", wanted, "one that keeps none")
            start, ends = kept.x[0, :samples], kept.x[-1, :samples]
            total = known.get("n_given", known.get("n", kept.x.shape[1]))
        else:
            shape = known.get("shape", list(expect_noise(noise).shape[1:]))
            expect(list(noise.shape[1:]) == shape, "noise", f"samples of the calibration's shape {shape}", noise)
            start, ends, total = noise[:samples], None, len(noise)
        warn_if_another(velocity, known, stacklevel=5)
        ranks = ranks_of(group)
        expect_agreed_fit(ranks, velocity, self, noise, chunk, samples=samples)
        self.teacher_error = teacher_error(self, velocity, start, total, chunk, ends, ranks)
        return self.teacher_error

    def choices(self, steps: int) -> dict[str, Schedule | Solver]:
        """What there is for N steps, by its name in `verified`: the uniform schedule (from the grid's first time, with
        the forced knots), the Bellman schedule, the solver, "fitted", and the best of what else was tried; KeyError
        where there is no other than the uniform one."""
        known = {UNIFORM: self.uniform(steps)}
        if steps in self.schedules or steps not in self.solvers:
            known[BELLMAN] = self[steps]
        solver, others = self.solvers.get(steps), 0
        own = None if solver is None else plan_hash(solver)  # of a file they are not the same object
        for c in self.tried.get(steps, ()):
            if c.failed is None and c.name not in known and plan_hash(c.plan) != own and others < OTHERS:
                known[c.name], others = c.plan, others + 1
        if solver is not None:
            known[FITTED] = solver
        return {name: self.marked(plan) for name, plan in known.items()}

    def uniform(self, steps: int) -> Schedule:
        """N equal steps from the grid's first time, on no grid; with forced knots, equal between these."""
        return Schedule.uniform(steps, max(0.0, self.times[0].item()), self.forced_knots)

    def add_verified(
        self,
        errors: dict[int, dict[str, float]],
        intervals: dict[int, dict[str, tuple[float, float] | None]] | None = None,
    ) -> None:
        """Put endpoint errors of `choices` into `verified`, their intervals beside them (None of those that have none),
        and what it is that they are of."""
        for steps, of in errors.items():
            self.verified[steps] = of
            self.verified_as[steps] = _hashes_of(self.choices(steps))
            known = {name: ends for name, ends in (intervals or {}).get(steps, {}).items() if ends is not None}
            self.verified_interval.pop(steps, None)  # of former errors
            if known:
                self.verified_interval[steps] = known

    def best(self, steps: int) -> Schedule | Solver:
        """Of `choices`, what has the least verified error: those that are what was verified, and not put in its place
        since.

        Where nothing was verified, the best of what was tried (`tried`); where nothing was tried, or another solver was
        put into `solvers` since, that solver, else the Bellman schedule. KeyError for a number of steps that there is
        nothing for, which `cal.solvers[N] = fk.fit_solver(velocity, cal, N)` makes from the kept samples.
        """
        if steps not in self.schedules and steps not in self.solvers:
            there, got = sorted({*self.schedules, *self.solvers}), describe(steps)
            made = f"; cal.solvers[{got}] = fk.fit_solver(velocity, cal, {got}) makes it, find({got}) a schedule"
            possible = isinstance(steps, numbers.Integral) and not isinstance(steps, bool) and steps > 0
            raise KeyError(f"steps: expected one of {there}, got {got}{made if possible else ''}")
        return self.choices(steps)[self._best(steps)]

    def best_schedule(self, steps: int) -> Schedule:
        """Of the schedules among `choices` the one of least verified error, for samplers that make Euler's steps alone;
        where none was verified, the last one: the Bellman schedule, or the best that was tried. KeyError as `choices`.
        """
        errors = self.errors(steps)
        schedules = {name: of for name, of in self.choices(steps).items() if isinstance(of, Schedule)}
        return schedules[min(reversed(schedules), key=lambda name: errors.get(name, math.inf))]

    def _best(self, steps: int) -> str:
        known, errors = self.choices(steps), self.errors(steps)
        tried = [c for c in self.tried.get(steps, ()) if c.failed is None]
        if tried and not errors:
            now = _hashes_of(known)
            then = [plan_hash(c.plan) for c in tried]
            if FITTED not in now or now[FITTED] in then:  # no other was put there
                best = [name for name in known if now[name] == then[0]]
                if best:
                    return best[0]
        # the last of them where errors are equal or unknown
        return min(reversed(known), key=lambda name: errors.get(name, math.inf))

    def errors(self, steps: int) -> dict[str, float]:
        """The verified errors of `choices` that are still what was verified, by name; KeyError as `choices`."""
        now, then = _hashes_of(self.choices(steps)), self.verified_as.get(steps, {})
        verified = {name: e for name, e in self.verified.get(steps, {}).items() if e == e}  # no NaN
        of = {then[name]: e for name, e in verified.items() if name in then}  # another solver may be "fitted" by now
        own = {name for name, plan in now.items() if name in verified and then.get(name) == plan}  # of equal plans too
        known = {name: verified[name] if name in own else of.get(plan) for name, plan in now.items()}
        if known.get(UNIFORM) is None and UNIFORM in verified:
            known[UNIFORM] = verified[UNIFORM]
        return {name: e for name, e in known.items() if e is not None}

    def report(self) -> str:
        """A table of all that was tried, for each N the best first: the root mean square of the distance to the
        teacher's samples, of samples that a plan was not fitted to, with its interval of 95 %, what it took in
        evaluations of single samples and in seconds, and "*" at `best`. Where the samples do not decide between the
        best and the next, a line says so, and about how many would."""
        if not self.tried:
            return f'nothing was tried: calibrate(..., effort="fit" or "best") does\n\n{self}'
        effort, seconds = self.provenance.get("effort"), sum(c.seconds for of in self.tried.values() for c in of)
        head = [f"tried, by samples that they were not fitted to, in {seconds:.1f} s"]
        if isinstance(effort, dict) and {"level", "samples", "evaluations"} <= effort.keys():
            made, n = effort["evaluations"], effort["samples"]
            head = [f"effort {effort['level']}: {n:,} samples, {made:,} evaluations of single ones with the rollout's"]
            head += [f"a teacher of {len(self.times) - 1} steps; what was tried took {seconds:.1f} s"]
            head += [f"skipped: {what} ({why})" for what, why in effort.get("skipped", {}).items()]
        head += [self._told_of_teacher(root=True)]
        return "\n".join([*head, "", *table(self.tried, {n: self._best_tried(n) for n in self.tried})])

    def _best_tried(self, steps: int) -> str | None:
        """The name, in `tried`, of `best`."""
        if steps not in self.schedules and steps not in self.solvers:  # a caller may take them out
            return None
        best = plan_hash(self.best(steps))
        return next((c.name for c in self.tried[steps] if c.failed is None and plan_hash(c.plan) == best), None)

    def __repr__(self) -> str:
        K, steps = len(self.times) - 1, ", ".join(map(str, sorted(self.schedules)))
        return f"Calibration(K={K}, n={self.provenance.get('n')}, schedules of {steps} steps)"

    def __str__(self) -> str:
        lines = [f"{'N':>3} {'cost':>11} {'95 % interval':>19} {'needed':>7} {'uniform':>11} {'ratio':>6}  knots"]
        for n, s in sorted(self.schedules.items()):
            knots = " ".join(f"{t:.3g}" for t in s.times)
            interval = "-" if s.cost_interval is None else f"{s.cost_interval[0]:.3g}..{s.cost_interval[1]:.3g}"
            figures = [math.nan if c is None else c for c in (s.cost, s.uniform_cost, s.ratio)]
            needed = "-" if s.samples_needed is None else s.samples_needed
            lines.append(
                f"{n:>3} {figures[0]:>11.4g} {interval:>19} {needed:>7} {figures[1]:>11.4g} {figures[2]:>6.3f}  {knots}"
            )
        if unmeasured := sorted(set(self.solvers) - set(self.verified) - set(self.tried)):
            lines += ["", f"a solver for N = {', '.join(map(str, unmeasured))}, not verified: cal.best(N)"]
        if self.tried:
            lines += ["", f"{'N':>3} {'rms':>9}  {'tried':>5}  best of what was tried, by cross-validation"]
        for n, of in sorted(self.tried.items()):
            c = next((c for c in of if c.failed is None), None)
            rms, name = ("-", "-") if c is None else (f"{c.error**0.5:.4g}", c.name)
            tell = "" if c is None or c.decided else ", undecided"
            lines.append(f"{n:>3} {rms:>9}  {len(of):>5}  {name}{tell}")
        if self.verified:
            names = "".join(f"{name:>32}" for name in CHOICES)
            lines += ["", f"{'N':>3} {names}  best of the verified endpoint errors (mean squared)"]
        for n, errors in sorted(self.verified.items()):
            cells = "".join(f"{self._verified_cell(n, name, errors):>32}" for name in CHOICES)
            known = n in self.schedules or n in self.solvers  # a caller may take schedules out
            lines.append(f"{n:>3} {cells}  {self._best(n) if known else '-'}")
        if self.verified or self.teacher_error is not None:
            lines += ["", self._told_of_teacher(root=not self.verified and bool(self.tried))]  # as the table above it
        return "\n".join(lines)

    def _told_of_teacher(self, root: bool = False) -> str:
        told = "not measured (cal.measure_teacher)" if self.teacher_error is None else self.teacher_error.told(root)
        return f"the teacher's own error ({self.teacher_solver.name}, K = {len(self.times) - 1}): {told}"

    def _verified_cell(self, n: int, name: str, errors: Mapping[str, float]) -> str:
        interval = self.verified_interval.get(n, {}).get(name)
        between = "" if interval is None else " ({:.3g}..{:.3g})".format(*interval)
        return f"{errors[name]:.4g}{between}" if name in errors else "-"

    def save(self, path: str | Path) -> None:
        """Write the card, a JSON file with its SHA-256 (docs/card.md): whole or not at all, and nothing that `load`
        would refuse.

        In provenance and notes, arrays become lists, and numbers that are not finite become texts. TypeError for what
        JSON cannot hold.
        """
        expect_target(path)
        for n, solver in self.solvers.items():  # a caller may put in anything
            expect(isinstance(n, numbers.Integral), "solvers", "numbers of steps as keys", n, TypeError)
            expect(isinstance(solver, Solver), f"solvers[{n}]", "a Solver", solver, TypeError)
        data = written(self, {n: self._best(n) for n in sorted({*self.schedules, *self.solvers})})
        calibration_of(type(self), data)
        text = json.dumps(sealed(data), indent=1)
        with whole_file(path) as partial:
            partial.write_text(text)

    @classmethod
    def load(cls, path: str | Path, velocity: Velocity | None = None) -> "Calibration":
        """Read a calibration written by `Calibration.save`.

        Args:
            path: the file. One without a checksum, as earlier versions wrote them, is read with a warning, and so is
                one that was edited on purpose, once its entry "sha256" is taken out.
            velocity: the model it is to be used with; a warning says so if it was made for another one.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if the file is truncated, was changed since it was written, or is something else.
        """
        path, wanted = expect_path(path, "path"), "a whole calibration file"
        velocity = None if velocity is None else resolve(velocity)
        data = read_json(path, "path", wanted)
        version = expect_version(data, path)
        with damaged("path", wanted, path):
            found = digest(data)
            if SUM in data:
                expect_unchanged(data[SUM], found, EDITED)
            cal = calibration_of(cls, data if version == 3 else as_version_3(data))
            if version == 1 and "verified_as" not in data:  # as files once were: what is there is what was verified
                cal.add_verified({n: of for n, of in cal.verified.items() if n in {*cal.schedules, *cal.solvers}})
        if SUM not in data:
            warn_of_no_sum(path)
        if velocity is not None and (differs := velocity.identify().differences(cal.provenance)):
            warnings.warn(
                f"velocity: expected the model that {path} was made for, got another one ({', '.join(differs)}); its "
                "schedules may not be the best for it",
                UserWarning,
                stacklevel=2,
            )
        return cal


OF_A_PART = ("n", "n_given", "seed", "noise_sha256", "max_regret", "stopped", "effort", "versions", "device", "unknown")
OF_A_PART += ("parts",)
OF_ROWS = ("conditioning", "unconditional")  # hashes, of each part's own rows perhaps


def _merged_provenance(parts: list[dict]) -> dict:
    """What they share, their sum, and what each has of its own, as "parts". ValueError where they are not of one
    velocity, or two of the same noise."""
    found, noises = dict(parts[0]), [_noises(p) for p in parts]
    for key in sorted(set().union(*parts) - {*OF_A_PART, *OF_ROWS}):
        values = [p.get(key) for p in parts]
        if key == "attributes_sha256":  # None where it counts its calls, say
            values = [value for value in values if value is not None] or [None]
        if key == PIPELINE and None not in values:  # each part may be of other prompts
            common = [k for k in values[0] if k not in INDIFFERENT or all(v.get(k) == values[0][k] for v in values)]
            values = [{k: v for k, v in value.items() if k in common or k not in INDIFFERENT} for value in values]
        for value in values:
            expect(value == values[0], "calibrations", f"the same {key} in all, {describe(values[0])}", value)
        found[key] = values[0] if len(values) == len(parts) else None
    for i, noise in enumerate(noises):
        expect_int(parts[i].get("n"), "calibrations", "numbers of samples in provenance['n']", 1)
        same = [j for j in range(i) if noise & noises[j]]
        expect(not same, "calibrations", "other noise in each", f"numbers {min(same, default=i)} and {i} of the same")
    for key in OF_ROWS:
        hashes = [p.get(key) or {} for p in parts]
        found[key] = {name: h if all(of.get(name) == h for of in hashes) else None for name, h in hashes[0].items()}
    own = [{key: p[key] for key in (*OF_A_PART, *OF_ROWS) if key in p} for p in parts]
    found = {key: value for key, value in found.items() if key not in OF_A_PART}
    found |= {key: parts[0][key] for key in ("versions", "unknown") if key in parts[0]}
    return found | {"n": sum(p["n"] for p in parts), "seed": None, "noise_sha256": None, "parts": own}


def _noises(provenance: dict) -> set[str]:
    """The hashes of its noise, of a merged one those of its parts."""
    own = {provenance.get("noise_sha256")} - {None}
    return own.union(*map(_noises, provenance.get("parts", ())))


def _joined_trajectories(parts: list[Calibration]) -> Trajectory | None:
    """Those kept of the first samples of all, which end where a part does not keep all of its own."""
    kept = []
    for part in parts:
        if part.kept is None or (kept and part.kept.v.dtype != kept[0].v.dtype):
            break
        kept.append(part.kept)
        if part.kept.x.shape[1] < part.provenance.get("n_given", part.provenance["n"]):
            break
    if not kept:
        return None
    x, v = (torch.cat([getattr(k, name).to(kept[0].x.device) for k in kept], 1) for name in "xv")
    return Trajectory(parts[0].times, x, v)


def _hashes_of(plans: dict[str, Schedule | Solver]) -> dict[str, str]:
    return {name: plan_hash(plan) for name, plan in plans.items()}
