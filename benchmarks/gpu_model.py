"""Writes docs/gpu.md: what the GPU kernels are as compiled, and the time that no kernel can beat.

    python benchmarks/gpu_model.py --write docs/gpu.md

It reads the built extension with tests/_binaries.py and measures nothing.
"""

import argparse
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import _binaries  # noqa: E402
from _kernel_rules import RULES  # noqa: E402


@dataclass(frozen=True)
class Gpu:
    name: str
    arch: str
    bandwidth: float  # TB/s
    source: str
    rates: dict[str, float]  # Tflop/s, from data sheets, without sparsity; bf16 and tf32 on tensor cores


HOPPER = dict(fp32=67, tf32=495, bf16=989, fp64=34)
GPUS = [
    Gpu("A100 80 GB SXM", "80", 2.04, "data sheet", dict(fp32=19.5, tf32=156, bf16=312, fp64=9.7)),
    Gpu("H100 SXM", "90a", 3.0, "copy, measured on one (data sheet: 3.35)", HOPPER),
    Gpu("H200", "90a", 4.3, "copy, measured on one (data sheet: 4.8)", HOPPER),
    Gpu("B200", "100", 8.0, "data sheet", dict(fp32=75, tf32=1100, bf16=2250, fp64=37)),
]


@dataclass(frozen=True)
class Floor:
    """A piece of work: bytes that must move and operations that must happen, and the kernel that does it."""

    op: str
    case: str
    sizes: dict[str, int]
    moves: str  # bytes, in terms of the sizes
    computes: str  # operations; a multiply-add is two
    unit: str  # what computes them: a key of Gpu.rates
    kernel: str  # its whole name
    # Elements that a thread takes in one pass through the hot loop, or through the kernel if it has no loop, where it
    # does the same for each; 0 where that cannot be said.
    elements: int = 0

    def bytes(self) -> int:
        return eval(self.moves, {}, self.sizes)

    def operations(self) -> int:
        return eval(self.computes, {}, self.sizes)

    def seconds(self, gpu: Gpu) -> tuple[float, str]:
        memory, compute = self.bytes() / gpu.bandwidth / 1e12, self.operations() / gpu.rates[self.unit] / 1e12
        return (memory, "memory") if memory >= compute else (compute, self.unit)


FLOORS = [
    Floor(
        *("euler_step", "64 Mi elements, guided, bfloat16 velocities and copy", dict(n=64 << 20)),
        *("n * (4 + 2 + 2 + 4 + 2)", "n * 5", "fp32"),
        *("euler_step_kernel<float, __nv_bfloat16, __nv_bfloat16, true, 4>", 8),
    ),
    Floor(
        *("euler_step", "64 Mi elements, float32", dict(n=64 << 20), "n * (4 + 4 + 4)", "n * 2", "fp32"),
        *("euler_step_kernel<float, float, float, false, 4>", 4),
    ),
]

HEAD = """\
# The GPU kernels: a model, not a measurement

**No kernel of this library has run on a GPU.** Below is what can be known without one: what the machine code holds, and
how long a GPU must take at least for the bytes that have to move and the operations that have to happen, if it moved
and computed at the rates stated and did nothing else. A kernel takes longer than that, and how much longer only a GPU
can tell.

`python benchmarks/gpu_model.py --write docs/gpu.md` writes this page from the built extension; a test compares them.
Compiled by nvcc {compiler}.
"""
COMPILED = """
## The kernels of these cases, as compiled

Registers of a thread; shared memory of a block; blocks on a multiprocessor, the part of its warps that they are, and
what limits them; instructions in the hot loop, or in the whole kernel where it has no loop, with the paths for what
does not fit in vectors; and, where a pass does the same for a known number of elements, instructions for each, at most.
FP32 counts additions, multiplications and multiply-adds in float32, FP64 those in double; LDG and STG are accesses
narrower than 16 bytes.
"""
ALL = """
## All kernels

Over sm_80, sm_90a, sm_100 and sm_120. The tests hold the kernels to the ceilings and instructions that are named here
(tests/_kernel_rules.py); none has a stack frame or local memory, and none whose types are float32 or narrower has
instructions in double precision, unless said.
"""
SHOWN = (
    "LDG.128",
    "LDG",
    "LDGSTS",
    "LDS",
    "LDSM",
    "STG.128",
    "STG",
    "STS",
    "FP32",
    "FP64",
    "HMMA",
    "MUFU",
    "SHFL",
    "BAR",
)


def table(head: Iterable, rows: Iterable[Iterable], right: Iterable[int] = ()) -> list[str]:
    head = list(head)
    rule = ["--:" if i in right else "---" for i in range(len(head))]
    return ["", *("| " + " | ".join(map(str, row)) + " |" for row in (head, rule, *rows)), ""]


def si(value: float, unit: str) -> str:
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f}" if seconds >= 1e-5 else f"{seconds * 1e6:.2g}"


def floors() -> list[str]:
    lines = ["## The least time", "", "At these rates; those of operations are the data sheets', without sparsity.", ""]
    units = ("fp32", "tf32", "bf16", "fp64")
    lines += table(
        ["GPU", "TB/s", "whence", *(f"{u}, Tflop/s" for u in units)],
        ([g.name, g.bandwidth, g.source, *(g.rates[u] for u in units)] for g in GPUS),
        (1, 3, 4, 5, 6),
    )[1:]
    rows = []
    for f in FLOORS:
        sizes = ", ".join(f"{k} = {v:,}" for k, v in f.sizes.items())
        moved = f"`{f.moves}` = {si(f.bytes(), 'B')}"
        computed = f"`{f.computes}` = {si(f.operations(), 'op')}, {f.unit}"
        times = [f.seconds(g) for g in GPUS]
        limit = ", ".join(dict.fromkeys(by for _, by in times))
        rows.append([f.op, f"{f.case}: {sizes}", moved, computed, *(microseconds(t) for t, _ in times), limit])
    head = ["op", "case", "bytes that must move", "operations that must happen"]
    head += [*(f"{g.name}, us" for g in GPUS), "limit"]
    return lines + table(head, rows, range(4, 4 + len(GPUS)))[1:]


def counts(kernel, among) -> str:
    """LDG and STG are those that are not of 16 bytes."""
    found = {what: kernel.count(what, among) for what in SHOWN}
    for what in ("LDG", "STG"):
        found[what] -= found[f"{what}.128"]
    return ", ".join(f"{n} {what}" for what, n in found.items() if n)


def compiled(kernels) -> list[str]:
    lines = [COMPILED]
    for name, elements in dict.fromkeys((f.kernel, f.elements) for f in FLOORS):
        rows = []
        for k in sorted((k for k in kernels if k.name == name), key=lambda k: k.sm):
            (rule,) = (r for r in RULES if re.fullmatch(r.name, name))
            blocks, part, limit = k.occupancy(rule.dynamic)
            loop = k.hot_loop
            size = len(k.instructions) if loop is None else len(loop)
            per = f"{size / elements:.1f}" if elements else ""
            shared = k.shared + rule.dynamic
            where = f"{'kernel' if loop is None else 'loop'}: {size}"
            occupied = f"{blocks} of {k.threads}, {part:.0%} ({limit})"
            rows.append([f"sm_{k.arch}", k.registers, f"{shared:,}", occupied, where, counts(k, loop), per])
        head = [
            "",
            "registers",
            "shared memory",
            "blocks of threads, occupancy",
            "instructions",
            "of these",
            "an element",
        ]
        lines += ["", f"`{name}`", *table(head, rows, (1, 2, 6))]
    return lines


def all_kernels(kernels) -> list[str]:
    rows = []
    for r in RULES:
        of = [k for k in kernels if re.fullmatch(r.name, k.name)]
        registers = [k.registers for k in of]
        least = min(of, key=lambda k: k.occupancy(r.dynamic)[1])
        occupied = f"{least.occupancy(r.dynamic)[1]:.0%} (sm_{least.arch})"
        shared = max(k.shared for k in of) + r.dynamic
        span = f"{min(registers)} to {max(registers)}"
        name = r.name.replace("|", "\\|")
        rows.append(
            [
                f"`{name}`",
                len({k.name for k in of}),
                span,
                r.registers,
                f"{shared:,}",
                occupied,
                f"{r.has} (in double)" if r.double else r.has,
            ]
        )
    head = ["kernels", "instances", "registers", "at most", "shared memory", "least occupancy", "has"]
    return [ALL, *table(head, rows, (1, 2, 3, 4, 5))]


def document() -> str:
    path = _binaries.built()
    kernels = _binaries.read(path)
    missing = [f.kernel for f in FLOORS if not any(k.name == f.kernel for k in kernels)]
    if missing:
        raise RuntimeError(f"no such kernel: {missing}")
    lines = [HEAD.format(compiler=_binaries.compiler(path)), *floors(), "", *compiled(kernels), *all_kernels(kernels)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, metavar="FILE", help="where to write it; else it is printed")
    args = parser.parse_args()
    if args.write:
        args.write.write_text(document())
    else:
        print(document(), end="")
