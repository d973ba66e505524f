"""Where the final layer of a network begins: found in one call of it, by what it runs and not by its class."""

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from flowkernels.fusion.stand_in import running


@dataclass(frozen=True)
class FinalLayer:
    """stop: path of the module whose call begins it. given: which of its arguments the tokens are, by number or name.
    linear: of the module that runs the linear layer."""

    stop: str
    given: int | str
    linear: str


class _Layers(TorchFunctionMode):
    """The last linear layer that a call runs, in the module `head` or one inside it, and where it could be entered."""

    def __init__(self, net: nn.Module, head: str | None):
        super().__init__()
        self.head, self.paths = head, {id(m): name for name, m in net.named_modules()}
        self.linear: str | None = None
        self.entries: list[tuple[str, int | str]] = []
        self.norm: list[tuple[str, int | str]] = []
        self.made: list[tuple] = []  # by the last few functions, and how their module was called

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is nn.functional.linear:
            self._see_linear(args[0] if args else kwargs["input"])
        elif function is nn.functional.layer_norm:
            self.norm = self._entry((args[0] if args else kwargs["input"]).shape)
        out = function(*args, **kwargs)
        if isinstance(out, Tensor):
            self.made = [*self.made[-3:], (weakref.ref(out), self._entry(out.shape))]
        return out

    def _see_linear(self, features: Tensor) -> None:
        linear = next((path for path, _, _ in self._running()), None)
        inside = linear is not None and (self.head in (None, "", linear) or linear.startswith(f"{self.head}."))
        if inside:
            made = next((entry for made, entry in reversed(self.made) if made() is features), [])
            self.linear = linear
            self.entries = list(dict.fromkeys((*self.norm, *made, *self._entry(features.shape))))

    def _running(self) -> Iterator[tuple[str, tuple, dict]]:
        return ((self.paths[id(m)], args, kwargs) for m, args, kwargs in running() if id(m) in self.paths)

    def _entry(self, shape) -> list[tuple[str, int | str]]:
        """The innermost module that runs, if it was called with tokens of this shape."""
        for path, args, kwargs in self._running():
            given = (*enumerate(args), *kwargs.items())
            return [(path, k) for k, t in given if isinstance(t, Tensor) and t.shape == shape and t.dim() >= 2][:1]
        return []


def find(net: nn.Module, head: str | None, call: Callable[[], object]) -> tuple[object, str | None, list[FinalLayer]]:
    """What `call()`, an evaluation of the network, gives; the linear layer that comes last, and where its final layer
    may begin: at a LayerNorm, at a module that makes what the linear layer reads, at this layer itself."""
    with _Layers(net, head) as layers:
        out = call()
    return out, layers.linear, [FinalLayer(stop, given, layers.linear) for stop, given in layers.entries]
