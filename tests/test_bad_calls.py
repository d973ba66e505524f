"""Bad calls of everything public get an error that names the argument (tests/_bad_calls.py makes them).

A seeded share here; FLOWKERNELS_BAD_CALLS=20000 makes as many, FLOWKERNELS_BAD_CALLS_SEED=7 others.
"""

import collections
import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flowkernels as fk

CALLS = int(os.environ.get("FLOWKERNELS_BAD_CALLS", "1000"))
SEED = int(os.environ.get("FLOWKERNELS_BAD_CALLS_SEED", "0"))
UNNAMED = 0.01  # of all calls, at most
STUCK = 60  # seconds without an answer


def outcomes(calls: int, seed: int, log: Path) -> list[tuple[str, str, str]]:
    """(call, kind, detail) of each, by an interpreter of its own that is started again behind a call that ends it."""
    start, found = 0, []
    while start < calls:
        command = [sys.executable, Path(__file__).with_name("_bad_calls.py"), "--log", log]
        log.unlink(missing_ok=True)
        options = [f"--calls={calls}", f"--seed={seed}", f"--start={start}"]
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run([*command, *options], capture_output=True, timeout=STUCK + calls)
        lines = log.read_text().splitlines()
        found += [tuple(json.loads(line.split(" ", 2)[2])) for line in lines if line.startswith("=")]
        begun = lines[-1].split(" ", 2)
        if begun[0] == "?":
            found.append((begun[2], "crash", "no outcome"))
        start = int(begun[1]) + 1
    return found


def test_bad_calls_are_named(tmp_path):
    found = outcomes(CALLS, SEED, tmp_path / "log")
    faults = [f"{kind}: {call}: {detail}" for call, kind, detail in found if kind not in ("named", "works")]
    counts = collections.Counter(kind for _, kind, _ in found)
    told = "\n".join([str(dict(counts)), *faults])
    assert len(found) >= CALLS, told
    assert counts["unnamed"] <= UNNAMED * CALLS, told
    assert set(counts) <= {"named", "works", "unnamed"}, told
    assert counts["named"] > CALLS / 2, told  # most of the values mean nothing


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch._mkldnn, torch.strided], ids=str)
def test_tensors_that_are_not_dense_are_named(layout):
    """Of layout strided a nested one, of which torch raises where it is asked for its shape."""
    dense = torch.eye(3)
    if layout is torch.strided:
        odd = torch.nested.nested_tensor([dense[0], dense[0, :2]])
    else:
        odd = dense.to_mkldnn() if layout is torch._mkldnn else dense.to_sparse(layout=layout)
    calls = [
        lambda: fk.sample(lambda x, t: x, odd, 2),
        lambda: fk.velocity_gram(odd),
        lambda: fk.linear_update(dense, [odd], [1.0]),
        lambda: fk.linear_euler(dense, dense, dense, 0.1, scale=odd),
        lambda: fk.linear_euler(dense, dense, dense, 0.1, bias=odd),
    ]
    for call in calls:
        with pytest.raises(
            TypeError, match=r"^(noise|v|v\[0\]|scale|bias): expected a dense tensor \(.to_dense\(\)\), got a \w+ "
        ):
            call()
