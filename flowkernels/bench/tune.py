"""`flowkernels tune`: the fastest configuration of each Triton kernel on the GPU at hand, written as a table.

A kernel's configurations are what its op's SEARCH spans. They are tried on cases of the benchmark that launch it, one
kernel after the other, the others at their best so far. Each is first compared with float64, within the benchmark's
bound, and measured once beside the shipped one; the best few then take turns with it, in an order that rotates. What
replaces it was faster in four rounds out of five.
"""

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from flowkernels import _options
from flowkernels._checks import expect
from flowkernels._files import expect_target, plain, sealed, whole_file, write_or_keep
from flowkernels.bench import suite
from flowkernels.bench.case import Case, Work
from flowkernels.bench.harness import Shares
from flowkernels.bench.timers import timer
from flowkernels.ops import tuned
from flowkernels.ops.public import OPS
from flowkernels.runtime import backends, environment

CASES = 3  # of the benchmark, for each kernel
FINALISTS = 3  # beside the shipped configuration
ROUNDS = 15
LEAST_GAIN = 0.01  # in four rounds out of five
NO_TIME = "the time was over"


@dataclass
class Tuned:
    """What was found for one kernel. Seconds are geometric means over its cases of medians over rounds."""

    kernel: str
    cases: list[str]
    shipped: dict
    best: dict
    shipped_seconds: float = math.nan  # of one that did not run
    best_seconds: float = math.nan
    tried: int = 0
    of: int = 0
    skipped: dict[str, str] = field(default_factory=dict)  # configuration -> why it did not run
    wrong: dict[str, str] = field(default_factory=dict)  # configuration -> by how much

    @property
    def runs(self) -> bool:
        return not math.isnan(self.best_seconds)


class Tuner:
    """clock: measures, see timers.py. say: takes a line of progress. wait: raises what a launch has left behind."""

    def __init__(self, clock, say: Callable[[str], Any] = lambda line: None, wait: Callable[[], Any] = lambda: None):
        self.clock, self.say, self.wait = clock, say, wait

    def cases_of(self, cases: Sequence[Case], configs: Mapping[str, dict]) -> dict[str, list[Case]]:
        """The kernels that these cases launch, each with a few of the cases that launch it."""
        from flowkernels.ops import triton_common

        found: dict[str, list[Case]] = {}
        for case in tqdm(cases, "cases", leave=False, file=sys.stderr):
            with triton_common.use(configs), triton_common.watch() as kernels:
                try:
                    _call(case.make())()
                    self.wait()
                except torch.OutOfMemoryError:
                    self.say(f"{case.name}: left out, it does not fit into the GPU's memory")
                    continue
                except Exception as e:  # of a kernel: its turn will show whether other configurations run
                    self.say(f"{case.name}: {_reason(e)}")
            for kernel in kernels:
                found.setdefault(kernel, []).append(case)
        return {kernel: _few(of_kernel) for kernel, of_kernel in found.items()}

    def search(
        self,
        kernel: str,
        candidates: Sequence[dict],
        works: Mapping[str, Work],
        configs: Mapping[str, dict],
        spent: Callable[[], bool] = lambda: False,
    ) -> Tuned:
        """The best of the candidates on these works by name; the first is the shipped one, and always tried.

        configs: of the other kernels. spent: whether the time is over.
        """
        from flowkernels.ops import triton_common

        found = Tuned(kernel, list(works), candidates[0], candidates[0], of=len(candidates))
        calls = [_call(work) for work in works.values()]
        loops: list[int] = []

        def seconds(i: int) -> list[float]:
            with triton_common.use({**configs, kernel: candidates[i]}):
                return [self.clock.seconds(call, n) for call, n in zip(calls, loops, strict=True)]

        base, ratios = None, {}  # the first that runs, and what others take beside it
        for i, config in enumerate(tqdm(candidates, kernel, leave=False, file=sys.stderr)):
            if i and spent():
                break
            found.tried += 1
            if not self._runs(found, config, works, calls, configs):
                continue
            if base is None:
                base = i
                with triton_common.use({**configs, kernel: config}):
                    loops = [self.clock.plan(call)[0] for call in calls]
            else:
                ratios[i] = _mean(a / b for a, b in zip(seconds(i), seconds(base), strict=True))
        if base is None:
            return found

        finalists = [base, *sorted(ratios, key=ratios.get)[:FINALISTS]]
        times: dict[int, list[list[float]]] = {i: [] for i in finalists}
        for r in range(ROUNDS):
            for k in range(len(finalists)):
                i = finalists[(k + r) % len(finalists)]
                times[i].append(seconds(i))
        medians = {i: _mean(map(statistics.median, zip(*times[i], strict=True))) for i in finalists}
        best = min((i for i in finalists if i == base or _faster(times[i], times[base])), key=medians.get)
        found.best, found.best_seconds = candidates[best], medians[best]
        found.shipped_seconds = medians.get(0, math.nan)
        return found

    def _runs(self, found: Tuned, config: dict, works: Mapping[str, Work], calls: list, configs) -> bool:
        """Whether every result is within its bound; notes why not."""
        from flowkernels.ops import triton_common

        for (case, work), call in zip(works.items(), calls, strict=True):
            try:
                with triton_common.use({**configs, found.kernel: config}):
                    result = call()
                    self.wait()
            except Exception as e:  # Triton's compiler raises of all kinds
                self._expect_usable(found.kernel, config, e)
                found.skipped[_words(config)] = _reason(e)
                return False
            error, bound = work.check(result)
            if not error <= bound:
                found.wrong[_words(config)] = f"{error:.2g} > {bound:.2g}, {case}"
                self.say(f"WRONG: {found.kernel} with {_words(config)}: error {found.wrong[_words(config)]}")
                return False
        return True

    def _expect_usable(self, kernel: str, config: dict, error: Exception) -> None:
        try:
            self.wait()
        except Exception:
            left = f"{kernel} with {_words(config)} left the GPU unusable for this process"
            raise RuntimeError(f"{left}: {_reason(error)}") from error


def candidates(shipped: dict, search: Mapping[str, Sequence]) -> list[dict]:
    """The shipped configuration, then all that its search spans."""
    others = ({**shipped, **dict(zip(search, values, strict=True))} for values in itertools.product(*search.values()))
    return [shipped, *(config for config in others if config != shipped)]


def _call(work: Work) -> Callable[[], Any]:
    """Ours, on Triton. The first provider takes what is chosen automatically or asked for."""
    name, ours = next(iter(work.calls.items()))
    assert name.startswith("flowkernels"), name

    def run():
        with backends.backend("triton"):
            return ours()

    return run


def _few(cases: list[Case]) -> list[Case]:
    """The quick ones, which matter most, the largest, and one from the middle."""
    others = sorted((case for case in cases if not case.quick), key=lambda case: case.size)
    middle = others[:-1][(len(others) - 1) // 2 :][:1]
    return [*(case for case in cases if case.quick), *others[-1:], *middle][:CASES]


def _mean(values) -> float:
    return statistics.geometric_mean(values)


def _faster(times: list[list[float]], base: list[list[float]]) -> bool:
    """By more than noise: in four rounds out of five, by LEAST_GAIN."""
    ratios = [_mean(a / b for a, b in zip(*pair, strict=True)) for pair in zip(times, base, strict=True)]
    return 5 * sum(ratio < 1 - LEAST_GAIN for ratio in ratios) >= 4 * len(ratios)


def _reason(e: Exception) -> str:
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    return f"{type(e).__name__}: {lines[0] if lines else ''}"


def _words(config: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in config.items())


# The command


def add_arguments(add: Callable) -> None:
    add("ops", nargs="*", metavar="OP", help=f"which of {', '.join(OPS)}; all if none is given")
    add("--device", default="cuda:0", help="GPU")
    add("--out", type=_options.path, help="file to write; the GPU's table in the user's cache if not given")
    add("--minutes", type=_options.above_0, help="what is not done by then stays as it is; no limit if not given")


def run(args: argparse.Namespace) -> int:
    """Tune and write the table; 1 if a configuration gave a wrong result."""
    unknown = sorted(set(args.ops) - set(OPS))
    expect(not unknown, "OP", f"one of {', '.join(OPS)}", ", ".join(unknown))
    device = _gpu(args.device)
    gpu = torch.cuda.get_device_name(device)
    path = args.out or tuned.default_path(gpu)
    before = _before(path, gpu)
    if args.out is None:
        path.parent.mkdir(parents=True, exist_ok=True)
    expect_target(path, "--out")
    with torch.cuda.device(device):
        tuner = Tuner(timer(device), lambda line: tqdm.write(line, file=sys.stderr), torch.cuda.synchronize)
        cases = {op: suite.cases(op, device) for op in args.ops or OPS}
        found, left = tune(cases, tuner, before.get("configs", {}), math.inf if args.minutes is None else args.minutes)
    print_table(found, left, args.minutes)
    if not any(t.runs for t in found):
        print(f"{path}: not written, nothing was tuned")
        return 1
    table = as_table(found, before, device)
    write_or_keep(path, "--out", lambda path: _write(path, table))
    tuned.of_device.cache_clear()
    print(f"{path}: {len(table['configs'])} kernels on {gpu}{_how_to_use(path, gpu)}")
    return int(any(t.wrong for t in found))


def _write(path: Path, table: dict) -> None:
    with whole_file(path) as partial:
        partial.write_text(json.dumps(sealed(plain(table)), indent=1) + "\n")


def _gpu(name: str) -> torch.device:
    """The GPU to tune for; ValueError says why there is none."""
    try:
        device, reason = torch.device(name), None
    except RuntimeError as e:
        device, reason = None, str(e).splitlines()[0]
    there = torch.cuda.device_count()
    if device is None:
        pass
    elif backends.triton_interpreted():
        reason = "TRITON_INTERPRET=1 has them interpreted, where time says nothing; unset it"
    elif device.type != "cuda":
        reason = "it is none"
    elif there and (device.index or 0) >= there:
        reason = f"there {'is' if there == 1 else 'are'} {there}, counted from 0"
    else:
        reason = backends.why_not("triton", device)
    expect(reason is None, "--device", "a GPU that Triton kernels run on", f"{name!r}: {reason}")
    return torch.device("cuda", device.index or 0)


def _before(path: Path, gpu: str) -> dict:
    """The table that is there: what is not tuned now is kept. Empty where there is none for this GPU."""
    if not path.exists():
        return {}
    try:
        return tuned.read(path, gpu)
    except ValueError as e:
        print(f"flowkernels: warning: what is replaced is kept in no part: {e}", file=sys.stderr)
        return {}


def tune(
    cases: Mapping[str, Sequence[Case]], tuner: Tuner, configs: Mapping[str, dict], minutes: float
) -> tuple[list[Tuned], dict[str, str]]:
    """Tune the ops that these are the cases of, from `configs` on. What was found, and kernels that were not tuned with
    the reason."""
    end = time.monotonic() + 60 * minutes
    found, left, best, tried, of_kernel = [], {}, dict(configs), {}, {}
    for op, of_op in cases.items():
        shipped, search = tuned.kernels(op)
        late = time.monotonic() >= end
        launched = {} if late else tuner.cases_of(of_op, configs)
        for kernel in search:
            if kernel in launched:
                of_kernel[kernel] = launched[kernel]
                tried[kernel] = candidates(shipped[kernel], search[kernel])
            else:
                left[kernel] = NO_TIME if late else "no case of the benchmark launches it"
    shares = Shares((end - time.monotonic()) / 60, {kernel: len(tried[kernel]) for kernel in tried})
    for kernel in tried:
        if time.monotonic() >= end:
            left[kernel] = NO_TIME
            continue
        shares.begin(kernel)
        works = {case.name: case.make() for case in of_kernel[kernel]}
        result = tuner.search(kernel, tried[kernel], works, best, shares.spent)
        tuner.say(_line(result))
        if result.runs:
            best[kernel] = result.best
        else:
            left[kernel] = "no configuration runs: " + next(iter((result.wrong | result.skipped).values()))
        found.append(result)
        del works
    return found, left


def _line(t: Tuned) -> str:
    left_out = "".join(f", {len(of)} {word}" for word, of in (("wrong", t.wrong), ("skipped", t.skipped)) if of)
    return f"{t.kernel}: {t.tried} of {t.of} configurations tried{left_out}, on {'; '.join(t.cases)}"


def as_table(found: Sequence[Tuned], before: Mapping[str, Any], device: torch.device) -> dict:
    """What is written: a table of this GPU, with what the one before has of other kernels."""
    import triton

    source = environment.provenance(device)
    ran = [t for t in found if t.runs]
    return {
        **dict(format=tuned.FORMAT, device=source["device"], driver=source["driver"], cuda=source["cuda"]),
        **dict(hip=torch.version.hip or "", torch=source["torch"], triton=triton.__version__),
        **{key: source[key] for key in ("flowkernels", "commit", "date")},
        "configs": {**before.get("configs", {}), **{t.kernel: t.best for t in ran}},
        "times": {**before.get("times", {}), **{t.kernel: _times(t) for t in ran}},
    }


def _times(t: Tuned) -> dict:
    """Of one kernel, for the table."""
    shipped = None if math.isnan(t.shipped_seconds) else round(1e6 * t.shipped_seconds, 3)
    return {
        **dict(shipped_us=shipped, best_us=round(1e6 * t.best_seconds, 3), cases=t.cases, tried=t.tried, of=t.of),
        **dict(skipped=t.skipped, wrong=t.wrong),
    }


def print_table(found: Sequence[Tuned], left: Mapping[str, str], minutes: float | None) -> None:
    print(f"{'':<28}{'shipped us':>12}{'best us':>12}  best configuration")
    for t in found:
        if not t.runs:
            continue
        times = (t.shipped_seconds, t.best_seconds)
        cells = "".join(f"{'-' if math.isnan(s) else format(1e6 * s, '.4g'):>12}" for s in times)
        same = " (as shipped)" if t.best == t.shipped else ""
        print(f"{t.kernel:<28}{cells}  {_words(t.best)}{same}")
    for t in found:
        for kind in ("wrong", "skipped"):
            reasons = list(getattr(t, kind).values())
            for reason in dict.fromkeys(reasons):
                print(f"{t.kernel}: {reasons.count(reason)} {kind.upper() if kind == 'wrong' else kind}: {reason}")
        if t.tried < t.of:
            print(f"{t.kernel}: {t.of - t.tried} of {t.of} configurations not tried, {minutes:g} minutes being over")
    for kernel, reason in left.items():
        print(f"{kernel}: stays as it is, {reason}")


def _how_to_use(path: Path, gpu: str) -> str:
    """How kernels get the table."""
    asked = tuned.asked()
    in_use = tuned.default_path(gpu) if asked is None else Path(asked) if asked else None
    if in_use is not None and in_use.absolute() == path.absolute():
        return ", used from now on"
    return f"; {tuned.VARIABLE}={path} makes use of it"
