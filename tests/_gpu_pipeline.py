"""Each stage on a device against the same on the CPU, from equal noise. Float32 sums differ in their order, no more."""

import copy

import torch
from _flows import normal
from torch import nn

import flowkernels as fk
from flowkernels.models.bundled import BUNDLED


def close(got, expected, tolerance=1e-4):
    got, expected = got.detach().cpu().double(), expected.detach().cpu().double()
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * expected.abs().max().item())


def digits():
    return BUNDLED["digits"].load().requires_grad_(False), normal(32, 1, 8, 8)


def both(device):
    """(network, noise) on the CPU and on the device."""
    net, noise = digits()
    return (net, noise), (copy.deepcopy(net).to(device), noise.to(device))


def same_costs(got, expected):
    for n in expected:
        assert abs(got[n].cost / expected[n].cost - 1) < 1e-3
        assert abs(got[n].uniform_cost / expected[n].uniform_cost - 1) < 1e-3
        assert len(got[n].times) == n + 1
        assert got[n].times.device.type == "cpu"


def calibrate(device):
    expected, got = (fk.calibrate(*where, grid=20, steps=(2, 4), progress=False) for where in both(device))
    same_costs(got, expected)


def schedule(device):
    """Step costs and the recursion by themselves, also with states that are no Euler steps."""
    v, x = normal(20, 8, 64), normal(21, 8, 64, seed=1)
    for states in (None, x):
        there = None if states is None else states.to(device)
        expected, got = fk.step_costs(v, 20, states), fk.step_costs(v.to(device), 20, there)
        j, k = torch.triu_indices(21, 21, 1)
        found, truth = got.cpu()[j, k], expected[j, k]
        torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-6 * truth.max().item())
        same_costs(fk.least_cost_schedules(got, 20, (2, 4)), fk.least_cost_schedules(expected, 20, (2, 4)))


def rollout(device):
    expected, got = (fk.rollout(*where, 10) for where in both(device))
    close(got.x, expected.x)
    close(got.v, expected.v)


def straighten(device):
    (net, noise), (net_there, noise_there) = both(device)
    times = fk.calibrate(net, noise, grid=12, steps=3, progress=False)[3]
    settings = dict(iterations=4, batch=16, progress=False, seed=1)
    expected = fk.straighten(None, net, times, noise=noise, **settings)
    got = fk.straighten(None, net_there, times, noise=noise_there, **settings)
    for a, b in zip(got.history["loss"], expected.history["loss"], strict=True):
        assert abs(a / b - 1) < 1e-2
    with torch.no_grad():
        close(fk.sample(got.student, noise_there, times), fk.sample(expected.student, noise, times), 1e-2)


def sample(device):
    expected, got = (fk.sample(*where, 4) for where in both(device))
    close(got, expected)
    assert got.device.type == torch.device(device).type


def fuse(device):
    (net, noise), (net_there, noise_there) = both(device)
    close(fk.fuse(net_there, 4)(noise_there), fk.sample(net, noise, 4))
    low = fk.fuse(net_there, 4, weights=torch.bfloat16)(noise_there)
    close(low, fk.sample(net, noise, 4), 0.05)
    expected, got = fk.rollout(net, noise, 5), fk.rollout(fk.fuse(net_there, 5), noise_there, 5)
    close(got.x, expected.x)


class Perceptron(nn.Module):
    """A network whose last Linear gives the velocity."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.head = nn.Sequential(nn.Linear(17, 64), nn.SiLU()), nn.Linear(64, 16)

    def forward(self, x, t):
        return self.head(self.trunk(torch.cat([x, t[:, None]], 1)))


def fuse_head(device):
    net, noise = Perceptron().requires_grad_(False), normal(5, 16)
    there = copy.deepcopy(net).to(device)
    close(fk.sample(fk.fuse_head(there), noise.to(device), 4), fk.sample(net, noise, 4))


def solvers(device):
    """Samples, fused samplers and heads by solvers, and the way back."""
    (net, noise), (net_there, noise_there) = both(device)
    for solver in (fk.Solver.adams_bashforth(5, 2), fk.Solver.adams_bashforth(5, 3), fk.Solver.heun(3)):
        expected = fk.sample(net, noise, solver)
        close(fk.sample(net_there, noise_there, solver), expected)
        close(fk.fuse(net_there, solver)(noise_there), expected)
    head, noise = Perceptron().requires_grad_(False), normal(5, 16)
    there = fk.fuse_head(copy.deepcopy(head).to(device))
    close(fk.sample(there, noise.to(device), solver), fk.sample(head, noise, solver))
    expected, got = fk.invert(head, noise, 6), fk.invert(copy.deepcopy(head).to(device), noise.to(device), 6)
    close(got.noise, expected.noise)
    close(got.error, expected.error, 1e-2)


def fits(device):
    """The samples' scatter, objectives that evaluate, a fit and its polish: errors, as equal ridges need not be."""
    where = both(device)
    cals = [fk.calibrate(*w, grid=12, steps=(2, 3), progress=False) for w in where]
    for objective in ("norm", "endpoint", "pairs", "student", "oss", "free"):
        for (net, _), cal in zip(where, cals, strict=True):
            assert cal.find(3, objective=objective, velocity=net)[3].steps == 3
    for inverse in (False, True):
        errors = []
        for (net, _), cal in zip(where, cals, strict=True):
            solver = fk.fit_solver(net, cal, 3, inverse=inverse)
            polished = fk.polish(net, cal, solver, iterations=2)
            errors.append((solver.notes["held_out"][solver.name], polished.notes["polish"][1]))
        for got, expected in zip(*errors, strict=True):
            assert abs(got / expected - 1) < 0.2


STAGES = {f.__name__: f for f in (calibrate, schedule, rollout, straighten, sample, fuse, fuse_head, solvers, fits)}
