"""torchcfm: its UNetModelWrapper, which takes (t, x), sampled by us, beside torchdiffeq as its examples have it."""

import torch
import torchdiffeq
from torchcfm.models.unet.unet import UNetModelWrapper

import flowkernels as fk


def run(steps: int = 4):
    torch.manual_seed(0)
    model = UNetModelWrapper((1, 8, 8), 32, 1, channel_mult=(1, 1), attention_resolutions="4").eval()
    for p in model.requires_grad_(False).parameters():
        p.normal_(std=0.1)  # its last layer begins with zeros
    noise = torch.randn(2, 1, 8, 8)
    theirs = torchdiffeq.odeint(lambda t, x: model(t, x), noise, torch.linspace(0, 1, steps + 1), method="euler")[-1]
    # with flowkernels
    velocity = fk.VelocityField(model, x_name="x", time_name="t")
    samples = fk.sample(velocity, noise, steps)
    # ----
    return samples, theirs, velocity


if __name__ == "__main__":
    samples, theirs, _ = run()
    print(f"largest difference to torchdiffeq's Euler {(samples - theirs).abs().max():.1e}")
