"""Calls on plain tensors, which the compiled module looks at itself: the same results, bit for bit, and for anything
else the same errors as by Python's checks."""

import importlib

import pytest
import torch

import flowkernels as fk
from flowkernels.ops import library
from flowkernels.ops.straighten_loss import _Given
from flowkernels.runtime import backends

READABLE = hasattr(torch.Tensor, "__dlpack_c_exchange_api__")  # from torch 2.10 on
pytestmark = pytest.mark.skipif(backends.extension() is None, reason="no compiled module")


def g(*shape, dtype=torch.float32, seed=0):
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made.to(dtype)


def places(B, knots=5, n=4):
    return torch.arange(B) % (knots - 1), torch.arange(B) % n


TIMES = torch.linspace(0, 1, 11, dtype=torch.float64)
CALLS = {
    "euler_step": lambda x, v: fk.euler_step(x(3, 4), v(3, 4, seed=1), 0.1),
    "euler_step, guided": lambda x, v: fk.euler_step(
        x(3, 4), v(3, 4, seed=1), -0.1, v_uncond=v(3, 4, seed=2), guidance=2.5
    ),
    "linear_update": lambda x, v: fk.linear_update(
        x(2, 3, 5), [v(2, 3, 5, seed=s) for s in (1, 2, 3)], [0.1, -2.0, 3.0]
    ),
    "linear_update, scaled": lambda x, v: fk.linear_update(x(7), [v(7, seed=1)], [0.5], scale=0.25),
    "velocity_gram": lambda x, v: fk.velocity_gram(v(10, 2, 3, 4)),
    "cost_from_gram": lambda x, v: fk.cost_from_gram(g(9, 9, dtype=torch.float64), TIMES),
    "cost_from_gram, states": lambda x, v: fk.cost_from_gram(g(19, 19, dtype=torch.float64), TIMES, states=True),
    "bellman": lambda x, v: fk.bellman(g(7, 7, dtype=torch.float64).abs(), 4, 1.5),
    "bellman_pairs": lambda x, v: fk.bellman_pairs(
        g(7, dtype=torch.float64).abs(), g(7, 7, 7, dtype=torch.float64).abs(), 4
    ),
    "linear_euler": lambda x, v: fk.linear_euler(x(3, 6), v(3, 2, 8, seed=1), x(3, 8, seed=2), 0.1, bias=v(3, seed=3)),
    "linear_euler, one output": lambda x, v: fk.linear_euler(x(3, 1), v(3, 8, seed=1), v(1, 8, seed=2), 0.1),
    "segment_points": lambda x, v: fk.segment_points(x(5, 4, 3, 2), *places(6)),
    "segment_points, between": lambda x, v: fk.segment_points(x(5, 4, 3), *places(6), g(6).abs()),
    "segment_points, low": lambda x, v: fk.segment_points(
        x(5, 4, 3), *places(6), g(6, dtype=torch.float64).abs(), dtype=torch.bfloat16
    ),
    "straighten_loss": lambda x, v: fk.straighten_loss(v(6, 3, 2), x(5, 4, 3, 2), g(4).abs() + 0.1, *places(6)),
    "straighten_loss, huber": lambda x, v: fk.straighten_loss(
        v(6, 3), x(5, 4, 3), g(4, dtype=torch.float64).abs() + 0.1, *places(6), weight=g(6).abs(), loss="huber"
    ),
}
DTYPES = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.float32, torch.bfloat16),
    "float16": (torch.float32, torch.float16),
    "float64": (torch.float64, torch.float64),
}


def by_checks(monkeypatch, op):
    """Python's way."""
    monkeypatch.setattr(importlib.import_module(f"flowkernels.ops.{op.split(',')[0]}"), "plain", lambda op, t: None)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("call", CALLS)
def test_results_are_the_same(call, dtypes, monkeypatch):
    state, velocity = (lambda *shape, dtype=d, seed=0: g(*shape, dtype=dtype, seed=seed) for d in DTYPES[dtypes])
    module = importlib.import_module(f"flowkernels.ops.{call.split(',')[0]}")
    slow = importlib.import_module("flowkernels.ops._state_op") if hasattr(module, "OP") else module
    with monkeypatch.context() as patch:
        if READABLE:  # then Python's way is not gone
            patch.setattr(slow, "direct", None)
        found = CALLS[call](state, velocity)
    by_checks(monkeypatch, call)
    expected = CALLS[call](state, velocity)
    for a, b in zip(*((t if isinstance(t, tuple) else (t,)) for t in (found, expected)), strict=True):
        assert (a.dtype, a.stride()) == (b.dtype, b.stride())
        assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))


@pytest.mark.parametrize("factor", [1.0, -3.0])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_the_gradient_is_the_same(dtypes, factor, monkeypatch):
    state, velocity = DTYPES[dtypes]

    def gradient():
        v = g(6, 3, 2, dtype=velocity).requires_grad_()
        loss = fk.straighten_loss(v, g(5, 4, 3, 2, dtype=state), g(4).abs() + 0.1, *places(6)).loss
        (loss * factor).backward()
        return v.grad, type(loss.grad_fn).__name__

    found, by = gradient()
    assert (by == f"{_Given.__name__}Backward") == READABLE
    by_checks(monkeypatch, "straighten_loss")
    assert torch.equal(found, gradient()[0])


class Subclass(torch.Tensor):
    pass


ODD = {
    "negated": lambda t: torch.complex(torch.zeros_like(t), -t).conj().imag,
    "zero": lambda t: torch._efficientzerotensor(t.shape),
    "with a gradient": lambda t: t.clone().requires_grad_(),
    "parameter": lambda t: torch.nn.Parameter(t),
    "subclass": lambda t: t.as_subclass(Subclass),
    "sliced": lambda t: torch.stack([t, t], -1)[..., 0],
    "transposed": lambda t: t.t().contiguous().t(),
    "expanded": lambda t: t[:1].expand(3, 4),
    "empty": lambda t: t[:0],
    "integers": lambda t: t.long(),
    "complex": lambda t: t.to(torch.complex64),
    "another shape": lambda t: t[:, :2].contiguous(),
    "on meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "sparse rows": lambda t: t.to_sparse_csr(),
    "nested": lambda t: torch.nested.nested_tensor([t[0], t[1]]),
    "an array": lambda t: t.numpy(),
    "nothing": lambda t: None,
}


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("odd", ODD)
def test_other_tensors_are_pythons_to_look_at(odd, place, monkeypatch):
    args = [g(3, 4), g(3, 4, seed=1)]
    args[place] = ODD[odd](args[place])
    C = backends.extension()
    assert not C.euler_step_plain(*args, 0.1, None, 1.0, torch.empty(3, 4), True, 1)
    assert not C.linear_update_plain(args[0], [args[1]], [0.1], 1.0, torch.empty(3, 4), True, 1)

    def said():
        try:
            made = fk.euler_step(*args, 0.1)
            return made.shape if made.is_meta else made.detach().clone()
        except Exception as e:
            return type(e), str(e)

    found = said()
    by_checks(monkeypatch, "euler_step")
    expected = said()
    assert torch.equal(found, expected) if isinstance(found, torch.Tensor) else found == expected


@pytest.mark.parametrize("h", [1, True, torch.tensor(0.1), "0.1", None, float("nan")])
def test_other_numbers_too(h, monkeypatch):
    def said():
        try:
            return fk.euler_step(g(3), g(3), h).isnan().all().item()
        except Exception as e:
            return type(e), str(e)

    found = said()
    by_checks(monkeypatch, "euler_step")
    assert found == said()


def test_arguments_are_looked_at_before_a_backend_that_is_not_there():
    with fk.backend("cuda"), pytest.raises(TypeError, match="v: expected"):
        fk.euler_step(g(3), None, 0.1)


def test_a_call_that_somebody_watches_goes_by_the_dispatcher():
    with torch.profiler.profile() as profile, fk.profile_ranges():
        fk.euler_step(g(3), g(3), 0.1)
    assert any(event.key == "flowkernels::euler_step.cpu" for event in profile.key_averages())
    with fk.backend("reference"):
        assert library.plain("euler_step", g(1)) is None
    assert torch.equal(torch.func.vmap(lambda x: fk.euler_step(x, x, 0.5))(g(3, 2)), 1.5 * g(3, 2))


@pytest.mark.parametrize("t", [TIMES.flip(0), TIMES * 2, TIMES - 1, TIMES[:1], TIMES.float(), TIMES * torch.nan])
def test_times_that_are_none_get_their_errors(t, monkeypatch):
    def said():
        try:
            return fk.cost_from_gram(g(9, 9, dtype=torch.float64), t).tolist()
        except Exception as e:
            return type(e), str(e)

    found = said()
    by_checks(monkeypatch, "cost_from_gram")
    assert found == said()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite(dtype):
    C, x = backends.extension(), g(3, 5, dtype=dtype)
    x[0, 0] = torch.finfo(dtype).max
    assert C.is_finite(x) == (1 if READABLE else -1)
    for value in (torch.nan, torch.inf, -torch.inf):
        bad = x.clone()
        bad[2, 4] = value
        assert C.is_finite(bad) == (0 if READABLE else -1)
        assert not library.is_finite(bad)
    assert C.is_finite(x.half()) == C.is_finite(x[:, 1:]) == C.is_finite(x[:0]) == C.is_finite(None) == -1
