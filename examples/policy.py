"""A flow policy: actions from an observation, in one fused call of few steps.

    python examples/policy.py

The policy here is a small network with random weights in the shape of the real thing: a chunk of actions, the time and
an encoded observation in, a velocity of the chunk out. `fk.fuse` records it once; a new observation costs its encoder
and one kernel call.
"""

import argparse

import torch
from torch import Tensor, nn

import flowkernels as fk


class Policy(nn.Module):
    """Velocity of a chunk of actions `[n, actions * horizon]`, given an observation."""

    def __init__(self, actions: int = 7, horizon: int = 8, observation: int = 32, width: int = 256):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(observation, width), nn.Mish(), nn.Linear(width, width))
        self.time = nn.Sequential(nn.Linear(1, width), nn.Mish(), nn.Linear(width, width))
        self.input = nn.Linear(actions * horizon, width)
        self.body = nn.Sequential(nn.Mish(), nn.Linear(width, width), nn.Mish(), nn.Linear(width, actions * horizon))

    def forward(self, x: Tensor, t: Tensor, obs: Tensor) -> Tensor:
        return self.body(self.input(x) + self.time(t[:, None]) + self.encoder(obs))


def main(argv: list[str] | None = None) -> Tensor:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4, help="evaluations of the sampler")
    parser.add_argument("--grid", type=int, default=50, help="fine steps of the teacher")
    parser.add_argument("--calls", type=int, default=10, help="observations to act on")
    args = parser.parse_args(argv)
    if args.calls < 1:
        parser.error(f"--calls: expected 1 or more, got {args.calls}")

    torch.manual_seed(0)
    policy = Policy().eval()
    # calibrate on observations like those to come: one row of conditioning a noise
    noise, observations = torch.randn(128, 56), torch.randn(128, 32)
    velocity = fk.VelocityField(policy, conditioning={"obs": observations})
    cal = fk.calibrate(velocity, noise, grid=args.grid, steps=[args.steps])
    solver = fk.fit_solver(velocity, cal, args.steps)

    one = fk.VelocityField(policy, conditioning={"obs": observations[:1]})
    sampler = fk.fuse(one, solver)
    for _ in range(args.calls):
        obs = torch.randn(1, 32)
        actions = sampler(torch.randn(1, 56), obs=obs)  # all steps in one call
    print(f"{args.calls} chunks of actions of shape {tuple(actions.view(8, 7).shape)}, {args.steps} evaluations each")
    return actions


if __name__ == "__main__":
    main()
