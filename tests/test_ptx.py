"""The PTX that nvcc makes of the kernels, translated to C++ (csrc/host_cuda/ptx_to_cpp.py) and run on the emulation."""

import ctypes
import importlib
import math
import struct
from fractions import Fraction

import _host_cuda
import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves

import flowkernels as fk
from flowkernels.ops.public import OPS
from flowkernels.runtime import backends

OPS = [op for op in OPS if op in backends.CUDA_OPS]
SAMPLES = {op: importlib.import_module(f"flowkernels.ops.{op}.samples") for op in OPS}
CASES = [pytest.param(op, s, id=f"{op}-{s.id}") for op in OPS for s in SAMPLES[op].sample_inputs()]


@pytest.fixture(scope="module")
def ptx():
    module = _host_cuda.module("host_cuda_ptx")
    with _host_cuda.in_place(module):
        yield module


@pytest.mark.parametrize(("op", "sample"), CASES)
def test_against_float64(ptx, op, sample):
    before = ptx.ptx_launches()
    with backends.backend("cuda"):
        result = getattr(fk, op)(*sample.args, **sample.kwargs)
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


def to_tf32(a):
    return 0x7FFFFFFF if math.isnan(f32(a)) else a + 0x1000 & ~0x1FFF


LOW = dict(f16=(11, -14), bf16=(8, -126))  # digits, and the least exponent


def of_low(bits, kind):
    return float(f32(bits << 16) if kind == "bf16" else np.array(bits, np.uint16).view(np.float16)[()])


def low(kind, f, count):
    """f of 16-bit floats: both halves of a, then the lower one of b; rounded once, to nearest and ties to even."""

    def rounded(a, b, c):
        values = [of_low(bits, kind) for bits in (a & 0xFFFF, a >> 16, b & 0xFFFF)][:count]
        if not all(map(math.isfinite, values)):
            return of_f32(f(*map(np.float32, values)))
        if not (exact := f(*map(Fraction, values))):
            return of_f32(f(*map(np.float32, values)))
        digits, least = LOW[kind]
        ulp = Fraction(2) ** (max(math.frexp(exact)[1] - 1, least) - digits + 1)
        value = round(exact / ulp) * ulp
        return of_f32(
            math.copysign(math.inf, value) if abs(value) >= 2 ** (127 if kind == "bf16" else 15) * 2 else value
        )

    return rounded


def low_row(instruction, kind, count):
    operands = ", ".join(["%h", "%i", "%j"][:count])
    return f"mov.b32 {{%h, %i}}, %a; mov.b32 {{%j, _}}, %b; {instruction}.{kind} %h, {operands}; cvt.f32.{kind} %d, %h;"


def in_pairs(kind):
    """The lower half of a product of pairs, and the upper one, by the instruction for single ones."""
    return (
        f"mul.{kind}x2 %d, %a, %b; mov.b32 {{%h, %i}}, %a; mov.b32 {{%j, %k}}, %b; mul.{kind} %h, %h, %j; "
        f"mul.{kind} %i, %i, %k; mov.b32 %t0, {{%h, %i}}; xor.b32 %d, %d, %t0;"
    )


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
    "add.cc.u32 %d, %a, %b; addc.u32 %d, %c, 9;": lambda a, b, c: c + 9 + (a + b >> 32),
    "sub.cc.u32 %d, %a, %b; subc.u32 %d, %c, 9;": lambda a, b, c: c - 9 - (a < b),
    "add.cc.u32 %d, -1, 1; addc.cc.u32 %d, %a, %b; addc.u32 %d, 0, 0;": lambda a, b, c: a + b + 1 >> 32,
    "mad.lo.cc.u32 %d, %a, %b, %c; madc.hi.u32 %d, %a, %b, %c;": lambda a, b, c: (
        (a * b >> 32) + c + ((a * b & MASK) + c >> 32)
    ),
    "rem.u32 %d, %a, 3; mul.wide.u32 %l, %d, 4; mov.b64 %m, digits; add.s64 %l, %l, %m; "
    "ld.global.nc.b32 %d, [%l];": lambda a, b, c: (7, 80, 900)[a % 3],
    "mov.b32 %t0, depot; st.local.v2.b32 [%t0+8], {%a, %b}; ld.local.b32 %d, [%t0+12];": lambda a, b, c: b,
    "cvta.local.u64 %l, depot; st.b32 [%l+4], %a; ld.local.b32 %d, [depot+4];": lambda a, b, c: a,
    "createpolicy.fractional.L2::evict_last.b64 %l, 1.0; "
    "ld.global.L1::evict_last.L2::cache_hint.b32 {%d}, [%in + 4], %l;": lambda a, b, c: b,
    in_pairs("f16"): lambda a, b, c: 0,
    in_pairs("bf16"): lambda a, b, c: 0,
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


FLOAT |= {"cvt.rna.tf32.f32 %d, %a;": lambda a, b, c: to_tf32(a)}
FLOAT |= {
    "min.NaN.f32 %d, %a, %b; max.NaN.f32 %d, %d, %c; abs.f32 %d, %d;": lambda a, b, c: of_f32(
        abs(np.maximum(np.minimum(f32(a), f32(b)), f32(c)))
    )
}
for kind in LOW:
    FLOAT |= {
        low_row("add", kind, 2): low(kind, lambda x, y: x + y, 2),
        low_row("sub", kind, 2): low(kind, lambda x, y: x - y, 2),
        low_row("mul", kind, 2): low(kind, lambda x, y: x * y, 2),
        low_row("fma.rn", kind, 3): low(kind, lambda x, y, z: x * y + z, 3),
        low_row("neg", kind, 1): low(kind, lambda x: -x, 1),
        low_row("max", kind, 2) + " abs.f32 %d, %d;": low(kind, lambda x, y: abs(y if x != x or y > x else x), 2),
        low_row("min.NaN", kind, 2) + " abs.f32 %d, %d;": low(kind, lambda x, y: abs(x if x != x or x < y else y), 2),
        f"mov.b32 {{%h, %i}}, %a; setp.lt.{kind} %p, %h, %i; selp.b32 %d, 1, 2, %p;": lambda a, b, c, kind=kind: (
            1 if of_low(a & 0xFFFF, kind) < of_low(a >> 16, kind) else 2
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
        .global .align 4 .b32 digits[3] = {{7, 80, 900}};
        .visible .entry table(.param .u64 .ptr .global .align 4 table_0, .param .u64 table_1) {{
        .local .align 8 .b8 depot[16];
        .reg .b32 %a, %b, %c, %d, %t<2>; .reg .b64 %l, %m, %in, %out; .reg .pred %p, %q, %z; .reg .b16 %h, %i, %j, %k;
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
    [
        "wgmma.fence.sync.aligned;",
        "add.sat.s32 %r, %r, %r;",
        "fma.rn.relu.f32 %r, %r, %r, %r;",
        "call f;",
        "ld.global.v8.b32 {%r}, [p];",
        "add.u32x2 %r, %r, %r;",
        "cp.async.ca.shared.global [p], [p], 2;",
    ],
)
def test_unknown_instruction_is_an_error(instruction):
    text = f".visible .entry odd(.param .u64 p) {{ .reg .b32 %r; {instruction} ret; }}"
    with pytest.raises(RuntimeError, match=rf"odd: unsupported instruction {instruction.split('.')[0].split()[0]}"):
        _host_cuda.PtxLibrary(text)


@pytest.mark.parametrize(
    ("kind", "depth", "a", "c", "expected"),
    [
        ("tf32", 8, 0x3F800FFF, 0.0, 8.0),  # of 1 + 2^-11 - 2^-23 the unit sees 1
        ("tf32", 4, 0x3F802000, 0.0, 4 + 2.0**-8),
        ("tf32", 8, 0x3F800000, 2.0**24, 2.0**24 + 8),
        ("tf32", 8, 0x3F800000, 2.0**25, 2.0**25),  # an accumulator so large that what is added is cut off
        ("tf32", 8, 0x40400000, 2.0**25, 2.0**25 + 16),  # 3 becomes 2, four times; the sum is cut off again
        ("bf16", 16, 0x3F803F80, 2.0**24, 2.0**24 + 16),
        ("bf16", 8, 0x3F803F80, -(2.0**25), -(2.0**25)),
        ("f16", 16, 0x3C003C00, 2.0**25, 2.0**25),
    ],
)
def test_matrix_unit(kind, depth, a, c, expected):
    """A of equal elements, B of ones: the operands' digits, and what the unit of an A100 cuts off."""
    words = depth // (4 if kind == "tf32" else 8)
    one = dict(tf32=0x3F800000, bf16=0x3F803F80, f16=0x3C003C00)[kind]
    library = _host_cuda.PtxLibrary(
        f""".visible .entry unit(.param .u64 unit_0, .param .u32 unit_1, .param .f32 unit_2) {{
        .reg .b32 %a, %b, %c<4>; .reg .b64 %out, %at; ld.param.b64 %out, [unit_0];
        ld.param.b32 %a, [unit_1]; mov.b32 %b, {one}; mov.u32 %c0, %tid.x; mul.wide.u32 %at, %c0, 16;
        add.s64 %out, %out, %at;
        ld.param.b32 %c0, [unit_2]; mov.b32 %c1, %c0; mov.b32 %c2, %c0; mov.b32 %c3, %c0;
        mma.sync.aligned.m16n8k{depth}.row.col.f32.{kind}.{kind}.f32 {{%c0, %c1, %c2, %c3}},
            {{{", ".join(["%a"] * 2 * words)}}}, {{{", ".join(["%b"] * words)}}}, {{%c0, %c1, %c2, %c3}};
        st.global.v4.b32 [%out], {{%c0, %c1, %c2, %c3}}; ret; }}"""
    )
    out = np.zeros(128, np.float32)
    library.launch("unit", (1,), (32,), 0, out, ctypes.c_uint32(a), ctypes.c_float(c))
    assert set(out) == {np.float32(expected)}


@pytest.mark.parametrize("async_lazy", [True, False])
def test_copies_of_every_size(async_lazy):
    library = _host_cuda.PtxLibrary(
        """.extern .shared .align 16 .b8 memory[];
        .visible .entry copies(.param .u64 copies_0, .param .u64 copies_1) {
        .reg .b32 %to, %r<9>; .reg .b64 %in, %out; ld.param.b64 %in, [copies_0]; ld.param.b64 %out, [copies_1];
        mov.b32 %to, memory; mov.b32 %r8, 4;
        st.shared.v4.b32 [%to], {5, 6, 7, 8};
        cp.async.ca.shared.global [ %to + 0 ], [ %in + 0 ], 0x4;
        cp.async.ca.shared.global [ %to + 8 ], [ %in + 8 ], 0x8, %r8;
        cp.async.cg.shared.global.L2::128B [ %to + 16 ], [ %in + 16 ], 0x10;
        cp.async.commit_group; cp.async.wait_group 0;
        ld.shared.v4.b32 {%r0, %r1, %r2, %r3}, [%to]; ld.shared.v4.b32 {%r4, %r5, %r6, %r7}, [%to+16];
        st.global.v4.b32 [%out], {%r0, %r1, %r2, %r3}; st.global.v4.b32 [%out+16], {%r4, %r5, %r6, %r7}; ret; }"""
    )
    given, got = np.arange(10, 18, dtype=np.uint32), np.zeros(8, np.uint32)
    _host_cuda.ptx_order(async_lazy=async_lazy)
    library.launch("copies", (1,), (1,), 32, given, got)
    assert got.tolist() == [10, 6, 12, 0, 14, 15, 16, 17]
    with pytest.raises(RuntimeError, match=r"access of 16 bytes at .*in no tensor of the launch; 16 bytes from"):
        library.launch("copies", (1,), (1,), 32, given[:7], got)
    with pytest.raises(RuntimeError, match=r"copies: parameter 1 has 8 bytes in PTX and 4 on the host"):
        library.launch("copies", (1,), (1,), 32, given, ctypes.c_int(3))
