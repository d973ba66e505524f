"""A recorded network: what samplers on several schedules share, and its tables for a batch."""

import contextlib
import functools
import itertools
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from flowkernels._checks import LOW, expect, expect_mapping, expect_tensor
from flowkernels._guidance import expect_weight
from flowkernels.fusion.lowering import Lowering, Replayed
from flowkernels.fusion.record import ROWS, STATE, TIME, NotFusable, Numbers, Record, sample_rows
from flowkernels.ops.library import Made, is_captured
from flowkernels.ops.mlp_sample import Layer, plan_for
from flowkernels.runtime.torch_private import tree_flatten, uncompiled, untraced
from flowkernels.runtime.watch import Unwatchable, Watch, executed
from flowkernels.solver import Update
from flowkernels.velocity.field import HOOKS, VelocityField, float64_device, overridden
from flowkernels.velocity.protocol import expect_rows, is_per_sample

FEW = 3  # samples of a call that looks for the numbers that a network deals with
TRIES = 3  # recordings of a network that is changed, by another thread or by its own calls, while it is recorded
WAY_OUT = "fk.sample(velocity, noise, schedule, capture=...) captures the loop of any network"


class Network:
    """What samplers on several schedules share."""

    def __init__(self, velocity, field: VelocityField, shape: tuple[int, ...], weights: torch.dtype | None):
        self.velocity, self.field, self.shape, self.weights = velocity, field, shape, weights
        self.dim, self.is_flat = torch.Size(shape).numel(), len(shape) == 1
        expect(self.dim > 0, "shape", "at least one feature", shape)
        self.recorded: Recorded | None = None
        self.captured: set[Batch] = set()  # what CUDA graphs read
        self.lock = threading.Lock()

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k not in ("recorded", "captured", "lock")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, recorded=None, captured=set(), lock=threading.Lock())

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

    def record(self, n: int, given: Mapping[str, Any]) -> "Recorded":
        """The network recorded, with its weights as they are and conditioning of this form."""
        with self.lock:
            if self.recorded is None or self.recorded.is_stale() or not self.recorded.fits(n, given):
                here = self.device.type != "meta"
                expect(here, "velocity", "a network with values, on the CPU or a GPU", f"one on {self.device}")
                for _ in range(TRIES):
                    found = Recorded(self, n, given)
                    if found.repeats(self, given):
                        break
                else:
                    found.look()  # a network that counts its calls is not another one
                self.recorded = found
            return self.recorded


def _undisturbed(f):
    """Without gradients, autocast and compiler, and outside of the caller's inference mode, whose tensors count no
    writes."""

    @untraced
    @functools.wraps(f)
    def run(self, network, *args):
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(network.device.type, enabled=False):
            return f(self, network, *args)

    return run


class Recorded:
    """A network's operations and weights at one moment.

    each: names of the conditioning that has one row a sample. low: bfloat16 for weights in it, or None.
    """

    @_undisturbed
    def __init__(self, network: Network, n: int, given: Mapping[str, Any]):
        self.field, self.dim, self.device = network.field, network.dim, network.device
        other = overridden(self.field).keys() - {"call_network"} | {h for h in HOOKS[:2] if getattr(self.field, h)}
        if other:  # what the recording does not call
            said = f"got {sorted(other)} overridden"
            raise NotFusable(f"velocity: expected a VelocityField's own evaluation, {said}; {WAY_OUT}")
        try:
            expect_weight(self.field.guidance, "a fused sampler, whose kernel joins guidance with the step", WAY_OUT)
        except ValueError as e:
            raise NotFusable(str(e)) from None
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
                try:
                    out = self.record.run(lambda: self.field.call_network(x, t, kwargs))
                except Exception as e:
                    self.record.refused.raise_any()  # it may come of that
                    expected = "expected the shape of one sample of this network, but a call on"
                    raise NotFusable(f"shape: {expected} {list(x.shape)} raised {type(e).__name__}: {e}") from e
            self.out = self.record.tensors[out]
            self.lowering = Lowering(self.record, x_place, out, self.dim)
        except NotFusable as e:
            if str(e).startswith("shape: "):
                raise
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
        self.made = Made(self.record.tensors)

    def _inputs(self, network: Network, given: Mapping[str, Any], rows: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
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

    def _numbers(self, network: Network, given: Mapping[str, Any]) -> set[int]:
        """The integers and sizes that a call on a few samples deals with."""
        x, t, kwargs = self._inputs(network, given, FEW)
        with contextlib.suppress(Exception), uncompiled(), Numbers() as numbers:  # the recording says what is wrong
            self.field.call_network(x, t, kwargs)
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

    @_undisturbed
    def repeats(self, network: Network, given: Mapping[str, Any]) -> bool:
        """Whether the network that was looked at does what was recorded: another thread may have changed it between."""
        x, t, kwargs = self._inputs(network, given, self.record.rows)
        if is_captured(x):
            return True
        with contextlib.suppress(Exception), uncompiled():  # the next recording says what is wrong
            return torch.equal(self.field.call_network(x, t, kwargs), self.out) and not self.is_stale()
        return False

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
        each = set()
        for name, kwargs in (("conditioning", given), ("unconditional", self.field.unconditional)):
            for key, value in kwargs.items():
                if key not in self.field.shared and isinstance(value, Tensor):
                    expect_rows(value, f"{name}[{key!r}]", n)
                    each |= {key} if is_per_sample(value, n) else set()
        return each

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


class Batch:
    """A network's layers with the tables of one sampler's evaluations and one batch's conditioning."""

    @_undisturbed
    def __init__(self, network: Recorded, times: Tensor, n: int, given: Mapping[str, Any], last: "Batch | None"):
        self.network, field = network, network.field
        self.n, self.given = n, _conditioning(field, given)
        self.versions = [_version(v) for v in self.given.values()]
        known = last if last is not None and last.network is network else None
        network.made.use()
        if known:
            known.made.use()
        self.layers = network.layers(times, n, given, known and known.layers)
        self.unconditional = None
        if field.is_guided:
            known_too = known.unconditional if known else self.layers
            self.unconditional = network.layers(times, n, {**given, **field.unconditional}, known_too)
        self._prepared: dict[Any, Any] = {}  # by the module of the kernels
        self.made = Made(t for a in (*self.layers, *(self.unconditional or ())) for t in (a.weight, *a.tables))

    def is_stale(self, network: Network, n: int, given: Mapping[str, Any], known: bool) -> bool:
        if self.network is not network.recorded or (not known and self.network.is_stale()):
            return True
        if not given and not self.given:
            return False
        now = _conditioning(network.field, given)
        same = n == self.n and now.keys() == self.given.keys() and all(v is self.given[k] for k, v in now.items())
        return not same or [_version(v) for v in now.values()] != self.versions

    def ready(self, C):
        """What `prepared` has made for samples that no CUDA graph held, or None."""
        return self._prepared.get(C)

    @torch.no_grad()
    def prepared(self, C, steps: Tensor | Sequence[Update], x: Tensor):
        """For samples like x."""
        network = self.network
        self.made.use()
        if (plan := network.plans.get(C)) is None:
            plan = plan_for(C, network.dim, self.layers, network.low)
        found = plan.prepare(steps, self.layers, self.unconditional, network.field.guidance)
        if not is_captured(x):
            network.plans[C], self._prepared[C] = plan, found
        return found


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
