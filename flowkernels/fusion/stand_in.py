"""What becomes of a tensor in the rest of a network's call: seen by a stand-in that has its shape and no values.

From where the final layer begins a call of the network runs on a stand-in. A LayerNorm, factors and terms of it are
noted, then a linear layer, then moves of its outputs; whatever else is done with one is refused. What the call returns
tells what there was. So nothing is assumed of the network, neither its class nor what it was at an earlier call.
"""

import itertools
import os
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowkernels._checks import FLOATS
from flowkernels.runtime.torch_private import (
    CALL_MODULE,
    DisableTorchFunctionSubclass,
    OpOverload,
    without_memory,
)

VIEWS = {
    *("view", "_unsafe_view", "_reshape_alias", "reshape", "permute", "transpose", "t", "movedim", "unsqueeze"),
    *("squeeze", "expand", "slice", "select", "narrow", "split", "split_with_sizes", "unbind", "unfold"),
    *("as_strided", "detach", "alias"),
}
COPIES = {
    *("clone", "_to_copy", "neg", "cat", "stack", "flip", "roll", "repeat", "pixel_shuffle", "pixel_unshuffle"),
    "col2im",
}
READS = {
    *(Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.__repr__, Tensor.__format__),
    *(Tensor.data_ptr, Tensor.untyped_storage, Tensor.storage, Tensor.__reduce_ex__, Tensor.__deepcopy__),
}
PLAIN = (Tensor, nn.Parameter)
TORCH, HERE = (os.path.join(folder, "") for folder in (os.path.dirname(torch.__file__), Path(__file__).parents[1]))


class Refused(Exception):
    """What the network does that is none of that, and where."""


@dataclass(frozen=True)
class Features:
    """`norm(z) factor + term`, which a linear layer is to read. casts: what the network rounds it to meanwhile."""

    z: Tensor
    norm: float | None = None  # eps of a LayerNorm
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    factor: Any = None
    term: Any = None
    casts: frozenset[torch.dtype] = frozenset()

    @property
    def is_bare(self) -> bool:
        return self.norm is None and self.factor is None and self.term is None


@dataclass(frozen=True)
class Head:
    """A linear layer of features: its outputs are the velocity, only moved. versions: of what `tensors` gives, as the
    layer read them."""

    features: Features
    weight: Tensor
    bias: Tensor | None
    versions: tuple[int | None, ...] = ()

    def tensors(self) -> list[Tensor]:
        f = self.features
        found = (f.z, f.norm_weight, f.norm_bias, f.factor, f.term, self.weight, self.bias)
        return [t for t in found if isinstance(t, Tensor)]

    def stays(self) -> bool:
        """Whether what it reads is there still, as it was."""
        now = self.tensors()
        there = all(t.numel() == 0 or t.untyped_storage().nbytes() > 0 for t in now)
        return there and tuple(map(_version, now)) == self.versions


@dataclass(frozen=True)
class Outputs:
    """Those of a head, moved in the way `way`. places: where each came from, counted from 1, negative where it is
    negated; None where nobody asks."""

    head: Head
    way: int
    places: Tensor | None


class Ways:
    """Numbers for what is done with outputs: the same for the same operations on the same numbers."""

    def __init__(self):
        self._known: dict[tuple, int] = {}
        self._next = itertools.count()

    def __call__(self, *what) -> int:
        return self._known.setdefault(what, next(self._next))


@dataclass
class Tail:
    """The rest of one evaluation. with_places: the places of the outputs are followed. calls: how many calls it is made
    of; of several, a later one may write where an earlier one has left what its final layer reads."""

    ways: Ways
    with_places: bool
    calls: int = 1
    refused: Refused | None = None
    over: bool = False
    begun: int = 0
    _made: list = field(default_factory=list)
    _heads: list[Head] = field(default_factory=list)

    def begin(self, z: Tensor) -> "StandIn":
        """In the place of z, what the final layer is called with."""
        self.begun += 1
        if isinstance(z, StandIn):
            return z
        plain = type(z) in PLAIN and z.layout is torch.strided and z.dtype in FLOATS and z.dim() >= 2
        self.expect(plain, f"calls its final layer with a {type(z).__name__}")
        return self.make(_meta(z), z.device, Features(z.detach()))

    def make(self, meta: Tensor, device: torch.device, value: Features | Outputs) -> "StandIn":
        made = StandIn(meta, device, self, value)
        self._made.append(weakref.ref(made))
        return made

    def expect(self, ok: bool, what: str) -> None:
        if not ok:
            self.refused = self.refused or Refused(what + _where())
            raise self.refused

    def head(self, features: Features, weight: Tensor, bias: Tensor | None) -> Head:
        if self.calls > 1:
            names = ("z", "factor", "term")
            given = {name: getattr(features, name) for name in names}
            features = replace(features, **{k: t.clone() for k, t in given.items() if isinstance(t, Tensor)})
        head = Head(features, weight.detach(), _detached(bias))
        self._heads.append(replace(head, versions=tuple(map(_version, head.tensors()))))
        return self._heads[-1]

    def end(self) -> None:
        """Of the evaluation, after which nothing may hold a stand-in."""
        self.over = True
        if not all(head.stays() for head in self._heads):
            self.refused = self.refused or Refused("writes to what its final layer has read, or frees it")
        if any(made() is not None for made in self._made):
            self.refused = self.refused or Refused("keeps its velocity, or a part of it, beyond the call")
        if self.refused is not None:
            raise self.refused


class StandIn(Tensor):
    meta: Tensor
    tail: Tail
    value: Features | Outputs

    @staticmethod
    def __new__(cls, meta: Tensor, device: torch.device, tail: Tail, value: Features | Outputs):
        made = without_memory(
            cls,
            meta.shape,
            strides=meta.stride(),
            storage_offset=meta.storage_offset(),
            dtype=meta.dtype,
            device=device,
        )
        made.meta, made.tail, made.value = meta, tail, value
        return made

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        own = _SEEN_WHOLE.get(function)
        if own is not None or function in READS:
            tail = next(a for a in (*args, *kwargs.values()) if isinstance(a, StandIn)).tail
            tail.expect(own is not None and not tail.over, _reads(getattr(function, "__name__", "")))
            return own(tail, *args, **kwargs)
        with DisableTorchFunctionSubclass():
            return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        given = [t for t in _tensors(args, kwargs) if isinstance(t, StandIn)]
        tail = given[0].tail
        tail.expect(not tail.over, "uses its velocity after the call")
        tail.expect(isinstance(function, OpOverload), _more(str(function)))
        out = function.decompose(*args, **kwargs)  # what inference mode hands on whole
        if out is not NotImplemented:
            return out
        name = function._schema.name.split("::")[1]
        if name.startswith("new_") or name in ("zeros_like", "ones_like", "full_like", "empty_like"):
            kwargs["device"] = kwargs.get("device") or given[0].device
            return function(*_replaced(args, _as_meta), **kwargs)
        tail.expect(not function._schema.is_mutable, _more(name))
        tail.expect(name != "_local_scalar_dense", _reads(name))
        device = kwargs.get("device") or given[0].device
        tail.expect(torch.device(device) == given[0].device, "takes its velocity to another device")
        kwargs = {k: v for k, v in kwargs.items() if k != "device"}
        if all(isinstance(s.value, Outputs) for s in given):
            return _moved(tail, function, name, args, kwargs, given)
        return _modulated(tail, function, name, args, kwargs, given)


# ---- before the linear layer ----


def _modulated(tail: Tail, function, name: str, args: tuple, kwargs: dict, given: list[StandIn]) -> StandIn:
    stand, value = given[0], given[0].value
    tail.expect(len(given) == 1 and isinstance(value, Features), _more(name))
    if name in ("detach", "alias", "clone"):
        return tail.make(function(stand.meta, **kwargs), stand.device, value)
    if name == "_to_copy":
        meta = function(stand.meta, **kwargs)
        tail.expect(meta.dtype in FLOATS, f"makes {meta.dtype} of its final layer's input")
        return tail.make(meta, stand.device, replace(value, casts=value.casts | {meta.dtype}))
    others = [a for a in args if a is not stand]
    simple = len(args) == 2 and kwargs.get("alpha", 1) == 1 and isinstance(others[0], (Tensor, int, float))
    tail.expect(name in ("mul", "add") and simple, f"does more in its final layer than linear_euler does ({name})")
    other = others[0].detach() if isinstance(others[0], Tensor) else others[0]
    shape = other.shape if isinstance(other, Tensor) else ()
    sizes = zip(reversed(shape), reversed(stand.shape), strict=False)
    tail.expect(
        len(shape) <= stand.dim() and all(a in (1, b) for a, b in sizes),
        f"spreads its final layer's input over more dimensions ({name})",
    )
    dtype = torch.result_type(stand.meta, other)
    meta = torch.empty_strided(stand.shape, stand.stride(), dtype=dtype, device="meta")
    factor, term = value.factor, value.term
    if name == "mul":
        factor = other if factor is None else factor * other
        term = term if term is None else term * other
    else:
        term = other if term is None else term + other
    return tail.make(meta, stand.device, replace(value, factor=factor, term=term))


def _layer_norm(tail: Tail, input, normalized_shape, weight=None, bias=None, eps=1e-5) -> StandIn:
    value, bare = input.value, isinstance(input.value, Features) and input.value.is_bare
    tail.expect(bare and tuple(normalized_shape) == input.shape[-1:], _more("layer_norm"))
    _expect_plain(tail, weight, bias)
    dtype = _autocast(input, torch.float32) or input.dtype
    meta = torch.empty_strided(input.shape, input.stride(), dtype=dtype, device="meta")
    return tail.make(
        meta, input.device, replace(value, norm=eps, norm_weight=_detached(weight), norm_bias=_detached(bias))
    )


def _linear(tail: Tail, input, weight, bias=None) -> StandIn:
    features = isinstance(input, StandIn) and isinstance(input.value, Features)
    tail.expect(features, _more("linear"))
    _expect_plain(tail, weight, bias)
    value = input.value
    low = _autocast(input, None)
    least = _narrowest(value.z.dtype, weight.dtype, *([] if low is None else [low]))
    wide = all(torch.promote_types(dtype, least) == dtype for dtype in value.casts)
    tail.expect(wide, "rounds its final layer's input to fewer digits")
    shape, dtype = (*input.shape[:-1], len(weight)), low or weight.dtype
    meta = torch.empty(shape, dtype=dtype, device="meta")
    places = torch.arange(1, meta.numel() + 1, device="cpu").view(shape) if tail.with_places else None
    way = tail.ways("linear", value.z.shape, value.z.dtype, shape, dtype)
    return tail.make(meta, input.device, Outputs(tail.head(value, weight, bias), way, places))


def _autocast(t: Tensor, dtype: torch.dtype | None) -> torch.dtype | None:
    """Of results, where autocast is on."""
    kind = t.device.type
    if not torch.is_autocast_enabled(kind):
        return None
    return dtype or torch.get_autocast_dtype(kind)


def _narrowest(*dtypes: torch.dtype) -> torch.dtype:
    return max(dtypes, key=lambda d: torch.finfo(d).eps)


def _expect_plain(tail: Tail, *parameters) -> None:
    for t in parameters:
        ok = t is None or (type(t) in PLAIN and t.layout is torch.strided and t.dtype in FLOATS)
        said = "" if t is None else f"a {type(t).__name__} of {t.dtype}"
        tail.expect(ok, f"has {said} for a parameter of its final layer")


def _detached(t: Tensor | None) -> Tensor | None:
    return t if t is None else t.detach()


def _version(t: Tensor) -> int | None:
    return None if t.is_inference() else t._version


def _reads_shape(tail: Tail, stand):
    return stand


_SEEN_WHOLE: dict[Any, Callable] = {
    nn.functional.linear: _linear,
    nn.functional.layer_norm: _layer_norm,
    Tensor.data.__get__: _reads_shape,  # the same without a history
}


# ---- behind it ----


def _moved(tail: Tail, function, name: str, args: tuple, kwargs: dict, given: list[StandIn]) -> Any:
    tensors = _tensors(args, kwargs)
    tail.expect(name in VIEWS or name in COPIES, _more(name))
    tail.expect(len(tensors) == len(given), f"mixes the velocity with other values ({name})")
    head = given[0].value.head
    tail.expect(all(s.value.head is head for s in given), f"mixes velocities of two calls ({name})")
    out = function(*_replaced(args, _as_meta), **kwargs)
    for dtype in {meta.dtype for meta in _several(out)} - {s.dtype for s in given}:
        kept = name == "_to_copy" and dtype in FLOATS and torch.promote_types(dtype, given[0].dtype) == dtype
        tail.expect(kept, f"makes {dtype} of the velocity")
    way = tail.ways(str(function), _frozen(args), _frozen(kwargs))
    places = [None] * len(_several(out))
    if tail.with_places:
        places = _several(_places(function, name, args, kwargs))
    made = [
        tail.make(meta, given[0].device, Outputs(head, tail.ways(way, i), _like(p, meta)))
        for i, (meta, p) in enumerate(zip(_several(out), places, strict=True))
    ]
    return made[0] if isinstance(out, Tensor) else made


def _places(function, name: str, args: tuple, kwargs: dict) -> Any:
    args = _replaced(args, lambda t: t.value.places)
    if name == "_to_copy":
        return args[0]
    if name == "col2im":  # a sum, where patches overlap, which is not known for integers
        return function(args[0].double(), *args[1:], **kwargs).long()
    return function(*args, **kwargs)


def _like(places: Tensor | None, meta: Tensor) -> Tensor | None:
    """In the strides that the outputs have: views that follow take them so."""
    if places is None or places.stride() == meta.stride():
        return places
    return torch.empty_strided(meta.shape, meta.stride(), dtype=places.dtype, device="cpu").copy_(places)


def _several(out: Any) -> list:
    return [out] if isinstance(out, Tensor) else list(out)


def _frozen(a: Any) -> Any:
    """Of arguments what tells one operation from another."""
    if isinstance(a, StandIn):
        return StandIn, a.value.way
    if isinstance(a, (list, tuple)):
        return tuple(map(_frozen, a))
    if isinstance(a, dict):
        return tuple((k, _frozen(v)) for k, v in sorted(a.items()))
    return type(a), a


def _meta(t: Tensor) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def _as_meta(t: Tensor) -> Tensor:
    return t.meta if isinstance(t, StandIn) else _meta(t)


def _tensors(args: tuple, kwargs: dict) -> list[Tensor]:
    """Those of an operation, which takes them by themselves or in lists."""
    flat = itertools.chain.from_iterable(a if isinstance(a, (list, tuple)) else (a,) for a in (*args, *kwargs.values()))
    return [a for a in flat if isinstance(a, Tensor)]


def _replaced(args: tuple, by: Callable[[Tensor], Tensor]) -> list:
    """Arguments with others for their tensors."""

    def of(a):
        if isinstance(a, (list, tuple)):
            return [of(b) for b in a]
        return by(a) if isinstance(a, Tensor) else a

    return [of(a) for a in args]


# ---- words ----


def _more(what: str) -> str:
    return f"does more with the velocity than to move it ({what})"


def _reads(what: str) -> str:
    return f"looks at values of its velocity on the host ({what})"


def outside(*passed: str):
    """The innermost frame of code in none of these folders."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith((*passed, "<")):
        frame = frame.f_back
    return frame


def _where() -> str:
    """The innermost line that is neither torch's nor the library's, and the module that runs."""
    frame, module = outside(TORCH, HERE), next(running(), None)
    at = "" if frame is None else f", in {frame.f_code.co_name} at {os.path.basename(frame.f_code.co_filename)}:"
    at += "" if frame is None else str(frame.f_lineno)
    return at if module is None else f"{at} of a {type(module[0]).__name__}"


def running():
    """The modules whose calls are under way in this thread, innermost first, each with what it was called with."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is CALL_MODULE.__code__:
            held = frame.f_locals
            yield held["self"], held["args"], held["kwargs"]
        frame = frame.f_back
