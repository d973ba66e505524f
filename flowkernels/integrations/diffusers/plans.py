"""What a call of a pipeline is made for: plans, which the scheduler asks that stands in for the pipeline's own."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flowkernels._checks import expect

if TYPE_CHECKING:
    from flowkernels.integrations.diffusers.calls import Calls


class Stop(BaseException):
    """Ends a pipeline's call; no `except Exception` of its own takes it."""


class Plan:
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
        raise Stop


class First(Plan):
    """The first step, and the dtype of the state at the second where it is another: HunyuanVideo rounds its times to
    it. Networks are evaluated for the first."""

    stubs = True
    latents: Tensor | None = None

    def prepared(self, latents, again) -> None:
        self.latents = latents

    def step(self, scheduler, model_output, sample) -> Tensor:
        if hasattr(self, "sample"):
            self.later = sample.dtype if sample.dtype != self.sample.dtype else None
            raise Stop
        self.sample, self.output = sample, model_output
        self.counts.clear()  # of calls of the networks, which give the same once more
        return sample.to(model_output.dtype)


class Grid(Plan):
    """The scheduler's own times, and no more."""

    def loop_begins(self) -> None:
        raise Stop


class Noise(Plan):
    """What the pipeline begins n samples with."""

    def __init__(self, n: int, generator: torch.Generator | None):
        self.n, self.generator = n, generator

    def prepared(self, latents, again) -> None:
        self.sample = again(self.n, self.generator)
        raise Stop


class NoiseOfStep(Plan):
    """The same of one sample, where the scheduler sees it first."""

    stubs = True

    def __init__(self, generator: torch.Generator | None):
        self.generator = generator


class Evaluation(Plan):
    """The velocity of one state at one time."""

    def __init__(self, calls: "Calls", x: Tensor, t: float):
        self.calls, self.x, self.t, self.dtype = calls, x, t, calls.dtype

    def set_timesteps(self, scheduler, own, kwargs) -> None:
        self.calls.set_times(scheduler, [self.t], kwargs)


class EvaluationOfStep(Plan):
    """The same by two steps, of which the first is for nothing but to give the loop its state."""

    stubs = True

    def __init__(self, calls: "Calls", x: Tensor, t: float):
        self.calls, self.state, self.t = calls, x, t

    def set_timesteps(self, scheduler, own, kwargs) -> None:
        self.calls.set_times(scheduler, [self.t] * 2, kwargs)

    def step(self, scheduler, model_output, sample) -> Tensor:
        if self.stubs:
            self.stubs = False
            return self.state.to(model_output.device, model_output.dtype, copy=True)
        return super().step(scheduler, model_output, sample)


class Steps(Plan):
    """Euler steps of the pipeline's own loop, with its networks at some of them: (number, state, output) of these.
    Elsewhere they give what they gave before, as a loop that depends on its step's number takes no notice."""

    stubs = True

    def __init__(self, calls: "Calls", times: list[float], places: Sequence[int]):
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
            same = sample.shape == self.after.shape and relative(sample, self.after) <= cast
            told = f"{type(calls.pipe).__name__}, which edits it"
            expect(same, "pipe", "a loop that goes on from the state that a step has made", told)
        if i in self.places:
            self.found.append((i, sample, model_output))
        if i == self.places[-1]:
            raise Stop
        h = self.times[i + 1] - self.times[i]
        self.after = (sample.float() + calls.sign * h * model_output.float()).to(model_output.dtype)
        self.i, self.stubs = i + 1, i + 1 not in self.places
        self.counts.clear()
        return self.after


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-30)).item()
