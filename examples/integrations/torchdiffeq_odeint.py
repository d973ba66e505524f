"""A sampler of others that calls torchdiffeq's odeint by a name in its module, with a solver of ours in its place."""

import sys

import torch
from torchdiffeq import odeint

import flowkernels as fk
from flowkernels.integrations import torchdiffeq


def sample(func, noise, steps: int, **options):
    """As speech and image models have it: theirs to write, not to change."""
    return odeint(func, noise, torch.linspace(0, 1, steps + 1), **options)[-1]


def run(solver: fk.Solver | None = None, method: str = "midpoint", steps: int = 8):
    torch.manual_seed(0)
    weight, noise, host = torch.randn(3, 3), torch.randn(6, 3), sys.modules[__name__]

    def func(t, x):
        return torch.tanh(x @ weight) + t

    own = host.odeint
    theirs = sample(func, noise, steps, method=method)
    # with flowkernels
    host.odeint = torchdiffeq.odeint(solver or fk.Solver.midpoint(steps))
    # ----
    samples = sample(func, noise, steps, method=method)
    host.odeint = own
    return samples, theirs, func


if __name__ == "__main__":
    samples, theirs, _ = run()
    print(f"largest difference to torchdiffeq's midpoint {(samples - theirs).abs().max():.1e}")
