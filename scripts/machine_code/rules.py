"""What the machine code of every kernel must be like, and what the kernels have to move and compute at least.

Each op says it of its own in csrc/<op>/rules.py: CUDA and TRITON are rules, of which each kernel has exactly one, and
each a kernel; FLOORS are pieces of work. For all kernels: no stack, no local memory, and no double precision unless a
template argument or `double` says so. Ceilings of registers are what nvcc 13.0 or Triton 3.9 needs, up to the next
multiple of 8. Dynamic shared memory is what the launcher asks for in the cases of benchmarks/, or in those named.
"""

import functools
import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

from flowkernels.ops.public import OPS
from machine_code.binaries import INSTRUCTIONS, Kernel, occupancy

ROOT = Path(__file__).parents[2]
LOW = "(__half|__nv_bfloat16)"
FUNCTIONS = {"ceil": lambda n, d: -(-n // d), "max": max, "min": min}
READ = ("3.6",)  # releases of Triton that the rules were read on beside 3.9
FEW = 16  # bytes of stack
ONE_BLOCK = {80: 0.125, 90: 0.125, 100: 0.125, 120: 0.166}  # of 256 threads on a multiprocessor
TWO_BLOCKS = {80: 0.25, 90: 0.25, 100: 0.25, 120: 0.333}
TWO_WITH_HOPPER = {80: 0.125, 90: 0.25, 100: 0.25, 120: 0.166}


@dataclass(frozen=True)
class Rule:
    """What has to hold for the kernels whose whole name matches. Values can differ by architecture: {80: ...}."""

    name: str
    registers: int  # at most
    occupancy: float | dict[int, float]  # at least, as a part of the warps, with `dynamic` bytes of shared memory
    dynamic: int | dict[int, int] = 0
    has: str = ""  # instructions that occur, or how many at least or at most: "LDG.128 STG.128>=2 STG.narrow<=1"
    double: bool = False  # computes in double, whatever its template arguments
    threads: int = 0  # of a block, where they are fewer than the kernel was compiled for
    older: dict[str, int] = field(default_factory=dict)  # registers, at most, by earlier releases of Triton
    spilled: dict[str, int] = field(default_factory=dict)  # bytes of stack that these need

    def shared(self, k: Kernel) -> int:
        return k.shared + by_sm(self.dynamic, k.sm)

    def occupied(self, k: Kernel) -> tuple[int, float, str]:
        return occupancy(k.sm, k.registers, self.shared(k), self.threads or k.threads)


def by_sm(value, sm: int):
    return value[sm] if isinstance(value, dict) else value


class Names(dict):
    """What formulas know: what is given, and what goes with each instruction of a kind in a kernel: `each(kernel, the
    loop that has most of them)`, shared out among these."""

    def __init__(self, given: dict[str, float], kernel: Kernel | None, each: Callable[[Kernel, range], float]):
        super().__init__(given)
        self.kernel, self.each = kernel, each

    def __missing__(self, name: str) -> float:
        if self.kernel is None or (what := name.replace("_", ".")) not in INSTRUCTIONS:
            raise KeyError(name)
        loop = self.kernel.loop_of(what)
        return self.each(self.kernel, loop) / max(self.kernel.count(what, loop), 1)


@dataclass(frozen=True)
class Floor:
    """A case of benchmarks/: what must move and be computed at least, and what the kernel does beside, for the model.

    Formulas are of the sizes, of `sms`, the multiprocessors of a device, of `resident`, the blocks that one of them
    holds, and of `blocks`. In `issues` a kind of instruction, such as HMMA, stands for the instructions of a warp that
    go with each of these, addresses and the loop included, in the innermost loop of which they are most, and else in
    the whole kernel.
    """

    case: str
    sizes: dict[str, int]
    moves: str  # bytes of device memory
    computes: str  # operations; a multiply-add is two
    unit: str  # what computes them: a key of a GPU's rates in gpu_model.py
    elements: str  # that `issues` and bytes are given for each of
    kernel: str | dict[int, str]  # its whole name, or by architecture
    blocks: str  # of a launch; all else is of all launches together
    issues: str  # instructions of all warps
    memory: str = ""  # bytes of device memory that do move, where they are more than have to
    l2: str = ""  # bytes that pass through the second-level cache; where there is none, those that move
    shared: str = ""  # bytes to and from shared memory
    longest: float = 1  # the busiest warp's instructions, in those of the mean one
    chain: str = ""  # clocks of a block beside its loops, one after another
    launches: int = 1

    def __call__(self, formula: str, **names: float) -> float:
        return eval(formula or "0", FUNCTIONS, self.sizes | names)

    def instructions(self, kernel: Kernel, **names: float) -> tuple[float, float]:
        """Of all warps; and the clocks that a warp alone takes for one of them, by those that are counted in loops."""
        value = lambda each: eval(self.issues, FUNCTIONS, Names(self.sizes | names, kernel, each))  # noqa: E731
        outside, all_of_them = value(lambda k, loop: 0), value(lambda k, loop: len(loop))
        clocks = value(lambda k, loop: k.clocks(loop))
        return all_of_them, (clocks - outside) / (all_of_them - outside)

    def bytes(self) -> int:
        return self(self.moves)

    def operations(self) -> int:
        return self(self.computes)


@functools.cache
def of_op(op: str) -> ModuleType | None:
    """The op's rules.py."""
    path = ROOT / "csrc" / op / "rules.py"
    if not path.exists():  # an op without kernels for GPUs
        return None
    spec = importlib.util.spec_from_file_location(f"machine_code.rules_of_{op}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cuda() -> list[Rule]:
    return [rule for op in OPS for rule in getattr(of_op(op), "CUDA", ())]


def triton_release() -> str:
    return ".".join(version("triton").split(".")[:2])


def triton(op: str) -> list[Rule]:
    """Those of the release at hand; of one that none was read on, what the kernels hold, and that they spill no more
    than a few values."""
    rules = list(getattr(of_op(op), "TRITON", ()))
    release = triton_release()
    if release == "3.9":
        return rules
    if release not in READ:
        return [replace(rule, registers=255, occupancy=0.0, spilled={release: FEW}) for rule in rules]
    return [replace(rule, registers=rule.older.get(release, rule.registers)) for rule in rules]


def floors() -> dict[str, list[Floor]]:
    """By op."""
    return {op: list(module.FLOORS) for op in OPS if hasattr(module := of_op(op), "FLOORS")}


def problems(kernels: list[Kernel], rules: list[Rule]) -> list[str]:
    found, used = [], set()
    for k in kernels:
        say = lambda text, k=k: found.append(f"sm_{k.arch} {k.name}: {text}")  # noqa: E731
        matching = [r for r in rules if re.fullmatch(r.name, k.name)]
        stack = max((r.spilled.get(triton_release(), 0) for r in matching), default=0)
        if k.stack > stack or k.local or (k.count("local") and not stack):
            say(f"{k.stack} bytes of stack, {k.local} of local memory, {k.count('local')} accesses to it")
        used |= {id(r) for r in matching}
        if len(matching) != 1:
            say(f"{len(matching)} rules")
        for r in matching:
            if k.registers > r.registers:
                say(f"{k.registers} registers, more than {r.registers}")
            part, limit = r.occupied(k)[1:]
            if part < (least := by_sm(r.occupancy, k.sm)):
                say(f"occupancy {part:.0%} (by {limit}), less than {least:.0%}")
            for wanted in r.has.split():
                what, bound, number = re.fullmatch(r"([^<>]+)(?:([<>])=(\d+))?", wanted).groups()
                count = k.count(what)
                if count > int(number) if bound == "<" else count < int(number or 1):
                    say(f"{count} {what}, wanted {wanted}")
            double = r.double or re.search("double|float64", k.template_arguments)
            if not double and k.count("FP64"):
                say(f"{k.count('FP64')} double-precision instructions")
    return found + [f"rule {r.name}: no such kernel" for r in rules if id(r) not in used]
