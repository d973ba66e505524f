"""ComfyUI: nodes that run a card's schedules and solvers in SamplerCustom and SamplerCustomAdvanced.

    # custom_nodes/flowkernels/__init__.py, which `flowkernels export CARD --to comfy-nodes --out FOLDER` writes
    from flowkernels.integrations.comfy import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS, list_cards

    list_cards(__file__)

ComfyUI's models of flow matching (of its model sampling CONST) denoise: `model(x, sigma)` is x + sigma v, where v is
dx/dt at t = 1 - sigma. Its samplers begin at sigma noise + (1 - sigma) latent, of the first sigma: the state there.
Written against commit a125cd8 (0.3.64, 2025-10-12); docs/integrations/comfy.md says what ran. Nothing of ComfyUI is
imported before it is needed.
"""

import hashlib
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from flowkernels._casts import no_grad
from flowkernels._checks import (
    FLOATS,
    FlowError,
    expect,
    expect_callable,
    expect_choice,
    expect_mapping,
    expect_path,
    expect_tensor,
)
from flowkernels.calibration.calibration import Calibration
from flowkernels.sampling.loop import OPS, evaluated_steps, initial_state
from flowkernels.schedule import Schedule
from flowkernels.solver import Solver, expect_solver
from flowkernels.velocity.protocol import VelocityBase

SAME = 1e-5  # between sigmas: of other nodes they come in float32, or with few digits
FOLDER, CARD = "flowkernels", ".boss.json"
SOLVERS: dict[str, Callable[[Tensor], Solver]] = {
    "euler": Solver.euler,
    "heun": Solver.heun,
    **{f"adams-bashforth {p}": partial(Solver.adams_bashforth, order=p) for p in (2, 3, 4)},
}


def solver_sigmas(plan: Schedule | Solver | int | Sequence[float] | Tensor) -> Tensor:
    """What ComfyUI calls SIGMAS: 1 - t at a plan's knots, falling, the last 0, float32 `[N+1]` on the CPU.

    Raises TypeError, ValueError, naming `plan`, for an inversion, and for knots that are one in float32.

    Examples:
        >>> solver_sigmas([0, 0.25, 1])
        tensor([1.0000, 0.7500, 0.0000])
    """
    solver = _expect_plan(plan)
    sigmas = _sigmas(solver.times)
    expect(bool((sigmas.diff() < 0).all()), "plan", "knots whose sigmas differ in float32", solver)
    return sigmas


def solver_sampler(plan: Schedule | Solver | int | Sequence[float] | Tensor | str) -> "SolverSampler":
    """A sampler function for `comfy.samplers.KSAMPLER`: all evaluations of a solver, at its own model times.

    Args:
        plan: what `fk.sample` takes as a schedule, such as `cal.best(4)`. It takes the SIGMAS of its own knots; of
            Euler's and Heun's steps any of these, one after the other, as SplitSigmas and SplitSigmasDenoise leave
            them. Or a name, "euler", "heun" or "adams-bashforth 2" to "4": that solver on whatever SIGMAS it is given.

    What it returns is called as `sampler(model, x, sigmas, extra_args=None, callback=None, disable=None)`, with x
    `[n, *shape]`, and returns the last state in x's dtype; states are float32, whatever the model computes in. The
    callback is told at the first evaluation of each step.

    Raises:
        TypeError, ValueError: naming `plan`, for an inversion, and for model times at or after t = 1, where a model
            that denoises has no velocity. When it runs: naming `sigmas`, for others than its own; `model`, for one that
            is none of flow matching; `latent_image`, for an empty one where a plan begins below sigma = 1, which
            ComfyUI would begin at sigma times the noise. FlowError for NaN or Inf in the samples.

    Examples:
        >>> solver_sampler(fk.Solver.adams_bashforth([0, 0.5, 1]))
        SolverSampler('adams-bashforth 2', steps=2, evaluations=2)
    """
    return SolverSampler(plan)


class SolverSampler:
    """What `solver_sampler` returns."""

    def __init__(self, plan: Schedule | Solver | int | Sequence[float] | Tensor | str):
        self.plan, self.make = None, None
        if isinstance(plan, str):
            self.name, self.make = expect_choice(plan, "plan", list(SOLVERS)), SOLVERS[plan]
        else:
            self.plan = _expect_plan(plan)
            self.name, self.make = self.plan.name, _restarts(self.plan)
        self.__name__ = self.name  # which ComfyUI logs

    def __repr__(self) -> str:
        of = "" if self.plan is None else f", steps={self.plan.steps}, evaluations={self.plan.evaluations}"
        return f"SolverSampler({self.name!r}{of})"

    @no_grad
    def __call__(
        self,
        model: Callable[..., Tensor],
        x: Tensor,
        sigmas: Tensor,
        extra_args: dict[str, Any] | None = None,
        callback: Callable[[dict[str, Any]], Any] | None = None,
        disable: bool | None = None,
    ) -> Tensor:
        expect_tensor(x, "x", FLOATS)
        expect(expect_tensor(sigmas, "sigmas").dim() == 1, "sigmas", "falling numbers in one dimension", sigmas)
        if callback is not None:
            expect_callable(callback, "callback", "a function of a dict, or None")
        extra = {} if extra_args is None else expect_mapping(extra_args, "extra_args")
        if len(sigmas) < 2:
            return x
        solver, evaluations = self._chosen(sigmas)
        _expect_flow(model)
        if self.plan is not None:
            _expect_start(model, sigmas)
        steps = len(sigmas) - 1
        first = [i == 0 or i * steps // evaluations > (i - 1) * steps // evaluations for i in range(evaluations)]
        flow = _Flow(model, extra, sigmas, first, callback)
        state = initial_state(x)
        made = evaluated_steps(flow, state, solver, flow.model_times(solver.model_times, state), functions=OPS)
        made = itertools.islice(made, evaluations)  # each of them a state of its own, which nodes may keep
        for step in tqdm(made, self.name, evaluations, disable=disable):
            state, _ = step
        finite, got = bool(torch.isfinite(state).all()), "NaN or Inf in the samples (float16 may overflow)"
        expect(finite, "model", "finite samples", got, FlowError)
        return state.to(x.dtype)

    def _chosen(self, sigmas: Tensor) -> tuple[Solver, int]:
        """What runs on these sigmas, and how many of its evaluations."""
        given = sigmas.detach().cpu().double()  # in this order: not every device has float64
        falls = given.dim() == 1 and bool((given.diff() < 0).all())
        expect(falls and bool(given[-1] >= 0), "sigmas", "falling numbers, none below 0", _shown(sigmas))
        if self.plan is None:
            expect(bool(given[0] <= 1 + SAME), "sigmas", "none above 1: those of a flow", _shown(sigmas))
            return self._part((1 - given).clamp(min=0))
        own = _sigmas(self.plan.times).double()
        if len(own) == len(given) and bool((own - given).abs().max() <= SAME):
            return self.plan, self.plan.evaluations
        first = int((own - given[0]).abs().argmin())
        there = own[first : first + len(given)]
        part = len(there) == len(given) and bool((there - given).abs().max() <= SAME)
        if part and self.make is not None:
            return self._part(self.plan.times[first : first + len(given)])
        way_out = "of the same node" if self.make is None else "of the same node, or some in a row of them"
        if part:
            way_out += f", as {self.name!r} runs whole (Euler's and Heun's steps take parts of their sigmas)"
        expect(False, "sigmas", f"{_shown(own)}, the SIGMAS {way_out}", _shown(sigmas))

    def _part(self, times: Tensor) -> tuple[Solver, int]:
        """On times that may end before 1: a last step to there is left out, and so is its evaluation."""
        whole = times[-1] > 1 - 1e-12
        solver = self.make(times if whole else torch.cat([times, times.new_ones(1)]))
        return solver, solver.evaluations - (not whole)


class _Flow(VelocityBase):
    """A model that denoises, as a velocity. Its time is sigma: `model_times` makes it of t in float64."""

    def __init__(
        self, model, extra_args: Mapping[str, Any], sigmas: Tensor, first: list[bool], callback: Callable | None
    ):
        self.model, self.extra_args, self.sigmas, self.callback = model, extra_args, sigmas, callback
        self.first, self.calls, self.step = first, 0, 0

    def model_times(self, times: Tensor, x: Tensor) -> Tensor:
        return super().model_times(1 - times, x)

    def velocities(self, x: Tensor, t: Tensor, embedding=None) -> tuple[Tensor, None, float]:
        denoised, first = self.model(x, t, **self.extra_args), self.first[self.calls]
        like = expect_tensor(denoised, "model", FLOATS).shape == x.shape
        expect(like, "model", f"denoised states of x's shape {list(x.shape)}", denoised)
        v = (denoised.to(x.dtype) - x) / t.reshape(-1, *[1] * (x.dim() - 1))  # before the callback, which may write
        self.calls += 1
        if first:
            if self.callback is not None:
                told = self.sigmas[self.step]
                self.callback(dict(x=x, i=self.step, sigma=told, sigma_hat=told, denoised=denoised))
            self.step += 1
        return v, None, 1.0


def _expect_plan(plan) -> Solver:
    if isinstance(plan, Calibration):
        expect(False, "plan", "one plan of it: cal.best(N)", "a Calibration", TypeError)
    solver = expect_solver(plan, "plan")
    expect(solver.reaches_data, "plan", "a solver from noise to data", solver)
    before = bool(((1 - solver.model_times).float() > 0).all())
    expect(before, "plan", "model times before t = 1, where a model that denoises has no velocity", solver)
    return solver


def _sigmas(times: Tensor) -> Tensor:
    sigmas = (1 - times).float()
    sigmas[-1] = 0  # which it is to 1e-12
    return sigmas


def _shown(sigmas: Tensor) -> str:
    return f"[{', '.join(f'{s:.6g}' for s in sigmas.flatten().tolist())}]"


def _restarts(solver: Solver) -> Callable[[Tensor], Solver] | None:
    """What makes the same steps of some of its knots; None where a step knows of more than its own state."""
    if solver.is_euler:
        return Solver.euler
    if solver.evaluations != 2 * solver.steps - 1 or not solver.keeps_start:
        return None
    heun = Solver.heun(solver.times)
    same = torch.equal(heun.model_times, solver.model_times)
    same = same and torch.allclose(heun.coefficients, solver.coefficients, rtol=0, atol=1e-12)
    return Solver.heun if same else None


def _expect_flow(model) -> None:
    from comfy.model_sampling import CONST

    sampling = getattr(getattr(getattr(model, "inner_model", None), "inner_model", None), "model_sampling", None)
    kinds = ", ".join(kind.__name__ for kind in type(sampling).__bases__)
    told = f"one with {kinds}" if sampling is not None else "one without inner_model.inner_model.model_sampling"
    expect(isinstance(sampling, CONST), "model", "one of flow matching, with ComfyUI's model sampling CONST", told)


def _expect_start(model, sigmas: Tensor) -> None:
    latent, begins = getattr(model, "latent_image", None), sigmas[0].item()
    empty = latent is not None and begins < 1 - SAME and not bool(latent.any())
    got = f"an empty one, of which ComfyUI makes {begins:.6g} times the noise"
    expect(not empty, "latent_image", f"a latent to begin with at sigma = {begins:.6g}, or sigmas from 1 on", got)


# ---- nodes ----


def list_cards(path: str | Path | None = None) -> list[str]:
    """The cards in ComfyUI's `models/flowkernels`, and in the folders that extra_model_paths.yaml has as `flowkernels`.

    path: a folder with cards that is listed as well from now on, or a file in it.
    """
    import folder_paths

    folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))
    if path is not None:
        given = expect_path(path, "path").resolve()
        folder_paths.add_model_folder_path(FOLDER, str(given if given.is_dir() else given.parent))
    return [name for name in folder_paths.get_filename_list(FOLDER) if name.endswith(CARD)]


def _card_file(card: str) -> str:
    import folder_paths

    list_cards()
    return folder_paths.get_full_path_or_raise(FOLDER, card)


class _CardNode:
    """A node with a card and a number of steps."""

    CATEGORY = "sampling/custom_sampling/flowkernels"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        steps = {"default": 4, "min": 1, "max": 10000, "tooltip": "One that the card has."}
        return {"required": {"card": (list_cards(),), "steps": ("INT", steps)}}

    @classmethod
    def IS_CHANGED(cls, card: str, steps: int) -> str:
        return hashlib.sha256(Path(_card_file(card)).read_bytes()).hexdigest()


class CardSigmas(_CardNode):
    """SIGMAS of a card's schedule, for the sampler euler."""

    RETURN_TYPES, FUNCTION, DESCRIPTION = ("SIGMAS",), "sigmas", __doc__

    def sigmas(self, card: str, steps: int) -> tuple[Tensor]:
        return (solver_sigmas(Calibration.load(_card_file(card)).best_schedule(steps)),)


class CardSampler(_CardNode):
    """The best plan of a card, solvers included, as a SAMPLER with the SIGMAS that it takes."""

    RETURN_TYPES, FUNCTION, DESCRIPTION = ("SAMPLER", "SIGMAS"), "sampler", __doc__

    def sampler(self, card: str, steps: int) -> tuple[Any, Tensor]:
        from comfy.samplers import KSAMPLER

        plan = Calibration.load(_card_file(card)).best(steps)
        return KSAMPLER(solver_sampler(plan)), solver_sigmas(plan)


class SolverSelect:
    """A solver by name as a SAMPLER, for any SIGMAS of a flow, whole or in part."""

    CATEGORY = _CardNode.CATEGORY
    RETURN_TYPES, FUNCTION, DESCRIPTION = ("SAMPLER",), "sampler", __doc__

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"solver": (list(SOLVERS), {"default": "adams-bashforth 2"})}}

    def sampler(self, solver: str) -> tuple[Any]:
        from comfy.samplers import KSAMPLER

        return (KSAMPLER(solver_sampler(solver)),)


NODE_CLASS_MAPPINGS = {
    "FlowkernelsCardSampler": CardSampler,
    "FlowkernelsCardSigmas": CardSigmas,
    "FlowkernelsSolver": SolverSelect,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "FlowkernelsCardSampler": "Sampler of a card (flowkernels)",
    "FlowkernelsCardSigmas": "Sigmas of a card (flowkernels)",
    "FlowkernelsSolver": "Solver (flowkernels)",
}
