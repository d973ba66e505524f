"""A student that accelerate has prepared is trained by its processes, with the losses of one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def test_prepared_students_train_by_their_processes(tmp_path):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent.parent)}
    for count in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        command += [str(HERE / "_prepared_run.py"), str(tmp_path / f"of-{count}")]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    first, *others = [torch.load(tmp_path / f"of-{count}") for count in ("1.0", "2.0", "2.1")]
    assert first[0] == 1
    for processes, losses in others:
        assert processes == 2
        assert losses == others[0][1]
        assert losses == pytest.approx(first[1], rel=1e-5)
