"""The average of a student's weights over its training."""

import torch
from torch import Tensor, nn

from flowkernels._checks import LOW
from flowkernels.runtime.torch_private import lerp_each_
from flowkernels.training.students.modules import copied


class Average(nn.Module):
    """Exponential moving average whose decay grows to `decay` as (1+n)/(10+n), so that short runs are not held back.
    Buffers are the student's last.

    module: a copy of the student with the averaged weights, those of bfloat16 and float16 in float32: a step of the
    average is mostly smaller than their rounding, and would be lost. n_averaged: how many there were, on the CPU, of
    which nothing has to be waited for. The state dict is that of torch's AveragedModel.
    """

    def __init__(self, student: nn.Module, decay: float):
        super().__init__()
        self.module, self.decay = copied(student), decay
        self.register_buffer("n_averaged", torch.zeros((), dtype=torch.int64, device="cpu"))
        groups: dict[tuple, tuple[list[Tensor], list[Tensor]]] = {}
        for own, p in zip(self.module.parameters(), student.parameters(), strict=True):
            if own.dtype in LOW:
                own.data = own.data.float()
            alike = groups.setdefault((p.device, p.dtype), ([], []))
            alike[0].append(own), alike[1].append(p)
        self._groups = list(groups.values())
        self._held = list(zip(_holders(self.module), _holders(student), strict=True))

    @torch.no_grad()
    def update(self) -> None:
        """Add the student's weights as they are now."""
        n = int(self.n_averaged)
        rate = min(self.decay, (1 + n) / (10 + n)) if n else 0.0
        for own, new in self._groups:
            if n and own[0].is_floating_point():
                lerp_each_(own, [p.to(own[0].dtype) for p in new] if new[0].dtype in LOW else new, 1 - rate)
            else:
                for a, p in zip(own, new, strict=True):
                    a.copy_(p)
        for (own, name), (part, _) in self._held:
            getattr(own, name).copy_(getattr(part, name))
        self.n_averaged += 1


def _holders(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """The module that has it and its name there, of each buffer: a forward may put another in its place."""
    return [(part, name) for part in module.modules() for name, _ in part.named_buffers(recurse=False)]
