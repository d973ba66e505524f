"""A diffusers pipeline as a velocity: its own call, stopped at the first step of its scheduler."""

import contextlib
import copy
import functools
import inspect
import math
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from flowkernels._checks import (
    FLOATS,
    expect,
    expect_bool,
    expect_float64,
    expect_int,
    expect_list,
    expect_positive_int,
    expect_room,
    expect_shown,
    expect_tensor,
    expect_text,
    expect_times,
)
from flowkernels.integrations.diffusers.scheduler import _expect_flow
from flowkernels.integrations.diffusers.sigmas import before_shift, shift_of, static_shift
from flowkernels.velocity.hashes import unwrapped
from flowkernels.velocity.protocol import VelocityBase
from flowkernels.velocity.provenance import Identity, hash_of, network_identity

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

OURS = "num_inference_steps sigmas timesteps latents output_type return_dict"
OURS = frozenset(f"{OURS} callback callback_steps callback_on_step_end callback_on_step_end_tensor_inputs".split())
TEXT = re.compile(r"prompt(_\d+)?")  # a text for all samples; pipelines repeat a negative one by themselves
OF_PROMPTS = re.compile(r"(negative_)?(pooled_)?prompt.*")  # texts, embeddings and masks: one for each prompt
PREPARED = re.compile(r"_?(encode|prepare)_")  # methods whose results depend on the prompts and images alone
PROCESSED = ("preprocess", "preprocess_video", "resize")  # of processors
BY_INDEX = ("cfg_trunc_ratio", "control_guidance_start", "control_guidance_end", "skip_guidance_layers")
MOST_STEPS = 100_000
KEPT = 8  # batches of prompts whose encodings stay


def pipeline_velocity(
    pipe: "DiffusionPipeline",
    *,
    batch_size: int | None = None,
    shared: Sequence[str] = (),
    check: bool = True,
    **arguments: Any,
) -> "PipelineVelocity":
    """The velocity of a diffusers pipeline as it samples: guided its own way, behind its own casts.

        v = pipeline_velocity(pipe, prompt=prompts, guidance_scale=5, height=1024, width=1024)
        cal = fk.calibrate(v, v.noise(64), grid=v.grid(50), steps=[4, 8], fit=True)

    An evaluation is a call of the pipeline on a copy of it (its models shared) with one time, which ends where the
    scheduler is to make the step; what was to be stepped with is the velocity. What the call prepares of prompts and
    images is kept between calls. The pipeline itself is left as it is.

    Args:
        pipe: a pipeline with a flow-matching scheduler. Changes of its weights are seen, those of its scheduler, its
            components or what it encodes prompts with are not: make another velocity then.
        batch_size: samples in a call at most; None puts all that it is asked for into one.
        shared: names of arguments that are one thing for all prompts although they are lists as long as these, such
            as several images to one prompt.
        check: run the pipeline's own loop, with its networks at 4 of its usual number of steps, and compare these
            velocities: 9 evaluations at most of a sample (of two with several prompts). It finds what is no function of
            state and time. One evaluation of a sample is made in any case.
        arguments: those of the pipeline's call. Sample i has prompt i mod P of P prompts, whatever the batch, and so
            with all that is given as a list of P entries and with tensors of prompts' embeddings. Texts may be of
            unlike lengths. A `generator` is copied, and draws what conditioning is sampled (none: one of seed 0).

    The state x is what the scheduler is given: packed where the pipeline packs it, and where it is given a part (image
    to video of LTX, all frames but the first) that part. It is cast to the dtype of the pipeline's latents, and the
    velocity is in that of its output. Some schedulers round times to integers: this does not. Pipelines run without
    gradients: what is to be trained is to be called as a `fk.VelocityField`.

    Returns:
        PipelineVelocity: called with x `[n, *shape]` and t `[n]`; `grid(K)`, `noise(n)`, `provenance`, `forced_knots`.

    Raises:
        TypeError, ValueError: naming the argument. For pipelines whose loop does what no velocity says: schedulers that
            are not for flow matching, a start at an image (`strength`), guidance that depends on the step's number or
            on steps before, caches, edits of the state between steps, two states.

    Examples:
        >>> import diffusers
        >>> size = dict(sample_size=8, num_layers=1, attention_head_dim=8, num_attention_heads=2)
        >>> size |= dict(joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16)
        >>> net = diffusers.SD3Transformer2DModel(**size)
        >>> stock = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        >>> pipe = diffusers.StableDiffusion3Pipeline(net, stock, *[None] * 7)  # with prompts that are encoded already
        >>> texts = dict(prompt_embeds=torch.randn(2, 4, 16), pooled_prompt_embeds=torch.randn(2, 16))
        >>> v = pipeline_velocity(pipe, **texts, guidance_scale=1, height=64, width=64)
        >>> fk.sample(v, v.noise(3), v.grid(4)).shape
        torch.Size([3, 16, 8, 8])
    """
    given = _expect_pipeline(pipe)
    if batch_size is not None:
        batch_size = expect_positive_int(batch_size, "batch_size")
    names = "names of arguments"
    expect_shown(not isinstance(shared, str), "shared", names, shared, TypeError)
    given_names = expect_list(shared, "shared", names, ordered=False)
    shared = frozenset(expect_text(name, "shared", names) for name in given_names)
    check = expect_bool(check, "check")
    velocity = PipelineVelocity(_Calls(given, _Arguments(given, arguments, shared)), batch_size)
    if check:
        velocity._calls.expect_velocity()
    return velocity


class PipelineVelocity(VelocityBase):
    """What `pipeline_velocity` makes.

    provenance: what a calibration made with it depends on beside weights: pipeline, shape of latents, size, guidance,
    scheduler and its shift, boundary, number of prompts, dtype.
    forced_knots: the first time of the second network, for pipelines that change networks (Wan 2.2).
    """

    def __init__(self, calls: "_Calls", batch_size: int | None, places: Tensor | None = None):
        self._calls, self._batch_size, self._places = calls, batch_size, places
        self.provenance, self.forced_knots = calls.provenance, calls.forced_knots
        self.conditioning = calls.arguments.conditioning()

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """dx/dt, `[n, *shape]`. x: `[n, *shape]`, on the pipeline's device. t: `[n]`, or one for all."""
        expect_tensor(x, "x", FLOATS)
        calls, n = self._calls, len(x) if x.dim() else 0
        fits = x.dim() > 0 and list(x.shape[1:]) == calls.shape
        expect(fits, "x", f"a state of shape [n, {', '.join(map(str, calls.shape))}]", x)
        expect(x.device == calls.device, "x", f"a state on {calls.device}, where the pipeline runs", x)
        times = expect_float64(t, "t", "times from 0 to 1").flatten().tolist()
        expect(len(times) in (1, n), "t", f"one time, or one for each of {n} samples", t)
        expect(all(0 <= time <= 1 for time in times), "t", "times from 0 to 1", t)
        times = times * n if len(times) < n else times[:n]
        places = range(n) if self._places is None else self._places.tolist()
        expect(len(places) == n, "x", f"the states of the velocity's {len(places)} samples", x)
        parts = []
        for rows in self._batches(times):
            prompts = tuple(places[i] % calls.arguments.prompts for i in rows)
            parts.append(calls.velocity(x[rows.start : rows.stop], times[rows.start], prompts))
        return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else torch.empty_like(x)

    def _batches(self, times: list[float]) -> Iterator[range]:
        """Rows one after another of one time, as many as go into a call."""
        start = 0
        while start < len(times):
            stop, most = start + 1, len(times) if self._batch_size is None else start + self._batch_size
            while stop < min(most, len(times)) and times[stop] == times[start]:
                stop += 1
            yield range(start, stop)
            start = stop

    def grid(self, steps: int) -> Tensor:
        """The times of the pipeline's own scheduler for a number of steps, its shift included, and 1 at the end:
        float64 `[steps + 1]`, fewer where it gives a time twice."""
        return self._calls.grid(expect_int(steps, "steps", f"a number of steps, up to {MOST_STEPS:,}", 1, MOST_STEPS))

    def noise(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """What the pipeline begins n samples with, float32 `[n, *shape]`. generator: as the pipeline's."""
        n = expect_positive_int(n, "n")
        expect_room(4 * n * math.prod(self._calls.shape), "n", "latents", f"{n} samples")
        known = generator is None or isinstance(generator, torch.Generator)
        expect(known, "generator", "a torch.Generator or None", generator, TypeError)
        return self._calls.noise(n, generator)

    def rows(self, index: Tensor | slice, n: int) -> "PipelineVelocity":
        expect_shown(isinstance(index, (Tensor, slice)), "index", "a tensor of places or a slice", index, TypeError)
        index = index.cpu() if isinstance(index, Tensor) else index
        if self._places is not None:
            places = self._places[index]
        elif isinstance(index, slice):  # prompts are for any number of samples: past n too
            ends = index.start or 0, n if index.stop is None else index.stop, index.step or 1
            places = torch.arange(*ends, device="cpu")
        else:
            places = torch.arange(n, device="cpu")[index]
        return PipelineVelocity(self._calls, self._batch_size, places)

    def time_for(self, t: Tensor, x: Tensor) -> Tensor:
        """In float64 on the CPU: the scheduler's times are formed of them."""
        return t.to("cpu", torch.float64)

    def model_times(self, times: Tensor, x: Tensor) -> Tensor:
        return times.to("cpu", torch.float64)

    def identify(self, weights: bool = True) -> Identity:
        networks = nn.ModuleDict(self._calls.networks())
        known = network_identity(networks, self.convention(), conditioning=self.conditioning, weights=weights)
        return replace(known, pipeline=self.provenance)

    def convention(self) -> dict[str, Any]:
        return dict(pipeline=self.provenance["pipeline"], sign=self._calls.sign, reverse_time=self._calls.sign < 0)

    def __repr__(self) -> str:
        return f"PipelineVelocity({self.provenance['pipeline']}, {self._calls.arguments.prompts} prompts)"


def _expect_pipeline(pipe) -> "DiffusionPipeline":
    try:
        from diffusers import DiffusionPipeline
    except ImportError:
        DiffusionPipeline = ()
    expected = "a DiffusionPipeline of diffusers"
    expect(isinstance(pipe, DiffusionPipeline), "pipe", expected, type(pipe).__name__, TypeError)
    scheduler = getattr(pipe, "scheduler", None)
    expect(scheduler is not None, "pipe", "a pipeline with a scheduler", type(pipe).__name__)
    _expect_flow(scheduler, "pipe.scheduler")
    parameters = inspect.signature(type(pipe).__call__).parameters
    told = f"{type(pipe).__name__}, which begins at an image (calibrate the pipeline that begins at noise)"
    expect("strength" not in parameters, "pipe", "a pipeline that begins at noise", told)
    for name, part in pipe.components.items():
        cached = getattr(part, "is_cache_enabled", False) is True
        expect(not cached, f"pipe.{name}", "a network without a cache of steps before (disable_cache)", "one with it")
    return pipe


class _Arguments:
    """The arguments of the pipeline's call, which prompts there are, and the arguments of a batch of these."""

    def __init__(self, pipe: "DiffusionPipeline", given: dict[str, Any], shared: frozenset[str]):
        parameters = dict(inspect.signature(type(pipe).__call__).parameters)
        unknown = sorted(set(given) - set(parameters) | ({"self"} & set(given)))
        known = f"those of {type(pipe).__name__}: {', '.join(sorted(set(parameters) - OURS - {'self'}))}"
        expect(not unknown, "arguments", known, f"{unknown}", TypeError)
        ours = sorted(set(given) & OURS)
        expect(not ours, "arguments", "none that the velocity decides: states, times and results", f"{ours}", TypeError)
        expect(shared <= set(given), "shared", f"names of {sorted(given)}", f"{sorted(shared - set(given))}")
        for name in ("num_images_per_prompt", "num_videos_per_prompt"):
            expect(given.get(name, 1) == 1, name, "1: samples go through the prompts in turn", given.get(name))
        generator = given.pop("generator", None)
        known = generator is None or isinstance(generator, torch.Generator)
        expect(known, "generator", "one torch.Generator, or None", generator, TypeError)
        self.given, self.parameters = _rebuilt(given), parameters  # which a caller may write to
        self.generator = torch.Generator(device="cpu").manual_seed(0) if generator is None else copy_of(generator)
        self._initial = self.generator.get_state()
        self.seed = int(torch.randint(2**48, (), generator=copy_of(self.generator), device=self.generator.device))
        self.prompts = self._prompts()
        rows = [name for name, value in given.items() if name not in shared and self._has_rows(name, value)]
        self.rows = frozenset(rows)

    def _prompts(self) -> int:
        prompt, embeds = self.given.get("prompt"), self.given.get("prompt_embeds")
        of = prompt if isinstance(prompt, (list, tuple)) else embeds if prompt is None else None
        P = len(of) if isinstance(of, (list, tuple, Tensor)) else 1
        expect(P > 0, "prompt", "at least one prompt", "none")
        return P

    def _has_rows(self, name: str, value) -> bool:
        sized = isinstance(value, (list, tuple)) or (isinstance(value, Tensor) and value.dim() > 0)
        if sized and OF_PROMPTS.fullmatch(name):
            expect(len(value) == self.prompts, name, f"one for each of {self.prompts} prompts", value)
            return True
        return sized and len(value) == self.prompts > 1

    def of(self, prompts: tuple[int, ...]) -> dict[str, Any]:
        """For a call on the prompts of these numbers."""
        found = _rebuilt(self.given)
        for name, value in self.given.items():
            if name in self.rows:
                found[name] = value[list(prompts)] if isinstance(value, Tensor) else [value[j] for j in prompts]
            elif isinstance(value, str) and TEXT.fullmatch(name) and (len(prompts) > 1 or self.prompts > 1):
                found[name] = [value] * len(prompts)
        if "generator" in self.parameters:
            found["generator"] = copy_of(self.generator, self._initial)
        for name, value in (("num_inference_steps", 2), ("output_type", "latent")):
            if name in self.parameters:
                found[name] = value
        return found

    def conditioning(self, of_prompts: bool = False) -> dict[str, Any]:
        """What has a hash, but for the prompts, or these alone: a calibration is made on some of them for all."""
        texts = {k: v for k, v in self.given.items() if isinstance(v, (str, Tensor)) or k in self.rows}
        positive = {k for k in texts if OF_PROMPTS.fullmatch(k) and not k.startswith("negative_")}
        return {k: v for k, v in texts.items() if (k in positive) == of_prompts}

    def value(self, name: str):
        parameter = self.parameters.get(name)
        return self.given.get(
            name, None if parameter is None or parameter.default is parameter.empty else parameter.default
        )


def copy_of(generator: torch.Generator, state: Tensor | None = None) -> torch.Generator:
    """A generator that draws the same, from here or from a state."""
    other = torch.Generator(device=generator.device)
    return other.set_state(generator.get_state() if state is None else state)


class _Stop(BaseException):
    """Ends a pipeline's call; no `except Exception` of its own takes it."""


class _Plan:
    """What a call is made for: asked by the scheduler that stands in for the pipeline's own.

    x: the state that goes in where the pipeline makes its latents; None leaves them. dtype: to put it in, or None for
        that of its own.
    stubs: whether networks give what they gave before, which nobody looks at.
    """

    x: Tensor | None = None
    dtype: torch.dtype | None = None
    stubs = False

    def __deepcopy__(self, memo):
        expect(False, "pipe", "a pipeline with one state", "one that copies its scheduler, for a second state")

    def set_timesteps(self, scheduler, own: Callable, kwargs: dict) -> None:
        """The scheduler's own times."""
        own(**kwargs)
        self.scheduler, self.mu = scheduler, kwargs.get("mu")
        self.explicit = kwargs.get("timesteps") is not None and kwargs.get("sigmas") is not None

    def prepared(self, latents: Tensor, again: Callable) -> None:
        """The pipeline has its latents; again: makes them for n samples by a generator."""

    def loop_begins(self) -> None:
        """All that comes before the first step is done."""

    def step(self, scheduler, model_output: Tensor, sample: Tensor) -> Tensor:
        self.sample, self.output = sample, model_output
        raise _Stop


class _First(_Plan):
    """The first step, and the dtype of the state at the second where it is another: HunyuanVideo rounds its times to
    it. Networks are evaluated for the first."""

    stubs = True
    latents: Tensor | None = None

    def prepared(self, latents, again) -> None:
        self.latents = latents

    def step(self, scheduler, model_output, sample) -> Tensor:
        if hasattr(self, "sample"):
            self.later = sample.dtype if sample.dtype != self.sample.dtype else None
            raise _Stop
        self.sample, self.output = sample, model_output
        self.counts.clear()  # of calls of the networks, which give the same once more
        return sample.to(model_output.dtype)


class _Grid(_Plan):
    """The scheduler's own times, and no more."""

    def loop_begins(self) -> None:
        raise _Stop


class _Noise(_Plan):
    """What the pipeline begins n samples with."""

    def __init__(self, n: int, generator: torch.Generator | None):
        self.n, self.generator = n, generator

    def prepared(self, latents, again) -> None:
        self.sample = again(self.n, self.generator)
        raise _Stop


class _NoiseOfStep(_Plan):
    """The same of one sample, where the scheduler sees it first."""

    stubs = True

    def __init__(self, generator: torch.Generator | None):
        self.generator = generator


class _Evaluation(_Plan):
    """The velocity of one state at one time."""

    def __init__(self, calls: "_Calls", x: Tensor, t: float):
        self.calls, self.x, self.t, self.dtype = calls, x, t, calls.dtype

    def set_timesteps(self, scheduler, own, kwargs) -> None:
        self.calls.set_times(scheduler, [self.t], kwargs)


class _EvaluationOfStep(_Plan):
    """The same by two steps, of which the first is for nothing but to give the loop its state."""

    stubs = True

    def __init__(self, calls: "_Calls", x: Tensor, t: float):
        self.calls, self.state, self.t = calls, x, t

    def set_timesteps(self, scheduler, own, kwargs) -> None:
        self.calls.set_times(scheduler, [self.t] * 2, kwargs)

    def step(self, scheduler, model_output, sample) -> Tensor:
        if self.stubs:
            self.stubs = False
            return self.state.to(model_output.device, model_output.dtype, copy=True)
        return super().step(scheduler, model_output, sample)


class _Steps(_Plan):
    """Euler steps of the pipeline's own loop, with its networks at some of them: (number, state, output) of these.
    Elsewhere they give what they gave before, as a loop that depends on its step's number takes no notice."""

    stubs = True

    def __init__(self, calls: "_Calls", times: list[float], places: Sequence[int]):
        self.calls, self.times, self.places, self.found, self.i = calls, times, places, [], 0

    def set_timesteps(self, scheduler, own, kwargs) -> None:
        own(**kwargs)
        self.stubs = False
        times = scheduler.timesteps  # which some round, and Heun's has twice
        if not torch.is_floating_point(times) or len(times) != len(self.times) - 1:
            self.calls.set_times(scheduler, self.times[:-1], kwargs)

    def step(self, scheduler, model_output, sample) -> Tensor:
        i, calls = self.i, self.calls
        if i:
            cast = 2 * torch.finfo(calls.dtype).eps  # of the state
            same = sample.shape == self.after.shape and _relative(sample, self.after) <= cast
            told = f"{type(calls.pipe).__name__}, which edits it"
            expect(same, "pipe", "a loop that goes on from the state that a step has made", told)
        if i in self.places:
            self.found.append((i, sample, model_output))
        if i == self.places[-1]:
            raise _Stop
        h = self.times[i + 1] - self.times[i]
        self.after = (sample.float() + calls.sign * h * model_output.float()).to(model_output.dtype)
        self.i, self.stubs = i + 1, i + 1 not in self.places
        self.counts.clear()
        return self.after


class _Calls:
    """Calls of a pipeline on copies of it, and what these have prepared of prompts."""

    def __init__(self, pipe: "DiffusionPipeline", arguments: _Arguments):
        self.pipe, self.arguments = copy.copy(pipe), arguments
        if "solvers" in pipe.scheduler.config:  # it is `solver_scheduler`'s, which has kept the config of the stock one
            from diffusers import FlowMatchEulerDiscreteScheduler

            stock = {k: v for k, v in pipe.scheduler.config.items() if k != "solvers"}
            self.pipe.__dict__["scheduler"] = FlowMatchEulerDiscreteScheduler.from_config(stock)
        self.config = self.pipe.scheduler.config
        self.sign = 1 if self.config.get("invert_sigmas") else -1  # of dx/dt beside the output
        self.device = pipe._execution_device
        self._prepared: OrderedDict[Any, dict] = OrderedDict()
        self._methods = [
            name
            for name in dir(type(pipe))
            if PREPARED.match(name) and inspect.isfunction(getattr(type(pipe), name)) and name != "prepare_latents"
        ]
        usual = arguments.value("num_inference_steps")
        self.usual = usual if isinstance(usual, int) and usual > 1 else 50
        plan = self._run((0,), _First(), num_inference_steps=self.usual)
        # whether the scheduler is given what prepare_latents has made, and not something of it (image to video)
        seen, latents = plan.sample, plan.latents
        self.direct = latents is not None and seen.shape == latents.shape and torch.equal(seen.float(), latents.float())
        self.shape, self.device = list(seen.shape[1:]), seen.device
        self.dtype = plan.later or (latents.dtype if self.direct else plan.output.dtype)
        self._shift = None  # of what the network is told, where the pipeline gives times and sigmas (CogView4)
        if plan.explicit:
            self._shift = shift_of(self.config, plan.mu, static_shift(self.pipe.scheduler) or 1.0)
        self.forced_knots = self._boundary()
        self.provenance = self._provenance(plan)

    # ---- a call ----

    def _run(self, prompts: tuple[int, ...], plan: _Plan, **changes) -> Any:
        """The plan, after a call on these prompts."""
        pipe = copy.copy(self.pipe)
        pipe.__class__ = _with_device(type(pipe), self.device)
        kwargs = self.arguments.of(prompts) | changes
        ambient = (torch.is_autocast_enabled(self.device.type), torch.get_autocast_dtype(self.device.type))
        key = (prompts, ambient, torch.get_default_dtype())
        known = self._prepared.get(key)
        prepared = _Prepared(pipe, plan, kwargs.get("generator"), known, prompts, self.arguments.seed)
        prepared.put_over(self._methods)
        pipe.__dict__["scheduler"] = _stand_in(self.pipe.scheduler, plan)
        if plan.stubs:
            prepared.put_over_networks(self.networks())
            plan.counts = prepared.counts
            kwargs |= {"generator": plan.generator} if isinstance(plan, _NoiseOfStep) else {}
        try:
            pipe(**kwargs)
        except _Stop:
            if prepared.complete and prepared.results:
                self._prepared[key] = {**(known or {}), **prepared.results}
                while len(self._prepared) > KEPT:
                    self._prepared.popitem(last=False)
            return plan
        told = f"{type(pipe).__name__}, whose call ended without one"
        raise ValueError(f"pipe: expected a pipeline that makes steps by scheduler.step, got {told}")

    def velocity(self, x: Tensor, t: float, prompts: tuple[int, ...]) -> Tensor:
        made = self._run(prompts, (_Evaluation if self.direct else _EvaluationOfStep)(self, x, t))
        self._expect_whole(made.sample, made.output, list(x.shape))
        return made.output if self.sign > 0 else -made.output

    def _expect_whole(self, sample, output, shape: list[int]) -> None:
        """Raise where the scheduler is not given all of the latents, with one output for them."""
        shapes = [list(part.shape) if isinstance(part, Tensor) else type(part).__name__ for part in (sample, output)]
        told = f"{type(self.pipe).__name__}, which steps {shapes[0]} by {shapes[1]} of latents {shape}"
        expect(shapes == [shape] * 2, "pipe", "a pipeline that steps all of its latents, by one output", told)

    def set_times(self, scheduler, times: list[float], kwargs: dict) -> None:
        """Put times into a scheduler: as its own set_timesteps would for its sigmas, without rounding to integers."""
        device = kwargs.get("device")
        noise = torch.tensor([1 - t for t in times], dtype=torch.float64, device="cpu")  # sigma
        level, end = (1 - noise, 1.0) if self.sign > 0 else (noise, 0.0)  # what the scheduler has for it
        of_network = level if self._shift is None else before_shift(level, self._shift)
        scheduler.timesteps = (self.config["num_train_timesteps"] * of_network).float().to(device)
        scheduler.sigmas = torch.cat([level, level.new_tensor([end])]).float().to(device)
        scheduler.num_inference_steps = len(times)
        scheduler._step_index = scheduler._begin_index = None

    # ---- what it is asked for ----

    def grid(self, steps: int) -> Tensor:
        if "num_inference_steps" not in self.arguments.parameters:
            expect(False, "pipe", "a pipeline that is told a number of steps", type(self.pipe).__name__)
        plan = self._run((0,), _Grid(), num_inference_steps=steps)
        level = plan.scheduler.sigmas.cpu().double()
        times = level if self.sign > 0 else 1 - level
        times = times[torch.cat([times.new_ones(1, dtype=torch.bool), times.diff() != 0])]
        if 0 < times[-1] < 1:  # of a scheduler that ends before
            times = torch.cat([times, times.new_ones(1)])
        return expect_times(times, "pipe.scheduler")

    def noise(self, n: int, generator: torch.Generator | None) -> Tensor:
        P, rows = self.arguments.prompts, self.arguments.rows
        if not self.direct:
            parts = [self._run((i % P,), _NoiseOfStep(generator)).sample for i in range(n)]
        else:  # in one, but where there are images to the prompts, which are as many as their batch
            images = any(not OF_PROMPTS.fullmatch(name) for name in rows)
            sizes = [min(P, n - begin) for begin in range(0, n, P)] if images else [n]
            prompts = [tuple(range(size)) if images else (0,) for size in sizes]
            parts = [self._run(p, _Noise(k, generator)).sample for p, k in zip(prompts, sizes, strict=True)]
        x = torch.cat(parts)
        expect(len(x) == n, "n", f"{n} samples of the pipeline", x)
        return x if x.dtype == torch.float64 else x.float()

    def expect_velocity(self) -> None:
        """Velocities of the pipeline's loop at the begin, after an eighth, in the middle and at the end of its usual
        number of steps, and the same by themselves."""
        prompts, times = tuple(range(min(2, self.arguments.prompts))), self.grid(self.usual).tolist()
        K = len(times) - 1
        places = sorted({0, K // 8, K // 2, K - 1})
        found = self._run(prompts, _Steps(self, times, places), num_inference_steps=self.usual).found
        exact = found[0][2].dtype in (torch.float32, torch.float64) and torch.finfo(self.dtype).eps < 1e-4
        for i, sample, output in found:
            self._expect_whole(sample, output, [len(prompts), *self.shape])
            error = _relative(self.velocity(sample, times[i], prompts), self.sign * output)
            used = [a for a in BY_INDEX if self.arguments.value(a) not in (None, 0.0, 1.0)]
            because = f"; {', '.join(used)} may be why" if used else ""
            told = f"velocities of step {i + 1} of {K} that are others by {error:.2g} than by themselves{because}"
            expected = "velocities of state and time alone"
            expect(error <= (1e-4 if exact else 0.05), "pipe", expected, f"{type(self.pipe).__name__}, {told}")

    def networks(self) -> dict[str, nn.Module]:
        """What the velocity is of."""
        return {
            name: part
            for name, part in self.pipe.components.items()
            if isinstance(part, nn.Module) and name.startswith(("transformer", "unet", "controlnet"))
        }

    def _boundary(self) -> tuple[float, ...]:
        ratio = self.pipe.config.get("boundary_ratio")
        if ratio is None or not {"transformer", "transformer_2"} <= set(self.networks()):
            return ()
        below = np.nextafter(np.float32(ratio), np.float32(0))  # there the second one is asked, as a float32
        return (1 - float(below),)

    def _provenance(self, plan: _Grid) -> dict[str, Any]:
        """Ready for JSON."""
        value, config = self.arguments.value, self.config
        transformer = next(iter(self.networks().values()), None)
        again = self._run((0,), _Grid(), num_inference_steps=4)  # of Flux 2, mu is one for each number of steps
        guidance = {k: value(k) for k in self.arguments.parameters if "guidance_scale" in k or "cfg" in k}
        found = {
            "pipeline": type(self.pipe).__name__,
            "networks": {k: type(unwrapped(v)).__name__ for k, v in self.networks().items()},
            "latent_shape": self.shape,
            **{name: value(name) for name in ("height", "width", "num_frames") if value(name) is not None},
            "guidance": {k: v for k, v in guidance.items() if isinstance(v, (int, float, bool, str))},
            "guidance_embeds": getattr(getattr(transformer, "config", None), "guidance_embeds", None),
            "scheduler": type(self.pipe.scheduler).__name__,
            "shift": static_shift(self.pipe.scheduler),
            "use_dynamic_shifting": bool(config.get("use_dynamic_shifting")),
            **({"mu": None if plan.mu is None else float(plan.mu)} if again.mu == plan.mu else {}),
            "inverted_time": self.sign > 0,
            "boundary_ratio": self.pipe.config.get("boundary_ratio"),
            "prompts": self.arguments.prompts,
            "prompts_sha256": hash_of(self.arguments.conditioning(of_prompts=True), "prompts", {}),
            "dtype": None if transformer is None else str(transformer.dtype),
        }
        return found


def _relative(a: Tensor, b: Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-30)).item()


@functools.cache
def _with_device(kind: type, device: torch.device) -> type:
    """The class of a pipeline that knows where it runs, and does not look through all modules at every call."""
    return type(kind.__name__, (kind,), {"__module__": kind.__module__, "_execution_device": device})


@functools.cache
def _stand_in_class(kind: type) -> type:
    """A scheduler class that asks a plan."""

    names = list(inspect.signature(kind.set_timesteps).parameters)[1:]

    class StandIn(kind):
        @functools.wraps(kind.set_timesteps)
        def set_timesteps(self, *args, **kwargs):
            named = dict(zip(names, args, strict=False)) | kwargs
            self._plan.set_timesteps(self, functools.partial(kind.set_timesteps, self), named)

        @functools.wraps(kind.step)
        def step(self, model_output, timestep, sample, *args, **kwargs):
            tokens = kwargs.get("per_token_timesteps")
            expect(tokens is None, "pipe", "a pipeline with one time for a sample", "one with times of tokens")
            after = self._plan.step(self, model_output, sample)
            if not kwargs.get("return_dict", True):
                return (after,)
            from diffusers.schedulers.scheduling_utils import SchedulerOutput

            return SchedulerOutput(prev_sample=after)

    StandIn.__name__ = StandIn.__qualname__ = kind.__name__
    return StandIn


def _stand_in(scheduler, plan: _Plan):
    other = copy.copy(scheduler)
    other.__class__ = _stand_in_class(type(scheduler))
    other._plan = plan
    return other


class _Prepared:
    """The methods of a copy of a pipeline that prepare prompts, images and latents: results as they come, or those of a
    call before, in the same order.

    results: {(name, how many times it was called before): result, state of the generator after}.
    complete: whether the loop has begun, so that there is nothing more to come.
    """

    def __init__(
        self,
        pipe,
        plan: _Plan,
        generator: torch.Generator | None,
        known: dict | None,
        prompts: tuple[int, ...],
        seed: int,
    ):
        self.pipe, self.plan, self.generator, self.known = pipe, plan, generator, known or {}
        self.prompts, self.seed = prompts, seed
        self.results, self.counts, self.complete, self._inside = {}, {}, False, False

    def put_over(self, methods: Sequence[str]) -> None:
        own = self.pipe.__dict__
        for name in methods:
            own[name] = self._kept(name, getattr(self.pipe, name))
        for part, value in list(own.items()):
            names = PROCESSED if "processor" in part else ("encode",) if part == "vae" else ()
            names = [n for n in names if callable(getattr(value, n, None))]
            if names:
                own[part] = copy.copy(value)
                for name in names:
                    own[part].__dict__[name] = self._kept(f"{part}.{name}", getattr(value, name))
        if hasattr(self.pipe, "prepare_latents"):
            own["prepare_latents"] = self._latents(self.pipe.prepare_latents)
        own["_progress_bar_config"] = {"disable": True}
        own["progress_bar"] = self._bar(self.pipe.progress_bar)

    def put_over_networks(self, networks: Mapping[str, nn.Module]) -> None:
        for name, network in networks.items():
            self.pipe.__dict__[name] = _Stub(network, functools.partial(self._output, name, network))

    def _output(self, name: str, network: nn.Module, *args, **kwargs):
        if not self.plan.stubs:
            return network(*args, **kwargs)
        return self._result(f"{name}()", lambda: network(*args, **kwargs))

    def _bar(self, own: Callable) -> Callable:
        @functools.wraps(own)
        def progress_bar(*args, **kwargs):
            self.complete = True
            self.plan.loop_begins()
            return own(*args, **kwargs)

        return progress_bar

    def _kept(self, name: str, own: Callable) -> Callable:
        @functools.wraps(own)
        def method(*args, **kwargs):
            if self._inside or self.complete:
                return own(*args, **kwargs)
            return self._result(name, lambda: self._frozen(own(*args, **kwargs)))

        return method

    def _result(self, name: str, make: Callable) -> Any:
        key = name, self.counts.get(name, 0)
        self.counts[name] = key[1] + 1
        known = self.results.get(key) or self.known.get(key)  # of this call where a plan has counted anew
        if known is not None:
            result, state = known
            if state is not None:
                self.generator.set_state(state)
            return _rebuilt(result)
        self._inside = True
        try:
            with self._drawing(), torch.inference_mode(False), torch.no_grad():  # kept for use outside of it too
                result = make()
        finally:
            self._inside = False
        self.results[key] = result, None if self.generator is None else self.generator.get_state()
        return _rebuilt(result)

    @contextlib.contextmanager
    def _drawing(self, further: int = 0) -> Iterator[None]:
        """What is drawn by the generator of all is the same each time, and not taken from the caller's."""
        device, seed = self.pipe._execution_device, self.seed + further
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach other devices too
            if device.type == "cuda":
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
            yield

    def _frozen(self, encoded):
        """What a VAE encodes, with what is drawn of it drawn once: for a prompt the same in every batch."""
        of = getattr(encoded, "latent_dist", None)
        if not hasattr(of, "sample"):
            return encoded
        found, draw = [], of.sample

        def sample(*args, **kwargs):
            rows, n = getattr(of, "parameters", ()), len(self.prompts)
            if not found and len(rows) and len(rows) % n == 0:  # once more for guidance, it may be
                for j, row in enumerate(rows.split(1)):
                    with self._drawing(self.prompts[j % n]):
                        found.append(type(of)(row).sample())
                found[:] = [torch.cat(found)]
            elif not found:
                with self._drawing():
                    found.append(draw(*args, **kwargs))
            return found[0]

        of.sample = sample
        return encoded

    def _latents(self, own: Callable) -> Callable:
        """prepare_latents, with the state of the plan for its latents."""

        @functools.wraps(own)
        def prepare_latents(*args, **kwargs):
            plan = self.plan
            if isinstance(plan, _NoiseOfStep):  # drawn anew, and so what the pipeline makes of it
                return own(*args, **kwargs)

            def again(n: int, generator: torch.Generator | None) -> Tensor:
                asked = inspect.signature(own).bind(*args, **kwargs)
                asked.apply_defaults()
                batch = next((name for name in ("batch_size", "bsz") if name in asked.arguments), None)
                expect(batch is not None, "pipe", "prepare_latents of a batch_size", f"{list(asked.arguments)}")
                changes = {batch: n, "generator": generator}
                asked.arguments.update({k: v for k, v in changes.items() if k in asked.arguments})
                return _latents_of(own(*asked.args, **asked.kwargs))

            if isinstance(plan, _Noise):
                plan.prepared(None, again)
            result = self._result("prepare_latents", lambda: own(*args, **kwargs))
            latents = _latents_of(result)
            plan.prepared(latents, again)
            if plan.x is None:
                return result
            expected = f"a state of shape {list(latents.shape)}, as the pipeline's latents"
            expect(plan.x.shape == latents.shape, "x", expected, plan.x)
            x = plan.x.to(latents.device, plan.dtype or latents.dtype, copy=True)
            return x if isinstance(result, Tensor) else type(result)([x, *result[1:]])

        return prepare_latents


class _Stub:
    """A network to a pipeline, called otherwise."""

    def __init__(self, network: nn.Module, call: Callable):
        self._network, self._call = network, call

    __class__ = property(lambda self: type(self._network))

    def __getattr__(self, name: str):
        return getattr(self._network, name)

    def __call__(self, *args, **kwargs):
        return self._call(*args, **kwargs)


def _latents_of(result) -> Tensor:
    latents = result if isinstance(result, Tensor) else result[0] if isinstance(result, (tuple, list)) else None
    expect(isinstance(latents, Tensor), "pipe", "latents of prepare_latents, or these first", type(result).__name__)
    return latents


def _rebuilt(result):
    """Containers anew, which a pipeline may write to; their tensors shared."""
    if type(result) in (list, tuple):
        return type(result)(map(_rebuilt, result))
    return {k: _rebuilt(v) for k, v in result.items()} if type(result) is dict else result
