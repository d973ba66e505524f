import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowkernels.ops.bellman import bellman
from flowkernels.ops.samples import generator
from flowkernels.runtime import backends
from flowkernels.runtime.backends import BACKENDS, backend

F64 = torch.float64


def path(parent, steps, k):
    """The knots that `parent` records for `steps` steps to knot k."""
    knots = [k]
    for s in range(steps, 0, -1):
        knots.append(int(parent[s, knots[-1]]))
    return knots[::-1]


def exhaustive(cost, steps, carry=1.0):
    """J(s, k) over every path of s steps from knot 0 to knot k; products and sums are rounded as in the recursion."""
    n = len(cost)
    value = torch.full((steps + 1, n), math.inf, dtype=F64)
    value[0, 0] = 0
    for s in range(1, steps + 1):
        for k in range(s, n):
            for middle in itertools.combinations(range(1, k), s - 1):
                knots = (0, *middle, k)
                total = 0.0
                for j, i in itertools.pairwise(knots):
                    total = carry * total + cost[j][i]
                value[s, k] = min(value[s, k].item(), total)
    return value


@st.composite
def costs(draw, entries, largest=8):
    """A cost matrix, +Inf among its entries now and then, and a number of steps."""
    K = draw(st.integers(1, largest))
    entry = st.one_of(entries, entries, entries, st.just(math.inf))
    above = iter(draw(st.lists(entry, min_size=K * (K + 1) // 2, max_size=K * (K + 1) // 2)))
    # what is on and below the diagonal is not read
    rows = [[next(above) if k > j else draw(st.sampled_from([0.0, -9.0, math.nan])) for k in range(K + 1)]
            for j in range(K + 1)]  # fmt: skip
    return rows, draw(st.integers(1, K))


@given(costs(st.integers(0, 3).map(float)), st.sampled_from(BACKENDS))
def test_exhaustive_search_and_ties(case, name):
    """Small whole numbers, so that paths tie often and sums are exact."""
    rows, steps = case
    with backend(name):
        value, parent = bellman(torch.tensor(rows, dtype=F64), steps)
    expected = exhaustive(rows, steps)
    assert torch.equal(value, expected)
    for s, k in itertools.product(range(steps + 1), range(len(rows))):
        attains = [j for j in range(k) if s and expected[s - 1, j] + rows[j][k] == expected[s, k] < math.inf]
        assert parent[s, k] == (attains[0] if attains else -1)


@given(costs(st.floats(-1e6, 1e6)), st.sampled_from(BACKENDS), st.sampled_from([0.7, 1 / 0.9, 3, 1e-60, 1e60]))
def test_exhaustive_search_with_a_factor_on_the_cost_so_far(case, name, carry):
    """Bit for bit: rounding keeps an order, so that the least of the rounded sums is the sum of the least."""
    rows, steps = case
    with backend(name):
        value, parent = bellman(torch.tensor(rows, dtype=F64), steps, carry)
    assert torch.equal(value, exhaustive(rows, steps, carry))
    for s, k in (parent >= 0).nonzero().tolist():
        attains = [
            j for j in range(k) if value[s - 1, j] < math.inf and carry * value[s - 1, j] + rows[j][k] == value[s, k]
        ]
        assert parent[s, k] == attains[0]


@pytest.mark.parametrize("name", BACKENDS)
def test_a_factor_of_one_is_none(name):
    cost = torch.rand(40, 40, dtype=F64, generator=generator(0))
    with backend(name):
        got, expected = bellman(cost, 12, 1), bellman(cost, 12)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("name", BACKENDS)
def test_a_factor_changes_the_path(name):
    """Steps of equal length are best; where later ones count for less, they are longer."""
    t = torch.arange(41, dtype=F64)
    with backend(name):
        _, parent = bellman((t - t[:, None]).square(), 4, 1 / 0.5)
    assert path(parent, 4, 40) == [0, 3, 8, 19, 40]


@pytest.mark.parametrize("number", [float, torch.tensor], ids=["float", "tensor"])
@pytest.mark.parametrize("name", BACKENDS)
def test_the_factor_stays_open_when_compiled(name, number):
    cost = torch.rand(9, 9, dtype=F64, generator=generator(0))
    torch._dynamo.reset()
    compiled = torch.compile(lambda c, carry: bellman(c, 5, carry), fullgraph=True, dynamic=True, backend="aot_eager")
    with backend(name):
        compiled(cost, number(1.1))
        with torch._dynamo.config.patch(error_on_recompile=True):
            for carry in (0.7, 1 / 0.9, 12.0):
                expected = bellman(cost, 5, torch.tensor(carry).item() if number is torch.tensor else carry)
                got = compiled(cost, number(carry))
                assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
            with pytest.raises(ValueError, match=r"carry: expected a positive, finite number, got -0\.5"):
                compiled(cost, number(-0.5))


@given(costs(st.floats(-1e6, 1e6), largest=10), st.sampled_from(BACKENDS))
def test_value_and_parent_agree(case, name):
    rows, steps = case
    cost = torch.tensor(rows, dtype=F64)
    with backend(name):
        value, parent = bellman(cost, steps)
    assert (value.dtype, parent.dtype) == (F64, torch.int64)
    assert value.shape == parent.shape == (steps + 1, len(rows))
    assert value[0].tolist() == [0.0] + [math.inf] * (len(rows) - 1)
    assert (parent[0] == -1).all()
    for s, k in itertools.product(range(1, steps + 1), range(len(rows))):
        j = int(parent[s, k])
        if j == -1:
            assert value[s, k] == math.inf
            continue
        assert value[s, k] == value[s - 1, j] + cost[j, k] < math.inf
        knots = path(parent, s, k)
        assert knots[0] == 0
        assert all(a < b for a, b in itertools.pairwise(knots))
        assert value[s, k] <= min(value[s - 1, i] + cost[i, k] for i in range(k))


@given(costs(st.floats(0, 1e3), largest=10))
def test_fewer_steps_are_the_first_rows(case):
    rows, steps = case
    cost = torch.tensor(rows, dtype=F64)
    value, parent = bellman(cost, steps)
    full_value, full_parent = bellman(cost, len(rows) - 1)
    assert torch.equal(full_value[: steps + 1], value)
    assert torch.equal(full_parent[: steps + 1], parent)


@given(costs(st.integers(0, 100).map(float), largest=10), st.integers(-4, 4))
def test_scaling_the_costs_scales_the_values(case, power):
    rows, steps = case
    cost = torch.tensor(rows, dtype=F64)
    value, parent = bellman(cost, steps)
    scaled, same = bellman(cost * 2.0**power, steps)
    assert torch.equal(scaled, value * 2.0**power)
    assert torch.equal(same, parent)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(("K", "steps"), [(12, 4), (100, 10), (96, 32)])
def test_squared_steps_are_best_uniform(K, steps, name):
    t = torch.arange(K + 1, dtype=F64)
    with backend(name):
        value, parent = bellman((t - t[:, None]).square(), steps)
    assert path(parent, steps, K) == list(range(0, K + 1, K // steps))
    assert value[steps, K] == K**2 / steps


@pytest.mark.parametrize("name", BACKENDS)
def test_ties_take_the_smallest_knot(name):
    with backend(name):
        value, parent = bellman(torch.zeros(34, 34, dtype=F64), 33)
    for s in range(1, 34):
        assert parent[s].tolist() == [-1] * s + [s - 1] * (34 - s)
        assert value[s, s:].eq(0).all()


@pytest.mark.parametrize("name", BACKENDS)
def test_one_step_of_one(name):
    with backend(name):
        value, parent = bellman(torch.tensor([[0.0, 3.5], [0.0, 0.0]], dtype=F64), 1)
    assert value.tolist() == [[0, math.inf], [math.inf, 3.5]]
    assert parent.tolist() == [[-1, -1], [-1, 0]]


@pytest.mark.parametrize("name", BACKENDS)
def test_one_step_from_the_start(name):
    cost = torch.rand(9, 9, dtype=F64, generator=generator(0))
    with backend(name):
        value, parent = bellman(cost, 1)
    assert torch.equal(value[1, 1:], cost[0, 1:])
    assert parent[1].tolist() == [-1] + [0] * 8


@pytest.mark.parametrize("name", BACKENDS)
def test_forbidden_steps(name):
    """Only the path 0 -> 2 -> 5 is open."""
    cost = torch.full((6, 6), math.inf, dtype=F64)
    cost[0, 2], cost[2, 5] = 1.0, 2.0
    with backend(name):
        value, parent = bellman(cost, 5)
    reached = {(0, 0): 0.0, (1, 2): 1.0, (2, 5): 3.0}
    for s, k in itertools.product(range(6), range(6)):
        assert value[s, k] == reached.get((s, k), math.inf)
    assert path(parent, 2, 5) == [0, 2, 5]
    assert int((parent >= 0).sum()) == 2


@pytest.mark.parametrize("name", BACKENDS)
def test_a_sum_that_overflows_is_unreachable(name):
    with backend(name):
        value, parent = bellman(torch.full((3, 3), 1.7e308, dtype=F64), 2)
    assert value[2].tolist() == [math.inf] * 3
    assert parent[2].tolist() == [-1] * 3


@pytest.mark.parametrize("n", [32, 64, 128, 129, 1030, 2049])
def test_on_a_gpu_as_many_knots_as_a_block_holds_and_more(n):
    """Few values, so that many paths tie."""
    cost = torch.randint(4, (n, n), generator=generator(0)).double()
    with backend("cuda"):
        got = bellman(cost, 4)
    assert all(torch.equal(a, b) for a, b in zip(got, bellman(cost, 4), strict=True))


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize("n", [6, 40, 128, 1030])
def test_on_a_gpu_bad_costs_are_in_the_tables(n, steps):
    """For a captured graph, whose launches nobody waits for; otherwise the first one raises."""
    cost = torch.ones(n, n, dtype=F64)
    cost[2, 3], cost[1, n - 1], cost[1, 2] = math.nan, -math.inf, math.nan
    value, parent = torch.zeros(steps + 1, n, dtype=F64), torch.zeros(steps + 1, n, dtype=torch.int64)
    place = torch.zeros((), dtype=torch.int64)
    tables = value.data_ptr(), parent.data_ptr(), place.data_ptr()
    backends.cuda_module().bellman(cost.data_ptr(), n, steps, 1.0, *tables, 0, 0)
    assert place == n + 2
    assert value.isnan().all()
    assert parent.eq(-1).all()
    with backend("cuda"), pytest.raises(ValueError, match=r"got cost\[1, 2\] = nan"):
        bellman(cost, steps)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("carry", [0, 0.0, -1.0, math.inf, math.nan, torch.tensor(0.0)])
def test_a_factor_that_is_none(carry, name):
    with backend(name), pytest.raises(ValueError, match="carry: expected a positive, finite number, got "):
        bellman(COST, 2, carry)


@pytest.mark.parametrize("name", BACKENDS)
def test_from_a_value_of_minus_infinity_a_forbidden_step_stays_forbidden(name):
    cost = torch.full((5, 5), -1.7e308, dtype=F64)
    cost[2, 3] = math.inf
    with backend(name):
        value, parent = bellman(cost, 3)
        with_factor, _ = bellman(cost / 1e8, 2, 1e10)
    assert value[2].tolist() == [math.inf] * 2 + [-math.inf] * 3
    assert parent[2].tolist() == [-1, -1, 1, 1, 1]
    assert value[3].tolist() == [math.inf] * 4 + [-math.inf]
    assert parent[3].tolist() == [-1, -1, -1, -1, 2]
    assert torch.equal(with_factor[2], value[2])


def test_leaves_the_costs_alone():
    cost = torch.rand(7, 7, dtype=F64, generator=generator(0))
    before = cost.clone()
    bellman(cost, 6)
    assert torch.equal(cost, before)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_bad_costs_raise_under_compile_too(bad, name):
    cost = torch.ones(5, 5, dtype=F64)
    cost[1, 3] = bad
    torch._dynamo.reset()
    with backend(name), pytest.raises(ValueError, match=r"cost: expected no NaN or -Inf above the diagonal"):
        torch.compile(bellman, fullgraph=True, backend="aot_eager")(cost, 3)


def test_on_the_meta_device():
    value, parent = bellman(torch.empty(6, 6, dtype=F64, device="meta"), 3)
    assert value.shape == parent.shape == (4, 6)
    assert (value.dtype, parent.dtype, value.device.type) == (F64, torch.int64, "meta")


COST = torch.ones(4, 4, dtype=F64)


def with_entry(bad):
    cost = COST.clone()
    cost[1, 2] = bad
    return cost


@pytest.mark.parametrize(
    ("error", "message", "cost", "steps"),
    [
        (TypeError, r"cost: expected a torch.Tensor, got list", COST.tolist(), 2),
        (TypeError, r"cost: expected torch.float64, got a torch.float32 tensor of shape \[4, 4\]", COST.float(), 2),
        (ValueError, r"cost: expected shape \[K\+1, K\+1\] with K >= 1, got .*\[4, 3\]", COST[:, :3], 2),
        (ValueError, r"cost: expected shape \[K\+1, K\+1\] with K >= 1, got .*\[4\]", COST[0], 2),
        (ValueError, r"cost: expected shape \[K\+1, K\+1\] with K >= 1, got .*\[1, 1\]", COST[:1, :1], 1),
        (ValueError, r"cost: expected shape \[K\+1, K\+1\] with K >= 1, got .*\[0, 0\]", COST[:0, :0], 1),
        (
            ValueError,
            r"cost: expected no NaN or -Inf above the diagonal, got cost\[1, 2\] = nan",
            with_entry(math.nan),
            2,
        ),
        (ValueError, r"cost: expected .*, got cost\[1, 2\] = -inf", with_entry(-math.inf), 2),
        (ValueError, r"steps: expected at least 1, got 0", COST, 0),
        (ValueError, r"steps: expected at least 1, got -1", COST, -1),
        (ValueError, r"steps: expected at most K = 3, got 4", COST, 4),
        (TypeError, r"steps: expected an integer, got 2.0", COST, 2.0),
        (TypeError, r"steps: expected an integer, got True", COST, True),
        (TypeError, r"steps: expected an integer, got None", COST, None),
    ],
)
def test_errors_name_the_argument(error, message, cost, steps):
    with pytest.raises(error, match=message):
        bellman(cost, steps)
