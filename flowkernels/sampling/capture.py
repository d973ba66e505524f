"""The captured loop: all steps of a schedule or a solver as one CUDA graph, or compiled as one function.

Small networks spend their sampling time on launching kernels and on Python. A schedule is fixed, so that its whole loop
can be recorded once and replayed. Nothing inside the loop looks at a value: step sizes are constants, the times are on
the device before it starts, and what depends on them alone is evaluated once (`fk.HasTimeEmbedding`).
"""

import functools
import sys
import threading
import traceback
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from flowkernels._checks import expect
from flowkernels.runtime import backends
from flowkernels.runtime.torch_private import FORWARD_HOOKS, HELD, compiler_errors
from flowkernels.sampling.loop import OPS, REFERENCE, AsFunctions, evaluated_steps, last_state
from flowkernels.solver import Solver, euler_sizes
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
    settings = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    what = tuple(solver.model_times.tolist()), solver.updates()
    key = mode, COMPILER, backend, *what, x.shape, x.dtype, x.device, autocast, settings

    if mode == "compile":
        # settings that are constants to the compiler
        key += *(known.convention() or {}).values(), known.has_time_embedding(), _hooks(velocity)
        with LOOPS.lock:
            loop = LOOPS.find(velocity, key)
            if loop is None:
                t = known.model_times(solver.model_times, x)
                next(evaluated_steps(velocity, x, solver, t))  # the velocity's own errors, not the compiler's
                compiled = _compiled(solver, REFERENCE if backend == "reference" else OPS)
                loop = LOOPS.keep(velocity, key, functools.partial(_call_compiled, compiled, t=t))
        return loop(velocity, x)

    # under the lock to the end: the graph's buffers are shared by all who call it
    with LOOPS.lock:
        graph = LOOPS.find(velocity, (*key, _state(velocity)))
        if graph is None:
            t = known.model_times(solver.model_times, x)
            with torch.autocast(kind, autocast[1], autocast[0], cache_enabled=False):  # cached casts would be freed
                graph = _Graph(lambda x, t: last_state(velocity, x, solver, t), x, t)
            LOOPS.keep(velocity, (*key, _state(velocity)), graph)  # after its first calls, which may have changed it
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


# ---- CUDA graph ----


class _Graph:
    """One CUDA graph of `loop(x, t)`; called with a state, it returns the new one in memory of its own."""

    def __init__(self, loop: Callable, x: Tensor, t: Tensor):
        with torch.cuda.device(x.device), torch.inference_mode(False), torch.no_grad():
            self.x, self.t = x.clone(memory_format=torch.contiguous_format), t.clone()  # read by every replay
            self.graph, self.out = _record(functools.partial(loop, self.x, self.t))
            self.done = torch.cuda.Event()

    def __call__(self, x: Tensor) -> Tensor:
        with torch.cuda.device(self.x.device):
            self.done.wait()  # for a replay on another stream
            self.x.copy_(x)
            self.graph.replay()
            out = self.out.clone()
            self.done.record()
        return out


def _record(loop: Callable[[], Tensor]) -> tuple:
    """(graph, its output) of `loop()` on the current device, in a private pool of memory."""
    outer, before, stream = sys.exc_info()[1], torch.cuda.get_sync_debug_mode(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        loop()  # what is made at a first call: handles of libraries, tables that a network keeps
    graph = torch.cuda.CUDAGraph()
    try:
        # once with syncs forbidden, for an error that names the line and leaves no half-made graph behind
        torch.cuda.set_sync_debug_mode("error")
        with torch.cuda.stream(stream):
            loop()
        torch.cuda.set_sync_debug_mode(before)
        torch.cuda.current_stream().wait_stream(stream)
        # thread_local: what other threads ask of the GPU meanwhile does not spoil the graph
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
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
    return graph, out


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def _at(frames: Sequence[traceback.FrameSummary]) -> str:
    """Where an error came from, torch's own frames aside."""
    own = [f for f in frames if not Path(f.filename).is_relative_to(Path(torch.__file__).parent)]
    return f" at {own[-1].filename}:{own[-1].lineno}, `{own[-1].line}`" if own else ""


PLAIN = frozenset((bool, int, float, str, type(None), torch.dtype, torch.device))
CONTAINERS = frozenset((dict, OrderedDict, list, tuple, set))
LONGEST = 256  # entries of a container that are looked at
SEEN = {"training", *HELD, *FORWARD_HOOKS}
MACHINERY = frozenset(vars(nn.Module())) - SEEN


def _hooks(velocity) -> tuple:
    """What tells the hooks of all modules apart, which the compiler takes for those that it has seen: their numbers."""
    modules = velocity.modules() if isinstance(velocity, nn.Module) else ()
    return tuple(number for module in modules for name in FORWARD_HOOKS for number in getattr(module, name))


def _state(velocity) -> tuple:
    """What a graph has taken in for good: addresses and layouts of tensors, plain settings, identities of the rest.

    Looked at are modules, functions with what they close over and the modules and tensors that they name,
    `functools.partial`, bound methods, and in them short containers. Values in memory are none of it: a replay reads
    what is there then.
    """
    state, todo, seen = [], [velocity], set()
    if not isinstance(velocity, nn.Module):
        todo.append(getattr(velocity, "__dict__", None))
    while todo:
        value = todo.pop()
        kind = type(value)
        if kind in PLAIN:
            state.append(value)
        elif isinstance(value, Tensor):
            dense = value.layout is torch.strided
            state.append((value.data_ptr(), value.dtype, value.shape, value.stride()) if dense else id(value))
        elif kind in CONTAINERS:
            if 0 < len(value) <= LONGEST and id(value) not in seen:
                seen.add(id(value))
                todo.extend(value.values() if isinstance(value, dict) else value)
            state.append(len(value))
        elif kind is types.MethodType:  # made anew at every access
            todo.extend((value.__func__, value.__self__))
        elif id(value) not in seen:
            seen.add(id(value))
            state.append(id(value))
            if isinstance(value, nn.Module):
                for name, v in vars(value).items():
                    if name not in MACHINERY:
                        (state if type(v) in PLAIN else todo).append(v)
            elif isinstance(value, types.FunctionType):
                todo.extend(cell.cell_contents for cell in value.__closure__ or ())
                named = map(value.__globals__.get, value.__code__.co_names)
                todo.extend(v for v in named if isinstance(v, (Tensor, nn.Module)))
                todo.append(value.__defaults__)
            elif isinstance(value, functools.partial):
                todo.extend((value.func, value.args, value.keywords))
    return tuple(state)


# ---- what is kept ----


class _Loops:
    """Loops by the velocity they were made of, without keeping it alive; the least recently used go first."""

    def __init__(self):
        self.lock, self.loops = threading.RLock(), OrderedDict()

    def find(self, velocity, key):
        _, key = _identity(velocity, key)
        if key not in self.loops:
            return None
        self.loops.move_to_end(key)
        return self.loops[key][0]

    def keep(self, velocity, key, loop):
        owner, key = _identity(velocity, key)
        try:
            gone = weakref.ref(owner, lambda _: self.loops.pop(key, None))
        except TypeError:
            expected = "a callable that can be weakly referenced, for capture (a VelocityField of it can)"
            expect(False, "velocity", expected, velocity, TypeError)
        self.loops[key] = loop, gone
        while len(self.loops) > SIZE:
            self.loops.popitem(last=False)
        return loop

    def clear(self) -> None:
        with self.lock:
            self.loops.clear()


def _identity(velocity, key) -> tuple:
    """(object that the loops of a velocity live as long as, key): a bound method is made anew at every access."""
    method = isinstance(velocity, types.MethodType)
    owner = velocity.__self__ if method else velocity
    return owner, (id(owner), velocity.__func__ if method else None, key)


LOOPS = _Loops()
