"""What a recorded loop has taken in of a velocity for good, and whether that is still so."""

import contextlib
import functools
import types
import weakref
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from flowkernels.runtime import backends
from flowkernels.runtime.torch_private import FORWARD_HOOKS, HELD, SPARSE_PARTS, is_traceable_wrapper_subclass

PLAIN = frozenset((bool, int, float, str, type(None), torch.dtype, torch.device))
CONTAINERS = frozenset((dict, OrderedDict, list, tuple, set))
LONGEST = 256  # entries of a container that are looked at, unless it is a module's own of its parts
SEEN = {"training", *HELD, *FORWARD_HOOKS}
MACHINERY = frozenset(vars(nn.Module())) - SEEN

FORM = 2  # of the marks: the extension's, if it is to read them
# kinds of marks
SAME, WEAK, STRONG, TENSOR, WRAPPER, SPARSE = range(6)
DICT, ORDERED, ITEMS, LENGTH, AGAIN, MODULE, METHOD, FUNCTION, PARTIAL = range(6, 15)


class State:
    """Addresses and layouts of a velocity's tensors, its plain settings, and identities of the rest, as they are now.

    Looked at are modules, functions with what they close over and the modules and tensors that they name,
    `functools.partial`, bound methods, and in them short containers. Values in memory are none of it: a replay reads
    what is there then.

    warns: whether `warn_if_training` has something to say, which follows from what is looked at.

    Nothing in it keeps the velocity alive. It is a flat list of marks `(kind, ...)` in the order of a walk, each of
    what was found in its place; `holds` takes the same walk, in C++ where the extension is built
    (csrc/watch/state.cpp).
    """

    def __init__(self, velocity: Any, warns: bool = False):
        self.marks, self.storages = _marks(velocity)
        self.warns = warns
        C = backends.extension()
        self._find = C.state_holds if getattr(C, "state_form", None) == FORM else None

    def holds(self, velocity: Any) -> bool:
        """Whether all of it is as it was."""
        if self._find is not None:
            return self._find(self.marks, _roots(velocity))
        return holds_reference(self.marks, velocity)


def holds_reference(marks: tuple, velocity: Any) -> bool:
    """What the extension does, for builds without it, and to compare with."""
    now, _ = _marks(velocity)
    return len(now) == len(marks) and all(map(_same, now, marks))


def _same(now: tuple, then: tuple) -> bool:
    if now[0] == then[0] == SAME:
        a, b = now[1], then[1]
        equal = a.hex() == b.hex() if type(a) is type(b) is float else a == b  # -0.0 is not 0.0, NaN is NaN
        return a is b or (type(a) is type(b) and equal)
    return _equal(now, then)


def _equal(now: Any, then: Any) -> bool:
    """Numbers and texts by their values, all else by its identity."""
    if now is then or type(now) is not type(then):
        return now is then
    if issubclass(type(now), tuple):
        return len(now) == len(then) and all(map(_equal, now, then))
    return type(now) in (int, bool, str, bytes) and now == then


def _roots(velocity: Any) -> tuple:
    """With the attributes of an object, or of one whose method it is."""
    owner = velocity.__self__ if type(velocity) is types.MethodType else velocity
    held = None if isinstance(owner, nn.Module) else getattr(owner, "__dict__", None)
    return velocity, held if type(held) is dict else None


def _marks(velocity: Any) -> tuple[tuple, frozenset[int]]:
    """(marks, storages of the tensors in them)."""
    marks, storages, seen, containers, whole, todo = [], set(), set(), {}, set(), list(_roots(velocity))
    while todo:
        value = todo.pop()
        mark, parts = _mark(value, seen, containers, whole)
        if mark[0] == MODULE:
            whole |= {id(vars(value).get(name)) for name in HELD}
        if mark[0] == TENSOR:
            storages.add(value.untyped_storage()._cdata)
        marks.append(mark)
        todo.extend(parts)
    return tuple(marks), frozenset(storages)


def _mark(value: Any, seen: set[int], containers: dict[int, int], whole: set[int]) -> tuple[tuple, Any]:
    """Of one value, and what is to be looked at in it. seen: all that was looked at before, but for containers, which
    are numbered; whole: those that are looked at however long they are."""
    kind = type(value)
    if kind in PLAIN:
        return (SAME, value), ()
    if issubclass(kind, Tensor):  # isinstance would ask a proxy for what it stands for
        with contextlib.suppress(Exception):  # of what has no memory, or not one: nested, or yet to be initialized
            return _mark_tensor(value, kind)
    if kind is types.MethodType:  # made anew at every access
        return (METHOD,), (value.__func__, value.__self__)
    if kind in CONTAINERS or issubclass(kind, tuple):
        if id(value) in containers:
            return (AGAIN, containers[id(value)]), ()
        containers[id(value)] = len(containers)
        if not (0 < len(value) <= LONGEST or (value and id(value) in whole)):
            return (LENGTH, kind, len(value)), ()
        if isinstance(value, dict):
            return (DICT if kind is dict else ORDERED, tuple(value)), value.values()
        return (ITEMS, kind, len(value)), value
    try:
        is_known, known = WEAK, weakref.ref(value)
    except TypeError:
        is_known, known = STRONG, value
    if id(value) in seen:
        return (is_known, known), ()
    seen.add(id(value))
    if issubclass(kind, nn.Module):
        held = dict(vars(value))  # other threads may write there meanwhile
        read = bytes(name not in MACHINERY for name in held)
        mark = MODULE, known, tuple(held), read, weakref.ref(kind)
        return mark, [v for name, v in held.items() if name not in MACHINERY]
    if kind is types.FunctionType:
        return _mark_function(value, known)
    if issubclass(kind, functools.partial):
        return (PARTIAL, known), (value.func, value.args, value.keywords)
    return (is_known, known), ()


def _mark_tensor(t: Tensor, kind: type) -> tuple[tuple, list]:
    if is_traceable_wrapper_subclass(t):
        names = tuple(t.__tensor_flatten__()[0])
        return (WRAPPER, weakref.ref(t), names), [getattr(t, name) for name in names]
    if t.layout in SPARSE_PARTS:
        names = SPARSE_PARTS[t.layout]
        return (SPARSE, weakref.ref(t), names), [getattr(t, name)() for name in names]
    where = t.data_ptr(), t.dtype, t.shape, t.stride(), t.is_conj(), t.is_neg()
    return (TENSOR, kind, *where), []


def _names(code: types.CodeType) -> tuple[str, ...]:
    """Of globals and attributes, those of functions inside as well."""
    inner = (name for c in code.co_consts if isinstance(c, types.CodeType) for name in _names(c))
    return tuple(dict.fromkeys((*code.co_names, *inner)))


def _mark_function(f: types.FunctionType, known: weakref.ref) -> tuple[tuple, list]:
    """With its attributes, what it closes over, and of the globals that it names the tensors and modules.

    Of each of both: None for a part, False for what is not there, or the type of one that is passed over.
    """
    parts, kinds, names = [f.__defaults__, f.__kwdefaults__, f.__dict__], [], _names(f.__code__)
    for cell in f.__closure__ or ():
        try:
            parts.append(cell.cell_contents)
            kinds.append(None)
        except ValueError:  # empty
            kinds.append(False)
    for name in names:
        there, value = name in f.__globals__, f.__globals__.get(name)
        followed = issubclass(type(value), (Tensor, nn.Module))
        parts.extend([value] * followed)
        kinds.append(None if followed else there and type(value))
    return (FUNCTION, known, f.__code__, names, tuple(kinds)), parts
