"""Fuse a velocity network with the steps of a schedule or solver: a whole sampler in one call of `mlp_sample`.

A call of the network is recorded (record.py), turned into layers (lowering.py, where a new kind of layer is added),
kept with what tells whether it still holds (recorded.py, watch.py), and run with tables for the steps and the batch.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flowkernels._casts import no_grad
from flowkernels._checks import (
    LOW,
    expect,
    expect_bool,
    expect_finite_flow,
    expect_int,
    expect_noise,
    expect_shape,
    expect_tensor,
)
from flowkernels.fusion.record import NotFusable
from flowkernels.fusion.recorded import WAY_OUT, Batch, Network
from flowkernels.ops.library import direct, direct_triton, fresh, is_captured, plain
from flowkernels.ops.mlp_sample import mlp_sample
from flowkernels.runtime.torch_private import modes_are_on
from flowkernels.schedule import Schedule
from flowkernels.solver import Solver, euler_sizes, expect_solver
from flowkernels.velocity.evaluate import warn_if_training
from flowkernels.velocity.field import VelocityField, float64_device
from flowkernels.velocity.protocol import Velocity, VelocityBase, is_per_sample, resolve, samples_of
from flowkernels.velocity.provenance import Identity

MOST_BYTES = 256 << 20  # of tables with a row for every step of every sample; more samples run in parts
MOST_SCHEDULES = 8  # that a sampler keeps tables for, beside its own


def fuse(
    velocity: Velocity,
    schedule: Schedule | Solver | int | Sequence[float] | Tensor,
    *,
    shape: Sequence[int] | None = None,
    weights: torch.dtype | None = None,
) -> "FusedSampler":
    """A sampler that evaluates the network and makes all steps of a schedule or of a `Solver` in one call.

    For networks that are stacks of linear layers, found out by recording one call: activations (ReLU, LeakyReLU, PReLU,
    SiLU, GELU, ELU, SELU, Tanh, Sigmoid, Mish, Softplus, GLU, clamp, ...), residual sums, gates, LayerNorm, RMSNorm,
    BatchNorm in eval mode, and whatever puts features elsewhere. docs/fused-samplers.md has the whole list.
    Time and conditioning may enter in any way that does not involve x before a concatenation, a sum or a product: what
    depends on them alone is computed once a schedule by the network's own operations.

    Args:
        velocity: a network `net(x, t)` or a `VelocityField` around one, with its conditioning and guidance. A module
            whose forward takes one input, such as `nn.Sequential` or torchcfm's `MLP(time_varying=True)`, gets x with t
            as its last column.
        schedule: a Schedule, a Solver, N for N uniform steps, or N+1 increasing times in [0, 1].
        shape: of one sample; None tries vectors as long as the outputs of the network's linear layers.
        weights: torch.float32 or torch.bfloat16; None takes bfloat16 for a bfloat16 network, else float32. With
            bfloat16 the inputs of linear layers are rounded to it as well; sums and the state stay in float32.

    Returns:
        FusedSampler; `fk.sample`, `fk.rollout` and `fk.calibrate` take it in place of the velocity. Its numbers are the
        network's to float32 rounding (2^-9 a product with bfloat16 weights), which is checked on a few samples here.

    Raises:
        NotFusable: naming all modules that stopped it, each with the operation and the reason.
        TypeError, ValueError: naming the argument.

    Examples:
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.SiLU(), torch.nn.Linear(8, 2))
        >>> velocity, noise = fk.VelocityField(net, time_column=True), torch.randn(4, 2)
        >>> sampler = fk.fuse(velocity, 8)
        >>> torch.allclose(sampler(noise), fk.sample(velocity, noise, 8), atol=1e-5)
        True
    """
    resolve(velocity)
    if _takes_one_input(velocity):
        velocity = VelocityField(velocity, time_column=True)
    known = weights is None or weights is torch.float32 or weights is torch.bfloat16
    expect(known, "weights", "float32, bfloat16 or None", weights, TypeError)
    shape = None if shape is None else expect_shape(shape, "shape", "the sizes of one sample, each at least 1")
    solver = expect_solver(schedule, "schedule", shared=not modes_are_on())
    warn_if_training(velocity)
    field = VelocityField.of(velocity)
    shape = _shape_of_sample(field) if shape is None else shape
    sampler = FusedSampler(Network(velocity, field, shape, weights), solver)
    sampler.verify()
    sampler.on([0.0, 0.3, 0.7, 1.0]).verify()  # a schedule of one step would not show what time does
    return sampler


def _key(solver: Solver) -> tuple:
    """What tells samplers on one network apart."""
    return tuple(solver.times.tolist()), tuple(solver.model_times.tolist()), solver.updates()


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
    n, said = samples_of(field), "a network without nn.Linear"
    for width in dict.fromkeys(m.out_features for m in reversed(linear)):
        x = torch.zeros(n, width, dtype=torch.float32, device=linear[0].weight.device)
        try:
            t = torch.zeros(n, dtype=torch.float64, device=float64_device(x.device))
            v = field.call_network(x, t, field.conditioning)
            if v.shape == x.shape:
                return (width,)
        except Exception as e:  # whatever a network makes of a wrong shape
            said = f"{type(e).__name__}: {e} on {list(x.shape)}"
    raise NotFusable(f"shape: expected the shape of one sample, which could not be found out ({said})")


class FusedSampler(VelocityBase):
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

    A CUDA graph that calls are captured in reads what the sampler keeps, with the weights that it had: the sampler has
    to live as long as the graph.

    velocity: what it was made from; a VelocityField for a network with one input. times: the knots, float64 `[N+1]`.
    shape: of one sample.
    """

    is_fused = True
    shares_solvers = True  # sampling/loop.py

    def __init__(self, network: "Network", solver: Solver):
        self._network, self._solver, self._key = network, solver, _key(solver)
        sizes = euler_sizes(solver.updates())
        self._steps = solver.updates() if sizes is None else torch.tensor(sizes, dtype=torch.float64, device="cpu")
        self._batch: Batch | None = None
        self._others: dict[tuple, FusedSampler] = {}

    @property
    def velocity(self) -> Velocity:
        return self._network.velocity

    @property
    def times(self) -> Tensor:
        return self._solver.times.clone()

    @property
    def shape(self) -> tuple[int, ...]:
        return self._network.shape

    @property
    def weights(self) -> torch.dtype:
        """float32 or bfloat16: what linear layers multiply."""
        return self._prepare(samples_of(self._network.field), None).network.low or torch.float32

    @property
    def stale(self) -> bool:
        """Whether the network's weights were written since they were last taken in."""
        return self._network.recorded is None or self._network.recorded.is_stale()

    def refresh(self) -> None:
        """Take in the network's weights as they are now."""
        self._network.recorded = None

    def on(self, schedule: Schedule | Solver | int | Sequence[float] | Tensor) -> "FusedSampler":
        """The same network on another schedule or solver."""
        solver = expect_solver(schedule, "schedule")
        key = self._key if solver is self._solver else _key(solver)
        if key == self._key:
            return self
        if key not in self._others:
            while len(self._others) >= MOST_SCHEDULES:
                self._others.pop(next(iter(self._others)))
            self._others[key] = FusedSampler(self._network, solver)
        return self._others[key]

    def rows(self, index: Tensor | slice, n: int) -> "FusedSampler":
        """The same sampler for the samples `index` of n: conditioning that has one row a sample is indexed."""
        field = self._network.field.rows(index, n)
        if not field.conditioning:
            return self
        return FusedSampler(Network(field, field, self.shape, self._network.weights), self._solver)

    def fused_run(self, solver: Solver) -> "FusedSampler":
        return self.on(solver)

    def unfused(self) -> VelocityBase:
        return resolve(self.velocity)

    def identify(self, weights: bool = True) -> Identity:
        return self.unfused().identify(weights)

    def __getstate__(self) -> dict:
        """Without what is made at the first call: copies record their own network anew."""
        return self.__dict__ | {"_batch": None, "_others": {}}

    def __call__(self, noise: Tensor, **conditioning: Any) -> Tensor:
        """Samples at t = 1, or of an inversion at its last time.

        Args:
            noise: `[n, *shape]`, float32, bfloat16 or float16, where the network is.
            conditioning: in place of entries of the VelocityField's conditioning, for this call.

        Returns:
            `[n, *shape]`, float32.

        Raises:
            TypeError, ValueError: naming the argument; for NaN or Inf, the sample and the step. On a GPU nothing waits
                for the kernel to look for NaN and Inf: they show in the result.
        """
        if not conditioning and (found := self._at_once(noise)) is not None:
            return found
        return self.run(noise, conditioning)[0]

    def _at_once(self, noise: Tensor) -> Tensor | None:
        """Samples of plain noise on the CPU where there is no conditioning and all is as in the last call, in a third
        of the time that `run` takes besides its kernel; else None."""
        network, batch = self._network, self._batch
        if batch is None or batch.given or network.field.conditioning or (C := plain("mlp_sample", noise)) is None:
            return None
        if (prepared := batch.ready(C)) is None or batch.is_stale(network, batch.n, batch.given, False):
            return None
        out = torch.empty_like(noise)
        done = C.mlp_sample_plain(prepared.address, noise, network.shape, out, torch.get_num_threads())
        return out if done else None

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
                each = {k for k, v in (conditioning or {}).items() if is_per_sample(v, n)} - {
                    *self._network.field.shared
                }
                part = {k: v[rows] if k in each else v for k, v in (conditioning or {}).items()}
                parts.append(self.rows(rows, n).run(x[rows], part, **kept, first=first + begin))
            found = zip(*parts, (0, 1, 1), strict=True)
            return tuple(None if t[0] is None else torch.cat(t[:-1], t[-1]) for t in found)
        batch = self._prepare(n, given, known)
        if x.device != batch.network.device:
            expect(False, "noise", f"a tensor on {batch.network.device}, where the network is", f"one on {x.device}")
        if is_captured(x):
            self._network.captured.add(batch)
        way = direct("mlp_sample", x)
        if (C := way[0] if way else direct_triton("mlp_sample", x)) is not None:
            out, kept = torch.empty_like(x), [None, None]
            if states:
                kept[0] = fresh(x.new_empty(len(self._steps) + 1, *x.shape))
            if velocities:
                kept[1] = fresh(x.new_empty(len(self._steps), *x.shape))
            bad = (batch.ready(C) or batch.prepared(C, self._steps, x)).run(x, out, *kept)
        else:
            out, *kept = self._by_op(batch, x, states or velocities)
            bad = -1 if torch.isfinite(out).all() else 0
        if bad >= 0:
            expect_noise(noise)
            _, _, v = self._by_op(batch, x, True)
            what = "step" if self._solver.evaluations == self._solver.steps else "evaluation"
            expect_finite_flow(out, v, self._solver.model_times, first, what)
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
    def _by_op(self, batch: "Batch", x: Tensor, trajectory: bool) -> list[Tensor | None]:
        """(samples, states, velocities), the latter two for a trajectory, through the public op: any backend, and any
        tracer of torch's."""
        batch.made.use()
        low, w = batch.network.low, self._network.field.guidance
        options = dict(unconditional=batch.unconditional, guidance=w, weights=low, trajectory=trajectory)
        steps = self._steps.tolist() if isinstance(self._steps, Tensor) else self._steps
        found = mlp_sample(x.flatten(1), steps, batch.layers, **options)
        if not trajectory:
            return [found.view(x.shape), None, None]
        return [t.view(*t.shape[:-1], *x.shape[1:]) for t in found]

    def _prepare(self, n: int, given: Mapping[str, Any] | None, known: bool = False) -> "Batch":
        """The layers with their tables for n samples: those of the last call, where nothing has changed.

        known: it has been looked at just now what the network is.
        """
        given, batch = self._network.field.conditioning if given is None else given, self._batch
        if batch is None or batch.is_stale(self._network, n, given, known):
            batch = self._batch = Batch(self._network.record(n, given), self._solver.model_times, n, given, batch)
        return batch

    @no_grad
    def verify(self) -> None:
        """Raise NotFusable unless a few samples have the velocities that the network itself has."""
        field = self._network.field
        n = samples_of(field)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(n, *self.shape, generator=generator, dtype=torch.float32, device="cpu")
        x = x.to(self._network.device)
        _, states, velocities = self.run(x, states=True, velocities=True)
        for s in sorted({0, len(self._steps) // 2, len(self._steps) - 1}):
            now = self._solver.model_times[s].item()
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
