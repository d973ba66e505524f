"""What the machine code of the kernels of linear_euler is like, and what they have to move and compute at least."""

from machine_code.rules import LOW, TWO_BLOCKS, TWO_WITH_HOPPER, Floor, Rule

CUDA = [
    # Guided tokens of 1,152 features, 16 outputs; 4,096 tokens of 3,072, 64 outputs; a Linear of 512. Tokens come by
    # cp.async's 16 bytes; bfloat16 and float16 weights come by 8 bytes, four features of one output.
    Rule(
        rf"linear_euler_kernel<{LOW}, .*, false, 1, 4>",
        128,
        TWO_BLOCKS,
        dynamic=37376,
        has="HMMA>=12 LDGSTS LDG.narrow<=9",
    ),
    Rule(
        rf"linear_euler_kernel<{LOW}, {LOW}, false, 1, 8>",
        128,
        TWO_WITH_HOPPER,
        dynamic=98816,
        has="HMMA>=24 LDGSTS LDG.narrow<=9",
    ),
    Rule(
        r"linear_euler_kernel<float, float, false, 1, 4>",
        128,
        {**TWO_BLOCKS, 120: 0.166},
        dynamic=74752,
        has="HMMA>=24 LDGSTS LDG.128>=12 LDG.narrow<=9",
    ),
    Rule(r"linear_euler_kernel<.*, true, 1, 4>", 64, 0.5, dynamic=22656, has="HMMA>=4 LDGSTS LDG.narrow<=9"),
    Rule(r"linear_euler_kernel<.*, true, 1, 8>", 96, TWO_BLOCKS, dynamic=41216, has="HMMA>=8 LDGSTS LDG.narrow<=9"),
    # for float64, and tokens too long for shared memory
    Rule(r"linear_euler_rows_kernel<float>", 96, 0.25),
    Rule(r"linear_euler_rows_kernel<double>", 136, 0.125),
]

TRITON = [
    # tokens and weights come asynchronously; the state of a token's 64 outputs 16 bytes at once, that of patches not
    Rule(
        r"linear_euler_kernel<x=float32.*BLOCK_O=64.*",
        136,
        0.1,
        has="tensor_cores LDGSTS LDG.128 STG.128",
        older={"3.6": 168},
    ),
    Rule(r"linear_euler_kernel<x=float32.*BLOCK_O=(16|32).*", 104, 0.1, has="tensor_cores LDGSTS", older={"3.6": 128}),
    Rule(r"linear_euler_kernel<x=float64.*", 128, 0.1, has="FP64 LDGSTS"),
]

FLOORS = [
    # Three products of parts. Of 16 tokens: a block reads all weights, scales and shifts.
    Floor(
        case="4,096 tokens of 3,072 -> 64, bfloat16",
        sizes=dict(T=4096, d=3072, o=64),
        moves="T * d * 2 + o * d * 2 + T * o * (4 + 4)",
        computes="3 * 2 * T * d * o",
        unit="16-bit",
        elements="T * d",
        kernel="linear_euler_kernel<__nv_bfloat16, __nv_bfloat16, false, 1, 8>",
        blocks="ceil(T, 16)",
        issues="T * d / 256 * (24 * HMMA + 80 + LDGSTS) + blocks * 8 * 450",
        l2="T * d * 2 + blocks * (o + 2) * d * 2 + T * o * (4 + 4)",
        shared="4 * T * d * 2 + 2 * blocks * 8 * 16 * o * 4",
    ),
    # Six products of parts, of 32 outputs
    Floor(
        case="1,024 tokens of 1,152 -> 4 channels of 2x2, guided, float32",
        sizes=dict(T=1024, d=1152, o=16),
        moves="2 * T * d * 4 + o * d * 4 + T * o * (4 + 4)",
        computes="6 * 2 * 2 * T * d * o",
        unit="16-bit",
        elements="2 * T * d",
        kernel="linear_euler_kernel<float, float, false, 1, 4>",
        blocks="ceil(T, 8)",
        issues="2 * T * d / 256 * (24 * HMMA + 60 + 2 * LDGSTS) + blocks * 8 * 450",
        l2="2 * T * d * 4 + blocks * (o + 4) * d * 4 + T * o * (4 + 4)",
        shared="4 * 2 * T * d * 4 + 2 * blocks * 8 * 16 * 32 * 4",
    ),
]
