"""What `calibrate(effort="fit" | "best")` tries for each number of steps, and what it takes."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from tqdm import tqdm

from flowkernels.calibration.calibration import Calibration
from flowkernels.calibration.card import BELLMAN, UNIFORM
from flowkernels.calibration.fit import fit_candidates, schedule_on_grid
from flowkernels.calibration.progress import Progress
from flowkernels.calibration.samples import HELD_OUT, Samples, held_out_last
from flowkernels.calibration.selection import Candidate
from flowkernels.calibration.tried import Tried, plan_hash, ranked
from flowkernels.evaluation.endpoint import endpoint_errors
from flowkernels.schedule import Schedule
from flowkernels.solver import Solver, adams_bashforth
from flowkernels.velocity.protocol import VelocityBase

EFFORTS = SCHEDULE, FIT = "schedule", "fit"


def try_plans(
    velocity: VelocityBase, cal: Calibration, steps: Sequence[int], effort: str, chunk: int, done: Progress, bar: bool
) -> None:
    """Fill `tried` and `solvers` of a calibration made just now of the very velocity.

    done: takes what was tried, and has what was tried before.
    """
    with tqdm(total=len(steps), desc=effort, disable=not bar, leave=False, unit="N") as shown:
        search = Search(velocity, cal, chunk, done)
        for N in steps:
            search.basics(N)
            shown.update()
    cal.tried.update({N: ranked(search.found[N]) for N in steps})
    for N, of in cal.tried.items():
        solvers = [c.plan for c in of if c.failed is None and isinstance(c.plan, Solver)]
        if solvers:
            cal.solvers[N] = solvers[0]
    cal.provenance["effort"] = {"level": effort, "samples": search.data.n}


class Search:
    """Tries plans on the samples that a calibration keeps.

    found: {N: [Candidate]}, no two with equal plans.
    """

    def __init__(self, velocity: VelocityBase, cal: Calibration, chunk: int, done: Progress):
        self.cal, self.done, self.found = cal, done, {}
        data = Samples.of(velocity, cal, None, chunk, proven=True)
        order, self.fitted = held_out_last(data.n, HELD_OUT)
        self.data = data.in_order(order)

    def basics(self, N: int) -> None:
        """Uniform steps, the Bellman schedule, Adams-Bashforth on both and a fit."""
        plan = schedule_on_grid(self.cal, N)
        plans = {UNIFORM: self.cal.uniform(N), BELLMAN: plan}
        plans |= {f"adams-bashforth 2, {name}": adams_bashforth(of, 2) for name, of in plans.items()}
        self.task(N, "basics", lambda: [*self.judged(plans.items()), *self.fits(N, {BELLMAN: plan})])

    def fits(self, N: int, plans: dict[str, Schedule]) -> Iterable[Candidate]:
        """With errors of cross-validation, on the samples that other plans are judged on."""
        for name, plan in plans.items():
            (found,) = fit_candidates(self.data, {name: plan}, ways={"": (False, True)})
            spent = round(found.evaluations * self.data.n)
            yield replace(found, name=f"fit, {name}", errors=found.errors[self.fitted :], evaluations=spent)

    def judged(self, plans: Iterable[tuple[str, Schedule | Solver]]) -> Iterable[Candidate]:
        """Plans that were fitted to none of the samples."""
        rows, data = slice(self.fitted, self.data.n), self.data
        for name, plan in plans:
            before, began = data.teacher.evaluations, time.perf_counter()
            try:
                start, first = data.state(data.start[0])[rows], data.velocity_at_start()[rows]
                _, x = data.teacher.run(Solver.of(plan), start, (first,), rows.start)
                errors = endpoint_errors(x, data.state(-1)[rows]).double().cpu()
                failed = None if bool(torch.isfinite(errors).all()) else "NaN or Inf at the end"
            except (ValueError, RuntimeError) as e:
                failed = f"{type(e).__name__}: {e}"
            spent = data.teacher.evaluations - before, time.perf_counter() - began
            yield (
                Tried(name, plan, failed=failed, evaluations=spent[0], seconds=spent[1])
                if failed
                else Candidate(name, plan, errors, *spent)
            )

    def task(self, N: int, key: str, make: Callable[[], Iterable[Candidate]]) -> None:
        """Add what `make` finds for N steps, or what was found for this key before."""
        key, there = f"{N} {key}", self.found.setdefault(N, [])
        if key not in self.done.tried:
            made = list(make())
            with self.done.changes():
                self.done.tried[key] = made
        hashes = {plan_hash(c.plan) for c in there}
        for c in self.done.tried[key]:
            if plan_hash(c.plan) not in hashes:
                there.append(c)
                hashes.add(plan_hash(c.plan))
