"""A trial of a student: how long a pass takes, and what it keeps."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class Trial:
    """A forward and a backward pass of some examples: seconds of the last, and bytes of what is kept for the backward,
    weights aside; None before there was one. idle: the ids of weights that it gave no gradient."""

    examples: int
    seconds: float | None = None
    activations: int | None = None
    idle: frozenset[int] = frozenset()

    @contextlib.contextmanager
    def looked_at(self, net: nn.Module) -> Iterator[None]:
        """Around a forward."""
        aside = {t.untyped_storage()._cdata for t in (*net.parameters(), *net.buffers())}
        found: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            if storage._cdata not in aside:
                found[storage._cdata] = storage.nbytes()  # it is there as long as the graph
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            yield
        self.activations = sum(found.values())

    @contextlib.contextmanager
    def timed(self, device: torch.device) -> Iterator[None]:
        _wait(device)
        begin = time.perf_counter()
        yield
        _wait(device)
        self.seconds = time.perf_counter() - begin


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
