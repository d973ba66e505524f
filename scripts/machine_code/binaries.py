"""What the built extension holds for GPUs: registers, memory and instructions of every kernel, from its machine code.

The tools are NVIDIA's, from the triton wheel; no GPU is needed.
"""

import fcntl
import functools
import hashlib
import importlib.util
import pickle
import re
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flowkernels._files import whole_file

# for each multiprocessor: warps, blocks, bytes of shared memory (of which each block takes 1 KiB more than it asks for)
MULTIPROCESSORS = {80: (64, 32, 164 << 10), 90: (64, 32, 228 << 10), 100: (64, 32, 228 << 10), 120: (48, 24, 100 << 10)}
REGISTERS, REGISTER_UNIT, SHARED_UNIT, SHARED_RESERVED = 65536, 256, 128, 1024

# what is looked for in a kernel; modifiers can stand between the parts
INSTRUCTIONS = {
    "LDG": r"LDG\b",
    "LDG.128": r"LDG\b.*\.128\b",
    "LDG.narrow": r"LDG\b(?!.*\.(64|128)\b)",
    "STG": r"STG\b",
    "STG.128": r"STG\b.*\.128\b",
    "STG.narrow": r"STG\b(?!.*\.(64|128)\b)",
    "LDS": r"LDS\b",
    "STS": r"STS\b",
    "LDSM": r"LDSM\b",
    "LDGSTS": r"LDGSTS\b",
    "HMMA": r"HMMA\b",
    "tensor_cores": r"([HIQ]G?MMA|UTC[HIQ]MMA|DMMA)\b",  # of warps, of groups of four on sm_90, of a block on sm_100
    "FFMA": r"FFMA2?\b",
    "FP32": r"F(ADD|MUL|FMA)2?\b",
    "MUFU": r"MUFU\b",
    "SHFL": r"SHFL\b",
    "BAR": r"BAR\b",
    # Not those of bits in shared memory, with which sm_100 keeps account of the columns of its tensor memory
    "atomics": r"(RED|ATOM)G?\b|ATOMS\b(?!\.(AND|OR)\b)",
    "local": r"(LDL|STL)\b",
    "DADD": r"DADD\b",
    "DMUL": r"DMUL\b",
    "DFMA": r"DFMA\b",
    "FP64": r"D(ADD|MUL|FMA|SETP|MNMX|MMA)\b|.*\.F64\b|MUFU\..*64H\b",
}

# The bits of an instruction from the 105th on: clocks until the warp's next, the counters that it sets until it has
# written and read its operands, and those that it waits for
CONTROL = 105
FIELDS = (0, 15), (5, 7), (8, 7), (11, 63)
# Clocks until what takes its time is there: of shared memory, the second-level cache and products of matrices as Luo et
# al. measured them on an H100 (arXiv 2402.13499); the others, and 20 where there is none, are taken to be about that
LATENCIES = {"LDGSTS|STG|RED": 10, "LDG": 263, "LDSM": 33, "LDS|ATOMS|STS": 29, "SHFL": 25, "HMMA": 33, "MUFU|D": 30}


@functools.cache  # there are few, in many places
def is_one(what: str, instruction: str) -> bool:
    return bool(re.match(INSTRUCTIONS[what], instruction))


@dataclass(frozen=True)
class Kernel:
    name: str  # "euler_step_kernel<float, __nv_bfloat16, float, false, 8>"
    arch: str  # "90a"
    registers: int
    stack: int  # bytes for each thread
    local: int
    shared: int  # bytes for each block, those that the kernel declares
    threads: int  # in a block, at most
    instructions: list[str] = field(repr=False)  # without operands: "LDG.E.128"
    loops: list[range] = field(repr=False)  # the innermost ones, as places in instructions
    control: list[int] = field(repr=False)  # of each instruction: when the warp goes on, and what it waits for

    @property
    def sm(self) -> int:
        return int(self.arch.rstrip("af"))

    @property
    def template_arguments(self) -> str:
        return self.name.partition("<")[2]

    def count(self, what: str, among: range | None = None) -> int:
        which = self.instructions if among is None else (self.instructions[i] for i in among)
        return sum(is_one(what, i) for i in which)

    def loop_of(self, what: str) -> range:
        """The innermost loop of which most is that kind, else the whole kernel."""
        most = max(self.loops, key=lambda loop: self.count(what, loop) / len(loop), default=range(0))
        return most if self.count(what, most) else range(len(self.instructions))

    def clocks(self, among: range) -> int:
        """What a warp alone takes for these, in a loop: the compiler's stalls, and the latencies of what comes when it
        comes and is waited for. Barriers of a block take no time here."""
        now, ready = 0, [0] * 6
        for _ in range(2):  # the second time, for what the first one has left on its way
            start = now
            for i in among:
                stall, write, read, wait = (self.control[i] >> at & bits for at, bits in FIELDS)
                now = max([now, *(ready[b] for b in range(6) if wait >> b & 1)])
                latency = next((n for kind, n in LATENCIES.items() if re.match(kind, self.instructions[i])), 20)
                for barrier, n in ((write, latency), (read, 10)):
                    if barrier < 6:
                        ready[barrier] = max(ready[barrier], now + n)
                now += max(stall, 1)
        return now - start

    @property
    def code(self) -> str:
        """A digest of what it is."""
        found = (self.registers, self.stack, self.local, self.shared, self.threads, self.instructions, self.control)
        return hashlib.sha256(repr(found).encode()).hexdigest()[:12]

    @property
    def hot_loop(self) -> range | None:
        """The innermost loop with most multiply-adds, of one that is mostly those if there is one (an activation's has
        many among other work), else that computes or loads most, else the longest."""
        by = ("HMMA", "FFMA", "FP32", "FP64", "LDG")

        def weight(loop: range):
            counts = [self.count(what, loop) for what in by]
            return counts[0], counts[1] * (2 * counts[1] > len(loop)), *counts[1:], len(loop)

        return max(self.loops, key=weight, default=None)


def occupancy(sm: int, registers: int, shared: int, threads: int) -> tuple[int, float, str]:
    """Blocks on a multiprocessor, the part of its warps that they are, and what limits them."""
    warps, blocks, memory = MULTIPROCESSORS[sm]
    of_block = -(-threads // 32)
    of_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    limits = {
        "warps": warps // of_block,
        "blocks": blocks,
        "registers": REGISTERS // 4 // of_warp * 4 // of_block,  # a quarter of the multiprocessor has its own
        "shared memory": memory // (-(-(shared + SHARED_RESERVED) // SHARED_UNIT) * SHARED_UNIT),
    }
    limit = min(limits, key=limits.get)
    return limits[limit], limits[limit] * of_block / warps, limit


def tool(name: str) -> str:
    spec = importlib.util.find_spec("triton")
    path = spec and Path(spec.origin).parent / "backends/nvidia/bin" / name
    if not path or not path.exists():
        raise RuntimeError(f"{name} is needed: pip install triton")
    return str(path)


def run(*command, cwd: Path | None = None) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=cwd)
    if done.returncode:
        raise RuntimeError(f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def demangle(names: list[str]) -> list[str]:
    """Without the return type, our namespace, unnamed ones and the parameters."""
    plain = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    short = [re.sub(r"\bfk::cuda::|\(anonymous namespace\)::|^void ", "", n) for n in plain.splitlines()]
    return [n.rpartition("(")[0] or n for n in short]


def sections(cubin: bytes) -> Iterator[tuple[str, bytes]]:
    """Of an ELF file for 64 bits, little endian: name and contents."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    for name, kind, _, _, offset, length in headers:
        at = headers[names][4] + name
        yield cubin[at : cubin.index(b"\0", at)].decode(), b"" if kind == 8 else cubin[offset : offset + length]


def max_threads(cubin: bytes) -> dict[str, int]:
    """Threads of a block by kernel: the bounds that it was compiled for, in its section .nv.info."""
    found = {}
    for name, contents in sections(cubin):
        if name.startswith(".nv.info."):
            at = 0
            while at < len(contents):
                form, attribute, size = struct.unpack_from("<BBH", contents, at)
                if form == 4 and attribute in (0x05, 0x10):  # MAX_THREADS, REQNTID
                    x, y, z = struct.unpack_from("<III", contents, at + 4)
                    found[name.removeprefix(".nv.info.")] = x * y * z
                at += 4 + (size if form == 4 else 0)
    return found


def instructions(listing: str) -> tuple[list[str], list[range], list[int]]:
    """Of one kernel's disassembly: instructions, the innermost loops, and the instructions' places in the code, 16
    bytes each. Branches go to labels, or to addresses."""
    found, labels, branches, places, first = [], {}, [], [], None
    for m in re.finditer(r"^(\.L\w+):|/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)([^;]*);", listing, re.M):
        if m[1]:
            labels[m[1]] = len(found)
            continue
        address = int(m[2], 16)
        first = address if first is None else first
        labels[address] = len(found)
        if m[3].startswith("BRA") and (to := re.search(r"`\((\.L\w+)\)|\b(0x[0-9a-f]+)\s*$", m[4])):
            branches.append((len(found), to[1] or int(to[2], 16)))
        if m[3] != "NOP":
            found.append(m[3])
            places.append((address - first) // 16)
    loops = [range(labels[to], at + 1) for at, to in branches if labels.get(to, at) < at]
    inner = [a for a in loops if not any(b != a and a.start <= b.start and b.stop <= a.stop for b in loops)]
    return found, inner, places


def read_cubin(path: Path) -> list[Kernel]:
    code = run(tool("nvdisasm"), "-c", path)
    arch = "".join(re.search(r"\.target\s+sm_(\w+)|EF_CUDA_SM(\d+)", code).groups(""))  # as nvcc's or Triton's ptxas
    return kernels_of(
        path, arch, dict(s.split(",", 1) for s in re.split(r"^\s*\.section\s+\.text\.", code, flags=re.M)[1:])
    )


def read_cubins(paths: list[Path], arch: str) -> list[list[Kernel]]:
    """Of cubins for one architecture, disassembled together: nvdisasm takes half a second to begin."""
    texts = [{n[6:]: code for n, code in sections(p.read_bytes()) if n.startswith(".text.")} for p in paths]
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(code for of in texts for code in of.values()))
        file.flush()
        lines = re.findall(
            r"^\s*/\*[0-9a-f]{4,}\*/\s+[^/]*;", run(tool("nvdisasm"), "-b", f"SM{arch}", file.name), re.M
        )
    # an instruction is 16 bytes
    at = 0
    for of in texts:
        for name, code in of.items():
            of[name], at = "\n".join(lines[at : at + len(code) // 16]), at + len(code) // 16
    if at != len(lines):
        raise RuntimeError(f"{len(lines)} instructions in {16 * at} bytes of cubins")
    return [kernels_of(path, arch, of) for path, of in zip(paths, texts, strict=True)]


def kernels_of(cubin: Path, arch: str, texts: dict[str, str]) -> list[Kernel]:
    usage = run(tool("cuobjdump"), "--dump-resource-usage", cubin)
    threads = max_threads(cubin.read_bytes())
    codes = {name[6:]: code for name, code in sections(cubin.read_bytes()) if name.startswith(".text.")}
    found = re.findall(r"Function (\S+):\s*\n\s*(.*)", usage)
    kernels = []
    for (symbol, line), name in zip(found, demangle([symbol for symbol, _ in found]), strict=True):
        use = {k: int(v) for k, v in re.findall(r"([A-Z]+):(\d+)", line)}
        # from sm_90 on, what is reserved is counted in
        shared = use["SHARED"] - (SHARED_RESERVED if int(arch.rstrip("af")) >= 90 and use["SHARED"] else 0)
        sass, loops, places = instructions(texts[symbol])
        words = [int.from_bytes(codes[symbol][16 * at : 16 * at + 16], "little") >> CONTROL for at in places]
        limit = threads.get(symbol, 1024)
        kernels.append(Kernel(name, arch, use["REG"], use["STACK"], use["LOCAL"], shared, limit, sass, loops, words))
    return kernels


def cubins(path: str, folder: Path) -> list[Path]:
    """Of a module, extracted into a folder. One fat binary at a time: those of other sources would take each other's
    place, as all of them are named cuda.cu."""
    module, found = Path(path).read_bytes(), []
    fat = b"".join(contents for name, contents in sections(module) if name == ".nv_fatbin")
    while fat:
        magic, _, head, size = struct.unpack_from("<IHHQ", fat)
        if magic != 0xBA55ED50:
            raise RuntimeError(f"{path}: not a fat binary")
        own = folder / str(len(found))
        own.mkdir()
        (own / "one.fatbin").write_bytes(fat[: head + size])
        run(tool("cuobjdump"), "-xelf", "all", own / "one.fatbin", cwd=own)
        found.append(sorted(own.glob("*.cubin")))
        fat = fat[head + size :].lstrip(b"\0")
    return [cubin for of_one in found for cubin in of_one]


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """What `make()` gives, pickled in that file: made by the process that comes first, while others wait for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            found = pickle.dumps(make())
            for old in path.parent.glob("*.pickle"):
                old.unlink()
            with whole_file(path) as partial:
                partial.write_bytes(found)
        return pickle.loads(path.read_bytes())


def read_module(path: str) -> list[Kernel]:
    """Those of each architecture together, in the order in which the module has them."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        paths = cubins(path, Path(folder))
        by_arch = {}
        for cubin in paths:
            by_arch.setdefault(re.search(r"\.sm_(\w+)\.cubin$", cubin.name)[1], []).append(cubin)
        found = {}
        for own, kernels in zip(by_arch.values(), pool.map(read_cubins, by_arch.values(), by_arch), strict=True):
            found |= zip(own, kernels, strict=True)
    return [k for cubin in paths for k in found[cubin]]


@functools.cache
def read(path: str) -> list[Kernel]:
    """The kernels of a module or a cubin. To disassemble the extension takes long: what was found in a module is kept
    in build/ for as long as neither it nor this file changes."""
    if path.endswith(".cubin"):
        return read_cubin(Path(path))
    digest = hashlib.sha256(Path(path).read_bytes() + Path(__file__).read_bytes()).hexdigest()[:16]
    return kept(Path(__file__).parents[2] / "build/binaries" / f"{digest}.pickle", lambda: read_module(path))


def compiler(path: str) -> str:
    """The release of nvcc that made it: "13.0, V13.0.88"."""
    with tempfile.TemporaryDirectory() as folder:
        text = cubins(path, Path(folder))[0].read_bytes()
    return re.search(rb"Cuda compilation tools, release ([\w., ]+)", text)[1].decode()


def built() -> str:
    """The path of the extension."""
    import flowkernels._C

    return flowkernels._C.__file__
