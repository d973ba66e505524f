"""What the quality of samples is measured on: models, their data, and how much work is done on each."""

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

import flowkernels as fk
from flowkernels.evaluation.distances import Energy, Frechet
from flowkernels.models.bundled import BUNDLED
from flowkernels.models.networks import ResidualMLP

from .classifier import Classifier
from .closed_forms import Policy, generator, mixture2, mixture64, scales
from .datasets import digits, fashion
from .gradient_fits import Descent

STEPS = (1, 2, 3, 4, 5, 6, 7, 8, 10)


@dataclass(frozen=True)
class Straightening:
    """What `fk.straighten` is given, for each N of `steps` and the first `seeds` seeds."""

    steps: tuple[int, ...]
    iterations: int
    batch: int
    bank: int
    lr: float
    ema: float
    seeds: int = 3


@dataclass(frozen=True)
class Sizes:
    """How much work a data set is: noises of a calibration, held-out noises, K, how many of the held-out noises the
    finer teacher is rolled out from, samples and iterations of `fk.polish`, the largest N that it is worth, what is
    spent on fits by gradients, and the budget of `effort="best"` in evaluations a sample, None for its own."""

    calibration: int
    held_out: int
    straighten: Straightening
    grid: int = 100
    steps: tuple[int, ...] = STEPS
    finer: int = 256
    polish: tuple[int, int, int] = (512, 6, 10)
    descent: Descent = field(default_factory=Descent)
    budget: int | None = None

    def quick(self) -> "Sizes":
        little = replace(self.straighten, steps=(2,), iterations=8, batch=16, bank=32)
        few = dict(finer=16, polish=(32, 2, 4), descent=Descent(5, 16), budget=150)
        return Sizes(64, 128, little, grid=20, steps=(1, 2, 4), **few)


SIZES = {
    "mixture2": Sizes(1024, 4096, Straightening((2, 4, 8), 400, 256, 4096, 1e-3, 0.99)),
    "mixture64": Sizes(1024, 4096, Straightening((2, 4, 8), 400, 256, 4096, 1e-3, 0.99)),
    "scales": Sizes(1024, 4096, Straightening((2, 4, 8), 400, 256, 4096, 1e-3, 0.99)),
    "policy": Sizes(512, 2048, Straightening((2, 4, 8), 400, 128, 2048, 1e-3, 0.99)),
    "digits": Sizes(1024, 2048, Straightening((2, 4, 8), 400, 256, 4096, 1e-3, 0.99)),
    "fashion": Sizes(
        *(256, 384, Straightening((4, 8), 128, 64, 256, 2e-4, 0.95, seeds=1)),
        **dict(finer=64, polish=(96, 3, 6), descent=Descent(150, 16, steps=(2, 3, 4, 8)), budget=1500),
    ),
}


@dataclass
class Data:
    """A data set's model and what its samples are compared with.

    velocity: the model of the benchmark, teacher and students alike. network: the module in float32 behind it.
    student: makes the module that straightening trains. real: samples of the data, None where there are none.
    observe: (n, generator) -> the conditioning of n samples, keyword arguments of the velocity; None without any.
    """

    name: str
    shape: tuple[int, ...]
    velocity: Callable
    network: nn.Module
    student: Callable[[], nn.Module]
    distance: Energy | Frechet
    real: Tensor | None
    model: str
    observe: Callable[[int, torch.Generator], dict[str, Tensor]] | None = None

    def given(self, velocity: Callable, n: int, seed: int) -> Callable:
        """The velocity of n samples, with the conditioning that belongs to the seed."""
        if self.observe is None:
            return velocity
        return fk.VelocityField(velocity, conditioning=self.observe(n, generator(10**6 + seed)))

    @functools.cached_property
    def _described(self):
        return self.distance.describe(self.real)

    def from_real(self, described) -> float | str:
        """The distance of described samples to the data; "" where there are none."""
        return "" if self.real is None else self.distance.between(described, self._described)


class Corrected(nn.Module):
    """A closed-form velocity plus a network, zero at first: what straightening trains where there are no weights.

    dim: of the state; observed: of an observation, which the network sees as well.
    """

    def __init__(self, field: nn.Module, dim: int, observed: int = 0):
        super().__init__()
        self.field, self.net = field, ResidualMLP(dim + observed, width=128, blocks=2, time_width=64)
        nn.init.zeros_(self.net.output.weight), nn.init.zeros_(self.net.output.bias)

    def forward(self, x: Tensor, t: Tensor, **conditioning: Tensor) -> Tensor:
        seen = [y.to(x.dtype).flatten(1) for y in (x, *conditioning.values())]
        correction = self.net(torch.cat(seen, 1), t)[:, : seen[0].shape[1]]
        return self.field(x, t, **conditioning) + correction.view(x.shape)


class Bfloat16(nn.Module):
    """A convolutional network under bfloat16 autocast, float32 outside."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.net(x.contiguous(memory_format=torch.channels_last), t).float()


class InBatches:
    """A compiled velocity called on batches of one size, the last one padded, so that it is compiled once.

    eager: the same for states that need gradients, which would be compiled anew.
    """

    def __init__(self, velocity: Callable, eager: Callable, size: int):
        self.velocity, self.eager, self.size = velocity, eager, size

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        if x.requires_grad:
            return self.eager(x, t)
        parts = []
        for a, b in zip(x.split(self.size), t.split(self.size), strict=True):
            short = self.size - len(a)
            a = torch.cat([a, a[:1].expand(short, *a.shape[1:])]) if short else a
            b = torch.cat([b, b[:1].expand(short)]) if short else b
            parts.append(self.velocity(a.contiguous(), b.contiguous())[: self.size - short])
        return torch.cat(parts)


def load(name: str, say: Callable[[str], None]) -> Data:
    """A data set by name; what it lacks on this machine is said."""
    mixtures = {"mixture2": mixture2, "mixture64": mixture64, "scales": scales}
    if name in mixtures:
        net = mixtures[name]()
        real = net.sample(SIZES[name].held_out, generator(12345))
        student = lambda: Corrected(copy.deepcopy(net), net.means.shape[1])  # noqa: E731
        return Data(name, net.shape, net, net, student, Energy(), real, "closed form, float32")
    if name == "policy":
        net, shape = Policy(), (Policy.STEPS, Policy.ACTIONS)
        real = net.sample(**net.observe(SIZES[name].held_out, generator(12345)), g=generator(12346))
        student = lambda: Corrected(copy.deepcopy(net), math.prod(shape), Policy.OBSERVED)  # noqa: E731
        model = "closed form given an observation, float32"
        return Data(name, shape, net, net, student, Energy(), real, model, net.observe)
    net = BUNDLED[name].load().requires_grad_(False)
    make = lambda: copy.deepcopy(net).requires_grad_(True)  # noqa: E731
    if name == "digits":
        real = _there(lambda: digits()[0], say)
        return Data(name, BUNDLED[name].shape, net, net, make, Energy(), real, "residual MLP, float32")
    real = _there(lambda: fashion("t10k")[0], say)
    distance = Frechet(Classifier.load()[0])
    shape = BUNDLED[name].shape
    eager = Bfloat16(copy.deepcopy(net))
    compiled = InBatches(torch.compile(eager, dynamic=False), eager, 64)
    try:
        with torch.no_grad():
            compiled(torch.zeros(1, *shape), torch.zeros(1))
    except Exception as e:  # whatever a missing or broken compiler makes torch raise
        say(f"fashion: not compiled, so in float32 ({str(e).strip().splitlines()[0]})")
        return Data(name, shape, net, net, make, distance, real, "UNet, float32")
    model = "UNet, bfloat16 autocast, torch.compile, batches of 64"
    return Data(name, shape, compiled, net, lambda: Bfloat16(make()), distance, real, model)


def _there(read: Callable[[], Tensor], say: Callable[[str], None]) -> Tensor | None:
    try:
        return read()
    except (OSError, ImportError) as e:
        say(f"no distances to data: {e}")
        return None
