"""Calibrations, fits and refinements by several processes: those of one process, and the same on every one."""

import contextlib
import dataclasses
import datetime
import io
import os
import signal
import time
import warnings
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from _ranks import in_ranks
from torch import Tensor, nn
from torch import distributed as dist

import flowkernels as fk
from flowkernels.calibration import effort
from flowkernels.calibration.refine import ROBUST_FIRST, Refinement, refine
from flowkernels.calibration.samples import Samples
from flowkernels.ops.samples import generator
from flowkernels.runtime.ranks import Ranks

F64, D, K, n = torch.float64, 5, 12, 37


def normal(*shape: int, seed: int = 0, dtype=F64) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=F64).to(dtype)


class Net(nn.Module):
    """A small network of x, t and a row of conditioning; `count` calls `at_call`, for faults at one of them."""

    def __init__(self, conditions: int = 0, seed: int = 1):
        super().__init__()
        width = D + 1 + conditions
        self.first, self.last = (nn.Parameter(normal(*s, seed=seed) / 2) for s in ((16, width), (D, 16)))
        self.fault, self.calls = None, 0

    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
        self.calls += 1
        if self.fault is not None:
            self.fault(self.calls)
        y = torch.cat([x, t.to(x).view(-1, 1).expand(len(x), 1), *([] if c is None else [c])], 1)
        return 2 * torch.tanh(y @ self.first.T.to(x)) @ self.last.T.to(x)


def plain() -> Net:
    return Net()


def guided() -> fk.VelocityField:
    c = normal(n, 3, seed=5)  # of each sample
    return fk.VelocityField(
        Net(3), conditioning={"c": c}, unconditional={"c": torch.zeros(1, 3, dtype=F64)}, guidance=1.7
    )


def fused() -> fk.FusedSampler:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(D + 1, 16), nn.SiLU(), nn.Linear(16, D))
    return fk.fuse(fk.VelocityField(net, time_column=True), K)


def bad_at(sample: int) -> Net:
    """NaN late on the way of one sample."""
    net, row = Net(), normal(n, D)[sample]

    def velocity(x, t):
        return torch.where((t[:, None] > 0.5) & ((x - row).abs().sum(1, keepdim=True) < 1e-9), torch.nan, 0.0) + 0 * x

    net.forward = velocity
    return net


COMMON = dict(grid=K, steps=[2, 3], progress=False)
KEPT = COMMON | dict(chunk=10, effort="fit", verify_noise=normal(33, D, seed=9))
FIT = dict(effort="fit", teacher_error=9)
# name: (velocity, noises, options)
CASES = {
    "schedule": (plain, n, dict(verify_noise=normal(11, D, seed=9))),
    "chunks": (plain, n, dict(chunk=16, keep_bytes=20 * D * 8 * (2 * K + 1), effort="fit")),
    "few": (plain, 3, dict(chunk=1, effort="fit", verify_noise=normal(1, D, seed=9))),
    "heun": (plain, n, FIT | dict(teacher_solver="heun", forced_knots=[0.5], verify_noise=normal(5, D, seed=9))),
    "regret": (plain, 100, dict(max_regret=0.4)),
    "guided": (guided, n, FIT | dict(verify_noise=normal(11, D, seed=9))),
    "fused": (fused, n, dict(chunk=10, verify_noise=normal(11, D, seed=9, dtype=torch.float32))),
    "best": (
        plain,
        24,
        dict(steps=[2], grid=8, effort="best", evaluations=24 * 1500, verify_noise=normal(5, D, seed=9)),
    ),
}


def made(name: str, **more) -> fk.Calibration:
    of, count, options = CASES[name]
    dtype = torch.float32 if name == "fused" else F64
    return fk.calibrate(of(), normal(count, D, dtype=dtype), **COMMON | options | more)


def told(value) -> object:
    """In plain values and tensors, without times that differ from run to run and addresses."""
    if isinstance(value, fk.Calibration):
        costs, keys = value.sample_costs, ("times", "cost", "gram", "schedules", "solvers", "tried", "verified")
        found = {key: told(getattr(value, key)) for key in (*keys, "verified_interval", "teacher_error")}
        found |= {"kept": None if value.kept is None else [value.kept.x, value.kept.v], "norm": value.norm_cost}
        found |= {"groups": [costs.grams, costs.sizes], "effort": value.provenance.get("effort")}
        return found | {"n": value.provenance["n"], "dtype": value.provenance["velocity_dtype"]}
    if dataclasses.is_dataclass(value):
        found = {f.name: told(getattr(value, f.name)) for f in dataclasses.fields(value) if f.name != "seconds"}
        if isinstance(found.get("plan"), dict):  # of which files keep no intervals of costs
            found["plan"] = {k: v for k, v in found["plan"].items() if k not in ("cost_interval", "samples_needed")}
        return found
    if isinstance(value, dict):
        return {key: told(v) for key, v in value.items()}
    return [told(v) for v in value] if isinstance(value, (list, tuple)) else value


def expect_close(one, other, bound: float, where: str = "") -> None:
    """Numbers to a bound, relative or absolute; solvers that were refined by their errors alone: along what the ends do
    not depend on, rounding decides about their coefficients."""
    assert type(one) is type(other), (where, one, other)
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        refined = ", refined" in str(one.get("name", "")) and "plan" in one
        for key in one:
            if not (refined and key == "plan" and bound):
                expect_close(one[key], other[key], bound, f"{where}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for i, pair in enumerate(zip(one, other, strict=True)):
            expect_close(*pair, bound, f"{where}[{i}]")
    elif isinstance(one, Tensor):
        assert one.dtype == other.dtype, where
        same = torch.allclose(one, other, bound, bound, equal_nan=True)
        assert same, (where, (one - other).abs().max())
    elif isinstance(one, float) and bound:
        assert one == pytest.approx(other, rel=bound, abs=bound, nan_ok=True), where
    else:
        assert one == other or one != one, (where, one, other)


def stages(group) -> dict:
    """What takes a calibration, on its kept samples and on noise."""
    cal, velocity, noise = made("schedule"), plain(), normal(21, D, seed=3)
    velocity.requires_grad_(True)
    found = {
        objective: cal.find([2, 3], objective=objective, velocity=velocity, samples=13, group=group)
        for objective in ("endpoint", "student", "free")
    }
    found["fit"] = fk.fit_solver(velocity, cal, 3, group=group)
    found["inverse"] = fk.fit_solver(velocity, cal, 3, inverse=True, noise=noise, chunk=4, group=group)
    found["polish"] = fk.polish(velocity, cal, fk.Solver.heun(2), samples=31, group=group).notes["polish"]
    # so many that steps are made of a part of them at first, with weights
    many = fk.calibrate(velocity, normal(150, D), K, [2], progress=False)
    with torch.no_grad():
        data = Samples.of(velocity, many, proven=True, ranks=Ranks(group))
        ways = [Refinement(ROBUST_FIRST, iterations=2)]
        found["windows"] = refine(data, [fk.Solver.heun(2)], many.times, refinements=ways)[0].errors
    found["knots"] = fk.polish(velocity, cal, cal.uniform(3), noise=noise, group=group)
    found["teacher"] = cal.measure_teacher(velocity, samples=7, group=group)
    return told(found)


def raised(work) -> str:
    try:
        work()
    except BaseException as e:
        return f"{type(e).__name__}: {e}"
    return "nothing"


def calibrates(rank: int, folder) -> dict:
    """All cases, and what differs, fails and is interrupted, in one group."""
    group, found = dist.group.WORLD, {}
    for name in CASES:
        found[name] = told(made(name, group=group))
    found["stages"] = stages(group)
    v = normal(K, 7, 2, seed=2)
    found["step costs"] = fk.step_costs(v[:, rank::2], K, group=group) if dist.get_world_size() == 2 else None
    # in time, as the first one's clock has it: those of the others stand still
    stopped = SimpleNamespace(monotonic=lambda: 0.0, perf_counter=time.perf_counter)
    with mock.patch.object(effort, "time", stopped if rank else time):
        found["minutes"] = told(made("best", group=group, evaluations=None, minutes=0.02))

    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fk.calibrate(Training(), normal(8, D), K, [2], group=group)
    found["shown"] = [len(stderr.getvalue()) > 0, [str(w.message)[:40] for w in caught]]

    def other(**changed):
        arguments = dict(velocity=plain(), noise=normal(8, D)) | COMMON
        return raised(lambda: fk.calibrate(**arguments | (changed if rank == 1 else {}), group=group))

    found["others"] = {
        "noise": other(noise=normal(8, D, seed=1)),
        "velocity": other(velocity=Net(seed=2)),
        "steps": other(steps=[2, 4]),
        "chunk": other(chunk=3),
        "effort": other(effort="fit"),
        "grid": other(grid=K + 1),
        "checkpoint": other(checkpoint=folder / "other"),
        "bad": other(steps=[K + 5]),
    }
    found["NaN"] = raised(lambda: fk.calibrate(bad_at(30), normal(n, D), **COMMON, group=group))

    world, last = dist.get_world_size(), []
    net = plain()
    net.fault = last.append
    uninterrupted = told(fk.calibrate(net, normal(n, D), **KEPT, group=group))
    path = folder / f"checkpoint-{world}"

    def fault(call: int) -> None:  # while samples are rolled out, and while solvers are verified
        if rank == 1 and call in (30, last[-1] - 1):
            raise OSError("the disk of rank 1")

    for turn in ("first", "last"):
        net = plain()
        net.fault = fault
        net.calls = 0 if turn == "first" else 31
        found[f"{turn} fault"] = raised(
            lambda net=net: fk.calibrate(net, normal(n, D), **KEPT, resume=False, checkpoint=path, group=group)
        )
        found[f"{turn} written"] = path.exists()
        if rank == 0:
            (folder / f"{turn}-{world}").write_bytes(path.read_bytes())
        dist.barrier()
    net = plain()
    found["resumed"] = told(fk.calibrate(net, normal(n, D), **KEPT, checkpoint=path, group=group))
    found["calls to resume"] = net.calls < last[-1] / 3
    found["uninterrupted"] = uninterrupted

    averaged, early = plain(), dist.new_group(timeout=datetime.timedelta(seconds=30))
    wrapped = nn.parallel.DistributedDataParallel(averaged, process_group=early)
    found["synchronised"] = raised(lambda: fk.calibrate(wrapped, normal(8, D), **COMMON, group=group))

    def interrupt(call: int) -> None:
        if rank == 1 and call == 400:
            os.kill(os.getpid(), signal.SIGINT)

    net = plain()
    net.fault = interrupt
    found["interrupted"] = told(fk.calibrate(net, normal(24, D), 8, [2], effort="best", progress=False, group=group))
    net.calls = 400 - 5
    found["ended"] = raised(lambda: fk.calibrate(net, normal(24, D), 8, [2], progress=False, group=group))

    late = dist.new_group(timeout=datetime.timedelta(seconds=1))
    before = path.read_bytes()
    if rank == 0:
        found["missing"] = raised(
            lambda: fk.calibrate(plain(), normal(8, D), **COMMON, checkpoint=path, resume=False, group=late)
        )
        assert path.read_bytes() == before
    dist.barrier()
    return found


class Training(nn.Module):
    """Left in training mode, of which a warning is."""

    def __init__(self):
        super().__init__()
        self.net, self.drop = Net(), nn.Dropout(0.5)

    def forward(self, x, t):
        return self.net(x, t)


@pytest.mark.filterwarnings("ignore:(verify_noise|checkpoint):UserWarning")
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_calibrate_as_one_process(tmp_path, world):
    first, *others = in_ranks(tmp_path, world, calibrates, tmp_path)
    for other in others:
        for name in (*CASES, "stages", "minutes", "interrupted", "step costs"):
            expect_close(first[name], other[name], 0.0, name)
    for name in CASES:
        expect_close(first[name], told(made(name)), 1e-3 if name == "fused" else 1e-12, name)
    expect_close(first["stages"], stages(None), 1e-12, "stages")
    if world == 2:
        expect_close(first["step costs"], fk.step_costs(normal(K, 7, 2, seed=2), K), 1e-12)

    assert first["shown"][0]
    assert any(text.startswith("velocity: expected") for text in first["shown"][1])
    for other in others:
        assert other["shown"] == [False, []]

    for rank, found in enumerate((first, *others)):
        for name, text in found["others"].items():
            if name == "bad":  # on one rank, which says so to the others
                own = "ValueError: steps: expected"
                assert text.startswith(
                    own if rank == 1 else f"ConnectionAbortedError: group: rank 1 ended the work with an error: {own}"
                )
            else:
                assert text.startswith(f"ValueError: {name}: expected the same on every rank"), text
                assert text.endswith("on rank 1"), text
        assert found["NaN"] == raised(lambda: fk.calibrate(bad_at(30), normal(n, D), **COMMON))
        assert "sample 30" in found["NaN"]
        for turn in ("first", "last"):
            assert found[f"{turn} fault"] == "OSError: the disk of rank 1"
            assert found[f"{turn} written"]
        assert found["calls to resume"]
        expect_close(found["resumed"], found["uninterrupted"], 0.0, "resumed")
        assert found["synchronised"].startswith("ValueError: velocity: expected a network that every rank has whole")
        assert found["interrupted"]["effort"]["skipped"]["the rest"] == "interrupted"
        assert found["ended"].startswith("KeyboardInterrupt")
    assert first["missing"].startswith("TimeoutError: group: expected")
    assert f"rank {', '.join(map(str, range(1, world)))} did not come within 1 s" in first["missing"]

    whole = told(fk.calibrate(plain(), normal(n, D), **KEPT))
    expect_close(first["resumed"], whole, 1e-12, "resumed")
    for turn in ("first", "last"):  # by one process
        again = fk.calibrate(plain(), normal(n, D), **KEPT, checkpoint=tmp_path / f"{turn}-{world}")
        expect_close(told(again), whole, 1e-12, turn)
