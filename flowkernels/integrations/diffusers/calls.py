"""Calls of a pipeline on copies of it, stopped where the scheduler is to make a step."""

import copy
import functools
import inspect
import re
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from flowkernels._checks import expect, expect_times
from flowkernels.integrations.diffusers.arguments import OF_PROMPTS, Arguments
from flowkernels.integrations.diffusers.plans import (
    Evaluation,
    EvaluationOfStep,
    First,
    Grid,
    Noise,
    NoiseOfStep,
    Plan,
    Steps,
    Stop,
    relative,
)
from flowkernels.integrations.diffusers.prepared import Prepared
from flowkernels.integrations.diffusers.sigmas import before_shift, shift_of, static_shift
from flowkernels.velocity.hashes import unwrapped
from flowkernels.velocity.provenance import hash_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

PREPARED = re.compile(r"_?(encode|prepare)_")  # methods whose results depend on the prompts and images alone
BY_INDEX = ("cfg_trunc_ratio", "control_guidance_start", "control_guidance_end", "skip_guidance_layers")
KEPT = 8  # batches of prompts whose encodings stay


class Calls:
    """Calls of a pipeline on copies of it, and what these have prepared of prompts."""

    def __init__(self, pipe: "DiffusionPipeline", arguments: Arguments):
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
        plan = self._run((0,), First(), num_inference_steps=self.usual)
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

    def _run(self, prompts: tuple[int, ...], plan: Plan, **changes) -> Any:
        """The plan, after a call on these prompts."""
        pipe = copy.copy(self.pipe)
        pipe.__class__ = _with_device(type(pipe), self.device)
        kwargs = self.arguments.of(prompts) | changes
        ambient = (torch.is_autocast_enabled(self.device.type), torch.get_autocast_dtype(self.device.type))
        key = (prompts, ambient, torch.get_default_dtype())
        known = self._prepared.get(key)
        prepared = Prepared(pipe, plan, kwargs.get("generator"), known, prompts, self.arguments.seed)
        prepared.put_over(self._methods)
        pipe.__dict__["scheduler"] = _stand_in(self.pipe.scheduler, plan)
        if plan.stubs:
            prepared.put_over_networks(self.networks())
            plan.counts = prepared.counts
            kwargs |= {"generator": plan.generator} if isinstance(plan, NoiseOfStep) else {}
        try:
            pipe(**kwargs)
        except Stop:
            if prepared.complete and prepared.results:
                self._prepared[key] = {**(known or {}), **prepared.results}
                while len(self._prepared) > KEPT:
                    self._prepared.popitem(last=False)
            return plan
        told = f"{type(pipe).__name__}, whose call ended without one"
        raise ValueError(f"pipe: expected a pipeline that makes steps by scheduler.step, got {told}")

    def velocity(self, x: Tensor, t: float, prompts: tuple[int, ...]) -> Tensor:
        made = self._run(prompts, (Evaluation if self.direct else EvaluationOfStep)(self, x, t))
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
        plan = self._run((0,), Grid(), num_inference_steps=steps)
        level = plan.scheduler.sigmas.cpu().double()
        times = level if self.sign > 0 else 1 - level
        times = times[torch.cat([times.new_ones(1, dtype=torch.bool), times.diff() != 0])]
        if 0 < times[-1] < 1:  # of a scheduler that ends before
            times = torch.cat([times, times.new_ones(1)])
        return expect_times(times, "pipe.scheduler")

    def noise(self, n: int, generator: torch.Generator | None) -> Tensor:
        P, rows = self.arguments.prompts, self.arguments.rows
        if not self.direct:
            parts = [self._run((i % P,), NoiseOfStep(generator)).sample for i in range(n)]
        else:  # in one, but where there are images to the prompts, which are as many as their batch
            images = any(not OF_PROMPTS.fullmatch(name) for name in rows)
            sizes = [min(P, n - begin) for begin in range(0, n, P)] if images else [n]
            prompts = [tuple(range(size)) if images else (0,) for size in sizes]
            parts = [self._run(p, Noise(k, generator)).sample for p, k in zip(prompts, sizes, strict=True)]
        x = torch.cat(parts)
        expect(len(x) == n, "n", f"{n} samples of the pipeline", x)
        return x if x.dtype == torch.float64 else x.float()

    def expect_velocity(self) -> None:
        """Velocities of the pipeline's loop at the begin, after an eighth, in the middle and at the end of its usual
        number of steps, and the same by themselves."""
        prompts, times = tuple(range(min(2, self.arguments.prompts))), self.grid(self.usual).tolist()
        K = len(times) - 1
        places = sorted({0, K // 8, K // 2, K - 1})
        found = self._run(prompts, Steps(self, times, places), num_inference_steps=self.usual).found
        exact = found[0][2].dtype in (torch.float32, torch.float64) and torch.finfo(self.dtype).eps < 1e-4
        for i, sample, output in found:
            self._expect_whole(sample, output, [len(prompts), *self.shape])
            error = relative(self.velocity(sample, times[i], prompts), self.sign * output)
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

    def _provenance(self, plan: Grid) -> dict[str, Any]:
        """Ready for JSON."""
        value, config = self.arguments.value, self.config
        transformer = next(iter(self.networks().values()), None)
        again = self._run((0,), Grid(), num_inference_steps=4)  # of Flux 2, mu is one for each number of steps
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


def _stand_in(scheduler, plan: Plan):
    other = copy.copy(scheduler)
    other.__class__ = _stand_in_class(type(scheduler))
    other._plan = plan
    return other
