"""The demo: a bundled model, from calibration to a report folder."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import flowkernels as fk
from flowkernels._files import whole_folder, write_or_keep
from flowkernels.calibration.card import BELLMAN, CHOICES, FITTED, UNIFORM
from flowkernels.evaluation.endpoint import endpoint_errors
from flowkernels.models.bundled import BUNDLED, save_network
from flowkernels.runtime.environment import environment
from flowkernels.solver import Solver
from flowkernels.velocity.identity import parameter_hash


@dataclass(frozen=True)
class Settings:
    """How much work the demo does.

    calibration: noises for the step costs. effort, evaluations: of `calibrate`. held_out: noises for the endpoint
    errors, in no other use.
    iterations, batch, bank, lr, ema: of `straighten`. grid: K, fine steps of the teacher. steps: the table's N.
    straighten: the N that is straightened. pictured: samples in the picture.
    """

    calibration: int
    effort: str
    evaluations: int | None
    held_out: int
    iterations: int
    batch: int
    bank: int
    lr: float
    ema: float
    grid: int = 100
    steps: tuple[int, ...] = (2, 3, 4, 6, 8)
    straighten: int = 4
    pictured: int = 12


SETTINGS = {
    "digits": Settings(
        calibration=512,
        effort="best",
        evaluations=2_000_000,
        held_out=1024,
        iterations=1500,
        batch=64,
        bank=8192,
        lr=5e-4,
        ema=0.995,
    ),
    "fashion": Settings(
        calibration=32,
        effort="fit",
        evaluations=None,
        held_out=32,
        iterations=128,
        batch=8,
        bank=112,
        lr=5e-5,
        ema=0.95,
    ),
}


def _error_cells(name: str, x: Tensor, teacher: Tensor) -> dict[str, float]:
    """The endpoint error of a row, and the standard error of that mean."""
    each = endpoint_errors(x, teacher)
    return {f"error_{name}": each.mean().item(), f"error_{name}_se": (each.std() / len(each) ** 0.5).item()}


def fused(net, schedule, shape: tuple[int, ...]):
    """The network with its steps in one call, or the network itself where it is no stack of linear layers."""
    try:
        return fk.fuse(net, schedule, shape=shape)
    except fk.NotFusable:
        return net


def run(
    data: str = "digits",
    out: str | Path = "flowkernels-report",
    *,
    seed: int = 0,
    settings: Settings | None = None,
    progress: bool = True,
) -> dict:
    """Calibrate, evaluate, straighten and sample a bundled model, and write the report folder.

    Args:
        data: "digits" or "fashion".
        out: the report folder. A previous report there is replaced; anything else is an error before any work.
        seed: of all noise; calibration, straightening and evaluation draw from seeds of their own.
        settings: how much work; None takes the data set's.
        progress: show progress bars, one line a stage, and the table.

    Returns:
        What `report.json` holds: table, straightened, history, provenance, seconds, environment, settings.
    """
    from flowkernels.cli import plot, report  # bring matplotlib along, which nothing else needs

    bundled, s = BUNDLED[data], settings or SETTINGS[data]
    out = report.expect_report_folder(out)
    seconds: dict[str, float] = {}

    def say(text: str) -> None:
        if progress:
            tqdm.write(text)

    @contextlib.contextmanager
    def stage(name: str, what: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        seconds[name] = time.perf_counter() - start
        say(f"{name:<10} {seconds[name]:6.1f} s   {what}")

    def noise(n: int, offset: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed + offset)
        return torch.randn(n, *bundled.shape, generator=generator, dtype=torch.float32, device="cpu")

    with stage("load", f"{data}, samples of shape {list(bundled.shape)}"):
        net = bundled.load()
        velocity = fused(net, s.grid, bundled.shape)
    evaluated, N = sorted({*s.steps, s.straighten}), s.straighten
    what = f"{s.calibration} noises, {s.grid} fine steps, the best solver of each N, no training (effort={s.effort!r})"
    with stage("calibrate", what):
        calibration = fk.calibrate(
            velocity,
            noise(s.calibration, 0),
            s.grid,
            evaluated,
            effort=s.effort,
            evaluations=s.evaluations,
            seed=seed,
            progress=progress,
        )

    held_out, plan = noise(s.held_out, 2), Solver.of(calibration.best(N))
    with stage("evaluate", f"endpoint errors on {s.held_out} other noises"):
        teacher = fk.sample(velocity, held_out, s.grid, progress=progress)
        rows, ends = [], {}
        for n in evaluated:
            best = calibration[n]
            row = {"steps": n, "cost_uniform": best.uniform_cost, "cost_bellman": best.cost, "ratio": best.ratio}
            plans = {UNIFORM: calibration.uniform(n), BELLMAN: best, FITTED: calibration.best(n)}
            for name, how in plans.items():
                ends[name, n] = fk.sample(velocity, held_out, how)
                row |= _error_cells(name, ends[name, n], teacher)
            rows.append(row)
    with stage("straighten", f"N = {N}, {s.iterations} iterations on {s.bank} trajectories"):
        result = fk.straighten(
            None,
            velocity,
            plan,
            target="endpoint",
            grid=s.grid,
            noise=bundled.shape,
            iterations=s.iterations,
            batch=s.batch,
            bank=s.bank,
            lr=s.lr,
            ema=s.ema,
            warmup=s.iterations // 10,
            seed=seed + 1,
            progress=progress,
        )
    with stage("sample", f"{s.held_out} samples, {N} steps, straightened"):
        student = fused(result.student, result.solver, bundled.shape)
        straightened = fk.sample(student, held_out, result.solver)
        next(r for r in rows if r["steps"] == N).update(_error_cells("straightened", straightened, teacher))

    shown = {name: ends[name, N] for name in CHOICES} | {"straightened": straightened}
    pictures = {name: x[: s.pictured] for name, x in {"teacher": teacher, **shown}.items()}
    results = {
        "format": report.FORMAT,
        "data": data,
        "seed": seed,
        "settings": asdict(s),
        "endpoint_error": "mean over samples of the squared L2 distance to the teacher's endpoint",
        "table": rows,
        "solver": result.solver.to_dict(),
        "history": result.history,
        "provenance": calibration.provenance,
        "environment": environment(),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": seconds,
    }

    def write(path: Path) -> None:
        with whole_folder(path) as folder:
            with stage("report", str(path)):
                calibration.save(folder / "schedule.boss.json")
                notes = {"straightened_from": parameter_hash(net), "solver": results["solver"]}
                save_network(result.student, folder / "student.safetensors", **notes)
                images = plot.draw(results, calibration, pictures, folder)
            seconds["total"] = sum(s for name, s in seconds.items() if name != "total")
            report.write(results, images, folder)

    write_or_keep(out, "out", write)
    say(f"{'total':<10} {seconds['total']:6.1f} s\n\n{report.table(results)}")
    return results
