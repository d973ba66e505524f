"""`Composite`: a velocity that is made of networks, each of which may be one with conditioning of its own."""

import copy
from typing import Any

from torch import Tensor, nn

from flowkernels._checks import describe, expect
from flowkernels.runtime.torch_private import COMPILED_CALL
from flowkernels.velocity.protocol import VelocityBase, resolve


class Composite(nn.Module, VelocityBase):
    """What students of networks share: their conditioning follows the samples, and each rounds its own times."""

    def parts(self) -> list[nn.Module]:
        """The networks."""
        lists = ([*part] if isinstance(part, nn.ModuleList) else [part] for part in self._modules.values())
        return [part for parts in lists for part in parts]

    @property
    def conditioning(self) -> dict[str, Any]:
        """That of the first network."""
        return dict(resolve(self.parts()[0]).conditioning)

    @property
    def shared(self) -> tuple[str, ...]:
        return resolve(self.parts()[0]).shared

    def rows(self, index: Tensor | slice, n: int) -> "Composite":
        if not any(isinstance(net, VelocityBase) for net in self.parts()):
            return self
        some = copy.copy(self)
        some.__dict__.pop(COMPILED_CALL, None)  # which calls this one
        some.__dict__["_modules"] = {name: _rows(part, index, n) for name, part in self._modules.items()}
        return some

    def time_for(self, t: Tensor, x: Tensor) -> Tensor:
        return t


def _rows(part: nn.Module, index: Tensor | slice, n: int) -> nn.Module:
    if isinstance(part, nn.ModuleList):
        return nn.ModuleList([_rows(net, index, n) for net in part])
    return part.rows(index, n) if isinstance(part, VelocityBase) else part


def answer_of(network: nn.Module, name: str, like: Tensor, x: Tensor, t: Tensor, **given: Any) -> Tensor:
    """A network's answer, of the shape of a state `like`. name: of the argument that it is."""
    v = network(x, resolve(network).time_for(t, x), **given)
    if not isinstance(v, Tensor) or v.shape != like.shape:
        expect(False, name, f"an answer of x's shape {list(like.shape)}", describe(v))
    return v
