"""What the processes of a group send each other: to all from all, a header with each piece, so that no two pieces of
different kinds meet."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

HEAD, INLINE = 32, 16 << 10  # int64s of a header; bytes that go with it, in one message
DIMS = HEAD - 7
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16)
DTYPES += (torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128)


@dataclass(frozen=True)
class Message:
    """Of one rank. status, turn, kind: numbers that `Ranks` gives. t: the tensor, flat; None where it has sent none.
    shape, dtype: the tensor's. is_far: whether it is on an accelerator."""

    status: int
    turn: int
    kind: int
    t: Tensor | None = None
    shape: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    is_far: bool = False


class Exchange:
    """Of a group. device: where headers travel, the CPU if the group has a backend for it."""

    def __init__(self, group: Any, size: int):
        self.group, self.size = group, size
        # such as "cpu:gloo,cuda:nccl"
        of = dict(entry.split(":") for entry in dist.get_backend_config(group).split(","))
        far = [device for device, backend in of.items() if device != "cpu" and backend != "gloo"]
        self.accelerator = far[0] if far else None  # whose tensors go directly
        self.device = self._device("cpu" if "cpu" in of else next(iter(of)))

    def _device(self, kind: str) -> torch.device:
        return (
            torch.device(kind) if kind == "cpu" else torch.device(kind, torch.get_device_module(kind).current_device())
        )

    def of_all(self, status: int, turn: int, kind: int, t: Tensor | None = None) -> list[Message]:
        """A message of every rank, those of this one being these: tensors of any shapes and dtypes, on the device of
        this rank's tensor, or where it has none on one of the kind that others have."""
        shape, is_far = () if t is None else tuple(t.shape), t is not None and t.device.type != "cpu"
        assert len(shape) <= DIMS
        bytes_of = None if t is None else _bytes_of(t.detach())
        nbytes = 0 if bytes_of is None else len(bytes_of)
        head = [status, turn, kind, nbytes, -1 if t is None else DTYPES.index(t.dtype), is_far, len(shape), *shape]
        head = torch.tensor(head + [0] * (HEAD - len(head)), dtype=torch.int64, device="cpu").view(torch.uint8)
        sent = torch.zeros(len(head) + INLINE, dtype=torch.uint8, device=self.device)
        sent[: len(head)] = head
        if 0 < nbytes <= INLINE:
            sent[len(head) : len(head) + nbytes] = bytes_of
        found = self._gathered(sent)
        heads = found[:, : len(head)].cpu().view(torch.int64).tolist()
        most, pieces = max(h[3] for h in heads), found[:, len(head) :]
        if most > INLINE and len({(h[1], h[2]) for h in heads}) == 1 and not any(h[0] for h in heads):
            far = self.accelerator is not None and all(h[5] for h in heads if h[4] >= 0)  # the same on every rank
            where = self._device(self.accelerator) if far else self.device
            sent = torch.empty(-(-most // 16) * 16, dtype=torch.uint8, device=where)
            if t is not None:
                sent[:nbytes] = bytes_of
            pieces = self._gathered(sent)
        device = None if t is None else t.device
        return [self._read(h, piece, device) for h, piece in zip(heads, pieces, strict=True)]

    def _gathered(self, sent: Tensor) -> Tensor:
        found = torch.empty(self.size, len(sent), dtype=torch.uint8, device=sent.device)
        dist.all_gather(list(found.unbind()), sent, group=self.group)
        return found

    def _read(self, head: list[int], piece: Tensor, device: torch.device | None) -> Message:
        status, turn, kind, nbytes, dtype, is_far, dims, *rest = head
        if dtype < 0 or nbytes > len(piece):
            return Message(status, turn, kind)
        t = piece[:nbytes].view(DTYPES[dtype])
        if device is None and is_far:
            device = self._device(self.accelerator or "cuda")
        return Message(status, turn, kind, t.to(device or "cpu"), tuple(rest[:dims]), DTYPES[dtype], bool(is_far))


def _bytes_of(t: Tensor) -> Tensor:
    flat = t.contiguous().view(-1)
    if len(flat) == 1:  # whose stride may be any number
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8)
