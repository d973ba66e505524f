"""`refine`: solvers from several starts, refined jointly on the endpoint and judged by cross-validation."""

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowkernels.calibration.endpoint_problem import EndpointProblem, Unknowns, places_of, price_of
from flowkernels.calibration.least_squares import minimised
from flowkernels.calibration.samples import Samples
from flowkernels.calibration.selection import Candidate
from flowkernels.solver import Solver

ITERATIONS = 5  # of a refinement, at most
SQUARED, ROBUST_FIRST, ROBUST_LAST = "squared", "robust first", "robust last"
REFINED = ", refined"


def annealed(weights: str) -> Callable[[float], float | None]:
    """`scale_at` of `minimised`: of the squared distance throughout; robust at first, so that a few samples far off do
    not lead into a valley of their own, and squared at last; or squared at first."""

    def scale_at(done: float) -> float | None:
        if weights == SQUARED:
            return None
        if weights == ROBUST_FIRST:
            return 2 * 32 ** (done / 0.6) if done < 0.6 else None
        return None if done < 0.4 else 2 * 32 ** ((1 - done) / 0.6)

    return scale_at


def window_of(fit: int, unknowns: int, size: int) -> int:
    """How many samples' derivatives an iteration takes, of `fit` samples of `size` elements: an eighth of them, and no
    fewer than determine the unknowns well."""
    return min(fit, max(fit // 8, 32, math.ceil(16 * unknowns / max(size, 1))))


@dataclass(frozen=True)
class Refinement:
    """How a solver is refined. weights: a name of `annealed`. start_coefficients: whether those of x_0 are free.
    iterations: how many each half of the samples may take, or as many evaluations in smaller ones: derivatives of them
    all and six runs of the solver; and a third of that of all samples in the end."""

    weights: str = SQUARED
    start_coefficients: bool = False
    iterations: int = ITERATIONS

    def budget(self, M: int) -> float:
        """Evaluations of each sample of a half, at most, for a solver of M."""
        return self.iterations * (price_of(places_of(M, self.start_coefficients), M) + 6 * M)

    def __str__(self) -> str:
        free = ", free x_0" if self.start_coefficients else ""
        longer = "" if self.iterations == ITERATIONS else f", {self.iterations} iterations"
        return f"{self.weights}{free}{longer}"


def refine(
    data: Samples,
    starts: Sequence[Solver | Candidate],
    grid: Tensor,
    *,
    forced: Sequence[int] = (),
    refinements: Sequence[Refinement] = (Refinement(), Refinement(ROBUST_FIRST), Refinement(ROBUST_FIRST, True)),
    budget_evaluations: float | None = None,
    progress: Callable[[], object] = lambda: None,
) -> list[Candidate]:
    """Solvers whose coefficients and model times are refined on the endpoint error, from each start in each way.

    Each half of the samples refines the start, and is the judge of what the other half makes of it: these are the
    errors. The better of the two is refined a little more on all samples; that is the plan.

    Args:
        data: samples with the teacher's states.
        starts: solvers with any numbers of evaluations, all from noise to data or all back.
        grid: the teacher's times, float64 `[K+1]`.
        forced: places in the grid of the knots that no evaluation may pass.
        refinements: ways to refine; every start takes them all, those of least price first while the budget lasts.
        budget_evaluations: of the network, for each sample; a refinement that would take more is left out. None is as
            many as it takes.
        progress: called after every iteration.

    Returns:
        Candidates in the order of starts and refinements, those that are not finite left out. Their evaluations and
        seconds are of their own refinement.
    """
    solvers = [s.plan if isinstance(s, Candidate) else s for s in starts]
    names = [s.name for s in starts]
    found, spent = [], 0.0
    for how, (name, solver) in itertools.product(refinements, zip(names, solvers, strict=True)):
        if budget_evaluations is not None and spent + price(data, solver, how) > budget_evaluations:
            continue
        candidate = refined(data, solver, grid, forced, how, name, progress)
        spent += candidate.evaluations
        if torch.isfinite(candidate.errors).all():
            found.append(candidate)
    return found


def price(data: Samples, solver: Solver, how: Refinement) -> float:
    """How many evaluations of each sample a refinement takes, at most, but for rejected steps at the end."""
    return 4 / 3 * how.budget(solver.evaluations) + 6 * solver.evaluations + 8


def refined(
    data: Samples,
    start: Solver,
    grid: Tensor,
    forced: Sequence[int],
    how: Refinement,
    name: str,
    progress: Callable[[], object] = lambda: None,
) -> Candidate:
    """A start refined in one way, with errors by cross-validation on two halves of the samples."""
    began, before = time.perf_counter(), data.teacher.evaluations
    unknowns = Unknowns.of(data, grid, forced, start, how.start_coefficients)
    size, scale_at = data.x[0, 0].numel(), annealed(how.weights)
    budget = how.budget(start.evaluations)

    def minimum(problem: EndpointProblem, solver: Solver, scale_at: Callable, budget: float) -> Solver:
        window = window_of(problem.fit, len(unknowns.places), size)
        return minimised(problem, unknowns, solver, scale_at, budget, window, progress)

    errors, models = torch.empty(data.n, dtype=torch.float64, device="cpu"), []
    for mine, other in halves(data):
        part = data.in_order([*mine, *other])
        problem = EndpointProblem(part, len(mine), start.is_inverse)
        solver = minimum(problem, start, scale_at, budget)
        errors[other] = problem.held_out(solver)
        models.append((errors[other].mean().item(), solver))
        data.teacher.evaluations = part.teacher.evaluations
    solver = min(models, key=lambda m: m[0] if m[0] == m[0] else math.inf)[1]
    last = scale_at(1.0)
    solver = minimum(EndpointProblem(data, data.n, start.is_inverse), solver, lambda done: last, budget / 3)
    evaluations = (data.teacher.evaluations - before) / data.n
    return Candidate(f"{name}{REFINED} ({how})", solver, errors, evaluations, time.perf_counter() - began)


def halves(data: Samples) -> tuple[tuple[list[int], list[int]], ...]:
    """(places of the one half, of the other), and turned round."""
    one, other = ((data.folds % 2 == k).nonzero().flatten().tolist() for k in (0, 1))
    return (one, other), (other, one)


def own_errors(data: Samples, solver: Solver) -> Tensor:
    """Of a solver as it is, `[n]`."""
    problem = EndpointProblem(data, data.n, solver.is_inverse)
    return problem.errors(problem.ends(solver)[1])
