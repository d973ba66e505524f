"""The learning rate of a run by one of torch's schedulers."""

import copy
import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from flowkernels._checks import describe, expect, expect_takes
from flowkernels.velocity.hashes import tensors_hash

NAME = "lr_scheduler"
SCHEDULER = "a function of an optimiser that returns one of torch.optim.lr_scheduler, or None"
WARMUP, DECAY = 100, "cosine"  # of straighten, where nothing else is asked for: a scheduler takes their place


def expect_scheduler(value: Any, name: str) -> Callable[[torch.optim.Optimizer], LRScheduler]:
    expect_takes(value, name, SCHEDULER, [])
    return value


class Scheduler:
    """A scheduler of an optimiser's learning rates, a step of it behind each of the optimiser's; ReduceLROnPlateau is
    given the losses of the history's rows, and makes a step at each.

    It is gone through beforehand, on a copy of the optimiser's groups, for as many iterations as there are: TypeError,
    ValueError, naming the argument, for one that fails or has rates that are not numbers >= 0.

    varies: names of what it changes in the groups.
    """

    def __init__(self, make: Callable[[torch.optim.Optimizer], Any], optimizer: torch.optim.Optimizer, iterations: int):
        self.varies = _gone_through(make, optimizer, iterations)
        self.optimizer, self.scheduler = optimizer, _made(make, optimizer)

    def rate(self) -> float:
        """That of the first group as it is now."""
        return float(self.optimizer.param_groups[0]["lr"])

    def step(self, loss: float | None) -> None:
        """Behind an iteration. loss: where the history has a row of it."""
        if not isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step()
        elif loss is not None:
            self.scheduler.step(loss)

    def identity(self) -> dict[str, str]:
        """What determines it, in plain values, at its start; of functions nothing."""
        kind, state = type(self.scheduler), self.scheduler.state_dict()
        return {"kind": f"{kind.__module__}.{kind.__qualname__}", "state": tensors_hash({"state": state})[:16]}

    def contents(self) -> dict[str, Any]:
        """For a checkpoint."""
        groups = [{key: _plain(group[key]) for key in sorted(self.varies)} for group in self.optimizer.param_groups]
        return {"state": _stored(self.scheduler.state_dict()), "groups": groups}

    def load(self, saved: Any) -> None:
        """Go on from `contents`; ValueError, naming the checkpoint, for what is not such."""
        _expect_alike(saved, self.contents(), NAME)
        self.scheduler.load_state_dict(_restored(saved["state"], self.scheduler.state_dict()))
        for group, values in zip(self.optimizer.param_groups, saved["groups"], strict=True):
            for key, value in values.items():
                if isinstance(group[key], Tensor):  # a compiled or captured step has its address
                    group[key].fill_(value)
                else:
                    group[key] = value


def _stored(value: Any) -> Any:
    """With dicts in the place of Counters, which MultiStepLR has, in containers of their own."""
    if isinstance(value, Mapping):
        return {key: _stored(each) for key, each in value.items()}
    return type(value)(_stored(each) for each in value) if type(value) in (list, tuple) else value


def _restored(value: Any, like: Any) -> Any:
    if isinstance(like, Counter):
        return Counter(value)
    if isinstance(like, Mapping):
        return {key: _restored(value[key], each) for key, each in like.items()}
    if type(like) in (list, tuple):
        return type(like)(_restored(*each) for each in zip(value, like, strict=True))
    return value


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value


def _made(make: Callable, optimizer: torch.optim.Optimizer) -> LRScheduler:
    found = make(optimizer)
    if not isinstance(found, LRScheduler):
        expect(False, NAME, SCHEDULER, f"one that returns {describe(found)}", TypeError)
    own = getattr(found, "optimizer", None) is optimizer
    expect(own, NAME, "a function that returns a scheduler of the optimiser that it is given", "one of another")
    return found


def _gone_through(make: Callable, optimizer: torch.optim.Optimizer, iterations: int) -> frozenset[str]:
    """The names of what changes in the groups."""
    trial = copy.copy(optimizer)
    trial.param_groups = [
        {**copy.deepcopy(_settings(group)), "params": group["params"]} for group in trial.param_groups
    ]
    trial.state = {}
    scheduler, varies, done = _made(make, trial), {"lr"}, 0
    if isinstance(scheduler, ReduceLROnPlateau):
        return frozenset(varies)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the optimiser makes no steps
            for done in range(iterations):  # noqa: B007
                for group in trial.param_groups:
                    rate = float(group["lr"])
                    if not (math.isfinite(rate) and rate >= 0):
                        raise ValueError(f"a rate of {rate}")
                before = [_settings(group) for group in trial.param_groups]
                scheduler.step()
                for was, group in zip(before, trial.param_groups, strict=True):
                    varies |= {key for key, value in was.items() if group[key] is not value and group[key] != value}
    except Exception as e:
        got = f"{type(e).__name__}: {e}, at iteration {done}"
        raise ValueError(f"{NAME}: expected a schedule of {iterations} iterations, got {got}") from e
    return frozenset(varies)


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _expect_alike(have: Any, want: Any, what: str) -> None:
    """Of the same structure, with numbers where there are some."""
    fits = type(have) is type(want) or {type(have), type(want)} <= {int, float}
    if isinstance(want, Mapping):
        fits = fits and have.keys() == want.keys()
    elif isinstance(want, Sequence) and not isinstance(want, str):
        fits = fits and len(have) == len(want)
    if not fits:
        expect(False, "checkpoint", f"{what} as {describe(want)}", describe(have))
    if isinstance(want, Mapping) and all(isinstance(key, str) for key in want):
        for key, value in want.items():
            _expect_alike(have[key], value, f"{what}[{key!r}]")
    elif isinstance(want, Sequence) and not isinstance(want, str):
        for own, value in zip(have, want, strict=True):
            _expect_alike(own, value, what)
