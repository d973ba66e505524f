"""How far a teacher itself ends from the true solution: a floor under every error that is measured against it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from flowkernels._checks import expect, expect_numbers, expect_positive_int, expect_real, expect_text
from flowkernels.calibration.measured import Measured
from flowkernels.evaluation.bootstrap import mean_interval
from flowkernels.evaluation.endpoint import endpoint_errors
from flowkernels.runtime.ranks import Ranks
from flowkernels.sampling.sample import sample
from flowkernels.sampling.teacher_solver import ENTRY, HEUN, heun
from flowkernels.solver import Solver
from flowkernels.velocity.protocol import VelocityBase

SAMPLES = 64  # that it is estimated on; a few of them may have most of it
ORDERS = 1.0, 3.0  # of convergence, between which an estimate of Heun's method is extrapolated


@dataclass(frozen=True)
class TeacherError:
    """A teacher's own error at t = 1, by a finer solution of the same samples.

    error: the mean squared L2 distance, as endpoint errors are. interval: of 95 % of that mean, by bootstrap, or None.
    samples: how many. evaluations: that it took, of each. reference: the finer solution.
    factor: what Richardson's extrapolation has multiplied the squared distance to it by; 1 where it is the reference's
        alone, whose own error is of a higher order, or where the solutions do not yet converge as the method says.
    order: that of their convergence, as three grids show it; None where it was not looked at. Far from 2 the grid does
        not resolve the flow yet, and the error may be larger.

    Examples:
        >>> velocity, noise = (lambda x, t: x * t[:, None] ** 4), torch.randn(64, 2)
        >>> cal = fk.calibrate(velocity, noise, 20, [2], teacher_error=64, progress=False)
        >>> cal.teacher_error.evaluations, cal.teacher_error.reference
        (40, 'heun on 20 steps')
    """

    error: float
    interval: tuple[float, float] | None
    samples: int
    evaluations: int
    reference: str
    factor: float = 1.0
    order: float | None = None

    def __str__(self) -> str:
        return self.told()

    def told(self, root: bool = False) -> str:
        """In a line. root: as root mean squares."""
        power = 0.5 if root else 1
        between = "" if self.interval is None else " ({:.3g}..{:.3g})".format(*(end**power for end in self.interval))
        off = self.order is not None and not ORDERS[0] <= self.order <= ORDERS[1]
        doubt = f", which do not converge yet (order {self.order:.2g})" if off else ""
        kind = "rms" if root else "mean squared"
        return f"{kind} {self.error**power:.4g}{between} of {self.samples} samples to {self.reference}{doubt}"

    def to_dict(self) -> dict[str, Any]:
        known = asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in known.items() if v is not None}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], name: str = "teacher_error") -> "TeacherError":
        """What `to_dict` gave; ValueError or KeyError for what is none."""
        expect(isinstance(data, Mapping), name, "an object", data)
        real = "a number of at least 0"
        numbers = {k: expect_real(data[k], f"{name}.{k}", real, lambda a: a >= 0) for k in ("error", "factor")}
        counts = {k: expect_positive_int(data[k], f"{name}.{k}") for k in ("samples", "evaluations")}
        interval, order = data.get("interval"), data.get("order")
        if interval is not None:
            low, high = expect_numbers(interval, f"{name}.interval", 2)
            expect(0 <= low <= high, f"{name}.interval", "[low, high]", interval)
            interval = (low, high)
        order = None if order is None else expect_real(order, f"{name}.order", "a number")
        return cls(**numbers, **counts, interval=interval, order=order, reference=expect_text(data["reference"], name))


def finer(times: Tensor, forced: Sequence[int]) -> tuple[Tensor, tuple[int, ...]]:
    """The grid of half its steps, and the places in it of forced knots."""
    between = torch.stack([times[:-1], (times[:-1] + times[1:]) / 2], 1).flatten()
    return torch.cat([between, times[-1:]]), tuple(2 * f for f in forced)


def can_be_halved(solver: Solver, named: bool, forced: Sequence[int]) -> bool:
    """Whether twice the steps can show how fast the teacher's converge. named: whether it was given by its name."""
    return named and solver.name == HEUN and solver.steps % 2 == 0 and all(f % 2 == 0 for f in forced)


def price_of(solver: Solver, named: bool, forced: Sequence[int]) -> int:
    """Evaluations of each sample whose end is known."""
    return solver.steps * (2 if solver.is_euler else 5 if can_be_halved(solver, named, forced) else 4)


def teacher_error(
    cal: Measured,
    velocity: VelocityBase,
    start: Tensor,
    total: int,
    chunk: int | None,
    ends: Tensor | None = None,
    ranks: Ranks | None = None,
) -> TeacherError:
    """Of the first samples, from their states `start` at the grid's first time; `ends`: the teacher's own, if known.

    Of a teacher of Euler's steps it is the distance to Heun's on the same grid, 2K evaluations; of any other to Heun's
    on half the steps, 4K. Of Heun's own, where the grid can be halved, twice the steps show as K more evaluations how
    fast all of them converge, and the distance is extrapolated by that.
    """
    n, times, forced, solver = len(start), cal.times, cal.forced, cal.teacher_solver
    order, factor, ranks = None, 1.0, ranks or Ranks()

    def of_part(plan: Solver, rows: slice) -> Tensor:
        begins = range(rows.start, rows.stop, chunk or n)
        parts = (slice(i, min(i + (chunk or n), rows.stop)) for i in begins)
        return torch.cat([sample(velocity.rows(part, total), start[part], plan) for part in parts])

    def at_end(plan: Solver) -> Tensor:
        return ranks.shared(n, lambda rows: of_part(plan, rows))

    evaluations = 0
    if ends is None:
        ends, evaluations = at_end(solver), solver.evaluations
    steps = times, forced
    reference = heun(*(finer(*steps) if cal.secants else steps))
    best = at_end(reference)
    evaluations += reference.evaluations
    errors = endpoint_errors(ends, best)
    halved = can_be_halved(solver, cal.provenance.get(ENTRY) == HEUN, forced)
    if halved and (near := errors.mean().item()) > 0:
        twice = heun(times[::2], [f // 2 for f in forced])
        far = endpoint_errors(at_end(twice), ends).mean().item()
        evaluations += twice.evaluations
        order = math.log2(max(far, 1e-300) / near) / 2
        if ORDERS[0] <= order <= ORDERS[1]:
            factor = 1 / (1 - 2.0**-order) ** 2
    errors = factor * errors
    told = f"{reference.name} on {reference.steps} steps"
    found = TeacherError(errors.mean().item(), mean_interval(errors), n, evaluations, told, factor, order)
    return ranks.from_first(found)
