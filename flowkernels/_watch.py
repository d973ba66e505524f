"""Whether anything that a network's Python reads has changed: attributes, hooks, functions, classes, tensors.

A `Watch` is one walk from the network over all that its calls could read, kept as a flat list of entries: what each
place held. `changed` compares them with what is there now, in C++ where the extension is built (csrc/watch/watch.cpp).
An object put in the place of another counts as a change, even an equal one. Given the code that a call has run
(`executed`), the walk goes on only through attributes that this code names: what a call has not read cannot change
which way the next one goes. FusedSampler's documentation lists what no watch can see.
"""

import collections
import contextlib
import dis
import enum
import functools
import logging
import operator
import os
import sys
import sysconfig
import threading
import types
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
import torch.utils._device  # whose CURRENT_DEVICE says it sooner than torch.get_default_device()
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from flowkernels import backends

DICT, LIST, OBJECT, CELL, FUNCTION, LOOKUP, TENSOR, CLASS, CALL = range(9)
MOST = 50_000  # entries, beyond which a network counts as none that can be watched
ARRAY_BYTES = 1 << 16  # of a numpy array, whose values are compared; of larger ones a few

# attributes of every module: those that decide what a call of it does, and those that do not
MACHINERY = frozenset(("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks"))
ASIDE = frozenset(vars(nn.Module())) - MACHINERY
GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")
DYNAMIC = frozenset(("getattr", "vars", "__dict__", "__getattribute__", "attrgetter", "methodcaller", "eval", "exec"))
PLAIN = (bool, int, float, complex, str, bytes, type(None), type(...), type(NotImplemented), range, slice, enum.Enum)
PLAIN += (torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format, torch.Generator, np.generic)
PLAIN += (types.BuiltinFunctionType, types.CodeType, weakref.ref, threading.local, logging.Logger, os.PathLike)


class Unwatchable(ValueError):
    """A network of more objects than are worth a look at every call."""


class Watch:
    """What a network's calls read, as it is now.

        watch = Watch(net)
        net.gain = 0.5
        watch.changed()          # "gain of GainNet"

    Args:
        roots: the network: modules, functions, or any objects.
        codes: the code that a call of it has run, from `executed`; None follows every attribute.
        but: objects of whose insides somebody else takes care.

    Raises:
        Unwatchable: naming the place, if there is too much to look at.
    """

    def __init__(self, *roots: Any, codes: Iterable[types.CodeType] | None = None, but: Iterable[Any] = ()):
        walk = _Walk(codes, but)
        for root in roots:
            walk.visit(root, getattr(root, "__qualname__", type(root).__name__))
        for name in GLOBAL_HOOKS:
            walk.visit(vars(nn.modules.module)[name], f"torch.nn.modules.module.{name}")
        walk.visit_modules()
        walk.lookup(vars(torch.utils._device), "CURRENT_DEVICE", "torch's default device")
        walk.add(CALL, torch.get_default_dtype, torch.get_default_dtype(), None, "torch's default dtype")
        self._places = tuple(walk.places)
        self._fused_writes = tuple((t, _WRITES.get(t, 0)) for t in walk.tensors)
        self._entries = (*walk.entries, _epoch_entry())
        self._find = getattr(backends.extension(), "watch_changed", changed_reference)

    def changed(self) -> str | None:
        """The place of something that is not what it was; None if all is."""
        at = self._find(self._entries)
        if at < 0:
            return None
        if at < len(self._places):
            return self._places[at]
        for t, writes in self._fused_writes:
            if _WRITES.get(t, 0) != writes:
                return f"a tensor of shape {list(t.shape)}, by an optimiser with fused=True"
        self._entries = (*self._entries[:-1], _epoch_entry())  # of other networks
        return None


@contextlib.contextmanager
def executed() -> Iterator[set[types.CodeType] | None]:
    """The code that the block runs in this thread, whole when the block ends; None under somebody's profiler."""
    if sys.getprofile() is not None:
        yield None
        return
    found: set[types.CodeType] = set()

    def see(frame, event, _):
        if event == "call":
            found.add(frame.f_code)

    sys.setprofile(see)
    try:
        yield found
    finally:
        sys.setprofile(None)


def _names(codes: Iterable[types.CodeType]) -> frozenset[str] | None:
    """The names that code could look up, texts in it included; None if it could look up any."""
    names: set[str] = set()
    for code in codes:
        if not _is_fixed_file(code.co_filename):
            found = _names_of(code)
            if found & DYNAMIC and not code.co_filename.startswith(_OWN):  # whose names are texts
                return None
            names |= found
    return frozenset(names)


@functools.lru_cache(4096)
def _names_of(code: types.CodeType) -> frozenset[str]:
    names = set(code.co_names) | {text for c in code.co_consts for text in _texts(c)}
    return frozenset(names).union(*map(_names_of, _inner(code)))


@functools.lru_cache(4096)
def _globals_of(code: types.CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """Names of globals or builtins, and of modules that are imported."""
    found = [(i.opname, i.argval) for i in dis.get_instructions(code)]
    read = frozenset(name for op, name in found if op in ("LOAD_GLOBAL", "LOAD_NAME"))
    imported = frozenset(name for op, name in found if op == "IMPORT_NAME")
    inner = list(map(_globals_of, _inner(code)))
    return read.union(*(r for r, _ in inner)), imported.union(*(m for _, m in inner))


def _inner(code: types.CodeType) -> Iterator[types.CodeType]:
    return (c for c in code.co_consts if isinstance(c, types.CodeType))


def _texts(constant) -> Iterator[str]:
    if isinstance(constant, str):
        yield constant
    elif isinstance(constant, (tuple, frozenset)):
        for c in constant:
            yield from _texts(c)


_FOLDERS = tuple(
    os.path.join(os.path.realpath(folder), "")
    for folder in (sysconfig.get_path("stdlib"), *(os.path.dirname(m.__file__) for m in (torch, np)))
)


_OWN = os.path.join(os.path.dirname(__file__), "")


@functools.lru_cache(4096)
def _is_fixed_file(path: str) -> bool:
    """Whether it is of Python's library, of torch or of numpy, whose code is taken to stay as it is."""
    if path.startswith("<frozen"):
        return True
    path, (library, *packages) = os.path.realpath(path), _FOLDERS
    of_library = path.startswith(library) and not {"site-packages", "dist-packages"} & set(path.split(os.sep))
    return of_library or path.startswith(tuple(packages))


@functools.lru_cache(4096)
def _is_fixed_module(name: str | None) -> bool:
    root = (name or "").partition(".")[0]
    if root in ("torch", "numpy", "builtins"):
        return True
    module = sys.modules.get(root)
    if root == "__main__" or root not in sys.stdlib_module_names or module is None:
        return False
    file = getattr(module, "__file__", None)
    return file is None or _is_fixed_file(file)


class _Walk:
    """Entries `(kind, object, a, b)`: what holds as long as nothing has changed there."""

    def __init__(self, codes: Iterable[types.CodeType] | None, but: Iterable[Any]):
        self.codes = None if codes is None else frozenset(codes)
        self.names = None if codes is None else _names(codes)
        self.entries: list[tuple] = []
        self.places: list[str] = []
        self.tensors: list[Tensor] = []
        self._modules: dict[str, types.ModuleType] = {}
        self._named: set[str] = set()  # by the functions on the way
        # by identity; kept alive meanwhile, so that no other object takes it
        self._seen: dict[Any, Any] = {id(thing): thing for thing in but}

    def add(self, kind: int, thing, a, b, place: str) -> None:
        if len(self.entries) == MOST:
            raise Unwatchable(f"{place}: more than {MOST} objects that a call could read")
        self.entries.append((kind, thing, a, b))
        self.places.append(place)

    def lookup(self, where: dict, name: str, place: str) -> Any:
        """What the dict has under the name; the dict itself stands for nothing."""
        value = where.get(name, where)
        self.add(LOOKUP, where, name, value, place)
        return None if value is where else value

    def call(self, read, place: str) -> Any:
        """What a function without arguments returns."""
        value = read()
        self.add(CALL, read, value, None, place)
        return value

    def visit(self, value: Any, place: str) -> None:
        todo = [(value, place)]
        while todo:  # no recursion: lists may be long, and nested
            value, place = todo.pop()
            if isinstance(value, PLAIN) or id(value) in self._seen:
                continue
            self._seen[id(value)] = value
            todo += reversed(list(self._parts(value, place)))

    def visit_modules(self) -> None:
        """Of Python's modules what functions on the way name: `torch.relu`, `F.gelu`, `settings.scale`."""
        done: set[tuple[str, str]] = set()
        while wanted := [
            (module, name)
            for module in list(self._modules.values())
            for name in self._named & vars(module).keys()
            if (module.__name__, name) not in done
        ]:
            for module, name in wanted:
                done.add((module.__name__, name))
                place = f"{module.__name__}.{name}"
                self.visit(self.lookup(vars(module), name, place), place)

    def _parts(self, value: Any, place: str) -> Iterator[tuple[Any, str]]:
        """Add the entries of a value, and give what is to be visited from it."""
        if isinstance(value, Tensor):
            yield from self._tensor(value, place)
        elif isinstance(value, types.ModuleType):
            self._modules[value.__name__] = value
        elif isinstance(value, type):
            yield from self._class(value, place)
        elif isinstance(value, types.FunctionType):
            yield from self._function(value, place)
        elif isinstance(value, types.MethodType):
            yield from ((value.__func__, place), (value.__self__, place))
        elif isinstance(value, (staticmethod, classmethod)):
            yield value.__func__, place
        elif isinstance(value, (property, functools.cached_property)):
            yield value.fget if isinstance(value, property) else value.func, place
        elif isinstance(value, functools.partial):
            yield from ((value.func, place), (value.args, place), (value.keywords, place))
        elif isinstance(value, np.ndarray):
            self.call(functools.partial(_values, value), place)
            if value.dtype.hasobject:
                yield value.tolist(), place
        else:
            yield from self._object(value, place)

    def _object(self, value: Any, place: str) -> Iterator[tuple[Any, str]]:
        """Containers, and what has attributes; both, of classes derived from containers."""
        kind = type(value)
        if isinstance(value, dict):
            if isinstance(value, collections.OrderedDict):  # whose order a dict's own view does not show
                self.call(functools.partial(tuple, value), place)
            self.add(DICT, value, tuple(dict.keys(value)), tuple(dict.values(value)), place)
            yield from ((v, f"{place}[{k!r}]" if isinstance(k, (str, int)) else place) for k, v in dict.items(value))
            yield from ((k, place) for k in dict.keys(value))
        elif isinstance(value, list):
            self.add(LIST, value, tuple(list.__iter__(value)), None, place)
            yield from ((v, f"{place}[{i}]") for i, v in enumerate(list.__iter__(value)))
        elif isinstance(value, tuple):
            yield from ((v, f"{place}[{i}]") for i, v in enumerate(tuple.__iter__(value)))
        elif isinstance(value, (set, frozenset, collections.deque, bytearray)):
            held = self.call(functools.partial(tuple, value), place)
            yield from ((v, place) for v in held)
        if kind not in (dict, list, tuple, set, frozenset):
            yield kind, f"the class {kind.__qualname__}"
            yield from self._attributes(value, kind, place)

    def _attributes(self, value: Any, kind: type, place: str) -> Iterator[tuple[Any, str]]:
        held, module, fixed = getattr(value, "__dict__", None), isinstance(value, nn.Module), _is_fixed(kind)
        if type(held) is dict:
            self.add(OBJECT, value, kind, (tuple(held), tuple(held.values())), f"an attribute of {place}")
            for name, v in held.items():
                if module and name in MACHINERY and id(v) not in self._seen:
                    for key, part in v.items():  # under its path, as named_modules has it
                        yield part, f"{place}.{key}"
                    self.add(DICT, v, tuple(v), tuple(v.values()), f"{name} of {place}")
                elif not (module and name in ASIDE) and (fixed or self._reads(name)):
                    yield v, f"{place}.{name}"
        for name in _slots(kind):
            if fixed or self._reads(name):
                yield self.call(functools.partial(getattr, value, name, None), f"{place}.{name}"), f"{place}.{name}"

    def _reads(self, name: str) -> bool:
        return self.names is None or name in self.names

    def _tensor(self, t: Tensor, place: str) -> Iterator[tuple[Any, str]]:
        self.tensors.append(t)
        if type(t) in (Tensor, nn.Parameter, nn.Buffer) and t.layout is torch.strided:
            if t.device.type != "meta":
                version = None if t.is_inference() else t._version
                self.add(TENSOR, t, (t.data_ptr(), version, t.shape, t.stride()), None, place)
        else:
            self.call(functools.partial(_version_of_subclass, t), place)
            inside = t.__tensor_flatten__()[0] if hasattr(t, "__tensor_flatten__") else ()
            yield from ((getattr(t, name), f"{place}.{name}") for name in inside)
        yield t.__dict__, place

    def _class(self, kind: type, place: str) -> Iterator[tuple[Any, str]]:
        if not _is_fixed(kind):
            held = dict(vars(kind))
            self.add(CLASS, kind, tuple(held), tuple(held.values()), place)
            yield from ((v, f"{name} of {place}") for name, v in held.items() if self._reads(name) or callable(v))
            yield from ((base, f"the class {base.__qualname__}") for base in kind.__mro__[1:])
        elif issubclass(kind, nn.Module):
            for name in ("forward", "__call__"):
                if name in vars(kind):
                    self.call(functools.partial(vars(kind).get, name), f"{name} of {place}")
            yield from ((base, f"the class {base.__qualname__}") for base in kind.__mro__[1:])

    def _function(self, f: types.FunctionType, place: str) -> Iterator[tuple[Any, str]]:
        code = f.__code__
        if _is_fixed_file(code.co_filename):
            return
        self.add(FUNCTION, f, (code, f.__defaults__, f.__kwdefaults__), None, place)
        if self.codes is not None and code not in self.codes:
            return  # has not run
        yield from ((f.__defaults__, place), (f.__kwdefaults__, place), (f.__dict__, place))
        for name, cell in zip(code.co_freevars, f.__closure__ or (), strict=True):
            try:
                held = cell.cell_contents
            except ValueError:  # empty
                held = cell
            self.add(CELL, cell, held, cell, f"{name} of {place}")
            if held is not cell:
                yield held, f"{name} of {place}"
        read, imported = _globals_of(code)
        self._named |= _names_of(code)
        for name in sorted(read):
            yield self.lookup(f.__globals__, name, f"{name} of {f.__module__}"), f"{name} of {f.__module__}"
        for name in sorted(imported):
            yield self.lookup(sys.modules, name, name), name


def _is_fixed(kind: type) -> bool:
    return _is_fixed_module(kind.__module__)


@functools.lru_cache(1024)
def _slots(kind: type) -> tuple[str, ...]:
    """Names of a class's slots that are no dict, of classes whose instances are more than their values."""
    if _is_fixed(kind):
        return ()
    slots = (s for base in kind.__mro__ if not _is_fixed(base) for s in _listed(vars(base).get("__slots__", ())))
    return tuple(s for s in slots if s not in ("__dict__", "__weakref__"))


def _listed(slots) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _values(a: np.ndarray) -> tuple:
    small = a.nbytes <= ARRAY_BYTES and not a.dtype.hasobject
    return a.shape, a.strides, a.dtype.str, a.ctypes.data, a.tobytes() if small else None


def _version_of_subclass(t: Tensor) -> tuple:
    with torch._C.DisableTorchFunctionSubclass():
        return t.shape, None if t.is_inference() else t._version


# Optimisers with fused=True raise no version counter

_WRITES = WeakIdKeyDictionary()  # parameter -> how many steps of such optimisers it has taken
_epoch = 0  # all such steps


def _after_step(optimizer, args, kwargs) -> None:
    global _epoch
    written = [p for group in optimizer.param_groups if group.get("fused") for p in group["params"]]
    if written:
        for p in written:
            _WRITES[p] = _WRITES.get(p, 0) + 1
        _epoch += 1


register_optimizer_step_post_hook(_after_step)


def _epoch_entry() -> tuple:
    return LOOKUP, globals(), "_epoch", _epoch


# What the extension does, for builds without it, and to compare with


def changed_reference(entries: tuple) -> int:
    """The place of the first entry that does not hold any more; -1 if all do."""
    for i, entry in enumerate(entries):
        if not _holds(*entry):
            return i
    return -1


def _holds(kind: int, thing, a, b) -> bool:
    if kind == DICT:
        return _same(dict.keys(thing), a) and _same(dict.values(thing), b)
    if kind == LIST:
        return _same(thing, a)
    if kind == OBJECT:
        held = thing.__dict__
        return type(thing) is a and _same(held.keys(), b[0]) and _same(held.values(), b[1])
    if kind == CELL:
        try:
            return thing.cell_contents is a
        except ValueError:
            return a is b
    if kind == FUNCTION:
        return _same((thing.__code__, thing.__defaults__, thing.__kwdefaults__), a)
    if kind == LOOKUP:
        return thing.get(a, thing) is b
    if kind == TENSOR:
        pointer, version, shape, stride = a
        same = thing.data_ptr() == pointer and thing.shape == shape and thing.stride() == stride
        return same and (version is None or thing._version == version)
    if kind == CLASS:
        return _same(vars(thing).keys(), a) and _same(vars(thing).values(), b)
    try:
        now = thing()
        return now is a or bool(now == a)
    except Exception:  # such as comparing tensors
        return False


def _same(now: Iterable, then: tuple) -> bool:
    now = list(now)
    return len(now) == len(then) and all(map(operator.is_, now, then))
