"""Every instruction set that this processor has, each in a process of its own; run as a script it is that process."""

import ctypes
import importlib
import mmap
import os
import subprocess
import sys
from pathlib import Path

import ops_cases
import pytest
import torch

import flowkernels
import flowkernels as fk
from flowkernels.ops.euler_step import euler_step
from flowkernels.ops.public import OPS
from flowkernels.runtime import backends

NAMES = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


def available():
    """This process's set and the lower ones; the first one alone, and so an error, without a compiled module."""
    C = backends.extension()
    return NAMES[: NAMES.index(C.isa()) + 1] if C else NAMES[:1]


REFUSED = """
import torch
from flowkernels import backend
from flowkernels import euler_step

for name in ("cpu", "auto"):
    try:
        with backend(name):
            euler_step(torch.ones(3), torch.ones(3), 0.5)
        print(name, "ran")
    except Exception as e:
        print(name, e)
"""


@pytest.fixture(scope="module")
def done():
    """What each process printed, by the name of its set; they run at the same time."""
    # MALLOC_PERTURB_: the C library fills memory that it hands out with 0x7f, about 3e38 in float32
    env = os.environ | {"MALLOC_PERTURB_": str(0x80), "FLOWKERNELS_BACKEND": "cpu"}
    env["PYTHONPATH"] = os.pathsep.join(map(str, (Path(flowkernels.__file__).parents[1], Path(__file__).parents[1])))
    processes = {
        isa: subprocess.Popen(
            [sys.executable, *script],
            env=env | {"FLOWKERNELS_ISA": isa},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for isa, script in [*((isa, [__file__]) for isa in available()), ("sse9", ["-c", REFUSED])]
    }
    yield {isa: (*p.communicate(timeout=300), p.returncode) for isa, p in processes.items()}
    for p in processes.values():
        p.kill()


@pytest.mark.parametrize("isa", available())
def test_instruction_set(isa, done):
    out, errors, status = done[isa]
    assert status == 0, errors
    assert out.split() == [isa, "samples", "halves", "guard"]


def test_unknown_instruction_set(done):
    """It is an error that says what was expected and what came, never a quiet fall to another set or backend."""
    out, errors, status = done["sse9"]
    assert status == 0, errors
    message = "FLOWKERNELS_ISA: expected baseline, avx2, avx512, avx512_bf16 or amx, got 'sse9'"
    assert [(line.split()[0], message in line) for line in out.splitlines()] == [("cpu", True), ("auto", True)], out


# ---- what runs in the process ----


def check_samples():
    for name in OPS:
        op, samples = getattr(fk, name), importlib.import_module(f"flowkernels.ops.{name}.samples")
        for sample in samples.sample_inputs():
            of_one = None
            for threads in (1, 2):
                torch.set_num_threads(threads)
                got = op(*sample.args, **sample.kwargs)
                if of_one is None or not alike(got, of_one):  # most do not depend on the threads
                    error, bound = samples.error_and_bound(sample, got)
                    assert error <= bound, f"{name} {sample.id}, {threads} threads: error {error:g} > {bound:g}"
                again, of_one = op(*sample.args, **sample.kwargs), got
                assert alike(got, again), f"{name} {sample.id}: another result the second time"


def alike(*results):
    return all(map(same, *(r if isinstance(r, tuple) else (r,) for r in results)))


def same(a, b):
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def check_halves():
    """Conversion from every half-precision value, and to it from the float32 values around every boundary."""
    for dtype in (BF16, F16):
        half = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
        read = euler_step(torch.zeros(2**16), half, 1.0)
        assert same(read, half.float()), dtype
        # every upper half of a float32 with lower halves at and next to ties, for either type's rounding
        low_bits = [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x0FFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x3001]
        bits = (torch.arange(2**16)[:, None] * 2**16 + torch.tensor(low_bits)).flatten()
        x = (bits - (bits >= 2**31) * 2**32).int().view(F32)
        for state in (x, x.double()):
            _, copy = euler_step(state, torch.zeros_like(state), 0.0, low=dtype)
            assert same(copy, state.to(dtype)), (state.dtype, dtype)


def before_guard_page(t):
    """A copy of `t` that ends where readable memory ends: one element more is a fault."""
    page, size = mmap.PAGESIZE, t.numel() * t.element_size()
    pages = -(-size // page)
    memory = mmap.mmap(-1, (pages + 1) * page)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(base + pages * page), page, 0) == 0
    return torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=pages * page - size).view(t.shape).copy_(t)


def check_bounds():
    """No access past the end of an input or output, for every length of tail."""
    for name in OPS:
        ops_cases.of(name).guarded(before_guard_page)


if __name__ == "__main__":
    print(backends.extension().isa())
    check_samples()
    print("samples")
    check_halves()
    print("halves")
    check_bounds()
    print("guard")
