"""What exchanges between processes take of a calibration by several, beside one by a single process. Run by hand:

    torchrun --nproc-per-node 2 benchmarks/many_devices/calibrate.py --effort best --samples 256
    torchrun --nproc-per-node 2 benchmarks/many_devices/calibrate.py --network dit

Each process has one thread. In every round the first one calibrates alone while the others sleep, then all together,
with the same noise; the medians of the rounds are printed. What is waited for slower processes is in the time of
exchanges, but not in their time of the processor.
"""

import argparse
import statistics
import time
from collections.abc import Sequence

import torch
from torch import distributed as dist
from torch import nn

import flowkernels as fk
from flowkernels.models.bundled import BUNDLED
from flowkernels.models.networks import DiT
from flowkernels.runtime.ranks import Ranks


def network(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """A bundled one, or a transformer of random weights on states of the digits' size, of more work."""
    if name in BUNDLED:
        return BUNDLED[name].load(), BUNDLED[name].shape
    torch.manual_seed(0)
    net = DiT(1, 8)
    for p in net.parameters():  # some layers begin at zero, and the flow is to be curved
        nn.init.normal_(p, std=0.05)
    return net.eval().requires_grad_(False), (1, 8, 8)


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="digits", choices=[*BUNDLED, "dit"])
    parser.add_argument("--effort", default="schedule", choices=["schedule", "fit", "best"])
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--grid", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args(args)
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    torch.set_num_threads(1)
    first = dist.get_rank() == 0
    net, shape = network(asked.network)
    noise = fk.noise(asked.samples, shape, seed=0)
    options = dict(grid=asked.grid, steps=[4, 8], effort=asked.effort, progress=False)
    alone, together, whole, own = [], [], [], []
    for _ in range(asked.rounds):
        begun = time.perf_counter()
        if first:
            fk.calibrate(net, noise, **options)
        alone.append(time.perf_counter() - begun)
        dist.barrier()
        ranks, begun, worked = Ranks(dist.group.WORLD), time.perf_counter(), time.process_time()
        fk.calibrate(net, noise, **options, group=ranks)
        together.append(time.perf_counter() - begun)
        whole.append(ranks.seconds / together[-1])
        own.append(ranks.processor_seconds / (time.process_time() - worked))
        exchanges = ranks.exchanges
    if first:
        one, several, of_time, of_processor = map(statistics.median, (alone, together, whole, own))
        print(f"{asked.network}, {asked.samples} samples, K = {asked.grid}, {asked.effort}, {asked.rounds} rounds")
        print(f"  one process  {one:8.3f} s")
        print(f"  {dist.get_world_size()} processes  {several:8.3f} s, {one / several:.2f} times as fast")
        print(f"  {exchanges} exchanges: {of_processor:.2%} of the processor's time, {of_time:.2%} of all with waiting")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
