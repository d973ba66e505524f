"""Trainings killed at random moments and started again, until they end: `python tests/_killed_runs.py --count 200`.

Whatever the moments, what is returned is that of a training that nobody killed, bit for bit: weights, history,
evaluations, the best iteration, and the names of the checkpoints beside; and between them the newest is whole.
"""

import argparse
import collections
import contextlib
import json
import mmap
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import torch
from test_straighten import SOLVER, small_net, trained
from test_straighten_watch import PLAN, pairs_of
from tqdm import tqdm

from flowkernels.training.bank.trajectory_bank import TrajectoryBank
from flowkernels.training.objective import StraightenLoss
from flowkernels.training.run import checkpoint, state, watch
from flowkernels.training.run.descent import Descent

WATCHED = dict(held_out=6, evaluate_every=2, patience=9, keep_checkpoints=3, init="keep", lr=0.03, iterations=30)
RUNS = {
    "averaged": dict(checkpoint_every=1),
    "refreshed": dict(checkpoint_every=3, refresh=5, t_sampling="uniform"),
    "on a solver": SOLVER | dict(checkpoint_every=2, rollout_every=3, refresh=8),
    "pairs": dict(noise=None, bank=pairs_of, target="reflow", checkpoint_every=4, ema=None),
    "a bank in files": dict(checkpoint_every=5, refresh=6, refresh_fraction=0.3),
}
PHASES = ("other", "step", "writing", "numbering", "evaluating", "rolling the bank out", "rolling the student out")


def run(name: str, folder: Path):
    """A training in a folder, from where it is there; its parts, as they can be compared."""
    settings = WATCHED | RUNS[name]
    if name == "a bank in files":
        settings |= dict(noise=None)
        given = dict(noise=(4,), size=40, chunk=4, storage=folder / "bank", progress=False)
        settings["bank"] = TrajectoryBank(small_net(0).eval(), PLAN, **given)
    result = trained(small_net(1, 0.3), checkpoint=folder / "run.pt", **settings)
    names = sorted(path.name for path in folder.iterdir())
    weights = {key: value.tolist() for key, value in result.student.state_dict().items()}
    return json.dumps([weights, result.history, result.evaluations, result.best, result.errors, names])


@contextlib.contextmanager
def phases(told: mmap.mmap):
    """Where a training is, in memory that outlives it."""
    places = {
        "step": [(Descent, "step"), (state.State, "update_average")],
        "writing": [(state, "write_checkpoint")],
        "numbering": [(state, "keep_numbered")],
        "evaluating": [(watch.Watch, "_evaluate")],
        "rolling the bank out": [(TrajectoryBank, "fill"), (TrajectoryBank, "roll_out"), (TrajectoryBank, "refresh")],
        "rolling the student out": [(StraightenLoss, "roll_out")],
    }
    for phase, owners in places.items():
        for owner, name in owners:
            setattr(owner, name, _noting(getattr(owner, name), told, PHASES.index(phase)))
    yield


def _noting(function, told: mmap.mmap, phase: int):
    def noting(*args, **kwargs):
        before = told[0]
        told[0] = phase
        try:
            return function(*args, **kwargs)
        finally:
            told[0] = before

    return noting


def killed(name: str, folder: Path, out: Path, seconds: float, told: mmap.mmap) -> str | None:
    """The phase in which a process that trains was killed after so long; None if it had ended before."""
    told[0] = 0
    process = os.fork()
    if process == 0:
        try:
            with phases(told):
                found = run(name, folder)
            out.write_text(found)
        except BaseException as e:
            out.write_text(f"{type(e).__name__}: {e}")
        os._exit(0)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if os.waitpid(process, os.WNOHANG)[0]:
            return None
        time.sleep(0.0005)
    os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    return PHASES[told[0]] if os.WIFSIGNALED(status) else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # a forked process has no other
    tqdm.set_lock(threading.RLock())  # its own is shared by forked processes: one that is killed may have it
    warnings.simplefilter("ignore")
    r, wrong, where, ended = random.Random(args.seed), [], collections.Counter(), 0
    told = mmap.mmap(-1, 1)
    with tempfile.TemporaryDirectory() as root:
        expected, seconds, names = {}, {}, list(RUNS)
        while sum(where.values()) < args.count:
            name = names[(args.seed + ended) % len(names)]
            if name not in expected:
                (whole := Path(root) / "whole").mkdir()
                begin = time.monotonic()
                expected[name] = run(name, whole)
                seconds[name] = time.monotonic() - begin
                shutil.rmtree(whole)
            (folder := Path(root) / "run").mkdir()
            out, most = Path(root) / "result", args.count // len(names) + 1 + r.randrange(3)
            for again in range(10**6):
                enough = again >= most or sum(where.values()) >= args.count
                phase = killed(name, folder, out, 1e6 if enough else r.uniform(0, 0.7) * seconds[name], told)
                if phase is None:
                    break
                where[phase] += 1
                try:
                    if (folder / "run.pt").exists():
                        checkpoint.read_checkpoint(folder / "run.pt")
                except ValueError as e:
                    wrong.append(f"{name}: {e}")
            if (found := out.read_text()) != expected[name]:
                wrong.append(f"{name}: {found[:300]}, not {expected[name][:300]}")
            shutil.rmtree(folder)
            ended += 1
    print(json.dumps({"kills": sum(where.values()), "where": where, "ended": ended, "wrong": wrong}))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
