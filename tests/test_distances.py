"""Energy and Frechet distances: by definition, of distributions that are known, and by scipy's matrix root."""

import math

import numpy as np
import pytest
import torch
from _flows import normal
from scipy.linalg import sqrtm

from flowkernels.evaluation.distances import Energy, Frechet


def apart(distance, x, y):
    return distance.between(distance.describe(x), distance.describe(y))


def test_energy_distance():
    x, y = normal(700, 3, dtype=torch.float64), normal(600, 3, seed=1, dtype=torch.float64) + 1

    def mean(a, b):
        return (a[:, None] - b[None]).square().sum(2).sqrt().mean()

    assert apart(Energy(), x, y) == pytest.approx((2 * mean(x, y) - mean(x, x) - mean(y, y)).item(), rel=1e-9)
    assert abs(apart(Energy(), x, x)) < 1e-9
    assert apart(Energy(), torch.zeros(1, 2), torch.tensor([[3.0, 4.0]])) == 10  # of two points: 2 |x - y|
    assert Energy().with_error(*(Energy().describe(x[:1]) for _ in range(2)))[1] is None


def test_energy_distance_of_two_normal_distributions():
    """In one dimension E|X - Y| of N(0, 1) and N(m, 1) is known: X - Y is N(-m, 2)."""
    m = 1.5
    x, y = normal(5000, 1), normal(5000, 1, seed=1) + m
    across = 2 * math.exp(-(m**2) / 4) / math.sqrt(math.pi) + m * math.erf(m / 2)
    expected = 2 * across - 4 / math.sqrt(math.pi)
    assert apart(Energy(), x, y) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("paired", [False, True])
def test_the_standard_error_is_the_spread_of_the_distance(paired):
    """Over 300 pairs of sets, of equal noise where they are paired."""
    energy, found, errors = Energy(), [], []
    noise, other = normal(300, 60, 2), normal(300, 60, 2, seed=1)
    for x, y in zip(noise, noise * 1.5 + 0.7 if paired else other * 1.5 + 0.7, strict=True):
        value, error = energy.with_error(energy.describe(x), energy.describe(y), paired)
        found.append(value), errors.append(error)
    assert np.mean(errors) == pytest.approx(np.std(found), rel=0.15)


@pytest.mark.parametrize(("n", "m", "d"), [(40, 50, 6), (8, 50, 12), (8, 9, 12), (2, 2, 5), (30, 30, 1)])
def test_frechet_distance(n, m, d):
    """With fewer samples than features too, where covariances have no full rank."""
    x, y = normal(n, d, dtype=torch.float64), 2 * normal(m, d, seed=1, dtype=torch.float64) + 1
    A, B = (np.atleast_2d(np.cov(s.numpy(), rowvar=False)) for s in (x, y))
    off = np.square(x.mean(0).numpy() - y.mean(0).numpy()).sum()
    small = 1e-9 if min(n, m) <= d else 0.0  # the root of a singular matrix; tends to the distance as it goes to 0
    root = sqrtm((A + small * np.eye(d)) @ (B + small * np.eye(d))).real
    expected = off + np.trace(A) + np.trace(B) - 2 * np.trace(root)
    assert apart(Frechet(), x, y) == pytest.approx(expected, rel=1e-9 if small == 0 else 1e-3)
    assert apart(Frechet(), x, y) == pytest.approx(apart(Frechet(), y, x), rel=1e-12)
    assert apart(Frechet(), x, x) < 1e-12
    turned = torch.linalg.qr(normal(d, d, seed=2, dtype=torch.float64)).Q  # of both, which changes nothing
    assert apart(Frechet(), x @ turned, y @ turned) == pytest.approx(apart(Frechet(), x, y), rel=1e-9)


def test_frechet_distance_of_two_normal_distributions():
    A = torch.tensor([[2.0, 0.6], [0.6, 1.0]], dtype=torch.float64)
    B = torch.tensor([[0.5, -0.2], [-0.2, 1.5]], dtype=torch.float64)
    m = torch.tensor([1.0, -2.0], dtype=torch.float64)
    # tr (A B)^(1/2) of 2 x 2 matrices, from trace and determinant
    root = ((A @ B).trace() + 2 * torch.linalg.det(A @ B).sqrt()).sqrt()
    expected = m.square().sum() + A.trace() + B.trace() - 2 * root
    roots = [torch.linalg.cholesky(C).T for C in (A, B)]
    found = Frechet().between((torch.zeros_like(m), roots[0]), (m, roots[1]))
    assert found == pytest.approx(expected.item(), rel=1e-12)
    x, y = normal(20_000, 2), 3 * normal(20_000, 2, seed=1) + 1  # |1, 1|^2 + 2 (1 - 3)^2
    assert apart(Frechet(lambda x: x), x, y) == pytest.approx(10, rel=0.05)
    with pytest.raises(ValueError, match="samples: expected at least 2"):
        Frechet().describe(x[:1])
