"""Compiles the Triton kernels of an op ahead of time, as the op launches them on its sample inputs; no GPU is needed.

    python scripts/machine_code/triton_compile.py OP [OP ...] --out DIR [--targets 80,90,100,120,gfx942]

Writes DIR/<variant>.<target>.cubin (.hsaco), and prints a line or two for each. A process of its own: Triton decides
between its interpreter and its compiler when it is imported.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"  # whatever those who start it have set
    os.environ["FLOWKERNELS_TRITON_CONFIGS"] = ""  # the shipped ones, on a machine with a GPU too
ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from flowkernels.ops import triton_common  # noqa: E402
from flowkernels.ops.public import OPS  # noqa: E402
from flowkernels.ops.samples import op_args, samples_of  # noqa: E402
from flowkernels.runtime import backends  # noqa: E402
from machine_code.binaries import Kernel, read_cubins  # noqa: E402

TARGETS = {"80": ("cuda", 80, 32), "90": ("cuda", 90, 32), "100": ("cuda", 100, 32), "120": ("cuda", 120, 32)}
TARGETS["gfx942"] = ("hip", "gfx942", 64)


class Driver:
    """Stands in for the driver of a GPU: enough to compile for it."""

    def __init__(self, target: str):
        self.target = GPUTarget(*TARGETS[target])

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


# how the integers and the memory of a launch are, by what a label ends in: `example`
FORMS = ALIGNED, ODD, ONES = "", " odd", " ones"


def example(name: str, seen: list, form: str):
    """An argument like those that were seen, as Triton tells them apart. ALIGNED is as real models have it: sizes are
    multiples of 16, memory is aligned. ODD and ONES: neither is where it was not in all that were seen; with ONES,
    integers that were 1 are, which compiles them in."""
    first = seen[0]
    if isinstance(first, torch.Tensor):
        aligned = form == ALIGNED or all(t.data_ptr() % 16 == 0 for t in seen)
        return torch.empty(32, dtype=first.dtype)[0 if aligned else 1 :]
    if isinstance(first, (tuple, list)):
        return tuple(example(name, list(a), form) for a in zip(*seen, strict=True))
    if type(first) is not int:
        return first
    if (form == ONES and 1 in seen) or ("stride" in name and all(a == 1 for a in seen)):
        return 1
    multiple = min(-(-max(seen) // 16) * 16 or 16, max(seen) | 1 << 40)
    return multiple if form == ALIGNED or all(a % 16 == 0 for a in seen) else max(seen) | 3


def typed(arg) -> str:
    """The type of an argument as a kernel sees it."""
    if isinstance(arg, torch.Tensor):
        return str(arg.dtype)[6:]
    if isinstance(arg, (tuple, list)):
        return f"({', '.join(map(typed, arg))})"
    return str(arg) if isinstance(arg, bool) or arg is None else type(arg).__name__


class Recorder:
    """In place of `triton_common.launch`: each kernel with each choice of types and constants, and all it was given."""

    def __init__(self):
        self.launches = {}

    def __call__(self, kernel, grid, *args, on, config, **constants):
        given = dict(zip(kernel.arg_names, args, strict=False))
        types = {name: t for name, arg in given.items() if (t := typed(arg)) not in ("int", "(float)")}
        label = f"{kernel.__name__}<{', '.join(f'{k}={v}' for k, v in (types | constants | config).items())}>"
        self.launches.setdefault(label, (kernel, grid, constants | config, []))[-1].append(given)

    def variants(self, forms) -> Iterator[tuple]:
        """Labels, kernels, grids, options and arguments."""
        for label, (kernel, grid, options, seen) in self.launches.items():
            different, same = {}, {p.name for p in kernel.params if p.do_not_specialize}
            for form in forms:
                args = {name: example(name, [given[name] for given in seen], form) for name in seen[0]}
                key = repr([special(a) for name, a in args.items() if name not in same])
                different.setdefault(key, (label + form, kernel, grid, options, list(args.values())))
            yield from different.values()


def special(arg):
    """What Triton compiles for, beside the type."""
    if isinstance(arg, torch.Tensor):
        return arg.data_ptr() % 16 == 0
    if isinstance(arg, tuple):
        return tuple(map(special, arg))
    return (arg == 1, arg % 16 == 0, arg >= 1 << 31) if type(arg) is int else arg


def inputs_of(op: str) -> list[tuple]:
    samples = samples_of(op)
    inputs = getattr(samples, "compiled_inputs", samples.sample_inputs)  # where all of them take minutes
    return [op_args(op, s) for s in inputs()]


def compile_for(target: str, op: str, inputs: list[tuple], out: Path) -> list[dict]:
    """For sm_80, all; for the others, not those in float16 that are the same in bfloat16, and in the aligned form; for
    AMD, each kernel once for each type of its first argument."""
    triton.runtime.driver.set_active(Driver(target))
    recorder, found, known = Recorder(), [], set()
    function = backends.triton_op(op)
    # what refuses values, as `bellman` does, sees memory that nothing has written
    refuses = "_refuse" in function.__globals__
    refusing = patch.dict(function.__globals__, {"_refuse": lambda *_: None} if refuses else {})
    with patch.object(triton_common, "launch", recorder), refusing:
        for args in inputs:
            function(*args)
    full = target == "80"
    for label, kernel, grid, options, args in recorder.variants(FORMS if full else [ALIGNED]):
        alike = label.replace("bfloat16", "float16") if TARGETS[target][0] == "cuda" else label.split(",")[0]
        if fails_to_compile(target, label) or (alike in known and not (full and label.endswith(">"))):
            continue
        known.add(alike)
        start = time.process_time()
        compiled = kernel.warmup(*args, grid=grid, **options, enable_fp_fusion=True)
        binary = "cubin" if "cubin" in compiled.asm else "hsaco"
        path = out / f"{op}.{len(found)}.{target}.{binary}"
        path.write_bytes(compiled.asm[binary])
        if "ptx" in compiled.asm:
            path.with_suffix(".ptx").write_text(compiled.asm["ptx"])
        found.append(dict(op=op, label=label, target=target, file=path.name, shared=compiled.metadata.shared,
                          warps=compiled.metadata.num_warps, seconds=time.process_time() - start))  # fmt: skip
    for kernel in {kernel for kernel, *_ in recorder.launches.values()}:
        kernel.device_caches.clear()  # which are by device, and it is the same
    return found


def fails_to_compile(target: str, label: str) -> bool:
    """Before 3.9, Triton's compiler for AMD ends on linear_euler's products in float64, which have a batch."""
    old = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)
    return old and TARGETS[target][0] == "hip" and label.startswith("linear_euler_kernel<x=float64")


def read(variants: list[dict], out: Path) -> list[Kernel]:
    """The kernels of one target."""
    target = variants[0]["target"]
    arch = target if target == "80" else f"{target}a"
    found = read_cubins([out / v["file"] for v in variants], arch)
    named = zip(variants, found, strict=True)
    return [replace(k, name=v["label"], arch=target, shared=v["shared"]) for v, (k,) in named]


def told(k: Kernel) -> str:
    names = ("LDG", "LDG.128", "STG", "STG.128", "tensor_cores", "LDGSTS", "FP64", "SHFL", "BAR", "atomics")
    counts = " ".join(f"{n}:{k.count(n)}" for n in names if k.count(n))
    return f"\n{'':>14}{k.registers} registers, stack {k.stack}, local {k.local}, shared {k.shared}, {counts}"


def compile_op(op: str, out: Path, targets: Iterable[str] = TARGETS) -> tuple[list[Kernel], list[dict]]:
    """NVIDIA's kernels, and what was compiled for all targets."""
    kernels, variants, inputs = [], [], inputs_of(op)
    for target in targets:
        compiled = compile_for(target, op, inputs, out)
        variants += compiled
        if TARGETS[target][0] == "cuda":
            kernels += read(compiled, out)
    return kernels, variants


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="+", choices=OPS, metavar="OP")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--targets", default=",".join(TARGETS))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for op in args.ops:
        kernels, variants = compile_op(op, args.out, args.targets.split(","))
        found = {(k.arch, k.name): k for k in kernels}
        for v in variants:
            k = found.get((v["target"], v["label"]))
            print(f"{v['target']:>6} {v['seconds']:5.1f} s  {v['label']}{told(k) if k else ''}")


if __name__ == "__main__":
    main()
