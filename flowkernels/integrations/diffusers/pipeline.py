"""A diffusers pipeline as a velocity: `pipeline_velocity`."""

import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

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
)
from flowkernels.integrations.diffusers.arguments import Arguments
from flowkernels.integrations.diffusers.calls import Calls
from flowkernels.integrations.diffusers.scheduler import expect_flow
from flowkernels.velocity.protocol import VelocityBase
from flowkernels.velocity.provenance import Identity, network_identity

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

MOST_STEPS = 100_000


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
        cal = fk.calibrate(v, v.noise(64), grid=v.grid(50), steps=[4, 8], effort="fit")

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
    velocity = PipelineVelocity(Calls(given, Arguments(given, arguments, shared)), batch_size)
    if check:
        velocity._calls.expect_velocity()
    return velocity


class PipelineVelocity(VelocityBase):
    """What `pipeline_velocity` makes.

    provenance: what a calibration made with it depends on beside weights: pipeline, shape of latents, size, guidance,
    scheduler and its shift, boundary, number of prompts, dtype.
    forced_knots: the first time of the second network, for pipelines that change networks (Wan 2.2).
    """

    def __init__(self, calls: "Calls", batch_size: int | None, places: Tensor | None = None):
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
    expect_flow(scheduler, "pipe.scheduler")
    parameters = inspect.signature(type(pipe).__call__).parameters
    told = f"{type(pipe).__name__}, which begins at an image (calibrate the pipeline that begins at noise)"
    expect("strength" not in parameters, "pipe", "a pipeline that begins at noise", told)
    for name, part in pipe.components.items():
        cached = getattr(part, "is_cache_enabled", False) is True
        expect(not cached, f"pipe.{name}", "a network without a cache of steps before (disable_cache)", "one with it")
    return pipe
