"""stable-audio-tools: its own sample_rf with a solver of ours, a tiny DiT of its own of random weights.

sample_rf steps on a logistic schedule of its own, whatever is asked of it: `times` says where. A schedule of Euler's
steps needs no more than `sample_discrete_euler(model, noise, sigmas=(1 - cal[4].times).float())`.
"""

import torch
from stable_audio_tools.inference.sampling import sample_rf
from stable_audio_tools.models.dit import DiffusionTransformer

import flowkernels as fk
from flowkernels.integrations.host_loops import host_loop, host_velocity


def dit():
    torch.manual_seed(0)
    made = DiffusionTransformer(
        io_channels=4, embed_dim=64, depth=2, num_heads=2, cond_token_dim=8, diffusion_objective="rectified_flow"
    )
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return made.eval().requires_grad_(False)


def run(steps: int = 4):
    model, noise = dit(), torch.randn(2, 4, 16)
    given = dict(cross_attn_cond=torch.randn(2, 5, 8), cfg_scale=3.0)
    velocity = host_velocity(model, "forward", lambda: sample_rf(model, noise, steps=steps, **given))
    solver = fk.calibrate(velocity, noise, grid=24, steps=[steps], effort="fit", progress=False).best(steps)
    # with flowkernels
    times = torch.sigmoid(torch.linspace(6, -2, steps + 1))
    times[0], times[-1] = 1, 0
    with host_loop(model, "forward", solver, times=times):
        # ----
        samples = sample_rf(model, noise, steps=steps, **given)
    return samples, fk.sample(velocity, noise, solver), solver


if __name__ == "__main__":
    samples, expected, solver = run()
    print(f"{solver}: largest difference to fk.sample {(samples - expected).abs().max():.1e}")
