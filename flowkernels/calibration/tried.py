"""`Tried`: a plan for N steps that a calibration has tried, as it is kept, stored and reported."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from flowkernels._checks import expect, expect_int, expect_numbers, expect_real, expect_text, expect_times
from flowkernels._files import plain
from flowkernels.calibration.selection import Candidate, choose
from flowkernels.evaluation.bootstrap import mean_interval
from flowkernels.sampling.teacher_solver import ENTRY
from flowkernels.schedule import Schedule
from flowkernels.solver import Solver
from flowkernels.velocity.hashes import tensors_hash

PIPELINE = "pipeline"  # of a provenance: the settings of the one that it is for
# of a network that is not defined at all times or all batches, and of what no plan comes of; else a calibration ends
FAILURES = (ValueError, TypeError, RuntimeError, LookupError, ArithmeticError, AssertionError)


def _no_errors() -> Tensor:
    return torch.zeros(0, dtype=torch.float64, device="cpu")


@dataclass(frozen=True, eq=False)
class Tried(Candidate):
    """A plan that was tried, with its figures.

    errors: of each sample (`Candidate`), NaN of one that has not judged it; of one from a file, empty. error: their
    mean. interval: of 95 % of it, None of fewer than two samples. samples: how many they are. failed: why there is no
    error, None where there is one. decided: of the best of its N, whether it is better than the next for certain
    (95 %); needed: about how many samples would decide, None where that is not known.

    evaluations: of single samples, all that it took, whatever their number was. seconds: that they took.

    Examples:
        >>> velocity, noise = (lambda x, t: x * t[:, None] ** 4), torch.randn(64, 2)
        >>> cal = fk.calibrate(velocity, noise, 20, [2], effort="fit", progress=False)
        >>> cal.tried[2][0].plan is cal.best(2), cal.tried[2][0].samples
        (True, 64)
    """

    errors: Tensor = field(default_factory=_no_errors)
    error: float = math.nan
    interval: tuple[float, float] | None = None
    samples: int = 0
    failed: str | None = None
    decided: bool = True
    needed: int | None = None


def better(candidates: Sequence[Candidate]) -> int:
    """The place of the best, by the samples that have judged all of them; where all samples have judged that one, of
    those that all have judged the best. An error is NaN where a sample has not."""
    judged = ~torch.stack([c.errors for c in candidates]).isnan()
    rows = judged.all(0)
    best = choose([replace(c, errors=c.errors[rows]) for c in candidates]).best
    if not judged[best].all():
        return best
    whole = [i for i, c in enumerate(candidates) if judged[i].all()]
    return whole[choose([candidates[i] for i in whole]).best]


def ranked(candidates: Sequence[Candidate]) -> list[Tried]:
    """The best first (`better`), the others by their errors, those that have none last."""
    known = [c for c in candidates if getattr(c, "failed", None) is None]
    failed = [tried_of(c) for c in candidates if getattr(c, "failed", None) is not None]
    if not known:
        return failed
    best = better(known)
    rows = ~known[best].errors.isnan()
    rivals = [c for c in known if not c.errors[rows].isnan().any()]
    choice = choose([replace(c, errors=c.errors[rows]) for c in rivals])
    first = tried_of(known[best], choice.decided, choice.needed)
    others = [tried_of(c) for i, c in enumerate(known) if i != best]
    return [first, *sorted(others, key=lambda c: c.error), *failed]


def tried_of(c: Candidate, decided: bool = True, needed: int | None = None) -> Tried:
    """A candidate with its figures."""
    known = c.errors[~c.errors.isnan()]
    error = known.mean().item() if len(known) else math.nan
    interval, failed = mean_interval(known), getattr(c, "failed", None)
    of = (c.name, c.plan, c.errors, float(c.evaluations), c.seconds)
    return Tried(*of, error, interval, len(known), failed, decided, needed)


def plan_hash(plan: Schedule | Solver) -> str:
    """Of what decides its samples."""
    parts = ("times",)
    if isinstance(plan, Solver):
        parts = ("times", "model_times", "coefficients", *(() if plan.keeps_start else ("start_coefficients",)))
    return tensors_hash({part: getattr(plan, part) for part in parts})


def own_notes(plan: Schedule | Solver) -> dict:
    """Those that do not come of the calibration's provenance."""
    return {k: v for k, v in plan.notes.items() if k not in (PIPELINE, ENTRY)}


def plan_to_dict(plan: Schedule | Solver) -> dict:
    """As a file has it: {"schedule": {times, indices, notes}} or {"solver": {..}}."""
    if isinstance(plan, Solver):
        return {"solver": plan.to_dict() | {"notes": plain(own_notes(plan))}}
    of = {"times": plan.times.tolist(), "indices": None if plan.indices is None else list(plan.indices)}
    return {"schedule": of | {"cost": plan.cost, "uniform_cost": plan.uniform_cost, "notes": plain(own_notes(plan))}}


def plan_from_dict(data: Mapping[str, Any], name: str, grid: Tensor) -> Schedule | Solver:
    """ValueError for what is no plan."""
    expect(isinstance(data, dict) and len(data) == 1, name, "a schedule or a solver", data)
    ((kind, of),) = data.items()
    expect(kind in ("schedule", "solver") and isinstance(of, dict), name, "a schedule or a solver", kind)
    if kind == "solver":
        return Solver.from_dict(of)
    expect_numbers(of["times"], f"{name}.times")
    on_it = of.get("indices") is not None
    known = dict(cost=of.get("cost"), uniform_cost=of.get("uniform_cost"), notes=of.get("notes", {}))
    places = dict(grid=grid, indices=tuple(of["indices"])) if on_it else {}
    return Schedule(expect_times(of["times"], f"{name}.times"), **places, **known)


def to_dict(tried: Tried) -> dict:
    """The entry of a card."""
    found = {"name": tried.name, "samples": tried.samples, "evaluations": tried.evaluations, "seconds": tried.seconds}
    if tried.failed is not None:
        return plain(found | {"failed": tried.failed, "plan": plan_to_dict(tried.plan)})
    found |= {"error": tried.error} | ({} if tried.interval is None else {"interval": list(tried.interval)})
    found |= {} if tried.decided else {"decided": False, "needed": tried.needed}
    return plain(found | {"plan": plan_to_dict(tried.plan)})


def from_dict(data: Any, name: str, grid: Tensor, N: int | None = None) -> Tried:
    """What a card's entry is of, checked. N: of how many evaluations the plan is to be."""
    expect(isinstance(data, dict), name, "an object", data)
    plan, least = plan_from_dict(data["plan"], f"{name}.plan", grid), "a number of at least 0"
    made = Solver.of(plan).evaluations
    expect(N in (None, made), f"{name}.plan", f"one of {N} evaluations", f"{made}")
    of = {"name": expect_text(data["name"], f"{name}.name"), "plan": plan}
    expect(abs(plan.times.min() - grid[0]) <= 1e-9, f"{name}.plan", f"one from {grid[0]:g}", f"{plan.times.min():g}")
    for entry in ("evaluations", "seconds"):
        of[entry] = expect_real(data[entry], f"{name}.{entry}", least, lambda v: v >= 0)
    of["samples"] = expect_int(data["samples"], f"{name}.samples", "a number of samples", 0)
    if "failed" in data:
        return Tried(**of, failed=expect_text(data["failed"], f"{name}.failed"))
    of["error"] = expect_real(data["error"], f"{name}.error", least, lambda v: v >= 0)
    if "interval" in data:
        low, high = expect_numbers(data["interval"], f"{name}.interval", 2)
        expect(0 <= low <= high, f"{name}.interval", "[low, high]", data["interval"])
        of["interval"] = (low, high)
    if "decided" in data:
        expect(data["decided"] is False, f"{name}.decided", "false, or no entry", data["decided"])
        needed = data["needed"]
        of |= {"decided": False}
        of["needed"] = needed if needed is None else expect_int(needed, f"{name}.needed", "a number of samples", 1)
    return Tried(**of)


def effort_of(data: Any, name: str) -> None:
    """Check a provenance's entry of what was tried: its level, samples and evaluations, and what was skipped."""
    expect(isinstance(data, dict), name, "an object", data)
    expect_text(data["level"], f"{name}.level")
    for entry in ("samples", "evaluations"):
        expect_int(data[entry], f"{name}.{entry}", "a number of at least 0", 0)
    skipped = data.get("skipped", {})
    expect(isinstance(skipped, dict), f"{name}.skipped", "an object", skipped)
    for what, why in skipped.items():
        expect_text(why, f"{name}.skipped.{what}")


def table(tried: Mapping[int, Sequence[Tried]], best: Mapping[int, str]) -> list[str]:
    """Lines of `Calibration.report`: N, name, root mean square of the error with its interval, evaluations, seconds."""
    width = max([len(c.name) for of in tried.values() for c in of], default=4)
    lines = [f"{'N':>3}   {'name':<{width}} {'rms':>9}  {'95 % interval':<17} {'evaluations':>12} {'seconds':>8}"]
    for n, of in sorted(tried.items()):
        lines.append("")
        for c in of:
            mark = "*" if c.name == best.get(n) else " "
            figures = f"{c.evaluations:>12,.0f} {c.seconds:>8.2f}"
            if c.failed is not None:
                lines.append(f"{n:>3} {mark} {c.name:<{width}} {'-':>9}  {'':<17} {figures}  failed: {c.failed:.200}")
                continue
            between = "" if c.interval is None else "{:.3g}..{:.3g}".format(*(max(e, 0) ** 0.5 for e in c.interval))
            lines.append(f"{n:>3} {mark} {c.name:<{width}} {c.error**0.5:>9.4g}  {between:<17} {figures}".rstrip())
        if of and not of[0].decided:
            more = f"; about {of[0].needed:,} would decide" if of[0].needed else ""
            lines.append(f"      undecided on {of[0].samples:,} samples{more}")
    return lines
