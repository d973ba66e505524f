"""What the tests of all ops ask about one: tests/ops/cases_<op>.py, which has

    CALLS           calls on a few small tensors of whole numbers, by name: for the ways past torch's dispatcher
    accesses()      calls whose loads and stores are asked to be coalesced
    guarded(page)   calls of the CPU kernel on tensors that `page` puts right before memory that cannot be read

and, where it applies,

    GRADIENTS             which arguments of the registered op have one
    WAITS                 why a call on a GPU waits for it
    TRITON_PTX            whether the PTX of its Triton kernels is run on the host
    large(device, n, on)  the largest error in ulp of float32, of which a few are allowed, past 2^31 elements;
                          LARGE_BYTES: how many it takes for each of n
"""

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

LOW = torch.bfloat16, torch.float16
STATES = (torch.float32, torch.float32), *((torch.float32, low) for low in LOW), (torch.float64, torch.float64)


class Call(NamedTuple):
    run: Callable  # tensors -> result
    shapes: tuple  # of its tensors
    written: tuple = ()  # the ones that it writes to
    converts: bool = False  # some of its tensors first, which gives them memory


class Accesses(NamedTuple):
    """A call on aligned tensors, whose loads and stores take the fewest sectors and passes that they can. Exceptions,
    each with its reason: source lines with this text may take so many times the fewest."""

    function: Callable
    args: tuple
    kwargs: dict
    exceptions: dict[str, float]


@functools.cache
def of(op: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"cases_{op}", Path(__file__).parent / f"ops/cases_{op}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PLACES = torch.tensor([0, 2, 1, 1]), torch.tensor([0, 1, 2, 0])  # intervals, samples: in a bank of 4 knots, 3 samples


def places():
    """Of segments in a bank: (bank, intervals, samples, places on the segments)."""
    bank, u = torch.randn(5, 3, 1024), torch.rand(4, dtype=torch.float64)
    return bank, torch.arange(4), torch.tensor([0, 1, 2, 0]), u


def apart(got: Tensor, expected: Tensor, scale: Tensor) -> float:
    worst = ((got.double() - expected.double()).abs() / scale.double()).max().item()
    return worst / torch.finfo(torch.float32).eps


def pieces(n: int, size: int = 1 << 26):
    return (slice(i, min(n, i + size)) for i in range(0, n, size))
