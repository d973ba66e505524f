"""What the machine code of the kernels of linear_euler is like, and what they have to move and compute at least."""

from machine_code.rules import LOW, TWO_BLOCKS, TWO_WITH_HOPPER, Floor, Rule

ONE_OF_120 = {**TWO_BLOCKS, 120: 0.166}

CUDA = [
    # Many tokens of a sample: three chunks in shared memory, of 16, 32 and 64 outputs. All that the loop reads comes by
    # cp.async, but for a gain a feature.
    Rule(rf"linear_euler_slices_kernel<{LOW}, .*, [24]>", 128, TWO_BLOCKS, dynamic=46848, has="HMMA>=6 LDGSTS>=6"),
    Rule(rf"linear_euler_slices_kernel<{LOW}, .*, 8>", 128, ONE_OF_120, dynamic=62208, has="HMMA>=24 LDGSTS>=6"),
    Rule(r"linear_euler_slices_kernel<float, float, 2>", 112, TWO_BLOCKS, dynamic=46464, has="HMMA>=12 LDGSTS>=6"),
    Rule(r"linear_euler_slices_kernel<float, float, [48]>", 128, ONE_OF_120, dynamic=74112, has="HMMA>=24 LDGSTS>=6"),
    Rule(r"linear_euler_finish_kernel<(16|32|64)>", 96, TWO_BLOCKS, has="LDG.128>=3"),
    # Guided tokens of 1,152 features, 16 outputs; 4,096 tokens of 3,072, 64 outputs; a Linear of 512. Tokens come by
    # cp.async's 16 bytes; bfloat16 and float16 weights come by 8 bytes, four features of one output.
    Rule(
        rf"linear_euler_kernel<{LOW}, .*, false, [24]>",
        128,
        TWO_BLOCKS,
        dynamic=37376,
        has="HMMA>=6 LDGSTS LDG.narrow<=9",
    ),
    Rule(
        rf"linear_euler_kernel<{LOW}, {LOW}, false, 8>",
        128,
        TWO_WITH_HOPPER,
        dynamic=98816,
        has="HMMA>=24 LDGSTS LDG.narrow<=9",
    ),
    Rule(
        r"linear_euler_kernel<float, float, false, [24]>",
        128,
        ONE_OF_120,
        dynamic=74752,
        has="HMMA>=12 LDGSTS LDG.128>=10 LDG.narrow<=9",
    ),
    Rule(r"linear_euler_kernel<.*, true, [24]>", 64, 0.5, dynamic=22656, has="HMMA>=2 LDGSTS LDG.narrow<=9"),
    Rule(r"linear_euler_kernel<.*, true, 8>", 96, TWO_BLOCKS, dynamic=41216, has="HMMA>=8 LDGSTS LDG.narrow<=9"),
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

# A tile is 64 tokens, of which a block takes a slice of the features: as many slices as fill the multiprocessors once,
# with a block for the sums of each sample. Warps of 16 rows read the weights of their features from shared memory. The
# second kernel reads what the first has added up.
FLOORS = [
    # Three products of parts
    Floor(
        case="4,096 tokens of 3,072 -> 64, bfloat16",
        sizes=dict(T=4096, d=3072, o=64),
        moves="T * d * 2 + o * d * 2 + T * o * (4 + 4)",
        computes="3 * 2 * T * d * o",
        unit="16-bit",
        elements="T * d",
        kernel="linear_euler_slices_kernel<__nv_bfloat16, __nv_bfloat16, 8>",
        blocks="65 * max(1, resident * sms // 65)",
        issues="T * d / 256 * 24 * HMMA + T * d / 4096 * 8 * 110 + blocks * 8 * 700",
        l2="T * d * 2 + T / 64 * o * d * 2 + 2 * blocks / 65 * T * o * 4 + T * o * (4 + 4)",
        shared="2 * T * d * 2 + T / 64 * (1 + 4) * o * d * 2 + 5 * blocks / 65 * T * o * 4",
        launches=2,
    ),
    # Six products of parts
    Floor(
        case="1,024 tokens of 1,152 -> 4 channels of 2x2, guided, float32",
        sizes=dict(T=1024, d=1152, o=16),
        moves="2 * T * d * 4 + o * d * 4 + T * o * (4 + 4)",
        computes="6 * 2 * 2 * T * d * o",
        unit="16-bit",
        elements="2 * T * d",
        kernel="linear_euler_slices_kernel<float, float, 2>",
        blocks="34 * min(6, max(1, resident * sms // 34))",
        issues="2 * T * d / 256 * 12 * HMMA + blocks * 8 * 700",
        l2="2 * T * d * 4 + T / 32 * o * d * 4 + 4 * blocks / 34 * T * o * 4 + T * o * (4 + 4)",
        shared="4 * T * d * 4 + T / 32 * (1 + 4) * o * d * 4 + 10 * blocks / 34 * T * o * 4",
        launches=2,
    ),
]
