"""What the functions that launch the Triton kernels do on the host, seen on tensors without memory."""

import importlib

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from flowkernels.ops import triton_common
from flowkernels.ops.public import OPS
from flowkernels.ops.samples import op_args
from flowkernels.runtime import backends

aten = torch.ops.aten
NAMES = {op: [a.name for a in getattr(torch.ops.flowkernels, op).default._schema.arguments] for op in OPS}
CASES = [
    pytest.param(op, s, knots, id=f"{op}-{s.id}-{knots}")
    for op in OPS
    for s in importlib.import_module(f"flowkernels.ops.{op}.samples").sample_inputs()
    for knots in (("cpu", "meta") if "times" in NAMES[op] else ("cpu",))
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


class FromNumbers(TorchFunctionMode):
    """Tensors beside the samples that torch makes of numbers by a copy, which meta tensors hide from `Calls`."""

    MAKERS = torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy, torch.Tensor.new_tensor

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in self.MAKERS and not out.is_cpu:
            self.seen.append(func)
        # t[i, j] = 1 is a copy where nothing is left of t's dimensions
        if func is torch.Tensor.__setitem__ and not isinstance(args[2], torch.Tensor) and not args[0].is_cpu:
            self.seen.append(func)
        return out


@pytest.fixture
def launches(monkeypatch):
    found = []
    monkeypatch.setattr(triton_common, "launch", lambda kernel, grid, *args, **_: found.append((kernel, grid, args)))
    return found


def read_or_copied(op, *args) -> list:
    with Calls() as calls, FromNumbers() as made:
        backends.triton_op(op)(*args)
    return made.seen + [func for func, devices in calls.seen if devices == {"cpu", "meta"}]


@pytest.mark.parametrize(("op", "sample", "knots"), CASES)
def test_nothing_is_read_or_copied_from_the_host(op, sample, knots, launches, monkeypatch):
    """Either would wait for the device, and no CUDA graph could hold the call. Knots are there or on the CPU."""
    monkeypatch.setattr(triton_common, "is_captured", lambda t: True)  # otherwise some report a NaN
    args = [
        tree_map_only(torch.Tensor, lambda t: t.detach().to(knots if name == "times" else "meta"), a)  # noqa: B023
        for name, a in zip(NAMES[op], op_args(op, sample), strict=True)
    ]
    assert read_or_copied(op, *args) == []
    for *_, given in launches:
        assert {t.device.type for t in tree_iter(given) if isinstance(t, torch.Tensor)} == {"meta"}


@pytest.mark.parametrize(
    "copy",
    [
        lambda t: torch.tensor([1.0, 2.0], device=t.device),
        lambda t: torch.as_tensor(2, device=t.device),
        lambda t: t.new_tensor([1.0]),
        lambda t: torch.ones(3).to(t.device),
        lambda t: t.copy_(torch.ones(2, 2)),
        lambda t: t.__setitem__((0, 0), 0),
    ],
)
def test_a_copy_is_found(copy, monkeypatch):
    monkeypatch.setattr(backends, "triton_op", lambda op: copy)
    assert len(read_or_copied("", torch.empty(2, 2, device="meta"))) == 1


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
