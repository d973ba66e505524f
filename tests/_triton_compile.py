"""Compiles the Triton kernels of an op ahead of time, as the op launches them on its sample inputs; no GPU is needed.

    python tests/_triton_compile.py OP [OP ...] --out DIR [--targets 80,90,100,120,gfx942]

Writes DIR/<variant>.<target>.cubin (.hsaco) and what it read in them, DIR/kernels.pickle, and prints a line or two for
each. A process of its own: Triton decides between its interpreter and its compiler when it is imported.
"""

import argparse
import dataclasses
import importlib
import os
import pickle
import sys
import time
from pathlib import Path
from unittest.mock import patch

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"  # whatever those who start it have set
    os.environ["FLOWKERNELS_TRITON_CONFIGS"] = ""  # the shipped ones, on a machine with a GPU too
ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import _binaries  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from _contract import op_args  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from flowkernels import backends  # noqa: E402
from flowkernels.ops import OPS, _triton  # noqa: E402

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


def typical(name: str, arg):
    """The argument as real models have it: sizes are multiples of 16, memory is aligned."""
    if isinstance(arg, torch.Tensor):
        return torch.empty(16, dtype=arg.dtype)
    if isinstance(arg, (tuple, list)):
        return tuple(typical(name, a) for a in arg)
    if type(arg) is int and not (arg == 1 and "stride" in name):  # a stride of 1 is compiled in
        return min(-(-arg // 16) * 16 or 16, arg | 1 << 40)
    return arg


def typed(arg) -> str:
    """The type of an argument as a kernel sees it."""
    if isinstance(arg, torch.Tensor):
        return str(arg.dtype)[6:]
    if isinstance(arg, (tuple, list)):
        return f"({', '.join(map(typed, arg))})"
    return str(arg) if isinstance(arg, bool) or arg is None else type(arg).__name__


class Recorder:
    """In place of `_triton.launch`: each kernel with each choice of types and constants, once."""

    def __init__(self):
        self.launches = {}

    def __call__(self, kernel, grid, *args, on, config, **constants):
        given = dict(zip(kernel.arg_names, args, strict=False))
        types = {name: t for name, arg in given.items() if (t := typed(arg)) not in ("int", "(float)")}
        label = f"{kernel.__name__}<{', '.join(f'{k}={v}' for k, v in (types | constants | config).items())}>"
        self.launches[label] = kernel, grid, [typical(*a) for a in given.items()], constants | config

    def record(self, op: str) -> None:
        samples = importlib.import_module(f"flowkernels.ops.{op}.samples")
        inputs = getattr(samples, "compiled_inputs", samples.sample_inputs)  # where all of them take minutes
        calls = [op_args(op, s) for s in inputs()]
        with patch("flowkernels.ops.bellman.triton_kernel._refuse"):  # it sees memory that nothing has written
            for args in calls:
                backends.triton_op(op)(*args)


def compile_for(target: str, ops: list[str], out: Path) -> list[dict]:
    triton.runtime.driver.set_active(Driver(target))
    found = []
    for op in ops:
        recorder = Recorder()
        before, _triton.launch = _triton.launch, recorder
        recorder.record(op)
        _triton.launch = before
        for i, (label, (kernel, grid, args, options)) in enumerate(recorder.launches.items()):
            kernel.device_caches.clear()
            start = time.monotonic()
            compiled = kernel.warmup(*args, grid=grid, **options, enable_fp_fusion=True)
            binary = "cubin" if "cubin" in compiled.asm else "hsaco"
            path = out / f"{op}.{i}.{target}.{binary}"
            path.write_bytes(compiled.asm[binary])
            if "ptx" in compiled.asm:
                path.with_suffix(".ptx").write_text(compiled.asm["ptx"])
            found.append(dict(op=op, label=label, target=target, file=path.name, shared=compiled.metadata.shared,
                              warps=compiled.metadata.num_warps, seconds=time.monotonic() - start))  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="+", choices=OPS, metavar="OP")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--targets", default=",".join(TARGETS))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    variants = [v for t in args.targets.split(",") for v in compile_for(t, args.ops, args.out)]
    kernels = []
    for v in variants:
        print(f"{v['target']:>6} {v['seconds']:5.1f} s  {v['label']}")
        if not v["file"].endswith("cubin"):
            continue
        (read,) = _binaries.read_cubin(args.out / v["file"])
        k = dataclasses.replace(read, name=v["label"], arch=v["target"], shared=v["shared"])
        kernels.append(k)
        known = ("LDG", "LDG.128", "STG", "STG.128", "HMMA", "LDGSTS", "FP64", "SHFL", "BAR", "atomics")
        counts = " ".join(f"{n}:{k.count(n)}" for n in known if k.count(n))
        print(f"{'':>14}{k.registers} registers, stack {k.stack}, local {k.local}, shared {k.shared}, {counts}")
    (args.out / "kernels.pickle").write_bytes(pickle.dumps((kernels, variants)))


if __name__ == "__main__":
    main()
