"""What the machine code of every kernel must be like, and what the kernels have to move and compute at least.

Each op says it of its own in csrc/<op>/rules.py: CUDA and TRITON are rules, of which each kernel has exactly one, and
each a kernel; FLOORS are pieces of work. For all kernels: no stack, no local memory, and no double precision unless a
template argument or `double` says so. Ceilings of registers are what nvcc 13.0 or Triton 3.9 needs, up to the next
multiple of 8. Dynamic shared memory is what the launcher asks for in the cases of benchmarks/, or in those named.
"""

import functools
import importlib.util
import re
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

from flowkernels.ops.public import OPS
from machine_code.binaries import Kernel, occupancy

ROOT = Path(__file__).parents[2]
LOW = "(__half|__nv_bfloat16)"
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

    def shared(self, k: Kernel) -> int:
        return k.shared + by_sm(self.dynamic, k.sm)

    def occupied(self, k: Kernel) -> tuple[int, float, str]:
        return occupancy(k.sm, k.registers, self.shared(k), self.threads or k.threads)


def by_sm(value, sm: int):
    return value[sm] if isinstance(value, dict) else value


@dataclass(frozen=True)
class Floor:
    """A piece of work: bytes that must move and operations that must happen, and the kernel that does it."""

    case: str
    sizes: dict[str, int]
    moves: str  # bytes, in terms of the sizes
    computes: str  # operations; a multiply-add is two
    unit: str  # what computes them: a key of a GPU's rates in gpu_model.py
    kernel: str  # its whole name
    # Elements that a thread takes in one pass through the kernel, which has no loop; or FP32 instructions for each in
    # the hot loop, which nvcc may unroll; neither where it does not do the same for each.
    elements: int = 0
    fp32: int = 0

    def bytes(self) -> int:
        return eval(self.moves, {}, self.sizes)

    def operations(self) -> int:
        return eval(self.computes, {}, self.sizes)


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


def triton(op: str) -> list[Rule]:
    rules = list(getattr(of_op(op), "TRITON", ()))
    if version("triton").startswith("3.9."):
        return rules
    return [replace(rule, registers=255, occupancy=0.0) for rule in rules]


def floors() -> dict[str, list[Floor]]:
    """By op."""
    return {op: list(module.FLOORS) for op in OPS if hasattr(module := of_op(op), "FLOORS")}


def problems(kernels: list[Kernel], rules: list[Rule]) -> list[str]:
    found, used = [], set()
    for k in kernels:
        say = lambda text, k=k: found.append(f"sm_{k.arch} {k.name}: {text}")  # noqa: E731
        if k.stack or k.local or k.count("local"):
            say(f"{k.stack} bytes of stack, {k.local} of local memory, {k.count('local')} accesses to it")
        matching = [r for r in rules if re.fullmatch(r.name, k.name)]
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
