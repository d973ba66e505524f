"""log p of flows whose density is known, and what a caller may give."""

import itertools
import math

import pytest
import torch
from _flows import normal
from torch import nn

import flowkernels as fk
from flowkernels.evaluation.likelihood import runge_kutta
from flowkernels.models.closed_form import GaussianMixtureVelocity
from flowkernels.models.networks import ResidualMLP
from flowkernels.ops.samples import generator

F64 = torch.float64
MEANS, STDS = normal(3, 4, dtype=F64), torch.tensor([0.5, 0.8, 0.3], dtype=F64)
WEIGHTS = torch.tensor([0.2, 0.5, 0.3], dtype=F64)
MIXTURE = GaussianMixtureVelocity(MEANS, STDS, WEIGHTS)
DATA = MIXTURE.sample(12, generator(0))


def log_density(x):
    """Of the mixture, by torch.distributions."""
    modes = torch.distributions.Independent(torch.distributions.Normal(MEANS, STDS[:, None].expand(3, 4)), 1)
    return torch.distributions.MixtureSameFamily(torch.distributions.Categorical(WEIGHTS), modes).log_prob(x)


def test_a_mixture_s_density():
    errors = [(fk.log_likelihood(MIXTURE, DATA, N).nats - log_density(DATA)).abs().max().item() for N in (20, 40, 80)]
    assert errors[2] < 3e-6
    assert all(a / b > 10 for a, b in itertools.pairwise(errors))  # of order 4
    found = fk.log_likelihood(MIXTURE, DATA, 80)
    assert (found.probes, found.probe_error, found.evaluations) == (0, None, 320)
    assert found.bits_per_dim == pytest.approx(-log_density(DATA).mean().item() / (4 * math.log(2)), rel=1e-6)
    assert found.standard_error == pytest.approx(log_density(DATA).std().item() / 12**0.5, rel=1e-5)
    back = fk.sample(MIXTURE, found.noise, runge_kutta(torch.linspace(0, 1, 81, dtype=F64)))
    torch.testing.assert_close(back, DATA, rtol=3e-6, atol=3e-6)
    single = fk.log_likelihood(GaussianMixtureVelocity(MEANS.float(), STDS.float(), WEIGHTS.float()), DATA.float(), 40)
    assert single.noise.dtype == torch.float32
    torch.testing.assert_close(single.nats, log_density(DATA), rtol=1e-4, atol=1e-4)


def test_a_linear_flow_is_exact():
    """v = A x: x_1 = exp(A) x_0, whatever the probes say of the trace on the diagonal."""
    A = torch.tensor([[0.3, 0.9], [-0.4, -0.2]], dtype=F64)
    E, x = torch.linalg.matrix_exp(A), normal(5, 2, dtype=F64)
    known = torch.distributions.MultivariateNormal(torch.zeros(2, dtype=F64), E @ E.T).log_prob(x)
    found = fk.log_likelihood(lambda x, t: x @ A.T, x, 50)
    torch.testing.assert_close(found.nats, known, rtol=1e-7, atol=1e-7)
    for solver in (fk.Solver.heun(400, inverse=True), fk.Solver.adams_bashforth(400, 3, inverse=True)):
        torch.testing.assert_close(fk.log_likelihood(lambda x, t: x @ A.T, x, solver).nats, known, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_probes(distribution):
    """Unbiased, with the error that their scatter says; the same whatever the chunk."""
    options = dict(probes=80, distribution=distribution, seed=3)
    found = fk.log_likelihood(MIXTURE, DATA, 4, **options)
    exact = fk.log_likelihood(MIXTURE, DATA, 4, probes=0)
    off = (found.nats - exact.nats) / found.probe_error
    assert off.abs().max() < 4
    assert off.std() < 2
    assert found.nats.tolist() == pytest.approx(fk.log_likelihood(MIXTURE, DATA, 4, chunk=5, **options).nats.tolist())
    other = fk.log_likelihood(MIXTURE, DATA, 4, **(options | dict(seed=4)))
    assert not torch.equal(found.nats, other.nats)
    if distribution == "rademacher":  # e_i^2 = 1: of a Jacobian that is diagonal every probe is exact
        diagonal = fk.log_likelihood(lambda x, t: -x * x, DATA / 9, 4, probes=3)
        torch.testing.assert_close(diagonal.nats, fk.log_likelihood(lambda x, t: -x * x, DATA / 9, 4).nats)
        assert diagonal.probe_error.max() < 1e-12
    assert "80 probes, their standard error" in str(found)
    assert str(fk.log_likelihood(MIXTURE, DATA, 1, probes=1)).endswith("1 probe)")


def test_levels():
    """Of uniform data on 4 levels a flow to their uniform density has log p = -D log 4; here, of the identity."""
    levels = torch.tensor([-1.0, -1 / 3, 1 / 3, 1.0], dtype=F64)
    data = levels[torch.randint(4, (6, 5), generator=generator(0))]
    zero = lambda x, t: 0 * x  # noqa: E731
    found = fk.log_likelihood(zero, data, 1, levels=4, seed=7)
    x, (low, width) = found.noise, (-1, 0.5)
    k = ((data + 1) * 1.5).round()
    assert bool(((x >= low + k * width) & (x < low + (k + 1) * width)).all())  # each in its level's bin
    density = torch.distributions.Normal(0, 1).log_prob(x).sum(1)
    torch.testing.assert_close(found.nats, density + 5 * math.log(width))
    assert found.offset == 1
    assert "1 of it for the levels" in str(found)
    with pytest.raises(ValueError, match="data: expected values on 4 levels from -1 to 1, got others in sample 2"):
        fk.log_likelihood(zero, data.index_fill(0, torch.tensor([2]), 0.1), 1, levels=4)
    images = torch.tensor([[0, 128, 255]], dtype=torch.float32) / 127.5 - 1
    assert fk.log_likelihood(zero, images, 1, levels=256).offset == 7


def test_guidance_and_conditioning_of_each_sample():
    """By the field that a caller would write out."""
    net = ResidualMLP(4, width=16, blocks=1, time_width=8).double()

    def call(x, t, y):
        return net(x * y, t)

    y = normal(12, 1, seed=5, dtype=F64)
    field = fk.VelocityField(call, conditioning={"y": y}, unconditional={"y": torch.ones(1, 1, dtype=F64)}, guidance=2)
    found = fk.log_likelihood(field, DATA, 10, chunk=5)
    whole = fk.log_likelihood(lambda x, t: 2 * net(x * y, t) - net(x, t), DATA, 10)
    torch.testing.assert_close(found.nats, whole.nats, rtol=1e-9, atol=1e-9)
    assert all(p.grad is None for p in net.parameters())


def test_a_fused_sampler_and_what_a_caller_has_set():
    net = ResidualMLP(4, width=16, blocks=1, time_width=8).eval()
    x = DATA.float()
    expected = fk.log_likelihood(net, x, 5).nats
    torch.testing.assert_close(fk.log_likelihood(fk.fuse(net, 2), x, 5).nats, expected)
    frozen = net.requires_grad_(False)
    before, grad = torch.get_default_dtype(), torch.is_grad_enabled()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.no_grad():
            torch.testing.assert_close(fk.log_likelihood(frozen, x, 5).nats, expected)
        with torch.inference_mode():
            torch.testing.assert_close(fk.log_likelihood(frozen, x.clone(), 5).nats, expected)
    finally:
        torch.set_default_dtype(before)
    assert torch.is_grad_enabled() == grad


class Detached(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4).double()

    def forward(self, x, t):
        return self.linear(x.detach())


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        (dict(data=DATA * torch.inf), ValueError, "data: expected finite values"),
        (dict(solver=0), ValueError, "solver: expected at least 1"),
        (dict(solver=fk.Solver.heun(3)), ValueError, "solver: expected a solver from data, at t = 1, to noise"),
        (dict(solver=fk.Schedule([0.2, 1])), ValueError, "solver: expected a schedule from t = 0"),
        (dict(probes=-1), ValueError, "probes: expected a number of probes, 0"),
        (dict(distribution="normal"), ValueError, "distribution: expected 'rademacher' or 'gaussian'"),
        (dict(levels=1), ValueError, "levels: expected an integer of at least 2"),
        (dict(value_range=(1, 1)), ValueError, "value_range: expected two finite"),
        (dict(velocity=lambda x, t: x * torch.nan), ValueError, "velocity: expected finite .* in sample 0"),
        (dict(velocity=lambda x, t: x.detach()), ValueError, "velocity: expected one that gradients of x go through"),
        (dict(velocity=Detached()), ValueError, "velocity: expected one that gradients of x go through"),
    ],
)
def test_what_is_refused(changes, error, said):
    with pytest.raises(error, match=f"^{said}"):
        fk.log_likelihood(**(dict(velocity=MIXTURE, data=DATA, solver=2) | changes))
