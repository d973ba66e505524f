import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowkernels.ops.bellman import bellman
from flowkernels.ops.bellman_pairs import bellman_pairs
from flowkernels.ops.samples import generator
from flowkernels.runtime import backends
from flowkernels.runtime.backends import BACKENDS, backend

F64 = torch.float64
EVERY = pytest.mark.parametrize("name", BACKENDS)


def path(value, parent, steps):
    """The knots of `steps` steps of least cost to the last knot."""
    k = value.shape[-1] - 1
    knots = [k, int(value[steps, :, k].argmin())]
    for s in range(steps, 1, -1):
        knots.append(int(parent[s, knots[-1], knots[-2]]))
    return knots[::-1]


def cost_of(knots, first, cost):
    return first[knots[1]] + sum(cost[i][j][k] for i, j, k in zip(knots, knots[1:], knots[2:], strict=False))


def exhaustive(first, cost, steps):
    """V(s, j, k) over every path of s steps from knot 0 that ends with the step from j to k."""
    n = len(first)
    value = torch.full((steps + 1, n, n), math.inf, dtype=F64)
    value[0, 0, 0] = 0
    for s in range(1, steps + 1):
        for knots in itertools.combinations(range(1, n), s):
            knots = (0, *knots)
            value[s][knots[-2:]] = min(value[s][knots[-2:]].item(), cost_of(knots, first, cost))
    return value


@st.composite
def costs(draw, entries, largest=6):
    """Costs of first steps and of others, +Inf among them now and then, and a number of steps."""
    n = draw(st.integers(1, largest)) + 1
    entry = st.one_of(entries, entries, entries, entries, st.just(math.inf))
    size = n + math.comb(n, 3) - 1
    read = iter(draw(st.lists(entry, min_size=size, max_size=size)))
    unread = draw(st.sampled_from([0.0, -9.0, math.nan, -math.inf]))
    first = [next(read) if k else unread for k in range(n)]
    cost = [[[next(read) if i < j < k else unread for k in range(n)] for j in range(n)] for i in range(n)]
    return first, cost, draw(st.integers(1, n - 1))


def tensors(case):
    first, cost, steps = case
    return torch.tensor(first, dtype=F64), torch.tensor(cost, dtype=F64), steps


@given(costs(st.integers(0, 3).map(float)), st.sampled_from(BACKENDS))
def test_exhaustive_search_and_ties(case, name):
    """Small whole numbers, so that paths tie often and sums are exact."""
    first, cost, steps = case
    with backend(name):
        value, parent = bellman_pairs(*tensors(case))
    expected = exhaustive(first, cost, steps)
    assert (value.dtype, parent.dtype) == (F64, torch.int64)
    assert torch.equal(value, expected)
    for s, j, k in itertools.product(range(steps + 1), range(len(first)), range(len(first))):
        attains = [
            i for i in range(j) if s > 1 and k > j and expected[s - 1, i, j] + cost[i][j][k] == expected[s, j, k]
        ]
        assert parent[s, j, k] == (attains[0] if attains and expected[s, j, k] < math.inf else -1)
    for s in range(1, steps + 1):
        if value[s, :, -1].min() < math.inf:
            knots = path(value, parent, s)
            assert knots[0] == 0
            assert cost_of(knots, first, cost) == expected[s, :, -1].min()


@settings(max_examples=20)
@given(costs(st.floats(-1e6, 1e6)))
def test_all_backends_have_the_same_bits(case):
    results = []
    for name in BACKENDS:
        with backend(name):
            results.append(bellman_pairs(*tensors(case)))
    for value, parent in results[1:]:
        assert torch.equal(value, results[0][0])
        assert torch.equal(parent, results[0][1])


@given(costs(st.floats(0, 1e3), largest=9))
def test_fewer_steps_are_the_first_planes(case):
    first, cost, steps = tensors(case)
    value, parent = bellman_pairs(first, cost, steps)
    full_value, full_parent = bellman_pairs(first, cost, len(first) - 1)
    assert torch.equal(full_value[: steps + 1], value)
    assert torch.equal(full_parent[: steps + 1], parent)


@EVERY
@pytest.mark.parametrize(("n", "steps"), [(2, 1), (9, 8), (22, 6)])
def test_costs_that_do_not_depend_on_the_knot_before_are_those_of_bellman(n, steps, name):
    """Whole numbers: the paths tie, and of equal ones both take the smallest knots from the end on."""
    cost = torch.randint(20, (n, n), generator=generator(n)).double()
    with backend(name):
        value, parent = bellman(cost, steps)
        of_pairs, before = bellman_pairs(cost[0], cost.expand(n, n, n), steps)
    assert torch.equal(of_pairs.amin(1), value)
    j = torch.where(value[1:] < math.inf, of_pairs[1:].argmin(1), -1)
    assert torch.equal(j, parent[1:])
    for s in range(2, steps + 1):
        reached = (of_pairs[s] < math.inf).nonzero()
        assert all(before[s, j, k] == parent[s - 1, j] for j, k in reached.tolist())


@EVERY
def test_a_greedy_first_step_may_be_wrong(name):
    """From knot 1 every step is free but the last, which is dear: the knot before decides."""
    first = torch.tensor([math.nan, 0.0, 1.0, math.inf], dtype=F64)
    cost = torch.full((4, 4, 4), math.inf, dtype=F64)
    cost[0, 1, 2], cost[0, 1, 3], cost[0, 2, 3], cost[1, 2, 3] = 0.0, 5.0, 1.0, 9.0
    with backend(name):
        value, parent = bellman_pairs(first, cost, 3)
    assert value[:, :, 3].amin(1).tolist() == [math.inf, math.inf, 2.0, 9.0]
    assert path(value, parent, 2) == [0, 2, 3]
    assert path(value, parent, 3) == [0, 1, 2, 3]


@EVERY
def test_forbidden_steps(name):
    """Only the path 0 -> 2 -> 3 -> 5 is open."""
    first, cost = torch.full((6,), math.inf, dtype=F64), torch.full((6, 6, 6), math.inf, dtype=F64)
    first[2], cost[0, 2, 3], cost[2, 3, 5] = 1.0, 2.0, 4.0
    with backend(name):
        value, parent = bellman_pairs(first, cost, 5)
    reached = {(0, 0, 0): 0.0, (1, 0, 2): 1.0, (2, 2, 3): 3.0, (3, 3, 5): 7.0}
    for at in itertools.product(range(6), range(6), range(6)):
        assert value[at] == reached.get(at, math.inf)
    assert path(value, parent, 3) == [0, 2, 3, 5]
    assert int((parent >= 0).sum()) == 2


@EVERY
@pytest.mark.parametrize("sign", [1, -1])
def test_sums_that_overflow(sign, name):
    """To Inf: unreachable. To -Inf: a value as any other, from which a forbidden step stays forbidden."""
    first, cost = torch.full((5,), 1.7e308 * sign, dtype=F64), torch.full((5, 5, 5), 1.7e308 * sign, dtype=F64)
    cost[1, 2, 3] = math.inf
    with backend(name):
        value, parent = bellman_pairs(first, cost, 3)
    reached = value[2:] < math.inf
    assert not value.isnan().any()
    assert torch.equal(reached, parent[2:] >= 0)
    if sign > 0:
        assert not reached.any()
    else:
        assert value[2, 1, 2:].tolist() == [-math.inf] * 3
        assert value[3, 2].tolist() == [math.inf] * 4 + [-math.inf]


@EVERY
def test_one_step_of_one(name):
    with backend(name):
        value, parent = bellman_pairs(
            torch.tensor([math.nan, 3.5], dtype=F64), torch.full((2, 2, 2), math.nan, dtype=F64), 1
        )
    assert value.tolist() == [[[0, math.inf], [math.inf] * 2], [[math.inf, 3.5], [math.inf] * 2]]
    assert parent.eq(-1).all()


def random(n, seed=0):
    g = generator(seed)
    return torch.randint(4, (n,), generator=g).double(), torch.randint(4, (n, n, n), generator=g).double()


@pytest.mark.parametrize("n", [31, 32, 33, 64, 65, 100])
def test_on_a_gpu_more_knots_than_a_block_has_lanes(n):
    """Few values, so that many paths tie."""
    first, cost = random(n)
    with backend("cuda"):
        got = bellman_pairs(first, cost, 4)
    assert all(torch.equal(a, b) for a, b in zip(got, bellman_pairs(first, cost, 4), strict=True))


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize("n", [20, 40])
@pytest.mark.parametrize("where", ["first", "cost"])
def test_on_a_gpu_bad_costs_are_in_the_tables(where, n, steps):
    """For a captured graph, whose launches nobody waits for; otherwise the first one raises."""
    first, cost = random(n)
    cost[2, 3, 4], cost[1, 2, n - 1], cost[1, 3, 7] = math.nan, -math.inf, math.nan
    if where == "first":
        first[9], first[15] = -math.inf, math.nan
    value, parent = (torch.zeros(steps + 1, n, n, dtype=dtype) for dtype in (F64, torch.int64))
    place = torch.zeros((), dtype=torch.int64)
    addresses = [t.data_ptr() for t in (value, parent, place)]
    backends.cuda_module().bellman_pairs(first.data_ptr(), cost.data_ptr(), n, steps, *addresses, 0, 0)
    assert place == (9 if where == "first" else n + (1 * n + 2) * n + n - 1)
    assert value.isnan().all()
    assert parent.eq(-1).all()
    named = r"first\[9\]" if where == "first" else rf"cost\[1, 2, {n - 1}\]"
    for name in BACKENDS:
        with backend(name), pytest.raises(ValueError, match=rf"got {named} = -inf"):
            bellman_pairs(first, cost, steps)


@EVERY
@pytest.mark.parametrize("bad", [math.nan, -math.inf])
@pytest.mark.parametrize("steps", [1, 3])
def test_every_bad_cost_is_found_whatever_the_steps(bad, steps, name):
    n = 5
    at = [(0, k) for k in range(1, n)] + [(1, i, j, k) for i, j, k in itertools.combinations(range(n), 3)]
    for which, *place in at:
        both = torch.ones(n, dtype=F64), torch.ones(n, n, n, dtype=F64)
        both[which][tuple(place)] = bad
        message = rf"{'cost' if which else 'first'}: expected no NaN or -Inf .*\[{', '.join(map(str, place))}\] = {bad}"
        with backend(name), pytest.raises(ValueError, match=message):
            bellman_pairs(*both, steps)


@EVERY
def test_bad_costs_raise_under_compile_too(name):
    cost = torch.ones(5, 5, 5, dtype=F64)
    cost[1, 2, 3] = math.nan
    torch._dynamo.reset()
    with backend(name), pytest.raises(ValueError, match=r"cost: expected no NaN or -Inf where i < j < k"):
        torch.compile(bellman_pairs, fullgraph=True, backend="aot_eager")(cost[0, 0], cost, 3)


def test_leaves_the_costs_alone_and_has_no_gradient():
    first, cost = random(7)
    before = first.clone(), cost.clone()
    value, _ = bellman_pairs(first.requires_grad_(), cost.requires_grad_(), 6)
    assert not value.requires_grad
    assert torch.equal(first, before[0])
    assert torch.equal(cost, before[1])


def test_on_the_meta_device():
    first, cost = torch.empty(6, dtype=F64, device="meta"), torch.empty(6, 6, 6, dtype=F64, device="meta")
    value, parent = bellman_pairs(first, cost, 3)
    assert value.shape == parent.shape == (4, 6, 6)
    assert (value.dtype, parent.dtype, value.device.type) == (F64, torch.int64, "meta")


FIRST, COST = torch.ones(4, dtype=F64), torch.ones(4, 4, 4, dtype=F64)


@pytest.mark.parametrize(
    ("error", "message", "first", "cost", "steps"),
    [
        (TypeError, r"first: expected a torch.Tensor, got list", FIRST.tolist(), COST, 2),
        (TypeError, r"cost: expected a torch.Tensor, got list", FIRST, COST.tolist(), 2),
        (TypeError, r"first: expected torch.float64, got a torch.float32 tensor", FIRST.float(), COST, 2),
        (TypeError, r"cost: expected torch.float64, got a torch.float32 tensor", FIRST, COST.float(), 2),
        (ValueError, r"cost: expected shape \[K\+1, K\+1, K\+1\] with K >= 1, got .*\[4, 4\]", FIRST, COST[0], 2),
        (ValueError, r"cost: expected .* with K >= 1, got .*\[4, 4, 3\]", FIRST, COST[..., 1:], 2),
        (ValueError, r"cost: expected .* with K >= 1, got .*\[1, 1, 1\]", FIRST[:1], COST[:1, :1, :1], 1),
        (ValueError, r"cost: expected .* with K >= 1, got .*\[\]", FIRST[0], COST[0, 0, 0], 1),
        (ValueError, r"first: expected shape \[4\] on cpu, as cost, got .*\[3\]", FIRST[1:], COST, 2),
        (ValueError, r"first: expected shape \[4\] on cpu, as cost, got .* on meta", FIRST.to("meta"), COST, 2),
        (ValueError, r"steps: expected at least 1, got 0", FIRST, COST, 0),
        (ValueError, r"steps: expected at most K = 3, got 4", FIRST, COST, 4),
        (TypeError, r"steps: expected an integer, got 2.0", FIRST, COST, 2.0),
        (TypeError, r"steps: expected an integer, got True", FIRST, COST, True),
    ],
)  # fmt: skip
def test_errors_name_the_argument(error, message, first, cost, steps):
    with pytest.raises(error, match=message):
        bellman_pairs(first, cost, steps)
