"""A batch of a bank, and what draws one."""

from typing import NamedTuple

import torch
from torch import Tensor


class BankBatch(NamedTuple):
    """A batch of a bank: the teacher's states at the knots `[N+1, n, *shape]`, float32 or float64, and of each of its
    examples the interval, 0..N-1, and the sample, 0..n-1; int64 `[B]`, where the states are.

    ends: the states are those at the ends of the examples' intervals alone, `[2, B, *shape]`, of a bank that is
    somewhere else; size: its n, where that has to be known. weight: factors on the examples' losses, `[B]`.
    conditioning: keyword arguments of the network by name, with a row for each example, which take the place of a
    `VelocityField`'s own; guidance: the name of the one that is the teacher's weight of guidance, where one is. times:
    the knots whose intervals these are, where known: a loss of others refuses the batch. part: (start, stop, of): the
    examples are those from start to stop of a batch of so many, of which others are computed apart; None is all. What a
    loss draws it draws for all of them, so that the parts together are the batch. first: the sample that the first of
    `states` is of, of a bank that a rank has a part of.

    Examples:
        >>> states = fk.rollout(lambda x, t: -x, torch.randn(16, 2), 20).x[[0, 10, 20]]
        >>> batch = fk.BankBatch(states, torch.randint(2, (8,)), torch.randint(16, (8,)))
    """

    states: Tensor
    interval: Tensor
    sample: Tensor
    ends: bool = False
    weight: Tensor | None = None
    size: int | None = None
    conditioning: dict[str, Tensor] | None = None
    guidance: str | None = None
    times: tuple[float, ...] | None = None
    part: tuple[int, int, int] | None = None
    first: int = 0

    def split(self, start: int, stop: int) -> "BankBatch":
        """The examples from start to stop, to be computed apart from the others (`part`)."""
        first, _, of = self.part or (0, 0, len(self.interval))
        rows, states, size = slice(start, stop), self.states, self.states.shape[1] if self.size is None else self.size
        if self.ends:
            states = states[:, rows]
        return self.examples(rows)._replace(states=states, size=size, part=(first + start, first + stop, of))

    @property
    def columns(self) -> Tensor:
        """Where the examples' samples are in `states`, `[B]`."""
        return self.sample - self.first if self.first else self.sample

    def examples(self, rows: slice) -> "BankBatch":
        """Some of the examples, on the same states."""
        weight = None if self.weight is None else self.weight[rows]
        given = None if self.conditioning is None else {k: v[rows] for k, v in self.conditioning.items()}
        parts = dict(interval=self.interval[rows], sample=self.sample[rows])
        return self._replace(**parts, weight=weight, conditioning=given)


def uniform(n: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """In [0, 1), float32 `[n]`, on a device, by `generator_on`."""
    return torch.rand(n, generator=generator_on(device, generator), dtype=torch.float32, device=device)


def generator_on(device: torch.device, generator: torch.Generator) -> torch.Generator:
    """To draw with on a device, where a run's generator is on the CPU: that itself there. On a GPU, whose queue a copy
    of what the CPU draws would have to wait for, one whose seed that draws: all that a checkpoint has to keep."""
    if device == generator.device:
        return generator
    seed = torch.randint(2**63 - 1, (), generator=generator, device="cpu").item()
    return torch.Generator(device).manual_seed(seed)
