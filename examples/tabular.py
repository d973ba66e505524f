"""A tabular flow, trained here in seconds on scikit-learn's wine table, then sampled in few steps.

    python examples/tabular.py

Needs scikit-learn. The network is a stack of linear layers with the time as a further column (torchcfm's convention),
so that it fuses whole.
"""

import argparse

import torch
from sklearn.datasets import load_wine
from torch import nn

import flowkernels as fk
from flowkernels.evaluation.endpoint import endpoint_error


def train(data: torch.Tensor, iterations: int) -> nn.Module:
    """Conditional flow matching on straight paths from noise to data."""
    D = data.shape[1]
    net = nn.Sequential(nn.Linear(D + 1, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, D))
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    for _ in range(iterations):
        x1 = data[torch.randint(len(data), (256,))]
        x0, t = torch.randn_like(x1), torch.rand(256, 1)
        v = net(torch.cat([(1 - t) * x0 + t * x1, t], 1))
        loss = (v - (x1 - x0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


def main(argv: list[str] | None = None) -> dict[int, tuple[float, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=2000, help="of the flow's own training")
    parser.add_argument("--grid", type=int, default=100, help="fine steps of the teacher")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    table = torch.tensor(load_wine().data, dtype=torch.float32)
    data = (table - table.mean(0)) / table.std(0)
    velocity = fk.VelocityField(train(data, args.iterations), time_column=True)
    sampler = fk.fuse(velocity, args.grid)  # goes wherever the velocity does
    noise, held_out = torch.randn(2, 512, data.shape[1])

    cal = fk.calibrate(sampler, noise, grid=args.grid, steps=[2, 4, 8])
    teacher, errors = fk.sample(sampler, held_out, args.grid), {}
    print("mean squared distance to the teacher:\n  N   uniform    fitted")
    for N in (2, 4, 8):
        solver = fk.fit_solver(sampler, cal, N)
        errors[N] = tuple(endpoint_error(fk.sample(sampler, held_out, s), teacher) for s in (N, solver))
        print(f"{N:3} {errors[N][0]:9.4g} {errors[N][1]:9.4g}")
    return errors


if __name__ == "__main__":
    main()
