"""Solvers as a scheduler of diffusers' pipelines: one real pipeline, and the loops of SD3's and Flux's."""

import copy
import inspect
import pickle

import numpy as np
import pytest
import torch
from _flows import normal, uneven_grid
from diffusers import DDPMPipeline, FlowMatchEulerDiscreteScheduler, UNet2DModel
from test_fuse_head import flux, randomised, sd3

import flowkernels as fk
from flowkernels import Schedule, Solver
from flowkernels.integrations.diffusers import scheduler as integration
from flowkernels.integrations.diffusers import solver_scheduler

BF16, F64 = torch.bfloat16, torch.float64
SOLVERS = {
    "schedule": Schedule(uneven_grid(4)),
    "other times": Solver.euler(uneven_grid(4), model_times=[0.1, 0.1, 0.4, 0.9]),
    "ab2": Solver.adams_bashforth(uneven_grid(4), 2),
    "heun": Solver.heun(uneven_grid(3)),
    "dense": Solver(uneven_grid(4), uneven_grid(4)[:-1], normal(4, 4, dtype=F64).tril() / 4),
}
EACH = pytest.mark.parametrize("name", SOLVERS)


def evaluations(solver):
    return Solver.of(solver).evaluations


def close(got, expected, tolerance=2e-5):
    """Timesteps, in thousandths, round to float32 at another place."""
    assert got.shape == expected.shape
    assert (got.double() - expected.double()).norm() <= tolerance * expected.double().norm()


@torch.no_grad()
def pipeline(scheduler, net, latents, rows, scale, steps, begin=False, other=None, guidance=1.0, **kwargs):
    """The denoising loop of StableDiffusion3Pipeline, and with `begin` of FluxPipeline, which brings sigmas and mu."""
    if begin:
        sigmas = np.linspace(1.0, 1 / steps, steps)
        if hasattr(scheduler.config, "use_flow_sigmas") and scheduler.config.use_flow_sigmas:
            sigmas = None
        for name in ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift"):
            assert scheduler.config.get(name, None) is not None
        kwargs = dict(mu=0.7) | kwargs
        if sigmas is None:
            scheduler.set_timesteps(steps, device=latents.device, **kwargs)
        else:
            scheduler.set_timesteps(sigmas=sigmas, device=latents.device, **kwargs)
        scheduler.set_begin_index(0)
    else:
        scheduler.set_timesteps(steps, device=latents.device)
    timesteps = scheduler.timesteps
    assert len(timesteps) == steps * scheduler.order
    latents = latents * scheduler.init_noise_sigma
    for t in timesteps:
        timestep = t.expand(latents.shape[0]) / scale
        v = net(hidden_states=latents, timestep=timestep, **rows, return_dict=False)[0]
        if other is not None:
            u = net(hidden_states=latents, timestep=timestep, **other, return_dict=False)[0]
            v = u + guidance * (v - u)
        latents = scheduler.step(v, t, latents, return_dict=False)[0]
    return latents


@EACH
def test_the_loop_of_sd3(name):
    net, convention, rows, other, shape = sd3(2)
    noise, solver = normal(2, *shape), SOLVERS[name]
    other = {k: v.expand(2, *v.shape[1:]) for k, v in other.items()}
    field = fk.VelocityField(net, **convention, conditioning=rows, unconditional=other, guidance=3.0, packed=False)
    got = pipeline(solver_scheduler(solver), net, noise, rows, 1, evaluations(solver), other=other, guidance=3.0)
    close(got, fk.sample(field, noise, solver))


@EACH
def test_the_loop_of_flux(name):
    net, convention, rows, _, shape = flux(2)
    noise, solver = normal(2, *shape), SOLVERS[name]
    scheduler = solver_scheduler(solver)
    for _ in range(2):  # again, with the same object
        got = pipeline(scheduler, net, noise, rows, 1000, evaluations(solver), begin=True)
        close(got, fk.sample(fk.VelocityField(net, **convention, conditioning=rows), noise, solver))


@EACH
def test_a_pipeline(name):
    torch.manual_seed(0)
    blocks = dict(block_out_channels=(8, 8), down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
    net = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=4, **blocks)
    net, solver = randomised(net), SOLVERS[name]
    pipe = DDPMPipeline(net, solver_scheduler(solver))
    pipe.set_progress_bar_config(disable=True)
    images = pipe(2, torch.Generator().manual_seed(1), evaluations(solver), output_type="np").images
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    expected = fk.sample(fk.VelocityField(net.eval(), reverse_time=True, time_scale=1000), noise, solver)
    expected = (expected / 2 + 0.5).clamp(0, 1)
    assert 0.01 < expected.mean() < 0.99
    close(torch.from_numpy(images).permute(0, 3, 1, 2), expected)


def test_euler_steps_are_those_of_diffusers():
    """On its own sigmas, which end in zero."""
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs.set_timesteps(5)
    ours = solver_scheduler((1 - theirs.sigmas).tolist())
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=0, atol=1e-7)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=0, atol=1e-4)
    x = y = normal(3, 4)
    for t, own in zip(theirs.timesteps, ours.timesteps, strict=True):
        x, y = theirs.step(x.sin(), t, x).prev_sample, ours.step(y.sin(), own, y).prev_sample
        torch.testing.assert_close(x, y)
    image = normal(3, 4, seed=1)
    theirs.set_begin_index(2), ours.set_begin_index(2)
    theirs._step_index = ours._step_index = None
    given = theirs.timesteps[2:3]
    torch.testing.assert_close(ours.scale_noise(image, given, x), theirs.scale_noise(image, given, x))


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_the_stock_scheduler_takes_a_schedule(kind):
    """As docs/diffusers.md has it, with the convention that VelocityField's documentation gives; shifted, or with the
    last sigma, it samples something else."""
    net, convention, rows, _, shape = dict(sd3=sd3, flux=flux)[kind](2)
    assert convention.get("time_scale", 1) == dict(sd3=1000, flux=1)[kind]
    noise, cal = normal(2, *shape), {4: Schedule(uneven_grid(4))}
    expected = fk.sample(fk.VelocityField(net, **convention, conditioning=rows), noise, cal[4])

    @torch.no_grad()
    def stock(shift, sigmas):
        scheduler, x = FlowMatchEulerDiscreteScheduler(shift=shift), noise
        scheduler.set_timesteps(sigmas=sigmas)
        for t in scheduler.timesteps:
            timestep = t.expand(len(x)) / dict(sd3=1, flux=1000)[kind]
            v = net(hidden_states=x, timestep=timestep, **rows, return_dict=False)[0]
            x = scheduler.step(v, t, x, return_dict=False)[0]
        return scheduler.timesteps, x

    timesteps, x = stock(1.0, cal[4].sigmas[:-1].tolist())
    torch.testing.assert_close(timesteps, (1000 * cal[4].sigmas[:-1]).float())
    close(x, expected)
    assert (stock(3.0, cal[4].sigmas[:-1].tolist())[1] - expected).norm() > 0.01 * expected.norm()
    assert len(stock(1.0, cal[4].sigmas.tolist())[0]) == 5


def test_a_saved_pipeline(tmp_path):
    blocks = dict(block_out_channels=(8, 8), down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
    net = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=4, **blocks)
    pipe = DDPMPipeline(net, solver_scheduler(SOLVERS["ab2"]))
    pipe.save_pretrained(tmp_path)
    other = DDPMPipeline.from_pretrained(tmp_path)
    assert type(other.scheduler) is type(pipe.scheduler)
    for p in (pipe, other, copy.deepcopy(pipe)):
        p.set_progress_bar_config(disable=True)
    images = [
        p(2, torch.Generator().manual_seed(1), 4, output_type="np").images for p in (pipe, other, copy.deepcopy(other))
    ]
    assert all(np.array_equal(images[0], image) for image in images)


def test_inverted_time_is_refused():
    """Of pipelines that say so by their name alone, and of a scheduler's configuration."""

    class MochiPipeline:
        def __init__(self, scheduler):
            self.scheduler = scheduler

        def __call__(self, steps):
            return retrieve_timesteps(self.scheduler, steps)

    def retrieve_timesteps(scheduler, steps):
        scheduler.set_timesteps(steps)
        return scheduler.timesteps

    scheduler = solver_scheduler(4)
    with pytest.raises(ValueError, match=r"^scheduler: expected a pipeline whose .*got MochiPipeline, .*invert_sigmas"):
        MochiPipeline(scheduler)(4)
    assert len(retrieve_timesteps(scheduler, 4)) == 4
    for name in ("invert_sigmas", "stochastic_sampling"):
        config = FlowMatchEulerDiscreteScheduler(**{name: True}).config
        with pytest.raises(ValueError, match=rf"^{name}: expected False"):
            type(scheduler).from_config(config, solver=scheduler.config.solver)


def test_the_state_stays_in_float32():
    """And goes on from what the pipeline has made of it, where it has."""
    solver = Solver.adams_bashforth(16, 2)
    noise = normal(64, 3)

    def run(change=None):
        scheduler, x = solver_scheduler(solver), noise.bfloat16()
        for i, t in enumerate(scheduler.timesteps):
            x = scheduler.step((1e-3 * x.double().sin()).bfloat16(), t, x, return_dict=False)[0]
            assert x.dtype == BF16
            x = change(i, x) if change is not None else x
        return scheduler._state

    field = fk.VelocityField(lambda x, t: -(1e-3 * x.double().sin()).bfloat16(), dtype=BF16)
    kept, expected = run(), fk.sample(field, noise.bfloat16(), solver)
    torch.testing.assert_close(kept, expected, rtol=0, atol=1e-6)
    rounded = run(lambda i, x: x.clone())
    assert (rounded - expected).abs().max() > 1e-4
    for change in (lambda i, x: x.mul_(2) if i == 7 else x, lambda i, x: x * 2 if i == 7 else x):
        assert (run(change).abs().mean() / kept.abs().mean()) == pytest.approx(2, rel=0.01)
    with torch.inference_mode():
        assert (run() - expected).abs().max() < 0.02  # nobody could tell whether it was written to


def test_velocities_in_the_same_memory():
    out, solver = torch.empty(3, 4), Solver.adams_bashforth(5, 3)
    scheduler, x = solver_scheduler(solver), normal(3, 4)
    for t in scheduler.timesteps:
        x = scheduler.step(out.copy_(-x.sin()), t, x).prev_sample
    torch.testing.assert_close(x, fk.sample(lambda x, t: x.sin(), normal(3, 4), solver))


def test_through_its_config_and_copies(tmp_path):
    scheduler = solver_scheduler(SOLVERS["ab2"], 500)
    scheduler.save_pretrained(tmp_path)
    others = [type(scheduler).from_pretrained(tmp_path), type(scheduler).from_config(scheduler.config)]
    for other in (*others, copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        assert torch.equal(other.solver.coefficients, scheduler.solver.coefficients)
        assert torch.equal(other.timesteps, scheduler.timesteps)
    assert integration.SolverScheduler is type(scheduler)
    assert scheduler.timesteps[0] == 500
    assert isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
    asked = set(inspect.signature(scheduler.set_timesteps).parameters)
    assert {"sigmas", "mu"} <= asked
    assert "timesteps" not in asked  # which pipelines say is not supported


def test_starts_from_an_image():
    """The second half of Euler's steps; of a step of Heun's; not of a solver that looks back."""
    noise = normal(3, 4)
    scheduler = solver_scheduler(4)
    scheduler.set_begin_index(2)
    x = noise
    for t in scheduler.timesteps[2:]:
        x = scheduler.step(-torch.ones_like(x), t, x).prev_sample
    torch.testing.assert_close(x, noise + 0.5)
    scheduler = solver_scheduler(Solver.heun(4))
    scheduler.set_begin_index(2)
    scheduler.step(noise, scheduler.timesteps[2], noise)
    for solver, begin in ((SOLVERS["ab2"], 1), (Solver.heun(4), 3)):
        scheduler = solver_scheduler(solver)
        scheduler.set_begin_index(begin)
        with pytest.raises(ValueError, match=rf"^begin_index: expected 0, or a solver that looks back.*got {begin}"):
            scheduler.step(noise, scheduler.timesteps[begin], noise)


def test_errors():
    scheduler, x = solver_scheduler(SOLVERS["ab2"]), normal(3, 4)
    for kwargs in (dict(num_inference_steps=28), dict(sigmas=[1.0, 0.5])):
        with pytest.raises(ValueError, match=r"^num_inference_steps: expected 4, the evaluations of Solver"):
            scheduler.set_timesteps(**kwargs)
    for t in scheduler.timesteps:
        scheduler.step(x, t, x)
    with pytest.raises(ValueError, match=r"^step: expected 4 steps after set_timesteps, got one more"):
        scheduler.step(x, 0.0, x)
    with pytest.raises(ValueError, match=r"^solver: expected a solver from noise to data"):
        solver_scheduler(Solver.heun(3, inverse=True))
    with pytest.raises(AttributeError, match="no attribute 'Scheduler'"):
        _ = integration.Scheduler
