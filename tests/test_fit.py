"""Fitted and polished solvers: exact where they can be, never worse on what they hold out, and counted."""

import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import flowkernels as fk
from flowkernels.calibration import fit
from flowkernels.calibration.fit import fit_candidates
from flowkernels.calibration.samples import Samples
from flowkernels.calibration.stepwise import fit_steps
from flowkernels.models.closed_form import GaussianMixtureVelocity
from flowkernels.solver import Solver, polynomial_weights

F64 = torch.float64


def noise(n: int, *shape: int, seed: int = 0, dtype=torch.float32) -> Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def mixture() -> GaussianMixtureVelocity:
    return GaussianMixtureVelocity(torch.tensor([[2.0, 0.0], [-1.0, 1.5], [-1.0, -2.0]]), 0.2, [1, 2, 3])


def calibrated(velocity, n: int = 192, K: int = 40, shape=(2,), **options) -> fk.Calibration:
    return fk.calibrate(velocity, noise(n, *shape), K, (1, 2, 3, 4, 6), progress=False, **options)


def endpoint_error(velocity, plan, K: int = 40, n: int = 256) -> float:
    """On noise that no calibration has seen."""
    x0 = noise(n, 2, seed=7)
    return (fk.sample(velocity, x0, plan) - fk.sample(velocity, x0, K)).square().sum(1).mean().item()


class Counted:
    def __init__(self, velocity):
        self.velocity, self.count = velocity, 0

    def __call__(self, x, t):
        self.count += len(x)
        return self.velocity(x, t)


def polynomial(degree: int):
    """Features that move as polynomials in t; their coefficients are further features, which stand still."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        c = x.unflatten(1, (degree + 2, -1))[:, 1:]
        powers = t[:, None] ** torch.arange(degree + 1)
        moving = (c * powers[:, :, None]).sum(1, keepdim=True)
        return torch.cat([moving, torch.zeros_like(c)], 1).flatten(1)

    return velocity


def exact_calibration(degree: int, x0: Tensor, times: Tensor) -> fk.Calibration:
    """As `calibrate` makes it, of a teacher that is exact on polynomial flows."""
    velocity = polynomial(degree)
    v = torch.stack([velocity(x0, t.expand(len(x0))) for t in times[:-1]])
    c = x0.unflatten(1, (degree + 2, -1))[:, 1:]
    powers = torch.arange(1, degree + 2)
    x = x0.repeat(len(times), 1, 1)
    x[:, :, : c.shape[2]] += torch.einsum("kp,npd->knd", times[:, None] ** powers / powers, c)
    cal = fk.calibrate(velocity, x0, times, (4, 5), progress=False)
    return fk.Calibration(times, cal.cost, dict(cal), cal.provenance, kept=fk.Trajectory(times, x, v))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_polynomial_flows_give_adams_bashforth(order):
    """Of a degree below the order. Where a step has fewer velocities it is a fit to what there is; the first with
    enough of them makes up for those before, and all later ones are Adams-Bashforth's."""
    degree, N = order - 1, 5
    times = torch.linspace(0, 1, 21, dtype=F64)
    x0 = noise(64, 6 * (degree + 2), dtype=F64)
    cal = exact_calibration(degree, x0, times)
    schedule = fk.Schedule(times[[0, 3, 7, 12, 15, 20]], times, (0, 3, 7, 12, 15, 20))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of order 1, Euler is as good
        solver = fk.fit_solver(polynomial(degree), cal, N, schedule=schedule, order=order)
    adams = Solver.adams_bashforth(schedule, order).coefficients
    steps, expected = (b.diff(dim=0)[order - 1 :] for b in (solver.coefficients, adams))
    torch.testing.assert_close(steps, expected, atol=1e-5, rtol=0)
    k = order - 1
    whole = polynomial_weights(schedule.times[:order], schedule.times[0], schedule.times[order])
    torch.testing.assert_close(solver.coefficients[k, :order], whole, atol=1e-4, rtol=0)
    got = fk.sample(polynomial(degree), x0, solver)
    torch.testing.assert_close(got, cal.kept.x[-1], atol=1e-5, rtol=0)


def test_linear_fields_are_exact_with_enough_terms():
    """A matrix of three eigenvalues: three velocities span all that the flow can do."""
    matrix = torch.tensor([[-2.0, 1.0, 0.0], [0.0, -1.0, 0.5], [0.3, 0.0, 1.0]], dtype=F64)

    def velocity(x, t):
        return x @ matrix.T.to(x.dtype)

    x0 = noise(64, 3, dtype=F64)
    cal = fk.calibrate(velocity, x0, 50, (1, 2, 3, 4), progress=False)
    errors = [fk.fit_solver(velocity, cal, N, free_start=False).notes["held_out"] for N in (1, 2, 3, 4)]
    assert errors[1]["fitted"] > 1e-6  # two terms are not enough
    assert fk.fit_solver(velocity, cal, 2).notes["held_out"]["fitted"] < 1e-10  # with x_0 they are three
    assert errors[2]["fitted"] < 1e-10
    assert errors[3]["fitted"] < 1e-10
    assert errors[3]["euler"] > 1e-3
    other = noise(32, 3, seed=1, dtype=F64)
    got = fk.sample(velocity, other, fk.fit_solver(velocity, cal, 4))
    torch.testing.assert_close(got, fk.sample(velocity, other, 50), atol=1e-5, rtol=0)


def test_better_than_euler_and_adams_bashforth():
    velocity = mixture()
    cal = calibrated(velocity)
    for N in (2, 4, 6):
        solver = fk.fit_solver(velocity, cal, N)
        errors = solver.notes["held_out"]
        assert solver.name == "fitted"
        assert errors["fitted"] < min(errors["euler"], errors["adams-bashforth 2"])
        assert endpoint_error(velocity, solver) < endpoint_error(velocity, cal[N])
        assert torch.equal(solver.times, cal[N].times)
        assert torch.equal(solver.model_times, cal[N].times[:-1])


def test_flows_of_one_gaussian_are_exact_in_a_step():
    """`x_1 = mean + std x_0` and the first velocity is `mean - x_0`: `x_1 = (1 + std) x_0 + v_0`."""
    velocity = GaussianMixtureVelocity(torch.tensor([[2.0, -1.0]], dtype=F64), 0.3)
    cal = fk.calibrate(velocity, noise(32, 2, dtype=F64), 400, 1, progress=False)
    solver, bound = (fk.fit_solver(velocity, cal, 1, free_start=free) for free in (True, False))
    assert bound.keeps_start
    x0 = noise(64, 2, seed=1, dtype=F64)
    torch.testing.assert_close(fk.sample(velocity, x0, solver), fk.sample(velocity, x0, 400), atol=1e-5, rtol=0)
    teachers = ((1.3, 1.0), 0.01)  # its own error, on its grid
    assert (solver.start_coefficients.item(), solver.coefficients.item()) == pytest.approx(teachers[0], abs=teachers[1])
    assert bound.notes["held_out"]["fitted"] > 1e6 * solver.notes["held_out"]["fitted"]


def plain_fit(data: Samples, knots: list[float], ridges: tuple[float, ...], ways: tuple[bool, ...]):
    """(b, a, errors of cross-validation) by least squares on the samples' own numbers."""
    N, F = len(knots) - 1, int(data.folds.max()) + 1
    goals, nodes = [data.state_at(t) for t in knots], torch.tensor(knots, dtype=F64)
    x0, v = goals[0], []
    b, a = torch.zeros(F + 1, N, dtype=F64), torch.ones(F + 1, dtype=F64)

    def end(j):
        return a[j] * x0 + sum(b[j, i] * u for i, u in enumerate(v))

    for k in range(N):
        own = [end(j) for j in range(F + 1)]
        v.append(data.teacher.at(own[F], knots[k]))
        h, news = knots[k + 1] - knots[k], []
        for j in range(F + 1):
            tried = []
            for p in range(1, k + 2):
                q = min(p, 3)
                adams = torch.zeros(k + 1, dtype=F64)
                adams[k + 1 - q :] = polynomial_weights(nodes[k - q + 1 : k + 1], nodes[k], nodes[k + 1]) / h
                rest = (goals[k + 1] - own[j]) / h - sum(w * u for w, u in zip(adams, v, strict=True))
                for free in ways:
                    columns = [v[k], *(v[m] - v[m - 1] for m in range(k - p + 2, k + 1)), *([x0] if free else [])]

                    def least_squares(rows, ridge, columns=columns, rest=rest):
                        A = torch.stack([c[rows].flatten() for c in columns], 1)
                        damped = torch.cat([A, (ridge**0.5 * A.norm(dim=0)).diag()])
                        target = torch.cat([rest[rows].flatten(), torch.zeros(A.shape[1], dtype=F64)])
                        return torch.linalg.lstsq(damped, target[:, None]).solution[:, 0]

                    for ridge in ridges:
                        error = 0
                        for g in set(range(F)) - {j}:
                            change = least_squares((data.folds != j) & (data.folds != g), ridge)
                            left = rest - sum(c * column for c, column in zip(change, columns, strict=True))
                            error += left[data.folds == g].square().sum()
                        change = least_squares(data.folds != j, ridge)
                        weights = adams.clone()
                        weights[k] += change[0]
                        for c, m in zip(change[1:p], range(k - p + 2, k + 1), strict=True):
                            weights[m] += c
                            weights[m - 1] -= c
                        tried.append((error, weights, change[p] if free else 0))
            news.append(min(tried, key=lambda t: t[0])[1:])
        for j, (weights, more) in enumerate(news):
            b[j, : k + 1] += h * weights
            a[j] += h * more
    errors = torch.zeros(data.n, dtype=F64)
    for f in range(F):
        errors[data.folds == f] = (end(f) - goals[-1]).square().sum(1)[data.folds == f]
    return b[F], a[F], errors


@pytest.mark.parametrize("ways", [(False,), (True,), (False, True)])
def test_cross_validation_is_that_of_least_squares(ways):
    """Of samples in an order of their own, in folds of unequal sizes."""
    velocity, times = mixture().double(), torch.linspace(0, 1, 11, dtype=F64)
    kept = fk.rollout(velocity, noise(11, 2, dtype=F64), times)
    cal = fk.Calibration(times, torch.zeros(11, 11, dtype=F64), {}, kept=kept)
    data = Samples.of(velocity, cal, folds=3, proven=True).in_order([3, 1, 4, 0, 5, 9, 2, 6, 8, 7])
    knots, ridges = torch.tensor([0.0, 0.2, 0.55, 1.0], dtype=F64), (1e-3, 1e-1)
    found = fit_steps(data, knots, 3, ridges, ways)
    b, a, errors = plain_fit(data, knots.tolist(), ridges, ways)
    torch.testing.assert_close(found.solver.coefficients[-1], b, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found.solver.start_coefficients[-1], a, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found.errors, errors, rtol=1e-6, atol=1e-9)
    assert errors.min() > 1e-9


def test_cross_validated_errors_are_those_of_fresh_samples():
    """On targets that are noise, where every fit is too flexible: on average they are those, on samples that no fit has
    seen, of fits to as many samples as folds leave."""
    velocity = lambda x, t: torch.stack([x[:, 1], -x[:, 0]], 1) * (1 + t[:, None]) + x.sin()  # noqa: E731
    times, knots = torch.linspace(0, 1, 5, dtype=F64), torch.tensor([0, 0.25, 0.5, 1], dtype=F64)
    cross, fresh = [], []
    for seed in range(60):
        x = noise(5, 16, 2, seed=seed, dtype=F64)
        cal = fk.Calibration(times, torch.zeros(5, 5, dtype=F64), {}, {}, kept=fk.Trajectory(times, x, x[:-1]))
        data = Samples.of(velocity, cal)
        data.first = None
        cross.append(fit_steps(data, knots, 3, (1e-7, 1e-3, 1.0), (False, True)).errors.mean())
        fewer = data.in_order(range(12))
        solver = fit_steps(fewer, knots, 3, (1e-7, 1e-3, 1.0), (False, True)).solver
        others = fk.sample(velocity, noise(256, 2, seed=1000 + seed, dtype=F64), solver)
        fresh.append((others - noise(256, 2, seed=2000 + seed, dtype=F64)).square().sum(1).mean())
    assert abs(torch.stack(cross).log().mean() - torch.stack(fresh).log().mean()) < 0.1


def test_the_best_of_several_schedules():
    velocity = Counted(mixture())
    cal = calibrated(velocity)
    plans = [fk.Schedule(cal.times[[0, 1, 2, 40]]), cal[3], cal.find(3, objective="norm")[3]]
    velocity.count = 0
    best = fk.fit_solver(velocity, cal, 3, schedule=plans)
    assert velocity.count == best.notes["evaluations"] * 192 <= 3 * 2 * 3 * 192
    each = [fk.fit_solver(velocity, cal, 3, schedule=plan) for plan in plans]
    errors = [solver.notes["error"] for solver in each]
    least = each[errors.index(min(errors))]
    assert torch.equal(best.coefficients, least.coefficients)
    assert best.notes["error"] == least.notes["error"]
    assert errors[0] > min(errors)


@pytest.mark.parametrize("inverse", [False, True])
def test_what_it_says_it_costs(inverse):
    """At most 2N a sample, all of it counted; the first is the calibration's of a module that has not changed."""
    velocity = Counted(mixture())
    cal, of_module = calibrated(velocity), calibrated(mixture())
    for N in (1, 2, 4):
        velocity.count = 0
        notes = fk.fit_solver(velocity, cal, N, inverse=inverse).notes
        n, m = notes["samples"]
        assert n == 192 >= m >= 96
        assert velocity.count == 192 * N + 2 * (N - 1) * m == notes["evaluations"] * 192
        assert notes["evaluations"] <= 2 * N
        known = fk.fit_solver(mixture(), of_module, N, inverse=inverse).notes
        assert known["evaluations"] <= 2 * N
        assert known["samples"][1] >= m
        assert known["error"] == notes["error"]


def test_candidates_are_of_the_same_samples():
    """Fits on several knots, with x_0's coefficients free and not, and what they took."""
    velocity = mixture()
    cal = calibrated(velocity, n=33)
    data = Samples.of(velocity, cal, folds=5)
    found = fit_candidates(data, {"squared": cal[3], "pairs": cal.find(3, objective="pairs")[3]})
    names = ["squared, fitted", "squared, fitted, free start", "pairs, fitted", "pairs, fitted, free start"]
    assert [c.name for c in found] == names
    assert [c.plan.keeps_start for c in found] == [True, False] * 2
    assert all(c.errors.shape == (33,) and c.errors.dtype == F64 and c.seconds > 0 for c in found)
    assert sum(c.evaluations for c in found) == pytest.approx(data.evaluations)
    plain = fk.fit_solver(velocity, cal, 3, folds=5, free_start=False)
    assert torch.equal(found[0].plan.coefficients, plain.coefficients)
    with pytest.raises(ValueError, match=r"^plans: expected plans that begin at 0, as the samples do"):
        fit_candidates(data, {"late": fk.Schedule([0.5, 1])})


@pytest.mark.parametrize("N", [3, 7])
def test_knots_between_those_of_the_grid(N):
    """The teacher's states there are those of its own Euler steps."""
    velocity = mixture()
    cal = calibrated(velocity)
    plan = fk.Schedule.uniform(N)
    solver = fk.fit_solver(velocity, cal, N, schedule=plan)
    assert torch.equal(solver.times, plan.times)
    assert endpoint_error(velocity, solver) < 0.5 * endpoint_error(velocity, plan)
    data = Samples.of(velocity, cal)
    for t in (0.0, 0.0125, 0.33, 1.0):
        j = min(int(t * 40 + 1e-9), 39)
        expected = cal.kept.x[j] + (t - cal.times[j].item()) * cal.kept.v[j]
        torch.testing.assert_close(data.state_at(t), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("adams-bashforth 2", 2)])
def test_falls_back_and_says_so(name, order, monkeypatch):
    """From a fit that is made worse: velocities jump at the knot, or change linearly."""

    def velocity(x, t):
        s = t.to(x.dtype)[:, None]
        return x[:, 1:] * (1 + (s >= 0.5) if order == 1 else 1 + s) * torch.tensor([1.0, 0.0], dtype=F64)

    def worse(*args):
        found = fit_steps(*args)
        b = 2 * found.solver.coefficients
        return replace(found, solver=replace(found.solver, coefficients=b), errors=found.errors + 1)

    monkeypatch.setattr(fit, "fit_steps", worse)
    cal = fk.calibrate(velocity, noise(64, 2, dtype=F64), 20, 2, progress=False)
    schedule = fk.Schedule(cal.times[[0, 10, 20]])
    with pytest.warns(UserWarning, match=rf"the fit for N = 2 is not better than {name} on 64 samples") as seen:
        solver = fk.fit_solver(velocity, cal, 2, schedule=schedule)
    assert seen[-1].filename == __file__
    assert solver.name == name
    assert torch.equal(solver.coefficients, Solver.adams_bashforth(schedule, order).coefficients)
    errors = solver.notes["held_out"]
    assert errors[name] == min(errors.values()) < errors["fitted"]
    x1 = fk.sample(velocity, noise(64, 2, dtype=F64), solver)
    assert solver.notes["error"] == pytest.approx((x1 - cal.kept.x[-1]).square().sum(1).mean().item(), abs=1e-9)


@pytest.mark.filterwarnings("error:fit_solver")
def test_it_does_not_say_so_for_rounding():
    """Where Euler is exact, and the fit but for rounding."""
    velocity = lambda x, t: torch.tensor([0.1, 0.7, -1.3]).expand_as(x)  # noqa: E731
    cal = fk.calibrate(velocity, noise(64, 3), 20, 4, progress=False)
    solver = fk.fit_solver(velocity, cal, 4)
    assert solver.name == "fitted"
    assert solver.notes["held_out"]["fitted"] < 1e-10


@pytest.mark.parametrize("n", [2, 3, 64])
@pytest.mark.parametrize(
    "velocity",
    [
        lambda x, t: torch.zeros_like(x),
        lambda x, t: torch.ones_like(x),
        lambda x, t: torch.where(t < 0.5, 1.0, 2.0)[:, None].expand_as(x),
    ],
    ids=["zero", "constant", "equal at several knots"],
)
def test_degenerate_velocities(velocity, n):
    """Gram matrices of zeros and of equal rows, and fewer samples than steps."""
    cal = fk.calibrate(velocity, noise(n, 3), 20, (1, 4, 6), progress=False)
    for N in (1, 4, 6):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # nothing is better than Euler where Euler is exact
            solver = fk.fit_solver(velocity, cal, N)
            polished = fk.polish(velocity, cal, solver, iterations=2)
        assert torch.isfinite(solver.coefficients).all()
        assert solver.coefficients.abs().max() < 10
        x0 = noise(5, 3, seed=2)
        teacher = fk.sample(velocity, x0, 20)
        of_fit, of_polish, of_euler = (
            (fk.sample(velocity, x0, plan) - teacher).square().sum(1).mean() for plan in (solver, polished, cal[N])
        )
        assert max(of_fit, of_polish) <= max(1e-8, 1.5 * of_euler)


def test_order_bounds_the_past():
    velocity = mixture()
    cal = calibrated(velocity)
    solver = fk.fit_solver(velocity, cal, 6, order=2)
    assert max(solver.notes["orders"]) == 2
    steps = torch.cat([solver.coefficients[:1], solver.coefficients.diff(dim=0)])
    assert steps.tril(-2).abs().max() < 1e-12
    assert steps.diagonal(-1).abs().max() > 1e-2


def test_a_large_ridge_is_adams_bashforth():
    velocity = mixture()
    cal = calibrated(velocity)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        solver = fk.fit_solver(velocity, cal, 2, order=2, ridge=1e9)
    torch.testing.assert_close(solver.coefficients, Solver.adams_bashforth(cal[2], 2).coefficients, atol=1e-6, rtol=0)


def test_chunks_and_conditioning_follow_the_samples():
    """One shift a sample, which each evaluation has to find again."""
    net = mixture()
    shift = noise(96, 2, seed=3)
    velocity = fk.VelocityField(lambda x, t, shift: net(x, t) + shift, conditioning=dict(shift=shift))
    cal = calibrated(velocity, n=96)
    whole, parts = fk.fit_solver(velocity, cal, 4), fk.fit_solver(velocity, cal, 4, chunk=7)
    torch.testing.assert_close(whole.coefficients, parts.coefficients, atol=1e-4, rtol=0)
    assert whole.notes["held_out"]["fitted"] < whole.notes["held_out"]["euler"]
    whole, parts = (fk.polish(velocity, cal, whole, iterations=1, chunk=chunk) for chunk in (None, 7))
    torch.testing.assert_close(whole.coefficients, parts.coefficients, atol=1e-2, rtol=0)


def test_guidance_is_part_of_the_velocity():
    net = mixture()
    options = dict(conditioning=dict(c=1.0), unconditional=dict(c=0.0), guidance=1.5, packed=False)
    velocity = fk.VelocityField(lambda x, t, c: net(x, t) * (1 + 0.3 * c), **options)
    plain = lambda x, t: net(x, t) * (1 + 0.3 * 1.5)  # noqa: E731
    one, other = (fk.fit_solver(v, calibrated(v), 4) for v in (velocity, plain))
    torch.testing.assert_close(one.coefficients, other.coefficients, atol=1e-3, rtol=0)


def test_fused_samplers():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2)).requires_grad_(False)
    sampler = fk.fuse(net, 40)
    cal = calibrated(sampler)
    solver = fk.fit_solver(sampler, cal, 3)
    x0 = noise(64, 2, seed=1)
    teacher = sampler(x0)
    errors = [(fk.sample(sampler, x0, s) - teacher).square().sum(1).mean().item() for s in (cal[3], solver)]
    assert errors[1] < errors[0]


def test_inverse():
    """From data to noise, nearer to the teacher's noise than Euler steps on the same knots."""
    velocity = mixture()
    cal = calibrated(velocity)
    solver = fk.fit_solver(velocity, cal, 6, inverse=True)
    assert solver.is_inverse
    assert solver.notes["held_out"]["fitted"] < solver.notes["held_out"]["euler"]
    x0 = noise(64, 2, seed=1)
    data = fk.sample(velocity, x0, 40)
    fitted = fk.invert(velocity, data, solver, round_trip=False).noise
    plain = fk.invert(velocity, data, cal[6], round_trip=False).noise
    assert (fitted - x0).square().mean() < (plain - x0).square().mean()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("from_file", [False, True])
def test_a_students_solver_leads_to_the_teachers_states(from_file):
    """Another velocity than the teacher's: twice as fast, along the same way, here. A fit to the teacher's states is
    about as good as the teacher's own, and evaluates nothing but the student, the noise's rollout aside."""
    teacher = Counted(mixture())
    student = Counted(lambda x, t: 2 * teacher.velocity(x, t))
    cal = calibrated(teacher)
    given = dict(teacher=teacher) | (dict(noise=noise(96, 2, seed=3)) if from_file else {})
    known = cal if not from_file else fk.Calibration(cal.times, cal.cost, dict(cal), cal.provenance)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "velocity: expected the model")  # plain functions have no hash
        teacher.count = student.count = 0
        solver = fk.fit_solver(student, known, 4, **given)
        assert (teacher.count, student.count > 0) == ((96 * 40 if from_file else 0), True)
        polished = fk.polish(student, known, solver, **given)
        own = fk.fit_solver(teacher, known, 4, noise=given.get("noise"))
    x0 = noise(256, 2, seed=7)
    x1 = fk.sample(mixture(), x0, 40)

    def error(plan, velocity=student):
        return (fk.sample(velocity, x0, plan) - x1).square().sum(1).mean().item()

    assert error(solver) < 1.5 * error(own, mixture())
    assert max(error(solver), error(polished)) < 0.02 * error(fk.Schedule.uniform(4))


def test_a_calibration_from_a_file_needs_noise(tmp_path):
    velocity = mixture()
    cal = calibrated(velocity)
    cal.save(tmp_path / "cal.json")
    loaded = fk.Calibration.load(tmp_path / "cal.json")
    with pytest.raises(ValueError, match=r"^calibration: expected one that keeps trajectories \(noise= rolls"):
        fk.fit_solver(velocity, loaded, 4)
    counted = Counted(velocity)
    solver = fk.fit_solver(counted, loaded, 4, noise=noise(192, 2))
    torch.testing.assert_close(solver.coefficients, fk.fit_solver(velocity, cal, 4).coefficients)
    assert counted.count == solver.notes["evaluations"] * 192 > 40 * 192


def test_other_numbers_of_steps_are_planned():
    velocity = mixture()
    cal = calibrated(velocity)
    assert torch.equal(fk.fit_solver(velocity, cal, 5).times, fk.least_cost_schedules(cal.cost, cal.times, 5)[5].times)
    assert 5 not in cal  # nothing is added to what is given


def test_float64_and_images():
    velocity = lambda x, t: -x * (1 + t).view(-1, 1, 1, 1)  # noqa: E731
    cal = fk.calibrate(velocity, noise(16, 1, 2, 2, dtype=F64), 20, 3, progress=False)
    solver = fk.fit_solver(velocity, cal, 3)
    assert solver.notes["held_out"]["fitted"] < 1e-8


# ---- polish ----


def test_polish_lowers_the_endpoint_error():
    velocity = Counted(mixture())
    cal = calibrated(velocity)
    for N in (1, 4):
        fitted = fk.fit_solver(velocity, cal, N, free_start=False)
        velocity.count = 0
        polished = fk.polish(velocity, cal, fitted, samples=128)
        assert velocity.count == polished.notes["evaluations"] * 128
        assert polished.name == "fitted, polished"
        assert polished.notes["polish"][1] < polished.notes["polish"][0]
        assert endpoint_error(velocity, polished) < 0.8 * endpoint_error(velocity, fitted)
        assert polished.model_times.min() >= 0
        assert polished.model_times.max() <= 0.975  # where the teacher's last evaluation is
        again = fk.polish(velocity, cal, polished, samples=128)
        assert again.name == "fitted, polished"
        assert again.notes["polish"][1] <= polished.notes["polish"][1]


@pytest.mark.parametrize(("n", "most", "parts"), [(2, None, 4), (3, None, 2), (64, 10, 4), (7, 100, 5)])
def test_folds_are_spread(n, most, parts):
    """Over all samples, none of them empty, and the same ones of fewer samples."""
    cal = calibrated(VELOCITY, n=n, K=6)
    data = Samples.of(VELOCITY, cal, folds=parts, most=most)
    sizes = data.folds.bincount()
    assert data.n == min(n, most or n) == sizes.sum()
    assert len(sizes) == min(parts, data.n)
    assert sizes.max() - sizes.min() <= 1
    assert torch.equal(
        data.folds, Samples.of(VELOCITY, cal, folds=parts).folds[: data.n] if data.n >= parts else data.folds
    )


def test_polish_of_a_velocity_that_is_defined_at_the_knots_alone():
    """Its coefficients alone."""

    def velocity(x, t):
        off = ((t * 10).round() / 10 - t).abs() > 1e-4
        return torch.where(off[:, None], torch.nan, -x)

    cal = fk.calibrate(velocity, noise(16, 2), 10, 2, progress=False)
    solver = Solver.euler(cal[2])
    polished = fk.polish(velocity, cal, solver)
    assert torch.equal(polished.model_times, solver.model_times)
    assert endpoint_error(lambda x, t: -x, polished, K=10) < 1e-8


def test_polish_keeps_what_is_best():
    """A solver that is exact stays as it is, to rounding."""
    velocity = lambda x, t: torch.ones_like(x)  # noqa: E731
    cal = fk.calibrate(velocity, noise(16, 2), 10, 2, progress=False)
    solver = Solver.euler(cal[2])
    torch.testing.assert_close(fk.polish(velocity, cal, solver).coefficients, solver.coefficients, atol=1e-6, rtol=0)
    assert fk.polish(velocity, cal, cal[2]) is cal[2]


def test_polish_of_a_schedule_moves_knots():
    velocity = mixture()
    cal = calibrated(velocity)
    poor = fk.Schedule(cal.times[[0, 3, 6, 40]])
    schedule = fk.polish(velocity, cal, poor)
    assert isinstance(schedule, fk.Schedule)
    assert schedule.steps == 3
    assert endpoint_error(velocity, schedule) < 0.5 * endpoint_error(velocity, poor)
    assert schedule.cost >= cal[3].cost  # which is the least there is
    assert schedule.uniform_cost == cal[3].uniform_cost


def test_polish_of_an_inverse_solver():
    velocity = mixture()
    cal = calibrated(velocity)
    solver = Solver.euler(cal[3], inverse=True)
    polished = fk.polish(velocity, cal, solver)
    assert polished.is_inverse
    assert polished.name == "euler, polished"
    assert polished.notes["polish"][1] < 0.5 * polished.notes["polish"][0]


VELOCITY = mixture()
CAL = calibrated(VELOCITY, n=8, K=10)
LONE = calibrated(VELOCITY, n=1, K=10)


def fitting(steps=2, velocity=VELOCITY, cal=CAL, **options):
    return lambda: fk.fit_solver(velocity, cal, steps, **options)


def polishing(start=CAL[2], **options):
    return lambda: fk.polish(VELOCITY, CAL, start, **options)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, r"^velocity: expected a callable", fitting(velocity=3)),
        (TypeError, r"^calibration: expected a Calibration", fitting(cal=CAL[2])),
        (ValueError, r"^steps: expected at most K = 10", fitting(11)),
        (TypeError, r"^steps: expected an integer", fitting(2.0)),
        (ValueError, r"^schedule: expected a schedule of 3 steps", fitting(3, schedule=CAL[2])),
        (ValueError, r"^schedule: expected knots on the calib", fitting(schedule=fk.Schedule([0.33, 0.5, 1]))),
        (TypeError, r"^schedule: expected a Schedule", fitting(schedule=2)),
        (TypeError, r"^schedule: expected a Schedule", fitting(schedule=[CAL[2], 2])),
        (ValueError, r"^schedule: expected at least one schedule", fitting(schedule=[])),
        (ValueError, r"^folds: expected an integer of at least 2, got 1", fitting(folds=1)),
        (TypeError, r"^free_start: expected", fitting(free_start=1)),
        (ValueError, r"^order: expected at least 1", fitting(order=0)),
        (ValueError, r"^ridge: expected a finite number of at least 0", fitting(ridge=-1.0)),
        (ValueError, r"^chunk: expected at least 1", fitting(chunk=0)),
        (ValueError, r"^calibration: expected 2 samples or more, got 1", fitting(cal=LONE)),
        (ValueError, r"^noise: expected 2 samples or more, got 1", fitting(noise=noise(1, 2))),
        (ValueError, r"^velocity: expected finite velocities", fitting(velocity=lambda x, t: x / 0)),
        (TypeError, r"^start: expected a Solver or a Schedule", polishing(3)),
        (ValueError, r"^samples: expected at least 2", polishing(samples=1)),
        (ValueError, r"^iterations: expected at least 1", polishing(iterations=0)),
        (TypeError, r"^robust: ", polishing(robust=1)),
        (TypeError, r"^start_coefficients: ", polishing(start_coefficients="yes")),
    ],
)
def test_bad_input(error, message, call):
    with pytest.raises(error, match=message):
        call()
