"""Writes docs/gpu.md: what the GPU kernels are as compiled, and the time that no kernel can beat.

    python scripts/gpu_model.py --write docs/gpu.md

It reads the built extension with machine_code/binaries.py, compiles the Triton kernels, and measures nothing.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from machine_code import binaries, rules, triton_binaries  # noqa: E402

from flowkernels._files import whole_file  # noqa: E402
from flowkernels.ops.public import OPS  # noqa: E402


@dataclass(frozen=True)
class Gpu:
    name: str
    arch: str
    bandwidth: float  # TB/s
    source: str
    rates: dict[str, float]  # Tflop/s, from data sheets, without sparsity; 16-bit: bfloat16 or float16, on tensor cores

    def seconds(self, floor: rules.Floor) -> tuple[float, str]:
        """What it takes at least, and what for."""
        memory, compute = floor.bytes() / self.bandwidth / 1e12, floor.operations() / self.rates[floor.unit] / 1e12
        return (memory, "memory") if memory >= compute else (compute, floor.unit)


HOPPER = {"fp32": 67, "16-bit": 989, "fp64": 34}
GPUS = [
    Gpu("A100 80 GB SXM", "80", 2.04, "data sheet", {"fp32": 19.5, "16-bit": 312, "fp64": 9.7}),
    Gpu("H100 SXM", "90a", 3.0, "copy, measured on one (data sheet: 3.35)", HOPPER),
    Gpu("H200", "90a", 4.3, "copy, measured on one (data sheet: 4.8)", HOPPER),
    Gpu("B200", "100", 8.0, "data sheet", {"fp32": 75, "16-bit": 2250, "fp64": 37}),
]


FLOORS = rules.floors()

HEAD = """\
# The GPU kernels: a model, not a measurement

**No kernel of this library has run on a GPU.** Below is what can be known without one: what the machine code holds, and
how long a GPU must take at least for the bytes that have to move and the operations that have to happen, if it moved
and computed at the rates stated and did nothing else. A kernel takes longer than that, and how much longer only a GPU
can tell.

A launch alone takes microseconds: where the floor is less, it says nothing. `bellman` runs on one multiprocessor,
because each step needs all of the one before, `cost_from_gram` on K / 32, a tile of `mlp_sample` on one, layer after
layer: these have only that part of a GPU's rates, whereas the floors are those of a whole one. `bellman_pairs` reads
its costs once a step from the third on and once to check them, the floor once.

`python scripts/gpu_model.py --write docs/gpu.md` writes this page from the built extension; a test compares them.
Compiled by nvcc {compiler}.
"""
COMPILED = """
## One kernel of each op, as compiled

Of the op's first case above. Registers of a thread; shared memory of a block; blocks on a multiprocessor of so many
threads, the part of its warps that they are, and what limits them. Instructions in the hot loop, or in the whole kernel
where it has no loop, with the paths for what does not fit in vectors; and, where each element is treated alike,
instructions for each (of each term, in `linear_update`), addresses and loop included. FP32 counts additions,
multiplications and multiply-adds in float32, FP64 those in double; LDG and STG are accesses narrower than 16 bytes.
nvcc unrolls some loops more for one architecture than for another.
"""
ALL = """
## All kernels

Over sm_80, sm_90a, sm_100 and sm_120. The tests hold the kernels to these ceilings, occupancies and instructions
(csrc/<op>/rules.py, which says what cases the shared memory is of). None has a stack frame or local memory, and none
whose types are float32 or narrower has instructions in double precision, unless said.
"""
TRITON = """
## The Triton kernels, compiled ahead of time

Compiled by Triton {version}, with the shipped configurations, in every choice of types that the tests' inputs make, for
sizes that are multiples of 16 and aligned memory: {variants} variants of {kernels} kernels. Every kernel compiles for
{amd} too, with each type of its first argument. For each target: registers of a thread; bytes of shared memory of a
block; the part of a multiprocessor's warps that its blocks are. The tests hold the kernels to the ceiling of registers
and to the instructions (csrc/<op>/rules.py); tensor_cores are HMMA, on sm_90 HGMMA for tiles of 64, on sm_100 UTCHMMA.
None has a stack frame or local memory, for sm_80 also where sizes are odd or 1 and memory is not aligned; none has
atomic operations on memory; and none whose types are float32 or narrower has instructions in double precision, unless
said.
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
    units = ("fp32", "16-bit", "fp64")
    lines += table(
        ["GPU", "TB/s", "whence", *(f"{u}, Tflop/s" for u in units)],
        ([g.name, g.bandwidth, g.source, *(g.rates[u] for u in units)] for g in GPUS),
        (1, 3, 4, 5),
    )[1:]
    rows = []
    for op, f in ((op, f) for op, of_op in FLOORS.items() for f in of_op):
        sizes = ", ".join(f"{k} = {v:,}" for k, v in f.sizes.items())
        moved = f"`{f.moves}` = {si(f.bytes(), 'B')}"
        computed = f"`{f.computes}` = {si(f.operations(), 'op')}, {f.unit}"
        times = [g.seconds(f) for g in GPUS]
        limit = ", ".join(dict.fromkeys(by for _, by in times))
        rows.append([op, f"{f.case}: {sizes}", moved, computed, *(microseconds(t) for t, _ in times), limit])
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
    for f, *_ in FLOORS.values():
        rows = []
        for k in sorted((k for k in kernels if k.name == f.kernel), key=lambda k: k.sm):
            (rule,) = (r for r in rules.cuda() if re.fullmatch(r.name, k.name))
            blocks, part, limit = rule.occupied(k)
            loop = k.hot_loop
            size = len(k.instructions) if loop is None else len(loop)
            elements = k.count("FP32", loop) / f.fp32 if f.fp32 else f.elements
            per = f"{size / elements:.1f}" if elements else ""
            where = f"{'kernel' if loop is None else 'loop'}: {size}"
            occupied = f"{blocks} of {rule.threads or k.threads}, {percent(part)} ({limit})"
            rows.append([f"sm_{k.arch}", k.registers, f"{rule.shared(k):,}", occupied, where, counts(k, loop), per])
        head = ["", "registers", "shared memory", "blocks", "instructions", "of these", "an element"]
        lines += ["", f"`{f.kernel}`", *table(head, rows, (1, 2, 6))]
    return lines


def percent(part: float) -> str:
    return f"{100 * part:.3g}%"


def span(values: Iterable, form: Callable = str) -> str:
    low, high = form(min(values)), form(max(values))
    return low if low == high else f"{low} to {high}"


def all_kernels(kernels) -> list[str]:
    rows = []
    for r in rules.cuda():
        of = [k for k in kernels if re.fullmatch(r.name, k.name)]
        name = r.name.replace("|", "\\|")
        registers, shared = span([k.registers for k in of]), span([r.shared(k) for k in of], "{:,}".format)
        occupied = span([r.occupied(k)[1] for k in of], percent)
        has = " ".join([r.has, "(in double)" * r.double]).strip()
        rows.append([f"`{name}`", len({k.name for k in of}), registers, r.registers, shared, occupied, has])
    head = ["kernels", "instances", "registers", "at most", "shared memory", "occupancy", "has"]
    return [ALL, *table(head, rows, (1, 2, 3, 4, 5))]


def triton_kernels(kernels, variants) -> list[str]:
    kernels = [k for k in kernels if k.name.endswith(">")]  # not those of odd sizes
    targets = sorted({k.sm for k in kernels})
    rows = []
    for r in (r for op in OPS for r in rules.triton(op)):
        of = [k for k in kernels if re.fullmatch(r.name, k.name)]
        cells = []
        for sm in targets:
            own = [k for k in of if k.sm == sm]
            shared = span([r.shared(k) for k in own], "{:,}".format)
            occupied = span([r.occupied(k)[1] for k in own], percent)
            cells.append(f"{span([k.registers for k in own])}; {shared}; {occupied}")
        name = r.name.replace("|", "\\|")
        has = " ".join([r.has, "(in double)" * r.double]).strip()
        rows.append([f"`{name}`", len({k.name for k in of}), *cells, r.registers, has])
    head = ["kernels", "variants", *(f"sm_{sm}" for sm in targets), "registers at most", "has"]
    names = {k.name for k in kernels}
    text = TRITON.format(
        version=triton_binaries.version("triton"),
        variants=len(names),
        kernels=len({name.split("<")[0] for name in names}),
        amd=", ".join(sorted({v["target"] for v in variants} - {str(sm) for sm in targets})),
    )
    return [text, *table(head, rows, (1, len(head) - 2))]


def document() -> str:
    path = binaries.built()
    kernels = binaries.read(path)
    wanted = [f.kernel for of_op in FLOORS.values() for f in of_op]
    missing = [name for name in wanted if not any(k.name == name for k in kernels)]
    if missing:
        raise RuntimeError(f"no such kernel: {missing}")
    lines = [HEAD.format(compiler=binaries.compiler(path)), *floors(), "", *compiled(kernels), *all_kernels(kernels)]
    of_ops = [triton_binaries.read(op) for op in reversed(OPS)][::-1]  # tests may read them at the same time, forwards
    lines += triton_kernels([k for found, _ in of_ops for k in found], [v for _, of in of_ops for v in of])
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, metavar="FILE", help="where to write it; else it is printed")
    args = parser.parse_args()
    if args.write:
        text = document()
        with whole_file(args.write) as partial:
            partial.write_text(text)
    else:
        print(document(), end="")
