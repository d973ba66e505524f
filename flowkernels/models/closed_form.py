"""Velocities of data whose flow is known in closed form: deterministic teachers without a network, of a data set and of
a mixture of Gaussians. They follow the library's convention: t = 0 noise, t = 1 data."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flowkernels._checks import (
    FLOATS,
    expect,
    expect_float64,
    expect_noise,
    expect_positive_int,
    expect_room,
    expect_shown,
    expect_values,
)


class EmpiricalVelocity(nn.Module):
    """Closed-form velocity of the empirical distribution of `data` `[m, *shape]`.

    `v(x, t) = (softmax(-|x - t X|^2 / (2 (1-t)^2)) X - x) / (1 - t)`, the minimiser of the flow-matching loss
    on a finite data set (Lipman et al. 2023, marginal velocity of Gaussian conditional paths). Needs t < 1.
    """

    def __init__(self, data: Tensor):
        super().__init__()
        self.register_buffer("data", expect_noise(data, "data").flatten(1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        flat, s = x.flatten(1), t.to(x.dtype)[:, None]
        # |x - tX|^2 without its x^2 term, which the softmax does not see
        logits = (2 * s * flat @ self.data.T - s**2 * self.data.square().sum(1)) / (2 * (1 - s) ** 2)
        return ((logits.softmax(1) @ self.data - flat) / (1 - s)).view(x.shape)


def mixture_velocity(x: Tensor, t: Tensor, means: Tensor, stds: Tensor, log_weights: Tensor) -> Tensor:
    """`E[x_1 - x_0 | x_t = x]` for x_1 of a mixture of Gaussians with diagonal covariances and standard normal x_0.

    x: `[n, D]`. t: `[n]`. means, stds: `[n or 1, m, D]`. log_weights: `[n or 1, m]`, up to a constant.
    """
    s = t.to(x.dtype)[:, None, None]
    variance = (1 - s) ** 2 + (s * stds) ** 2  # of x_t in each mode, [n, m, D]
    off = x[:, None] - s * means
    logits = log_weights - (variance.log() + off.square() / variance).sum(2) / 2
    # of a mode: mean + slope (x - t mean), the regression of x_1 - x_0 on x_t
    slope = (s * stds**2 - (1 - s)) / variance
    return (logits.softmax(1)[:, :, None] * (means + slope * off)).sum(1)


class GaussianMixtureVelocity(nn.Module):
    """Closed-form velocity of a mixture of Gaussians, exact for every t from 0 to 1.

    The data are x_1 ~ sum over m of `weights[m] N(means[m], stds[m]^2)`, the states x_t = (1-t) x_0 + t x_1 with
    standard normal x_0, and `v(x, t) = E[x_1 - x_0 | x_t = x]`: the posterior of the modes given x, with each mode's
    conditional mean, which is linear in x.

    Args:
        means: `[m, *shape]`.
        stds: a positive number, m of them, or `[m, *shape]`, one for each mode and coordinate.
        weights: m positive numbers, which are normalised; None weighs all modes alike.
    """

    def __init__(self, means: Tensor, stds: float | Sequence[float] | Tensor, weights=None):
        super().__init__()
        expect_values(means, "means", FLOATS)
        ok = means.dim() >= 2 and means.numel() > 0 and bool(torch.isfinite(means).all())
        expect(ok, "means", "finite means of shape [m, *shape]", means)
        m, self.shape = len(means), tuple(means.shape[1:])
        expected = f"{m} positive numbers, one for each mode"
        each = f"{expected}, or {[*means.shape]} of them"
        stds = expect_float64(stds, "stds", each).to(means)
        stds = stds.expand(m) if stds.dim() == 0 else stds
        weights = expect_float64([1.0] * m if weights is None else weights, "weights", expected).to(means)
        shapes = {"stds": ((m,), means.shape), "weights": ((m,),)}
        for name, value, known in (("stds", stds, each), ("weights", weights, expected)):
            positive = value.shape in shapes[name] and bool((value > 0).all()) and bool(torch.isfinite(value).all())
            if not positive:
                expect(False, name, known, value.tolist())
        self.register_buffer("means", means.flatten(1).clone())
        self.register_buffer("stds", (stds.flatten(1) if stds.dim() > 1 else stds).clone())
        self.register_buffer("weights", weights / weights.sum())

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        flat, s = x.flatten(1), t.to(x.dtype)[:, None]
        if self.stds.dim() > 1:
            return mixture_velocity(flat, t, self.means[None], self.stds[None], self.weights.log()).view(x.shape)
        variance = (1 - s) ** 2 + (s * self.stds) ** 2  # as in mixture_velocity, [n, m] alone
        off = (flat[:, None] - s[:, :, None] * self.means).square().sum(2)
        logits = self.weights.log() - flat.shape[1] / 2 * variance.log() - off / (2 * variance)
        posterior = logits.softmax(1)
        slope = (s * self.stds**2 - (1 - s)) / variance
        v = (posterior * (1 - slope * s)) @ self.means + (posterior * slope).sum(1, keepdim=True) * flat
        return v.view(x.shape)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Samples of the mixture itself, `[n, *shape]`; the generator is of the CPU."""
        expect_positive_int(n, "n")
        expect_room(8 * n * self.means.shape[1], "n", "samples", f"{n}")
        known = generator is None or isinstance(generator, torch.Generator)
        expect_shown(known, "generator", "a torch.Generator or None", generator, TypeError)
        mode = torch.multinomial(self.weights.cpu(), n, replacement=True, generator=generator).to(self.means.device)
        shape = n, self.means.shape[1]
        noise = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(self.means)
        return (self.means[mode] + self.stds[mode].view(n, -1) * noise).view(n, *self.shape)
