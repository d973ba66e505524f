"""`refine`: solvers from several starts, refined jointly on the endpoint and judged by cross-validation."""

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowkernels.calibration.least_squares import EndpointProblem, Unknowns, minimised
from flowkernels.calibration.samples import Samples
from flowkernels.calibration.selection import Candidate
from flowkernels.solver import Solver

ITERATIONS = 24  # of a refinement, at most
SQUARED, ROBUST_FIRST, ROBUST_LAST = "squared", "robust first", "robust last"
REFINED = ", refined"


def annealed(weights: str, iterations: int) -> list[float | None]:
    """The scales of `minimised`: of the squared distance throughout; robust at first, so that a few samples far off do
    not lead into a valley of their own, and squared at last; or squared at first."""
    if weights == SQUARED:
        return [None] * iterations
    robust = max(1, iterations * 3 // 4 if weights == ROBUST_FIRST else iterations // 2)
    scales = [2 * 32 ** (k / max(robust - 1, 1)) for k in range(robust)]
    rest = [None] * (iterations - robust)
    return scales + rest if weights == ROBUST_FIRST else rest + scales[::-1]


def window_of(fit: int, unknowns: int, size: int) -> int:
    """How many samples' derivatives an iteration takes, of `fit` samples of `size` elements: an eighth of them, and no
    fewer than determine the unknowns well."""
    return min(fit, max(fit // 8, 32, math.ceil(16 * unknowns / max(size, 1))))


@dataclass(frozen=True)
class Refinement:
    """How a solver is refined. weights: a name of `annealed`. start_coefficients: whether those of x_0 are free.
    iterations: of each half of the samples, and at most a third as many of all in the end."""

    weights: str = SQUARED
    start_coefficients: bool = False
    iterations: int = ITERATIONS

    @property
    def last_iterations(self) -> int:
        """Of all samples."""
        return max(1, self.iterations // 3)

    @property
    def most_iterations(self) -> int:
        return 2 * self.iterations + self.last_iterations

    def __str__(self) -> str:
        free = ", free x_0" if self.start_coefficients else ""
        return f"{self.weights}{free}"


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
    """How many evaluations of each sample a refinement takes, about."""
    M = solver.evaluations
    of_unknowns = sum((M - i) + (M - 1 - i) * (i + 1 + how.start_coefficients) for i in range(M))
    unknowns = M * (M + 3) // 2 + M * how.start_coefficients
    half = data.n // 2
    part = window_of(half, unknowns, data.x[0, 0].numel()) / half if half else 1.0
    return how.iterations * (4 / 3) * (part * of_unknowns + 2 * M) + 3 * M


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
    size, scales = data.x[0, 0].numel(), annealed(how.weights, how.iterations)

    def minimum(problem: EndpointProblem, solver: Solver, scales: list[float | None]) -> Solver:
        window = window_of(problem.fit, len(unknowns.places), size)
        return minimised(problem, unknowns, solver, scales, window, progress)

    errors, models = torch.empty(data.n, dtype=torch.float64, device="cpu"), []
    for mine, other in halves(data):
        part = data.in_order([*mine, *other])
        problem = EndpointProblem(part, len(mine), start.is_inverse)
        solver = minimum(problem, start, scales)
        errors[other] = problem.held_out(solver)
        models.append((errors[other].mean().item(), solver))
        data.teacher.evaluations = part.teacher.evaluations
    solver = min(models, key=lambda m: m[0] if m[0] == m[0] else math.inf)[1]
    final = [scales[-1]] * how.last_iterations
    solver = minimum(EndpointProblem(data, data.n, start.is_inverse), solver, final)
    evaluations = (data.teacher.evaluations - before) / data.n
    return Candidate(f"{name}{REFINED} ({how})", solver, errors, evaluations, time.perf_counter() - began)


def halves(data: Samples) -> tuple[tuple[list[int], list[int]], ...]:
    """(places of the one half, of the other), and turned round."""
    one, other = ((data.folds % 2 == k).nonzero().flatten().tolist() for k in (0, 1))
    return (one, other), (other, one)


def own_errors(data: Samples, solver: Solver) -> Tensor:
    """Of a solver as it is, `[n]`."""
    return EndpointProblem(data, data.n, solver.is_inverse).run(solver)[1]
