"""Stock samplers as Solvers: against diffusers' own schedulers, and what knots of one's own do at sigma = 1."""

import functools
import math

import numpy as np
import pytest
import torch
from _flows import normal

import flowkernels as fk
from flowkernels.models.closed_form import GaussianMixtureVelocity

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # of what diffusers hands to numpy
NAMES = ("euler", "heun", "dpmpp_2m", "dpmpp_3m", "unipc_2", "unipc_3", "deis_2", "deis_3")


def velocity():
    means = torch.tensor([[2.0, 0.0], [-1.0, 1.5], [0.0, -2.0]], dtype=torch.float64)
    return GaussianMixtureVelocity(means, [0.3, 0.4, 0.8], [1, 3, 2])


def scheduler(name: str, **settings):
    d = pytest.importorskip("diffusers")
    if name == "euler":
        return d.FlowMatchEulerDiscreteScheduler(**settings)
    if name == "heun":
        return d.FlowMatchHeunDiscreteScheduler(**settings)
    kinds = {
        "dpmpp": d.DPMSolverMultistepScheduler,
        "unipc": d.UniPCMultistepScheduler,
        "deis": d.DEISMultistepScheduler,
    }
    kind, order = name.split("_")
    settings = {"flow_shift": settings["shift"]} if settings else {}
    order = dict(solver_order=int(order[0]))
    return kinds[kind](prediction_type="flow_prediction", use_flow_sigmas=True, **order, **settings)


def sampled(stock, x, times=None):
    """As a pipeline does, with the velocity of diffusers' sign; what the scheduler keeps in float64 where it lets us.

    times: of the network, instead of the scheduler's, which are cut to thousandths.
    """
    net = velocity()
    stock.sigmas = stock.sigmas.double()
    for i, t in enumerate(stock.timesteps):
        at = 1 - float(t) / 1000 if times is None else times[i]
        x = stock.step(-net(x, torch.full((len(x),), at, dtype=torch.float64)), t, x).prev_sample
    return x


@pytest.mark.parametrize("shift", [1, 3, 7.5])
@pytest.mark.parametrize("name", NAMES)
def test_equal_to_diffusers(name, shift):
    x0 = normal(16, 2, dtype=torch.float64)
    for N in (1, 2, 3, 4, 5, 6, 8, 10, 16, 20):
        solvers = fk.stock_solvers(N, shift=shift)
        key = name if shift == 1 else f"{name}, shift {shift}"
        if name == "heun" and N % 2 == 0:
            assert key not in solvers
            continue
        stock = scheduler(name, shift=shift)
        if name == "euler":
            stock.set_timesteps(sigmas=np.linspace(1, 1 / N, N))
        else:
            stock.set_timesteps((N + 1) // 2 if name == "heun" else N)
        if "deis" in name:
            if N >= 15:
                continue  # its last step is of higher order, on sigmas that end before 0
            assert stock.sigmas[-1] > 0.01  # it ends with noise: here it does not
            stock.sigmas[-1] = 1e-10
        assert len(stock.timesteps) == N
        solver = solvers[key]
        assert (solver.name, solver.evaluations, solver.keeps_start) == (key, N, True)
        # DPM-Solver++, Heun and Euler keep float32 sigmas or states
        most = 1e-12 if "unipc" in name else 1e-8 if "deis" in name else 4e-5 if N > 8 else 1e-5
        assert (fk.sample(velocity(), x0, solver) - sampled(stock, x0)).abs().max() < most, N


@pytest.mark.parametrize("name", NAMES[2:])
def test_knots_of_ones_own_are_diffusers_formulas(name):
    """From a late start, with the times that the network gets at the knots."""
    times, x = [0.2, 0.3, 0.5, 0.6, 0.85, 1], normal(16, 2, dtype=torch.float64)
    stock = scheduler(name)
    stock.set_timesteps(5)
    stock.sigmas = 1 - torch.tensor(times, dtype=torch.float64)
    if "deis" in name:
        stock.sigmas[-1] = 1e-10
    solver = fk.stock_solvers(times)[name]
    assert solver.times.tolist() == [*solver.model_times.tolist(), 1] == times
    assert (fk.sample(velocity(), x, solver) - sampled(stock, x, times)).abs().max() < (1e-5 if "dpm" in name else 1e-8)


@functools.cache
def true_samples():
    x = normal(32, 2, dtype=torch.float64)
    return x, fk.sample(velocity(), x, fk.Solver.adams_bashforth(1000, 3))


@pytest.mark.parametrize("name", [*NAMES[2:], "euler"])
def test_order_from_sigma_one(name):
    """At sigma = 1 the log of the signal-to-noise ratio is -inf, and the methods are their limits there. Steps of first
    order, and last ones that are long in that log, leave order 2, less a log of N."""
    x, truth = true_samples()
    plans = [fk.stock_solvers(fk.Schedule.uniform(N))[name] for N in (80, 160)]
    coarse, fine = ((fk.sample(velocity(), x, plan) - truth).norm() for plan in plans)
    order = math.log2(coarse / fine)
    assert 0.9 < order < 1.1 if name == "euler" else order > 1.6


@pytest.mark.parametrize("first", [1e-6, 1e-9])
def test_a_first_step_of_almost_nothing(first):
    """Near sigma = 1 rounding grows: of x_0's coefficient, and not of the velocities'."""
    for solver in fk.stock_solvers([0, first, 0.3, 0.6, 1]).values():
        assert solver.keeps_start
        assert torch.allclose(solver.coefficients.sum(1), solver.times[1:], rtol=0, atol=1e-9)
        assert solver.amplification < 3
    # DPM-Solver++ (2M) by logarithms of the times themselves
    lam = [math.log(t / (1 - t)) for t in (first, 0.3, 0.6)]
    x0, v0, v1, v2, v3 = np.eye(5)
    x1 = x0 + first * v0
    m1 = x1 + (1 - first) * v1
    # of the step from sigma = 1 on, infinitely long in lam, the slope has no weight
    x2 = 0.7 / (1 - first) * x1 - 0.3 * math.expm1(lam[0] - lam[1]) * m1
    m2, r = x2 + 0.7 * v2, (lam[1] - lam[0]) / (lam[2] - lam[1])
    x3 = 0.4 / 0.7 * x2 - 0.6 * math.expm1(lam[1] - lam[2]) * (m2 + (m2 - m1) / r / 2)
    x4 = x3 + 0.4 * v3
    rows = fk.stock_solvers([0, first, 0.3, 0.6, 1])["dpmpp_2m"].coefficients
    assert np.allclose(rows, np.stack([x1, x2, x3, x4])[:, 1:], rtol=0, atol=1e-8)


def test_knots_that_rounding_does_not_tell_apart():
    with pytest.raises(ValueError, match=r"^steps: expected knots that are far enough apart for 'unipc_3' in float64"):
        fk.stock_solvers([0.4, 0.4 + 1e-9, 0.6, 0.7, 0.8, 0.9, 1])


def test_by_hand():
    """DPM-Solver++ (2M) on three knots of four, its one step of second order written out."""
    s = [0.9, 0.6, 0.3, 0]
    lam = [math.log((1 - q) / q) for q in s[:-1]]
    h, before = lam[2] - lam[1], lam[1] - lam[0]
    x0, v0, v1, v2 = np.eye(4)
    m0 = x0 + s[0] * v0
    x1 = s[1] / s[0] * x0 + (1 - s[1]) * (1 - math.exp(lam[0] - lam[1])) * m0
    m1 = x1 + s[1] * v1
    x2 = s[2] / s[1] * x1 + (1 - s[2]) * (1 - math.exp(-h)) * (m1 + h / before / 2 * (m1 - m0))
    x3 = x2 + s[2] * v2
    solver = fk.stock_solvers([1 - q for q in s])["dpmpp_2m"]
    assert np.allclose(solver.coefficients, np.stack([x1, x2, x3])[:, 1:], atol=1e-14)
    assert np.allclose(np.stack([x1, x2, x3])[:, 0], 1)


def test_names_and_equals():
    assert [*fk.stock_solvers(3)] == [*NAMES]
    assert [*fk.stock_solvers(4, shift=3)] == [f"{name}, shift 3" for name in NAMES if name != "heun"]
    assert [*fk.stock_solvers([0, 0.5, 1])] == [name for name in NAMES if name != "heun"]
    assert len(fk.stock_solvers(4, shift=(1, 2.5))) == 14
    for N, equal in ((4, True), (5, False)):
        found = fk.stock_solvers(N)
        for name in ("dpmpp_{}m", "unipc_{}", "deis_{}"):
            low, high = (found[name.format(order)].coefficients for order in (2, 3))
            assert torch.equal(low, high) == equal


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(steps=0), "steps: expected at least 1, got 0"),
        (dict(steps=[0, 2]), "steps: expected "),
        (dict(steps=4, shift=0), "shift: expected a number from 0.001 to 1000, or several, got 0"),
        (dict(steps=4, shift=[]), "shift: expected a number from 0.001 to 1000, or several, got none"),
        (dict(steps=[0, 0.5, 1], shift=3), "shift: expected 1 with knots of one's own, got 3"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        fk.stock_solvers(**arguments)
