"""k-diffusion's own samplers and wrappers beside ours. What its package imports beside its samplers (CLIP, clean-fid,
scikit-image) is not there; nor, on a torch of the CPU, torchvision, of which its utils take a converter of pictures:
the package's __init__ is left out, and what cannot be imported stands empty. All that runs here is its own."""

import importlib
import importlib.util
import math
import runpy
import sys
import types
from functools import partial

import pytest
import torch
from conftest import EXAMPLES
from torch import nn

import flowkernels as fk
from flowkernels.integrations.k_diffusion import sampler, solver

QUIET = dict(disable=True)


@pytest.fixture(scope="module")
def K(torchvision):
    with pytest.MonkeyPatch.context() as patch:
        package = types.ModuleType("k_diffusion")
        package.__path__ = list(importlib.util.find_spec("k_diffusion").submodule_search_locations)
        patch.setitem(sys.modules, "k_diffusion", package)
        found = {n: importlib.import_module(f"k_diffusion.{n}") for n in ("sampling", "external", "layers")}
        yield types.SimpleNamespace(**found)
        for name in [n for n in sys.modules if n.split(".")[0] == "k_diffusion"]:
            del sys.modules[name]


class Net(nn.Module):
    """What each wrapper takes: told a step, an angle or sigma."""

    def __init__(self, scale=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.scale, self.alphas_cumprod = scale, (1 - torch.linspace(0.03, 0.11, 1000) ** 2).cumprod(0)
        self.first, self.last = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, x, t, cond=None):
        shift = t.to(x)[:, None, None, None] / self.scale
        shift = shift if cond is None else shift + cond.to(x)[:, None, None, None]
        return x / 2 + self.last(torch.tanh(self.first(x) + shift))

    apply_model = forward


def wrapped(K):
    return {
        "CompVisDenoiser": K.external.CompVisDenoiser(Net(1000.0)),
        "CompVisVDenoiser": K.external.CompVisVDenoiser(Net(1000.0)),
        "quantized": K.external.CompVisDenoiser(Net(1000.0), quantize=True),
        "VDenoiser": K.external.VDenoiser(Net()),
        "Denoiser": K.layers.Denoiser(Net(), sigma_data=0.5),
    }


WRAPPERS = ("CompVisDenoiser", "CompVisVDenoiser", "quantized", "VDenoiser", "Denoiser")
SAMPLERS = {
    "euler": {},
    "heun": {},
    "dpm_2": {},
    "lms": {},
    "lms order 2": dict(order=2),
    "dpmpp_2m": {},
    "dpmpp_2s_ancestral": dict(eta=0.0),
    "dpmpp_2m_sde": dict(eta=0.0),
    "dpmpp_3m_sde": dict(eta=0.0),
}


def relative(found, wanted):
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.filterwarnings("ignore:Should have t")
def test_its_samplers_as_solvers(K, wrapper, name, host_row):
    model, sigmas = wrapped(K)[wrapper], K.sampling.get_sigmas_karras(7, 0.05, 12.0)
    sample = getattr(K.sampling, f"sample_{name.split()[0]}")
    x = 12 * torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(1))
    made = solver(sample, sigmas, **SAMPLERS[name])
    args = dict(extra_args={"cond": torch.tensor([0.0, 0.5, 1.0])}, **QUIET)
    wanted = sample(model, x, sigmas, **args, **SAMPLERS[name])
    difference = relative(sampler(made)(model, x, sigmas, **args), wanted)
    assert difference < 1e-6 if wrapper != "quantized" else difference < 1e-5
    if wrapper == "CompVisDenoiser" and name in ("euler", "heun", "lms", "dpmpp_2m"):
        host_row("k-diffusion", f"sample_{name} of a CompVisDenoiser", "k_diffusion", difference)


@pytest.mark.parametrize("name", ["euler", "heun", "lms"])
@pytest.mark.filterwarnings("ignore:.*Adams-Bashforth 4 amplifies")
def test_a_flow_on_its_sigmas(K, name):
    """Our Euler, Heun and Adams-Bashforth are its Euler, Heun and LMS where sigma is 1 - t."""
    net = Net()
    v = lambda x, t: net(x, 1 - t)  # noqa: E731
    flow = lambda x, sigma: x + sigma[:, None, None, None] * v(x, 1 - sigma)  # noqa: E731
    noise, times = torch.randn(3, 2, 6, 6), torch.tensor([0, 0.1, 0.25, 0.5, 0.8, 1], dtype=torch.float64)
    plans = dict(euler=fk.Solver.euler, heun=fk.Solver.heun, lms=partial(fk.Solver.adams_bashforth, order=4))
    sigmas, its = (1 - times).float(), getattr(K.sampling, f"sample_{name}")
    wanted = its(flow, noise, sigmas, **QUIET)
    with torch.no_grad():
        for plan in (plans[name](times), plans[name], solver(its, sigmas, flow=True)):
            assert relative(sampler(plan, flow=True)(flow, noise, sigmas, **QUIET), wanted) < 1e-6
        assert relative(fk.sample(v, noise, plans[name](times)), wanted) < 1e-6
    exported = fk.export(plans[name](times), "k-diffusion")
    assert exported.dtype == torch.float32  # float64 sigmas would make a float64 state, which its models do not take
    assert relative(its(flow, noise, exported, **QUIET), wanted) < 1e-6


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_fitted_solver(K, wrapper):
    """Equal to fk.sample on from_denoiser(model), which is equal to its own Euler with many steps."""
    model = wrapped(K)[wrapper]
    ends = None if hasattr(model, "sigma_max") else (0.03, 14.0)
    v, noise = fk.from_denoiser(model, time_range=ends), torch.randn(24, 2, 6, 6)
    assert math.isclose(v.path.most, 14.0 if ends else model.sigma_max.item(), rel_tol=1e-6)
    conditioned = fk.VelocityField(v, conditioning={"cond": torch.zeros(1)})
    cal = fk.calibrate(conditioned, v.initial(noise), v.grid(40), [3, 5], effort="fit", progress=False)
    sample, args = sampler(cal, steps=5), dict(extra_args={"cond": torch.zeros(24)}, **QUIET)
    assert sample.sigmas.dtype == torch.float32
    x = noise * sample.sigmas[0]
    found, plan = sample(model, x, sample.sigmas, **args), v.grid(40)
    torch.testing.assert_close(found, fk.sample(conditioned, v.state(x), cal.best(5)), rtol=1e-5, atol=1e-5)
    its = K.sampling.sample_euler(model, x, ((1 - plan) / plan).float(), **args)
    torch.testing.assert_close(its, fk.sample(conditioned, v.state(x), plan), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["euler", "heun", "dpm_2", "dpmpp_2m"])
def test_the_callback(K, name):
    model, sigmas = wrapped(K)["VDenoiser"], K.sampling.get_sigmas_karras(4, 0.1, 9.0)
    x, its = 9 * torch.randn(2, 2, 6, 6), getattr(K.sampling, f"sample_{name}")
    told, wanted = [], []
    sampler(solver(its, sigmas))(model, x, sigmas, callback=told.append, **QUIET)
    its(model, x, sigmas, callback=wanted.append, **QUIET)
    assert [d["i"] for d in told] == [d["i"] for d in wanted] == [0, 1, 2, 3]
    for ours, theirs in zip(told, wanted, strict=True):
        assert set(ours) >= {"x", "i", "sigma", "sigma_hat", "denoised"}
        for key in ("x", "sigma", "sigma_hat", "denoised"):
            assert ours[key].shape == theirs[key].shape
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(K, dtype):
    """The model gets what its own samplers give it; the state is kept in float32, and the sigmas in the plan."""
    net = K.external.VDenoiser(Net()).to(dtype)
    sigmas = K.sampling.get_sigmas_karras(8, 0.05, 12.0).to(dtype)
    x = (12 * torch.randn(3, 2, 6, 6)).to(dtype)
    plan = solver(K.sampling.sample_euler, K.sampling.get_sigmas_karras(8, 0.05, 12.0))
    found = sampler(plan)(net, x, sigmas, **QUIET)
    assert found.dtype == dtype
    assert found.isfinite().all()
    reference = sampler(plan)(net.float(), x.float(), **QUIET)
    assert relative(found.float(), reference) < 16 * torch.finfo(dtype).eps


def test_its_noise_and_adaptive_steps_are_refused(K):
    sigmas = K.sampling.get_sigmas_karras(4, 0.1, 9.0)
    before = torch.random.get_rng_state()
    for name, more in (("euler_ancestral", {}), ("euler", dict(s_churn=2.0)), ("dpmpp_sde", {})):
        with pytest.raises(ValueError, match=r"^sample: expected a sampler that adds no noise"):
            solver(getattr(K.sampling, f"sample_{name}"), sigmas, **more)
    assert torch.equal(torch.random.get_rng_state(), before)
    for name in ("dpm_fast", "dpm_adaptive"):
        with pytest.raises(TypeError, match=r"^sample: expected a sampler \(model, x, sigmas\)"):
            solver(getattr(K.sampling, f"sample_{name}"), sigmas)


def test_the_example(K, host_row):
    samples, ours, _ = runpy.run_path(str(EXAMPLES / "k_diffusion.py"))["run"]()
    difference = relative(samples, ours)
    assert difference < 1e-6
    host_row("k-diffusion", "a fitted solver of a CompVisDenoiser, beside fk.sample", "k_diffusion", difference)
