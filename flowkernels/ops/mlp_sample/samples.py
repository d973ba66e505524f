"""Sample inputs of `mlp_sample` and the error allowed on them, for its tests and its benchmark."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from flowkernels.ops.mlp_sample import Layer, Source, _flat, _flat_steps, _layers, _steps, reference
from flowkernels.ops.samples import Sample, arrange, generator, not_none, slices
from flowkernels.solver import Update

TRIALS, MOVED = 3, 60  # evaluations with random errors, and numbers that they move together at least
CHECKED = 10**10  # multiply-adds, about, that the samples of a large batch that are checked may cost in each of them


class Network:
    """Layers one by one, with random weights and tables for n samples and as many steps."""

    def __init__(self, dim: int, n: int, steps: int, seed: int = 0):
        self.g = generator(seed)
        self.dim, self.n, self.steps = dim, n, steps
        self.widths, self.layers = [dim], []

    def table(self, width: int, rows: str, around: float = 0.0) -> Tensor:
        """rows: "one" for all, one each "step", "sample" or "both"."""
        shape = self.steps if rows in ("step", "both") else 1, self.n if rows in ("sample", "both") else 1, width
        return around + 0.3 * torch.randn(shape, generator=self.g)

    def add(
        self, width=None, map="linear", source=None, shift="step", scale=None, shift_each=None, **other
    ) -> "Network":
        """A layer on the last value, or on `source`; `append=True`: to the last value, from the one before."""
        append = other.pop("append", False)
        last = len(self.widths) - (2 if append else 1)
        source = Source(*source) if source else Source(last, 0, self.widths[last])
        width = width or source.width
        weight = None
        if map == "linear":
            weight = torch.randn(width, source.width, generator=self.g) / source.width**0.5
        tables = (None if rows is None else self.table(width, rows) for rows in (shift, shift_each))
        scale = None if scale is None else self.table(width, scale, around=1.0)
        if "other" in other:
            other["other"] = Source(*other["other"])
        first = self.widths[-1] if append else 0
        self.layers.append(Layer(map, source, width, weight, 1e-5, scale, *tables, first=first, **other))
        if append:
            self.widths[-1] += width
        else:
            self.widths.append(width)
        return self

    def head(self) -> "Network":
        return self.add(self.dim)

    def sample(
        self,
        name: str,
        layout: str = "contiguous",
        guidance: float | None = None,
        solver: Callable[[int, torch.Generator], list[Update]] | None = None,
        **kwargs,
    ) -> Sample:
        x = arrange(torch.randn(self.n, self.dim, generator=self.g), layout)
        h = (torch.rand(self.steps, generator=self.g, dtype=torch.float64) / max(self.steps, 1)).tolist()
        h = h if solver is None else solver(self.steps, self.g)
        if guidance is not None:
            others = [
                replace(a, **{k: t + 0.1 for k in ("scale", "shift", "shift_each") if (t := getattr(a, k)) is not None})
                for a in self.layers
            ]
            kwargs |= dict(unconditional=others, guidance=guidance)
        shape = f"n{self.n}x{self.dim}-steps{self.steps}"
        return Sample(f"{name}-{shape}" + ("" if layout == "contiguous" else f"-{layout}"), (x, h, self.layers), kwargs)


def last_few(order: int) -> Callable[[int, torch.Generator], list[Update]]:
    """From the state before, with the last few velocities; weights of both signs, as in Adams-Bashforth."""

    def updates(steps: int, g: torch.Generator) -> list[Update]:
        def update(i):
            terms = min(order, i + 1)
            signs = torch.tensor([(-1.0) ** (terms - 1 - k) for k in range(terms)], dtype=torch.float64)
            factors = signs * (0.5 + torch.rand(terms, generator=g, dtype=torch.float64)) / steps
            return Update(False, tuple(range(i + 1 - terms, i + 1)), tuple(factors.tolist()))

        return [update(i) for i in range(steps)]

    return updates


def dense(steps: int, g: torch.Generator) -> list[Update]:
    """From x, with all velocities, as a fit has them."""
    factors = torch.randn(steps, steps, generator=g, dtype=torch.float64) / max(steps, 1)
    return [Update(i > 0, tuple(range(i + 1)), tuple(factors[i, : i + 1].tolist())) for i in range(steps)]


SCALES = 1.0, 1.0, 0.7, -0.6, 0.0


def scattered(steps: int, g: torch.Generator) -> list[Update]:
    """Any of the velocities, its own or not, from either state, which is scaled or not; places are used again in no
    order."""
    found = []
    for i in range(steps):
        which = torch.rand(i + 1, generator=g).lt(0.5).nonzero().flatten().tolist() or [i // 2]
        factors = torch.randn(len(which), generator=g, dtype=torch.float64) / steps
        from_start = bool(torch.rand((), generator=g) < 0.5) and i > 0
        scale = SCALES[torch.randint(len(SCALES), (), generator=g)]
        found.append(Update(from_start, tuple(which), tuple(factors.tolist()), scale))
    return found


def sample_inputs() -> Iterator[Sample]:
    """Every feature at least once; widths, batches and steps around the vectors, panels and tiles of the kernels."""
    bf16 = torch.bfloat16
    alphas = dict(leaky_relu=0.1, elu=1.5, at_least=-0.3, at_most=0.4)
    shapes = [(1, 0, 1), (2, 1, 2), (3, 2, 3), (15, 5, 4), (16, 6, 1), (17, 7, 2), (33, 13, 3), (65, 49, 2), (64, 3, 4)]
    shapes += [(31, 4, 2), (48, 8, 3), (2, 17, 1)]
    activations = [a for a in reference.ACTIVATIONS if a != "none"]
    for i, (activation, (dim, n, steps)) in enumerate(zip(activations, shapes, strict=True)):
        net = (
            Network(dim, n, steps, i)
            .add(100, activation=activation, alpha=alphas.get(activation, 0.0))
            .add((33, 130, 2)[i % 3], activation=activation, alpha=alphas.get(activation, 0.0), gain=(1.0, 1.05)[i % 2])
        )
        yield net.head().sample(activation)
    yield Network(3, 97, 1).head().sample("one layer")
    yield Network(65, 131, 3).add(130, activation="silu").add(130, activation="silu").head().sample("threads")
    yield Network(5, 4, 0).add(17, activation="relu").head().sample("no steps", trajectory=True)

    def residual(dim, n, steps, width=65, norm="layer_norm", **kwargs):
        """A norm, scale and shift, two layers, a gate of each step and sample, and the sum with what came in."""
        net = Network(dim, n, steps).add(width)
        for _ in range(2):
            stream = len(net.widths) - 1
            net.add(map=norm, scale="both", shift="both")
            net.add(width + 3, activation="silu").add(width, shift=None, activation="gelu_tanh")
            net.add(map="identity", shift=None, scale="step", combine="add", other=(stream, 0, width))
        return net.add(map=norm, shift=None).head()

    for n, layout in ((1, "contiguous"), (7, "sliced"), (49, "misaligned")):
        yield residual(17, n, 2).sample("residual", layout)
    yield residual(33, 13, 3, 130).sample("residual guided", guidance=2.5, trajectory=True)
    yield residual(1, 6, 4, 2).sample("residual narrow", trajectory=True)
    for n in (1, 13, 49):
        yield residual(17, n, 2, 66, "rms_norm").sample("rms norm", weights=(None, bf16)[n == 13])

    def bounded(dim, n, steps, width):
        """Between what a table and another value have."""
        net = Network(dim, n, steps).add(width).add(width, source=(0, 0, dim))
        net.add(map="identity", source=(1, 0, width), combine="maximum", other=(2, 0, width), scale="step")
        net.add(map="identity", source=(1, 0, width), shift="both", combine="minimum", other=(3, 0, width), gain=1.3)
        return net.head()

    for n, dim, width in ((1, 3, 15), (7, 16, 33), (33, 17, 100)):
        yield bounded(dim, n, 3, width).sample("bounded", trajectory=n == 7)

    def gates(n, steps, rows):
        """Parts of values multiplied, shifts of two kinds, and values put together from three layers."""
        net = Network(15, n, steps).add(34, shift="step", shift_each=rows)
        net.add(map="identity", source=(1, 17, 17), shift=None, activation="sigmoid")
        net.add(map="identity", source=(1, 0, 17), combine="multiply", other=(2, 0, 17), shift=None, scale=rows)
        net.add(3, source=(3, 1, 16), activation="tanh").add(map="identity", source=(0, 2, 11), shift=rows, append=True)
        net.add(33, source=(1, 3, 31), shift="step", activation="mish", append=True)
        return net.add(100, activation="elu", alpha=1.0, gain=1.1).head()

    for n, steps, rows in ((1, 3, "sample"), (2, 1, "both"), (13, 2, "sample"), (97, 3, "both"), (5, 2, "one")):
        yield gates(n, steps, rows).sample(f"gates {rows}", trajectory=n == 13)
    yield gates(7, 2, "both").sample("gates guided", guidance=0.5)
    yield Network(2, 3, 10).add(600, activation="silu").add(520, activation="silu").head().sample("large weights")
    for n in (1, 6, 33):
        yield residual(33, n, 3).sample("residual low", weights=bf16, trajectory=n == 6)
    yield gates(49, 2, "sample").sample("gates low", "sliced", guidance=1.5, weights=bf16)
    yield (
        Network(3, 17, 4)
        .add(100, activation="silu")
        .add(15, activation="silu")
        .head()
        .sample("narrow low", weights=bf16)
    )
    solvers = {"two terms": last_few(2), "three terms": last_few(3), "dense": dense, "scattered": scattered}
    for (name, solver), shape in zip(solvers.items(), ((17, 7, 5), (3, 33, 4), (16, 49, 4), (5, 1, 8)), strict=True):
        net = Network(*shape).add(33, activation="silu").add(20, activation="silu").head()
        yield net.sample(f"solver {name}", solver=solver, trajectory=name == "dense")
    kwargs = dict(solver=scattered, trajectory=True)
    yield residual(33, 5, 7).sample("solver scattered guided", "misaligned", guidance=1.5, **kwargs)
    yield residual(15, 17, 6).sample("solver scattered low", "sliced", weights=bf16, **kwargs)


def to_op(sample: Sample) -> tuple:
    (x, h, layers), k = sample.args, sample.kwargs
    options = k.get("guidance", 1.0), k.get("weights"), k.get("trajectory", False)
    return (x, *_flat_steps(h), *_flat(layers, k.get("unconditional")), *options)


def from_op(args: tuple) -> Sample:
    x, step_sizes, updates, tensors, code, numbers, guided, guidance, weights, trajectory = args
    layers, unconditional = _layers(tensors, code, numbers, guided)
    kwargs = not_none(unconditional=unconditional, guidance=guidance, weights=weights, trajectory=trajectory)
    return Sample("from_op", (x, _steps(step_sizes, updates), layers), kwargs)


def parts(sample: Sample, got: Tensor | tuple[Tensor, ...]) -> Iterator[tuple[Sample, Tensor | tuple]]:
    """Of a batch that would take long, samples from the first to the last at even distances."""
    (x, h, layers), others = sample.args, sample.kwargs.get("unconditional")
    n, cost = len(x), len(h) * sum(a.weight.numel() for a in layers if a.weight is not None)
    checked = min(n, max(1, CHECKED // max(1, cost)))
    places = torch.linspace(0, n - 1, checked, dtype=torch.float64, device=x.device).round().long()

    def of(layers, where):
        names = "scale", "shift", "shift_each"
        tables = [
            {k: t[:, where] for k in names if (t := getattr(a, k)) is not None and t.shape[1] > 1} for a in layers
        ]
        return [replace(a, **each) for a, each in zip(layers, tables, strict=True)]

    for piece in slices(checked, sum(a.width for a in layers)):
        where = places[piece]
        kwargs = sample.kwargs if others is None else sample.kwargs | dict(unconditional=of(others, where))
        found = (got[0][where], *(t[:, where] for t in got[1:])) if sample.kwargs.get("trajectory") else got[where]
        yield Sample(sample.id, (x[where], h, of(layers, where)), kwargs), found


def error_and_bound(sample: Sample, got: Tensor | tuple[Tensor, ...]) -> tuple[float, float]:
    """The largest error against float64 of the states and velocities, and the largest allowed, relative to the largest
    of them.

    Allowed is what rounding alone does to the result. That is found by backward analysis: a sum of k products whose
    partial sums are rounded is exact for weights that are off by some sqrt(k) half-ulps, and activations and steps are
    for tables, gains and states that are off by one or two ulp, norms for such inputs and means. The network is
    evaluated in float64 with such random errors, so often that a result of few numbers is not moved too little by
    chance, and twice the largest difference is allowed. An update of k terms rounds k partial sums: it is exact for a
    state that it starts from, and for factors, which are rounded themselves, that are off by some sqrt(k) half-ulps
    more. A scale of that state is rounded, and its product.

    With `weights` the truth is that of the network that is not rounded, and the reference rounds as the kernel does:
    twice its error, the rounding that is asked for, is allowed beside. Their values differ where an input lies so near
    the middle of two numbers that an error of the kind above, d, takes it to the other one: with a probability of d /
    eps of `weights`, by eps. Its mean square is d * eps.
    """
    x, h, layers = sample.args
    k = sample.kwargs
    trajectory = k.get("trajectory", False)
    if not x.numel():
        return 0.0, 0.0
    given = layers, k.get("unconditional"), k.get("guidance", 1.0)

    def evaluate(x, h, layers, others, guidance, weights=None, *norms):
        return reference.mlp_sample(x, h, layers, others, guidance, weights, *norms)[: 3 if trajectory else 1]

    truth = evaluate(x.double(), h, *given)

    def error(found: Sequence[Tensor]) -> float:
        worst = [(a - b).abs().max() / b.abs().max() for a, b in zip(found, truth, strict=True) if b.numel()]
        return max(w.item() if w == w else math.inf for w in worst)

    half_ulp, full = torch.finfo(torch.float32).eps / 2, functools.partial(x.new_full, dtype=torch.float64)
    floor, multistep = 0.0, len(h) > 0 and isinstance(h[0], tuple)
    updates = [Update(*u) if multistep else Update(False, (i,), (u,)) for i, u in enumerate(h)]
    for trial in range(TRIALS + MOVED // x.numel()):
        g = torch.Generator().manual_seed(trial)

        def off(t, amount, g=g, rounded=False):
            if t is None:
                return None
            amount *= half_ulp
            if rounded and k.get("weights"):
                amount += (amount * torch.finfo(k["weights"]).eps) ** 0.5
            return t.double() * (1 + amount * torch.randn(t.shape, generator=g, dtype=torch.float64))

        def moved(layers, off=off):
            return layers and [
                replace(
                    a,
                    weight=off(a.weight, a.source.width**0.5, rounded=True),
                    **{name: off(getattr(a, name), 4) for name in ("scale", "shift", "shift_each")},
                    gain=a.gain * (1 + (-1) ** i * 4 * half_ulp),
                )
                for i, a in enumerate(layers)
            ]

        def norm(y, shape, eps, off=off):
            mean, spread = y.mean(1, keepdim=True), (y.var(1, unbiased=False, keepdim=True) + eps).sqrt()
            return F.layer_norm(off(y, 4), shape, eps=eps) + (off(mean, 4) - mean) / spread

        def moved_update(u, off=off):
            """By errors of its own at every element of the state, and where that is scaled of the terms."""
            scaled = u.scale != 1
            factors = (off(full(x.shape if scaled else (), b), 1 + len(u.which) ** 0.5) for b in u.factors)
            scale = off(full(x.shape, u.scale), scaled + (len(u.which) + scaled) ** 0.5)
            return Update(u.from_start, u.which, tuple(factors), scale)

        def rms(y, shape, eps, off=off):
            return F.rms_norm(off(y, 4), shape, eps=eps)

        norms = dict(layer_norm=norm, rms_norm=rms)
        other = x.double(), map(moved_update, updates), moved(layers), moved(given[1]), given[2]
        floor = max(floor, error(evaluate(*other, None, norms)))
    found = got if trajectory else (got,)
    rounded = error(evaluate(x, h, *given, k["weights"])) if k.get("weights") else 0.0
    return error(found), 2 * rounded + 2 * floor
