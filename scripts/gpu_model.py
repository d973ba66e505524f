"""Writes docs/gpu.md: what the GPU kernels are as compiled, how long they must take, what a model says that they take,
and what they took on the GPUs that benchmarks/results/gpu has results of.

    python scripts/gpu_model.py --write docs/gpu.md

It reads the built extension with machine_code/binaries.py, compiles the Triton kernels, and measures nothing. Beside
the page, it draws its plot, and appends what has changed to benchmarks/results/gpu/model.csv; a kernel that comes to be
more than 5 % further from its floor needs --lower.
"""

import argparse
import csv
import datetime
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import pages  # noqa: E402
from machine_code import binaries, rules, triton_binaries  # noqa: E402

from flowkernels._files import whole_file  # noqa: E402
from flowkernels.bench import tables  # noqa: E402
from flowkernels.ops.public import OPS  # noqa: E402

RESULTS = ROOT / "benchmarks/results/gpu"
HISTORY = RESULTS / "model.csv"
SCHEDULERS, SHARED_RATE = 4, 128  # of a multiprocessor; bytes a clock


@dataclass(frozen=True)
class Gpu:
    name: str
    arch: str
    bandwidth: float  # TB/s
    source: str
    rates: dict[str, float]  # Tflop/s, from data sheets, without sparsity; 16-bit: bfloat16 or float16, on tensor cores
    sms: int
    ghz: float
    l2: float  # TB/s
    l2_source: str
    mma: float  # the part of the tensor cores' rate that instructions of a warp reach
    launch: float = 2.2  # us: the least that a kernel takes, measured on an H200

    def seconds(self, floor: rules.Floor) -> tuple[float, str]:
        """What it takes at least, and what for."""
        memory, compute = floor.bytes() / self.bandwidth / 1e12, floor.operations() / self.rates[floor.unit] / 1e12
        return (memory, "memory") if memory >= compute else (compute, floor.unit)

    def model(self, floor: rules.Floor, kernels: list[binaries.Kernel]) -> tuple[float, str]:
        """What the kernel is expected to take, and what limits it: what the busiest multiprocessor has to do."""
        k, rule = kernel_of(floor, kernels, int(self.arch.rstrip("a")))
        resident, _, _ = rule.occupied(k)
        of = dict(sms=self.sms, resident=resident)
        of["blocks"] = blocks = floor(floor.blocks, **of)
        most = math.ceil(blocks / self.sms)  # blocks of the busiest
        clock = 1 / self.ghz / 1e9
        whole = self.sms * most / blocks  # how much longer it takes than its share of the work would
        warps = (rule.threads or k.threads) / 32
        issued, each = floor.instructions(k, **of)
        schedulers = min(SCHEDULERS, warps * min(resident, most))
        together = max(1, warps * min(resident, most) / SCHEDULERS)  # warps of a scheduler
        alone = issued * each / (blocks * warps) * floor.longest + floor(floor.chain, **of)
        alone *= math.ceil(most / resident)
        rate = self.rates[floor.unit] * (self.mma if floor.unit == "16-bit" else 1) * 1e12
        takes = {
            "memory": floor(floor.memory or floor.moves, **of) / self.bandwidth / 1e12,
            # one multiprocessor can have twice its share
            "L2": floor(floor.l2 or floor.moves, **of) / self.l2 / 1e12 * max(1, whole / 2),
            "shared memory": floor(floor.shared, **of) * most / blocks / SHARED_RATE * clock,
            floor.unit: floor.operations() / rate * whole,
            "instructions": (alone + issued * most / blocks / schedulers * (1 - 1 / together)) * clock,
        }
        by, launches = max(takes, key=takes.get), floor.launches * self.launch * 1e-6
        return takes[by] + launches, by if takes[by] > launches else "launches"


HOPPER = dict(rates={"fp32": 67, "16-bit": 989, "fp64": 34}, sms=132, ghz=1.98, l2=9.0, mma=0.63)
GPUS = [
    Gpu(
        *("A100 80 GB SXM", "80", 2.04, "data sheet", {"fp32": 19.5, "16-bit": 312, "fp64": 9.7}),
        **dict(sms=108, ghz=1.41, l2=7.2, l2_source="5,120 bytes a clock, data sheet", mma=1),
    ),
    Gpu(
        *("H100 SXM", "90a", 3.0, "copy, measured on one (data sheet: 3.35)"),
        **HOPPER,
        l2_source="the H200's",
    ),
    Gpu(
        *("H200", "90a", 4.3, "copy, measured on one (data sheet: 4.8)"),
        **HOPPER,
        l2_source="by the percentages of Nsight Compute on one",
    ),
    Gpu(
        *("B200", "100", 8.0, "data sheet", {"fp32": 75, "16-bit": 2250, "fp64": 37}),
        **dict(sms=148, ghz=1.97, l2=18.0, l2_source="two dies with an H200's each, assumed", mma=0.31),
    ),
]


FLOORS = rules.floors()


def kernel_of(floor: rules.Floor, kernels: list[binaries.Kernel], sm: int) -> tuple[binaries.Kernel, rules.Rule]:
    name = rules.by_sm(floor.kernel, sm)
    (kernel,) = (k for k in kernels if k.name == name and k.sm == sm)
    (rule,) = (r for r in rules.cuda() if re.fullmatch(r.name, name))
    return kernel, rule


HEAD = """\
# The GPU kernels: floors, a model, and measurements

At commit ae0d00c all ops' CUDA and Triton kernels ran on an NVIDIA H200 (sm_90, driver 580.159.04, 2026-11-29): their
errors against float64 were within the bounds, and compute-sanitizer's four tools found nothing. CUDA graphs of the
sampling loop gave wrong numbers there, and Triton's bellman, bellman_pairs and cost_from_gram could not be captured;
both have been mended since. What has changed since has run on the host ([host-cuda.md](host-cuda.md)) and on no GPU:
of the cases below, it is marked. For sm_80, sm_100 and sm_120 the kernels have been compiled, and have run on no GPU.

Three times stand below for each case. The floor: how long a GPU must take at least for the bytes that have to move and
the operations that have to happen, if it moved and computed at the rates stated and did nothing else. The model: what
the kernel, as compiled, is expected to take. And what was measured, where there is a measurement; a figure without one
is a model's.

`python scripts/gpu_model.py --write docs/gpu.md` writes this page from the built extension and from
benchmarks/results/gpu; a test compares them.
Compiled by nvcc {compiler}.
"""
MODEL = """
## What the kernels are expected to take

A model, and no measurement: launches, and the longest of the following, for the busiest multiprocessor, which has as
many blocks as come to it.

- memory: the bytes above, and those that are read once more from there;
- L2: the bytes that pass through it, which are more where blocks read the same;
- shared memory: the bytes written and read there, 128 a clock;
- operations: those above; instructions of one warp reach a part of the tensor cores' rate;
- instructions: those of a warp one after another, with the stalls that the compiler has written into the machine code
  and the latencies of what is waited for, times the waves of blocks; and those of the other warps of its scheduler, one
  a clock. Registers and shared memory limit how many blocks are there at once;
- launches: 2.2 us each, the least that a kernel took on the H200.

scripts/gpu_rates.cu measures these rates and latencies on a GPU, and has not run on one yet. The formulas are in
csrc/<op>/rules.py, beside the floors. In brackets the floor as a part of the time. A test holds the kernels to the last
row of each in benchmarks/results/gpu/model.csv, less 5 %.
"""
MEASURED = """
## What they took

kernels: the sum of the durations of a call's kernels in Nsight Compute, each on cold caches, at the clock that the GPU
takes by itself. call: the benchmark's time of the device between two events, also on a cold cache. The model is that of
the kernels as they were measured; of the model: how many times as long as it they took, or the call where the kernels
were not profiled. Whether they have changed since stands last. One figure of the model is from these measurements:
5,000 clocks for what is not products in a layer of mlp_sample, from its case with n=1 and bfloat16 weights.

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


def share(part: float) -> str:
    return f"{part:.0%}" if part >= 0.01 else f"{100 * part:.1g}%"


def cases() -> list[tuple[str, rules.Floor]]:
    return [(op, floor) for op, of_op in FLOORS.items() for floor in of_op]


def floors() -> list[str]:
    lines = ["## The least time", "", "At these rates; those of operations are the data sheets', without sparsity.", ""]
    units = ("fp32", "16-bit", "fp64")
    lines += table(
        ["GPU", "TB/s", "whence", *(f"{u}, Tflop/s" for u in units)],
        ([g.name, g.bandwidth, g.source, *(g.rates[u] for u in units)] for g in GPUS),
        (1, 3, 4, 5),
    )[1:]
    rows = []
    for op, f in cases():
        sizes = ", ".join(f"{k} = {v:,}" for k, v in f.sizes.items())
        moved = f"`{f.moves}` = {si(f.bytes(), 'B')}"
        computed = f"`{f.computes}` = {si(f.operations(), 'op')}, {f.unit}"
        times = [g.seconds(f) for g in GPUS]
        limit = ", ".join(dict.fromkeys(by for _, by in times))
        rows.append([op, f"{f.case}: {sizes}", moved, computed, *(microseconds(t) for t, _ in times), limit])
    head = ["op", "case", "bytes that must move", "operations that must happen"]
    head += [*(f"{g.name}, us" for g in GPUS), "limit"]
    return lines + table(head, rows, range(4, 4 + len(GPUS)))[1:]


def models(kernels) -> list[str]:
    rates = table(
        ["GPU", "multiprocessors", "GHz", "L2, TB/s", "whence", "tensor cores by warps"],
        ([g.name, g.sms, g.ghz, g.l2, g.l2_source, f"{g.mma:.0%}"] for g in GPUS),
        (1, 2, 3, 5),
    )
    rows = []
    for op, f in cases():
        found = [(g.seconds(f)[0], *g.model(f, kernels)) for g in GPUS]
        limit = ", ".join(dict.fromkeys(by for *_, by in found))
        rows.append([op, f.case, *(f"{microseconds(t)} ({share(least / t)})" for least, t, _ in found), limit])
    expected = table(["op", "case", *(f"{g.name}, us" for g in GPUS), "limit"], rows, range(2, 2 + len(GPUS)))
    return [MODEL, *rates, *expected, "![The parts of the floors that the model expects](gpu.png)", ""]


def measurements(gpu: Gpu, results: Path) -> tuple[dict, dict[tuple[str, str], float], dict[tuple[str, str], float]]:
    """The newest on such a GPU that a folder of results has: a row that says where and when, and by op and case the
    seconds of the kernels, by Nsight Compute, and of a call on the device, by the benchmark."""
    found = {}, {}, {}
    for folder in sorted(results.glob("*-????-??-??"), key=lambda folder: folder.name[-10:]):
        rows = {path.stem: tables.read_csv(path) for path in sorted(folder.glob("*.csv"))}
        calls = [r for op in OPS for r in rows.get(op, []) if r["provider"] == "flowkernels cuda" and r["gate"] == "ok"]
        where = next(iter(calls or rows.get("kernels", [])), {"device": ""})
        if gpu.name.split()[0] not in where["device"].split():
            continue
        found = where, {}, {(r["entry"], r["case"]): r["p50_us"] * 1e-6 for r in calls if of_the_device(r)}
        for row in rows.get("kernels", []):
            key = row["op"], row["case"]
            found[1][key] = found[1].get(key, 0) + row["us"] * 1e-6
    return found


def of_the_device(row: dict) -> bool:
    """Whether the time is the device's alone. Those without the host's may hold launches: where calls one after the
    other, launches included, take no longer, they do not."""
    return row.get("host_us", "") != "" or row["looped_us"] == "" or row["looped_us"] < 1.15 * row["p50_us"]


def beside(gpu: Gpu, results: Path | None = None) -> tuple[dict, list[dict]]:
    """Where and when it was measured, and the cases measured beside the model of what was: the furthest first."""
    where, of_kernels, of_calls = measurements(gpu, results or RESULTS)
    found = []
    for key, row in at_commit(gpu, where.get("commit", "")).items():
        times = {"kernels": of_kernels.get(key), "call": of_calls.get(key)}
        if took := times["kernels"] or times["call"]:
            of_model = {what: float(row[f"{what}_us"]) * 1e-6 for what in ("floor", "model")}
            ratios = {"ratio": took / of_model["model"], "part": of_model["floor"] / took}
            found.append(row | of_model | times | ratios)
    return where, sorted(found, key=lambda row: -row["ratio"])


def measured(kernels) -> list[str]:
    lines = [MEASURED]
    codes = {k.code for k in kernels}
    for g in GPUS:
        where, found = beside(g)
        if not found:
            continue
        lines.append(f"{where['device']}, driver {where['driver']}, commit {where['commit']}, {where['date']}:")
        times = ("floor", "model", "kernels", "call")
        rows = []
        for row in found:
            cells = [microseconds(row[what]) if row[what] else "" for what in times]
            since = "" if row["code"] in codes else "yes"
            rows.append(
                [row["op"], row["case"], *cells, row["limit"], f"{row['ratio']:.2f}", share(row["part"]), since]
            )
        head = [
            "op",
            "case",
            *(f"{what}, us" for what in times),
            "limit",
            "of the model",
            "floor's part",
            "changed since",
        ]
        lines += table(head, rows, (2, 3, 4, 5, 7, 8))
    return lines


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
        for sm in binaries.MULTIPROCESSORS:
            k, rule = kernel_of(f, kernels, sm)
            blocks, part, limit = rule.occupied(k)
            loop = k.hot_loop
            size = len(k.instructions) if loop is None else len(loop)
            per = figures(f, kernels, sm)["instructions"]
            where = f"{'kernel' if loop is None else 'loop'}: {size}"
            occupied = f"{blocks} of {rule.threads or k.threads}, {percent(part)} ({limit})"
            rows.append([f"sm_{k.arch}", k.registers, f"{rule.shared(k):,}", occupied, where, counts(k, loop), per])
        head = ["", "registers", "shared memory", "blocks", "instructions", "of these", "an element"]
        lines += ["", f"`{rules.by_sm(f.kernel, 90)}`", *table(head, rows, (1, 2, 6))]
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


# ---- the history ----
FIXED = ("op", "case", "arch")  # what a row is of
EXPECTED = ("gpu", "floor_us", "model_us", "limit", "fraction")  # nothing where GPUS has no GPU of the architecture
AGAIN = ("commit", "date", "nvcc")  # what alone makes no new row


def figures(f: rules.Floor, kernels: list[binaries.Kernel], sm: int) -> dict:
    """Of a case's kernel for one architecture: what a row of the history says of it."""
    k, rule = kernel_of(f, kernels, sm)
    gpu = next((g for g in reversed(GPUS) if g.arch == k.arch), None)
    resident, part, _ = rule.occupied(k)
    of = dict(sms=gpu.sms if gpu else 170, resident=resident)
    of["blocks"] = f(f.blocks, **of)
    elements = f(f.elements)
    return {
        "kernel": k.name,
        "code": k.code,
        "registers": k.registers,
        "shared": rule.shared(k),
        "occupancy": f"{part:.4g}",
        "bytes": f"{f(f.l2 or f.moves, **of) / elements:.4g}",
        "instructions": f"{32 * f.instructions(k, **of)[0] / elements:.4g}",
        **({"gpu": gpu.name} | expected(gpu, f, kernels) if gpu else dict.fromkeys(EXPECTED, "")),
    }


def expected(gpu: Gpu, f: rules.Floor, kernels: list[binaries.Kernel]) -> dict:
    least, (takes, limit) = gpu.seconds(f)[0], gpu.model(f, kernels)
    times = {"floor_us": f"{least * 1e6:.4g}", "model_us": f"{takes * 1e6:.4g}"}
    return times | {"limit": limit, "fraction": f"{least / takes:.4g}"}


def history() -> list[dict[str, str]]:
    return list(csv.DictReader(HISTORY.open(newline=""))) if HISTORY.exists() else []


def at_commit(gpu: Gpu, commit: str) -> dict[tuple[str, str], dict[str, str]]:
    """By op and case, what the history had last at that commit; at the newest, where it has none of that commit."""
    rows = history()
    end = max((i + 1 for i, row in enumerate(rows) if row["commit"] == commit), default=len(rows))
    return {(row["op"], row["case"]): row for row in rows[:end] if row["gpu"] == gpu.name}


def news(kernels: list[binaries.Kernel]) -> list[dict[str, str]]:
    """Rows of the kernels that are not as the history has them last."""
    last = {tuple(row[key] for key in FIXED): row for row in history()}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    now = {"commit": commit.strip(), "date": today, "nvcc": binaries.compiler(binaries.built())}
    rows = []
    for op, f in cases():
        for sm in binaries.MULTIPROCESSORS:
            fixed = {"op": op, "case": f.case, "arch": str(sm)}
            row = fixed | now | {key: str(value) for key, value in figures(f, kernels, sm).items()}
            before = last.get(tuple(fixed.values()), {})
            if any(before.get(key) != value for key, value in row.items() if key not in AGAIN):
                rows.append(row)
    return rows


def further(rows: list[dict[str, str]]) -> list[str]:
    """Which of these are more than 5 % further from their floor than the history has them last."""
    last = {tuple(row[key] for key in FIXED): row for row in history()}
    found = []
    for row in rows:
        before = last.get(tuple(row[key] for key in FIXED))
        if before and row["fraction"] and float(row["fraction"]) < 0.95 * float(before["fraction"]):
            of = f"{row['op']}, {row['case']}, sm_{row['arch']}"
            found.append(f"{of}: {row['fraction']} of the floor, before {before['fraction']} ({before['commit']})")
    return found


def append(rows: list[dict[str, str]]) -> None:
    rows = history() + rows
    with whole_file(HISTORY) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def plot(path: Path) -> None:
    """The parts of the floors over the commits of the history, and those measured."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    rows = history()
    commits = list(dict.fromkeys(row["commit"] for row in rows))
    across = 4
    down = len(cases()) // across + 1
    figure, axes = pyplot.subplots(down, across, figsize=(15, 2.4 * down), sharex=True, sharey=True, squeeze=False)
    for axis, (op, f) in zip(axes.flat, cases(), strict=False):
        for g in (g for g in GPUS if g.name in {row["gpu"] for row in rows}):
            own = [r for r in rows if (r["op"], r["case"], r["gpu"]) == (op, f.case, g.name)]
            at, parts = [commits.index(r["commit"]) for r in own], [100 * float(r["fraction"]) for r in own]
            if own:  # as it was until the commit that changed it
                axis.step([*at, len(commits) - 0.5], [*parts, parts[-1]], where="post", label=f"{g.name}, model")
            where, of_kernels, of_calls = measurements(g, RESULTS)
            if seconds := (of_calls | of_kernels).get((op, f.case)):
                at = commits.index(where["commit"]) if where["commit"] in commits else len(commits) - 0.5
                label = f"{g.name}, measured {where['date']}"
                axis.plot([at], [100 * g.seconds(f)[0] / seconds], "k*", markersize=9, label=label)
        axis.set_title(f"{op}\n{f.case}", fontsize=7)
        axis.set_xticks(range(len(commits)), commits, rotation=45, fontsize=7)
        axis.set_yscale("log")
        axis.set_ylim(0.02, 150)
        axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel("floor, % of the time", fontsize=8)
    found = [pair for axis in axes.flat for pair in zip(*axis.get_legend_handles_labels(), strict=True)]
    handles = {label: handle for handle, label in found}
    for axis in axes.flat[len(cases()) :]:
        axis.set_axis_off()
    axes.flat[-1].legend(handles.values(), handles.keys(), loc="center", fontsize=8)
    pages.save(figure, path)


def document() -> str:
    path = binaries.built()
    kernels = binaries.read(path)
    wanted = {rules.by_sm(f.kernel, sm) for _, f in cases() for sm in binaries.MULTIPROCESSORS}
    missing = [name for name in sorted(wanted) if not any(k.name == name for k in kernels)]
    if missing:
        raise RuntimeError(f"no such kernel: {missing}")
    lines = [HEAD.format(compiler=binaries.compiler(path)), *floors(), *models(kernels), *measured(kernels)]
    lines += [*compiled(kernels), *all_kernels(kernels)]
    of_ops = [triton_binaries.read(op) for op in reversed(OPS)][::-1]  # tests may read them at the same time, forwards
    lines += triton_kernels([k for found, _ in of_ops for k in found], [v for _, of in of_ops for v in of])
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, metavar="FILE", help="where to write it; else it is printed")
    parser.add_argument("--lower", action="store_true", help="even where a kernel comes to be further from its floor")
    args = parser.parse_args()
    text = document()
    if not args.write:
        print(text, end="")
        sys.exit()
    rows = news(binaries.read(binaries.built()))
    if (worse := further(rows)) and not args.lower:
        sys.exit("further from their floors; --lower if it has to be:\n" + "\n".join(worse))
    append(rows)
    plot(args.write.with_suffix(".png"))
    with whole_file(args.write) as partial:
        partial.write_text(text)
    print(f"{args.write}, {len(rows)} rows in {HISTORY.relative_to(ROOT)}")
