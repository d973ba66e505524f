"""A solver fitted step by step to the teacher's states, in one pass of evaluations, with cross-validation inside."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowkernels._checks import expect_finite_flow
from flowkernels.calibration.samples import Samples
from flowkernels.evaluation.endpoint import endpoint_errors
from flowkernels.ops.linear_update import linear_update
from flowkernels.ops.velocity_gram import velocity_gram
from flowkernels.solver import Solver, polynomial_weights


@dataclass(frozen=True, eq=False)
class Fitted:
    """A fit. solver: fitted to all samples; its notes have the "orders" and the "ridges" of the steps, None where one
    is Adams-Bashforth's. errors: of each sample the squared L2 distance of its end to the teacher's, float64 `[n]` on
    the CPU, by coefficients fitted without its fold.
    """

    solver: Solver
    errors: Tensor


def fit_steps(
    data: Samples,
    knots: Tensor,
    order: int,
    ridges: Sequence[float],
    free_start: Sequence[bool] = (False,),
    name: str = "fitted",
) -> Fitted:
    """The fit on these knots, float64 `[N+1]`, rising or, for an inverse solver, falling.

    order: the most past velocities of a step. ridges: to choose from, rising; Inf is Adams-Bashforth itself.
    free_start: whether the coefficient of x_0 is fitted too, to choose from for each step.

    For F folds there are F + 1 sets of coefficients, without each fold and of all samples. All samples go on by the
    last one, and the end by another one's is the combination of the same velocities that it makes: an error of
    cross-validation takes no evaluation. Orders and ridges of a set are chosen without its fold too.
    """
    ranks, mine = data.teacher.ranks, data.teacher.ranks.part(data.n)
    own = data if ranks.is_alone else data.own(range(mine.start, mine.stop))  # samples, of which sums are of all
    goals = [own.state_at(t) for t in knots.tolist()]
    x, N, h, any_free = goals[0], len(knots) - 1, knots.diff().tolist(), any(free_start)
    F = int(data.folds.max()) + 1
    folds = [(own.folds == f).nonzero().flatten().to(x.device) for f in range(F)]
    # increments of these rows: the first velocity, what velocities change by, what Euler leaves to be explained, x_0
    rows = x.new_zeros(N + 2 + any_free, *x.shape)
    b = torch.zeros(N, F + 1, N, dtype=torch.float64, device="cpu")
    a = torch.ones(N, F + 1, dtype=torch.float64, device="cpu")
    damping, chosen = torch.tensor(ridges, dtype=torch.float64, device="cpu"), []
    at_start = data.velocity_at_start(bool(knots[0] > knots[1]))[mine]

    def grams_of(k: int) -> Tensor:
        rows[k + 1] = own.teacher.at(x, knots[k].item()) if k else at_start
        expect_finite_flow(rows[k + 1], [rows[k + 1]], knots[k:], mine.start)
        torch.sub(goals[k + 1], x, out=rows[k + 2]).div_(h[k])
        if any_free:
            torch.add(rows[k + 2], goals[0], out=rows[k + 3])
        return torch.stack([velocity_gram(rows[: k + 3 + any_free].index_select(1, f)).cpu() for f in folds])

    for k in range(N):
        grams = ranks.total(ranks.tried(lambda k=k: grams_of(k)))
        if k and own is not data:
            data.teacher.evaluations += data.n
        if k:
            b[k], a[k] = b[k - 1], a[k - 1]
        gaps = (b[k, F:, :k] - b[k, :, :k]) / h[k], (a[k, F:] - a[k]) / h[k]
        ways = [(p, free) for p in range(1, min(order, k + 1) + 1) for free in free_start]
        tried = [_step(grams, gaps, knots[: k + 2], p, damping, free) for p, free in ways]
        best = torch.stack([errors for errors, *_ in tried], 1).flatten(1).argmin(1)  # the first of equal ones
        for j, (way, r) in enumerate(zip((best // len(ridges)).tolist(), (best % len(ridges)).tolist(), strict=True)):
            p, (_, weights, more) = ways[way][0], tried[way]
            b[k, j, k - p + 1 : k + 1] += h[k] * weights[j, r]
            a[k, j] += h[k] * more[j, r]
        chosen.append((p, None if ridges[r] == math.inf else ridges[r]))  # by all samples, the last
        x = linear_update(goals[0], list(rows[1 : k + 2]), b[k, F, : k + 1].tolist(), scale=a[k, F].item())
    errors = torch.empty(own.n, dtype=torch.float64, device=x.device)
    for f, places in enumerate(folds):
        start, end, *v = (t.index_select(0, places) for t in (goals[0], goals[-1], *rows[1 : N + 1]))
        errors[places] = endpoint_errors(linear_update(start, v, b[-1, f].tolist(), scale=a[-1, f].item()), end)
    orders, damped = zip(*chosen, strict=True)
    notes = {"orders": list(orders), "ridges": list(damped)}
    of_all, start = (t[:, F].clone(memory_format=torch.contiguous_format) for t in (b, a))  # which hashes can read
    solver = Solver(knots, knots[:-1], of_all, name, notes, start)
    return Fitted(solver, ranks.gathered(errors.cpu(), data.n))


def _step(
    grams: Tensor, gaps: tuple[Tensor, Tensor], knots: Tensor, p: int, ridges: Tensor, free: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(errors, weights of the last p velocities, and of x_0) of the step to the last of the knots, `[F+1, R]`,
    `[F+1, R, p]` and `[F+1, R]`, of the F + 1 sets of coefficients and R ridges. An error is the sum over the folds
    that a set is fitted to, each by a fit to the others of them.

    grams: `[F, ., .]` of each fold's increments v_0, v_1 - v_0, ..., v_k - v_{k-1}, r - v_k, with r the velocity that
    would reach the teacher's state, and perhaps x_0, which is needed where a gap is not 0. gaps: by how much the
    coefficients of the velocities, `[F+1, k]`, and of x_0, `[F+1]`, that the samples have gone on by are ahead of each
    set's, divided by the step. free: whether x_0 takes part.

    The unknowns are the departures from Adams-Bashforth of order min(p, 3) of the factors of v_k, v_k - v_{k-1}, ...:
    differences keep what velocities that nearly agree would cancel, and the ridge is relative to the size of each.
    """
    k, F, width = len(knots) - 2, len(grams), grams.shape[1]
    q, u = min(p, 3), p + free
    adams = torch.zeros(p, dtype=torch.float64, device="cpu")
    adams[p - q :] = polynomial_weights(knots[k - q + 1 : k + 1], knots[k], knots[k + 1]) / (knots[k + 1] - knots[k])
    # rows of `basis` in increments: v_k, then v_m - v_{m-1} for m = k-p+2..k, x_0, then what is left to be explained
    basis = torch.zeros(F + 1, 1, u + 1, width, dtype=torch.float64, device="cpu")
    basis[..., 0, : k + 1] = 1
    basis[..., 1:p, k - p + 2 : k + 1] = torch.eye(p - 1, dtype=torch.float64, device="cpu")
    basis[..., u, k + 1] = 1
    basis[..., u, k - p + 2 : k + 1] = adams[:-1].cumsum(0)
    basis[:, 0, u, :k] += gaps[0].flip(1).cumsum(1).flip(1)
    if width > k + 2:
        basis[..., p : p + free, k + 2] = 1
        basis[:, 0, u, k + 2] = gaps[1]
    each = basis @ grams @ basis.mT  # of every set, on every fold
    # [F+1, F+1, F]: the folds of a set, less one each, and the last of all of them
    has = 1 - torch.eye(F + 1, F, dtype=torch.float64, device="cpu")
    sums = torch.einsum("jf,gf,jfab->jgab", has, has, each)
    S, s = sums[..., :u, :u], sums[..., :u, u]
    size = S.diagonal(dim1=-2, dim2=-1).sqrt()
    size = torch.where(size > 0, size, 1.0)  # no velocity, nothing to fit: it stays Adams-Bashforth
    values, vectors = torch.linalg.eigh(S / size[..., None] / size[..., None, :])
    along = (s / size)[..., None, :] @ vectors
    change = along / (values.clamp_min(0)[..., None, :] + ridges[:, None]) @ vectors.mT / size[..., None, :]
    out = torch.cat([-change, torch.ones_like(change[..., :1])], -1)[:, :F]
    errors = torch.einsum("jg,jgri,jgik,jgrk->jr", has, out, each, out)
    change = change[:, F]
    weights = adams.expand(*change.shape[:2], -1).clone()
    weights[..., -1] += change[..., 0]
    weights[..., 1:] += change[..., 1:p]
    weights[..., :-1] -= change[..., 1:p]
    return errors, weights, change[..., p:].sum(-1)
