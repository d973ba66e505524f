"""Step costs against the double loop over pairs in float64."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from _flows import (
    ElementwiseField,
    digits_teacher,
    direct_cost,
    even_grid,
    heun,
    linear_field,
    normal,
    raw_gram_cost,
    relative_error,
    uneven_grid,
)

import flowkernels as fk
from flowkernels.calibration.step_cost import StepCost

TOLERANCE = 1e-5  # of every single pair


def euler_costs_agree(v, times, tolerance=TOLERANCE):
    cost = fk.step_costs(v, times)
    expected = direct_cost(v, times)
    K = len(times) - 1
    j = torch.arange(K)
    assert cost.dtype == torch.float64
    assert cost.shape == (K + 1, K + 1)
    assert torch.equal(torch.isinf(cost), torch.ones(K + 1, K + 1, dtype=torch.bool).tril())
    assert torch.equal(cost[j, j + 1], torch.zeros(K, dtype=torch.float64))  # one Euler step is exact
    expected[j, j + 1] = 0
    if K > 1:
        assert relative_error(cost, expected) <= tolerance
    assert bool((cost[expected == 0] == 0).all())


def smooth_velocities(K, n, *shape, seed=0, dtype=torch.float64):
    """Velocities along curved trajectories, `[K, n, *shape]`."""
    return fk.rollout(ElementwiseField(), normal(n, *shape, seed=seed, dtype=torch.float64), K).v.to(dtype)


def almost_straight(K, n, dim):
    """A velocity for each sample that changes by 1e-5 of itself over the whole trajectory."""
    return (normal(n, dim, dtype=torch.float64) + 1e-5 * smooth_velocities(K, n, dim)).float()


def large_offset(K, n, dim):
    """Curved trajectories that all drift by 300 besides."""
    return (300 + smooth_velocities(K, n, dim)).float()


@pytest.mark.parametrize("times", [even_grid(100), uneven_grid(60)], ids=["even", "uneven"])
def test_digits_teacher(times):
    euler_costs_agree(fk.rollout(digits_teacher(), normal(32, 1, 8, 8), times).v, times)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("K", [1, 2, 3, 33])
def test_dtypes_and_lengths(dtype, K):
    for times in (even_grid(K), uneven_grid(K, seed=K)):
        euler_costs_agree(smooth_velocities(K, 7, 3, 5, dtype=dtype), times)


def test_float64_velocities_keep_float64_accuracy():
    times = uneven_grid(50)
    euler_costs_agree(smooth_velocities(50, 9, 11), times, tolerance=1e-11)


def test_velocities_that_jump():
    """Independent velocities at every step, the roughest trajectory there is."""
    euler_costs_agree(normal(100, 16, 10), even_grid(100))


@pytest.mark.parametrize("make", [almost_straight, large_offset])
@pytest.mark.parametrize("times", [even_grid(100), uneven_grid(100)], ids=["even", "uneven"])
def test_where_a_gram_matrix_of_raw_velocities_fails(make, times):
    v = make(100, 24, 16)
    euler_costs_agree(v, times)
    expected = direct_cost(v, times)
    j = torch.arange(100)
    expected[j, j + 1] = 0
    assert relative_error(raw_gram_cost(v, times), expected) > 100 * TOLERANCE


def test_straight_flow_costs_nothing():
    v = normal(6, 4).expand(20, 6, 4)
    cost = fk.step_costs(v, 20)
    assert bool((cost.triu(1)[torch.isfinite(cost)] == 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0.0, 300.0])
@pytest.mark.parametrize("times", [even_grid(50), uneven_grid(40)], ids=["even", "uneven"])
def test_heun_teacher(dtype, offset, times):
    """The digits' last steps are so straight that their cost is the rounding of the float32 states."""
    teacher = digits_teacher() if dtype == torch.float32 else ElementwiseField()
    x, v = heun(teacher, normal(16, 1, 8, 8, dtype=dtype), times)
    x = x + offset
    cost = fk.step_costs(v, times, x=x)
    assert relative_error(cost, direct_cost(v, times, x)) <= TOLERANCE
    assert bool((cost.diagonal(1) > 0).all())  # Heun's step is not Euler's


@pytest.mark.parametrize("K", [1, 2, 5])
def test_recorded_states_on_short_grids(K):
    times = uneven_grid(K)
    x, v = normal(K + 1, 5, 3, seed=1), normal(K, 5, 3, seed=2)  # not steps of any method
    assert relative_error(fk.step_costs(v, times, x=x), direct_cost(v, times, x)) <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_velocities_with_recorded_states(dtype):
    times = uneven_grid(30)
    x, v = heun(linear_field(), normal(10, 4), times)
    v = v.to(dtype)
    assert relative_error(fk.step_costs(v, times, x=x), direct_cost(v, times, x)) <= TOLERANCE


def test_recorded_euler_states_cost_what_euler_costs():
    traj = fk.rollout(linear_field(), normal(10, 4, dtype=torch.float64), 30)
    with_states = fk.step_costs(traj.v, traj.times, x=traj.x)
    upper = torch.ones(31, 31, dtype=torch.bool).triu(1)
    assert torch.allclose(with_states[upper], fk.step_costs(traj.v, traj.times)[upper], rtol=1e-9, atol=1e-24)


def test_layouts_give_the_same_costs():
    times = uneven_grid(12)
    v = smooth_velocities(12, 6, 4, 5, dtype=torch.float32)
    expected = direct_cost(v, times)
    expected.diagonal(1).zero_()
    wide = torch.empty(12, 6, 4, 10)[..., ::2].copy_(v)
    for layout in (
        v.transpose(2, 3).contiguous().transpose(2, 3),
        v.transpose(0, 1).contiguous().transpose(0, 1),
        wide,
    ):
        assert not layout.is_contiguous()
        assert relative_error(fk.step_costs(layout, times), expected) <= TOLERANCE


@pytest.mark.parametrize("states", [False, True], ids=["euler", "recorded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chunks_add_up(states, dtype):
    times = uneven_grid(25)
    x, v = heun(linear_field(6), normal(20, 6, dtype=dtype), times)
    kept = x if states else None
    whole, chunked = StepCost(times, states=states), StepCost(times, states=states)
    whole.update(v, kept)
    for rows in (slice(0, 1), slice(1, 8), slice(8, 20)):
        chunked.update(v[:, rows], x[:, rows] if states else None)
    assert chunked.count == whole.count == 20
    expected = direct_cost(v, times, kept)
    if not states:
        expected.diagonal(1).zero_()
    for costs in (whole, chunked):
        assert relative_error(costs.cost(), expected) <= (1e-11 if dtype == torch.float64 else TOLERANCE)


@pytest.mark.parametrize("states", [False, True], ids=["euler", "recorded"])
def test_merge_and_all_reduce_are_one_sum(states):
    times = uneven_grid(10)
    x, v = heun(linear_field(), normal(9, 4), times)

    def accumulated(*parts):
        costs = StepCost(times, states=states)
        for rows in parts:
            costs.update(v[:, rows], x[:, rows] if states else None)
        return costs

    whole = accumulated(slice(0, 5), slice(5, 9))
    merged = accumulated(slice(0, 5)).merge(accumulated(slice(5, 9)))
    reduced = accumulated(slice(0, 5))
    reduced.state += accumulated(slice(5, 9)).state
    for costs in (merged, reduced):
        assert costs.count == 9
        assert torch.equal(costs.state, whole.state)
        assert torch.equal(costs.cost(), whole.cost())
    assert whole.state.numel() == ((19 if states else 9) ** 2 + 1)


def test_all_reduce_over_two_processes(tmp_path):
    torch.save(normal(12, 8, 5), tmp_path / "v.pt")
    program = textwrap.dedent("""
        import sys, torch, torch.distributed as dist
        import flowkernels as fk
        folder, rank = sys.argv[1], int(sys.argv[2])
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
        v = torch.load(f"{folder}/v.pt")
        costs = fk.StepCost(12).update(v[:, :3] if rank == 0 else v[:, 3:])
        dist.all_reduce(costs.state)
        torch.save(costs.cost(), f"{folder}/cost{rank}.pt")
        dist.destroy_process_group()
    """)
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen([sys.executable, "-c", program, str(tmp_path), str(rank)], env=environment) for rank in (0, 1)
    ]
    try:
        assert [p.wait(timeout=120) for p in ranks] == [0, 0]
    finally:
        for p in ranks:
            p.kill()
    first, second = (torch.load(tmp_path / f"cost{rank}.pt") for rank in (0, 1))
    v = torch.load(tmp_path / "v.pt")
    assert torch.equal(first, second)
    expected = direct_cost(v, even_grid(12))
    expected.diagonal(1).zero_()
    assert relative_error(first, expected) <= TOLERANCE


def test_bad_velocities_add_nothing():
    costs = StepCost(6)
    good = normal(6, 4, 3)
    costs.update(good)
    before = costs.state.clone()
    for value in (torch.nan, torch.inf):
        bad = good.clone()
        bad[2, 3, 1] = value
        with pytest.raises(ValueError, match=r"^v: .*sample 3 at step 2"):
            costs.update(bad)
    assert torch.equal(costs.state, before)


def test_bad_states_are_named():
    x, v = normal(4, 5, 2), normal(3, 5, 2)
    x[3, 1, 0] = torch.nan
    with pytest.raises(ValueError, match=r"^x: .*sample 1 at step 3"):
        fk.step_costs(v, 3, x=x)
    single = normal(1, 3, 2)
    single[0, 2] = torch.inf
    with pytest.raises(ValueError, match=r"^v: .*sample 2 at step 0"):  # K = 1 has no increments to show it
        fk.step_costs(single, 1)


def test_overflow_of_finite_velocities_is_named():
    v = torch.full((3, 2, 2), 3e38)
    v[1] *= -1
    with pytest.raises(
        ValueError, match=r"^v: expected velocities whose squared increments are finite, got an overflow"
    ):
        fk.step_costs(v, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fk.step_costs([[1.0]], 1), TypeError, r"^v: expected a torch.Tensor, got list"),
        (lambda: fk.step_costs(torch.ones(3, 4), 3), ValueError, r"^v: .*\[K, n, \*shape\], got .*\[3, 4\]"),
        (lambda: fk.step_costs(torch.ones(3, 4, 2), 4), ValueError, r"^v: expected K = 4 velocities.*\[3, 4, 2\]"),
        (lambda: fk.step_costs(torch.ones(3, 0, 2), 3), ValueError, r"^v: .*at least one sample.*\[3, 0, 2\]"),
        (lambda: fk.step_costs(torch.ones(3, 4, 0), 3), ValueError, r"^v: .*one feature.*\[3, 4, 0\]"),
        (lambda: fk.step_costs(torch.ones(3, 4, 2, dtype=torch.int64), 3), TypeError, r"^v: .*got a torch.int64"),
        (lambda: fk.step_costs(torch.ones(3, 4, 2, device="meta"), 3), ValueError, r"^v: .*data.*meta"),
        (lambda: fk.step_costs(torch.ones(3, 4, 2), [0, 0.5, 0.4, 1]), ValueError, r"^times: .*increasing.*0.5"),
        (lambda: fk.step_costs(torch.ones(3, 4, 2), 3, x=torch.ones(3, 4, 2)), ValueError, r"^x: .*\[4, 4, 2\]"),
        (lambda: fk.step_costs(torch.ones(3, 4, 2), 3, x=[0.0]), TypeError, r"^x: expected a torch.Tensor"),
        (lambda: StepCost(3).update(torch.ones(3, 4, 2), torch.ones(4, 4, 2)), ValueError, r"^x: expected None"),
        (lambda: StepCost(3, states=True).update(torch.ones(3, 4, 2)), ValueError, r"^x: expected states, got None"),
        (lambda: StepCost(3).merge(StepCost(4)), ValueError, r"^other: .*same times"),
        (lambda: StepCost(3).merge(StepCost(3, states=True)), ValueError, r"^other: .*same kind"),
        (lambda: StepCost(3).merge(3), ValueError, r"^other: expected a StepCost"),
        (lambda: StepCost(3).cost(), ValueError, r"at least one update, got none"),
        (lambda: StepCost(0), ValueError, r"^times: expected at least 1 step, got 0"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
