import itertools
import math

import pytest
import torch
from _pairs import covering, words_of
from hypothesis import given
from hypothesis import strategies as st

from flowkernels.ops.euler_step import euler_step
from flowkernels.ops.linear_euler import linear_euler
from flowkernels.ops.linear_euler.samples import error_and_bound, make, sample_inputs
from flowkernels.ops.linear_update import linear_update
from flowkernels.ops.samples import arrange, generator
from flowkernels.runtime.backends import BACKENDS, backend

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = [F32, BF16, F16, F64]
SAMPLES = list(sample_inputs())
SEEDS = st.integers(0, 2**32 - 1)
EACH = pytest.mark.parametrize("name", BACKENDS)
EVERY = "bias norm affine scale shift"


def state_of(dtype):
    return F64 if dtype == F64 else F32


def integers(*shape, seed, dtype=F32):
    """Whole numbers, small enough that every operation on them is exact."""
    return torch.randint(-4, 5, shape, generator=generator(seed)).to(dtype)


def exact(n, tokens, d, outputs, seed, dtype, modulated=True):
    """A state, tokens, weights and options of whole numbers, of which every product and sum is exact."""
    x, z = integers(n, tokens, outputs, seed=seed, dtype=state_of(dtype)), integers(n, tokens, d, seed=1, dtype=dtype)
    weight = integers(outputs, d, seed=2, dtype=dtype)
    options = dict(bias=integers(outputs, seed=3, dtype=dtype))
    if modulated:
        options |= dict(scale=integers(n, d, seed=4, dtype=dtype), shift=integers(n, d, seed=5, dtype=dtype))
    return x, z, weight, options


def pair(result):
    return result if isinstance(result, tuple) else (result, None)


# ---- against float64, and against the other ops ----


@given(
    st.tuples(st.integers(1, 5), st.integers(1, 70), st.integers(1, 150), st.integers(1, 40)),
    st.sets(st.sampled_from(EVERY.split())),
    st.sampled_from([None, 0.0, 1.0, 3.5]),
    st.integers(0, 3),
    st.sampled_from(DTYPES),
    st.sampled_from(BACKENDS),
    SEEDS,
)
def test_formula_in_float64(sizes, options, guidance, terms, dtype, name, seed):
    n, tokens, d, outputs = sizes
    options = " ".join(sorted(options | ({"norm"} if "affine" in options else set())))
    sample = make(
        (n, tokens * outputs), d, (tokens,), dtype=dtype, options=options, guidance=guidance, terms=terms, seed=seed
    )
    with backend(name):
        error, bound = error_and_bound(sample, linear_euler(*sample.args, **sample.kwargs))
    assert error <= bound


@given(
    st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 12), st.integers(1, 12)),
    st.integers(1, 4),
    st.integers(0, 3),
    st.sampled_from(["pqc", "cpq"]),
    st.sampled_from([None, 2.5]),
    st.sampled_from(DTYPES),
    SEEDS,
)
def test_patches_in_float64(grid, p, extra, order, guidance, dtype, seed):
    n, C, high, wide = grid
    shape = (n, C, p * high, p * wide)
    sample = make(
        shape, 19, dtype=dtype, options=EVERY, patch=p, order=order, extra=extra, guidance=guidance, seed=seed
    )
    error, bound = error_and_bound(sample, linear_euler(*sample.args, **sample.kwargs))
    assert error <= bound


@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 30),
    SEEDS,
    st.sampled_from(DTYPES),
    st.sampled_from([1.0, 0.0, 0.25, -2.0]),
)
def test_is_a_linear_layer_and_a_step(tokens, d, outputs, seed, dtype, x_scale):
    x, z, weight, options = exact(3, tokens, d, outputs, seed, dtype)
    f = z.double() * (1 + options["scale"].double()[:, None]) + options["shift"].double()[:, None]
    v = f @ weight.double().T + options["bias"].double()
    assert torch.equal(linear_euler(x, z, weight, 0.5, **options).double(), x.double() + 0.5 * v)
    v, half = v.to(x.dtype), x.shape[0] // 2
    assert torch.equal(linear_euler(x, z, weight, 0.5, **options), euler_step(x, v, 0.5))
    terms = [integers(*x.shape, seed=6 + i, dtype=x.dtype) for i in range(2)]
    got = linear_euler(x, z, weight, 0.25, **options, history=terms, b=[-0.5, 2.0], x_scale=x_scale)
    assert torch.equal(got, linear_update(x, [v, *terms], [0.25, -0.5, 2.0], scale=x_scale))
    rows = {k: t if k == "bias" else t[:2] for k, t in options.items()}  # two samples as one and its unconditional
    guided = linear_euler(x[:half], z[:2], weight, 0.5, **rows, guidance=2.0)
    assert torch.equal(guided, euler_step(x[:half], v[:1], 0.5, v_uncond=v[1:2], guidance=2.0))


@pytest.mark.parametrize("order", ["pqc", "cpq"])
@pytest.mark.parametrize("channels", [3, 5])
@pytest.mark.parametrize("p", [1, 2, 3])
def test_every_output_has_its_place(p, channels, order):
    """The outputs are their own numbers: as the models put them back, by einsum."""
    n, high, wide, C = 2, 4, 5, 3
    outputs = p * p * channels
    z = torch.arange(n * high * wide * outputs, dtype=F32).view(n, high * wide, outputs)
    if order == "pqc":
        v = torch.einsum("nhwpqc->nchpwq", z.view(n, high, wide, p, p, channels))
    else:
        v = torch.einsum("nhwcpq->nchpwq", z.view(n, high, wide, channels, p, p))
    v = v.reshape(n, channels, high * p, wide * p)[:, :C]
    x = torch.zeros(n, C, high * p, wide * p)
    for name in BACKENDS:
        with backend(name):
            assert torch.equal(linear_euler(x, z, torch.eye(outputs), 1.0, patch=p, order=order), v)


@EACH
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_scaled_state_is_rounded_before_the_sum(dtype, name):
    sample = make((5, 60), 33, (4,), dtype=dtype, options=EVERY, terms=2)
    x, *args = sample.args
    x_scale = 0.3 if name in ("cpu", "cuda") else -0.5  # Triton may contract another one with the sum
    with backend(name):
        plain, one = (linear_euler(x, *args, **sample.kwargs, **given) for given in ({}, dict(x_scale=1)))
        scaled = linear_euler(x, *args, **sample.kwargs, x_scale=x_scale)
        before = linear_euler(torch.mul(x, x_scale), *args, **sample.kwargs)
    assert torch.equal(plain, one)
    assert torch.equal(scaled, before)


@EACH
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_constant_row_has_no_spread(dtype, name):
    """LayerNorm of a constant is exactly zero, however large: nothing is a difference of squares."""
    z = torch.tensor([1.0, -3.0, 4096.0, 0.0]).to(dtype)[:, None].expand(4, 37)
    weight, bias = integers(5, 37, seed=0, dtype=dtype), integers(5, seed=1, dtype=dtype)
    x = integers(4, 5, seed=2, dtype=state_of(dtype))
    with backend(name):
        got = linear_euler(x, z, weight, 1.0, bias=bias, norm=1e-6)
    assert torch.equal(got, x + bias.to(x.dtype))


def test_a_spread_far_from_zero():
    """z = 4096 +- 1: E[z^2] - E[z]^2 would lose every digit of the variance 1 in float32. The kernel's is exact."""
    z = 4096 + torch.tensor([1.0, -1.0]).repeat(3, 64)
    weight = integers(7, 128, seed=0)
    with backend("cpu"):
        got = linear_euler(torch.zeros(3, 7), z, weight, 1.0, norm=0.0)
    assert torch.equal(got, ((z - 4096) @ weight.T))


@EACH
def test_parameters_in_the_states_dtype(name):
    """float32 weights, LayerNorm and modulation with bfloat16 tokens; a scale and a shift of two dtypes."""
    x, z, weight, options = exact(3, 5, 18, 4, 0, BF16)
    with backend(name):
        expected = linear_euler(x, z, weight, 0.5, **options)
        for wide in ({"weight"}, {"bias"}, {"scale"}, {"shift"}, {"scale", "shift"}, {"weight", *options}):
            given = {k: t.float() if k in wide else t for k, t in (options | dict(weight=weight)).items()}
            assert torch.equal(linear_euler(x, z, h=0.5, **given), expected)


# ---- views of tensors are read in place ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_behind_others_and_halves_of_an_embedding(dtype):
    """What a transformer hands over: the image's tokens behind the text's, and halves of one row of modulation."""
    x, z, weight, options = exact(3, 6, 40, 8, 0, dtype)
    expected = linear_euler(x, z, weight, 0.5, **options)
    longer = torch.full((3, 11, 40), math.nan, dtype=z.dtype)
    longer[:, 5:] = z
    scale, shift = torch.cat([options["scale"], options["shift"]], 1).chunk(2, dim=1)
    assert not scale.is_contiguous()
    given = options | dict(scale=scale, shift=shift)
    assert torch.equal(linear_euler(x, longer[:, 5:], weight, 0.5, **given), expected)
    assert torch.equal(linear_euler(x, longer[:, 5:].unflatten(1, (2, 3)), weight, 0.5, **given), expected)
    wide = torch.cat([torch.full_like(weight, math.nan), weight], 1)[:, 40:]
    assert torch.equal(linear_euler(x, z, wide, 0.5, **options), expected)
    assert torch.equal(linear_euler(x, z, weight.T.contiguous().T, 0.5, **options), expected)
    assert torch.equal(linear_euler(x.flatten(1), z, weight, 0.5, **options), expected.flatten(1))
    one = linear_euler(x[:, 0], z[:, 0], weight, 0.5, **options)  # no dimension of tokens
    assert torch.equal(one, expected[:, 0])


def test_one_row_of_modulation_for_all():
    x, z, weight, options = exact(3, 6, 19, 8, 0, F32)
    for k in ("scale", "shift"):
        row = options[k][1:2]
        shared = linear_euler(x, z, weight, 0.5, **options | {k: row})
        for each in (row.expand(3, 19), row.expand(3, 19).contiguous()):
            assert torch.equal(shared, linear_euler(x, z, weight, 0.5, **options | {k: each}))


# ---- outputs ----


@EACH
@pytest.mark.parametrize("sample", covering(SAMPLES, lambda s: words_of(s.id)), ids=lambda s: s.id)
def test_in_place_equals_out_of_place(sample, name):
    x, *args = sample.args
    with backend(name):
        state, low = pair(linear_euler(x, *args, **sample.kwargs))
        target = arrange(x, "sliced") if not x.is_contiguous() else x.clone()
        version = target._version
        got, got_low = pair(linear_euler(target, *args, **sample.kwargs, out=target))
    assert got is target
    assert target._version > version
    assert torch.equal(target, state)
    assert state.is_contiguous()
    assert low is got_low is None or torch.equal(got_low, low)


def arrange_in(memory, like, layout):
    """A view of `memory` with the shape of `like` and the strides of a layout, one element from its start."""
    return memory.as_strided(like.shape, arrange(like, layout).stride(), 1)


@EACH
@pytest.mark.parametrize("patch", [None, 2])
@pytest.mark.parametrize("layout", ["contiguous", "misaligned", "sliced", "permuted"])
def test_writes_what_it_is_given_and_nothing_else(layout, patch, name):
    x = integers(2, 3, 4, 10, seed=0)
    z, weight = (integers(*s, seed=1) for s in (((2, 10, 7), (16, 7)) if patch else ((2, 4, 7), (30, 7))))
    v = linear_euler(torch.zeros_like(x), z, weight, 1.0, patch=patch)  # of a patch's 4 channels 3 are the velocity
    # no two values alike: a write to a neighbour would show
    memories = [torch.arange(1000, 3000, dtype=F32), torch.arange(2000).bfloat16(), torch.arange(2000).half()]
    out, low, velocity = (arrange_in(m, x, layout) for m in memories)
    before, versions = [m.clone() for m in memories], [t._version for t in (out, low, velocity)]
    with backend(name):
        got = linear_euler(x, z, weight, 0.5, patch=patch, out=out, low=low, velocity_out=velocity)
    assert got[0] is out
    assert got[1] is low
    assert all(t._version > version for t, version in zip((out, low, velocity), versions, strict=True))
    for t, memory, was, expected in zip((out, low, velocity), memories, before, (x + v / 2, x + v / 2, v), strict=True):
        assert torch.equal(t, expected.to(t.dtype))
        arrange_in(was, x, layout).copy_(t)
        assert torch.equal(memory, was)


@EACH
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_velocity_may_replace_the_oldest_of_the_history(dtype, name):
    x, z, weight, options = exact(2, 5, 9, 6, 0, dtype)
    old, older = (integers(*x.shape, seed=i, dtype=x.dtype) for i in (7, 8))
    v = linear_euler(torch.zeros_like(x), z, weight, 1.0, **options)
    with backend(name):
        new, low = linear_euler(
            x, z, weight, 1.5, **options, history=[old, older], b=[-0.5, 0.25], velocity_out=older, low=BF16
        )
    assert torch.equal(older, v)
    assert torch.equal(new, x + 1.5 * v - 0.5 * old + 0.25 * integers(*x.shape, seed=8, dtype=x.dtype))
    assert torch.equal(low, new.bfloat16())


def test_adams_bashforth_in_one_buffer_of_velocities():
    """Steps of order 2 with the last velocity in a buffer, against every velocity in torch."""
    net = integers(6, 6, seed=0).double() / 16
    x = expected = integers(4, 6, seed=1).double()
    last, buffer = None, torch.empty_like(x)
    for k in range(6):
        v = expected @ net.T
        expected = expected + (v if last is None else 1.5 * v - 0.5 * last) / 8
        last = v
        terms = {} if k == 0 else dict(history=[buffer], b=[-0.5 / 8])
        x = linear_euler(x, x, net, (1.0 if k == 0 else 1.5) / 8, **terms, velocity_out=buffer)
        torch.testing.assert_close(x, expected, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(buffer, v, rtol=1e-14, atol=1e-14)


# ---- values that are not finite; threads ----


@EACH
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("options", ["", "bias norm affine scale shift"])
def test_what_is_not_finite_stays_with_its_token(value, options, name):
    sample = make((3, 4, 6, 20), 37, patch=2, options=options, guidance=2.0)
    x, z, *args = sample.args
    with backend(name):
        before = linear_euler(*sample.args, **sample.kwargs)
        z = z.clone()
        z[4, 7, 36] = value  # the unconditional half of sample 1
        after = linear_euler(x, z, *args, **sample.kwargs)
    token = torch.zeros(3, 4, 6, 20, dtype=torch.bool)
    token[1, :, 0:2, 14:16] = True
    assert not after[token].isfinite().any()
    assert torch.equal(after[~token], before[~token])


@pytest.mark.parametrize("dtype", [F32, BF16, F64])
@pytest.mark.parametrize("options", ["", EVERY])
def test_threads_do_not_change_a_bit(options, dtype):
    cases = [
        make((2, 4, 64, 64), 200, patch=2, options=options, guidance=3.0, dtype=dtype, low=BF16),
        make((200, 30), 300, options=options, dtype=dtype),
        make((1, 70), 3000, (5,), options=options, dtype=dtype),
        make((3, 300), 1200, (1,), options=options, dtype=dtype),
    ]
    for sample in cases:
        results = []
        for threads in (1, 2, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(pair(linear_euler(*sample.args, **sample.kwargs)))
        for (state, low), (first, first_low) in itertools.product(results[1:], results[:1]):
            assert torch.equal(state, first)
            assert low is None or torch.equal(low, first_low)


@pytest.mark.parametrize(
    ("name", "d", "outputs"),
    [("cpu", 3000, 3), ("cpu", 64, 700), ("cpu", 20000, 2), ("cpu", 512, 130), ("triton", 600, 3), ("triton", 64, 130)],
)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_shapes_past_the_tiles(name, d, outputs, dtype):
    sample = make((37, outputs), d, dtype=dtype, options="bias norm", guidance=None)
    with backend(name):
        error, bound = error_and_bound(sample, linear_euler(*sample.args, **sample.kwargs))
    assert error <= bound


@pytest.mark.parametrize(
    ("shape", "d", "dtype", "guidance", "options"),
    [
        ((40, 70), 72, BF16, None, EVERY),  # blocks of 64 outputs and of the 6 after them
        ((40, 70), 72, BF16, None, "bias"),
        ((40, 70), 72, F16, 2.0, EVERY),
        ((9, 33), 72, F32, 2.0, EVERY),
        ((5, 6), 5000, F32, 2.0, EVERY),  # fewer tokens in a block than its tensor-core tile has rows
        ((3, 6), 16000, BF16, None, EVERY),
        ((2, 9), 26000, F32, None, EVERY),  # a token is more than shared memory holds
        ((2, 9), 26000, F16, 1.5, EVERY),
    ],
)
def test_shapes_past_the_tiles_of_cuda(shape, d, dtype, guidance, options):
    sample = make(shape, d, dtype=dtype, options=options, guidance=guidance, mean=5.0, low=BF16)
    with backend("cuda"):
        error, bound = error_and_bound(sample, linear_euler(*sample.args, **sample.kwargs))
    assert error <= bound


@EACH
@pytest.mark.parametrize("dtype", [F32, F64])
def test_a_long_history_whose_last_the_velocity_replaces(dtype, name):
    x, z, weight, options = exact(2, 5, 9, 6, 0, dtype)
    history = [integers(*x.shape, seed=7 + i, dtype=x.dtype) for i in range(40)]
    b = (integers(40, seed=6, dtype=F64) / 4).tolist()
    v = linear_euler(torch.zeros_like(x), z, weight, 1.0, **options)
    expected = linear_update(x, [v, *history], [1.5, *b], scale=-0.5)
    with backend(name):
        got = linear_euler(x, z, weight, 1.5, **options, history=history, b=b, x_scale=-0.5, velocity_out=history[-1])
    assert torch.equal(history[-1], v)
    assert torch.equal(got, expected)


# ---- no gradients; transforms; compilers ----


@pytest.mark.parametrize(
    "which", ["x", "z", "weight", "bias", "norm_weight", "scale", "shift", "out", "low", "velocity_out", "history[0]"]
)
def test_gradients_are_refused(which):
    x, z, weight, h = make((2, 6), 5).args
    given = dict(bias=torch.ones(6), norm=1e-5, norm_weight=torch.ones(5), scale=torch.ones(2, 5))
    given |= dict(shift=torch.ones(2, 5), out=torch.zeros(2, 6), low=torch.zeros(2, 6).bfloat16())
    given |= dict(velocity_out=torch.zeros(2, 6), history=[torch.ones(2, 6)], b=[0.5])
    tensors = dict(x=x, z=z, weight=weight, **given)
    (given["history"][0] if which == "history[0]" else tensors[which]).requires_grad_()
    with pytest.raises(ValueError, match=r"expected no gradient: linear_euler has none; use torch\.no_grad") as e:
        linear_euler(x, z, weight, h, **given)
    assert str(e.value).startswith(which + ":")
    assert not given["out"].any()
    with torch.no_grad():
        linear_euler(x, z, weight, h, **given)
    assert given["out"].all()


def test_torch_func_transforms():
    x, z, weight, options = exact(3, 4, 6, 5, 0, F64)

    def step(x, z):
        return linear_euler(x, z, weight, 0.25, **options)

    _, tangent = torch.func.jvp(step, (x, z), (torch.ones_like(x), torch.zeros_like(z)))
    assert tangent.eq(1).all()
    many = torch.stack([z, 2 * z])
    assert torch.equal(torch.func.vmap(lambda z: step(x, z))(many), torch.stack([step(x, t) for t in many]))
    for written in (dict(out=x), dict(velocity_out=x.clone()), dict(low=torch.empty(x.shape, dtype=BF16))):
        with pytest.raises(ValueError, match=r"^(out|velocity_out): expected None, and low a dtype"):
            torch.func.vmap(lambda z, kw=written: linear_euler(x, z, weight, 0.25, **kw))(many)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_mutation_under_compile(compiler):
    def sampler(x, z, weight, buffer, low):
        for i in range(3):
            history = dict(history=[buffer], b=[-0.25]) if i else {}
            linear_euler(x, z + low.float(), weight, 0.5, out=x, low=low, velocity_out=buffer, **history)
        return x, buffer, low

    def inputs():
        return [
            integers(3, 6, seed=0),
            integers(3, 6, seed=1),
            integers(6, 6, seed=2),
            torch.zeros(3, 6),
            torch.zeros(3, 6, dtype=BF16),
        ]

    torch._dynamo.reset()
    eager, compiled = inputs(), inputs()
    expected = sampler(*eager)
    got = torch.compile(sampler, fullgraph=True, backend=compiler)(*compiled)
    assert all(torch.equal(a, b) for a, b in zip((*got, *compiled), (*expected, *eager), strict=True))


@pytest.mark.parametrize("low", [None, F16])
def test_opcheck_of_the_mutable_op(low):
    sample = make((2, 3, 4, 6), 9, patch=2, guidance=2.0, options=EVERY, terms=1)
    x, k = sample.args[0], sample.kwargs
    names = ("bias", "norm", "norm_weight", "norm_bias", "scale", "shift", "patch")
    copy = None if low is None else torch.empty(x.shape, dtype=low)
    args = (*sample.args[:3], *map(k.get, names), "pqc", 2.0, 0.5, k["history"], k["b"], 0.3)
    written = torch.empty_like(x), copy, torch.empty_like(x)
    torch.library.opcheck(torch.ops.flowkernels.linear_euler_out.default, (*args, *written))


def test_on_the_meta_device():
    x, z, weight = (torch.empty(s, device="meta") for s in ((2, 3, 4, 4), (2, 4, 9), (12, 9)))
    state, low = linear_euler(x, z.bfloat16(), weight, 0.5, patch=2, low=BF16)
    assert (state.shape, state.dtype, low.dtype, state.device.type) == (x.shape, F32, BF16, "meta")
    assert linear_euler(x, z, weight, 0.5, patch=2, out=x) is x


X, Z, W = torch.zeros(2, 6), torch.zeros(2, 3, 5), torch.zeros(2, 5)
IMAGE, TOKENS, HEAD = torch.zeros(2, 3, 4, 6), torch.zeros(2, 6, 5), torch.zeros(12, 5)


@pytest.mark.parametrize(
    ("error", "message", "args", "kwargs"),
    [
        (TypeError, r"x: expected a torch.Tensor, got float 1.0", (1.0, Z, W, 0.1), {}),
        (TypeError, r"x: expected torch.float32 or torch.float64, got a torch.bfloat16", (X.bfloat16(), Z, W, 0.1), {}),
        (ValueError, r"x: expected shape \[n, \*shape\]", (torch.tensor(1.0), Z, W, 0.1), {}),
        (TypeError, r"z: expected torch.float64, got a torch.float32", (X.double(), Z, W, 0.1), {}),
        (TypeError, r"z: expected torch.float32 or .*, got a torch.float64", (X, Z.double(), W, 0.1), {}),
        (ValueError, r"z: expected shape \[2, \*tokens, 5\] on cpu, got .*\[3, 3, 5\]", (X, Z[[0, 1, 1]], W, 0.1), {}),
        (ValueError, r"z: expected .*conditional and unconditional samples, got", (X, Z, W, 0.1), dict(guidance=2.0)),
        (ValueError, r"z: expected shape \[2, \*tokens, 4\]", (X, Z, W[:, :4], 0.1), {}),
        (TypeError, r"weight: expected a torch.Tensor, got list", (X, Z, [1.0], 0.1), {}),
        (TypeError, r"weight: expected torch.float32, got a torch.bfloat16", (X, Z, W.bfloat16(), 0.1), {}),
        (
            TypeError,
            r"weight: expected torch.bfloat16 or torch.float32, got a torch.float16",
            (X, Z.bfloat16(), W.half(), 0.1),
            {},
        ),
        (ValueError, r"weight: expected a tensor of shape \[outputs, d\], not empty", (X, Z, W[0], 0.1), {}),
        (ValueError, r"weight: expected as many outputs as make 6 elements .* 3 tokens", (X, Z, W[:1], 0.1), {}),
        (ValueError, r"bias: expected shape \[2\] on cpu, got .*\[5\]", (X, Z, W, 0.1), dict(bias=torch.zeros(5))),
        (ValueError, r"scale: expected shape \[2, 5\] or \[1, 5\] on cpu", (X, Z, W, 0.1), dict(scale=torch.ones(5))),
        (ValueError, r"shift: expected shape \[2, 5\] or", (X, Z, W, 0.1), dict(shift=torch.ones(3, 5))),
        (TypeError, r"shift: expected a torch.Tensor, got float", (X, Z, W, 0.1), dict(shift=1.0)),
        (ValueError, r"norm_weight: expected None without norm", (X, Z, W, 0.1), dict(norm_weight=torch.ones(5))),
        (TypeError, r"norm: expected a number", (X, Z, W, 0.1), dict(norm="layer")),
        (TypeError, r"h: expected a number", (X, Z, W, None), {}),
        (TypeError, r"guidance: expected a number", (X, Z, W, 0.1), dict(guidance="2")),
        (
            ValueError,
            r"order: expected 'pqc' or 'cpq', got 'qpc'",
            (IMAGE, TOKENS, HEAD, 1),
            dict(patch=2, order="qpc"),
        ),
        (TypeError, r"patch: expected an integer, got 2.0", (IMAGE, TOKENS, HEAD, 1), dict(patch=2.0)),
        (ValueError, r"x: expected shape \[n, C, H, W\], of patches", (X, Z, W, 0.1), dict(patch=1)),
        (
            ValueError,
            r"x: expected a height and a width that are multiples of 3",
            (IMAGE, TOKENS, HEAD, 1),
            dict(patch=3),
        ),
        (ValueError, r"z: expected 24 tokens a sample, patches of 1", (IMAGE, TOKENS, HEAD, 1), dict(patch=1)),
        (ValueError, r"weight: expected 12 outputs, 3 channels", (IMAGE, TOKENS, HEAD[:10], 1), dict(patch=2)),
        (ValueError, r"weight: expected 12 outputs, 3 channels", (IMAGE, TOKENS, HEAD[:8], 1), dict(patch=2)),
        (TypeError, r"history: expected a sequence", (X, Z, W, 0.1), dict(history=1, b=[1.0])),
        (ValueError, r"b: expected 1 coefficients, one for each velocity, got 0", (X, Z, W, 0.1), dict(history=[X])),
        (ValueError, r"history\[0\]: expected x's shape", (X, Z, W, 0.1), dict(history=[X[:1]], b=[1.0])),
        (TypeError, r"history\[1\]: expected torch.float32", (X, Z, W, 0.1), dict(history=[X, X.half()], b=[1, 1])),
        (TypeError, r"b\[0\]: expected a number", (X, Z, W, 0.1), dict(history=[X], b=["1"])),
        (TypeError, r"x_scale: expected a number, got None", (X, Z, W, 0.1), dict(x_scale=None)),
        (TypeError, r"out: expected torch.float32, got", (X, Z, W, 0.1), dict(out=X.double())),
        (ValueError, r"out: expected x's shape", (X, Z, W, 0.1), dict(out=X[:1])),
        (TypeError, r"low: expected torch.bfloat16, torch.float16 or", (X, Z, W, 0.1), dict(low=F32)),
        (ValueError, r"velocity_out: expected x's shape", (X, Z, W, 0.1), dict(velocity_out=X[0])),
        (TypeError, r"velocity_out: expected torch.float32 or .*", (X, Z, W, 0.1), dict(velocity_out=X.double())),
    ],
)
def test_errors(error, message, args, kwargs):
    with pytest.raises(error, match=rf"^{message}"):
        linear_euler(*args, **kwargs)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_float64_state_is_rounded_through_float32_as_torch_does(dtype, name):
    """A little above the middle of two numbers of 16 bits: in float32 it is the middle, which goes to the even one."""
    x = torch.full((2, 16), 1 + torch.finfo(dtype).eps / 2 + 2.0**-40, dtype=torch.float64)
    z, weight = torch.zeros(2, 3, dtype=torch.float64), torch.zeros(16, 3, dtype=torch.float64)
    with backend(name):
        state, low = linear_euler(x, z, weight, 1.0, low=dtype)
        linear_euler(x, z, weight, 1.0, low=(written := torch.empty(2, 16, dtype=dtype)))
    assert torch.equal(state, x)
    assert torch.equal(low, x.to(dtype))
    assert torch.equal(written, low)
