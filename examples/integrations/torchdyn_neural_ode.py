"""torchdyn: the vector field of a NeuralODE as torchcfm's tutorials make it, sampled by us, beside its own solver."""

import torch
from torchcfm.models.models import MLP
from torchcfm.utils import torch_wrapper
from torchdyn.core import NeuralODE

import flowkernels as fk


def run(solver: str = "euler", steps: int = 8):
    torch.manual_seed(0)
    model, noise = MLP(dim=2, time_varying=True).requires_grad_(False), torch.randn(6, 2)
    node = NeuralODE(torch_wrapper(model), solver=solver, sensitivity="autograd")
    theirs = node.trajectory(noise, torch.linspace(0, 1, steps + 1))[-1]
    plan = getattr(fk.Solver, solver)(steps)
    # with flowkernels
    velocity = fk.VelocityField(model, time_column=True)
    samples = fk.sample(velocity, noise, plan)
    # ----
    return samples, theirs, velocity


if __name__ == "__main__":
    samples, theirs, _ = run()
    print(f"largest difference to NeuralODE.trajectory {(samples - theirs).abs().max():.1e}")
