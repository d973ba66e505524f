"""A LoRA that makes SD3 sample in few steps, in the loop of diffusers' train_dreambooth_lora_sd3.py, under accelerate.

    python examples/sd3_lora_accelerate.py                  # a tiny random SD3, made here: seconds on a CPU
    accelerate launch examples/sd3_lora_accelerate.py --model FOLDER --prompts prompts.txt --height 1024 --width 1024 \\
        --mixed-precision bf16 --size 10000 --iterations 3000 --out few_steps

Of that script the accelerator, the adapter, checkpoints by hooks, clipping and average stay; data set and loss go. In
their place are `fk.calibrate`, of the pipeline as it samples, `fk.TrajectoryBank`, its own samples with their prompts'
embeddings, and `fk.StraightenLoss`. The teacher is the same network with its adapter off, guided; the student, with it
on, is not guided: it samples with guidance_scale=1, in one evaluation a step. Whatever the number of processes, a step
is of the same `--batch` samples, of which each process computes its share.
"""

import argparse
import os
import shutil
import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel, cast_training_params
from diffusers.utils import convert_unet_state_dict_to_peft
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict

import flowkernels as fk
from flowkernels.integrations.diffusers import pipeline_velocity, solver_scheduler

LAYERS = [f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")]
LAYERS += [f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")]
CONVENTION = dict(
    reverse_time=True, time_scale=1000.0, x_name="hidden_states", time_name="timestep"
)  # docs/diffusers.md


def tiny() -> tuple[StableDiffusion3Pipeline, dict]:
    """A random SD3 without text encoders, and what takes the place of prompts."""
    torch.manual_seed(0)
    size = dict(sample_size=8, pos_embed_max_size=8, in_channels=4, out_channels=4, num_layers=2)
    heads = dict(attention_head_dim=8, num_attention_heads=4, caption_projection_dim=32)
    transformer = SD3Transformer2DModel(**size, **heads, joint_attention_dim=32, pooled_projection_dim=32)
    vae = AutoencoderKL(latent_channels=4, block_out_channels=(32,), shift_factor=0.0)
    pipe = StableDiffusion3Pipeline(transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), vae, *[None] * 6)
    texts = dict(prompt_embeds=torch.randn(2, 6, 32), pooled_prompt_embeds=torch.randn(2, 32))
    without = dict(prompt_embeds=torch.randn(1, 6, 32), pooled_prompt_embeds=torch.randn(1, 32))
    return pipe, texts | {f"negative_{name}": row.expand_as(texts[name]) for name, row in without.items()}


def load(args) -> tuple[StableDiffusion3Pipeline, dict]:
    if args.model is None:
        return tiny()
    dtype = torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32
    prompts = Path(args.prompts).read_text().splitlines() if args.prompts else ["a red fox in the snow", "a lighthouse"]
    texts = dict(prompt=prompts, negative_prompt="", max_sequence_length=args.max_sequence_length)
    return StableDiffusion3Pipeline.from_pretrained(args.model, dtype=dtype), texts


class Progress:
    """What a checkpoint keeps beside weights, optimiser and schedule."""

    def __init__(self, generator: torch.Generator):
        self.step, self.generator = 0, generator

    def state_dict(self) -> dict:
        return {"step": self.step, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        self.step = state["step"]
        self.generator.set_state(state["generator"])


def keep_adapters(accelerator: Accelerator) -> None:
    """Checkpoints hold the adapter, in the pipeline's layout, in the place of the whole network."""

    def save(models, weights, folder):
        for model in models:
            layers = get_peft_model_state_dict(accelerator.unwrap_model(model))
            if accelerator.is_main_process:
                StableDiffusion3Pipeline.save_lora_weights(folder, transformer_lora_layers=layers)
        weights.clear()

    def restore(models, folder):
        state = StableDiffusion3Pipeline.lora_state_dict(folder)
        state = {key.removeprefix("transformer."): value for key, value in state.items()}
        set_peft_model_state_dict(accelerator.unwrap_model(models.pop()), convert_unet_state_dict_to_peft(state))

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(restore)


def checkpoint(accelerator: Accelerator, out: Path, step: int) -> None:
    """A folder that is whole, or not there under its name."""
    half, whole = out / "half", out / f"checkpoint-{step:06d}"
    accelerator.save_state(half)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(whole, ignore_errors=True)
        os.rename(half, whole)
    accelerator.wait_for_everyone()


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="an SD3 as StableDiffusion3Pipeline.from_pretrained takes it; else a tiny one")
    parser.add_argument("--prompts", help="a file with a prompt a line")
    parser.add_argument("--max-sequence-length", type=int, default=256)
    parser.add_argument("--height", type=int, default=8)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--guidance-scale", type=float, default=4.0, help="of the teacher")
    parser.add_argument("--steps", type=int, default=4, help="evaluations of the sampler")
    parser.add_argument("--grid", type=int, default=28, help="fine steps of the teacher")
    parser.add_argument("--samples", type=int, default=16, help="samples to calibrate on")
    parser.add_argument("--size", type=int, default=64, help="trajectories of the bank")
    parser.add_argument("--held-out", type=int, default=16, help="of them to measure errors on")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8, help="samples of a step, by all processes, before accumulation")
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--clip", type=float, default=1.0)
    parser.add_argument("--ema", type=float, help="decay of an average of the adapter, which is then what is saved")
    parser.add_argument("--mixed-precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--checkpoint-every", type=int, default=500)
    parser.add_argument("--out", help="folder of schedule, bank, checkpoints and adapter, where a killed run goes on")
    args = parser.parse_args(argv)
    if args.out is None:
        with tempfile.TemporaryDirectory() as temporary:
            return main([*(argv or []), "--out", temporary])

    # `--batch` is of all processes: the schedule of the learning rate makes a step each step
    loading = DataLoaderConfiguration(split_batches=True)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision, gradient_accumulation_steps=args.accumulate, dataloader_config=loading
    )
    share, rest = divmod(args.batch, accelerator.num_processes)
    if rest or not share:
        parser.error(f"--batch: expected a multiple of {accelerator.num_processes} processes, got {args.batch}")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    pipe, texts = load(args)
    pipe.to(accelerator.device).set_progress_bar_config(disable=True)
    call = dict(height=args.height, width=args.width)

    # the teacher: the pipeline, and the same as a field whose prompts are rows of tables
    v = pipeline_velocity(pipe, **texts, **call, guidance_scale=args.guidance_scale)
    embeds, without, pooled, pooled_without = pipe.encode_prompt(
        **dict.fromkeys(("prompt", "prompt_2", "prompt_3")) | texts
    )
    transformer = pipe.transformer
    rows = dict(encoder_hidden_states=embeds, pooled_projections=pooled)
    teacher = fk.VelocityField(
        transformer.eval(),
        **CONVENTION,
        dtype=transformer.dtype,
        conditioning=rows,
        guidance=args.guidance_scale,
        unconditional=dict(encoder_hidden_states=without[:1], pooled_projections=pooled_without[:1]),
    )
    teacher.check(v, v.noise(len(embeds)))  # that it is the pipeline's velocity

    places = torch.arange(args.size) % len(embeds)
    with accelerator.main_process_first():  # by one of the processes, for all
        file = out / "calibration.json"
        if not file.exists():
            noise = v.noise(args.samples, torch.Generator().manual_seed(1))
            fk.calibrate(v, noise, grid=v.grid(args.grid), steps=[args.steps], progress=False).save(file)
        cal = fk.Calibration.load(file, v)
        bank = fk.TrajectoryBank(
            teacher,
            cal[args.steps],
            noise=tuple(v.noise(1).shape[1:]),
            size=args.size,
            storage=out / "bank",
            conditioning={name: (table, places) for name, table in rows.items()},
            device=accelerator.device,
            progress=False,
        ).fill()

    # the student: the same network with an adapter
    transformer.requires_grad_(False)
    torch.manual_seed(2)
    # alpha as large as the rank, which is what load_lora_weights takes it for
    adapter = LoraConfig(r=args.rank, lora_alpha=args.rank, init_lora_weights="gaussian", target_modules=LAYERS)
    transformer.add_adapter(adapter)
    cast_training_params(transformer, dtype=torch.float32)
    weights = [p for p in transformer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=args.lr, weight_decay=1e-4)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=5, num_training_steps=args.iterations)
    net, optimizer, schedule = accelerator.prepare(transformer.train(), optimizer, schedule)
    student = fk.VelocityField(net, **CONVENTION, dtype=transformer.dtype)
    objective = fk.StraightenLoss(cal[args.steps])
    progress = Progress(torch.Generator().manual_seed(3))
    average = None if args.ema is None else EMAModel(weights, decay=args.ema, use_ema_warmup=True)
    keep_adapters(accelerator)
    accelerator.register_for_checkpointing(progress, *([] if average is None else [average]))
    there = sorted(out.glob("checkpoint-*"))
    if there:
        accelerator.load_state(there[-1])
        accelerator.print(f"goes on from {there[-1].name}")

    mine = slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)
    for step in range(progress.step, args.iterations):
        for _ in range(args.accumulate):
            with accelerator.accumulate(net):
                batch = bank.sample(args.batch, progress.generator, held_out=args.held_out)
                loss = objective(student, batch.split(mine.start, mine.stop), progress.generator).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(weights, args.clip)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        if average is not None:
            average.step(weights)
        progress.step = step + 1
        if progress.step % args.checkpoint_every == 0 or progress.step == args.iterations:
            checkpoint(accelerator, out, progress.step)
        if step % 20 == 0:
            accelerator.print(f"step {step}: loss {loss.item():.4g}")
    if average is not None:
        average.copy_to(weights)
    transformer = accelerator.unwrap_model(net).eval()

    # what is held out, in N steps with the adapter and without
    ends = bank.ends(args.held_out, cal[args.steps])
    found = {}
    for name, switch in (("without", transformer.disable_adapters), ("with", transformer.enable_adapters)):
        switch()
        field = fk.VelocityField(transformer, **CONVENTION, dtype=transformer.dtype, conditioning=ends.conditioning)
        x = fk.sample(field, ends.states[0], cal[args.steps])
        found[name] = (x - ends.states[1]).square().mean().sqrt().item()
        accelerator.print(f"rms to the teacher's samples in {args.steps} steps, {name} the adapter: {found[name]:.4g}")

    if accelerator.is_main_process:
        layers = get_peft_model_state_dict(transformer)
        StableDiffusion3Pipeline.save_lora_weights(out, transformer_lora_layers=layers)
        again = load(args)[0].to(accelerator.device)
        again.set_progress_bar_config(disable=True)
        again.load_lora_weights(out)
        with torch.no_grad():
            given = {name: table[:1] for name, table in rows.items()}
            point = dict(
                hidden_states=ends.states[0][:1].to(transformer.dtype), timestep=ends.states.new_tensor([500.0])
            )
            one, other = (n(**point, **given).sample for n in (transformer, again.transformer))
        found["difference"] = (one - other).abs().max().item()
        again.scheduler = solver_scheduler(cal[args.steps], like=again.scheduler)
        latents = again(
            **texts, **call, guidance_scale=1.0, num_inference_steps=args.steps, output_type="latent"
        ).images
        print(f"saved; loaded by the pipeline, it differs by {found['difference']:.2g}; {len(latents)} samples")
    accelerator.end_training()
    return found


if __name__ == "__main__":
    main()
