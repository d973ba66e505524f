"""Straightening of a student that accelerate has prepared, under torchrun or `accelerate launch`."""

import sys

import torch
from accelerate import Accelerator

import flowkernels as fk


def main(path: str) -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.SiLU(), torch.nn.Linear(8, 3))
    student = fk.VelocityField(
        torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.SiLU(), torch.nn.Linear(8, 3)), time_column=True
    )
    student.net = accelerator.prepare(student.net)
    group = torch.distributed.group.WORLD if accelerator.num_processes == 1 else None  # else the student's
    settings = dict(noise=(3,), grid=8, bank=32, batch=8, iterations=4, log_every=1, progress=False, lr=1e-2)
    teacher = fk.VelocityField(net, time_column=True)
    found = fk.straighten(student, teacher, fk.Schedule([0, 0.5, 1]), **settings, group=group)
    torch.save((accelerator.num_processes, found.history["loss"]), f"{path}.{accelerator.process_index}")


if __name__ == "__main__":
    main(sys.argv[1])
