import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowkernels.ops.euler_step import euler_step
from flowkernels.ops.linear_update import linear_update, triton_kernel
from flowkernels.ops.linear_update.samples import error_and_bound, sample_inputs
from flowkernels.ops.samples import Sample, arrange, generator
from flowkernels.runtime.backends import BACKENDS, backend

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = [(F32, F32), (F32, BF16), (F32, F16), (F64, F64)]
LAYOUTS = ["contiguous", "misaligned", "sliced", "permuted", "channels_last"]
SAMPLES = [s for s in sample_inputs() if "expanded" not in s.id]
SIZES, SEEDS, TERMS = st.integers(0, 140), st.integers(0, 2**32 - 1), st.integers(1, 9)
SCALES = st.sampled_from([1.0, 0.0, 0.25, -2.0])  # of the state, which are exact too
EACH = pytest.mark.parametrize("name", BACKENDS)


def randn(*shape, seed, dtype=F32):
    return torch.randn(shape, generator=generator(seed), dtype=F64).to(dtype)


def integers(*shape, seed, dtype=F32):
    """Whole numbers, small enough that every operation on them is exact."""
    return torch.randint(-8, 9, shape, generator=generator(seed)).to(dtype)


def exact(size, terms, seed, dtypes):
    """A state and velocities of whole numbers, and coefficients in eighths."""
    x, *v = (integers(size, seed=seed + i, dtype=dtypes[min(i, 1)]) for i in range(terms + 1))
    return x, v, (integers(terms, seed=seed + 99, dtype=F64) / 8).tolist()


def pair(result):
    return result if isinstance(result, tuple) else (result, None)


# ---- properties; whole numbers and eighths make them exact ----


@given(SIZES, TERMS, SEEDS, st.sampled_from(DTYPES), SCALES, st.sampled_from(BACKENDS))
def test_is_the_sum(size, terms, seed, dtypes, scale, name):
    x, v, b = exact(size, terms, seed, dtypes)
    with backend(name):
        got, low = linear_update(x, v, b, scale=scale, low=BF16)
    wide = torch.stack([t.double() for t in v])
    assert torch.equal(got.double(), scale * x.double() + torch.tensor(b, dtype=F64) @ wide)
    assert torch.equal(low, got.bfloat16())


@given(SIZES, TERMS, SEEDS, st.sampled_from(DTYPES))
def test_is_linear(size, terms, seed, dtypes):
    x, v, b = exact(size, terms, seed, dtypes)
    new = linear_update(x, v, b)
    order = torch.randperm(terms, generator=generator(seed)).tolist()
    assert torch.equal(linear_update(x, [v[i] for i in order], [b[i] for i in order]), new)
    assert torch.equal(linear_update(x, [*v, *v], [*b, *(-c for c in b)]), x)
    assert torch.equal(linear_update(x, v, [0.0] * terms), x)
    assert torch.equal(linear_update(x, [2 * t for t in v], [c / 2 for c in b]), new)
    cut = seed % (terms + 1)
    if 0 < cut < terms:  # the terms in two calls
        assert torch.equal(linear_update(linear_update(x, v[:cut], b[:cut]), v[cut:], b[cut:]), new)
    at = seed % (size + 1)
    parts = [linear_update(x[part], [t[part] for t in v], b) for part in (slice(at), slice(at, None))]
    assert torch.equal(torch.cat(parts), new)


@given(SIZES, SEEDS, st.sampled_from(DTYPES), st.floats(-2, 2))
def test_one_term_is_an_euler_step(size, seed, dtypes, h):
    x, v = randn(size, seed=seed, dtype=dtypes[0]), randn(size, seed=seed + 1, dtype=dtypes[1])
    got, expected = linear_update(x, [v], [h], low=F16), euler_step(x, v, h, low=F16)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


@given(SIZES, TERMS, SEEDS, st.sampled_from(DTYPES), st.floats(1e-3, 20), st.floats(-2, 2), st.sampled_from(BACKENDS))
def test_formula_in_float64(size, terms, seed, dtypes, spread, scale, name):
    x, *v = (randn(size, seed=seed + i, dtype=dtypes[min(i, 1)]) for i in range(terms + 1))
    sample = Sample("", (x, v, (spread * randn(terms, seed=seed + 99, dtype=F64)).tolist()), dict(scale=scale))
    with backend(name):
        error, bound = error_and_bound(sample, linear_update(*sample.args, **sample.kwargs))
    assert error <= bound


def test_a_multistep_method_from_its_first_state():
    """Adams-Bashforth 2, step by step and as one sum from x_0; whole numbers divided by powers of two: exact."""
    x0, v = integers(50, seed=0), [integers(50, seed=i) for i in range(1, 7)]
    x, b = x0, [0.0] * 6
    for k in range(6):
        step = {k: 1.0} if k == 0 else {k: 1.5, k - 1: -0.5}
        x = linear_update(x, [v[i] for i in step], [c / 8 for c in step.values()])
        for i, c in step.items():
            b[i] += c / 8
        assert torch.equal(linear_update(x0, v[: k + 1], b[: k + 1]), x)


def test_coefficients_and_velocities_in_every_form():
    x, v = integers(4, 5, seed=0), integers(3, 4, 5, seed=1)
    expected = x + 0.5 * v[0] - v[1] + 2 * v[2]
    for b in ([0.5, -1, 2], (0.5, -1.0, 2.0), torch.tensor([0.5, -1, 2]), iter([0.5, -1, 2])):
        assert torch.equal(linear_update(x, v.unbind(), b), expected)
    assert torch.equal(linear_update(x, v, [0.5, -1, 2]), expected)
    leaf = x.clone().requires_grad_()  # through the dispatcher
    assert torch.equal(linear_update(leaf, v, torch.tensor([0.5, -1, 2])), expected)


@EACH
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("terms", [1, 5, 40])
def test_the_scaled_state_is_rounded_before_the_sum(terms, dtypes, name):
    """A scale of 1 changes no bit of what comes of none, and another one is a product before the same sum; but for
    Triton, which may contract it with the sum."""
    x, *v = (randn(700, seed=i, dtype=dtypes[min(i, 1)]) for i in range(terms + 1))
    x[:2], v[0][:2] = torch.tensor([-0.0, 0.0]), 0
    b = randn(terms, seed=99, dtype=F64).tolist()
    scale = 0.3 if name in ("cpu", "cuda") else -0.5  # a power of two: exact
    with backend(name):
        plain, one = linear_update(x, v, b), linear_update(x, v, b, scale=1)
        scaled, before = linear_update(x, v, b, scale=scale), linear_update(torch.mul(x, scale), v, b)
    assert torch.equal(plain, one)
    assert torch.equal(plain.signbit(), one.signbit())
    assert torch.equal(scaled, before)


# ---- outputs: in place, into a tensor, in low precision ----


@EACH
@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.id)
def test_in_place_equals_out_of_place(sample, name):
    x, v, b = sample.args
    with backend(name):
        state, low = pair(linear_update(x, v, b, **sample.kwargs))
        target = arrange(x, "sliced") if x.dim() and not x.is_contiguous() else x.clone()
        version = target._version
        got, got_low = pair(linear_update(target, v, b, out=target, **sample.kwargs))
    assert got is target
    assert target._version > version
    assert torch.equal(target, state)
    assert state.is_contiguous()
    assert low is got_low is None or torch.equal(got_low, low)


@EACH
@pytest.mark.parametrize("layout", LAYOUTS)
def test_writes_what_it_is_given_and_nothing_else(layout, name):
    x, *v = (integers(2, 3, 5, 7, seed=i) for i in range(3))
    expected = x + 0.5 * v[0] - 0.25 * v[1]
    for low_layout in (layout, "contiguous", "sliced"):
        # no two values alike: a write to a neighbour would show
        memory, low_memory = torch.arange(1000, 2000, dtype=F32), torch.arange(200, 456).bfloat16().repeat(4)
        out, low = (arrange_in(m, x, lay) for m, lay in ((memory, layout), (low_memory, low_layout)))
        before, low_before = memory.clone(), low_memory.clone()
        versions = out._version, low._version
        with backend(name):
            got = linear_update(*(arrange(x, layout), [arrange(t, layout) for t in v], [0.5, -0.25]), out=out, low=low)
        assert got[0] is out
        assert got[1] is low
        assert out._version > versions[0]
        assert low._version > versions[1]
        assert torch.equal(out, expected)
        assert torch.equal(low, expected.bfloat16())
        arrange_in(before, x, layout).copy_(out)
        arrange_in(low_before, x, low_layout).copy_(low)
        assert torch.equal(memory, before)
        assert torch.equal(low_memory, low_before)


def arrange_in(memory, like, layout):
    """A view of `memory` with the shape of `like` and the strides of a layout, one element from its start."""
    return memory.as_strided(like.shape, arrange(like, layout).stride(), 1)


@EACH
@pytest.mark.parametrize("low", [BF16, F16])
def test_low_as_a_dtype_and_as_a_tensor(low, name):
    x, v = randn(37, seed=0), [randn(37, seed=i) for i in (1, 2)]
    target = torch.empty(37, dtype=low)
    with backend(name):
        state, copy = linear_update(x, v, [0.3, 0.1], low=low)
        same, given = linear_update(x, v, [0.3, 0.1], low=target)
        stepped, last = linear_update(x, v, [0.3, 0.1], out=torch.empty(37), low=low)
    assert given is target
    assert torch.equal(state, same)
    assert torch.equal(state, stepped)
    assert all(torch.equal(state.to(low), c) for c in (copy, given, last))


@EACH
@pytest.mark.parametrize("low", [BF16, F16])
def test_a_copy_of_float64_is_rounded_as_by_torch(low, name):
    """By way of float32: these are just above the middle of two neighbours, and float32 takes them for the middle."""
    x = 1 + torch.finfo(low).eps * torch.tensor([0.5, 1.5], dtype=F64) + 2**-40
    with backend(name):
        state, copy = linear_update(x, [torch.zeros(2, dtype=F64)], [1.0], low=low)
    assert torch.equal(state, x)
    assert torch.equal(copy, x.to(low))
    assert copy[0] == 1


@pytest.mark.parametrize("dtypes", DTYPES)
def test_launches_of_triton_do_not_change_a_bit(dtypes, monkeypatch):
    x, *v = (randn(700, seed=i, dtype=dtypes[min(i, 1)]) for i in range(8))
    b, results = randn(7, seed=99).tolist(), []
    scale = -0.3
    for terms in (7, 3, 1):
        monkeypatch.setattr(triton_kernel, "TERMS", terms)
        with backend("triton"):
            results.append(linear_update(x, v, b, scale=scale, low=BF16))
    assert all(torch.equal(*pair) for other in results[1:] for pair in zip(other, results[0], strict=True))
    assert torch.equal(results[0][1], results[0][0].bfloat16())


# ---- values that are not finite ----


@EACH
@pytest.mark.parametrize(("x_dtype", "v_dtype"), DTYPES)
def test_nan_and_inf_propagate(x_dtype, v_dtype, name):
    values = torch.tensor([0.0, -1.0, math.nan, math.inf, -math.inf], dtype=F64)
    x, v, w = (t.flatten() for t in torch.meshgrid(values, values, values, indexing="ij"))
    for *b, scale in (
        [0.0, 1.0, 1.0],
        [0.25, -2.0, 0.0],
        [math.inf, 0.0, -1.0],
        [math.nan, 1.0, 1.0],
        [1, 1, math.inf],
    ):
        with backend(name):
            state, low = linear_update(x.to(x_dtype), [v.to(v_dtype), w.to(v_dtype)], b, scale=scale, low=BF16)
        torch.testing.assert_close(state.double(), scale * x + b[0] * v + b[1] * w, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(low, state.bfloat16(), rtol=0, atol=0, equal_nan=True)


@EACH
@pytest.mark.parametrize("low", [BF16, F16])
def test_a_copy_out_of_range_is_infinite(low, name):
    x = torch.tensor([3.4028234e38, -3.4028234e38, 65519.0, 65520.0, -65536.0, 1e-8, 6e-8, 1e-45])
    with backend(name):
        state, copy = linear_update(x, [torch.zeros(8)], [1.0], low=low)
    assert torch.equal(state, x)
    assert torch.equal(copy, x.to(low))


# ---- threads, and stores past the caches ----


@pytest.mark.parametrize("low", [None, BF16])
@pytest.mark.parametrize(("x_dtype", "v_dtype"), [(F32, F32), (F32, BF16), (F64, F64)])
@pytest.mark.parametrize("offset", [0, 1, 16], ids=["aligned", "misaligned", "next line"])
def test_large_states_with_any_number_of_threads(offset, x_dtype, v_dtype, low):
    """From 4 MiB of output a thread in float32: past the caches where the outputs are aligned, and through them."""
    n = (1 << 21) + 37
    x, *v = (integers(n + offset, seed=i, dtype=x_dtype if i == 0 else v_dtype)[offset:] for i in range(3))
    expected = x + 0.5 * v[0].to(x_dtype) - 0.125 * v[1].to(x_dtype)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        memory = torch.full((n + offset + 9,), 77, dtype=x_dtype)
        copies = None if low is None else torch.full((n + offset + 9,), 77, dtype=low)
        out, copy = memory[offset : offset + n], None if low is None else copies[offset : offset + n]
        linear_update(x, v, [0.5, -0.125], out=out, low=copy)
        assert torch.equal(out, expected)
        assert memory[:offset].eq(77).all()
        assert memory[offset + n :].eq(77).all()
        if low is not None:
            assert torch.equal(copy, expected.to(low))
            assert copies[:offset].eq(77).all()
            assert copies[offset + n :].eq(77).all()
    linear_update(x, v, [0.5, -0.125], out=x)  # in place: never past the caches
    assert torch.equal(x, expected)


@pytest.mark.parametrize(("terms", "n"), [(1, 16385), (3, 70001), (40, 999), (2, 1 << 20)])
def test_threads_do_not_change_a_bit(terms, n):
    x, *v = (randn(n, seed=i) for i in range(terms + 1))
    b = randn(terms, seed=99).tolist()
    results = []
    for threads in (1, 2, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(linear_update(x, v, b, scale=0.3, low=F16))
    assert all(torch.equal(state, results[0][0]) and torch.equal(low, results[0][1]) for state, low in results[1:])


# ---- gradients ----


def leaves(*shape, count=3, dtype=F64):
    return [randn(*shape, seed=i, dtype=dtype).requires_grad_() for i in range(count)]


@EACH
def test_gradcheck(name):
    with backend(name):
        for terms in (1, 3):
            inputs = tuple(leaves(2, 3, count=terms + 1))
            update = lambda x, *v: linear_update(x, v, [0.3, -1.5, 0.7][: len(v)], scale=len(v) - 2.3)  # noqa: E731
            assert torch.autograd.gradcheck(update, inputs, check_batched_grad=True)
            assert torch.autograd.gradgradcheck(update, inputs)


@EACH
@pytest.mark.parametrize("scale", [1, 0, -0.3])
@pytest.mark.parametrize("loss", ["sum", "permuted", "sliced", "scaled", "dense"])
def test_gradients_that_arrive_strided(loss, scale, name):
    weights = randn(7, 5, 3, seed=9, dtype=F64)
    reduce = {
        "sum": lambda y: y.sum(),
        "permuted": lambda y: (y.permute(2, 1, 0) * weights).sum(),
        "sliced": lambda y: (y[:, 1:4] * weights.permute(2, 1, 0)[:, 1:4]).sum(),
        "scaled": lambda y: y.mean() * 3,
        "dense": lambda y: y.square().sum(),
    }[loss]
    got, expected = leaves(3, 5, 7), leaves(3, 5, 7)
    for leaf in (got, expected):
        leaf[1].requires_grad_(loss != "scaled")  # one that needs none among those that do
    with backend(name):
        total = reduce(linear_update(got[0], got[1:], [0.3, -1.5], scale=scale))
        total.backward(retain_graph=True)
        total.backward()
    x, v, w = expected
    (2 * reduce(scale * x + 0.3 * v - 1.5 * w)).backward()
    for a, b in zip(got, expected, strict=True):
        assert a.grad is b.grad is None or torch.allclose(a.grad, b.grad, rtol=1e-12, atol=1e-12)


def test_one_velocity_in_two_terms_and_as_the_state():
    x = randn(7, seed=0, dtype=F64).requires_grad_()
    linear_update(x, [x, x], [0.5, 0.25]).sum().backward()
    assert x.grad.eq(1.75).all()


@pytest.mark.parametrize("v_dtype", [F32, BF16, F16])
def test_gradients_have_the_dtypes_of_the_inputs(v_dtype):
    x, v, w = leaves(4, 5, dtype=F32)
    v, w = (t.detach().to(v_dtype).requires_grad_() for t in (v, w))
    state, low = linear_update(x, [v, w], [1.5, -1.0], low=BF16)
    (2 * low).sum().backward(retain_graph=True)
    assert (x.grad.dtype, v.grad.dtype, w.grad.dtype) == (F32, v_dtype, v_dtype)
    assert [t.grad.unique().tolist() for t in (x, v, w)] == [[2.0], [3.0], [-2.0]]
    (state.sum() + (2 * low).sum()).backward()
    assert [t.grad.unique().tolist() for t in (x, v, w)] == [[5.0], [7.5], [-5.0]]


@pytest.mark.parametrize("which", ["x", r"v[1]", "out", "low"])
def test_no_gradient_with_out_or_a_tensor_low(which):
    t = {k: randn(3, 4, seed=i) for i, k in enumerate(["x", "v[0]", "v[1]", "out"])}
    t["low"] = torch.zeros(3, 4, dtype=BF16)
    t[which].requires_grad_()
    for target in ("out", "low") if which not in ("out", "low") else (which,):
        args = t["x"], [t["v[0]"], t["v[1]"]], [0.5, 1.0]
        before = t[target].clone()
        with pytest.raises(
            ValueError, match=r"^[^:]*: expected no gradient with out= or a tensor low=, got requires"
        ) as e:
            linear_update(*args, **{target: t[target]})
        assert str(e.value).startswith(which + ":")
        assert torch.equal(t[target], before)
        with torch.no_grad():
            assert torch.equal(pair(linear_update(*args, **{target: t[target]}))[0], linear_update(*args))


@EACH
@pytest.mark.parametrize("columns", [6, 5], ids=["contiguous", "sliced"])
@pytest.mark.parametrize("target", ["out", "low"])
def test_autograd_sees_a_tensor_that_was_written(target, columns, name):
    x, v = randn(4, columns, seed=0), randn(4, columns, seed=1)
    leaf = torch.ones(4, 6, dtype=F32 if target == "out" else BF16, requires_grad=True)
    saved = (leaf * 1)[:, :columns]
    loss = saved.square().sum()
    with backend(name), torch.no_grad():
        linear_update(x, [v], [0.5], **{target: saved})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_torch_func_transforms():
    x, v = randn(3, 5, seed=0, dtype=F64), randn(3, 5, seed=1, dtype=F64)

    def update(x, v):
        return linear_update(x, [v, x], [0.25, 0.5], scale=-2.0)

    _, tangent = torch.func.jvp(update, (x, v), (torch.ones_like(x), torch.ones_like(v)))
    torch.testing.assert_close(tangent, torch.full_like(x, -1.25))
    grad = torch.func.grad(lambda v: update(x, v).square().sum())(v)
    torch.testing.assert_close(grad, 0.5 * update(x, v))
    torch.testing.assert_close(torch.func.vmap(update)(x, v), update(x, v))
    state, low = torch.func.vmap(lambda x, v: linear_update(x, [v], [0.25], low=BF16))(x, v)
    assert torch.equal(low, state.bfloat16())
    for written in (dict(out=x), dict(low=torch.empty(5, dtype=BF16))):
        with pytest.raises(ValueError, match=r"^out: expected None, and low a dtype"):
            torch.func.vmap(lambda x, v, kw=written: linear_update(x, [v], [0.25], **kw))(x, v)


# ---- torch.compile ----


def multistep_in_place(x, v, low):
    for i in range(3):
        linear_update(x, [v, low], [0.5, -0.25 * i], out=x, low=low)  # the copy is the next velocity
    return x, low


def update_of_a_view(x, v, low):
    y = x[:, 1:5]
    return linear_update(y, [v[:, 1:5]] * 3, [0.5, 0.25, 1.0], out=y)


def update_and_read(x, v, low):
    before = x @ x.T
    return before, linear_update(x, [v, low], [0.5, 1.0], low=F16)[0], linear_update(x, [v], [2.0], out=x)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("program", [multistep_in_place, update_of_a_view, update_and_read], ids=lambda f: f.__name__)
def test_mutation_under_compile(program, compiler):
    def inputs():
        return integers(5, 9, seed=0), integers(5, 9, seed=1, dtype=BF16), integers(5, 9, seed=2, dtype=BF16)

    torch._dynamo.reset()
    eager, compiled = inputs(), inputs()
    expected = program(*eager)
    got = torch.compile(program, fullgraph=True, backend=compiler)(*compiled)
    expected, got = (r if isinstance(r, tuple) else (r,) for r in (expected, got))
    assert all(torch.equal(a, b) for a, b in zip((*got, *compiled), (*expected, *eager), strict=True))


def test_gradients_under_compile():
    def loss(x, v, w):
        state, low = linear_update(x, [v, w], [0.3, 2.5], scale=0.7, low=BF16)
        return (state.square() + low).sum()

    eager, compiled = leaves(3, 7, dtype=F32), leaves(3, 7, dtype=F32)
    torch._dynamo.reset()
    loss(*eager).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(*compiled).backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(eager, compiled, strict=True))


@pytest.mark.parametrize("low", [None, F16])
def test_opcheck_of_the_mutable_op(low):
    x, v, w, out = (randn(3, 21, seed=i) for i in range(4))
    copy = None if low is None else torch.empty(3, 21, dtype=low)
    torch.library.opcheck(torch.ops.flowkernels.linear_update_out.default, (x, [v, w], [0.3, 0.1], -0.3, out, copy))


# ---- the meta device and errors ----


def test_on_the_meta_device():
    x = torch.empty(2, 3, 4, 5, device="meta").to(memory_format=torch.channels_last)
    state, low = linear_update(x, [x.bfloat16()] * 2, [0.1, 0.2], low=BF16)
    assert (state.shape, state.dtype, low.dtype, state.device.type) == (x.shape, F32, BF16, "meta")
    assert state.is_contiguous()
    assert low.is_contiguous()
    assert linear_update(x, [x], [0.1], out=x) is x


X = torch.zeros(3, 4)
HALF = X.bfloat16()


@pytest.mark.parametrize(
    ("error", "message", "args", "kwargs"),
    [
        (TypeError, r"scale: expected a number, got 'a'", (X, [X], [0.1]), dict(scale="a")),
        (TypeError, r"scale: expected a number, got None", (X, [X], [0.1]), dict(scale=None)),
        (TypeError, r"x: expected a torch.Tensor, got float 1.0", (1.0, [X], [0.1]), {}),
        (TypeError, r"x: expected torch.float32 or torch.float64, got a torch.bfloat16", (HALF, [HALF], [0.1]), {}),
        (TypeError, r"v: expected a sequence, .*, got None", (X, None, [0.1]), {}),
        (ValueError, r"v: expected at least one velocity, got none", (X, [], []), {}),
        (TypeError, r"v\[0\]: expected a torch.Tensor, got str 'x'", (X, "x", [0.1]), {}),
        (TypeError, r"v\[1\]: expected a torch.Tensor, got NoneType None", (X, [X, None], [0.1, 0.2]), {}),
        (TypeError, r"v\[0\]: expected torch.float32 or .*, got a torch.float64", (X, [X.double()], [0.1]), {}),
        (TypeError, r"v\[0\]: expected torch.float64, got a torch.float32", (X.double(), [X], [0.1]), {}),
        (TypeError, r"v\[1\]: expected torch.bfloat16, got a torch.float32", (X, [HALF, X], [0.1, 1]), {}),
        (TypeError, r"v\[0\]: expected .*, got a torch.int64", (X, [X.long()], [0.1]), {}),
        (ValueError, r"v\[1\]: expected x's shape \[3, 4\] on cpu, got .*\[4\]", (X, [X, X[0]], [0.1, 1]), {}),
        (ValueError, r"v\[0\]: expected x's shape .* on meta", (X, [X.to("meta")], [0.1]), {}),
        (TypeError, r"b: expected a sequence, .*, got 0.1", (X, [X], 0.1), {}),
        (ValueError, r"b: expected 2 coefficients, one for each velocity, got 1", (X, [X, X], [0.1]), {}),
        (TypeError, r"b\[1\]: expected a number, got 'a'", (X, [X, X], [0.1, "a"]), {}),
        (TypeError, r"b\[0\]: expected a number, got None", (X, [X], [None]), {}),
        (TypeError, r"b\[0\]: expected a number, got a .*\[1\]", (X, [X], [torch.ones(1)]), {}),
        (
            ValueError,
            r"b\[0\]: expected a number that needs no gradient",
            (X, [X], [torch.tensor(0.1, requires_grad=True)]),
            {},
        ),
        (TypeError, r"out: expected a torch.Tensor, got int 3", (X, [X], [0.1]), dict(out=3)),
        (TypeError, r"out: expected torch.float32, got a torch.float64", (X, [X], [0.1]), dict(out=X.double())),
        (ValueError, r"out: expected x's shape .*, got .*\[4, 3\]", (X, [X], [0.1]), dict(out=X.T.clone())),
        (ValueError, r"out: expected x's shape .* on meta", (X, [X], [0.1]), dict(out=X.to("meta"))),
        (TypeError, r"low: expected torch.bfloat16 or .*, got a torch.float32", (X, [X], [0.1]), dict(low=X.clone())),
        (TypeError, r"low: expected torch.bfloat16, .*, got torch.float32", (X, [X], [0.1]), dict(low=F32)),
        (TypeError, r"low: expected torch.bfloat16, .*, got bf16", (X, [X], [0.1]), dict(low="bf16")),
        (ValueError, r"low: expected x's shape .*, got .*\[4\]", (X, [X], [0.1]), dict(low=HALF[0])),
        (ValueError, r"low: expected x's shape .* on meta", (X, [X], [0.1]), dict(low=HALF.to("meta"))),
    ],
)
def test_errors_name_the_argument(error, message, args, kwargs):
    given = [kwargs[k] for k in ("out", "low") if isinstance(kwargs.get(k), torch.Tensor)]
    version = [t._version for t in given]
    with pytest.raises(error, match="^" + message):
        linear_update(*args, **kwargs)
    assert [t._version for t in given] == version
    assert X.eq(0).all()
