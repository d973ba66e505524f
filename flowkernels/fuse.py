"""Fuse a velocity network with the steps of a schedule or solver: a whole sampler in one call of `mlp_sample`."""

import contextlib
import functools
import inspect
import itertools
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from flowkernels._casts import no_grad
from flowkernels._checks import (
    LOW,
    expect,
    expect_bool,
    expect_finite_flow,
    expect_int,
    expect_mapping,
    expect_noise,
    expect_shape,
    expect_tensor,
    expect_times,
)
from flowkernels._lowering import Lowering, Replayed
from flowkernels._record import ROWS, STATE, TIME, NotFusable, Numbers, Record, sample_rows
from flowkernels._watch import Unwatchable, Watch, executed
from flowkernels.ops._library import direct, direct_gpu, fresh
from flowkernels.ops.mlp_sample import Layer, Update, mlp_sample, one_by_one, plan_for
from flowkernels.schedule import Schedule
from flowkernels.solver import Solver
from flowkernels.velocity_field import (
    HOOKS,
    VelocityField,
    expect_velocity,
    float64_device,
    overridden,
    warn_if_training,
)

MOST_BYTES = 256 << 20  # of tables with a row for every step of every sample; more samples run in parts
FEW = 3  # samples of a call that looks for the numbers that a network deals with
MOST_SCHEDULES = 8  # that a sampler keeps tables for, beside its own
WAY_OUT = "fk.sample(velocity, noise, schedule, capture=...) captures the loop of any network"


def fuse(
    velocity,
    schedule: Schedule | Solver | int | Sequence[float] | Tensor,
    *,
    shape: Sequence[int] | None = None,
    weights: torch.dtype | None = None,
) -> "FusedSampler":
    """A sampler that evaluates the network and makes all steps of a schedule or of a `Solver` in one call.

    For networks that are stacks of linear layers, found out by recording one call: activations (ReLU, LeakyReLU, SiLU,
    GELU, ELU, SELU, Tanh, Sigmoid, Mish, GLU), residual sums, gates, LayerNorm, slices and concatenations of features.
    Time and conditioning may enter in any way that does not involve x before a concatenation, a sum or a product: what
    depends on them alone is computed once a schedule by the network's own operations.

    Args:
        velocity: a network `net(x, t)` or a `VelocityField` around one, with its conditioning and guidance. A module
            whose forward takes one input, such as `nn.Sequential` or torchcfm's `MLP(time_varying=True)`, gets x with t
            as its last column.
        schedule: a Schedule, a Solver, N for N uniform steps, or N+1 increasing times from 0 to 1.
        shape: of one sample; None tries vectors as long as the outputs of the network's linear layers.
        weights: torch.float32 or torch.bfloat16; None takes bfloat16 for a bfloat16 network, else float32. With
            bfloat16 the inputs of linear layers are rounded to it as well; sums and the state stay in float32.

    Returns:
        FusedSampler; `fk.sample`, `fk.rollout` and `fk.calibrate` take it in place of the velocity. Its numbers are the
        network's to float32 rounding (2^-9 a product with bfloat16 weights), which is checked on a few samples here.

    Raises:
        NotFusable: naming the module that stopped it.
        TypeError, ValueError: naming the argument.
    """
    expect_velocity(velocity)
    if _takes_one_input(velocity):
        velocity = VelocityField(velocity, time_column=True)
    known = weights is None or weights is torch.float32 or weights is torch.bfloat16
    expect(known, "weights", "float32, bfloat16 or None", weights, TypeError)
    shape = None if shape is None else expect_shape(shape, "shape", "the sizes of one sample, each at least 1")
    solver, times = _solver_and_times(schedule)
    warn_if_training(velocity)
    field = velocity if isinstance(velocity, VelocityField) else VelocityField(velocity)
    shape = _shape_of_sample(field) if shape is None else shape
    sampler = FusedSampler(_Network(velocity, field, shape, weights), times, solver)
    sampler.verify()
    sampler.on([0.0, 0.3, 0.7, 1.0]).verify()  # a schedule of one step would not show what time does
    return sampler


def _solver_and_times(schedule: Schedule | Solver | int | Sequence[float] | Tensor) -> tuple[Solver | None, Tensor]:
    """The solver, None for Euler steps, and the knots."""
    if isinstance(schedule, Solver):
        return None if schedule.is_euler else schedule, schedule.times
    return None, schedule.times if isinstance(schedule, Schedule) else expect_times(schedule, "schedule")


def _key(solver: Solver | None, times: Tensor) -> tuple:
    """What tells samplers on one network apart."""
    if solver is None:
        return tuple(times.tolist())
    return tuple(t.numpy().tobytes() for t in (times, solver.model_times, solver.coefficients))


def _takes_one_input(net: Any) -> bool:
    """Whether a module's forward has no second positional argument for the time."""
    if not isinstance(net, nn.Module):
        return False
    kinds = [p.kind for p in inspect.signature(net.forward).parameters.values()]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(kind in positional for kind in kinds) == 1 and inspect.Parameter.VAR_POSITIONAL not in kinds


@no_grad
def _shape_of_sample(field: VelocityField) -> tuple[int, ...]:
    """A vector as long as the velocity that the network returns for it; likely as long as the last linear layer's."""
    net = field.net
    linear = [m for m in net.modules() if isinstance(m, nn.Linear)] if isinstance(net, nn.Module) else []
    n, said = _samples_of(field), "a network without nn.Linear"
    for width in dict.fromkeys(m.out_features for m in reversed(linear)):
        x = torch.zeros(n, width, dtype=torch.float32, device=linear[0].weight.device)
        try:
            v = field._call(x, torch.zeros(n, dtype=torch.float64, device=float64_device(x.device)), field.conditioning)
            if v.shape == x.shape:
                return (width,)
        except Exception as e:  # whatever a network makes of a wrong shape
            said = f"{type(e).__name__}: {e} on {list(x.shape)}"
    raise NotFusable(f"shape: expected the shape of one sample, which could not be found out ({said})")


def _samples_of(field: VelocityField) -> int:
    """A number of samples that the conditioning fits."""
    values = (*field.conditioning.values(), *field.unconditional.values())
    lengths = [len(v) for v in values if isinstance(v, Tensor) and v.dim() and len(v) > 1]
    return lengths[0] if lengths else 3


class FusedSampler:
    """Velocity evaluation and all steps in one call; made by `fuse`.

        sampler = fk.fuse(net, schedule)
        x1 = sampler(noise)                  # fk.sample(net, noise, schedule)
        x1 = sampler(noise, obs=obs)         # with other conditioning of the VelocityField

    Whatever changes what the network does (weights, attributes, hooks, functions, settings of the VelocityField) is
    noticed, and taken in at the next call. `refresh()` has to be called after a change that leaves no trace, which is:

    - memory of a tensor written otherwise than by an operation on it: through `.data`, numpy, DLPack or a pointer, by
      kernels that raise no version counter (such as `torch._fused_sgd_`), or any write to one made in inference mode;
    - elements of arrays and buffers of more than 64 KiB;
    - functions of torch, numpy, Python's library or this package that are replaced where only these call them;
    - what is read through them from elsewhere: files, the clock, `os.getenv`, settings other than torch's default dtype
      and device, and what forward does in threads of its own.

    velocity: what it was made from; a VelocityField for a network with one input. times: the knots, float64 `[N+1]`.
    shape: of one sample.
    """

    def __init__(self, network: "_Network", times: Tensor, solver: Solver | None = None):
        """solver: None for Euler steps on `times`."""
        self._network, self.times, self._solver, self._key = network, times, solver, _key(solver, times)
        self._model_times = times[:-1] if solver is None else solver.model_times
        self._steps = times.diff() if solver is None else one_by_one(solver.updates())
        if isinstance(self._steps[0], float):
            self._steps = torch.tensor(self._steps, dtype=torch.float64, device="cpu")
        self._batch: _Batch | None = None
        self._others: dict[tuple, FusedSampler] = {}

    @property
    def velocity(self):
        return self._network.velocity

    @property
    def shape(self) -> tuple[int, ...]:
        return self._network.shape

    @property
    def weights(self) -> torch.dtype:
        """float32 or bfloat16: what linear layers multiply."""
        return self._prepare(_samples_of(self._network.field), None).network.low or torch.float32

    @property
    def stale(self) -> bool:
        """Whether the network's weights were written since they were last taken in."""
        return self._network.recorded is None or self._network.recorded.is_stale()

    def refresh(self) -> None:
        """Take in the network's weights as they are now."""
        self._network.recorded = None

    def on(self, schedule: Schedule | Solver | int | Sequence[float] | Tensor) -> "FusedSampler":
        """The same network on another schedule or solver."""
        if self._solver is not None and schedule is self._solver:
            return self
        solver, times = _solver_and_times(schedule)
        key = _key(solver, times)
        if key == self._key:
            return self
        if key not in self._others:
            while len(self._others) >= MOST_SCHEDULES:
                self._others.pop(next(iter(self._others)))
            self._others[key] = FusedSampler(self._network, times, solver)
        return self._others[key]

    def rows(self, index: Tensor | slice, n: int) -> "FusedSampler":
        """The same sampler for the samples `index` of n: conditioning that has one row a sample is indexed."""
        field = self._network.field.rows(index, n)
        if not field.conditioning:
            return self
        return FusedSampler(_Network(field, field, self.shape, self._network.weights), self.times, self._solver)

    def __getstate__(self) -> dict:
        """Without what is made at the first call: copies record their own network anew."""
        return self.__dict__ | {"_batch": None, "_others": {}}

    def __call__(self, noise: Tensor, **conditioning: Any) -> Tensor:
        """Samples at t = 1, or of an inversion at t = 0.

        Args:
            noise: `[n, *shape]`, float32, bfloat16 or float16, where the network is.
            conditioning: in place of entries of the VelocityField's conditioning, for this call.

        Returns:
            `[n, *shape]`, float32.

        Raises:
            TypeError, ValueError: naming the argument; for NaN or Inf, the sample and the step. On a GPU nothing waits
                for the kernel to look for NaN and Inf: they show in the result.
        """
        return self.run(noise, conditioning)[0]

    def run(
        self,
        noise: Tensor,
        conditioning: Mapping[str, Any] | None = None,
        *,
        states: bool = False,
        velocities: bool = False,
        first: int = 0,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(samples `[n, *shape]`, states `[M+1, n, *shape]`, velocities `[M, n, *shape]`), the latter two as asked.

        The states are those before each of the M evaluations, N with Euler steps, and the samples.

        first: what the samples are counted from in errors.
        """
        if states is not False or velocities is not False or type(first) is not int or first < 0:
            states, velocities = expect_bool(states, "states"), expect_bool(velocities, "velocities")
            first = expect_int(first, "first", "a number of samples", 0)
        x, dim = noise, self._network.dim
        plain = type(x) is Tensor and x.dtype == torch.float32 and x.layout is torch.strided and not x.requires_grad
        if not plain:
            x = self._converted(noise)
        n = len(x) if x.dim() > 1 else 0
        if n == 0 or x.numel() != n * dim or not (self._network.is_flat or x.shape[1:] == self.shape):
            expect(False, "noise", f"shape [n, {', '.join(map(str, self.shape))}] with n > 0", noise)
        x = x.contiguous()
        given = self._network.given(conditioning)
        known = n > 1 and len(given) > 0  # whether it is looked at here what the network is now
        if known and (most := self._most_samples(n, given)) < n:
            parts = []
            for begin in range(0, n, most):
                rows, kept = slice(begin, begin + most), dict(states=states, velocities=velocities)
                part = {k: v[rows] if _has_rows(v, n) else v for k, v in (conditioning or {}).items()}
                parts.append(self.rows(rows, n).run(x[rows], part, **kept, first=first + begin))
            found = zip(*parts, (0, 1, 1), strict=True)
            return tuple(None if t[0] is None else torch.cat(t[:-1], t[-1]) for t in found)
        batch = self._prepare(n, given, known)
        if x.device != batch.network.device:
            expect(False, "noise", f"a tensor on {batch.network.device}, where the network is", f"one on {x.device}")
        if (C := direct("mlp_sample", x) or direct_gpu("mlp_sample", x)) is not None:
            out, kept = torch.empty_like(x), [None, None]
            if states:
                kept[0] = fresh(x.new_empty(len(self._steps) + 1, *x.shape))
            if velocities:
                kept[1] = fresh(x.new_empty(len(self._steps), *x.shape))
            bad = batch.prepared(C, self._steps).run(x, out, *kept)
        else:
            out, *kept = self._by_op(batch, x, states or velocities)
            bad = -1 if torch.isfinite(out).all() else 0
        if bad >= 0:
            expect_noise(noise)
            _, _, v = self._by_op(batch, x, True)
            what = "step" if len(self._steps) == len(self.times) - 1 else "evaluation"
            expect_finite_flow(out, v, self._model_times, first, what)
        return out, kept[0] if states else None, kept[1] if velocities else None

    def _most_samples(self, n: int, given: Mapping[str, Any]) -> int:
        """How many samples have tables of no more than MOST_BYTES."""
        width = self._network.record(n, given).width_of_both
        sizes = 8 * len(self._steps) * width * (2 if self._network.field.is_guided else 1)  # float64 when they are made
        return max(1, MOST_BYTES // sizes) if sizes else n

    def _converted(self, noise: Tensor) -> Tensor:
        """Noise of other types than plain float32, checked."""
        expect_tensor(noise, "noise", (torch.float32, *LOW))
        if noise.requires_grad:
            expect(not torch.is_grad_enabled(), "noise", "no gradient: a fused sampler has none", "requires_grad")
        return noise.detach().float()

    @torch.no_grad()
    def _by_op(self, batch: "_Batch", x: Tensor, trajectory: bool) -> list[Tensor | None]:
        """(samples, states, velocities), the latter two for a trajectory, through the public op: any backend, and any
        tracer of torch's."""
        low, w = batch.network.low, self._network.field.guidance
        options = dict(unconditional=batch.unconditional, guidance=w, low=low, trajectory=trajectory)
        steps = self._steps.tolist() if isinstance(self._steps, Tensor) else self._steps
        found = mlp_sample(x.flatten(1), steps, batch.layers, **options)
        if not trajectory:
            return [found.view(x.shape), None, None]
        return [t.view(*t.shape[:-1], *x.shape[1:]) for t in found]

    def _prepare(self, n: int, given: Mapping[str, Any] | None, known: bool = False) -> "_Batch":
        """The layers with their tables for n samples: those of the last call, where nothing has changed.

        known: it has been looked at just now what the network is.
        """
        given, batch = self._network.field.conditioning if given is None else given, self._batch
        if batch is None or batch.is_stale(self._network, n, given, known):
            batch = self._batch = _Batch(self._network.record(n, given), self._model_times, n, given, batch)
        return batch

    @no_grad
    def verify(self) -> None:
        """Raise NotFusable unless a few samples have the velocities that the network itself has."""
        field = self._network.field
        n = _samples_of(field)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(n, *self.shape, generator=generator, dtype=torch.float32, device="cpu")
        x = x.to(self._network.device)
        _, states, velocities = self.run(x, states=True, velocities=True)
        for s in sorted({0, len(self._steps) // 2, len(self._steps) - 1}):
            now = self._model_times[s].item()
            t = torch.full((n,), now, dtype=torch.float64, device=float64_device(x.device))
            with torch.autocast(x.device.type, enabled=False):
                expected = field(states[s], t).float()
            error = (velocities[s] - expected).abs().max().item()
            allowed = (0.1 if self._batch.network.is_low else 1e-3) * max(expected.abs().max().item(), 1e-6)
            if not error <= allowed:
                raise NotFusable(
                    f"velocity: expected a network that the operations of one call describe, got velocities that "
                    f"differ by {error:.3g} at step {s} (what it does may depend on values, on the number of samples, "
                    f"or on several times at once); {WAY_OUT}"
                )
        if self._network.recorded is not None:
            self._network.recorded.look()  # a network that counts its calls is not another one


class _Network:
    """What samplers on several schedules share."""

    def __init__(self, velocity, field: VelocityField, shape: tuple[int, ...], weights: torch.dtype | None):
        self.velocity, self.field, self.shape, self.weights = velocity, field, shape, weights
        self.dim, self.is_flat = torch.Size(shape).numel(), len(shape) == 1
        expect(self.dim > 0, "shape", "at least one feature", shape)
        self.recorded: _Recorded | None = None
        self.lock = threading.Lock()

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k not in ("recorded", "lock")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, recorded=None, lock=threading.Lock())

    @property
    def device(self) -> torch.device:
        """Where the network is now."""
        net = self.field.net
        tensors = itertools.chain(net.parameters(), net.buffers()) if isinstance(net, nn.Module) else iter(())
        return next((t.device for t in tensors), torch.device("cpu"))

    def given(self, conditioning: Mapping[str, Any] | None) -> Mapping[str, Any]:
        """The VelocityField's conditioning with what a call puts in its place."""
        if conditioning is None or (type(conditioning) is dict and not conditioning):
            return self.field.conditioning
        expect_mapping(conditioning, "conditioning")
        known = sorted(self.field.conditioning)
        unknown = sorted(set(conditioning) - set(known))
        expect(not unknown, "conditioning", f"names of the VelocityField's conditioning {known}", f"{unknown}")
        for key, value in conditioning.items():
            if isinstance(self.field.conditioning[key], Tensor):
                expect_tensor(value, key)
        return self.field.conditioning | conditioning

    def record(self, n: int, given: Mapping[str, Any]) -> "_Recorded":
        """The network recorded, with its weights as they are and conditioning of this form."""
        with self.lock:
            if self.recorded is None or self.recorded.is_stale() or not self.recorded.fits(n, given):
                self.recorded = _Recorded(self, n, given)
            return self.recorded


def _undisturbed(f):
    """Without gradients and autocast, and outside of the caller's inference mode, whose tensors count no writes."""

    @functools.wraps(f)
    def run(self, network, *args):
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(network.device.type, enabled=False):
            return f(self, network, *args)

    return run


class _Recorded:
    """A network's operations and weights at one moment.

    each: names of the conditioning that has one row a sample. low: bfloat16 for weights in it, or None.
    """

    @_undisturbed
    def __init__(self, network: _Network, n: int, given: Mapping[str, Any]):
        self.field, self.dim, self.device = network.field, network.dim, network.device
        other = overridden(self.field).keys() - {"_call"} | {h for h in HOOKS[:2] if getattr(self.field, h)}
        if other:  # what the recording does not call
            said = f"got {sorted(other)} overridden"
            raise NotFusable(f"velocity: expected a VelocityField's own evaluation, {said}; {WAY_OUT}")
        net, unconditional = self.field.net, self.field.unconditional
        module = net if isinstance(net, nn.Module) else None
        self.each, self.keys = self._with_rows(n, given), (given.keys() | (), unconditional.keys() | ())
        for key in unconditional:
            expect(key in given, f"unconditional[{key!r}]", f"a key of conditioning {sorted(given)}", "another")
        for key, value in given.items():
            self._expect_tensors_or_equal(key, value)
        self.plain = {k: v for k, v in given.items() if not isinstance(v, Tensor)}
        rows = sample_rows(self._numbers(network, given))
        self.record = Record(module, rows)
        x, t, kwargs = self._inputs(network, given, rows)
        x_place, self.t_place = self.record.input(x, STATE), self.record.input(t, TIME)
        self.places = {
            key: self.record.input(value, *([ROWS] if key in self.each else []))
            for key, value in kwargs.items()
            if isinstance(value, Tensor)
        }
        try:
            with executed() as codes:
                out = self.record.run(lambda: self.field._call(x, t, kwargs))
        except NotFusable as e:
            raise NotFusable(f"velocity: expected a stack of linear layers, but {e}; {WAY_OUT}") from None
        except Exception as e:
            expected = "expected the shape of one sample of this network, but a call on"
            raise NotFusable(f"shape: {expected} {list(x.shape)} raised {type(e).__name__}: {e}") from e
        try:
            self.lowering = Lowering(self.record, x_place, out, self.dim)
        except NotFusable as e:
            raise NotFusable(f"velocity: expected a stack of linear layers, but {e}; {WAY_OUT}") from None
        self.codes = codes
        self.look()
        self.width_of_both = self.lowering.width_of_both()
        dtypes = {t.dtype for t in self.record.tensors}
        matrices = {self.record.tensors[place].dtype for place in self.lowering.matrices}
        expect(torch.float64 not in matrices, "velocity", "a network in float32 or bfloat16", "float64 weights")
        low = network.weights or (torch.bfloat16 if matrices == {torch.bfloat16} else torch.float32)
        self.low = None if low == torch.float32 else low
        self.is_low = self.low is not None or not dtypes.isdisjoint(LOW)
        self.plans: dict[Any, Any] = {}  # by the module of the kernels

    def _inputs(self, network: _Network, given: Mapping[str, Any], rows: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """(x, t, conditioning) of so many samples."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(rows, *network.shape, generator=generator, dtype=torch.float32, device="cpu")
        t = torch.linspace(0, 1, rows, dtype=torch.float64, device=float64_device(network.device))
        kwargs = dict(given)
        for key, value in given.items():
            if isinstance(value, Tensor):
                index = torch.arange(rows, device=value.device)
                kwargs[key] = value[index % len(value)] if key in self.each else value.clone()
        return x.to(network.device), t, kwargs

    def _numbers(self, network: _Network, given: Mapping[str, Any]) -> set[int]:
        """The integers and sizes that a call on a few samples deals with."""
        x, t, kwargs = self._inputs(network, given, FEW)
        with contextlib.suppress(Exception), Numbers() as numbers:  # the recording says what is wrong
            self.field._call(x, t, kwargs)
        return numbers.found

    def look(self) -> None:
        """What the network is now, is what was recorded."""
        # the field with its network, and weights that only the recording has seen; what conditioning holds may change
        apart = self.field.conditioning, self.field.unconditional
        try:
            roots = self.field, *self.plain.values(), *self.record.free_tensors()
            self.watch = Watch(*roots, codes=self.codes, but=apart)
        except Unwatchable as e:
            raise NotFusable(f"velocity: expected a network whose changes can be noticed, but {e}; {WAY_OUT}") from None

    def is_stale(self) -> bool:
        return self.watch.changed() is not None

    def _expect_tensors_or_equal(self, key: str, value: Any) -> None:
        """Conditioning is tensors, or something that is the same in every call, the unconditional one included."""
        if isinstance(value, Tensor):
            other = self.field.unconditional.get(key, value)
            if not isinstance(other, Tensor):
                raise NotFusable(f"unconditional[{key!r}]: expected a tensor, as in the conditioning, got {other!r}")
            return
        if any(isinstance(v, Tensor) for v in tree_flatten(value)[0]):
            raise NotFusable(f"conditioning[{key!r}]: expected a tensor, got a container of them")
        if self.field.is_guided and self.field.unconditional.get(key, value) != value:
            raise NotFusable(f"unconditional[{key!r}]: expected tensors, or the same as in the conditioning")

    def _with_rows(self, n: int, given: Mapping[str, Any]) -> set[str]:
        """The names of the conditioning that has one row for each of n > 1 samples."""
        return {k for k, v in [*given.items(), *self.field.unconditional.items()] if _has_rows(v, n)}

    def fits(self, n: int, given: Mapping[str, Any]) -> bool:
        """Whether conditioning is of the same names, and has one row a sample where it had when recorded (or one for
        all of them); what is no tensor has to be the same."""
        unconditional = self.field.unconditional
        if (given.keys(), unconditional.keys()) != self.keys:
            return False
        for key, value in (*given.items(), *unconditional.items()):
            if isinstance(value, Tensor) == (key in self.plain) or not _is_same(self.plain.get(key), value):
                return False
        recorded = {k: self.record.tensors[p].dtype for k, p in self.places.items()}
        if any(isinstance(v, Tensor) and v.dtype != recorded.get(k, v.dtype) for k, v in given.items()):
            return False
        rows = {k: len(v) for k, v in given.items() if isinstance(v, Tensor) and v.dim()}
        return self._with_rows(n, given) <= self.each and all(rows.get(k) in (1, n) for k in self.each)

    def layers(self, times: Tensor, n: int, given: Mapping[str, Any], known: list[Layer] | None) -> list[Layer]:
        """The layers with their tables for evaluations at these times; those of `known` layers, but for what depends on
        conditioning."""
        inputs = {self.t_place: times.to(self.record.tensors[self.t_place])}
        for key, value in given.items():
            if key in self.places:
                inputs[self.places[key]] = self._input(key, value, n)
        steps, shared = len(times), set(self.places) - self.each
        of_rows = known is not None and not shared
        values = self.record.replay(inputs, steps, n, self.lowering.needed(of_rows))
        layers = self.lowering.layers(Replayed(self.record, values, steps, n, self.device), known if of_rows else None)
        if known is None or of_rows:
            return layers
        return [replace(a, weight=b.weight) for a, b in zip(layers, known, strict=True)]

    def _input(self, key: str, value: Any, n: int) -> Tensor:
        expect_tensor(value, key)
        recorded = self.record.tensors[self.places[key]]
        if key in self.each:
            shape = (n, *recorded.shape[1:])
            fits = value.dim() == recorded.dim() and value.shape[1:] == shape[1:] and len(value) in (1, n)
        else:
            shape, fits = recorded.shape, value.shape == recorded.shape
        expect(fits, key, f"shape {list(shape)}", value)
        return value.expand(shape)


class _Batch:
    """A network's layers with the tables of one sampler's evaluations and one batch's conditioning."""

    @_undisturbed
    def __init__(self, network: _Recorded, times: Tensor, n: int, given: Mapping[str, Any], last: "_Batch | None"):
        self.network, field = network, network.field
        self.n, self.given = n, _conditioning(field, given)
        self.versions = [_version(v) for v in self.given.values()]
        known = last if last is not None and last.network is network else None
        self.layers = network.layers(times, n, given, known and known.layers)
        self.unconditional = None
        if field.is_guided:
            known_too = known.unconditional if known else self.layers
            self.unconditional = network.layers(times, n, {**given, **field.unconditional}, known_too)
        self._prepared: dict[Any, Any] = {}  # by the module of the kernels

    def is_stale(self, network: _Network, n: int, given: Mapping[str, Any], known: bool) -> bool:
        if self.network is not network.recorded or (not known and self.network.is_stale()):
            return True
        if not given and not self.given:
            return False
        now = _conditioning(network.field, given)
        same = n == self.n and now.keys() == self.given.keys() and all(v is self.given[k] for k, v in now.items())
        return not same or [_version(v) for v in now.values()] != self.versions

    @torch.no_grad()
    def prepared(self, C, steps: Tensor | list[Update]):
        if C not in self._prepared:
            network = self.network
            if C not in network.plans:
                network.plans[C] = plan_for(C, network.dim, self.layers, network.low)
            given = self.layers, self.unconditional, network.field.guidance
            self._prepared[C] = network.plans[C].prepare(steps, *given)
        return self._prepared[C]


def _has_rows(v: Any, n: int) -> bool:
    """Whether it has one row for each of n > 1 samples."""
    return isinstance(v, Tensor) and v.dim() > 0 and len(v) == n > 1


def _conditioning(field: VelocityField, given: Mapping[str, Any]) -> dict[tuple[str, bool], Any]:
    """What both calls of guidance get, by name and whether it is the unconditional one."""
    return {(k, False): v for k, v in given.items()} | {(k, True): v for k, v in field.unconditional.items()}


def _is_same(a: Any, b: Any) -> bool:
    """Whether a call gets what the network was recorded with; tensors may be others."""
    try:
        return isinstance(b, Tensor) or a is b or (type(a) is type(b) and bool(a == b))
    except Exception:  # of objects that do not compare
        return False


def _version(v: Any) -> object:
    """Where a tensor is, and how often it was written to; something that equals nothing for one that does not count."""
    if not isinstance(v, Tensor):
        return 0
    return object() if v.is_inference() else (v.data_ptr(), v._version)
