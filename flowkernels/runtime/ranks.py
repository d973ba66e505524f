"""Processes of torch.distributed that do one piece of work together: ranks of a group, each with a slice of it."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from flowkernels._checks import describe, expect

Group = Any  # a torch.distributed.ProcessGroup; torch without distributed has no such name


class Ranks:
    """The processes of a group, in which every one makes the same calls in the same order.

        ranks = Ranks(group)
        rows = ranks.part(len(noise))            # of n samples, those of this rank: slices of equal size, or one more
        ends = ranks.gathered(run(noise[rows]), len(noise))

    group: a `torch.distributed.ProcessGroup`, such as `torch.distributed.group.WORLD`; None is this process alone, of
    which nothing is sent. size, rank: the number of processes, and which of them this is.
    What comes back is the same on every rank, bit for bit.
    """

    def __init__(self, group: Group | None = None, name: str = "group"):
        if group is None:
            self.group, self.size, self.rank = None, 1, 0
            return
        there = dist.is_available() and dist.is_initialized()
        expected = "a torch.distributed.ProcessGroup (torch.distributed.init_process_group() makes the first), or None"
        expect(there and isinstance(group, dist.ProcessGroup), name, expected, describe(group), TypeError)
        self.group, self.size, self.rank = group, dist.get_world_size(group), dist.get_rank(group)
        expect(self.rank >= 0, name, "a group that this process is in", f"one without rank {dist.get_rank()}")

    @property
    def is_alone(self) -> bool:
        return self.size == 1

    def part(self, n: int, rank: int | None = None) -> slice:
        """Of n samples in order those of a rank, None this one."""
        r = self.rank if rank is None else rank
        return slice(n * r // self.size, n * (r + 1) // self.size)

    def gathered(self, rows: Tensor, n: int, dim: int = 0) -> Tensor:
        """All n samples, of which `rows` are those of this rank's part, along a dimension."""
        if self.is_alone:
            return rows
        parts = [self.part(n, r) for r in range(self.size)]
        most = max(p.stop - p.start for p in parts)
        mine = rows.movedim(dim, 0).contiguous()
        if len(mine) < most:
            mine = torch.cat([mine, mine.new_zeros(most - len(mine), *mine.shape[1:])])
        found = [torch.empty_like(mine) for _ in parts]
        dist.all_gather(found, mine, group=self.group)
        return torch.cat([f[: p.stop - p.start] for f, p in zip(found, parts, strict=True)]).movedim(0, dim)

    def total(self, t: Tensor) -> Tensor:
        """The sum over the ranks, added in their order."""
        if self.is_alone:
            return t
        found = [torch.empty_like(t) for _ in range(self.size)]
        dist.all_gather(found, t.contiguous(), group=self.group)
        return torch.stack(found).sum(0)

    def from_first(self, value: Any) -> Any:
        """What the first rank has, plain values and tensors on the CPU."""
        if self.is_alone:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=dist.get_global_rank(self.group, 0), group=self.group)
        return box[0]

    def of_each(self, value: Any) -> list[Any]:
        """What each rank has, plain values."""
        if self.is_alone:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found

    def expect_same(self, settings: Mapping[str, Any]) -> None:
        """ValueError, on every rank, naming the first of the settings, in plain values, that is not everywhere what it
        is on the first rank."""
        each = self.of_each({key: repr(value) for key, value in settings.items()})
        for key in sorted(set().union(*each)):
            for rank, of in enumerate(each):
                got, first = of.get(key, "nothing"), each[0].get(key, "nothing")
                expect(
                    got == first,
                    key,
                    f"the same on every rank, {_short(first)} as on rank 0",
                    f"{_short(got)} on rank {rank}",
                )

    def wait(self) -> None:
        """Until every rank is here."""
        if not self.is_alone:
            dist.barrier(group=self.group)


def _short(text: str) -> str:
    return text if len(text) < 100 else f"{text[:60]}.. (sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]})"
