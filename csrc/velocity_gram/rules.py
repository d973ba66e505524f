"""What the machine code of the kernels of velocity_gram is like, and what they have to move and compute at least."""

from machine_code.rules import LOW, TWO_BLOCKS, Floor, Rule

CUDA = [
    # K = 100, blocks of 320 threads; for pairs of panels K = 256, blocks of 512; as many slabs in flight as there is
    # room for
    Rule(
        r"velocity_gram_increments_kernel<float, false>",
        96,
        {80: 0.3125, 90: 0.3125, 100: 0.3125, 120: 0.416},
        dynamic={80: 68160, 90: 68160, 100: 68160, 120: 42560},
        threads=320,
        has="HMMA>=24 LDSM>=8 LDGSTS",
    ),
    Rule(
        rf"velocity_gram_increments_kernel<{LOW}, false>",
        96,
        {80: 0.3125, 90: 0.3125, 100: 0.3125, 120: 0.416},
        dynamic=42560,
        threads=320,
        has="HMMA>=24 LDSM>=8 LDGSTS",
    ),
    Rule(
        r"velocity_gram_increments_kernel<float, true>",
        104,
        TWO_BLOCKS,
        dynamic={80: 165952, 90: 165952, 100: 165952, 120: 99904},
        has="HMMA>=24 LDSM>=8 LDGSTS",
    ),
    Rule(
        rf"velocity_gram_increments_kernel<{LOW}, true>",
        104,
        TWO_BLOCKS,
        dynamic=99904,
        has="HMMA>=24 LDSM>=8 LDGSTS",
    ),
    # secants of states differ in few digits
    Rule(r"velocity_gram_rows_kernel<float, .*>", 112, 0.25, double=True),
    Rule(r"velocity_gram_rows_kernel<double, double>", 128, 0.25),
    # the sums of the blocks are added up in float64; times are float64
    Rule(r"velocity_gram_sum_kernel<.*>", 40, 1.0, double=True),
    Rule(r"velocity_gram_knots_kernel", 16, 1.0, threads=256, double=True),
]

TRITON = [
    # Increments are formed of what comes asynchronously where rows are aligned. float64 has no tensor cores on sm_120.
    Rule(r"velocity_gram_kernel<v=float32.*", 168, 0.1, has="tensor_cores LDGSTS STG.128"),
    Rule(r"velocity_gram_kernel<v=b?float16.*", 128, 0.2, has="tensor_cores STG.128"),
    Rule(r"velocity_gram_kernel<v=float64.*", 120, 0.25, has="FP64 STG.128"),
    # secants of states differ in few digits; times are float64, and the slices are added up in float64
    Rule(r"velocity_gram_rows_kernel<.*", 48, 0.62, double=True, has="LDG.128 STG.128"),
    Rule(r"velocity_gram_sum_kernel<.*", 96, 0.31, double=True, has="LDG.128"),
]

FLOORS = [
    # each pair of increments once
    Floor(
        case="float32, three products of halves",
        sizes=dict(K=100, M=307200),
        moves="K * M * 4",
        computes="3 * K * (K - 1) * M",
        unit="16-bit",
        kernel="velocity_gram_increments_kernel<float, false>",
    ),
    Floor(
        case="bfloat16, three products of halves",
        sizes=dict(K=100, M=307200),
        moves="K * M * 2",
        computes="3 * K * (K - 1) * M",
        unit="16-bit",
        kernel="velocity_gram_increments_kernel<__nv_bfloat16, false>",
    ),
]
