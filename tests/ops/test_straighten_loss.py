import math
import operator

import pytest
import torch
from _pairs import pairs
from hypothesis import given
from hypothesis import strategies as st

from flowkernels.ops.samples import Sample, arrange, generator
from flowkernels.ops.segment_points import segment_points
from flowkernels.ops.segment_points.samples import places
from flowkernels.ops.straighten_loss import StraightenLosses, reference, straighten_loss
from flowkernels.ops.straighten_loss.samples import error_and_bound, gradient_error_and_bound, sample_inputs
from flowkernels.runtime.backends import BACKENDS, backend

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
SHAPES = st.tuples(st.integers(2, 5), st.integers(1, 4), st.sampled_from([1, 2, 16, 64, 128]))
SEEDS, BATCHES = st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 4, 8])
DTYPES = [(F32, F32), (F32, BF16), (F32, F16), (F64, F64)]
EACH = pytest.mark.parametrize("name", BACKENDS)
LOSSES = pytest.mark.parametrize("loss", ["l2", "huber"])


def drawn(shape, batch, seed, dtypes=(F32, F32)):
    """Whole numbers and, with sizes that are powers of two, exact means; steps of 1/4, 1/2, 1 and 2; weights in 1/2."""
    g = generator(seed)
    bank = torch.randint(-8, 9, shape, generator=g).to(dtypes[0])
    v = torch.randint(-8, 9, (batch, *shape[2:]), generator=g).to(dtypes[1])
    h = 2.0 ** torch.randint(-2, 2, (shape[0] - 1,), generator=g)
    return (v, bank, h, *places(shape[0], shape[1], batch, g)), torch.randint(5, (batch,), generator=g) / 2


def errors(v, bank, h, interval, sample):
    """e in float64, one plain look-up after another."""
    rows = zip(interval.tolist(), sample.tolist(), strict=True)
    targets = [(bank[i + 1, s].double() - bank[i, s].double()) / h[i].double() for i, s in rows]
    return v.double() - torch.stack(targets)


def with_gradient(args, **kwargs):
    """The losses, and the gradient in v of `loss`."""
    v = args[0].detach().clone().requires_grad_()
    result = straighten_loss(v, *args[1:], **kwargs)
    return result, torch.autograd.grad(result.loss, v)[0]


def same(a, b):
    return all(torch.equal(p.nan_to_num(nan=-1.0), q.nan_to_num(nan=-1.0)) for p, q in zip(a, b, strict=True))


# ---- properties; whole numbers make them exact ----


@given(SHAPES, BATCHES, SEEDS, st.sampled_from(DTYPES), st.booleans(), st.sampled_from(BACKENDS))
def test_is_the_mean_squared_error(shape, batch, seed, dtypes, weighted, name):
    args, weight = drawn(shape, batch, seed, dtypes)
    weight = weight if weighted else None
    with backend(name):
        got, gradient = with_gradient(args, weight=weight)
    e, w = errors(*args), torch.ones(batch) if weight is None else weight
    each = e.square().mean(1)
    assert all(t.dtype == dtypes[0] for t in got)
    assert gradient.dtype == dtypes[1]
    assert torch.equal(got.per_sample.double(), each)
    assert got.loss == (w * each).mean()
    for i, mean in enumerate(got.per_interval):
        own = each[args[3] == i]
        torch.testing.assert_close(
            mean, own.mean().to(mean), rtol=2 * torch.finfo(dtypes[0]).eps, atol=0, equal_nan=True
        )
    expected = 2 * w[:, None] * e / (batch * shape[2])
    if dtypes[1] != F16:  # whose smallest numbers are coarse
        assert torch.equal(gradient, expected.to(dtypes[1]))
    assert (gradient - expected).abs().max() <= 2**-25 + expected.abs().max() * torch.finfo(dtypes[1]).eps / 2


@given(SHAPES, BATCHES, SEEDS, st.sampled_from(["l2", "huber"]), st.sampled_from(BACKENDS))
def test_zero_on_the_secant(shape, batch, seed, loss, name):
    """An Euler step with the target velocity lands on the next knot: no loss, no gradient."""
    (_, bank, h, i, s), _ = drawn(shape, batch, seed)
    v = (segment_points(bank, i, s, torch.ones(batch)) - segment_points(bank, i, s)) / h[i, None]
    with backend(name):
        got, gradient = with_gradient((v, bank, h, i, s), loss=loss)
    assert torch.equal(segment_points(bank, i, s) + h[i, None] * v, segment_points(bank, i, s, torch.ones(batch)))
    assert not got.loss
    assert not got.per_sample.any()
    assert torch.equal(got.per_interval.isnan(), torch.bincount(i, minlength=len(h)) == 0)
    assert not gradient.any()


@given(SHAPES, BATCHES, SEEDS, st.sampled_from(["l2", "huber"]))
def test_symmetries(shape, batch, seed, loss):
    args, weight = drawn(shape, batch, seed)
    v, bank, h, i, s = args
    got, gradient = with_gradient(args, weight=weight, loss=loss)
    # the same trajectories elsewhere, mirrored, backwards in time, and the batch twice
    shift = torch.arange(shape[1] * shape[2]).view(shape[1:]) % 5
    for other in [(v, bank + shift, h, i, s), (-v, -bank, h, i, s), (-v, bank.flip(0), h.flip(0), len(h) - 1 - i, s)]:
        result, other_gradient = with_gradient(other, weight=weight, loss=loss)
        assert torch.equal(result.loss, got.loss)
        assert torch.equal(result.per_sample, got.per_sample)
        assert torch.equal(other_gradient.abs(), gradient.abs())
    twice = (v.repeat(2, 1), bank, h, i.repeat(2), s.repeat(2))
    result, other_gradient = with_gradient(twice, weight=weight.repeat(2), loss=loss)
    assert torch.equal(other_gradient, gradient.repeat(2, 1) / 2)
    torch.testing.assert_close((result.loss, result.per_interval), (got.loss, got.per_interval), equal_nan=True)
    # a step of 2 h to twice the distance has the same target
    assert same(straighten_loss(v, 2 * bank, 2 * h, i, s, weight=weight, loss=loss), got)


@given(SHAPES, BATCHES, SEEDS, st.sampled_from(["l2", "huber"]))
def test_weights_scale_the_loss_and_the_gradient_alone(shape, batch, seed, loss):
    args, weight = drawn(shape, batch, seed)
    plain, gradient = with_gradient(args, loss=loss)
    ones, same_gradient = with_gradient(args, loss=loss, weight=torch.ones(batch))
    assert same(plain, ones)
    assert torch.equal(gradient, same_gradient)
    got, weighted = with_gradient(args, loss=loss, weight=weight)
    assert same(got[1:], plain[1:])
    torch.testing.assert_close(weighted, gradient * weight[:, None])
    torch.testing.assert_close(got.loss, (weight * plain.per_sample).mean())
    four, other = with_gradient(args, loss=loss, weight=4 * weight)
    assert four.loss == 4 * got.loss
    assert torch.equal(other, 4 * weighted)
    for dtype in (F64, BF16, F16):
        assert straighten_loss(*args, loss=loss, weight=weight.to(dtype)).loss == got.loss


@given(SHAPES, BATCHES, SEEDS, st.sampled_from(BACKENDS), st.floats(1e-3, 1e3))
def test_huber_is_a_hyperbola(shape, batch, seed, name, c):
    """`(huber + c)^2 = mse + c^2`; near c times the root mean square far out, and mse / 2c near zero."""
    args, weight = drawn(shape, batch, seed, (F64, F64))
    with backend(name):
        huber, gradient = with_gradient(args, weight=weight, loss="huber", huber_c=c)
        mse, slope = with_gradient(args, weight=weight)
    torch.testing.assert_close((huber.per_sample + c).square(), mse.per_sample + c * c, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, slope / (2 * (huber.per_sample + c))[:, None], rtol=1e-12, atol=0)
    assert (huber.per_sample <= mse.per_sample.sqrt()).all()
    assert (huber.per_sample <= mse.per_sample / (2 * c) * (1 + 1e-12)).all()


@EACH
def test_huber_of_small_errors_does_not_cancel(name):
    """In float32 `sqrt(mse + c^2) - c` would be zero: errors of 1e-6 against c = 0.03."""
    bank, place = torch.zeros(2, 1, 64), torch.zeros(1, dtype=torch.int64)
    with backend(name):
        got = straighten_loss(torch.full((1, 64), 1e-6), bank, torch.ones(1), place, place, loss="huber")
    assert got.loss.item() == pytest.approx(1e-12 / 0.06, rel=1e-5)


@EACH
@pytest.mark.parametrize("sample", list(sample_inputs())[::3], ids=lambda s: s.id)
def test_gradient_in_float64(sample, name):
    """Also of a loss that is scaled, whose gradient passes through one more product."""
    with backend(name):
        _, gradient = with_gradient(sample.args, **sample.kwargs)
        v = sample.args[0].detach().clone().requires_grad_()
        (0.5 * straighten_loss(v, *sample.args[1:], **sample.kwargs).loss).backward()
    error, bound = gradient_error_and_bound(sample, gradient)
    assert error <= bound
    if v.dtype != F16:
        assert torch.equal(2 * v.grad, gradient)


# ---- intervals and sizes ----


@EACH
@LOSSES
def test_intervals_that_were_not_drawn_are_nan(loss, name):
    bank, h = torch.arange(12.0).view(6, 1, 2), torch.ones(5)
    i, s = torch.tensor([3, 1, 3]), torch.zeros(3, dtype=torch.int64)
    with backend(name):
        got, gradient = with_gradient((torch.zeros(3, 2), bank, h, i, s), loss=loss)
        one = straighten_loss(torch.zeros(1, 2), bank[:2], h[:1], s[:1], s[:1], loss=loss)
    assert got.per_interval.isnan().tolist() == [True, False, True, False, True]
    assert torch.equal(got.per_interval[[1, 3]], got.per_sample[:2])
    assert gradient.isfinite().all()
    assert [t.shape for t in one] == [(), (1,), (1,)]


@EACH
@LOSSES
@pytest.mark.parametrize("shape", [(3, 2, 4), (3, 0, 4), (3, 2, 0), (2, 1, 3, 0)])
def test_an_empty_batch(shape, loss, name):
    none = torch.zeros(0, dtype=torch.int64)
    args = (torch.zeros(0, *shape[2:]), torch.ones(shape), torch.ones(shape[0] - 1), none, none)
    with backend(name):
        got, gradient = with_gradient(args, loss=loss, weight=torch.ones(0))
    assert got.loss.isnan()
    assert got.per_sample.shape == (0,)
    assert got.per_interval.isnan().all()
    assert gradient.shape == args[0].shape


@EACH
@LOSSES
@pytest.mark.parametrize("threads", [1, 2])
def test_samples_without_features(threads, loss, name):
    """The mean over no features is NaN."""
    torch.set_num_threads(threads)
    i = torch.tensor([0, 1, 1])
    with backend(name):
        got, gradient = with_gradient((torch.zeros(3, 0), torch.ones(4, 2, 0), torch.ones(3), i, i), loss=loss)
    assert all(t.isnan().all() for t in got)
    assert [t.shape for t in got] == [(), (3,), (3,)]
    assert gradient.shape == (3, 0)


# ---- values that are not finite ----


@EACH
@LOSSES
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["v", "bank", "step_sizes", "weight"])
def test_nan_and_inf_propagate(where, value, loss, name):
    (v, bank, h, *_), _ = drawn((3, 2, 40), 3, 0)
    i, s, weight = torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]), torch.ones(3)
    {"v": v[1], "bank": bank[2, 1], "step_sizes": h, "weight": weight}[where][1] = value
    c = 0.0 if loss == "l2" else 0.03
    with backend(name):
        got, gradient = with_gradient((v, bank, h, i, s), weight=weight, loss=loss)
    expected = StraightenLosses(*reference.straighten_loss(v, bank, h, i, s, weight, c))
    torch.testing.assert_close(tuple(got), tuple(expected), equal_nan=True)
    torch.testing.assert_close(gradient, reference.gradient(v, bank, h, i, s, weight, c), equal_nan=True)
    assert got.per_sample[0].isfinite()
    assert gradient[0].isfinite().all()
    if not (where == "step_sizes" and math.isinf(value)):  # an infinite step has the target zero
        assert not got.loss.isfinite()


@EACH
def test_steps_of_zero(name):
    (v, bank, h, *_), _ = drawn((3, 2, 8), 2, 0)
    bank[0], h[0], i = bank[1], 0, torch.tensor([0, 1])
    with backend(name):
        got, gradient = with_gradient((v, bank, h, i, i))
    assert got.per_sample.isnan().tolist() == [True, False]  # 0 / 0
    assert gradient.isnan().any(1).tolist() == [True, False]


@EACH
def test_only_the_rows_that_are_drawn_are_read(name):
    bank = torch.full((4, 3, 20), math.nan)
    bank[1:3, 2] = 1
    with backend(name):
        got = straighten_loss(torch.ones(1, 20), bank, torch.ones(3), torch.tensor([1]), torch.tensor([2]))
    assert got.loss == 1


# ---- threads, and stores past the caches ----


@LOSSES
@pytest.mark.parametrize(("shape", "batch"), [((4, 3, 1000), 70), ((3, 2, 40000), 3), ((3, 2, 100001), 1)])
def test_threads_do_not_change_a_bit(shape, batch, loss):
    """More samples than threads, and fewer, each in parts."""
    g = generator(0)
    args = (torch.randn(batch, shape[2], generator=g), torch.randn(shape, generator=g), torch.rand(shape[0] - 1) + 0.1)
    args += places(shape[0], shape[1], batch, g)
    results = []
    for threads in (1, 2, 2, 3, 7):
        torch.set_num_threads(threads)
        got, gradient = with_gradient(args, loss=loss, weight=torch.arange(batch) / 3)
        results.append((*got, gradient))
    assert all(same(r, results[0]) for r in results[1:])


@LOSSES
@pytest.mark.parametrize(
    ("features", "dtype", "layout"),
    [(65536, F32, "contiguous"), (65536, F32, "misaligned"), (65531, F32, "contiguous"), (65536, BF16, "contiguous")],
)
@pytest.mark.parametrize("batch", [33, 1])
def test_large_gradients(batch, features, dtype, layout, loss):
    """From 2 MiB of gradient a thread: past the caches where rows begin at multiples of vectors. Whole numbers."""
    features *= 1 if batch > 1 else 33
    shape = (3, 2, features)
    (v, bank, h, i, s), weight = drawn(shape, batch, 0, (F32, dtype))
    v, bank, weight = arrange(v, layout), arrange(bank, layout), weight + 1
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        got, gradient = with_gradient((v, bank, h, i, s), weight=weight, loss=loss)
        results.append((*got, gradient))
    assert same(*results)
    e = reference.errors(v, bank, h, i, s)  # exact
    mse = e.double().square().mean(1)
    factor = 2 * weight.double() if loss == "l2" else weight / (mse + 0.03**2).sqrt()
    factor = (factor / batch / features)[:, None].float()
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(gradient.float(), factor * e, rtol=step, atol=0)
    if loss == "l2":
        assert torch.equal(got.per_sample, mse.float())


# ---- gradients ----


def leaves(loss="l2", seed=0, dtype=F64, v_dtype=None):
    (v, bank, h, i, s), weight = drawn((4, 3, 5), 6, seed, (dtype, v_dtype or dtype))
    g = generator(seed)
    v = (torch.randn(v.shape, generator=g, dtype=F64)).to(v.dtype).requires_grad_()
    return v, lambda v: straighten_loss(v, bank, h, i, s, weight=weight, loss=loss)


@pytest.mark.parametrize(("weighted", "loss", "name"), pairs([False, True], ["l2", "huber"], BACKENDS))
def test_gradcheck(weighted, loss, name):
    args, weight = drawn((3, 3, 3), 4, 0, (F64, F64))
    kwargs = dict(loss=loss, weight=weight if weighted else None, huber_c=0.3)
    v = args[0] + torch.rand(4, 3, generator=generator(0), dtype=F64)
    with backend(name):
        for scale in (1, 3):
            of_v = lambda v, scale=scale: straighten_loss(v, *args[1:], **kwargs).loss * scale  # noqa: E731
            assert torch.autograd.gradcheck(of_v, v.requires_grad_(), check_batched_grad=True)
            assert torch.autograd.gradcheck(of_v, v, check_forward_ad=True, check_backward_ad=False)


@EACH
@LOSSES
@pytest.mark.parametrize(
    "reduce",
    [
        lambda loss, v: loss * 3,
        lambda loss, v: loss + v.square().sum(),
        lambda loss, v: v.sum() - 0.5 * loss,
        lambda loss, v: loss**2,
        lambda loss, v: loss.expand(4, 5).sum(),
        lambda loss, v: (loss.expand(7)[::2] * torch.arange(4)).sum(),
        lambda loss, v: torch.stack([loss, loss * 2])[1],
        lambda loss, v: loss + loss.detach(),
        lambda loss, v: loss.exp().reciprocal(),
    ],
)
@pytest.mark.parametrize("dispatched", [False, True])
def test_gradients_as_they_arrive(dispatched, reduce, loss, name):
    """Against torch's differentiation of the reference, from a leaf and through a network's last operation."""
    v, call = leaves(loss)
    args, weight = drawn((4, 3, 5), 6, 0, (F64, F64))
    expected = reference.straighten_loss(v, *args[1:], weight, 0.0 if loss == "l2" else 0.03)[0]
    (wanted,) = torch.autograd.grad(reduce(expected, v), v)
    with backend(name):
        own = torch.nn.Parameter(v.detach()) if dispatched else v  # a subclass goes through the dispatcher
        (got,) = torch.autograd.grad(reduce(call(own).loss, own), own)
        torch.testing.assert_close(got, wanted)
        leaf = v.detach().clone().requires_grad_()
        double = 2 * leaf
        reduce(call(double / 2).loss, double / 2).backward()
        torch.testing.assert_close(leaf.grad, wanted)


@EACH
@pytest.mark.parametrize("dispatched", [False, True])
@pytest.mark.parametrize("scale", [1, 3])
def test_backward_twice(scale, dispatched, name):
    """Gradients accumulate, and what is done to a gradient does not reach the next one."""
    v, call = leaves("huber")
    v = torch.nn.Parameter(v.detach()) if dispatched else v
    with backend(name):
        loss = call(v).loss * scale
        loss.backward(retain_graph=True)
        first = v.grad.clone()
        v.grad.mul_(0)  # as clip_grad_norm_ and zero_grad(set_to_none=False) do
        loss.backward(retain_graph=True)
        assert torch.equal(v.grad, first)
        loss.backward()
        assert torch.equal(v.grad, 2 * first)
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()
        v.grad = None
        (call(v).loss + call(v).loss).backward()
        torch.testing.assert_close(v.grad, 2 / scale * first)


@EACH
@pytest.mark.parametrize("dispatched", [False, True])
def test_only_the_loss_is_differentiable_and_only_in_v(dispatched, name):
    args, weight = drawn((4, 3, 5), 6, 0)
    v, bank, h, weight = (t.clone().requires_grad_() for t in (*args[:3], weight))
    v = torch.nn.Parameter(v.detach()) if dispatched else v
    with backend(name):
        got = straighten_loss(v, bank, h, *args[3:], weight=weight)
        assert [t.requires_grad for t in got] == [True, False, False]
        got.loss.backward()
        assert v.grad is not None
        assert bank.grad is h.grad is weight.grad is None
        assert not straighten_loss(v.detach(), bank, h, *args[3:], weight=weight).loss.requires_grad
        with torch.no_grad():
            assert not straighten_loss(v, bank, h, *args[3:]).loss.requires_grad


@EACH
@pytest.mark.parametrize("dispatched", [False, True])
def test_a_second_derivative_raises(dispatched, name):
    """It is not there, and zero would be wrong. Without one, create_graph changes nothing."""
    v, call = leaves()
    v = torch.nn.Parameter(v.detach()) if dispatched else v
    with backend(name):
        expected = torch.autograd.grad(call(v).loss, v)[0]
        for reduce in (lambda x: x, lambda x: x * 3, lambda x: x**2):
            (gradient,) = torch.autograd.grad(reduce(call(v).loss), v, create_graph=True)
            assert (gradient * expected).sum() > 0
            with pytest.raises(RuntimeError, match="straighten_loss: its gradient is not differentiable"):
                gradient.square().sum().backward()


@pytest.mark.parametrize("name", ["cpu", "cuda"])
@pytest.mark.parametrize("v_dtype", [BF16, F16])
def test_a_scaled_loss_in_half_precision(v_dtype, name):
    """A gradient scaler starts at 65,536, which float16 does not hold; a third is not rounded to bfloat16 first."""
    v, call = leaves(dtype=F32, v_dtype=v_dtype)
    with backend(name):
        (plain,) = torch.autograd.grad(call(v).loss, v)
        for scale in (65536.0, 1 / 3, 1e-3):
            (got,) = torch.autograd.grad(call(v).loss * scale, v)
            assert got.dtype == v_dtype
            assert torch.equal(got, (plain.float() * torch.tensor(scale)).to(v_dtype))


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("features", [1, 5, 8, 600])
@pytest.mark.parametrize("scale", [1.0, 3.0, math.nan])
def test_a_gpu_scales_the_gradient_where_it_lies(scale, features, dtypes):
    """And only if its graph is not gone through again: what a kept one holds, stays."""
    args, _ = drawn((3, 2, features), 4, 0, dtypes)
    v, held = args[0].requires_grad_(), []
    with backend("cuda"), torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        loss = straighten_loss(*args).loss * scale
        before = held[0].clone()
        expected = before * scale
        (kept,) = torch.autograd.grad(loss, v, retain_graph=True)
        torch.testing.assert_close(kept, expected, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(held[0], before)
        (last,) = torch.autograd.grad(loss, v)
        torch.testing.assert_close(last, expected, rtol=0, atol=0, equal_nan=True)
        assert last.data_ptr() == held[0].data_ptr()


@pytest.mark.parametrize("name", ["cpu", "cuda"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_kept_graph_gives_away_nothing(scale, name):
    """Writing to a gradient does not spoil the next."""
    v, call = leaves()
    with backend(name):
        loss = call(v).loss * scale
        (first,) = torch.autograd.grad(loss, v, retain_graph=True)
        expected = first.clone()
        first.zero_()
        assert torch.equal(torch.autograd.grad(loss, v)[0], expected)


def test_a_gradient_is_not_scaled_twice():
    """Torch frees a graph after the hooks of a node; one that stops backward leaves it."""
    v, call = leaves()

    def stop(*_):
        raise RuntimeError("stopped")

    with backend("cuda"):
        loss = call(v).loss
        hook = loss.grad_fn.register_hook(stop)
        for again in ("stopped", "backward a second time"):
            with pytest.raises(RuntimeError, match=again):
                (loss * 3).backward()
        hook.remove()
        assert v.grad is None


@EACH
def test_v_with_strides_and_repeats(name):
    args, weight = drawn((4, 3, 4, 5), 6, 0)
    row = args[0][:1]
    with backend(name):
        expected, gradient = with_gradient((row.expand_as(args[0]).contiguous(), *args[1:]), weight=weight)
        leaf = row.clone().requires_grad_()
        got = straighten_loss(leaf.expand_as(args[0]), *args[1:], weight=weight)
        got.loss.backward()
        assert same((t.detach() for t in got), (t.detach() for t in expected))
        torch.testing.assert_close(leaf.grad, gradient.sum(0, keepdim=True))
        turned = args[0].transpose(1, 2).contiguous().requires_grad_()
        straighten_loss(turned.transpose(1, 2), *args[1:], weight=weight).loss.backward()
        assert torch.equal(turned.grad.transpose(1, 2), with_gradient(args, weight=weight)[1])


@EACH
def test_states_may_change_after_the_loss(name):
    """The gradient is taken in the forward pass: a bank that is rolled out anew before backward does no harm."""
    (v, bank, *rest), _ = drawn((4, 3, 5), 6, 0)
    expected = with_gradient((v, bank, *rest))[1]
    leaf = v.clone().requires_grad_()
    with backend(name):
        loss = straighten_loss(leaf, bank, *rest).loss
        bank.fill_(math.nan)
        loss.backward()
    assert torch.equal(leaf.grad, expected)


def test_torch_func_transforms():
    args, weight = drawn((4, 3, 5), 6, 0, (F64, F64))
    v, rest = args[0], args[1:]
    for loss in ("l2", "huber"):
        of_v = lambda v, loss=loss: straighten_loss(v, *rest, weight=weight, loss=loss).loss  # noqa: E731
        gradient = with_gradient(args, weight=weight, loss=loss)[1]
        torch.testing.assert_close(torch.func.grad(of_v)(v), gradient)
        _, tangent = torch.func.jvp(of_v, (v,), (v,))
        torch.testing.assert_close(tangent, (gradient * v).sum())
        torch.testing.assert_close(torch.func.vmap(of_v)(torch.stack([v, -v])), torch.stack([of_v(v), of_v(-v)]))
    hessian = torch.func.hessian(lambda v: straighten_loss(v, *rest).loss)(v).view(30, 30)
    torch.testing.assert_close(hessian, 2 / 30 * torch.eye(30, dtype=F64))
    # places are looked at where they can be
    for i, name in ((-1, "interval"), (3, "interval")):
        with pytest.raises(ValueError, match=rf"^{name}: expected indices from 0 to 2, got {i} at {name}\[0\]"):
            torch.func.grad(lambda v, i=i: straighten_loss(v, *rest[:2], 0 * rest[2] + i, rest[3]).loss)(v)
    with pytest.raises(ValueError, match=r"^sample: expected indices from 0 to 2, got -1 at sample\[0\]"):
        torch.func.vmap(lambda v: straighten_loss(v, *rest[:3], rest[3] * 0 - 1).loss)(v[None])
    many = torch.stack([rest[2], rest[2].flip(0)])
    got = torch.func.vmap(lambda i: straighten_loss(v, *rest[:2], i, rest[3]).loss)(many)
    torch.testing.assert_close(got, torch.stack([straighten_loss(v, *rest[:2], i, rest[3]).loss for i in many]))


def test_under_checkpointing():
    v, call = leaves("huber")
    expected = torch.autograd.grad(call(v).loss, v)[0]
    again = torch.utils.checkpoint.checkpoint(lambda v: call(v).loss, v, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(again, v)[0], expected)


# ---- torch.compile: a step of training ----


@pytest.mark.parametrize(
    ("compiler", "name", "loss", "scale"),
    [
        ("aot_eager", "cpu", "l2", 1),
        ("aot_eager", "cpu", "huber", 3),
        ("aot_eager", "reference", "huber", 1),
        ("inductor", "cpu", "l2", 3),
    ],
)
def test_a_training_step_under_compile(compiler, name, loss, scale):
    """The network's input from segment_points, the loss and its backward: the losses and every gradient."""
    g = generator(0)
    bank, h = torch.randn(4, 3, 5, generator=g), torch.rand(3, generator=g) + 0.2
    i, s = places(4, 3, 8, g)
    u, weight = torch.rand(8, generator=g), torch.rand(8, generator=g)

    def network():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 5))

    def step(net):
        x = segment_points(bank, i, s, u)
        got = straighten_loss(net(x), bank, h, i, s, weight=weight, loss=loss)
        return got.loss * scale, got.per_sample, got.per_interval

    torch._dynamo.reset()
    eager, compiled = network(), network()
    with backend(name):
        expected = step(eager)
        expected[0].backward()
        got = torch.compile(step, fullgraph=True, backend=compiler)(compiled)
        got[0].backward()
    assert [t.requires_grad for t in got] == [True, False, False]
    torch.testing.assert_close(got, expected, equal_nan=True)
    for a, b in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_an_index_outside_the_bank_under_compile():
    args, _ = drawn((4, 3, 5), 6, 0)
    torch._dynamo.reset()
    compiled = torch.compile(lambda i: straighten_loss(*args[:3], i, args[4]).loss, fullgraph=True, backend="aot_eager")
    assert compiled(args[3]) == straighten_loss(*args).loss
    with pytest.raises(ValueError, match=r"^interval: expected indices from 0 to 2, got -1 at interval\[0\]"):
        compiled(torch.full_like(args[3], -1))


# ---- errors ----


OUTSIDE = [
    ([0, 3, 0], [0, 0, 0], r"interval: expected indices from 0 to 2, got 3 at interval\[1\]"),
    ([0, 0, -1], [0, 0, 0], r"interval: expected indices from 0 to 2, got -1 at interval\[2\]"),
    ([0, 0, 0], [0, -1, 5], r"sample: expected indices from 0 to 1, got -1 at sample\[1\]"),
    ([2, 2**63 - 1, 0], [2, 0, 0], r"sample: expected indices from 0 to 1, got 2 at sample\[0\]"),
]


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize("needs_gradient", [False, True])
@pytest.mark.parametrize(("interval", "sample", "message"), OUTSIDE)
def test_an_index_outside_the_bank(interval, sample, message, needs_gradient, name):
    v = torch.ones(3, 5, requires_grad=needs_gradient)
    places = torch.tensor(interval), torch.tensor(sample)
    with backend(name), pytest.raises(ValueError, match="^" + message):
        straighten_loss(v, torch.ones(4, 2, 5), torch.ones(3), *places)


@pytest.mark.parametrize("name", ["cuda", "triton"])
@LOSSES
@pytest.mark.parametrize("features", [5, 600, 5000])  # lanes of a warp; a block; and parts of a sample
@pytest.mark.parametrize(("interval", "sample", "_"), OUTSIDE)
def test_on_a_gpu_an_index_outside_the_bank_makes_nan_of_its_sample(interval, sample, _, features, loss, name):
    interval, sample = torch.tensor(interval), torch.tensor(sample)
    outside = (interval < 0) | (interval > 2) | (sample < 0) | (sample > 1)
    with backend(name):
        args = torch.ones(3, features), torch.ones(4, 2, features), torch.ones(3), interval, sample
        got, gradient = with_gradient(args, loss=loss)
    assert got.loss.isnan()
    assert torch.equal(got.per_sample.isnan(), outside)
    assert torch.equal(gradient.isnan(), outside[:, None].expand(-1, features))
    for i in range(3):  # an interval that there is none of is in no mean
        own = got.per_sample[interval == i]
        torch.testing.assert_close(got.per_interval[i], own.mean(), equal_nan=True)


GOOD = dict(
    v=torch.ones(3, 5),
    bank=torch.ones(4, 2, 5),
    step_sizes=torch.ones(3),
    interval=torch.zeros(3, dtype=torch.int64),
    sample=torch.zeros(3, dtype=torch.int64),
)


def change(name, to=None, **extra):
    value = to(GOOD.get(name, GOOD["step_sizes"])) if callable(to) else to
    return {name: value, **extra}


@pytest.mark.parametrize(
    ("error", "message", "bad"),
    [
        (TypeError, "v: expected a torch.Tensor, got NoneType", change("v")),
        (TypeError, "v: expected torch.float32 or .*, got a torch.float64", change("v", torch.Tensor.double)),
        (TypeError, "v: expected torch.float64, got a torch.float32", change("bank", torch.Tensor.double)),
        (TypeError, "v: expected .*, got a torch.int64", change("v", torch.Tensor.long)),
        (ValueError, r"v: expected shape \[3, 5\] on cpu, got .*\[2, 5\]", change("v", operator.itemgetter(slice(2)))),
        (ValueError, r"v: expected shape \[3, 5\] on cpu, got .*\[5, 3\]", change("v", torch.t)),
        (ValueError, r"v: expected shape \[3, 5\] on cpu, got .*\[15\]", change("v", torch.flatten)),
        (ValueError, r"v: expected shape \[3, 5\] on cpu, got .*\[\]", change("v", torch.sum)),
        (ValueError, r"v: expected shape .* on cpu, got .* on meta", change("v", lambda t: t.to("meta"))),
        (TypeError, "bank: expected torch.float32 or .*, got a torch.float16", change("bank", torch.Tensor.half)),
        (ValueError, r"bank: expected shape \[N\+1, n, \*shape\]", change("bank", lambda t: t[0])),
        (ValueError, r"bank: expected shape .* with N >= 1, got .*\[1, 2, 5\]", change("bank", lambda t: t[:1])),
        (TypeError, "step_sizes: expected a torch.Tensor, got list", change("step_sizes", [1.0])),
        (TypeError, "step_sizes: expected .*, got a torch.int64", change("step_sizes", torch.Tensor.long)),
        (ValueError, r"step_sizes: expected shape \[3\] on cpu, got .*\[2\]", change("step_sizes", lambda t: t[1:])),
        (ValueError, r"step_sizes: expected .*, got .*\[3, 1\]", change("step_sizes", lambda t: t[:, None])),
        (ValueError, "step_sizes: expected .*, got .* on meta", change("step_sizes", lambda t: t.to("meta"))),
        (TypeError, "interval: expected torch.int64, got a torch.int32", change("interval", torch.Tensor.int)),
        (TypeError, "interval: expected a torch.Tensor, got int 0", change("interval", 0)),
        (TypeError, "sample: expected torch.int64, got a torch.float32", change("sample", torch.Tensor.float)),
        (ValueError, r"sample: expected shape \[3\], one for each", change("sample", lambda t: t[:2])),
        (TypeError, "weight: expected a torch.Tensor, got list", change("weight", [1.0])),
        (TypeError, "weight: expected .*, got a torch.bool", change("weight", torch.Tensor.bool)),
        (ValueError, r"weight: expected shape \[3\] on cpu, got .*\[2\]", change("weight", lambda t: t[1:])),
        (ValueError, r"weight: expected shape \[3\] on cpu, got .*\[3, 1\]", change("weight", lambda t: t[:, None])),
        (ValueError, "loss: expected 'l2' or 'huber', got l1", change("loss", "l1")),
        (ValueError, "loss: expected 'l2' or 'huber', got None", change("loss")),
        (ValueError, "huber_c: expected a positive number, got 0", change("huber_c", 0, loss="huber")),
        (ValueError, "huber_c: expected a positive number, got -0.1", change("huber_c", -0.1, loss="huber")),
        (ValueError, "huber_c: expected a positive number, got nan", change("huber_c", math.nan, loss="huber")),
        (TypeError, "huber_c: expected a number, got '1'", change("huber_c", "1", loss="huber")),
        (TypeError, "huber_c: expected a number, got None", change("huber_c", loss="huber")),
    ],
)
def test_errors_name_the_argument(error, message, bad):
    with pytest.raises(error, match="^" + message):
        straighten_loss(**{**GOOD, **bad})


def test_defaults():
    got = straighten_loss(**GOOD)
    assert same(got, straighten_loss(**GOOD, weight=None, loss="l2"))
    assert same(straighten_loss(**GOOD, loss="huber"), straighten_loss(**GOOD, loss="huber", huber_c=0.03))
    assert got.loss == 1
    sample = Sample("", tuple(GOOD.values()), dict(loss="huber"))
    error, bound = error_and_bound(sample, straighten_loss(**GOOD, loss="huber"))
    assert error <= bound
