"""How far apart two sets of samples are: energy and Frechet distances, and the classifier whose features they take."""

import torch
from torch import Tensor, nn

from flowkernels import _weights
from flowkernels.models.bundled import BUNDLED


class Classifier(nn.Sequential):
    """Small Fashion-MNIST classifier; its penultimate layer (64 features) is the feature space of Frechet distances."""

    def __init__(self):
        def conv(cin, cout):
            return [nn.Conv2d(cin, cout, 3, padding=1), nn.BatchNorm2d(cout), nn.ReLU(), nn.MaxPool2d(2)]

        features = nn.Sequential(
            *conv(1, 32), *conv(32, 64), *conv(64, 64), nn.Flatten(), nn.Linear(576, 64), nn.ReLU()
        )
        super().__init__(features, nn.Linear(64, 10))
        self.config = {}

    @classmethod
    def load(cls) -> "Classifier":
        """With its trained weights, from beside the fashion model's."""
        path = BUNDLED["fashion"].path.with_name("classifier.safetensors")
        if not path.is_file():
            raise FileNotFoundError(f"{path}: not found; `python scripts/train_models.py classifier` makes it")
        net = cls()
        state, _ = _weights.read(path, "path", "the classifier's weights")
        net.load_state_dict(state)
        return net.eval()


class Energy:
    """Energy distance `2 E|X - Y| - E|X - X'| - E|Y - Y'|` over all pairs, each with itself included.

    Zero for equal samples; in expectation too large by a term that falls as one over the number of samples.

    Source: Szekely and Rizzo, Energy statistics: a class of statistics based on distances (2013).
    """

    name = "energy distance"

    def describe(self, samples: Tensor) -> tuple[Tensor, float]:
        """What `between` needs of a set of samples `[n, *shape]`."""
        flat = samples.double().flatten(1)
        return flat, _mean_distance(flat, flat)

    def between(self, a: tuple[Tensor, float], b: tuple[Tensor, float]) -> float:
        return 2 * _mean_distance(a[0], b[0]) - a[1] - b[1]


def _mean_distance(x: Tensor, y: Tensor) -> float:
    parts = (torch.cdist(part, y).sum() for part in x.split(512))  # in parts that a cache holds
    return float(sum(parts)) / (len(x) * len(y))


class Frechet:
    """Frechet distance of Gaussians fitted to features, `|m_a - m_b|^2 + tr(A + B - 2 (A B)^(1/2))`.

    features: samples `[n, *shape]` -> `[n, d]`. The fit to few samples is too narrow, so distances shrink as n grows.

    Source: Heusel et al., GANs trained by a two time-scale update rule (2017); features of a classifier of ours.
    """

    name = "Frechet distance"

    def __init__(self, features):
        self.features = features

    @torch.no_grad()
    def describe(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the features."""
        found = torch.cat([self.features(part) for part in samples.split(500)]).double()
        return found.mean(0), found.T.cov()

    def between(self, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
        (ma, A), (mb, B) = a, b
        values, vectors = torch.linalg.eigh(A)
        root = vectors * values.clamp(min=0).sqrt() @ vectors.T
        cross = torch.linalg.eigvalsh(root @ B @ root).clamp(min=0).sqrt().sum()
        return float((ma - mb).square().sum() + A.trace() + B.trace() - 2 * cross)
