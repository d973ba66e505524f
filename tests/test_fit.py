"""Fitted and polished solvers: exact where they can be, never worse on what they hold out, and counted."""

import warnings

import pytest
import torch
from torch import Tensor, nn

import flowkernels as fk
from flowkernels.calibration import fit
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
    errors = [fk.fit_solver(velocity, cal, N).notes["held_out"] for N in (1, 2, 3, 4)]
    assert errors[1]["fitted"] > 1e-6  # two terms are not enough
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


def test_the_best_of_several_schedules():
    velocity = Counted(mixture())
    cal = calibrated(velocity)
    plans = [fk.Schedule(cal.times[[0, 1, 2, 40]]), cal[3], cal.find(3, objective="norm")[3]]
    velocity.count = 0
    best = fk.fit_solver(velocity, cal, 3, schedule=plans)
    assert velocity.count == best.notes["evaluations"] * 192 == 192 + 3 * (2 * 192 + 2 * 2 * 48)
    each = [fk.fit_solver(velocity, cal, 3, schedule=plan) for plan in plans]
    errors = [solver.notes["held_out"][solver.name] for solver in each]
    least = each[errors.index(min(errors))]
    assert torch.equal(best.coefficients, least.coefficients)
    assert best.notes["held_out"] == least.notes["held_out"]
    assert errors[0] > min(errors)


def test_what_it_says_it_costs():
    """At most 2N a sample, all of it counted; the first is the calibration's of a module that has not changed."""
    velocity = Counted(mixture())
    cal, of_module = calibrated(velocity), calibrated(mixture())
    for N in (1, 2, 4):
        velocity.count = 0
        notes = fk.fit_solver(velocity, cal, N, held_out=0.25).notes
        assert notes["samples"] == [144, 48]
        assert velocity.count == 192 * N + 2 * (N - 1) * 48 == notes["evaluations"] * 192
        assert notes["evaluations"] <= 2 * N
        known = fk.fit_solver(mixture(), of_module, N, held_out=0.25).notes
        assert known["evaluations"] == notes["evaluations"] - 1
        assert known["held_out"] == notes["held_out"]


def test_held_out_samples_are_not_fitted():
    """Changing what the teacher does with them changes no coefficient where nothing is chosen by them."""
    velocity = mixture()
    cal = calibrated(velocity)
    options = dict(order=2, ridge=1e-3)
    before = fk.fit_solver(velocity, cal, 1, **options)
    x = cal.kept.x.clone()
    x[-1, 3::4] += 1e-3  # every fourth
    cal = fk.Calibration(cal.times, cal.cost, dict(cal), cal.provenance, kept=fk.Trajectory(cal.times, x, cal.kept.v))
    after = fk.fit_solver(velocity, cal, 1, **options)
    assert torch.equal(before.coefficients, after.coefficients)
    assert before.notes["held_out"] != after.notes["held_out"]


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("adams-bashforth 2", 2)])
def test_falls_back_and_says_so(name, order):
    """The samples that are held out, every fourth, move in another way than the others, in one that Euler or
    Adams-Bashforth 2 is exact for: on their way velocities jump at the knot, or change linearly."""

    def velocity(x, t):
        s = t.to(x.dtype)[:, None]
        other = 1 + (s >= 0.5).to(x.dtype) if order == 1 else 1 + (s - 0.5).clamp_min(0)
        return torch.where(x[:, 1:] < 0, torch.cat([other, 0 * s], 1), torch.cat([(8 * s).sin(), 0 * s], 1))

    x0 = noise(64, 2, dtype=F64)
    x0[:, 1] = 1
    x0[3::4, 1] = -1
    cal = fk.calibrate(velocity, x0, 20, 2, progress=False)
    schedule = fk.Schedule(cal.times[[0, 10, 20]])
    with pytest.warns(UserWarning, match=rf"the fit for N = 2 is not better than {name} on the 16 held-out") as seen:
        solver = fk.fit_solver(velocity, cal, 2, schedule=schedule, ridge=0.0)
    assert [w.filename for w in seen] == [__file__]
    assert solver.name == name
    assert torch.equal(solver.coefficients, Solver.adams_bashforth(schedule, order).coefficients)
    errors = solver.notes["held_out"]
    assert errors[name] == min(errors.values()) < errors["fitted"]


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
    for N in (1, 3):
        fitted = fk.fit_solver(velocity, cal, N)
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


@pytest.mark.parametrize(("n", "most"), [(2, None), (3, None), (64, None), (64, 10), (7, 100)])
@pytest.mark.parametrize("held_out", [0.01, 0.25, 0.5, 0.99])
def test_held_out_samples_are_spread(n, most, held_out):
    """Over all samples, and the same ones for a polish of fewer."""
    some, whole = (fit.held_out_last(m, held_out) for m in (min(n, most or n), n))
    for order, fitted in (some, whole):
        assert sorted(order) == list(range(len(order)))
        assert 1 <= fitted < len(order)
        assert abs((len(order) - fitted) - held_out * len(order)) <= 1
    (order, fitted), (of_all, fitted_of_all) = some, whole
    if held_out * len(order) > 1 and (1 - held_out) * len(order) > 1:
        assert set(order[fitted:]) <= set(of_all[fitted_of_all:])


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
        (ValueError, r"^schedule: expected knots on the calib", fitting(schedule=fk.Schedule([0, 0.33, 1]))),
        (TypeError, r"^schedule: expected a Schedule", fitting(schedule=2)),
        (TypeError, r"^schedule: expected a Schedule", fitting(schedule=[CAL[2], 2])),
        (ValueError, r"^schedule: expected at least one schedule", fitting(schedule=[])),
        (ValueError, r"^held_out: expected a part between 0 and 1, got 1", fitting(held_out=1)),
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
