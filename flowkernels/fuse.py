"""Fuse a velocity network with the Euler steps of a schedule: a whole sampler in one call of `mlp_sample`."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flowkernels import _trace
from flowkernels._checks import expect, expect_noise, expect_tensor, expect_times
from flowkernels._trace import ROWS, STATE, TIME, Lowering, NotFusable, Record, Replayed
from flowkernels.ops._library import direct, fresh
from flowkernels.ops.mlp_sample import Layer, Plan, Tables, mlp_sample
from flowkernels.schedule import Schedule
from flowkernels.velocity_field import VelocityField, warn_if_training

WAY_OUT = "fk.sample(velocity, noise, schedule, capture=...) captures the loop of any network"


def fuse(
    velocity,
    schedule: Schedule | int | Sequence[float] | Tensor,
    *,
    shape: Sequence[int] | None = None,
    weights: torch.dtype | None = None,
) -> "FusedSampler":
    """A sampler that evaluates the network and makes all Euler steps of the schedule in one call.

    For networks that are stacks of linear layers, found out by recording one call: activations (ReLU, LeakyReLU, SiLU,
    GELU, ELU, SELU, Tanh, Sigmoid, Mish, GLU), residual sums, gates, LayerNorm, slices and concatenations of features.
    Time and conditioning may enter in any way that does not involve x before a concatenation, a sum or a product: what
    depends on them alone is computed once a schedule by the network's own operations.

    Args:
        velocity: a network `net(x, t)` or a `VelocityField` around one, with its conditioning and guidance. A module
            whose forward takes one input, such as `nn.Sequential` or torchcfm's `MLP(time_varying=True)`, gets x with t
            as its last column.
        schedule: a Schedule, N for N uniform steps, or N+1 increasing times from 0 to 1.
        shape: of one sample; None takes a vector as long as the output of the network's last `nn.Linear`.
        weights: torch.float32 or torch.bfloat16; None takes bfloat16 for a bfloat16 network, else float32. With
            bfloat16 the inputs of linear layers are rounded to it as well; sums and the state stay in float32.

    Returns:
        FusedSampler; `fk.sample`, `fk.rollout` and `fk.calibrate` take it in place of the velocity. Its numbers are the
        network's to float32 rounding (2^-9 a product with bfloat16 weights), which is checked on a few samples here.

    Raises:
        NotFusable: naming the module that stopped it.
        TypeError, ValueError: naming the argument.
    """
    if not isinstance(velocity, VelocityField):
        expect(callable(velocity), "velocity", "a callable velocity(x, t)", velocity, TypeError)
        velocity = VelocityField(velocity, time_column=_takes_one_input(velocity))
    expect(weights in (None, torch.float32, torch.bfloat16), "weights", "float32, bfloat16 or None", weights, TypeError)
    times = schedule.times if isinstance(schedule, Schedule) else expect_times(schedule, "schedule")
    warn_if_training(velocity)
    shape = tuple(shape) if shape is not None else _shape_of_sample(velocity.net)
    return FusedSampler(_Network(velocity, shape, weights), times)


def _takes_one_input(net: Any) -> bool:
    """Whether a module's forward has no second positional argument for the time."""
    if not isinstance(net, nn.Module):
        return False
    kinds = [p.kind for p in inspect.signature(net.forward).parameters.values()]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(kind in positional for kind in kinds) == 1 and inspect.Parameter.VAR_POSITIONAL not in kinds


def _shape_of_sample(net: Any) -> tuple[int, ...]:
    linear = [m for m in net.modules() if isinstance(m, nn.Linear)] if isinstance(net, nn.Module) else []
    expect(bool(linear), "shape", "the shape of one sample, for a network without nn.Linear", "None")
    return (linear[-1].out_features,)


class FusedSampler:
    """Velocity evaluation and all Euler steps in one call; made by `fuse`.

        sampler = fk.fuse(net, schedule)
        x1 = sampler(noise)                  # fk.sample(net, noise, schedule)
        x1 = sampler(noise, obs=obs)         # with other conditioning of the VelocityField

    Weights that were written since (by an optimiser, `load_state_dict`, `.to()`) are noticed and taken in at the next
    call. Writing through `.data` leaves no trace: call `refresh()`.

    velocity: the network that it was made from, as a VelocityField. times: float64 `[N+1]`. shape: of one sample.
    """

    def __init__(self, network: "_Network", times: Tensor):
        self._network, self.times = network, times
        self._h = times.diff()
        self._tables: tuple[Any, ...] = ()
        self._others: dict[tuple, FusedSampler] = {}
        self._verify()

    @property
    def velocity(self) -> VelocityField:
        return self._network.field

    @property
    def shape(self) -> tuple[int, ...]:
        return self._network.shape

    @property
    def weights(self) -> torch.dtype:
        """float32 or bfloat16: what linear layers multiply."""
        return self._network.low or torch.float32

    @property
    def stale(self) -> bool:
        """Whether the network's weights were written since they were last taken in."""
        return self._network.is_stale()

    def refresh(self) -> None:
        """Take in the network's weights as they are now."""
        self._network.built = None

    def on(self, schedule: Schedule | int | Sequence[float] | Tensor) -> "FusedSampler":
        """The same network on another schedule."""
        times = schedule.times if isinstance(schedule, Schedule) else expect_times(schedule, "schedule")
        key = tuple(times.tolist())
        if key == tuple(self.times.tolist()):
            return self
        if key not in self._others:
            while len(self._others) >= 8:
                self._others.pop(next(iter(self._others)))
            other = FusedSampler.__new__(FusedSampler)
            other._network, other.times, other._h = self._network, times, times.diff()
            other._tables, other._others = (), {}
            self._others[key] = other
        return self._others[key]

    def rows(self, index: Tensor | slice, n: int) -> "FusedSampler":
        """The same sampler for the samples `index` of n: conditioning that has one row a sample is indexed."""
        if not self.velocity.conditioning:
            return self
        return FusedSampler(_Network(self.velocity.rows(index, n), self.shape, self._network.weights), self.times)

    def __call__(self, noise: Tensor, **conditioning: Any) -> Tensor:
        """Samples at t = 1.

        Args:
            noise: `[n, *shape]`, float32, bfloat16 or float16, where the network is.
            conditioning: in place of entries of the VelocityField's conditioning, for this call.

        Returns:
            `[n, *shape]`, float32.

        Raises:
            TypeError, ValueError: naming the argument; for NaN or Inf, the sample and the step.
        """
        return self.run(noise, conditioning)[0]

    def run(
        self,
        noise: Tensor,
        conditioning: Mapping[str, Any] | None = None,
        states: bool = False,
        velocities: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(samples `[n, *shape]`, states `[N+1, n, *shape]`, velocities `[N, n, *shape]`), the latter two as asked."""
        expect_tensor(noise, "noise", (torch.float32, torch.bfloat16, torch.float16))
        network, n = self._network, len(noise) if noise.dim() else 0
        numel = 1
        for d in noise.shape[1:]:
            numel *= d
        if n == 0 or noise.dim() < 2 or numel != network.dim:
            expect(False, "noise", f"shape [n, {', '.join(map(str, self.shape))}] with n > 0", noise)
        grad = torch.is_grad_enabled() and noise.requires_grad
        expect(not grad, "noise", "no gradient: a fused sampler has none", "requires_grad")
        x = noise.detach().float().contiguous()
        layers, unconditional = self._prepared(n, conditioning)
        out = fresh(torch.empty_like(x))
        steps = len(self.times) - 1
        kept = [
            fresh(x.new_empty(steps + more, *x.shape)) if wanted else None
            for wanted, more in ((states, 1), (velocities, 0))
        ]
        guidance = self.velocity.guidance
        if (C := direct("mlp_sample", x)) is not None:
            plan, tables, others = self._planned(C, layers, unconditional)
            bad = plan.run(x, self._h, tables, others, guidance, out, *kept)
        else:
            with torch.no_grad():
                out, *kept = mlp_sample(
                    x.flatten(1),
                    self._h.tolist(),
                    layers,
                    unconditional=unconditional,
                    guidance=guidance,
                    low=network.low,
                    trajectory=True,
                )
            out, *kept = (t.view(*t.shape[:-1], *x.shape[1:]) for t in (out, *kept))
            bad = -1 if torch.isfinite(out).all() else 0
        if bad >= 0:
            self._explain(noise, conditioning, velocities)
        return out, kept[0], kept[1]

    def _explain(self, noise: Tensor, conditioning, velocities: bool) -> None:
        """Raise for a result that is not finite: the noise was not, or a velocity."""
        from flowkernels.rollout import expect_finite_flow

        expect_noise(noise)
        if velocities is not None:
            with torch.no_grad():
                layers, unconditional = self._prepared(len(noise), conditioning)
                x, _, v = mlp_sample(
                    noise.detach().float().flatten(1),
                    self._h.tolist(),
                    layers,
                    unconditional=unconditional,
                    guidance=self.velocity.guidance,
                    low=self._network.low,
                    trajectory=True,
                )
            expect_finite_flow(x, v, self.times)

    def _prepared(self, n: int, conditioning) -> tuple[list[Layer], list[Layer] | None]:
        """The layers with their tables for n samples."""
        network = self._network
        given = network.given(conditioning)
        if network.is_stale() or (given and not network.fits(n, given)):
            network.build(n, given)
        key = (network.built, network.key(n, given))
        if not self._tables or self._tables[0] != key:
            known = self._tables[1:3] if self._tables and self._tables[0][0] is network.built else (None, None)
            self._tables = (key, *network.layers(self.times, n, given, known), None)
        return self._tables[1:3]

    def _planned(self, C, layers, unconditional) -> tuple[Plan, Tables, Tables | None]:
        if self._tables[3] is None:
            others = None if unconditional is None else Tables(unconditional)
            self._tables = (*self._tables[:3], (self._network.plan(C, layers), Tables(layers), others))
        return self._tables[3]

    @torch.no_grad()
    def _verify(self) -> None:
        """A few samples must have the velocities that the network has, at a few steps."""
        network, field = self._network, self.velocity
        lengths = [len(v) for v in field.conditioning.values() if isinstance(v, Tensor) and v.dim() and len(v) > 1]
        n = lengths[0] if lengths else 3
        x = torch.randn(n, *self.shape, generator=torch.Generator().manual_seed(0)).to(network.device)
        _, states, velocities = self.run(x, states=True, velocities=True)
        steps = len(self.times) - 1
        for s in sorted({0, steps // 2, steps - 1}):
            t = torch.full((n,), self.times[s].item(), device=network.device)
            expected = field(states[s], t).float()
            error = (velocities[s] - expected).abs().max().item()
            allowed = (1e-3 if network.low is None else 0.1) * max(expected.abs().max().item(), 1e-6)
            if not error <= allowed:
                raise NotFusable(
                    f"velocity: expected a network that its recorded operations describe, got velocities that differ "
                    f"by {error:.3g} at step {s} (its branches may depend on the values); {WAY_OUT}"
                )


class _Network:
    """What samplers on different schedules share: the recorded network, its packed weights, and whether they are old."""

    def __init__(self, field: VelocityField, shape: tuple[int, ...], weights: torch.dtype | None):
        self.field, self.shape, self.weights = field, shape, weights
        self.dim = torch.Size(shape).numel()
        expect(self.dim > 0, "shape", "at least one feature", shape)
        self.built: object | None = None  # a new object for every time the weights were taken in
        self.each: set[str] = set()  # names of the conditioning that has one row a sample
        tensors = [*self._parameters()]
        self.device = tensors[0].device if tensors else torch.device("cpu")

    def _parameters(self):
        net = self.field.net
        return [*net.parameters(), *net.buffers()] if isinstance(net, nn.Module) else []

    def build(self, n: int, conditioning: Mapping[str, Any]) -> None:
        """Record one call of the network and take in its weights."""
        field, net = self.field, self.field.net
        module = net if isinstance(net, nn.Module) else None
        each = self._with_rows(n, conditioning)
        tensors = [*self._parameters(), *(v for v in conditioning.values() if isinstance(v, Tensor))]
        rows = _trace.sample_rows(d for t in [*tensors, torch.empty(self.shape)] for d in t.shape)
        record = Record(module, rows)
        x = torch.randn(rows, *self.shape, generator=torch.Generator().manual_seed(0)).to(self.device)
        t = torch.linspace(0, 1, rows, device=self.device)
        self.x_place, self.t_place = record.input(x, STATE), record.input(t, TIME)
        kwargs, self.places = {}, {}
        for key, value in conditioning.items():
            if isinstance(value, Tensor):
                value = value[torch.arange(rows, device=value.device) % len(value)] if key in each else value.clone()
                self.places[key] = record.input(value, *([ROWS] if key in each else []))
            kwargs[key] = value
        try:
            out = record.run(lambda: field._call(x, t, kwargs))
            self.lowering = Lowering(record, self.x_place, out, self.dim)
        except NotFusable as e:
            raise NotFusable(f"velocity: expected a stack of linear layers, but {e}; {WAY_OUT}") from None
        except (RuntimeError, TypeError, IndexError, ValueError) as e:
            raise NotFusable(
                f"shape: expected the shape of one sample of this network, but a call on {list(x.shape)} raised {e}"
            ) from e
        self.record, self.each, self.plans = record, each, {}
        matrices = [record.tensors[p] for d in self.lowering._all() if d.weight for p in d.weight[1]]
        expect(
            all(m.dtype != torch.float64 for m in matrices),
            "velocity",
            "a float32 or bfloat16 network",
            "float64 weights",
        )
        own = bool(matrices) and all(m.dtype == torch.bfloat16 for m in matrices)
        low = self.weights or (torch.bfloat16 if own else torch.float32)
        self.low = None if low == torch.float32 else low
        self.watched = list(_watch(module)) if module is not None else []
        self.built = object()

    def is_stale(self) -> bool:
        if self.built is None:
            return True
        for owner, name, t, pointer, version in self.watched:
            if owner.get(name) is not t or t.data_ptr() != pointer or t._version != version:
                return True
        return False

    def _with_rows(self, n: int, given: Mapping[str, Any]) -> set[str]:
        """The names of the conditioning that has one row a sample, for n > 1 samples."""
        both = [*given.items(), *self.field.unconditional.items()]
        return {k for k, v in both if isinstance(v, Tensor) and v.dim() and len(v) == n and n > 1}

    def fits(self, n: int, given: Mapping[str, Any]) -> bool:
        """Whether it was recorded with the same conditioning having one row a sample (or n, or the one for all)."""
        rows = {k: len(v) for k, v in given.items() if isinstance(v, Tensor) and v.dim()}
        return self._with_rows(n, given) <= self.each and all(rows[k] in (1, n) for k in self.each)

    def given(self, conditioning: Mapping[str, Any] | None) -> Mapping[str, Any]:
        """The VelocityField's conditioning with what a call puts in its place."""
        if not conditioning:
            return self.field.conditioning
        known = sorted(self.field.conditioning)
        unknown = sorted(set(conditioning) - set(known))
        expect(not unknown, "conditioning", f"names of the VelocityField's conditioning {known}", f"{unknown}")
        return self.field.conditioning | conditioning

    def key(self, n: int, given: Mapping[str, Any]) -> tuple:
        """What tables of conditioning depend on, but for the weights and the times."""
        if not given:
            return ()
        values = [*given.values(), *self.field.unconditional.values()]
        return (n, *((id(v), v._version) if isinstance(v, Tensor) else v for v in values), *map(_Kept, values))

    def layers(self, times: Tensor, n: int, given, known) -> tuple[list[Layer], list[Layer] | None]:
        """The layers with the tables of these times and of n samples' conditioning; `known`, those of other samples."""
        conditional = self._tables(times, n, given, known[0])
        if not self.field.is_guided:
            return conditional, None
        unconditional = self._tables(times, n, given | self.field.unconditional, known[1] or conditional)
        return conditional, unconditional

    def _tables(self, times: Tensor, n: int, given: Mapping[str, Any], known) -> list[Layer]:
        inputs = {self.t_place: times[:-1].to(torch.float32).to(self.device)}
        for key, value in given.items():
            if key not in self.places:
                same = value is self.field.conditioning[key] or value == self.field.conditioning[key]
                expect(bool(same), key, "the value that the network was fused with, or a tensor in both", value)
                continue
            expect_tensor(value, key)
            recorded = self.record.tensors[self.places[key]]
            rows = n if key in self.each else len(recorded) if recorded.dim() else None
            if key in self.each and len(value) == 1:
                value = value.expand(n, *value.shape[1:])
            fits = value.dim() == recorded.dim() and value.shape[1:] == recorded.shape[1:]
            fits = fits and (rows is None or len(value) == rows)
            shape = [rows, *recorded.shape[1:]] if rows is not None else []
            expect(fits, key, f"shape {shape}", value)
            inputs[self.places[key]] = value
        # the unconditional tables differ from the conditional ones in what depends on shared conditioning as well
        of_rows = known is not None and not (set(self.places) - self.each)
        needed = self.lowering.needed(of_rows)
        values = self.record.replay(inputs, len(times) - 1, n, needed)
        replayed = Replayed(self.record, values, len(times) - 1, n)
        if of_rows:
            return self.lowering.layers(replayed, known)
        layers = self.lowering.layers(replayed)
        if known is not None:  # one packed copy of the weights serves both
            layers = [Layer(**{**vars(a), "weight": b.weight}) for a, b in zip(layers, known, strict=True)]
        return layers

    def plan(self, C, layers: list[Layer]) -> Plan:
        """The packed network, once for all schedules."""
        if C not in self.plans:
            self.plans[C] = Plan(C, self.dim, layers, self.low)
        return self.plans[C]


class _Kept:
    """Keeps a value alive, so that no other takes its identity; equal to any other."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other) -> bool:
        return isinstance(other, _Kept)

    __hash__ = None


def _watch(module: nn.Module):
    for m in module.modules():
        for owner in (m._parameters, m._buffers):
            for name, t in owner.items():
                if t is not None:
                    yield owner, name, t, t.data_ptr(), t._version
