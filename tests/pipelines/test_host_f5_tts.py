"""F5-TTS' own `CFM.sample` with a tiny random DiT, by schedules and solvers of ours.

It needs torchaudio, whose releases for other versions of torch do not load beside this one: run by hand, as
docs/integrations/f5-tts.md says.
"""

import runpy
from pathlib import Path

import pytest
import torch
from f5_tts.model import cfm

import flowkernels as fk

N = 8
run = runpy.run_path(str(Path(__file__).parents[2] / "examples/integrations/f5_speech.py"))["run"]


@pytest.fixture
def speech():
    """A model, and what its `sample` takes: two utterances of unlike lengths."""
    from f5_tts.model.backbones.dit import DiT

    torch.manual_seed(0)
    net = DiT(dim=32, depth=2, heads=2, dim_head=16, mel_dim=10, text_num_embeds=20, attn_mask_enabled=True)
    model = cfm.CFM(net, mel_spec_kwargs=dict(n_mel_channels=10)).eval()
    with torch.no_grad():
        for weight in model.parameters():  # zeros at first
            weight.normal_(0, 0.3 if weight.dim() < 2 else weight[0].numel() ** -0.5)
    cond, text = torch.randn(2, 12, 10), torch.randint(1, 20, (2, 9))
    text[1, 5:] = -1
    lens = torch.tensor([12, 7])
    given = dict(cond=cond, text=text, duration=torch.tensor([24, 17]), lens=lens, cfg_strength=2.0, seed=3)
    return model, given


def off(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def test_its_own_loop(speech, host_row):
    """Euler on its own times: uniform, pruned (EPSS) and swayed."""
    model, given = speech
    for steps, use_epss, sway in ((N, False, None), (7, True, None), (7, True, -1.0)):
        uniform = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        t = cfm.get_epss_timesteps(steps, "cpu", torch.float64) if use_epss else uniform
        if sway is not None:
            t = t + sway * (torch.cos(torch.pi / 2 * t) - 1 + t)
        own, _ = model.sample(**given, steps=steps, use_epss=use_epss, sway_sampling_coef=sway)
        difference = off(run(model, fk.Schedule(t), given), own)
        assert difference < 1e-5
    host_row("f5-tts", "CFM.sample, Euler on EPSS and swayed times", "f5_speech", difference)


@pytest.mark.parametrize("solver", [fk.Solver.adams_bashforth(N), fk.Schedule([0, 0.05, 0.2, 0.5, 1])])
def test_each_of_a_ragged_batch_is_its_own(speech, solver):
    """As alone: what its padding and masks do is as before."""
    model, given = speech
    both = run(model, solver, given)
    for i, (length, long) in enumerate(zip(given["duration"].tolist(), given["lens"].tolist(), strict=True)):
        text = given["text"][i : i + 1]
        alone = dict(given, cond=given["cond"][i : i + 1, :long], text=text[:, : (text >= 0).sum()], lens=None)
        alone["duration"] = given["duration"][i : i + 1]
        found = run(model, solver, alone)
        own = [model.sample(**g, steps=N, use_epss=False)[0][0 if g is alone else i, :length] for g in (alone, given)]
        assert off(found[0, :length], both[i, :length]) < max(1e-5, 2 * off(*own))  # its own batches differ a little


def test_calibrated_in_its_call(speech, host_row):
    """Where its caches of text are: a velocity that outlives the call would leave its own text in them."""
    model, given = speech
    found, odeint = {}, cfm.odeint

    def calibrated(fn, noise, t, **method):
        v = lambda x, t: fn(t[0], x)  # noqa: E731
        found["cal"] = fk.calibrate(v, noise, grid=24, steps=[N])
        found["expected"] = fk.sample(v, noise, found["cal"][N])
        return noise[None]

    cfm.odeint = calibrated
    try:
        model.sample(**given)
    finally:
        cfm.odeint = odeint
    sample = run(model, found["cal"][N], given)
    mask = torch.arange(12)[None] < given["lens"][:, None]
    expected = found["expected"].clone()
    expected[:, :12][mask] = given["cond"][mask]
    assert off(sample, expected) < 1e-5
    host_row("f5-tts", "CFM.sample, calibrated", "f5_speech", off(sample, expected))
