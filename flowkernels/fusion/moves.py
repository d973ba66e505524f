"""Whether what a network returns is the output of one of its modules, only moved; and whether it looks at values."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from flowkernels._checks import FLOATS
from flowkernels.runtime.torch_private import (
    DisableTorchFunction,
    OpOverload,
    TorchDispatchMode,
    tree_leaves,
    uncompiled,
)

SHAPE_OF = ("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like")  # and new_*
TORCH, HERE = (os.path.join(folder, "") for folder in (os.path.dirname(torch.__file__), Path(__file__).parents[1]))
COPIES = ("clone", "_to_copy", "neg", "cat", "stack", "pixel_shuffle", "col2im")  # views are known by their memory


class Refused(Exception):
    """What the network does that is none of that, and where."""


class Moves(TorchDispatchMode):
    """Operations in which the tensors that are followed take no part but to be moved, copied and negated.

    Beside each memory that holds entries of the followed tensor lies one of the same form with their places, counted
    from 1, negative where the entry is. Whatever else is done with one of them, values that are read on the host
    anywhere, and writes to what was there before the tensor, which whoever stops there would miss, are refused.
    """

    supports_higher_order_operators = True

    def __init__(self):
        super().__init__()
        self._places: dict[int, tuple[Tensor, Tensor]] = {}  # by the address of a storage: a tensor on it, its places
        self._made: dict[int, Tensor] = {}  # since the tensor is followed; kept, so that no other takes its address
        self._reads = _HostReads(self)
        self._refused: Refused | None = None
        self.followed = 0
        self.linear: list[Tensor] = []  # the weight and the bias that F.linear was called with last

    def run(self, call: Callable[[], Any]) -> Any:
        """`call()`, looked at; raises Refused also where the call has caught it, or made another error of it."""
        try:
            with uncompiled(), self._reads, self:
                return call()
        finally:
            if self._refused is not None:
                raise self._refused

    def follow(self, t: Tensor) -> None:
        self.followed += 1
        self._keep(t, torch.arange(1, t.numel() + 1, device="cpu").view(t.shape))

    def places(self, t: Tensor) -> Tensor | None:
        """Of t's entries the signed places in the followed tensor, from 1, and 0 for others; None if t has none."""
        if _storage(t) not in self._places:
            return None
        on, places = self._places[_storage(t)]
        self.expect(t.dtype == on.dtype and not t.is_neg() and not t.is_conj(), f"reads the velocity as {t.dtype}")
        return places.as_strided(t.shape, t.stride(), t.storage_offset())

    def holds(self, args: Any) -> bool:
        return any(isinstance(t, Tensor) and _storage(t) in self._places for t in tree_leaves(args))

    def expect(self, ok: bool, what: str) -> None:
        if not ok:
            self._refused = self._refused or Refused(what + _where())
            raise self._refused

    def _keep(self, t: Tensor, places: Tensor) -> None:
        size = t.untyped_storage().nbytes() // t.element_size()
        flat = torch.zeros(size, dtype=torch.int64, device="cpu")
        flat.as_strided(t.shape, t.stride(), t.storage_offset()).copy_(places)
        self._places[_storage(t)] = t, flat

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        held = self.holds((args, kwargs))
        if not isinstance(function, OpOverload):  # a higher-order operator
            chooses = any(word in function.name() for word in ("cond", "while"))
            self.expect(not chooses, f"chooses by a value ({function.name()})")
            self.expect(not held, _more(function.name()))
            return function(*args, **kwargs)
        with self:  # what inference mode hands on whole; of other operations this does nothing
            out = function.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
        name = function._schema.name.split("::")[1]
        looks = _reads_values(function, args, kwargs) and not _is_own_read()
        self.expect(not looks, f"looks at values on the host ({name})")
        if self.followed and function._schema.is_mutable:
            self.expect(not held, _more(name))
            before = any(_storage(t) not in self._made for t in _written(function, args, kwargs))
            self.expect(not before, f"writes ({name}) to a tensor from before the velocity was there")
        out = function(*args, **kwargs)
        given = {_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        tensors = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        new = [t for t in tensors if _storage(t) not in given]
        if not held or name in SHAPE_OF or name.startswith("new_"):
            if self.followed:
                self._made.update((_storage(t), t) for t in new)
        else:
            self.expect(bool(tensors) and (not new or (name in COPIES and out is new[0])), _more(name))
            if new:
                self._keep(out, self._moved(function, name, args, kwargs, out))
        return out

    def _moved(self, function, name: str, args: tuple, kwargs: dict, out: Tensor) -> Tensor:
        """The places of the entries of a copy."""
        self.expect(out.dtype in FLOATS, f"makes {out.dtype} of the velocity")

        def of(t):
            places = self.places(t)
            self.expect(places is not None, f"mixes the velocity with other values ({name})")
            return places

        if name in ("clone", "_to_copy"):
            return of(args[0])
        if name in ("cat", "stack"):
            return function([of(t) for t in args[0]], *args[1:], **kwargs)
        if name == "col2im":  # a sum, where patches overlap, which is not known for integers
            return function(of(args[0]).double(), *args[1:], **kwargs).long()
        return function(of(args[0]), *args[1:], **kwargs)


class _HostReads(TorchFunctionMode):
    """Of the values that reach the host, those that are no operation to a `TorchDispatchMode`."""

    READS = (Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__)
    MEMORY = (Tensor.data_ptr, Tensor.untyped_storage, Tensor.storage)

    def __init__(self, moves: Moves):
        super().__init__()
        self.moves = moves

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.linear:
            self.moves.linear = [t for t in (*args[1:], *(kwargs or {}).values()) if t is not None]
        reads = function in self.READS
        self.moves.expect(not reads, f"looks at values on the host ({getattr(function, '__name__', '')})")
        taken = function in self.MEMORY and self.moves.holds(args)
        self.moves.expect(not taken, f"takes the memory of the velocity ({getattr(function, '__name__', '')})")
        return function(*args, **(kwargs or {}))


def _storage(t: Tensor) -> int | None:
    try:
        with DisableTorchFunction():
            return t.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse, or opaque
        return None


def _more(what: str) -> str:
    return f"does more with the velocity than to move it ({what})"


def _reads_values(function: OpOverload, args: tuple, kwargs: dict) -> bool:
    """Whether Python learns from it what a tensor holds, or how long a result is that depends on that."""
    if torch.Tag.data_dependent_output in function.tags:
        return True
    if torch.Tag.dynamic_output_shape not in function.tags or kwargs.get("output_size") is not None:
        return False
    if function is torch.ops.aten.index.Tensor:
        return any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
    return True


def _written(function: OpOverload, args: tuple, kwargs: dict) -> list[Tensor]:
    given = dict(zip((a.name for a in function._schema.arguments), args, strict=False)) | kwargs
    written = (a for a in function._schema.arguments if a.alias_info is not None and a.alias_info.is_write)
    return [t for t in tree_leaves([given.get(a.name) for a in written]) if isinstance(t, Tensor)]


def _outside(*passed: str):
    """The innermost frame of code in none of these folders."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith((*passed, "<")):
        frame = frame.f_back
    return frame


def _is_own_read() -> bool:
    """Of conditioning, which is compared where two calls of guidance are packed into one."""
    frame = _outside(TORCH, __file__)
    return frame is not None and frame.f_code.co_filename == os.path.join(HERE, "velocity", "field.py")


def _where() -> str:
    """The innermost line that is neither torch's nor the library's."""
    if (frame := _outside(TORCH, HERE)) is None:
        return ""
    return f", in {frame.f_code.co_name} at {os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
