"""Trainings that tests/test_straighten_many.py starts in processes of a group, and under torchrun."""

import os
import signal
import sys
import warnings
from pathlib import Path

import torch
from torch import distributed as dist

import flowkernels as fk

F64 = dict(dtype=torch.float64)
BOSS, END = fk.Schedule([0, 0.25, 0.5, 1]), fk.Schedule([0, 1])
RUNS = {
    "boss": dict(accumulate=2, refresh=3, refresh_fraction=0.3, held_out=7, evaluate_every=2, patience=9),
    "reflow": dict(target="reflow", ema=None, clip=0.01, t_sampling="uniform"),
    "on_policy": dict(target="on_policy", rollout_every=3),
    "solver": dict(target="solver", rollout_every=3, bank=90, grid=8),
    "endpoint": dict(target="endpoint", bank=90, grid=8, plan=fk.Schedule([0, 0.5, 1])),
    "blockwise": dict(target="blockwise"),
    "pairs": dict(
        target="reflow", noise=None, grid=None, bank=lambda n, g: fk.Pairs(drawn(2 * n, g).view(2, n, 3)), plan=END
    ),
}


def network(seed: int = 0, dropout: float = 0.0) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [torch.nn.Linear(4, 16), torch.nn.SiLU(), torch.nn.Dropout(dropout), torch.nn.Linear(16, 3)]
        return torch.nn.Sequential(*layers).double()


def drawn(n: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(n, 3, generator=generator, **F64)


def teacher() -> fk.VelocityField:
    return fk.VelocityField(network(), time_column=True)


def sharded(student: torch.nn.Module) -> torch.nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    inner = student.net if isinstance(student, fk.VelocityField) else student
    for part in inner.modules():
        if isinstance(part, torch.nn.Linear):
            fully_shard(part, mesh=mesh)
    fully_shard(inner, mesh=mesh)
    return student


def trained(name: str, kind: str = "bare", **changed):
    """(history, weights, errors, coefficients, evaluations) of a run, plain."""
    settings = dict(noise=drawn, bank=70, grid=16, iterations=8, batch=12, log_every=2, lr=1e-2, warmup=2)
    settings |= dict(progress=False, group=dist.group.WORLD) | RUNS[name] | changed
    plan = settings.pop("plan", BOSS)
    if settings.get("target") in ("solver", "endpoint"):
        plan = fk.Solver.adams_bashforth(plan, 2)
    velocity, student = settings.pop("velocity", None) or teacher(), settings.pop("student", None)
    if kind == "sharded":
        student = sharded(student or teacher())
    if kind == "parallel":
        student = student or teacher()
        student.net = torch.nn.parallel.DistributedDataParallel(student.net)
        settings["group"] = None  # the student's is taken
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="target=")
        found = fk.straighten(student, velocity, plan, **settings)
    weights = {key.replace("module.", ""): whole(value) for key, value in found.student.state_dict().items()}
    solver = None if found.solver is None else found.solver.coefficients
    return dict(found.history), weights, found.errors, solver, found.evaluations


def whole(t: torch.Tensor) -> torch.Tensor:
    return (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone()


def said(work) -> str:
    try:
        work()
    except Exception as e:
        return f"{type(e).__name__}: {e}"
    return "nothing"


def stop_at(iteration: int):
    return (lambda event: event.kind == "log" and event.iteration >= iteration,)


def on_two(rank: int, folder: str) -> dict:
    folder, found = Path(folder), {}
    for name in RUNS:
        found[name] = trained(name)
    for name in ("boss", "on_policy", "endpoint"):
        found[f"{name} sharded"] = trained(name, "sharded")
    found["boss parallel"] = trained("boss", "parallel")
    with_dropout = dict(student=fk.VelocityField(network(0, 0.3), time_column=True))
    found["dropout"] = trained("boss", **with_dropout)
    with_dropout = dict(student=fk.VelocityField(network(0, 0.3), time_column=True), checkpoint=folder / "dropout")
    stopped = trained("boss", **with_dropout, callbacks=stop_at(5))
    assert stopped[0]["iteration"][-1] < 7
    with_dropout["student"] = fk.VelocityField(network(0, 0.3), time_column=True)
    found["dropout resumed"] = trained("boss", **with_dropout)
    for kind in ("bare", "sharded"):  # for other numbers of ranks
        for name in ("boss", "on_policy"):
            path = folder / f"{name}-{kind}"
            trained(name, kind, checkpoint=path, checkpoint_every=3, keep_checkpoints=2, callbacks=stop_at(5))
    found["errors"] = refused(rank, folder)
    return found


def refused(rank: int, folder: Path) -> dict[str, str]:
    """What is said of a call that is none, on this rank."""
    found = {
        "lr": said(lambda: trained("boss", lr=1e-2 * (1 + rank))),
        "teacher": said(lambda: trained("boss", velocity=fk.VelocityField(network(rank), time_column=True))),
        "batch": said(lambda: trained("boss", batch=13, accumulate=1)),
        "iterations": said(lambda: trained("boss", iterations=8 if rank == 0 else 0)),
        "blockwise": said(
            lambda: trained("blockwise", student=fk.Blockwise([sharded(teacher()) for _ in "abc"], BOSS))
        ),
    }

    def fails(n: int, generator: torch.Generator) -> torch.Tensor:
        if rank == 1:
            raise RuntimeError("no noise here")
        return drawn(n, generator)

    found["noise"] = said(lambda: trained("boss", noise=fails))
    (folder / "file").touch()
    dist.barrier()
    found["file"] = said(lambda: trained("boss", checkpoint=folder / "file"))
    found["other"] = said(lambda: trained("boss", checkpoint=folder / "boss-bare", seed=1))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trained("boss", group=None)
    found["alone"] = " ".join(str(w.message) for w in told)
    last = sorted((folder / "boss-bare").glob("0*"))[-1] / "__1_0.distcp"
    if rank == 0:
        intact = last.read_bytes()
        last.write_bytes(intact[:-3] + b"abc")
    dist.barrier()
    found["damaged"] = said(lambda: trained("boss", checkpoint=folder / "boss-bare"))
    if rank == 0:
        last.write_bytes(intact)
    dist.barrier()
    return found


def on_three(rank: int, folder: str) -> dict:
    """Goes on with what two have begun; at the end one is missing."""
    folder, found = Path(folder), {}
    for kind, now in (("bare", "bare"), ("bare", "sharded"), ("sharded", "bare"), ("sharded", "sharded")):
        for name in ("boss", "on_policy"):
            path = folder / f"{kind}-{now}" / f"{name}-{kind}"
            found[f"{name} {kind} {now}"] = trained(name, now, checkpoint=path)
    for name in RUNS:
        found[name] = trained(name)
    if rank < 2:
        found["missing"] = said(lambda: trained("boss", checkpoint=folder / "bare-bare" / "boss-bare"))
    return found


def under_torchrun(folder: str) -> None:
    """A rank that is killed in the middle, once."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    folder, rank = Path(folder), dist.get_rank()

    def kill(event) -> None:
        marker = folder / "killed"
        if rank == 1 and event.kind == "log" and event.iteration >= 5 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    student = fk.VelocityField(network(0, 0.3), time_column=True)
    found = trained("boss", student=student, checkpoint=folder / "run", checkpoint_every=3, callbacks=(kill,))
    torch.save(found, folder / f"found.{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    under_torchrun(sys.argv[1])
