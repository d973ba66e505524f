"""The models of the benchmark that are known in closed form, each from fixed seeds."""

import math

import torch
from torch import Tensor, nn

from flowkernels.models.closed_form import GaussianMixtureVelocity, mixture_velocity


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mixture2() -> GaussianMixtureVelocity:
    """Eight modes on a ring of radius 2, weighted 1 to 8."""
    angle = torch.arange(8) * math.pi / 4
    return GaussianMixtureVelocity(2 * torch.stack([angle.cos(), angle.sin()], 1), 0.15, range(1, 9))


def mixture64() -> GaussianMixtureVelocity:
    """Sixteen random modes in 64 dimensions, some 6 apart, of different widths and weights."""
    g = generator(0)
    means = torch.randn(16, 64, generator=g) / 2
    return GaussianMixtureVelocity(means, 0.1 + 0.4 * torch.rand(16, generator=g), 1 + torch.rand(16, generator=g))


def scales() -> GaussianMixtureVelocity:
    """Six centres in 13 dimensions, each with eight scales from 0.05 to 20 and wider the rarer, as of Student's t with
    two degrees of freedom; log-normal factors make each coordinate's width its own."""
    g = generator(1)
    centres = 1.5 * torch.randn(6, 13, generator=g)
    widths = 0.05 * 400 ** torch.linspace(0, 1, 8)
    stds = widths[:, None] * (0.5 * torch.randn(6, 8, 13, generator=g)).exp()
    # the density of log scale s is s^-2 beyond the bulk at 0.3
    weights = (1 / (widths / 0.3 + 0.3 / widths) ** 2).expand(6, 8)
    return GaussianMixtureVelocity(centres.repeat_interleave(8, 0), stds.flatten(0, 1), weights.flatten())


class Policy(nn.Module):
    """Closed-form velocity of a policy: action chunks `[n, 16, 7]` given observations `[n, 32]`, in five modes.

    A random two-layer network makes of an observation each mode's weight and mean; chunks are smooth, as their cosine
    coefficients in time have means and widths that fall with the frequency.
    """

    MODES, STEPS, ACTIONS, OBSERVED = 5, 16, 7, 32

    def __init__(self):
        super().__init__()
        g, hidden = generator(2), 64
        m, T, A = self.MODES, self.STEPS, self.ACTIONS
        k, at = torch.arange(T)[:, None], torch.arange(T)[None] + 0.5
        basis = (math.pi * k * at / T).cos() * (2 / T) ** 0.5
        basis[0] /= 2**0.5
        falls = (1.0 + torch.arange(T)) ** -1.5
        width = 0.4 * falls[None, :, None] * (0.5 * torch.randn(m, T, A, generator=g)).exp() + 0.02
        tensors = dict(basis=basis, stds=width.flatten(1))
        tensors["into"] = torch.randn(hidden, self.OBSERVED, generator=g) / self.OBSERVED**0.5
        tensors["shift"] = 0.5 * torch.randn(hidden, generator=g)
        out = torch.randn(m, T, A, hidden, generator=g) * (3 * falls[:, None, None] / hidden**0.5)
        tensors["means"] = out.view(m * T * A, hidden)
        tensors["choice"] = 3 * torch.randn(m, hidden, generator=g) / hidden**0.5
        for name, value in tensors.items():
            self.register_buffer(name, value)

    def modes(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Means `[n, m, T * A]` of the cosine coefficients, log weights `[n, m]`."""
        h = torch.tanh(2 * (observation @ self.into.T + self.shift))
        return (h @ self.means.T).view(len(h), self.MODES, -1), (h @ self.choice.T).log_softmax(1)

    def forward(self, x: Tensor, t: Tensor, observation: Tensor) -> Tensor:
        means, log_weights = self.modes(observation.to(x.dtype))
        v = mixture_velocity((self.basis @ x).flatten(1), t, means, self.stds[None], log_weights)
        return self.basis.T @ v.view(x.shape)

    def observe(self, n: int, g: torch.Generator) -> dict[str, Tensor]:
        """The conditioning of n samples, random observations."""
        return {"observation": torch.randn(n, self.OBSERVED, generator=g)}

    def sample(self, observation: Tensor, g: torch.Generator) -> Tensor:
        """A chunk for each observation."""
        means, log_weights = self.modes(observation)
        mode = torch.multinomial(log_weights.exp(), 1, generator=g)[:, 0]
        found = means[torch.arange(len(mode)), mode]
        found = found + self.stds[mode] * torch.randn(found.shape, generator=g)
        return self.basis.T @ found.view(-1, self.STEPS, self.ACTIONS)
