"""From data to noise and back: against the definition in float64."""

import itertools

import pytest
import torch
from _flows import Counted, LinearField, digits, digits_teacher, linear_field, normal, uneven_grid
from _transformers import field_of
from test_capture import aot_eager, no_loops  # noqa: F401
from test_solver_sampling import definition, guided
from torch import nn

import flowkernels as fk
from flowkernels import Schedule, Solver
from flowkernels.models.bundled import BUNDLED

F64 = torch.float64


def reversed_euler(velocity, data, times):
    """Steps on the knots from the last to the first, each with the velocity at the knot that it leaves."""
    x = data
    for begin, end in itertools.pairwise(reversed(times.tolist())):
        x = x + (end - begin) * velocity(x, torch.full((len(x),), begin, dtype=x.dtype))
    return x.detach()


class Clocked(nn.Module):
    """A curved field that depends on the time, and keeps the times that it is asked for."""

    def __init__(self):
        super().__init__()
        self.times = []

    def forward(self, x, t):
        self.times.append(t[0].item())
        return (1 + t[:, None]) * x.sin() + t[:, None] ** 2


@pytest.mark.parametrize("times", [torch.tensor([0, 1.0], dtype=F64), uneven_grid(6)], ids=["one step", "uneven"])
def test_euler_on_the_reversed_knots(times):
    field, data = Clocked(), normal(5, 3, dtype=F64)
    expected = reversed_euler(Clocked(), data, times)
    kept = data.clone()
    for schedule in (times, times.tolist(), Schedule(times), Solver.euler(times, inverse=True)):
        field.times.clear()
        got = fk.invert(field, data, schedule, round_trip=False)
        assert field.times == pytest.approx(times.flip(0)[:-1].tolist(), abs=1e-15)
        torch.testing.assert_close(got.noise, expected, rtol=1e-13, atol=1e-13)
        assert got.error is None
        assert got.evaluations == len(times) - 1
    assert torch.equal(data, kept)


SOLVERS = {
    "other times": Solver.euler(uneven_grid(5), model_times=[0.9, 0.8, 0.5, 0.3, 0.2], inverse=True),
    "ab2": Solver.adams_bashforth(uneven_grid(5), 2, inverse=True),
    "ab3": Solver.adams_bashforth(uneven_grid(5), 3, inverse=True),
    "heun": Solver.heun(uneven_grid(4), inverse=True),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_are_run_as_they_are(name):
    field, data, solver = Clocked(), normal(5, 3, dtype=F64), SOLVERS[name]
    forward = Solver.adams_bashforth(7, 2)
    got = fk.invert(field, data, solver, resample_with=forward)
    torch.testing.assert_close(got.noise, definition(Clocked(), data, solver), rtol=1e-13, atol=1e-13)
    again = definition(Clocked(), got.noise, forward)
    torch.testing.assert_close(got.error, (again - data).square().sum(1), rtol=1e-10, atol=1e-15)
    assert got.evaluations == solver.evaluations
    assert len(field.times) == solver.evaluations + 7


@pytest.mark.parametrize(("order", "bounds"), [(1, (1.85, 2.15)), (2, (3.6, 4.4))])
def test_noise_and_round_trip_converge(order, bounds):
    """To the noise of the flow itself, and the way back to the data, at the solver's order."""
    field, noise = linear_field(), normal(5, 4, dtype=F64)
    data, distances, errors = field.exact(noise), [], []
    for N in (50, 100, 200):
        found = fk.invert(
            field, data, Solver.adams_bashforth(N, order, inverse=True), resample_with=Solver.adams_bashforth(N, order)
        )
        distances.append((found.noise - noise).abs().max().item())
        errors.append(found.error.max().sqrt().item())
    for values in (distances, errors):
        for coarse, fine in itertools.pairwise(values):
            assert bounds[0] < coarse / fine < bounds[1]


def test_the_way_back_is_the_schedules_own():
    field, data, times = Clocked(), normal(4, 3), uneven_grid(5)
    got = fk.invert(field, data, times)
    expected = (fk.sample(field, got.noise, times).double() - data).square().sum(1)
    assert torch.equal(got.error, expected)
    assert (got.error.dtype, got.error.shape) == (F64, (4,))
    assert (got.error > 0).all()
    assert torch.equal(fk.invert(field, data, Solver.euler(times, inverse=True)).error, expected)
    better = fk.invert(field, data, times, resample_with=Solver.heun(times)).error
    assert not torch.equal(better, expected)
    assert got.noise.dtype == torch.float32
    assert torch.equal(fk.invert(field, data, times, progress=True).noise, got.noise)


def test_a_straight_flow_comes_back():
    data = normal(4, 2, 3)
    found = fk.invert(lambda x, t: torch.ones_like(x), data, 4)
    torch.testing.assert_close(found.noise, data - 1)
    assert found.error.max() < 1e-12


@pytest.mark.parametrize("packed", [True, False])
def test_guidance_and_conditioning(packed):
    field, data = guided(packed), normal(5, 9)
    for solver in (SOLVERS["ab2"], Solver.euler(4, inverse=True)):
        got = fk.invert(field, data, solver, round_trip=False).noise
        torch.testing.assert_close(got.double(), definition(field, data, solver), rtol=2e-5, atol=2e-6)


def test_fused_heads():
    field, data = field_of("sd3", 2, guidance=2.0)
    for schedule, forward in ((3, None), (SOLVERS["ab2"], Solver.adams_bashforth(uneven_grid(5)))):
        got, expected = (fk.invert(v, data, schedule, resample_with=forward) for v in (fk.fuse_head(field), field))
        assert (got.noise - expected.noise).norm() <= 4e-6 * expected.noise.norm()
        torch.testing.assert_close(got.error, expected.error, rtol=1e-3, atol=1e-9)


def test_fused_samplers():
    net, data = BUNDLED["digits"].load(), digits()[:4]
    fused = fk.fuse(net, 3, shape=(1, 8, 8))
    for schedule, forward in ((3, None), (SOLVERS["ab2"], Solver.adams_bashforth(uneven_grid(5)))):
        got, expected = (fk.invert(v, data, schedule, resample_with=forward) for v in (fused, net))
        assert (got.noise - expected.noise).norm() <= 1e-5 * expected.noise.norm()
        torch.testing.assert_close(got.error, expected.error, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match=r"^data: expected finite values, got NaN or Inf in sample 0"):
        fk.invert(fused, data * torch.nan, 3)


def test_captured(aot_eager):  # noqa: F811
    field, data = linear_field(), normal(5, 4)
    for schedule in (3, SOLVERS["ab2"]):
        got, expected = (fk.invert(field, data, schedule, round_trip=False, capture=c) for c in ("compile", None))
        torch.testing.assert_close(got.noise, expected.noise, rtol=1e-5, atol=1e-6)


def test_a_model_that_is_not_defined_at_the_data():
    """The digits' exact velocity: Euler steps with the time of the knot that they come to."""
    teacher, data = digits_teacher(F64), digits()[:4].double()
    times = uneven_grid(12)
    solver = Solver.euler(times, model_times=times.flip(0)[1:], inverse=True)
    found = fk.invert(teacher, data, solver, resample_with=times)
    torch.testing.assert_close(found.noise, definition(teacher, data, solver), rtol=1e-10, atol=1e-10)
    assert found.error.isfinite().all()


def test_no_gradients():
    field = linear_field()
    found = fk.invert(field, normal(3, 4).requires_grad_(), 3)
    assert not found.noise.requires_grad
    assert not found.error.requires_grad
    assert field.matrix.grad is None


def test_errors():
    velocity, data = Counted(LinearField(torch.eye(3))), normal(5, 3)
    for forward in (Solver.heun(3), Solver.euler(3)):
        message = r"^schedule: expected a solver from data to noise \(Solver.adams_bashforth\(..., inverse=True\), fit_"
        with pytest.raises(ValueError, match=message):
            fk.invert(velocity, data, forward)
    with pytest.raises(
        ValueError, match=r"^resample_with: expected a schedule or solver for the way back.*round_trip=False"
    ):
        fk.invert(velocity, data, SOLVERS["ab2"])
    with pytest.raises(ValueError, match=r"^resample_with: expected a solver from noise to data, got Solver"):
        fk.invert(velocity, data, 3, resample_with=SOLVERS["ab2"])
    with pytest.raises(ValueError, match=r"^resample_with: expected None without round_trip, got 4"):
        fk.invert(velocity, data, 3, round_trip=False, resample_with=4)
    with pytest.raises(ValueError, match=r"^resample_with: expected strictly increasing times"):
        fk.invert(velocity, data, 3, resample_with=[0, 0.5, 0.5, 1])
    with pytest.raises(ValueError, match=r"^schedule: expected strictly increasing times"):
        fk.invert(velocity, data, [1, 0.5, 0.5, 0])
    with pytest.raises(ValueError, match=r"^data: expected finite values, got NaN or Inf in sample 1"):
        fk.invert(velocity, torch.where(torch.arange(5)[:, None] == 1, torch.nan, data), 3)
    with pytest.raises(TypeError, match=r"^data: expected"):
        fk.invert(velocity, data.long(), 3)
    with pytest.raises(ValueError, match=r"^capture: expected None"):
        fk.invert(velocity, data, 3, capture="jit")
    assert velocity.calls == 0


def test_what_is_not_finite_names_sample_and_time():
    def spoiled(x, t):
        bad = (t < 0.6) & (torch.arange(len(x)) == 2)
        return torch.where(bad[:, None], torch.nan, torch.zeros_like(x))

    for schedule in (4, Solver.adams_bashforth(4, 2, inverse=True)):
        with pytest.raises(ValueError, match=r"^velocity: .*NaN or Inf in sample 2 at step 2 \(t = 0.5\)"):
            fk.invert(spoiled, normal(4, 3), schedule, round_trip=False)
    with pytest.raises(ValueError, match=r"in sample 0 at step 0 \(t = 1\)"):
        fk.invert(digits_teacher(), digits()[:4], 4)
