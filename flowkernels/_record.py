"""One call of a velocity network, recorded operation by operation, with what each value depends on.

Values that depend on the state x become layers (`flowkernels/_lowering.py`). Others depend on time, on conditioning or
on parameters alone; they are computed again for all steps of a schedule and all samples of a batch (`Record.replay`).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

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

    SHAPE_ONLY = ("new_zeros", "new_ones", "new_full", "new_empty", "zeros_like", "ones_like", "full_like")

    def __init__(self, net: nn.Module | None, rows: int):
        super().__init__()
        self.rows, self.calls, self.tensors, self.kinds, self.overwritten = rows, [], [], [], set()
        self._places: dict[int, int] = {}
        self._names = {id(m): name or type(m).__name__ for name, m in net.named_modules()} if net is not None else {}
        self._modules: list[str] = []

    def input(self, t: Tensor, *kind: str) -> int:
        return self._place(t, frozenset(kind))

    def _place(self, t: Tensor, kind: frozenset) -> int:
        self._places[id(t)] = len(self.tensors)
        self.tensors.append(t)  # kept alive, so that no other tensor takes its identity
        self.kinds.append(kind)
        return len(self.tensors) - 1

    def run(self, call: Callable[[], Tensor]) -> int:
        """Record `call()`; where its result is."""

        def enter(module, _):
            self._modules.append(f"{self._names.get(id(module), '?')} ({type(module).__name__})")

        def leave(*_):
            self._modules.pop()

        hooks = nn.modules.module
        handles = [
            hooks.register_module_forward_pre_hook(enter),
            hooks.register_module_forward_hook(leave, always_call=True),
        ]
        try:
            with torch.no_grad(), self:
                out = call()
        finally:
            for handle in handles:
                handle.remove()
        return self._places[id(out)]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, where = kwargs or {}, self._modules[-1] if self._modules else "the network"
        refs: list[int] = []

        def see(a):
            if not isinstance(a, Tensor):
                return a
            place = self._places.get(id(a))
            place = self._place(a, frozenset()) if place is None else place
            if place in self.overwritten:
                raise NotFusable(f"{where}: reads a tensor after {function} has overwritten it through another")
            refs.append(place)
            return Ref(place)

        seen_args, seen_kwargs = tree_map(see, args), tree_map(see, kwargs)
        out = function(*args, **kwargs)
        kind = frozenset().union(*(self.kinds[r] for r in refs))
        if function._schema.name.split("::")[1] in self.SHAPE_ONLY:
            kind = frozenset()
        outputs = [t for t in tree_flatten(out)[0] if isinstance(t, Tensor)]
        for t in outputs:
            if id(t) in self._places:  # written in place: what else shows that memory may not be read again
                self.overwritten |= {i for i, u in enumerate(self.tensors) if u is not t and _overlap(t, u)}
        places = [self._place(t, kind) for t in outputs]
        self.calls.append(Call(function, seen_args, seen_kwargs, places, kind, where))
        return out

    def leads(self, place: int) -> bool:
        """Whether the value has one row a sample."""
        return self.tensors[place].dim() > 0 and len(self.tensors[place]) == self.rows

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
            if isinstance(a, int) and not isinstance(a, bool) and a == self.rows:
                return rows
            if not isinstance(a, Ref):
                return a
            if STATE in self.kinds[a.index]:  # of which the shape alone is used
                return self.tensors[a.index][:1]
            value = values.get(a.index, self.tensors[a.index])
            mine = self.kinds[a.index]
            if not self.leads(a.index) or mine == kind:
                return value
            if not mine:
                return value.expand(rows, *value.shape[1:]) if len(value) == 1 else value
            return value.repeat_interleave(n, 0) if mine == {TIME} else value.repeat(steps, *[1] * (value.dim() - 1))

        with torch.no_grad():
            for call in reversed(order):
                rows = (steps if TIME in call.kind else 1) * (n if ROWS in call.kind else 1)
                args, kwargs = tree_map(
                    lambda a, kind=call.kind, rows=rows: argument(a, kind, rows), (call.args, call.kwargs)
                )
                if call.function._schema.is_mutable:
                    args = (args[0].clone(), *args[1:])
                out = call.function(*args, **kwargs)
                for place, t in zip(
                    call.outputs, [t for t in tree_flatten(out)[0] if isinstance(t, Tensor)], strict=True
                ):
                    values[place] = t
        return {place: values.get(place, self.tensors[place]) for place in needed}


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors may share memory. Ranges of columns of one matrix are told apart."""
    if a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return False
    if a.dim() != 2 or b.dim() != 2 or a.stride() != b.stride() or a.stride(1) != 1:
        return True
    first, second = (t.storage_offset() % max(a.stride(0), 1) for t in (a, b))
    return first < second + b.shape[1] and second < first + a.shape[1]


def sample_rows(dims: Iterable[int]) -> int:
    """A number of samples that no dimension of the network shares, so that it tells itself apart in the arguments."""
    taken = set(dims)
    return next(
        p for p in (11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, *range(67, 10_000)) if p not in taken
    )
