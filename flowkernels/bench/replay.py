"""`flowkernels replay`: the calls that a program has made, stored by `flowkernels record`, and each backend on them."""

import argparse
import json
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from flowkernels import _options
from flowkernels._checks import expect
from flowkernels.bench.case import Case, Work
from flowkernels.bench.harness import Measured, measure, pinned, rows
from flowkernels.bench.tables import print_rows
from flowkernels.bench.timers import timer
from flowkernels.ops import public
from flowkernels.ops.recorded_calls import Call, open_calls
from flowkernels.ops.samples import nearest, samples_of
from flowkernels.runtime import backends, environment


def add_arguments(add: Callable) -> None:
    add("file", type=_options.path, metavar="FILE", help="of `flowkernels record` or fk.record_calls")
    names = ", ".join(backends.BACKENDS)
    add("--backends", help=f"such as cpu,reference, of {names}; those that run there if not given")
    add("--device", help="torch device; the one that the calls were made on if not given")
    add("--threads", type=_options.integer(1, 4096), default=torch.get_num_threads(), help="threads of a CPU run")
    add("--seconds", type=_options.above_0, default=2.0, help="time for each call")
    add("--json", action="store_true", help="as JSON")


def run(args: argparse.Namespace) -> int:
    """Check and time each backend on the calls of the file; 1 if one's result is wrong or it raises."""
    expect(args.file.is_file(), "FILE", "a file of `flowkernels record`", f"{args.file}, which is no file")
    found = open_calls(args.file)
    device = _device(args.device, found.calls[0].device)
    chosen, not_run = _backends(args.backends, found.calls, device)
    source, clock, everything = environment.provenance(device), timer(device), []
    if not args.json:
        made = " | ".join(f"{k} {v}" for k, v in found.made.items() if v)
        print(f"{args.file}: {len(found.calls)} calls of {found.op}, made with {made}")
        print("replayed with " + " | ".join(f"{k} {v}" for k, v in source.items() if v))
    with pinned(args.threads):
        for i, call in enumerate(found.calls):
            results = _rows(f"call {i}: {_describe(call)}", call, chosen, device, clock, args)
            everything += [row | source | {"threads": args.threads} for row in results]
            if not args.json:
                _print_call(everything[-len(results) :])
    if args.json:
        report = {"made": found.made, "rows": [_plain(row) for row in everything], "not_run": not_run}
        print(json.dumps(report, indent=1))
    else:
        for name, reason in not_run.items():
            print(f"\n{name}: not run, {reason}")
    return int(any(row["gate"] != "ok" for row in everything))


def _device(asked: str | None, recorded: torch.device) -> torch.device:
    try:
        return torch.zeros(1, device=recorded if asked is None else asked).device
    except (RuntimeError, AssertionError) as e:
        got = (
            repr(asked)
            if asked is not None
            else f"{str(recorded)!r}, where the calls were made; --device cpu replays them there"
        )
        raise ValueError(f"--device: expected a device of this torch build, got {got} ({e})") from e


def _backends(asked: str | None, calls: list[Call], device: torch.device) -> tuple[dict, dict]:
    """What to run -> why without a speed, or None; and what not -> why not."""
    names = asked.split(",") if asked else backends.BACKENDS
    for name in names:
        known = ", ".join(backends.BACKENDS)
        expect(name in backends.BACKENDS, "--backends", f"names out of {known}, with commas between", repr(name))
    run, not_run = {}, {}
    for name in names:
        reason = next((r for c in calls if (r := _why_not(name, c.op, device))), None)
        untimed = _why_no_speed(name, device)
        if asked is None and (reason or untimed):
            not_run[name] = reason or f"{untimed}: --backends {name} compares its results"
        else:
            expect(reason is None, "--backends", "backends that can run the calls", f"{name!r}: {reason}")
            run[name] = untimed
    return run, not_run


def _why_not(name: str, op: str, device: torch.device) -> str | None:
    try:
        with backends.backend(name):
            backends.choose(op, device.type)
        return None
    except backends.BackendError:
        return backends.why_not(name, device.type, op)


def _why_no_speed(name: str, device: torch.device) -> str | None:
    """Of kernels that run where they are not meant to, time says nothing."""
    if name == "cuda" and device.type != "cuda":
        return "emulated on the host, where time says nothing"
    if name == "triton" and (device.type == "cpu" or backends.triton_interpreted()):
        return "interpreted, where time says nothing"
    return None


def _rows(title: str, call: Call, run: dict, device: torch.device, clock, args: argparse.Namespace) -> list[dict]:
    """Results for each backend, in the benchmark's fields: those that are right take turns and have times."""
    judged = {name: _judge(name, call, device) for name in run}
    measured = {name: Measured(error, bound) for name, (error, bound, _) in judged.items()}
    sample, outs = _inputs(call, device)

    def on(name: str) -> Callable:
        def timed():
            return _call(name, call, sample, outs)

        return timed

    right = [name for name, m in measured.items() if m.ok and run[name] is None]
    work = Work({name: on(name) for name in right}, lambda _: (0.0, 0.0))
    times, *_ = measure(work, clock, args.threads, args.seconds, limits=False)
    for name, m in times.items():
        measured[name].seconds, measured[name].looped, measured[name].extra_mb = m.seconds, m.looped, m.extra_mb
    case = Case(title, sample.args[0].numel(), lambda: work)
    found = rows(call.op, case, work, measured, [], [])
    notes = {name: "; ".join(n for n in (run[name], judged[name][2]) if n) for name in run}
    return [{"count": call.count, "note": notes[row["provider"]], **row} for row in found]


def _call(name: str, call: Call, sample, outs: dict[str, Tensor]):
    with backends.backend(name):
        return getattr(public, call.op.removesuffix("_out"))(*sample.args, **sample.kwargs | outs)


def _judge(name: str, call: Call, device: torch.device) -> tuple[float, float, str | None]:
    """(error, bound, a note) of one backend, on inputs and in memory that no other one has written to."""
    sample, outs = _inputs(call, device)
    given = _inputs(call, device)[0] if call.in_place else sample
    try:
        error, bound, share = check(call.op.removesuffix("_out"), given, _call(name, call, sample, outs), outs)
    except Exception as e:  # of a kernel, or of its inputs: the other backends are looked at all the same
        return math.inf, 0.0, f"raised {type(e).__name__}: {e}"
    if not bound < math.inf:  # which allows anything
        error, bound = math.inf, 0.0
    if not error <= bound:
        return error, bound, None if _finite(given) else "the inputs hold NaN or Inf"
    return error, bound, None if share == 1 else f"{100 * share:.3g} % of the result compared"


def _inputs(call: Call, device: torch.device):
    """(the call as a sample of the public function, the tensors that it is to write to by name)."""
    args = call.arguments(device)
    outs = {name: args.pop(name) for name in call.written}
    of_function = [*args.values()]
    if call.written:  # the functional form has a dtype where this one has a tensor
        of_function.append(None if outs["low"] is None else outs["low"].dtype)
    samples = samples_of(call.op.removesuffix("_out"))
    return samples.from_op(tuple(of_function)), {name: t for name, t in outs.items() if t is not None}


def check(op: str, sample, got, outs: dict[str, Tensor]) -> tuple[float, float, float]:
    """(error, bound) of that part of a result which is nearest to its bound, and the share that was looked at.

    Large inputs are compared in parts (flowkernels/ops/samples.py), so that float64 takes little memory beyond them.
    """
    samples = samples_of(op)
    v = sample.args[0]
    gradient = torch.autograd.grad(got.loss, v)[0] if v.requires_grad else None
    pairs, seen = [], 0
    with torch.no_grad():
        for part, of_part in _parts(samples, sample, got):
            pairs.append(samples.error_and_bound(part, of_part))
            seen += _numel(of_part)
            if gradient is not None:
                pairs.append(samples.gradient_error_and_bound(part, gradient))
        if (velocity := outs.get("velocity_out")) is not None:
            rounding = torch.finfo(velocity.dtype).eps / 2 if velocity.dtype != v.dtype else 0.0
            for part, of_part in _parts(samples, samples.of_velocity(sample), velocity):
                error, bound = samples.error_and_bound(part, of_part)
                pairs.append((error, bound + rounding))
    return *nearest(*pairs), seen / max(1, _numel(got)) if _numel(got) else 1.0


def _parts(samples, sample, got) -> Iterator[tuple]:
    yield from samples.parts(sample, got) if hasattr(samples, "parts") else [(sample, got)]


def _numel(got) -> int:
    return got.numel() if isinstance(got, Tensor) else sum(map(_numel, got))


def _finite(sample) -> bool:
    tensors = [t for t in (*sample.args, *sample.kwargs.values()) if isinstance(t, Tensor)]
    return all(bool(torch.isfinite(t).all()) for t in tensors)


# What it prints


def _describe(call: Call) -> str:
    """The call's arguments in a line, what is None aside."""

    def of(value) -> str:
        if isinstance(value, list):
            return "[" + ", ".join(of(v) for v in value[:3]) + (", ..." if len(value) > 3 else "") + "]"
        if not isinstance(value, dict):
            return f"{value:.6g}" if isinstance(value, float) else str(value)
        if "tensor" not in value:
            return value["dtype"]
        dense = list(torch.empty(value["shape"], device="meta").stride())
        layout = "" if value["stride"] == dense else f" strides {value['stride']}"
        return f"{value['dtype']} {value['shape']}{layout}"

    named = ", ".join(f"{name} {of(value)}" for name, value in call.args.items() if value is not None)
    return f"{call.op}({named})" + (" in place" if call.in_place else "")


def _print_call(results: list[dict]) -> None:
    first = results[0]
    times = "once" if first["count"] == 1 else f"{first['count']} times"
    print(f"\n{first['case']}, {times} ({first['threads']} threads)")
    columns = {"p50 us": "p50_us", "p20": "p20_us", "p80": "p80_us", "rounds": "rounds", "extra MB": "extra_mb"}
    if any(row["looped_us"] != "" for row in results):
        columns["in a loop"] = "looped_us"
    print_rows(results, columns, 12, 11)


def _plain(row: dict) -> dict:
    """Without NaN and Inf, which JSON has not."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
