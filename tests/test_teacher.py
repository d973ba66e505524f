"""One velocity on samples of its own order: chunks, conditioning, guidance, counts."""

import pytest
import torch
from _flows import Counted, ElementwiseField, RowField, normal

import flowkernels as fk
from flowkernels.models.bundled import BUNDLED
from flowkernels.sampling.teacher import Teacher, velocity_at

ORDER = torch.tensor([4, 0, 5, 2])


class Pushed(torch.nn.Module):
    def forward(self, x, t, push):
        return (3 * x + push * t[:, None]).sin() * push


def guided_field(n=6):
    push = normal(n, 3, seed=1, dtype=torch.float64)
    return fk.VelocityField(Pushed(), conditioning={"push": push}, unconditional={"push": -push}, guidance=1.5), push


@pytest.mark.parametrize("chunk", [None, 1, 3, 4, 9])
@pytest.mark.parametrize("order", [None, ORDER], ids=["all", "some"])
def test_each_sample_has_its_own_conditioning_and_guidance(order, chunk):
    field, push = guided_field()
    x = normal(6 if order is None else 4, 3, dtype=torch.float64)
    teacher = Teacher(field, 6, order=order, chunk=chunk)
    c = push if order is None else push[order]
    t = torch.full((len(x),), 0.3, dtype=torch.float64)
    v, v_uncond = Pushed()(x, t, c), Pushed()(x, t, -c)
    expected = v_uncond + 1.5 * (v - v_uncond)
    assert torch.allclose(teacher.at(x, 0.3), expected, rtol=1e-12)
    assert torch.allclose(teacher.at(x[2:], 0.3, 2), expected[2:], rtol=1e-12)
    assert torch.allclose(teacher.at(x[1:3], 0.3, 1), expected[1:3], rtol=1e-12)
    assert teacher.evaluations == 2 * len(x)


@pytest.mark.parametrize(("chunk", "calls"), [(None, 5), (3, 10), (4, 5), (5, 8), (20, 5), (30, 5)])
@pytest.mark.parametrize("order", [None, ORDER], ids=["all", "some"])
def test_rows_of_several_times(order, chunk, calls):
    """Each with its own time, conditioning and guidance, in as few calls as the rows of a chunk allow: beside three of
    the check, of two rows each at most, and one of its last time."""
    field, push = guided_field()
    calls_of = []
    field.net.register_forward_pre_hook(lambda net, args: calls_of.append(len(args[0])))
    n = 4
    x, times = normal(5, n, 3, dtype=torch.float64), [0.1, 0.3, 0.35, 0.6, 0.9]
    teacher = Teacher(field, 6, order=order, chunk=chunk)
    found = teacher.at_times(x, times, 0)
    rows = torch.arange(n) if order is None else order
    for v, states, t in zip(found, x, times, strict=True):
        at = torch.full((n,), t, dtype=torch.float64)
        v_cond, v_uncond = Pushed()(states, at, push[rows]), Pushed()(states, at, -push[rows])
        assert torch.allclose(v, v_uncond + 1.5 * (v_cond - v_uncond), rtol=1e-12)
    assert len(calls_of) == calls
    assert torch.allclose(teacher.at_times(x[:, 1:], times, 1), found[:, 1:], rtol=1e-12)


@pytest.mark.parametrize("kind", ["first time", "rows of its own", "some of its rows", "as many rows", "none"])
def test_velocities_that_take_one_time_are_evaluated_time_by_time(kind):
    """Also where the first samples are conditioned alike, so that two rows do not show it."""
    push, seen = normal(4, 3, seed=1), []
    more = torch.cat([push[:1].expand(3, 3), normal(27, 3, seed=2)])
    rows = {"rows of its own": push, "some of its rows": more[:4], "as many rows": more}

    def velocity(x, t):
        seen.append(len(x))
        s = t[0] if kind == "first time" else t[:, None]
        given = rows[kind] if kind in rows else torch.full((30, 1), 2.0)
        given = given if kind == "rows of its own" else given[: len(x)]
        return (3 * x + given * s).sin()

    x, times = normal(5, 4, 3), [0.1, 0.3, 0.35, 0.6, 0.9]
    teacher = Teacher(velocity, 4)
    found = teacher.at_times(x, times)
    assert teacher.takes_rows is (kind == "none")
    assert seen[-2:] == ([20, 4] if kind == "none" else [4, 4])
    for v, states, t in zip(found, x, times, strict=True):
        assert torch.equal(v, velocity(states, torch.full((4,), t)))
    assert teacher.at_times(x[:0], []).shape == (0, 4, 3)


@pytest.mark.parametrize("chunk", [None, 2, 5])
def test_parts_are_the_samples_in_order(chunk):
    teacher = Teacher(fk.VelocityField(RowField(), conditioning={"rows": normal(9, 3)}), 9, chunk=chunk)
    seen = [rows for rows, _ in teacher.parts(5, 3)]
    assert [i for rows in seen for i in range(rows.start, rows.stop)] == list(range(5))
    assert max(rows.stop - rows.start for rows in seen) == (chunk or 5)
    again = [field for _, field in teacher.parts(5, 3)]
    assert all(a is b for a, (_, b) in zip(again, teacher.parts(5, 3), strict=True))
    assert teacher.evaluations == 0


def test_rows_in_an_order_are_not_kept():
    """They are copies of the conditioning, which may be large; what is written there meanwhile is seen."""
    field, push = guided_field()
    x, teacher = normal(4, 3, dtype=torch.float64), Teacher(field, 6, order=ORDER, chunk=2)
    before = teacher.at(x, 0.3)
    push.mul_(2)
    assert torch.equal(teacher.at(x, 0.3), Teacher(field, 6, order=ORDER, chunk=2).at(x, 0.3))
    assert not torch.equal(teacher.at(x, 0.3), before)


def test_calls_and_evaluations():
    velocity = Counted(ElementwiseField())
    teacher = Teacher(velocity, 7, chunk=3)
    teacher.at(normal(7, 2), 0.5)
    assert (velocity.calls, teacher.evaluations) == (3, 7)


def test_velocities_are_in_the_states_dtype_and_memory_of_their_own():
    x = normal(3, 2)
    for velocity in (lambda x, t: x, lambda x, t: x.bfloat16()):
        v = Teacher(velocity, 3).at(x, 0.0)
        assert v.dtype == x.dtype
        assert v.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("known", [0, 1, 3])
def test_runs_of_a_solver(known):
    field, _ = guided_field()
    part = field.rows(ORDER[1:], 6)
    x, solver = normal(4, 3, dtype=torch.float64), fk.Solver.adams_bashforth(4)
    teacher = Teacher(field, 6, order=ORDER, chunk=2)
    v, last = teacher.run(solver, x[1:], first=1)
    assert torch.allclose(last, fk.sample(part, x[1:], solver), rtol=1e-10)
    assert (len(v), teacher.evaluations) == (4, 12)
    again, same = teacher.run(solver, x[1:], v[:known], 1)
    assert torch.equal(same, last)
    assert all(torch.equal(a, b) for a, b in zip(again, v, strict=True))
    assert teacher.evaluations == 12 + 3 * (4 - known)


def test_of_a_fused_sampler_its_velocity():
    net, x = BUNDLED["digits"].load(), normal(3, 1, 8, 8)
    fused = Teacher(fk.fuse(net, 4, shape=(1, 8, 8)), 3)
    assert torch.equal(fused.at(x, 0.25), Teacher(net, 3).at(x, 0.25))


def test_a_velocity_at_one_time_has_gradients():
    x = normal(3, 2, dtype=torch.float64).requires_grad_()
    velocity_at(guided_field(3)[0], torch.cat([x, x[:, :1]], 1), 0.5).sum().backward()
    assert x.grad.abs().min() > 0


@pytest.mark.parametrize("order", [None, ORDER], ids=["all", "some"])
def test_flows_of_some_samples(order):
    field, _ = guided_field()
    x, solver = normal(4, 3, dtype=torch.float64), fk.Solver.euler(5)
    teacher = Teacher(field, 6, solver=solver, order=order)
    part = field.rows(slice(1, 4) if order is None else order[1:], 6)
    expected = fk.rollout(part, x[1:], 5)
    out = torch.empty_like(expected.x)
    steps = [v.clone() for _, v in teacher.flow(x[1:], 1, out=out, keep=True)]
    assert torch.equal(out, expected.x)
    assert torch.equal(torch.stack(steps), expected.v)
    assert teacher.fused is None
    assert teacher.evaluations == 15
    *_, (last, v) = teacher.flow(x[1:], 1)
    assert torch.equal(last, expected.x[-1])
    assert v is None


def test_a_fused_flow_is_the_flow():
    net, x = BUNDLED["digits"].load(), normal(3, 1, 8, 8)
    fused, plain = (Teacher(v, 3, solver=fk.Solver.euler(4)) for v in (fk.fuse(net, 4, shape=(1, 8, 8)), net))
    last, states, velocities = fused.fused_flow(x[1:], 1, states=True, velocities=True)
    out = torch.empty_like(states)
    v = torch.stack([v.clone() for _, v in plain.flow(x[1:], 1, out=out, keep=True)])
    assert torch.allclose(states, out, atol=1e-5)
    assert torch.allclose(velocities, v, atol=1e-4)
    assert torch.equal(last, states[-1])
    assert fused.evaluations == plain.evaluations == 8
    assert fused.fused_flow(x, states=False)[1:] == (None, None)


def test_a_flow_that_overflows_names_the_sample_and_the_step():
    velocity = lambda x, t: torch.where((t[:, None] >= 0.5) & (x > 5), torch.inf, 0.0)  # noqa: E731
    x = torch.zeros(6, 2)
    x[4] = 9
    with pytest.raises(ValueError, match=r"^velocity: .* in sample 4 at step 2 \(t = 0.5\)"):
        list(Teacher(velocity, 6, solver=fk.Solver.euler(4)).flow(x[3:], 3))
