"""The examples that train in others' loops, on tiny models: docs/trainers.md."""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import flowkernels as fk
from flowkernels.integrations.diffusers import solver_scheduler

ROOT = Path(__file__).parents[2]
ADAPTER = "pytorch_lora_weights.safetensors"


def script(name):
    return runpy.run_path(str(ROOT / f"examples/{name}.py"))["main"]


@pytest.fixture
def launched(monkeypatch):
    """A run's environment; what accelerate keeps for a process is forgotten behind each."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")

    def run(*options):
        try:
            return script("sd3_lora_accelerate")([str(option) for option in options])
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)

    return run


def farthest(a: Path, b: Path) -> float:
    one, other = load_file(a / ADAPTER), load_file(b / ADAPTER)
    assert one.keys() == other.keys()
    return max((one[key] - other[key]).abs().max().item() for key in one)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_sd3_lora(precision, launched, tmp_path):
    family = tiny.FAMILIES["sd3"]
    family.make().save_pretrained(tmp_path / "sd3")
    (tmp_path / "prompts.txt").write_text("\n".join(tiny.PROMPTS))
    options = ["--model", tmp_path / "sd3", "--prompts", tmp_path / "prompts.txt", "--max-sequence-length", 16]
    options += ["--height", 16, "--width", 16, "--grid", 16, "--size", 32, "--held-out", 8, "--iterations", 24]
    options += ["--accumulate", 2, "--ema", 0.9, "--checkpoint-every", 10, "--mixed-precision", precision]
    found = launched(*options, "--out", tmp_path / "out")
    assert found["with"] < 0.9 * found["without"]
    assert found["difference"] == 0

    # killed behind step 20
    shutil.copytree(tmp_path / "out", tmp_path / "again")
    shutil.rmtree(tmp_path / "again/checkpoint-000024")
    (tmp_path / "again" / ADAPTER).unlink()
    launched(*options, "--out", tmp_path / "again")
    assert farthest(tmp_path / "out", tmp_path / "again") == 0

    # the pipeline with adapter and scheduler is the student on the schedule
    if precision == "no":
        pipe = family.prepare(type(family.make()).from_pretrained(tmp_path / "sd3"))
        pipe.load_lora_weights(tmp_path / "out")
        plan = fk.Calibration.load(tmp_path / "out/calibration.json")[4]
        embeds, _, pooled, _ = pipe.encode_prompt(tiny.PROMPTS, None, None, max_sequence_length=16)
        student = fk.VelocityField(
            pipe.transformer,
            **dict(reverse_time=True, time_scale=1000, x_name="hidden_states", time_name="timestep"),
            conditioning=dict(encoder_hidden_states=embeds, pooled_projections=pooled),
        )
        noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        wanted = fk.sample(student, noise, plan)
        pipe.scheduler = solver_scheduler(plan, like=pipe.scheduler)
        size = dict(height=16, width=16, max_sequence_length=16, num_inference_steps=4)
        got = pipe(tiny.PROMPTS, latents=noise, guidance_scale=1, output_type="latent", **size).images
        assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_sd3_lora_in_two_processes(launched, tmp_path):
    options = ["--grid", "12", "--iterations", "8", "--size", "32", "--held-out", "8"]
    launched(*options, "--out", tmp_path / "one")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [ROOT / "examples/sd3_lora_accelerate.py", *options, "--out", tmp_path / "two"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert farthest(tmp_path / "one", tmp_path / "two") < 1e-5


def test_lightning_module(tmp_path):
    """A run that was stopped and went on ends as one that was not, bit for bit."""
    options = ["--grid", "10", "--size", "256", "--batch", "32", "--iterations", "40", "--accumulate", "2"]
    found = script("lightning_module")([*options, "--out", str(tmp_path / "whole")])
    assert found["student"] < 0.95 * found["teacher"]
    for stop in (["--stop", "18"], []):
        script("lightning_module")([*options, *stop, "--out", str(tmp_path / "again")])
    whole, again = (torch.load(tmp_path / name / "last.ckpt", weights_only=False) for name in ("whole", "again"))
    assert whole["global_step"] == again["global_step"] == 20
    assert all(torch.equal(whole["state_dict"][key], again["state_dict"][key]) for key in whole["state_dict"])
