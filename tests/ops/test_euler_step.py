import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowkernels.ops.euler_step import euler_step
from flowkernels.ops.euler_step.samples import arrange, error_and_bound, sample_inputs
from flowkernels.ops.samples import generator
from flowkernels.ops.velocity_gram.samples import Sample
from flowkernels.runtime.backends import BACKENDS, backend

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = [(F32, F32), (F32, BF16), (F32, F16), (F64, F64)]
LAYOUTS = ["contiguous", "misaligned", "sliced", "permuted", "reversed", "channels_last", "expanded"]
SAMPLES = list(sample_inputs())
EVERY_SAMPLE = pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.id)
SIZES, SEEDS = st.integers(0, 70), st.integers(0, 2**32 - 1)


def randn(*shape, seed, dtype=F32):
    return torch.randn(shape, generator=generator(seed), dtype=F64).to(dtype)


def integers(*shape, seed, dtype=F32):
    """Whole numbers, small enough that every operation on them is exact."""
    return torch.randint(-8, 9, shape, generator=generator(seed)).to(dtype)


def pair(result):
    return result if isinstance(result, tuple) else (result, None)


# ---- properties; whole numbers and powers of two make them exact ----


@given(SIZES, SEEDS, st.sampled_from(DTYPES), st.integers(-8, 8))
def test_is_linear_in_v(size, seed, dtypes, h):
    x = integers(size, seed=seed, dtype=dtypes[0])
    v, w = (integers(size, seed=seed + i, dtype=dtypes[1]) for i in (1, 2))
    assert torch.equal(
        euler_step(x, 2 * v - w, h / 8) - x, 2 * (euler_step(x, v, h / 8) - x) - euler_step(x, w, h / 8) + x
    )
    assert torch.equal(euler_step(x, torch.zeros_like(v), h), x)
    assert torch.equal(euler_step(x, v, 0.0), x)
    assert torch.equal(euler_step(x, v, h / 8), x + v.to(x.dtype) * (h / 8))


@given(SIZES, SEEDS, st.sampled_from(DTYPES), st.integers(-64, 64))
def test_guidance(size, seed, dtypes, w):
    x = integers(size, seed=seed, dtype=dtypes[0])
    v, u = (integers(size, seed=seed + i, dtype=dtypes[1]) for i in (1, 2))
    wide_v, wide_u = v.to(x.dtype), u.to(x.dtype)
    got = euler_step(x, v, 0.5, v_uncond=u, guidance=w / 8)
    assert torch.equal(got, x + 0.5 * (wide_u + w / 8 * (wide_v - wide_u)))
    assert torch.equal(euler_step(x, v, 0.5, v_uncond=u, guidance=1.0), euler_step(x, v, 0.5))
    assert torch.equal(euler_step(x, v, 0.5, v_uncond=u), euler_step(x, v, 0.5))
    assert torch.equal(euler_step(x, v, 0.5, v_uncond=u, guidance=0.0), euler_step(x, u, 0.5))
    assert torch.equal(euler_step(x, v, 0.5, v_uncond=v, guidance=w), euler_step(x, v, 0.5))


@given(SIZES, SEEDS, st.sampled_from(DTYPES), st.floats(-20, 20), st.floats(-2, 2), st.sampled_from(BACKENDS))
def test_guided_formula_in_float64(size, seed, dtypes, w, h, name):
    x = randn(size, seed=seed, dtype=dtypes[0])
    v, u = (randn(size, seed=seed + i, dtype=dtypes[1]) for i in (1, 2))
    with backend(name):
        got = euler_step(x, v, h, v_uncond=u, guidance=w)
    error, bound = error_and_bound(Sample("", (x, v, h), dict(v_uncond=u, guidance=w)), got)
    assert error <= bound


def test_a_hundred_steps_with_a_low_precision_copy():
    """The state does not drift from float64 by more than a rounding a step; a bfloat16 state does."""
    x = state = randn(1000, seed=0)
    exact = x.double()
    for i in range(100):
        v = randn(1000, seed=i + 1, dtype=BF16)
        state, low = euler_step(state, v, 0.01, low=BF16)
        exact = exact + 0.01 * v.double()
        assert torch.equal(low, state.bfloat16())
    # each of 100 steps rounds the sum, the product and h to half an ulp of at most the largest state
    assert (state - exact).abs().max() <= 100 * 1.5 * torch.finfo(F32).eps * exact.abs().max()


# ---- outputs: in place, into a tensor, in low precision ----


@EVERY_SAMPLE
@pytest.mark.parametrize("name", BACKENDS)
def test_in_place_equals_out_of_place(sample, name):
    x, v, h = sample.args
    with backend(name):
        state, low = pair(euler_step(x, v, h, **sample.kwargs))
        # a copy that keeps gaps between elements; a state with overlap cannot be stepped in place
        target = arrange(x, "sliced") if x.dim() and not x.is_contiguous() else x.clone()
        got, got_low = pair(euler_step(target, v, h, out=target, **sample.kwargs))
    assert got is target
    assert torch.equal(target, state)
    assert (low is None) == (got_low is None)
    assert low is None or torch.equal(got_low, low)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("layout", [s for s in LAYOUTS if s != "expanded"])
def test_writes_what_it_is_given_and_nothing_else(layout, name):
    x, v, u = (randn(2, 3, 5, 7, seed=i) for i in range(3))
    expected = euler_step(x, v, 0.3, v_uncond=u, guidance=3.0)
    for low_layout in (layout, "contiguous", "sliced"):
        # no two values alike: a write to a neighbour would show
        memory, low_memory = torch.arange(1000, 2000, dtype=F32), torch.arange(200, 456).bfloat16().repeat(4)
        out, low = (arrange_in(m, x, lay) for m, lay in ((memory, layout), (low_memory, low_layout)))
        before, low_before = memory.clone(), low_memory.clone()
        with backend(name):
            got, got_low = euler_step(x, v, 0.3, v_uncond=u, guidance=3.0, out=out, low=low)
        assert got is out
        assert got_low is low
        torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(low, out.bfloat16())
        arrange_in(before, x, layout).copy_(out)
        arrange_in(low_before, x, low_layout).copy_(low)
        assert torch.equal(memory, before)
        assert torch.equal(low_memory, low_before)


def arrange_in(memory, like, layout):
    """A view of `memory` with the shape of `like` and the strides of a layout, one element from its start."""
    return memory.as_strided(like.shape, arrange(like, layout).stride(), 1)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_layout_for_every_input_and_output(layout, name):
    x, v = (arrange(randn(2, 3, 5, 7, seed=i), layout) for i in range(2))
    expected = euler_step(x.contiguous(), v.contiguous(), 0.3)
    with backend(name):
        torch.testing.assert_close(euler_step(x, v, 0.3), expected)
        if layout != "expanded":
            euler_step(x, v, 0.3, out=x)
            torch.testing.assert_close(x, expected)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_new_tensors_have_the_strides_of_empty_like(layout, name):
    x, v = arrange(randn(2, 3, 5, 7, seed=0), layout), randn(2, 3, 5, 7, seed=1)
    with backend(name):
        state, low = euler_step(x, v, 0.3, low=F16)
    assert state.stride() == low.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("low", [BF16, F16])
@pytest.mark.parametrize("name", BACKENDS)
def test_low_as_a_dtype_and_as_a_tensor(low, name):
    x, v = randn(37, seed=0), randn(37, seed=1)
    target = torch.empty(37, dtype=low)
    with backend(name):
        state, copy = euler_step(x, v, 0.3, low=low)
        same, given = euler_step(x, v, 0.3, low=target)
        stepped, last = euler_step(x.clone(), v, 0.3, out=torch.empty(37), low=low)
    assert given is target
    assert torch.equal(state, same)
    assert torch.equal(state, stepped)
    assert torch.equal(copy, state.to(low))
    assert torch.equal(copy, given)
    assert torch.equal(copy, last)


def test_other_rows_of_one_buffer():
    """A rollout that keeps its states: every step reads one row and writes the next."""
    v = randn(6, 3, 11, seed=0)
    states = torch.zeros(7, 3, 11)
    for i in range(6):
        euler_step(states[i], v[i], 0.5, out=states[i + 1])
    torch.testing.assert_close(states[1:], 0.5 * v.cumsum(0), rtol=1e-5, atol=1e-5)


# ---- values that are not finite ----


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(("x_dtype", "v_dtype"), DTYPES)
def test_nan_and_inf_propagate(x_dtype, v_dtype, name):
    values = torch.tensor([0.0, -1.0, math.nan, math.inf, -math.inf], dtype=F64)
    x, v, u = (t.flatten() for t in torch.meshgrid(values, values, values, indexing="ij"))
    x, v, u = x.to(x_dtype), v.to(v_dtype), u.to(v_dtype)
    for w in (0.0, 1.0, 2.5, math.inf, math.nan):
        expected = x.double() + 0.25 * (u.double() + w * (v.double() - u.double()))
        with backend(name):
            state, low = euler_step(x, v, 0.25, v_uncond=u, guidance=w, low=BF16)
        torch.testing.assert_close(state.double(), expected, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(low, state.bfloat16(), rtol=0, atol=0, equal_nan=True)
    for h in (0.0, math.inf, math.nan):
        with backend(name):
            state = euler_step(x, v, h)
        torch.testing.assert_close(state.double(), x.double() + h * v.double(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("low", [BF16, F16])
def test_a_copy_out_of_range_is_infinite(low, name):
    x = torch.tensor([3.4028234e38, -3.4028234e38, 65519.0, 65520.0, -65536.0, 1e-8, 6e-8, 1e-45])
    with backend(name):
        state, copy = euler_step(x, torch.zeros(8), 1.0, low=low)
    assert torch.equal(state, x)
    assert torch.equal(copy, x.to(low))


# ---- gradients ----


def leaves(*shape, count=3, dtype=F64):
    return [randn(*shape, seed=i, dtype=dtype).requires_grad_() for i in range(count)]


@pytest.mark.parametrize("name", BACKENDS)
def test_gradcheck(name):
    x, v, u = leaves(2, 3, 2)
    with backend(name):
        assert torch.autograd.gradcheck(lambda x, v: euler_step(x, v, 0.3), (x, v))
        guided = lambda x, v, u: euler_step(x, v, 0.3, v_uncond=u, guidance=2.5)  # noqa: E731
        assert torch.autograd.gradcheck(guided, (x, v, u))
        assert torch.autograd.gradgradcheck(guided, (x, v, u))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("loss", ["sum", "permuted", "sliced", "cat", "dense"])
def test_gradients_that_arrive_strided(loss, name):
    weights = randn(7, 5, 3, seed=9, dtype=F64)
    reduce = {
        "sum": lambda y: y.sum(),
        "permuted": lambda y: (y.permute(2, 1, 0) * weights).sum(),
        "sliced": lambda y: (y[:, 1:4] * weights.permute(2, 1, 0)[:, 1:4]).sum(),
        "cat": lambda y: (torch.cat([y, y[:, :2]], 1) * weights.permute(2, 1, 0).repeat(1, 2, 1)[:, :7]).sum(),
        "dense": lambda y: y.square().sum(),
    }[loss]
    got, expected = leaves(3, 5, 7), leaves(3, 5, 7)
    with backend(name):
        reduce(euler_step(*got[:2], 0.3, v_uncond=got[2], guidance=2.5)).backward()
    x, v, u = expected
    reduce(x + 0.3 * (u + 2.5 * (v - u))).backward()
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("v_dtype", [F32, BF16, F16])
def test_gradients_have_the_dtypes_of_the_inputs(v_dtype):
    x, v, u = leaves(4, 5, dtype=F32)
    v, u = (t.detach().to(v_dtype).requires_grad_() for t in (v, u))
    euler_step(x, v, 0.5, v_uncond=u, guidance=3.0).sum().backward()
    assert (x.grad.dtype, v.grad.dtype, u.grad.dtype) == (F32, v_dtype, v_dtype)
    assert x.grad.eq(1).all()
    assert v.grad.eq(1.5).all()
    assert u.grad.eq(-1).all()


@pytest.mark.parametrize("x_dtype", [F32, F64])
def test_gradients_through_the_low_precision_copy(x_dtype):
    x, v = leaves(4, 5, count=2, dtype=x_dtype)
    state, low = euler_step(x, v, 0.5, low=BF16)
    (2 * low).sum().backward(retain_graph=True)
    assert x.grad.eq(2).all()
    assert v.grad.eq(1).all()
    assert (x.grad.dtype, v.grad.dtype) == (x_dtype, x_dtype)
    (state.sum() + (2 * low).sum()).backward()
    assert x.grad.eq(2 + 3).all()
    assert v.grad.eq(1 + 1.5).all()


@pytest.mark.parametrize("wanted", range(3))
def test_gradient_of_one_input(wanted):
    tensors = [t.requires_grad_(i == wanted) for i, t in enumerate(t.detach() for t in leaves(3, 4))]
    x, v, u = tensors
    euler_step(x, v, 0.5, v_uncond=u, guidance=3.0).sum().backward()
    assert [t.grad is not None for t in tensors] == [i == wanted for i in range(3)]
    assert tensors[wanted].grad.eq([1.0, 1.5, -1.0][wanted]).all()


def test_gradient_of_expanded_inputs():
    v = randn(1, 7, seed=0, dtype=F64).requires_grad_()
    x = randn(5, 7, seed=1, dtype=F64)
    euler_step(x, v.expand(5, 7), 0.5).sum().backward()
    assert v.grad.eq(2.5).all()


@pytest.mark.parametrize("which", ["x", "v", "v_uncond", "out", "low"])
def test_no_gradient_with_out_or_a_tensor_low(which):
    t = {k: randn(3, 4, seed=i) for i, k in enumerate(["x", "v", "v_uncond", "out"])}
    t["low"] = torch.empty(3, 4, dtype=BF16)
    t[which].requires_grad_()
    for target in ("out", "low") if which not in ("out", "low") else (which,):
        kwargs = dict(v_uncond=t["v_uncond"], guidance=2.0, **{target: t[target]})
        with pytest.raises(
            ValueError, match=rf"{which}: expected no gradient with out= or a tensor low=, got requires"
        ):
            euler_step(t["x"], t["v"], 0.5, **kwargs)
        with torch.no_grad():
            state = pair(euler_step(t["x"], t["v"], 0.5, **kwargs))[0]
        torch.testing.assert_close(state, euler_step(t["x"], t["v"], 0.5, v_uncond=t["v_uncond"], guidance=2.0))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("columns", [6, 5], ids=["contiguous", "sliced"])
@pytest.mark.parametrize("target", ["out", "low"])
def test_autograd_sees_a_tensor_that_was_written(target, columns, name):
    """Backward through a value that `out=` or a tensor `low=` has overwritten since raises, as for torch's own ops."""
    x, v = randn(4, columns, seed=0), randn(4, columns, seed=1)
    leaf = torch.ones(4, 6, dtype=F32 if target == "out" else BF16, requires_grad=True)
    saved = (leaf * 1)[:, :columns]
    loss = saved.square().sum()
    with backend(name), torch.no_grad():
        euler_step(x, v, 0.5, **{target: saved})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", BACKENDS)
def test_in_inference_mode(name):
    x, v = randn(4, 5, seed=0), randn(4, 5, seed=1)
    expected = euler_step(x, v, 0.5)
    with torch.inference_mode(), backend(name):
        state = x.clone()
        low = torch.empty(4, 5, dtype=BF16)
        euler_step(state, v, 0.5, out=state, low=low)
        fresh = euler_step(x, v, 0.5)
    torch.testing.assert_close(state, expected)
    torch.testing.assert_close(fresh, expected)
    torch.testing.assert_close(low, state.bfloat16())


# ---- torch.compile: the mutable op, with outputs that are inputs ----


def step_in_place(x, v, low):
    return euler_step(x, v, 0.1, out=x)


def step_in_place_and_read(x, v, low):
    before = x @ x.T
    euler_step(x, v, 0.1, out=x)
    return before, x @ x.T


def steps_in_place(x, v, low):
    for i in range(3):
        euler_step(x, v, 0.1 * (i + 1), v_uncond=low, guidance=2.0, out=x)
    return x


def step_with_a_copy(x, v, low):
    return euler_step(x, v, 0.1, low=low)


def steps_in_place_with_a_copy(x, v, low):
    for _ in range(3):
        euler_step(x, low, 0.1, out=x, low=low)  # the copy is the next velocity
    return x, low


def step_an_intermediate(x, v, low):
    y = euler_step(x, v, 0.2)
    before = euler_step(y, v, 0.3)
    euler_step(y, v, 0.1, out=y)
    return before, euler_step(y, v, 0.3)


def step_into_the_next_row(x, v, low):
    for i in range(len(x) - 1):
        euler_step(x[i], v[i], 0.1, out=x[i + 1], low=low[i])
    return x, low


def step_a_view_in_place(x, v, low):
    y = x[:, 1:5]
    return euler_step(y, v[:, 1:5], 0.1, out=y, low=low[:, 1:5])


def step_a_transposed_view_in_place(x, v, low):
    y = x.T
    return euler_step(y, v.T, 0.1, out=y)


def step_one_view_into_another(x, v, low):
    flat = x.view(-1)
    euler_step(flat.view(x.shape), v, 0.1, out=x)
    return flat


PROGRAMS = [
    step_in_place,
    step_in_place_and_read,
    steps_in_place,
    step_with_a_copy,
    steps_in_place_with_a_copy,
    step_an_intermediate,
    step_into_the_next_row,
    step_a_view_in_place,
    step_a_transposed_view_in_place,
    step_one_view_into_another,
]


# what the compiler makes of a program does not depend on the backend: each program meets one other than the CPU's
REST = [b for b in BACKENDS if b != "cpu"]
OTHERS = [(program, "aot_eager", b) for program, b in zip(PROGRAMS, itertools.cycle(REST), strict=False)]


@pytest.mark.parametrize(
    ("program", "compiler", "name"),
    [*itertools.product(PROGRAMS, ("aot_eager", "inductor"), ["cpu"]), *OTHERS],
)
def test_mutation_under_compile(program, compiler, name):
    def inputs():
        return randn(5, 9, seed=0), randn(5, 9, seed=1, dtype=BF16), randn(5, 9, seed=2, dtype=BF16)

    torch._dynamo.reset()
    eager, compiled = inputs(), inputs()
    with backend(name):
        expected = program(*eager)
        got = torch.compile(program, fullgraph=True, backend=compiler)(*compiled)
    for a, b in zip((*pair(got), *compiled), (*pair(expected), *eager), strict=True):
        assert a is b is None or torch.equal(a, b)
    # what is an input in eager is an input in the compiled program, not a copy
    places = [
        [i for i, t in enumerate(ts) if r is t] for r, ts in ((pair(expected)[0], eager), (pair(got)[0], compiled))
    ]
    assert places[0] == places[1]


def test_gradients_under_compile():
    def loss(x, v, u):
        state, low = euler_step(x, v, 0.3, v_uncond=u, guidance=2.5, low=BF16)
        return (state.square() + low).sum()

    eager, compiled = leaves(3, 7, dtype=F32), leaves(3, 7, dtype=F32)
    torch._dynamo.reset()
    loss(*eager).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(*compiled).backward()
    for a, b in zip(eager, compiled, strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("case", ["out", "low", "both", "guided"])
def test_opcheck_of_the_mutable_op(case):
    x, v, u, out = (randn(3, 21, seed=i) for i in range(4))
    low = torch.empty(3, 21, dtype=F16) if case in ("low", "both") else None
    guided = case in ("guided", "both")
    args = (x, v, 0.3, u if guided else None, 2.0 if guided else 1.0, out, low)
    torch.library.opcheck(torch.ops.flowkernels.euler_step_out.default, args)


# ---- the meta device and errors ----


def test_on_the_meta_device():
    x = torch.empty(2, 3, 4, 5, device="meta").to(memory_format=torch.channels_last)
    state, low = euler_step(x, x.bfloat16(), 0.1, low=BF16)
    assert (state.shape, state.dtype, low.dtype) == (x.shape, F32, BF16)
    assert state.stride() == low.stride() == x.stride()
    assert euler_step(x, x, 0.1, out=x) is x


X = torch.zeros(3, 4)
HALF = X.bfloat16()


@pytest.mark.parametrize(
    ("error", "message", "args", "kwargs"),
    [
        (TypeError, r"x: expected a torch.Tensor, got float 1.0", (1.0, X, 0.1), {}),
        (TypeError, r"x: expected torch.float32 or torch.float64, got a torch.bfloat16", (HALF, HALF, 0.1), {}),
        (TypeError, r"v: expected a torch.Tensor, got NoneType", (X, None, 0.1), {}),
        (TypeError, r"v: expected .*, got a torch.float64 tensor", (X, X.double(), 0.1), {}),
        (TypeError, r"v: expected torch.float64, got a torch.float32 tensor", (X.double(), X, 0.1), {}),
        (TypeError, r"v: expected .*, got a torch.int64 tensor", (X, X.long(), 0.1), {}),
        (ValueError, r"v: expected x's shape \[3, 4\] on cpu, got .*\[3, 1\]", (X, X[:, :1], 0.1), {}),
        (ValueError, r"v: expected x's shape \[3, 4\] on cpu, got .*\[4, 3\]", (X, X.T, 0.1), {}),
        (ValueError, r"v: expected x's shape \[3, 4\] on cpu, got .* on meta", (X, X.to("meta"), 0.1), {}),
        (TypeError, r"h: expected a number, got None", (X, X, None), {}),
        (TypeError, r"h: expected a number, got '0.1'", (X, X, "0.1"), {}),
        (TypeError, r"v_uncond: expected torch.bfloat16, got a torch.float32", (X, HALF, 0.1), dict(v_uncond=X)),
        (ValueError, r"v_uncond: expected x's shape .*, got .*\[4\]", (X, X, 0.1), dict(v_uncond=X[0])),
        (ValueError, r"v_uncond: expected x's shape .* on meta", (X, X, 0.1), dict(v_uncond=X.to("meta"))),
        (ValueError, r"guidance: expected 1 without v_uncond, got 2.0", (X, X, 0.1), dict(guidance=2.0)),
        (ValueError, r"guidance: expected 1 without v_uncond, got nan", (X, X, 0.1), dict(guidance=math.nan)),
        (TypeError, r"guidance: expected a number, got None", (X, X, 0.1), dict(v_uncond=X, guidance=None)),
        (TypeError, r"guidance: expected a number, got '2'", (X, X, 0.1), dict(v_uncond=X, guidance="2")),
        (TypeError, r"out: expected a torch.Tensor, got int 3", (X, X, 0.1), dict(out=3)),
        (TypeError, r"out: expected torch.float32, got a torch.float64", (X, X, 0.1), dict(out=X.double())),
        (ValueError, r"out: expected x's shape .*, got .*\[4, 3\]", (X, X, 0.1), dict(out=X.T.clone())),
        (ValueError, r"out: expected x's shape .* on meta", (X, X, 0.1), dict(out=X.to("meta"))),
        (
            TypeError,
            r"low: expected torch.bfloat16 or torch.float16, got a torch.float32",
            (X, X, 0.1),
            dict(low=X.clone()),
        ),
        (TypeError, r"low: expected torch.bfloat16, .*, got torch.float32", (X, X, 0.1), dict(low=F32)),
        (TypeError, r"low: expected torch.bfloat16, .*, got bf16", (X, X, 0.1), dict(low="bf16")),
        (ValueError, r"low: expected x's shape .*, got .*\[4\]", (X, X, 0.1), dict(low=HALF[0])),
        (ValueError, r"low: expected x's shape .* on meta", (X, X, 0.1), dict(low=HALF.to("meta"))),
    ],
)
def test_errors_name_the_argument(error, message, args, kwargs):
    with pytest.raises(error, match=message):
        euler_step(*args, **kwargs)


def test_torch_func_transforms():
    """jvp, vmap and grad are those of the formula, not silently zero."""
    x, v, u = (torch.randn(3, 5, generator=generator(i), dtype=torch.float64) for i in range(3))

    def step(x, v):
        return euler_step(x, v, 0.25, v_uncond=u, guidance=3.0)

    _, tangent = torch.func.jvp(step, (x, v), (torch.ones_like(x), torch.ones_like(v)))
    torch.testing.assert_close(tangent, torch.full_like(x, 1 + 0.25 * 3.0))
    grad = torch.func.grad(lambda x, v: step(x, v).square().sum(), argnums=1)(x, v)
    torch.testing.assert_close(grad, 2 * 0.75 * step(x, v))
    rows = torch.func.vmap(lambda x, v: euler_step(x, v, 0.25))(x, v)
    torch.testing.assert_close(rows, x + 0.25 * v)
    with pytest.raises(ValueError, match=r"^out: expected None"):
        torch.func.vmap(lambda x, v: euler_step(x, v, 0.25, out=x))(x, v)


def test_a_step_size_that_needs_a_gradient():
    with pytest.raises(ValueError, match=r"^h: expected a number that needs no gradient"):
        euler_step(torch.ones(2), torch.ones(2), torch.tensor(0.1, requires_grad=True))
