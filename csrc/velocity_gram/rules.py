"""What the machine code of the kernels of velocity_gram is like, and what they have to move and compute at least."""

from machine_code.rules import LOW, Floor, Rule

CUDA = [
    # One block on a multiprocessor. K = 100: ten warps have a tile and five load; pairs of panels: 16 and 4.
    Rule(
        r"velocity_gram_increments_kernel<float, false>",
        128,
        {80: 0.23, 90: 0.23, 100: 0.23, 120: 0.31},
        dynamic=67136,
        threads=480,
        has="HMMA>=84 LDSM>=24 LDG.128>=13",
    ),
    Rule(
        rf"velocity_gram_increments_kernel<{LOW}, false>",
        120,
        {80: 0.23, 90: 0.23, 100: 0.23, 120: 0.31},
        dynamic=67136,
        threads=480,
        has="HMMA>=84 LDSM>=24 LDG>=13",
    ),
    Rule(
        r"velocity_gram_increments_kernel<float, true>",
        96,
        {80: 0.31, 90: 0.31, 100: 0.31, 120: 0.41},
        dynamic=68672,
        has="HMMA>=24 LDSM>=8 LDG.128>=9",
    ),
    Rule(
        rf"velocity_gram_increments_kernel<{LOW}, true>",
        96,
        {80: 0.31, 90: 0.31, 100: 0.31, 120: 0.41},
        dynamic=68672,
        has="HMMA>=24 LDSM>=8 LDG>=9",
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

# Of a slab of 64 columns: 24 products for each quarter of a tile; what a loader does for 12 increments of its lanes,
# by hand, for its loop also holds what seldom happens; and the loops of the ten warps that multiply.
SLABS = dict(
    blocks="sms",
    issues="M // 64 * (quarters * 24 * HMMA + loaders * 620 + 700)",
    # loaders share the rows between them; partial sums
    l2="K * M * {element} * 13 / 12 + 2 * blocks * tiles * 4096",
    # halves in; and out, 16 rows of 16 columns a load
    shared="M // 64 * (K * 64 * 4 + 224 * 512)",
    longest=1.6,
    launches=2,
)


def slabs(element: int) -> dict:
    return {key: value.format(element=element) if isinstance(value, str) else value for key, value in SLABS.items()}


FLOORS = [
    # each pair of increments once, as three products of halves
    Floor(
        case="K=100, n=100, D=3072, float32",
        sizes=dict(K=100, M=307200, tiles=10, quarters=28, loaders=5),
        moves="K * M * 4",
        computes="3 * K * (K - 1) * M",
        unit="16-bit",
        elements="K * M",
        kernel="velocity_gram_increments_kernel<float, false>",
        **slabs(4),
    ),
    Floor(
        case="K=100, n=100, D=3072, bfloat16",
        sizes=dict(K=100, M=307200, tiles=10, quarters=28, loaders=5),
        moves="K * M * 2",
        computes="3 * K * (K - 1) * M",
        unit="16-bit",
        elements="K * M",
        kernel="velocity_gram_increments_kernel<__nv_bfloat16, false>",
        **slabs(2),
    ),
]
