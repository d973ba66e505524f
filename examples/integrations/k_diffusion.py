"""A model of discrete steps in k-diffusion's wrapper, sampled by a fitted solver in place of one of its samplers."""

import torch
from k_diffusion import external
from torch import Tensor, nn

import flowkernels as fk
from flowkernels.integrations import k_diffusion


class Model(nn.Module):
    """As CompVis has them: predicts noise at steps from 0 to 999, of a condition."""

    def __init__(self):
        super().__init__()
        self.alphas_cumprod = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0)
        self.first, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)

    def apply_model(self, x: Tensor, step: Tensor, cond: Tensor) -> Tensor:
        h = self.first(x) + (cond + step / 1000)[:, None, None, None]
        return x + 0.5 * self.last(torch.tanh(h))


def run() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    denoiser, noise, cond = external.CompVisDenoiser(Model()).eval(), torch.randn(16, 3, 8, 8), torch.linspace(0, 1, 16)
    # with flowkernels
    velocity = fk.VelocityField(fk.from_denoiser(denoiser), conditioning={"cond": cond})
    cal = fk.calibrate(velocity, velocity.net.initial(noise), velocity.net.grid(50), [6], effort="fit", progress=False)
    sample = k_diffusion.sampler(cal)
    # ----
    sigmas = sample.sigmas
    samples = sample(denoiser, noise * sigmas[0], sigmas, extra_args={"cond": cond}, disable=True)
    return samples, fk.sample(velocity, velocity.net.initial(noise), cal.best(6)), noise


if __name__ == "__main__":
    samples, ours, _ = run()
    print((samples - ours).abs().max() / ours.abs().max())
