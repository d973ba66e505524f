"""Processes killed at random moments while they write the same file: `python tests/_kills.py --count 2000`.

Whatever the moment, the file is one of those that were written, whole; and after the next write nothing else is there.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

import flowkernels as fk
from flowkernels import _weights
from flowkernels._files import whole_folder
from flowkernels.models import bundled
from flowkernels.models import networks as networks_module
from flowkernels.training.run.checkpoint import read_checkpoint, write_checkpoint


def velocity(x, t):
    return -x


def calibrations():
    cals = [fk.calibrate(velocity, torch.randn(8, 4), K, [1, 2], seed=K, progress=False) for K in (60, 90)]
    return [cal.save for cal in cals], lambda path: fk.Calibration.load(path).provenance["seed"]


def networks():
    nets = [networks_module.ResidualMLP(16, width, 2, 16) for width in (64, 128)]
    saves = [lambda path, net=net: bundled.save_network(net, path) for net in nets]
    return saves, lambda path: bundled.load_network(path).config["width"]


def weights():
    saves = [lambda path, n=n: _weights.write(path, {"a": torch.full((n,), float(n))}) for n in (70_000, 90_000)]
    return saves, lambda path: len(_weights.read(path, "path", "weights")[0]["a"])


KEYS = ("setting", "iteration", "history", "student", "optimizer", "average", "bank_rng", "rng", "global_rng")


def checkpoints():
    def save(path, n):
        state = dict.fromkeys((*KEYS, "totals", "counts", "bank_noise"))
        state |= {"setting": {}, "student": torch.full((n,), float(n))}
        write_checkpoint(path, state)

    saves = [lambda path, n=n: save(path, n) for n in (70_000, 90_000)]
    return saves, lambda path: len(read_checkpoint(path)["student"])


def folders():
    def save(path, n):
        with whole_folder(path) as new:
            for i in range(n):
                (new / f"{i}").write_text("x" * 10_000)

    return [lambda path, n=n: save(path, n) for n in (20, 30)], lambda path: len(list(path.iterdir()))


def killed(save, path: Path, seconds: float) -> None:
    """A process that writes the file again and again, until it is killed."""
    process = os.fork()
    if process == 0:
        while True:
            save(path)
    time.sleep(seconds)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # a forked process has no other
    r, wrong, left = random.Random(args.seed), [], 0
    with tempfile.TemporaryDirectory() as folder:
        formats = []
        for make in (calibrations, networks, weights, checkpoints, folders):
            saves, read = make()
            path, known = Path(folder) / make.__name__ / "file", []
            path.parent.mkdir()
            for save in saves:
                save(path)
                known.append(read(path))
            formats.append((path, saves, read, known))
        for i in range(args.count):
            path, saves, read, known = formats[i % len(formats)]
            which, name = i // len(formats) % 2, f"{i} {path.parent.name}"
            killed(saves[which], path, r.uniform(0.0005, 0.03))
            left += len(list(path.parent.iterdir())) > 1
            try:
                away = path.parent.name == "folders" and not path.exists()  # of two renames, one is done
                if not away and read(path) not in known:
                    wrong.append(f"{name}: {read(path)}, not one of {known}")
                saves[which](path)
                if read(path) != known[which]:
                    wrong.append(f"{name}: not what was written after the kill")
            except Exception as e:
                wrong.append(f"{name}: {type(e).__name__}: {e}")
            if [p.name for p in path.parent.iterdir()] != ["file"]:
                wrong.append(f"{name}: {sorted(p.name for p in path.parent.iterdir())} are left")
    print(json.dumps({"kills": args.count, "left": left, "wrong": wrong}))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
