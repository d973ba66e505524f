"""The torch.library namespace of the ops, and what their registrations share."""

import contextlib
import importlib
import os
import sys
import threading
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flowkernels._checks import expect
from flowkernels._checks import is_finite as every_is_finite
from flowkernels.runtime import backends, observers
from flowkernels.runtime.torch_private import (
    functorch,
    innermost_transform,
    number_of_modes,
    profiler_enabled,
    raw_stream,
    tracing_state,
)

with contextlib.suppress(ImportError):
    importlib.import_module("flowkernels._C")  # now, not at the first call: it has to know of forks before they happen


def _look_for_threads() -> None:
    global _threads
    with contextlib.suppress(OSError):  # no /proc
        _threads = len(os.listdir("/proc/self/task")) > threading.active_count()


def _run_serially() -> None:
    if _threads:
        torch.set_num_threads(1)


# torch waits for ever in a forked child for OpenMP's threads, where the parent has had some (the compiled kernels know)
_threads = True
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_look_for_threads, after_in_child=_run_serially)

CPU = torch.device("cpu")
LIBRARY = torch.library.Library("flowkernels", "DEF")
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # csrc/common/dtype.h


KERNELS: dict[str, Callable] = {}  # of the registered ops, what `register` was given
TENSORS: dict[str, list[tuple[int, str, bool]]] = {}  # their tensors: place, name, whether it may be on the CPU


def register(schema: str, kernel, reference, fake, *, cuda: bool = True, host: tuple[str, ...] = ()) -> None:
    """Define an op: `kernel(C, *args)` runs on the compiled module, `kernel(module, *args, device, stream)` on that of
    CUDA kernels, unless it has none (`cuda`), the function of its name in <op>/triton_kernel.py on Triton,
    `reference(*args)` on torch. An op that takes numbers gets a second overload, `tensor`: see `_register_open`.

    Tensors that are not where the first one is raise: of them, a kernel would read an address that means nothing there.
    host: the names of those that may be on the CPU wherever the others are."""
    name = schema.split("(")[0]
    TENSORS[name] = [
        (i, tensor, tensor in host) for i, (kind, tensor) in enumerate(_arguments(schema)) if kind.startswith("Tensor")
    ]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    KERNELS[name] = kernel
    if cuda:
        backends.CUDA_OPS.add(name)

    def on(choice, args):
        if choice == "cpu":
            return kernel(backends.extension(), *args)
        if choice == "cuda":
            return kernel(backends.cuda_module(), *args, *stream_of(args[0]))
        if choice == "triton":
            return backends.triton_op(name)(*args)
        with no_autocast(args[0]):
            return reference(*args)

    def run(*args):
        expect_places(name, args)
        choice = backends.choose(name, args[0].device)
        if not observers.present:
            return on(choice, args)
        with observers.around(name, choice, args):
            return on(choice, args)

    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flowkernels::{name}", fake, lib=LIBRARY)
    if any(kind.startswith("float") for kind in _kinds(schema)):
        _register_open(schema, run, fake)


def expect_places(op: str, args: tuple) -> None:
    """The tensors of a registered op: all where the first one is, but for those that the host reads."""
    device = args[0].device
    for i, name, on_host in TENSORS[op]:
        for t in args[i] if isinstance(args[i], (list, tuple)) else (args[i],):
            if t is not None and t.device != device and not (on_host and t.is_cpu):
                expect(False, name, f"a tensor on {device}{' or the CPU' if on_host else ''}", t)


def no_autocast(t: Tensor):
    """A context in which torch's own operations compute in the dtypes that they are given, as the kernels do."""
    device = t.device.type
    on = device in ("cpu", "cuda") and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else contextlib.nullcontext()


NUMBERS: dict[str, list[str]] = {}  # of ops that take numbers, the types of their arguments


def _arguments(schema: str) -> list[list[str]]:
    """Type and name of each."""
    return [argument.split() for argument in schema[schema.index("(") + 1 : schema.rindex(") ->")].split(", ")]


def _kinds(schema: str) -> list[str]:
    return [kind for kind, _ in _arguments(schema)]


def _register_open(schema: str, run, fake) -> None:
    """The overload `tensor`, with a tensor of no dimensions on the CPU in the place of every number: the compiler
    keeps a tensor open, where it would bake a number into the code and compile anew for the next."""
    name, kinds = schema.split("(")[0], _kinds(schema)
    NUMBERS[name] = kinds
    LIBRARY.define(schema.replace("(", ".tensor(", 1).replace("float", "Tensor"), tags=(torch.Tag.pt2_compliant_tag,))

    def number(kind, arg):
        if arg is None or not kind.startswith("float"):
            return arg
        return [t.item() for t in arg] if kind == "float[]" else arg.item()

    LIBRARY.impl(f"{name}.tensor", lambda *args: run(*map(number, kinds, args)), "CompositeExplicitAutograd")
    torch.library.register_fake(f"flowkernels::{name}.tensor", fake, lib=LIBRARY)


def register_autograd(name: str, backward, setup_context) -> None:
    """For both overloads: the numbers that `setup_context` sees are tensors in one of them."""
    for overload in (name, f"{name}.tensor"):
        torch.library.register_autograd(f"flowkernels::{overload}", backward, setup_context=setup_context, lib=LIBRARY)


def dispatch(name: str, *args):
    """The registered op, by torch's dispatcher; compiled, with numbers that are not known yet left open."""
    op = getattr(torch.ops.flowkernels, name)
    if torch.compiler.is_compiling() and any(map(_is_open, NUMBERS[name], args)):
        return op.tensor(*map(_as_tensor, NUMBERS[name], args))
    return op(*args)


def _is_open(kind: str, arg) -> bool:
    """Whether it holds a number that the compiler keeps open: one that it does not know to have a sign."""
    if arg is None or not kind.startswith("float"):
        return False
    if kind == "float[]":
        return any(_is_open("float", a) for a in arg)
    known = torch.fx.experimental.symbolic_shapes.statically_known_true
    return isinstance(arg, Tensor) or not (known(arg < 0) or known(arg >= 0))


def _as_tensor(kind: str, arg):
    if arg is None or not kind.startswith("float"):
        return arg
    if kind == "float[]":
        return [as_tensor(a) for a in arg]
    return as_tensor(arg)


def as_tensor(number) -> Tensor:
    """A number as the overload `tensor` takes it; a product, which the compiler knows how to make of an open number."""
    return torch.ones((), dtype=torch.float64, device="cpu") * number


def on_gpu(t: Tensor) -> bool:
    return t.is_cuda


def stream_of(t: Tensor) -> tuple[int, int]:
    """The device and the address of the stream on which a CUDA kernel for `t` belongs."""
    if not t.is_cuda:  # kernels compiled for the host
        return 0, 0
    device = t.get_device()
    return device, raw_stream(device)


def uploaded(C, t: Tensor, like: Tensor, where: tuple) -> Tensor:
    """The numbers `t` of the CPU on the GPU of `like`. They travel as arguments of launches: nothing waits, and a graph
    can hold it."""
    words = -(-t.nbytes // 16)
    padded = torch.nn.functional.pad(t, (0, 16 * words // t.element_size() - len(t))).contiguous()
    there = like.new_empty(padded.shape, dtype=t.dtype)
    C.mlp_upload(padded.data_ptr(), padded.nbytes, there.data_ptr(), *where)
    return there[: len(t)]


class Made:
    """Tensors that work on the current stream has made, to be kept and used on any: the GPU's queues wait for one
    another, the host for none, and memory is not given away before the last one is done with it.

    A graph's capture waits for nothing: it begins when the device is idle, as `torch.cuda.graph` sees to.
    """

    def __init__(self, tensors: Iterable[Tensor | None]):
        self.tensors = [t for t in tensors if t is not None and on_gpu(t)]
        if self.tensors:
            stream = torch.cuda.current_stream(self.tensors[0].device)
            self.event, self.streams = torch.cuda.Event(), {stream.cuda_stream}
            self.event.record(stream)

    def use(self) -> None:
        """Before work on the current stream that uses them."""
        if not self.tensors:
            return
        stream = torch.cuda.current_stream(self.tensors[0].device)
        if stream.cuda_stream in self.streams or torch.cuda.is_current_stream_capturing():
            return
        stream.wait_event(self.event)
        for t in self.tensors:
            t.record_stream(stream)
        self.streams.add(stream.cuda_stream)


LARGE = 32 << 20  # bytes from which the C library maps memory afresh for every tensor


def fresh(t: Tensor) -> Tensor:
    """`t`, just allocated, on large pages where that pays."""
    if torch.compiler.is_compiling() or type(t) is not Tensor or t.nbytes < LARGE or not t.is_cpu:
        return t
    if (C := backends.extension()) is not None:
        C.advise_large_pages(t.data_ptr(), t.nbytes)
    return t


def direct(op: str, *tensors: Tensor | None, gradient: bool = False, host: Tensor | None = None):
    """The module of compiled kernels and what they take last (`where`, as in `register`), if the call may go straight
    to it; None if torch's dispatcher has something to do.

    It has under a compiler, a tracer, a mode, a transform, a profiler, `profile_ranges` or `record_calls`, and for
    tensors that are a subclass, live neither on the CPU nor on the CUDA GPU of the first one, carry a pending negation,
    are zeros without memory (of forward-mode differentiation), or need a gradient (unless the caller sees to that).
    Otherwise it would only cost time: about 40 us a call, and 300 us where there is a gradient. host: a tensor that is
    read on the CPU wherever the others are.
    """
    if _watched() or (host is not None and not is_plain(host)):
        return None
    grad, first = not gradient and torch.is_grad_enabled(), tensors[0]
    cuda = first.is_cuda
    for t in tensors:
        if t is None:
            continue
        if type(t) is not Tensor or t.is_neg() or t._is_zerotensor():  # is_plain, which takes a call
            return None
        if not (t.is_cuda if cuda else t.is_cpu) or (grad and t.requires_grad):
            return None
    if not cuda and (choice := backends.choose(op, "cpu")) == "cpu":
        return backends.extension(), ()
    if cuda:
        choice = backends.choose(op, first.device)
    return (backends.cuda_module(), stream_of(first)) if choice == "cuda" else None


def plain(op: str, t: Tensor):
    """The module of compiled kernels, if a call on plain tensors of the CPU may go straight to its function
    `<op>_plain`, which looks whether all are such, in a tenth of the time of Python's checks; else None. t: one of
    them, which memory for results may be made like."""
    if _watched() or type(t) is not Tensor or not t.is_cpu or t.layout is not torch.strided or t.is_nested:
        return None
    if backends.requested() not in ("auto", "cpu"):  # which may not be there: arguments are looked at first
        return None
    return backends.reader() if backends.choose(op, "cpu") == "cpu" else None


def is_plain_state(t) -> bool:
    """Whether it is known to be a small plain tensor of the CPU, float32 or float64, of samples that are all finite."""
    return (C := backends.reader()) is not None and C.is_finite(t) == 1 and t.dim() > 1


def is_finite(t: Tensor) -> bool:
    """No NaN or Inf; of small tensors of the CPU without torch's operations. Inside vmap, where values cannot be looked
    at, it is taken to have none."""
    known = -1 if (C := backends.reader()) is None else C.is_finite(t)
    return is_batched(t) or every_is_finite(t) if known < 0 else bool(known)


def direct_triton(op: str, t: Tensor):
    """The module of the op's Triton kernels, if a call on `t`, without a gradient, may go straight to it."""
    if _watched() or type(t) is not Tensor or t.is_neg() or t._is_zerotensor():
        return None
    if backends.choose(op, t.device) == "triton":
        return sys.modules[backends.triton_op(op).__module__]
    return None


def threads_or(where: tuple) -> tuple:
    """What a kernel takes last: a number of threads, or on a GPU the device and the stream."""
    return where or (torch.get_num_threads(),)


def refused_place(launch, arguments: tuple, bad: Tensor | None, where: tuple) -> int:
    """What a kernel returns that looks for values which it refuses: the place of the first, or -1. A kernel on a GPU
    leaves it in `bad`, for which the call waits, except while a CUDA graph is captured."""
    if bad is None:
        return launch(*arguments)
    launch(*arguments, bad.data_ptr(), *where)
    return -1 if is_captured(bad) else int(bad.item())


def is_captured(t: Tensor) -> bool:
    """Whether what is done with `t` now goes into a CUDA graph: nothing can be waited for, and what it makes is written
    by the graph's replays alone, so that nothing else may use it."""
    return on_gpu(t) and torch.cuda.is_current_stream_capturing()


def _watched() -> bool:
    if torch.compiler.is_compiling() or tracing_state() or number_of_modes() or profiler_enabled() or _is_transformed():
        return True
    return observers.present


def is_plain(t: Tensor, device: torch.device = CPU) -> bool:
    """A tensor whose memory, on that device, holds its values."""
    return type(t) is Tensor and t.device == device and not t.is_neg() and not t._is_zerotensor()


def is_transformed() -> bool:
    """Inside torch.func's transforms or forward-mode differentiation, for which the ops register no rules."""
    return not torch.compiler.is_compiling() and _is_transformed()


def is_batched(t: Tensor) -> bool:
    """Inside vmap, or in the backward of torch.autograd.grad(is_grads_batched=True), which has one of its own."""
    while functorch.is_functorch_wrapped_tensor(t) and not functorch.is_batchedtensor(t):
        t = functorch.get_unwrapped(t)
    return functorch.is_batchedtensor(t) or functorch.is_legacy_batchedtensor(t)


def _is_transformed() -> bool:
    return forward_ad._current_level >= 0 or innermost_transform() is not None
