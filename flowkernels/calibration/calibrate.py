"""Calibrate: roll out, step costs and schedules in one streamed call."""

import contextlib
import itertools
import numbers
import platform
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from flowkernels._checks import (
    expect,
    expect_bool,
    expect_choice,
    expect_int,
    expect_noise,
    expect_positive_int,
    expect_real,
    expect_room,
    expect_seed,
    expect_times,
)
from flowkernels._files import expect_target, plain
from flowkernels._guidance import told
from flowkernels._version import __version__
from flowkernels._warnings import held_warnings, warn
from flowkernels.calibration.agreed import expect_agreed
from flowkernels.calibration.bellman import least_cost_schedules
from flowkernels.calibration.calibration import BELLMAN, FITTED, UNIFORM, Calibration
from flowkernels.calibration.effort import BEST, EFFORTS, SCHEDULE, Budget, try_plans
from flowkernels.calibration.progress import Progress
from flowkernels.calibration.sample_costs import SampleCosts, group_size
from flowkernels.calibration.teacher_error import SAMPLES as OWN_SAMPLES
from flowkernels.calibration.teacher_error import price_of
from flowkernels.calibration.teacher_error import teacher_error as measured_teacher_error
from flowkernels.calibration.tried import FAILURES
from flowkernels.evaluation.bootstrap import mean_interval
from flowkernels.evaluation.endpoint import endpoint_error, endpoint_errors
from flowkernels.ops.library import fresh
from flowkernels.runtime.ranks import Group, Ranks, by_ranks, ranks_of
from flowkernels.sampling.loop import initial_state
from flowkernels.sampling.rollout import Trajectory
from flowkernels.sampling.sample import sample
from flowkernels.sampling.teacher import Teacher
from flowkernels.sampling.teacher_solver import EULER, HEUN, KnotStates, entry_of, expect_teacher_solver
from flowkernels.schedule import expect_steps, first_from, forced_places
from flowkernels.solver import Solver
from flowkernels.velocity.evaluate import TRAINING, warn_if_training
from flowkernels.velocity.protocol import Velocity, VelocityBase, resolve, rows_of_samples
from flowkernels.velocity.provenance import hash_of

CHUNK_BYTES = 256 << 20  # velocities of one chunk of samples
KEEP_BYTES = 512 << 20  # states and velocities that stay


@by_ranks
def calibrate(
    velocity: Velocity,
    noise: Tensor,
    grid: int | Sequence[float] | Tensor = 100,
    steps: int | Iterable[int] = range(1, 11),
    *,
    max_regret: float | None = None,
    teacher_solver: str | Solver = EULER,
    teacher_error: int | None = None,
    verify_noise: Tensor | None = None,
    effort: str = "schedule",
    evaluations: int | None = None,
    minutes: float | None = None,
    forced_knots: Sequence[float] | Tensor | None = None,
    keep_bytes: int = KEEP_BYTES,
    chunk: int | None = None,
    checkpoint: str | Path | None = None,
    resume: bool = True,
    progress: bool = True,
    seed: int | None = None,
    group: Group | None = None,
) -> Calibration:
    """The schedule of least cost for each number of steps: roll out, step costs and Bellman, streamed in chunks.

    Args:
        velocity: callable `velocity(x, t)` with x `[n, *shape]`, t `[n]`, a `VelocityField` or a `FusedSampler`; the
            teacher.
        noise: `[n, *shape]`, as many samples as wanted; a few hundred settle most schedules.
        grid: K for K uniform fine steps, or K+1 increasing times, from 0 or later to 1. Costs K evaluations a sample
            (`teacher_solver`). `noise` is the state at its first time, where every schedule begins.
        steps: the numbers of steps N wanted, each 1..K.
        max_regret: a share, such as 0.02: stop as soon as no chosen schedule costs more than that above the least cost
            in 95 % of bootstrap resamples of the samples so far, looked at from 32 samples on whenever they are half
            as many again; `noise` is then the most that is used. None uses all of it, which a fit may want: schedules
            settle first.
        teacher_solver: the teacher's steps on the grid.
            "euler": K evaluations of a sample.
            "heun": Heun's method, of the second order: 2K, so that K = 50 costs what Euler's steps cost at K = 100. Its
            steps to t = 1 and to forced knots are the midpoint method's, which evaluates at neither.
            A Solver from noise to data whose `times` are the grid, such as `fk.Solver.adams_bashforth(grid, 2)` (K): as
            many as it makes, and one more for each knot whose velocity it does without.
            Costs, schedules, fits and endpoint errors are of its states at the knots, and the velocities there.
        teacher_error: of how many of the first samples to measure how far the teacher itself ends from a finer solution
            (`Calibration.measure_teacher`), a floor under all errors: 2K evaluations of each of Euler's steps, 4K or 5K
            of others. 0 measures nothing. None is 0, and with `effort="best"` 64, or fewer where these would take more
            than a twentieth of a budget.
        verify_noise: other noise, `[m, *shape]`: the endpoint errors to the teacher on it are `verified`, and a warning
            names the numbers of steps for which something is worse than uniform steps. K evaluations of each of its
            samples, and N for every N and each of its `choices`: 2 with `effort="schedule"`, up to 7. Conditioning with
            one row a sample gives it the first m rows, of which there are no more than of `noise`.
        effort: what is done for each N.
            "schedule": the schedule of least cost; nothing is evaluated but the rollout.
            "fit": solvers too, on the samples that are kept, which are to be two or more: uniform steps, the Bellman
            schedule, Adams-Bashforth 2 on both and a fit, each judged by samples that it was not fitted to. At most 2 N
            evaluations of each sample more.
            "best": a budget is spent on what pays: stock samplers, fits on the knots of several objectives, with x_0's
            coefficient free and not, and joint refinements of times and coefficients from the best of them and from
            those of the next smaller and larger N; of a short one fits take two fifths at first. What was tried is in
            `tried` and `report()`, `best(N)` is the best. Ctrl-C ends it with what there is.
        evaluations: the budget of "best": as many of single samples in all, the rollout's with them; None is what all
            fits and three refinements of each N take (six of N <= 4), for N = 8 about 3,000 of each sample. Those of
            "fit" are made in any case. Nothing is begun that would take more. The budget is said before it is spent.
        minutes: the budget as time, from the call on: nothing is begun that would not end by then, as far as the
            rollout, and what of its kind was done before, tell; with `evaluations` the first of both that is spent.
        forced_knots: times of the grid that every schedule has as knots, as no step may span them: such as where a
            pipeline changes from one network to another. None takes the velocity's own (`VelocityBase.forced_knots`),
            or the first times of the grid after them.
            A schedule has one step more than forced knots, or more. Solvers may use velocities of before one.
        keep_bytes: of the teacher's trajectory, states and velocities of the first samples, that stay in memory as
            `kept`, for objectives and fits that need them; 0 keeps none.
        chunk: samples rolled out at once; None chooses so that their velocities take at most 256 MiB.
        checkpoint: file that keeps what has been done so far: costs, kept trajectories, solvers and endpoint errors. It
            is written after the first chunk, then as often as takes 5 % of the time at most, and when the work is
            interrupted by an error or Ctrl-C; it stays when all is done.
        resume: go on from `checkpoint` if it exists: the result is that of an uninterrupted run, bit for bit where the
            network gives the same twice. One of another velocity, noise, grid, chunk or autocast raises; an edited
            network of equal weights, and what has no hash (a plain function, guidance by one that holds values), warn.
            False starts anew.
        progress: show a progress bar.
        seed: the seed that `noise` was made with, for the provenance.
        group: a `torch.distributed.ProcessGroup`, such as `torch.distributed.group.WORLD`, whose processes all make
            this call with the same arguments and a whole velocity each: every one evaluates its part of the samples,
            and returns the same, bit for bit. What differs between them is an error before any work, as far as there
            are hashes. The first one writes `checkpoint`, warns and shows progress; another number of processes may go
            on from that file. The budget is of all together.

    Returns:
        Calibration. No schedule costs more than the uniform one on the same grid; `best(N)` is what to use.

    Raises:
        TypeError, ValueError: naming the argument; for NaN or Inf, the sample and the step.
        TimeoutError, ConnectionError: where a process of the group has not come within its timeout, or has ended or
            raised an error: which one. Files are as they were, or the last checkpoint.

    Examples:
        >>> noise = torch.randn(64, 2)
        >>> cal = fk.calibrate(lambda x, t: x * t[:, None] ** 4, noise, grid=20, steps=[2, 4], progress=False)
        >>> cal[2].steps, bool(cal[2].cost < cal[2].uniform_cost)
        (2, True)
    """
    given, ranks = resolve(velocity), ranks_of(group)
    times = expect_times(grid, "grid")
    expect_noise(noise)
    K, n = len(times) - 1, len(noise)
    if forced_knots is None:
        forced_knots = first_from(given.unfused().forced_knots, times)
    forced = forced_places(forced_knots, times)
    forced_knots = times[list(forced)]
    wanted = expect_steps(steps, K, len(forced))
    solver = expect_teacher_solver(teacher_solver, times, forced)
    if chunk is None:
        rows = K if solver.is_euler else 2 * solver.evaluations  # states beside the velocities, all of a fused sampler
        chunk = max(1, min(n, CHUNK_BYTES // (rows * noise[0].numel() * 4)))
    expect_positive_int(chunk, "chunk")
    expect_room(32 * K**2, "grid", "step costs", f"{K} steps")
    integer = isinstance(keep_bytes, numbers.Integral) and not isinstance(keep_bytes, bool)
    expect(integer, "keep_bytes", "a number of bytes", keep_bytes, TypeError)
    expect(keep_bytes >= 0, "keep_bytes", "at least 0", keep_bytes)
    if max_regret is not None:
        max_regret = expect_real(max_regret, "max_regret", "a positive share, such as 0.02", lambda a: a > 0)
    if asked := teacher_error is not None:
        teacher_error = expect_int(teacher_error, "teacher_error", "a number of samples, or 0", 0)
    progress, resume = (expect_bool(b, k) for b, k in ((progress, "progress"), (resume, "resume")))
    progress = progress and ranks.is_first
    expect_choice(effort, "effort", EFFORTS)
    for name, value in (("evaluations", evaluations), ("minutes", minutes)):
        expect(value is None or effort == BEST, name, f"None, except with effort={BEST!r}", value)
    if minutes is not None:
        minutes = expect_real(minutes, "minutes", "a positive number of minutes", lambda m: m > 0)
    path = None if checkpoint is None or not ranks.is_first else expect_target(checkpoint, "checkpoint")
    seed = None if seed is None else expect_seed(seed)
    if verify_noise is not None:
        _expect_other_noise(verify_noise, noise, given)
    teacher = Teacher(given, n, solver=solver)
    velocity = teacher.velocity
    warn_if_training(velocity)

    expect_agreed(
        *(ranks, velocity),
        **dict(noise=noise, verify_noise=verify_noise, grid=times, steps=wanted, forced_knots=forced_knots),
        **dict(teacher_solver=solver, max_regret=max_regret, teacher_error=teacher_error, effort=effort, chunk=chunk),
        **dict(evaluations=evaluations, minutes=minutes, keep_bytes=keep_bytes, resume=resume, seed=seed),
        checkpoint=checkpoint is not None,
        sampler_weights=None if teacher.fused is None else str(teacher.fused.weights),
    )
    provenance = _provenance(velocity, noise, K, seed) | entry_of(solver, teacher_solver)
    rolled_out = _Trajectories(teacher, noise, keep_bytes, ranks)
    too_few, wanted_kept = "keep_bytes" if n > 1 else "noise", f"two samples whose trajectories are kept, for {effort}"
    expect(rolled_out.most > 1 or effort == SCHEDULE, too_few, wanted_kept, f"{rolled_out.most}")
    own, kept = price_of(solver, teacher_solver == HEUN, forced), rolled_out.most
    least = n * rolled_out.evaluations + 2 * sum(wanted) * kept + own * min(teacher_error or 0, kept)
    if evaluations is not None:
        whole = f"at least {least:,}, of all samples together: the rollout and what 'fit' tries"
        expect_int(evaluations, "evaluations", whole, least)
    if teacher_error is None:
        few = OWN_SAMPLES if evaluations is None else min(OWN_SAMPLES, (evaluations - least) // (20 * own))
        teacher_error = min(few, kept) if effort == BEST else 0
    budget = Budget.of(evaluations, minutes, ranks)
    size, euler = group_size(n) if max_regret is None else 1, solver.is_euler
    samples = SampleCosts(times, size, device=noise.device, secants=not euler)
    looks = [] if max_regret is None else _looks(n)
    setting = {k: v for k, v in provenance.items() if k not in ("attributes_sha256", "seed", "device", "versions")}
    setting |= {"times": times, "chunk": chunk, "kept": rolled_out.most, "max_regret": max_regret}
    setting |= {} if max_regret is None else {"steps": wanted, "forced_knots": forced_knots}  # when it stops
    setting |= {"fused": teacher.fused is not None and str(teacher.fused.weights)}
    if torch.is_autocast_enabled(noise.device.type):  # files of before are without it
        setting |= {"autocast": str(torch.get_autocast_dtype(noise.device.type))}
    attributes = provenance["attributes_sha256"]
    if attributes is not None and path is not None:  # and the names of hooks and of what else has no hash
        attributes = " ".join([attributes, *velocity.identify(weights=False).unread])
    done = Progress(path, setting, attributes, {"forced_knots": forced_knots.tolist()}, ranks)
    if ranks.from_first(resume and path is not None and path.exists()):
        rolled_out.restore(done.load(samples, rolled_out.x))
    parts = list(_parts(n, chunk, [rolled_out.most, *looks]))
    expect(any(done.samples == stop for _, stop in [(0, 0), *parts]), "checkpoint", "whole chunks", done.samples)
    took = 0.0
    with (
        done.kept(),
        tqdm(
            total=len(parts) * rolled_out.evaluations, desc="calibrate", disable=not progress, leave=False, unit="eval"
        ) as bar,
    ):
        for start, stop in parts:
            if stop > done.samples:
                begun = time.perf_counter()
                grams, pieces, dtype = rolled_out.grams(samples, start, stop, bar)
                took = (time.perf_counter() - begun) / (stop - start) / rolled_out.evaluations
                with done.changes():
                    samples.add(grams, pieces)
                    done.add_samples(samples, rolled_out.kept_so_far(), dtype)
            else:
                bar.update(rolled_out.evaluations)
            if stop in looks and stop >= done.samples:
                schedules = least_cost_schedules(samples.cost(), times, wanted, forced_knots=forced_knots)
                if stable := ranks.from_first(max(samples.regrets(schedules, forced).values()) <= max_regret):
                    break
    cost = samples.cost()
    provenance |= {"velocity_dtype": done.velocity_dtype}
    if velocity.identify(weights=False).attributes != provenance["attributes_sha256"]:
        provenance["attributes_sha256"] = None  # it counts its calls, say, or keeps what it has computed
    if teacher.fused is not None:
        provenance["sampler_weights"] = str(teacher.fused.weights)
    if max_regret is not None:
        reason = "schedules stable" if stable else "all samples used"
        provenance |= {"n": stop, "n_given": n, "max_regret": max_regret, "stopped": reason}
    found = samples.with_intervals(least_cost_schedules(cost, times, wanted, forced_knots=forced_knots))
    cost, found, gram = ranks.from_first((cost.cpu(), found, samples.gram.cpu()))
    cal = Calibration(
        times,
        cost,
        found,
        provenance,
        gram,
        kept=rolled_out.kept(stop),
        sample_costs=samples,
        forced_knots=forced_knots,
    )
    if not asked and not budget.in_time(20 * own * teacher_error, took):
        teacher_error = 0
    with done.kept(), _warnings_once():
        if teacher_error:
            ends, first = None if cal.kept is None else cal.kept.x[-1, :teacher_error], noise[:teacher_error]
            first = first if ends is None else first[: len(ends)]
            try:
                cal.teacher_error = measured_teacher_error(cal, velocity, first, n, chunk, ends, ranks)
            except FAILURES:  # at times between those of the grid
                if asked:
                    raise
        if effort != SCHEDULE:
            spent = rolled_out.evaluations * stop
            spent += own * len(first) if teacher_error else 0
            try_plans(given, cal, wanted, effort, chunk, done, progress, budget, spent, took)
        if verify_noise is not None:
            _verify(cal, given, verify_noise, wanted, chunk, n, done, ranks)
    return cal


def _looks(n: int) -> list[int]:
    """Numbers of samples after which to look whether the schedules are stable: 32, half as many again, .., all n."""
    found = [32]
    while found[-1] < n:
        found.append(found[-1] * 3 // 2)
    return [*found[:-1], n]


def _expect_other_noise(verify_noise: Tensor, noise: Tensor, velocity: VelocityBase) -> None:
    expect_noise(verify_noise, "verify_noise")
    same = verify_noise.shape[1:] == noise.shape[1:] and verify_noise.device == noise.device
    expected = f"noise of shape [m, {', '.join(map(str, noise.shape[1:]))}] on {noise.device}"
    expect(same, "verify_noise", expected, verify_noise)
    m = min(len(verify_noise), len(noise))
    other = not torch.equal(verify_noise[:m].to(noise.dtype), noise[:m])
    expect(other, "verify_noise", "other noise than the calibration's", "the same values")
    if len(verify_noise) > len(noise) and (rows := rows_of_samples(velocity, len(noise))):
        most = f"at most {len(noise)} samples, as many as {', '.join(rows)} has rows"
        expect(False, "verify_noise", most, f"{len(verify_noise)}")


def _verify(
    cal: Calibration,
    velocity: VelocityBase,
    noise: Tensor,
    steps: list[int],
    chunk: int,
    n: int,
    done: Progress,
    ranks: Ranks,
) -> None:
    """Endpoint errors on other noise than the calibration's, and a warning where one is worse than uniform steps'."""
    plans = {N: cal.choices(N) for N in steps}
    begun = done.verify(plans, noise)
    for start in range(begun, len(noise), chunk):

        def errors_of(part: slice, start=start) -> Tensor:
            rows = slice(start + part.start, start + part.stop)
            field = velocity.rows(rows, n)
            x1, of_each = (
                sample(field, noise[rows], cal.teacher_solver),
                [p for of in plans.values() for p in of.values()],
            )
            return torch.stack([endpoint_errors(sample(field, noise[rows], plan), x1) for plan in of_each]).cpu()

        each = iter(ranks.shared(min(chunk, len(noise) - start), errors_of, 1))
        with done.changes():
            done.add_errors({N: {name: next(each) for name in of} for N, of in plans.items()})
    errors = done.errors()
    total = {N: {name: each.mean().item() for name, each in of.items()} for N, of in errors.items()}
    between = {N: {name: mean_interval(each) for name, each in of.items()} for N, of in errors.items()}
    cal.add_verified(*ranks.from_first((total, between)))
    rounding, said = 1e-12 * endpoint_error(noise, torch.zeros_like(noise)), []
    for name, what in ((BELLMAN, "Bellman schedule"), (FITTED, "fitted solver")):
        worse = [str(N) for N in steps if total[N].get(name, 0) > total[N][UNIFORM] + rounding]
        if worse:
            said.append(f"the {what} has a larger error than uniform steps for N = {', '.join(worse)}")
    if said:
        best = "use cal.best(N), which is the best of them for every N"
        warn(f"verify_noise: on this noise {' and '.join(said)}; {best}", stacklevel=2)


@contextlib.contextmanager
def _warnings_once() -> Iterator[None]:
    """Warnings of a block of `calibrate` once each, as its caller's; of the network's training mode
    not again."""
    with held_warnings() as held:
        yield
    for text in held:
        if not text.startswith(TRAINING):
            warn(text, stacklevel=5)


def _parts(n: int, chunk: int, cuts: Iterable[int]) -> Iterator[tuple[int, int]]:
    """(start, stop) of the parts of n samples, of `chunk` at most, none across a cut."""
    start = 0
    while start < n:
        stop = min(start + chunk, n, *(cut for cut in cuts if cut > start))
        yield start, stop
        start = stop


class _Trajectories:
    """Rolls a teacher out, some samples at a time, and keeps the trajectories of the first `most`.

    evaluations: of a sample.
    """

    def __init__(self, teacher: Teacher, noise: Tensor, keep_bytes: int, ranks: Ranks):
        self.ranks, self.teacher, self.noise, self.times = ranks, teacher, noise, teacher.solver.times
        self.knots = None if teacher.solver.is_euler else KnotStates.of(teacher.solver)
        self.evaluations = (self.knots or teacher.solver).evaluations
        state = initial_state(noise[:1])
        self.most = min(len(noise), keep_bytes // (state.nbytes * (2 * len(self.times) - 1)))
        self.x = self._new(len(self.times), self.most, state) if self.most else None
        self.v = self.scratch = self.states = None

    def grams(self, costs: SampleCosts, start: int, stop: int, bar) -> tuple[Iterable[Tensor], list[int], torch.dtype]:
        """Of the samples from start to stop, which are the next ones of `costs`, what its `add` takes, and the dtype of
        velocities. Of several ranks each rolls out some of them; all keep what is kept."""
        n, ranks, pieces = stop - start, self.ranks, costs.pieces(stop - start)
        if ranks.is_alone:
            x, v = self.trajectories(start, stop, bar)
            return costs.grams_of(v, pieces, x if costs.secants else None), pieces, v.dtype
        pieces, cuts = _divided(pieces, ranks.size)
        begin, end = cuts[ranks.rank : ranks.rank + 2]
        own = [p for p, last in zip(pieces, itertools.accumulate(pieces), strict=True) if begin < last <= end]

        def rolled_out() -> tuple[Tensor, Tensor] | None:
            if not own:
                return None
            x, v = self.trajectories(start + begin, start + end, bar)
            return v, torch.stack(list(costs.grams_of(v, own, x if costs.secants else None)))

        v, grams = ranks.tried(rolled_out) or (None, None)
        grams = ranks.gathered(grams, len(pieces))
        if stop <= self.most:
            mine, rows = slice(start + begin, start + end), slice(start, stop)
            x = ranks.gathered(self.x[:, mine] if own else None, n, 1)
            v = ranks.gathered(v, n, 1)
            self.x[:, rows] = x
            self._kept(rows, v[0]).copy_(v)
        dtype = v.dtype if v is not None else None
        return grams, pieces, next(d for d in ranks.of_each(dtype) if d is not None)

    def trajectories(self, start: int, stop: int, bar) -> tuple[Tensor | None, Tensor]:
        """States and velocities of the samples from start to stop, all kept or none: `[K+1, stop - start, *shape]`,
        None where Euler's steps tell them, and `[K, stop - start, *shape]`, good until the next call."""
        rows, keep = slice(start, stop), stop <= self.most
        if self.knots is not None:
            begin = initial_state(self.noise[rows])
            x = self.x[:, rows] if keep else self._scratch_states(begin)
            into = (lambda v: self._kept(rows, v)) if keep else self._scratch
            return x, self.knots.fill(self.teacher, begin, start, x, into, bar.update)
        if self.teacher.fused is not None:
            _, states, v = self.teacher.fused_flow(self.noise[rows], start, states=keep, velocities=True)
            bar.update(len(v))
            if keep and stop - start == self.most:
                self.x, self.v = states, v
            elif keep:
                self.x[:, rows] = states
                self._kept(rows, v[0]).copy_(v)
            return None, v
        begin, out = initial_state(self.noise[rows]), self.x[:, rows] if keep else None
        for i, (_, v) in enumerate(self.teacher.flow(begin, start, out=out, keep=True)):
            if i == 0:
                found = self._kept(rows, v) if keep else self._scratch(v)
            found[i] = v
            bar.update()
        return None, found

    def kept_so_far(self) -> tuple[Tensor, Tensor] | None:
        """States and velocities, of all that are to be kept, as far as they have been rolled out."""
        return (self.x, self.v) if self.most else None

    def restore(self, kept: tuple[Tensor, Tensor] | None) -> None:
        """Of the first samples, as they were kept before."""
        if kept is not None:
            rows = slice(kept[0].shape[1])
            self.x[:, rows] = kept[0]
            self._kept(rows, kept[1][0].to(self.x.device)).copy_(kept[1])

    def kept(self, n: int) -> Trajectory | None:
        """Of the first n samples, those that have been rolled out."""
        if n < self.most:  # without the memory of the others
            self.x, self.v = self.x[:, :n].clone(), self.v[:, :n].clone()
        return Trajectory(self.times, self.x, self.v) if self.most else None

    def _new(self, length: int, n: int, like: Tensor) -> Tensor:
        return fresh(torch.empty(length, n, *like.shape[1:], dtype=like.dtype, device=like.device))

    def _kept(self, rows: slice, like: Tensor) -> Tensor:
        if self.v is None:
            self.v = self._new(len(self.times) - 1, self.most, like)
        return self.v[:, rows]

    def _scratch(self, like: Tensor) -> Tensor:
        if self.scratch is None or self.scratch.shape[1] < len(like):
            self.scratch = self._new(len(self.times) - 1, len(like), like)
        return self.scratch[:, : len(like)]

    def _scratch_states(self, like: Tensor) -> Tensor:
        if self.states is None or self.states.shape[1] < len(like):
            self.states = self._new(len(self.times), len(like), like)
        return self.states[:, : len(like)]


def _divided(pieces: list[int], ranks: int) -> tuple[list[int], list[int]]:
    """(the pieces, some of them as two, where ranks begin and end) of equal parts, or nearly, where whole pieces make
    these."""
    n, borders = sum(pieces), [0, *itertools.accumulate(pieces)]
    cuts = [n * r // ranks for r in range(ranks + 1)]
    near = [min(borders, key=lambda b: abs(b - cut)) for cut in cuts]
    cuts = [b if abs(b - cut) <= n / (8 * ranks) else cut for b, cut in zip(near, cuts, strict=True)]
    borders = sorted({*borders, *cuts})
    return [b - a for a, b in itertools.pairwise(borders)], cuts


def _provenance(velocity: VelocityBase, noise: Tensor, K: int, seed: int | None) -> dict:
    """What is known before the first evaluation, ready for JSON."""
    known = velocity.identify().provenance()
    of_noise = hash_of(noise, "noise", unknown := known.pop("unknown", {}))
    return plain(
        {
            "K": K,
            "n": len(noise),
            "seed": None if seed is None else expect_seed(seed),
            "shape": list(noise.shape[1:]),
            "state_dtype": str(initial_state(noise[:0]).dtype),
            "device": noise.device.type,
            "guidance": told(velocity.guidance),
            "convention": velocity.convention(),
            **known,
            "noise_sha256": of_noise,
            **({"unknown": unknown} if unknown else {}),
            "versions": {"flowkernels": __version__, "torch": torch.__version__, "python": platform.python_version()},
        }
    )
