"""Calibration, what `calibrate` returns, and its file."""

import base64
import inspect
import itertools
import json
import math
import numbers
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowkernels._casts import no_grad
from flowkernels._checks import (
    describe,
    expect,
    expect_int,
    expect_mapping,
    expect_numbers,
    expect_path,
    expect_real,
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
from flowkernels.calibration.bellman import least_cost_schedules
from flowkernels.calibration.objectives import OBJECTIVES
from flowkernels.calibration.sample_costs import SINGLES, SampleCosts
from flowkernels.sampling.rollout import Trajectory
from flowkernels.schedule import Schedule, expect_steps
from flowkernels.solver import Solver
from flowkernels.velocity.evaluate import expect_velocity
from flowkernels.velocity.hashes import tensors_hash
from flowkernels.velocity.identity import identity

FORMAT = "flowkernels.calibration"
VERIFIED = ("uniform", "bellman", "fitted")  # of what there are endpoint errors


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
            raise KeyError(f"steps: expected one of {sorted(self.schedules)}, got {got}; find({got}) adds it")
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
    def find(
        self, steps: int | Iterable[int], *, objective: str = "squared", velocity=None, **options
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
        plans = least_cost_schedules(self.cost, self.times, wanted)
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
        lines = [f"{'N':>3} {'cost':>11} {'95 % interval':>19} {'needed':>6} {'uniform':>11} {'ratio':>6}  knots"]
        for n, s in sorted(self.schedules.items()):
            knots = " ".join(f"{t:.3g}" for t in s.times)
            interval = "-" if s.cost_interval is None else f"{s.cost_interval[0]:.3g}..{s.cost_interval[1]:.3g}"
            figures = [math.nan if c is None else c for c in (s.cost, s.uniform_cost, s.ratio)]
            needed = "-" if s.samples_needed is None else s.samples_needed
            lines.append(
                f"{n:>3} {figures[0]:>11.4g} {interval:>19} {needed:>6} {figures[1]:>11.4g} {figures[2]:>6.3f}  {knots}"
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

    @classmethod
    def load(cls, path: str | Path, velocity=None) -> "Calibration":
        """Read a calibration written by `Calibration.save`.

        Args:
            path: the file. One without a checksum, as earlier versions wrote them, is read with a warning.
            velocity: the model it is to be used with; a warning says so if it was made for another one.

        Raises:
            FileNotFoundError; ValueError if the file is truncated, was changed since it was written, or is something
            else.
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
    interval = needed = None
    if "cost_interval" in data:
        low, high = (_least(end, f"{name}.cost_interval") for end in data["cost_interval"])
        expect(low <= high, f"{name}.cost_interval", "[low, high]", data["cost_interval"])
        interval = (low, high)
        needed = expect_int(data["samples_needed"], f"{name}.samples_needed", "a number of samples", 1)
    notes = _object(data.get("notes", {}), f"{name}.notes")
    return Schedule(
        times[indices], times, tuple(indices), *costs, cost_interval=interval, samples_needed=needed, notes=notes
    )


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
    if s.cost_interval is not None:
        data |= {"cost_interval": list(s.cost_interval), "samples_needed": s.samples_needed}
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
