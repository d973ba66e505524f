"""Calibrate: roll out, step costs and schedules in one streamed call, and the file that keeps them."""

import base64
import contextlib
import inspect
import itertools
import json
import math
import numbers
import platform
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from flowkernels._casts import no_grad
from flowkernels._checks import (
    describe,
    expect,
    expect_bool,
    expect_finite_flow,
    expect_int,
    expect_mapping,
    expect_noise,
    expect_numbers,
    expect_path,
    expect_positive_int,
    expect_real,
    expect_room,
    expect_seed,
    expect_shown,
    expect_times,
    expect_values,
)
from flowkernels._files import (
    SUM,
    damaged,
    digest,
    expect_target,
    expect_unchanged,
    plain,
    read_json,
    sealed,
    warn_of_no_sum,
    whole_file,
)
from flowkernels._version import __version__
from flowkernels._warnings import held_warnings, warn
from flowkernels.costs import GROUPS, OBJECTIVES, SINGLES, SampleCosts
from flowkernels.fuse import FusedSampler
from flowkernels.ops._library import fresh
from flowkernels.ops.euler_step.reference import guided
from flowkernels.rollout import Trajectory, euler, initial_state
from flowkernels.sample import sample
from flowkernels.schedule import Schedule, StepCost, bellman, expect_steps
from flowkernels.solver import Solver
from flowkernels.velocity_field import (
    TRAINING,
    VelocityField,
    attributes_of,
    expect_velocity,
    hash_of,
    identity,
    tensors_hash,
    velocity_rows,
    warn_if_training,
)

FORMAT = "flowkernels.calibration"
CHUNK_BYTES = 256 << 20  # velocities of one chunk of samples
VERIFIED = ("uniform", "bellman", "fitted")  # of what there are endpoint errors
KEEP_BYTES = 512 << 20  # states and velocities that stay


@dataclass(frozen=True, eq=False)
class Calibration(Mapping):
    """The schedules of a model, by number of steps: `cal[4]`.

    times: the fine grid, float64 `[K+1]`. cost: all step costs, float64 `[K+1, K+1]`, Inf where k <= j.
    schedules: {N: Schedule}. provenance: where the calibration comes from (K, n, seed, dtype, shape, guidance, the
    model's parameter hash, library versions).
    gram: the mean Gram matrix of velocity increments, float64 `[K-1, K-1]` (`velocity_gram` divided by n).
    solvers: {N: Solver}, such as fits; empty until one is put there.
    All of the above on the CPU, and in the file; gram is None from a file of before there was one.

    verified: {N: {"uniform": e, "bellman": e, "fitted": e}}, where `calibrate` was given noise to verify on: the mean
    squared distance to the teacher's samples of Euler steps on the uniform and on the Bellman schedule, and of the
    solver if there is one. In the file.

    verified_as: {N: {"bellman": h, "fitted": h}}, hashes of the schedule and the solver that were verified; what is
    there now may be another. In the file.

    kept: the teacher's trajectory of the first samples, where they are. sample_costs: step costs of groups of samples.
    Both in memory only, None in a calibration from a file.
    """

    times: Tensor
    cost: Tensor
    schedules: dict[int, Schedule]
    provenance: dict = field(default_factory=dict)
    gram: Tensor | None = None
    solvers: dict[int, Solver] = field(default_factory=dict)
    verified: dict[int, dict[str, float]] = field(default_factory=dict)
    kept: Trajectory | None = field(default=None, repr=False)
    sample_costs: SampleCosts | None = field(default=None, repr=False)
    verified_as: dict[int, dict[str, str]] = field(default_factory=dict, repr=False)
    _found: dict = field(default_factory=dict, repr=False)  # tables made when they were asked for, and of what

    def __post_init__(self):
        times = expect_times(self.times, "times")
        K = len(times) - 1
        object.__setattr__(self, "times", times)
        expect_values(self.cost, "cost", (torch.float64,))
        expect(self.cost.shape == (K + 1, K + 1), "cost", f"shape {[K + 1, K + 1]}, a row for each knot", self.cost)
        if self.gram is not None:
            expect_values(self.gram, "gram", (torch.float64,))
            expect(self.gram.shape == (K - 1, K - 1), "gram", f"shape {[K - 1, K - 1]}", self.gram)
        for name, of in (("schedules", Schedule), ("solvers", Solver), ("verified", Mapping)):
            entries, expected = getattr(self, name), f"a dict from numbers of steps to {of.__name__}s"
            known = isinstance(entries, Mapping) and all(isinstance(v, of) for v in entries.values())
            expect_shown(known, name, expected, entries, TypeError)
            for n in entries:
                expect_int(n, name, expected, 1)
        expect_mapping(self.provenance, "provenance")

    def __getitem__(self, steps: int) -> Schedule:
        known = isinstance(steps, numbers.Integral) and not isinstance(steps, bool) and steps in self.schedules
        if not known:  # KeyError for all of them, which a Mapping's `in` takes for an answer
            got = describe(steps)
            raise KeyError(f"steps: expected one of {sorted(self.schedules)}, got {got}; plan({got}) adds it")
        return self.schedules[steps]

    def __iter__(self) -> Iterator[int]:
        return iter(self.schedules)

    def __len__(self) -> int:
        return len(self.schedules)

    @property
    def norm_cost(self) -> Tensor | None:
        """Step costs like `cost` of E|e| in place of E|e|^2, the mean over at most 512 of the samples kept.

        Made at the first use or when the calibration is saved, about 0.2 ms a sample. None without kept samples, and
        from a file that has none.
        """
        if self.kept is None:
            return self._found.get("norm_cost")  # of the file
        return self._of_kept("norm_cost", lambda: self._singles().norm_cost())

    def _singles(self) -> SampleCosts | None:
        """The step costs of single samples, from those that are kept."""

        def singles():
            found = SampleCosts(self.times, most=SINGLES)
            return found.update(self.kept.v[:, : found.most])  # no more than groups of one

        return None if self.kept is None else self._of_kept("singles", singles)

    def _of_kept(self, name: str, make):
        """What `make()` makes of the velocities kept, made anew where they are others or were written to."""
        v = self.kept.v
        version = object() if v.is_inference() else v._version  # writes to the former are not counted
        found = self._found.get(name)
        if not isinstance(found, tuple) or found[0] is not v or found[1] != version:
            found = self._found[name] = v, version, make()
        return found[2]

    @no_grad
    def plan(
        self, steps: int | Iterable[int], objective: str = "squared", *, velocity=None, **options
    ) -> dict[int, Schedule] | dict[int, Solver]:
        """Schedules or solvers for numbers of steps, by an objective of choice; all of one call from one table.

        Args:
            steps: the numbers of steps N wanted, each 1..K.
            velocity: the teacher, for objectives that evaluate it (a `FusedSampler`'s own velocity is used).
            options: those of the objective. Of those that evaluate, `samples` (the first ones; 64) and `chunk`, how
                many are evaluated at once (all).
            objective: what is least, with e the error of a step from a teacher's knot, and its further evaluations of
                each of the `samples`, of which there are at most those kept:
                "squared": the sum of E|e|^2. None. BOSS, arXiv 2312.16414. Adds the schedules to this calibration.
                "norm": the sum of E|e|. None.
                "gits": the sum of `gamma^i E|e|`, i counting the steps; gamma = 1.15. None. GITS (On the Trajectory
                Regularity of ODE-based Diffusion Sampling, arXiv 2405.11326), whose recursion from the data end is
                `V[j][s] = min_i E|e|_2 + gamma V[i][s-1]`.
                "endpoint": the sum of `E|(d x_K / d x_k) e|^2`, each error as the teacher's flow carries it to t = 1,
                to first order: estimated with `probes` random signs, pulled back through the teacher's steps.
                (1 + 2 probes)(K - 1), a vector-Jacobian product counted as two; probes = 2. The velocity must have
                gradients.
                "pairs": the sum of E|e|^2 of Adams-Bashforth 2, exactly: a step's error depends on the knot before it
                too. None, but K^3 numbers. Returns solvers.
                "student": the mean squared distance of the student's own state to the teacher's, where the best
                predecessor of each knot is decided from the start on (a greedy choice: no optimum). About N K for the
                largest N. OSS, arXiv 2503.21774.
                "free": the sum of E|e|^2 where the velocity of a step from t may be asked for at later times
                `t + f (1 - t)`, f being the best of `candidates` = 0, 1/64, 1/32, 3/64, 3/32, 3/16 (the first
                knot's included). K for each candidate but 0. Returns Euler solvers with such model times.

        Returns:
            {N: Schedule} or, of "pairs" and "free", {N: Solver}. Those of other objectives than "squared" say in their
            `notes` the objective, its evaluations of each sample, and of solvers the cost; a Schedule's cost is in
            terms of its objective.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        wanted = expect_steps(steps, len(self.times) - 1)
        if not (isinstance(objective, str) and objective == "squared"):
            known = ["squared", *OBJECTIVES]
            expect(isinstance(objective, str) and objective in known, "objective", f"one of {known}", objective)
            make = OBJECTIVES[objective]
            allowed = list(inspect.signature(make).parameters)[2:]
            unknown = sorted(set(options) - set(allowed))
            expect(not unknown, "options", f"of {allowed} for {objective!r}", f"{unknown}", TypeError)
            return make(self, wanted, **({"velocity": velocity} if "velocity" in allowed else {}), **options)
        expect(not options, "options", "none for 'squared'", f"{sorted(options)}", TypeError)
        plans = bellman(self.cost, self.times, wanted)
        if self.sample_costs is not None:
            plans = self.sample_costs.with_intervals(plans)
        self.schedules.update(plans)
        return plans

    def best(self, steps: int) -> Schedule | Solver:
        """Of the uniform schedule, the Bellman schedule and the solver, what has the least verified error: those that
        are what was verified, and not put in its place since.

        Where nothing was verified, the solver if there is one, else the Bellman schedule.
        """
        known = {"uniform": Schedule.uniform(steps)}
        if steps in self.schedules or steps not in self.solvers:
            known = {"bellman": self[steps], **known}
        if steps in self.solvers:
            known = {"fitted": self.solvers[steps], **known}
        errors, of = self.verified.get(steps, {}), self.verified_as.get(steps, {})
        as_it_was = {name for name in known if name == "uniform" or of.get(name) == _hash_of_plan(known[name])}
        errors = {name: e for name, e in errors.items() if name in as_it_was and e == e}  # NaN is not
        return known[min(known, key=lambda name: errors.get(name, math.inf))]

    def __str__(self) -> str:
        lines = [f"{'N':>3} {'cost':>11} {'95 % interval':>19} {'enough':>7} {'uniform':>11} {'ratio':>6}  knots"]
        for n, s in sorted(self.schedules.items()):
            knots = " ".join(f"{t:.3g}" for t in s.times)
            interval = "-" if s.interval is None else f"{s.interval[0]:.3g}..{s.interval[1]:.3g}"
            figures = [math.nan if c is None else c for c in (s.cost, s.uniform_cost, s.ratio)]
            enough = "-" if s.enough is None else s.enough
            lines.append(
                f"{n:>3} {figures[0]:>11.4g} {interval:>19} {enough:>7} {figures[1]:>11.4g} {figures[2]:>6.3f}  {knots}"
            )
        return "\n".join(lines)

    def save(self, path: str | Path) -> None:
        """Write a JSON file with its SHA-256; whole or not at all, and nothing that `load` would refuse.

        In provenance and notes, arrays become lists, and numbers that are not finite become texts. TypeError for what
        JSON cannot hold.
        """
        expect_target(path)
        data = {
            "format": FORMAT,
            "version": 1,
            "provenance": plain(self.provenance),
            "times": self.times.tolist(),
            "schedules": {str(n): _schedule_to_dict(s, self.times) for n, s in sorted(self.schedules.items())},
            "cost": _encoded(self.cost, 1),
        }
        if self.gram is not None:
            data["gram"] = _encoded(self.gram, 0)
        if self.norm_cost is not None:
            data["norm_cost"] = _encoded(self.norm_cost, 1)
        if self.solvers:
            data["solvers"] = {str(n): _solver_to_dict(s) for n, s in sorted(self.solvers.items())}
        if self.verified:
            data["verified"] = {str(n): plain(errors) for n, errors in sorted(self.verified.items())}
            data["verified_as"] = {str(n): plain(hashes) for n, hashes in sorted(self.verified_as.items())}
        _from_dict(data)
        text = json.dumps(sealed(data), indent=1)
        with whole_file(path) as partial:
            partial.write_text(text)


def load(path: str | Path, velocity=None) -> Calibration:
    """Read a calibration written by `Calibration.save`.

    Args:
        path: the file. One without a checksum, as earlier versions wrote them, is read with a warning.
        velocity: the model it is to be used with; a warning says so if it was made for another one.

    Raises:
        FileNotFoundError; ValueError if the file is truncated, was changed since it was written, or is something else.
    """
    path, wanted = expect_path(path, "path"), "a whole calibration file"
    if velocity is not None:
        expect_velocity(velocity)
    data = read_json(path, "path", wanted)
    kind = data.get("format") if isinstance(data, dict) else type(data).__name__
    expect(kind == FORMAT, "path", f"a file of format {FORMAT!r}", f"{path} of format {kind!r}")
    version = data.get("version")
    expect(type(version) is int and version == 1, "path", "version 1", f"{path} of version {version!r}")
    with damaged("path", wanted, path):
        found = digest(data)
        if SUM in data:
            expect_unchanged(data[SUM], found)
        cal = _from_dict(data)
    if SUM not in data:
        warn_of_no_sum(path)
    if velocity is not None and (differs := identity(velocity).differences(cal.provenance)):
        warnings.warn(
            f"velocity: expected the model that {path} was made for, got another one ({', '.join(differs)}); its "
            "schedules may not be the best for it",
            UserWarning,
            stacklevel=2,
        )
    return cal


def _from_dict(data: dict) -> Calibration:
    """The calibration in a file, each of its entries checked."""
    expect_numbers(data["times"], "times")
    times = expect_times(data["times"], "times")
    K = len(times) - 1
    tables = {"cost": (K + 1, 1), "gram": (K - 1, 0), "norm_cost": (K + 1, 1)}
    tables = {name: _decoded(data[name], name, *of) for name, of in tables.items() if name == "cost" or name in data}
    provenance = _object(data["provenance"], "provenance")
    expect(provenance.get("K", K) == K, "provenance.K", f"{K}, the steps of times", provenance.get("K"))
    shape, made_for = provenance.get("shape", []), provenance.get("parameters_sha256")
    expect(isinstance(shape, list), "provenance.shape", "the shape of a sample", shape)
    for size in shape:
        expect_int(size, "provenance.shape", "positive integers", 1)
    expect(made_for is None or isinstance(made_for, str), "provenance.parameters_sha256", "a text or null", made_for)
    schedules = {n: _schedule(s, f"schedules.{n}", n, times) for n, s in _by_steps(data, "schedules", K)}
    solvers = {n: _solver(s, f"solvers.{n}", n) for n, s in _by_steps(data, "solvers", None)}
    verified = {n: _errors(errors, f"verified.{n}") for n, errors in _by_steps(data, "verified", None)}
    verified_as = {n: _texts(hashes, f"verified_as.{n}") for n, hashes in _by_steps(data, "verified_as", None)}
    if "verified_as" not in data:  # earlier versions: what is there is what was verified
        verified_as = {n: _hashes_of_plans(schedules.get(n), solvers.get(n)) for n in verified}
    return Calibration(
        *(times, tables["cost"], schedules, provenance, tables.get("gram"), solvers, verified),
        verified_as=verified_as,
        _found={"norm_cost": tables.get("norm_cost")},
    )


def _texts(data, name: str) -> dict[str, str]:
    for text in _object(data, name).values():
        expect(isinstance(text, str), name, "texts", text)
    return data


def _hash_of_plan(plan: Schedule | Solver) -> str:
    """Of what decides its samples."""
    names = ("times", "model_times", "coefficients") if isinstance(plan, Solver) else ("times",)
    return tensors_hash({name: getattr(plan, name) for name in names})


def _hashes_of_plans(schedule: Schedule | None, solver: Solver | None) -> dict[str, str]:
    plans = {"bellman": schedule, "fitted": solver}
    return {name: _hash_of_plan(plan) for name, plan in plans.items() if plan is not None}


def _object(value, name: str) -> dict:
    expect(isinstance(value, dict), name, "an object", value)
    return value


def _by_steps(data: dict, name: str, most: int | None) -> Iterator[tuple[int, Any]]:
    """(N, entry) of a table by numbers of steps; only the schedules have to be there."""
    for key, entry in _object(data[name] if name == "schedules" else data.get(name, {}), name).items():
        canonical = key.isascii() and key.isdecimal() and key[0] != "0"
        expect(canonical, name, "numbers of steps", repr(key))
        yield expect_int(int(key), name, "numbers of steps" + (f" up to {most}" if most else ""), 1, most), entry


def _schedule(data, name: str, N: int, times: Tensor) -> Schedule:
    K, indices = len(times) - 1, _object(data, name)["indices"]
    expect(isinstance(indices, list), name, "a list of indices", indices)
    for i in indices:
        expect_int(i, f"{name}.indices", f"integers from 0 to {K}", 0, K)
    whole = len(indices) == N + 1 and indices[0] == 0 and indices[-1] == K
    whole = whole and all(a < b for a, b in itertools.pairwise(indices))
    expect(whole, f"{name}.indices", f"{N + 1} rising indices from 0 to {K}", indices)
    costs = (None if data[c] is None else _least(data[c], f"{name}.{c}") for c in ("cost", "uniform_cost"))
    interval = enough = None
    if "interval" in data:
        low, high = (_least(end, f"{name}.interval") for end in data["interval"])
        expect(low <= high, f"{name}.interval", "[low, high]", data["interval"])
        interval, enough = (low, high), expect_int(data["enough"], f"{name}.enough", "a number of samples", 1)
    notes = _object(data.get("notes", {}), f"{name}.notes")
    return Schedule(times[indices], times, tuple(indices), *costs, interval=interval, enough=enough, notes=notes)


def _least(value, name: str) -> float:
    expect(isinstance(value, (int, float)), name, "a number of at least 0", value)
    return expect_real(value, name, "a number of at least 0", lambda number: number >= 0)


def _solver(data, name: str, N: int) -> Solver:
    solver = Solver.from_dict(_object(data, name))
    expect(solver.steps == N, name, f"a solver of {N} steps", f"one of {solver.steps}")
    return solver


def _errors(data, name: str) -> dict[str, float]:
    unknown = sorted(set(_object(data, name)) - set(VERIFIED))
    expect(not unknown, name, f"errors of {', '.join(VERIFIED)}", f"{unknown}")
    return {what: _least(error, f"{name}.{what}") for what, error in data.items()}


def _schedule_to_dict(s: Schedule, times: Tensor) -> dict:
    on_it = s.grid is not None and torch.equal(s.grid, times)
    expect(on_it, "schedules", "schedules on the grid of the calibration", s)
    data = {"indices": list(s.indices), "cost": s.cost, "uniform_cost": s.uniform_cost}
    if s.interval is not None:
        data |= {"interval": list(s.interval), "enough": s.enough}
    return plain(data | ({"notes": s.notes} if s.notes else {}))


def _solver_to_dict(s: Solver) -> dict:
    return s.to_dict() | {"notes": plain(s.notes)}


def _encoding(diagonal: int) -> str:
    return f"base64 of little-endian float64, entries k {'>' if diagonal else '>='} j row by row"


def _encoded(matrix: Tensor, diagonal: int) -> dict:
    """The entries of a matrix on and above its diagonal, or (1) above it."""
    row, column = torch.triu_indices(*matrix.shape, diagonal, device="cpu")
    entries = matrix[row, column].numpy().astype("<f8").tobytes()
    return {"encoding": _encoding(diagonal), "data": base64.b64encode(entries).decode()}


def _decoded(data, name: str, size: int, diagonal: int) -> Tensor:
    """The matrix `[size, size]`: of costs, with Inf below, or (diagonal 0) a Gram matrix."""
    encoding, text = _object(data, name).get("encoding"), data["data"]
    expect(encoding == _encoding(diagonal), f"{name}.encoding", repr(_encoding(diagonal)), encoding)
    count = size * (size + 1 - 2 * diagonal) // 2
    length = (8 * count + 2) // 3 * 4  # before anything of that size is made
    expect(isinstance(text, str), name, "a text", text)
    expect(len(text) == length, name, f"{count} entries in {length} characters", f"{len(text)} characters")
    values = torch.from_numpy(np.frombuffer(base64.b64decode(text, validate=True), "<f8").astype(np.float64))
    expect(len(values) == count, name, f"{count} entries", str(len(values)))
    row, column = torch.triu_indices(size, size, diagonal, device="cpu")
    matrix = torch.full((size, size), torch.inf, dtype=torch.float64, device="cpu")
    matrix[row, column] = values
    if diagonal:  # Inf forbids a step
        expect(bool((values >= 0).all()), name, "costs of at least 0", "negative ones or NaN")
        return matrix
    matrix[column, row] = values
    finite = bool(torch.isfinite(values).all()) and bool((matrix.diagonal() >= 0).all())
    expect(finite, name, "finite entries, of at least 0 on the diagonal", "others")
    return matrix


@no_grad
def calibrate(
    velocity,
    noise: Tensor,
    grid: int | Sequence[float] | Tensor = 100,
    steps: int | Iterable[int] = range(1, 11),
    *,
    until: float | None = None,
    verify: Tensor | None = None,
    fit: bool = False,
    keep: int = KEEP_BYTES,
    chunk: int | None = None,
    progress: bool = True,
    seed: int | None = None,
) -> Calibration:
    """The schedule of least cost for each number of steps: roll out, step costs and Bellman, streamed in chunks.

    Args:
        velocity: callable `velocity(x, t)` with x `[n, *shape]`, t `[n]`, a `VelocityField` or a `FusedSampler`; the
            teacher.
        noise: `[n, *shape]`, as many samples as wanted; a few hundred settle most schedules.
        grid: K for K uniform fine steps, or K+1 increasing times from 0 to 1. Costs K evaluations a sample.
        steps: the numbers of steps N wanted, each 1..K.
        until: a share, such as 0.02: stop as soon as no chosen schedule costs more than that above the least cost in
            95 % of bootstrap resamples of the samples so far, looked at from 32 samples on whenever they are half as
            many again; `noise` is then the most that is used. None uses all of it, which a fit may want: schedules
            settle first.
        verify: other noise, `[m, *shape]`: the endpoint errors to the teacher on it are `verified`, and a warning names
            the numbers of steps for which something is worse than uniform steps. K evaluations of each of its samples,
            and 2N for every N, 3N with `fit`. Conditioning with one row a sample gives it the first m rows.
        fit: fit a solver for each N (`fit_solver`), which needs kept samples; they are `solvers`.
        keep: bytes of the teacher's trajectory, states and velocities of the first samples, that stay in memory as
            `kept`, for objectives and fits that need them; 0 keeps none.
        chunk: samples rolled out at once; None chooses so that their velocities take at most 256 MiB.
        progress: show a progress bar.
        seed: the seed that `noise` was made with, for the provenance.

    Returns:
        Calibration. No schedule costs more than the uniform one on the same grid; `best(N)` is what to use.

    Raises:
        TypeError, ValueError: naming the argument; for NaN or Inf, the sample and the step.
    """
    expect_velocity(velocity)
    times = expect_times(grid, "grid")
    expect_noise(noise)
    K, n = len(times) - 1, len(noise)
    wanted = expect_steps(steps, K)
    if chunk is None:
        chunk = max(1, min(n, CHUNK_BYTES // (K * noise[0].numel() * 4)))
    expect_positive_int(chunk, "chunk")
    expect_room(32 * K**2, "grid", "step costs", f"{K} steps")
    integer = isinstance(keep, numbers.Integral) and not isinstance(keep, bool)
    expect(integer, "keep", "a number of bytes", keep, TypeError)
    expect(keep >= 0, "keep", "at least 0", keep)
    if until is not None:
        until = expect_real(until, "until", "a positive share, such as 0.02", lambda a: a > 0)
    fit, progress = expect_bool(fit, "fit"), expect_bool(progress, "progress")
    seed = None if seed is None else expect_seed(seed)
    if verify is not None:
        _expect_other_noise(verify, noise)
    given, fused = velocity, velocity.on(times) if isinstance(velocity, FusedSampler) else None
    velocity = velocity if fused is None else fused.velocity
    warn_if_training(velocity)

    provenance = _provenance(velocity, noise, K, seed)
    teacher = _Teacher(velocity, fused, noise, times, keep)
    enough = teacher.most > 1 or not fit
    expect(enough, "keep" if n > 1 else "noise", "two samples whose trajectories are kept, with fit", f"{teacher.most}")
    costs = StepCost(times, device=noise.device)
    samples = SampleCosts(times, max(1, 2 * n // GROUPS) if until is None else 1)
    looks = [] if until is None else _looks(n)
    parts = list(_parts(n, chunk, [teacher.most, *looks]))
    with tqdm(total=len(parts) * K, desc="calibrate", disable=not progress, leave=False, unit="eval") as bar:
        for start, stop in parts:
            v = teacher.velocities(start, stop, bar)
            costs.update(v)
            samples.update(v)
            if stop in looks:
                stable = max(samples.regrets(bellman(costs.cost(), times, wanted)).values()) <= until
                if stable:
                    break
    cost = costs.cost()
    provenance |= {"velocity_dtype": str(v.dtype)}
    if attributes_of(velocity)[0] != provenance["attributes_sha256"]:
        provenance["attributes_sha256"] = None  # it counts its calls, say, or keeps what it has computed
    if fused is not None:
        provenance["sampler_weights"] = str(fused.weights)
    if until is not None:
        reason = "schedules stable" if stable else "all samples used"
        provenance |= {"n": stop, "n_given": n, "until": until, "stopped": reason}
    cal = Calibration(
        *(times, cost.cpu(), samples.with_intervals(bellman(cost, times, wanted))),
        *(provenance, (costs.gram / costs.count).cpu()),
        **dict(kept=teacher.kept(stop), sample_costs=samples),
    )
    if fit:
        from flowkernels.fit import fit_solver

        cal._found["made_with"] = velocity  # for certain, whether it has a hash or not
        with _warnings_once():
            cal.solvers.update({N: fit_solver(given, cal, N, chunk=chunk) for N in wanted})
        del cal._found["made_with"]
    if verify is not None:
        with _warnings_once():
            _verify(cal, given, verify, wanted, chunk, n)
    return cal


def _looks(n: int) -> list[int]:
    """Numbers of samples after which to look whether the schedules are stable: 32, half as many again, .., all n."""
    found = [32]
    while found[-1] < n:
        found.append(found[-1] * 3 // 2)
    return [*found[:-1], n]


def _expect_other_noise(verify: Tensor, noise: Tensor) -> None:
    expect_noise(verify, "verify")
    same = verify.shape[1:] == noise.shape[1:] and verify.device == noise.device
    expect(same, "verify", f"noise of shape [m, {', '.join(map(str, noise.shape[1:]))}] on {noise.device}", verify)
    m = min(len(verify), len(noise))
    other = not torch.equal(verify[:m].to(noise.dtype), noise[:m])
    expect(other, "verify", "other noise than the calibration's", "the same values")


def _verify(cal: Calibration, velocity, noise: Tensor, steps: list[int], chunk: int, n: int) -> None:
    """Endpoint errors on other noise than the calibration's, and a warning where one is worse than uniform steps'."""
    total = {N: {} for N in steps}
    for start in range(0, len(noise), chunk):
        rows = slice(start, min(start + chunk, len(noise)))
        part = velocity.rows(rows, n) if isinstance(velocity, FusedSampler) else velocity_rows(velocity, rows, n)
        x1 = sample(part, noise[rows], cal.times)
        for N in steps:
            tried = {"uniform": N, "bellman": cal[N]} | ({"fitted": cal.solvers[N]} if N in cal.solvers else {})
            for name, schedule in tried.items():
                error = (sample(part, noise[rows], schedule) - x1).double().square().sum().item()
                total[N][name] = total[N].get(name, 0.0) + error / len(noise)
    cal.verified.update(total)
    cal.verified_as.update({N: _hashes_of_plans(cal[N], cal.solvers.get(N)) for N in steps})
    rounding = 1e-12 * noise.double().square().flatten(1).sum(1).mean().item()

    def worse_than_uniform(name):
        return [N for N in steps if total[N].get(name, 0) > total[N]["uniform"] + rounding]

    worse = {name: worse_than_uniform(name) for name in ("bellman", "fitted")}
    said = [
        f"the {what} has a larger error than uniform steps for N = {', '.join(map(str, worse[name]))}"
        for name, what in (("bellman", "Bellman schedule"), ("fitted", "fitted solver"))
        if worse[name]
    ]
    if said:
        text = f"verify: on this noise {' and '.join(said)}; use cal.best(N), which is the best of them for every N"
        warn(text, stacklevel=2)


@contextlib.contextmanager
def _warnings_once() -> Iterator[None]:
    """Warnings of a block of `calibrate` once each, as its caller's; of the network's training mode
    not again."""
    with held_warnings() as held:
        yield
    for text in held:
        if not text.startswith(TRAINING):
            warnings.warn(text, UserWarning, stacklevel=5)


def _parts(n: int, chunk: int, cuts: Iterable[int]) -> Iterator[tuple[int, int]]:
    """(start, stop) of the parts of n samples, of `chunk` at most, none across a cut."""
    start = 0
    while start < n:
        stop = min(start + chunk, n, *(cut for cut in cuts if cut > start))
        yield start, stop
        start = stop


class _Teacher:
    """Rolls a teacher out on its grid, some samples at a time, and keeps the trajectories of the first `most`."""

    def __init__(self, velocity, fused: FusedSampler | None, noise: Tensor, times: Tensor, keep: int):
        self.velocity, self.fused, self.noise, self.times = velocity, fused, noise, times
        state = initial_state(noise[:1])
        self.most = min(len(noise), keep // (state.nbytes * (2 * len(times) - 1)))
        self.x = self._new(len(times), self.most, state) if self.most else None
        self.v = self.scratch = None

    def velocities(self, start: int, stop: int, bar) -> Tensor:
        """Those of the samples from start to stop, all kept or none: `[K, stop - start, *shape]`, good until the next
        call."""
        rows, n, K = slice(start, stop), len(self.noise), len(self.times) - 1
        keep = stop <= self.most
        if self.fused is not None:
            x, states, v = self.fused.rows(rows, n).run(self.noise[rows], states=keep, velocities=True, first=start)
            expect_finite_flow(x, v, self.times, first=start)  # not looked at by the kernel on a GPU
            bar.update(K)
            if keep and stop - start == self.most:
                self.x, self.v = states, v
            elif keep:
                self.x[:, rows] = states
                self._kept(rows, v[0]).copy_(v)
            return v
        out = self.x[:, rows] if keep else None
        flow = euler(velocity_rows(self.velocity, rows, n), initial_state(self.noise[rows]), self.times, out)
        for i, (x, v, v_uncond, w) in enumerate(flow):
            v = v if v_uncond is None else guided(v, v_uncond, w, x.dtype)
            if i == 0:
                found = self._kept(rows, v) if keep else self._scratch(v)
            found[i] = v
            bar.update()
        expect_finite_flow(x, found, self.times, first=start)
        return found

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


def _provenance(velocity, noise: Tensor, K: int, seed: int | None) -> dict:
    """What is known before the first evaluation, ready for JSON."""
    known = identity(velocity).provenance()
    of_noise = hash_of(noise, "noise", unknown := known.pop("unknown", {}))
    return plain(
        {
            "K": K,
            "n": len(noise),
            "seed": None if seed is None else expect_seed(seed),
            "shape": list(noise.shape[1:]),
            "state_dtype": str(initial_state(noise[:0]).dtype),
            "device": noise.device.type,
            "guidance": velocity.guidance if isinstance(velocity, VelocityField) else 1.0,
            "convention": velocity.convention() if isinstance(velocity, VelocityField) else None,
            **known,
            "noise_sha256": of_noise,
            **({"unknown": unknown} if unknown else {}),
            "versions": {"flowkernels": __version__, "torch": torch.__version__, "python": platform.python_version()},
        }
    )
