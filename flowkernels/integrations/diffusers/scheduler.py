"""Solvers as a scheduler of diffusers' pipelines."""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from flowkernels._checks import describe, expect, expect_int, expect_mapping
from flowkernels._files import plain
from flowkernels._warnings import warn
from flowkernels.calibration.calibration import Calibration
from flowkernels.integrations.diffusers.sigmas import before_shift, shift_of, static_shift
from flowkernels.ops.linear_update import linear_update
from flowkernels.schedule import Schedule
from flowkernels.solver import Solver, expect_solver, last_uses, polynomial_weights
from flowkernels.velocity.provenance import warn_of_another_pipeline

if TYPE_CHECKING:
    from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin

FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
FLOW_MODES = ("UniPC", "DPMSolver", "DEIS", "SASolver")  # of schedulers that are for other models too
MOST_GROWTH = 1000  # of x_0's part in one step, which raises the rounding of the state with it
LOWER = {torch.float32: (torch.bfloat16, torch.float16), torch.float64: (torch.float32, torch.bfloat16, torch.float16)}


def solver_scheduler(
    solver: Calibration | Solver | Schedule | int | Sequence[float] | torch.Tensor, like: "SchedulerMixin"
) -> "FlowMatchEulerDiscreteScheduler":
    """A scheduler for diffusers' flow-matching pipelines, in place of the one that they have:

        pipe.scheduler = solver_scheduler(cal, like=pipe.scheduler)
        pipe(prompt, num_inference_steps=8)

    Args:
        solver: a Calibration, of which `best(N)` serves each N that it holds; a Solver from noise to data; or what
            `fk.sample` takes as a schedule. Pipelines are to be asked for as many `num_inference_steps` as one of them
            has evaluations; sigmas, timesteps and shifts that they bring along give way to its own times.
        like: the scheduler that it replaces, which knows how the network is called: the time scale
            (`num_train_timesteps`), and where time is inverted (`invert_sigmas`) the other direction and the other
            sign. FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, or UniPC, DPM-Solver, DEIS or
            SA-Solver with `prediction_type="flow_prediction"` and `use_flow_sigmas=True`; others are refused. Its
            config is kept, so that `type(like).from_config(pipe.scheduler.config)` is the way back.

    The state is kept in float32 between steps, where the pipeline hands back what it was given: each element that is
    the kept one rounded to bfloat16 or float16 goes on from the kept one, and any other from what the pipeline has made
    of it, however it was written. A start within the solver (an image, strength below 1) has no velocities before it:
    steps that look further back, or scale the state, are Euler's and then Adams-Bashforth's of order 2 on its knots,
    which a warning says once. With `per_token_timesteps` each token's start is its own. Where the pipeline changes the
    shape of its latents the solver starts anew there, as from an image.

    `save_config` keeps all of it, numbers to the last digit. A pipeline that was saved with it is loaded after
    `import flowkernels.integrations.diffusers`: diffusers does not import a module because a file names it. Copies
    (`copy.deepcopy`, `from_config`) serve requests at the same time.

    Raises:
        TypeError, ValueError: naming the argument, also for a solver one of whose states has nothing of x_0 in it (a
            start coefficient of 0 before the last); at `set_timesteps` for a number of steps that it does not hold, and
            for sigmas that begin below its own start (latents that the pipeline has noised less).

    Examples:
        >>> from diffusers import FlowMatchEulerDiscreteScheduler
        >>> stock = FlowMatchEulerDiscreteScheduler(shift=3.0)
        >>> scheduler = solver_scheduler(fk.Solver.adams_bashforth(4, order=2), like=stock)
        >>> scheduler.set_timesteps(4)
        >>> scheduler.timesteps
        tensor([1000.,  750.,  500.,  250.])
    """
    expect_flow(like)
    solvers = {str(n): _to_dict(s) for n, s in sorted(_held(solver).items())}
    now = {"shift": static_shift(like)} if "shift" in like.config else {}
    return scheduler_class().from_config(like.config, solvers=solvers, **now)


def _held(solver) -> dict[int, Solver]:
    """By number of evaluations; of two with as many, that of more steps."""
    if isinstance(solver, Calibration):
        steps = sorted({*solver.schedules, *solver.solvers})
        expect(len(steps) > 0, "solver", "a calibration that holds a schedule or a solver", "one of none")
        held = [_with_notes(solver.best(n)) for n in steps]
    else:
        held = [_with_notes(solver)]
    for each in held:
        expect(each.reaches_data, "solver", "a solver from noise to data", each)
        a = each.start_coefficients.abs()
        known = (a[:-1] != 0) & (a[1:] <= MOST_GROWTH * a[:-1])
        expected = (
            f"{each!r} with no start coefficient that is 0, or below 1/{MOST_GROWTH} of the next, before the last"
        )
        got = f"{each.start_coefficients.tolist()}: steps go from state to state, and one says too little of x_0"
        expect(bool(known.all()), "solver", expected, got)
    return {each.evaluations: each for each in held}


def _with_notes(plan) -> Solver:
    """As a solver, with a schedule's notes too, which name the pipeline that it is for."""
    solver = expect_solver(plan, "solver")
    return replace(solver, notes=plan.notes) if isinstance(plan, Schedule) and plan.notes else solver


def _to_dict(solver: Solver) -> dict:
    if solver.is_euler:
        known = {"pipeline": solver.notes["pipeline"]} if "pipeline" in solver.notes else {}
        return {"times": solver.times.tolist()} | ({"notes": plain(known)} if known else {})
    return solver.to_dict() | {"notes": plain(solver.notes)}


def _from_dict(data: dict) -> Solver:
    if set(expect_mapping(data, "solvers")) - {"times", "notes"}:
        return Solver.from_dict(data)
    euler, notes = Solver.euler(data["times"]), expect_mapping(data.get("notes", {}), "notes")
    return replace(euler, notes=notes) if notes else euler  # whose coefficients are not made, for many steps


def expect_flow(like, argument: str = "like") -> None:
    """A scheduler of networks whose output is noise - data at x = (1 - sigma) data + sigma noise, without noise of its
    own on the way."""
    names = {kind.__name__ for kind in type(like).__mro__}
    expected = (
        "a scheduler of a flow-matching model, such as pipe.scheduler: one of "
        f"{', '.join(FLOW)}, or of {', '.join(FLOW_MODES)} with prediction_type='flow_prediction' and "
        "use_flow_sigmas=True"
    )
    expect("SchedulerMixin" in names, argument, expected, describe(like), TypeError)
    config, name = like.config, type(like).__name__
    of_modes = "prediction_type" in config and name.startswith(FLOW_MODES) and "Inverse" not in name
    if of_modes:
        prediction, flow = config["prediction_type"], config.get("use_flow_sigmas", False)
        known = prediction == "flow_prediction" and flow
        expect(known, argument, expected, f"{name} with prediction_type={prediction!r} and use_flow_sigmas={flow}")
    expect(of_modes or not names.isdisjoint(FLOW), argument, expected, name)
    edm = config.get("sigma_data") is not None and not of_modes  # Cosmos 2 writes it there, and scales latents by sigma
    expect(not edm, argument, expected, f"{name} in the hands of an EDM pipeline (its config has sigma_data)")
    noisy = config.get("stochastic_sampling", False)
    expect(not noisy, argument, "a scheduler without noise of its own", f"{name} with stochastic_sampling=True")


@functools.cache
def scheduler_class() -> type:
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.configuration_utils import register_to_config
    from diffusers.schedulers.scheduling_utils import SchedulerOutput

    class SolverScheduler(FlowMatchEulerDiscreteScheduler):
        """The steps of Solvers, given as their dicts by number of evaluations; `solver_scheduler` makes it."""

        __qualname__ = "SolverScheduler"
        __module__ = "flowkernels.integrations.diffusers"  # where a saved pipeline says that it is
        init_noise_sigma = 1.0
        model_outputs, last_sample = (), None  # ChronoEdit cuts those of its scheduler with the latents

        @register_to_config
        def __init__(self, solvers: dict | None = None, num_train_timesteps: int = 1000, invert_sigmas: bool = False):
            whole = isinstance(solvers, dict) and len(solvers) > 0
            expect(whole, "solvers", "those of a scheduler that solver_scheduler(..., like=scheduler) makes", solvers)
            super().__init__(num_train_timesteps=num_train_timesteps, invert_sigmas=invert_sigmas)
            self.solvers = {each.evaluations: each for each in map(_from_dict, solvers.values())}
            self.solver = None
            self._warned = False
            if len(self.solvers) == 1:
                self.set_timesteps()

        @classmethod
        def from_config(cls, config=None, return_unused_kwargs=False, **kwargs):
            """Of `solver_scheduler`'s config; what else is there, of the scheduler in whose place it is, is kept."""
            own, of_other = ("solvers", "num_train_timesteps", "invert_sigmas"), expect_mapping(config, "config")
            merged = {k: v for k, v in {**of_other, **kwargs}.items() if k in config or k in own}
            expected = "one with solvers, as solver_scheduler(..., like=scheduler) makes it"
            expect("solvers" in merged, "config", expected, f"that of {config.get('_class_name', 'another scheduler')}")
            made = cls(**{k: merged[k] for k in own if k in merged})
            made.register_to_config(**{k: v for k, v in merged.items() if k[0] != "_"}, _use_default_values=[])
            return (made, {k: v for k, v in kwargs.items() if k not in merged}) if return_unused_kwargs else made

        def set_shift(self, shift: float) -> None:
            expect(False, "set_shift", "no shift: the times are the solver's", shift)

        def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None) -> None:
            """Begin; sigmas and timesteps are taken for their number. A pipeline that gives both (CogView4) tells its
            network sigma as it was before the shift, which mu may be; else mu is taken for nothing."""
            given = {"num_inference_steps": num_inference_steps}
            given |= {name: len(v) for name, v in (("sigmas", sigmas), ("timesteps", timesteps)) if v is not None}
            self.solver = solver = self._of(given)
            scale, start = self.config.num_train_timesteps, 1 - float(solver.times[0])
            for name, values, unit in (("sigmas", sigmas, 1), ("timesteps", timesteps, scale)):
                if values is not None:  # shifts leave 1 where it is; some pipelines begin at 0.999
                    first, expected = (
                        float(values[0]) / unit,
                        f"a start at sigma {start:g}, that of {solver!r}, or above",
                    )
                    expect(first > start - 0.005, name, f"{expected} (a start within it has a begin_index)", first)
            M, t = solver.evaluations, solver.model_times
            self._updates = solver.updates(chained=True)  # a pipeline may change the state between steps
            self._last = last_uses(self._updates)
            self._known = solver.times if solver.steps == M else torch.cat([t, t.new_ones(1)])  # of the states
            self.num_inference_steps = M
            times = [self._known, t] if self.config.invert_sigmas else [1 - self._known, 1 - t]
            if sigmas is not None and timesteps is not None and not self.config.invert_sigmas:
                shift = shift_of(self.config, mu, self.config.get("shift", 1.0))
                times[1] = before_shift(times[1], shift)
            self.sigmas, self.timesteps = times[0].float().to(device), (scale * times[1]).float().to(device)
            self._step_index = self._begin_index = None
            self._mu = mu if self.config.get("use_dynamic_shifting", False) else None
            self._start(0)

        def _of(self, given: dict) -> Solver:
            held = sorted(self.solvers)
            one = f"{held[0]}, the evaluations of {self.solvers[held[0]]!r}"
            expected = one if len(held) == 1 else f"one of {held}, the numbers of evaluations that the scheduler holds"
            for name, number in given.items():
                if number is not None:
                    number = expect_int(number, name, expected, 1)
                    if given["num_inference_steps"] is None and number not in held:  # of which pipelines make them
                        name = f"num_inference_steps, or {name} of that length"
                    expect(number in held, name, expected, number)
            asked = {number for number in given.values() if number is not None} or set(held)
            expect(len(asked) == 1, "num_inference_steps", expected, "none" if len(asked) == len(held) else given)
            return self.solvers[int(asked.pop())]

        def _start(self, begin: int) -> None:
            """Nothing is known of before this evaluation."""
            self._begin, self._past, self._state, self._joined = begin, {}, None, None
            self._short = not all(self._is_own(i, begin) for i in range(begin, len(self._updates)))

        def _is_own(self, i: int, begin: int) -> bool:
            """Whether the step after evaluation i is the solver's own, of velocities from `begin` on. One that scales
            its state is for states that have come from x_0 by its steps."""
            update = self._updates[i]
            return min(update.which) >= begin and (update.scale == 1 or begin == 0)

        def _rule(self, i: int, begin: int) -> tuple[tuple[int, ...], tuple[float, ...], float]:
            """Velocities, their factors and the state's of the step after evaluation i, of those from `begin` on.

            The solver's own where it can be. Else a step of lower order over the same interval. What
            begins with one of Euler's has an error of the second order in the step there, so that no more than order 2
            is to be had of it: Adams-Bashforth 2 on the knots suffices. The factors add up to the interval, and so
            constant velocities stay exact, as they would not with the solver's own factors cut off.
            """
            if self._is_own(i, begin):
                return self._updates[i][1:]
            t = self._known[max(i - 1, begin) : i + 2]
            if len(t) == 2 or t[0] == t[1] or t[1] == t[2]:
                return (i,), (float(t[-1] - t[-2]),), 1.0
            return (i - 1, i), tuple(polynomial_weights(t[:2], t[1], t[2]).tolist()), 1.0

        def index_for_timestep(self, timestep, schedule_timesteps=None) -> int:
            """The nearest; of equal ones the last, after which most is left to be done, or the first of all."""
            timesteps = self.timesteps if schedule_timesteps is None else schedule_timesteps
            away = (timesteps - torch.as_tensor(timestep, dtype=timesteps.dtype, device=timesteps.device)).abs()
            nearest = (away == away.min()).nonzero().flatten().tolist()
            return nearest[-1] if nearest[0] else 0

        def scale_noise(self, sample, timestep, noise):
            """Data with the noise that the state has before a step."""
            if self.begin_index is None:
                at = [self.index_for_timestep(t) for t in timestep]
            else:  # before the first step, or for inpainting after one
                at = [self.begin_index if self.step_index is None else self.step_index] * len(timestep)
            t = self._known[at].to(sample.device, torch.promote_types(sample.dtype, torch.float32))
            t = t.reshape(-1, *[1] * (sample.dim() - 1))
            return (t * sample + (1 - t) * noise).to(sample.dtype)

        def add_noise(self, original_samples, noise, timesteps):
            return self.scale_noise(original_samples, timesteps, noise)

        def scale_model_input(self, sample, timestep=None):
            return sample

        def step(
            self, model_output, timestep, sample, generator=None, per_token_timesteps=None, return_dict: bool = True
        ):
            expect(self.solver is not None, "step", "set_timesteps before it", "none")
            if self.step_index is None:
                self._init_step_index(timestep)
                self._start(self.step_index)
                now = {"latent_shape": list(sample.shape[1:])} | ({} if self._mu is None else {"mu": self._mu})
                warn_of_another_pipeline(self.solver, now, stacklevel=2)
            i, M = self.step_index, self.solver.evaluations
            expect(i < M, "step", f"{M} steps after set_timesteps", "one more")
            if self._state is not None and self._state.shape != sample.shape:
                self._start(i)
            if self._short and not self._warned:
                self._warned = True
                text = f"begin_index: starts at evaluation {self._begin} of {self.solver!r}, whose steps look back at "
                text += "velocities before it" + ("" if self.solver.keeps_start else " or at x_0")
                warn(text + "; those steps are of lower order (Euler, then Adams-Bashforth 2)", 2)
            dtype = torch.float64 if sample.dtype == torch.float64 else torch.float32
            x = self._taken(sample, dtype)
            v = model_output.to(dtype) if torch.float64 in (dtype, model_output.dtype) else model_output
            by_token = per_token_timesteps is not None
            as_before = i == self._begin or by_token == (self._joined is not None)
            expect(as_before, "per_token_timesteps", "them for all steps of a run or for none", per_token_timesteps)
            keeps = self._last[i] > i or ((self._short or by_token) and i + 1 < M)
            self._past[i] = v.clone() if keeps else v  # a pipeline may give the next in the same memory
            x = self._stepped_by_token(x, v, per_token_timesteps) if by_token else self._stepped(x, self._begin)
            self._past = {k: past for k, past in self._past.items() if self._last[k] > i or (k == i and keeps)}
            self._state = x
            new = x if by_token else x.to(model_output.dtype)
            self._step_index += 1
            return SchedulerOutput(prev_sample=new) if return_dict else (new,)

        def _taken(self, sample, dtype):
            """The sample, but the state that was kept wherever the sample is that one rounded, and no more: what is
            lost where somebody has written to it is less than the rounding."""
            x, kept = sample.to(dtype), self._state
            if kept is None or kept is x:
                return x
            kept = kept.to(x.device, dtype)
            for low in LOWER[dtype]:
                x = torch.where(kept.to(low) == x, kept, x)
            return x

        def _stepped(self, x, begin: int, sign: int | None = None):
            """sign: of dx/dt in terms of the network's output, which is noise - data, but where time is inverted."""
            which, factors, scale = self._rule(self.step_index, begin)
            sign = (1 if self.config.invert_sigmas else -1) if sign is None else sign
            past = [self._past[k] for k in which]
            if len({v.dtype for v in past}) > 1:
                past = [v.to(x.dtype) for v in past]
            return linear_update(x, past, [sign * b for b in factors], scale=scale)

        def _stepped_by_token(self, x, v, timesteps):
            """As the stock scheduler, which pipelines of this kind give data - noise: tokens at the time of this step
            make it, of lower order where they have come to it late; tokens at an earlier sigma make Euler's to the next
            knot below; those at sigma 0 stay."""
            i, sigma = self.step_index, timesteps[..., None] / self.config.num_train_timesteps
            fits = x.dim() == 3 and sigma.dim() == 3 and sigma.shape[0] == len(x) and sigma.shape[1] in (1, x.shape[1])
            expect(fits, "per_token_timesteps", f"shape [{len(x)}, 1 or tokens], of latents of 3 dimensions", timesteps)
            inverted = self.config.invert_sigmas
            expect(not inverted, "per_token_timesteps", "None, where time is inverted", timesteps)
            knots = self.sigmas.to(sigma)
            now = (sigma - self.timesteps[i].to(sigma) / self.config.num_train_timesteps).abs() <= 1e-6
            joined = torch.full_like(sigma, self.solver.evaluations) if self._joined is None else self._joined
            self._joined = joined = torch.where(now & (joined > i), i, joined)
            below = torch.where(knots < sigma - 1e-6, knots, 0).amax(-1, keepdim=True)
            new = x + (sigma - below) * v
            for begin in joined[now].unique().int().tolist():
                new = torch.where(now & (joined == begin), self._stepped(x, begin, 1), new)
            return new

    return SolverScheduler
