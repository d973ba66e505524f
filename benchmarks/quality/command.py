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
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import flowkernels as fk
from flowkernels import Solver
from flowkernels.bench.tables import write_csv
from flowkernels.models.bundled import BUNDLED
from flowkernels.models.closed_form import GaussianMixtureVelocity
from flowkernels.models.networks import ResidualMLP
from flowkernels.runtime.environment import provenance

from .datasets import digits, fashion
from .metrics import Classifier, Energy, Frechet

STEPS = (1, 2, 3, 4, 6, 8, 10)
FIELDS = (
    *("data", "seed", "row", "N", "evaluations", "endpoint_error", "rms"),
    *("distance_to_teacher", "distance_to_data", "metric", "teacher_distance_to_data"),
    *("calibration_evaluations", "calibration_seconds", "gate", "settings", "notes"),
    *("hardware", "versions", "threads", "commit", "date"),
)
GATE = 1e-4  # largest relative difference of a roll-out in float32 from the same one in float64, or summed otherwise


@dataclass(frozen=True)
class Straightening:
    """What `fk.straighten` is given, for each N of `steps` and the first `seeds` seeds."""

    steps: tuple[int, ...]
    iterations: int
    batch: int
    bank: int
    lr: float
    ema: float
    seeds: int = 3


@dataclass(frozen=True)
class Sizes:
    """How much work a data set is: noises of a calibration, held-out noises, K, how many of the held-out noises the
    finer teacher is rolled out from, samples and iterations of `fk.polish`, and the largest N that it is worth."""

    calibration: int
    held_out: int
    straighten: Straightening
    grid: int = 100
    steps: tuple[int, ...] = STEPS
    finer: int = 256
    polish: tuple[int, int, int] = (512, 6, 10)

    def quick(self) -> "Sizes":
        little = replace(self.straighten, steps=(2,), iterations=8, batch=16, bank=32)
        return Sizes(64, 128, little, grid=20, steps=(1, 2, 4), finer=16, polish=(32, 2, 4))


SIZES = {
    "mixture2": Sizes(1024, 4096, Straightening((2, 4, 8), 400, 256, 4096, 1e-3, 0.99)),
    "mixture64": Sizes(1024, 4096, Straightening((2, 4, 8), 400, 256, 4096, 1e-3, 0.99)),
    "digits": Sizes(1024, 2048, Straightening((2, 4, 8), 400, 256, 4096, 1e-3, 0.99)),
    "fashion": Sizes(256, 384, Straightening((4, 8), 128, 64, 256, 2e-4, 0.95, seeds=1), finer=64, polish=(96, 3, 6)),
}


# Models and data


@dataclass
class Data:
    """A data set's model and what its samples are compared with.

    velocity: the model of the benchmark, teacher and students alike. network: the module in float32 behind it.
    student: makes the module that straightening trains. real: samples of the data, None where there are none.
    """

    name: str
    shape: tuple[int, ...]
    velocity: Callable
    network: nn.Module
    student: Callable[[], nn.Module]
    distance: Energy | Frechet
    real: Tensor | None
    model: str


class Corrected(nn.Module):
    """A closed-form velocity plus a network, zero at first: what straightening trains where there are no weights."""

    def __init__(self, field: nn.Module, dim: int):
        super().__init__()
        self.field, self.net = field, ResidualMLP(dim, width=128, blocks=2, time_width=64)
        nn.init.zeros_(self.net.output.weight), nn.init.zeros_(self.net.output.bias)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.field(x, t) + self.net(x, t)


class Bfloat16(nn.Module):
    """A convolutional network under bfloat16 autocast, float32 outside."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.net(x.contiguous(memory_format=torch.channels_last), t).float()


class InBatches:
    """A compiled velocity called on batches of one size, the last one padded, so that it is compiled once.

    eager: the same for states that need gradients, which would be compiled anew.
    """

    def __init__(self, velocity: Callable, eager: Callable, size: int):
        self.velocity, self.eager, self.size = velocity, eager, size

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        if x.requires_grad:
            return self.eager(x, t)
        parts = []
        for a, b in zip(x.split(self.size), t.split(self.size), strict=True):
            short = self.size - len(a)
            a = torch.cat([a, a[:1].expand(short, *a.shape[1:])]) if short else a
            b = torch.cat([b, b[:1].expand(short)]) if short else b
            parts.append(self.velocity(a.contiguous(), b.contiguous())[: self.size - short])
        return torch.cat(parts)


class Counted:
    """A velocity that counts the samples it is evaluated on; a pass back through it counts as two evaluations."""

    def __init__(self, velocity: Callable):
        self.velocity, self.count = velocity, 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return self.seen(self.velocity(x, t))

    def seen(self, v: Tensor) -> Tensor:
        self.count += len(v)
        if v.requires_grad:
            v.register_hook(lambda gradient: self.passed_back(len(gradient)))
        return v

    def passed_back(self, n: int) -> None:
        self.count += 2 * n


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mixture2() -> GaussianMixtureVelocity:
    """Eight modes on a ring of radius 2, weighted 1 to 8."""
    angle = torch.arange(8) * math.pi / 4
    return GaussianMixtureVelocity(2 * torch.stack([angle.cos(), angle.sin()], 1), 0.15, range(1, 9))


def mixture64() -> GaussianMixtureVelocity:
    """Sixteen random modes in 64 dimensions, some 6 apart, of different widths and weights."""
    g = generator(0)
    means = torch.randn(16, 64, generator=g) / 2
    return GaussianMixtureVelocity(means, 0.1 + 0.4 * torch.rand(16, generator=g), 1 + torch.rand(16, generator=g))


def load(name: str, say: Callable[[str], None]) -> Data:
    """A data set by name; what it lacks on this machine is said."""
    if name in ("mixture2", "mixture64"):
        net = mixture2() if name == "mixture2" else mixture64()
        real = net.sample(SIZES[name].held_out, generator(12345))
        student = lambda: Corrected(copy.deepcopy(net), net.means.shape[1])  # noqa: E731
        return Data(name, net.shape, net, net, student, Energy(), real, "closed form, float32")
    net = BUNDLED[name].load().requires_grad_(False)
    make = lambda: copy.deepcopy(net).requires_grad_(True)  # noqa: E731
    if name == "digits":
        real = _there(lambda: digits()[0], say)
        return Data(name, BUNDLED[name].shape, net, net, make, Energy(), real, "residual MLP, float32")
    real = _there(lambda: fashion("t10k")[0], say)
    distance = Frechet(Classifier.load()[0])
    shape = BUNDLED[name].shape
    eager = Bfloat16(copy.deepcopy(net))
    compiled = InBatches(torch.compile(eager, dynamic=False), eager, 64)
    try:
        with torch.no_grad():
            compiled(torch.zeros(1, *shape), torch.zeros(1))
    except Exception as e:  # whatever a missing or broken compiler makes torch raise
        say(f"fashion: not compiled, so in float32 ({str(e).strip().splitlines()[0]})")
        return Data(name, shape, net, net, make, distance, real, "UNet, float32")
    model = "UNet, bfloat16 autocast, torch.compile, batches of 64"
    return Data(name, shape, compiled, net, lambda: Bfloat16(make()), distance, real, model)


def _there(read: Callable[[], Tensor], say: Callable[[str], None]) -> Tensor | None:
    try:
        return read()
    except (OSError, ImportError) as e:
        say(f"no distances to data: {e}")
        return None


# Rows


@dataclass
class Run:
    """What a row is made from: the model, which counts its evaluations, and its calibration.

    note: what the row has to say of itself.
    """

    data: Data
    sizes: Sizes
    seed: int
    velocity: Counted
    cal: fk.Calibration
    note: str = ""

    def noise(self, n: int, use: int) -> Tensor:
        """Noise of its own for each seed and use: 0 calibration, 1 held out, 2 straightening."""
        return torch.randn(n, *self.data.shape, generator=generator(1000 * self.seed + use))


@dataclass(frozen=True)
class Row:
    """make: run -> {N: Solver or Schedule, or a pair of one and another velocity}.

    calibrated: whether it uses the calibration, whose K evaluations a sample it then answers for.
    trained: whether weights change. known: published elsewhere, here to compare with.
    """

    title: str
    make: Callable[[Run], dict]
    calibrated: bool = True
    trained: bool = False
    known: bool = False


ROWS: dict[str, Row] = {}


def row(name: str, title: str, **settings):
    def add(make):
        ROWS[name] = Row(title, make, **settings)
        return make

    return add


def warped(name: str, title: str, warp: Callable[[Tensor], Tensor]) -> None:
    """A row of Euler steps on the knots warp(u), u uniform."""

    def make(run: Run) -> dict:
        u = {N: torch.linspace(0, 1, N + 1, dtype=torch.float64) for N in run.sizes.steps}
        return {N: Solver.euler(warp(u[N]).clamp(0, 1)) for N in u}

    ROWS[name] = Row(title, make, calibrated=False, known=True)


def multistep(name: str, title: str, order: int, calibrated: bool) -> None:
    def make(run: Run) -> dict:
        return {N: Solver.adams_bashforth(run.cal[N] if calibrated else N, order) for N in run.sizes.steps}

    ROWS[name] = Row(title, make, calibrated=calibrated, known=not calibrated)


def planned(name: str, title: str, objective: str, **settings) -> None:
    """A row of the Bellman recursion with another objective."""

    def plans(run) -> dict:
        return run.cal.find(run.sizes.steps, objective=objective, velocity=run.velocity)

    ROWS[name] = Row(title, plans, **settings)


warped("uniform", "uniform, Euler", lambda u: u)
# of sigma = 1 - t: sigma' = 3 sigma / (1 + 2 sigma). Source: Esser et al. (arXiv 2403.03206), section 5.3.2
warped("shifted", "shifted by 3, Euler", lambda u: u / (3 - 2 * u))
# the cosine schedule's signal-to-noise ratio on a flow's straight paths. Source: Nichol and Dhariwal
# (arXiv 2102.09672); as CosMap in Esser et al., section 3.1
warped("cosine", "cosine, Euler", lambda u: 1 / (1 + 1 / torch.tan(u * math.pi / 2)))
ROWS["boss"] = Row("BOSS's schedule, Euler", lambda run: {N: run.cal[N] for N in run.sizes.steps}, known=True)
planned("gits", "GITS's schedule, Euler", "gits", known=True)
planned("oss", "OSS's schedule, Euler", "student", known=True)
planned("norm", "E abs(e), Euler", "norm")
planned("endpoint", "errors at the endpoint, Euler", "endpoint")
planned("free", "free model times, Euler", "free")
multistep("ab2", "uniform, Adams-Bashforth 2", 2, calibrated=False)
multistep("ab3", "uniform, Adams-Bashforth 3", 3, calibrated=False)
multistep("boss_ab2", "BOSS's schedule, Adams-Bashforth 2", 2, calibrated=True)
multistep("boss_ab3", "BOSS's schedule, Adams-Bashforth 3", 3, calibrated=True)
planned("pairs", "pairs of knots, Adams-Bashforth 2", "pairs")


@row("heun", "uniform, Heun", calibrated=False, known=True)
def _(run: Run) -> dict:
    """By evaluations, of which Heun takes an odd number; all of them, so that there is a curve."""
    return {2 * N - 1: Solver.heun(N) for N in range(1, max(run.sizes.steps) // 2 + 1)}


@row("fitted", "fitted")
def fitted(run: Run) -> dict:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of what the note says
        found = {N: fk.fit_solver(run.velocity, run.cal, N) for N in run.sizes.steps}
    back = [f"{solver.name} at N = {N}" for N, solver in found.items() if solver.name != "fitted"]
    run.note = f"not better on its own held-out samples, so {', '.join(back)}" if back else ""
    return found


@row("fitted3", "fitted, on the best of three knots")
def _(run: Run) -> dict:
    """BOSS's, E|e|'s and those of errors carried to the endpoint; the held-out samples choose for each N."""
    steps = run.sizes.steps
    plans = [run.cal.find(steps, objective=o, velocity=run.velocity) for o in ("squared", "norm", "endpoint")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # where Adams-Bashforth or Euler is better, it is that
        return {N: fk.fit_solver(run.velocity, run.cal, N, schedule=[p[N] for p in plans]) for N in steps}


@row("polished", "fitted, polished")
def _(run: Run) -> dict:
    samples, iterations, most = run.sizes.polish
    options = dict(samples=samples, iterations=iterations)
    found = {N: s if most < N else fk.polish(run.velocity, run.cal, s, **options) for N, s in fitted(run).items()}
    run.note = f"on {samples} samples, at most {iterations} iterations, N up to {most}"
    return found


@row("straightened", "BOSS's schedule, Euler, straightened", trained=True)
def _(run: Run) -> dict:
    s = run.sizes.straighten
    if run.seed >= s.seeds:
        return {}
    found = {}
    for N in s.steps:
        torch.manual_seed(run.seed)
        student = run.data.student()
        student.register_forward_hook(lambda module, inputs, v: run.velocity.seen(v))
        result = fk.straighten(
            student,
            run.velocity,
            run.cal[N],
            noise=run.noise(s.bank, 2),
            init="keep",
            iterations=s.iterations,
            batch=s.batch,
            lr=s.lr,
            ema=s.ema,
            warmup=s.iterations // 10,
            seed=run.seed,
            progress=False,
        )
        found[N] = run.cal[N], result.student.requires_grad_(False)
    run.note = f"{s.iterations} iterations of {s.batch} on {s.bank} trajectories"
    return found


# Measuring


def summed(velocity, noise: Tensor, solver: Solver) -> Tensor:
    """The solver as its definition reads, in plain torch and with every term."""
    x, v = noise, []
    for i, t in enumerate(solver.model_times.tolist()):
        v.append(velocity(x, torch.full((len(x),), t, dtype=x.dtype)))
        x = noise + sum(b * w for b, w in zip(solver.coefficients[i].tolist(), v, strict=False))
    return x


@torch.no_grad()
def gate(data: Data, K: int) -> list[tuple[str, float]]:
    """(what, largest relative difference): the teacher in float32 to float64, and samplers to their definitions."""
    noise = torch.randn(4, *data.shape, generator=generator(99))
    double = copy.deepcopy(data.network).double()
    truth, loop = fk.sample(double, noise.double(), K), fk.sample(data.network, noise, K)
    knots = torch.linspace(0, 1, K + 1, dtype=torch.float64)
    moved = Solver.euler(knots, model_times=knots[:-1] + 1e-9)  # which is no longer Euler's loop to `sample`

    def off(x: Tensor, y: Tensor) -> float:
        return ((x - y).abs().max() / y.abs().max()).item()

    checks = [("float32 teacher to float64", off(loop, truth))]
    checks.append(("Euler as a linear update to Euler's loop", off(fk.sample(data.network, noise, moved), loop)))
    for solver in (Solver.adams_bashforth(8, 3), Solver.heun(4)):
        found = fk.sample(data.network, noise, solver)
        checks.append((f"{solver.name} to its sums in float64", off(found, summed(double, noise.double(), solver))))
    return checks


class Results:
    """The rows of a CSV file, written whole after each addition; without a file in memory only."""

    def __init__(self, path: Path | None):
        self.path, self.rows = path, {}

    def read(self) -> None:
        if self.path is not None and self.path.is_file():
            with open(self.path, newline="") as f:
                for found in csv.DictReader(f):
                    self.rows[found["data"], int(found["seed"]), found["row"], int(found["N"])] = found

    def has(self, key: tuple, settings: str) -> bool:
        return self.rows.get(key, {}).get("settings") == settings

    def add(self, rows: Iterable[dict]) -> None:
        self.read()  # another run may have written to it
        for new in rows:
            self.rows[new["data"], new["seed"], new["row"], new["N"]] = dict.fromkeys(FIELDS, "") | new
        if self.path is not None:
            write_csv(self.path, self.rows.values(), FIELDS)


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
            return self.results.has((self.data.name, seed, name, N), self.settings)

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
        teacher = fk.sample(self.data.velocity, held_out, self.sizes.grid)
        self.teacher, described = teacher, self.data.distance.describe(teacher)
        self.described = described
        self.teacher_to_data = self._to_data(described)
        if not there("teacher", self.sizes.grid):
            self.results.add(self._teacher_rows(run, held_out))
        ok = True
        for name in wanted:
            if self.spent():
                self.left_out.append(f"{self.data.name}, seed {seed}, {name}")
                continue
            run.velocity.count, run.note, began = 0, "", time.perf_counter()
            try:
                made = ROWS[name].make(run)
            except Exception:
                print(f"\n{self.data.name}, seed {seed}: {name} failed\n{traceback.format_exc()}", flush=True)
                ok = False
                continue
            seconds, evaluations = time.perf_counter() - began, run.velocity.count / self.sizes.calibration
            if ROWS[name].calibrated:
                seconds, evaluations = seconds + cal_seconds, evaluations + cal_evaluations
            rows = []
            for N, how in made.items():
                solver, velocity = how if isinstance(how, tuple) else (how, self.data.velocity)
                figures = self._figures(Counted(velocity), held_out, solver)
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
        return self.sizes.steps

    def _calibrated(self, seed: int) -> tuple[Run, float, float]:
        """The run of a seed, with the evaluations a sample and the seconds of its calibration."""
        run = Run(self.data, self.sizes, seed, Counted(self.data.velocity), None)
        noise, start = run.noise(self.sizes.calibration, 0), time.perf_counter()
        run.cal = fk.calibrate(run.velocity, noise, self.sizes.grid, self.sizes.steps, seed=1000 * seed, progress=False)
        return run, run.velocity.count / len(noise), time.perf_counter() - start

    def _figures(self, velocity: Counted, noise: Tensor, solver) -> dict:
        x = fk.sample(velocity, noise, solver)
        error = (x - self.teacher).double().square().flatten(1).sum(1).mean().item()
        there = self.data.distance.describe(x)
        return dict(
            evaluations=velocity.count // len(noise),
            endpoint_error=error,
            rms=error**0.5,
            distance_to_teacher=self.data.distance.between(there, self.described),
            distance_to_data=self._to_data(there),
        )

    def _to_data(self, described) -> float | str:
        if self.data.real is None:
            return ""
        if not hasattr(self, "real"):
            self.real = self.data.distance.describe(self.data.real)
        return self.data.distance.between(described, self.real)

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
            finer = fk.sample(velocity, few, steps)
            error = (self.teacher[: len(few)] - finer).double().square().flatten(1).sum(1).mean().item()
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
    chosen = _names(args.data, SIZES, "--data") if args.data else (["mixture2"] if args.quick else list(SIZES))
    names = _names(args.rows, ROWS, "--rows") if args.rows else list(ROWS)
    seeds = args.seeds or (1 if args.quick else 3)
    if args.list:
        for name in chosen:
            for which in names:
                print(f"quality: {name}: {which} ({ROWS[which].title})")
        return 0
    where = provenance(torch.device("cpu"))
    versions = ", ".join(f"{k} {where[k]}" for k in ("flowkernels", "torch", "python"))
    source = dict(hardware=f"{where['device']}, {where['isa']}", versions=versions, threads=args.threads)
    source |= dict(commit=where["commit"], date=where["date"])
    print(" | ".join(str(v) for v in source.values() if v))
    results = Results(args.out / "quality.csv" if args.out else None)
    results.read()
    end, failed, left_out = time.monotonic() + 60 * (args.minutes or math.inf), False, []
    for name in chosen:
        sizes = SIZES[name].quick() if args.quick else SIZES[name]
        data = load(name, lambda text: print(text, flush=True))
        bench = Bench(data, sizes, results, source, lambda: time.monotonic() >= end)
        print(f"\n{name}: {bench.settings}; {data.distance.name}", flush=True)
        checks = gate(data, sizes.grid)
        red = [f"{what}: {off:.2g} > {GATE:g}" for what, off in checks if not off <= GATE]
        print(
            "  gate: " + ("RED, no figures: " + "; ".join(red) if red else "; ".join(f"{w} {o:.1g}" for w, o in checks))
        )
        if red:
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


def _names(text: str, known: Iterable[str], option: str) -> list[str]:
    names = text.split(",")
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ValueError(f"{option}: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    return names
