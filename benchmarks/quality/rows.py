"""The rows: schedules and solvers whose samples are compared, each made from a calibration or without one."""

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import flowkernels as fk
from flowkernels import Solver
from flowkernels.calibration.effort import BEST, EFFORTS
from flowkernels.solver import adams_bashforth

from .data import Data, Sizes, generator
from .gradient_fits import Pairs, bespoke, ld3


class Counted:
    """A velocity that counts the samples it is evaluated on; a pass back through it counts as two evaluations."""

    def __init__(self, velocity: Callable):
        self.velocity, self.count = velocity, 0

    def __call__(self, x: Tensor, t: Tensor, **conditioning: Tensor) -> Tensor:
        return self.seen(self.velocity(x, t, **conditioning))

    def seen(self, v: Tensor) -> Tensor:
        self.count += len(v)
        if v.requires_grad:
            v.register_hook(lambda gradient: self.passed_back(len(gradient)))
        return v

    def passed_back(self, n: int) -> None:
        self.count += 2 * n


@dataclass
class Run:
    """What a row is made from: the model, which counts its evaluations, and its calibration.

    note: what the row has to say of itself.
    """

    data: Data
    sizes: Sizes
    seed: int
    counted: Counted
    cal: fk.Calibration
    note: str = ""

    @functools.cached_property
    def velocity(self) -> Callable:
        """Of the calibration's samples."""
        return self.given(self.sizes.calibration, 0)

    def given(self, n: int, use: int) -> Callable:
        """The velocity of the noise of a use."""
        return self.data.given(self.counted, n, 1000 * self.seed + use)

    def pairs(self) -> Pairs:
        """The calibration's noise and the teacher's ends of it."""
        noise, rows = self.noise(self.sizes.calibration, 0), getattr(self.velocity, "conditioning", {})

        def of(index: Tensor) -> Callable:
            return functools.partial(self.counted, **{key: value[index] for key, value in rows.items()})

        return Pairs(of, noise, fk.sample(self.velocity, noise, self.sizes.grid))

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
SHIFTS = (1, 3)  # of diffusers' schedulers: none, and Stable Diffusion 3's
STOCK = {
    "dpmpp_2m": "DPM-Solver++ (2M)",
    "dpmpp_3m": "DPM-Solver++ (3M)",
    "unipc_2": "UniPC 2",
    "unipc_3": "UniPC 3",
    "deis_2": "DEIS 2",
    "deis_3": "DEIS 3",
    "heun": "Heun",
}


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
        return {N: adams_bashforth(run.cal[N] if calibrated else N, order) for N in run.sizes.steps}

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
planned("oss", "OSS's schedule, Euler", "oss", known=True)
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


def stock(name: str, title: str, shift: float) -> None:
    """A row of a stock sampler, as a Solver that is equal to diffusers' scheduler (tests/test_stock.py)."""
    key = name if shift == 1 else f"{name}, shift {shift:g}"

    def make(run: Run) -> dict:
        found = {N: fk.stock_solvers(N, shift=shift) for N in run.sizes.steps}
        return {N: solvers[key] for N, solvers in found.items() if key in solvers}

    title = f"{title}, diffusers" + ("" if shift == 1 else f", shift {shift:g}")
    of_flow = "flow_heun" if name == "heun" else name
    ROWS[of_flow if shift == 1 else f"{of_flow}_shift{shift:g}"] = Row(title, make, calibrated=False, known=True)


for name, title in STOCK.items():
    for shift in SHIFTS:
        stock(name, title, shift)


def by_gradient(name: str, title: str, method: Callable, rate: str) -> None:
    def make(run: Run) -> dict:
        how, pairs = run.sizes.descent, run.pairs()
        wanted = [N for N in run.sizes.steps if how.steps is None or N in how.steps]
        found = {N: method(pairs, N, how, generator(1000 * run.seed + 3)) for N in wanted}
        taken = ", ".join(f"N = {N}: {solver.name.partition(', ')[2]}" for N, solver in found.items())
        cosine = f"Adam from {getattr(how, rate):g}, cosine to 0"
        run.note = f"{how.iterations} iterations of {how.batch}, twice, {cosine}; taken: {taken}"
        return found

    ROWS[name] = Row(title, make, calibrated=False, known=True)


by_gradient("ld3", "LD3: times by gradients", ld3, "ld3")
by_gradient("bespoke", "Bespoke Non-Stationary: times and coefficients by gradients", bespoke, "bespoke")


def one_call(effort: str) -> None:
    """A row of what one call of `fk.calibrate` finds best for each N."""

    def make(run: Run) -> dict:
        steps, noise = run.sizes.steps, run.noise(run.sizes.calibration, 0)
        options = dict(effort=effort, seed=1000 * run.seed, progress=False)
        if effort == BEST and run.sizes.budget is not None:
            options["evaluations"] = run.sizes.budget * len(noise)
        cal = fk.calibrate(run.velocity, noise, run.sizes.grid, steps, **options)
        found = {N: cal.best(N) for N in steps}
        run.note = "taken: " + ", ".join(f"N = {N}: {getattr(plan, 'name', 'schedule')}" for N, plan in found.items())
        return found

    ROWS[effort] = Row(f'calibrate(effort="{effort}"), cal.best(N)', make, calibrated=False)


for effort in EFFORTS[1:]:  # but "schedule"
    one_call(effort)


@row("straightened", "BOSS's schedule, Euler, straightened", trained=True)
def _(run: Run) -> dict:
    s = run.sizes.straighten
    if run.seed >= s.seeds:
        return {}
    found = {}
    for N in s.steps:
        torch.manual_seed(run.seed)
        student = run.data.student()
        student.register_forward_hook(lambda module, inputs, v: run.counted.seen(v))
        result = fk.straighten(
            run.data.given(student, s.bank, 1000 * run.seed + 2),
            run.given(s.bank, 2),
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
        trained = result.student.requires_grad_(False)
        found[N] = run.cal[N], trained if run.data.observe is None else trained.net
    run.note = f"{s.iterations} iterations of {s.batch} on {s.bank} trajectories"
    return found
