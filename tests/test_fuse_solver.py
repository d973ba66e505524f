"""Fused samplers of solvers: on every backend what the loop gives that is written down in float64."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import flowkernels as fk
from flowkernels.fusion import sampler as sampler_module
from flowkernels.ops.mlp_sample.samples import error_and_bound
from flowkernels.ops.samples import Sample, generator
from flowkernels.runtime.backends import BACKENDS, backend

F64 = torch.float64


def fitted(M: int = 5) -> fk.Solver:
    """All velocities at every step, and times between the knots, as a fit has them."""
    g = generator(2)
    b = torch.randn(M, M, generator=g, dtype=F64).tril() / M + torch.full((M, M), 1 / M, dtype=F64).tril()
    return fk.Solver(torch.linspace(0, 1, M + 1), torch.rand(M, generator=g, dtype=F64), b)


def scaled() -> fk.Solver:
    """Two velocities and a multiple of the state before."""
    ratios, b = torch.tensor([0.8, 1.3, -0.5, 0.9, 1.1], dtype=F64), torch.zeros(5, 5, dtype=F64)
    for i, ratio in enumerate(ratios):
        b[i] = ratio * b[i - 1]
        b[i, max(0, i - 1) : i + 1] += torch.tensor([-0.1, 0.3], dtype=F64)[-(i + 1) :]
    return fk.Solver(KNOTS, KNOTS[:-1], b, start_coefficients=ratios.cumprod(0))


KNOTS = [0.0, 0.2, 0.3, 0.65, 0.8, 1.0]
SOLVERS = {
    "ab2": fk.Solver.adams_bashforth(KNOTS, 2),
    "ab3": fk.Solver.adams_bashforth(KNOTS, 3),
    "heun": fk.Solver.heun(3),
    "dense": fitted(),
    "free times": fk.Solver.euler(4, model_times=[0.1, 0.3, 0.55, 0.9]),
    "free start": replace(fitted(), start_coefficients=torch.tensor([0.9, 0.0, -0.6, 1.2, 0.8])),
    "scaled": scaled(),
    "late": fk.Solver.adams_bashforth(KNOTS[1:], 2),
    "euler back": fk.Solver.euler(KNOTS, inverse=True),
    "ab2 back": fk.Solver.adams_bashforth(KNOTS[1:], 2, inverse=True),
}


class Conditional(nn.Module):
    """Of x, and of t and a row of conditioning for each sample together."""

    def __init__(self, dim=6, cond=4, w=21):
        super().__init__()
        self.embed, self.norm = nn.Linear(cond + 1, 8), nn.LayerNorm(w)
        self.a, self.b = nn.Linear(dim + 8, w), nn.Linear(w, dim)

    def forward(self, x, t, c):
        embedding = torch.tanh(self.embed(torch.cat([c.expand(len(x), -1), t[:, None].to(x.dtype)], 1)))
        return self.b(self.norm(nn.functional.silu(self.a(torch.cat([x, embedding], 1)))))


def randn(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed))


def network():
    torch.manual_seed(0)
    return Conditional().eval().requires_grad_(False)


def field(n, net=None, guidance=None):
    guided = {} if guidance is None else dict(guidance=guidance, unconditional={"c": torch.zeros(1, 4)})
    return fk.VelocityField(net or network(), conditioning={"c": randn(n, 4, seed=1)}, **guided)


def loop(velocity, x, solver):
    """(samples, states, velocities) of the solver's definition."""
    start, states, velocities = x, [x], []
    for i, t in enumerate(solver.model_times):
        velocities.append(velocity(states[-1], torch.full((len(x),), t.item(), dtype=x.dtype)))
        terms = (b * v for b, v in zip(solver.coefficients[i], velocities, strict=False))
        states.append(solver.start_coefficients[i] * start + sum(b.to(x.dtype) for b in terms))
    return states[-1], torch.stack(states), torch.stack(velocities)


def exact(velocity, x, solver):
    net, c, others = velocity.net.double(), velocity.conditioning["c"].double(), velocity.unconditional
    others = {k: v.double() for k, v in others.items()}
    wide = fk.VelocityField(net, conditioning={"c": c}, unconditional=others or None, guidance=velocity.guidance)
    try:
        return loop(wide, x.double(), solver)
    finally:
        net.float()


def assert_within_the_bound(sampler, velocity, x, solver):
    """That of the op, on the layers that the network became: states, velocities and samples beside the exact loop."""
    got = sampler.run(x, states=True, velocities=True)
    batch, M = sampler._batch, solver.evaluations
    assert [t.shape for t in got] == [x.shape, (M + 1, *x.shape), (M, *x.shape)]
    assert torch.equal(got[1][0], x)
    assert torch.equal(got[1][-1], got[0])
    assert torch.equal(sampler(x), got[0])
    steps = sampler._steps.tolist() if isinstance(sampler._steps, torch.Tensor) else sampler._steps
    kwargs = {} if batch.unconditional is None else dict(unconditional=batch.unconditional, guidance=velocity.guidance)
    kwargs |= dict(trajectory=True, weights=batch.network.low)
    error, bound = error_and_bound(Sample("", (x, steps, batch.layers), kwargs), got)
    assert error <= bound
    for found, truth in zip(got, exact(velocity, x, solver), strict=True):  # tables are of float32 here
        assert (found - truth).abs().max() <= (bound + 4 * torch.finfo(torch.float32).eps) * truth.abs().max()


MULTISTEP = ("ab2", "ab3", "heun", "dense", "free start", "scaled", "ab2 back")  # the others are Euler steps to the op


@pytest.mark.parametrize(
    ("solver", "name"), [(s, name) for name in BACKENDS for s in (SOLVERS if name == "cpu" else MULTISTEP)]
)
def test_a_solver_on_every_backend(solver, name):
    solver, x, guidance = SOLVERS[solver], randn(9, 6), 1.7 if solver in ("ab2", "dense", "free start") else None
    velocity = field(9, guidance=guidance)
    sampler = fk.fuse(velocity, solver)
    with backend(name):
        assert_within_the_bound(sampler, velocity, x, solver)


@pytest.mark.parametrize("name", BACKENDS)
def test_start_coefficients_with_bfloat16_weights(name):
    x, solver = randn(9, 6), SOLVERS["free start"]
    with backend(name):
        for guidance in (None, 1.7):
            velocity = field(9, guidance=guidance)
            assert_within_the_bound(fk.fuse(velocity, solver, weights=torch.bfloat16), velocity, x, solver)


def test_the_form_of_start_coefficients():
    free, steps = SOLVERS["free start"].updates(), SOLVERS["scaled"].updates()
    assert [u.scale for u in free] == SOLVERS["free start"].start_coefficients.tolist()
    assert [(u.from_start, len(u.which)) for u in steps] == [(False, 1), (True, 2)] + [(False, 2)] * 3
    assert [round(u.scale, 12) for u in steps] == [0.8, 1.04, -0.5, 0.9, 1.1]


@pytest.mark.parametrize("name", BACKENDS)
def test_other_conditioning_and_other_solvers_of_one_sampler(name):
    net, x, other = network(), randn(9, 6), randn(9, 4, seed=5)
    sampler = fk.fuse(field(9, net), 4)
    with backend(name):
        for solver in (SOLVERS["ab2"], SOLVERS["dense"], SOLVERS["free start"], fk.Solver.euler(KNOTS)):
            got = sampler.on(solver)(x, c=other)
            expected = loop(fk.VelocityField(net, conditioning={"c": other}), x, solver)[0]
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_samplers_of_solvers_are_told_apart():
    sampler = fk.fuse(field(3), SOLVERS["ab2"])
    assert sampler.on(SOLVERS["ab2"]) is sampler
    assert sampler.on(fk.Solver.adams_bashforth(KNOTS, 2)) is sampler
    others = [sampler.on(s) for s in (SOLVERS["ab3"], KNOTS, fk.Solver.euler(KNOTS, model_times=[0.1] * 5), 3)]
    assert len({id(s) for s in [sampler, *others]}) == 5
    assert sampler.on(fk.Solver.euler(KNOTS)) is others[1]
    assert sampler.on(fk.Solver.adams_bashforth(KNOTS, 3)) is others[0]
    for s in (sampler, *others[:3]):
        assert s.times.tolist() == KNOTS
    back = fk.Solver.euler(KNOTS, inverse=True)
    assert sampler.on(back) is sampler.on(back) is not others[1]
    assert sampler.rows(slice(0, 2), 3)._steps == sampler._steps
    with pytest.raises((TypeError, ValueError), match=r"^schedule: expected"):
        others[1].on(None)


def test_euler_is_the_same_path():
    """A solver of Euler steps gives the bits that the schedule gives."""
    x, velocity = randn(9, 6), field(9)
    sampler = fk.fuse(velocity, KNOTS)
    assert torch.equal(fk.fuse(velocity, fk.Solver.euler(KNOTS))(x), sampler(x))
    given = fk.Solver.euler(KNOTS, model_times=KNOTS[:-1])
    assert sampler.on(given) is sampler
    free = fk.fuse(velocity, SOLVERS["free times"])
    assert isinstance(free._steps, torch.Tensor)
    assert free._steps.tolist() == [0.25] * 4


@pytest.mark.parametrize("guidance", [None, 1.5])
def test_many_samples_run_in_parts(monkeypatch, guidance):
    x, solver, other = randn(20, 6), SOLVERS["dense"], randn(20, 4, seed=5)
    sampler = fk.fuse(field(20, guidance=guidance), solver)
    whole = sampler.run(x, {"c": other}, states=True, velocities=True)
    width = sampler._network.recorded.width_of_both
    assert width > 0
    monkeypatch.setattr(
        sampler_module, "MOST_BYTES", 8 * solver.evaluations * (2 if guidance else 1) * width * 7
    )  # 7 samples
    calls = []
    run = fk.FusedSampler.run
    monkeypatch.setattr(fk.FusedSampler, "run", lambda self, *a, **k: calls.append(len(a[0])) or run(self, *a, **k))
    parts = sampler.run(x, {"c": other}, states=True, velocities=True)
    assert calls == [20, 7, 7, 6]
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)


def test_what_is_not_finite_names_the_evaluation_and_its_time():
    c = randn(5, 4)
    velocity = fk.VelocityField(network(), conditioning={"c": c})
    sampler = fk.fuse(velocity, SOLVERS["dense"])
    c[3, 1] = math.nan
    first = SOLVERS["dense"].model_times[0].item()
    with pytest.raises(ValueError, match=rf"sample 3 at step 0 \(t = {first:.6g}\)"):
        sampler(randn(5, 6))
    with pytest.raises(ValueError, match=r"sample 3 at evaluation 0 \(t = 0\)"):
        sampler.on(SOLVERS["heun"])(randn(5, 6))


def test_there_and_back():
    """An inversion of samples ends near the noise, with the higher order nearer."""
    x, velocity = randn(9, 6), field(9)
    sampler = fk.fuse(velocity, 40)
    errors = []
    for order in (1, 2):
        there = sampler.on(fk.Solver.adams_bashforth(40, order))(x)
        back = sampler.on(fk.Solver.adams_bashforth(40, order, inverse=True))(there)
        errors.append((back - x).abs().max().item())
    assert errors[0] > 3 * errors[1]
