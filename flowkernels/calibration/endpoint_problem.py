"""Where a solver takes samples, and derivatives of that by its coefficients, its coefficients of x_0 and its model
times: finite differences of the sampler itself."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flowkernels.calibration.samples import Samples
from flowkernels.evaluation.endpoint import endpoint_errors
from flowkernels.ops.linear_update import linear_update
from flowkernels.ops.velocity_gram import velocity_gram
from flowkernels.sampling.teacher import Teacher
from flowkernels.solver import Solver

DIFFERENCES = (0.02, 0.005, 0.00125, 0.0003125)  # of unknowns, for derivatives: the first is beyond bfloat16's rounding
KEPT = 2**26  # elements of derivatives that are kept between steps
STACKED = 2**18  # elements of the states that are evaluated at once, where the samples alone are fewer
FROM_START = -1  # the place of a coefficient of x_0 in its row


def places_of(M: int, start_coefficients: bool) -> list[tuple[int, int | None]]:
    """What of a solver of M evaluations is free, as `Unknowns` has it."""
    row = (None, FROM_START) if start_coefficients else (None,)
    return [(i, where) for i in range(M) for where in (*row, *range(i + 1))]


def price_of(places: list[tuple[int, int | None]], M: int) -> int:
    """The evaluations of a sample that derivatives by all of these take: a coefficient changes those that follow its
    own evaluation, a time that one too."""
    return sum(M - i if where is None else M - 1 - i for i, where in places)


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
        places = places_of(solver.evaluations, start_coefficients)
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

    def values(self, solver: Solver) -> Tensor:
        """Of a solver, float64 `[P]`."""
        t, b, a = solver.model_times, solver.coefficients, solver.start_coefficients
        found = [t[i] if where is None else a[i] if where == FROM_START else b[i, where] for i, where in self.places]
        return torch.stack(found)

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


def _last_scale(solver: Solver) -> float:
    return solver.start_coefficients[-1].item()


class EndpointProblem:
    """The endpoints of n samples: where a solver takes them, and derivatives of that.

    fit: how many of them, the first, are fitted; the others are held out.

    Of several ranks each has its own of the fitted samples, a part of every window (`divide`): velocities, ends,
    derivatives and `rows` are of these; errors are those of all, and Gram matrices the sums over all.
    """

    def __init__(self, data: Samples, fit: int, inverse: bool):
        self.data, self.fit, self.ranks, self.places = data, fit, data.teacher.ranks, (data.start[0], -1)
        if inverse:
            self.places = -1, data.start[0]
        self.begin, self.end = (data.state(i) for i in self.places)  # of all samples
        self.divide(1)

    def divide(self, windows: int) -> None:
        """Into windows of about equal size, of which `rows` are some."""
        bounds = [self.fit * w // windows for w in range(windows + 1)]
        self.windows, self.own, self.own_fit = [slice(a, b) for a, b in itertools.pairwise(bounds)], self.data, self.fit
        self.own_begin, self.own_end, self.mine, self._back, self._counted = self.begin, self.end, slice(None), None, 0
        if self.ranks.is_alone:
            return
        of_each = [[self.ranks.part(b - a, r) for a, b in itertools.pairwise(bounds)] for r in range(self.ranks.size)]
        each = [
            torch.cat(
                [torch.arange(a + p.start, a + p.stop, device="cpu") for a, p in zip(bounds, parts, strict=False)]
            )
            for parts in of_each
        ]
        self.mine, self._back = each[self.ranks.rank], torch.cat(each).argsort()
        ends = list(itertools.accumulate((p.stop - p.start for p in of_each[self.ranks.rank]), initial=0))
        self.windows, self.own_fit = [slice(a, b) for a, b in itertools.pairwise(ends)], len(self.mine)
        self.own = self.data.own(self.mine)
        self.own_begin, self.own_end = (t.index_select(0, self.mine.to(t.device)) for t in (self.begin, self.end))

    def rows(self, turn: int, windows: int) -> slice:
        """Of this rank's: a window, or for one of them all."""
        return slice(0, self.own_fit) if windows == 1 else self.windows[turn % windows]

    def _summed(self, t: Tensor) -> Tensor:
        """Float64 on the CPU, over the ranks; what they have evaluated since the last time is counted."""
        if self.ranks.is_alone:
            return t
        made, self._counted = self.own.teacher.evaluations - self._counted, self.own.teacher.evaluations
        *_, made = found = self.ranks.total(torch.cat([t.flatten(), torch.tensor([made]).to(t)]))
        self.data.teacher.evaluations += int(made)
        return found[:-1].view(t.shape)

    @property
    def evaluations(self) -> int:
        return self.data.teacher.evaluations

    def ends(self, solver: Solver) -> tuple[list[Tensor], Tensor]:
        """(velocities, ends) of the samples that are fitted."""
        found = self.ranks.tried(lambda: self.own.teacher.run(solver, self.own_begin[: self.own_fit]))
        if not self.ranks.is_alone:
            self._counted += solver.evaluations * self.own_fit
            self.data.teacher.evaluations += solver.evaluations * self.fit
        return found

    def errors(self, x: Tensor) -> Tensor:
        """Squared distances of such ends, float64 `[fit]`, on the CPU."""
        errors = self.ranks.gathered(endpoint_errors(x, self.own_end[: self.own_fit]).cpu(), self.fit)
        return errors if self._back is None else errors[self._back]

    def held_out(self, solver: Solver) -> Tensor:
        """The errors of the samples that are not fitted."""
        rows = slice(self.fit, self.data.n)
        return self.data.errors_of(solver, self.begin[rows], self.end[rows], (), self.fit)

    def can_keep(self, unknowns: Unknowns) -> bool:
        """Whether the derivatives of all fitted samples are few enough."""
        return len(unknowns.places) * self.fit * self.data.x[0, 0].numel() <= KEPT

    def gram(self, solver: Solver, unknowns: Unknowns, v: list[Tensor], rows: slice, weights: Tensor) -> Tensor:
        """The Gram matrix of the endpoint's derivatives and, last, of what is missing to the teacher's, float64
        `[P+1, P+1]`: over the samples `rows`, whose velocities v are, with weights `[.]`."""

        def own() -> Tensor:
            size = len(unknowns.places) + 1
            total = torch.zeros(size, size, dtype=torch.float64, device="cpu")
            for part, whole in self._parts(rows):
                some, last = [t[part] for t in v], solver.coefficients[-1].tolist()
                x = linear_update(self.own_begin[whole], some, last, scale=_last_scale(solver))
                derivatives = self._of_part(solver, unknowns, some, x, whole)
                total = total + self._own_gram(derivatives, x, whole, weights[part])
            return total

        return self._summed(self.ranks.tried(own))

    def gram_of(self, derivatives: Tensor, x: Tensor, rows: slice, weights: Tensor) -> Tensor:
        """The same of derivatives `[P, ., *shape]` at the ends x."""
        return self._summed(self.ranks.tried(lambda: self._own_gram(derivatives, x, rows, weights)))

    def _own_gram(self, derivatives: Tensor, x: Tensor, rows: slice, weights: Tensor) -> Tensor:
        each = weights.sqrt().to(x).view(-1, *[1] * (x.dim() - 1))
        sums = x.new_zeros(len(derivatives) + 2, *x.shape)  # whose increments `velocity_gram` multiplies
        torch.mul(derivatives, each, out=sums[1:-1])
        torch.sub(self.own_end[rows], x, out=sums[-1]).mul_(each)
        return velocity_gram(sums.cumsum_(0)).cpu()

    def derivatives(self, solver: Solver, unknowns: Unknowns, v: list[Tensor], rows: slice) -> Tensor:
        """Of the ends of the samples `rows` by each unknown, `[P, ., *shape]`."""

        def own() -> Tensor:
            found = [self.own_begin.new_zeros(len(unknowns.places), 0, *self.own_begin.shape[1:])]
            for part, whole in self._parts(rows):
                some, last = [t[part] for t in v], solver.coefficients[-1].tolist()
                x = linear_update(self.own_begin[whole], some, last, scale=_last_scale(solver))
                found.append(self._of_part(solver, unknowns, some, x, whole))
            return found[1] if len(found) == 2 else torch.cat(found, 1)

        return self.ranks.tried(own)

    def _parts(self, rows: slice) -> Iterator[tuple[slice, slice]]:
        """(places in `rows`, places in all) of the parts that are evaluated at once."""
        for part in self.own.teacher.chunks(rows.stop - rows.start):
            yield part, slice(rows.start + part.start, rows.start + part.stop)

    def _of_part(self, solver, unknowns, v, x, rows: slice) -> Tensor:
        found = x.new_zeros(len(unknowns.places), *x.shape)
        for i in range(solver.evaluations):
            for row, derivative in self._derivatives(solver, unknowns, i, self.own_begin[rows], v, x, rows):
                found[row] = derivative
        return found

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
                change = self.own.teacher.at(state, solver.model_times[i].item() + step, rows.start).sub_(v[i])
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
        chunk = self.own.teacher.chunk
        return chunk if chunk is not None else max(n, STACKED // max(size, 1))

    def _carried(self, solver, i: int, start, v, x, after, changes: list, rows: slice) -> list:
        """The changes of the state after evaluation i, carried on to the endpoint, evaluated in one batch."""
        known, u, n = self.own.teacher, len(changes), len(start)
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
        known = self.own.teacher
        order = torch.arange(rows.start, rows.stop, device="cpu") if known.order is None else known.order[rows]
        return Teacher(known.velocity, known.total, order=order.repeat(u), chunk=known.chunk)

    def difference(self, solver: Solver, unknowns: Unknowns, v: list[Tensor], rows: slice) -> float:
        """Which of DIFFERENCES is the best for derivatives: larger ones have more of curvature in them, smaller ones
        more of rounding, and by that the derivatives of two differ."""
        M, whole = solver.evaluations, unknowns.by / DIFFERENCES[0]
        if M == 1:
            return unknowns.by
        start, a, b = self.own_begin[rows], solver.start_coefficients.tolist(), solver.coefficients.tolist()
        now = solver.model_times[-1].item()

        def own() -> Tensor:
            x = linear_update(start, v[: M - 1], b[M - 2][: M - 1], scale=a[M - 2])
            found = [
                (self.own.teacher.at(x + h * whole * v[M - 2], now, rows.start) - v[-1]).div_(h * whole)
                for h in DIFFERENCES
            ]
            off = [(one - other).double().square().sum().cpu() for one, other in itertools.pairwise(found)]
            return torch.stack(off)

        off = self._summed(self.ranks.tried(own)).tolist()
        least = min(range(len(off)), key=lambda k: off[k] if off[k] == off[k] else torch.inf)
        return DIFFERENCES[least] * whole
