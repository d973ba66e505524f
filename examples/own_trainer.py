"""Straightening inside a trainer's loop of one's own: a bank of states for the data set, and a module for the loss.

    python examples/own_trainer.py
    python examples/own_trainer.py --t-sampling uniform --loss huber

`fk.StraightenLoss` gathers the network's inputs from the bank, evaluates it once and is the loss, whose targets are
not materialised. Everything else, the optimiser, mixed precision, logging, stays the trainer's.
"""

import argparse
import copy

import torch

import flowkernels as fk
from flowkernels.models.bundled import BUNDLED


def main(argv: list[str] | None = None) -> tuple[float, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--steps", type=int, default=4, help="evaluations of the sampler")
    parser.add_argument("--grid", type=int, default=100, help="fine steps of the teacher")
    parser.add_argument("--t-sampling", default="start", help="start is BOSS as published, uniform piecewise reflow")
    parser.add_argument("--loss", default="l2")
    args = parser.parse_args(argv)
    if args.iterations < 1:
        parser.error(f"--iterations: expected 1 or more, got {args.iterations}")

    torch.manual_seed(0)
    model = BUNDLED["digits"]
    teacher = model.load()
    noise = torch.randn(512, *model.shape)
    schedule = fk.calibrate(teacher, noise, grid=args.grid, steps=[args.steps])[args.steps]

    # the teacher's states at the schedule's knots, [N + 1, n, *shape]
    trajectory = fk.rollout(teacher, noise, args.grid)
    knots = torch.searchsorted(trajectory.times, schedule.times - 1e-9)
    bank = trajectory.x[knots]
    objective = fk.StraightenLoss(schedule, t_sampling=args.t_sampling, loss=args.loss)

    student = copy.deepcopy(teacher).train()
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)
    losses = []
    for _ in range(args.iterations):
        batch = fk.BankBatch(bank, torch.randint(args.steps, (128,)), torch.randint(len(noise), (128,)))
        loss = objective(student, batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    first, last = (sum(part) / len(part) for part in (losses[:10], losses[-10:]))
    print(f"loss of {args.steps} steps: {first:.4g} in the first ten iterations, {last:.4g} in the last ten")
    return first, last


if __name__ == "__main__":
    main()
