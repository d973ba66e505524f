"""Whether anything that a network's Python reads has changed: attributes, hooks, functions, classes, tensors.

A `Watch` is one walk from the network over all that its calls could read, kept as a flat list of entries: what each
place held. `changed` compares them with what is there now, in C++ where the extension is built (csrc/watch/watch.cpp).
An object put in the place of another counts as a change, even an equal one. Given the code that a call has run
(`executed`), the walk goes on only through attributes that this code names: what a call has not read cannot change
which way the next one goes. FusedSampler's documentation lists what no watch can see.
"""

import array
import collections
import contextlib
import contextvars
import ctypes
import dis
import functools
import inspect
import logging
import operator
import os
import re
import sys
import sysconfig
import threading
import types
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from flowkernels.runtime import backends
from flowkernels.runtime.torch_private import (
    COMPILED_CALL,
    FORWARD_HOOKS,
    GLOBAL_HOOKS,
    HELD,
    NOT_IN_STATE,
    DisableTorchFunctionSubclass,
    of_all_modules,
    of_devices,
)

DICT, LIST, OBJECT, CELL, FUNCTION, LOOKUP, TENSOR, CLASS, CALL = range(9)
MOST = 50_000  # entries, beyond which a network counts as none that can be watched
ARRAY_BYTES = 1 << 16  # of a numpy array, whose values are compared; of larger ones a few

# attributes of every module: those that decide what a call of it does, and those that do not
MACHINERY = frozenset((*HELD, *FORWARD_HOOKS))
ASIDE = frozenset((*vars(nn.Module()), COMPILED_CALL)) - MACHINERY  # the compiler keeps its own state
NAMESPACES = frozenset(("globals", "eval", "exec", "__globals__"))  # code that reads globals by any name
IMPORTS = frozenset(("import_module", "__import__", "modules"))
DYNAMIC = frozenset(("getattr", "vars", "__dict__", "__getattribute__", "attrgetter", "methodcaller", "eval", "exec"))
PLAIN = (bool, int, float, complex, str, bytes, type(None), type(...), type(NotImplemented), range, slice)
PLAIN += (torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format, torch.Generator, np.generic)
PLAIN += (types.CodeType, logging.Logger, os.PathLike)
BUFFERS = (bytearray, array.array, memoryview, ctypes._SimpleCData, ctypes.Array, ctypes.Structure, ctypes.Union)


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
        walk = _Walk(roots, codes, but)
        if codes is not None and walk.cached:  # what is behind a cache has not run, but may run next time
            walk = _Walk(roots, {*codes, *walk.cached}, but)
        walk.lookup(vars(of_devices), "CURRENT_DEVICE", "torch's default device")
        walk.add(CALL, torch.get_default_dtype, torch.get_default_dtype(), None, "torch's default dtype")
        self._places = tuple(walk.places)
        self._fused_writes = tuple((t, _WRITES.get(t, 0)) for t in walk.tensors)
        self._entries = (*walk.entries, _epoch_entry())
        self._find = getattr(backends.reader() or backends.extension(), "watch_changed", changed_reference)

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


_HAS_DOCSTRING = getattr(inspect, "CO_HAS_DOCSTRING", 0)


@functools.lru_cache(4096)
def _names_of(code: types.CodeType) -> frozenset[str]:
    described = _HAS_DOCSTRING & code.co_flags if _HAS_DOCSTRING else not code.co_name.startswith("<")
    first = 1 if described and code.co_flags & inspect.CO_OPTIMIZED else 0  # the docstring, or None before 3.13
    names = set(code.co_names) | {text for c in code.co_consts[first:] for text in _texts(c)}
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
        yield from re.findall(r"[^\W\d]\w*", constant)
    elif isinstance(constant, (tuple, frozenset)):
        for c in constant:
            yield from _texts(c)


_FOLDERS = tuple(
    os.path.join(os.path.realpath(folder), "")
    for folder in (sysconfig.get_path("stdlib"), *(os.path.dirname(m.__file__) for m in (torch, np)))
)


_OWN = os.path.join(os.path.dirname(os.path.dirname(__file__)), "")


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

    def __init__(self, roots: tuple, codes: Iterable[types.CodeType] | None, but: Iterable[Any]):
        self.codes = None if codes is None else frozenset(codes)
        self.names = None if codes is None else _names(codes)
        self.others = _names(c for c in codes or () if not c.co_filename.startswith(_OWN)) or ()  # than of this package
        self.entries: list[tuple] = []
        self.places: list[str] = []
        self.tensors: list[Tensor] = []
        self._modules: dict[str, types.ModuleType] = {}
        self._uses: dict[tuple[str, frozenset[str]], types.ModuleType] = {}  # by functions that name this and that
        self._named: set[str] = set()  # by the functions on the way
        # by identity; kept alive meanwhile, so that no other object takes it
        self._seen: dict[Any, Any] = {id(thing): thing for thing in but}
        self.cached: set[types.CodeType] = set()
        listed = self.names is not None and "state_dict" in self.names
        self.aside = ASIDE - {NOT_IN_STATE} if listed else ASIDE
        for root in roots:
            self.visit(root, getattr(root, "__qualname__", type(root).__name__))
        for name in GLOBAL_HOOKS:
            self.visit(vars(of_all_modules)[name], f"torch.nn.modules.module.{name}")
        self.visit_modules()

    def add(self, kind: int, thing, a, b, place: str) -> None:
        if len(self.entries) == MOST:
            raise Unwatchable(f"{place}: more than {MOST} objects that a call could read")
        self.entries.append((kind, thing, a, b))
        self.places.append(place)

    def keep(self, kind: int, thing, held: dict, place: str) -> dict:
        """`held`, a copy of what `thing` has: other threads may write there during the walk."""
        self.add(kind, thing, tuple(held), tuple(held.values()), place)
        return held

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

    def items(self, read, place: str) -> tuple:
        """The objects that a function without arguments returns, in new tuples or lists of the same ones."""
        held = tuple(read())  # kept alive, so that no other takes the identity of one
        self.add(CALL, functools.partial(_identities, read), tuple(map(id, held)), held, place)
        return held

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
        walked: set[tuple[str, frozenset[str]]] = set()
        while True:
            wanted = dict(self._uses)  # of a function alone, and of objects that hold a module
            wanted |= {(name, frozenset(self._named)): module for name, module in self._modules.items()}
            wanted = {use: module for use, module in wanted.items() if use not in walked}
            if not wanted:
                return
            walked |= wanted.keys()
            for (of, names), module in wanted.items():
                for name in sorted(names & vars(module).keys()):
                    value, place = vars(module)[name], f"{of}.{name}"
                    if (of, name) not in done:
                        done.add((of, name))
                        self.lookup(vars(module), name, place)
                    if isinstance(value, types.ModuleType):
                        self._uses[value.__name__, names] = value
                    else:
                        self.visit(value, place)

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
        elif isinstance(value, (types.BuiltinMethodType, types.MethodWrapperType)):
            yield value.__self__, place
        elif isinstance(value, (staticmethod, classmethod)):
            yield value.__func__, place
        elif isinstance(value, (property, functools.cached_property)):
            yield value.fget if isinstance(value, property) else value.func, place
        elif isinstance(value, functools.partial):
            yield from ((part, place) for part in self.items(functools.partial(_of_partial, value), place))
        elif isinstance(value, weakref.ref):
            yield from ((target, place) for target in self.items(lambda: (value(),), place))
        elif isinstance(value, contextvars.ContextVar):
            yield from ((held, place) for held in self.items(lambda: (value.get(None),), place))
        elif isinstance(value, types.MappingProxyType):
            yield from ((held, place) for held in self.items(lambda: (*value, *value.values()), place))
        elif isinstance(value, threading.local):
            yield from ((held, place) for held in self.items(lambda: (*vars(value), *vars(value).values()), place))
        elif isinstance(value, BUFFERS):
            self.call(functools.partial(_bytes, value), place)
        elif type(value) in weakref.ProxyTypes:
            raise Unwatchable(f"{place}: a weak proxy hides what it stands for")
        elif isinstance(value, torch.jit.ScriptModule):
            raise Unwatchable(f"{place}: a ScriptModule has its attributes where Python does not see them")
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
                self.items(functools.partial(tuple, value), place)
            if isinstance(value, collections.defaultdict):
                yield from ((f, place) for f in self.items(lambda: (value.default_factory,), place))
            held = self.keep(DICT, value, dict.copy(value), place)
            yield from ((v, f"{place}[{k!r}]" if isinstance(k, (str, int)) else place) for k, v in held.items())
            yield from ((k, place) for k in held)
        elif isinstance(value, list):
            held = tuple(list.__iter__(value))
            self.add(LIST, value, held, None, place)
            yield from ((v, f"{place}[{i}]") for i, v in enumerate(held))
        elif isinstance(value, tuple):
            yield from ((v, f"{place}[{i}]") for i, v in enumerate(tuple.__iter__(value)))
        elif isinstance(value, (set, frozenset, collections.deque)):
            yield from ((v, place) for v in self.items(functools.partial(tuple, value), place))
        elif isinstance(value, functools._lru_cache_wrapper):
            self.cached |= _codes_from(value.__wrapped__)
        if kind not in (dict, list, tuple, set, frozenset):
            yield kind, f"the class {kind.__qualname__}"
            yield from self._attributes(value, kind, place)

    def _attributes(self, value: Any, kind: type, place: str) -> Iterator[tuple[Any, str]]:
        held, module, fixed = getattr(value, "__dict__", None), isinstance(value, nn.Module), _is_fixed(kind)
        if type(held) is dict:
            held = held.copy()
            self.add(OBJECT, value, kind, (tuple(held), tuple(held.values())), f"an attribute of {place}")
            for name, v in held.items():
                if module and name in MACHINERY and id(v) not in self._seen:
                    parts = self.keep(DICT, v, dict.copy(v), f"{name} of {place}")
                    yield from ((part, f"{place}.{key}") for key, part in parts.items())  # as named_modules has it
                elif not (module and name in self.aside) and (fixed or name in ASIDE or self._reads(name)):
                    yield v, f"{place}.{name}"
        for name in _slots(kind):
            if fixed or self._reads(name):
                read = functools.partial(getattr, value, name, None)
                yield from ((held, f"{place}.{name}") for held in self.items(lambda read=read: (read(),), place))

    def _reads(self, name: str) -> bool:
        return self.names is None or name in self.names

    def _tensor(self, t: Tensor, place: str) -> Iterator[tuple[Any, str]]:
        self.tensors.append(t)
        if type(t) in (Tensor, nn.Parameter, nn.Buffer) and t.layout is torch.strided:
            if t.device.type != "meta":
                version = None if t.is_inference() else t._version
                self.add(TENSOR, t, (t.data_ptr(), version, t.shape, t.stride(), t.dtype), None, place)
        else:
            self.call(functools.partial(_version_of_subclass, t), place)
            inside = t.__tensor_flatten__()[0] if hasattr(t, "__tensor_flatten__") else ()
            yield from ((getattr(t, name), f"{place}.{name}") for name in inside)
        for name in ("requires_grad", "grad"):
            if name in self.others:
                read = functools.partial(getattr, t, name)
                yield from ((held, place) for held in self.items(lambda read=read: (read(),), place))
        yield t.__dict__, place

    def _class(self, kind: type, place: str) -> Iterator[tuple[Any, str]]:
        if not _is_fixed(kind):
            held = self.keep(CLASS, kind, vars(kind).copy(), place)
            yield from ((v, f"{name} of {place}") for name, v in held.items() if self._reads(name) or callable(v))
            yield from ((base, f"the class {base.__qualname__}") for base in (*kind.__mro__[1:], type(kind)))
        elif issubclass(kind, nn.Module):
            for name in ("forward", "__call__"):
                if name in vars(kind):
                    self.call(functools.partial(vars(kind).get, name), f"{name} of {place}")
            code = getattr(vars(kind).get("forward"), "__code__", None)
            for name in sorted(_names_of(code) & vars(nn.functional).keys()) if code is not None else ():
                self.lookup(vars(nn.functional), name, f"torch.nn.functional.{name}")
            yield from ((base, f"the class {base.__qualname__}") for base in kind.__mro__[1:])

    def _function(self, f: types.FunctionType, place: str) -> Iterator[tuple[Any, str]]:
        code = f.__code__
        fixed = _is_fixed_file(code.co_filename) or code.co_filename.startswith(
            _OWN
        )  # perhaps somebody's own in its closure: a decorator's wrapper
        if not fixed:
            self.add(FUNCTION, f, (code, f.__defaults__, f.__kwdefaults__), None, place)
        if f.__dict__ or not fixed:
            yield f.__dict__, place
        if not fixed and self.codes is not None and code not in self.codes:
            return  # has not run
        yield from ((f.__defaults__, place), (f.__kwdefaults__, place))
        for name, cell in zip(code.co_freevars, f.__closure__ or (), strict=True):
            try:
                held = cell.cell_contents
            except ValueError:  # empty
                held = cell
            self.add(CELL, cell, held, cell, f"{name} of {place}")
            if held is not cell:
                yield held, f"{name} of {place}"
        if fixed:
            return
        read, imported = _globals_of(code)
        names = _names_of(code)
        self._named |= names
        if names & NAMESPACES:
            yield f.__globals__, f"a global of {f.__module__}"
        read |= names & f.__globals__.keys()
        imported |= names & sys.modules.keys() if names & IMPORTS else frozenset()
        for where, of, looked_up in ((f.__globals__, f" of {f.__module__}", read), (sys.modules, "", imported)):
            for name in sorted(looked_up):
                value = self.lookup(where, name, f"{name}{of}")
                if isinstance(value, types.ModuleType):
                    self._uses[value.__name__, names] = value
                else:
                    yield value, f"{name}{of}"


def _codes_from(f: Any) -> set[types.CodeType]:
    """The code of a function, and of those that it names."""
    found, todo = set(), [f]
    while todo:
        f = todo.pop()
        if isinstance(f, types.FunctionType) and f.__code__ not in found and not _is_fixed_file(f.__code__.co_filename):
            found.add(f.__code__)
            todo += [f.__globals__[name] for name in _names_of(f.__code__) & f.__globals__.keys()]
    return found


def _is_fixed(kind: type) -> bool:
    module = kind.__module__
    return isinstance(module, str) and _is_fixed_module(module)


@functools.lru_cache(1024)
def _slots(kind: type) -> tuple[str, ...]:
    """Names of a class's slots that are no dict, of classes whose instances are more than their values."""
    if _is_fixed(kind):
        return ()
    slots = (s for base in kind.__mro__ if not _is_fixed(base) for s in _listed(vars(base).get("__slots__", ())))
    return tuple(s for s in slots if s not in ("__dict__", "__weakref__"))


def _listed(slots) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _identities(read) -> tuple[int, ...]:
    return tuple(map(id, read()))


def _bytes(buffer) -> tuple:
    view = memoryview(buffer)
    return view.nbytes, view.tobytes() if view.nbytes <= ARRAY_BYTES else None


def _of_partial(f: functools.partial) -> tuple:
    return f.func, f.args, f.keywords


def _values(a: np.ndarray) -> tuple:
    small = a.nbytes <= ARRAY_BYTES and not a.dtype.hasobject
    return a.shape, a.strides, a.dtype.str, a.ctypes.data, a.tobytes() if small else None


def _version_of_subclass(t: Tensor) -> tuple:
    with DisableTorchFunctionSubclass():
        shape = None if nn.parameter.is_lazy(t) else t.shape  # of which one without values has none
        where = None
        with contextlib.suppress(Exception):  # of what has no memory, or none of its own
            where = t.data_ptr(), t.stride(), t.dtype
        return shape, where, None if t.is_inference() else t._version


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
        pointer, version, shape, stride, dtype = a
        same = thing.data_ptr() == pointer and thing.shape == shape and thing.stride() == stride
        return same and thing.dtype is dtype and (version is None or thing._version == version)
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
