"""Joint refinement on the endpoint: steps as of dense least squares, errors as of samples that were not fitted."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import flowkernels as fk
from flowkernels.calibration import least_squares, refine
from flowkernels.calibration.endpoint_problem import DIFFERENCES, EndpointProblem, Unknowns
from flowkernels.calibration.refine import ROBUST_FIRST, ROBUST_LAST, SQUARED, Refinement
from flowkernels.calibration.samples import Samples
from flowkernels.models.closed_form import GaussianMixtureVelocity
from flowkernels.solver import Solver

F64 = torch.float64


def noise(n: int, *shape: int, seed: int = 0, dtype=torch.float32) -> Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def bent(x: Tensor, t: Tensor) -> Tensor:
    """Neither linear in x nor in t."""
    return torch.sin(x.flip(1)) - x * (1 + t.to(x.dtype) ** 2)[:, None]


def samples(velocity, n: int = 8, d: int = 2, K: int = 20, N: int = 3, dtype=F64, chunk=None):
    cal = fk.calibrate(velocity, noise(n, d, dtype=dtype), K, N, progress=False)
    return cal, Samples.of(velocity, cal, None, chunk)


def end_by_loops(velocity, x0: Tensor, t: list[float], a: list[float], b: list[list[float]]) -> Tensor:
    v, x = [], x0
    for i, now in enumerate(t):
        v.append(velocity(x, torch.full((len(x),), now, dtype=x.dtype)))
        x = a[i] * x0
        for k in range(i + 1):
            x = x + b[i][k] * v[k]
    return x


@pytest.mark.parametrize("start_coefficients", [False, True])
@pytest.mark.parametrize("chunk", [None, 3])
def test_a_step_is_that_of_dense_damped_least_squares(start_coefficients, chunk):
    """Residual by residual and unknown by unknown, with weights, over some of the samples."""
    cal, data = samples(bent, chunk=chunk)
    ab = Solver.adams_bashforth(cal[3], 2)
    solver = replace(ab, start_coefficients=torch.tensor([1.0, 0.9, 1.1], dtype=F64))
    unknowns = replace(Unknowns.of(data, cal.times, (), solver, start_coefficients), by=1e-5)
    problem, rows = EndpointProblem(data, 6, False), slice(1, 6)
    weights = torch.tensor([1.0, 0.5, 2.0, 0.1, 3.0], dtype=F64)
    v, _ = data.teacher.run(solver, problem.begin[rows], (), rows.start)
    gram = problem.gram(solver, unknowns, v, rows, weights)

    x0, goal = cal.kept.x[0, rows], cal.kept.x[-1, rows]
    t, a, b = solver.model_times.tolist(), solver.start_coefficients.tolist(), solver.coefficients.tolist()
    base, columns, root = end_by_loops(bent, x0, t, a, b), [], weights.sqrt()[:, None]
    for i in range(3):
        for what in ("t", *(["a"] if start_coefficients else []), *range(i + 1)):
            h = 1e-5
            t2, a2, b2 = list(t), list(a), [list(row) for row in b]
            if what == "t":
                h = -h if t[i] + h > cal.times[-2] else h
                t2[i] += h
            elif what == "a":
                a2[i] += h
            else:
                b2[i][what] += h
            columns.append(((end_by_loops(bent, x0, t2, a2, b2) - base) / h * root).flatten())
    J, r = torch.stack(columns, 1), ((goal - base) * root).flatten()
    torch.testing.assert_close(
        gram, torch.cat([J, r[:, None]], 1).T @ torch.cat([J, r[:, None]], 1), rtol=1e-6, atol=1e-8
    )

    for damping in (1e-3, 1.0):
        scaled = J / J.norm(dim=0)
        augmented = torch.cat([scaled, damping**0.5 * torch.eye(J.shape[1], dtype=F64)])
        missing = torch.cat([r, torch.zeros(J.shape[1], dtype=F64)])
        expected = torch.linalg.lstsq(augmented, missing).solution
        got = least_squares.step(gram, damping) * J.norm(dim=0)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_unknowns_that_move_nothing_stay():
    gram = torch.tensor([[2.0, 0.0, 4.0], [0.0, 0.0, 0.0], [4.0, 0.0, 9.0]], dtype=F64)
    assert least_squares.step(gram, 0.0).tolist() == [2.0, 0.0]


def test_derivatives_count_what_they_evaluate():
    """M (M+1) (M+2) / 6 a sample, and M (M-1) / 2 more with coefficients of x_0."""
    cal, data = samples(bent, N=4)
    solver, start = Solver.adams_bashforth(cal[4], 2), data.teacher.evaluations
    problem, rows = EndpointProblem(data, 8, False), slice(0, 8)
    v, _ = problem.ends(solver)
    for free, each in ((False, 4 * 5 * 6 // 6), (True, 4 * 5 * 6 // 6 + 4 * 3 // 2)):
        unknowns, start = Unknowns.of(data, cal.times, (), solver, free), data.teacher.evaluations
        problem.gram(solver, unknowns, v, rows, torch.ones(8, dtype=F64))
        assert data.teacher.evaluations - start == 8 * each


def test_the_difference_is_as_small_as_rounding_allows():
    """Of a network in float32 smaller than of one whose velocities are in bfloat16."""
    found = []
    for velocity in (bent, lambda x, t: bent(x, t).bfloat16().float()):
        cal, data = samples(velocity, n=64, dtype=torch.float32)
        solver, problem = Solver.euler(cal[3]), EndpointProblem(data, 64, False)
        v, _ = problem.ends(solver)
        found.append(problem.difference(solver, Unknowns.of(data, cal.times, (), solver, False), v, slice(0, 64)))
    assert found[0] < found[1] == DIFFERENCES[0]


def test_robust_weights():
    """The loss's derivative is the weight; far samples count nothing, and without a scale all count alike."""
    errors = torch.tensor([0.0, 0.5, 2.0, 1e9], dtype=F64)
    weights, _ = least_squares.loss(errors, 2.0)
    for i in range(4):
        up, down = (torch.where(torch.arange(4) == i, errors + h, errors) for h in (1e-4, -1e-4))
        slope = (least_squares.loss(up, 2.0)[1] - least_squares.loss(down, 2.0)[1]) / 2e-4 * 4
        assert weights[i].item() == pytest.approx(slope, rel=1e-4, abs=1e-6)
    assert weights[3] < 1e-8
    assert least_squares.loss(errors, None)[0].tolist() == [1.0] * 4


def test_scales_are_annealed():
    first, last = (refine.annealed(w) for w in (ROBUST_FIRST, ROBUST_LAST))
    for scale_at, robust in ((first, range(6)), (last, range(10, 3, -1))):
        found = [scale_at(k / 10) for k in robust]
        assert found == sorted(found)
        assert found[0] == 2
        assert all(scale_at(k / 10) is None for k in range(11) if k not in robust)
    assert refine.annealed(SQUARED)(0.0) is None


def test_corrected_derivatives_say_what_a_step_has_found():
    """The least change that does, weighed by the size of each; unknowns that were not moved stay."""
    J, size = noise(3, 4, 2, dtype=F64), torch.tensor([1.0, 4.0, 9.0], dtype=F64)
    change, moved, before = torch.tensor([0.5, 0.0, -1.0], dtype=F64), noise(4, 2, seed=1, dtype=F64), None
    before = J.clone()
    least_squares._correct(J, change, moved, size)
    torch.testing.assert_close(torch.einsum("p,pnd->nd", change, J), moved)
    assert torch.equal(J[1], before[1])
    torch.testing.assert_close((J - before)[2] / (change * size)[2], (J - before)[0] / (change * size)[0])


def test_forced_knots_and_the_teachers_times_hold_every_evaluation():
    cal, data = samples(bent, n=32)
    forced = int((cal.times - 0.5).abs().argmin())
    start = Solver.euler([0, 0.25, 0.5, 0.75, 1])
    (found,) = refine.refine(
        data, [start], cal.times, forced=(forced,), refinements=[Refinement(ROBUST_FIRST, True, iterations=12)]
    )
    assert not torch.equal(found.plan.model_times, start.model_times)
    assert torch.equal(found.plan.model_times < cal.times[forced], start.model_times < cal.times[forced])
    assert found.plan.model_times.min() >= 0
    assert found.plan.model_times.max() <= cal.times[-2]


def test_coefficients_of_x0_are_found_where_they_are_needed():
    """On a linear flow one evaluation then does: x_1 = a x_0 exactly, where with a = 1 the velocity has to do it."""
    velocity = lambda x, t: torch.stack([-x[:, 0] * (1 + t), x[:, 1] * t], 1)  # noqa: E731
    cal, data = samples(velocity, n=16)
    start = Solver.euler(1)
    plain, free = refine.refine(data, [start], cal.times, refinements=[Refinement(), Refinement(SQUARED, True)])
    assert plain.plan.keeps_start
    assert not free.plan.keeps_start
    assert free.errors.mean() < 1e-6 * plain.errors.mean()


@pytest.mark.parametrize("n", [16, 64])
def test_errors_are_those_of_fresh_samples(n):
    """Over planted calibrations of few samples: nearer to the errors on fresh noise than those of the fitted samples
    are, and not below."""
    stds = torch.rand(6, generator=torch.Generator().manual_seed(1)) + 0.1
    velocity = GaussianMixtureVelocity(noise(6, 4, seed=3) * 2, stds)
    told, fresh, seen, new = 0.0, 0.0, 0.0, noise(2048, 4, seed=99)
    ends = fk.sample(velocity, new, 20)
    for seed in range(8):
        cal = fk.calibrate(velocity, noise(n, 4, seed=seed), 20, 4, progress=False)
        data = Samples.of(velocity, cal)
        start = Solver.adams_bashforth(cal[4], 2)
        (found,) = refine.refine(data, [start], cal.times, refinements=[Refinement(iterations=8)])
        told += found.errors.mean().item()
        seen += refine.own_errors(data, found.plan).mean().item()
        fresh += (fk.sample(velocity, new, found.plan) - ends).double().square().sum(1).mean().item()
    assert seen < fresh < 1.5 * told
    assert told / fresh < fresh / seen


def test_refine_leaves_out_what_is_not_finite_and_what_is_over_the_budget():
    def velocity(x, t):
        return torch.where((t > 0.31)[:, None] & (t < 0.34)[:, None], torch.nan, bent(x, t))

    cal, data = samples(bent, n=16)
    data = Samples.of(velocity, cal)
    at_nan = Solver.euler([0, 0.32, 1])
    good = Solver.euler([0, 0.5, 1])
    found = refine.refine(data, [at_nan, good], cal.times, refinements=[Refinement(iterations=3)])
    assert [c.name for c in found] == ["euler, refined (squared, 3 iterations)"]
    assert torch.isfinite(found[0].errors).all()
    assert refine.refine(data, [good], cal.times, budget_evaluations=10.0) == []
    one = refine.price(data, good, Refinement())
    two = refine.refine(data, [good, good], cal.times, refinements=[Refinement()], budget_evaluations=one)
    assert len(two) == 1
    assert two[0].evaluations <= one


def test_an_inverse_solver():
    cal, data = samples(bent, n=32)
    start = Solver.euler(cal[3], inverse=True)
    (found,) = refine.refine(data, [start], cal.times, refinements=[Refinement(ROBUST_FIRST)])
    assert found.plan.is_inverse
    assert found.errors.mean() < 0.1 * refine.own_errors(data, start).mean()


def test_errors_are_of_their_own_samples():
    """Of halves that find about the same, those by cross-validation are about those of the plan, sample by sample."""
    cal, data = samples(bent, n=128)
    (found,) = refine.refine(data, [Solver.euler(cal[3])], cal.times, refinements=[Refinement()])
    both = torch.stack([found.errors, refine.own_errors(data, found.plan)]).log()
    assert torch.corrcoef(both)[0, 1] > 0.8
