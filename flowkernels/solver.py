"""Solvers: what a sampler does at each of its evaluations, beyond Euler steps on a schedule's knots."""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from flowkernels._checks import (
    expect,
    expect_bool,
    expect_float64,
    expect_mapping,
    expect_numbers,
    expect_positive_int,
    expect_room,
    expect_text,
    expect_times,
)
from flowkernels._warnings import warn
from flowkernels.schedule import Schedule

MOST_GROWTH = 4.0  # of x_0's part from state to state, beyond which updates begin at x_0
MOST_AMPLIFICATION = (
    2.0  # of errors, beyond which Adams-Bashforth warns: a quarter of its weights, by size, is negative
)
NEGLIGIBLE = 1e-14  # of the largest coefficient: what sums in float64 leave of a zero


class Update(NamedTuple):
    """What follows evaluation i: x_{i+1} = scale * (x_0 or x_i) + the sum of factor * v_k, added up in the order of k.

    from_start: from x_0, else from x_i. which: the velocities k, at most i. factors: one for each.
    """

    from_start: bool
    which: tuple[int, ...]
    factors: tuple[float, ...]
    scale: float = 1.0


def euler_sizes(updates: Sequence[Update]) -> list[float] | None:
    """The step sizes, where each update adds nothing but its own velocity to its own state; else None."""
    sizes = []
    for i, (from_start, which, factors, scale) in enumerate(updates):
        if from_start or which != (i,) or scale != 1:
            return None
        sizes.append(factors[0])
    return sizes


def last_uses(updates: Sequence[Update]) -> list[int]:
    """For each evaluation the last update that reads its velocity; its own where none does."""
    last = list(range(len(updates)))
    for i, update in enumerate(updates):
        for k in update.which:
            last[k] = i
    return last


@dataclass(frozen=True, eq=False)
class Solver:
    """An explicit linear solver: M evaluations of the velocity, with the state before evaluation i + 1 (after the last,
    the sample)

        x_{i+1} = a[i] x_0 + sum_{l <= i} b[i, l] v_l,    v_i = v(x_i, model_times[i])

    times: the knots of its N steps, float64 `[N+1]`, from 0 (noise), or later, to 1 (data), or before; of an inversion
        in the other direction. One that begins later begins with the state there; one that ends before 1 is for
        `sample`, `rollout` and `invert`, and the other stages refuse it.
    model_times: the time that the velocity is given at each evaluation, float64 `[M]`.
    coefficients: b, float64 `[M, M]`, zero above the diagonal, in units of time.
    name: what it is, in a word.
    notes: where it comes from, such as the report of a fit. Numbers, texts, lists and dicts of them.
    start_coefficients: a, float64 `[M]`; None for ones, as multistep methods have them, exponential integrators on
        straight paths too. With others a solver is any linear scheme in x_0 and velocities, such as a fit has them.

    Multistep methods make one evaluation a step, M = N; Heun's second stage is an evaluation of its own.

    Examples:
        >>> solver = fk.Solver.adams_bashforth([0, 0.5, 1], order=2)
        >>> fk.sample(lambda x, t: -x, torch.ones(1, 2), solver)
        tensor([[0.3750, 0.3750]])
    """

    times: Tensor
    model_times: Tensor
    coefficients: Tensor
    name: str = "solver"
    notes: dict = field(default_factory=dict)
    start_coefficients: Tensor | None = field(default_factory=lambda: None)  # no attribute of the class: __getattr__

    def __post_init__(self):
        times = expect_float64(self.times, "times", "a sequence of times")
        falls = times.dim() == 1 and len(times) > 1 and bool(times[0] > times[-1])
        known = expect_times(times.flip(0) if falls else times, "times", whole=False)
        t = expect_float64(self.model_times, "model_times", "a sequence of times, one for each evaluation")
        b = expect_float64(self.coefficients, "coefficients", "a table of numbers, a row for each evaluation")
        expect_text(self.name, "name"), expect_mapping(self.notes, "notes")
        expect(t.dim() == 1 and len(t) > 0, "model_times", "shape [M], one time for each evaluation", t)
        expect(bool(torch.isfinite(t).all()), "model_times", "finite times", t.tolist())
        expect(b.shape == (len(t), len(t)), "coefficients", f"shape [{len(t)}, {len(t)}], a row for each evaluation", b)
        expect(bool(torch.isfinite(b).all()), "coefficients", "finite coefficients", b.tolist())
        expect(not b.triu(1).any(), "coefficients", "zeros above the diagonal: no velocity before its evaluation", b)
        a = torch.ones_like(t)
        if self.start_coefficients is not None:
            a = expect_float64(self.start_coefficients, "start_coefficients", "numbers, one for each evaluation")
            expect(a.shape == t.shape, "start_coefficients", f"{len(t)} numbers, one for each evaluation", a)
            expect(bool(torch.isfinite(a).all()), "start_coefficients", "finite numbers", a.tolist())
        tables = {"model_times": t, "coefficients": b, "start_coefficients": a}
        for name, value in {"times": times if falls else known, **tables}.items():
            object.__setattr__(self, name, value.clone())  # the caller may write to what it gave
        object.__setattr__(self, "_updates", self._find_updates())  # here, where torch.compile does not look at values

    def __getattr__(self, name: str):
        """The coefficients of `Solver.euler`, made where they are asked for: a grid may have a million steps."""
        if name not in ("coefficients", "start_coefficients") or "times" not in vars(self):
            return object.__getattribute__(self, name)  # for its error, which may be one of a property's
        if name == "start_coefficients":  # of a pickle of an earlier version too
            object.__setattr__(self, name, torch.ones_like(self.model_times))
            return vars(self)[name]
        h = self.times.diff()
        expect_room(8 * (2 * len(h)) ** 2, "coefficients", "a table of them", f"{len(h)} steps")
        object.__setattr__(self, name, h.expand(len(h), -1).tril())
        return vars(self)[name]

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        if not all(isinstance(update, Update) for update in state["_updates"]):  # a pickle of an earlier version
            vars(self)["_updates"] = self._find_updates()

    @property
    def steps(self) -> int:
        """N."""
        return len(self.times) - 1

    @property
    def evaluations(self) -> int:
        """M, the number of velocity evaluations of a sample (NFE)."""
        return len(self.model_times)

    @property
    def is_inverse(self) -> bool:
        """Whether it runs from data to noise."""
        return self.times[0].item() > self.times[-1].item()

    @property
    def reaches_data(self) -> bool:
        """Whether it ends at t = 1."""
        return abs(self.times[-1].item() - 1) <= 1e-12

    @property
    def is_euler(self) -> bool:
        """Whether it is nothing but Euler steps on its knots."""
        on_knots = torch.equal(self.model_times, self.times[:-1])
        return on_knots and euler_sizes(self._updates) == self.times.diff().tolist()

    @property
    def amplification(self) -> float:
        """How errors of its velocities add up, `sum_l |b[M-1, l]| / |t_N - t_0|`: where none is off by more than eps,
        the sample is off by `amplification |t_N - t_0| eps` at most.

        1 where the velocities' weights are positive and make up the time, as of Euler's steps. More where they are of
        both signs: Adams-Bashforth 2 weighs the last two by `1 + r/2` and `-r/2` of a step r times the one before it,
        and extrapolates what two near ones differ by, errors included, over the long step.

        Examples:
            >>> fk.Solver.adams_bashforth([0, 0.25, 0.5, 0.75, 1]).amplification
            1.0
            >>> round(fk.Solver.adams_bashforth([0, 0.01, 0.5, 1]).amplification, 2)
            24.99
        """
        T, sizes = abs(self.times[-1] - self.times[0]).item(), euler_sizes(self._updates)
        weights = self.coefficients[-1].tolist() if sizes is None else sizes
        return sum(map(abs, weights)) / T

    def updates(self, chained: bool = False) -> tuple[Update, ...]:
        """What follows each evaluation, in whichever form has fewer terms: Adams-Bashforth 2 from x_i has two, a fit
        has them all from x_0.

        chained: all from x_i, for a caller that changes states on the way. ValueError where a start coefficient before
            the last is 0: the state there says nothing of x_0.
        """
        as_is = not expect_bool(chained, "chained") or self.is_euler  # whose steps are from x_i
        return self._updates if as_is else self._find_updates(chained)

    def _find_updates(self, chained: bool = False) -> tuple[Update, ...]:
        b, a, found = self.coefficients, [1.0, *self.start_coefficients.tolist()], []
        small = NEGLIGIBLE * b.abs().max()
        for i in range(self.evaluations):
            # larger ones would raise rounding with them, but for the first state's, which is x_0 itself
            known = i == 0 or (a[i] != 0 and abs(a[i + 1] / a[i]) <= MOST_GROWTH)
            if chained:
                expect(a[i] != 0, "start_coefficients", "no 0 before the last, for steps from state to state", a[1:])
            scales = a[i + 1] / a[i] if known or chained else 1.0, a[i + 1]
            rows = b[i] - scales[0] * b[i - 1] if i else b[i], b[i]
            terms = [(row.abs() > small).nonzero().flatten().tolist() or [i] for row in rows]
            fewer = len(terms[1]) < len(terms[0]) or len(terms[0]) == len(terms[1]) == i + 1
            first = i > 0 and (fewer or not known) and not chained
            found.append(Update(first, tuple(terms[first]), tuple(rows[first][terms[first]].tolist()), scales[first]))
        return tuple(found)

    @property
    def keeps_start(self) -> bool:
        """Whether all start coefficients are 1."""
        return bool((self.start_coefficients == 1).all())

    def to_dict(self) -> dict:
        """What `from_dict` makes it of again, for JSON; without start coefficients that are all 1."""
        tables = {k: getattr(self, k).tolist() for k in ("times", "model_times", "coefficients")}
        if not self.keeps_start:
            tables["start_coefficients"] = self.start_coefficients.tolist()
        return {"name": self.name, **tables, "notes": self.notes}

    @classmethod
    def from_dict(cls, data: dict) -> "Solver":
        """What `to_dict` gave. ValueError if it is something else, naming the entry."""
        expect_mapping(data, "data")
        entries = ("times", "model_times", "coefficients", "name", "notes", "start_coefficients")
        known = {k: data.get(k) for k in entries}
        expect(isinstance(known["name"], str), "name", "a text", known["name"])
        expect(isinstance(known["notes"], dict), "notes", "a dict", known["notes"])
        for name in ("times", "model_times"):
            expect_numbers(known[name], name)
        M, rows = len(known["model_times"]), known["coefficients"]
        square = isinstance(rows, list) and len(rows) == M
        expect(square, "coefficients", f"{M} rows, one for each evaluation", rows)
        for row in rows:
            expect_numbers(row, "coefficients", M)
        if known["start_coefficients"] is not None:
            expect_numbers(known["start_coefficients"], "start_coefficients", M)
        return cls(**known)

    @classmethod
    def of(cls, schedule: "Schedule | Solver | int | Sequence[float] | Tensor") -> "Solver":
        """The solver itself, or Euler steps on a schedule."""
        return expect_solver(schedule, "schedule")

    @classmethod
    def euler(
        cls,
        schedule: Schedule | int | Sequence[float] | Tensor,
        *,
        model_times: Sequence[float] | Tensor | None = None,
        inverse: bool = False,
    ) -> "Solver":
        """Euler steps on a schedule's knots.

        Args:
            schedule: a Schedule, N for N uniform steps, or N+1 increasing times in [0, 1].
            model_times: the time that the velocity is given at each step, where that is not the step's first knot.
            inverse: from data to noise, on the same knots, which may then be given from the last to the first.
        """
        times = _knots(schedule, inverse)
        given = times[:-1]
        if model_times is not None:
            given = expect_float64(model_times, "model_times", "a sequence of times")
            expect(given.shape == times[:-1].shape, "model_times", f"{len(times) - 1} times, one for each step", given)
            expect(bool(torch.isfinite(given).all()), "model_times", "finite times", given.tolist())
        return cls._euler(times, given)

    @classmethod
    def _euler(cls, times: Tensor, model_times: Tensor) -> "Solver":
        """`euler` on checked times: each call of a stage on a schedule makes one, and none pays for a table."""
        if cls is not Solver:  # whose own __init__ is to run
            h = times.diff()
            return cls(times, model_times, h.expand(len(h), -1).tril(), "euler")
        steps = itertools.pairwise(times.tolist())
        updates = tuple(Update(False, (i,), (end - begin,)) for i, (begin, end) in enumerate(steps))
        solver, own = cls.__new__(cls), dict(times=times.clone(), model_times=model_times.clone())  # as in __init__
        vars(solver).update(own, name="euler", notes={}, _updates=updates)
        return solver

    @classmethod
    def adams_bashforth(
        cls, schedule: Schedule | int | Sequence[float] | Tensor, order: int = 2, *, inverse: bool = False
    ) -> "Solver":
        """Adams-Bashforth on any knots: each step integrates the polynomial through the last `order` velocities.

        The first steps, which have fewer velocities before them, are of lower order. Exact for velocities that are
        polynomials in t of a degree below `order`, from the step on that has as many velocities.

        A UserWarning says where its `amplification` is above 2, on knots with a long step after a short one, as
        schedules of least cost have them: there it is likely to be worse than on uniform knots, or than Euler's steps.

        Args:
            schedule: a Schedule, N for N uniform steps, or N+1 increasing times in [0, 1].
            order: 1 (Euler) or more; beyond 3 or 4 it is unstable on most flows.
            inverse: from data to noise, on the same knots, which may then be given from the last to the first.

        Source: Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, chapter III.5 (variable steps).
        """
        found = adams_bashforth(schedule, order, inverse=inverse)
        if (by := found.amplification) > MOST_AMPLIFICATION:
            ratio = max(b / a for a, b in itertools.pairwise(found.times.diff().abs().tolist()))
            warn(
                f"schedule: expected knots on which Adams-Bashforth {order} amplifies errors of velocities at most "
                f"{MOST_AMPLIFICATION:g} times, got {by:.3g} (Solver.amplification), with a step of {ratio:.3g} times "
                "the one before it; uniform knots, Euler's steps or fit_solver are likely to be better",
                stacklevel=2,
            )
        return found if cls is Solver else cls(found.times, found.model_times, found.coefficients, found.name)

    @classmethod
    def heun(cls, schedule: Schedule | int | Sequence[float] | Tensor, *, inverse: bool = False) -> "Solver":
        """Heun's method, the last step Euler: 2N - 1 evaluations in N steps.

        An evaluation of the last knot, where velocities of flow models are at their worst, is avoided.

        Args:
            schedule: a Schedule, N for N uniform steps, or N+1 increasing times in [0, 1].
            inverse: from data to noise, on the same knots, which may then be given from the last to the first.

        Source: Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models, algorithm 1.
        """
        times = _knots(schedule, inverse, table=True)
        N, h = len(times) - 1, times.diff()
        M = 2 * N - 1
        b = torch.zeros(M, M, dtype=torch.float64, device="cpu")
        at = torch.zeros(M, dtype=torch.float64, device="cpu")
        done = torch.zeros(M, dtype=torch.float64, device="cpu")
        for k in range(N):
            first = 2 * k
            at[first], b[first] = times[k], done
            b[first, first] += h[k]
            if k + 1 < N:
                at[first + 1] = times[k + 1]
                done[first : first + 2] += h[k] / 2
                b[first + 1] = done
        return cls(times, at, b, "heun")

    @classmethod
    def midpoint(cls, schedule: Schedule | int | Sequence[float] | Tensor, *, inverse: bool = False) -> "Solver":
        """The explicit midpoint method: 2N evaluations in N steps, at each step's first knot and halfway to the next.

        torchdiffeq's `midpoint` on the same times. No velocity at the last knot is evaluated.

        Args:
            schedule: a Schedule, N for N uniform steps, or N+1 increasing times in [0, 1].
            inverse: from data to noise, on the same knots, which may then be given from the last to the first.

        Source: Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, section II.1 (Runge, 1895).

        Examples:
            >>> fk.sample(lambda x, t: 2 * t[:, None] * x, torch.ones(1, 1), fk.Solver.midpoint(1))
            tensor([[2.]])
        """
        times = _knots(schedule, inverse, table=True)
        N, h = len(times) - 1, times.diff()
        at, b = times[:-1].repeat_interleave(2), torch.zeros(2 * N, 2 * N, dtype=torch.float64, device="cpu")
        at[1::2] += h / 2
        for k in range(N):
            b[2 * k, 2 * k] = h[k] / 2
            b[2 * k + 1 :, 2 * k + 1] = h[k]
        return cls(times, at, b, "midpoint")

    def __repr__(self) -> str:
        knots = ", ".join(f"{t:.3g}" for t in self.times)
        return f"Solver({self.name!r}, steps={self.steps}, evaluations={self.evaluations}, times=[{knots}])"


def adams_bashforth(
    schedule: Schedule | int | Sequence[float] | Tensor, order: int = 2, *, inverse: bool = False
) -> Solver:
    """`Solver.adams_bashforth` without its warning: for what is tried, and whose errors are measured."""
    expect_positive_int(order, "order")
    times = _knots(schedule, inverse, table=True)
    N = len(times) - 1
    steps = torch.zeros(N, N, dtype=torch.float64, device="cpu")
    for k in range(N):
        p = min(order, k + 1)
        steps[k, k - p + 1 : k + 1] = polynomial_weights(times[k - p + 1 : k + 1], times[k], times[k + 1])
    return Solver(times, times[:-1], steps.cumsum(0), f"adams-bashforth {order}")


def expect_solver(
    schedule: Schedule | Solver | int | Sequence[float] | Tensor,
    name: str,
    *,
    shared: bool = False,
) -> Solver:
    """What the loops run: a Solver as it is, and Euler's steps on a Schedule, on N uniform steps or on times.

    shared: for a caller that neither writes to it nor hands it on, outside of torch's modes: of so many uniform steps
        there is one for all.
    """
    if isinstance(schedule, Solver):
        return schedule
    if shared and type(schedule) is int and 1 <= schedule <= MOST_SHARED:
        return _uniform(schedule, False)
    times = schedule.times if isinstance(schedule, Schedule) else expect_times(schedule, name, whole=False)
    return Solver._euler(times, times[:-1])


MOST_SHARED = 1024


@functools.lru_cache(32)
@torch.inference_mode(False)
def _uniform(steps: int, inverse: bool) -> Solver:
    return Solver.euler(steps, inverse=inverse)


def expect_inverse(schedule: Schedule | Solver | int | Sequence[float] | Tensor, *, shared: bool = False) -> Solver:
    """A solver from data to noise as it is, and Euler's steps back on a schedule. shared: as in `expect_solver`."""
    if shared and type(schedule) is int and 1 <= schedule <= MOST_SHARED:
        return _uniform(schedule, True)
    if not isinstance(schedule, Solver):
        return Solver.euler(schedule, inverse=True)
    expected = "a solver from data to noise (Solver.adams_bashforth(..., inverse=True), fit_solver(inverse=True))"
    expect(schedule.is_inverse, "schedule", expected, schedule)
    return schedule


def _knots(schedule, inverse: bool, table: bool = False) -> Tensor:
    """float64 `[N+1]`, increasing, or decreasing for an inversion. table: of coefficients, to have room."""
    expect(not isinstance(schedule, Solver), "schedule", "a Schedule, a number of steps or times", schedule, TypeError)
    expect_bool(inverse, "inverse")
    times = schedule.times if isinstance(schedule, Schedule) else expect_times(schedule, "schedule", False, inverse)
    if table:
        expect_room(8 * (2 * len(times)) ** 2, "schedule", "coefficients", f"{len(times) - 1} steps")
    return times.flip(0) if inverse else times


def polynomial_weights(nodes: Tensor, begin: Tensor, end: Tensor) -> Tensor:
    """The weights of values at `nodes` [p] in the integral from `begin` to `end` of the polynomial through them."""
    p, scale = len(nodes), (end - begin).abs()
    at = (nodes - begin) / scale  # of the order of one, so that the powers are
    powers = torch.arange(p, dtype=torch.float64, device="cpu")
    sign = torch.sign(end - begin)
    moments = sign ** (powers + 1) / (powers + 1)
    return scale * torch.linalg.solve(at[None, :] ** powers[:, None], moments)
