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

# Of a slab of 32 columns, with tiles of 32 x 32 sums: 24 products for each half of a tile, 8 lanes for a row's
# increments, 16 bytes a copy; and what scales and adds the sums up.
SLABS = dict(
    blocks="sms * resident",
    issues="M // 32 * (tiles * 48 * HMMA + 96 * SHFL + K * {element} / 16 * LDGSTS + 2400)",
    l2="K * M * {element} + 2 * blocks * tiles * 4096",
    # velocities in, twice out; halves in; the halves of both sides of a tile, and scales
    shared="M // 32 * (K * 32 * {element} * 3 + 128 * 128 + tiles * (16 * 512 + 12 * 128))",
    launches=2,
)


def slabs(element: int) -> dict:
    return {key: value.format(element=element) if isinstance(value, str) else value for key, value in SLABS.items()}


FLOORS = [
    # each pair of increments once, as three products of halves
    Floor(
        case="K=100, n=100, D=3072, float32",
        sizes=dict(K=100, M=307200, tiles=10),
        moves="K * M * 4",
        computes="3 * K * (K - 1) * M",
        unit="16-bit",
        elements="K * M",
        kernel="velocity_gram_increments_kernel<float, false>",
        **slabs(4),
    ),
    Floor(
        case="K=100, n=100, D=3072, bfloat16",
        sizes=dict(K=100, M=307200, tiles=10),
        moves="K * M * 2",
        computes="3 * K * (K - 1) * M",
        unit="16-bit",
        elements="K * M",
        kernel="velocity_gram_increments_kernel<__nv_bfloat16, false>",
        **slabs(2),
    ),
]
