"""Levenberg and Marquardt's damped least squares on a solver's endpoints: of its coefficients, its coefficients of x_0
and its model times, by finite differences of the sampler itself."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flowkernels.calibration.samples import Samples
from flowkernels.evaluation.endpoint import endpoint_errors
from flowkernels.ops.linear_update import linear_update
from flowkernels.ops.velocity_gram import velocity_gram
from flowkernels.sampling.teacher import Teacher
from flowkernels.solver import Solver

DAMPING = 1e-3  # of the first step, in parts of the size of each unknown
DIFFERENCES = (0.02, 0.005, 0.00125, 0.0003125)  # of unknowns, for derivatives: the first is beyond bfloat16's rounding
STACKED = 2**18  # elements of the states that are evaluated at once, where the samples alone are fewer
FROM_START = -1  # the place of a coefficient of x_0 in its row


@dataclass(frozen=True)
class Unknowns:
    """What of a solver of M evaluations is free: (i, None) is the time of evaluation i, (i, FROM_START) the coefficient
    of x_0 after it and (i, l) that of v_l.

    limits: between which times each evaluation stays. by: the differences for derivatives.
    """

    places: list[tuple[int, int | None]]
    limits: list[tuple[float, float]]
    by: float

    @classmethod
    def of(
        cls, data: Samples, grid: Tensor, forced: Sequence[int], solver: Solver, start_coefficients: bool
    ) -> "Unknowns":
        first = data.start[1]
        row = (None, FROM_START) if start_coefficients else (None,)
        places = [(i, where) for i in range(solver.evaluations) for where in (*row, *range(i + 1))]
        return cls(places, time_limits(grid.tolist(), forced, solver, first), DIFFERENCES[0] * (1 - first))

    def of_evaluation(self, i: int) -> list[tuple[int, int | None]]:
        """(place in the list, what) of those that come into play with evaluation i."""
        return [(row, where) for row, (at, where) in enumerate(self.places) if at == i]

    def difference(self, solver: Solver, i: int) -> float:
        """By how much time i is changed for a derivative: up, or down where there is more room; 0 where there is
        none."""
        t, (low, high), by = solver.model_times[i].item(), self.limits[i], self.by
        up, down = high - t, t - low
        step = min(by, up) if up >= by or up >= down else -min(by, down)
        return step if abs(step) > by / 16 else 0.0

    def moved(self, solver: Solver, by: Tensor) -> Solver:
        t, b, a = (x.clone() for x in (solver.model_times, solver.coefficients, solver.start_coefficients))
        for (i, where), change in zip(self.places, by.tolist(), strict=True):
            if where is None:
                t[i] = min(max(t[i].item() + change, self.limits[i][0]), self.limits[i][1])
            elif where == FROM_START:
                a[i] += change
            else:
                b[i, where] += change
        return replace(solver, model_times=t, coefficients=b, start_coefficients=a)


def time_limits(grid: list[float], forced: Sequence[int], solver: Solver, first: float) -> list[tuple[float, float]]:
    """Between which times each evaluation stays: where the teacher was evaluated, on its side of every forced knot."""
    t = solver.model_times.tolist()
    found = []
    for now in t:
        low = max([min(first, *t), *(grid[f] for f in forced if grid[f] <= now)])
        high = min([max(grid[-2], *t), *(max(grid[f - 1], now) for f in forced if grid[f] > now)])
        found.append((low, high))
    return found


def loss(errors: Tensor, scale: float | None) -> tuple[Tensor, float]:
    """(weights of the samples for a step of least squares, mean loss) of squared distances `[n]`.

    scale: None for the squared distance e itself, else the loss scale * log(1 + e / scale) of Student's distribution,
    whose weights 1 / (1 + e / scale) leave out samples that are far off: the reweighted least squares of Holland and
    Welsch (1977).
    """
    if scale is None:
        return torch.ones_like(errors), errors.mean().item()
    return 1 / (1 + errors / scale), (scale * torch.log1p(errors / scale)).mean().item()


class EndpointProblem:
    """The endpoints of n samples: where a solver takes them, and derivatives of that.

    fit: how many of them, the first, are fitted; the others are held out.
    """

    def __init__(self, data: Samples, fit: int, inverse: bool):
        place = data.start[0]
        self.data, self.fit = data, fit
        self.begin, self.end = (data.state(i) for i in ((-1, place) if inverse else (place, -1)))

    def run(self, solver: Solver, rows: slice | None = None) -> tuple[list[Tensor], Tensor]:
        """(velocities, errors [.]) of the samples `rows`; of those that are fitted, if None."""
        rows = slice(0, self.fit) if rows is None else rows
        v, x = self.data.teacher.run(solver, self.begin[rows], (), rows.start)
        return v, endpoint_errors(x, self.end[rows]).cpu()

    def held_out(self, solver: Solver) -> Tensor:
        return self.run(solver, slice(self.fit, self.data.n))[1]

    def gram(self, solver: Solver, unknowns: Unknowns, v: list[Tensor], rows: slice, weights: Tensor) -> Tensor:
        """The Gram matrix of the endpoint's derivatives and, last, of what is missing to the teacher's, float64
        `[P+1, P+1]`: over the samples `rows`, whose velocities v are, with weights `[.]`."""
        total = 0
        for part in self.data.teacher.chunks(rows.stop - rows.start):
            whole = slice(rows.start + part.start, rows.start + part.stop)
            total = total + self._gram(solver, unknowns, [t[part] for t in v], whole, weights[part])
        return total

    def _gram(self, solver, unknowns, v, rows: slice, weights) -> Tensor:
        start, end = self.begin[rows], self.end[rows]
        a, b = solver.start_coefficients.tolist(), solver.coefficients.tolist()
        x = linear_update(start, v, b[-1], scale=a[-1])
        sums = start.new_zeros(len(unknowns.places) + 2, *start.shape)  # whose increments `velocity_gram` multiplies
        for i in range(solver.evaluations):
            for row, derivative in self._derivatives(solver, unknowns, i, start, v, x, rows):
                sums[row + 1] = derivative
        sums[-1] = end - x
        sums.mul_(weights.sqrt().to(sums).view(-1, *[1] * (sums.dim() - 2)))
        return velocity_gram(sums.cumsum_(0)).cpu()

    def _derivatives(self, solver, unknowns, i: int, start, v, x, rows: slice) -> Iterator[tuple[int, Tensor]]:
        """(place, derivative) of the endpoint x of what comes into play with evaluation i; none, for zeros, where the
        velocity is not defined at a changed time."""
        a, b = solver.start_coefficients.tolist(), solver.coefficients.tolist()
        M, by, stacked = solver.evaluations, unknowns.by, []
        after = linear_update(start, v[: i + 1], b[i][: i + 1], scale=a[i])
        for row, where in unknowns.of_evaluation(i):
            if where is None:
                step = unknowns.difference(solver, i)
                if step == 0:
                    continue
                state = linear_update(start, v[:i], b[i - 1][:i], scale=a[i - 1]) if i else start
                change = self.data.teacher.at(state, solver.model_times[i].item() + step, rows.start).sub_(v[i])
                if i == M - 1:
                    stacked.append((row, step, b[i][i] * change, None))
                else:
                    stacked.append((row, step, b[i][i] * change, change))
            else:
                stacked.append((row, by, by * (start if where == FROM_START else v[where]), None))
        if i < M - 1:
            most = max(1, self._most_at_once(len(start), start[0].numel()) // len(start))
            parts = [stacked[k : k + most] for k in range(0, len(stacked), most)]
            stacked = [moved for part in parts for moved in self._carried(solver, i, start, v, x, after, part, rows)]
        for row, step, moved, _ in stacked:
            derivative = moved / step
            if torch.isfinite(derivative).all():
                yield row, derivative

    def _most_at_once(self, n: int, size: int) -> int:
        chunk = self.data.teacher.chunk
        return chunk if chunk is not None else max(n, STACKED // max(size, 1))

    def _carried(self, solver, i: int, start, v, x, after, changes: list, rows: slice) -> list:
        """The changes of the state after evaluation i, carried on to the endpoint, evaluated in one batch."""
        known, u, n = self.data.teacher, len(changes), len(start)
        teacher = self._repeated(u, rows)
        a, b = solver.start_coefficients.tolist(), solver.coefficients.tolist()
        states, made = torch.cat([after + change for _, _, change, _ in changes]), []
        for j in range(i + 1, solver.evaluations):
            made.append(teacher.at(states, solver.model_times[j].item()))
            shared = linear_update(start, v[: i + 1], b[j][: i + 1], scale=a[j])
            states = linear_update(shared.repeat(u, *[1] * (shared.dim() - 1)), made, b[j][i + 1 : j + 1])
            for k, (_, _, _, change) in enumerate(changes):
                if change is not None:
                    states[k * n : (k + 1) * n].add_(change, alpha=b[j][i])
        known.evaluations += teacher.evaluations
        moved = states.view(u, *start.shape).sub_(x)
        return [(row, step, end, None) for (row, step, _, _), end in zip(changes, moved, strict=True)]

    def _repeated(self, u: int, rows: slice) -> Teacher:
        """The teacher of u copies of the samples `rows`."""
        known = self.data.teacher
        order = torch.arange(rows.start, rows.stop, device="cpu") if known.order is None else known.order[rows]
        return Teacher(known.velocity, known.total, order=order.repeat(u), chunk=known.chunk)

    def difference(self, solver: Solver, unknowns: Unknowns, v: list[Tensor], rows: slice) -> float:
        """Which of DIFFERENCES is the best for derivatives: larger ones have more of curvature in them, smaller ones
        more of rounding, and by that the derivatives of two differ."""
        M, whole = solver.evaluations, unknowns.by / DIFFERENCES[0]
        if M == 1:
            return unknowns.by
        start, a, b = self.begin[rows], solver.start_coefficients.tolist(), solver.coefficients.tolist()
        x = linear_update(start, v[: M - 1], b[M - 2][: M - 1], scale=a[M - 2])
        now = solver.model_times[-1].item()
        found = [
            (self.data.teacher.at(x + h * whole * v[M - 2], now, rows.start) - v[-1]).div_(h * whole)
            for h in DIFFERENCES
        ]
        off = [(one - other).double().square().sum().item() for one, other in itertools.pairwise(found)]
        least = min(range(len(off)), key=lambda k: off[k] if off[k] == off[k] else torch.inf)
        return DIFFERENCES[least] * whole


ATTEMPTS = 5  # at a step, each with ten times the damping of the last
IDLE = 3e-3  # the part that the loss falls by, below which an iteration is idle


def minimised(
    problem: EndpointProblem,
    unknowns: Unknowns,
    solver: Solver,
    scales: Sequence[float | None],
    window: int,
    progress: Callable[[], object] = lambda: None,
) -> Solver:
    """The solver after an iteration for each of `scales`, or fewer where the last of them find nothing more.

    scales: of `loss`, in units of the median squared distance; None is the squared distance itself. window: the samples
        whose derivatives an iteration takes, in turn; all that are fitted decide whether its step is made. A step that
        is right for a few and good for all leaves narrow valleys that the exact step ends in.

    Of the squared distance, the iterate with the least; else the last.
    """
    windows = max(1, round(problem.fit / window))
    edges = [problem.fit * k // windows for k in range(windows + 1)]
    v, errors = problem.run(solver)
    if not torch.isfinite(errors).all():
        return solver
    best, damping, idle = (errors.mean().item(), solver), DAMPING, 0
    for k, c in enumerate(scales):
        scale = None if c is None else c * errors.median().item() or None
        weights, now = loss(errors, scale)
        rows = slice(edges[k % windows], edges[k % windows + 1])
        of_window = [t[rows] for t in v]
        if k == 0:
            unknowns = replace(unknowns, by=problem.difference(solver, unknowns, of_window, rows))
        gram = problem.gram(solver, unknowns, of_window, rows, weights[rows])
        progress()
        found, attempts = now, ATTEMPTS if torch.isfinite(gram).all() else 0
        for _ in range(attempts):
            change = step(gram, damping)
            if torch.isfinite(change).all():
                tried = unknowns.moved(solver, change)
                tried_v, tried_errors = problem.run(tried)
                found = loss(tried_errors, scale)[1]
                if found < now:  # NaN is not
                    solver, v, errors, damping = tried, tried_v, tried_errors, max(damping / 5, 1e-6)
                    break
            damping = max(10 * damping, 1e-4)
        else:
            found, damping = now, min(damping, 1e-2)
        best = min(best, (errors.mean().item(), solver), key=lambda b: b[0])
        idle = idle + 1 if found > (1 - IDLE) * now else 0
        if idle > windows and c == scales[-1]:
            break
    return best[1] if scales[-1] is None else solver


def step(gram: Tensor, damping: float) -> Tensor:
    """The change of the unknowns that damped least squares takes, float64 `[P]`, from a Gram matrix as
    `EndpointProblem.gram` gives it. Unknowns that move no endpoint stay."""
    S, s = gram[:-1, :-1], gram[:-1, -1]
    size = S.diagonal().clamp(min=0).sqrt()
    size = torch.where(size > 1e-7 * size.max(), size, torch.inf)
    S, s, eye = S / size / size[:, None], s / size, torch.eye(len(s), dtype=torch.float64, device="cpu")
    return torch.linalg.solve(S + (damping * eye) + torch.diag((size == torch.inf).double()), s) / size
