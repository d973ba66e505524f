"""The PTX that Triton makes of its kernels for sm_80, run on the emulation, in a process of its own: _triton_ptx.py."""

import fcntl
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import ops_cases
import pytest

from flowkernels.ops.public import OPS

OPS = [op for op in OPS if getattr(ops_cases.of(op), "TRITON_PTX", False)]
SAMPLES = {op: list(importlib.import_module(f"flowkernels.ops.{op}.samples").sample_inputs()) for op in OPS}
CASES = [(op, s.id) for op in OPS for s in SAMPLES[op]]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """What came of the kernels and ops, by what the program calls them. Run once, by the process of the tests that is
    first to ask: most of what a run of one of them takes is to import torch and Triton."""
    folder = tmp_path_factory.getbasetemp()
    path = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "triton_ptx.jsonl"
    with open(path, "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not path.stat().st_size:
            program = [sys.executable, Path(__file__).with_name("_triton_ptx.py"), "kernels", *OPS]
            done = subprocess.run(program, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-4000:]
            file.write(done.stdout)
            file.flush()
        found = {}
        for row in map(json.loads, path.read_text().splitlines()):
            found.setdefault(row["of"], {})[row["id"]] = row
    return found


def test_kernels_of_every_kind(rows):
    found = rows["kernels"]
    assert len(found) >= 19
    wrong = [r["failed"] or r for r in found.values() if r["failed"] or not r["error"] <= r["bound"]]
    assert not wrong, "\n".join(map(str, wrong))
    assert all(r["launches"] == 1 for r in found.values())


@pytest.mark.parametrize(("op", "sample"), [pytest.param(*c, id="-".join(c)) for c in CASES])
def test_op_against_float64(rows, op, sample):
    row = rows[op][sample]
    assert not row["failed"], row["failed"]
    assert row["error"] <= row["bound"]
    assert row["launches"] or row["empty"]
