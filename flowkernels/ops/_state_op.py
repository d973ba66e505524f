"""What the ops that make a new state share: the ways that a call may take, and their two registrations."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flowkernels._checks import LOW, expect, expect_out
from flowkernels.ops.library import LARGE, direct, dispatch, fresh, is_transformed, no_autocast, register


class StateOp:
    """An op that makes a new state, and on demand a low-precision copy of it.

    Registered as `name(*arguments, ScalarType? low) -> (state, copy)`, and as `name_out(*arguments, out, low)`, which
    writes: to another tensor too, where `also` names one.

    Args:
        arguments: of the schema; the state first.
        tensors: the names of the tensors among them, in the order in which they are passed to a call; the last name is
            that of a list if `many`.
        kernel: `kernel(C, *arguments, out, low[, also], *where)`; where: as in `register`.
        reference: `reference(*arguments)` in torch: the new state, and what `also` gets, which may be None.
        layout: of the results, where a call does not say where they go.
    """

    def __init__(
        self,
        name: str,
        arguments: str,
        *,
        tensors: Sequence[str],
        kernel: Callable,
        reference: Callable,
        layout: torch.memory_format = torch.contiguous_format,
        many: bool = False,
        also: str | None = None,
        differentiable: bool = True,
    ):
        self.name, self.out_name, self.tensors, self.many = name, f"{name}_out", tensors, many
        self.kernel, self.reference, self.layout = kernel, reference, layout
        self.also, self.differentiable = also, differentiable
        self.count = count = arguments.count(", ") + 1
        self.none = none = () if also is None else (None,)

        def functional(C, *args) -> tuple[Tensor, Tensor]:
            x, low = args[0], args[count]
            new, copy = self.fake(x, low)
            self.kernel(C, *args[:count], new, None if low is None else copy, *none, *args[count + 1 :])
            return new, copy

        def functional_reference(*args) -> tuple[Tensor, Tensor]:
            new, copy = self.fake(*args)
            new.copy_(reference(*args[:-1])[0])
            return new, copy if args[-1] is None else copy.copy_(new)

        def writing(C, *args) -> None:
            outs = count + 2 + len(none)
            self.write(C, args[:count], args[count:outs], args[outs:])

        def writing_reference(*args) -> None:
            out, low, *others = args[count:]
            new, velocity = reference(*args[:count])
            for to, value in ((out, new), (low, new), *((t, velocity) for t in others)):
                if to is not None:
                    to.copy_(value)

        last = "" if also is None else f", Tensor(c!)? {also}"
        schema = f"{name}({arguments}, ScalarType? low) -> (Tensor, Tensor)"
        schema_out = f"{name}_out({arguments}, Tensor(a!) out, Tensor(b!)? low{last}) -> ()"
        register(schema, functional, functional_reference, self.fake)
        register(schema_out, writing, writing_reference, lambda *args: None)

    def fake(self, x: Tensor, *args) -> tuple[Tensor, Tensor]:
        """Memory for what the op of that name returns."""
        low = args[-1]
        return self.empty(x), x.new_empty(0) if low is None else self.empty(x, low)

    def empty(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        if dtype is None:  # its own is faster not named
            return fresh(torch.empty_like(x, memory_format=self.layout))
        return fresh(torch.empty_like(x, dtype=dtype, memory_format=self.layout))

    def made(self, x: Tensor) -> Tensor:
        """`empty(x)`, where no compiler looks: most often a call less."""
        new = torch.empty_like(x, memory_format=self.layout)
        return new if new.nbytes < LARGE else fresh(new)

    def on_triton(self, kernel: Callable) -> tuple[Callable, Callable]:
        """Both registered ops, the one that writes second, on `kernel(*arguments, out, low[, also])`."""

        def functional(*args) -> tuple[Tensor, Tensor]:
            new, copy = self.fake(*args)
            kernel(*args[:-1], new, None if args[-1] is None else copy, *self.none)
            return new, copy

        def writing(*args) -> None:
            kernel(*args)
            _tell_autograd(args[self.count :])

        return functional, writing

    def call(self, args: tuple, tensors: tuple, out: Tensor | None, low, also: tuple = ()):
        """The state, or the pair of it and its copy. args, out, low: of the public function, checked but for `out` and
        `also`, the tensor of that name; tensors: those in args."""
        x, wants_low = args[0], low is not None
        functional = out is None and not isinstance(low, Tensor) and (not also or also[0] is None)
        if functional and (way := direct(self.name, *tensors)) is not None:
            C, where = way
            new = self.made(x)
            copy = self.empty(x, low) if wants_low else None
            self.kernel(C, *args, new, copy, *also, *where)
            return (new, copy) if wants_low else new
        if not self.differentiable:
            self._refuse_gradients(f"no gradient: {self.name} has none; use torch.no_grad()", tensors, out, low, also)
        if is_transformed():  # jvp, vmap and grad of torch.func go through torch's own rules
            name = self.also if also and also[0] is not None else "out"
            expected = "None, and low a dtype, inside torch.func's transforms"
            expect(functional, name, expected, "a tensor to write to")
            with no_autocast(x):
                new, _ = self.reference(*args)
            return (new, new.to(low)) if wants_low else new
        if functional:
            new, copy = dispatch(self.name, *args, low)
            return (new, copy) if wants_low else new

        out = self.empty(x) if out is None else out
        expect_out(out, "out", x, (x.dtype,))
        if also and also[0] is not None:
            expect_out(also[0], self.also, x, velocity_dtypes(x))
        if wants_low and not isinstance(low, Tensor):
            low = self.empty(x, low)
        if self.differentiable:
            self._refuse_gradients("no gradient with out= or a tensor low=", tensors, out, low, also)
        if (way := direct(self.out_name, *tensors, out, low, *also)) is not None:
            self.write(way[0], args, (out, low, *also), way[1])
        else:
            dispatch(self.out_name, *args, out, low, *also)
        return (out, low) if wants_low else out

    def write(self, C, args: tuple, outs: tuple, where: tuple = ()) -> None:
        self.kernel(C, *args, *outs, *where)
        _tell_autograd(outs)

    def _refuse_gradients(self, expected: str, tensors, out, low, also) -> None:
        if not torch.is_grad_enabled():
            return
        for i, t in enumerate((*tensors, out, low, *also)):
            if isinstance(t, Tensor) and t.requires_grad:
                expect(False, self._name(i, len(tensors)), expected, "requires_grad")

    def _name(self, i: int, count: int) -> str:
        """Of the i-th of so many tensors of a call, and of those that are written after them."""
        if i >= count:
            return ("out", "low", self.also)[i - count]
        alone = len(self.tensors) - self.many
        return self.tensors[i] if i < alone else f"{self.tensors[-1]}[{i - alone}]"


def _tell_autograd(outs: tuple) -> None:
    """That these were written to, as torch's own operations do."""
    for t in outs:
        if t is not None:
            torch.autograd.graph.increment_version(t)


_BESIDE_FLOAT32, _BESIDE_FLOAT64 = (torch.float32, *LOW), (torch.float64,)


def velocity_dtypes(x: Tensor) -> tuple[torch.dtype, ...]:
    """What a velocity next to the state x may be."""
    return _BESIDE_FLOAT64 if x.dtype == torch.float64 else _BESIDE_FLOAT32


def gradient_of_state(grad: Tensor | None, grad_low: Tensor | None) -> Tensor | None:
    """Of both results of an op: that of the copy counts as the state's own."""
    if grad_low is None or not grad_low.numel():
        return grad
    low = grad_low.to(grad.dtype if grad is not None else torch.float32)
    return low if grad is None else grad + low
