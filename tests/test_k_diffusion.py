"""flowkernels/integrations/k_diffusion.py without k-diffusion: what it refuses, and what a host's loop sees. Beside the
package itself: tests/pipelines/test_host_k_diffusion.py."""

import itertools
import math

import pytest
import torch
from _flows import normal

import flowkernels as fk
from flowkernels.integrations.k_diffusion import sampler, solver

SIGMAS = torch.tensor([9.0, 2.0, 0.5, 0.0])
TIMES = 1 / (1 + SIGMAS.double())
QUIET = dict(disable=True)


def model(x, sigma, shift=0.0):
    return torch.tanh(x / (1 + sigma.square())[:, None] + shift)


def euler(model, x, sigmas, disable=None, noise=0.0, power=1.0):
    for sigma, then in itertools.pairwise(sigmas):
        d = (x - model(x, sigma * x.new_ones(len(x)))) / sigma
        x = x + d.abs().pow(power) * d.sign() * (then - sigma) + noise * torch.randn_like(x)
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("of_sigmas", ["own", "None", "list", "float64"])
def test_a_plan_runs_on_its_own_sigmas(of_sigmas, dtype):
    plan = fk.Solver.heun(TIMES)
    given = dict(own=sampler(plan).sigmas, None_=None, list=SIGMAS.tolist(), float64=SIGMAS.double())
    x = 9 * normal(4, 3, dtype=dtype)
    v = fk.from_denoiser(lambda z, s: model(z, s, 0.3), time_range=(0, 9))
    sample, kept = sampler(plan), x.clone()
    found = sample(model, x, given[of_sigmas.replace("None", "None_")], {"shift": 0.3}, **QUIET)
    assert found.dtype == dtype
    torch.testing.assert_close(found, fk.sample(v, v.state(x), plan), rtol=1e-6, atol=1e-6)
    assert torch.equal(x, kept)
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        torch.testing.assert_close(sample(model, x, None, {"shift": 0.3}, **QUIET), found)


def test_a_calibration_a_schedule_and_what_makes_a_solver():
    v, x = fk.from_denoiser(model, time_range=(0.01, 9)), 9 * normal(16, 3)
    cal = fk.calibrate(v, v.state(x), v.grid(20), [2, 3], effort="fit", progress=False)
    best, knots = cal.best(3), cal[3].times
    own = ((1 - knots) / knots).float()
    plans = [
        (cal, 3, None, best),
        (best, None, None, best),
        (cal[3], None, own, cal[3]),
        (fk.Solver.euler, None, own, cal[3]),
    ]
    for plan, steps, sigmas, wanted in plans:
        found = sampler(plan, steps=steps)(model, x, sigmas, **QUIET)
        torch.testing.assert_close(found, fk.sample(v, v.state(x), wanted))
    with pytest.raises(ValueError, match=r"^steps: expected one of \[2, 3\], got None"):
        sampler(cal)


def test_the_callback_is_told_of_each_step_once():
    told = []
    plans = [fk.Solver.euler(TIMES), fk.Solver.heun(TIMES), solver(euler, SIGMAS)]
    for plan in plans:
        told.clear()
        sampler(plan)(model, 9 * normal(4, 3), SIGMAS, callback=told.append, **QUIET)
        assert [d["i"] for d in told] == [0, 1, 2]
        assert torch.stack([d["sigma"] for d in told]).tolist() == pytest.approx(SIGMAS[:-1].tolist(), rel=1e-6)
        for d in told:
            assert set(d) == {"x", "i", "sigma", "sigma_hat", "denoised"}
            torch.testing.assert_close(d["denoised"], model(d["x"], d["sigma"].expand(4)))
        x = 9 * normal(4, 3)
        spoil = {"callback": lambda told: (told["x"].zero_(), told["denoised"].zero_(), told["sigma"].zero_())}
        assert torch.equal(sampler(plan)(model, x, SIGMAS, **spoil, **QUIET), sampler(plan)(model, x, SIGMAS, **QUIET))


REFUSED = [
    (lambda: sampler(4), r"plan: expected times after 0, as in .grid\(steps\) of fk.from_denoiser"),
    (lambda: sampler([0, 0.5, 1]), "plan: expected times after 0"),
    (lambda: sampler(fk.Solver.heun(TIMES, inverse=True)), "plan: expected a solver from noise to data"),
    (lambda: sampler([0.1, 0.5]), "plan: expected a solver from noise to data"),
    (lambda: sampler(TIMES, steps=3), "steps: expected None for a plan that is no Calibration, got 3"),
    (lambda: sampler(TIMES, flow=1), "flow: expected True or False, got 1"),
    (lambda: sampler(lambda: 0), "plan: expected a Solver, or what makes one of times"),
    (lambda: run(lambda t: t, SIGMAS), "plan: expected what makes a Solver of times"),
    (lambda: run(fk.Solver.heun, None), "sigmas: expected falling sigmas with the last 0"),
    (lambda: run(fk.Solver.heun, SIGMAS[:-1]), "sigmas: expected falling sigmas with the last 0, got 9 to 0.5"),
    (lambda: run(fk.Solver.heun, SIGMAS, flow=True), "sigmas: expected 1 - t, at most 1, of a flow, got 9 to 0"),
    (lambda: run(TIMES, SIGMAS * 1.001), r"sigmas: expected the plan's own, \[9, 2, 0.5, 0\] .* got \[9.009"),
    (lambda: run(TIMES, SIGMAS[1:]), r"sigmas: expected the plan's own, \[9, 2, 0.5, 0\] .* got \[2.0, 0.5, 0.0\]"),
    (lambda: run(TIMES, "karras"), "sigmas: expected the plan's, got 'karras'"),
    (lambda: run(TIMES, SIGMAS, x=normal(4)), r"x: expected shape \[n, \*shape\]"),
    (lambda: run(TIMES, SIGMAS, model=3), "model: expected a model"),
    (lambda: run(TIMES, SIGMAS, extra_args=[1]), "extra_args: expected a dict"),
    (lambda: run(TIMES, SIGMAS, callback=3), "callback: expected a function of a dict, or None, got 3"),
    (lambda: run(TIMES, SIGMAS, disable="no"), "disable: expected True or False, got 'no'"),
    (lambda: run(TIMES, SIGMAS, model=lambda x, s: x * math.nan), "model: expected finite denoised states, got NaN"),
    (lambda: run(TIMES, SIGMAS, model=lambda x, s: x[:1]), "model: expected an answer of x's shape"),
    (lambda: solver(euler, SIGMAS, noise=0.1), "sample: expected a sampler that adds no noise, got euler"),
    (lambda: solver(euler, SIGMAS, power=1.1), "sample: expected a sampler whose steps are linear, got euler"),
    (lambda: solver(euler, SIGMAS.flip(0)), "sigmas: expected falling sigmas with the last 0"),
    (lambda: solver(euler, SIGMAS, other=1), r"sample: expected a sampler \(model, x, sigmas\)"),
    (lambda: solver(lambda m, x, s, disable: x, SIGMAS), "sample: expected a sampler that calls the model"),
    (lambda: solver(silent, SIGMAS), "sample: expected a sampler that returns the last state, of x's shape, got None"),
    (lambda: run(TIMES, SIGMAS, model=lambda x, s: (x,), callback=print), "model: expected a torch.Tensor, got tuple"),
    (lambda: solver(3, SIGMAS), r"sample: expected a sampler \(model, x, sigmas\)"),
]


def silent(model, x, sigmas, disable):
    model(x, sigmas[:1])


def run(plan, sigmas, model=model, x=None, flow=False, disable=True, **more):
    return sampler(plan, flow=flow)(model, normal(4, 3) if x is None else x, sigmas, disable=disable, **more)


@pytest.mark.parametrize(("call", "said"), REFUSED)
def test_refused(call, said):
    with pytest.raises((ValueError, TypeError), match=f"^{said}"):
        call()
