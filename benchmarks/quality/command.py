"""`flowkernels bench quality`: how good samples of few steps are, by schedule and solver.

    flowkernels bench quality --out benchmarks/results && python scripts/quality_report.py

For each data set, seed, row and N: the endpoint error to the teacher (Euler on the fine grid, from equal noise), the
distances of the samples to the teacher's and to data, and what the row's calibration cost. All on held-out noise, which
no calibration has seen. A row that the CSV file has with equal settings is not computed again.
"""

import argparse
import copy
import csv
import math
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

import flowkernels as fk
from flowkernels import Solver
from flowkernels.bench.tables import write_csv
from flowkernels.evaluation.endpoint import endpoint_error, endpoint_errors
from flowkernels.runtime.environment import provenance

from .data import SIZES, Data, Sizes, generator, load
from .rows import ROWS, Counted, Run

FIELDS = (
    *("data", "seed", "row", "N", "evaluations", "endpoint_error", "rms"),
    *("distance_to_teacher", "distance_to_data", "metric", "teacher_distance_to_data"),
    *("calibration_evaluations", "calibration_seconds", "gate", "settings", "notes", "parts"),
    *("hardware", "versions", "threads", "commit", "date"),
)
KEY = ("data", "seed", "row", "N")
PARTS = 16  # of the held-out samples, whose endpoint errors are kept for intervals of ratios
GATE = 1e-4  # largest relative difference of a roll-out in float32 from the same one in float64, or summed otherwise


def summed(velocity, noise: Tensor, solver: Solver) -> Tensor:
    """The solver as its definition reads, in plain torch and with every term."""
    x, v, a = noise, [], solver.start_coefficients.tolist()
    for i, t in enumerate(solver.model_times.tolist()):
        v.append(velocity(x, torch.full((len(x),), t, dtype=x.dtype)))
        x = a[i] * noise + sum(b * w for b, w in zip(solver.coefficients[i].tolist(), v, strict=False))
    return x


@torch.no_grad()
def gate(data: Data, K: int) -> list[tuple[str, float]]:
    """(what, largest relative difference): the teacher in float32 to float64, and samplers to their definitions."""
    noise = torch.randn(4, *data.shape, generator=generator(99))
    double = copy.deepcopy(data.network).double()
    network, double = (data.given(net, len(noise), 99) for net in (data.network, double))
    truth, loop = fk.sample(double, noise.double(), K), fk.sample(network, noise, K)
    knots = torch.linspace(0, 1, K + 1, dtype=torch.float64)
    moved = Solver.euler(knots, model_times=knots[:-1] + 1e-9)  # which is no longer Euler's loop to `sample`

    def off(x: Tensor, y: Tensor) -> float:
        return ((x - y).abs().max() / y.abs().max()).item()

    checks = [("float32 teacher to float64", off(loop, truth))]
    checks.append(("Euler as a linear update to Euler's loop", off(fk.sample(network, noise, moved), loop)))
    for solver in (Solver.adams_bashforth(8, 3), Solver.heun(4)):
        found = fk.sample(network, noise, solver)
        checks.append((f"{solver.name} to its sums in float64", off(found, summed(double, noise.double(), solver))))
    return checks


def is_green(data: Data, K: int) -> bool:
    """What `gate` finds, printed."""
    checks = gate(data, K)
    red = [f"{what}: {off:.2g} > {GATE:g}" for what, off in checks if not off <= GATE]
    print("  gate: " + ("RED, no figures: " + "; ".join(red) if red else "; ".join(f"{w} {o:.1g}" for w, o in checks)))
    return not red


def source_of(threads: int) -> dict:
    """What every row says of where it comes from, printed."""
    where = provenance(torch.device("cpu"))
    versions = ", ".join(f"{k} {where[k]}" for k in ("flowkernels", "torch", "python"))
    source = dict(hardware=f"{where['device']}, {where['isa']}", versions=versions, threads=threads)
    source |= dict(commit=where["commit"], date=where["date"])
    print(" | ".join(str(v) for v in source.values() if v))
    return source


class Results:
    """The rows of a CSV file, written whole after each addition; without a file in memory only.

    key: the fields of which no two rows share the values.
    """

    def __init__(self, path: Path | None, fields: Sequence[str] = FIELDS, key: Sequence[str] = KEY):
        self.path, self.fields, self.key, self.rows = path, fields, key, {}

    def _key(self, row: Mapping) -> tuple[str, ...]:
        return tuple(str(row[name]) for name in self.key)

    def read(self) -> None:
        if self.path is not None and self.path.is_file():
            with open(self.path, newline="") as f:
                for found in csv.DictReader(f):
                    self.rows[self._key(found)] = found

    def has(self, row: Mapping) -> bool:
        """Whether there is one of the same key and settings."""
        return self.rows.get(self._key(row), {}).get("settings") == row["settings"]

    def add(self, rows: Iterable[dict]) -> None:
        self.read()  # another run may have written to it
        for new in rows:
            self.rows[self._key(new)] = dict.fromkeys(self.fields, "") | new
        if self.path is not None:
            write_csv(self.path, self.rows.values(), self.fields)


@dataclass
class Bench:
    """One data set of the benchmark, under way."""

    data: Data
    sizes: Sizes
    results: Results
    source: dict
    spent: Callable[[], bool]
    left_out: list[str] = field(default_factory=list)

    @property
    def settings(self) -> str:
        s = self.sizes
        real = 0 if self.data.real is None else len(self.data.real)
        sizes = f"K {s.grid}, calibration {s.calibration}, held out {s.held_out}, data {real}"
        return f"{self.data.model}; {sizes}"

    def seed(self, seed: int, names: list[str]) -> bool:
        """Measure the rows that are not there yet; whether all went well."""

        def there(name: str, N: int) -> bool:
            return self.results.has(dict(data=self.data.name, seed=seed, row=name, N=N, settings=self.settings))

        wanted = {name: self._steps(name, seed) for name in names}
        wanted = {name: ns for name, ns in wanted.items() if not all(there(name, N) for N in ns)}
        if not wanted:
            print(f"{self.data.name}, seed {seed}: all there", flush=True)
            return True
        if self.spent():
            self.left_out.append(f"{self.data.name}, seed {seed}")
            return True
        start = time.perf_counter()
        run, cal_evaluations, cal_seconds = self._calibrated(seed)
        held_out = run.noise(self.sizes.held_out, 1)
        teacher = fk.sample(self._given(self.data.velocity, seed), held_out, self.sizes.grid)
        self.teacher, described = teacher, self.data.distance.describe(teacher)
        self.described = described
        self.teacher_to_data = self.data.from_real(described)
        if not there("teacher", self.sizes.grid):
            self.results.add(self._teacher_rows(run, held_out))
        ok = True
        for name in wanted:
            if self.spent():
                self.left_out.append(f"{self.data.name}, seed {seed}, {name}")
                continue
            run.counted.count, run.note, began = 0, "", time.perf_counter()
            try:
                made = ROWS[name].make(run)
            except Exception:
                print(f"\n{self.data.name}, seed {seed}: {name} failed\n{traceback.format_exc()}", flush=True)
                ok = False
                continue
            seconds, evaluations = time.perf_counter() - began, run.counted.count / self.sizes.calibration
            if ROWS[name].calibrated:
                seconds, evaluations = seconds + cal_seconds, evaluations + cal_evaluations
            rows = []
            for N, how in made.items():
                solver, velocity = how if isinstance(how, tuple) else (how, self.data.velocity)
                figures = self._figures(seed, velocity, held_out, solver)
                cost = dict(calibration_evaluations=evaluations, calibration_seconds=seconds, notes=run.note)
                rows.append(self._row(seed, name, N, **figures, **cost))
            self.results.add(rows)
            self._print(name, rows)
        print(f"{self.data.name}, seed {seed}: {time.perf_counter() - start:.1f} s", flush=True)
        return ok

    def _steps(self, name: str, seed: int) -> tuple[int, ...]:
        """The numbers of evaluations that a row has."""
        s = self.sizes.straighten
        if name == "straightened":
            return s.steps if seed < s.seeds else ()
        if name == "heun":
            return tuple(range(1, max(self.sizes.steps), 2))
        if name.startswith("flow_heun"):
            return tuple(N for N in self.sizes.steps if N % 2)
        if name in ("ld3", "bespoke") and self.sizes.descent.steps is not None:
            return tuple(N for N in self.sizes.steps if N in self.sizes.descent.steps)
        return self.sizes.steps

    def _calibrated(self, seed: int) -> tuple[Run, float, float]:
        """The run of a seed, with the evaluations a sample and the seconds of its calibration."""
        run = Run(self.data, self.sizes, seed, Counted(self.data.velocity), None)
        noise, start = run.noise(self.sizes.calibration, 0), time.perf_counter()
        run.cal = fk.calibrate(run.velocity, noise, self.sizes.grid, self.sizes.steps, seed=1000 * seed, progress=False)
        return run, run.counted.count / len(noise), time.perf_counter() - start

    def _given(self, velocity: Callable, seed: int, few: int | None = None) -> Callable:
        """The velocity of held-out noise, or of the first few."""
        field = self.data.given(velocity, self.sizes.held_out, 1000 * seed + 1)
        return field if field is velocity or few is None else field.rows(slice(few), self.sizes.held_out)

    def _figures(self, seed: int, velocity: Callable, noise: Tensor, solver) -> dict:
        counted = Counted(velocity)
        x = fk.sample(self._given(counted, seed), noise, solver)
        errors = endpoint_errors(x, self.teacher)
        error, parts = errors.mean().item(), [part.mean().item() for part in errors.tensor_split(PARTS)]
        there = self.data.distance.describe(x)
        return dict(
            evaluations=counted.count // len(noise),
            endpoint_error=error,
            rms=error**0.5,
            distance_to_teacher=self.data.distance.between(there, self.described),
            distance_to_data=self.data.from_real(there),
            parts=" ".join(f"{part:.5g}" for part in parts),
        )

    def _teacher_rows(self, run: Run, held_out: Tensor) -> list[dict]:
        """The teacher's own error to one on a finer grid, and of a low-precision model to itself in float32."""
        K, few = self.sizes.grid, held_out[: self.sizes.finer]
        found = {}
        if run.seed < self.sizes.straighten.seeds:
            found["teacher"] = self.data.velocity, 4 * K, f"to {4 * K} Euler steps on {len(few)} noises"
            if self.data.velocity is not self.data.network:
                found["float32 teacher"] = self.data.network, K, f"the model to itself in float32 on {len(few)} noises"
        rows = [dict(row="teacher", N=K)] if not found else []
        for name, (velocity, steps, note) in found.items():
            finer = fk.sample(self._given(velocity, run.seed, len(few)), few, steps)
            error = endpoint_error(self.teacher[: len(few)], finer)
            rows.append(dict(row=name, N=K, endpoint_error=error, rms=error**0.5, notes=note))
            print(f"  {name:<18} rms {error**0.5:.4g} {note}", flush=True)
        both = dict(evaluations=K, distance_to_data=self.teacher_to_data)
        return [self._row(run.seed, r.pop("row"), r.pop("N"), **both, **r) for r in rows]

    def _row(self, seed: int, name: str, N: int, **figures) -> dict:
        which = dict(data=self.data.name, seed=seed, row=name, N=N, metric=self.data.distance.name, gate="ok")
        there = dict(teacher_distance_to_data=self.teacher_to_data, settings=self.settings)
        return which | there | figures | self.source

    def _print(self, name: str, rows: list[dict]) -> None:
        if not rows:
            return
        by = {r["N"]: f"{r['rms']:.3g}" for r in rows}
        cells = "".join(f"{by.get(N, '-'):>9}" for N in self.sizes.steps)
        cost = f"{rows[0]['calibration_evaluations']:9.1f} {rows[0]['calibration_seconds']:8.1f} s"
        print(f"  {name:<18}{cells}{cost}", flush=True)


def run(args: argparse.Namespace) -> int:
    """1 if a gate was red or a row failed."""
    chosen = names_of(args.data, SIZES, "--data") if args.data else (["mixture2"] if args.quick else list(SIZES))
    names = names_of(args.rows, ROWS, "--rows") if args.rows else list(ROWS)
    seeds = args.seeds or (1 if args.quick else 3)
    if args.list:
        for name in chosen:
            for which in names:
                print(f"quality: {name}: {which} ({ROWS[which].title})")
        return 0
    source = source_of(args.threads)
    results = Results(args.out / "quality.csv" if args.out else None)
    results.read()
    end, failed, left_out = time.monotonic() + 60 * (args.minutes or math.inf), False, []
    for name in chosen:
        sizes = SIZES[name].quick() if args.quick else SIZES[name]
        data = load(name, lambda text: print(text, flush=True))
        bench = Bench(data, sizes, results, source, lambda: time.monotonic() >= end)
        print(f"\n{name}: {bench.settings}; {data.distance.name}", flush=True)
        if not is_green(data, sizes.grid):
            failed = True
            continue
        print(f"  {'rms':<18}" + "".join(f"{f'N={N}':>9}" for N in sizes.steps) + "  evaluations a sample, time")
        for seed in range(seeds):
            failed |= not bench.seed(seed, names)
        left_out += bench.left_out
    if left_out:
        print(f"\nleft out, {args.minutes:g} minutes being over (--minutes): " + "; ".join(left_out))
    if args.out:
        print(f"{results.path}: {len(results.rows)} rows")
    return int(failed)


def names_of(text: str, known: Iterable[str], option: str) -> list[str]:
    names = text.split(",")
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ValueError(f"{option}: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    return names
