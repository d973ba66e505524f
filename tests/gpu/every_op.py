"""A program that runs every op's CUDA kernels on a few small inputs, for compute-sanitizer.

    compute-sanitizer --tool=racecheck python tests/gpu/every_op.py [OP ...]

`--device cpu` runs them on the kernels compiled for the host.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import _gpu_checks  # noqa: E402
import torch  # noqa: E402

from flowkernels.ops.public import OPS  # noqa: E402
from flowkernels.ops.samples import moved  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(OPS)}; all if none is given")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    if args.device == "cpu":
        import _host_cuda

        with _host_cuda.in_place(_host_cuda.module()):
            run(args.ops, args.device)
    else:
        run(args.ops, args.device)


def run(ops: list[str], device: str) -> None:
    for op in ops or OPS:
        samples = [s for s in _gpu_checks.samples(op) if 0 < s.args[0].numel() < 20_000]
        for sample in samples[:: max(1, len(samples) // 6)]:  # a few, from all over
            _gpu_checks.call(op, moved(sample, device))
        if device != "cpu":
            torch.cuda.synchronize()
        print(f"{op}: ran", flush=True)


if __name__ == "__main__":
    main()
