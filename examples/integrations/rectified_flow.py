"""rectified-flow-pytorch: RectifiedFlow.sample with a solver of ours in the place of its odeint."""

import rectified_flow_pytorch.rectified_flow as host
import torch
from torch import nn

import flowkernels as fk
from flowkernels.integrations.torchdiffeq import odeint


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x, times):
        return torch.tanh(self.conv(x)) + times[:, None, None, None]


def run(plan=None, steps: int = 5, **settings):
    """steps: as its sample counts them, the number of times, of one step fewer."""
    torch.manual_seed(0)
    flow, noise = host.RectifiedFlow(Net(), data_shape=(1, 8, 8), **settings), torch.randn(2, 1, 8, 8)
    own, theirs = host.odeint, flow.sample(2, steps=steps, noise=noise.clone())
    # with flowkernels
    host.odeint = odeint(plan or fk.Solver.midpoint(steps - 1))
    # ----
    samples = flow.sample(2, steps=2, noise=noise.clone())
    host.odeint = own
    return samples, theirs, flow


if __name__ == "__main__":
    samples, theirs, _ = run()
    print(f"largest difference to its own midpoint {(samples - theirs).abs().max():.1e}")
