"""k-diffusion: a sampler of its signature that runs a solver of ours, and its own samplers as solvers.

    from flowkernels.integrations import k_diffusion

    velocity = fk.from_denoiser(model, time_range=(0.03, 14.6))  # or the model's own sigma_min and sigma_max
    cal = fk.calibrate(velocity, velocity.initial(noise), velocity.grid(100), range(2, 9), effort="best")
    sample = k_diffusion.sampler(cal, steps=6)
    x = sample(model, noise * sample.sigmas[0], sample.sigmas, extra_args={"cond": c})

Its states are `x_1 + sigma e`, ours these over 1 + sigma, at t = 1 / (1 + sigma). With `flow=True` sigma is 1 - t, and
states are ours, as ComfyUI and others run k-diffusion's samplers on flow models. Nothing of k-diffusion is imported.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from flowkernels._checks import (
    FLOATS,
    LOW,
    FlowError,
    expect,
    expect_bool,
    expect_float64,
    expect_mapping,
    expect_noise,
    expect_shown,
    expect_takes,
    expect_tensor,
)
from flowkernels.calibration.calibration import Calibration
from flowkernels.sampling.loop import initial_state
from flowkernels.sampling.sample import sample as run
from flowkernels.schedule import Schedule
from flowkernels.solver import Solver, expect_solver
from flowkernels.velocity.denoiser import Denoiser, from_denoiser

__all__ = ("sampler", "solver")

SAME = 1e-5  # of a sigma: of float32, through functions of it
SAME_LOW = 5e-3  # of bfloat16 and float16
MOST = 8  # evaluations of a step, of a sampler that is made a solver
EXACT = 1e-8  # of its samples on a field that is not linear

Model: TypeAlias = Callable[..., Tensor]
Plan: TypeAlias = Calibration | Schedule | Solver | Sequence[float] | Tensor | Callable[[Tensor], Solver]


class Sampler(Protocol):
    """A function of the signature of k-diffusion's samplers. sigmas: those that it runs on, float32 `[N+1]`, the last
    one 0; None where it takes any."""

    sigmas: Tensor | None

    def __call__(
        self,
        model: Model,
        x: Tensor,
        sigmas: Tensor | None = None,
        extra_args: Mapping[str, Any] | None = None,
        callback: Callable[[dict[str, Any]], Any] | None = None,
        disable: bool | None = None,
    ) -> Tensor: ...


def sampler(plan: Plan, *, steps: int | None = None, flow: bool = False) -> Sampler:
    """A sampler `(model, x, sigmas, extra_args=None, callback=None, disable=None)`, as k_diffusion.sampling has them,
    that runs a solver at its own model times on the model's denoised outputs.

    Args:
        plan: a Solver, a Schedule, N+1 times, or a Calibration, whose `best(steps)` is taken: of `fk.from_denoiser`
            of the model. Or what makes a Solver of times, such as `fk.Solver.heun`, or a partial of
            `fk.Solver.adams_bashforth`: then on the sigmas of each call.
        steps: which N of a Calibration; not needed where it holds one.
        flow: the model is of a flow, and sigma 1 - t: it gives `x + sigma v`, v = dx/dt, from x = noise at sigma = 1.

    `sample.sigmas` is what to hand over as `sigmas`, and `sigmas[0]` times standard normal noise as x. Other sigmas are
    refused, but for a plan that takes any; None stands for its own. The state is kept in float32, float64 for a float64
    x; the model gets x's dtype, and sigma in it, as in k-diffusion: in half precision both are rounded. `callback`
    gets a dict of x, i, sigma, sigma_hat and denoised once a step, where the state is at a knot.

    Raises TypeError, ValueError naming the argument, and `FlowError`, a ValueError, for NaN and Inf.

    Examples:
        >>> D = lambda x, sigma: x / (1 + sigma.square())[:, None]  # of standard normal data
        >>> sample = sampler(fk.Solver.heun)
        >>> sigmas = torch.tensor([80.0, 20, 5, 1, 0.2, 0])
        >>> sample(D, 80 * torch.ones(1, 2), sigmas, disable=True)
        tensor([[0.9585, 0.9585]])
        >>> sampler(fk.Solver.heun([1 / 81, 0.5, 1])).sigmas
        tensor([80.,  1.,  0.])
    """
    flow = expect_bool(flow, "flow")
    makes = callable(plan) and not isinstance(plan, (type, nn.Module))
    if isinstance(plan, Calibration):
        held = sorted({*plan.schedules, *plan.solvers})
        expect(steps is not None or len(held) == 1, "steps", f"one of {held}", "None")
        steps = held[0] if steps is None else steps
        expect(steps in held, "steps", f"one of {held}", steps)
        known = Solver.of(plan.best(steps))
    else:
        expect(steps is None, "steps", "None for a plan that is no Calibration", steps)
        known = None if makes else expect_solver(plan, "plan")
    if makes:
        expect_takes(plan, "plan", "a Solver, or what makes one of times", None)
    if known is not None:
        _expect_usable(known, flow)

    def sample(
        model: Model,
        x: Tensor,
        sigmas: Tensor | None = None,
        extra_args: Mapping[str, Any] | None = None,
        callback: Callable[[dict[str, Any]], Any] | None = None,
        disable: bool | None = None,
    ) -> Tensor:
        expect_noise(x, "x")
        extra = {} if extra_args is None else expect_mapping(extra_args, "extra_args")
        expect_takes(model, "model", "a model(x, sigma, **extra_args) that denoises", x, x, by_name=extra)
        if callback is not None:
            expected = "a function of a dict, or None"
            expect(not isinstance(callback, nn.Module), "callback", expected, callback, TypeError)
            expect_takes(callback, "callback", expected, {})
        disable = disable if disable is None else expect_bool(disable, "disable")
        chosen = _on(plan, sigmas, flow) if known is None else known
        if known is not None and sigmas is not None:
            _expect_same(sigmas, _sigmas(known.times, flow))
        asked = _Asked(model, x, extra, callback, chosen, flow)
        first = _sigmas(chosen.times[:1], flow).item()
        velocity = _denoiser(asked, first, flow)
        state = velocity.state(initial_state(x), chosen.times[0].item())
        shown = sys.stderr.isatty() if disable is None else not disable
        found = run(velocity, state, chosen, check=False, progress=shown)
        if not bool(torch.isfinite(found).all()):
            bad = (~torch.isfinite(found.flatten(1)).all(1)).nonzero()[0].item()
            expect(False, "model", "finite denoised states", f"NaN or Inf in sample {bad}", FlowError)
        return found.to(x.dtype)

    sample.sigmas = None if known is None else _sigmas(known.times, flow).float()
    return sample


class _Asked:
    """A model as `from_denoiser` calls it; the callback is told of evaluations at knots."""

    def __init__(
        self,
        model: Model,
        x: Tensor,
        extra: Mapping[str, Any],
        callback: Callable[[dict[str, Any]], Any] | None,
        solver: Solver,
        flow: bool,
    ):
        self.model, self.dtype, self.extra, self.callback = model, x.dtype, extra, callback
        self.told = _first_evaluations(solver) if callback is not None else {}
        self.done = 0

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        x, sigma = x.to(self.dtype), sigma.to(self.dtype)
        step, now = self.told.get(self.done), sigma[0].clone()
        self.done += 1
        kept = x.clone() if step is not None else x  # which the model may write to
        denoised = self.model(x, sigma, **self.extra)
        if step is not None:
            told = expect_tensor(denoised, "model", FLOATS).clone()  # which the callback may write to
            self.callback(dict(x=kept, i=step, sigma=now, sigma_hat=now, denoised=told))
        return denoised


def _first_evaluations(solver: Solver) -> dict[int, int]:
    """For the evaluation that each step begins with, the step: the last at its knot, as Heun's stages before it are of
    the step before; the first of those that are left, where none is."""
    if solver.evaluations == solver.steps:
        return {i: i for i in range(solver.steps)}
    times, found = solver.model_times.tolist(), {}
    for k, knot in enumerate(solver.times[:-1].tolist()):
        at = [i for i, t in enumerate(times) if abs(t - knot) < 1e-12]
        if at:
            found[at[-1]] = k
    return found


def _denoiser(model: Model, first: float, flow: bool) -> Denoiser:
    if flow:
        return from_denoiser(model, "data", "straight")
    return from_denoiser(model, "data", "variance_exploding", time_range=(0.0, first))


def _sigmas(times: Tensor, flow: bool) -> Tensor:
    """float64, the last one 0 where it is."""
    sigmas = (1 - times) if flow else (1 - times) / times
    return torch.where(sigmas.abs() < 1e-12, 0.0, sigmas)


def _times(sigmas: Tensor, flow: bool) -> Tensor:
    return 1 - sigmas if flow else 1 / (1 + sigmas)


def _expect_usable(solver: Solver, flow: bool) -> None:
    expect(solver.reaches_data, "plan", "a solver from noise to data", solver)
    begins = min(solver.times[0].item(), solver.model_times.min().item())
    got = f"one from t = {begins:.6g}, where sigma is infinite (flow=True: of a flow model, whose sigma is 1 - t)"
    expect(flow or begins > 0, "plan", "times after 0, as in .grid(steps) of fk.from_denoiser(model)", got)


def _expect_sigmas(sigmas: Any, flow: bool) -> Tensor:
    falling = "falling sigmas with the last 0"
    given = expect_float64(sigmas, "sigmas", falling)
    expect(given.dim() == 1 and len(given) > 1, "sigmas", f"{falling}, two or more", sigmas)
    fits = bool(given.isfinite().all()) and bool((given.diff() < 0).all()) and bool(given[-1] == 0)
    got = f"{given[0].item():.6g} to {given[-1].item():.6g}" + ("" if fits else ", in another course")
    expect(fits, "sigmas", falling, got)
    expect(not flow or bool(given[0] <= 1), "sigmas", "1 - t, at most 1, of a flow", got)
    return given


def _on(plan: Callable[[Tensor], Solver], sigmas: Any, flow: bool) -> Solver:
    solver = plan(_times(_expect_sigmas(sigmas, flow), flow))
    expect(isinstance(solver, Solver), "plan", "what makes a Solver of times", solver, TypeError)
    _expect_usable(solver, flow)
    return solver


def _expect_same(sigmas: Any, own: Tensor) -> None:
    given = expect_float64(sigmas, "sigmas", "the plan's")
    tolerance = SAME_LOW if isinstance(sigmas, Tensor) and sigmas.dtype in LOW else SAME
    same = given.shape == own.shape and torch.allclose(given, own, rtol=tolerance, atol=0)
    told = f"[{', '.join(f'{s:.6g}' for s in own.tolist())}]"
    got = [round(s, 6) for s in given.flatten().tolist()]
    expect(same, "sigmas", f"the plan's own, {told} (sample.sigmas; None stands for them)", got)


def solver(
    sample: Callable[..., Tensor], sigmas: Sequence[float] | Tensor, *, flow: bool = False, **settings: Any
) -> Solver:
    """One of k-diffusion's samplers as a Solver: to compare with, to choose from, to go on from.

    It is run on unit vectors in the place of x and of the denoised states, in float64: what comes out is its
    coefficients, exactly. `sampler` of it makes the samples that it makes.

    Args:
        sample: `sample_euler`, `sample_heun`, `sample_dpm_2`, `sample_lms`, `sample_dpmpp_2m` and their like: a
            function `(model, x, sigmas, disable=..., **settings)` whose steps are linear in x and the denoised states.
        sigmas: falling, the last one 0, `[N+1]`.
        flow: as `sampler` has it.
        settings: further keyword arguments of it, such as `order=2` of sample_lms.

    Raises TypeError, ValueError naming the argument: `sample` for one that adds noise (ancestral ones, s_churn), or
    chooses its steps by the states.

    Examples:
        >>> def sample_euler(model, x, sigmas, disable=None):
        ...     for sigma, then in zip(sigmas[:-1], sigmas[1:]):
        ...         x = x + (x - model(x, sigma.expand(len(x)))) * (then / sigma - 1)
        ...     return x
        >>> solver(sample_euler, [80.0, 1.0, 0.0])
        Solver('euler', steps=2, evaluations=2, times=[0.0123, 0.5, 1])
    """
    known = _expect_sigmas(sigmas, expect_bool(flow, "flow"))
    expect_takes(sample, "sample", "a sampler (model, x, sigmas)", None, None, None, by_name=["disable", *settings])
    N = len(known) - 1
    first, second = (_run_on_units(sample, known, flow, settings, seed, MOST * N) for seed in (0, 1))
    silent = len(first[0]) == len(second[0]) and torch.equal(first[0], second[0])
    name = getattr(sample, "__name__", "sampler").removeprefix("sample_")
    expect(silent, "sample", "a sampler that adds no noise", name)
    states, times = first
    M = len(states) - 1
    x = torch.eye(1 + MOST * N, dtype=torch.float64, device="cpu")[0]
    begins = torch.allclose(states[0], x, rtol=0, atol=1e-12) and abs(times[0] - _times(known[0], flow)) < 1e-12
    expect(begins, "sample", "a sampler that begins with the model at x and sigmas[0]", name)
    rows = states[1:, : M + 1]
    made = Solver(_times(known, flow), times, rows[:, 1:].tril(), name, start_coefficients=rows[:, 0])
    expect(_is_linear(sample, made, known, flow, settings), "sample", "a sampler whose steps are linear", name)
    return made


def _run_on_units(
    sample: Callable[..., Tensor], sigmas: Tensor, flow: bool, settings: Mapping[str, Any], seed: int, most: int
) -> tuple[Tensor, Tensor]:
    """(the states before each evaluation and the last one, in x_0 and the velocities `[M + 1, 1 + most]`; the times of
    the evaluations `[M]`), of the straight path."""
    units = torch.eye(1 + most, dtype=torch.float64, device="cpu")
    states: list[Tensor] = []
    times: list[Tensor] = []

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        expect(len(states) < most, "sample", f"a sampler of at most {MOST} evaluations a step", "more")
        t = _times(sigma.double()[:1], flow)
        state = (x if flow else x * t)[0]
        states.append(state), times.append(t[0])
        return (state + (1 - t) * units[len(states)])[None]

    begin = units[:1] if flow else units[:1] * (1 + sigmas[0])
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        last = sample(model, begin, sigmas, disable=True, **settings)
    expect(len(states) > 0, "sample", "a sampler that calls the model", "one that does not")
    fits = isinstance(last, Tensor) and last.shape == begin.shape
    expect_shown(fits, "sample", "a sampler that returns the last state, of x's shape", last)
    return torch.stack([*states, last[0]]), torch.stack(times)


def _is_linear(
    sample: Callable[..., Tensor], made: Solver, sigmas: Tensor, flow: bool, settings: Mapping[str, Any]
) -> bool:
    """Whether the solver's samples are the sampler's on a model that is not."""

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        return torch.sin(x / (1 + sigma.view(-1, 1))) + 0.3 * x / (1 + sigma.view(-1, 1).square())

    x = sigmas[0] * torch.linspace(-1.5, 2, 12, dtype=torch.float64, device="cpu").view(4, 3)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        wanted = sample(model, x, sigmas, disable=True, **settings)
    return torch.allclose(sampler(made, flow=flow)(model, x, disable=True), wanted, rtol=EXACT, atol=EXACT)
