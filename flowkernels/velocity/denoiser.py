"""`from_denoiser`: a network of diffusion, which predicts data, noise or v on a path of its own, as a velocity."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from flowkernels._checks import (
    FLOATS,
    expect,
    expect_bool,
    expect_callable,
    expect_choice,
    expect_float64,
    expect_noise,
    expect_positive_int,
    expect_real,
    expect_shown,
    expect_takes,
    expect_tensor,
    expect_times,
)
from flowkernels.runtime.torch_private import COMPILED_CALL, innermost_transform
from flowkernels.schedule import uniform_indices
from flowkernels.velocity.composite import Composite, answer_of, expect_state
from flowkernels.velocity.field import exact_time, float64_device
from flowkernels.velocity.noise_paths import NoisePath, PathLike, Table, path_of
from flowkernels.velocity.protocol import VelocityBase

EARLY = 1e-6  # of a time, by which it may lie before the first: float32's rounding
Predicts: TypeAlias = Literal["data", "noise", "v"]
ModelTime: TypeAlias = Literal["sigma", "c_noise"] | Callable[[Tensor], Tensor]


class Denoiser(Composite):
    """What `from_denoiser` makes: a velocity `v(x, t)` of states `x = t x_1 + (1 - t) e`, for every stage.

    A call with further arguments by name hands them to the network: `fk.VelocityField(denoiser, conditioning=...,
    guidance=...)` says them once, and guides.

    start: the first time, at which the network has its most noise; states begin there. end: the last one at which it is
        asked; after it the noise is what it predicts there, of the same x / t, and at t = 1 its mean, which is 0.
    """

    def __init__(
        self, net: Callable, predicts: Predicts, path: NoisePath, time: ModelTime | None = None, rounded: bool = False
    ):
        super().__init__()
        self.net, self.path = net, path
        self.predicts, self.time, self.rounded = predicts, time, rounded
        self.end, self.start = self.times([path.least, path.most]).tolist()

    def parts(self) -> list[Any]:
        return [self.net]

    def _of(self, made: Callable[[Any], Any]) -> "Denoiser":
        other = copy.copy(self)
        other.__dict__.pop(COMPILED_CALL, None)  # which calls this one
        other._modules = dict(self._modules)
        other.net = made(self.net)
        return other

    # ---- its own times and states, and the straight path's ----

    def times(self, own: Sequence[float] | Tensor) -> Tensor:
        """The times t, float64 `[N]`, of the network's own: sigmas of "variance_exploding", steps of a table. Of a
        sigma of 0 it is 1. ValueError for times that the path has not."""
        s = expect_float64(own, "own", "a sequence of the network's times")
        expect(s.dim() == 1 and bool(s.isfinite().all()), "own", "a sequence of finite times", own)
        low, high = self.path.whole
        near = EARLY * max(abs(end) for end in self.path.whole if math.isfinite(end))
        fits = bool(((s >= low - near) & (s <= high + near)).all())
        expect(fits, "own", f"the path's times, from {low:g} to {high:g}", s.tolist())
        return self.path.times(s.clamp(low, high))

    def own_times(self, t: Sequence[float] | Tensor) -> Tensor:
        """The network's times, float64 `[N]`, of times t; after `end` the one there."""
        t = expect_float64(t, "t", "a sequence of times")
        expect(t.dim() == 1 and bool(t.isfinite().all()), "t", "a sequence of finite times", t)
        self._expect_inside(t, "t")
        s = self.path.own(t.clamp(max=self.end))
        return s.round() if self.rounded else s

    def grid(self, steps: int) -> Tensor:
        """K + 1 times for `calibrate`, `rollout` and `Schedule.uniform`'s like: from `start` evenly to `end`, and 1;
        the nearest of a table's own, where these are rounded to."""
        K = len(expect_times(expect_positive_int(steps, "steps"), "steps")) - 1
        if self.end == 1:
            return torch.linspace(self.start, 1, K + 1, dtype=torch.float64, device="cpu")
        one = torch.ones(1, dtype=torch.float64, device="cpu")
        if K == 1:
            return torch.cat([self.start * one, one])
        if not self.rounded:
            return torch.cat([torch.linspace(self.start, self.end, K, dtype=torch.float64, device="cpu"), one])
        own = torch.arange(self.path.most, self.path.least - 0.5, -1, dtype=torch.float64, device="cpu")
        expect(len(own) >= K, "steps", f"at most {len(own)}, the steps of the table", K)
        every = self.times(own)
        return torch.cat([every[list(uniform_indices(every, K - 1))], one])

    def initial(self, noise: Tensor) -> Tensor:
        """The state at `start` of standard normal noise `[n, *shape]`: `(1 - start) noise`, which is all that is known
        of it; what is passed to stages as `noise`."""
        return (1 - self.start) * expect_noise(noise)

    def state(self, z: Tensor, t: float | None = None) -> Tensor:
        """A state of the network's own path at time t, its own variables, as x: `z / (alpha + sigma)`.

        t: None is `start`: of a sampler that begins at z = e, as DDIM's, or at sigma e, as k-diffusion's.
        """
        return expect_noise(z, "z") / self._scale_at(t)

    def own_state(self, x: Tensor, t: float | None = None) -> Tensor:
        """The other direction of `state`."""
        return expect_noise(x, "x") * self._scale_at(t)

    def _scale_at(self, t: float | None) -> float:
        within = f"a time from {self.start:.6g} to 1"
        t = self.start if t is None else expect_real(t, "t", within, lambda t: self.start * (1 - EARLY) <= t <= 1)
        at = torch.tensor([t], dtype=torch.float64, device="cpu")
        return self.path.scale(at, self.path.own(at)).item()

    # ---- evaluation ----

    def _is_outside(self, t: Tensor) -> Tensor:
        found = (t < self.start * (1 - EARLY)) | (t > 1 + EARLY)
        return found | ((t > 0) & (t < self.path.first * (1 - EARLY))) if self.path.first else found

    def _expected(self) -> str:
        apart = f", or {self.path.first:.6g}," if self.path.first > self.start else ""
        return (
            f"times from {self.start:.6g}{apart} to 1, as in .grid(steps) of this velocity: before, its network is not "
            "defined"
        )

    def time_for(self, t: Tensor, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and innermost_transform() is None and type(t) is Tensor and t.is_cpu:
            self._expect_inside(t, "t")
        return t

    def model_times(self, times: Tensor, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self._expect_inside(times, "velocity")
        return times.to(float64_device(x.device), non_blocking=True)

    def _expect_inside(self, t: Tensor, name: str) -> None:
        if bool((outside := self._is_outside(t.detach())).any()):
            expect(False, name, self._expected(), f"{t.detach()[outside][0].item():.6g}")

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(scale, own time, factor, of x, rest) at times `[n]`, float64: the network's answer p to scale x at its own
        time makes `v = factor (p - of_x x) + rest x`."""
        late = t.clamp(min=self.end)
        held, ratio = t.clamp(max=self.end), self.end / late
        s = self.path.own(held)
        rest = (1 - ratio) / late
        if self.predicts == "data":
            room = 1 - held
            factor, of_x = ratio / torch.where(room > 0, room, 1.0), ratio
        elif self.predicts == "noise":
            factor, of_x = -ratio / held, ratio
        else:
            square = held.square() + (1 - held).square()
            factor, of_x = -ratio * square.rsqrt(), torch.zeros_like(t)
            rest = rest + ratio.square() * (2 * held - 1) / square
        last = t >= 1
        factor, rest = torch.where(last, 0.0, factor), torch.where(last, 1.0, rest)
        factor = torch.where(self._is_outside(t), torch.nan, factor)  # where values are not looked at
        return self.path.scale(held, s) * ratio, s, factor, of_x, rest

    def network_time(self, t: Tensor, s: Tensor) -> Tensor:
        """What the network is told at times t, where its own are s: float64, or int64 where it is rounded to."""
        if self.rounded:
            s = s.round()
            return s if isinstance(self.net, VelocityBase) else s.long()
        if self.time is None:
            return s
        if callable(self.time):
            return self.time(s)
        sigma = (1 - t) / t
        return sigma if self.time == "sigma" else sigma.log() / 4

    def forward(self, x: Tensor, t: Tensor, **conditioning: Any) -> Tensor:
        expect_state(x, t)
        t = self.time_for(exact_time(t).to(float64_device(x.device), torch.float64), x)
        scale, s, factor, of_x, rest = self.coefficients(t)
        given = self.network_time(t.clamp(max=self.end), s)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        scale, factor, of_x, rest = (
            part.to(x.device, wide).view(-1, *[1] * (x.dim() - 1)) for part in (scale, factor, of_x, rest)
        )
        state = x.to(wide)
        answer = answer_of(self.net, "model", x, (scale * state).to(x.dtype), given.to(x.device), **conditioning)
        expect_tensor(answer, "model", FLOATS)
        return (factor * (answer.to(wide) - of_x * state) + rest * state).to(x.dtype)

    def extra_repr(self) -> str:
        told = "" if self.time is None else f", time={self.time!r}"
        return f"predicts={self.predicts!r}{told}{', rounded=True' if self.rounded else ''}"


def from_denoiser(
    model: Callable[..., Tensor] | nn.Module,
    predicts: Predicts = "data",
    path: PathLike = "variance_exploding",
    *,
    time_range: Sequence[float] | None = None,
    time: ModelTime | None = None,
    rounded: bool = False,
) -> Denoiser:
    """A velocity of a network that was trained to denoise, or to predict noise or v, on a path of diffusion.

    On a path `z = alpha(s) x_1 + sigma(s) e` the straight one has the same noise at t = alpha / (alpha + sigma), with
    the state x = z / (alpha + sigma) = t x_1 + (1 - t) e. There the network's prediction p makes the exact velocity
    `v(x, t) = E[x_1 - e | x]`:

        data   v = (p - x) / (1 - t)
        noise  v = (x - p) / t
        v      v = ((2t - 1) x - sqrt(t^2 + (1-t)^2) p) / (t^2 + (1-t)^2)

    All stages take it: `noise` is `velocity.initial(noise)`, the grid `velocity.grid(100)`, which begins where the
    network's noise does, and samples at t = 1 are data.

    Args:
        model: any callable `model(z, time, **conditioning)`, of states `[n, *shape]` and times `[n]`, which gives a
            tensor of z's shape; an `nn.Module` becomes a submodule. A `VelocityField` around it names the arguments
            (`x_name`, `time_name`), casts (`dtype`), takes `.sample`; it is told the network's own time and noise.
        predicts: "data", the denoised state, as k-diffusion's wrappers and EDM's preconditioned networks give it;
            "noise", e; "v", alpha e - sigma x_1, on paths with alpha^2 + sigma^2 = 1.
        path: alpha, sigma, and the network's own time s.
            "variance_exploding": alpha = 1, s = sigma.
            "cosine": alpha = cos(pi s / 2), sigma = sin(pi s / 2).
            "linear": alpha^2 = exp(-(19.9 s^2 / 2 + 0.1 s)), sigma^2 = 1 - alpha^2.
            "straight": alpha = 1 - s, sigma = s.
            a table alphas_cumprod, falling, or what has one (a scheduler of diffusers', a CompVis model): alpha^2 at
            s = 0, 1, ..., T - 1, between them linear in log(sigma / alpha).
            a function of s, a float64 tensor `[n]`, that gives alpha and sigma.
        time_range: the network's own times next to the data and next to the noise, between which it is asked. None: all
            of a path that ends; of "variance_exploding" the model's `sigma_min` and `sigma_max`; a function needs them.
        time: what the network is told. None: s. "sigma": sigma / alpha; "c_noise": a quarter of its logarithm. Or a
            function of s, such as `lambda s: 1000 * s`.
        rounded: with a table, the network is told the nearest step, as int64, and `grid` has no others.

    Times are formed in float64 and rounded once, to float32, or float64 for a float64 state. Before `start` and
    after 1 the network is not defined: ValueError; on a GPU, in a direct call, NaN. After `end` the noise that it
    predicts there stays; at t = 1 the velocity is x, the limit for data that have a density.

    Raises:
        TypeError, ValueError: naming the argument, such as for a table that does not fall.

    Source: Lipman et al., Flow Matching Guide and Code (arXiv 2412.06264), on changing schedulers; Shaul et al.,
    Bespoke Solvers (arXiv 2310.19075); Karras et al. (arXiv 2206.00364) for D(x, sigma); Salimans and Ho (arXiv
    2202.00512) for v.

    Examples:
        >>> D = lambda z, sigma: z / (1 + sigma.square())[:, None]  # of standard normal data
        >>> velocity = fk.from_denoiser(D, time_range=(0.002, 80))
        >>> x = velocity.initial(torch.ones(1, 2))
        >>> fk.sample(velocity, x, velocity.grid(100))  # along the exact flow 0.9999 times the noise
        tensor([[0.9873, 0.9873]])
        >>> betas = torch.linspace(1e-4, 0.02, 1000)
        >>> eps = lambda z, step: z  # a network that predicts noise at steps 0, 1, ..., 999
        >>> round(fk.from_denoiser(eps, "noise", (1 - betas).cumprod(0)).start, 4)
        0.0063
    """
    expect_callable(model, "model", "a callable model(z, time)")
    predicts = expect_choice(predicts, "predicts", ("data", "noise", "v"))
    found = path_of(path, time_range, model)
    is_table = isinstance(found, Table)
    expect(not expect_bool(rounded, "rounded") or is_table, "rounded", "False but with a table as path", rounded)
    whole = all(float(end).is_integer() for end in (found.least, found.most))
    expect(not rounded or whole, "time_range", "steps of the table, to be rounded to", [found.least, found.most])
    of_v = "a path with alpha^2 + sigma^2 = 1 for v (a velocity on the straight path is a VelocityField)"
    expect(predicts != "v" or found.preserves, "path", of_v, path)
    said = "'sigma', 'c_noise', a function of the network's own times or None"
    if callable(time):
        expect(not isinstance(time, nn.Module), "time", said, time, TypeError)
        expect_takes(time, "time", said, None)
    else:
        expect_shown(time is None or (isinstance(time, str) and time in ("sigma", "c_noise")), "time", said, time)
    expect(time is None or not rounded, "time", "None with rounded", time)
    made = Denoiser(model, predicts, found, time, bool(rounded))
    expect(made.start < made.end, "time_range", "less noise at its first than at its second", [found.least, found.most])
    expected = "an end with alpha above 0, where noise tells of the data (such as 0.999 of it)"
    expect(predicts != "noise" or made.start > 0, "time_range", expected, [found.least, found.most])
    ends = torch.tensor([made.end, made.start], dtype=torch.float64, device="cpu")
    told = made.network_time(ends, found.own(ends))
    expect(isinstance(told, Tensor) and told.shape == ends.shape, "time", "a function that gives times [n]", told)
    expected = "finite times for the network at both ends of time_range"
    expect(bool(told.isfinite().all()), "time", expected, told.tolist())
    return made
