"""Straightening inside a trainer's loop of one's own: a bank of the teacher's states, and a module for the loss.

    python examples/own_trainer.py
    python examples/own_trainer.py --target solver --accumulate 2 --autocast
    python examples/own_trainer.py --storage bank.shards     # written once, streamed from there, resumed after a kill

`fk.TrajectoryBank` rolls the teacher out once, for all schedules that it is given, and keeps its states at their knots.
`fk.StraightenLoss` takes the student and a batch of them, evaluates the student, and is the loss. Backward, optimiser,
accumulation, clipping, precision and what wraps the student stay the trainer's.
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
    parser.add_argument("--target", default="boss", help="what is learned: boss, reflow, on_policy, solver and others")
    parser.add_argument("--t-sampling", help="of boss: start is as published, uniform is piecewise reflow")
    parser.add_argument("--loss", default="l2")
    parser.add_argument("--accumulate", type=int, default=1, help="batches of 128 a step")
    parser.add_argument("--autocast", action="store_true", help="the student in bfloat16")
    parser.add_argument("--storage", default="device", help="of the bank: device, pinned, shared or a folder")
    args = parser.parse_args(argv)
    if args.iterations < 1:
        parser.error(f"--iterations: expected 1 or more, got {args.iterations}")

    torch.manual_seed(0)
    model = BUNDLED["digits"]
    teacher = model.load()
    cal = fk.calibrate(teacher, torch.randn(512, *model.shape), grid=args.grid, steps=[args.steps])
    plan = fk.fit_solver(teacher, cal, args.steps) if args.target == "solver" else cal[args.steps]
    objective = fk.StraightenLoss(
        plan, target=args.target, loss=args.loss, t_sampling=args.t_sampling, **needed_by(args.target, teacher)
    )
    bank = fk.TrajectoryBank(
        teacher, objective, noise=model.shape, size=2048, grid=args.grid, storage=args.storage
    ).fill()
    states = bank.states() if objective.needs_roll_out else None

    student = copy.deepcopy(teacher).train()
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)
    losses = []
    for i in range(args.iterations):
        if objective.needs_roll_out and i % 50 == 0:  # the student's own samples, of on_policy and solver
            objective.roll_out(student, states, chunk=512)
        for _ in range(args.accumulate):
            batch = bank.sample(128)
            if objective.needs_roll_out:
                batch = fk.BankBatch(states, batch.interval, batch.sample)
            with torch.autocast("cpu", torch.bfloat16, enabled=args.autocast):
                loss = objective(student, batch, progress=i / args.iterations).loss
            (loss / args.accumulate).backward()
            losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    first, last = (sum(part) / len(part) for part in (losses[:10], losses[-10:]))
    print(f"loss of {args.steps} steps: {first:.4g} in the first ten batches, {last:.4g} in the last ten")
    return first, last


def needed_by(target: str, teacher: torch.nn.Module) -> dict:
    """The teacher, for a target that evaluates it in the loop."""
    return {"teacher": teacher} if target == "on_policy" else {}


if __name__ == "__main__":
    main()
