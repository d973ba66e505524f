"""Loops of other codebases that are hard-coded Euler, by a schedule or solver: `host_loop`; and what they ask as a
velocity, to calibrate: `host_velocity`.

    from flowkernels.integrations.host_loops import host_loop, host_velocity

    v = host_velocity(model, "denoise_step", lambda: model.sample_actions(*observations))
    cal = fk.calibrate(v, v.noise, grid=50, steps=[4])
    with host_loop(model, "denoise_step", cal[4]):
        actions = model.sample_actions(*observation, num_steps=4)
"""

import copy
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flowkernels._casts import no_grad
from flowkernels._checks import (
    FLOATS,
    FlowError,
    describe,
    expect,
    expect_bool,
    expect_choice,
    expect_float64,
    expect_list,
    expect_real,
    expect_shown,
    expect_takes,
    expect_tensor,
    expect_text,
)
from flowkernels.ops.euler_step import euler_step
from flowkernels.ops.linear_update import linear_update
from flowkernels.sampling.loop import initial_state
from flowkernels.schedule import Schedule
from flowkernels.solver import Solver, euler_sizes, expect_solver, last_uses
from flowkernels.velocity.evaluate import warn_if_training
from flowkernels.velocity.hashes import unwrapped
from flowkernels.velocity.protocol import CONVENTION, VelocityBase
from flowkernels.velocity.provenance import Identity, network_identity

__all__ = ("host_loop", "host_velocity")

STATES = ("x_t", "xt", "x", "noisy_actions", "noisy_action", "a_t", "actions", "sample", "latents", "latent", "z", "y")
TIMES = ("timestep", "timesteps", "time", "t", "time_step", "tau", "sigma")
ROUNDING = 8  # of the last place of the largest number: what the host's own arithmetic loses in a step
OF_A_STEP = 0.01  # that a time may be off


def host_loop(
    owner: Any,
    name: str,
    solver: Schedule | Solver | int | Sequence[float] | Tensor,
    *,
    state: str | None = None,
    time: str | None = None,
    ends: Sequence[float] | None = None,
    times: Sequence[float] | Tensor | None = None,
    sign: int = 1,
    check: bool = True,
) -> "HostLoop":
    """A host's own Euler loop, made to follow a schedule or solver: in the block `owner.name`, which it asks for
    velocities, is called with our state at our time, and returns what moves the host's state to our next one.

    Args:
        owner: the object whose method the loop calls, or a module with a function. name: of it. A network in an
            attribute is taken by its `forward`.
        solver: as for `fk.sample`, with as many evaluations as the host's loop makes steps, from t = 0.
        state, time: the names of its arguments that are the state and the time; None for usual ones, such as x_t or
            sample, and timestep or t.
        ends: the host's times of noise and of data, such as (1, 0) or (0, 1000). None looks at the first time, 0 or 1;
            inside torch.compile only where the time is a number of Python's.
        times: all of the host's times, the last included, `[N+1]`, where its steps are not uniform from end to end.
        sign: 1 for a host that adds `(times[i+1] - times[i]) v`, in units of |ends|, as `dt = -1/N; x = x + dt * v`
            does with falling times; -1 for one that subtracts it.
        check: look at each call whether the host's time and state are where such a loop has them. One look at values a
            step, for which a GPU is waited for. Inside torch.compile nothing is looked at.

    The state is kept in float32 (float64 for a float64 state) beside the host's, which differs from it by the rounding
    of the host's last step. The host's function is called with the host's dtypes, under its autocast, and without
    gradients. A loop may run any number of times in the block, in several threads each its own; blocks may be nested,
    the inner one counts. What a host does to a velocity or to the state is found at the next step, behind the last one
    it is not seen: compare its result with `loop.state`.

    A function that is compiled anew for each HostLoop is so once for one that is made once and entered often.

    Returns:
        HostLoop, a context. `state`: the state after the last step of the loop that ended last, float32 or float64.

    Raises:
        TypeError, ValueError: naming the argument; in the block, where the host's loop is not such an Euler loop, or
            makes another number of steps; at its end, where a loop has ended early or none has run.

    Examples:
        >>> class Host:
        ...     def velocity(self, x_t, time):
        ...         return -x_t
        ...     def sample(self, x, steps):
        ...         for i in range(steps):
        ...             x = x + self.velocity(x, i / steps) / steps
        ...         return x
        >>> host = Host()
        >>> with host_loop(host, "velocity", [0, 0.2, 1]):
        ...     host.sample(torch.ones(1, 2), 2)
        tensor([[0.1600, 0.1600]])
    """
    function = _Function(owner, name, state, time)
    solver = expect_solver(solver, "solver")
    expect(not solver.is_inverse, "solver", "a solver from noise to data", solver)
    course = _Course.of(ends, times, sign, solver.evaluations)
    if times is None:
        whole = solver.times[0] == 0 and solver.reaches_data
        expect(whole, "solver", "a solver from t = 0 to 1, where the host's loop begins and ends", solver.times)
    elif course.ends is not None:
        begins = course.to_ours(course.times[0])
        fits = abs(begins - solver.times[0].item()) <= 1e-6
        expect(fits, "solver", f"a solver from t = {begins:.6g}, where the host's loop begins", solver.times)
    return HostLoop(function, solver, course, expect_bool(check, "check"))


def host_velocity(
    owner: Any,
    name: str,
    call: Callable[[], Any],
    *,
    state: str | None = None,
    time: str | None = None,
    ends: Sequence[float] | None = None,
    sign: int = 1,
    check: bool = True,
) -> "HostVelocity":
    """What a host's loop asks `owner.name`, as a velocity of the state and the time, with all else that it is given:
    caches, masks, observations.

    `call` runs the host once, such as `lambda: model.sample_actions(*observations)`; the arguments of the first call of
    the function are copied. Each evaluation is given a copy of these, since hosts write to their caches: memory and
    time of a copy.

    Args:
        owner, name, state, time, ends, sign: as for `host_loop`.
        call: runs the host's loop, without arguments.
        check: evaluate the velocity at the first and the last call that the host made, and compare: two evaluations.
            It finds what is no function of state and time, such as conditioning that changes from step to step.

    Returns:
        HostVelocity: a velocity. `noise`, float32 `[B, *shape]`, is the state that the host's loop began with. Sample i
        has the conditioning of row i mod B, whatever the batch: evaluations are calls of B rows, of which some may be
        idle, so that batches of B samples cost least.

    Raises:
        TypeError, ValueError: naming the argument.

    Examples:
        >>> class Host:
        ...     def velocity(self, x_t, time, goal):
        ...         return goal - x_t
        ...     def sample(self, goal, steps):
        ...         x = torch.zeros_like(goal)
        ...         for i in range(steps):
        ...             x = x + self.velocity(x, i / steps, goal) / steps
        ...         return x
        >>> host = Host()
        >>> v = host_velocity(host, "velocity", lambda: host.sample(torch.ones(1, 2), 2))
        >>> fk.sample(v, v.noise, [0, 0.2, 1])
        tensor([[0.8400, 0.8400]])
    """
    expect_takes(call, "call", "a function without arguments that runs the host's loop")
    check = expect_bool(check, "check")
    recorded = _Recording(_Function(owner, name, state, time), _Course.of(ends, None, sign, None))
    with torch.no_grad(), recorded:
        call()
    told = f"one that calls {name} not once"
    expect(recorded.first is not None, "call", f"a call in which {name} is called", told)
    velocity = HostVelocity(recorded.function, recorded.course, recorded.first)
    if check:
        for which, seen in (("first", recorded.first), ("last", recorded.last)):
            velocity.expect_seen(which, seen)
    return velocity


# ---- the host's function, and its times ----


class _Argument(NamedTuple):
    """Where a function is given it: place (None: only by name) and name."""

    place: int | None
    name: str

    def of(self, function: str, args: tuple, kwargs: dict) -> Any:
        if self.place is not None and self.place < len(args):
            return args[self.place]
        if self.name not in kwargs:
            expect(False, self.name, f"an argument of every call of {function}", "a call without it")
        return kwargs[self.name]

    def put(self, value: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if self.place is not None and self.place < len(args):
            return (*args[: self.place], value, *args[self.place + 1 :]), kwargs
        return args, {**kwargs, self.name: value}


class _Function:
    """The function that a host's loop calls, and where it is given state and time."""

    def __init__(self, owner: Any, name: str, state: str | None, time: str | None):
        expect_text(name, "name", "the name of a function of the owner")
        expect(not isinstance(owner, type), "owner", "an object or a module, not a class", owner, TypeError)
        owner = unwrapped(owner) if isinstance(owner, nn.Module) else owner
        found = getattr(owner, name, None)
        if isinstance(found, nn.Module):
            owner, name = unwrapped(found), "forward"
            found = owner.forward
        known = callable(found) and not isinstance(found, type)
        expect(known, "name", f"the name of a function of {describe(owner)}", repr(name))
        place = _PLACES.get((id(owner), name))
        found = found if place is None else place.original
        try:
            parameters = inspect.signature(found).parameters
        except (TypeError, ValueError):
            parameters = {}
        self.owner, self.name = owner, name
        self.state = _argument(parameters, state, "state", STATES)
        self.time = _argument(parameters, time, "time", TIMES)
        expect(self.state.name != self.time.name, "time", "another argument than the state", repr(self.time.name))

    def given(self, args: tuple, kwargs: dict) -> tuple[Tensor, Any]:
        x = self.state.of(self.name, args, kwargs)
        expect_tensor(x, self.state.name, FLOATS)
        expect(x.dim() > 0, self.state.name, "a state of at least one dimension", x)
        return x, self.time.of(self.name, args, kwargs)

    def call(self, original: Callable, args: tuple, kwargs: dict, x: Tensor, t: Any) -> tuple[Tensor, Any]:
        """The velocity at another state and time, and all that was returned."""
        args, kwargs = self.time.put(t, *self.state.put(x, args, kwargs))
        returned = original(*args, **kwargs)
        v = returned[0] if isinstance(returned, (tuple, list)) and len(returned) else returned
        expected = "a velocity of the state's shape, alone or first of a tuple"
        expect(isinstance(v, Tensor), self.name, expected, type(v).__name__, TypeError)
        fits = v.shape == x.shape and v.device == x.device and v.dtype in FLOATS
        expect(fits, self.name, f"{expected} {list(x.shape)}", v)
        return v, returned


def _argument(parameters: Mapping[str, inspect.Parameter], given: str | None, name: str, usual: tuple) -> _Argument:
    by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [k for k, p in parameters.items() if p.kind in (*by_place, inspect.Parameter.KEYWORD_ONLY)]
    known = f"the name of an argument, one of {', '.join(names) or 'none that can be read'}"
    if given is None:
        given = next((k for k in usual if k in names), None)
        expect(given is not None, name, known, "None, and none of the usual names")
    else:
        expect_text(given, name, known)
        open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()) or not parameters
        expect(given in names or open_ended, name, known, repr(given))
    by_name = given not in names or parameters[given].kind not in by_place
    return _Argument(None if by_name else list(parameters).index(given), given)


class _Course(NamedTuple):
    """The times of a host's loop. ends: of noise and data; None before one was seen. times: all of them, or None."""

    ends: tuple[float, float] | None
    times: list[float] | None
    sign: int

    @classmethod
    def of(cls, ends, times, sign, steps: int | None) -> "_Course":
        expect_choice(sign, "sign", (1, -1))
        if ends is not None:
            expected = "two numbers, the host's times of noise and of data, such as (1, 0)"
            pair = expect_list(ends, "ends", expected)
            expect_shown(len(pair) == 2, "ends", expected, ends)
            ends = tuple(expect_real(end, "ends", expected) for end in pair)
            expect_shown(ends[0] != ends[1], "ends", expected, ends)
        if times is not None:
            expected = f"{steps + 1} times, one more than the solver's evaluations, all rising or all falling"
            told = expect_float64(times, "times", expected)
            one_way = told.dim() == 1 and len(told) == steps + 1 and bool(torch.isfinite(told).all())
            one_way = one_way and abs(int(told.diff().sign().sum())) == steps
            expect_shown(one_way, "times", expected, times)
            times = told.tolist()
            if ends is None:
                unit = all(0 <= t <= 1 for t in times)
                expect_shown(unit, "times", "times from 0 to 1, or `ends`", times)
                ends = (0.0, 1.0) if times[0] < times[-1] else (1.0, 0.0)
        return cls(ends, times, sign)

    def seen_at(self, t: Any) -> "_Course":
        """With the ends that a first time says."""
        if self.ends is not None:
            return self
        if torch.compiler.is_compiling():
            expected = "the host's times of noise and of data, such as ends=(1, 0), inside torch.compile"
            expect(isinstance(t, (int, float)), "ends", expected, "None")
            first = t
        else:
            first, _ = _range_of(t)
        expected = "the host's times of noise and of data, such as (1000, 0): its loop begins at neither 0 nor 1"
        expect(first in (0, 1), "ends", expected, f"None, and a first time of {first:.6g}")
        return self._replace(ends=(0.0, 1.0) if first == 0 else (1.0, 0.0))

    def to_host(self, t: float) -> float:
        return self.ends[0] + (self.ends[1] - self.ends[0]) * t

    def to_ours(self, time: float) -> float:
        return (time - self.ends[0]) / (self.ends[1] - self.ends[0])

    def step(self, i: int, steps: int) -> float:
        """What the host multiplies the velocity of call i with."""
        begin, end = self.ends
        by = (end - begin) / steps if self.times is None else self.times[i + 1] - self.times[i]
        return self.sign * by / abs(end - begin)

    @property
    def direction(self) -> int:
        """dx/dt of ours, in the host's velocities."""
        return self.sign if self.ends[1] > self.ends[0] else -self.sign

    def expect_time(self, t: Any, i: int, steps: int, name: str) -> None:
        """That the host is where call i of so many has it."""
        low, high = _range_of(t)
        due = self.to_host(i / steps) if self.times is None else self.times[i]
        size = max(map(abs, self.ends))
        near = OF_A_STEP * abs(self.step(i, steps)) * abs(self.ends[1] - self.ends[0])
        near += _last_place(t) * 2 * (i + 1) * size
        if abs(low - due) > near or abs(high - due) > near:
            got = f"{low:.6g}" if low == high else f"{low:.6g} to {high:.6g}"
            expected = f"{due:.6g} at call {i + 1} of {steps} steps, one call a step, uniform from {self.ends[0]:g} to "
            expected += f"{self.ends[1]:g} (another number of steps: the host's; others: `times`)"
            expect(False, name, expected, got)


def _range_of(t: Any) -> tuple[float, float]:
    """The least and the largest time that a host gives."""
    expected = "times, as a number or a tensor of them"
    known = isinstance(t, Tensor) and t.numel() > 0 and not t.is_complex() and t.dtype != torch.bool
    if not known:
        number = expect_real(t, "time", expected)
        return number, number
    return tuple(torch.stack(t.detach().double().aminmax()).tolist())


def _last_place(t: Any) -> float:
    """Of times of about 1; of integers 1, to which hosts round and cut."""
    if isinstance(t, Tensor) and not t.is_floating_point():
        return 1.0
    dtype = t.dtype if isinstance(t, Tensor) else torch.float32
    return torch.finfo(dtype).eps


def _time_like(t: Any, value: float) -> Any:
    """A time as the host has it: number or tensor, of its dtype and shape."""
    if isinstance(t, Tensor):
        return torch.full_like(t, value if t.is_floating_point() else round(value))
    if isinstance(t, int):
        return round(value)
    return value if isinstance(t, float) else type(t)(value)


# ---- in its place ----


class _Place:
    """A function of an owner that is replaced, what it was, and by what in which threads, the last one last."""

    def __init__(self, function: _Function):
        self.owner, self.name = function.owner, function.name
        try:
            self.own = self.name in vars(self.owner)
        except TypeError:  # of an object with slots
            self.own = False
        self.original = getattr(self.owner, self.name)
        self.entered: list[tuple[int, _Replaced]] = []

    def put(self, stand_in: Callable) -> None:
        try:
            setattr(self.owner, self.name, stand_in)
        except (AttributeError, TypeError) as e:
            expected = f"an object whose {self.name} can be replaced"
            expect(False, "owner", expected, f"{describe(self.owner)} ({e})", TypeError)

    def put_back(self) -> None:
        if self.own:
            setattr(self.owner, self.name, self.original)
        else:
            delattr(self.owner, self.name)


_PLACES: dict[tuple[int, str], _Place] = {}
_LOCK = threading.RLock()


class _Replaced:
    """A context in which a host's function is another one: `__call__`."""

    def __init__(self, function: _Function):
        self.function = function
        self._original: Callable | None = None

        def stand_in(*args, **kwargs):
            return self._of_thread()(*args, **kwargs)

        self._stand_in = stand_in

    def _of_thread(self) -> "_Replaced":
        """What this thread entered last; where it entered none, the last of all."""
        if torch.compiler.is_compiling():
            return self
        place, mine = _PLACES.get((id(self.function.owner), self.function.name)), threading.get_ident()
        entered = () if place is None else tuple(place.entered)
        return next((replaced for thread, replaced in reversed(entered) if thread == mine), self)

    def __enter__(self):
        key = (id(self.function.owner), self.function.name)
        with _LOCK:
            place = _PLACES.get(key) or _Place(self.function)
            place.put(self._stand_in)
            self._original = place.original
            _PLACES[key] = place
            place.entered.append((threading.get_ident(), self))
        return self

    def __exit__(self, *error) -> None:
        key, mine = (id(self.function.owner), self.function.name), (threading.get_ident(), self)
        with _LOCK:
            place = _PLACES[key]
            last = max(i for i, entered in enumerate(place.entered) if entered == mine)
            del place.entered[last]
            if place.entered:
                place.put(place.entered[-1][1]._stand_in)
            else:
                place.put_back()
                del _PLACES[key]

    def _is_entered(self) -> bool:
        place = _PLACES.get((id(self.function.owner), self.function.name))
        return place is not None and any(entered is self for _, entered in place.entered)


class _Progress:
    """A loop of the host: how many calls there were, our state, and what its updates need."""

    def __init__(self):
        self.calls = 0
        self.x: Tensor | None = None
        self.start: Tensor | None = None
        self.past: dict[int, Tensor] = {}
        self.rounding = 0.0


class HostLoop(_Replaced):
    """What `host_loop` makes."""

    def __init__(self, function: _Function, solver: Solver, course: _Course, check: bool):
        super().__init__(function)
        self.solver, self.check = solver, check
        self.state: Tensor | None = None
        self._course = course
        self._updates = solver.updates()
        self._sizes, self._last = euler_sizes(self._updates), last_uses(self._updates)
        self._times = solver.model_times.tolist()
        self._progress: dict[int, _Progress] = {}
        self._traced, self._ran = _Progress(), False

    def __enter__(self) -> "HostLoop":
        if not self._is_entered():
            self._ran, self._traced = False, _Progress()
        super().__enter__()
        if isinstance(self.function.owner, nn.Module):
            warn_if_training(self.function.owner, stacklevel=3)
        return self

    def __exit__(self, kind, *error) -> None:
        super().__exit__(kind, *error)
        with _LOCK:
            ended = [threading.get_ident()] if self._is_entered() else list(self._progress)
            open_loops = [p.calls for p in (self._progress.pop(k, None) for k in ended) if p is not None and p.calls]
        if kind is None:
            N, name = self.solver.evaluations, self.function.name
            expected = f"{N} calls of {name} by each of the host's loops, one for each evaluation of the solver"
            expect(not open_loops, "solver", expected, f"one that ended after {open_loops and open_loops[0]}")
            expect(self._ran, "solver", expected, "none at all: the host calls another function, or a copy of it")

    @no_grad
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        compiling = torch.compiler.is_compiling()
        if compiling:
            return self._step(self._traced, args, kwargs, False)
        now = self._progress.setdefault(threading.get_ident(), _Progress())
        try:
            return self._step(now, args, kwargs, self.check)
        except BaseException:  # the next call begins a loop
            self._progress.pop(threading.get_ident(), None)
            raise

    def _step(self, now: _Progress, args: tuple, kwargs: dict, check: bool) -> Any:
        i, N = now.calls, self.solver.evaluations
        y, t = self.function.given(args, kwargs)
        if i == 0:
            self._course = self._course.seen_at(t)
            now.x = now.start = initial_state(y).clone(memory_format=torch.contiguous_format)
            now.past = {}
        course, x = self._course, now.x
        if check:
            course.expect_time(t, i, N, self.function.time.name)
            if i > 0:
                self._expect_state(y, now)
        at = _time_like(t, course.to_host(self._times[i]))
        v, returned = self.function.call(self._original, args, kwargs, x.to(y.dtype, copy=True), at)
        now.x = x = self._moved(now, i, v)
        by = course.step(i, N)
        dtype = torch.promote_types(v.dtype, y.dtype)
        if check:
            size = torch.maximum(y.detach().abs().amax(), x.abs().amax()) if x.numel() else 0.0
            now.rounding = ROUNDING * max(torch.finfo(d).eps for d in (y.dtype, dtype)) * size
        moves = ((x - y.to(x.dtype)) / by).to(dtype)
        now.calls = i + 1
        if now.calls == N:
            if check:
                self._expect_finite(x, i)
            self._end(now)
        made = getattr(type(returned), "_make", type(returned))  # of a named tuple
        return moves if returned is v else made((moves, *returned[1:]))

    def _moved(self, now: _Progress, i: int, v: Tensor) -> Tensor:
        """Our state after evaluation i, whose velocity the host has as v."""
        x, update = now.x, self._updates[i]
        v = v * self._course.direction if self._course.direction < 0 else v
        if torch.float64 in (x.dtype, v.dtype):
            v = v.to(x.dtype)
        if self._sizes is not None:
            return euler_step(x, v, self._sizes[i])
        now.past[i] = v if self._last[i] == i else v.clone()
        begin = now.start if update.from_start else x
        moved = linear_update(begin, [now.past[k] for k in update.which], list(update.factors), scale=update.scale)
        now.past = {k: kept for k, kept in now.past.items() if self._last[k] > i}
        return moved

    def _end(self, now: _Progress) -> None:
        self._ran = True
        if not torch.compiler.is_compiling():
            self.state = now.x
        now.calls, now.x, now.start, now.past = 0, None, None, {}

    def _expect_finite(self, x: Tensor, step: int) -> None:
        if not torch.isfinite(x).all():
            bad = (~torch.isfinite(x.flatten(1) if x.dim() > 1 else x[:, None]).all(1)).nonzero()[0].item()
            expect(False, "velocity", "finite velocities", f"NaN or Inf in sample {bad} at step {step}", FlowError)

    def _expect_state(self, y: Tensor, now: _Progress) -> None:
        """That the host's velocity has moved its state to ours, and nothing else has."""
        x, i, name = now.x, now.calls, self.function.state.name
        if y.shape == x.shape and bool(((y.to(x.dtype) - x).abs() <= now.rounding).all()):
            return
        if y.shape == x.shape:
            self._expect_finite(x, i - 1)
        expected = f"the state that {self.function.name}'s velocity leads to at call {i + 1}: of a loop that adds "
        expected += f"{self._course.step(i - 1, self.solver.evaluations):.6g} times the velocity and does nothing else"
        got = y if y.shape != x.shape else f"one that differs from it by {(y.to(x.dtype) - x).abs().max().item():.3g}"
        expect(False, name, f"{expected} (no guidance, clipping or noise of its own; of the other sign: `sign`)", got)


# ---- as a velocity ----


class _Seen(NamedTuple):
    """A call of the host's function: its arguments and its velocity, copied."""

    args: tuple
    kwargs: dict
    x: Tensor
    t: Any
    v: Tensor


class _Recording(_Replaced):
    """The first and the last call of a host's function."""

    def __init__(self, function: _Function, course: _Course):
        super().__init__(function)
        self.course = course
        self.first: _Seen | None = None
        self.last: _Seen | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        expected = "a call outside torch.compile, which is recorded"
        expect(not torch.compiler.is_compiling(), "call", expected, "a compiled one")
        x, t = self.function.given(args, kwargs)
        x, t = x.detach().clone(), copied(t)
        whole = (copied(args, self.function.owner), copied(kwargs, self.function.owner)) if self.first is None else None
        v, returned = self.function.call(self._original, args, kwargs, *self.function.given(args, kwargs))
        args, kwargs = whole or (self.first.args, self.first.kwargs)
        self.last = _Seen(args, kwargs, x, t, v.detach().clone())
        if self.first is None:
            low, high = _range_of(t)
            expect(low == high, self.function.time.name, "one time for all", f"{low:.6g} to {high:.6g}")
            self.course, self.first = self.course.seen_at(t), self.last
        return returned


def copied(value: Any, owner: Any = None) -> Any:
    """A copy of arguments, tensors in objects of any class included, but for modules of the owner."""
    memo = {id(part): part for part in owner.modules()} if isinstance(owner, nn.Module) else {}
    try:
        return copy.deepcopy(value, memo)
    except Exception as e:  # whatever a part of it raises
        expect(False, "call", "arguments that can be copied (copy.deepcopy)", f"{type(e).__name__}: {e}", TypeError)


class HostVelocity(VelocityBase):
    """What `host_velocity` makes.

    noise: the state that the host's loop began with, float32 (float64 of a float64 state) `[B, *shape]`.
    """

    def __init__(self, function: _Function, course: _Course, seen: _Seen, places: Tensor | None = None):
        self._function, self._course, self._seen, self._places = function, course, seen, places
        self.noise = initial_state(seen.x).clone()
        self.provenance = {"pipeline": f"{type(function.owner).__name__}.{function.name}"}

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """dx/dt, `[n, *shape]`. x: `[n, *shape]`, where the host's state is. t: `[n]`, or one for all."""
        B, shape = len(self.noise), list(self.noise.shape[1:])
        expect_tensor(x, "x", FLOATS)
        fits = x.dim() > 0 and list(x.shape[1:]) == shape
        expect(fits, "x", f"a state of shape [n, {', '.join(map(str, shape))}]", x)
        expect(x.device == self.noise.device, "x", f"a state on {self.noise.device}, where the host's is", x)
        times, n = expect_float64(t, "t", "times from 0 to 1").flatten().tolist(), len(x)
        expect(len(times) in (1, n), "t", f"one time, or one for each of {n} samples", t)
        expect(all(0 <= time <= 1 for time in times), "t", "times from 0 to 1", t)
        places = range(n) if self._places is None else self._places.tolist()
        expect(len(places) == n, "x", f"the states of the velocity's {len(places)} samples", x)
        found: list[Tensor | None] = [None] * n
        for time, rows in self._calls(times * n if len(times) < n else times, [place % B for place in places]):
            states = self._seen.x.clone()
            slots = list(rows)
            states[slots] = x[[rows[slot] for slot in slots]].to(states.dtype)
            v = self._evaluated(states, time)
            for slot, row in rows.items():
                found[row] = v[slot]
        return torch.stack(found) if n else torch.empty_like(x)

    @staticmethod
    def _calls(times: list[float], slots: list[int]) -> Iterator[tuple[float, dict[int, int]]]:
        """Calls of one time: which of the host's rows is which sample."""
        waiting: list[tuple[float, dict[int, int]]] = []
        for row, (time, slot) in enumerate(zip(times, slots, strict=True)):
            taken = next((rows for known, rows in waiting if known == time and slot not in rows), None)
            if taken is None:
                waiting.append((time, taken := {}))
            taken[slot] = row
        return iter(waiting)

    def _evaluated(self, x: Tensor, t: float) -> Tensor:
        seen, owner = self._seen, self._function.owner
        args, kwargs = copied(seen.args, owner), copied(seen.kwargs, owner)
        place = _PLACES.get((id(owner), self._function.name))
        original = getattr(owner, self._function.name) if place is None else place.original
        at = _time_like(seen.t, self._course.to_host(t))
        v, _ = self._function.call(original, args, kwargs, x, at)
        return v * self._course.direction if self._course.direction < 0 else v

    @no_grad
    def expect_seen(self, which: str, seen: _Seen) -> None:
        """That it says what the host's function returned at a call."""
        t = min(max(self._course.to_ours(_range_of(seen.t)[0]), 0.0), 1.0)
        v, told = self._evaluated(seen.x.clone(), t).double(), seen.v.double() * self._course.direction
        off = ((v - told).abs().max() / told.abs().max().clamp_min(1e-30)).item()
        expected = f"a function of state and time beside its first call's arguments, as at the host's {which} call"
        expect(
            off <= 64 * torch.finfo(seen.v.dtype).eps, "call", f"{expected} (check=False)", f"off by {off:.3g} of it"
        )

    def loop(self, solver: Schedule | Solver | int | Sequence[float] | Tensor, *, check: bool = True) -> HostLoop:
        """`host_loop` of the same function, as it was told and seen here."""
        function, course = self._function, self._course
        names = dict(state=function.state.name, time=function.time.name, ends=course.ends, sign=course.sign)
        return host_loop(function.owner, function.name, solver, **names, check=check)

    def rows(self, index: Tensor | slice, n: int) -> "HostVelocity":
        expect_shown(isinstance(index, (Tensor, slice)), "index", "a tensor of places or a slice", index, TypeError)
        places = torch.arange(n, device="cpu") if self._places is None else self._places
        places = places[index.cpu() if isinstance(index, Tensor) else index]
        return HostVelocity(self._function, self._course, self._seen, places)

    def identify(self, weights: bool = True) -> Identity:
        return network_identity(self._function.owner, self.convention() or CONVENTION, weights=weights)

    def convention(self) -> dict[str, Any]:
        return dict(function=self.provenance["pipeline"], ends=self._course.ends, sign=self._course.sign)
