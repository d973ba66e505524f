"""A bank shared by the ranks of a group: which trajectories each has, and batches that are the same whatever their
number."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flowkernels._checks import expect
from flowkernels.training.bank.batch import generator_on


@dataclass(frozen=True)
class ByRank:
    """Of n trajectories, of which the last `held_out` are not trained on, those of a rank, of `size` in all: of either
    part one W-th, with one beside where that is no whole number; as many on every rank, so that what is computed of
    them takes as many calls everywhere.

    Example b of a batch of B takes a trajectory between m b / B and m (b + 1) / B of the m that are trained on,
    uniformly: those of a rank's part of the batch, b from B rank / W on, are its own. Every rank draws the whole batch,
    which so does not depend on W.
    """

    n: int
    held_out: int = 0
    rank: int = 0
    size: int = 1

    @property
    def drawn(self) -> slice:
        """The trajectories of this rank that batches are drawn of."""
        m = self.n - self.held_out
        count = min(m, -(-m // self.size) + (m % self.size > 0))
        start = min(m * self.rank // self.size, m - count)
        return slice(start, start + count)

    @property
    def aside(self) -> slice:
        """Those that are held out."""
        count = -(-self.held_out // self.size)
        start = self.n - self.held_out + min(self.held_out * self.rank // self.size, self.held_out - count)
        return slice(start, start + count)

    @property
    def count(self) -> int:
        """Of both, which are kept in this order."""
        return self.drawn.stop - self.drawn.start + self.aside.stop - self.aside.start

    def of(self, rows: slice) -> list[slice]:
        """Those of this rank among some trajectories."""
        parts = [slice(max(rows.start, own.start), min(rows.stop, own.stop)) for own in (self.drawn, self.aside)]
        return [part for part in parts if part.start < part.stop]

    def places(self, sample: Tensor) -> Tensor:
        """Where trajectories of this rank are kept."""
        if self.size == 1:
            return sample
        behind = self.drawn.stop - self.drawn.start
        return torch.where(
            sample < self.n - self.held_out, sample - self.drawn.start, sample - self.aside.start + behind
        )

    def place(self, rows: slice) -> slice:
        """The same of what `of` has found."""
        behind = rows.start >= self.n - self.held_out
        first = self.drawn.start if not behind else self.aside.start - self.drawn.stop + self.drawn.start
        return slice(rows.start - first, rows.stop - first)

    def trajectories(self, device: torch.device) -> Tensor:
        """What is kept, in its order."""
        return torch.cat([torch.arange(own.start, own.stop, device=device) for own in (self.drawn, self.aside)])

    def part(self, n: int) -> slice:
        """This rank's of n in order."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def of_batch(self, batch: int) -> slice:
        """The examples of a batch that are this rank's."""
        expected = f"a multiple of the {self.size} ranks, which compute as many examples each"
        expect(batch % self.size == 0, "batch", expected, f"{batch}")
        return self.part(batch)

    def draw(self, batch: int, generator: torch.Generator, device: torch.device) -> Tensor:
        """The trajectories of all examples of a batch, int64 `[B]`."""
        m = self.n - self.held_out
        u = torch.rand(batch, generator=generator_on(device, generator), dtype=torch.float64, device=device)
        b = torch.arange(batch, device=device)
        last = ((b + 1) * m + batch - 1) // batch - 1  # which a sum that is rounded up would be beyond
        return torch.minimum(((b + u) * m / batch).long(), last)


def spread(ticket: int, chunks: int) -> int:
    """The place of the ticket-th chunk that is drawn, each once in `chunks`: those of some that follow each other are
    everywhere, so that a part of the bank is made anew by all ranks alike."""
    return ticket % chunks * _stride(chunks) % chunks


def _stride(chunks: int) -> int:
    """Near a golden section of the chunks, and without a divisor of theirs."""
    s = max(1, round(chunks * (math.sqrt(5) - 1) / 2))
    while math.gcd(s, chunks) != 1:
        s += 1
    return s
