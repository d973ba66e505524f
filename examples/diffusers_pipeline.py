"""A few-step solver for a diffusers pipeline: calibrated in it, put in as its scheduler, saved with it.

    python examples/diffusers_pipeline.py                  # a tiny random SD3, made here: seconds on a CPU
    python examples/diffusers_pipeline.py --model FOLDER --height 1024 --width 1024 --samples 64 --device cuda

The solver is fitted to what this pipeline does with these prompts and this guidance, and then it serves any prompt.
With a real model a few hundred samples settle most schedules; ask for prompts like those to come.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)

import flowkernels as fk
from flowkernels.integrations.diffusers import pipeline_velocity, solver_scheduler

PROMPTS = ["a red fox in the snow", "a lighthouse at night, oil on canvas"]


def tiny() -> StableDiffusion3Pipeline:
    """A random SD3 without text encoders."""
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
    )
    vae = AutoencoderKL(latent_channels=4, block_out_channels=(32,), shift_factor=0.0)
    without = dict.fromkeys(f"{part}{i}" for part in ("text_encoder", "tokenizer") for i in ("", "_2", "_3"))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return StableDiffusion3Pipeline(transformer=transformer, vae=vae, scheduler=scheduler, **without)


def embeddings() -> dict:
    """What takes the place of prompts, for a pipeline without text encoders."""
    rows = {f"{kind}prompt_embeds": torch.randn(2, 6, 32) for kind in ("", "negative_")}
    return rows | {f"{kind}pooled_prompt_embeds": torch.randn(2, 32) for kind in ("", "negative_")}


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a pipeline as DiffusionPipeline.from_pretrained takes it; else a tiny one")
    parser.add_argument("--height", type=int, default=8)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--steps", type=int, default=4, help="evaluations of the solver")
    parser.add_argument("--grid", type=int, default=24, help="fine steps of the teacher")
    parser.add_argument("--samples", type=int, default=16, help="samples to calibrate on")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", help="folder for the pipeline with its new scheduler")
    args = parser.parse_args(argv)
    if args.samples < 2:
        parser.error(f"--samples: expected 2 or more, got {args.samples}")

    if args.model:
        pipe = DiffusionPipeline.from_pretrained(args.model, torch_dtype=torch.bfloat16).to(args.device)
        call = dict(prompt=PROMPTS)
    else:
        pipe, call = tiny(), embeddings()
    call |= dict(height=args.height, width=args.width, guidance_scale=args.guidance_scale)
    pipe.set_progress_bar_config(disable=True)

    v = pipeline_velocity(pipe, **call)  # the pipeline's own guided velocity, its own grid, its own latents
    noise, held_out = v.noise(args.samples), v.noise(max(2, args.samples // 2))
    cal = fk.calibrate(v, noise, grid=v.grid(args.grid), steps=[args.steps], effort="fit", verify_noise=held_out)
    print(cal)

    stock = pipe.scheduler
    pipe.scheduler = solver_scheduler(cal, like=stock)  # its best for each number of steps that it has
    latents = pipe(**call, num_inference_steps=args.steps, output_type="latent")[0]

    with tempfile.TemporaryDirectory() as temporary:
        out = Path(args.out or temporary)
        pipe.save_pretrained(out)
        without = {name: None for name, part in pipe.components.items() if part is None}
        loaded = DiffusionPipeline.from_pretrained(out, **without)
        kind = type(loaded.scheduler).__name__
        print(f"{len(latents)} samples in {args.steps} steps; saved, and loaded with its {kind}")
    return cal.verified[args.steps]


if __name__ == "__main__":
    main()
