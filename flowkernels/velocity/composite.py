"""`Composite`: a velocity that is made of networks, each of which may be one with conditioning of its own."""

import copy
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor, nn

from flowkernels._checks import FLOATS, describe, expect, expect_tensor
from flowkernels.runtime.torch_private import COMPILED_CALL
from flowkernels.velocity.field import VelocityField
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
        return self._of(lambda net: net.rows(index, n) if isinstance(net, VelocityBase) else net)

    def without_conditioning(self, names: Collection[str]) -> "Composite":
        if not any(isinstance(net, VelocityBase) for net in self.parts()):
            return self
        return self._of(lambda net: net.without_conditioning(names) if isinstance(net, VelocityBase) else net)

    def with_conditioning(self, conditioning: Mapping[str, Any]) -> "Composite":
        """The same, each of its networks with further conditioning (`VelocityField.with_conditioning`)."""
        return self._of(lambda net: VelocityField.of(net).with_conditioning(conditioning))

    def _of(self, made: Callable[[nn.Module], nn.Module]) -> "Composite":
        """The same of other networks."""
        other = copy.copy(self)
        other.__dict__.pop(COMPILED_CALL, None)  # which calls this one
        other._modules = {
            name: nn.ModuleList([made(net) for net in part]) if isinstance(part, nn.ModuleList) else made(part)
            for name, part in self._modules.items()
        }
        return other

    def time_for(self, t: Tensor, x: Tensor) -> Tensor:
        return t


def expect_state(x: Any, t: Any) -> None:
    """A state `[n, *shape]`, and a time for each sample."""
    expect_tensor(x, "x", FLOATS), expect_tensor(t, "t", FLOATS)
    expect(x.dim() > 0, "x", "states [n, *shape]", x)
    expect(t.shape == x.shape[:1], "t", f"[{len(x)}], a time for each sample", t)


def answer_of(network: Callable, name: str, like: Tensor, x: Tensor, t: Tensor, **given: Any) -> Tensor:
    """A network's answer, of the shape of a state `like`. name: of the argument that it is. given: by name. Times that
    are integers are passed on as they are."""
    if given and isinstance(network, VelocityField):
        network, given = network.with_conditioning(given), {}
    v = network(x, resolve(network).time_for(t, x) if t.is_floating_point() else t, **given)
    if not isinstance(v, Tensor) or v.shape != like.shape:
        expect(False, name, f"an answer of x's shape {list(like.shape)}", describe(v))
    return v
