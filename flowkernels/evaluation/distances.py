"""How far apart two sets of samples are: energy and Frechet distances, in the samples' own space or in features."""

from collections.abc import Callable

import torch
from torch import Tensor

from flowkernels._checks import expect

ROWS = 512  # of distances that are made at once, so that a cache holds them
BATCH = 500  # samples whose features are made at once
Features = Callable[[Tensor], Tensor]  # samples [n, *shape] -> [n, d]


class _Distance:
    """features: samples `[n, *shape]` -> `[n, d]`; None takes the samples flattened."""

    def __init__(self, features: Features | None = None):
        self.features = features

    @torch.no_grad()
    def _flat(self, samples: Tensor) -> Tensor:
        if self.features is not None:
            samples = torch.cat([self.features(part.clone()) for part in samples.split(BATCH)])
        return samples.detach().double().flatten(1)


class Energy(_Distance):
    """Energy distance `2 E|X - Y| - E|X - X'| - E|Y - Y'|` over all pairs, each with itself included.

    Zero for equal samples; in expectation too large by a term that falls as one over the number of samples.

    Source: Szekely and Rizzo, Energy statistics: a class of statistics based on distances (2013).
    """

    name = "energy distance"

    def describe(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        """What `between` needs of a set of samples `[n, *shape]`: they, and their mean distances from each other."""
        flat = self._flat(samples)
        return flat, _mean_distances(flat, flat)[0]

    def between(self, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
        return self.with_error(a, b)[0]

    def with_error(
        self, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], paired: bool = False
    ) -> tuple[float, float | None]:
        """The distance, and its standard error by the first order of the statistic (its influence function), which
        vanishes where the two distributions are one; None of fewer than two samples.

        paired: the i-th samples of the two are of one noise.
        """
        rows, columns = _mean_distances(a[0], b[0])
        found = 2 * rows.mean() - a[1].mean() - b[1].mean()
        if min(len(rows), len(columns)) < 2:
            return found.item(), None
        first, second = 2 * (rows - a[1]), 2 * (columns - b[1])
        if paired:
            return found.item(), ((first + second).var() / len(rows)).sqrt().item()
        return found.item(), (first.var() / len(rows) + second.var() / len(columns)).sqrt().item()


def _mean_distances(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Of each of x `[n, d]` from all of y `[m, d]`, and of each of y from all of x."""
    center = y.mean(0)  # far from the origin cdist, which multiplies matrices, would lose digits
    x, y = x - center, y - center
    rows, columns = [], y.new_zeros(len(y))
    for part in x.split(ROWS):
        distances = torch.cdist(part, y)
        rows.append(distances.mean(1))
        columns += distances.sum(0)
    return torch.cat(rows), columns / len(x)


class Frechet(_Distance):
    """Frechet distance of Gaussians fitted to features, `|m_a - m_b|^2 + tr(A + B - 2 (A B)^(1/2))`.

    With A = R^T R and B = S^T S the last trace is the sum of the singular values of `R S^T`: no root of a matrix is
    taken, and fewer samples than features do no harm. The fit to few samples is too narrow, so distances shrink as n
    grows.

    Source: Heusel et al., GANs trained by a two time-scale update rule (2017).
    """

    name = "Frechet distance"

    def describe(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Of two samples or more the mean `[d]` of the features, and a root R `[min(n, d), d]` of their covariance."""
        flat = self._flat(samples)
        expect(len(flat) > 1, "samples", "at least 2, for a covariance", samples)
        mean = flat.mean(0)
        root = (flat - mean) / (len(flat) - 1) ** 0.5
        return mean, torch.linalg.qr(root, mode="r").R if len(flat) > flat.shape[1] else root

    def between(self, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
        (ma, R), (mb, S) = a, b
        cross = torch.linalg.svdvals(R @ S.T).sum()
        found = (ma - mb).square().sum() + R.square().sum() + S.square().sum() - 2 * cross
        return max(0.0, found.item())  # of equal samples it is a rounding error
