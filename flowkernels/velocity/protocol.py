"""What a velocity is to the stages: something to call, and what it may offer beside."""

from collections.abc import Callable, Collection, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch
from torch import Tensor

from flowkernels._checks import expect, expect_callable, expect_takes
from flowkernels._guidance import Guidance
from flowkernels.runtime.torch_private import tree_leaves, tree_map
from flowkernels.velocity.hashes import unwrapped
from flowkernels.velocity.provenance import Identity, network_identity
from flowkernels.velocity.time_embedding import Embedding, expand_embedding, exposes_time_embedding, times_of

if TYPE_CHECKING:
    from flowkernels.solver import Solver

# the library's, as `VelocityField.convention` says it
CONVENTION = MappingProxyType(dict(reverse_time=False, time_scale=1.0, sign=1, guidance=1.0, dtype=None))


class FusedRun(Protocol):
    """All steps of a solver in one call, as a `FusedSampler` makes them; weights: what its products are made of."""

    weights: torch.dtype

    def __call__(self, noise: Tensor) -> Tensor: ...

    def rows(self, index: Tensor | slice, n: int) -> "FusedRun": ...

    def run(
        self, noise: Tensor, *, states: bool = False, velocities: bool = False, first: int = 0
    ) -> tuple[Tensor, Tensor | None, Tensor | None]: ...


class VelocityBase:
    """A velocity that offers the stages more than a call `velocity(x, t)`.

    x `[n, *shape]` is the state, t `[n]` the time from 0, noise, to 1, data; the result is dx/dt, `[n, *shape]`. For
    that much any callable will do. A class derived from this one says what else there is by the methods that it
    overrides, all of which have a default; the stages ask a velocity nothing but these. `VelocityField`, `FusedSampler`
    and `FusedHead` are such classes. One with a time embedding is a `HasTimeEmbedding` as well.

    guidance: weight w of `v_uncond + w (v - v_uncond)`, of what `velocities` returns; or a function of both, which
        `velocities` has applied.
    conditioning: what it is called with beside x and t, by name.
    shared: the names of that which is not per sample.
    is_fused: it runs a solver, or a step, by kernels of its own (`fused_run`, `fused_steps`).
    forced_knots: times that no step may span, such as where one network takes over from another; `calibrate` takes
        them over: those of its grid, or the first ones after.
    provenance: settings, ready for JSON, that a calibration made with it depends on beside weights, such as the size of
        images; a warning says so where a schedule is used at others.

    Examples:
        >>> class Decay(fk.VelocityBase):
        ...     def __call__(self, x, t):
        ...         return -x
        >>> fk.sample(Decay(), torch.ones(1, 2), 2)
        tensor([[0.2500, 0.2500]])
    """

    guidance: Guidance = 1.0
    conditioning: Mapping[str, Any] = MappingProxyType({})
    shared: tuple[str, ...] = ()
    is_fused: bool = False
    forced_knots: tuple[float, ...] = ()
    provenance: Mapping[str, Any] = MappingProxyType({})

    # ---- evaluation ----

    def velocities(
        self, x: Tensor, t: Tensor, embedding: Embedding | None = None
    ) -> tuple[Tensor, Tensor | None, float]:
        """`(v, v_uncond or None, guidance)` at one time t `[n]`: with v_uncond guidance is left to the caller, who
        joins it with the step.

        embedding: of that time, of one row; None leaves it to the velocity.
        """
        return _called(self, x, t, embedding), None, 1.0

    def moments(self, t: Tensor, x: Tensor) -> Iterator[Any]:
        """A loop's times t `[M]`, as `model_times` gives them, one by one, as `velocities_at` takes them with states
        like x: each `[n]`, and what can be known of an evaluation there."""
        return times_of(t, len(x))

    def velocities_at(
        self, x: Tensor, moment: Any, embedding: Embedding | None = None
    ) -> tuple[Tensor, Tensor | None, float]:
        """`velocities` at one of the `moments`; what has changed since these were made is seen."""
        return self.velocities(x, self.time_for(moment, x), embedding)

    def rows(self, index: Tensor | slice, n: int) -> "VelocityBase":
        """The velocity for the samples `index` of n: what it holds with one row a sample is indexed."""
        return self

    def without_conditioning(self, names: Collection[str]) -> "VelocityBase":
        """The velocity without what it holds by these names, for rows that bring their own."""
        return self

    def without_guidance(self) -> "VelocityBase":
        """The conditional velocity alone."""
        return self

    # ---- times ----

    def time_for(self, t: Tensor, x: Tensor) -> Tensor:
        """Times in float64, where float64 is, as it takes them beside x: float32, or float64 for a float64 state."""
        return t.to(x.device, torch.float64 if x.dtype == torch.float64 else torch.float32)

    def model_times(self, times: Tensor, x: Tensor) -> Tensor:
        """The times of all evaluations `[M]`, float64 on the CPU, as it takes them, for loops; without a sync."""
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return times.to(x.device, dtype, non_blocking=True)

    def has_time_embedding(self) -> bool:
        """Whether its embeddings of times can be made ahead: `embed_time`."""
        return exposes_time_embedding(self)

    def embed_time(self, t: Tensor, like: Tensor) -> Embedding:
        """The time embedding at times t `[N]`; like: the state, whose dtype says what they are rounded to."""
        return self.time_embedding(self.time_for(t, like))

    # ---- what it is ----

    def identify(self, weights: bool = True) -> Identity:
        """In hashes; never an error. A module is its weights and attributes; what is none and does not say, is unknown.

        weights: False leaves out the hashes of weights, which take as long as these take to be read.
        """
        convention = self.convention() or CONVENTION
        return network_identity(self, convention, conditioning=self.conditioning, weights=weights)

    def convention(self) -> dict[str, Any] | None:
        """How it calls its network, for a calibration's provenance; None for the library's own convention."""
        return None

    # ---- kernels of its own ----

    def fused_run(self, solver: "Solver") -> FusedRun | None:
        """What makes all steps of a Solver in one call; None: nothing does."""
        return None

    def unfused(self) -> "VelocityBase":
        """The velocity to evaluate at single times, for one that makes all steps in one call."""
        return self

    def fused_steps(
        self, x: Tensor, solver: "Solver", out: Tensor | None = None, keep: bool = False
    ) -> Iterator[tuple[Tensor, Tensor | None]] | None:
        """What `loop.steps` yields for a Solver; None: it makes the steps itself."""
        return None


Velocity: TypeAlias = VelocityBase | Callable[[Tensor, Tensor], Tensor]  # what every stage takes


class Called(VelocityBase):
    """Any callable as a velocity. A wrapper, such as torch.compile's or DataParallel, takes times as what it wraps
    does."""

    shares_solvers = True  # sampling/loop.py

    def __init__(self, function: Callable):
        self.function = function
        self._wrapped = None if torch.compiler.is_compiling() else unwrapped(function)
        if (inside := self._inside()) is not None:
            self.forced_knots = inside.forced_knots

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return self.function(x, t)

    def _inside(self) -> VelocityBase | None:
        """The velocity that it wraps, which compiled loops do not know of."""
        return self._wrapped if isinstance(self._wrapped, VelocityBase) and not torch.compiler.is_compiling() else None

    def velocities(self, x: Tensor, t: Tensor, embedding: Embedding | None = None):
        return _called(self.function, x, t, embedding), None, 1.0

    def velocities_at(self, x: Tensor, moment: Tensor, embedding: Embedding | None = None):
        if self._inside() is None:  # the time is as `time_for` gives it
            return _called(self.function, x, moment, embedding), None, 1.0
        return super().velocities_at(x, moment, embedding)

    def rows(self, index: Tensor | slice, n: int) -> "Called":
        inside = self._inside()
        if inside is not None and len(range(n)[index] if isinstance(index, slice) else index) < n:
            rows = sorted(k for k, v in inside.conditioning.items() if k not in inside.shared and is_per_sample(v, n))
            expected = "a VelocityField around the wrapped network, where conditioning has a row for each sample"
            got = f"a {type(self.function).__name__} around a VelocityField with {rows}"
            expect(not rows, "velocity", expected, got)
        return self

    def time_for(self, t: Tensor, x: Tensor) -> Tensor:
        inside = self._inside()
        return super().time_for(t, x) if inside is None else inside.time_for(t, x)

    def model_times(self, times: Tensor, x: Tensor) -> Tensor:
        inside = self._inside()
        return super().model_times(times, x) if inside is None else inside.model_times(times, x)

    def has_time_embedding(self) -> bool:
        return exposes_time_embedding(self.function)

    def embed_time(self, t: Tensor, like: Tensor) -> Embedding:
        return self.function.time_embedding(self.time_for(t, like))

    def identify(self, weights: bool = True) -> Identity:
        inside = self._inside()
        if inside is not None:
            return inside.identify(weights)
        return network_identity(unwrapped(self.function), CONVENTION, weights=weights)


def _called(function, x: Tensor, t: Tensor, embedding: Embedding | None) -> Any:
    if embedding is not None:
        return function(x, t, embedding=expand_embedding(embedding, len(x)))
    try:
        return function(x, t)
    except TypeError:  # its own, unless it takes other arguments
        expect_takes(function, "velocity", "a callable velocity(x, t)", x, t)
        raise


def resolve(velocity: Velocity, name: str = "velocity") -> VelocityBase:
    """The velocity as stages ask it, once, where it comes in; TypeError for what cannot be called.

    Whether a callable takes x and t is looked at where it does not.
    """
    if isinstance(velocity, VelocityBase):
        return velocity
    expect_callable(velocity, name, "a callable velocity(x, t)")
    return Called(velocity)


def as_given(velocity: Velocity) -> Velocity:
    """What a resolved velocity was before."""
    return velocity.function if type(velocity) is Called else velocity


def is_per_sample(value: Any, n: int) -> bool:
    """Whether it, or a tensor in it, has one row for each of n > 1 samples, where it is not shared."""
    return n > 1 and any(t.dim() > 0 and len(t) == n for t in _tensors(value))


def fits_rows(value: Any, n: int) -> bool:
    return all(not t.dim() or len(t) in (1, n) for t in _tensors(value))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if value is None or isinstance(value, (str, int, float)):  # at every evaluation
        return []
    return [t for t in tree_leaves(value) if isinstance(t, Tensor)]


def expect_rows(value: Any, name: str, n: int) -> None:
    """Raise unless each tensor in conditioning that is not shared has one row for each of n samples, or one for all.

    name: such as `conditioning['y']`.
    """
    for t in _tensors(value):
        if not fits_rows(t, n):
            rows = f"{n} rows, one for each sample, or 1" if n > 1 else "1 row, that of the sample"
            key = name.partition("[")[2].removesuffix("]")
            expect(False, name, f"{rows} (shared=({key},) for what is not per sample)", t)


def samples_of(velocity: VelocityBase, default: int = 3) -> int:
    """A number of samples that the conditioning fits."""
    given = (*velocity.conditioning.items(), *getattr(velocity, "unconditional", {}).items())
    rows = (len(t) for key, value in given if key not in velocity.shared for t in _tensors(value) if t.dim())
    return next((n for n in rows if n > 1), default)


def rows_of_samples(velocity: VelocityBase, n: int) -> list[str]:
    """Names of the conditioning that has a row for each of n samples, such as `conditioning['y']`."""
    given = {name: getattr(velocity, name, {}) for name in ("conditioning", "unconditional")}
    return [
        f"{name}[{key!r}]"
        for name, values in given.items()
        for key, value in values.items()
        if key not in velocity.shared and is_per_sample(value, n)
    ]


def on_tensors(value: Any, f: Callable[[Tensor], Tensor]) -> Any:
    """f of a tensor, or of those in a container; what holds none as it is."""
    if isinstance(value, Tensor):
        return f(value)
    if not _tensors(value):
        return value
    return tree_map(lambda t: f(t) if isinstance(t, Tensor) else t, value)
