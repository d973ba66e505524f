"""Runs one op on one case of its benchmark, or on one of its samples, a few times: what a profiler looks at.

    python scripts/profile_driver.py euler_step "1024 Ki"

With `main` in place of an op: the main cases of all ops. Each is called twice, and once more between
cudaProfilerStart and cudaProfilerStop.
"""

import argparse
import math
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import flowkernels as fk  # noqa: E402
from flowkernels.bench import suite  # noqa: E402
from flowkernels.ops.public import OPS  # noqa: E402
from flowkernels.ops.samples import moved, samples_of  # noqa: E402


def find(op: str, which: str, device: torch.device):
    """(what it is, the call)."""
    samples = {s.id: s for s in samples_of(op).sample_inputs()}
    if which in samples:
        there = moved(samples[which], device)
        return f"sample {which}", lambda: getattr(fk, op)(*there.args, **there.kwargs)
    cases = suite.cases(op, device)
    if which.isdecimal():
        case = min((c for c in cases if c.size), key=lambda c: abs(math.log(c.size / max(1, int(which)))))
    else:
        case = next((c for c in cases if which in c.name), None)
    if case is None:
        names = "\n  ".join(c.name for c in cases)
        sys.exit(f"{op}: no sample has the id {which!r}, and no case has it in its name:\n  {names}")
    calls = case.make().calls
    return f"case {case.name}", next(call for name, call in calls.items() if name.startswith("flowkernels"))


def main_cases(device: torch.device):
    """(what it is, the call) of each op's main cases; where it has none, of its first."""
    for op in OPS:
        cases = suite.cases(op, device)
        for case in [c for c in cases if c.main] or cases[:1]:
            calls = case.make().calls
            yield (
                f"{op}, case {case.name}",
                next(call for name, call in calls.items() if name.startswith("flowkernels")),
            )


def profile_main_cases(device: torch.device) -> None:
    for what, call in main_cases(device):
        on_gpu = device.type == "cuda"
        print(what, flush=True)  # before what the profiler says of its kernels: scripts/gpu_report reads both
        call()
        call()
        if on_gpu:
            torch.cuda.synchronize(device)
            torch.cuda.profiler.start()
        call()
        if on_gpu:
            torch.cuda.synchronize(device)
            torch.cuda.profiler.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", choices=[*OPS, "main"])
    parser.add_argument("which", nargs="?", default="", help="part of a case's name, a size, or a sample's id")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--calls", type=int, default=8)
    args = parser.parse_args()
    device = torch.zeros(1, device=args.device).device
    if args.op == "main":
        profile_main_cases(device)
        return
    what, call = find(args.op, args.which, device)
    for _ in range(args.calls):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    print(f"{args.op}, {what}: {args.calls} calls on {device}")


if __name__ == "__main__":
    main()
