"""The arguments of a pipeline's call, for a batch of its prompts."""

import inspect
import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowkernels._checks import expect
from flowkernels.integrations.diffusers.prepared import rebuilt

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

OURS = "num_inference_steps sigmas timesteps latents output_type return_dict"
OURS = frozenset(f"{OURS} callback callback_steps callback_on_step_end callback_on_step_end_tensor_inputs".split())
TEXT = re.compile(r"prompt(_\d+)?")  # a text for all samples; pipelines repeat a negative one by themselves
OF_PROMPTS = re.compile(r"(negative_)?(pooled_)?prompt.*")  # texts, embeddings and masks: one for each prompt


class Arguments:
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
        self.given, self.parameters = rebuilt(given), parameters  # which a caller may write to
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
        found = rebuilt(self.given)
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
