"""Closed-form flows, and the formulas in float64 that the stages are compared with."""

import functools
import itertools

import torch
from torch import Tensor, nn

from flowkernels.models.closed_form import EmpiricalVelocity
from flowkernels.ops.samples import generator


def normal(*shape: int, seed: int = 0, dtype=torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


@functools.cache
def digits(count: int = 300) -> Tensor:
    """scikit-learn's handwritten digits in [-1, 1], `[count, 1, 8, 8]`."""
    from sklearn.datasets import load_digits

    images = torch.from_numpy(load_digits().images[:count])
    return (images / 8 - 1).float()[:, None]


def digits_teacher(dtype=torch.float32) -> EmpiricalVelocity:
    """The exact velocity of the digits; defined for t < 1, which is all that Euler steps need."""
    return EmpiricalVelocity(digits().to(dtype))


class LinearField(nn.Module):
    """v = A x, whose solution is x(t) = exp(A t) x(0)."""

    def __init__(self, matrix: Tensor):
        super().__init__()
        self.matrix = nn.Parameter(matrix.clone())

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x @ self.matrix.to(x.dtype).T

    def exact(self, x: Tensor, t: float = 1.0) -> Tensor:
        return x @ torch.linalg.matrix_exp(t * self.matrix.detach().to(x.dtype)).T


def linear_field(dim: int = 4, seed: int = 3) -> LinearField:
    return LinearField(normal(dim, dim, seed=seed, dtype=torch.float64) / dim**0.5)


class ConstantField(nn.Module):
    """One constant velocity for all samples: every trajectory is straight."""

    def __init__(self, velocity: Tensor):
        super().__init__()
        self.velocity = nn.Parameter(velocity.clone())

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.velocity.expand_as(x)


class RowField(nn.Module):
    """A constant velocity of each sample's own, given as conditioning."""

    def forward(self, x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        return rows.to(x.dtype).expand_as(x)


class ElementwiseField(nn.Module):
    """A curved field without sums, so that a sample's velocity does not depend on its batch."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        s = t.to(x.dtype).view(-1, *[1] * (x.dim() - 1))
        return (3 * x).sin() + 4 * s * s - x * s


class Turning(nn.Module):
    """A curved field whose features act on each other."""

    def __init__(self, dim=3):
        super().__init__()
        self.matrix = nn.Parameter(normal(dim, dim, seed=4, dtype=torch.float64))

    def forward(self, x, t):
        s = t.to(x.dtype)[:, None]
        return (2 * x @ self.matrix.T + 3 * s).sin() + 4 * s * s


class Counted:
    """A velocity that counts its calls."""

    def __init__(self, velocity):
        self.velocity, self.calls = velocity, 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        return self.velocity(x, t)


def even_grid(K: int) -> Tensor:
    """K+1 equidistant times from 0 to 1."""
    return torch.linspace(0, 1, K + 1, dtype=torch.float64)


def uneven_grid(K: int, seed: int = 0) -> Tensor:
    """K+1 times from 0 to 1 whose steps differ by a factor of up to 20."""
    steps = torch.rand(K, generator=generator(seed), dtype=torch.float64) + 0.05
    times = torch.cat([torch.zeros(1, dtype=torch.float64), steps.cumsum(0)]) / steps.sum()
    times[-1] = 1
    return times


def heun(velocity, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """States and velocities of Heun's method on `times`, in the noise's dtype; its last slope is taken before t = 1."""
    x, states, velocities = noise, [noise], []
    for a, b in itertools.pairwise(times.tolist()):
        v = velocity(x, torch.full((len(x),), a, dtype=x.dtype))
        ahead = velocity(x + (b - a) * v, torch.full((len(x),), min(b, 0.995), dtype=x.dtype))
        x = x + (b - a) / 2 * (v + ahead)
        states.append(x), velocities.append(v)
    return torch.stack(states), torch.stack(velocities)


def direct_cost(v: Tensor, times: Tensor, x: Tensor | None = None) -> Tensor:
    """Step costs by the double loop over pairs, in float64; without x the states are the Euler steps of v."""
    v, K = v.double().flatten(2), len(times) - 1
    if x is None:
        path = (times.diff()[:, None, None] * v).cumsum(0)
        x = torch.cat([torch.zeros_like(path[:1]), path])
    x = x.double().flatten(2)
    cost = torch.full((K + 1, K + 1), torch.inf, dtype=torch.float64)
    for j in range(K):
        span = (times[j + 1 :] - times[j])[:, None, None]
        cost[j, j + 1 :] = (x[j + 1 :] - x[j] - span * v[j]).square().sum(-1).mean(-1)
    return cost


def raw_gram_cost(v: Tensor, times: Tensor) -> Tensor:
    """Step costs from a float32 Gram matrix of the velocities themselves: what `velocity_gram` avoids."""
    K, n = v.shape[:2]
    flat = v.float().flatten(1)
    gram = (flat @ flat.T).double() / n
    cost = torch.full((K + 1, K + 1), torch.inf, dtype=torch.float64)
    for j in range(K):
        for k in range(j + 1, K + 1):
            weights = torch.zeros(K, dtype=torch.float64)
            weights[j:k] = times[j : k + 1].diff()
            weights[j] -= times[k] - times[j]
            cost[j, k] = weights @ gram @ weights
    return cost


def relative_error(cost: Tensor, expected: Tensor) -> Tensor:
    """Largest relative error over the pairs k > j of nonzero cost."""
    pairs = torch.ones_like(expected, dtype=torch.bool).triu(1) & (expected > 0)
    return ((cost - expected).abs() / expected)[pairs].max()


def plain_bellman(cost: list[list[float]], steps: int) -> tuple[list[int], float]:
    """The N-step path of least cost by a dynamic programme on Python floats; ties to the smaller knot."""
    K = len(cost) - 1
    value = [0.0] + [float("inf")] * K
    parents = []
    for _ in range(steps):
        best, parent = [float("inf")] * (K + 1), [-1] * (K + 1)
        for k in range(K + 1):
            for j in range(k):
                if value[j] + cost[j][k] < best[k]:
                    best[k], parent[k] = value[j] + cost[j][k], j
        value = best
        parents.append(parent)
    path = [K]
    for parent in reversed(parents):
        path.append(parent[path[-1]])
    return path[::-1], value[K]
