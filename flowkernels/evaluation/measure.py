"""The figures of `evaluate_sampler`: of one plan, and of an adaptive method at one tolerance."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flowkernels._checks import FlowError, expect, expect_tensor
from flowkernels.evaluation.adaptive import METHOD, adaptive
from flowkernels.evaluation.bootstrap import mean_interval
from flowkernels.evaluation.distances import BATCH, Energy, Features, Frechet
from flowkernels.evaluation.endpoint import endpoint_errors
from flowkernels.evaluation.evaluation import EvaluationRow
from flowkernels.evaluation.features import made
from flowkernels.evaluation.plans import Planned
from flowkernels.evaluation.straightness import sampled
from flowkernels.velocity.protocol import VelocityBase

ENDPOINT, STRAIGHTNESS, ENERGY, FRECHET, RK45, LIKELIHOOD = COLUMNS = (
    *("endpoint", "straightness", "energy"),
    *("frechet", "rk45", "likelihood"),
)
PairDistance = Callable[[Tensor, Tensor], Tensor]  # (samples, teacher's samples) -> [n]


@dataclass
class Measure:
    """What every row is measured with.

    velocity: of rows without one of their own, and of the adaptive method. columns: those wanted. pairs: further
    distances by name. points: of each interval's straightness. teacher: its samples, or None. data: what distances
    between sets are to, None: the teacher's samples.
    """

    velocity: VelocityBase
    noise: Tensor
    columns: Collection[str]
    pairs: Mapping[str, PairDistance]
    points: int
    chunk: int | None
    keep: bool
    features: Features | None
    teacher: Tensor | None
    data: Tensor | None
    _sets: dict[str, tuple[Energy | Frechet, Any]] = field(default_factory=dict)

    def __post_init__(self):
        kinds = {ENERGY: Energy, FRECHET: Frechet}
        wanted = [name for name in kinds if name in self.columns]
        if wanted:
            to = self._space(self.teacher if self.data is None else self.data.to(self.noise.device))
            self._sets = {name: (kinds[name](), kinds[name]().describe(to)) for name in wanted}

    def row(self, plan: Planned) -> EvaluationRow:
        """The figures of a plan."""
        velocity, solver = plan.velocity or self.velocity, plan.solver
        made = dict(name=plan.name, steps=solver.steps, **evaluations_of(velocity, solver.evaluations))
        points = self.points if STRAIGHTNESS in self.columns else 0
        try:
            samples, off = sampled(velocity, solver, self.noise, chunk=self.chunk, points=points)
        except FlowError as e:
            return EvaluationRow(**made, failed=f"{e}")
        if off is not None:
            h = solver.times.diff()
            along, along_error = mean_and_error((off * h).sum(1) / h.sum())
            each = [mean_and_error(column) for column in off.T]
            made |= dict(straightness=along, straightness_error=along_error)
            made |= dict(intervals=tuple(mean for mean, _ in each))
            if along_error is not None:
                made |= dict(interval_errors=tuple(error for _, error in each))
        return EvaluationRow(**made, **self._figures(samples))

    def adaptive_row(self, tolerance: float, start: float) -> EvaluationRow:
        """The figures of dopri5 at a tolerance."""
        name = f"{METHOD} {tolerance:g}"
        try:
            samples, calls = adaptive(self.velocity, self.noise, tolerance, start, self.chunk)
        except FlowError as e:
            return EvaluationRow(name, None, 0, 0, failed=f"{e}")
        return EvaluationRow(name, None, **evaluations_of(self.velocity, calls), **self._figures(samples))

    def _figures(self, samples: Tensor) -> dict[str, Any]:
        found: dict[str, Any] = {"samples": samples} if self.keep else {}
        if ENDPOINT in self.columns or RK45 in self.columns:
            errors = endpoint_errors(samples, self.teacher).cpu()
            interval = mean_interval(errors)
            found["rms"] = errors.mean().sqrt().item()
            if interval is not None:
                found["rms_interval"] = tuple(max(0.0, end) ** 0.5 for end in interval)
        space = self._space(samples) if self._sets else None
        for name, (distance, to) in self._sets.items():
            if name == FRECHET:
                found["frechet"] = distance.between(distance.describe(space), to)
            else:
                of = distance.with_error(distance.describe(space), to, paired=self.data is None)
                found["energy"], found["energy_error"] = of
        paired = {name: mean_and_error(self._pairwise(name, samples)) for name in self.pairs}
        return found | {"paired": paired}

    def _space(self, samples: Tensor) -> Tensor:
        return samples if self.features is None else made(self.features, samples)

    def _pairwise(self, name: str, samples: Tensor) -> Tensor:
        """float64 `[n]`, on the CPU. The function may write into what it is given."""
        found = []
        for x, y in zip(samples.split(BATCH), self.teacher.split(BATCH), strict=True):
            part = expect_tensor(self.pairs[name](x.clone(), y.clone()), f"distances[{name!r}]")
            fits = part.dim() > 0 and len(part) == part.numel() == len(x)
            expect(fits, f"distances[{name!r}]", f"a distance of each sample, [{len(x)}]", part)
            found.append(part.detach().double().flatten().cpu())
        found = torch.cat(found)
        bad = (~found.isfinite()).nonzero()
        expect(len(bad) == 0, f"distances[{name!r}]", "finite distances", f"NaN or Inf of sample {bad[:1].tolist()}")
        return found


def evaluations_of(velocity: VelocityBase, evaluations: int) -> dict[str, int]:
    """Of the velocity, and of the network: two of each with guidance."""
    guidance = velocity.unfused().guidance
    return dict(
        evaluations=evaluations,
        network_evaluations=evaluations * (2 if callable(guidance) or guidance != 1.0 else 1),
    )


def mean_and_error(values: Tensor) -> tuple[float, float | None]:
    """The mean of `values [n]` and its standard error, None of one."""
    error = (values.std() / len(values) ** 0.5).item() if len(values) > 1 else None
    return values.mean().item(), error


def fewest(row: EvaluationRow, adaptive: list[EvaluationRow]) -> int | None:
    """The fewest evaluations of an adaptive method's rows that end as near to the teacher as a row; None: no row's."""
    near = [a.evaluations for a in adaptive if a.failed is None and row.rms is not None and a.rms <= row.rms]
    return min(near, default=None)
