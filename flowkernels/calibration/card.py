"""The card, a calibration's file (docs/card.md): its entries as plain values, each of them checked when it is read."""

import base64
import itertools
from collections.abc import Callable, Container, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from flowkernels._checks import expect, expect_int, expect_numbers, expect_real, expect_times
from flowkernels._files import SUM, plain
from flowkernels._version import __version__
from flowkernels.calibration import tried
from flowkernels.calibration.teacher_error import TeacherError
from flowkernels.sampling.teacher_solver import ENTRY
from flowkernels.schedule import Schedule
from flowkernels.solver import Solver

FORMAT = "flowkernels.calibration"
RULE = {  # for readers of a file: what its numbers mean elsewhere
    "time": "t = 1 - sigma: sigma 1 is noise, sigma 0 data, x = sigma noise + (1 - sigma) data; a schedule that begins "
    "below sigma 1 begins with the state there",
    "shift": "in these sigmas already: the network is called at them, and nothing shifts them once more",
    "resolution": "provenance.pipeline has the size, shift, guidance and boundary that they were made at, where they "
    "come from a pipeline; at others they run, and may not be the best",
}
UNIFORM, BELLMAN, FITTED = CHOICES = ("uniform", "bellman", "fitted")  # what there is for N steps, in every table
EDITED = f"one that was edited on purpose is loaded, with a warning, without its entry {SUM!r}, and saved again"
RENAMED = {"cost_interval": "interval", "samples_needed": "enough"}  # entries of a schedule, as they once were
Made = TypeVar("Made")


def written(cal, best: dict[int, str]) -> dict:
    """The entries of a Calibration's file, but for its checksum. best: the name of the best choice of each N."""
    data = {
        "format": FORMAT,
        "version": 3,
        "written": {"by": f"flowkernels {__version__}", "date": f"{datetime.now(timezone.utc):%Y-%m-%d}"},
        "rule": RULE,
        "provenance": plain(cal.provenance),
        "times": cal.times.tolist(),
        "forced_knots": list(cal.forced_knots),
        "schedules": {str(n): _schedule_to_dict(s, cal.times) for n, s in sorted(cal.schedules.items())},
        "solvers": {str(n): _solver_to_dict(s) for n, s in sorted(cal.solvers.items())},
        "tried": {str(n): [tried.to_dict(c) for c in of] for n, of in sorted(cal.tried.items())},
        "verified": {str(n): _verified_to_dict(cal, n) for n in sorted(cal.verified)},
        "best": {str(n): name for n, name in best.items()},
        "cost": _encoded(cal.cost, 1),
    }
    if cal.teacher_error is not None:
        data["teacher_error"] = plain(cal.teacher_error.to_dict())
    tables = {"gram": (cal.gram, 0), "norm_cost": (cal.norm_cost, 1)}
    return data | {name: _encoded(table, diagonal) for name, (table, diagonal) in tables.items() if table is not None}


def expect_version(data: Any, path: str | Path) -> int:
    """Of the file at `path`, of which this is what was read."""
    kind = data.get("format") if isinstance(data, dict) else type(data).__name__
    expect(kind == FORMAT, "path", f"a file of format {FORMAT!r}", f"{path} of format {kind!r}")
    version = data.get("version")
    expect(type(version) is int and version in (1, 2, 3), "path", "version 1, 2 or 3", f"{path} of version {version!r}")
    return version


def calibration_of(made: Callable[..., Made], data: dict) -> Made:
    """What `made`, Calibration, makes of a file's entries, each of them checked."""
    expect_numbers(data["times"], "times")
    times = expect_times(data["times"], "times")
    K, forced = len(times) - 1, data["forced_knots"]
    expect_numbers(forced, "forced_knots")
    provenance = _object(data["provenance"], "provenance")
    gram_rows = 2 * K - 1 if ENTRY in provenance else K - 1  # of secants too, where the teacher's steps are not Euler's
    tables = {"cost": (K + 1, 1), "gram": (gram_rows, 0), "norm_cost": (K + 1, 1)}
    tables = {name: _decoded(data[name], name, *of) for name, of in tables.items() if name == "cost" or name in data}
    expect(provenance.get("K", K) == K, "provenance.K", f"{K}, the steps of times", provenance.get("K"))
    shape, made_for = provenance.get("shape", []), provenance.get("parameters_sha256")
    expect(isinstance(shape, list), "provenance.shape", "the shape of a sample", shape)
    for size in shape:
        expect_int(size, "provenance.shape", "positive integers", 1)
    expect(made_for is None or isinstance(made_for, str), "provenance.parameters_sha256", "a text or null", made_for)
    if "effort" in provenance:
        tried.effort_of(provenance["effort"], "provenance.effort")
    of, version = _by_steps(data, "schedules", K), data["version"]
    schedules = {n: _schedule(s, f"schedules.{n}", n, times, version) for n, s in of}
    solvers = {n: _solver(s, f"solvers.{n}", n, times) for n, s in _by_steps(data, "solvers", None)}
    of_tried = {n: _tried(of, f"tried.{n}", times, n) for n, of in _by_steps(data, "tried", None)}
    names = {n: {*CHOICES, *(c.name for c in of)} for n, of in of_tried.items()}
    known = _by_steps(data, "verified", None)
    verified = [(n, *_verified(of, f"verified.{n}", names.get(n, CHOICES))) for n, of in known]
    return made(
        times,
        tables["cost"],
        schedules,
        provenance,
        tables.get("gram"),
        solvers,
        {n: errors for n, errors, _, _ in verified},
        {n: hashes for n, _, hashes, _ in verified if hashes},
        verified_interval={n: intervals for n, _, _, intervals in verified if intervals},
        tried=of_tried,
        teacher_error=TeacherError.from_dict(data["teacher_error"]) if "teacher_error" in data else None,
        norm_cost=tables.get("norm_cost"),
        forced_knots=forced,
    )


def as_version_3(data: dict) -> dict:
    """A file of version 1, with what was verified in one table and today's names, or of version 2, before there was
    what was tried."""
    if data["version"] == 2:
        return data | {"tried": {}}
    verified, schedules = {}, {}
    for n, errors in _object(data.get("verified", {}), "verified").items():
        verified[n] = {name: {"error": error} for name, error in _object(errors, f"verified.{n}").items()}
        for entry, table in {"sha256": "verified_as", "interval": "verified_interval"}.items():
            known = _object(_object(data.get(table, {}), table).get(n, {}), f"{table}.{n}")
            for name in verified[n].keys() & known:
                verified[n][name][entry] = known[name]
    for n, schedule in _object(data["schedules"], "schedules").items():
        old = _object(schedule, f"schedules.{n}")
        schedules[n] = {new: old[name] for new, name in RENAMED.items() if name in old} | old
    return {"forced_knots": [], "solvers": {}, "tried": {}} | data | {"verified": verified, "schedules": schedules}


def _object(value, name: str) -> dict:
    expect(isinstance(value, dict), name, "an object", value)
    return value


def _by_steps(data: dict, name: str, most: int | None) -> Iterator[tuple[int, Any]]:
    """(N, entry) of a table by numbers of steps."""
    for key, entry in _object(data[name], name).items():
        canonical = key.isascii() and key.isdecimal() and key[0] != "0"
        expect(canonical, name, "numbers of steps", repr(key))
        yield expect_int(int(key), name, "numbers of steps" + (f" up to {most}" if most else ""), 1, most), entry


def _schedule(data, name: str, N: int, times: Tensor, version: int) -> Schedule:
    K, indices = len(times) - 1, _object(data, name)["indices"]
    expect(isinstance(indices, list), name, "a list of indices", indices)
    for i in indices:
        expect_int(i, f"{name}.indices", f"integers from 0 to {K}", 0, K)
    whole = len(indices) == N + 1 and indices[0] == 0 and indices[-1] == K
    whole = whole and all(a < b for a, b in itertools.pairwise(indices))
    expect(whole, f"{name}.indices", f"{N + 1} rising indices from 0 to {K}", indices)
    if version > 1:
        for entry, known in (("times", times[indices]), ("sigmas", 1 - times[indices])):
            expect(data[entry] == known.tolist(), f"{name}.{entry}", f"{known.tolist()}, of the indices", data[entry])
    costs = (None if data[c] is None else _least(data[c], f"{name}.{c}") for c in ("cost", "uniform_cost"))
    interval = needed = None
    if "cost_interval" in data:
        interval = _interval(data["cost_interval"], f"{name}.cost_interval")
        needed = expect_int(data["samples_needed"], f"{name}.samples_needed", "a number of samples", 1)
    notes = _object(data.get("notes", {}), f"{name}.notes")
    return Schedule(
        times[indices], times, tuple(indices), *costs, cost_interval=interval, samples_needed=needed, notes=notes
    )


def _interval(data, name: str) -> tuple[float, float]:
    low, high = (_least(end, name) for end in expect_numbers(data, name, 2))
    expect(low <= high, name, "[low, high]", data)
    return low, high


def _least(value, name: str) -> float:
    expect(isinstance(value, (int, float)), name, "a number of at least 0", value)
    return expect_real(value, name, "a number of at least 0", lambda number: number >= 0)


def _solver(data, name: str, N: int, times: Tensor) -> Solver:
    solver = Solver.from_dict(_object(data, name))
    expect(solver.steps == N, name, f"a solver of {N} steps", f"one of {solver.steps}")
    (begins, ends), grid = solver.times[[0, -1]].sort().values.tolist(), times[0].item()
    got = f"one from {begins:g}" + ("" if ends == 1 else f" to {ends:g}")
    fits = abs(begins - grid) <= 1e-9 and abs(ends - 1) <= 1e-9
    expect(fits, name, f"a solver of the grid's times, from {grid:g}", got)
    return solver


def _tried(data, name: str, times: Tensor, N: int) -> list[tried.Tried]:
    expect(isinstance(data, list), name, "a list", data)
    found = [tried.from_dict(entry, f"{name}[{i}]", times, N) for i, entry in enumerate(data)]
    names = [c.name for c in found]
    expect(len(set(names)) == len(names), name, "names that differ", names)
    return found


def _verified(
    data, name: str, names: Container[str]
) -> tuple[dict[str, float], dict[str, str], dict[str, tuple[float, float]]]:
    """Errors, hashes of what they are of, and intervals, each by choice, whose names are these."""
    unknown = sorted(what for what in _object(data, name) if what not in names)
    expect(not unknown, name, f"entries of {', '.join(CHOICES)} or of what was tried", f"{unknown}")
    errors, hashes, intervals = {}, {}, {}
    for what, entry in data.items():
        errors[what] = _least(_object(entry, f"{name}.{what}")["error"], f"{name}.{what}.error")
        if "sha256" in entry:
            expect(isinstance(entry["sha256"], str), f"{name}.{what}.sha256", "a text", entry["sha256"])
            hashes[what] = entry["sha256"]
        if "interval" in entry:
            intervals[what] = _interval(entry["interval"], f"{name}.{what}.interval")
    return errors, hashes, intervals


def _verified_to_dict(cal, n: int) -> dict:
    more = {"interval": cal.verified_interval.get(n, {}), "sha256": cal.verified_as.get(n, {})}
    return plain(
        {
            name: {"error": error} | {entry: of[name] for entry, of in more.items() if name in of}
            for name, error in cal.verified[n].items()
        }
    )


def _schedule_to_dict(s: Schedule, times: Tensor) -> dict:
    on_it = s.grid is not None and torch.equal(s.grid, times)
    expect(on_it, "schedules", "schedules on the grid of the calibration", s)
    data = {
        "times": s.times,
        "sigmas": s.sigmas,
        "indices": list(s.indices),
        "cost": s.cost,
        "uniform_cost": s.uniform_cost,
    }
    if s.cost_interval is not None:
        data |= {"cost_interval": list(s.cost_interval), "samples_needed": s.samples_needed}
    return plain(data | ({"notes": notes} if (notes := tried.own_notes(s)) else {}))


def _solver_to_dict(s: Solver) -> dict:
    return s.to_dict() | {"notes": plain(tried.own_notes(s))}


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
