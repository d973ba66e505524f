"""Straightening on many devices: on 2 and 3 processes, DistributedDataParallel or FSDP2, what one process learns; and
checkpoints that any number of them goes on from."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import _many_runs as runs
import pytest
import torch
from _ranks import in_ranks
from torch import distributed as dist

import flowkernels as fk
from flowkernels.bench import suite

CURVE, WEIGHTS = 1e-6, 1e-10  # of the losses, which are added up in float32, and of float64 weights


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """What each rank of two, and of three, has found; the folder of checkpoints as two have left it."""
    folder = tmp_path_factory.mktemp("many")
    (folder / "meet").mkdir()
    two = in_ranks(folder / "meet", 2, runs.on_two, str(folder))
    for kind, now in (("bare", "bare"), ("bare", "sharded"), ("sharded", "bare"), ("sharded", "sharded")):
        for name in ("boss", "on_policy"):
            shutil.copytree(folder / f"{name}-{kind}", folder / f"{kind}-{now}" / f"{name}-{kind}")
    three = in_ranks(folder / "meet", 3, runs.on_three, str(folder), timeout=20)
    return two, three, folder


@pytest.fixture
def group_of_one():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def apart(a, b) -> tuple[float, float]:
    """The largest differences of numbers of the history and evaluations, and of weights, errors and solvers."""
    curves, weights = [(a[0][key], b[0][key]) for key in a[0]], [(a[1][key], b[1][key]) for key in a[1]]
    assert a[0].keys() == b[0].keys()
    assert a[1].keys() == b[1].keys()
    assert (a[4] is None) == (b[4] is None)
    curves += [] if a[4] is None else [(a[4][key], b[4][key]) for key in a[4]]
    for i in (2, 3):
        assert (a[i] is None) == (b[i] is None)
        curves += [] if a[i] is None else [(a[i], b[i])]

    def most(pairs) -> float:
        both = [[torch.as_tensor(of, dtype=torch.float64).nan_to_num(nan=-1.0) for of in pair] for pair in pairs]
        return max((x - y).abs().max().item() for x, y in both)

    return most(curves), most(weights)


def test_many_learn_what_one_does(many, group_of_one):
    two, three, _ = many
    for name in runs.RUNS:
        one = runs.trained(name)
        for ranks in (two, three):
            kinds = [key for key in ranks[0] if key in (name, f"{name} sharded", f"{name} parallel")]
            assert name in kinds
            for kind in kinds:
                curve, weights = apart(one, ranks[0][kind])
                assert curve < CURVE, (kind, len(ranks), curve)
                assert weights < WEIGHTS, (kind, len(ranks), weights)
                for other in ranks[1:]:  # bit for bit
                    assert apart(ranks[0][kind], other[kind]) == (0, 0), (kind, len(ranks))
    assert apart(runs.trained("boss"), runs.trained("boss", seed=1))[1] > 1e-4  # the bounds tell runs apart


def test_a_run_goes_on_with_any_number_of_ranks(many, group_of_one):
    two, three, folder = many
    for name in ("boss", "on_policy"):
        one = runs.trained(name)
        for kind in ("bare", "sharded"):
            path = folder / f"{name}-{kind}"
            there = sorted(p.name for p in path.iterdir())
            assert len(there) == 2, there  # keep_checkpoints
            for now in ("bare", "sharded"):
                curve, weights = apart(one, three[0][f"{name} {kind} {now}"])
                assert curve < CURVE, (name, kind, now)
                assert weights < WEIGHTS, (name, kind, now)
            resumed = runs.trained(name, checkpoint=path)  # by one, of what two have left
            assert apart(one, resumed)[1] < WEIGHTS
    for rank in range(2):
        assert apart(two[rank]["dropout"], two[rank]["dropout resumed"]) == (0, 0)
    assert apart(two[0]["dropout"], two[0]["boss"])[1] > 1e-4


@pytest.mark.parametrize("kind", ["bare", "sharded"])
def test_checkpoints_of_many_are_evaluated_by_one(many, kind, recwarn):
    _, three, folder = many
    path, noise = folder / f"{kind}-{kind}" / f"on_policy-{kind}", runs.drawn(9, torch.Generator().manual_seed(9))
    found = fk.evaluate_checkpoints(path, runs.teacher(), runs.teacher(), runs.BOSS, noise)
    assert [row.name for row in found.rows] == [f"iteration {int(p.name)}" for p in sorted(path.iterdir())]
    student = runs.teacher()
    student.load_state_dict(three[0][f"on_policy {kind} {kind}"][1])
    (last,) = fk.evaluate_sampler(runs.teacher(), {"iteration 8": (student, runs.BOSS)}, noise).rows
    assert found.rows[-1] == last
    assert not [w for w in recwarn if "distributed" in f"{w.message}"]
    (path / "00000008" / "__0_0.distcp").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"^checkpoint: expected a checkpoint of a training with a group, .*00000008"):
        fk.evaluate_checkpoints([path / "00000008"], runs.teacher(), runs.teacher(), runs.BOSS, noise)


def test_errors_are_named_on_every_rank(many):
    two, three, folder = many
    expected = {
        "lr": ("ValueError: lr: expected the same on every rank, 0.01 as on rank 0, got 0.02 on rank 1",) * 2,
        "teacher": ("ValueError: teacher: expected the same on every rank",) * 2,
        "batch": ("ValueError: batch: expected a multiple of the 2 ranks",) * 2,
        "iterations": ("ConnectionAbortedError: group: rank 1 ended the work with an error", "ValueError: iterations"),
        "blockwise": ("ValueError: student: expected DistributedDataParallel, or a bare module",) * 2,
        "noise": ("ConnectionAbortedError: group: rank 1 ended the work with an error", "RuntimeError: no noise here"),
        "file": ("checkpoint: expected with a group a folder",) * 2,
        "other": ("ValueError: checkpoint: expected one of this run (seed = 1)",) * 2,
        "alone": ("group: 2 processes each do all of the work by themselves",) * 2,
        "damaged": ("__1_0.distcp",) * 2,
    }
    for what, texts in expected.items():
        for rank, text in enumerate(texts):
            assert text in two[rank]["errors"][what], (what, rank, two[rank]["errors"][what])
    for rank in range(2):
        assert three[rank]["missing"].startswith(("TimeoutError: ", "ConnectionError: ")), three[rank]["missing"]
        assert "rank 2" in three[rank]["missing"]
    assert (folder / "bare-bare" / "boss-bare" / "00000008" / "run.pt").exists()


def test_the_benchmark_of_collectives_runs(group_of_one, capsys):
    threads = torch.get_num_threads()
    try:
        arguments = ["--batch", "4", "--iterations", "3", "--rounds", "1"]
        assert suite.module("many_devices.straighten").main(arguments) == 0
    finally:
        torch.set_num_threads(threads)
    assert "losses apart by 0.0e+00" in capsys.readouterr().out


def test_a_killed_rank_ends_as_the_uninterrupted_run(many, tmp_path):
    two, _, _ = many
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    here = Path(__file__).parent
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)])}
    env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # in torchrun's own, gloo finds addresses of the ranks of before
    command += ["--max-restarts", "1", str(here / "_many_runs.py"), str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "killed").exists()
    for rank in range(2):
        found = torch.load(tmp_path / f"found.{rank}", weights_only=False)
        assert apart(two[rank]["dropout"], found) == (0, 0)
