"""The captured loop: all steps of a schedule or a solver as one CUDA graph, or compiled as one function.

Small networks spend their sampling time on launching kernels and on Python. A schedule is fixed, so that its whole loop
can be recorded once and replayed. Nothing inside the loop looks at a value: step sizes are constants, the times are on
the device before it starts, and what depends on them alone is evaluated once (`fk.HasTimeEmbedding`).
"""

import contextlib
import functools
import sys
import threading
import traceback
import types
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from flowkernels._checks import expect
from flowkernels.runtime import backends
from flowkernels.runtime.torch_private import (
    FORWARD_HOOKS,
    GLOBAL_HOOKS,
    SPARSE_PARTS,
    TorchDispatchMode,
    compiler_errors,
    float32_convolutions,
    float32_products,
    is_traceable_wrapper_subclass,
    of_all_modules,
    tree_leaves,
    uncompiled,
)
from flowkernels.runtime.watch import Unwatchable, Watch
from flowkernels.sampling.loop import OPS, REFERENCE, AsFunctions, evaluated_steps, last_state
from flowkernels.sampling.state import State
from flowkernels.solver import Solver, euler_sizes
from flowkernels.velocity.evaluate import warn_if_training
from flowkernels.velocity.hashes import unwrapped
from flowkernels.velocity.protocol import Velocity, resolve

MODES = (None, "auto", "graph", "compile")
COMPILER = "inductor"  # torch.compile's backend
SIZE = 16  # loops kept, of all velocities together
WAY_OUT = "capture=None runs it step by step"


def choose(capture: str | None, device: torch.device) -> str | None:
    """None, "graph" or "compile" for tensors on the device. ValueError for a graph where there are none."""
    known = capture is None or (isinstance(capture, str) and capture in MODES)
    expect(known, "capture", "None, 'auto', 'graph' or 'compile'", capture)
    if capture == "auto":
        return "graph" if device.type == "cuda" else None
    if capture == "graph":
        expected = f"a CUDA GPU for 'graph', which is one CUDA graph ({WAY_OUT}, 'compile' compiles the loop)"
        expect(device.type == "cuda", "capture", expected, f"tensors on {device}")
    return capture


def run(mode: str, velocity: Velocity, x: Tensor, solver: Solver) -> Tensor:
    """The state after all steps of the solver from x `[n, *shape]`, by a loop recorded now or on an earlier call."""
    kind, known = x.device.type, resolve(velocity)
    op = "linear_update" if euler_sizes(solver.updates()) is None else "euler_step"
    # compiled, a step is torch code as well, which the compiler fuses with the network, unless a backend is asked for
    plain = mode == "compile" and not backends.asked()
    backend = "reference" if plain else backends.choose(op, kind)
    autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    settings = float32_products(), float32_convolutions(), torch.are_deterministic_algorithms_enabled()
    settings += torch.get_default_dtype(), *(tuple(vars(of_all_modules)[name]) for name in GLOBAL_HOOKS)
    what = tuple(solver.model_times.tolist()), solver.updates()
    key = mode, COMPILER, backend, *what, x.shape, x.dtype, x.device, autocast, settings

    if mode == "compile":
        # settings that are constants to the compiler
        key += *(known.convention() or {}).values(), known.has_time_embedding(), _hooks(velocity)
        with LOOPS.lock:
            loop = LOOPS.find(velocity, key)
            if loop is None:
                t = known.model_times(solver.model_times.clone(), x)
                next(evaluated_steps(velocity, x, solver, t))  # the velocity's own errors, not the compiler's
                compiled = _compiled(solver, REFERENCE if backend == "reference" else OPS)
                loop = LOOPS.keep(velocity, key, functools.partial(_call_compiled, compiled, t=t))
        return loop(velocity, x)

    # under the lock to the end: the graph's buffers are shared by all who call it
    with LOOPS.lock:
        LOOPS.drop_passed()
        state = LOOPS.state_of(velocity)
        warns = (state is None or state.warns) and warn_if_training(velocity, stacklevel=6)
        graph = None if state is None else LOOPS.find(velocity, key, state)
        if graph is None or (graph.guidance is not None and graph.guidance.changed() is not None):
            t = known.model_times(solver.model_times.clone(), x)
            with torch.autocast(kind, autocast[1], autocast[0], cache_enabled=False):  # cached casts would be freed
                watch = _watch_guidance(velocity)
                graph = _Graph(lambda x, t: last_state(velocity, x, solver, t), x, t, watch)
            state = LOOPS.state_of(velocity) or State(velocity, warns)  # after first calls, which may have changed it
            graph.own_all_but(state.storages)
            LOOPS.keep(velocity, key, graph, state)
        return graph(x)


# ---- torch.compile ----


def _compiled(solver: Solver, functions: AsFunctions) -> Callable:
    """`loop(velocity, x, t)`."""

    def loop(velocity, x, t):
        return last_state(velocity, x, solver, t, functions)

    # a code object of its own: the compiler counts what it has made of one, and gives up beyond a limit
    own = types.FunctionType(loop.__code__.replace(), loop.__globals__, loop.__name__, None, loop.__closure__)
    return torch.compile(own, fullgraph=True, dynamic=False, backend=COMPILER)


def _call_compiled(loop: Callable, velocity, x: Tensor, t: Tensor) -> Tensor:
    try:
        return loop(velocity, x.detach().contiguous(), t)
    except compiler_errors() as e:
        reason = f"{_first_line(e)}{_at(getattr(e, 'real_stack', ()))}"
        expect(False, "velocity", f"a network that torch.compile takes whole ({WAY_OUT})", reason, RuntimeError)


def _hooks(velocity) -> tuple:
    """What tells the hooks of all modules apart, which the compiler takes for those that it has seen: their numbers."""
    modules = velocity.modules() if isinstance(velocity, nn.Module) else ()
    return tuple(number for module in modules for name in FORWARD_HOOKS for number in getattr(module, name))


# ---- CUDA graph ----


class _Graph:
    """One CUDA graph of `loop(x, t)`; called with a state, it returns the new one in memory of its own.

    A graph holds addresses. What was made while it was recorded is in its private pool. All else that it reads,
    `reads`, is either of the velocity's `State`, so that a change of address is seen and the graph not replayed, or
    held here.

    guidance: what says whether a function of guidance reads what it read then.
    """

    def __init__(self, loop: Callable, x: Tensor, t: Tensor, guidance: Watch | None):
        self.guidance = guidance
        with torch.cuda.device(x.device), torch.inference_mode(False), torch.no_grad():
            self.x, self.t = x.clone(memory_format=torch.contiguous_format), t.clone()  # read by every replay
            self.graph, self.out, self.reads = _record(functools.partial(loop, self.x, self.t), x.device)
            self.done = torch.cuda.Event()

    def own_all_but(self, storages: Collection[int]) -> None:
        """Hold what it reads, but for what the velocity's state has: old weights are not kept."""
        self.reads = {place: storage for place, storage in self.reads.items() if place not in storages}

    def __call__(self, x: Tensor) -> Tensor:
        with torch.cuda.device(self.x.device):
            _line_up(self.x.device)
            self.x.copy_(x)
            self.graph.replay()
            out = self.out.clone()
            self.done.record()
            LAST[self.x.device] = self.done
        return out

    def is_done(self) -> bool:
        """Whether its last replay is over, as far as it can be told: a query would spoil a graph that is recorded."""
        return not torch.cuda.is_current_stream_capturing() and self.done.query()


def _watch_guidance(velocity: Velocity) -> Watch | None:
    """Of a function of guidance all that it reads: a number in a global, say, is a constant of the graph."""
    guidance = getattr(unwrapped(velocity), "guidance", None)
    if not callable(guidance):
        return None
    try:
        return Watch(guidance)
    except Unwatchable as e:
        expect(False, "guidance", f"a function whose changes can be noticed, in a CUDA graph ({WAY_OUT})", str(e))


# One stream for each device, on which all graphs are recorded: cuBLAS keeps scratch memory for each stream, which these
# graphs share. So what they do, and their recording, is one after another.
STREAMS: dict[torch.device, torch.cuda.Stream] = {}
LAST: dict[torch.device, torch.cuda.Event] = {}  # behind the last of that


def _line_up(device: torch.device) -> None:
    """The current stream goes on behind all that graphs of this device do."""
    if device in LAST:
        LAST[device].wait()


@contextlib.contextmanager
def _aside(device: torch.device) -> Iterator[None]:
    """On the stream for recording, between what this stream has done before and what it does after."""
    if device not in STREAMS:
        STREAMS[device] = torch.cuda.Stream(priority=-1)  # of the streams that torch hands out, one with few users
    stream, current = STREAMS[device], torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        _line_up(device)
        try:
            yield
        finally:
            LAST[device] = stream.record_event()
            current.wait_stream(stream)


def _record(loop: Callable[[], Tensor], device: torch.device) -> tuple:
    """(graph, its output, memory that it reads and has not made) of `loop()` on the current device, in a private pool
    of memory."""
    outer, before = sys.exc_info()[1], torch.cuda.get_sync_debug_mode()
    with _aside(device):
        loop()  # what is made at a first call: handles of libraries, tables that a network keeps
        reads = _Reads()
        # where it fails, by memory say, of which compiled parts take more as they were written: what it saw until then
        with contextlib.suppress(Exception), uncompiled(), reads:
            loop()
    graph = torch.cuda.CUDAGraph()
    try:
        # once with syncs forbidden, for an error that names the line and leaves no half-made graph behind; of a mode
        # that torch has not done with, as it says at the first use
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
        with _aside(device):
            loop()
        torch.cuda.set_sync_debug_mode(before)
        # thread_local: what other threads ask of the GPU meanwhile does not spoil the graph
        with torch.cuda.graph(graph, stream=STREAMS[device], capture_error_mode="thread_local"):
            out = loop()
    except RuntimeError as e:
        first = e
        while first.__context__ not in (None, outer):  # ending the capture fails as well, after what stopped it
            first = first.__context__
        reason = f"{_first_line(first)}{_at(traceback.extract_tb(first.__traceback__))}"
        expected = f"a network without host syncs for a CUDA graph ({WAY_OUT}; capture='compile' may take it)"
        expect(False, "velocity", expected, reason, RuntimeError)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return graph, out, reads.storages


class _Reads(TorchDispatchMode):
    """The memory that operations read or write and that none of them has made, by where its storage is."""

    supports_higher_order_operators = True

    def __init__(self):
        super().__init__()
        self.storages, self.made = {}, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for storage in _storages((args, kwargs)):
            if storage._cdata not in self.made:
                self.storages[storage._cdata] = storage
        out = func(*args, **(kwargs or {}))
        self.made.update(storage._cdata for storage in _storages(out) if storage._cdata not in self.storages)
        return out


def _storages(values) -> Iterator[torch.UntypedStorage]:
    todo = [t for t in tree_leaves(values) if isinstance(t, Tensor)]
    while todo:
        t = todo.pop()
        if is_traceable_wrapper_subclass(t):
            todo += [getattr(t, name) for name in t.__tensor_flatten__()[0]]
        elif t.layout in SPARSE_PARTS:
            todo += [getattr(t, name)() for name in SPARSE_PARTS[t.layout]]
        elif t.layout is torch.strided:
            yield t.untyped_storage()


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def _at(frames: Sequence[traceback.FrameSummary]) -> str:
    """Where an error came from, torch's own frames aside."""
    own = [f for f in frames if not Path(f.filename).is_relative_to(Path(torch.__file__).parent)]
    return f" at {own[-1].filename}:{own[-1].lineno}, `{own[-1].line}`" if own else ""


# ---- what is kept ----


class _Loops:
    """Loops by the velocity they were made of and its state, without keeping it alive; the least recently used go
    first. A graph that is dropped while a replay of it runs is kept until that is over."""

    def __init__(self):
        self.lock, self.loops, self.dropped = threading.RLock(), OrderedDict(), []

    def state_of(self, velocity) -> State | None:
        """The velocity's state now, if loops of it are kept."""
        _, identity = _identity(velocity)
        places = reversed(list(self.loops))  # a list: the end of a velocity takes loops away at any time
        states = dict.fromkeys(state for of, _, state in places if of == identity and state is not None)
        return next((state for state in states if state.holds(velocity)), None)

    def find(self, velocity, key, state: State | None = None):
        place = (_identity(velocity)[1], key, state)
        if place not in self.loops:
            return None
        self.loops.move_to_end(place)
        return self.loops[place][0]

    def keep(self, velocity, key, loop, state: State | None = None):
        owner, identity = _identity(velocity)
        place = (identity, key, state)
        try:
            gone = weakref.ref(owner, lambda _: self._drop(place))
        except TypeError:
            expected = "a callable that can be weakly referenced, for capture (a VelocityField of it can)"
            expect(False, "velocity", expected, velocity, TypeError)
        self.loops[place] = loop, gone
        while len(self.loops) > SIZE:
            self._drop(next(iter(self.loops)))
        return loop

    def _drop(self, place) -> None:
        loop, _ = self.loops.pop(place, (None, None))
        if isinstance(loop, _Graph) and not loop.is_done():
            self.dropped.append(loop)

    def drop_passed(self) -> None:
        """Let go of dropped graphs whose replays are over."""
        for graph in list(self.dropped):
            if graph.is_done():
                self.dropped.remove(graph)

    def clear(self) -> None:
        with self.lock:
            for place in list(self.loops):
                self._drop(place)


def _identity(velocity) -> tuple:
    """(object that the loops of a velocity live as long as, what tells them apart): a bound method is made anew at
    every access."""
    method = isinstance(velocity, types.MethodType)
    owner = velocity.__self__ if method else velocity
    return owner, (id(owner), velocity.__func__ if method else None)


LOOPS = _Loops()
