"""Schedules and solvers in the forms that other samplers take: docs/card.md."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import torch
from torch import Tensor

from flowkernels import _checks
from flowkernels._checks import expect, expect_bool, expect_choice, expect_positive_int, one_of
from flowkernels._files import expect_target, plain, whole_file, whole_folder
from flowkernels.calibration.calibration import FITTED, Calibration
from flowkernels.schedule import Schedule
from flowkernels.solver import Solver, adams_bashforth, expect_solver

if TYPE_CHECKING:
    from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin


@dataclass(frozen=True)
class Receiver:
    """A sampler elsewhere.

    does: what it does with what it is given, in words, with the `{sampler}` that it is to run. suffixes: of the files
    that are written for it; none for a folder. whole: whether it takes coefficients, and so every solver. named: the
    solvers beside Euler's that it has by names of its own. scales: whether it begins at sigma[0] times the noise, and
    so not at the noise itself where that is below 1. other: what takes a solver that it has not. all_steps: whether it
    is given a calibration with all that it holds.
    """

    does: str
    suffixes: tuple[str, ...] = ()
    whole: bool = False
    named: tuple[str, ...] = ()
    scales: bool = False
    other: str = ""
    all_steps: bool = False


CARD = ".boss.json"
RECEIVERS = {
    "diffusers": Receiver(
        "the folder of a scheduler, which runs every solver at its own times, with no shift on top of them: "
        "pipe.scheduler = flowkernels.integrations.diffusers.SolverScheduler.from_pretrained(folder)",
        whole=True,
    ),
    "comfy": Receiver(
        "the text of ComfyUI's ManualSigmas, or as .json for a node of one's own: SamplerCustom runs the sigmas as "
        "they are, whatever the model's shift; choose the sampler {sampler}",
        suffixes=(".txt", ".json"),
        named=("heun",),
        scales=True,
        other="the node of 'comfy-nodes' runs it; ",
    ),
    "comfy-nodes": Receiver(
        "ComfyUI's nodes and a card for them: in its custom_nodes, NAME/CARD.boss.json, beside which the nodes are "
        "written; they run every solver, where flowkernels is installed for ComfyUI's Python",
        suffixes=(CARD,),
        whole=True,
        all_steps=True,
    ),
    "sdcpp": Receiver(
        "arguments of stable-diffusion.cpp, which runs the sigmas as they are, whatever --flow-shift",
        suffixes=(".txt",),
        named=("heun", "lms"),
        scales=True,
    ),
    "k-diffusion": Receiver(
        "sigmas for k_diffusion.sampling's sample_{sampler}, from the noise itself, with a model(x, sigma) that gives "
        "x + sigma v, where v = dx/dt at t = 1 - sigma",
        suffixes=(".pt",),
        named=("heun", "lms"),
    ),
    "timegrid": Receiver(
        "rising times, 0 = noise: the time_grid of flow_matching's ODESolver.sample(step_size=None, method='euler'), "
        "the t of torchdiffeq's odeint(method='euler')",
        suffixes=(".pt",),
    ),
    "numpy": Receiver(
        "float64 arrays for a loop of one's own: x[i+1] = start_coefficients[i] x[0] + sum over l <= i of "
        "coefficients[i, l] v(x[l], model_times[l])",
        suffixes=(".npz",),
        whole=True,
    ),
    "json": Receiver("the arrays of numpy as JSON, to the last digit", suffixes=(".json",), whole=True),
}
To = Literal["diffusers", "comfy", "comfy-nodes", "sdcpp", "k-diffusion", "timegrid", "numpy", "json"]
Plan = Calibration | Schedule | Solver | int | Sequence[float] | Tensor
ROUNDING = 1e-5  # of the noise: a start at sigma = 0.999999, as UniPC's, is one at 1
FOLDER = {"scheduler_config.json", "sigmas.json"}
NODES = '''"""flowkernels in ComfyUI: nodes for the cards (.boss.json) in this folder and in models/flowkernels."""

from flowkernels.integrations.comfy import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS, list_cards

list_cards(__file__)
'''


@overload
def export(
    plan: Plan, to: Literal["comfy", "comfy-nodes", "sdcpp"], *, steps: int | None = ..., path: str | Path | None = ...,
    knots_only: bool = ...,
) -> str: ...  # fmt: skip
@overload
def export(
    plan: Plan, to: Literal["k-diffusion", "timegrid"], *, steps: int | None = ..., path: str | Path | None = ...,
    knots_only: bool = ...,
) -> Tensor: ...  # fmt: skip
@overload
def export(
    plan: Plan, to: Literal["numpy"], *, steps: int | None = ..., path: str | Path | None = ..., knots_only: bool = ...
) -> dict[str, np.ndarray]: ...
@overload
def export(
    plan: Plan, to: Literal["json"], *, steps: int | None = ..., path: str | Path | None = ..., knots_only: bool = ...
) -> dict[str, Any]: ...
@overload
def export(
    plan: Plan, to: Literal["diffusers"], *, steps: int | None = ..., path: str | Path | None = ...,
    knots_only: bool = ..., like: "SchedulerMixin | None" = ...,
) -> "FlowMatchEulerDiscreteScheduler": ...  # fmt: skip
def export(
    plan: Plan,
    to: To,
    *,
    steps: int | None = None,
    path: str | Path | None = None,
    knots_only: bool = False,
    like: "SchedulerMixin | None" = None,
) -> Any:
    """A schedule or a solver in the form that another sampler takes.

    Args:
        plan: a Calibration, whose `best(steps)` is taken, a Solver, or what `fk.sample` takes as a schedule.
        to: who receives it, and what comes back for it.
            "diffusers": a scheduler for a pipeline, which needs diffusers; of a Calibration with all that it holds,
                where `steps` is None.
            "comfy": falling sigmas with the last 0 as text, for ComfyUI's ManualSigmas.
            "comfy-nodes": ComfyUI's nodes, the text of a module, which is written beside the card of a Calibration with
                all that it holds: `path` is CARD.boss.json in a folder of custom_nodes.
            "sdcpp": the arguments `--sigmas ... --sampling-method ... --steps ...` of stable-diffusion.cpp.
            "k-diffusion": falling sigmas with the last 0, float32 `[N+1]`.
            "timegrid": rising times, float32 `[N+1]`, for flow_matching and torchdiffeq.
            "numpy": float64 arrays: times `[N+1]`, sigmas `[N+1]`, model_times `[M]`, coefficients `[M, M]`,
                start_coefficients `[M]`.
            "json": the same as plain values, with the name, steps and evaluations, and the solver's notes.
        steps: which N of a Calibration; not needed where it holds one.
        path: a file to write as well: .txt (for "comfy" a .json too), .pt for tensors, .npz, .json; for "diffusers" a
            folder, in which a plain Euler schedule has its sigmas for the stock scheduler beside it.
        knots_only: where the receiver cannot run all of a plan, export its knots for Euler's steps, of a Calibration
            those of its best schedule.
        like: for "diffusers" the scheduler that it replaces, as `solver_scheduler` has it; None for one of a pipeline
            that calls its network at 1000 sigma, as most do.

    Sigmas are those at which the network is called: a shift is in them already. `RECEIVERS` in this module says what
    each receiver does with them; docs/card.md says what was read and what was run.

    Raises:
        ValueError: naming the argument; also where the receiver would run something else: for coefficients that it
            does not take (with how much worse Euler's steps on the knots are, where that is known), for a start below
            sigma = 1 where it scales the noise by it, for knots that are equal in float32.
        FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError: where `path` cannot be written.

    Examples:
        >>> fk.export([0, 0.1, 0.3, 0.6, 1], "comfy")
        '1.0, 0.9, 0.7, 0.4, 0.0'
        >>> fk.export(fk.Solver.heun(2), "sdcpp")
        '--sigmas 1.0,0.5,0.0 --sampling-method heun --steps 2'
    """
    made = Export(plan, to, steps, knots_only, like)
    if path is not None:
        made.write(made.expect_path(path))
    return made.value


class Export:
    """What `export` returns and writes, and what is said of it.

    value: as `export` has it. text: the same for a screen; None where there is none. words: what the receiver does.
    told: what it is. solver: that; None where it is all of a calibration.
    """

    def __init__(
        self,
        plan: Plan,
        to: str,
        steps: int | None = None,
        knots_only: bool = False,
        like: "SchedulerMixin | None" = None,
    ):
        self.to, self.receiver = to, RECEIVERS[expect_choice(to, "to", list(RECEIVERS))]
        self.knots_only = expect_bool(knots_only, "knots_only")
        expect(like is None or to == "diffusers", "like", f"None for {to!r}", like)
        self.plan, self.like, self.solver, self.sampler, dropped = plan, like, None, "", ""
        held = _held(plan) if isinstance(plan, Calibration) else []
        if self.receiver.all_steps:
            known = isinstance(plan, Calibration)
            expect(known, "plan", "a Calibration, whose card is written", plan, TypeError)
            expect(steps is None, "steps", f"None for {to!r}, which has all of them", steps)
            self.told = f"{', '.join(map(str, held))} steps"
        elif to == "diffusers" and steps is None and len(held) > 1:
            self.told = f"{', '.join(map(str, held))} steps, the best of each"
        else:
            self.solver, self.sampler, dropped = self._chosen(plan, steps)
            self.told = f"{self.solver.steps} steps, {self.solver.evaluations} evaluations ({self.solver.name})"
            dropped += self._expect_start(self.solver)
        self.value, self.text = getattr(self, f"_{to.replace('-', '_')}")()
        self.words = f"{to}: {self.receiver.does.format(sampler=self.sampler)}{dropped}"

    def _expect_start(self, solver: Solver) -> str:
        """What becomes of the noise, in words, where that is another state than the plan's."""
        expect(solver.reaches_data, "plan", "a solver from noise to data", solver)
        begins = 1 - max(0.0, solver.times[0].item())
        if begins > 1 - ROUNDING or not self.receiver.scales:
            return ""
        told = f"{self.to!r} begins at sigma[0] = {begins:.6g} times the noise"
        got = f"{solver}; {told}, and not at the noise (knots_only=True (--knots-only): this will do)"
        expect(self.knots_only, "plan", "a start at sigma = 1", got)
        return f"; {told}, where the plan begins at the noise itself"

    def _chosen(self, plan: Plan, steps: int | None) -> tuple[Solver, str, str]:
        """The solver that is exported, the receiver's sampler, and what has been left out, in words."""
        if isinstance(plan, Calibration):
            N = _steps_of(plan, steps)
            choices, errors, found = plan.choices(N), plan.errors(N), Solver.of(plan.best(N))
            euler, fitted = Solver.of(plan.best_schedule(N)), choices.get(FITTED)
            of_schedules = [errors[name] for name in errors if isinstance(choices.get(name), Schedule)]
            both = (errors.get(FITTED), min(of_schedules, default=None)) if found is fitted else (None, None)
            how = "endpoint errors on the verification noise"
        else:
            expect(steps is None, "steps", "None for a plan that is no Calibration", steps)
            found = expect_solver(plan, "plan")
            euler = found if found.is_inverse else Solver.euler(found.times)
            held_out = found.notes.get("held_out")
            held_out = held_out if isinstance(held_out, Mapping) else {}
            both, how = (held_out.get(found.name), held_out.get("euler")), "endpoint errors on the held-out samples"
        sampler = "" if self.receiver.whole else _sampler(found, self.receiver)
        if sampler is not None:
            return found, sampler, ""
        known = all(isinstance(e, float) for e in both)
        worse = f"{both[0]:.3g} with it, {both[1]:.3g} without: {how}" if known else "how much worse is not known"
        named, knots = one_of(["euler", *self.receiver.named]), ", ".join(f"{t:.3g}" for t in euler.times)
        got = f"{found.name!r} of {found.steps} steps, of which more than the knots would be lost ({worse}); "
        got += f"{self.receiver.other}knots_only=True (--knots-only) exports Euler's steps on the knots [{knots}]"
        expect(self.knots_only, "plan", f"a solver that {self.to!r} has ({named})", got)
        return euler, "euler", f"; all but the knots of {found.name!r} is left out ({worse})"

    @property
    def _sigmas(self) -> Tensor:
        """float32 `[N+1]`, falling, 0 at last."""
        sigmas = (1 - self.solver.times).float()
        sigmas[-1] = 0  # which it is to 1e-12
        falls = bool((sigmas.diff() < 0).all())
        expect(falls, "plan", "knots whose sigmas differ in float32", f"{self.solver}")
        return sigmas

    def _numbers(self) -> list[str]:
        """Never with an exponent, which ManualSigmas takes for another number."""
        return [np.format_float_positional(sigma, trim="0") for sigma in self._sigmas.numpy()]

    def _comfy(self) -> tuple[str, str]:
        return (text := ", ".join(self._numbers())), text

    def _comfy_nodes(self) -> tuple[str, str]:
        return NODES, NODES

    def _sdcpp(self) -> tuple[str, str]:
        numbers = ",".join(self._numbers())
        text = f"--sigmas {numbers} --sampling-method {self.sampler.split('(')[0]} --steps {self.solver.steps}"
        if self.sampler.startswith("lms"):  # whose default takes later velocities for the older ones
            text += f" --extra-sample-args lms_max_order={self.sampler[-2]},lms_shift=0"
        return text, text

    def _k_diffusion(self) -> tuple[Tensor, str]:
        return self._sigmas, f"[{', '.join(self._numbers())}]"

    def _timegrid(self) -> tuple[Tensor, str]:
        times = self.solver.times.clamp(0, 1).float()
        expect(bool((times.diff() > 0).all()), "plan", "knots that differ in float32", f"{self.solver}")
        return times, f"[{', '.join(np.format_float_positional(t, trim='0') for t in times.numpy())}]"

    def _numpy(self) -> tuple[dict[str, np.ndarray], None]:
        solver = self.solver
        tables = dict(times=solver.times, sigmas=1 - solver.times, model_times=solver.model_times)
        tables |= dict(coefficients=solver.coefficients, start_coefficients=solver.start_coefficients)
        return {k: t.numpy().copy() for k, t in tables.items()}, None

    def _json(self) -> tuple[dict[str, Any], str]:
        solver, tables = self.solver, {k: t.tolist() for k, t in self._numpy()[0].items()}
        data = dict(name=solver.name, steps=solver.steps, evaluations=solver.evaluations, **tables)
        data["notes"] = plain(solver.notes)
        return data, json.dumps(data, indent=1)

    def _diffusers(self) -> tuple["FlowMatchEulerDiscreteScheduler", None]:
        from diffusers import FlowMatchEulerDiscreteScheduler

        from flowkernels.integrations.diffusers import solver_scheduler

        like = FlowMatchEulerDiscreteScheduler() if self.like is None else self.like
        return solver_scheduler(self.plan if self.solver is None else self.solver, like=like), None

    # Files

    def expect_path(
        self, path: str | Path, name: str = "path", inputs: Iterable[tuple[str, str | Path | None]] = ()
    ) -> Path:
        """Where it can be written, as an absolute path; inputs as `expect_target` takes them."""
        suffixes = self.receiver.suffixes
        if not suffixes:
            return _expect_folder(path, name)
        find = _expect_beside if self.to == "comfy-nodes" else expect_target
        target = find(path, name, inputs)
        fits = str(path).endswith(suffixes)
        expect(fits, name, f"a file name ending in {' or '.join(suffixes)}", str(path))
        return target

    def write(self, path: Path) -> None:
        """Whole or not at all, at what `expect_path` gave."""
        if not self.receiver.suffixes:
            with whole_folder(path) as folder:
                self.value.save_config(folder)
                if self.solver is not None and self.solver.is_euler:
                    note = "FlowMatchEulerDiscreteScheduler(shift=1.0).set_timesteps(sigmas=sigmas)"
                    data = {"sigmas": self._sigmas[:-1].tolist(), "for": note}
                    (folder / "sigmas.json").write_text(json.dumps(data, indent=1))
            return
        if self.to == "comfy-nodes":
            path.parent.mkdir(exist_ok=True)
            with whole_file(path.parent / "__init__.py") as partial:
                partial.write_text(NODES)
            self.plan.save(path)
            return
        with whole_file(path) as partial, open(partial, "wb") as file:
            if path.suffix == ".pt":
                torch.save(self.value, file)
            elif path.suffix == ".npz":
                np.savez(file, **self.value)
            elif self.to == "comfy" and path.suffix == ".json":
                file.write(json.dumps({"sigmas": [float(number) for number in self._numbers()]}, indent=1).encode())
            else:
                file.write(f"{self.text}\n".encode())


def _held(calibration: Calibration) -> list[int]:
    return sorted({*calibration.schedules, *calibration.solvers})


def _steps_of(calibration: Calibration, steps: int | None) -> int:
    there = _held(calibration)
    if steps is None:
        expect(len(there) == 1, "steps", f"one of {there}", "None")
        return there[0]
    expect_positive_int(steps, "steps")
    expect(steps in there, "steps", f"one of {there}", steps)
    return steps


def _sampler(solver: Solver, receiver: Receiver) -> str | None:
    """The receiver's own name for a solver, if it has one."""
    if solver.is_euler:
        return "euler"
    if solver.is_inverse or solver.evaluations > 2 * solver.steps or not solver.keeps_start:
        return None
    named = {"euler": Solver.euler(solver.times)}
    if "heun" in receiver.named:
        named["heun"] = Solver.heun(solver.times)
    if "lms" in receiver.named:  # its first steps are of lower order, as ours
        orders = range(2, min(4, solver.steps) + 1)
        named |= {f"lms(order={p})": adams_bashforth(solver.times, p) for p in orders}
    for name, known in named.items():
        same = torch.equal(known.model_times, solver.model_times)
        if same and torch.allclose(known.coefficients, solver.coefficients, rtol=0, atol=1e-12):
            return name
    return None


def _expect_beside(path: str | Path, name: str, inputs: Iterable[tuple[str, str | Path | None]]) -> Path:
    """A card in a folder with ComfyUI's nodes: in one that has them, an empty one, or one that is still to be made."""
    target = Path(os.path.realpath(_checks.expect_path(path, name)))
    folder, module = target.parent, target.parent / "__init__.py"
    own = f"CARD{CARD} in a folder of its own in ComfyUI's custom_nodes"
    expect(folder.name != "custom_nodes", name, own, str(path))
    if not folder.exists():
        there = folder.parent.is_dir() and os.access(folder.parent, os.W_OK | os.X_OK)
        expect(there, name, "a folder, or one in a folder that can be written to", str(path), FileNotFoundError)
        return target
    expect_target(target, name, inputs), expect_target(module, name)
    ours = not module.exists() or module.read_bytes() == NODES.encode()
    expect(ours, name, own, f"{path}, beside which there is another {module.name}")
    return target


def _expect_folder(path: str | Path, name: str) -> Path:
    """A folder for a scheduler: a new one, an empty one, or one that holds a scheduler and nothing else."""
    target = Path(os.path.realpath(_checks.expect_path(path, name)))
    inside = f"{path}, of a pipeline that would go on to load it as the class in its model_index.json"
    outside = "a folder outside of a pipeline's (pipe.scheduler takes it, and pipe.save_pretrained keeps it)"
    expect(not (target.parent / "model_index.json").exists(), name, outside, inside)
    if not target.is_dir():
        expect(not target.exists(), name, "a folder", f"the file {path}", NotADirectoryError)
        return expect_target(target, name)
    writable = os.access(target.parent, os.W_OK | os.X_OK)
    expect(writable, name, "a folder that exists and can be written to", str(target.parent), PermissionError)
    foreign = sorted({entry.name for entry in target.iterdir()} - FOLDER)
    holds = f"{path} with {foreign[0]!r} in it" if foreign else ""
    expect(not foreign, name, "a new folder, or one that holds a scheduler alone", holds)
    return target
