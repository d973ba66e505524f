"""pytest-benchmark entries for regression runs: every quick case, gate first, then our default call.

`pytest scripts/test_speed.py --benchmark-save=NAME`, and later the same with `--benchmark-compare`.
"""

import pytest
import torch

from flowkernels.bench.suite import cases, entries

CPU = torch.device("cpu")
CASES = [(entry, case) for entry in entries() for case in cases(entry, CPU) if case.quick]


@pytest.mark.parametrize(("entry", "case"), [pytest.param(e, c, id=f"{e}: {c.name}") for e, c in CASES])
def test_speed(entry, case, benchmark):
    work = case.make()
    call = next(call for name, call in work.calls.items() if name.startswith("flowkernels"))
    error, bound = work.check(call())
    assert error <= bound
    benchmark.group = entry
    benchmark(call)
