"""A case of the benchmark: a named piece of work, done by ours and by their peers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from flowkernels.ops.library import KERNELS
from flowkernels.runtime import backends


@dataclass(frozen=True)
class Work:
    """One piece of work, on inputs that exist.

    calls: provider -> a call of it; "flowkernels ..." are ours, "torch ..." the peers that ratios are taken to.
    check: (error, bound) of a call's result; more than the bound, or NaN, and no speed is printed.
    moved: bytes that must be read and written. flops: operations that must be done, 0 where that says nothing.
    unit: the matrix products that `flops` are compared with on a GPU, a key of timers.UNITS.
    """

    calls: Mapping[str, Callable[[], Any]]
    check: Callable[[Any], tuple[float, float]]
    moved: float = 0
    flops: float = 0
    unit: str = "float32"


@dataclass(frozen=True)
class Case:
    """A named piece of work of `size` elements; `make` puts its inputs together.

    main: among the first that a GPU gets, and profiled there; those of the ops are the cases of docs/gpu.md.
    curves: the plots that it is a point of: what runs along the axis -> its place there.
    """

    name: str
    size: float
    make: Callable[[], Work]
    threads: int | None = None
    quick: bool = field(default=False, kw_only=True)  # in the quick selection
    main: bool = field(default=False, kw_only=True)
    curves: Mapping[str, float] = field(default_factory=dict, kw_only=True)


SMALL = 1, 1, 8, 8  # one 8x8 image


class Small(NamedTuple):
    """An op on one such image, for what a call costs beside its work: the public function, what our stages call once
    they have checked their arguments, the same work in torch, and the check of a result."""

    call: Callable[[], Any]
    inner: Callable[[], Any]
    peer: Callable[[], Any]
    check: Callable[[Any], tuple[float, float]]


def kernel(op: str, *args) -> Callable[[], Any]:
    """The op's kernel past the checks and the dispatcher."""
    C = backends.extension()
    return lambda: KERNELS[op](C, *args)


def interpreted(backend: str) -> bool:
    """Whether it is Triton's interpreter, whose speed says nothing."""
    return backend == "triton" and backends.triton_interpreted()


def is_kernel(provider: str) -> bool:
    """Whether it is ours and its arithmetic too: the reference adds up as torch does."""
    return provider.startswith("flowkernels") and provider != "flowkernels reference"


def ours(call: Callable[[], Any], device: torch.device) -> dict[str, Callable[[], Any]]:
    """A provider for each of our backends that can run on the device: the automatic choice, then the others."""
    chosen, *others = [b for b in backends.BACKENDS if backends.why_not(b, device) is None and not interpreted(b)]

    def on(name: str) -> Callable[[], Any]:
        def run():
            with backends.backend(name):
                return call()

        return run

    return {f"flowkernels {chosen}": call} | {f"flowkernels {b}": on(b) for b in others}
