"""torch.func's transforms and autocast: every op is right under them, or refuses by name.

An op that is new gets these tests by being listed in OPS.
"""

import importlib

import pytest
import torch
from _contract import identical, tensors

import flowkernels as fk
from flowkernels.ops.public import OPS
from flowkernels.ops.samples import generator
from flowkernels.runtime.backends import BACKENDS, backend

F64 = torch.float64
EVERY = pytest.mark.parametrize("op", OPS)
# with a derivative under the transforms; the others say "Not differentiable" and are constants there, as if detached
DERIVED = ("euler_step", "linear_euler", "linear_update", "straighten_loss", "mlp_sample")
REFUSED = {"linear_euler": "x: expected no gradient", "mlp_sample": "x: expected no gradient"}  # by torch.func.grad


def small(op, dtype=F64):
    """The op's first sample of more than one number; in this dtype, if there is one."""
    samples = importlib.import_module(f"flowkernels.ops.{op}.samples").sample_inputs()
    several = [s for s in samples if 1 < s.args[0].numel() < 2000 and all(s.args[0].shape)]
    return next((s for s in several if s.args[0].dtype == dtype), several[0])


def floating(args):
    """The places of floating-point tensors, in lists as well: (argument,) or (argument, entry)."""
    for i, arg in enumerate(args):
        for j, t in enumerate(arg if isinstance(arg, list) else [arg]):
            if isinstance(t, torch.Tensor) and t.is_floating_point():
                yield (i, j) if isinstance(arg, list) else (i,)


def at(args, place):
    return args[place[0]] if len(place) == 1 else args[place[0]][place[1]]


def with_tensor(args, place, t):
    args = list(args)
    if len(place) == 1:
        args[place[0]] = t
    else:
        args[place[0]] = [t if j == place[1] else other for j, other in enumerate(args[place[0]])]
    return args


def calls(op, dtype=F64):
    """(the op's results as tensors of one argument, that argument) for each of its floating-point tensors."""
    function, sample = getattr(fk, op), small(op, dtype)
    names, args = list(sample.kwargs), [*sample.args, *sample.kwargs.values()]
    for place in floating(args):
        if op == "cost_from_gram" and place == (1,):
            continue  # times, which are looked at on the CPU

        def call(t, place=place):
            new = with_tensor(args, place, t)
            return tensors(function(*new[: len(sample.args)], **dict(zip(names, new[len(sample.args) :], strict=True))))

        yield call, at(args, place)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", BACKENDS)
@EVERY
def test_vmap(op, name):
    """Over each tensor in turn, along its first and its last dimension, against one call for each."""
    found = list(calls(op))
    assert found
    with backend(name):
        for call, t in found:
            each = [t, 2 * t, 0.5 * t]
            expected = [torch.stack(parts) for parts in zip(*map(call, each), strict=True)]
            for dim in (0, t.dim()):
                got = torch.func.vmap(call, in_dims=dim)(torch.stack(each, dim))
                assert [g.dtype for g in got] == [e.dtype for e in expected]
                torch.testing.assert_close(list(got), expected, equal_nan=True)


@EVERY
def test_jvp(op):
    """Against differences; in float32, of mlp_sample, they are coarse."""
    for call, t in calls(op):
        wide = t.dtype == F64
        step = 1e-6 if wide else 1e-2
        tangent = torch.randn(t.shape, generator=generator(1), dtype=F64).to(t.dtype)
        first = lambda t, call=call: call(t)[0]  # noqa: E731
        value, got = torch.func.jvp(first, (t,), (tangent,))
        torch.testing.assert_close(value, first(t), equal_nan=True)
        if op in DERIVED and not (op == "straighten_loss" and t is not small(op).args[0] and not got.any()):
            expected = (first(t + step * tangent) - first(t - step * tangent)) / (2 * step)
            torch.testing.assert_close(got, expected, rtol=1e-6 if wide else 2e-2, atol=1e-6 if wide else 2e-2)
        else:
            assert not got.any()


@EVERY
def test_grad(op):
    """Agrees with jvp, or refuses, or is that of a constant."""
    call, t = next(calls(op))

    def total(t):
        return torch.nan_to_num(call(t)[0], posinf=0).sum()

    if op in REFUSED:
        with pytest.raises(ValueError, match=f"^{REFUSED[op]}"):
            torch.func.grad(total)(t)
        return
    gradient = torch.func.grad(total)(t)
    tangent = torch.randn(t.shape, generator=generator(1), dtype=F64).to(t.dtype)
    _, along = torch.func.jvp(total, (t,), (tangent,))
    torch.testing.assert_close((gradient * tangent).sum(), along.to(t.dtype))
    assert bool(gradient.any()) == (op in DERIVED)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", BACKENDS)
@EVERY
def test_autocast(op, name):
    """Inside the ops compute as they do outside: in the dtypes of their arguments, under a transform too."""
    (call, t), *_ = calls(op, torch.float32)
    with backend(name):
        expected = call(t)
        batched = torch.func.vmap(call)(t[None])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert identical(call(t), expected)
            assert identical(torch.func.vmap(call)(t[None]), batched)
