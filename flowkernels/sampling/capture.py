"""The captured loop: all steps of a schedule or a solver as one CUDA graph, or compiled as one function.

Small networks spend their sampling time on launching kernels and on Python. A schedule is fixed, so that its whole loop
can be recorded once and replayed. Nothing inside the loop looks at a value: step sizes are constants, the times are on
the device before it starts, and what depends on them alone is evaluated once (`velocity_field.HasTimeEmbedding`).
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
from flowkernels.ops.euler_step import reference
from flowkernels.ops.linear_update import reference as linear_reference
from flowkernels.runtime import backends
from flowkernels.runtime.torch_private import FORWARD_HOOKS, HELD, compiler_errors
from flowkernels.sampling.loop import Update, Velocities, updates_of
from flowkernels.solver import Solver
from flowkernels.velocity.evaluate import evaluate, has_time_embedding, model_times, time_embeddings
from flowkernels.velocity.field import VelocityField
from flowkernels.velocity.time_embedding import times_of

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


def run(mode: str, velocity, x: Tensor, plan: Tensor | Solver) -> Tensor:
    """The state after all steps of the plan, times or a solver, from x `[n, *shape]`, by a loop recorded now or on an
    earlier call."""
    kind = x.device.type
    if isinstance(plan, Solver):
        at, steps, step, loop_of = plan.model_times, updates_of(plan), _update(mode, kind), unrolled_solver
    else:
        at, steps, step, loop_of = plan[:-1], tuple((plan[1:] - plan[:-1]).tolist()), _step(mode, kind), _unrolled
    autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    settings = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    key = mode, COMPILER, step, tuple(at.tolist()), steps, x.shape, x.dtype, x.device, autocast, settings

    def unrolled(count: int | None = None) -> Callable:
        return loop_of(steps[:count], step, has_time_embedding(velocity))

    if mode == "compile":
        if isinstance(velocity, VelocityField):  # settings that are constants to the compiler
            key += tuple(velocity.convention().values())
        key += (has_time_embedding(velocity), _hooks(velocity))
        with LOOPS.lock:
            loop = LOOPS.find(velocity, key)
            if loop is None:
                t = model_times(velocity, at, x)
                unrolled(1)(velocity, x, t[:1])  # the velocity's own errors, not the compiler's
                loop = LOOPS.keep(velocity, key, functools.partial(_call_compiled, _compiled(unrolled()), t=t))
        return loop(velocity, x)

    # under the lock to the end: the graph's buffers are shared by all who call it
    with LOOPS.lock:
        graph = LOOPS.find(velocity, (*key, _state(velocity)))
        if graph is None:
            t = model_times(velocity, at, x)
            with torch.autocast(kind, autocast[1], autocast[0], cache_enabled=False):  # cached casts would be freed
                graph = _Graph(functools.partial(unrolled(), velocity), x, t)
            LOOPS.keep(velocity, (*key, _state(velocity)), graph)  # after its first calls, which may have changed it
        return graph(x)


def _step(mode: str, device: str) -> Callable:
    """One Euler step `(x, v, h, v_uncond, w) -> x`.

    Compiled, it is torch code as well, which the compiler fuses with the network, unless a backend is asked for.
    """
    chosen = backends.choose("euler_step", device)
    return reference.euler_step if chosen == "reference" or (mode == "compile" and not backends.asked()) else _op_step


def _op_step(x, v, h, v_uncond, w) -> Tensor:
    return torch.ops.flowkernels.euler_step(x, v, h, v_uncond, w, None)[0]


def _update(mode: str, device: str) -> Callable:
    """One update of a solver `(x, v, b) -> x`."""
    chosen = backends.choose("linear_update", device)
    plain = chosen == "reference" or (mode == "compile" and not backends.asked())
    return linear_reference.linear_update if plain else _op_update


def _op_update(x, v, b) -> Tensor:
    return torch.ops.flowkernels.linear_update(x, v, b, None)[0]


def _unrolled(h: tuple[float, ...], step: Callable, embedded: bool) -> Callable:
    """The loop of both modes: `loop(velocity, x, t)` with the state x `[n, *shape]` and t `[N]` on its device."""

    def loop(velocity, x: Tensor, t: Tensor) -> Tensor:
        x = x.clone()  # a velocity that writes to its input writes to the loop's own state
        embeddings = time_embeddings(velocity, t, x) if embedded else [None] * len(h)
        for size, now, embedding in zip(h, times_of(t, len(x)), embeddings, strict=True):
            v, v_uncond, w = evaluate(velocity, x, now, embedding)
            x = step(x, v, size, v_uncond, w)
        return x

    return loop


def unrolled_solver(updates: tuple[Update, ...], step: Callable, embedded: bool) -> Callable:
    """The same of a solver, with t `[M]`."""

    def loop(velocity, x: Tensor, t: Tensor) -> Tensor:
        start, past = x, Velocities()
        x = x.clone()
        embeddings = time_embeddings(velocity, t, x) if embedded else [None] * len(updates)
        for i, (update, now, embedding) in enumerate(zip(updates, times_of(t, len(x)), embeddings, strict=True)):
            v, v_uncond, w = evaluate(velocity, x, now, embedding)
            _, v_uncond = past.add(i, update, x, v, v_uncond, w)
            x = step(start if update.first else x, *past.terms(i, update, v_uncond, w))
        return x

    return loop


# ---- torch.compile ----


def _compiled(loop: types.FunctionType) -> Callable:
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
            self.graph, self.out = _record(functools.partial(loop, self.x, t))
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
