"""Straightening as a module of PyTorch Lightning: its trainer, precision, accumulation, clipping and checkpoints.

    pip install pytorch-lightning
    python examples/lightning_module.py
    python examples/lightning_module.py --devices 2 --accumulate 2 --out folder     # goes on from what is there

Batches are drawn in `training_step`, by their number, on every device alike, of which each takes its share. So the data
loader has numbers alone, a run that is resumed draws what it would have drawn, and devices change nothing but the order
in which sums are added.
"""

import argparse
import copy
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

import flowkernels as fk
from flowkernels.models.bundled import BUNDLED


class Straightening(pl.LightningModule):
    """student: with conditioning of its own, if any. bank, objective: of the same knots. batch: of all devices."""

    def __init__(self, student, bank: fk.TrajectoryBank, objective: fk.StraightenLoss, batch: int, lr: float):
        super().__init__()
        self.student, self.objective, self.bank, self.batch, self.lr = student, objective, bank, batch, lr

    def training_step(self, number: torch.Tensor, index: int) -> torch.Tensor:
        drawn = torch.Generator().manual_seed(index)
        batch, share = self.bank.sample(self.batch, drawn), self.batch // self.trainer.world_size
        part = batch.split(self.global_rank * share, (self.global_rank + 1) * share)
        losses = self.objective(self.student, part, drawn)
        self.log("loss", losses.loss, batch_size=share, sync_dist=True, prog_bar=True)
        return losses.loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.student.parameters(), lr=self.lr)


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=300, help="batches")
    parser.add_argument("--stop", type=int, help="batches after which this run stops, to go on later")
    parser.add_argument("--steps", type=int, default=4, help="evaluations of the sampler")
    parser.add_argument("--grid", type=int, default=100, help="fine steps of the teacher")
    parser.add_argument("--size", type=int, default=2048, help="trajectories")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--out", help="folder of the last checkpoint")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    model = BUNDLED["digits"]
    teacher = model.load()
    cal = fk.calibrate(teacher, torch.randn(256, *model.shape), grid=args.grid, steps=[args.steps], progress=False)
    plan = cal[args.steps]
    bank = fk.TrajectoryBank(teacher, plan, noise=model.shape, size=args.size, progress=False).fill()

    module = Straightening(copy.deepcopy(teacher).train(), bank, fk.StraightenLoss(plan), args.batch, lr=5e-4)
    trainer = pl.Trainer(
        accelerator=args.accelerator,
        devices=args.devices,
        strategy="ddp" if args.devices > 1 else "auto",
        precision=args.precision,
        max_steps=(args.stop or args.iterations) // args.accumulate,
        accumulate_grad_batches=args.accumulate,
        gradient_clip_val=1.0,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    last = None if args.out is None else Path(args.out) / "last.ckpt"
    there = str(last) if last is not None and last.exists() else None
    trainer.fit(module, DataLoader(range(args.iterations), batch_size=None), ckpt_path=there)
    if last is not None:
        trainer.save_checkpoint(last)

    noise = torch.randn(256, *model.shape, generator=torch.Generator().manual_seed(1))
    plans = {"teacher": plan, "student": (module.student.cpu().eval(), plan)}
    found = fk.evaluate_sampler(teacher, plans, noise, columns=["endpoint"], teacher_solver=args.grid)
    print(found.report())
    return {row.name: row.rms for row in found.rows}


if __name__ == "__main__":
    main()
