"""Solvers as a scheduler of diffusers' pipelines, alone and in the loops of SD3's and Flux's; schedules for stock ones.

Whole pipelines of all families are in tests/pipelines."""

import copy
import inspect
import json
import pickle
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from _flows import normal, uneven_grid
from _transformers import flux, randomised, sd3
from diffusers import DDPMPipeline, FlowMatchEulerDiscreteScheduler, UNet2DModel

import flowkernels as fk
from flowkernels import Schedule, Solver
from flowkernels.integrations import diffusers as integration
from flowkernels.integrations.diffusers import sigmas_for, solver_scheduler

BF16, F64 = torch.bfloat16, torch.float64
SOLVERS = {
    "schedule": Schedule(uneven_grid(4)),
    "other times": Solver.euler(uneven_grid(4), model_times=[0.1, 0.1, 0.4, 0.9]),
    "ab2": Solver.adams_bashforth(uneven_grid(4), 2),
    "heun": Solver.heun(0.1 + 0.9 * uneven_grid(3)),  # begins below sigma = 1
    "dense": Solver(uneven_grid(4), uneven_grid(4)[:-1], normal(4, 4, dtype=F64).tril() / 4),
}
SOLVERS["free start"] = replace(SOLVERS["dense"], start_coefficients=[0.9, 1.3, 0.6, 0.8])


def scaled_steps(times, scales):
    """Steps `x_{i+1} = scales[i] x_i + h v_i`."""
    rows = torch.diag(times.diff())
    for i in range(1, len(scales)):
        rows[i] += scales[i] * rows[i - 1]
    return Solver(times, times[:-1], rows, start_coefficients=torch.tensor(scales, dtype=F64).cumprod(0))


SOLVERS["scaled steps"] = scaled_steps(uneven_grid(4), [0.9, 1.3, 0.6, 0.8])
EACH = pytest.mark.parametrize("name", SOLVERS)
OPTIONS = {*inspect.signature(FlowMatchEulerDiscreteScheduler).parameters}  # early versions of diffusers lack some


def made(solver, **config):
    return solver_scheduler(solver, like=FlowMatchEulerDiscreteScheduler(**config))


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
    randomised(net)
    noise, solver = normal(2, *shape), SOLVERS[name]
    other = {k: v.expand(2, *v.shape[1:]) for k, v in other.items()}
    field = fk.VelocityField(net, **convention, conditioning=rows, unconditional=other, guidance=3.0, packed=False)
    got = pipeline(made(solver, shift=3.0), net, noise, rows, 1, evaluations(solver), other=other, guidance=3.0)
    close(got, fk.sample(field, noise, solver))


@EACH
def test_the_loop_of_flux(name):
    net, convention, rows, _, shape = flux(2)
    randomised(net)
    noise, solver = normal(2, *shape), SOLVERS[name]
    scheduler = made(solver, use_dynamic_shifting=True)
    for _ in range(2):  # again, with the same object
        got = pipeline(scheduler, net, noise, rows, 1000, evaluations(solver), begin=True)
        close(got, fk.sample(fk.VelocityField(net, **convention, conditioning=rows), noise, solver))


# ---- what it replaces ----

FLOW_MODE = dict(prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=1)
LIKE = {
    "plain": FlowMatchEulerDiscreteScheduler(),
    "time to 1": FlowMatchEulerDiscreteScheduler(num_train_timesteps=1),
    "inverted": FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
    "heun": diffusers.FlowMatchHeunDiscreteScheduler(),
    "dpm": diffusers.DPMSolverMultistepScheduler(**FLOW_MODE, flow_shift=3.0),
    "unipc": diffusers.UniPCMultistepScheduler(**FLOW_MODE, flow_shift=3.0),
    "ours": made(4, num_train_timesteps=1, invert_sigmas=True),
}


@torch.no_grad()
def run(scheduler, x, velocity, **kwargs):
    """A pipeline's loop; the velocity is what the network gives at a timestep."""
    called = []
    for t in scheduler.timesteps:
        called.append(float(t))
        x = scheduler.step(velocity(x, t), t, x, return_dict=False, **kwargs)[0]
    return called, x


@pytest.mark.parametrize("name", LIKE)
def test_the_network_is_called_as_before(name):
    """At the same times, with the steps of the stock scheduler on its own knots."""
    stock = copy.deepcopy(LIKE[name])
    if type(stock) is FlowMatchEulerDiscreteScheduler:
        stock.set_timesteps(sigmas=[1.0, 0.9, 0.6, 0.2])
    else:
        stock.set_timesteps(4)
    known = stock.sigmas[: len(stock.timesteps) + 1].double()
    if name == "heun":  # which makes two evaluations a step, and holds the knots twice
        known = known.unique().flip(0)
    sigmas = 1 - known if stock.config.get("invert_sigmas") else known
    ours = solver_scheduler((1 - sigmas).tolist(), like=stock)
    assert type(solver_scheduler(ours.solver, like=ours)) is type(ours)
    for kwargs in (
        dict(sigmas=sigmas[:-1].numpy()),
        dict(timesteps=list(sigmas[:-1] * ours.config.num_train_timesteps)),
    ):
        ours.set_timesteps(mu=0.7, **kwargs)
    times = stock.timesteps if name != "heun" else stock.timesteps.unique().flip(0)
    whole = name in ("dpm", "unipc")  # which call it at whole timesteps
    torch.testing.assert_close(ours.timesteps, times.float(), rtol=0, atol=1.0 if whole else 1e-4)
    x = normal(3, 4)
    velocity = lambda x, t: x.sin()  # noqa: E731
    if name not in ("heun", "unipc"):  # whose steps are not Euler's
        torch.testing.assert_close(run(ours, x, velocity)[1], run(stock, x, velocity)[1])
    if name != "ours":
        back = type(stock).from_config(ours.config)
        assert {k: v for k, v in back.config.items() if k in stock.config and k[0] != "_"} == {
            k: v for k, v in stock.config.items() if k[0] != "_"
        }


REFUSED = {
    "EulerDiscreteScheduler": {},
    "DDIMScheduler": {},
    "EDMEulerScheduler": {},
    "FlowMatchLCMScheduler": {},
    "DPMSolverMultistepScheduler": dict(prediction_type="v_prediction"),
    "UniPCMultistepScheduler": dict(use_flow_sigmas=True),
    "FlowMatchEulerDiscreteScheduler": dict(stochastic_sampling=True),
}
if "stochastic_sampling" not in OPTIONS:
    del REFUSED["FlowMatchLCMScheduler"], REFUSED["FlowMatchEulerDiscreteScheduler"]


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_replace_is_named(name):
    like = getattr(diffusers, name)(**REFUSED[name])
    with pytest.raises(ValueError, match=rf"^like: expected .*, got {name}"):
        solver_scheduler(4, like=like)


def test_a_scheduler_of_an_edm_pipeline_is_refused():
    stock = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    stock.register_to_config(sigma_max=80.0, sigma_data=1.0)  # as the pipelines of Cosmos 2 do
    with pytest.raises(
        ValueError, match=r"^like: .*got FlowMatchEulerDiscreteScheduler in the hands of an EDM pipeline"
    ):
        solver_scheduler(4, like=stock)
    with pytest.raises(TypeError, match=r"^like: expected a scheduler .*pipe\.scheduler.*got 1000"):
        solver_scheduler(4, like=1000)


# ---- a calibration ----


def calibration():
    field = fk.VelocityField(lambda x, t: (1 - t)[:, None] * x.sin())
    cal = fk.calibrate(field, normal(64, 4), grid=20, steps=[2, 3, 4], effort="fit", progress=False)
    return field, cal


def test_a_calibration_serves_what_it_holds():
    """In one scheduler and, at the same time, in copies made in each way, one of them through JSON."""
    field, cal = calibration()
    scheduler = made(cal)
    for number in (5, None):
        with pytest.raises(ValueError, match=r"^num_inference_steps: expected one of \[2, 3, 4\], .*got (5|none)"):
            scheduler.set_timesteps(number)
    with pytest.raises(ValueError, match=r"^num_inference_steps, or sigmas of that length: expected .*, got 28"):
        scheduler.set_timesteps(sigmas=[1 - i / 28 for i in range(28)])
    with pytest.raises(ValueError, match=r"^step: expected set_timesteps before it"):
        scheduler.step(normal(2, 4), 0.0, normal(2, 4))
    saved = json.loads(scheduler.to_json_string())
    pickled = pickle.loads(pickle.dumps(scheduler))
    copies = [scheduler, copy.deepcopy(scheduler), type(scheduler).from_config(saved), pickled]
    copies += [type(scheduler).from_config(scheduler.config), solver_scheduler(cal, like=scheduler)]
    shifted = FlowMatchEulerDiscreteScheduler(shift=1.0)
    shifted.set_shift(3.0)  # which leaves its config as it was
    assert {s.config.shift for s in (solver_scheduler(cal, like=shifted), made(cal, shift=3.0))} == {3.0}
    assert solver_scheduler(cal, like=made(cal, shift=3.0)).config.shift == 3.0
    steps = [2, 3, 4, 2, 3, 4]

    def request(scheduler, n, seed):
        scheduler.set_timesteps(n)
        return run(scheduler, normal(4, 4, seed=seed), lambda x, t: -field(x, 1 - t.expand(len(x)) / 1000))[1]

    with ThreadPoolExecutor(len(copies)) as threads:
        jobs = [threads.submit(request, *each) for each in zip(copies, steps, range(6), strict=True)]
        got = [job.result() for job in jobs]
    for n, seed, x in zip(steps, range(6), got, strict=True):
        close(x, fk.sample(field, normal(4, 4, seed=seed), cal.best(n)))
    best = Solver.of(cal.best(4))
    for each in copies:
        assert torch.equal(each.solvers[4].coefficients, best.coefficients)
        assert torch.equal(each.solvers[4].times, best.times)


# ---- set_timesteps ----


@pytest.mark.parametrize("again", [lambda s: s, copy.deepcopy, lambda s: type(s).from_config(s.config)])
def test_a_calibration_of_other_latents_or_another_shift_is_said_so(again):
    made_for = {"pipeline": "SomePipeline", "latent_shape": [3, 4, 4], "mu": 0.5, "height": 32}
    cal = fk.calibrate(lambda x, t: x * t[:, None, None, None], normal(4, 3, 4, 4), 8, [2, 4], progress=False)
    cal.provenance["pipeline"] = made_for
    cal.solvers[4] = replace(Solver.adams_bashforth(cal[4], 2), notes={})
    scheduler = again(made(cal, use_dynamic_shifting=True))
    for steps in (2, 4):  # a schedule and a solver
        for shape, mu, said in (
            ([3, 4, 4], 0.5, None),
            ([3, 8, 4], 0.5, r"latent_shape"),
            ([3, 4, 4], 0.7, "mu 0.5, now 0.7"),
        ):
            scheduler.set_timesteps(steps, mu=mu)
            x = normal(1, *shape)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                for t in scheduler.timesteps:
                    x = scheduler.step(x, t, x).prev_sample
            texts = [str(w.message) for w in caught]
            assert len(texts) == (said is not None)
            assert all("expected the pipeline that it was calibrated for" in text and said in text for text in texts)


def test_set_timesteps():
    scheduler = made(SOLVERS["ab2"], num_train_timesteps=500)
    assert {"timesteps", "sigmas", "mu"} <= set(inspect.signature(scheduler.set_timesteps).parameters)
    scheduler.set_timesteps(timesteps=np.linspace(500, 1, 4), sigmas=np.linspace(1, 0.25, 4), mu=0.5, device="cpu")
    assert scheduler.timesteps[0] == 500
    torch.testing.assert_close(scheduler.sigmas, (1 - uneven_grid(4)).float())
    bad = {
        "num_inference_steps": (dict(num_inference_steps=28), "4, the evaluations of Solver.*got 28"),
        "num_inference_steps, or sigmas of that length": (
            dict(sigmas=[1.0, 0.5]),
            "4, the evaluations of Solver.*got 2",
        ),
        "timesteps": (dict(num_inference_steps=4, timesteps=[500.0]), "4, the evaluations of Solver.*got 1"),
    }
    for name, (kwargs, told) in bad.items():
        with pytest.raises(ValueError, match=rf"^{name}: expected {told}"):
            scheduler.set_timesteps(**kwargs)
    for kwargs in (dict(sigmas=[0.7, 0.5, 0.3, 0.1]), dict(timesteps=[350, 200, 100, 50])):  # latents of less noise
        with pytest.raises(ValueError, match=r"^(sigmas|timesteps): expected a start at sigma 1, .*got 0.7"):
            scheduler.set_timesteps(**kwargs)
    with pytest.raises(ValueError, match=r"^set_shift: expected no shift"):
        scheduler.set_shift(3.0)
    for t in scheduler.timesteps:
        x = scheduler.step(normal(3, 4), t, normal(3, 4)).prev_sample
    with pytest.raises(ValueError, match=r"^step: expected 4 steps after set_timesteps, got one more"):
        scheduler.step(x, 0.0, x)


def test_a_schedule_that_begins_below_one():
    solver = Solver.adams_bashforth([0.2, 0.5, 1], 2)
    scheduler = made(solver, num_train_timesteps=1)
    scheduler.set_timesteps(sigmas=[1.0, 0.5])  # a pipeline's own, and
    scheduler.set_timesteps(sigmas=[0.8, 0.5])  # those of latents at its start
    called, x = run(scheduler, normal(3, 4), lambda x, t: -x.sin())
    assert called == pytest.approx([0.8, 0.5])
    torch.testing.assert_close(x, fk.sample(lambda x, t: x.sin(), normal(3, 4), solver))


def test_errors():
    stock = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match=r"^solver: expected a solver from noise to data"):
        solver_scheduler(Solver.heun(3, inverse=True), like=stock)
    for lost in (0.0, 1e-4):  # in whose state nothing is left of x_0
        with pytest.raises(
            ValueError, match=r"^solver: expected Solver.* no start coefficient that is 0, .*before the"
        ):
            made(replace(SOLVERS["dense"], start_coefficients=[1.0, lost, 1.0, 1.0]))
    made(replace(SOLVERS["dense"], start_coefficients=[1.0, 1.0, 1.0, 0.0]))
    scheduler = made(4)
    with pytest.raises(ValueError, match=r"^config: expected one with solvers, as solver_scheduler.*of FlowMatchEuler"):
        type(scheduler).from_config(json.loads(stock.to_json_string()))
    with pytest.raises(AttributeError, match="no attribute 'Scheduler'"):
        _ = integration.Scheduler
    assert integration.SolverScheduler is type(scheduler)


# ---- the state ----


def by_dlpack(x):
    view = torch.from_dlpack(x)
    assert view.data_ptr() == x.data_ptr()
    view.mul_(2)
    return x


def by_data(x):
    x.data.mul_(2)
    return x


SAME = {  # whatever the pipeline hands back, it is the same numbers
    "object": lambda x: x,
    "copy": lambda x: x.clone(),
    "through float32": lambda x: x.float().to(x.dtype),
    "as float32": lambda x: x.float(),  # Mochi's
    "rounded": lambda x: x.float().bfloat16().float(),  # Mochi's, whose network's output it makes float32
    "a part put back": lambda x: torch.cat([x[:1] * 0 + x[:1], x[1:]]),
}
EDITS = {
    "in place": lambda x: x.mul_(2),
    "data": by_data,
    "dlpack": by_dlpack,
    "new": lambda x: x * 2,
    "in float32": lambda x: x.float() * 2,
}


def rounded_run(change, last, dtype=BF16, ambient=torch.no_grad):
    """The state after 16 small steps of a network in bfloat16, and what the pipeline ended with; `change` of the
    latents after each step, or after one alone."""
    scheduler = made(Solver.adams_bashforth(16, 2))
    with ambient():
        x = normal(64, 3).bfloat16()
        for i, t in enumerate(scheduler.timesteps):
            x = scheduler.step((1e-3 * x.double().sin()).bfloat16().to(dtype), t, x, return_dict=False)[0]
            x = change(x) if last is None or i == last else x
        return scheduler._state.double().clone()


@pytest.mark.parametrize("ambient", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", [*SAME, *EDITS])
def test_edits_are_noticed_and_the_state_stays_in_float32(name, ambient):
    field = fk.VelocityField(lambda x, t: -(1e-3 * x.double().sin()).bfloat16(), dtype=BF16)
    expected = fk.sample(field, normal(64, 3).bfloat16(), Solver.adams_bashforth(16, 2)).double()
    if name in SAME:
        for dtype in (BF16, torch.float32):
            got = rounded_run(SAME[name], None, dtype, ambient)
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
        return
    got = rounded_run(EDITS[name], 7, ambient=ambient)
    plain = rounded_run(lambda x: x * 2, 7)
    torch.testing.assert_close(got, plain, rtol=0, atol=1e-6)
    assert (got.abs().mean() / expected.abs().mean()) == pytest.approx(2, rel=0.01)


def test_an_edit_of_a_part():
    """The rest keeps its float32 state, as in inpainting."""

    def keep(x):
        return torch.cat([torch.ones_like(x[:1]), x[1:]])

    whole, part = rounded_run(lambda x: x, None), rounded_run(keep, None)
    assert torch.equal(whole[1:], part[1:])
    assert not torch.equal(whole[:1], part[:1])


def test_velocities_in_the_same_memory_and_of_several_dtypes():
    out, solver = torch.empty(3, 4), Solver.adams_bashforth(5, 3)
    scheduler = made(solver)
    _, x = run(scheduler, normal(3, 4), lambda x, t: out.copy_(-x.sin()))
    torch.testing.assert_close(x, fk.sample(lambda x, t: x.sin(), normal(3, 4), solver))
    kinds = iter([torch.float32, torch.float64, torch.float32, BF16, torch.float16])
    scheduler.set_timesteps()
    _, mixed = run(scheduler, normal(3, 4), lambda x, t: -x.float().sin().to(next(kinds)))
    torch.testing.assert_close(mixed.float(), x, rtol=0, atol=5e-3)


def test_latents_of_another_shape_start_anew():
    """ChronoEdit keeps two frames of its latents from a step on."""
    scheduler, x = made(Solver.adams_bashforth(8, 2)), normal(4, 3)
    assert not scheduler.model_outputs
    for t in scheduler.timesteps[:4]:
        x = scheduler.step(-x.sin(), t, x).prev_sample
    x = x[[0, -1]]
    with pytest.warns(UserWarning, match="starts at evaluation 4"):
        x = scheduler.step(-x.sin(), scheduler.timesteps[4], x).prev_sample
    for t in scheduler.timesteps[5:]:
        x = scheduler.step(-x.sin(), t, x).prev_sample
    full = fk.sample(lambda x, t: x.sin(), normal(4, 3), 8)[[0, -1]]
    torch.testing.assert_close(x, full, rtol=0.1, atol=0.1)


# ---- starts within ----


def from_image(solver, begin, x, velocity):
    scheduler = made(solver, num_train_timesteps=1)
    scheduler.set_begin_index(begin)
    for t in scheduler.timesteps[begin:]:
        x = scheduler.step(-velocity(x, 1 - float(t)), t, x).prev_sample
    return x


def finest(x, velocity, begin, steps=400):
    """Runge and Kutta's fourth-order steps to t = 1."""
    h = (1 - begin) / steps
    for i in range(steps):
        t = begin + i * h
        a = velocity(x, t)
        b = velocity(x + h / 2 * a, t + h / 2)
        c = velocity(x + h / 2 * b, t + h / 2)
        x = x + h / 6 * (a + 2 * b + 2 * c + velocity(x + h * c, t + h))
    return x


def dense(n):
    """Adams-Bashforth 2 as a fit has it, each of whose steps looks back at all velocities."""
    ab2 = Solver.adams_bashforth(n, 2)
    more = torch.zeros(n, n, dtype=F64)
    more[:, :2] = 1e-3 * torch.arange(n)[:, None] * torch.tensor([1, -1])
    return Solver(ab2.times, ab2.model_times, ab2.coefficients + more.tril())


@pytest.mark.parametrize("order", [1, 2, 4, "dense"])
def test_the_order_of_a_start_within(order):
    """Halved steps have a quarter of the error where the solver looks back, half of it where it is Euler."""
    make = dense if order == "dense" else lambda n: Solver.adams_bashforth(n, order)
    x, velocity = normal(3, 4, dtype=F64), lambda x, t: x.sin() + 3 * (4 * x.new_tensor(t)).cos()
    exact = finest(x, velocity, 0.5)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        runs = [from_image(make(n), n // 2, x, velocity) for n in (40, 80)]
    errors = [float((run - exact).norm()) for run in runs]
    assert errors[0] / errors[1] == pytest.approx(2 if order == 1 else 4, rel=0.15)
    told = [str(each.message) for each in told if each.category is UserWarning]
    assert len(told) == (0 if order == 1 else 2)  # once each
    assert all("of lower order (Euler, then Adams-Bashforth 2)" in each for each in told)


@pytest.mark.filterwarnings("ignore:begin_index")
@EACH
def test_constant_velocities_stay_exact(name):
    """From any start: what is made of a solver's cut steps covers the same times, a stage of Heun's included. With no
    begin_index the timestep tells it, that of the whole step where a stage has the same."""
    solver = Solver.of(SOLVERS[name])
    for begin in range(1, solver.evaluations):
        scheduler, x = made(solver), normal(3, 4)
        if begin % 2:
            scheduler.set_begin_index(begin)
        for t in scheduler.timesteps[begin:]:
            x = scheduler.step(-torch.ones_like(x), t, x).prev_sample
        torch.testing.assert_close(x, normal(3, 4) + scheduler.sigmas[begin])
    twice = made(Solver.heun(3))
    assert twice.timesteps[1] == twice.timesteps[2]
    assert twice.index_for_timestep(twice.timesteps[1]) == 2


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_scale_noise(inverted, dtype):
    scheduler = made(uneven_grid(4), invert_sigmas=inverted)
    image, noise = normal(2, 3, 4).to(dtype), normal(2, 3, 4, seed=1).to(dtype)
    t = uneven_grid(4)
    for k, begin, after in ((2, None, None), (2, 2, None), (3, 0, 3)):
        scheduler._begin_index, scheduler._step_index = begin, after
        given = scheduler.timesteps[2:3].expand(2)
        expected = (t[k] * image.double() + (1 - t[k]) * noise.double()).to(dtype)
        torch.testing.assert_close(scheduler.scale_noise(image, given, noise), expected)
        assert torch.equal(scheduler.add_noise(image, noise, given), scheduler.scale_noise(image, given, noise))
    assert scheduler.scale_model_input(image, t[2]) is image


# ---- tokens of several times ----


def by_token(scheduler, x, velocity, ends):
    """As the pipeline of LTX with conditions: tokens whose latents are known up to a sigma wait until it is reached."""
    for t in scheduler.timesteps:
        times = torch.minimum(t, 1000 * ends)
        new = scheduler.step(velocity(x, times), t, x, per_token_timesteps=times, return_dict=False)[0]
        assert new.dtype == torch.float32
        x = torch.where((t / 1000 - 1e-6 < ends)[..., None], new, x)
    return x


@pytest.mark.filterwarnings("ignore:begin_index")
def test_tokens_of_several_times():
    """Euler's are the stock scheduler's steps; of another solver those that wait begin later, as an image does."""
    t, velocity = uneven_grid(6), lambda x, times: x.sin() + times[..., None] / 1000
    ends = torch.tensor([[1.0, 0.0, float(1 - t[3])], [0.5, 1.0, 1.0]])
    x, theirs = normal(2, 3, 5), FlowMatchEulerDiscreteScheduler()
    theirs.set_timesteps(sigmas=(1 - t)[:-1].tolist())
    if "per_token_timesteps" in inspect.signature(theirs.step).parameters:
        torch.testing.assert_close(by_token(made(t), x, velocity, ends), by_token(theirs, x, velocity, ends))
    for given in (ends[:1, :1], torch.ones(2, 3)):  # one for all of them, and the same for each
        whole = run(made(Solver.adams_bashforth(t, 3)), x[: len(given)], lambda x, t: -x.sin() - t / 1000)[1]
        got = by_token(made(Solver.adams_bashforth(t, 3)), x[: len(given)], velocity, given)
        torch.testing.assert_close(got, whole)
    got = by_token(made(Solver.adams_bashforth(t, 3)), x, velocity, ends)
    later = made(Solver.adams_bashforth(t, 3))
    later.set_begin_index(3)
    y = x[:1, 2:]
    for time in later.timesteps[3:]:
        y = later.step(-velocity(y, time.expand(1, 1)), time, y).prev_sample
    torch.testing.assert_close(got[:1, 2:], y)
    assert torch.equal(got[0, 1], x[0, 1])
    scheduler, v = made(Solver.adams_bashforth(t, 3)), normal(2, 3, 5)
    for latents, times, told in ((v[0], ends, "shape"), (v, ends[:, :2], "shape"), (v, None, "them for all steps")):
        scheduler.set_timesteps()
        scheduler.step(v, 1000.0, v, per_token_timesteps=1000 * ends)
        with pytest.raises(ValueError, match=rf"^per_token_timesteps: expected {told}"):
            scheduler.step(latents, 900.0, latents, per_token_timesteps=times)


# ---- saved pipelines ----

LOAD = """
import sys
sys.modules["transformers"] = None  # which takes seconds to import
import diffusers, numpy as np, safetensors.torch, torch
folder = sys.argv[1]
assert "flowkernels" not in sys.modules
try:
    diffusers.DDPMPipeline.from_pretrained(folder)
except ValueError as error:
    assert "import flowkernels.integrations.diffusers before calling" in str(error), error
else:
    assert tuple(map(int, diffusers.__version__.split(".")[:2])) < (0, 42)  # they import what a file names
import flowkernels.integrations.diffusers
pipe = diffusers.DDPMPipeline.from_pretrained(folder)
pipe.set_progress_bar_config(disable=True)
np.save(sys.argv[2], pipe(2, torch.Generator().manual_seed(1), 4, output_type="np").images)
"""


def test_a_saved_pipeline(tmp_path):
    """Loaded here, and in a process that has not seen this library."""
    blocks = dict(block_out_channels=(8, 8), down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
    net = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=4, **blocks)
    plan = SOLVERS["dense"]
    pipe = DDPMPipeline(randomised(net), made(plan, shift=3.0))
    pipe.save_pretrained(tmp_path / "pipe")
    other = DDPMPipeline.from_pretrained(tmp_path / "pipe")
    assert type(other.scheduler) is type(pipe.scheduler)
    assert {k: v for k, v in other.scheduler.config.items() if k[0] != "_"} == {
        k: v for k, v in pipe.scheduler.config.items() if k[0] != "_"
    }
    assert torch.equal(other.scheduler.solver.coefficients, plan.coefficients)
    pipes = (pipe, other, copy.deepcopy(pipe))
    for p in pipes:
        p.set_progress_bar_config(disable=True)
    images = [p(2, torch.Generator().manual_seed(1), 4, output_type="np").images for p in pipes]
    command = [sys.executable, "-c", LOAD, str(tmp_path / "pipe"), str(tmp_path / "images.npy")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    images.append(np.load(tmp_path / "images.npy"))
    assert all(np.array_equal(images[0], image) for image in images)
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    expected = fk.sample(fk.VelocityField(net.eval(), reverse_time=True, time_scale=1000), noise, plan)
    expected = (expected / 2 + 0.5).clamp(0, 1)
    assert 0.01 < expected.mean() < 0.99
    close(torch.from_numpy(images[0]).permute(0, 3, 1, 2), expected)


# ---- schedules for stock schedulers ----

STOCK = {
    "static": (dict(shift=3.0), None),
    "below 1": (dict(shift=0.3), None),
    "dynamic": (dict(use_dynamic_shifting=True, shift=3.0), 1.15),
    "linear": (dict(use_dynamic_shifting=True, time_shift_type="linear"), 3.2),
    "inverted": (dict(shift=3.0, invert_sigmas=True), None),
    "terminal": (dict(shift=3.0, shift_terminal=0.4), None),
    "time to 1": (dict(shift=12.0, num_train_timesteps=1), None),
}
STOCK = {name: (config, mu) for name, (config, mu) in STOCK.items() if set(config) <= OPTIONS}


@pytest.mark.parametrize("times", [[0, 0.1, 0.3, 0.6, 1], [0.2, 0.25, 0.6, 1], [0, 1e-4, 0.6, 1]])
@pytest.mark.parametrize("name", STOCK)
def test_a_stock_scheduler_runs_the_schedule(name, times):
    """Its steps from the first to the last, whatever it makes of what it is handed."""
    config, mu = STOCK[name]
    stock = FlowMatchEulerDiscreteScheduler(**config)
    given = sigmas_for(Schedule(times), stock, mu=mu)
    assert given == np.float32(given).tolist()
    assert type(given) is list
    stock.set_timesteps(sigmas=given, mu=mu)
    known = torch.tensor(times) if name == "inverted" else 1 - torch.tensor(times)
    torch.testing.assert_close(stock.sigmas, known.float(), rtol=0, atol=1e-6)
    scale = config.get("num_train_timesteps", 1000)
    torch.testing.assert_close(stock.timesteps, scale * known[:-1].float(), rtol=0, atol=1e-6 * scale)
    own = made(times, **config)
    torch.testing.assert_close(own.timesteps, stock.timesteps, rtol=0, atol=1e-6 * scale)


def test_what_a_stock_scheduler_cannot_run():
    stock = FlowMatchEulerDiscreteScheduler(shift=3.0)
    bad = [
        (4, dict(use_karras_sigmas=True), "scheduler: expected one without use_karras_sigmas"),
        (4, dict(use_exponential_sigmas=True), "scheduler: expected one without use_exponential_sigmas"),
        (4, dict(shift_terminal=0.1), r"scheduler: expected one that may end at sigma 0.25, .*=0.1"),
        (4, dict(use_dynamic_shifting=True), r'mu: expected .*cal.provenance\["pipeline"\]\["mu"\], got None'),
        ([0, 1e-9, 1], {}, "schedule: expected sigmas that are apart in float32"),
        (Solver.heun(3), {}, "schedule: expected Euler steps to t = 1; solver_scheduler takes others"),
    ]
    for schedule, config, told in bad:
        with pytest.raises(ValueError, match=f"^{told}"):
            sigmas_for(schedule, FlowMatchEulerDiscreteScheduler(**config))
    for other in (diffusers.FlowMatchHeunDiscreteScheduler(), LIKE["unipc"], made(4)):
        with pytest.raises(
            ValueError, match=r"^scheduler: expected a FlowMatchEulerDiscreteScheduler; solver_scheduler"
        ):
            sigmas_for(4, other)
    assert len(sigmas_for(fk.Solver.euler(4), stock)) == 4
    stock.set_shift(7.0)  # which its config does not say
    stock.set_timesteps(sigmas=sigmas_for(4, stock))
    torch.testing.assert_close(stock.sigmas, torch.tensor([1, 0.75, 0.5, 0.25, 0]), rtol=0, atol=1e-6)
