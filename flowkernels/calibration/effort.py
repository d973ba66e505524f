"""What `calibrate(effort="fit" | "best")` tries for each number of evaluations, in which order, and what it takes."""

import contextlib
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from tqdm import tqdm

from flowkernels._warnings import held_warnings
from flowkernels.calibration.calibration import Calibration
from flowkernels.calibration.card import BELLMAN, UNIFORM
from flowkernels.calibration.fit import WAYS, fit_candidates, schedule_on_grid
from flowkernels.calibration.neighbours import is_multistep, merged, split
from flowkernels.calibration.progress import Progress
from flowkernels.calibration.refine import ROBUST_FIRST, Refinement, price, refine
from flowkernels.calibration.samples import Samples
from flowkernels.calibration.selection import Candidate
from flowkernels.calibration.stock import stock_solvers
from flowkernels.calibration.tried import FAILURES, Tried, better, plan_hash, ranked
from flowkernels.runtime.ranks import Ranks
from flowkernels.schedule import Schedule
from flowkernels.solver import Solver, adams_bashforth
from flowkernels.velocity.protocol import VelocityBase

EFFORTS = SCHEDULE, FIT, BEST = "schedule", "fit", "best"
REFINEMENTS, FEW = 3, 4  # "best" has a budget for as many of each N where nothing is said, twice where N is few
JUDGES = 4  # one in so many samples judges what is hardly ever the best
SHIFTS = (1.0, 3.0)  # of stock samplers
SAMPLES = range(32, 65)  # that objectives evaluate, about one in 8
# objectives whose knots are fitted, and how many times K evaluations of each of so many samples they take about
KNOTS = {"student": 1, "norm": 0, "uniform": 0, "free": 5, "oss": 1, "pairs": 0, "gits": 0, "squared": 0, "endpoint": 5}
FITS = 0.4  # of what a budget leaves, for fits before refinements
NO_BUDGET = "no budget"
STEPWISE = ("student", "oss")  # as many for each step of the largest N
CHOSEN = {"": (False, True)}  # a fit with x_0's coefficient free or not, as its own cross-validation chooses
# a neighbour's best, or what the best that was refined began as: a refinement of what has seen all samples would not be
# judged by samples that it has not seen
FEWER, MORE, AGAIN = "fewer", "more", "again"
PLAIN, ROBUST, FREE = Refinement(), Refinement(ROBUST_FIRST), Refinement(ROBUST_FIRST, True)
LONG = replace(FREE, iterations=3 * FREE.iterations)
TIMES = "free"  # Euler at model times of its own: far off, but it leads into valleys that fits are not in
# turns of refinements: what is refined (a number is a place among those that were not), and how
TURNS = (
    *((0, ROBUST), (TIMES, FREE), (FEWER, FREE), (AGAIN, LONG), (1, FREE), (MORE, FREE), (0, PLAIN), (2, ROBUST)),
    *((0, FREE), (AGAIN, replace(PLAIN, iterations=LONG.iterations)), (FEWER, ROBUST), (1, ROBUST), (3, FREE)),
    *((MORE, ROBUST), (1, PLAIN), (4, FREE), (AGAIN, LONG), (5, ROBUST)),
)


@dataclass
class Budget:
    """Evaluations of single samples, in all, and the time by which they end; either may be Inf. evaluations: None for
    what some refinements of each number of evaluations take."""

    evaluations: float | None
    deadline: float
    ranks: Ranks = field(default_factory=Ranks)  # of which the first one's clock decides

    @classmethod
    def of(cls, evaluations: int | None, minutes: float | None, ranks: Ranks | None = None) -> "Budget":
        """From now on."""
        ranks = ranks or Ranks()
        if minutes is None:
            return cls(evaluations, math.inf, ranks)
        return cls(math.inf if evaluations is None else evaluations, time.monotonic() + 60 * minutes, ranks)

    def part(self, share: float, spent: float) -> "Budget":
        """A share of what is left, from now on."""
        now = time.monotonic()
        evaluations, deadline = spent + share * (self.evaluations - spent), now + share * (self.deadline - now)
        return replace(self, evaluations=evaluations, deadline=deadline)

    def allows(self, spent: float, more: float, seconds_each: float) -> bool:
        return spent + more <= self.evaluations and self.in_time(more, seconds_each)

    def in_time(self, evaluations: float, seconds_each: float) -> bool:
        if self.deadline == math.inf:
            return True
        return self.ranks.from_first(time.monotonic() + evaluations * seconds_each <= self.deadline)


def try_plans(
    velocity: VelocityBase,
    cal: Calibration,
    steps: Sequence[int],
    effort: str,
    chunk: int,
    done: Progress,
    bar: bool,
    budget: Budget,
    spent: int,
    seconds_each: float,
) -> None:
    """Fill `tried` and `solvers` of a calibration made just now of the very velocity.

    done: takes what was tried, and has what was tried before. spent: evaluations of single samples that the rollout
    took; seconds_each: what one took, 0 where none was made.
    """
    search, total = Search(velocity, cal, chunk, done, budget, spent, seconds_each), None
    if effort == FIT:
        total = 2 * sum(steps) * search.data.n
    else:
        if budget.evaluations is None:
            budget.evaluations = search.default(steps)
        if budget.evaluations < math.inf:
            total = int(budget.evaluations) - spent
        if bar:
            tqdm.write(f"calibrate: {search.told()}", file=sys.stderr)  # as progress bars are
    with tqdm(total=total, desc=effort, disable=not bar, leave=False, unit="eval", unit_scale=True) as search.bar:
        for N in steps:
            search.basics(N)
        if effort == BEST:
            try:
                search.widen(steps)
            except KeyboardInterrupt:
                search.skipped["the rest"] = "interrupted"
    cal.tried.update({N: ranked(search.found[N]) for N in steps})
    for N, of in cal.tried.items():
        solvers = [c.plan for c in of if c.failed is None and isinstance(c.plan, Solver)]
        if solvers:
            cal.solvers[N] = solvers[0]
    known = {"level": effort, "samples": search.data.n, "evaluations": int(search.spent)}
    cal.provenance["effort"] = known | ({"skipped": search.skipped} if search.skipped else {})


class Search:
    """Tries plans on the samples that a calibration keeps.

    found: {N: [Candidate]}, no two with equal plans; the errors of those that some samples alone judged are NaN for the
    others. few: samples that objectives evaluate. spent: evaluations of single samples, the rollout's with them.
    skipped: what was not tried, and why.
    """

    def __init__(
        self,
        velocity: VelocityBase,
        cal: Calibration,
        chunk: int,
        done: Progress,
        budget: Budget,
        spent: int,
        seconds_each: float,
    ):
        self.velocity, self.cal, self.chunk, self.done, self.budget = velocity, cal, chunk, done, budget
        self.data = Samples.of(velocity, cal, None, chunk, proven=True, ranks=budget.ranks)
        self.found: dict[int, list[Candidate]] = {}
        self.counted: set[str] = set()  # keys of tasks
        self.skipped: dict[str, str] = {}
        self.began: dict[str, Candidate] = {}  # hashes of plans: what they were refined from
        self.spent, self.seconds_each = float(spent), seconds_each
        self.took: dict[str, tuple[float, float]] = {}  # by the kind of task: evaluations made now, and seconds
        self.bar = None
        n = self.data.n
        self.few = min(n, max(SAMPLES[0], min(SAMPLES[-1], n // 8)))
        some = torch.randperm(n, generator=torch.Generator("cpu").manual_seed(0), device="cpu")[: max(2, n // JUDGES)]
        self.some = some.sort().values  # rows of samples come in an order, of labels perhaps

    def default(self, steps: Sequence[int]) -> int:
        """The evaluations that a budget is where nothing is said."""
        n, K = self.data.n, len(self.cal.times) - 1
        knots = sum(KNOTS[k] * (steps[-1] if k in STEPWISE else 1) for k in KNOTS) * K * self.few
        once = sum(N * (3 * len(KNOTS) + 2) for N in steps)
        once += sum(REFINEMENTS * (1 + (N <= FEW)) * price(self.data, Solver.euler(N), PLAIN) for N in steps)
        stock = sum(16 * N * len(self.some) for N in steps)
        return int(self.spent + knots + n * once + stock)

    def told(self) -> str:
        """What it may take."""
        left = self.budget.evaluations - self.spent
        if left < math.inf:
            minutes = "" if not self.seconds_each else f", about {left * self.seconds_each / 60:.2g} minutes"
            return f"up to {left:,.0f} evaluations of single samples more{minutes}"
        left = max(0.0, self.budget.deadline - time.monotonic())
        each = f", about {left / self.seconds_each:,.0f} evaluations of single samples" if self.seconds_each else ""
        return f"up to {left / 60:.2g} minutes more{each}"

    def basics(self, N: int) -> None:
        """Uniform steps, the Bellman schedule, Adams-Bashforth on both and a fit: 2 N evaluations a sample at most."""
        plan = schedule_on_grid(self.cal, N)
        plans = {UNIFORM: self.cal.uniform(N), BELLMAN: plan}
        plans |= {f"{name}, adams-bashforth 2": adams_bashforth(of, 2) for name, of in plans.items()}
        self.task(N, "basics", lambda: itertools.chain(self.judged(plans), self.fits({BELLMAN: plan}, CHOSEN)))

    def widen(self, steps: Sequence[int]) -> None:
        """All else: what costs little for every N first, then refinements, of every N as many, and with what they leave
        the fits that there was no room for before them."""
        whole = self.budget
        self.budget = whole.part(FITS, self.spent)
        for N in steps:
            self.stock(N)
        for name in KNOTS:
            self.knots(name, steps)
        self.budget = whole
        for N in steps:
            self.complete(N)
        for turn in TURNS:
            for N in steps:
                self.refine(N, *turn, steps)
        for name in [name for name in KNOTS if self.skipped.get(f"knots of {name}") == NO_BUDGET]:
            self.knots(name, steps)
        for N in steps:
            self.complete(N)

    def stock(self, N: int) -> None:
        """Samplers that pipelines come with, on their own knots, or on uniform ones where not every knot is free."""
        late = self.data.start[1] > 0 or self.cal.forced
        plans = stock_solvers(self.cal.uniform(N)) if late else stock_solvers(N, shift=SHIFTS)
        if N % 2 and N > 1:
            with contextlib.suppress(ValueError):  # fewer steps than forced knots take
                plans["heun"] = Solver.heun(self.cal.uniform((N + 1) // 2))
        if self.affords(len(plans) * N * len(self.some), f"stock samplers, N = {N}", "stock"):
            self.task(N, "stock", lambda: self.judged({f"stock {name}": plan for name, plan in plans.items()}))

    def knots(self, name: str, steps: Sequence[int]) -> None:
        """Fits on the knots that an objective finds, with x_0's coefficient free and not."""
        key, K = f"knots of {name}", len(self.cal.times) - 1
        own = KNOTS[name] * K * (steps[-1] if name in STEPWISE else 1) * self.few
        if not self.affords(own + 2 * sum(steps) * self.data.n, key):
            return
        plans = {}
        if any(f"{N} {key}" not in self.done.tried for N in steps):
            options = {"velocity": self.velocity, "chunk": self.chunk, "samples": self.few} if KNOTS[name] else {}
            try:
                with held_warnings():  # of the very velocity; and what comes of them is measured
                    plans = self.cal.find(steps, objective=name, group=self.budget.ranks, **options)
            except FAILURES as e:
                self.skipped[key] = f"{type(e).__name__}: {e}"
                return
            notes = plans[steps[0]].notes
            own = notes.get("evaluations", 0) * notes.get("samples", 0)
        for N in steps:
            extra = own if steps[0] == N else 0
            self.task(N, key, lambda N=N, extra=extra: self.on_knots(name, plans[N], extra))

    def on_knots(self, name: str, plan: Schedule | Solver, extra: float) -> Iterator[Candidate]:
        """Fits, and a solver as it is."""
        yield from self.fits({name: plan}, extra=extra)
        if isinstance(plan, Solver):
            yield from self.judged({name: plan})

    def fits(
        self, plans: dict[str, Schedule | Solver], ways: Mapping[str, Sequence[bool]] = WAYS, extra: float = 0
    ) -> Iterator[Candidate]:
        """On the knots of plans. extra: evaluations that finding them took."""
        for name, plan in plans.items():
            begun = time.perf_counter()
            knots = Schedule(plan.times)
            try:
                for c in self.in_all(fit_candidates(self.data, {name: knots}, ways=ways)):
                    yield replace(c, evaluations=c.evaluations + extra)
                    extra = 0
            except FAILURES as e:
                yield self.failure(f"{name}, fitted", plan, e, 0, time.perf_counter() - begun)

    def in_all(self, candidates: Iterable[Candidate]) -> Iterator[Candidate]:
        """Evaluations of all samples."""
        return (replace(c, evaluations=c.evaluations * self.data.n) for c in candidates)

    def judged(self, plans: dict[str, Schedule | Solver], rows: Tensor | None = None) -> Iterator[Candidate]:
        """Plans that were fitted to no sample, on some of them."""
        rows = self.some if rows is None else rows
        part = self.data.in_order(rows.tolist())
        start, end, first = part.state(part.start[0]), part.state(-1), part.velocity_at_start()
        for name, plan in plans.items():
            before, begun, solver = part.teacher.evaluations, time.perf_counter(), Solver.of(plan)
            past = (first,) if abs(solver.model_times[0].item() - part.start[1]) <= 1e-12 else ()
            try:
                found = part.errors_of(solver, start, end, past)
                if not torch.isfinite(found).all():
                    raise ValueError("NaN or Inf in the samples")
            except FAILURES as e:
                taken = part.teacher.evaluations - before, time.perf_counter() - begun
                yield self.failure(name, plan, e, *taken)
                continue
            errors = torch.full((self.data.n,), math.nan, dtype=torch.float64, device="cpu")
            errors[rows] = found
            yield Candidate(name, plan, errors, part.teacher.evaluations - before, time.perf_counter() - begun)

    def failure(self, name: str, plan: Schedule | Solver, e: Exception, evaluations: float, seconds: float) -> Tried:
        none = torch.full((self.data.n,), math.nan, dtype=torch.float64, device="cpu")
        failed = f"{type(e).__name__}: {e}"
        return Tried(name, plan, none, evaluations, seconds, samples=0, failed=failed)

    def complete(self, N: int) -> None:
        """Let all samples judge what is the best by some, or may be."""
        for _ in range(4):
            known = [c for c in self.found[N] if getattr(c, "failed", None) is None]
            chosen = known[better(known)] if known else None
            rest = None if chosen is None else torch.isnan(chosen.errors).nonzero().flatten()
            if rest is None or not len(rest) or not self.affords(len(rest) * N, f"all samples, N = {N}"):
                return
            (more,) = self.task(
                N,
                f"complete {plan_hash(chosen.plan)}",
                lambda c=chosen, r=rest: self.judged({c.name: c.plan}, r),
                add=False,
            )
            if getattr(more, "failed", None) is not None:
                whole = more
            else:
                errors = torch.where(torch.isnan(chosen.errors), more.errors, chosen.errors)
                taken = chosen.evaluations + more.evaluations, chosen.seconds + more.seconds
                whole = replace(chosen, errors=errors, evaluations=taken[0], seconds=taken[1])
            self.found[N] = [whole if c is chosen else c for c in self.found[N]]

    def refine(self, N: int, which: int | str, how: Refinement, steps: Sequence[int]) -> None:
        """One more refinement, where there is budget for it."""
        start = self.start_of(N, which, steps)
        if start is None or start.plan.is_inverse:
            return
        if not self.affords(price(self.data, start.plan, how) * self.data.n, f"more refinements, N = {N}", "refine"):
            return

        def make() -> Iterator[Candidate]:
            begun = time.perf_counter()
            try:
                yield from self.in_all(
                    refine(self.data, [start], self.cal.times, forced=self.cal.forced, refinements=[how])
                )
            except FAILURES as e:
                yield self.failure(f"{start.name}, refined ({how})", start.plan, e, 0, time.perf_counter() - begun)

        for c in self.task(N, f"refine {plan_hash(start.plan)} {how}", make):
            self.began.setdefault(plan_hash(c.plan), start)

    def start_of(self, N: int, which: int | str, steps: Sequence[int]) -> Candidate | None:
        """What is refined: of what all samples have judged the start of the best that was refined, the one at a place
        among those that were not, one by name, or a neighbour's best."""
        if which in (FEWER, MORE):
            return self.neighbour(N, which, steps)
        if which == TIMES:
            return next((c for c in self.found[N] if c.name == TIMES and getattr(c, "failed", None) is None), None)
        known = [replace(c, plan=Solver.of(c.plan)) for c in self.whole(N)]
        known.sort(key=lambda c: c.errors.mean().item())
        if which == AGAIN:
            return next((self.began[h] for c in known if (h := plan_hash(c.plan)) in self.began), None)
        fresh = []  # of those on the same knots the best
        for c in known:
            if ", refined" not in c.name and not any(torch.equal(c.plan.times, other.plan.times) for other in fresh):
                fresh.append(c)
        return fresh[which] if which < len(fresh) else None

    def whole(self, N: int) -> list[Candidate]:
        """Those that all samples have judged."""
        known = (c for c in self.found[N] if getattr(c, "failed", None) is None)
        return [c for c in known if not torch.isnan(c.errors).any()]

    def neighbour(self, N: int, which: str, steps: Sequence[int]) -> Candidate | None:
        """The best of the nearest number of evaluations below or above, with steps split or merged; None where that is
        not within a half."""
        near = [n for n in steps if (n < N if which == FEWER else n > N) and abs(n - N) <= max(1, N // 2)]
        near = sorted(near, key=lambda n: abs(n - N))
        for n in near[:1]:
            known = [c for c in self.whole(n) if is_multistep(Solver.of(c.plan))]
            best = min(known, key=lambda c: c.errors.mean().item(), default=None)
            if best is None:
                return None
            best = replace(best, name=f"that of N = {n}", plan=Solver.of(best.plan))
            for M in range(n, N, 1 if n < N else -1):
                if n < N:
                    best = replace(best, plan=split(best.plan))
                    continue
                plans = {f"merged {i} of {M}": p for i, p in merged(best.plan, self.cal.forced_knots).items()}
                if not plans or not self.affords(len(plans) * N * len(self.some), f"merged steps, N = {N}"):
                    return None
                tried = self.task(N, f"merged {plan_hash(best.plan)}", lambda p=plans: self.judged(p), add=False)
                tried = [c for c in tried if getattr(c, "failed", None) is None]
                if not tried:
                    return None
                best = replace(best, plan=min(tried, key=lambda c: c.errors.nanmean().item()).plan)
            return best
        return None

    def affords(self, evaluations: float, what: str, kind: str = "") -> bool:
        """Whether there is budget for as many of single samples; else it is said that they were skipped. What one takes
        is what those of tasks of this kind did, where that is more than the rollout's: batches may be smaller, or
        networks slower at other times."""
        made, seconds = self.took.get(kind, (0.0, 0.0))
        each = max(self.seconds_each, seconds / made if made else 0.0)
        ok = self.budget.allows(self.spent, evaluations, each)
        if ok:
            self.skipped.pop(what, None)
        else:
            self.skipped[what] = NO_BUDGET
        return ok

    def task(self, N: int, key: str, make: Callable[[], Iterable[Candidate]], add: bool = True) -> list[Candidate]:
        """What `make` finds for N evaluations, or what was found for this key before; `add`ed to what was found."""
        key, there = f"{N} {key}", self.found.setdefault(N, [])
        if key not in self.done.tried:
            kind, begun = key.split()[1], time.monotonic()
            made = self.budget.ranks.from_first(list(make()))  # with its seconds
            before, evaluations = self.took.get(kind, (0.0, 0.0)), sum(c.evaluations for c in made)
            self.took[kind] = before[0] + evaluations, before[1] + time.monotonic() - begun
            with self.done.changes():
                self.done.tried[key] = made
        if key not in self.counted:
            self.counted.add(key)
            spent = sum(c.evaluations for c in self.done.tried[key])
            self.spent += spent
            if self.bar is not None:
                self.bar.update(int(spent))
        hashes, names = {plan_hash(c.plan) for c in there}, {c.name for c in there}
        for c in self.done.tried[key] if add else ():
            if plan_hash(c.plan) not in hashes:
                name, i = c.name, 2
                while name in names:
                    name, i = f"{c.name}, {i}", i + 1
                there.append(c if name == c.name else replace(c, name=name))
                hashes.add(plan_hash(c.plan)), names.add(name)
        return self.done.tried[key]
