"""BOSS's published procedure, in plain torch: the baseline.

Written from the paper (arXiv 2312.16414) and from what the authors' code does (github.com/nguyenngocbaocmt02/BOSS,
sampling.py, finetune.py, losses.py, models/ema.py):

1. step costs, a pass and a value brought to the host for each pair (j, k) of K + 1 times, in stacks of 50 estimates, of
   states and velocities that the roll-out has moved to the CPU;
2. the path of least cost by loops over numbers;
3. the teacher rolled out on K steps, a chunk of noises at a time; both ends of every interval, and their times, into
   files of a folder for each chunk;
4. these files read, the chunks put together; each iteration permutes all examples and takes the first of them;
5. the loss at the knots, mean squared error to the secant; Adam (0.9, 0.999), linear warm-up and then a constant rate,
   gradients clipped to norm 1, the average of weights whose decay is at most (1 + n) / (10 + n), a tensor at a time.

Left out, all of which makes it faster than theirs: what they do beside the training (losses on a tenth of the examples
and images every 100 iterations, checkpoints), the other N whose files they write too, and the t + 1e-3 of their models.
Their warm-up is 5,000 of 12,000 iterations and more; here it is what ours has.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

STACK = 50  # estimates of states at once
CHUNK = 128  # noises rolled out at once (100 of theirs)
FILES = ("z0", "z1", "t0", "t1")


@torch.no_grad()
def rolled_out(velocity: Callable, noise: Tensor, times: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The K + 1 states and K velocities of Euler steps at the times `[K+1]`, each moved to the CPU."""
    x, states, velocities = noise, [noise.clone().cpu()], []
    for t, after in itertools.pairwise(times):
        v = velocity(x, t.expand(len(x)))
        x = x + (after - t) * v
        states.append(x.clone().cpu())
        velocities.append(v.clone().cpu())
    return states, velocities


@torch.no_grad()
def step_costs(velocity: Callable, noise: Tensor, times: Tensor) -> np.ndarray:
    """c(j, k), the mean over samples of `|x_j + (t_k - t_j) v_j - x_k|^2`; float64 `[K+1, K+1]`, zero for j >= k."""
    K, device = len(times) - 1, noise.device
    costs = np.zeros((K + 1, K + 1))
    for part in noise.split(CHUNK):
        states, velocities = rolled_out(velocity, part, times)
        for k in range(K + 1):
            goal = states[k].to(device)
            for start in range(0, k, STACK):
                rows = range(start, min(k, start + STACK))
                x, v = (torch.stack([of[j].to(device) for j in rows]) for of in (states, velocities))
                h = torch.stack([times[k] - times[j] for j in rows]).view(-1, *[1] * part.dim())
                for j, estimate in zip(rows, x + v * h, strict=True):
                    costs[j, k] += torch.sum(torch.square(estimate - goal)).item()
    return costs / len(noise)


def shortest_path(costs: np.ndarray, steps: int) -> list[int]:
    """The N + 1 places of the path of least cost."""
    K = len(costs) - 1
    least = np.full((steps + 1, K + 1), np.inf)  # from a place to the last, in so many steps
    least[1] = costs[:, K]
    for n in range(2, steps + 1):
        for j in range(K):
            for k in range(j + 1, K):
                least[n, j] = min(least[n, j], costs[j, k] + least[n - 1, k])
    path = [0]
    for n in range(steps, 1, -1):
        j = path[-1]
        path.append(next(k for k in range(j + 1, K) if costs[j, k] + least[n - 1, k] == least[n, j]))
    return [*path, K]


def write_examples(velocity: Callable, noise: Tensor, times: Tensor, path: list[int], folder: Path) -> None:
    """The ends of every interval of the path and their times, of each chunk of noises in a folder of its own."""
    for i, part in enumerate(noise.split(CHUNK)):
        states, _ = rolled_out(velocity, part, times)
        ends = list(itertools.pairwise(path))
        found = {name: torch.cat([states[pair[at]] for pair in ends]) for at, name in enumerate(("z0", "z1"))}
        for at, name in enumerate(("t0", "t1")):
            found[name] = torch.cat([torch.full((len(part),), times[pair[at]].item()) for pair in ends])
        there = folder / str(i)
        there.mkdir()
        for name, values in found.items():
            np.save(there / f"{name}.npy", values.numpy())


def read_examples(folder: Path) -> tuple[Tensor, ...]:
    """(z0, z1, t0, t1) of all chunks, on the CPU."""
    found = [[torch.from_numpy(np.load(part / f"{name}.npy")) for name in FILES] for part in sorted(folder.iterdir())]
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


def loss(student: nn.Module, z0: Tensor, z1: Tensor, t0: Tensor, t1: Tensor) -> Tensor:
    """The mean over features and examples of the squared difference to the secant."""
    h = (t1 - t0).view(-1, *[1] * (z0.dim() - 1))
    return torch.square(student(z0, t0) - (z1 - z0) / h).flatten(1).mean(1).mean()


@dataclass
class Average:
    """Moving averages of parameters, brought up to date one tensor after another."""

    weights: list[Tensor]
    most: float = 0.999
    count: int = 0

    @torch.no_grad()
    def update(self, parameters: list[nn.Parameter]) -> None:
        self.count += 1
        decay = min(self.most, (1 + self.count) / (10 + self.count))
        for mean, p in zip(self.weights, parameters, strict=True):
            mean.sub_((1 - decay) * (mean - p))


def training(
    student: nn.Module, examples: tuple[Tensor, ...], *, batch: int, lr: float, warmup: int, seed: int
) -> Iterator[list[Tensor]]:
    """Trains, an iteration whenever it is asked for the next; yields the averages of the student's parameters."""
    device = next(student.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    parameters = list(student.parameters())
    average = Average([p.detach().clone() for p in parameters])
    optimizer = torch.optim.Adam(parameters, lr=lr, betas=(0.9, 0.999), eps=1e-8)
    student.train()
    step = 0
    while True:
        drawn = torch.randperm(len(examples[0]), generator=generator)[:batch]
        z0, z1, t0, t1 = (values[drawn].to(device).float() for values in examples)
        optimizer.zero_grad()
        loss(student, z0, z1, t0, t1).backward()
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / warmup, 1.0)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average.update(parameters)
        step += 1
        yield average.weights
