"""Where a bank's states are kept in memory, and how a batch's are gathered: storage "device", "pinned" or "shared"."""

import shutil
from pathlib import Path

import torch
from torch import Tensor

from flowkernels._checks import expect, expect_room
from flowkernels.ops.library import fresh

MEMORIES = ("device", "pinned", "shared")
SHARED_MEMORY = Path("/dev/shm")  # where Linux has it: less than the machine's memory, and a program that fills it dies


class Memory:
    """States `[M, n, *shape]` and columns of conditioning `[n, ...]`, of M knots and n trajectories, in chunks.

    kind: "device": on the device; "pinned": on the host, page-locked where the device is a GPU; "shared": on the host,
    in memory that other processes may be handed.
    tickets: of each chunk the number of its draw, None before it is there.
    """

    def __init__(self, kind: str, device: torch.device, size: int, chunks: int):
        self.kind, self.device, self.size = kind, device, size
        self.states: Tensor | None = None
        self.columns: dict[str, Tensor] = {}
        self.tickets: list[int | None] = [None] * chunks

    def expect_space(self, nbytes: int, todo: int) -> None:
        """That the bank fits. todo: bytes of the chunks that are still to be made."""
        got = f"{self.size}"
        if self.kind == "device" and self.device.type == "cuda":
            expect_fits(nbytes, torch.cuda.get_device_properties(self.device).total_memory, f"{self.device}'s", got)
            return
        expect_room(nbytes, "size", "trajectories", got)
        if self.kind == "shared" and SHARED_MEMORY.is_dir() and self.states is None:
            expect_fits(nbytes, shutil.disk_usage(SHARED_MEMORY).free, "shared", got)

    def into(self, k: int, rows: slice, knots: int, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Where the states `[M, m, *shape]` of a chunk are to be written, which is none until it is `put`."""
        self.tickets[k] = None
        if self.states is None:
            self.states = self._new(dtype, knots, self.size, *like.shape[1:])
        return self.states[:, rows]

    def put(self, k: int, rows: slice, states: Tensor, columns: dict[str, Tensor], ticket: int, start: str) -> None:
        """That a chunk's states are written; with its conditioning."""
        for key, column in columns.items():
            if key not in self.columns:
                self.columns[key] = self._new(column.dtype, self.size, *column.shape[1:])
            self.columns[key][rows].copy_(column)
        self.tickets[k] = ticket

    def settle(self) -> None:
        """Wait for copies of states to the host; the states are another tensor from now on, of the same memory, so that
        what was made of those before is not taken for theirs."""
        self.states = self.states.view_as(self.states)
        if self.kind != "device" and self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def _new(self, dtype: torch.dtype, *shape: int) -> Tensor:
        if self.kind == "device":
            return fresh(torch.empty(shape, dtype=dtype, device=self.device))
        if self.kind == "shared":
            return torch.empty(shape, dtype=dtype, device="cpu").share_memory_()
        return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=self.device.type == "cuda")

    def ends(self, first: Tensor, last: Tensor, sample: Tensor) -> Tensor:
        """The states `[2, B, *shape]` of samples at their first and their last knots, indices where the states are."""
        flat, n = self.states.flatten(0, 1), self.size
        out = staged(self.device, flat.dtype, 2 * len(sample), *flat.shape[1:]) if flat.is_cpu else None
        found = torch.index_select(flat, 0, torch.cat([first * n + sample, last * n + sample]), out=out)
        return found.view(2, len(sample), *flat.shape[1:])

    def rows(self, sample: Tensor) -> dict[str, Tensor]:
        """The conditioning of samples, by name."""
        return {key: column.index_select(0, sample) for key, column in self.columns.items()}

    def knots(self, places: list[int], count: int, dtype: torch.dtype) -> Tensor:
        """The first trajectories' states at some of the knots `[len(places), count, *shape]`, on the device."""
        return self.states[places, :count].to(self.device, dtype)


def staged(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    """Memory on the host for what goes to a device: page-locked for a GPU, whose queue nothing then waits for. It is
    not given away before the copy is done: torch's allocator of such memory sees to that."""
    return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=device.type == "cuda")


def expect_fits(nbytes: int, there: int, what: str, got: str) -> None:
    told = f"{got}: {nbytes / 2**30:.3g} GiB of trajectories"
    expect(nbytes <= there, "size", f"what fits into {there / 2**30:.3g} GiB of {what} memory", told)
