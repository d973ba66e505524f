"""What the machine code of the kernels of mlp_sample is like, and what they have to move and compute at least."""

from machine_code.rules import ONE_BLOCK, TWO_BLOCKS, TWO_WITH_HOPPER, Floor, Rule


def tile(samples: int, element: int) -> dict[int, int]:
    """Shared memory with 64 -> 256 x 3 -> 64: a ring of weights, rows of values and, for bfloat16, of inputs; on sm_120
    no more than there is."""
    rows = samples * (4 * (64 + 2 * 256 + 4) + (2 * (256 + 8) if element == 2 else 0))
    of = (64 << 10) + rows
    return {80: of, 90: of, 100: of, 120: min(of, 98 << 10)}


CUDA = [
    # By samples of a tile; those of 32 have a multiprocessor to themselves. Products of float32 are spelled out:
    # no tensor cores. The wide ones have their rows in device memory.
    Rule(r"mlp_sample_kernel<Fma<1, 1>, false>", 94, {**TWO_BLOCKS, 120: 0.166}, tile(1, 4), "FFMA LDGSTS HMMA<=0"),
    Rule(r"mlp_sample_kernel<Fma<4, 1>, false>", 128, {**TWO_BLOCKS, 120: 0.166}, tile(4, 4), "FFMA LDGSTS HMMA<=0"),
    Rule(r"mlp_sample_kernel<Fma<8, 1>, false>", 116, TWO_WITH_HOPPER, tile(8, 4), "FFMA LDGSTS HMMA<=0"),
    Rule(r"mlp_sample_kernel<Fma<8, 2>, false>", 116, TWO_WITH_HOPPER, tile(16, 4), "FFMA>=128 LDGSTS HMMA<=0"),
    Rule(r"mlp_sample_kernel<Fma<8, 4>, false>", 128, ONE_BLOCK, tile(32, 4), "FFMA>=256 LDGSTS HMMA<=0"),
    Rule(r"mlp_sample_kernel<Fma<8, 1>, true>", 128, {**TWO_BLOCKS, 120: 0.166}, 64 << 10, "FFMA LDGSTS HMMA<=0"),
    Rule(r"mlp_sample_kernel<Mma<1>, false>", 108, TWO_WITH_HOPPER, tile(8, 2), "HMMA>=14 LDSM LDGSTS"),
    Rule(r"mlp_sample_kernel<Mma<2>, false>", 108, TWO_WITH_HOPPER, tile(16, 2), "HMMA>=28 LDSM LDGSTS"),
    Rule(r"mlp_sample_kernel<Mma<4>, false>", 128, ONE_BLOCK, tile(32, 2), "HMMA>=56 LDSM LDGSTS"),
    Rule(r"mlp_sample_kernel<Mma<1>, true>", 124, {**TWO_BLOCKS, 120: 0.166}, 64 << 10, "HMMA LDGSTS"),
    Rule(r"mlp_upload_kernel", 16, 1.0, threads=256, has="STG.128"),
]

TRITON = [
    # Euler steps; and updates of a solver, whose places and factors are held as well
    Rule(r"mlp_sample_kernel<.*updates=None.*", 240, 0.12, has="tensor_cores LDGSTS", older={"3.6": 248}),
    Rule(r"mlp_sample_kernel<.*updates=int64.*", 255, 0.12, has="tensor_cores LDGSTS"),
]

WEIGHTS = 2 * 64 * 256 + 2 * 256 * 256

FLOORS = [
    # A block reads all weights in every step, and multiplies as many samples as it has room for. What is not products,
    # of a layer: 137 us / 32 layers for one sample with bfloat16 weights on an H200, 2026-11-29, less these, is 5,000
    # clocks; since then five panels of a layer no longer wait for a load of 263 each.
    Floor(
        case="64 -> 256 x 3 -> 64, N=8, n=4096, float32 weights",
        sizes=dict(n=4096, D=64, w=256, N=8, weights=WEIGHTS),
        moves="n * D * 8 + 4 * weights",
        computes="2 * n * N * weights",
        unit="fp32",
        elements="n * N",
        kernel="mlp_sample_kernel<Fma<8, 4>, false>",
        blocks="ceil(n, min(32, ceil(n, sms)))",
        issues="blocks * N * (weights * (FFMA + LDGSTS / 4 / 32) + 32 * (3 * w + D) / 32 * 80)",
        l2="blocks * N * 4 * weights",
        chain="N * 4 * 3700",
        shared="blocks * N * weights / 128 * (8 * 128 + 4 * 512)",
    ),
    Floor(
        case="64 -> 256 x 3 -> 64, N=8, n=1024, bfloat16 weights",
        sizes=dict(n=1024, D=64, w=256, N=8, weights=WEIGHTS),
        moves="n * D * 8 + 2 * weights",
        computes="2 * n * N * weights",
        unit="16-bit",
        elements="n * N",
        kernel={sm: f"mlp_sample_kernel<Mma<{2 if sm == 80 else 1}>, false>" for sm in (80, 90, 100, 120)},
        blocks="ceil(n, min(32, ceil(n, sms)))",
        issues="blocks * N * (weights * (ceil(n, 8 * sms) * HMMA / 256 + LDGSTS / 8 / 32) + 8 * (3 * w + D) / 32 * 80)",
        l2="blocks * N * 2 * weights",
        chain="N * 4 * 3700",
        shared="blocks * N * weights * 2 * 2",
    ),
]
