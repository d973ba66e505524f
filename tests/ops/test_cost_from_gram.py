import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowkernels.ops.cost_from_gram import cost_from_gram
from flowkernels.ops.cost_from_gram.samples import weights
from flowkernels.ops.samples import generator, of_sum, rounding
from flowkernels.ops.velocity_gram import velocity_gram
from flowkernels.runtime.backends import BACKENDS, backend

SEEDS = st.integers(0, 2**32 - 1)


def integers(shape, seed):
    return torch.randint(-8, 9, shape, generator=generator(seed)).double()


def dyadic(K):
    """K+1 knots whose differences are exact, and differ."""
    return torch.tensor([1 - 2.0**-i for i in range(K)] + [1.0], dtype=torch.float64)


@given(st.integers(1, 9), SEEDS, st.booleans())
def test_is_the_mean_squared_residual(K, seed, states):
    """Whole numbers and knots that are sums of powers of two: every step of the recursion is exact."""
    v, t = integers((K, 3, 4), seed), dyadic(K)
    x = torch.cat([integers((1, 3, 4), seed + 1), t.diff().view(-1, 1, 1) * v]).cumsum(0)
    if states:
        x = x + integers(x.shape, seed + 2)
    cost = cost_from_gram(velocity_gram(v, x=x if states else None, times=t if states else None), t, states=states)
    for j in range(K + 1):
        for k in range(K + 1):
            residual = x[k] - x[j] - (t[k] - t[j]) * v[min(j, K - 1)]
            assert cost[j, k] == (residual.square().sum() if k > j else math.inf)


@given(st.integers(1, 30), SEEDS, st.booleans())
def test_is_the_quadratic_form(K, seed, states):
    g = generator(seed)
    rows = torch.randn(2 * K - 1 if states else K - 1, 50, generator=g, dtype=torch.float64)
    t = torch.linspace(0, 1, K + 1, dtype=torch.float64)
    w = weights(t, states)
    inside = torch.ones(K + 1, K + 1, dtype=torch.bool).triu(1)
    cost = cost_from_gram(rows @ rows.T, t, states=states)
    torch.testing.assert_close(cost[inside], (w @ (rows @ rows.T) * w).sum(2)[inside], rtol=1e-9, atol=1e-12)
    assert (cost[inside] >= 0).all()


@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize("K", [127, 128, 300])
def test_on_a_gpu_more_columns_than_a_block_takes_at_a_time(K, states):
    """Terms of a cost are not below zero, so that errors are relative to it."""
    rows = torch.rand(2 * K - 1 if states else K - 1, 50, generator=generator(0), dtype=torch.float64)
    with backend("cuda"):
        cost = cost_from_gram(rows @ rows.T, K, states=states)
    bound = 2 * rounding(6 + of_sum(3 * K), torch.float64)
    torch.testing.assert_close(cost, cost_from_gram(rows @ rows.T, K, states=states), rtol=bound, atol=0)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_inf_are_in_the_costs_they_are_part_of(name, bad):
    gram = torch.eye(9, dtype=torch.float64)
    gram[4, 4] = bad  # |a_5|^2, in S(j, k) for j < 5 < k
    with backend(name):
        cost = cost_from_gram(gram, 10)
    j, k = torch.meshgrid(torch.arange(11), torch.arange(11), indexing="ij")
    part = (j < 5) & (k > 5)
    assert not cost[part].isfinite().any()
    assert cost[(k > j) & ~part].isfinite().all()


def test_a_residual_of_zero_costs_zero_not_less():
    rows = torch.randn(30, 1, generator=generator(0), dtype=torch.float64)
    rows[1::2] = -rows[::2]
    assert (cost_from_gram(rows @ rows.T, 31) >= 0).all()


def test_needs_no_gradient():
    gram = torch.eye(3, dtype=torch.float64, requires_grad=True)
    assert not cost_from_gram(gram, 4).requires_grad


@pytest.mark.parametrize(
    ("error", "message", "gram", "times", "states"),
    [
        (TypeError, "gram: expected a torch.Tensor, got list", [[1.0]], 2, False),
        (TypeError, "gram: expected torch.float64, got a torch.float32", torch.eye(3), 4, False),
        (ValueError, r"gram: expected shape \[4, 4\], for 6 knots, got", torch.eye(3).double(), 5, False),
        (ValueError, r"gram: expected shape \[9, 9\], for 6 knots, got", torch.eye(4).double(), 5, True),
        (ValueError, "times: expected strictly increasing times", torch.eye(1).double(), [0.0, 0.5, 0.5], False),
    ],
)
def test_bad_input(error, message, gram, times, states):
    with pytest.raises(error, match=message):
        cost_from_gram(gram, times, states=states)
