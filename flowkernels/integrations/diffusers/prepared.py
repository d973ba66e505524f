"""What a pipeline's call prepares of prompts, images and latents, kept for the next."""

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flowkernels._checks import expect
from flowkernels.integrations.diffusers.plans import Noise, NoiseOfStep, Plan

PROCESSED = ("preprocess", "preprocess_video", "resize")  # of processors


class Prepared:
    """The methods of a copy of a pipeline that prepare prompts, images and latents: results as they come, or those of a
    call before, in the same order.

    results: {(name, how many times it was called before): result, state of the generator after}.
    complete: whether the loop has begun, so that there is nothing more to come.
    """

    def __init__(
        self,
        pipe,
        plan: Plan,
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
            self.pipe.__dict__[name] = Stub(network, functools.partial(self._output, name, network))

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
            return rebuilt(result)
        self._inside = True
        try:
            with self._drawing(), torch.inference_mode(False), torch.no_grad():  # kept for use outside of it too
                result = make()
        finally:
            self._inside = False
        self.results[key] = result, None if self.generator is None else self.generator.get_state()
        return rebuilt(result)

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
            if isinstance(plan, NoiseOfStep):  # drawn anew, and so what the pipeline makes of it
                return own(*args, **kwargs)

            def again(n: int, generator: torch.Generator | None) -> Tensor:
                asked = inspect.signature(own).bind(*args, **kwargs)
                asked.apply_defaults()
                batch = next((name for name in ("batch_size", "bsz") if name in asked.arguments), None)
                expect(batch is not None, "pipe", "prepare_latents of a batch_size", f"{list(asked.arguments)}")
                changes = {batch: n, "generator": generator}
                asked.arguments.update({k: v for k, v in changes.items() if k in asked.arguments})
                return latents_of(own(*asked.args, **asked.kwargs))

            if isinstance(plan, Noise):
                plan.prepared(None, again)
            result = self._result("prepare_latents", lambda: own(*args, **kwargs))
            latents = latents_of(result)
            plan.prepared(latents, again)
            if plan.x is None:
                return result
            expected = f"a state of shape {list(latents.shape)}, as the pipeline's latents"
            expect(plan.x.shape == latents.shape, "x", expected, plan.x)
            x = plan.x.to(latents.device, plan.dtype or latents.dtype, copy=True)
            return x if isinstance(result, Tensor) else type(result)([x, *result[1:]])

        return prepare_latents


class Stub:
    """A network to a pipeline, called otherwise."""

    def __init__(self, network: nn.Module, call: Callable):
        self._network, self._call = network, call

    __class__ = property(lambda self: type(self._network))

    def __getattr__(self, name: str):
        return getattr(self._network, name)

    def __call__(self, *args, **kwargs):
        return self._call(*args, **kwargs)


def latents_of(result) -> Tensor:
    latents = result if isinstance(result, Tensor) else result[0] if isinstance(result, (tuple, list)) else None
    expect(isinstance(latents, Tensor), "pipe", "latents of prepare_latents, or these first", type(result).__name__)
    return latents


def rebuilt(result):
    """Containers anew, which a pipeline may write to; their tensors shared."""
    if type(result) in (list, tuple):
        return type(result)(map(rebuilt, result))
    return {k: rebuilt(v) for k, v in result.items()} if type(result) is dict else result
