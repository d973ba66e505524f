"""A teacher's solver: its steps on a fine grid, by name or a Solver, and its states and velocities at the knots."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowkernels._checks import expect, expect_finite_flow, expect_room, expect_shown
from flowkernels._files import plain
from flowkernels.sampling.teacher import Teacher
from flowkernels.solver import Solver

EULER, HEUN = NAMES = ("euler", "heun")
ENTRY = "teacher_solver"  # of a provenance, where it is not Euler's; an argument's name
CLOSE = 1e-9  # of two times that are one


def expect_teacher_solver(given: str | Solver, times: Tensor, forced: Sequence[int] = (), name: str = ENTRY) -> Solver:
    """A teacher's steps on a grid, by name or as they are: whose states and velocities at the knots can be told.

    forced: the places of times in the grid that no evaluation of a step before one may be at.
    """
    K, expected = len(times) - 1, "'euler', 'heun' or a Solver"
    known = isinstance(given, Solver) or (isinstance(given, str) and given in NAMES)
    expect_shown(known, name, expected, given, ValueError if isinstance(given, str) else TypeError)
    if isinstance(given, str):
        return Solver.euler(times) if given == EULER else heun(times, forced)
    expect(given.reaches_data, name, "a solver from noise to data", given)
    got = f"one of {given.steps} steps from {given.times[0]:.6g}"
    expect(given.steps == K, name, f"a solver on the grid, of {K} steps (grid=solver.times)", got)
    away = (given.times - times).abs().max().item()
    expect(
        away <= CLOSE, name, "a solver whose times are the grid's (grid=solver.times)", f"times {away:.3g} from them"
    )
    KnotStates.of(given, name)
    return given


def heun(times: Tensor, forced: Sequence[int] = ()) -> Solver:
    """Heun's method in 2K evaluations, but for steps to the last time and to forced knots, where velocities are at
    their worst or another network's: the midpoint method makes these, and evaluates at neither."""
    K, h = len(times) - 1, times.diff().tolist()
    expect_room(8 * (2 * K) ** 2, "grid", "coefficients of Heun's method", f"{K} steps")
    at, b = times[:-1].repeat_interleave(2), torch.zeros(2 * K, 2 * K, dtype=torch.float64, device="cpu")
    before, weights = {k - 1 for k in (*forced, K)}, torch.tensor([[0.5, 0.5], [0, 1]], dtype=b.dtype, device="cpu")
    for k in range(K):
        first, done = 2 * k, b[2 * k - 1].clone() if k else b[0].clone()
        early = k in before
        at[first + 1] = times[k] + h[k] / 2 if early else times[k + 1]
        b[first], b[first + 1] = done, done
        b[first, first] += h[k] / 2 if early else h[k]
        b[first + 1, first : first + 2] += weights[int(early)] * h[k]
    return Solver(times, at, b, HEUN)


def entry_of(solver: Solver, given: str | Solver | None = None) -> dict:
    """What a provenance says of it: its name, if it was given by one, else its tables; nothing of Euler's steps."""
    if solver.is_euler:
        return {}
    entry = given if isinstance(given, str) else {k: v for k, v in solver.to_dict().items() if k != "notes"}
    return {ENTRY: plain(entry)}


def teacher_solver_of(provenance: Mapping, times: Tensor, forced: Sequence[int] = ()) -> Solver:
    """That of a calibration, by its provenance."""
    given = provenance.get(ENTRY, EULER)
    if isinstance(given, Mapping):
        given = Solver.from_dict({**given, "notes": {}})
    return expect_teacher_solver(given, times, forced, f"provenance.{ENTRY}")


@dataclass(frozen=True)
class KnotStates:
    """Which of a solver's states are those at its knots.

    places: of the N knots before the last, the evaluations that begin with the state there, rising from 0. missing: the
    knots at whose own time that evaluation is not made; each takes one more.
    """

    solver: Solver
    places: tuple[int, ...]
    missing: tuple[int, ...]

    @classmethod
    def of(cls, solver: Solver, name: str = ENTRY) -> "KnotStates":
        """Of one evaluation a step that one. Else the last one at the knot's time of a state that has come so far, as
        its coefficients say (Heun's prediction for that time is another, before it); or the last of such a state."""
        N, M, times = solver.steps, solver.evaluations, solver.times[:-1, None]
        on_time = (solver.model_times - times).abs() <= CLOSE  # [N, M]
        places = list(range(N))
        if M != N:
            there = torch.ones_like(on_time)
            if solver.keeps_start:
                passed = torch.cat([times[0], times[0] + solver.coefficients[:-1].sum(1)])
                there = (passed - times).abs() <= CLOSE
            for j in range(N):
                ways = (on_time[j] & there[j], on_time[j], there[j] & solver.keeps_start)
                found = next((way.nonzero().flatten().tolist() for way in ways if way.any()), [-1])
                places[j] = found[-1]
            rises = places[0] == 0 and all(a < b for a, b in itertools.pairwise(places))
            expected = "a solver of one evaluation a step, or one that is evaluated at its knots' times"
            expect(rises, name, expected, f"{M} evaluations in {N} steps")
        missing = tuple(j for j in range(N) if not on_time[j, places[j]])
        return cls(solver, tuple(places), missing)

    @property
    def evaluations(self) -> int:
        """Of a sample: the solver's, and those of velocities at the knots that it does without."""
        return self.solver.evaluations + len(self.missing)

    def fill(
        self,
        teacher: Teacher,
        x: Tensor,
        first: int,
        states: Tensor,
        velocities: Callable[[Tensor], Tensor],
        made: Callable[[], object],
    ) -> Tensor:
        """Roll out the samples from `first` on, from their states x.

        teacher: with this solver. states: `[N+1, n, *shape]`, into which those at the knots are written. velocities:
        makes `[N, n, *shape]` of one velocity's dtype, into which they are, and which is returned. made: called behind
        each evaluation.
        """
        N, M = self.solver.steps, self.solver.evaluations
        if teacher.fused is not None:
            _, all_states, v = teacher.fused_flow(x, first, states=True, velocities=True)
            states.copy_(all_states[[*self.places, M]])
            found = velocities(v[0]).copy_(v[list(self.places)])
            for _ in range(M):
                made()
        else:
            states[0], knots, found = x, {place: j for j, place in enumerate(self.places)} | {M: N}, None
            for i, (state, v) in enumerate(teacher.flow(x, first, keep=True)):
                found = velocities(v) if found is None else found
                if i in knots:
                    found[knots[i]] = v
                if i + 1 in knots:
                    states[knots[i + 1]] = state
                made()
        times = self.solver.times
        for j in self.missing:
            v = teacher.at(states[j], times[j].item(), first)
            before = itertools.repeat(torch.zeros_like(v), j)  # which have been looked at
            expect_finite_flow(v, itertools.chain(before, [v]), times, first, "knot")
            found[j] = v
            made()
        return found
