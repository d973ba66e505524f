"""What a student learns: a target turns places in a bank into inputs of the student, and its velocities into a loss.

Another target is a class beside `StraightLine` with its one method:

1. `loss_of(student, bank, places, generator)` draws what it needs from the generator, so that a resumed run draws the
   same; evaluates the student by `student_velocity`; and returns a `StraightenLoss` (ops/straighten_loss), of which the
   loop reads `loss`, with a graph, and `per_sample`, `[B]`, whose means by interval are the history's.
2. A setting of its own is a field of `settings.Settings`, with its check in `CHECKS` and a name in `SHARED`: a
   checkpoint of a run with another is refused. The field has a default, which is what runs of before it did, so that
   their checkpoints go on.
3. `straighten` has it as an argument, hands it to `Settings(...)`, chooses the target by it, and says what it is, with
   its source; cli/main.py offers it; docs/mathematics.md, "Straightening", has the formula.
4. tests/test_straighten.py has its formula once more, in float64, its resuming in `VARIANTS`, and its bad values;
   tests/_bad_calls.py has the argument in the row of `straighten`.

The bare loop, which needs none of 2 and 3, is at the top of loop.py.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from flowkernels.ops.segment_points import segment_points
from flowkernels.ops.straighten_loss import StraightenLoss, straighten_loss
from flowkernels.training.bank import Bank, Places, generator_on
from flowkernels.training.students import student_velocity


class Target(Protocol):
    """What the loop asks of a target."""

    def loss_of(self, student: nn.Module, bank: Bank, places: Places, generator: torch.Generator) -> StraightenLoss:
        """The loss of a batch, differentiable in the student's weights; generator: on the CPU."""


@dataclass(frozen=True)
class StraightLine:
    """The teacher's straight line over an interval `[t_a, t_b]`, from its state x_a to its state x_b: at
    `x = (1-u) x_a + u x_b` and `t = t_a + u (t_b - t_a)` the velocity `(x_b - x_a) / (t_b - t_a)`.

    u: "start", 0, BOSS as published (arXiv 2312.16414); or "uniform" in [0, 1], piecewise rectified flow, and on the
        one interval [0, 1] rectified flow (arXiv 2209.03003).
    loss, huber_c: of `fk.straighten_loss`. weight: float32 `[N]`, of each interval; None weighs all alike.
    """

    u: str = "start"
    loss: str = "l2"
    huber_c: float = 0.03
    weight: Tensor | None = None

    def loss_of(self, student: nn.Module, bank: Bank, places: Places, generator: torch.Generator) -> StraightenLoss:
        """The loss of a batch. Neither the target nor the states at the ends of the intervals are materialised."""
        device = bank.times.device
        interval, sample = places
        u, t = None, bank.times[interval]
        if self.u == "uniform":
            drawing = generator_on(device, generator)
            u = torch.rand(len(interval), generator=drawing, dtype=torch.float32, device=device)
            t = t + u * bank.step_sizes[interval]
        x = segment_points(bank.states, interval, sample, u)
        v = student_velocity(student, x, t, sample, bank.size)
        weight = None if self.weight is None else self.weight.to(device)[interval]
        return straighten_loss(
            v, bank.states, bank.step_sizes, interval, sample, weight=weight, loss=self.loss, huber_c=self.huber_c
        )
