"""The PTX that nvcc makes of the kernels, translated to C++ (csrc/host_cuda/ptx_to_cpp.py) and run on the emulation."""

import importlib
import math
import struct
from fractions import Fraction

import _host_cuda
import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves

from flowkernels import backends, ops

OPS = [op for op in ops.OPS if op in backends.CUDA_OPS]
SAMPLES = {op: importlib.import_module(f"flowkernels.ops.{op}.samples") for op in OPS}
CASES = [pytest.param(op, s, id=f"{op}-{s.id}") for op in OPS for s in SAMPLES[op].sample_inputs()]


@pytest.fixture(scope="module")
def ptx():
    module = _host_cuda.module("host_cuda_ptx")
    with backends.host_cuda(module):
        yield module


@pytest.mark.parametrize(("op", "sample"), CASES)
def test_against_float64(ptx, op, sample):
    before = ptx.ptx_launches()
    with backends.backend("cuda"):
        result = getattr(ops, op)(*sample.args, **sample.kwargs)
    error, bound = SAMPLES[op].error_and_bound(sample, result)
    assert error <= bound
    empty = any(torch.is_tensor(t) and t.numel() == 0 for t in tree_leaves([sample.args, result]))
    assert ptx.ptx_launches() > before or empty


# ---- single instructions: d = f(a, b, c), each of 32 bits, on operands with all kinds of bits ----
WORDS = [0, 1, 5, 31, 32, 33, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xDEADBEEF, 0x3F800000, 0xC0490FDB, 0x7FC00000]
MASK = 0xFFFFFFFF


def s32(v):
    return (v & MASK) - ((v & 0x80000000) << 1)


def f32(v):
    return np.array(v & MASK, np.uint32).view(np.float32)[()]


def of_f32(v):
    return int(np.float32(v).view(np.uint32))


def sign_extend(v, bits):
    return (v & (1 << bits) - 1) - ((v >> bits - 1 & 1) << bits) if bits else 0


def bfe(a, start, count, signed):
    start, count = start & 255, count & 255
    a = s32(a) if signed else a
    field = a >> start & (1 << count) - 1
    return sign_extend(field, count) if signed else field


def bfi(a, b, start, count):
    start, count = start & 255, count & 255
    mask = (1 << count) - 1 << start
    return b & ~mask | a << start & mask


def prmt(a, b, c):
    octets = struct.pack("<II", a, b)
    picked = [(octets[c >> 4 * i & 7], c >> 4 * i & 8) for i in range(4)]
    return int.from_bytes(bytes((255 if o & 128 else 0) if sign else o for o, sign in picked), "little")


def to_s32(v):
    return 0 if math.isnan(v) else int(max(-(2.0**31), min(2.0**31 - 1, v)))


def to_bf16(v):
    bits = of_f32(v)
    return 0x7FFF if math.isnan(v) else bits + 0x7FFF + (bits >> 16 & 1) >> 16


def fma_down(a):
    """a (1 + 2^-23) + 2, rounded towards minus infinity."""
    if not math.isfinite(a):
        return of_f32(a)
    exact = Fraction(float(a)) * Fraction(float(f32(0x3F800001))) + 2
    nearest = np.float32(float(exact))
    return of_f32(np.nextafter(nearest, np.float32(-np.inf)) if Fraction(float(nearest)) > exact else nearest)


def minimum(a, b):
    return float(np.fmin(f32(a), f32(b)))


INTEGER = {
    "add.s32 %d, %a, %b;": lambda a, b, c: a + b,
    "sub.s32 %d, %a, -7;": lambda a, b, c: a + 7,
    "mul.lo.s32 %d, %a, %b;": lambda a, b, c: a * b,
    "mul.hi.s32 %d, %a, %b;": lambda a, b, c: s32(a) * s32(b) >> 32,
    "mul.hi.u32 %d, %a, %b;": lambda a, b, c: a * b >> 32,
    "mad.lo.u32 %d, %a, %b, %c;": lambda a, b, c: a * b + c,
    "mul.wide.s32 %l, %a, %b; shr.s64 %l, %l, 9; cvt.u32.u64 %d, %l;": lambda a, b, c: s32(a) * s32(b) >> 9,
    "mul.wide.u32 %l, %a, %b; mov.b64 {_, %d}, %l;": lambda a, b, c: a * b >> 32,
    "div.u32 %d, %a, %b;": lambda a, b, c: a // b if b else MASK,
    "rem.u32 %d, %a, %b;": lambda a, b, c: a % b if b else a,
    "min.s32 %d, %a, %b;": lambda a, b, c: min(s32(a), s32(b)),
    "max.u32 %d, %a, %b;": lambda a, b, c: max(a, b),
    "and.b32 %d, %a, %b; not.b32 %d, %d; xor.b32 %d, %d, %c;": lambda a, b, c: ~(a & b) ^ c,
    "shl.b32 %d, %a, %b;": lambda a, b, c: a << b if b < 32 else 0,
    "shr.u32 %d, %a, %b;": lambda a, b, c: a >> b,
    "shr.s32 %d, %a, %b;": lambda a, b, c: s32(a) >> b,
    "shf.l.wrap.b32 %d, %a, %b, %c;": lambda a, b, c: ((b << 32 | a) << (c & 31)) >> 32,
    "shf.r.clamp.b32 %d, %a, %b, %c;": lambda a, b, c: (b << 32 | a) >> min(c, 32),
    "bfe.u32 %d, %a, %b, %c;": lambda a, b, c: bfe(a, b, c, False),
    "bfe.s32 %d, %a, 3, 7;": lambda a, b, c: bfe(a, 3, 7, True),
    "bfi.b32 %d, %a, %b, 5, 9;": lambda a, b, c: bfi(a, b, 5, 9),
    "prmt.b32 %d, %a, %b, %c;": prmt,
    "lop3.b32 %d, %a, %b, %c, 0x96;": lambda a, b, c: a ^ b ^ c,
    "lop3.b32 %d, %a, %b, %c, 0xE8;": lambda a, b, c: a & b | a & c | b & c,
    "popc.b32 %d, %a;": lambda a, b, c: bin(a).count("1"),
    "clz.b32 %d, %a;": lambda a, b, c: 32 - a.bit_length(),
    "brev.b32 %d, %a;": lambda a, b, c: int(f"{a:032b}"[::-1], 2),
    "setp.lt.s32 %p, %a, %b; selp.b32 %d, 1, 2, %p;": lambda a, b, c: 1 if s32(a) < s32(b) else 2,
    "setp.lo.u32 %p|%q, %a, %b; selp.b32 %d, 1, 2, %q;": lambda a, b, c: 1 if a >= b else 2,
    "setp.ge.and.s32 %p, %a, 0, %z; selp.b32 %d, 1, 2, %p;": lambda a, b, c: 2,
    "mov.b32 {%h, %i}, %a; mov.b32 %d, {%i, %h};": lambda a, b, c: a >> 16 | a << 16,
    "cvt.s32.s8 %d, %a;": lambda a, b, c: sign_extend(a, 8),
    "mov.b32 %d, 1; @!%z bra SKIP; mov.b32 %d, 2; SKIP: add.s32 %d, %d, %a;": lambda a, b, c: a + 1,
    "rem.u32 %d, %a, 3; brx.idx %d, TABLE; TABLE: .branchtargets ZERO, ONE, TWO; ZERO: mov.b32 %d, 7; bra.uni END; "
    "ONE: mov.b32 %d, 8; bra END; TWO: mov.b32 %d, 9; END:": lambda a, b, c: 7 + a % 3,
}
FLOAT = {
    "fma.rm.f32 %d, %a, 0f3F800001, 0f40000000;": lambda a, b, c: fma_down(f32(a)),
    "add.ftz.f32 %d, %a, %b;": lambda a, b, c: of_f32(f32(a) + f32(b)),
    "mul.f32 %d, %a, 0f40400000;": lambda a, b, c: of_f32(f32(a) * np.float32(3)),
    "fma.rn.f32 %d, %a, %b, %c;": lambda a, b, c: of_f32(float(f32(a)) * float(f32(b)) + float(f32(c))),
    "neg.f32 %d, %a;": lambda a, b, c: a ^ 0x80000000,
    "min.f32 %d, %a, %b;": lambda a, b, c: of_f32(minimum(a, b)),
    "setp.ne.f32 %p, %a, %b; selp.b32 %d, 1, 2, %p;": lambda a, b, c: 1 if f32(a) < f32(b) or f32(a) > f32(b) else 2,
    "setp.neu.f32 %p, %a, %b; selp.b32 %d, 1, 2, %p;": lambda a, b, c: 1 if f32(a) != f32(b) else 2,
    "setp.ltu.f32 %p, %a, %b; selp.b32 %d, 1, 2, %p;": lambda a, b, c: 1 if not f32(a) >= f32(b) else 2,
    "setp.nan.f32 %p, %a, %b; selp.b32 %d, 1, 2, %p;": lambda a, b, c: (
        1 if math.isnan(f32(a)) or math.isnan(f32(b)) else 2
    ),
    "cvt.rzi.s32.f32 %d, %a;": lambda a, b, c: to_s32(f32(a)),
    "cvt.rn.f32.s32 %d, %a;": lambda a, b, c: of_f32(s32(a)),
    "cvt.rn.f32.u32 %d, %a;": lambda a, b, c: of_f32(a),
    "cvt.rn.bf16x2.f32 %d, %a, %b;": lambda a, b, c: to_bf16(f32(a)) << 16 | to_bf16(f32(b)),
    "cvt.f64.f32 %l, %a; mul.f64 %l, %l, 0d3FE0000000000000; cvt.rn.f32.f64 %d, %l;": lambda a, b, c: of_f32(
        f32(a) / 2
    ),
}


def test_single_instructions():
    body = ""
    for i, text in enumerate([*INTEGER, *FLOAT]):
        scoped = text
        for label in ("SKIP", "TABLE", "ZERO", "ONE", "TWO", "END"):
            scoped = scoped.replace(label, f"$L{i}_{label}")
        body += f"{scoped} st.global.u32 [%out + {4 * i}], %d;\n"
    rows = len(INTEGER) + len(FLOAT)
    library = _host_cuda.PtxLibrary(
        f""".version 8.0\n.target sm_80\n.address_size 64
        .visible .entry table(.param .u64 .ptr .global .align 4 table_0, .param .u64 table_1) {{
        .reg .b32 %a, %b, %c, %d, %t<2>; .reg .b64 %l, %in, %out; .reg .pred %p, %q, %z; .reg .b16 %h, %i;
        ld.param.u64 %in, [table_0]; ld.param.u64 %out, [table_1];
        mov.u32 %t0, %ctaid.x; mov.u32 %t1, %ntid.x; mov.u32 %a, %tid.x; mad.lo.u32 %t0, %t0, %t1, %a;
        mul.wide.u32 %l, %t0, 12; add.s64 %in, %in, %l; mul.wide.u32 %l, %t0, {4 * rows}; add.s64 %out, %out, %l;
        ld.global.u32 %a, [%in]; ld.global.u32 %b, [%in+4]; ld.global.nc.u32 %c, [%in+8]; setp.ne.s32 %z, 1, 1;
        {body} ret; }}""",
    )
    operands = [(a, b, c) for a in WORDS for b in WORDS for c in (3, 0x80000001, 0x12345678, 0x3F000000)]
    given = np.array(operands, np.uint32)
    got = np.zeros((len(operands), rows), np.uint32)
    library.launch("table", (len(operands) // 4,), (4,), 0, given, got)
    wrong = []
    with np.errstate(all="ignore"):
        for i, (text, f) in enumerate((INTEGER | FLOAT).items()):
            for row, abc in zip(got[:, i], operands, strict=True):
                expected = f(*abc) & MASK
                nan = (
                    i >= len(INTEGER)
                    and "cvt.rzi" not in text
                    and math.isnan(f32(int(row)))
                    and math.isnan(f32(expected))
                )
                if row != expected and not nan:
                    wrong.append(f"{text} of {abc}: {int(row):#x}, not {expected:#x}")
    assert not wrong, "\n".join(wrong[:20])


@pytest.mark.parametrize(
    "instruction",
    ["wgmma.fence.sync.aligned;", "add.sat.s32 %r, %r, %r;", "fma.rn.relu.f32 %r, %r, %r, %r;", "call f;"],
)
def test_unknown_instruction_is_an_error(instruction):
    text = f".visible .entry odd(.param .u64 p) {{ .reg .b32 %r; {instruction} ret; }}"
    with pytest.raises(RuntimeError, match=rf"odd: unsupported instruction {instruction.split('.')[0].split()[0]}"):
        _host_cuda.PtxLibrary(text)
