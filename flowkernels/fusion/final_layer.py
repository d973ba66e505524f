"""What is fused of a head: the final nn.Linear, and what is done around it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class FinalLayer:
    """Where the trunk of a network ends, and what comes after.

    stop: path of the module at whose call the trunk ends. linear: of the nn.Linear that gives the velocity. None: the
        one that the network calls last, which is to be seen at its first call.
    arguments: `(net, layer, args, kwargs, also)`, with the arguments of that call and the output of the module `also`,
        to what `linear_euler` takes beside the Linear: z, and LayerNorm and modulation if any.
    patch, order: how the velocity lies in the outputs, as for `linear_euler`.
    computed: modules that `linear_euler` computes beside the Linear, with the class of which each has to be.
    """

    stop: str | None
    linear: str | None
    arguments: Callable[..., dict[str, Any]]
    also: str | None = None
    patch: int | None = None
    order: str = "pqc"
    computed: tuple[tuple[str, type[nn.Module]], ...] = ()


def after_trunk(net: nn.Module, layer: FinalLayer, args: tuple, kwargs: dict, also: Any) -> dict[str, Any]:
    """The `arguments` of a Linear alone: what it is called with."""
    return dict(z=args[0] if args else kwargs["input"])
