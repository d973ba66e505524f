"""Random damage to files of every format, and processes killed while they write: a share of what tests/_damage.py,
tests/_kills.py and tests/_killed_runs.py do by hand, with FLOWKERNELS_DAMAGED files and FLOWKERNELS_KILLED kills."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def run(script, *args):
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(script)), *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.stdout, f"exit code {done.returncode}, after {done.stderr[-3000:]}"
    return json.loads(done.stdout)


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's accounts of memory")
def test_damaged_files_are_refused_by_name_in_little_memory():
    count = int(os.environ.get("FLOWKERNELS_DAMAGED", "180"))
    told = run("_damage.py", "--count", count, "--seed", 7)
    assert told["wrong"] == []
    assert sum(told["outcomes"].values()) == count
    assert sum(n for name, n in told["outcomes"].items() if name.endswith("refused")) > count // 2


def test_a_killed_training_ends_as_one_that_was_not():
    count = int(os.environ.get("FLOWKERNELS_KILLED", "6"))
    told = run("_killed_runs.py", "--count", count, "--seed", 7)
    assert told["wrong"] == []
    assert told["kills"] >= count
    assert told["ended"] > 0


def test_a_killed_process_leaves_a_whole_file():
    count = int(os.environ.get("FLOWKERNELS_KILLED", "30"))
    told = run("_kills.py", "--count", count, "--seed", 7)
    assert told["wrong"] == []
    assert told["kills"] == count
    assert told["left"] > 0  # some were killed while they wrote
