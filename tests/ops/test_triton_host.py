"""What the functions that launch the Triton kernels do on the host, seen on tensors without memory."""

import importlib

import ops_cases
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from flowkernels.ops import triton_common
from flowkernels.ops.public import OPS
from flowkernels.ops.samples import op_args
from flowkernels.runtime import backends

aten = torch.ops.aten
CASES = [
    pytest.param(op, s, id=f"{op}-{s.id}")
    for op in OPS
    if not hasattr(ops_cases.of(op), "WAITS")  # as their docstrings say
    for s in importlib.import_module(f"flowkernels.ops.{op}.samples").sample_inputs()
]


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        devices = {t.device.type for t in tree_iter((args, kwargs, out)) if isinstance(t, torch.Tensor)}
        self.seen.append((func.overloadpacket, devices))
        return out


@pytest.fixture
def launches(monkeypatch):
    found = []
    monkeypatch.setattr(triton_common, "launch", lambda kernel, grid, *args, **_: found.append((kernel, grid, args)))
    return found


@pytest.mark.parametrize(("op", "sample"), CASES)
def test_nothing_is_read_or_copied_from_the_host(op, sample, launches):
    """Either would wait for the device, and no CUDA graph could hold the call. Knots are given on the CPU."""
    names = [a.name for a in getattr(torch.ops.flowkernels, op).default._schema.arguments]
    args = [
        a if name == "times" else tree_map_only(torch.Tensor, lambda t: t.detach().to("meta"), a)
        for name, a in zip(names, op_args(op, sample), strict=True)
    ]
    with Calls() as calls:
        backends.triton_op(op)(*args)
    assert not [func for func, devices in calls.seen if devices == {"cpu", "meta"}]
    for *_, given in launches:
        assert {t.device.type for t in tree_iter(given) if isinstance(t, torch.Tensor)} == {"meta"}


def test_a_step_in_place_allocates_nothing(launches):
    x = torch.empty(3, 5, device="meta")
    with Calls() as calls:
        backends.triton_op("euler_step_out")(x, x, 0.1, None, 1.0, x, None)
    assert len(launches) == 1
    assert not calls.seen


@pytest.mark.parametrize("shape", [(2, 1 << 30), (3, 5, 1 << 29), (65, 1 << 30)])
def test_velocities_of_many_columns_fit_a_grid(shape, launches):
    backends.triton_op("velocity_gram")(torch.empty(shape, dtype=torch.bfloat16, device="meta"), None, None)
    for _, grid, _ in launches:
        assert grid[0] < 2**31
        assert all(size < 2**16 for size in grid[1:])
