"""Schedules of least cost against exhaustive search and a plain dynamic programme."""

import itertools
import math

import numpy as np
import pytest
import torch
from _flows import digits_teacher, even_grid, normal, plain_bellman, uneven_grid
from hypothesis import given
from hypothesis import strategies as st

import flowkernels as fk
from flowkernels.schedule import Schedule, uniform_indices


def random_cost(K, seed=0):
    return normal(K + 1, K + 1, seed=seed, dtype=torch.float64).square()


@st.composite
def grids(draw, longest=24):
    """Strictly increasing times from 0 to 1, with steps of very different sizes."""
    steps = draw(st.lists(st.integers(1, 10**6), min_size=1, max_size=longest))
    knots = torch.tensor([0, *itertools.accumulate(steps)], dtype=torch.float64)
    return knots / knots[-1]


@st.composite
def problems(draw):
    """A grid, costs above the diagonal (few values, so that ties are common, or any) and a number of steps."""
    times = draw(grids(longest=12))
    K = len(times) - 1
    values = draw(st.sampled_from([st.integers(0, 3).map(float), st.floats(0, 1e9)]))
    entries = draw(st.lists(values, min_size=K * (K + 1) // 2, max_size=K * (K + 1) // 2))
    cost = torch.full((K + 1, K + 1), torch.inf, dtype=torch.float64)
    cost[torch.ones_like(cost, dtype=torch.bool).triu(1)] = torch.tensor(entries, dtype=torch.float64)
    return times, cost, draw(st.integers(1, K))


@pytest.mark.parametrize("K", range(1, 9))
def test_exhaustive_search(K):
    cost, times = random_cost(K, seed=K), uneven_grid(K)
    plans = fk.least_cost_schedules(cost, times, range(1, K + 1))
    assert sorted(plans) == list(range(1, K + 1))
    for steps, schedule in plans.items():
        paths = [(0, *inner, K) for inner in itertools.combinations(range(1, K), steps - 1)]
        costs = {path: sum(cost[j, k].item() for j, k in itertools.pairwise(path)) for path in paths}
        best = min(costs, key=costs.get)
        assert schedule.indices == best
        assert schedule.cost == costs[best]
        assert torch.equal(schedule.times, times[list(best)])


@pytest.mark.parametrize("ties", [False, True], ids=["random", "ties"])
def test_plain_dynamic_programme(ties):
    K = 100
    cost = random_cost(K)
    if ties:
        cost = cost.mul(3).floor()
    plans = fk.least_cost_schedules(cost, K, [1, 2, 3, 4, 7, 10, 50, 99, 100])
    rows = cost.tolist()
    for steps, schedule in plans.items():
        path, least = plain_bellman(rows, steps)
        assert list(schedule.indices) == path
        assert schedule.cost == least


def test_plain_dynamic_programme_on_a_flow():
    traj = fk.rollout(digits_teacher(), normal(16, 1, 8, 8), 100)
    cost = fk.step_costs(traj.v, traj.times)
    for steps, schedule in fk.least_cost_schedules(cost, traj.times).items():
        path, least = plain_bellman(cost.tolist(), steps)
        assert list(schedule.indices) == path
        assert schedule.cost == least
        assert schedule.ratio <= 1


@pytest.mark.parametrize("backend", ["cuda", "cpu", "reference"])
def test_ties_go_to_the_smaller_knot(backend):
    with fk.backend(backend):
        plans = fk.least_cost_schedules(torch.zeros(10, 10, dtype=torch.float64), 9, range(1, 10))
    for steps, schedule in plans.items():
        assert schedule.indices == (*range(steps), 9)
        assert schedule.ratio == 1


@given(problems())
def test_never_worse_than_uniform_and_equal_to_the_programme(problem):
    times, cost, steps = problem
    schedule = fk.least_cost_schedules(cost, times, steps)[steps]
    path, least = plain_bellman(cost.tolist(), steps)
    assert (list(schedule.indices), schedule.cost) == (path, least)
    even = uniform_indices(times, steps)
    assert schedule.uniform_cost == sum(cost[j, k].item() for j, k in itertools.pairwise(even))
    assert schedule.cost <= schedule.uniform_cost
    assert 0 <= schedule.ratio <= 1


@given(grids(), st.data())
def test_uniform_indices_are_a_path(times, data):
    K = len(times) - 1
    steps = data.draw(st.integers(1, K))
    indices = uniform_indices(times, steps)
    assert len(indices) == steps + 1
    assert (indices[0], indices[-1]) == (0, K)
    assert all(j < k for j, k in itertools.pairwise(indices))


@given(st.integers(1, 30), st.integers(1, 8))
def test_uniform_indices_where_they_divide(steps, factor):
    assert uniform_indices(even_grid(steps * factor), steps) == tuple(range(0, steps * factor + 1, factor))


def test_uniform_indices_are_the_nearest():
    assert uniform_indices(even_grid(100), 3) == (0, 33, 67, 100)
    assert uniform_indices(torch.tensor([0, 0.05, 0.1, 1], dtype=torch.float64), 3) == (0, 1, 2, 3)
    assert uniform_indices(torch.tensor([0, 0.9, 0.95, 0.97, 1], dtype=torch.float64), 3) == (0, 1, 2, 4)


def test_forbidden_steps():
    cost = random_cost(6)
    cost[0, 2:] = torch.inf
    cost[1, 3:] = torch.inf
    plans = fk.least_cost_schedules(cost, 6, [3, 4])
    assert all(schedule.indices[:3] == (0, 1, 2) for schedule in plans.values())
    with pytest.raises(ValueError, match="cost: expected a path of 2 steps of finite cost, got none"):
        fk.least_cost_schedules(cost, 6, 2)


def test_only_entries_above_the_diagonal_are_read():
    cost = random_cost(7)
    upper = torch.ones_like(cost, dtype=torch.bool).triu(1)
    clean = fk.least_cost_schedules(torch.where(upper, cost, torch.inf), 7, range(1, 8))
    assert fk.least_cost_schedules(torch.where(upper, cost, torch.nan), 7, range(1, 8)) == clean
    assert fk.least_cost_schedules(torch.where(upper, cost, -1.0), 7, range(1, 8)) == clean


def test_views():
    times = uneven_grid(20)
    schedule = fk.least_cost_schedules(random_cost(20), times, 5)[5]
    assert schedule.steps == 5
    assert schedule.times.dtype == schedule.sigmas.dtype == schedule.step_sizes.dtype == torch.float64
    assert torch.equal(schedule.times, times[list(schedule.indices)])
    assert torch.equal(schedule.sigmas, 1 - schedule.times)
    assert torch.equal(schedule.step_sizes, schedule.times[1:] - schedule.times[:-1])
    assert torch.equal(schedule.grid, times)
    assert schedule.ratio == schedule.cost / schedule.uniform_cost
    assert schedule.sigmas[0] == 1
    assert schedule.sigmas[-1] == 0


def test_uniform_schedule():
    schedule = Schedule.uniform(4)
    assert schedule.times.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert (schedule.grid, schedule.indices, schedule.cost, schedule.ratio) == (None, None, None, None)
    with pytest.raises(ValueError, match=r"^steps: expected at least 1, got 0"):
        Schedule.uniform(0)
    with pytest.raises(TypeError, match=r"^steps: expected an integer, got 2.5"):
        Schedule.uniform(2.5)


def test_equality_and_hash():
    cost = random_cost(8)
    first, second = fk.least_cost_schedules(cost, 8, 3)[3], fk.least_cost_schedules(cost.clone(), even_grid(8), 3)[3]
    assert first == second
    assert hash(first) == hash(second)
    assert len({first, second}) == 1
    assert first != fk.least_cost_schedules(cost, 8, 4)[4]
    assert first != fk.least_cost_schedules(2 * cost, 8, 3)[3]
    assert first != Schedule(first.times)
    assert Schedule(first.times) == Schedule(first.times.clone())
    assert first != first.times.tolist()


def test_repr():
    schedule = Schedule(torch.tensor([0, 0.25, 1]), torch.tensor([0, 0.25, 0.5, 1]), (0, 1, 3), 1.5, 3.0)
    assert repr(schedule) == "Schedule(steps=2, times=[0, 0.25, 1], cost=1.5, uniform_cost=3)"
    assert repr(Schedule.uniform(2)) == "Schedule(steps=2, times=[0, 0.5, 1])"
    assert repr(Schedule([0, 1], cost=2.0)) == "Schedule(steps=1, times=[0, 1], cost=2)"


def test_ratio_of_free_schedules_is_one():
    assert Schedule([0, 1], cost=0.0, uniform_cost=0.0).ratio == 1
    assert Schedule([0, 1], cost=1.0).ratio is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(times=[0, 0.5, 0.5, 1]), r"^times: expected strictly increasing times, got times\[1\] = 0.5"),
        (dict(times=[1, 0.5, 0]), r"^times: expected strictly increasing"),
        (
            dict(times=[0, 0.5]),
            r"^times: expected times from 0 \(noise\), or later, to 1 \(data\), got times from 0 to 0.5",
        ),
        (dict(times=[0, math.nan, 1]), r"^times: expected finite"),
        (dict(times=[0, 1], grid=[0, 0.5, 1]), r"^indices: .*with a grid"),
        (dict(times=[0, 1], indices=(0, 1)), r"^indices: .*None without"),
        (dict(times=[0, 0.4, 1], grid=[0, 0.5, 1], indices=(0, 1, 2)), r"^indices: expected the places of the 3 times"),
        (dict(times=[0, 1], grid=[0, 0.5, 1], indices=(0, 3)), r"^indices: .*got \(0, 3\)"),
        (dict(times=[0, 1], grid=[0, 0.5, 1], indices=(0, 1, 2)), r"^indices: "),
    ],
)
def test_bad_schedules(arguments, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**arguments)


GOOD = torch.ones(5, 5, dtype=torch.float64)


@pytest.mark.parametrize(
    ("cost", "times", "steps", "error", "message"),
    [
        (GOOD.tolist(), 4, 2, TypeError, r"^cost: expected a torch.Tensor, got list"),
        (GOOD, 5, 2, ValueError, r"^cost: expected shape \[6, 6\].*\[5, 5\]"),
        (GOOD[0], 4, 2, ValueError, r"^cost: expected shape \[5, 5\]"),
        (GOOD.to("meta"), 4, 2, ValueError, r"^cost: .*with data.*meta"),
        (GOOD * torch.nan, 4, 2, ValueError, r"^cost: .*no NaN or -Inf.*cost\[0, 1\] = nan"),
        (GOOD * -torch.inf, 4, 2, ValueError, r"^cost: .*cost\[0, 1\] = -inf"),
        (GOOD, [0, 0.2, 0.1, 0.5, 1], 2, ValueError, r"^times: expected strictly increasing"),
        (GOOD, 4, 0, ValueError, r"^steps: expected at least 1, got 0"),
        (GOOD, 4, -1, ValueError, r"^steps: expected at least 1, got -1"),
        (GOOD, 4, 5, ValueError, r"^steps: expected at most K = 4, the steps of the grid, got 5"),
        (GOOD, 4, [2, 7], ValueError, r"^steps: expected at most K = 4.* got 7"),
        (GOOD, 4, [], ValueError, r"^steps: expected at least one number of steps, got none"),
        (GOOD, 4, 2.0, TypeError, r"^steps: expected a number of steps or several, got 2.0"),
        (GOOD, 4, [2.0], TypeError, r"^steps: expected an integer, got 2.0"),
        (GOOD, 4, True, TypeError, r"^steps: expected an integer, got True"),
        (GOOD, 4, "2", TypeError, r"^steps: expected an integer, got '2'"),
        (GOOD, 4, None, TypeError, r"^steps: expected a number of steps or several, got None"),
        (GOOD, 4, np.array([2.0]), TypeError, r"^steps: expected an integer"),
    ],
)
def test_bad_input(cost, times, steps, error, message):
    with pytest.raises(error, match=message):
        fk.least_cost_schedules(cost, times, steps)


def test_schedules_are_equal_with_all_that_they_say_of_the_knots():
    times = [0, 0.5, 1]
    grid, other = (torch.tensor([0, t, 0.5, 1], dtype=torch.float64) for t in (0.2, 0.3))
    on_grid = Schedule(times, grid, (0, 2, 3), 1.0, 2.0)
    assert on_grid == Schedule(times, grid.clone(), (0, 2, 3), 1.0, 2.0, notes={"objective": "norm"})
    others = [(other, (0, 2, 3), 1.0, 2.0), (None, None, 1.0, 2.0), (grid, (0, 2, 3), 1.5, 2.0), (grid, (0, 2, 3), 1.0)]
    assert not any(on_grid == Schedule(times, *given) for given in others)
    assert on_grid != Schedule([0, 0.2, 1], grid, (0, 1, 3), 1.0, 2.0)
