"""lerobot's own `sample_actions` of pi0 and SmolVLA, tiny and random, by schedules and solvers of ours.

lerobot names other versions of torch and needs Python 3.12: run by hand, as docs/integrations/lerobot.md says.
"""

import copy
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import flowkernels as fk
from flowkernels.integrations.host_loops import host_loop, host_velocity

N, WIDTH = 4, 16


def pi0(monkeypatch, **settings):
    from lerobot.policies.pi0 import modeling_pi0
    from lerobot.policies.pi0.configuration_pi0 import PI0Config
    from transformers import PaliGemmaConfig

    gemma = modeling_pi0.GemmaConfig(width=WIDTH, depth=2, mlp_dim=32, num_heads=2, num_kv_heads=1, head_dim=8)
    monkeypatch.setattr(modeling_pi0, "get_gemma_config", lambda variant: gemma)
    vision = dict(model_type="siglip_vision_model", hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2)
    vision["patch_size"] = 14
    mapping = {
        "paligemma": lambda: PaliGemmaConfig(vision_config=vision),
        "gemma": modeling_pi0.CONFIG_MAPPING["gemma"],
    }
    monkeypatch.setattr(modeling_pi0, "CONFIG_MAPPING", mapping)
    config = PI0Config(chunk_size=5, n_action_steps=5, max_state_dim=4, max_action_dim=3, device="cpu", **settings)
    config.image_resolution = (28, 28)
    model = modeling_pi0.PI0Pytorch(config)
    model.paligemma_with_expert.paligemma.model.multi_modal_projector.linear = nn.Linear(WIDTH, WIDTH)
    return model, 28


def smolvla(monkeypatch, **settings):
    from lerobot.policies.smolvla import smolvlm_with_expert
    from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
    from lerobot.policies.smolvla.modeling_smolvla import VLAFlowMatching
    from transformers import SmolVLMConfig

    text = dict(model_type="llama", hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, vocab_size=64)
    text |= dict(num_attention_heads=2, num_key_value_heads=1, head_dim=8)
    vision = dict(hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    vision |= dict(image_size=32, patch_size=16)
    tiny = SmolVLMConfig(text_config=text, vision_config=vision, scale_factor=2, pad_token_id=0)
    tokens = SimpleNamespace(fake_image_token_id=1, global_image_token_id=2)
    of = SimpleNamespace
    monkeypatch.setattr(smolvlm_with_expert, "AutoConfig", of(from_pretrained=lambda name: copy.deepcopy(tiny)))
    monkeypatch.setattr(smolvlm_with_expert, "AutoProcessor", of(from_pretrained=lambda name: of(tokenizer=tokens)))
    sizes = dict(chunk_size=5, n_action_steps=5, max_state_dim=4, max_action_dim=3, num_vlm_layers=2)
    return VLAFlowMatching(SmolVLAConfig(**sizes, device="cpu", **settings)), 32


@pytest.fixture(params=[pi0, smolvla])
def policy(request, monkeypatch):
    """A model, what its `sample_actions` takes, and noise."""
    torch.manual_seed(0)
    model, size = request.param(monkeypatch)
    model = model.float().eval()
    with torch.no_grad():
        for weight in model.parameters():  # initial ones are so small that the velocity hardly depends on the state
            if weight.dim() > 1:
                weight.normal_(0, weight.shape[-1] ** -0.5)
    n = 3
    images, tokens = [torch.rand(n, 3, size, size) * 2 - 1], torch.randint(3, 60, (n, 6))
    masks = torch.ones(n, 6, dtype=torch.bool)
    masks[1, 4:] = False
    observations = (images, [torch.ones(n, dtype=torch.bool)], tokens, masks, torch.randn(n, 4))
    return model, observations, torch.randn(n, 5, 3)


def steps_of(model, steps):
    model.config.num_steps = model.config.num_inference_steps = steps


def off(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@torch.no_grad()
def test_its_own_loop(policy, host_row):
    model, observations, noise = policy
    steps_of(model, N)
    own = model.sample_actions(*observations, noise=noise)
    with host_loop(model, "denoise_step", N):
        ours = model.sample_actions(*observations, noise=noise)
    difference = off(ours, own)
    assert difference < 1e-6
    velocity = host_velocity(model, "denoise_step", lambda: model.sample_actions(*observations, noise=noise))
    assert torch.equal(velocity.noise, noise)
    assert off(fk.sample(velocity, noise, N), own) < 1e-6
    knots, ab2 = fk.Schedule([0, 0.1, 0.3, 0.6, 1]), fk.Solver.adams_bashforth(N)
    for solver in (knots, ab2):
        with host_loop(model, "denoise_step", solver):
            ours = model.sample_actions(*observations, noise=noise)
        assert off(ours, fk.sample(velocity, noise, solver)) < 1e-5
        assert off(ours, own) > 1e-3
    host_row("lerobot", f"{type(model).__name__}.sample_actions, Euler", "lerobot_policy", difference)


def test_the_example(policy, host_row):
    model, observations, noise = policy
    example = Path(__file__).parents[2] / "examples/integrations/lerobot_policy.py"
    torch.manual_seed(1)
    actions, cal = runpy.run_path(str(example))["run"](model, observations, noise)
    velocity = host_velocity(model, "denoise_step", lambda: model.sample_actions(*observations, noise=noise))
    difference = off(actions, fk.sample(velocity, noise, cal.best(N)))
    assert difference < 1e-5
    host_row("lerobot", f"{type(model).__name__}.sample_actions", "lerobot_policy", difference)


@pytest.mark.parametrize("fullgraph", [True, False])
@torch.no_grad()
def test_compiled(policy, fullgraph):
    """The whole of `sample_actions`, as `compile_model` has it."""
    model, observations, noise = policy
    steps_of(model, N)
    torch.compiler.reset()
    sample = torch.compile(model.sample_actions, backend="eager", fullgraph=fullgraph)
    solver = fk.Solver.adams_bashforth(N)
    with host_loop(model, "denoise_step", solver):
        eager = model.sample_actions(*observations, noise=noise)
    with host_loop(model, "denoise_step", solver, ends=(1, 0)):
        compiled = sample(*observations, noise=noise)
    assert off(compiled, eager) < 1e-5


@torch.no_grad()
def test_real_time_chunking_is_refused(policy):
    from lerobot.policies.rtc.configuration_rtc import RTCConfig
    from lerobot.policies.rtc.modeling_rtc import RTCProcessor

    model, observations, noise = policy
    steps_of(model, N)
    model.config.rtc_config = RTCConfig(enabled=True, execution_horizon=4)
    model.rtc_processor = RTCProcessor(model.config.rtc_config)
    chunk = dict(prev_chunk_left_over=torch.randn(3, 5, 3), inference_delay=1)
    told = r"^x_t: expected the state that denoise_step's velocity leads to"
    with pytest.raises(ValueError, match=told), host_loop(model, "denoise_step", N):
        model.sample_actions(*observations, noise=noise, **chunk)
    with host_loop(model, "denoise_step", N):  # the first chunk has none before it, and is not corrected
        ours = model.sample_actions(*observations, noise=noise)
    model.rtc_processor, model.config.rtc_config = None, None
    assert off(ours, model.sample_actions(*observations, noise=noise)) < 1e-6
