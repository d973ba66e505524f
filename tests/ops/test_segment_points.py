import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowkernels.ops.samples import Sample, arrange, generator
from flowkernels.ops.segment_points import segment_points
from flowkernels.ops.segment_points.samples import error_and_bound, places
from flowkernels.runtime.backends import BACKENDS, backend

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
SHAPES = st.tuples(st.integers(2, 5), st.integers(1, 4), st.integers(0, 70))
SEEDS = st.integers(0, 2**32 - 1)
DTYPES = st.sampled_from([(F32, None), (F32, F32), (F32, BF16), (F32, F16), (F64, None), (F64, BF16), (F64, F16)])
EACH = pytest.mark.parametrize("name", BACKENDS)
RAISING = pytest.mark.parametrize("name", ["cpu", "reference"])
ON_A_GPU = pytest.mark.parametrize("name", ["cuda", "triton"])


def drawn(shape, batch, seed, dtype=F32):
    """A bank of whole numbers, places in it and u in eighths: every operation is exact, in bfloat16 too."""
    g = generator(seed)
    bank = torch.randint(-8, 9, shape, generator=g).to(dtype)
    return bank, *places(shape[0], shape[1], batch, g), torch.randint(9, (batch,), generator=g) / 8


def looked_up(bank, interval, sample):
    """`(x_a, x_b)` by one plain look-up after another."""
    empty = bank.new_empty(0, *bank.shape[2:])
    pairs = list(zip(interval.tolist(), sample.tolist(), strict=True))
    return tuple(torch.stack([bank[i + k, s] for i, s in pairs]) if pairs else empty for k in (0, 1))


# ---- properties; whole numbers and eighths make them exact ----


@given(SHAPES, st.integers(0, 9), SEEDS, DTYPES, st.sampled_from(BACKENDS))
def test_is_on_the_segment(shape, batch, seed, dtypes, name):
    bank, i, s, u = drawn(shape, batch, seed, dtypes[0])
    a, b = looked_up(bank, i, s)
    with backend(name):
        got = segment_points(bank, i, s, u, dtype=dtypes[1])
        ends = [segment_points(bank, i, s, torch.full((batch,), end), dtype=dtypes[1]) for end in (0.0, 1.0)]
        start = segment_points(bank, i, s, dtype=dtypes[1])
    want = dtypes[1] or dtypes[0]
    assert got.dtype == want
    assert torch.equal(got, (a + u[:, None].to(a) * (b - a)).to(want))
    assert torch.equal(ends[0], a.to(want))
    assert torch.equal(ends[1], b.to(want))
    assert torch.equal(start, a.to(want))


@given(SHAPES, SEEDS)
def test_a_segment_walked_from_both_ends(shape, seed):
    """The reversed bank at 1 - u is the same point."""
    bank, i, s, u = drawn(shape, 7, seed)
    back = segment_points(bank.flip(0), len(bank) - 2 - i, s, 1 - u)
    assert torch.equal(segment_points(bank, i, s, u), back)


@given(SHAPES, SEEDS, st.permutations(range(7)))
def test_rows_do_not_meet(shape, seed, order):
    bank, i, s, u = drawn(shape, 7, seed)
    whole = segment_points(bank, i, s, u)
    assert torch.equal(segment_points(bank, i[order], s[order], u[order]), whole[order])
    for b in range(7):
        assert torch.equal(segment_points(bank, i[b : b + 1], s[b : b + 1], u[b : b + 1]), whole[b : b + 1])


@given(SEEDS, st.floats(-3, 3), st.sampled_from(BACKENDS))
def test_a_line_in_float64(seed, u, name):
    """A bank on a line, x = (i + s) d: u extends it beyond the ends too."""
    d = torch.rand(11, generator=generator(seed), dtype=F64)
    bank = (torch.arange(4.0, dtype=F64)[:, None] + torch.arange(3.0, dtype=F64))[..., None] * d
    i, s = torch.tensor([0, 2, 1]), torch.tensor([2, 0, 1])
    with backend(name):
        got = segment_points(bank, i, s, torch.full((3,), u, dtype=F64))
    # x_a and x_b round once each, to half an ulp of at most 5, and weigh at most 4 and 3; three operations follow
    atol = (5 * 3.5 + 3 * 8) * torch.finfo(F64).eps
    torch.testing.assert_close(got, ((i + s).double() + u)[:, None] * d, rtol=0, atol=atol)


@pytest.mark.parametrize("u_dtype", [F32, F64, BF16, F16])
def test_dtypes_of_u(u_dtype):
    bank, i, s, u = drawn((4, 3, 37), 6, 0)
    assert torch.equal(segment_points(bank, i, s, u.to(u_dtype)), segment_points(bank, i, s, u))
    strided = torch.stack([u, torch.full_like(u, math.nan)], 1).to(u_dtype)[:, 0]
    assert torch.equal(segment_points(bank, i, s, strided), segment_points(bank, i, s, u))


def test_indices_with_strides():
    bank, i, s, u = drawn((4, 3, 37), 6, 0)
    both = torch.stack([i, s], 1)
    assert torch.equal(segment_points(bank, both[:, 0], both[:, 1], u), segment_points(bank, i, s, u))
    one = torch.tensor([2])
    assert torch.equal(segment_points(bank, one.expand(6), s), segment_points(bank, torch.full((6,), 2), s))


@EACH
@pytest.mark.parametrize(("shape", "batch"), [((2, 1, 3), 0), ((3, 0, 4), 0), ((3, 2, 0), 5), ((3, 2, 4, 0), 1)])
def test_sizes_without_elements(shape, batch, name):
    i = torch.zeros(batch, dtype=torch.int64)
    with backend(name):
        for u in (None, torch.zeros(batch)):
            got = segment_points(torch.ones(shape), i, i, u, dtype=BF16)
            assert (got.shape, got.dtype) == ((batch, *shape[2:]), BF16)


# ---- values that are not finite ----


@EACH
@pytest.mark.parametrize("dtype", [None, BF16, F16])
def test_nan_and_inf_propagate(dtype, name):
    values = torch.tensor([0.0, -1.0, math.nan, math.inf, -math.inf])
    a, b = (t.flatten() for t in torch.meshgrid(values, values, indexing="ij"))
    bank, zero = torch.stack([a, b])[:, None], torch.zeros(5, dtype=torch.int64)
    u = torch.tensor([0.0, 1.0, 0.5, math.inf, math.nan])
    with backend(name):
        got, start = (segment_points(bank, zero, zero, where, dtype=dtype) for where in (u, None))
    expected = (a + u[:, None] * (b - a)).to(dtype or F32)
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(start, a.expand(5, -1).to(dtype or F32), rtol=0, atol=0, equal_nan=True)


@EACH
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_a_result_of_float64_is_rounded_as_by_torch(dtype, name):
    """By way of float32: these are just above the middle of two neighbours, and float32 takes them for the middle."""
    bank = (1 + torch.finfo(dtype).eps * torch.tensor([0.5, 1.5], dtype=F64) + 2**-40).expand(2, 1, 2)
    zero = torch.zeros(1, dtype=torch.int64)
    with backend(name):
        got = segment_points(bank, zero, zero, torch.ones(1), dtype=dtype)
    assert torch.equal(got, bank[0].to(dtype))
    assert got[0, 0] == 1


@EACH
def test_only_the_rows_that_are_drawn_are_read(name):
    bank = torch.full((4, 3, 20), math.nan)
    bank[1:3, 2] = 1
    with backend(name):
        assert segment_points(bank, torch.tensor([1]), torch.tensor([2]), torch.tensor([0.3])).eq(1).all()


# ---- threads, and stores past the caches ----


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("layout", "features"), [("contiguous", 65536), ("misaligned", 65536), ("contiguous", 65531)])
def test_large_results_with_any_number_of_threads(features, layout, dtype):
    """8 MiB of output a thread in float32, 4 in bfloat16: past the caches where rows begin at multiples of vectors."""
    g = generator(0)
    bank = arrange(torch.randn(3, 5, features, generator=g), layout)
    i, s = places(3, 5, 65, g)
    u = torch.rand(65, generator=g)
    results = []
    for threads in (1, 2, 2, 3):
        torch.set_num_threads(threads)
        results.append(segment_points(bank, i, s, u, dtype=dtype))
    assert all(torch.equal(r, results[0]) for r in results[1:])
    for b in (0, 31, 64):  # a row at a time, which is small enough to stay in the caches
        assert torch.equal(
            results[0][b], segment_points(bank, i[b : b + 1], s[b : b + 1], u[b : b + 1], dtype=dtype)[0]
        )
    error, bound = error_and_bound(
        Sample("", (bank, i[:2], s[:2], u[:2]), dict(dtype=dtype)), results[0][:2].contiguous()
    )
    assert error <= bound


# ---- gradients and the modes of autograd ----


def test_the_result_needs_no_gradient():
    bank, i, s, u = drawn((4, 3, 5), 6, 0)
    expected = segment_points(bank, i, s, u)
    got = segment_points(bank.clone().requires_grad_(), i, s, u.clone().requires_grad_())
    assert not got.requires_grad
    assert torch.equal(got, expected)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(bank, torch.ones_like(bank))
        assert torch.autograd.forward_ad.unpack_dual(segment_points(dual, i, s, u)).tangent is None


def test_the_result_is_not_a_view():
    bank, i, s, _ = drawn((4, 3, 5), 6, 0)
    before = bank.clone()
    for name in BACKENDS:
        with backend(name):
            segment_points(bank, i, s).fill_(99)
    assert torch.equal(bank, before)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_under_vmap():
    bank, i, s, u = drawn((4, 3, 5), 6, 0)
    many = torch.stack([u, 1 - u])
    got = torch.func.vmap(lambda u: segment_points(bank, i, s, u))(many)
    assert torch.equal(got, torch.stack([segment_points(bank, i, s, w) for w in many]))


# ---- errors ----

OUTSIDE = [
    ([0, 3, 0], [0, 0, 0], r"interval: expected indices from 0 to 2, got 3 at interval\[1\]"),
    ([0, 0, -1], [0, 0, 0], r"interval: expected indices from 0 to 2, got -1 at interval\[2\]"),
    ([0, 0, 0], [2, 0, 0], r"sample: expected indices from 0 to 1, got 2 at sample\[0\]"),
    ([0, 0, 0], [1, -2, -1], r"sample: expected indices from 0 to 1, got -2 at sample\[1\]"),
    ([2, -4, 9], [1, 7, 0], r"interval: expected indices from 0 to 2, got -4 at interval\[1\]"),
    ([0, -(2**63), 0], [0, 0, 0], r"interval: .*, got -9223372036854775808 at interval\[1\]"),
    ([0, 0, 2**63 - 1], [0, 0, 0], r"interval: .*, got 9223372036854775807 at interval\[2\]"),
    ([0, 0, 0], [0, 0, 2**62], r"sample: .*, got 4611686018427387904 at sample\[2\]"),
]


@RAISING
@pytest.mark.parametrize(("interval", "sample", "message"), OUTSIDE)
def test_an_index_outside_the_bank(interval, sample, message, name):
    with backend(name), pytest.raises(ValueError, match="^" + message):
        segment_points(torch.ones(4, 2, 5), torch.tensor(interval), torch.tensor(sample))


@ON_A_GPU
@pytest.mark.parametrize("dtypes", [(F32, F32), (F32, BF16), (F64, F16)])
@pytest.mark.parametrize("features", [5, 8, 600])
@pytest.mark.parametrize(("interval", "sample", "_"), OUTSIDE)
def test_on_a_gpu_an_index_outside_the_bank_makes_nan_of_its_point(interval, sample, _, features, dtypes, name):
    bank, interval, sample = torch.ones(4, 2, features, dtype=dtypes[0]), torch.tensor(interval), torch.tensor(sample)
    with backend(name):
        for u in (None, torch.full((3,), 0.5)):
            got = segment_points(bank, interval, sample, u, dtype=dtypes[1])
            outside = (interval < 0) | (interval > 2) | (sample < 0) | (sample > 1)
            assert torch.equal(got.isnan(), outside[:, None].expand(-1, features))
            assert got[~outside].eq(1).all()


@ON_A_GPU
def test_on_a_gpu_a_bank_without_samples_gives_nan(name):
    zero = torch.zeros(1, dtype=torch.int64)
    with backend(name):
        assert segment_points(torch.ones(3, 0, 5), zero, zero).isnan().all()


@RAISING
def test_a_bank_without_samples(name):
    zero = torch.zeros(1, dtype=torch.int64)
    with (
        backend(name),
        pytest.raises(ValueError, match=r"^sample: expected indices from 0 to -1, got 0 at sample\[0\]"),
    ):
        segment_points(torch.ones(3, 0, 5), zero, zero)


BANK, PLACE, U = torch.ones(4, 2, 5), torch.zeros(3, dtype=torch.int64), torch.zeros(3)


@pytest.mark.parametrize(
    ("error", "message", "args", "kwargs"),
    [
        (TypeError, r"bank: expected a torch.Tensor, got list", ([1.0], PLACE, PLACE), {}),
        (
            TypeError,
            r"bank: expected torch.float32 or torch.float64, got a torch.bfloat16",
            (BANK.bfloat16(), PLACE, PLACE),
            {},
        ),
        (
            ValueError,
            r"bank: expected shape \[N\+1, n, \*shape\] with N >= 1, got .*\[4, 2\]",
            (BANK[..., 0], PLACE, PLACE),
            {},
        ),
        (ValueError, r"bank: expected shape .* with N >= 1, got .*\[1, 2, 5\]", (BANK[:1], PLACE, PLACE), {}),
        (TypeError, r"interval: expected a torch.Tensor, got list \[0\]", (BANK, [0], PLACE), {}),
        (TypeError, r"interval: expected torch.int64, got a torch.int32", (BANK, PLACE.int(), PLACE), {}),
        (TypeError, r"sample: expected torch.int64, got a torch.float32", (BANK, PLACE, U), {}),
        (TypeError, r"sample: expected a torch.Tensor, got NoneType", (BANK, PLACE, None), {}),
        (ValueError, r"interval: expected shape \[B\] on cpu, got .*\[3, 1\]", (BANK, PLACE[:, None], PLACE), {}),
        (ValueError, r"interval: expected shape \[B\] on cpu, got .* on meta", (BANK, PLACE.to("meta"), PLACE), {}),
        (ValueError, r"sample: expected shape \[B\] on cpu, got .*\[\]", (BANK, PLACE, PLACE[0]), {}),
        (ValueError, r"sample: expected shape \[3\], one for each interval, got .*\[2\]", (BANK, PLACE, PLACE[:2]), {}),
        (TypeError, r"u: expected a torch.Tensor, got float 0.5", (BANK, PLACE, PLACE, 0.5), {}),
        (TypeError, r"u: expected torch.float32 or .*, got a torch.int64", (BANK, PLACE, PLACE, PLACE), {}),
        (ValueError, r"u: expected \[3\] on cpu, got .*\[3, 1\]", (BANK, PLACE, PLACE, U[:, None]), {}),
        (ValueError, r"u: expected \[3\] on cpu, got .* on meta", (BANK, PLACE, PLACE, U.to("meta")), {}),
        (
            TypeError,
            r"dtype: expected None, torch.float32, .*, got torch.float64",
            (BANK, PLACE, PLACE),
            dict(dtype=F64),
        ),
        (
            TypeError,
            r"dtype: expected None, torch.float64, .*, got torch.float32",
            (BANK.double(), PLACE, PLACE),
            dict(dtype=F32),
        ),
        (TypeError, r"dtype: expected .*, got half", (BANK, PLACE, PLACE), dict(dtype="half")),
    ],
)
def test_errors_name_the_argument(error, message, args, kwargs):
    with pytest.raises(error, match="^" + message):
        segment_points(*args, **kwargs)


def test_on_the_meta_device():
    bank, i = torch.empty(4, 2, 3, 5, device="meta"), torch.empty(7, dtype=torch.int64, device="meta")
    got = segment_points(bank, i, i, i.float(), dtype=F16)
    assert (got.shape, got.dtype, got.device.type) == ((7, 3, 5), F16, "meta")
