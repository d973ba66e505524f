"""Libraries of flow matching on torchdiffeq, of random weights: Meta's flow_matching, torchcfm, torchdyn, torchdiffeq
itself and rectified-flow-pytorch, each beside its own loop."""

import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flowkernels as fk

EXAMPLES = Path(__file__).parents[2] / "examples/integrations"


def load(name):
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(f"{name}_example", EXAMPLES / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def relative(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


# ---- Meta's flow_matching ----


@pytest.fixture
def meta():
    return load("meta_flow_matching")


@pytest.mark.parametrize("method", ["euler", "midpoint"])
def test_flow_matching(meta, host_row, method):
    samples, theirs, _ = meta.run(method)
    difference = relative(samples, theirs)
    host_row("flow_matching", f"ODESolver.sample, {method}, with extras", "meta_flow_matching", difference)
    assert difference <= 1e-6


@pytest.mark.parametrize("grid", [[0.0, 0.3, 1.0], [0.2, 0.7], [1.0, 0.4, 0.0]], ids=["uneven", "partial", "falling"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_time_grids_of_flow_matching(meta, grid, dtype):
    """With step_size=None its steps are the grid's; the grid's dtype does not matter."""
    from flow_matching.solver import ODESolver

    _, _, velocity = meta.run()
    noise = torch.randn(6, 2)
    solver = ODESolver(velocity.net)
    times = torch.tensor(grid, dtype=dtype)
    theirs = solver.sample(noise, None, time_grid=times, **velocity.conditioning)
    ours = fk.invert(velocity, noise, times).noise if grid[0] == 1 else fk.sample(velocity, noise, times)
    assert relative(ours, theirs) <= 1e-6


def test_without_a_step_size_its_grid_is_one_step(meta):
    """The default grid of ODESolver has two times: as fk.sample(..., 1), whatever its method's name promises."""
    from flow_matching.solver import ODESolver

    _, _, velocity = meta.run()
    noise = torch.randn(6, 2)
    theirs = ODESolver(velocity.net).sample(noise, None, **velocity.conditioning)
    assert relative(fk.sample(velocity, noise, 1), theirs) <= 1e-6


def test_gradients_of_flow_matching(meta):
    from flow_matching.solver import ODESolver

    _, _, velocity = meta.run()
    found = []
    for ours in (False, True):
        noise = torch.randn(6, 2, generator=torch.Generator().manual_seed(3)).requires_grad_()
        if ours:
            x = fk.sample(velocity, noise, fk.Solver.midpoint(4), differentiable=True)
        else:
            options = dict(step_size=0.25, method="midpoint", enable_grad=True)
            x = ODESolver(velocity.net).sample(noise, **options, **velocity.conditioning)
        found.append(torch.autograd.grad(x.square().sum(), noise)[0])
    assert relative(found[1], found[0]) <= 1e-5


def test_a_transformed_path_of_flow_matching(meta):
    """Its wrapper divides by a factor of the time, of no dimensions."""
    from flow_matching.path.scheduler import CondOTScheduler, PolynomialConvexScheduler, ScheduleTransformedModel
    from flow_matching.solver import ODESolver

    _, _, velocity = meta.run()
    model = ScheduleTransformedModel(velocity.net, CondOTScheduler(), PolynomialConvexScheduler(2.0))
    noise, times = torch.randn(6, 2), torch.tensor([0.0, 0.2, 0.5, 0.8, 1.0])
    theirs = ODESolver(model).sample(noise, None, time_grid=times, **velocity.conditioning)
    ours = fk.sample(lambda x, t: model(x, t[0], **velocity.conditioning), noise, times)
    assert relative(ours, theirs) <= 1e-6


def test_likelihoods_of_flow_matching(meta, host_row):
    from flow_matching.solver import ODESolver

    _, _, velocity = meta.run()
    data, N = torch.randn(6, 2), 16
    prior = lambda x: -(x.square().sum(1) + 2 * math.log(2 * math.pi)) / 2  # noqa: E731
    _, theirs = ODESolver(velocity.net).compute_likelihood(
        data, prior, step_size=1 / N, exact_divergence=True, **velocity.conditioning
    )
    ours = fk.log_likelihood(velocity, data, fk.Solver.euler(N, inverse=True), probes=0)
    difference = relative(ours.nats.float(), theirs)
    host_row("flow_matching", "ODESolver.compute_likelihood, euler, exact", "meta_flow_matching", difference)
    assert difference <= 1e-5
    wide = fk.log_likelihood(lambda x, t: velocity.net(x.float(), t.float(), **velocity.conditioning).double(),
                             data.double(), fk.Solver.euler(N, inverse=True))  # fmt: skip
    assert relative(wide.nats, ours.nats) <= 1e-5


# ---- torchcfm, torchdyn ----


def test_torchcfm(host_row):
    samples, theirs, velocity = load("torchcfm_unet").run()
    difference = relative(samples, theirs)
    host_row("torchcfm", "UNetModelWrapper, Euler's steps", "torchcfm_unet", difference)
    assert difference <= 1e-5
    net = velocity.net
    assert velocity.check(lambda x, t: net(t, x), torch.randn(2, 1, 8, 8)) <= 1e-5


@pytest.mark.parametrize("solver", ["euler", "midpoint"])
def test_torchdyn(host_row, solver, tmp_path):
    """In a process of its own: what its import brings changes attributes of modules, by which models are known."""
    code = "import runpy, sys, torch; torch.save(runpy.run_path(sys.argv[1])['run'](sys.argv[2])[:2], sys.argv[3])"
    command = [sys.executable, "-c", code, EXAMPLES / "torchdyn_neural_ode.py", solver, tmp_path / "found.pt"]
    subprocess.run(command, check=True, timeout=300)
    difference = relative(*torch.load(tmp_path / "found.pt"))
    host_row("torchdyn", f"NeuralODE.trajectory, {solver}", "torchdyn_neural_ode", difference)
    assert difference <= 1e-5


# ---- torchdiffeq, rectified-flow-pytorch ----


def test_torchdiffeq(host_row):
    example = load("torchdiffeq_odeint")
    samples, theirs, func = example.run()
    difference = relative(samples, theirs)
    host_row("torchdiffeq", "odeint by its name, midpoint", "torchdiffeq_odeint", difference)
    assert difference <= 1e-6
    solver = fk.Solver.adams_bashforth(8, 3)
    samples, _, _ = example.run(solver, method="dopri5")
    torch.manual_seed(0)
    torch.randn(3, 3)
    assert relative(samples, fk.sample(lambda x, t: func(t[0], x), torch.randn(6, 3), solver)) <= 1e-6


SETTINGS = {
    "flow": {},
    "noise": dict(predict="noise"),
    "clean": dict(predict="clean"),
    "clipped": dict(clip_during_sampling=True, odeint_kwargs=dict(method="euler")),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_rectified_flow(host_row, torchvision, name):
    example = load("rectified_flow")
    plan = fk.Solver.euler(4) if name == "clipped" else None
    samples, theirs, _ = example.run(plan, **SETTINGS[name])
    difference = relative(samples, theirs)
    host_row("rectified-flow-pytorch", f"RectifiedFlow.sample, {name}", "rectified_flow", difference)
    assert difference <= 1e-5
