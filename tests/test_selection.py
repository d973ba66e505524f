"""Selection: right on heavy tails, and it says what it does not know."""

import math

import pytest
import torch
from torch import Tensor

from flowkernels.calibration.selection import Candidate, Choice, choose
from flowkernels.schedule import Schedule

PLAN = Schedule([0, 1])


def choice(errors: Tensor) -> Choice:
    return choose([Candidate(f"{i}", PLAN, e) for i, e in enumerate(errors)])


def draws(seed: int, n: int, rms: list[float], tail: float = 2.0, own: float = 1.0) -> Tensor:
    """Errors `[c, n]` of plans with these rms distances, up to one factor: log-normal, of `tail` that they share."""
    generator = torch.Generator().manual_seed(seed)
    shared, each = torch.randn(n, generator=generator), torch.randn(len(rms), n, generator=generator)
    return torch.tensor(rms)[:, None].double() ** 2 * (tail * shared + own * each).double().exp()


def test_a_heavy_tail_does_not_decide():
    """Of five plans the one of least rms distance: more often, and with less regret, than the mean finds it, and much
    more than the mean of a quarter of the samples."""
    rms = [1.4, 1.0, 1.2, 1.6, 2.0]
    regrets = {"choose": [], "mean": [], "a quarter": []}
    for seed in range(120):
        errors = draws(seed, 64, rms)
        means = errors.mean(1), errors[:, 3::4].mean(1)
        for name, best in zip(regrets, (choice(errors).best, *(int(m.argmin()) for m in means)), strict=True):
            regrets[name].append(math.log(rms[best]))
    of = {name: sum(values) / len(values) for name, values in regrets.items()}
    right = sum(value == 0 for value in regrets["choose"]) / 120
    assert right > 0.7
    assert of["choose"] < 0.85 * of["mean"]
    assert of["choose"] < 0.6 * of["a quarter"]


def test_the_mean_decides_where_it_can():
    """A few large errors that are there on many samples count, whatever the others are."""
    errors = torch.stack([torch.full((4096,), 0.5), torch.full((4096,), 1.0)]).double()
    errors[0, ::64] = 100.0
    found = choice(errors)
    assert (found.best, found.second, found.decided, found.needed) == (1, 0, True, None)
    assert found.ratio[1] < 1
    assert choice(errors[:, 1:60]).best == 0  # where none is seen


def test_the_rule_in_plain_numbers():
    """The least mean distance of those within half a standard error of the least mean error."""
    for seed in range(30):
        errors = draws(seed, 12, [1.0, 1.1, 1.2, 1.3])
        rows = errors.tolist()
        means = [sum(row) / 12 for row in rows]
        least, near = rows[means.index(min(means))], []
        for i, row in enumerate(rows):
            behind = [a - b for a, b in zip(row, least, strict=True)]
            mean = sum(behind) / 12
            variance = sum((b - mean) ** 2 for b in behind) / 11
            if row is least or mean <= 0.5 * math.sqrt(variance / 12):
                near.append((sum(map(math.sqrt, row)) / 12, i))
        assert choice(errors).best == min(near)[1]


def test_what_is_undecided_and_how_many_samples_would_decide():
    """Of light tails: the ratio's interval has the true one in 95 % of draws, and as many as are said to be needed
    decide about half of the time, fewer before and more after."""
    true, covered, needed = 1 / 1.05, 0, []
    for seed in range(80):
        found = choice(draws(seed, 48, [1.0, 1.05], tail=0.3, own=0.3))
        low, high = found.ratio if found.best == 0 else (1 / found.ratio[1], 1 / found.ratio[0])
        covered += low <= true <= high
        assert found.decided == (found.ratio[1] < 1)
        assert (found.needed is None) == found.decided
        needed.append(found.needed or 48)
    assert covered >= 71
    n = sorted(needed)[40]
    decided = [sum(choice(draws(s, m, [1.0, 1.05], 0.3, 0.3)).decided for s in range(90, 130)) for m in (n // 4, 3 * n)]
    assert decided[0] < 18
    assert decided[1] > 28
    assert "undecided on 12 samples" in str(choice(draws(0, 12, [1.0, 1.01])))


def test_few_samples_and_errors_that_are_not_finite():
    one = choice(torch.tensor([[1.0, 2.0]], dtype=torch.float64))
    assert (one.best, one.second, one.decided, one.n) == (0, None, True, 2)
    nan, inf = math.nan, math.inf
    found = choice(torch.tensor([[nan, 1, 1], [2, 2, 2], [0, 0, inf]], dtype=torch.float64))
    assert (found.best, found.decided, found.needed) == (1, True, None)
    found = choice(torch.full((2, 3), inf, dtype=torch.float64))
    assert (found.best, found.second, found.decided, found.needed) == (0, 1, False, None)
    found = choice(torch.zeros(2, 3, dtype=torch.float64))
    assert (found.best, found.decided, found.needed) == (0, False, None)
    found = choice(torch.tensor([[1, 0, 0, 0], [0, 0, 0, 2]], dtype=torch.float64))  # some resamples have one alone
    assert (found.best, found.decided, found.needed) == (0, False, None)
    same = torch.rand(3, generator=torch.Generator().manual_seed(0)).double() + 0.1
    assert choice(torch.stack([same, same.flip(0), same])).needed is None
    found = choice(torch.tensor([[2.0], [1.0]], dtype=torch.float64))
    assert (found.best, found.decided, found.intervals) == (1, False, (None, None))
    with pytest.raises(ValueError, match=r"^candidates: expected one or more, got none"):
        choose([])
