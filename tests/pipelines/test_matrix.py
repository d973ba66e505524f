"""What holds in a pipeline of each family, with tiny random models; docs/pipelines.md is made of it (conftest.py)."""

import functools
import inspect
import math
import warnings

import diffusers
import pytest
import tiny
import torch

import flowkernels as fk
from flowkernels.integrations.diffusers import pipeline_velocity, sigmas_for, solver_scheduler

EACH = pytest.mark.parametrize("name", tiny.FAMILIES)
TIMES = [0.0, 0.13, 0.41, 0.77, 1.0]  # of no pipeline
SIGMAS = 1 - torch.tensor(TIMES[:-1], dtype=torch.float64)
N = len(TIMES) - 1
BY_NUMBER = {
    "karras": dict(use_karras_sigmas=True),
    "exponential": dict(use_exponential_sigmas=True),
    "beta": dict(use_beta_sigmas=True),
}
SHIFTS = {
    tiny.EULER: {
        "shift 1": dict(shift=1.0),
        "shift 5": dict(shift=5.0),
        "mu": tiny.DYNAMIC,
        "mu, linear": dict(tiny.DYNAMIC, time_shift_type="linear"),
        "terminal": dict(shift_terminal=0.1),
        "mu, terminal": dict(tiny.DYNAMIC, shift_terminal=0.02),
        **BY_NUMBER,
    },
    "UniPCMultistepScheduler": {
        "shift 1": dict(flow_shift=1.0),
        "shift 5": dict(flow_shift=5.0),
        **BY_NUMBER,
    },
}
SHIFTS["DPMSolverMultistepScheduler"] = SHIFTS["UniPCMultistepScheduler"]


class Times:
    """Records what sigma the networks are told in the block. `steps(n)`: one for each of n steps; networks are called
    once for each, or twice, for guidance."""

    def __init__(self, family: tiny.Family, pipe):
        self.family, self.networks, self.seen = family, family.networks(pipe), []

    def __enter__(self):
        self.hooks = [net.register_forward_pre_hook(self.see, with_kwargs=True) for net in self.networks]
        return self

    def __exit__(self, *raised):
        for hook in self.hooks:
            hook.remove()

    def see(self, network, args, kwargs):
        t = next((kwargs[name] for name in ("timestep", "timesteps") if name in kwargs), None)
        sigma = self.family.sigma((args[1] if t is None else t).detach().flatten())
        assert (sigma == sigma[0]).all()
        self.seen.append(sigma[0])

    def steps(self, n: int) -> torch.Tensor:
        assert self.seen
        assert len(self.seen) % n == 0
        calls = torch.stack(self.seen).reshape(n, -1)
        assert (calls == calls[:, :1]).all()
        return calls[:, 0]


def run(pipe, family, steps=None, seed=0, **kwargs) -> torch.Tensor:
    """Latents of a call."""
    if steps is not None:
        kwargs["num_inference_steps"] = steps
    arguments = family.call() | dict(output_type="latent", generator=torch.Generator().manual_seed(seed)) | kwargs
    taken = inspect.signature(type(pipe).__call__).parameters
    return pipe(**{key: value for key, value in arguments.items() if key in taken})[0]


def difference(got, expected) -> float:
    assert got.shape == expected.shape
    assert expected.isfinite().all()
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


@functools.cache
def calibration(name: str) -> fk.Calibration:
    """Of a pipeline as it is published: 4 samples of its two prompts, 8 fine steps, a fitted solver of 4."""
    family = tiny.FAMILIES[name]
    v = pipeline_velocity(family.make(), **family.call())
    noise = v.noise(4, torch.Generator().manual_seed(1))
    return fk.calibrate(v, noise, grid=v.grid(8), steps=[N], effort="fit", progress=False)


def takes(family: tiny.Family, argument: str) -> bool:
    return argument in inspect.signature(getattr(diffusers, family.pipeline).__call__).parameters


def shifts(family: tiny.Family, *kinds: str):
    """Schedulers of the class that is published and FlowMatchEulerDiscreteScheduler, under each shift."""
    for kind in dict.fromkeys(kinds or [family.scheduler[0], tiny.EULER]):
        for label, config in SHIFTS[kind].items():
            if "unshifted_time" in family.has and not shifts_alone(config):
                continue  # the network's time would be no function of sigma
            inverted = dict(invert_sigmas=True) if "inverted_sigmas" in family.has else {}
            plain = tiny.FLOW if kind != tiny.EULER else inverted
            yield f"{kind}, {label}", getattr(diffusers, kind)(**plain | config)


def shifts_alone(config) -> bool:
    others = ("shift_terminal", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
    return not any(config.get(key) for key in others)


def mu_of(pipe, family) -> float | None:
    """What the pipeline gives its scheduler as mu, or None where it gives nothing."""
    seen, own = {}, pipe.scheduler.set_timesteps

    @functools.wraps(own)  # pipelines look at its parameters
    def spy(*args, **kwargs):
        seen.update(kwargs)
        return own(*args, **{"mu": 1.0} | kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipe.scheduler, "set_timesteps", spy)
        run(pipe, family, N)
    return seen.get("mu")


def told(sigma: torch.Tensor, pipe, family) -> torch.Tensor:
    """What the network is told where the state has this sigma."""
    config = pipe.scheduler.config
    if "unshifted_time" not in family.has:
        return sigma
    mu = mu_of(pipe, family) if config.use_dynamic_shifting else None
    shift = config.shift if mu is None else math.exp(mu) if config.time_shift_type == "exponential" else mu
    return sigma / (sigma + shift * (1 - sigma))


@EACH
def test_networks_are_called_at_the_times_planned(name, found):
    """By our scheduler in place of the stock one, under every shift."""
    family, worst = tiny.FAMILIES[name], 0.0
    pipe = family.make()
    for label, stock in [("published", pipe.scheduler), *shifts(family)]:
        pipe.scheduler = stock
        planned = told(SIGMAS, pipe, family)
        pipe.scheduler = solver_scheduler(fk.Schedule(TIMES), like=stock)
        with Times(family, pipe) as times:
            run(pipe, family, N)
        off = (times.steps(N) - planned).abs().max().item()
        assert off <= 1e-6, label
        worst = max(worst, off)
    found("times", worst)


@pytest.mark.parametrize("name", [name for name, family in tiny.FAMILIES.items() if takes(family, "sigmas")])
def test_stock_schedulers_run_what_sigmas_for_gives(name, found):
    """Under every shift but those that run no given schedule, which are refused."""
    family, worst = tiny.FAMILIES[name], 0.0
    pipe = family.make()
    for label, pipe.scheduler in shifts(family, tiny.EULER):
        config = pipe.scheduler.config
        mu = mu_of(pipe, family) if config.use_dynamic_shifting else None
        if mu is None and config.use_dynamic_shifting:
            continue  # this pipeline does not run with such a scheduler
        if not shifts_alone(config):
            with pytest.raises(ValueError, match="scheduler: "):
                sigmas_for(TIMES, pipe.scheduler, mu=mu)
            continue
        given = dict(sigmas=sigmas_for(TIMES, pipe.scheduler, mu=mu))
        if "unshifted_time" in family.has:  # a pipeline that takes both, and rounds times
            given["timesteps"] = [1000 * sigma for sigma in given["sigmas"]]
        planned = told(SIGMAS, pipe, family)
        with Times(family, pipe) as times:
            run(pipe, family, N, **given)
        off = (times.steps(N) - planned).abs().max().item()
        assert off <= (1.001e-3 if "timesteps" in given else 1e-6), label
        assert (pipe.scheduler.sigmas[:-1] - SIGMAS).abs().max() <= 1e-6, label
        worst = max(worst, off)
    found("sigmas", worst)


@EACH
def test_the_grid_is_that_of_the_stock_scheduler(name):
    """Where schedulers round to integers, within that."""
    family = tiny.FAMILIES[name]
    pipe = family.make()
    for label, scheduler in [("published", pipe.scheduler), *shifts(family)]:
        pipe.scheduler = scheduler
        with Times(family, pipe) as times:
            try:
                run(pipe, family, 5)
            except ValueError as e:  # of stock schedulers that a pipeline gives no mu
                assert "mu" in str(e), label  # noqa: PT017
                continue
        v = pipeline_velocity(pipe, **family.call(), check=False)
        if scheduler.sigmas.max() > 1:  # UniPC and DPM-Solver take no notice of use_flow_sigmas there
            with pytest.raises(ValueError, match="scheduler: expected times from 0"):
                v.grid(5)
            continue
        grid = v.grid(5)
        grid = grid[[t not in v.forced_knots for t in grid]]
        rounded = not label.startswith(tiny.EULER) and family.scheduler[0] != tiny.EULER
        off = (told(1 - grid[:-1], pipe, family) - times.steps(5)).abs().max()
        assert off <= (1e-3 if rounded else 1e-6), label
        assert grid[-1] == 1


@EACH
def test_a_fitted_solver_samples_as_the_library_does(name, found):
    family, solver = tiny.FAMILIES[name], calibration(name).solvers[N]
    pipe = family.make()
    v = pipeline_velocity(pipe, **family.call())
    expected = fk.sample(v, v.noise(2, torch.Generator().manual_seed(0)), solver)
    pipe.scheduler = solver_scheduler(solver, like=pipe.scheduler)
    off = difference(run(pipe, family, N), expected)
    assert off <= 1e-5
    found("fitted", off)


@EACH
def test_a_saved_pipeline_keeps_its_scheduler(name, found, tmp_path):
    family = tiny.FAMILIES[name]
    pipe = family.make()
    pipe.scheduler = solver_scheduler(calibration(name), like=pipe.scheduler)
    expected = run(pipe, family, N)
    pipe.save_pretrained(tmp_path)
    loaded = family.prepare(getattr(diffusers, family.pipeline).from_pretrained(tmp_path))
    assert type(loaded.scheduler) is type(pipe.scheduler)
    assert torch.equal(run(loaded, family, N), expected)
    found("saved", "yes")


def on_the_stock_grid(pipe, family) -> None:
    """Our scheduler in place of the stock one, for Euler steps between the sigmas that it has just used."""
    sigmas = pipe.scheduler.sigmas.double()
    times = sigmas if "inverted_sigmas" in family.has else 1 - sigmas
    pipe.scheduler = solver_scheduler(fk.Schedule(times), like=pipe.scheduler)


EDITS = {
    "none": lambda latents: {},
    "another": lambda latents: dict(latents=0.8 * latents),
    "in place": lambda latents: dict(latents=latents.mul_(0.8)),
    "in place, unseen": lambda latents: latents.data.mul_(0.8) is None or {},
}


@EACH
def test_euler_steps_and_edits_of_latents_are_the_stock_schedulers(name, found):
    """After the second step `callback_on_step_end` edits latents."""
    family, worst = tiny.FAMILIES[name], 0.0
    pipe = family.make(scheduler=tiny.EULER, shift=3.0, invert_sigmas="inverted_sigmas" in family.has)
    stock, results = pipe.scheduler, []
    for ours in (False, True):
        if ours:
            on_the_stock_grid(pipe, family)
        for edit in EDITS.values():
            callback = lambda pipe, i, t, kwargs: edit(kwargs["latents"]) if i == 1 else {}  # noqa: B023, E731
            results.append(run(pipe, family, 6, callback_on_step_end=callback))
    assert pipe.scheduler is not stock
    for edit, expected, got in zip(EDITS, results, results[len(EDITS) :], strict=False):
        off = difference(got, expected)
        assert off <= 1e-5, edit
        worst = max(worst, off)
        assert (edit == "none") == (difference(expected, results[0]) < 1e-2)
    found("stock", worst)


@pytest.mark.parametrize("name", [name for name, family in tiny.FAMILIES.items() if family.img2img])
def test_an_image_as_the_start(name, found):
    """Euler steps are the stock scheduler's; a solver that looks back begins with less and at the same times."""
    family, worst, steps = tiny.FAMILIES[name], 0.0, 6
    parts = family.make(scheduler=tiny.EULER, shift=3.0).components
    kind = getattr(diffusers, family.img2img)
    pipe = family.prepare(kind(**{key: parts[key] for key in inspect.signature(kind).parameters if key in parts}))
    shape = (2, 5, 3, 16, 16) if "video" in family.has else (2, 3, 16, 16)
    image = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    start = {"video" if "video" in family.has else "image": image}
    stock = pipe.scheduler
    for strength in (0.3, 0.7, 1.0):
        pipe.scheduler = stock
        made = []
        counted = dict(start, callback_on_step_end=lambda pipe, i, *_, made=made: made.append(i) or {})
        with Times(family, pipe) as times:
            expected = run(pipe, family, steps, strength=strength, **counted)
        left = len(made)
        planned = times.steps(left)
        on_the_stock_grid(pipe, family)
        off = difference(run(pipe, family, steps, strength=strength, **start), expected)
        assert off <= 1e-5, strength
        worst = max(worst, off)
        looks_back = fk.Solver.adams_bashforth(pipe.scheduler.solver.times, 2)
        pipe.scheduler = solver_scheduler(looks_back, like=stock)
        with Times(family, pipe) as times, warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert run(pipe, family, steps, strength=strength, **start).isfinite().all()
        assert any("lower order" in str(w.message) for w in said) == (left < steps)
        assert (times.steps(left) - planned).abs().max() <= 1e-6
    found("image", worst)


@EACH
def test_bfloat16(name, found):
    """The state stays float32 in both, so that the pipeline's last latents are the library's, rounded."""
    family, solver = tiny.FAMILIES[name], calibration(name).solvers[N]
    pipe = family.make().to(torch.bfloat16)
    v = pipeline_velocity(pipe, **family.call())
    expected = fk.sample(v, v.noise(2, torch.Generator().manual_seed(0)).float(), solver)
    pipe.scheduler = solver_scheduler(solver, like=pipe.scheduler)
    off = difference(run(pipe, family, N), expected)
    assert off <= 2**-8
    found("bfloat16", off)


@pytest.mark.parametrize("name", ["sd3", "flux", "wan21"])
def test_a_compiled_transformer(name, found):
    """One graph for all steps of the pipeline."""
    family, solver = tiny.FAMILIES[name], calibration(name).solvers[N]
    pipe = family.make()
    v = pipeline_velocity(pipe, **family.call())
    pipe.scheduler = solver_scheduler(solver, like=pipe.scheduler)
    expected = run(pipe, family, N)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    pipe.transformer.compile()
    off = difference(run(pipe, family, N), expected)
    assert off <= 1e-4
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert difference(fk.sample(v, v.noise(2, torch.Generator().manual_seed(0)), solver), expected) <= 1e-4
    found("compiled", off)
