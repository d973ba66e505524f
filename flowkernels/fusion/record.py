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

    def __init__(self, net: nn.Module | None, rows: int):
        super().__init__()
        self.rows, self.calls, self.tensors, self.kinds, self.overwritten = rows, [], [], [], set()
        self.given: set[int] = set()  # inputs, and what was computed from them
        self.mixed: set[int] = set()  # what has no row for each sample any more
        self._places: dict[int, int] = {}
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
        return self._places[id(out)]

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

    def refuse_reading(self, name: str):
        raise NotFusable(f"{self.where}: {name} reads a value, and what follows may depend on it")

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
            place = self._new_place(a) if place is None else place
            if place in self.overwritten:
                raise NotFusable(f"{where}: reads a tensor after {function} has overwritten it through another")
            refs.append(place)
            return Ref(place)

        seen_args, seen_kwargs = tree_map(see, args), tree_map(see, kwargs)
        out = function(*args, **kwargs)
        kind, given = frozenset().union(*(self.kinds[r] for r in refs)), not self.given.isdisjoint(refs)
        name = function._schema.name.split("::")[1]
        if torch.Tag.nondeterministic_seeded in function.tags:
            raise NotFusable(f"{where}: {name} draws random numbers")
        if given and torch.Tag.dynamic_output_shape in function.tags:
            self.refuse_reading(name)
        if name.startswith("new_"):
            kind = frozenset()
        elif name in self.SHAPE_OF:
            kind -= {STATE}
        if not self.mixed.isdisjoint(refs):
            raise NotFusable(f"{where}: {name} reads what was made of several samples or several times")
        outputs = [t for t in tree_flatten(out)[0] if isinstance(t, Tensor)]
        if given and not outputs and out is not None:
            self.refuse_reading(name)
        for t in outputs:
            if id(t) in self._places:  # written in place: what else shows that memory may not be read again
                self.overwritten |= {i for i, u in enumerate(self.tensors) if u is not t and _overlap(t, u)}
        places = [self._place(t, kind) for t in outputs]
        if given:
            self.given.update(places)
        if kind & {TIME, ROWS} and STATE not in kind:
            self.mixed.update(p for p in places if not any(d and d % self.rows == 0 for d in self.tensors[p].shape))
        self.calls.append(Call(function, seen_args, seen_kwargs, places, kind, where))
        return out

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
                wanted |= {a.index for a in tree_flatten((call.args, call.kwargs))[0] if isinstance(a, Ref)}
        values = dict(inputs)

        def argument(a, kind, rows):
            if isinstance(a, int) and not isinstance(a, bool) and a and a % self.rows == 0:
                return a // self.rows * rows
            if not isinstance(a, Ref):
                return a
            if STATE in self.kinds[a.index]:  # of which the shape alone is used
                return self.tensors[a.index][:1]
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
