"""`flowkernels bench straightening`: what the trainer's targets reach, and what they cost.

    flowkernels bench straightening --out benchmarks/results && python scripts/straightening_report.py
    flowkernels bench straightening --data fashion --rows published,boss,solver --steps 4 --out benchmarks/results

For each data set, row and N: the endpoint error to the teacher (Euler on the fine grid, from equal noise) and the
distances of the samples, on held-out noise; evaluations and seconds of all that the row takes, its calibration and bank
included. Then how soon the rows have the error that BOSS's published procedure has in the end. Every row is written as
it is measured; one that the CSV file has with equal settings is not measured again.
"""

import argparse
import copy
import dataclasses
import importlib.util
import math
import re
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch import Tensor

import flowkernels as fk
from flowkernels.evaluation.distances import Energy, Frechet
from flowkernels.evaluation.endpoint import endpoint_error

from ..quality.command import Results, is_green, names_of, source_of
from ..quality.data import Data, load
from ..quality.rows import Counted
from .clock import Clock, Memory
from .reached import print_reached, reached
from .rows import ROWS, SIZES, Run, Sizes, noise_of, trajectories

FIELDS = (
    *("data", "seed", "row", "N", "iterations", "rms", "distance_to_teacher", "distance_to_data"),
    *("metric", "teacher_distance_to_data", "evaluations", "seconds", "processor_seconds"),
    *("iteration_seconds", "iteration_processor_seconds", "memory_mb", "curve"),
    *("gate", "settings", "hardware", "versions", "threads", "commit", "date"),
)
KEY = ("data", "seed", "row", "N", "iterations")


@dataclass
class Teacher:
    """What samples of held-out noise are compared with."""

    distance: Energy | Frechet
    samples: Tensor
    described: object = field(init=False)

    def __post_init__(self):
        self.described = self.distance.describe(self.samples)


@dataclass
class Bench:
    """One data set, under way."""

    data: Data
    sizes: Sizes
    seed: int
    results: Results
    source: dict
    spent: Callable[[], bool]
    left_out: list[str] = field(default_factory=list)
    _teachers: dict[bool, Teacher] = field(default_factory=dict)
    _calibrated: tuple[fk.Calibration, Clock, int] | None = None
    _filled: tuple[fk.TrajectoryBank, Clock] | None = None

    @property
    def settings(self) -> str:
        s = self.sizes
        uses = f"calibration {s.calibration}, published costs {s.published_costs}, bank {s.bank}, held out {s.held_out}"
        return f"{self.data.model}; K {s.grid}, {uses}; batch {s.batch}, lr {s.lr:g}"

    def run(self, wanted: list[tuple[str, tuple[int, ...], int]]) -> bool:
        """Measure the rows that are not there yet; whether all went well."""
        ok = True
        for name, steps, iterations in wanted:
            if all(self.results.has(self._row(name, N, iterations)) for N in steps):
                continue
            if self.spent():
                self.left_out.append(f"{self.data.name}: {name}, N = {steps}")
                continue
            try:
                self.results.add(list(self._measured(name, steps, iterations)))
            except Exception:
                print(f"\n{self.data.name}: {name} failed\n{traceback.format_exc()}", flush=True)
                ok = False
        return ok

    def warm_up(self) -> None:
        """What the first row would pay for all."""
        noise = self._noise(0, 4)
        cal = fk.calibrate(self.data.velocity, noise, 4, [2], progress=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            fk.polish(self.data.velocity, cal, fk.fit_solver(self.data.velocity, cal, 2), iterations=1)
        options = dict(noise=noise, iterations=1, batch=4, init="keep", progress=False)
        fk.straighten(self.data.student(), self.data.velocity, cal[2], **options)

    def _measured(self, name: str, steps: tuple[int, ...], iterations: int) -> Iterator[dict]:
        row = ROWS[name]
        data = in_float32(self.data) if row.float32 else self.data
        teacher = self._teacher(row.float32)
        cal, spent, evaluations = self._calibration()
        velocity, held_out = Counted(data.velocity), self._noise(1, self.sizes.held_out)
        run = Run(data, self.sizes, self.seed, steps, iterations, velocity, cal, held_out, teacher.samples)
        if row.calibrated:
            run.clock.add(spent)
            velocity.count += evaluations
        if row.shared:
            run.bank, rolled_out = self._bank()
            run.clock.add(rolled_out)
            velocity.count += run.bank.size * self.sizes.grid
        if row.needs:
            importlib.import_module(row.needs)  # whose own memory is not the row's
        memory = Memory()
        made = row.make(run)
        costs = dict(evaluations=velocity.count, seconds=run.clock.wall, processor_seconds=run.clock.processor)
        if len(run.stepped) > 1:
            costs["iteration_seconds"], costs["iteration_processor_seconds"] = run.iteration()
        peak = memory.peak()
        costs["memory_mb"] = "" if peak is None else peak + (run.bank.nbytes / 2**20 if row.shared else 0)
        costs["curve"] = ";".join(" ".join(f"{value:.6g}" for value in point) for point in run.curve)
        for N, (sampled, plan) in made.items():
            found = self._row(name, N, iterations) | costs | self._figures(run.samples(sampled, plan), teacher)
            print_row(found)
            yield found

    def _figures(self, x: Tensor, teacher: Teacher) -> dict:
        there = self.data.distance.describe(x)
        to_teacher = self.data.distance.between(there, teacher.described)
        error = endpoint_error(x, teacher.samples)
        teacher_to_data = self.data.from_real(teacher.described)
        return dict(
            rms=error**0.5,
            distance_to_teacher=to_teacher,
            distance_to_data=self.data.from_real(there),
            teacher_distance_to_data=teacher_to_data,
        )

    def _row(self, name: str, N: int, iterations: int) -> dict:
        which = dict(data=self.data.name, seed=self.seed, row=name, N=N, iterations=iterations)
        return which | dict(metric=self.data.distance.name, gate="ok", settings=self.settings) | self.source

    def _noise(self, use: int, n: int) -> Tensor:
        return noise_of(self.data, self.seed, use, n)

    def _teacher(self, float32: bool) -> Teacher:
        if float32 not in self._teachers:
            velocity = self.data.network if float32 else self.data.velocity
            x = fk.sample(velocity, self._noise(1, self.sizes.held_out), self.sizes.grid)
            self._teachers[float32] = Teacher(self.data.distance, x)
        return self._teachers[float32]

    def _calibration(self) -> tuple[fk.Calibration, Clock, int]:
        """With what it took."""
        if self._calibrated is None:
            velocity, clock, s = Counted(self.data.velocity), Clock(), self.sizes
            noise = self._noise(0, s.calibration)
            with clock:
                cal = fk.calibrate(velocity, noise, s.grid, s.steps, seed=1000 * self.seed, progress=False)
            self._calibrated = cal, clock, velocity.count
        return self._calibrated

    def _bank(self) -> tuple[fk.TrajectoryBank, Clock]:
        """Of the knots of all N, for all rows; with what it took."""
        if self._filled is None:
            clock, s, schedules = Clock(), self.sizes, list(self._calibration()[0].schedules.values())
            with clock:
                bank = trajectories(self.data.velocity, s, self._noise(2, s.bank), schedules).fill()
            self._filled = bank, clock
        return self._filled


def in_float32(data: Data) -> Data:
    """The same model, teacher and students in float32."""
    student = lambda: copy.deepcopy(data.network).requires_grad_(True)  # noqa: E731
    return dataclasses.replace(data, velocity=data.network, student=student)


def print_row(found: dict) -> None:
    name = f"{found['row']}, N = {found['N']}" + (f", {found['iterations']} iterations" if found["iterations"] else "")
    spent = f"{found['seconds']:8.1f} s, of processor {found['processor_seconds']:8.1f} s"
    print(f"  {name:<40}rms {found['rms']:<8.4g}{spent}", flush=True)


def wanted(data: Data, sizes: Sizes, args: argparse.Namespace) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """(row, the N that it has at once, iterations) of what was asked for."""
    chosen = numbers(args.steps, "--steps") or sizes.steps
    for name in names_of(args.rows, ROWS, "--rows") if args.rows else ROWS:
        row = ROWS[name]
        if data.name in row.not_of or (row.float32 and data.velocity is data.network):
            continue
        if row.needs and importlib.util.find_spec(row.needs) is None:
            print(f"  {name} is left out: there is no {row.needs}", flush=True)
            continue
        steps = tuple(N for N in chosen if row.only is None or N in row.only)
        asked = numbers(args.iterations, "--iterations")
        for at_once in [steps] if row.any_steps else [(N,) for N in steps]:
            fewer = sizes.fewer if set(at_once) <= set(sizes.fewer_steps) else ()
            iterations = asked or (*fewer, sizes.iterations)
            for some in (iterations if row.fewer else iterations[-1:]) if row.trained else (0,):
                if at_once:
                    yield name, at_once, some


def numbers(text: str | None, option: str) -> tuple[int, ...]:
    if text is None:
        return ()
    found = text.split(",")
    if not all(re.fullmatch("[1-9][0-9]{0,5}", word) for word in found):
        raise ValueError(f"{option}: expected numbers such as 2,4, got {text}")
    return tuple(map(int, found))


def run(args: argparse.Namespace) -> int:
    """1 if a gate was red or a row failed."""
    chosen = names_of(args.data, SIZES, "--data") if args.data else (["digits"] if args.quick else list(SIZES))
    if args.rows:
        names_of(args.rows, ROWS, "--rows")
    for option in ("steps", "iterations"):
        numbers(getattr(args, option), f"--{option}")
    if args.list:
        for name in chosen:
            for which in names_of(args.rows, ROWS, "--rows") if args.rows else ROWS:
                print(f"straightening: {name}: {which} ({ROWS[which].title})")
        return 0
    source = source_of(args.threads)
    results = Results(args.out / "straightening.csv" if args.out else None, FIELDS, KEY)
    results.read()
    end, failed, left_out = time.monotonic() + 60 * (args.minutes or math.inf), False, []
    for name in chosen:
        sizes = SIZES[name].quick() if args.quick else SIZES[name]
        data = load(name, lambda text: print(text, flush=True))
        for seed in range(args.seeds or 1):
            bench = Bench(data, sizes, seed, results, source, lambda: time.monotonic() >= end)
            print(f"\n{name}, seed {seed}: {bench.settings}; {data.distance.name}", flush=True)
            if not is_green(data, sizes.grid):
                failed = True
                break
            bench.warm_up()
            failed |= not bench.run(list(wanted(data, sizes, args)))
            left_out += bench.left_out
    print_reached(reached(results.rows.values()))
    if left_out:
        print(f"\nleft out, {args.minutes:g} minutes being over (--minutes): " + "; ".join(left_out))
    if args.out:
        print(f"{results.path}: {len(results.rows)} rows")
    return int(failed)
