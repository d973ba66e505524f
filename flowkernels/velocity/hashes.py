"""What determines a velocity, hashed: weights of any kind through wrappers, attributes of modules, conditioning.

What cannot be read raises `Unknown`, with the reason: nothing that counts is left out in silence.
"""

import dataclasses
import enum
import functools
import hashlib
import io
import types
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flowkernels.runtime.torch_private import (
    COMPILED,
    COMPILED_MODULE,
    FORWARD_HOOKS,
    OF_COMPILER,
    is_traceable_wrapper_subclass,
)

CONSTANTS = (bool, int, float, complex, str, bytes, type(None), range, slice)
CONSTANTS += (torch.dtype, torch.device, torch.layout, torch.memory_format)
MACHINERY = frozenset(vars(nn.Module())) | set(OF_COMPILER)  # hooks and the like
IN_PLACE = {  # modules that run another one as it is, and add nothing to its state: where it is
    COMPILED: COMPILED_MODULE,
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
}
WRAPPERS = IN_PLACE | {  # and those that hold more beside it
    "torch.optim.swa_utils.AveragedModel": "module",
    "peft.peft_model.PeftModel": "base_model",
    "peft.tuners.lora.model.LoraModel": "model",
}
SHARDED = ("torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel", "torch.distributed.tensor")
CONFIG = "_internal_dict"  # of diffusers, whose models hold their configuration there
DEEPEST = 32  # containers in containers
NAMED = {  # modules of this package in hashes: as they were called when files were first written with them
    "flowkernels.velocity.field": "flowkernels.velocity_field",
    "flowkernels.fusion.head": "flowkernels.fuse_head",
    "flowkernels.models.networks": "flowkernels.models",
    "flowkernels.models.closed_form": "flowkernels.models",
}


class Unknown(ValueError):
    """What cannot be read, and why."""


def class_name(kind: type) -> str:
    """A class as hashes name it, which does not change as the class moves in this package."""
    return f"{NAMED.get(kind.__module__, kind.__module__)}.{kind.__qualname__}"


def _names(kind: type) -> list[str]:
    return [f"{k.__module__}.{k.__qualname__}" for k in kind.__mro__]


@functools.lru_cache(4096)
def wraps(kind: type) -> str | None:
    """Where a wrapper of that class has what it runs; None for what is no wrapper."""
    return next((WRAPPERS[name] for name in _names(kind) if name in WRAPPERS), None)


def unwrapped(net: Any, levels: int = 64, of: Mapping[str, str] = WRAPPERS) -> Any:
    """What wrappers around a network run: of torch.compile, DataParallel, an average of weights and the like."""
    for _ in range(levels):
        name = wraps(type(net))
        if of is not WRAPPERS:
            name = next((of[kind] for kind in _names(type(net)) if kind in of), None)
        if name is None:
            break
        net = getattr(net, name)
    return net


def _walk(module: nn.Module, raw: str = "", path: str = "") -> Iterator[tuple[str, str, nn.Module]]:
    """(prefix of its names in a state dict, prefix without wrappers, module) of all modules but wrappers."""
    while (inner := unwrapped(module, 1)) is not module:
        raw += next(f"{name}." for name, child in module._modules.items() if child is inner)
        module = inner
    yield raw, path, module
    for name, child in module._modules.items():
        if child is not None:
            yield from _walk(child, f"{raw}{name}.", f"{path}{name}.")


def tensors_hash(values: Mapping[str, Any], start: str = "") -> str:
    """SHA-256 over `start` and the names, dtypes, shapes and bytes of tensors in the order of their names, and over
    what else there is: tensors made of others, containers, constants. Raises Unknown."""
    digest = hashlib.sha256(start.encode())
    for name, value in sorted(values.items()):
        with _reading(name):
            _feed(digest, name, value)
    return digest.hexdigest()


def weights_hash(net: nn.Module, start: str = "") -> tuple[str, str]:
    """(the hash of a network's state dict, that of all its weights): they differ where some are in no state dict, such
    as buffers that are not persistent. Raises Unknown."""
    net, prefixes, own = unwrapped(net), {}, {}
    for raw, path, module in _walk(net):
        if not set(_names(type(module))).isdisjoint(SHARDED):  # its state dict waits for other processes
            raise Unknown("sharded weights")
        prefixes[raw] = path
        own |= {raw + name: t for owner in (module._parameters, module._buffers) for name, t in owner.items()}

    def without_wrappers(key: str) -> str:
        raw = key
        while raw not in prefixes:
            raw = raw[: raw.rstrip(".").rfind(".") + 1]
        return prefixes[raw] + key.removeprefix(raw)

    with _reading("the state dict"):
        state = net.state_dict()
    found = tensors_hash({without_wrappers(key): value for key, value in state.items()}, start)
    missing = {without_wrappers(key): t for key, t in own.items() if t is not None and key not in state}
    return found, tensors_hash(missing, found) if missing else found


def attributes_hash(modules: Iterable[tuple[str, nn.Module, Collection[str]]]) -> tuple[str, list[str]]:
    """(the hash of modules' classes and attributes, weights and modules in them aside; the names of what could change
    their velocity and cannot be read: attributes of other kinds, hooks).

    modules: each with its prefix before and the names of attributes that do not count after it.
    """
    digest, unread = hashlib.sha256(), []
    for prefix, module, but in modules:
        digest.update(f"{prefix} {class_name(type(module))}".encode())
        unread += [f"{prefix}{name}" for name in FORWARD_HOOKS if getattr(module, name)]
        for name, value in sorted(vars(module).items()):
            if name in MACHINERY or name in but:
                continue
            one = hashlib.sha256()
            try:
                with _reading(name):
                    _feed(one, f"{prefix}{name}", _as_loaded(value, private=name != CONFIG))
                digest.update(one.digest())
            except Unknown:
                unread.append(f"{prefix}{name}")
    return digest.hexdigest(), unread


def _as_loaded(value: Any, private: bool) -> Any:
    """An attribute as it is where its module has been saved and loaded, which makes lists of tuples.

    private: with entries whose names begin with an underscore; of a configuration, those say where it was loaded from.
    """
    if type(value) in (list, tuple):
        return tuple(_as_loaded(v, private) for v in value)
    if isinstance(value, Mapping):
        return {k: _as_loaded(v, private) for k, v in value.items() if private or not str(k).startswith("_")}
    return value


def modules_of(net: nn.Module) -> list[tuple[str, nn.Module, Collection[str]]]:
    """All modules but wrappers, for `attributes_hash`."""
    return [(path, module, ()) for _, path, module in _walk(net)]


class _reading:
    """Whatever goes wrong in the block is Unknown."""

    def __init__(self, what: str):
        self.what = what

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, Exception) and not isinstance(error, Unknown):
            said = (str(error).strip() or "no message").splitlines()[0]
            raise Unknown(f"{self.what} could not be read ({kind.__name__}: {said[:120]})") from error


def _feed(digest, name: str, value: Any, depth: int = 0) -> None:
    """Add a value to a hash."""
    if depth > DEEPEST:
        raise Unknown(f"{name}: containers nested more than {DEEPEST} deep")
    if isinstance(value, Tensor):
        return _feed_tensor(digest, name, value, depth)
    kind = type(value)
    parts: dict[Any, Any] | None = None
    if isinstance(value, enum.Enum):
        said = f"{kind.__qualname__}.{value.name}"
    elif kind in CONSTANTS:
        said = repr(value)
    elif isinstance(value, np.generic):
        return _feed(digest, name, value.item(), depth + 1)
    elif isinstance(value, np.ndarray) and value.dtype != object:
        said, parts = f"{value.dtype} {value.shape}", {"bytes": np.ascontiguousarray(value).tobytes()}
    elif isinstance(value, (bytearray, io.BytesIO)):
        said = repr(bytes(value) if isinstance(value, bytearray) else value.getvalue())
    elif isinstance(value, (set, frozenset)):
        said, parts = "set", dict.fromkeys(sorted(tensors_hash({"": v}) for v in value))
    elif isinstance(value, Mapping):
        said, parts = "mapping", {h: value[k] for h, k in sorted((tensors_hash({"": k}), k) for k in value)}
    elif isinstance(value, (tuple, list)):
        said, parts = kind.__name__, dict(enumerate(value))
    elif isinstance(value, type) or _is_global(value):
        said = f"{value.__module__}.{value.__qualname__}"
    elif isinstance(value, functools.partial):
        said, parts = "partial", {"function": value.func, "args": value.args, "keywords": value.keywords}
    elif dataclasses.is_dataclass(value):
        said, parts = kind.__qualname__, {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    else:
        raise Unknown(f"{name}: a {kind.__module__}.{kind.__qualname__}")
    digest.update(f"{name} {said}".encode())
    for key, part in (parts or {}).items():
        _feed(digest, f"{name}.{key}", part, depth + 1)


def _is_global(value: Any) -> bool:
    """Whether it is a function whose name says what it does: no lambda, closure or method of an object."""
    if isinstance(value, types.BuiltinFunctionType):
        return value.__self__ is None or isinstance(value.__self__, (types.ModuleType, type))
    return isinstance(value, types.FunctionType) and "<" not in value.__qualname__


def _feed_tensor(digest, name: str, t: Tensor, depth: int) -> None:
    digest.update(f"{name} {t.dtype} {list(t.shape)}".encode())
    if t.device.type == "meta":
        raise Unknown(f"{name}: on the meta device, without values (offloaded?)")
    if any(kind.startswith(SHARDED) for kind in _names(type(t))):
        raise Unknown(f"{name}: sharded over processes")
    if is_traceable_wrapper_subclass(t):
        inner, context = t.__tensor_flatten__()
        parts = {"class": type(t), "context": context, **{key: getattr(t, key) for key in inner}}
    elif type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise Unknown(f"{name}: a {type(t).__qualname__}, which does not say what it is made of")
    elif t.is_quantized:
        parts = {"scheme": str(t.qscheme()), "integers": t.int_repr()}
        if t.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            parts |= {"scale": t.q_scale(), "zero_point": t.q_zero_point()}
        else:
            parts |= {"scales": t.q_per_channel_scales(), "zero_points": t.q_per_channel_zero_points()}
            parts["axis"] = t.q_per_channel_axis()
    elif t.layout == torch.sparse_coo:
        parts = {"indices": t.detach()._indices(), "values": t.detach()._values()}
    elif t.layout in (torch.sparse_csr, torch.sparse_bsr):
        parts = {"crow": t.crow_indices(), "col": t.col_indices(), "values": t.values()}
    elif t.layout in (torch.sparse_csc, torch.sparse_bsc):
        parts = {"ccol": t.ccol_indices(), "row": t.row_indices(), "values": t.values()}
    elif t.layout != torch.strided:  # of oneDNN
        parts = {"layout": t.layout, "values": t.detach().to_dense()}
    else:
        plain = t.detach().cpu().resolve_conj().resolve_neg().contiguous().flatten()
        return digest.update(plain.view(torch.uint8).numpy())
    for key, part in parts.items():
        _feed(digest, f"{name}.{key}", part, depth + 1)
