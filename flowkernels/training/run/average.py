"""The average of a student's weights over its training."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flowkernels._checks import LOW, expect
from flowkernels.runtime.sharded import alike, local, reshard, whole
from flowkernels.runtime.torch_private import lerp_each_
from flowkernels.training.run.optimizers import has_modes
from flowkernels.training.students.modules import expect_fits, names_of_trained, plain_state, trained_by_name

COUNT, PREFIX = "n_averaged", "module."  # in a state dict


class Average:
    """Exponential moving average whose decay grows to `decay` as (1+n)/(10+n), so that short runs are not held back.

    Of the trained parameters alone, of tied ones once; whatever else a student has is its last. Nothing of the student
    is copied but these, and of sharded ones each process averages its shard.

    weights: by names without wrappers, where the student's are; those of bfloat16 and float16 in float32: a step of the
    average is mostly smaller than their rounding, and would be lost. n_averaged: how many there were.
    """

    def __init__(self, student: nn.Module, decay: float):
        self.decay, self.n_averaged, self._student = decay, 0, student
        self._trained = trained_by_name(student)
        self.weights = {name: _wide(p.detach().clone()) for name, p in self._trained.items()}
        groups: dict[tuple, list[str]] = {}
        for name, p in self._trained.items():
            groups.setdefault((p.device, p.dtype), []).append(name)
        self._groups = list(groups.values())

    @torch.no_grad()
    def update(self) -> None:
        """Add the student's weights as they are now."""
        n = self.n_averaged
        rate = min(self.decay, (1 + n) / (10 + n)) if n else 0.0
        for names in self._groups:
            own = [local(self.weights[name]) for name in names]
            new = [local(self._trained[name]) for name in names]
            if n and own[0].is_floating_point():
                lerp_each_(own, [p.to(own[0].dtype) for p in new] if new[0].dtype in LOW else new, 1 - rate)
            else:
                for a, p in zip(own, new, strict=True):
                    a.copy_(p)
        self.n_averaged += 1

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The student with the averaged weights, in the block; then with its own again, bit for bit. Of memory a tensor
        more at a time, and all of bfloat16 and float16."""
        kept = {name: local(p.detach()).clone() for name, p in self._trained.items() if p.dtype in LOW}
        try:
            self._exchange(kept)
            yield
        finally:
            self._exchange(kept, back=True)

    @torch.no_grad()
    def _exchange(self, kept: Mapping[str, Tensor], back: bool = False) -> None:
        torch.clear_autocast_cache(), reshard(self._student)
        for name, p in self._trained.items():
            own, p = local(self.weights[name]), local(p)
            if name in kept:
                p.copy_(kept[name] if back else own)
            else:
                before = p.clone()
                p.copy_(own), own.copy_(before)

    @torch.no_grad()
    def put(self, student: nn.Module) -> None:
        """Write the averaged weights into the student or a copy of it."""
        torch.clear_autocast_cache()
        for name, p in trained_by_name(student).items():
            p.copy_(alike(self.weights[name], p))

    def state_dict(self, sharded: bool = False) -> dict[str, Tensor]:
        """Under the names of torch's AveragedModel, tied weights under each of theirs; whole, or as they are."""
        count = torch.tensor(self.n_averaged, dtype=torch.int64, device="cpu")
        averages = {name: t if sharded else whole(t) for name, t in self.weights.items()}
        return {COUNT: count} | {PREFIX + name: averages[first] for name, first in names_of_trained(self._student)}

    def expect(self, saved: Any, student: nn.Module, done: int) -> None:
        """Raise unless a checkpoint's is such an average, of as many iterations: of what is trained alone, or of all of
        the student's tensors. Those of before are of bfloat16 where it is."""
        own = {COUNT: torch.zeros((), dtype=torch.int64, device="cpu")}
        own |= {PREFIX + name: self.weights[first] for name, first in names_of_trained(student)}
        if isinstance(saved, Mapping) and not saved.keys() <= own.keys():
            whole_student = {PREFIX + name: value for name, value in plain_state(student).items()}
            own = whole_student | own
        expect_fits(own, saved, "checkpoint")
        n = int(saved[COUNT])
        expect(n == done, "checkpoint", f"an average of {done} iterations", f"{n}")

    @torch.no_grad()
    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take what `expect` has found to fit."""
        for name, own in self.weights.items():
            local(own).copy_(local(alike(saved[PREFIX + name], own)))
        self.n_averaged = int(saved[COUNT])


class OptimizersAverage(Average):
    """That of an optimiser which keeps one itself, as schedule-free ones do: the weights that `eval()` puts into the
    parameters, in place of those that it trains."""

    def __init__(self, student: nn.Module, optimizer: torch.optim.Optimizer):
        self.n_averaged, self.optimizer, self._student = 0, optimizer, student
        self.weights = self._trained = trained_by_name(student)  # of the shapes

    def update(self) -> None:
        self.n_averaged += 1

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """As of any average; of memory as much as the weights take."""
        kept = {name: local(p.detach()).clone() for name, p in self._trained.items()}
        try:
            self._switch(self.optimizer.eval)
            yield
        finally:
            self._switch(self.optimizer.train)
            with torch.no_grad():
                for name, p in self._trained.items():
                    local(p).copy_(kept[name])

    def _switch(self, switch: Callable[[], Any]) -> None:
        torch.clear_autocast_cache(), reshard(self._student)
        switch()

    def put(self, student: nn.Module) -> None:
        if student is self._student:
            self._switch(self.optimizer.eval)
            return
        with self.applied(), torch.no_grad():
            for name, p in trained_by_name(student).items():
                p.copy_(self._trained[name])

    def state_dict(self, sharded: bool = False) -> dict[str, Tensor]:
        with self.applied():
            return {name: value.detach().clone() for name, value in super().state_dict(sharded).items()}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        self.n_averaged = int(saved[COUNT])


def completed(average: Mapping[str, Any], student: Mapping[str, Any]) -> dict[str, Any]:
    """An average's state dict with what else the student has, which takes no room in the same file: weights that can
    be loaded."""
    return {PREFIX + name: value for name, value in student.items()} | dict(average)


def average_of(student: nn.Module, optimizer: torch.optim.Optimizer, ema: float | None) -> Average | None:
    """Of a run, None where there is none."""
    if has_modes(optimizer):
        return OptimizersAverage(student, optimizer)
    return None if ema is None else Average(student, ema)


def _wide(t: Tensor) -> Tensor:
    return t.float() if t.dtype in LOW else t
