"""The paths `alpha(s) x_1 + sigma(s) e` that networks of diffusion are trained on, s being a network's own time, and
where the straight path has the same noise: t = alpha / (alpha + sigma)."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from flowkernels._checks import expect, expect_float64, expect_list, expect_real, expect_shown, expect_takes, one_of

BETAS = (0.1, 20.0)  # of the noise at its ends, between them linear (arXiv 2011.13456, appendix C)
NODES = 1025  # of a path that is a function, between which its times are looked for
TRIES = 24  # within two of them: each takes half of what is left at least, and most take nearly all
ROUNDING = 1e-6  # of alpha^2 + sigma^2 where it is 1

PathLike: TypeAlias = str | Tensor | Sequence[float] | Callable[[Tensor], tuple[Tensor, Tensor]] | Any


class NoisePath(nn.Module):
    """A path from s = `least`, next to the data, to s = `most`, next to the noise. All in float64.

    whole: all times that it has. preserves: `alpha^2 + sigma^2 = 1`. first: the least t after 0 that it has, where one
        at 0 stands apart.
    """

    whole = (0.0, math.inf)
    preserves = False
    first = 0.0

    def __init__(self, least: float, most: float):
        super().__init__()
        self.least, self.most = least, most

    def times(self, s: Tensor) -> Tensor:
        """t of s."""
        raise NotImplementedError

    def own(self, t: Tensor) -> Tensor:
        """s of t."""
        raise NotImplementedError

    def scale(self, t: Tensor, s: Tensor) -> Tensor:
        """alpha + sigma, at both."""
        return (t.square() + (1 - t).square()).rsqrt()  # where alpha^2 + sigma^2 = 1

    def _apply(self, fn, recurse: bool = True) -> "NoisePath":
        """`.to(device)` moves tables; `.to(dtype)` leaves them in float64."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, table in before.items():
            if table is not None and self._buffers[name].dtype != torch.float64:
                self._buffers[name] = table.to(self._buffers[name].device)
        return self

    def extra_repr(self) -> str:
        return f"from {self.least:g} to {self.most:g}"


class VarianceExploding(NoisePath):
    """alpha = 1, and s is sigma."""

    def times(self, s: Tensor) -> Tensor:
        return 1 / (1 + s)

    def own(self, t: Tensor) -> Tensor:
        return (1 - t) / t

    def scale(self, t: Tensor, s: Tensor) -> Tensor:
        return 1 / t


class Straight(NoisePath):
    """alpha = 1 - s, sigma = s."""

    whole = (0.0, 1.0)

    def times(self, s: Tensor) -> Tensor:
        return 1 - s

    own = times

    def scale(self, t: Tensor, s: Tensor) -> Tensor:
        return torch.ones_like(t)


class Cosine(NoisePath):
    """alpha = cos(pi s / 2), sigma = sin(pi s / 2)."""

    whole = (0.0, 1.0)
    preserves = True

    def times(self, s: Tensor) -> Tensor:
        angle = s * (math.pi / 2)
        alpha, sigma = (math.pi / 2 - angle).sin(), angle.sin()  # which is 0 at s = 1, as a cosine is not
        return alpha / (alpha + sigma)

    def own(self, t: Tensor) -> Tensor:
        return torch.atan2(1 - t, t) * (2 / math.pi)


class Linear(NoisePath):
    """alpha^2 = exp(-B), B the integral of betas that rise linearly to s = 1."""

    whole = (0.0, 1.0)
    preserves = True

    def times(self, s: Tensor) -> Tensor:
        least, most = BETAS
        B = s * (least + s * ((most - least) / 2))
        return 1 / (1 + torch.expm1(B).sqrt())

    def own(self, t: Tensor) -> Tensor:
        least, most = BETAS
        B = torch.log1p(((1 - t) / t).square())
        return 2 * B / (least + (least**2 + 2 * (most - least) * B).sqrt())


class Table(NoisePath):
    """alpha^2 of the steps 0, 1, ... of a diffusion, falling. Between two of them log(sigma / alpha) is linear."""

    preserves = True

    def __init__(self, alphas_cumprod: Tensor, least: float, most: float):
        super().__init__(least, most)
        self.whole = (0.0, len(alphas_cumprod) - 1.0)
        levels = (torch.log1p(-alphas_cumprod) - alphas_cumprod.log()) / 2
        self.register_buffer("levels", levels, persistent=False)
        if levels[-1].isinf():  # of which nothing lies between it and the one before
            self.first = torch.sigmoid(-levels[-2]).item()

    def times(self, s: Tensor) -> Tensor:
        levels = self.levels.to(s.device)
        below = s.floor().clamp(0, len(levels) - 2)
        i = below.long()
        share, step = s - below, levels[i + 1] - levels[i]
        return torch.sigmoid(-levels[i] - torch.where(share > 0, share * step, 0.0))

    def own(self, t: Tensor) -> Tensor:
        levels, level = self.levels.to(t.device), ((1 - t) / t).log()
        i = torch.searchsorted(levels, level.detach().contiguous()).clamp(1, len(levels) - 1)
        first, last = levels[i - 1], levels[i]
        share = ((level - first) / (last - first)).clamp(0, 1)
        return i - 1 + torch.where(torch.isinf(level), (level > 0).to(share), share)


class Function(NoisePath):
    """Any function of s `[n]`, float64, that gives (alpha, sigma)."""

    def __init__(self, function: Callable[[Tensor], tuple[Tensor, Tensor]], least: float, most: float):
        super().__init__(least, most)
        self.whole = (min(least, most), max(least, most))
        self.function = function
        s = torch.linspace(least, most, NODES, dtype=torch.float64, device="cpu")
        alpha, sigma = self._parts(s)
        ok = bool(((alpha >= 0) & (sigma >= 0) & (alpha + sigma > 0)).all()) and bool((alpha + sigma).isfinite().all())
        expect(ok, "path", "finite alpha and sigma of at least 0, not both 0, in all of time_range", "others")
        t = alpha / (alpha + sigma)
        expect(
            bool((t.diff() < 0).all()), "path", "a sigma / alpha that rises with the model's time", "one that does not"
        )
        self.preserves = bool(((alpha.square() + sigma.square() - 1).abs() < ROUNDING).all())
        self.register_buffer("nodes", t.flip(0), persistent=False)

    def _parts(self, s: Tensor) -> tuple[Tensor, Tensor]:
        found = self.function(s)
        pair = isinstance(found, (tuple, list)) and len(found) == 2 and all(isinstance(part, Tensor) for part in found)
        expect_shown(pair, "path", "a function of times [n] that gives two tensors, alpha and sigma", found, TypeError)
        for part in found:
            expect(part.shape in (s.shape, ()), "path", f"alpha and sigma of the times' shape {list(s.shape)}", part)
        alpha, sigma = (part.to(s).expand(s.shape) for part in found)
        return alpha, sigma

    def times(self, s: Tensor) -> Tensor:
        alpha, sigma = self._parts(s)
        return alpha / (alpha + sigma)

    def own(self, t: Tensor) -> Tensor:
        """By the Illinois rule, between two nodes."""
        with torch.no_grad():
            wanted, nodes = t.detach(), self.nodes.to(t.device)
            i = torch.searchsorted(nodes, wanted.contiguous()).clamp(1, NODES - 1)
            step = (self.most - self.least) / (NODES - 1)
            b = self.most - step * i.to(wanted)
            a = b + step  # t(a) <= wanted <= t(b)
            fa, fb = nodes[i - 1] - wanted, nodes[i] - wanted
            for _ in range(TRIES):
                apart = fb - fa
                s = torch.where(apart != 0, b - fb * (b - a) / torch.where(apart != 0, apart, 1.0), b)
                f = self.times(s) - wanted
                crossed = f * fb <= 0
                a, fa = torch.where(crossed, b, a), torch.where(crossed, fb, fa / 2)
                b, fb = s, f
            s = b.clamp(min(self.least, self.most), max(self.least, self.most))
        if not t.requires_grad:
            return s
        with torch.enable_grad():  # ds = dt / t'(s)
            at = s.clone().requires_grad_()
            (slope,) = torch.autograd.grad(self.times(at).sum(), at)
        return s + (t - wanted) / slope

    def scale(self, t: Tensor, s: Tensor) -> Tensor:
        if self.preserves:
            return super().scale(t, s)
        alpha, sigma = self._parts(s)
        return alpha + sigma


NAMED: Mapping[str, type[NoisePath]] = {
    "variance_exploding": VarianceExploding,
    "cosine": Cosine,
    "linear": Linear,
    "straight": Straight,
}
KNOWN = f"{one_of(NAMED)}, a table alphas_cumprod (or what has one), or a function s -> (alpha, sigma)"
RANGE = "the model's times next to the data and next to the noise, such as (0.002, 80.0)"


def path_of(path: PathLike, time_range: Sequence[float] | None, model: Any) -> NoisePath:
    """The path that `from_denoiser` is told; ValueError, TypeError naming the argument."""
    ends = None
    if time_range is not None:
        ends = [expect_real(s, "time_range", RANGE) for s in expect_list(time_range, "time_range", RANGE)]
        expect(len(ends) == 2, "time_range", RANGE, ends)
    path = getattr(path, "alphas_cumprod", path)
    if isinstance(path, str):
        expect_shown(path in NAMED, "path", KNOWN, path)
        kind = NAMED[path]
        if ends is None:
            ends = _of_model(model) if kind.whole[1] == math.inf else kind.whole
        return kind(*_within(ends, kind.whole))
    if callable(path) and not isinstance(path, (Tensor, type, nn.Module)):
        expect_takes(path, "path", KNOWN, None)
        expect(ends is not None, "time_range", f"{RANGE}, with a path that is a function", "None")
        least, most = _within(ends, (-math.inf, math.inf), rising=False)
        return Function(path, least, most)
    expect_shown(not isinstance(path, (type, nn.Module, bytes, bytearray)), "path", KNOWN, path, TypeError)
    table = expect_float64(path, "path", KNOWN)
    expect(table.dim() == 1 and len(table) > 1, "path", "a table alphas_cumprod of one dimension", table)
    inside = bool(((table >= 0) & (table <= 1)).all())
    falls = inside and bool((table.diff() < 0).all()) and bool((table[:-1] > 0).all()) and bool(table[0] < 1)
    got = f"{table[0].item():.6g} to {table[-1].item():.6g}" + ("" if falls else ", which is another course")
    expect(falls, "path", "alphas_cumprod that fall within 1 and 0, (1 - betas).cumprod(0) of betas", got)
    last = len(table) - 1.0
    return Table(table, *_within(ends or (0.0, last), (0.0, last)))


def _within(ends: Sequence[float], whole: tuple[float, float], rising: bool = True) -> tuple[float, float]:
    (least, most), (low, high) = ends, whole
    ok = low <= min(ends) and max(ends) <= high and (least < most if rising else least != most)
    told = (
        "different ones" if not rising else f"{low:g} or more" if high == math.inf else f"within {low:g} and {high:g}"
    )
    expect(ok, "time_range", f"{RANGE}, {told}", list(ends))
    return least, most


def _of_model(model: Any) -> tuple[float, float]:
    """Its `sigma_min` and `sigma_max`, as k-diffusion's discrete wrappers and EDM's networks have them."""
    found = [getattr(model, name, None) for name in ("sigma_min", "sigma_max")]
    said = "None, and a model that has none" if None in found else f"None, and a model whose own are {found}"
    try:
        ends = [float(value) for value in found]
    except (TypeError, ValueError):
        ends = [math.nan, math.nan]
    expect(0 < ends[0] < ends[1] < math.inf, "time_range", RANGE, said)
    return ends[0], ends[1]
