"""Meta's flow_matching: samples of its ModelWrapper with extras, by our solver, beside its ODESolver's."""

import torch
from flow_matching.solver import ODESolver
from flow_matching.utils import ModelWrapper
from torch import nn

import flowkernels as fk


class Wrapped(ModelWrapper):
    """Its solver calls it with t of no dimensions; training with t [n]."""

    def forward(self, x, t, label):
        return torch.tanh(self.model(torch.cat([x, t.expand(len(x))[:, None], label[:, None]], 1)))


def run(method: str = "midpoint", steps: int = 8):
    torch.manual_seed(0)
    model, noise, label = Wrapped(nn.Linear(4, 2)).requires_grad_(False), torch.randn(6, 2), torch.arange(6.0)
    solver = getattr(fk.Solver, method)(steps)
    theirs = ODESolver(model).sample(noise, step_size=1 / steps, method=method, label=label)
    # with flowkernels
    velocity = fk.VelocityField(model, x_name="x", time_name="t", conditioning={"label": label})
    samples = fk.sample(velocity, noise, solver)
    # ----
    return samples, theirs, velocity


if __name__ == "__main__":
    samples, theirs, _ = run()
    print(f"largest difference to ODESolver.sample {(samples - theirs).abs().max():.1e}")
