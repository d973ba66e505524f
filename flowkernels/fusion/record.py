"""One call of a velocity network, recorded operation by operation, with what each value depends on.

Values that depend on the state x become layers (`fusion/lowering.py`). Others depend on time, on conditioning or
on parameters alone; they are computed again for all steps of a schedule and all samples of a batch (`Record.replay`).
"""

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from flowkernels.runtime.torch_private import (
    CALL_MODULE,
    TYPED_STORAGE,
    DisableTorchFunction,
    TorchDispatchMode,
    tree_flatten,
    tree_map,
    uncompiled,
)

TIME, ROWS, STATE = "time", "conditioning", "state"  # what a value may depend on


class NotFusable(ValueError):
    """A network that is not a stack of linear layers, or does not look like one."""


class Refused(list[str]):
    """What stops a network from being fused, each as "module: what"."""

    def raise_any(self) -> None:
        where: dict[str, dict[str, None]] = {}
        for message in self:
            place, _, what = message.partition(": ")
            where.setdefault(what, {})[place] = None
        if where:
            said = [(*places, what) for what, places in where.items()]
            raise NotFusable(
                "; ".join(
                    f"{first}: {what}" + (f" (so in {', '.join(rest)})" if rest else "") for first, *rest, what in said
                )
            )


@dataclass(frozen=True)
class Ref:
    """A tensor in the arguments of a recorded call, by its place in `Record.tensors`."""

    index: int


@dataclass
class Call:
    function: Any
    args: tuple
    kwargs: dict
    outputs: list[int]
    kind: frozenset  # of TIME, ROWS, STATE
    where: str  # the module it happened in


class Record(TorchDispatchMode):
    """The operations of one call on `rows` samples, and what each of their values depends on."""

    SHAPE_OF = ("zeros_like", "ones_like", "full_like", "empty_like")
    OVER = ("fill", "zero", "copy")  # what was in their first argument does not matter

    def __init__(self, net: nn.Module | None, rows: int):
        super().__init__()
        self.rows, self.calls, self.tensors, self.kinds, self.overwritten = rows, [], [], [], set()
        self.refused = Refused()
        self._views: dict[int, _View] = {}  # by the identity of the tensor that is one
        self.given: set[int] = set()  # inputs, and what was computed from them
        self.mixed: set[int] = set()  # what has no row for each sample any more
        self._places: dict[int, int] = {}
        self._stale: set[int] = set()  # overwritten views of tensors whose values are known
        self._names = {id(m): name or type(m).__name__ for name, m in net.named_modules()} if net is not None else {}

    def input(self, t: Tensor, *kind: str) -> int:
        place = self._place(t, frozenset(kind))
        self.given.add(place)
        return place

    def _place(self, t: Tensor, kind: frozenset) -> int:
        self._places[id(t)] = len(self.tensors)
        self.tensors.append(t)  # kept alive, so that no other tensor takes its identity
        self.kinds.append(kind)
        return len(self.tensors) - 1

    def run(self, call: Callable[[], Tensor]) -> int:
        """Record `call()`; where its result is."""
        with torch.no_grad(), uncompiled(), self, _Reads(self):
            out = call()
        if id(out) not in self._places:
            self.refused.append("the network: returns what none of the operations made, such as a tensor of a subclass")
            self.refused.raise_any()
        return self._fresh(out, "the network")

    @property
    def where(self) -> str:
        """The module that is running, by this thread's stack: a hook would be seen by all threads."""
        frame = sys._getframe(1)
        while frame is not None and frame.f_code is not CALL_MODULE.__code__:
            frame = frame.f_back
        if frame is None:
            return "the network"
        module = frame.f_locals["self"]
        return f"{self._names.get(id(module), '?')} ({type(module).__name__})"

    def is_given(self, t: Tensor) -> bool:
        """Whether it is one of the inputs, or was computed from them."""
        return self._places.get(id(t)) in self.given

    def is_current(self, place: int) -> bool:
        """Whether the tensor of a value was not written to since."""
        return self._places.get(id(self.tensors[place])) == place and place not in self.overwritten

    def refuse_reading(self, name: str) -> None:
        self.refused.append(f"{self.where}: {name} reads a value, and what follows may depend on it")

    def _new_place(self, t: Tensor) -> int:
        """Of what the recording has not seen yet: parameters, constants, but not the inputs' memory by another way."""
        with contextlib.suppress(RuntimeError, NotImplementedError):  # tensors without memory
            where = _memory(t)
            if where and any(_memory(self.tensors[p]) == where for p in self.given):
                self.refuse_reading("a tensor on the memory of another, not made by an operation of torch,")
        return self._place(t, frozenset())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, where = kwargs or {}, self.where
        refs: list[int] = []

        def see(a):
            if not isinstance(a, Tensor):
                return a
            place = self._places.get(id(a))
            place = self._new_place(a) if place is None else self._fresh(a, where)
            if place in self.overwritten:
                self.refused.append(f"{where}: reads a tensor that was overwritten through another one")
            refs.append(place)
            return Ref(place)

        seen_args, seen_kwargs = tree_map(see, args), tree_map(see, kwargs)
        out = function(*args, **kwargs)
        name = _base_name(function)
        if torch.Tag.nondeterministic_seeded in function.tags:
            self.refused.append(f"{where}: {name} draws random numbers")
        if not self.given.isdisjoint(refs) and self._has_free_shape(function, name, seen_args):
            self.refuse_reading(name)
        if not self.mixed.isdisjoint(refs):
            self.refused.append(f"{where}: {name} reads what was made of several samples or several times")
        outputs = [t for t in tree_flatten(out)[0] if isinstance(t, Tensor)]
        if not self.given.isdisjoint(refs) and not outputs and out is not None:
            self.refuse_reading(name)
        known = {id(t) for t in outputs if id(t) in self._places}
        self._add(function, seen_args, seen_kwargs, outputs, refs, where)
        for i, t in enumerate(outputs):
            if id(t) in known:
                self._written(t, where)
            elif args and isinstance(args[0], Tensor) and t is not args[0] and _is_view(function):
                self._views[id(t)] = _View(args[0], function, seen_args, seen_kwargs, outputs, i)
        return out

    def _add(self, function, args, kwargs, outputs: list[Tensor], refs: list[int], where: str) -> None:
        name = _base_name(function)
        read = refs[1:] if name in self.OVER else refs
        kind, given = frozenset().union(*(self.kinds[r] for r in read)), not self.given.isdisjoint(refs)
        if name.startswith("new_"):
            kind = frozenset()
        elif name in self.SHAPE_OF:
            kind -= {STATE}
        places = [self._place(t, kind) for t in outputs]
        if given:
            self.given.update(places)
        if kind & {TIME, ROWS} and STATE not in kind and self.mixed.isdisjoint(refs):  # which is said once
            self.mixed.update(p for p in places if not any(d and d % self.rows == 0 for d in self.tensors[p].shape))
        self.calls.append(Call(function, args, kwargs, places, kind, where))

    def _has_free_shape(self, function, name: str, args: tuple) -> bool:
        """Whether what the operation returns has a shape that depends on values which are given, or made of them."""
        if name == "index":
            masks = [a.index for a in tree_flatten(args[1])[0] if isinstance(a, Ref)]
            masks = [m for m in masks if self.tensors[m].dtype in (torch.bool, torch.uint8)]
            return not self.given.isdisjoint(masks)
        return torch.Tag.dynamic_output_shape in function.tags

    # ---- writes in place: a tensor that others are views of, or that is a view of one, is a new value then ----

    def _written(self, t: Tensor, where: str) -> None:
        """What t is a view of is made anew of what is in t now; other views of that, when they are read."""
        above, linked = [], t
        while (view := self._views.get(id(linked))) is not None:
            above.append(view.base)
            scatter = view.scattered()
            if scatter is None:
                break
            function, args = scatter
            refs = [self._places[id(view.base)], self._places[id(linked)]]
            args = tree_map(lambda a, refs=refs: Ref(refs[a.index]) if isinstance(a, Ref) else a, args)
            self._add(function, args, {}, [view.base], refs, where)
            linked = view.base
        current = {self._places[id(u)] for u in (t, *above)} if view is None else {self._places[id(t)]}
        for i, u in enumerate(self.tensors):
            if i in current or u is t or not _overlap(t, u):
                continue
            self.overwritten.add(i)
            if view is None and self._root(u) is linked:
                self._stale.add(i)

    def _root(self, t: Tensor) -> Tensor:
        while (view := self._views.get(id(t))) is not None:
            t = view.base
        return t

    def _fresh(self, t: Tensor, where: str) -> int:
        """The place of what is in t now: a view is taken again of what has been written to."""
        place = self._places[id(t)]
        if place not in self._stale or (view := self._views.get(id(t))) is None:
            return place
        base = self._fresh(view.base, where)
        args = tree_map(lambda a: Ref(base) if isinstance(a, Ref) else a, view.args)
        self._add(view.function, args, view.kwargs, view.outputs, [base], where)
        return self._places[id(t)]

    def free_tensors(self) -> list[Tensor]:
        """What was read but neither given nor computed: parameters, buffers, constants."""
        computed = {p for call in self.calls for p in call.outputs}
        return [t for p, t in enumerate(self.tensors) if p not in computed and p not in self.given]

    def leads(self, place: int) -> bool:
        """Whether the value has one row a sample."""
        return self.tensors[place].dim() > 0 and len(self.tensors[place]) == self.rows

    def _dim_of_rows(self, place: int) -> int | None:
        """Where the rows of the samples are in a value."""
        dims = [d for d, size in enumerate(self.tensors[place].shape) if size and size % self.rows == 0]
        if not dims:
            return None
        if len(dims) > 1 or self.tensors[place].shape[dims[0]] != self.rows:
            raise NotFusable("samples and another dimension are folded into one where time and conditioning meet")
        return dims[0]

    def replay(self, inputs: Mapping[int, Tensor], steps: int, n: int, needed: Iterable[int]) -> dict[int, Tensor]:
        """The values `needed` for `steps` times and n samples; one row a step, a sample or both, as they depend.

        inputs: the times `[steps]` and the conditioning, by their places.
        """
        wanted, order = set(needed), []
        for call in reversed(self.calls):
            if wanted.intersection(call.outputs):
                order.append(call)
                read = call.args[1:] if _base_name(call.function) in self.OVER else call.args
                refs = (a.index for a in tree_flatten((read, call.kwargs))[0] if isinstance(a, Ref))
                wanted.update(r for r in refs if STATE not in self.kinds[r])  # of others the shape alone is used
        values = dict(inputs)

        def argument(a, kind, rows, over=False):
            if isinstance(a, int) and not isinstance(a, bool) and a and a % self.rows == 0:
                return a // self.rows * rows
            if not isinstance(a, Ref):
                return a
            if STATE in self.kinds[a.index] or over:
                dim = self._dim_of_rows(a.index)
                value = self.tensors[a.index]
                return value if dim is None else value.narrow(dim, 0, 1).repeat_interleave(rows, dim)
            value = values.get(a.index, self.tensors[a.index])
            mine = self.kinds[a.index]
            if mine == kind or (dim := self._dim_of_rows(a.index)) is None:
                return value
            if not mine:
                if value.shape[dim] != 1:  # a constant that happens to be as long
                    return value
                return value.repeat(
                    [rows if d == dim else 1 for d in range(value.dim())]
                )  # some kernels ignore strides
            if mine == {TIME}:
                return value.repeat_interleave(n, dim)
            return value.repeat([steps if d == dim else 1 for d in range(value.dim())])

        with torch.no_grad():
            for call in reversed(order):
                rows = (steps if TIME in call.kind else 1) * (n if ROWS in call.kind else 1)
                args, kwargs = tree_map(
                    lambda a, kind=call.kind, rows=rows: argument(a, kind, rows), (call.args, call.kwargs)
                )
                if call.function._schema.is_mutable:
                    args = (args[0].clone(), *args[1:])
                if _base_name(call.function) in self.OVER:
                    args = (argument(call.args[0], call.kind, rows, over=True).clone(), *args[1:])
                try:
                    out = call.function(*args, **kwargs)
                except (RuntimeError, ValueError, IndexError) as e:
                    again = f"could not be repeated for {steps} steps of {n} samples ({e})"
                    raise NotFusable(f"{call.where}: {call.function} {again}") from e
                for place, t in zip(
                    call.outputs, [t for t in tree_flatten(out)[0] if isinstance(t, Tensor)], strict=True
                ):
                    values[place] = t
        return {place: values.get(place, self.tensors[place]) for place in needed}


@dataclass
class _View:
    """A tensor that an operation has made on the memory of another; one of its outputs."""

    base: Tensor
    function: Any
    args: tuple
    kwargs: dict
    outputs: list[Tensor]
    number: int

    def scattered(self) -> tuple[Any, tuple] | None:
        """What makes the base anew, of Ref(0), its old value, and Ref(1), the view; None where it is not known."""
        aten, name, base = torch.ops.aten, _base_name(self.function), self.base
        rest = self.args[1:]
        if self.kwargs:
            return None
        if name == "slice":
            return aten.slice_scatter.default, (Ref(0), Ref(1), *rest)
        if name == "select":
            return aten.select_scatter.default, (Ref(0), Ref(1), *rest)
        if name in ("split", "split_with_sizes"):
            dim = rest[1] if len(rest) > 1 else 0
            first = sum(t.shape[dim] for t in self.outputs[: self.number])
            last = first + self.outputs[self.number].shape[dim]
            return aten.slice_scatter.default, (Ref(0), Ref(1), dim, first, last)
        if name == "unbind":
            return aten.select_scatter.default, (Ref(0), Ref(1), rest[0] if rest else 0, self.number)
        if name in ("transpose", "t"):
            return (aten.t.default, (Ref(1),)) if name == "t" else (aten.transpose.int, (Ref(1), *rest))
        if name == "permute":
            back = sorted(range(base.dim()), key=lambda d: rest[0][d] % base.dim())
            return aten.permute.default, (Ref(1), back)
        if name in ("view", "unsqueeze", "squeeze", "alias", "detach"):
            return aten.reshape.default, (Ref(1), list(base.shape))
        return None


def _base_name(function) -> str:
    """Of an operation, without the underscore of one in place."""
    return function._schema.name.split("::")[1].rstrip("_")


def _is_view(function) -> bool:
    returned = function._schema.returns
    return bool(returned) and any(r.alias_info is not None and not r.alias_info.is_write for r in returned)


def _memory(t: Tensor) -> int:
    with DisableTorchFunction():  # no reading by the network
        return t.untyped_storage().data_ptr()


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors may share memory. Ranges of columns of one matrix are told apart."""
    if _memory(a) != _memory(b):
        return False
    if a.dim() != 2 or b.dim() != 2 or a.stride() != b.stride() or a.stride(1) != 1:
        return True
    first, second = (t.storage_offset() % max(a.stride(0), 1) for t in (a, b))
    return first < second + b.shape[1] and second < first + a.shape[1]


class _Reads(TorchFunctionMode):
    """Sees what gets at a tensor's values without an operation."""

    READS = frozenset(
        getattr(Tensor, name)
        for name in (
            *("tolist", "numpy", "data_ptr", "untyped_storage", "storage", TYPED_STORAGE, "apply_", "map_", "map2_"),
            *("__array__", "__dlpack__", "__reduce_ex__", "__deepcopy__", "__repr__", "__format__"),
        )
    )

    def __init__(self, record: Record):
        super().__init__()
        self.record = record

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if args and isinstance(args[0], Tensor) and self.record.is_given(args[0]):
            if function in self.READS:
                self.record.refuse_reading(function.__name__)
            if function is Tensor.data.__get__:  # the same memory in a tensor that no operation has made
                function = Tensor.detach
        return function(*args, **kwargs or {})


class Numbers(TorchDispatchMode):
    """The integers among the arguments of all operations, and the sizes of what they read and return."""

    def __init__(self):
        super().__init__()
        self.found: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for value in tree_flatten((args, kwargs, out))[0]:
            if isinstance(value, Tensor):
                self.found.update(value.shape)
            elif isinstance(value, int) and not isinstance(value, bool):
                self.found.add(abs(value))
        return out


def sample_rows(numbers: Iterable[int]) -> int:
    """A number of samples that tells itself, and its multiples, apart from the numbers of the network."""
    taken = {n for n in numbers if n}
    return next(p for p in itertools.count(97, 2) if _is_prime(p) and not any(n % p == 0 for n in taken))


def _is_prime(n: int) -> bool:
    return all(n % d for d in range(3, int(n**0.5) + 1, 2))
