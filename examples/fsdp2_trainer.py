"""Straightening in a bare torchrun loop: weights sharded by FSDP2, trajectories by rank, checkpoints that any number of
ranks can go on from.

    torchrun --nproc-per-node 2 examples/fsdp2_trainer.py
    torchrun --nproc-per-node 8 examples/fsdp2_trainer.py --batch 256 --checkpoint folder        # after a kill, again

Every rank makes the same calls and draws the same numbers, and computes its slice: of the bank the trajectories of its
part of the noise, and of each batch its examples, which are on trajectories that it has. So the losses and the student
are those of one rank, on any number of them, but for the order in which sums are added.
"""

import argparse
import copy
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

import flowkernels as fk
from flowkernels.models.networks import TimeEmbedding


class Transformer(torch.nn.Module):
    """A velocity of 8 x 8 images, in patches of 2 x 2: here a random one, in the place of a trained teacher."""

    def __init__(self, width: int = 32, blocks: int = 2):
        super().__init__()
        self.time, self.tokens = TimeEmbedding(64, width), torch.nn.Linear(4, width)
        self.position = torch.nn.Parameter(torch.randn(16, width))
        layer = dict(dim_feedforward=2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = torch.nn.ModuleList(torch.nn.TransformerEncoderLayer(width, 2, **layer) for _ in range(blocks))
        self.head = torch.nn.Linear(width, 4)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        z = self.tokens(functional.pixel_unshuffle(x, 2).flatten(2).mT)
        z = z + self.position + 8 * self.time(t)[:, None]
        for block in self.blocks:
            z = block(z)
        return functional.pixel_shuffle(self.head(z).mT.unflatten(2, (4, 4)), 2)


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return Transformer().eval()


def sharded(net: torch.nn.Module, mesh: DeviceMesh) -> torch.nn.Module:
    """The student, in place, block by block."""
    for block in net.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(net, mesh=mesh)


class Run(dcp.stateful.Stateful):
    """What a checkpoint has."""

    def __init__(self, student: torch.nn.Module, optimizer: torch.optim.Optimizer):
        self.student, self.optimizer, self.step = student, optimizer, 0

    def state_dict(self) -> dict:
        weights, moments = get_state_dict(self.student, self.optimizer)
        return {"student": weights, "optimizer": moments, "step": self.step}

    def load_state_dict(self, state: dict) -> None:
        set_state_dict(
            self.student, self.optimizer, model_state_dict=state["student"], optim_state_dict=state["optimizer"]
        )
        self.step = state["step"]


def save(run: Run, folder: Path) -> None:
    """Beside the one before, which goes once the new one is whole."""
    half, whole = folder / "half", folder / f"step-{run.step:06d}"
    dcp.save({"run": run}, checkpoint_id=half)
    if dist.get_rank() == 0:
        old = list(folder.glob("step-*"))
        os.rename(half, whole)
        for path in old:
            shutil.rmtree(path)
    dist.barrier()


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--steps", type=int, default=4, help="evaluations of the sampler")
    parser.add_argument("--grid", type=int, default=40, help="fine steps of the teacher")
    parser.add_argument("--size", type=int, default=512, help="trajectories, of all ranks")
    parser.add_argument("--batch", type=int, default=64, help="examples of an iteration, of all ranks")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--bfloat16", action="store_true", help="compute in bfloat16; weights and sums stay float32")
    parser.add_argument("--checkpoint", help="folder to go on from, and to write to")
    parser.add_argument("--checkpoint-every", type=int, default=20)
    parser.add_argument("--out", help="file of the student's weights, for one process")
    args = parser.parse_args(argv)

    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        return train(args, device)
    finally:
        dist.destroy_process_group()


def train(args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    rank, world = dist.get_rank(), dist.get_world_size()
    teacher = network().to(device)
    shape, everyone = (1, 8, 8), dist.group.WORLD
    noise = torch.randn(128, *shape, generator=torch.Generator().manual_seed(1)).to(device)
    cal = fk.calibrate(teacher, noise, grid=args.grid, steps=[args.steps], group=everyone, progress=False)
    plan = cal[args.steps]
    bank = fk.TrajectoryBank(
        teacher, plan, noise=shape, size=args.size, grid=args.grid, device=device, group=everyone, progress=False
    ).fill()
    objective = fk.StraightenLoss(plan)

    mesh = init_device_mesh(device.type, (world,))
    student = sharded(copy.deepcopy(teacher).train(), mesh)
    run = Run(student, torch.optim.Adam(student.parameters(), lr=args.lr))
    folder = None if args.checkpoint is None else Path(args.checkpoint)
    there = [] if folder is None else sorted(folder.glob("step-*"))
    if there:
        dcp.load({"run": run}, checkpoint_id=there[-1])

    losses = []
    for step in range(run.step, args.iterations):
        drawn = torch.Generator().manual_seed(1_000_003 + step)  # the same on every rank, and after a resume
        batch = bank.sample(args.batch, drawn)  # this rank's part of it
        # not FSDP's MixedPrecisionPolicy(bfloat16), which would round the times that the network is called with too
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bfloat16):
            loss = objective(student, batch, drawn).loss
        loss.backward()  # FSDP takes the mean over the ranks
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.step = step + 1
        if step % 20 == 0 or run.step == args.iterations:
            total = loss.detach().clone()
            dist.all_reduce(total)
            losses.append(total.item() / world)
            if rank == 0:
                print(f"step {step}: loss {losses[-1]:.6g}", flush=True)
        if folder is not None and (run.step % args.checkpoint_every == 0 or run.step == args.iterations):
            save(run, folder)

    whole = get_model_state_dict(student, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    found = {"loss": losses[-1] if losses else float("nan")}
    if rank == 0:  # where the weights are whole
        net = network()
        start = torch.randn(64, *shape, generator=torch.Generator().manual_seed(2))
        fine = fk.sample(net, start, args.grid)
        found["untrained"] = (fk.sample(net, start, plan) - fine).square().mean().sqrt().item()
        net.load_state_dict(whole)
        found["trained"] = (fk.sample(net, start, plan) - fine).square().mean().sqrt().item()
        print(f"rms to the teacher in {args.steps} steps: {found['untrained']:.4g}, trained {found['trained']:.4g}")
        if args.out is not None:
            torch.save(whole, args.out)
    return found


if __name__ == "__main__":
    main()
