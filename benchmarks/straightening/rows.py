"""The rows: targets of the trainer, what they begin from, and BOSS's published procedure.

A target that the trainer gets is a line here: `trained(name, title, schedule or solver, settings of fk.straighten)`.
"""

import copy
import math
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

import flowkernels as fk
from flowkernels.evaluation.endpoint import endpoint_error

from ..quality.data import Bfloat16, Data, generator
from ..quality.rows import Counted
from . import published
from .clock import Clock

Plan = fk.Schedule | fk.Solver
Made = dict[int, tuple[Callable, Plan]]  # of each N the velocity that is sampled, and on what


@dataclass(frozen=True)
class Sizes:
    """How much work a data set is.

    calibration, held_out, bank: noises of each use. published_costs: noises of the published procedure's costs.
    iterations: of training, the same for all. fewer: and of runs of their own, which show how soon an error is reached,
    for the N of fewer_steps. looks: how often the published procedure is evaluated meanwhile.
    """

    calibration: int
    held_out: int
    bank: int
    batch: int
    lr: float
    fewer: tuple[int, ...]
    fewer_steps: tuple[int, ...] = (2, 4)
    iterations: int = 1500
    published_costs: int = 100
    grid: int = 100
    looks: int = 15
    steps: tuple[int, ...] = (1, 2, 4, 8)

    @property
    def chunk(self) -> int:
        """Samples of an evaluation without gradients."""
        return max(64, self.batch)

    def quick(self) -> "Sizes":
        return Sizes(32, 64, 48, 16, self.lr, (4,), iterations=8, published_costs=32, grid=13, looks=2, steps=(1, 2))


SIZES = {
    "digits": Sizes(512, 2048, 8192, 128, 2e-4, (100, 300)),
    "fashion": Sizes(256, 384, 1024, 32, 2e-4, (150,), grid=40),
}


def noise_of(data: Data, seed: int, use: int, n: int) -> Tensor:
    """Noise of its own for each seed and use: 0 calibration, 1 held out, 2 banks, 3 the published costs."""
    return torch.randn(n, *data.shape, generator=generator(1000 * seed + use))


def trajectories(velocity: Callable, sizes: Sizes, noise: Tensor, schedules) -> fk.TrajectoryBank:
    return fk.TrajectoryBank(velocity, schedules, noise=noise, grid=sizes.grid, chunk=sizes.chunk, progress=False)


@dataclass
class Run:
    """What a row is made from.

    steps: the N asked for. velocity: the teacher, which counts its evaluations, and those of students.
    cal: its calibration. bank: its states at the knots that many rows have. held_out, goal: noise that nothing else
    sees, and the teacher's samples of it.
    clock: runs while a row works. stepped: what it showed after each step of an optimiser. curve: (iterations, seconds,
    seconds of processor, rms) of a row that is looked at on its way.
    """

    data: Data
    sizes: Sizes
    seed: int
    steps: tuple[int, ...]
    iterations: int
    velocity: Counted
    cal: fk.Calibration
    held_out: Tensor
    goal: Tensor
    bank: fk.TrajectoryBank | None = None
    clock: Clock = field(default_factory=Clock)
    stepped: list[tuple[float, float]] = field(default_factory=list)
    curve: list[tuple[int, float, float, float]] = field(default_factory=list)

    def optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """Adam, whose steps are noted."""
        adam = torch.optim.Adam(parameters, lr=self.sizes.lr)
        adam.register_step_post_hook(lambda *_: self.stepped.append(self.clock.now()))
        return adam

    def iteration(self) -> tuple[float, float]:
        """Seconds of one, and of the processor."""
        count = len(self.stepped) - 1
        return tuple((last - first) / count for first, last in zip(self.stepped[0], self.stepped[-1], strict=True))

    def noise(self, use: int, n: int) -> Tensor:
        return noise_of(self.data, self.seed, use, n)

    def student(self, part: int = 1) -> nn.Module:
        """A copy of the teacher, whose evaluations are counted; or one of a part of its width, of random weights."""
        torch.manual_seed(self.seed)
        student = self.data.student()
        if part > 1:
            student = narrower(student, part)
        student.register_forward_hook(lambda module, inputs, v: self.velocity.seen(v))
        return student

    @torch.no_grad()
    def samples(self, velocity: Callable, plan: Plan) -> Tensor:
        """Of the held-out noise, a chunk at a time and uncounted."""
        count = self.velocity.count
        x = torch.cat([fk.sample(velocity, part, plan) for part in self.held_out.split(self.sizes.chunk)])
        self.velocity.count = count
        return x

    def look(self, iteration: int, velocity: Callable, plan: Plan) -> None:
        """Note how far its samples are from the teacher's, while the clock stands still."""
        rms = endpoint_error(self.samples(velocity, plan), self.goal) ** 0.5
        self.curve.append((iteration, self.clock.wall, self.clock.processor, rms))


def narrower(student: nn.Module, part: int) -> nn.Module:
    """A network of the same kind, in the same precision, of one `part`-th of its width; its weights are random."""
    if isinstance(student, Bfloat16):
        return Bfloat16(narrower(student.net, part))
    config = dict(student.config)
    if "width" in config:
        config["width"] //= part
    else:
        config["widths"] = [width // part for width in config["widths"]]
    return type(student)(**config)


class OfTwo(nn.Module):
    """A network of the same kind, of random weights, on two states joined at dimension 1; it answers with one."""

    def __init__(self, student: nn.Module):
        super().__init__()
        same = student.net if isinstance(student, Bfloat16) else student
        size = "dim" if "dim" in same.config else "channels"
        net = type(same)(**same.config | {size: 2 * same.config[size]})
        self.net = Bfloat16(net) if isinstance(student, Bfloat16) else net

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.net(x, t)[:, : x.shape[1] // 2]


@dataclass(frozen=True)
class Row:
    """make: run -> Made, with the run's clock. trained: whether weights change. any_steps: whether one student is for
    every N. only: the N it is for. calibrated: whether it uses the calibration; shared: and the bank of all. fewer:
    whether it is also run with fewer iterations. float32: of the network in float32, where the data's is not.
    not_of: data whose model has no derivative in forward mode. needs: a package that is asked for; without it the row
    is left out."""

    title: str
    make: Callable[[Run], Made]
    trained: bool = True
    any_steps: bool = False
    only: tuple[int, ...] | None = None
    calibrated: bool = True
    shared: bool = False
    fewer: bool = False
    float32: bool = False
    not_of: tuple[str, ...] = ()
    needs: str = ""


ROWS: dict[str, Row] = {}


# ---- without training ----


def knots(run: Run, N: int) -> fk.Schedule:
    return run.cal[N]


def uniform(run: Run, N: int) -> fk.Schedule:
    return fk.Schedule.uniform(N)


def fitted(run: Run, N: int) -> fk.Solver:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # where another is better, it is that
        return fk.fit_solver(run.velocity, run.cal, N)


def fitted3(run: Run, N: int) -> fk.Solver:
    """On BOSS's knots, E|e|'s or those of errors carried to the endpoint; the held-out samples choose."""
    plans = [run.cal.find(N, objective=o, velocity=run.velocity)[N] for o in ("squared", "norm", "endpoint")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return fk.fit_solver(run.velocity, run.cal, N, schedule=plans)


def polished(run: Run, N: int) -> fk.Solver:
    return fk.polish(run.velocity, run.cal, fitted(run, N))


def untrained(name: str, title: str, plan: Callable[[Run, int], Plan]) -> None:
    def make(run: Run) -> Made:
        with run.clock:
            return {N: (run.data.velocity, plan(run, N)) for N in run.steps}

    ROWS[name] = Row(title, make, trained=False)


untrained("schedule", "BOSS's schedule, untrained", knots)
untrained("fitted", "fitted solver, untrained", fitted)
untrained("fitted3", "fitted solver on the best of three knots, untrained", fitted3)
untrained("polished", "fitted solver, polished, untrained", polished)


# ---- fk.straighten ----


def trained(
    name: str,
    title: str,
    plan: Callable[[Run, int], Plan],
    settings: dict | Callable[[Run], dict],
    student: Callable[[Run, Plan], nn.Module] = lambda run, plan: run.student(),
    sampled: Callable[[nn.Module, Plan], Callable] = lambda student, plan: student,
    batch: Callable[[Sizes, int], int] = lambda sizes, N: sizes.batch,
    shared: bool = True,
    rate: float = 1.0,
    **of_row,
) -> None:
    """plan: (run, N) -> what is trained for, and sampled on unless the training returns a solver. sampled: (student,
    plan) -> the velocity that is sampled. shared: whether it is trained on the bank of all, which has the knots of the
    calibration's schedules."""

    def make(run: Run) -> Made:
        s = run.sizes
        learned = settings(run) if callable(settings) else settings
        with run.clock:
            plans = {N: plan(run, N) for N in run.steps}
            of_most = plans[max(run.steps)]
            bank = run.bank
            if not shared:
                own = fk.StraightenLoss(of_most, teacher=run.velocity, **learned)
                bank = trajectories(run.velocity, s, run.noise(2, s.bank), own)
            result = fk.straighten(
                student(run, of_most),
                run.velocity,
                of_most,
                init="keep",
                iterations=run.iterations,
                batch=batch(s, max(run.steps)),
                lr=rate * s.lr,
                optimizer=run.optimizer,
                warmup=run.iterations // 15,
                ema=None,
                seed=run.seed,
                progress=False,
                bank=bank,
                **learned,
            )
        if result.solver is not None:
            plans = {result.solver.steps: result.solver}
        trained = result.student.requires_grad_(False)
        return {N: (sampled(trained, plan), plan) for N, plan in plans.items()}

    ROWS[name] = Row(title, make, shared=shared, **of_row)


def improved(run: Run) -> dict:
    c = 0.00054 * math.prod(run.data.shape) ** 0.5
    return dict(target="reflow", t_sampling="u_shaped", loss="huber", huber_c=c)


def accelerated(run: Run, plan: Plan) -> fk.Acceleration:
    second = OfTwo(run.data.student())
    second.register_forward_hook(lambda module, inputs, a: run.velocity.seen(a))
    return fk.Acceleration(run.student(), second)


def two_times(run: Run, plan: Plan) -> fk.AverageVelocity:
    student = run.student()
    name = "net.time" if isinstance(student, Bfloat16) else None
    return fk.AverageVelocity.from_velocity(student, time_embedding=name)


def adapted(run: Run, plan: Plan) -> nn.Module:
    """Adapters on the teacher's own weights, with at most 5 % as many parameters."""
    torch.manual_seed(run.seed)
    student = fk.add_lora(getattr(run.data.velocity, "eager", run.data.velocity), LORA[run.data.name])
    student.register_forward_hook(lambda module, inputs, v: run.velocity.seen(v))
    return student


LORA = {"digits": 4, "fashion": 8}  # ranks
WHOLE = dict(any_steps=True)
trained("boss", "`boss`", knots, {}, fewer=True)
trained("lora", "`boss`, LoRA, 10 times the learning rate", knots, {}, student=adapted, rate=10.0, needs="peft")
trained("boss_uniform", '`boss`, t_sampling="uniform" (piecewise reflow)', knots, dict(t_sampling="uniform"))
trained("reflow", "`reflow`", uniform, dict(target="reflow"), **WHOLE)
trained("improved_reflow", "`reflow`, u_shaped, pseudo-Huber (improved rectified flow)", uniform, improved, **WHOLE)
simple = dict(target="reflow", t_sampling="ten", weighting="per_sample_normalised")
trained("simple_reflow", "`reflow`, ten, normalised (Simple ReFlow)", uniform, simple, **WHOLE)
trained("distill", "`distill`", uniform, dict(target="distill"), only=(1,))
small = WHOLE | dict(student=lambda run, plan: run.student(2))
trained("small_reflow", "`reflow`, a student of half the width", uniform, dict(target="reflow"), **small)
annealed = dict(target="annealed_reflow")
trained("annealed_reflow", "`annealed_reflow`, a student of half the width (SlimFlow)", uniform, annealed, **small)
cauchy = dict(target="next_knot", loss="cauchy")
trained("next_knot", "`next_knot`, Cauchy (trajectory consistency)", knots, cauchy, shared=False)
trained("velocity_matching", "`velocity_matching`", knots, dict(target="velocity_matching"), shared=False)
two = WHOLE | dict(student=accelerated)
title = "`acceleration`, two networks, N + 1 evaluations (constant acceleration flow)"
trained("acceleration", title, uniform, dict(target="acceleration"), **two)
trained("on_policy", "`on_policy`", knots, dict(target="on_policy"))
each = dict(student=lambda run, plan: fk.Blockwise(run.student(), plan), only=(2, 4, 8))
trained("blockwise", "`blockwise`, N networks", knots, dict(target="blockwise"), **each)
noise = WHOLE | dict(student=lambda run, plan: fk.NoisePrediction(run.student()))
trained("noise", "`noise` (Rectified Diffusion)", uniform, dict(target="noise"), **noise)
of_two_times = WHOLE | dict(student=two_times, sampled=lambda student, plan: student.on(plan))
title = "`average_velocity`, of two times (SplitMeanFlow)"
trained("average_velocity", title, knots, dict(target="average_velocity"), **of_two_times)
derived = dict(target="average_velocity", consistency="derivative", weighting="adaptive")
trained(
    "mean_flow", "`average_velocity` by the derivative (MeanFlow)", knots, derived, not_of=("fashion",), **of_two_times
)
# each sample is evaluated N times, so that a batch is smaller and its gradient noisier
shared_out = dict(batch=lambda s, N: max(1, s.batch // N), rate=0.5, fewer=True)
trained("solver", "`solver`, from the fitted one", fitted, dict(target="solver"), fewer=True)
trained("endpoint", "`endpoint`, from the polished solver", polished, dict(target="endpoint"), **shared_out)
trained("endpoint_fitted", "`endpoint`, from the fitted solver", fitted, dict(target="endpoint"), **shared_out)


# ---- the baseline ----


def as_published(run: Run) -> Made:
    (N,), s = run.steps, run.sizes
    times = torch.linspace(0, 1, s.grid + 1)
    every = max(1, run.iterations // s.looks)
    with tempfile.TemporaryDirectory() as folder, run.clock:
        costs = published.step_costs(run.velocity, run.noise(3, s.published_costs), times)
        path = published.shortest_path(costs, N)
        published.write_examples(run.velocity, run.noise(2, s.bank), times, path, Path(folder))
        examples = published.read_examples(Path(folder))
    schedule = fk.Schedule([k / s.grid for k in path])
    student = run.student()
    averaged = copy.deepcopy(student).requires_grad_(False).eval()
    options = dict(batch=s.batch, lr=s.lr, warmup=max(1, run.iterations // 15), seed=run.seed)
    steps = published.training(student, examples, **options)
    for i in range(1, run.iterations + 1):
        with run.clock:
            weights = next(steps)
            run.stepped.append(run.clock.now())
        if i % every == 0 or i == run.iterations:
            for mean, p in zip(weights, averaged.parameters(), strict=True):
                p.copy_(mean)
            run.look(i, averaged, schedule)
    return {N: (averaged, schedule)}


ROWS["published"] = Row("BOSS as published", as_published, calibrated=False)
ROWS["published_float32"] = Row("BOSS as published, in float32", as_published, calibrated=False, float32=True)
