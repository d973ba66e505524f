"""The parts of an iteration of `straighten`: their seconds, in the loop as it is."""

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import nn

import flowkernels as fk
from flowkernels.training.objective import StraightenLoss
from flowkernels.training.run import loop
from flowkernels.training.run.bank import RunBank
from flowkernels.training.run.descent import Descent
from flowkernels.training.run.optimizers import own_optimizer
from flowkernels.training.run.state import State

OTHER = "other"
PARTS = ("forward", "backward", "optimizer", "batch", "loss", "gradient norm", "average", "history", OTHER)


class Spent:
    """Seconds of parts, by iteration: a part inside another counts as its own alone, and `OTHER` is what no part has.

    now: the clock, in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self.now, self.iterations, self._inside, self._last = now, [], [OTHER], None

    def part(self, name: str, call: Callable) -> Callable:
        """The call, which is that part."""

        @functools.wraps(call)
        def timed(*args, **kwargs):
            self._count()
            self._inside.append(name)
            try:
                return call(*args, **kwargs)
            finally:
                self._count()
                self._inside.pop()

        return timed

    def begin(self) -> None:
        """Another iteration: before it, nothing counts."""
        self._count()
        self.iterations.append(dict.fromkeys(PARTS, 0.0))

    def _count(self) -> None:
        now = self.now()
        if self.iterations:
            self.iterations[-1][self._inside[-1]] += now - self._last
        self._last = now

    def middle(self, left_out: int) -> dict[str, float]:
        """Seconds of an iteration, the mean over the half of them that took neither longest nor shortest. left_out:
        iterations at the beginning; the last one, which ends with the run, is left out too."""
        whole = sorted(self.iterations[left_out:-1], key=lambda parts: sum(parts.values()))
        some = whole[len(whole) // 4 : len(whole) - len(whole) // 4]
        return {name: sum(parts[name] for parts in some) / len(some) for name in PARTS}


@contextmanager
def watched(spent: Spent, student: nn.Module) -> Iterator[None]:
    """In it the loop's parts are counted. The forward is that of all modules of the student's class."""
    parts = (
        (type(student), "forward", "forward"),
        (torch.Tensor, "backward", "backward"),
        (RunBank, "sample", "batch"),
        (StraightenLoss, "forward", "loss"),
        (Descent, "step", "gradient norm"),
        (State, "update_average", "average"),
        (State, "count", "history"),
        (State, "log", "history"),
    )
    set_rate = loop.set_rate

    def begin(*args):
        spent.begin()
        set_rate(*args)

    with ExitStack() as patches:
        for owner, attribute, name in parts:
            patches.enter_context(mock.patch.object(owner, attribute, spent.part(name, getattr(owner, attribute))))
        patches.enter_context(mock.patch.object(loop, "set_rate", begin))
        yield


def shares(
    network: nn.Module, student: nn.Module, shape: tuple[int, ...], *, batch: int, bank: int, iterations: int
) -> dict[str, float]:
    """Seconds of each part of an iteration, target "boss" on four steps, all other settings as they are by default."""
    spent, warm_up, lr = Spent(), max(2, iterations // 10), 1e-4

    def optimizer(parameters):
        made = own_optimizer(None, parameters, lr)
        made.step = spent.part("optimizer", made.step)
        return made

    noise = torch.randn(bank, *shape, generator=torch.Generator().manual_seed(0))
    settings = dict(batch=batch, lr=lr, iterations=warm_up + iterations + 1, log_every=10**9, grid=4, init="keep")
    with watched(spent, student):
        schedule = fk.Schedule.uniform(4)
        fk.straighten(student, network, schedule, noise=noise, optimizer=optimizer, progress=False, **settings)
    return spent.middle(warm_up)
