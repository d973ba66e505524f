"""Levenberg and Marquardt's damped least squares on a solver's endpoints, with weights of the samples."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from flowkernels.calibration.endpoint_problem import EndpointProblem, Unknowns, price_of
from flowkernels.solver import Solver

DAMPING = 1e-3  # of the first step, in parts of the size of each unknown
ATTEMPTS = 4  # at a step, each with ten times the damping of the last
PATIENCE = 3  # idle iterations of few samples, before all are taken
IDLE = 3e-3  # the part that the loss falls by, below which an iteration is idle


def loss(errors: Tensor, scale: float | None) -> tuple[Tensor, float]:
    """(weights of the samples for a step of least squares, mean loss) of squared distances `[n]`.

    scale: None for the squared distance e itself, else the loss scale * log(1 + e / scale) of Student's distribution,
    whose weights 1 / (1 + e / scale) leave out samples that are far off: the reweighted least squares of Holland and
    Welsch (1977).
    """
    if scale is None:
        return torch.ones_like(errors), errors.mean().item()
    return 1 / (1 + errors / scale), (scale * torch.log1p(errors / scale)).mean().item()


def minimised(
    problem: EndpointProblem,
    unknowns: Unknowns,
    solver: Solver,
    scale_at: Callable[[float], float | None],
    budget: float,
    window: int,
    progress: Callable[[], object] = lambda: None,
) -> Solver:
    """The solver after as many steps as the budget has room for, or fewer where the last of them find nothing more.

    scale_at: of `loss`, in units of the median squared distance, by the part of the budget that is spent; None is the
        squared distance itself. budget: evaluations of each sample that is fitted. window: the samples whose
        derivatives a step takes at first, in turn, while steps from so few are good for all; then it takes those of
        all, and between them, where they are few enough to be kept, corrects them by what each step has found
        (Broyden's rank-1 update), which needs no more evaluations.

    Of the squared distance, the iterate with the least; else the last.
    """
    windows, turn = max(1, round(problem.fit / window)), 0
    problem.divide(windows)
    v, x = problem.ends(solver)
    errors = problem.errors(x)
    if not torch.isfinite(errors).all():
        return solver
    best, damping, derivatives, first, skipped = (errors.mean().item(), solver), DAMPING, None, True, 0.0
    began, final, idle = problem.evaluations, scale_at(1.0), 0
    M, price = solver.evaluations, price_of(unknowns.places, solver.evaluations)
    while True:
        corrected = derivatives is not None
        spent = (problem.evaluations - began) / problem.fit
        if spent + M + (0 if corrected else price / windows) > budget:
            break
        c = scale_at(min(1.0, skipped + spent / budget))
        scale = None if c is None else c * errors.median().item() or None
        weights, now = loss(errors, scale)
        rows, own_weights = problem.rows(turn, windows), weights[problem.mine]
        if first:
            unknowns = replace(unknowns, by=problem.difference(solver, unknowns, [t[rows] for t in v], rows))
            first = False
        if not corrected:
            turn += 1
            if windows == 1 and problem.can_keep(unknowns):
                derivatives = problem.derivatives(solver, unknowns, v, rows)
        if derivatives is not None:
            gram = problem.gram_of(derivatives, x, rows, own_weights)
        else:
            gram = problem.gram(solver, unknowns, [t[rows] for t in v], rows, own_weights[rows])
        progress()
        found = None
        for _ in range((2 if corrected or windows > 1 else ATTEMPTS) if torch.isfinite(gram).all() else 0):
            change = step(gram, damping)
            if torch.isfinite(change).all():
                tried = unknowns.moved(solver, change)
                tried_v, tried_x = problem.ends(tried)
                tried_errors = problem.errors(tried_x)
                if (lower := loss(tried_errors, scale)[1]) < now:  # NaN is not
                    found = lower
                    break
            damping = max(10 * damping, 1e-4)
        gain = 0.0
        if found is None:
            damping = min(damping, 1e-2)
        else:
            gain, damping = 1 - found / now, max(damping / 5, 1e-6)
            if derivatives is not None:
                _correct(
                    derivatives, unknowns.values(tried) - unknowns.values(solver), tried_x - x, gram.diagonal()[:-1]
                )
            solver, v, x, errors = tried, tried_v, tried_x, tried_errors
            best = min(best, (errors.mean().item(), solver), key=lambda b: b[0])
        if windows > 1:
            idle = 0 if gain > IDLE else idle + 1
            if idle == PATIENCE:
                windows, turn = 1, 0
        elif gain < (3 * IDLE if corrected else IDLE):
            derivatives = None
            if not corrected and c == final:
                break
            skipped += 0.0 if corrected else 0.2
    return best[1] if final is None else solver


def _correct(derivatives: Tensor, change: Tensor, moved: Tensor, size: Tensor) -> None:
    """Broyden's update in place: the least change of derivatives `[P, n, *shape]`, each by its own size, after which
    they take `change` [P] to `moved` [n, *shape]."""
    if not (change != 0).any():
        return
    scaled = change * torch.where(size > 0, size, 1.0)
    by = (scaled / (change @ scaled)).tolist()
    off = moved - torch.einsum("p,p...->...", change.to(derivatives), derivatives)
    for row, part in zip(derivatives, by, strict=True):
        row.add_(off, alpha=part)


def step(gram: Tensor, damping: float) -> Tensor:
    """The change of the unknowns that damped least squares takes, float64 `[P]`, from a Gram matrix as
    `EndpointProblem.gram` gives it. Unknowns that move no endpoint stay."""
    S, s = gram[:-1, :-1], gram[:-1, -1]
    size = S.diagonal().clamp(min=0).sqrt()
    size = torch.where(size > 1e-7 * size.max(), size, torch.inf)
    S, s, eye = S / size / size[:, None], s / size, torch.eye(len(s), dtype=torch.float64, device="cpu")
    return torch.linalg.solve(S + (damping * eye) + torch.diag((size == torch.inf).double()), s) / size
