import math

import pytest
import torch
from _pairs import pairs
from hypothesis import given
from hypothesis import strategies as st

from flowkernels.ops.cost_from_gram import cost_from_gram
from flowkernels.ops.samples import generator
from flowkernels.ops.velocity_gram import triton_kernel, velocity_gram
from flowkernels.ops.velocity_gram.samples import Sample, arrange, error_and_bound, sample_inputs, truth_and_allowed
from flowkernels.runtime.backends import BACKENDS, backend

SHAPES = st.tuples(st.integers(1, 14), st.integers(1, 5), st.integers(1, 40))
SEEDS = st.integers(0, 2**32 - 1)


def integers(shape, seed, dtype=torch.float32):
    """Whole numbers, small enough that every sum of products is exact in float32."""
    return torch.randint(-8, 9, shape, generator=generator(seed)).to(dtype)


def states(v, times, seed):
    """States near the Euler steps of `v`, and the same in `v`'s dtype."""
    g = generator(seed)
    noise = torch.randn(len(v) + 1, *v.shape[1:], generator=g, dtype=torch.float64)
    moves = times.diff().view(-1, *[1] * (v.dim() - 1)) * v.double()
    return (0.1 * noise + torch.cat([noise[:1], moves]).cumsum(0)).to(v.dtype)


# ---- properties; whole numbers make them exact ----


@given(SHAPES, SEEDS, st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
def test_is_the_gram_matrix_of_the_increments(shape, seed, dtype):
    v = integers(shape, seed, dtype)
    gram = velocity_gram(v)
    a = v.double().flatten(1).diff(dim=0)
    assert gram.dtype == torch.float64
    assert gram.shape == (len(v) - 1, len(v) - 1)
    assert torch.equal(gram, a @ a.T)


@given(SHAPES, SEEDS)
def test_adds_over_columns(shape, seed):
    v = integers(shape, seed)
    cut = seed % (shape[2] + 1)
    assert torch.equal(velocity_gram(v), velocity_gram(v[..., :cut]) + velocity_gram(v[..., cut:]))


@given(SHAPES, SEEDS)
def test_adds_over_samples(shape, seed):
    v = integers(shape, seed)
    assert torch.equal(velocity_gram(v), sum(velocity_gram(v[:, i]) for i in range(shape[1])))


@given(SHAPES, SEEDS, st.integers(-3, 3))
def test_is_quadratic_in_v_and_ignores_a_common_offset(shape, seed, offset):
    v = integers(shape, seed)
    gram = velocity_gram(v)
    assert torch.equal(velocity_gram(-4 * v), 16 * gram)
    assert torch.equal(velocity_gram(v + offset), gram)
    assert torch.equal(velocity_gram(v + integers(shape[1:], seed + 1)), gram)


@given(SHAPES, SEEDS)
def test_columns_in_any_order(shape, seed):
    v = integers(shape, seed)
    order = torch.randperm(shape[2], generator=generator(seed))
    assert torch.equal(velocity_gram(v[..., order]), velocity_gram(v))
    assert torch.equal(velocity_gram(v.unsqueeze(2).transpose(1, 3)), velocity_gram(v))


@given(SHAPES, SEEDS, st.booleans())
def test_is_symmetric_and_positive_semidefinite(shape, seed, with_states):
    v = torch.randn(shape, generator=generator(seed))
    times = torch.linspace(0, 1, shape[0] + 1, dtype=torch.float64)
    x = states(v, times, seed) if with_states else None
    gram = velocity_gram(v, x=x, times=times if with_states else None)
    assert torch.equal(gram, gram.T)
    if len(gram):
        # errors of the entries move an eigenvalue by no more than their norm
        *_, allowed = truth_and_allowed(Sample("", (v,), dict(x=x, times=times) if with_states else {}))
        assert torch.linalg.eigvalsh(gram)[0] >= -allowed.norm()


@given(SHAPES, SEEDS)
def test_with_states(shape, seed):
    """Steps of 1/2^k and whole numbers: secants are exact, so both blocks and the mixed one are."""
    v = integers(shape, seed)
    x = integers((shape[0] + 1, *shape[1:]), seed + 1)
    times = torch.tensor([1 - 2.0**-i for i in range(shape[0])] + [1.0], dtype=torch.float64)
    u = x.double().diff(dim=0) / times.diff().view(-1, 1, 1)
    rows = torch.cat([u.diff(dim=0), u - v]).flatten(1)
    assert torch.equal(velocity_gram(v.double(), x=x.double(), times=times), rows @ rows.T)
    sample = Sample("", (v,), dict(x=x, times=times))
    error, bound = error_and_bound(sample, velocity_gram(v, x=x, times=times))
    assert error <= bound


def test_step_cost_from_the_gram_matrix():
    """c(j, k) as a mean of squared distances, and as a quadratic form of the Gram matrix."""
    K, n = 7, 4
    g = generator(0)
    v = torch.randn(K, n, 5, generator=g, dtype=torch.float64)
    t = torch.cat([torch.zeros(1), torch.rand(K, generator=g).add(0.5).cumsum(0)]).double()
    t = t / t[-1]
    euler = torch.cat([v.new_zeros(1, n, 5), (t.diff().view(-1, 1, 1) * v).cumsum(0)])
    other = states(v, t, 1)
    A, B = velocity_gram(v) / n, velocity_gram(v, x=other, times=t) / n
    for j in range(K):
        for k in range(j + 1, K + 1):
            w = torch.zeros(2 * K - 1, dtype=torch.float64)
            w[j : k - 1] = t[k] - t[j + 1 : k]
            w[K - 1 + j] = t[k] - t[j]
            for x, cost in ((euler, w[: K - 1] @ A @ w[: K - 1]), (other, w @ B @ w)):
                direct = (x[k] - x[j] - (t[k] - t[j]) * v[j]).square().sum() / n
                torch.testing.assert_close(cost, direct, rtol=1e-12, atol=1e-28)


# ---- values that are not finite, sizes and layouts at the edge ----


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_nan_and_inf_show_in_the_rows_they_touch(bad, dtype):
    v = integers((11, 3, 25), 0, dtype)
    clean = velocity_gram(v)
    v[4, 1, 7] = bad
    gram = velocity_gram(v)
    touched = torch.zeros(10, dtype=torch.bool)
    touched[3:5] = True  # a_4 = v_4 - v_3 and a_5 = v_5 - v_4
    touched = touched[:, None] | touched
    assert not gram[touched].isfinite().any()
    assert torch.equal(gram[~touched], clean[~touched])
    with backend("reference"):
        torch.testing.assert_close(gram, velocity_gram(v), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_inf_in_states(bad):
    v, x = integers((6, 2, 19), 0), integers((7, 2, 19), 1)
    x[3, 1, 5] = bad
    gram = velocity_gram(v, x=x, times=6)
    with backend("reference"):
        expected = velocity_gram(v, x=x, times=6)
    assert torch.equal(gram.isfinite(), expected.isfinite())
    assert torch.equal(gram.isnan(), expected.isnan())
    finite = gram.isfinite().any(1)
    # x_3 is in u_2 and u_3, so in a_2, a_3, a_4 and e_2, e_3
    assert (~finite).nonzero().flatten().tolist() == [1, 2, 3, 7, 8]


@pytest.mark.parametrize("name", BACKENDS)
def test_range_of_half_precision(name):
    """Increments and products that a half-precision type cannot hold."""
    v = torch.tensor([[65504.0], [-65504.0], [2.0**-24]], dtype=torch.float16)
    a = v.double().diff(dim=0)
    with backend(name):
        torch.testing.assert_close(velocity_gram(v), a @ a.T, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_value_is_read_right(dtype):
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    for part in values.split(64):
        squares = part.float().square().double()
        v = torch.stack([torch.zeros_like(part), part], 1).view(-1, 1)
        euler = velocity_gram(v).diagonal()[::2]  # a_1 = v_1 - 0, a_3 = v_3 - 0
        torch.testing.assert_close(euler, squares, rtol=0, atol=0, equal_nan=True)
        states = velocity_gram(part[:, None], x=torch.zeros(65, 1), times=64).diagonal()[63:]  # e_j = 0 - v_j
        torch.testing.assert_close(states, squares, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 5, 7), (1, 0), (3, 0), (3, 0, 4), (2, 5, 0)])
def test_sizes_without_columns_or_increments(shape, name):
    K = shape[0]
    with backend(name):
        assert torch.equal(velocity_gram(torch.ones(shape)), torch.zeros(K - 1, K - 1, dtype=torch.float64))
        x = torch.zeros(K + 1, *shape[1:])
        expected = torch.zeros(2 * K - 1, 2 * K - 1, dtype=torch.float64)
        expected[K - 1 :, K - 1 :] = math.prod(shape[1:])  # e_j = 0 - 1
        assert torch.equal(velocity_gram(torch.ones(shape), x=x, times=K), expected)


def test_equal_velocities_cost_nothing():
    v = torch.randn(1, 3, 50, generator=generator(0)).expand(9, 3, 50)
    assert torch.equal(velocity_gram(v), torch.zeros(8, 8, dtype=torch.float64))


def test_increments_keep_what_a_raw_gram_matrix_cancels():
    """Velocities that agree in their first five digits; the increments are exact, so the error stays a few ulp."""
    g = generator(0)
    v = 100 + 1e-3 * torch.randn(9, 4, 300, generator=g)
    error, bound = error_and_bound(Sample("", (v,), {}), velocity_gram(v))
    assert error <= bound < 1e-5


@pytest.mark.parametrize("layout", ["misaligned", "sliced", "permuted", "reversed", "channels_last"])
def test_every_layout_gives_the_same(layout):
    v = integers((7, 3, 5, 3, 11), 0)
    x = integers((8, 3, 5, 3, 11), 1)
    assert torch.equal(velocity_gram(arrange(v, layout)), velocity_gram(v))
    with_states = velocity_gram(v, x=x, times=7)
    # the sums come in another order, and 7 steps do not divide exactly
    for v_layout, x_layout in ((layout, "contiguous"), ("contiguous", layout), (layout, layout)):
        got = velocity_gram(arrange(v, v_layout), x=arrange(x, x_layout), times=7)
        error, bound = error_and_bound(
            Sample("", (v,), dict(x=x, times=torch.linspace(0, 1, 8, dtype=torch.float64))), got
        )
        assert error <= bound
        torch.testing.assert_close(got, with_states, rtol=1e-5, atol=1e-5 * with_states.max().item())


def test_overlapping_windows():
    """Rows that share memory: v_m is v_{m-1} moved by one element."""
    v = integers((1, 40), 0).flatten().as_strided((9, 30), (1, 1))
    assert torch.equal(velocity_gram(v), velocity_gram(v.clone()))


def test_times_in_every_form():
    v, x = integers((4, 2, 5), 0), integers((5, 2, 5), 1)
    expected = velocity_gram(v, x=x, times=4)
    for times in ([0, 0.25, 0.5, 0.75, 1], (0.0, 0.25, 0.5, 0.75, 1.0), torch.linspace(0, 1, 5)):
        assert torch.equal(velocity_gram(v, x=x, times=times), expected)


def test_states_of_another_dtype():
    v, x = integers((4, 2, 5), 0), integers((5, 2, 5), 1)
    expected = velocity_gram(v, x=x, times=4)
    assert torch.equal(velocity_gram(v.bfloat16(), x=x, times=4), expected)
    assert torch.equal(velocity_gram(v, x=x.half(), times=4), expected)
    wide = velocity_gram(v.double(), x=x.double(), times=4)
    assert torch.equal(velocity_gram(v, x=x.double(), times=4), wide)
    assert torch.equal(velocity_gram(v.bfloat16().double(), x=x, times=4), wide)


@pytest.mark.parametrize("sample", [s for s in sample_inputs() if s.kwargs], ids=lambda s: s.id)
def test_without_states_is_a_block_of_the_euler_case(sample):
    """States that are Euler steps of `v`: the increments of the secants are those of `v`, and e_j vanishes."""
    v = sample.args[0].double()
    times = sample.kwargs["times"]
    moves = times.diff().view(-1, *[1] * (v.dim() - 1)) * v
    x = torch.cat([torch.zeros_like(v[:1]), moves.cumsum(0)])
    gram, plain = velocity_gram(v, x=x, times=times), velocity_gram(v)
    K = len(v)
    # a secant divides a difference of states of the size of x, rounded, by a step
    size = (x.abs().max() if x.numel() else x.new_zeros(())) * math.sqrt(v[0].numel())
    noise = 8 * torch.finfo(torch.float64).eps * size / times.diff().min()
    norms = plain.diagonal().sqrt()
    assert ((gram[: K - 1, : K - 1] - plain).abs() <= noise * (norms + norms[:, None] + noise)).all()
    assert (gram.diagonal()[K - 1 :] <= noise**2).all()


@pytest.mark.parametrize("times", [4, [0, 0.25, 0.5, 0.75, 1], torch.linspace(0, 1, 5)], ids=["int", "list", "tensor"])
def test_compiles_with_times_in_every_form(times):
    v, x = integers((4, 2, 5), 0), integers((5, 2, 5), 1)
    torch._dynamo.reset()
    compiled = torch.compile(velocity_gram, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(v, x=x, times=times), velocity_gram(v, x=x, times=times))


def test_on_the_meta_device():
    v = torch.empty(4, 2, 5, device="meta")
    assert velocity_gram(v).shape == (3, 3)
    gram = velocity_gram(v, x=torch.empty(5, 2, 5, device="meta"), times=4)
    assert (gram.shape, gram.dtype, gram.device.type) == ((7, 7), torch.float64, "meta")


# ---- errors ----

V, X = torch.ones(3, 2, 5), torch.ones(4, 2, 5)


@pytest.mark.parametrize(
    ("error", "message", "args", "kwargs"),
    [
        (TypeError, r"v: expected a torch.Tensor, got list", ([1.0],), {}),
        (TypeError, r"v: expected .*float32.*, got a torch.int64 tensor of shape \[3, 2, 5\]", (V.long(),), {}),
        (TypeError, r"v: expected .*float32.*, got a torch.complex64", (V.to(torch.complex64),), {}),
        (ValueError, r"v: expected shape \[K, n, \*shape\] with K >= 1, got .*\[3\]", (torch.ones(3),), {}),
        (ValueError, r"v: expected shape \[K, n, \*shape\] with K >= 1, got .*\[0, 3\]", (torch.ones(0, 3),), {}),
        (ValueError, r"times: expected None without x, got 3", (V,), dict(times=3)),
        (TypeError, r"x: expected a torch.Tensor, got str", (V,), dict(x="x", times=3)),
        (TypeError, r"x: expected .*, got a torch.int32 tensor", (V,), dict(x=X.int(), times=3)),
        (ValueError, r"x: expected shape \[4, 2, 5\].*, got .*\[3, 2, 5\]", (V,), dict(x=V, times=3)),
        (ValueError, r"x: expected shape \[4, 2, 5\].*, got .*\[4, 10\]", (V,), dict(x=X.flatten(1), times=3)),
        (ValueError, r"x: expected a tensor on v's device cpu, got .* on meta", (V,), dict(x=X.to("meta"), times=3)),
        (ValueError, r"times: expected the K\+1 knots, with x, got None", (V,), dict(x=X)),
        (ValueError, r"times: expected 4 knots, one for each state, got 5", (V,), dict(x=X, times=4)),
        (ValueError, r"times: expected at least 1 step, got 0", (V,), dict(x=X, times=0)),
        (TypeError, r"times: expected a number of steps or a sequence of times", (V,), dict(x=X, times="three")),
        (ValueError, r"times: expected finite times", (V,), dict(x=X, times=[0, math.nan, 0.6, 1])),
        (
            ValueError,
            r"times: expected strictly increasing times, got times\[1\] = 0.5, times\[2\] = 0.4",
            (V,),
            dict(x=X, times=[0, 0.5, 0.4, 1]),
        ),
        (
            ValueError,
            r"times: expected times from 0 \(noise\), or later, to 1 \(data\), got times from 0 to 0.9",
            (V,),
            dict(x=X, times=[0, 0.3, 0.6, 0.9]),
        ),
    ],
)
def test_errors_name_the_argument(error, message, args, kwargs):
    with pytest.raises(error, match=message):
        velocity_gram(*args, **kwargs)


def test_the_result_needs_no_gradient():
    v = torch.randn(4, 3, 2, generator=generator(0), requires_grad=True)
    assert not velocity_gram(v).requires_grad


# ---- many rows and columns: on processors that have it, the matrix unit ----


def increments_of(rows):
    """Velocities with these increments, exact in float32 for whole numbers."""
    return torch.cat([torch.zeros_like(rows[:1]), rows]).cumsum(0)


@pytest.mark.parametrize("K", [65, 66, 81, 97, 98, 129])
def test_many_rows_are_exact_for_whole_numbers(K):
    rows = integers((K - 1, 4101), K)
    v = increments_of(rows)[:, None]
    for velocities in (v, v.double()):
        assert torch.equal(velocity_gram(velocities), rows.double() @ rows.double().T)


def test_many_rows_keep_sixteen_bits_and_more():
    """Increments of 24 significant bits: products of low parts with high ones count, and the squares of low ones."""
    rows = 1 + torch.rand(70, 5000, generator=generator(0))
    v = rows.cumsum(0)[:, None]
    a = v.flatten(1).double().diff(dim=0)
    gram, truth = velocity_gram(v), a @ a.T
    error = (gram - truth).abs() / truth
    assert error.max() < 1e-6
    assert error.diagonal().max() < 3e-7


def test_identical_rows_lose_no_more_than_said():
    rows = torch.rand(1, 5000, generator=generator(0)).expand(80, -1)
    v = torch.arange(81)[:, None, None] * rows[:1].bfloat16().float()[None, 0] + 0.0
    a = v.flatten(1).double().diff(dim=0)
    truth = a @ a.T
    assert ((velocity_gram(v) - truth).abs() / truth).max() < 2**-16 / 3


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_and_inf_among_many_rows(bad, dtype):
    v = integers((70, 1, 4100), 0).to(dtype)
    v[4, 0, 7] = bad
    with backend("reference"):
        expected = velocity_gram(v)
    assert expected.isfinite().any()
    torch.testing.assert_close(velocity_gram(v), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("scale", [1e-36, 1e-25, 1e-17, 1e17])
def test_many_rows_of_any_size(scale):
    """Squares near the ends of float32's range, and products below it."""
    v = scale * torch.randn(70, 1, 4100, generator=generator(0))
    gram = velocity_gram(v)
    if scale < 1e-20:  # float32 does not hold the squares
        assert not gram.any()
        return
    error, bound = error_and_bound(Sample("", (v,), {}), gram)
    assert error <= bound


def test_many_rows_whose_squares_are_subnormal():
    """As with few rows: what float32 still holds of them is there."""
    v = 1e-21 * torch.randn(70, 1, 4100, generator=generator(0))
    few = velocity_gram(v[:10])
    assert (few.diagonal() > 0).all()
    torch.testing.assert_close(velocity_gram(v)[:9, :9], few, rtol=1e-2, atol=1e-41)


def test_many_rows_in_parts():
    """Chunks and threads: whole numbers, so every split gives the same bits."""
    v = increments_of(integers((75, 9000), 3))[:, None]
    whole = velocity_gram(v)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(velocity_gram(v), whole)
    assert torch.equal(velocity_gram(v[..., :5000]) + velocity_gram(v[..., 5000:]), whole)


# ---- kernels of a GPU: in CUDA compiled for the host, in Triton interpreted ----

ON_GPU = pytest.mark.parametrize("name", BACKENDS[:2])


PANELS = [2, 16, 17, 18, 33, 34, 65, 66, 97, 98, 100, 128, 129, 130]


@pytest.mark.parametrize(
    ("K", "name", "dtype"), pairs(PANELS, BACKENDS[:2], [torch.float32, torch.bfloat16, torch.float16])
)
def test_gpu_panels_of_rows(K, name, dtype):
    """Around 16, 32, 64, 96 and 128 rows, the sizes of a block's panel; columns around those of its slabs, 256 to 32.
    Whole numbers of four bits: every sum of 500 products is exact, however it is cut."""
    for M in (1, 33) if K > 34 else (31, 255, 257, 515):
        v = integers((K, 1, M), K, dtype)
        a = v.double().flatten(1).diff(dim=0)
        with backend(name):
            assert torch.equal(velocity_gram(v), a @ a.T)


@ON_GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gpu_error_of_gram_and_costs(name, dtype):
    """1e-5 of |a_i| |a_j|, and of every step cost, for velocities that change slowly."""
    K, g = 24, generator(0)
    v = (torch.randn(2, 300, generator=g) + 0.02 * torch.randn(K, 2, 300, generator=g).cumsum(0)).to(dtype)
    a = v.double().flatten(1).diff(dim=0)
    truth = a @ a.T
    with backend(name):
        gram = velocity_gram(v)
    norms = truth.diagonal().sqrt()
    assert ((gram - truth).abs() / (norms[:, None] * norms)).max() < 1e-6
    cost, expected = cost_from_gram(gram, K), cost_from_gram(truth, K)
    torch.testing.assert_close(cost, expected, rtol=1e-6, atol=0)


@ON_GPU
@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e-12, 1e11])
def test_gpu_increments_of_any_size(name, scale):
    """Rows and columns of very different sizes have scales of their own; half's range is not float32's."""
    g = generator(0)
    v = torch.randn(10, 1, 300, generator=g) * torch.logspace(0, -6, 10)[:, None, None]
    v[:, :, 7::32] *= 1e6
    v *= scale
    a = v.double().flatten(1).diff(dim=0)
    norms = a.norm(dim=1)
    with backend(name):
        error = (velocity_gram(v) - a @ a.T).abs()
    # float32 holds products of the size of its smallest number, and no smaller
    assert (error <= 1e-6 * norms[:, None] * norms + 300 * 2.0**-149).all()


@ON_GPU
@pytest.mark.parametrize(("K", "M"), [(10, 9000), (30, 4500), (60, 2500), (100, 1500), (140, 600)])
def test_gpu_rows_that_grow(name, K, M):
    """A kernel that keeps a row's scale has to lower it as larger columns come, with what it has summed so far: in some
    rows only, in none where they shrink."""
    g = generator(0)
    v = torch.randn(K, 1, M, generator=g)
    columns = torch.arange(M) * (45 / M)
    v[1::3] *= 2.0**columns
    v[2::3] *= 2.0**-columns
    v[:, :, : M // 9] *= 1e-3  # the first slabs
    a = v.double().flatten(1).diff(dim=0)
    truth, norms = a @ a.T, a.norm(dim=1)
    with backend(name):
        error = (velocity_gram(v) - truth).abs()
    assert (error <= 1e-6 * norms[:, None] * norms).all()


@ON_GPU
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("K", [11, 40, 70])
def test_gpu_nan_and_inf_show_in_the_rows_they_touch(name, K, bad):
    v = integers((K, 1, 70), 0)
    with backend(name):
        clean = velocity_gram(v)
        v[4, 0, 7] = bad
        gram = velocity_gram(v)
    touched = torch.zeros(K - 1, dtype=torch.bool)
    touched[3:5] = True
    touched = touched[:, None] | touched
    assert not gram[touched].isfinite().any()
    assert torch.equal(gram[~touched], clean[~touched])


@ON_GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gpu_rows_that_are_not_aligned(name, dtype):
    """Rows an odd number of elements apart, and 16-byte words that end beyond the last column."""
    wide = integers((20, 133), 0, dtype)
    for v in (wide[:, 1:], wide[:, :100], wide[:, 5:6], wide[:, :128].clone()[:, :101]):
        a = v.double().diff(dim=0)
        with backend(name):
            assert torch.equal(velocity_gram(v[:, None]), a @ a.T)


@pytest.mark.parametrize("constants", [{}, {"WARPS": 100}, {"BLOCKS": 1}, {"ROWS": 2000}, {"WARPS": 9, "ROWS": 5000}])
def test_triton_columns_in_parts(constants, monkeypatch):
    """Slices, and chunks of rows from states, that do not divide the columns. Whole numbers and steps of 1/2^k, so
    every cut gives the same bits."""
    for name, value in constants.items():
        monkeypatch.setattr(triton_kernel, name, value)
    times = torch.tensor([1 - 2.0**-i for i in range(7)] + [1.0], dtype=torch.float64)
    v, x = integers((7, 3, 115), 0, torch.float64), integers((8, 3, 115), 1, torch.float64)
    u = x.diff(dim=0) / times.diff().view(-1, 1, 1)
    increments, with_states = v.flatten(1).diff(dim=0), torch.cat([u.diff(dim=0), u - v]).flatten(1)
    with backend("triton"):
        for dtype in (torch.float32, torch.float64):
            assert torch.equal(velocity_gram(v.to(dtype)), increments @ increments.T)
        assert torch.equal(velocity_gram(v, x=x, times=times), with_states @ with_states.T)
        sample = Sample("", (v.bfloat16(),), dict(x=x.float(), times=times))
        error, bound = error_and_bound(sample, velocity_gram(*sample.args, **sample.kwargs))
        assert error <= bound


def test_triton_slices_are_short_and_fill_the_device():
    config = {"COLUMNS": 16, "num_warps": 4}
    for M, tiles in ((1, 1), (17, 3), (100_000, 6), (30_000_000, 3)):
        slices, columns = triton_kernel._slices(torch.empty(0), M, tiles, config)
        assert columns % 16 == 0
        assert (slices - 1) * columns < M <= slices * columns
        assert columns <= 16 * triton_kernel.BLOCKS


def test_times_that_are_every_other_of_others():
    """The knots are read by address."""
    v, x = torch.randn(4, 3, 5), torch.randn(5, 3, 5)
    grid = torch.linspace(0, 1, 9, dtype=torch.float64).square()
    for name in BACKENDS:
        with backend(name):
            got = velocity_gram(v, x=x, times=grid[::2])
            assert torch.equal(got, velocity_gram(v, x=x, times=grid[::2].tolist()))
