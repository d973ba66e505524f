"""stable-audio-tools: its own sampling functions and DiT, of random weights. k-diffusion, which it imports for its
models of diffusion alone and which brings a dozen packages along, is an empty module."""

import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch

import flowkernels as fk

EXAMPLE = Path(__file__).parents[2] / "examples/integrations/stable_audio.py"
KNOTS = [0, 0.1, 0.3, 0.62, 1]


@pytest.fixture
def example(monkeypatch):
    monkeypatch.setitem(sys.modules, "k_diffusion", types.ModuleType("k_diffusion"))
    spec = importlib.util.spec_from_file_location("stable_audio_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def relative(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


def test_a_fitted_solver_in_its_own_loop(example, host_row):
    samples, expected, solver = example.run()
    assert not solver.is_euler
    difference = relative(samples, expected)
    host_row("stable-audio-tools", "sample_rf, a fitted solver of 4 steps, guidance 3", "stable_audio", difference)
    assert difference <= 1e-6


@pytest.fixture
def flow(example):
    model, noise = example.dit(), torch.randn(2, 4, 16)
    given = dict(cross_attn_cond=torch.randn(2, 5, 8))
    return model, noise, given, lambda x, t: -model(x, 1 - t, **given)


def test_a_schedule_is_its_sigmas(flow):
    """Which its own Euler loop takes as they are, whatever shift it has."""
    from stable_audio_tools.inference.sampling import DistributionShift, sample_discrete_euler

    model, noise, given, v = flow
    sigmas = (1 - fk.Schedule(KNOTS).times).float()
    for shift in (None, DistributionShift()):
        found = sample_discrete_euler(model, noise, sigmas=sigmas, dist_shift=shift, disable_tqdm=True, **given)
        assert relative(found, fk.sample(v, noise, KNOTS)) <= 1e-6


def test_audio_to_begin_with(flow, example):
    """init_data and sigma_max < 1: a solver that begins at t = 1 - sigma_max."""
    model, noise, given, v = flow
    audio, solver = torch.randn(2, 4, 16), fk.Solver.adams_bashforth([0.4, 0.6, 0.8, 1])
    start = torch.logit(torch.tensor(0.6)).item()
    times = torch.sigmoid(torch.linspace(start, -2, 4))
    times[0], times[-1] = 0.6, 0
    with example.host_loop(model, "forward", solver, times=times):
        found = example.sample_rf(model, noise, init_data=audio, sigma_max=0.6, steps=3, **given)
    assert relative(found, fk.sample(v, 0.6 * noise + 0.4 * audio, solver)) <= 1e-6


@pytest.mark.parametrize("kind", ["rk4", "pingpong", "dpmpp"])
def test_its_other_samplers_are_no_euler_loop(flow, example, kind):
    model, noise, given, _ = flow
    times = torch.sigmoid(torch.linspace(6, -2, 5))
    times[0], times[-1] = 1, 0
    with pytest.raises(ValueError, match="expected"), example.host_loop(model, "forward", KNOTS, times=times):
        example.sample_rf(model, noise, steps=4, sampler_type=kind, **given)
