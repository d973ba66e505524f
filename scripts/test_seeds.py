"""The tests of numbers with other random inputs, instruction sets of torch's BLAS and of ours, and numbers of threads.

    scripts/test_seeds                          20 seeds, each with the next of the settings below
    scripts/test_seeds --all --seeds 0-4        every one of them with every setting
    scripts/test_seeds tests/ops/test_contract.py -k velocity_gram      other arguments are pytest's

A line for each run; then for each op how often it was compared and the largest error in units of its bound. What fails
is repeated by the variables that its line begins with, in front of pytest. Seeds: FLOWKERNELS_TEST_SEED, which
flowkernels/ops/samples.py describes, and Hypothesis' own.
"""

import argparse
import collections
import math
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as xml
from pathlib import Path

ROOT = Path(__file__).parents[1]
SETTINGS = [
    {},
    {"FLOWKERNELS_TEST_THREADS": "1", "OMP_NUM_THREADS": "1"},
    *({"ONEDNN_MAX_CPU_ISA": isa} for isa in ("SSE41", "AVX2")),
    *({"MKL_ENABLE_INSTRUCTIONS": isa} for isa in ("SSE4_2", "AVX2")),
    *({"ATEN_CPU_CAPABILITY": isa} for isa in ("default", "avx2")),
    *({"FLOWKERNELS_ISA": isa} for isa in ("baseline", "avx2")),
    {
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "ATEN_CPU_CAPABILITY": "default",
        "FLOWKERNELS_TEST_THREADS": "1",
    },
]
OPS = sorted(path.parent.name for path in ROOT.glob("flowkernels/ops/*/samples.py"))
NUMBERS = [f"tests/ops/test_{name}.py" for name in (*OPS, "contract")]
NUMBERS += ["tests/test_fuse.py::test_random_networks", "tests/test_fuse_solver.py", "tests/test_step_cost.py"]
KINDS = "not (opcheck or compiles or same_bits or threads or forked)"  # what seeds have no part in


def run(seed: int, setting: dict[str, str], arguments: list[str]) -> tuple[collections.Counter, dict, str]:
    """How many tests ended how, what each op took of its bounds, and pytest's output."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", f"--junitxml={report}"]
        # 0 is the seed of every other run of the tests, whose examples are fixed
        variables = setting if seed == 0 else setting | {"FLOWKERNELS_TEST_SEED": str(seed)}
        command += [] if seed == 0 else [f"--hypothesis-seed={seed}"]
        done = subprocess.run(
            [*command, *arguments], cwd=ROOT, env=os.environ | variables, capture_output=True, text=True
        )
        if not report.exists():
            sys.exit(done.stdout + done.stderr)
        counts, taken = collections.Counter(), collections.defaultdict(list)
        for test in xml.parse(report).iter("testcase"):
            outcome = {child.tag for child in test} & {"failure", "error", "skipped"}
            counts[outcome.pop() if outcome else "passed"] += 1
            for found in test.iter("property"):
                taken[found.get("name")].append(float(found.get("value")))
        return counts, taken, done.stdout


def seeds(text: str) -> range:
    first, _, last = text.rpartition("-")
    return range(int(first or 0), int(last) + 1 if first else int(last))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=seeds, default=range(20), help="how many, or the first and the last: 5-9")
    parser.add_argument("--all", action="store_true", help="every seed with every setting")
    options, arguments = parser.parse_known_args()
    arguments = arguments or [*NUMBERS, "-k", KINDS]
    runs = [(s, e) for s in options.seeds for e in SETTINGS] if options.all else []
    runs = runs or [(seed, SETTINGS[i % len(SETTINGS)]) for i, seed in enumerate(options.seeds)]
    every, wrong = collections.defaultdict(list), 0
    for seed, setting in runs:
        counts, taken, output = run(seed, setting, arguments)
        words = " ".join(f"{k}={v}" for k, v in {"FLOWKERNELS_TEST_SEED": seed, **setting}.items())
        print(f"{words}: {', '.join(f'{n} {kind}' for kind, n in counts.items())}", flush=True)
        for op, ratios in taken.items():
            every[op] += ratios
        if counts["failure"] + counts["error"] or not counts:
            wrong += 1
            print("\n".join(line for line in output.splitlines() if line.startswith(("E  ", "____"))), flush=True)
    for op, ratios in every.items():
        print(f"{op:<18}{len(ratios):>8} compared, at most {max(ratios, default=math.nan):.2f} of the bound")
    print(f"{len(runs)} runs, {wrong} with failures")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
