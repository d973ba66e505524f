"""What collectives take of straightening by several processes. Run by hand:

    torchrun --nproc-per-node 2 benchmarks/many_devices/straighten.py --network digits --batch 1024
    torchrun --nproc-per-node 2 benchmarks/many_devices/straighten.py --network dit

Each process has one thread. In every round the first one trains alone on whole batches while the others sleep; then
each by itself, at the same time, on batches of its part's size: the same work without collectives; then all together.
The medians of the rounds are printed, of an iteration: without the bank, and what comes before the first row of the
history.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import distributed as dist

import flowkernels as fk
from flowkernels.bench import suite


def iteration(
    net: torch.nn.Module, shape: tuple[int, ...], settings: dict[str, Any]
) -> tuple[float, float, list[float]]:
    """Seconds of an iteration, and of the processor; the losses."""
    at: list[tuple[int, float, float]] = []

    def note(event: fk.TrainingEvent) -> None:
        if event.kind == "log":
            at.append((event.iteration, time.perf_counter(), time.process_time()))

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="group: ")
        plan = fk.Schedule([0, 0.2, 0.4, 0.7, 1])
        found = fk.straighten(None, net, plan, noise=shape, grid=20, callbacks=(note,), progress=False, **settings)
    (first, began, worked), (last, ended, done) = at[0], at[-1]
    return (ended - began) / (last - first), (done - worked) / (last - first), found.history["loss"]


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="digits")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args(args)
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    torch.set_num_threads(1)
    first, size = dist.get_rank() == 0, dist.get_world_size()
    net, shape = suite.module("many_devices.calibrate").network(asked.network)
    common = dict(iterations=asked.iterations, log_every=max(1, asked.iterations // 5), bank=4 * asked.batch)
    whole, part = dict(batch=asked.batch), dict(batch=asked.batch // size)
    alone, apart, together, worked = [], [], [], []
    one = dist.new_group([0])
    for _ in range(asked.rounds):
        if first:
            seconds, _, losses = iteration(net, shape, common | whole | dict(group=one))
            alone.append(seconds)
        dist.barrier()
        seconds, own, _ = iteration(net, shape, common | part)
        apart.append(seconds)
        dist.barrier()
        seconds, with_all, of_all = iteration(net, shape, common | whole | dict(group=dist.group.WORLD))
        together.append(seconds)
        worked.append(with_all / own - 1)
        dist.barrier()
    if first:
        a, b, c, more = map(statistics.median, (alone, apart, together, worked))
        off = max(abs(x / y - 1) for x, y in zip(of_all, losses, strict=True))
        count = sum(p.numel() for p in net.parameters())
        print(f"{asked.network}, {count} weights, batch {asked.batch}, {asked.rounds} rounds: an iteration")
        print(f"  one process   {1e3 * a:8.3f} ms")
        print(f"  {size} processes   {1e3 * c:8.3f} ms, {a / c:.2f} times as fast; losses apart by {off:.1e}, relative")
        print(f"  without collectives {1e3 * b:8.3f} ms: they take {c / b - 1:.2%}, of the processor {more:.2%}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
