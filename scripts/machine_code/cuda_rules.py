"""What the machine code of every kernel must be like. Each kernel has exactly one rule, and each rule has a kernel.

For all: no stack, no local memory, and no double precision unless a template argument or `double` says so. Ceilings of
registers are what nvcc 13.0 needs, up to the next multiple of 8. Dynamic shared memory is what the launcher asks for in
the cases of benchmarks/, or in those named.
"""

from machine_code.binaries import Rule

LOW = "(__half|__nv_bfloat16)"


def tile(samples: int, element: int) -> dict[int, int]:
    """Of mlp_sample with 64 -> 256 x 3 -> 64: a ring of weights, rows of values and, for bfloat16, of inputs; on sm_120
    no more than there is."""
    rows = samples * (4 * (64 + 2 * 256 + 4) + (2 * (256 + 8) if element == 2 else 0))
    of = (64 << 10) + rows
    return {80: of, 90: of, 100: of, 120: min(of, 98 << 10)}


ONE_BLOCK = {80: 0.125, 90: 0.125, 100: 0.125, 120: 0.166}  # of 256 threads on a multiprocessor
TWO_BLOCKS = {80: 0.25, 90: 0.25, 100: 0.25, 120: 0.333}
TWO_WITH_HOPPER = {80: 0.125, 90: 0.25, 100: 0.25, 120: 0.166}

RULES = [
    # 16-byte accesses where there are vectors, and one element at a time for what is left; the instances of one element
    # take tensors that cannot be aligned together
    Rule(r"euler_step_kernel<.*, [248]>", 40, 1.0, has="LDG.128>=2 LDG.narrow<=3 STG.128 STG.narrow<=2"),
    Rule(r"euler_step_kernel<.*, 1>", 24, 1.0),
    # the loads of four terms are in flight together
    Rule(r"linear_update_kernel<.*, [248]>", 40, 0.75, has="LDG.128>=12 STG.128 STG.narrow<=2"),
    Rule(r"linear_update_kernel<.*, 1>", 40, 1.0),
    # Rows are read by 16 bytes of the bank's type, and what becomes of these is stored as one word, of 4 or 8 bytes
    # where it is narrower: neighbouring lanes fill whole sectors.
    Rule(
        r"segment_points_kernel<(float, float, .*, 4|double, double, .*, 2)>",
        *(48, 0.62),
        has="LDG.128>=3 LDG.narrow<=1 STG.128>=4 STG.narrow<=0",
    ),
    Rule(rf"segment_points_kernel<float, {LOW}, .*, 4>", 48, 0.62, has="LDG.128>=3 LDG.narrow<=1 STG>=4 STG.narrow<=0"),
    Rule(rf"segment_points_kernel<double, {LOW}, .*, 2>", 48, 0.62, has="LDG.128>=3 LDG.narrow<=0"),
    Rule(r"segment_points_kernel<float, .*, 2>", 40, 0.75, has="LDG>=5 LDG.narrow<=1"),
    Rule(r"segment_points_kernel<.*, 1>", 40, 0.75),
    # the same with velocities and their gradient in place of the points; narrow: the weight, the sums
    Rule(
        r"straighten_loss_kernel<(float, float, 4|double, double, 2)>",
        *(64, 0.5),
        has="LDG.128>=9 LDG.narrow<=4 STG.128>=4 STG.narrow<=2",
    ),
    Rule(rf"straighten_loss_kernel<float, {LOW}, 4>", 48, 0.62, has="LDG.128>=6 LDG.narrow<=4 STG>=6 STG.narrow<=2"),
    Rule(r"straighten_loss_kernel<float, .*, 2>", 40, 0.75),
    Rule(r"straighten_loss_kernel<float, .*, 1>", 48, 0.62),
    Rule(r"straighten_loss_kernel<double, double, 1>", 64, 0.5),
    Rule(
        r"straighten_loss_held_kernel<float, float, 4>",
        *(64, 0.5),
        has="LDG.128>=12 LDG.narrow<=2 STG.128>=4 STG.narrow<=1",
    ),
    Rule(
        rf"straighten_loss_held_kernel<float, {LOW}, 4>", 56, 0.5, has="LDG.128>=8 LDG.narrow<=2 STG>=4 STG.narrow<=1"
    ),
    Rule(r"straighten_loss_held_kernel<float, .*, [12]>", 48, 0.62),
    Rule(r"straighten_loss_held_kernel<double, double, 2>", 80, 0.375, has="LDG.128>=12 STG.128>=4"),
    Rule(r"straighten_loss_held_kernel<double, double, 1>", 56, 0.5),
    Rule(r"straighten_loss_join_kernel<.*>", 32, 1.0),
    Rule(r"straighten_loss_mean_kernel<.*>", 40, 0.66),
    # Guided tokens of 1,152 features, 16 outputs; 4,096 tokens of 3,072, 64 outputs; a Linear of 512. Tokens come by
    # cp.async's 16 bytes; bfloat16 and float16 weights come by 8 bytes, four features of one output.
    Rule(
        rf"linear_euler_kernel<{LOW}, .*, false, 1, 4>",
        *(128, TWO_BLOCKS),
        dynamic=37376,
        has="HMMA>=12 LDGSTS LDG.narrow<=9",
    ),
    Rule(
        rf"linear_euler_kernel<{LOW}, {LOW}, false, 1, 8>",
        *(128, TWO_WITH_HOPPER),
        dynamic=98816,
        has="HMMA>=24 LDGSTS LDG.narrow<=9",
    ),
    Rule(
        r"linear_euler_kernel<float, float, false, 1, 4>",
        *(128, {**TWO_BLOCKS, 120: 0.166}),
        dynamic=74752,
        has="HMMA>=24 LDGSTS LDG.128>=12 LDG.narrow<=9",
    ),
    Rule(r"linear_euler_kernel<.*, true, 1, 4>", 64, 0.5, dynamic=22656, has="HMMA>=4 LDGSTS LDG.narrow<=9"),
    Rule(r"linear_euler_kernel<.*, true, 1, 8>", 96, TWO_BLOCKS, dynamic=41216, has="HMMA>=8 LDGSTS LDG.narrow<=9"),
    # for float64, and tokens too long for shared memory
    Rule(r"linear_euler_rows_kernel<float>", 96, 0.25),
    Rule(r"linear_euler_rows_kernel<double>", 136, 0.125),
    # K = 100, blocks of 320 threads; for pairs of panels K = 256, blocks of 512; as many slabs in flight as there is
    # room for
    Rule(
        r"velocity_gram_increments_kernel<float, false>",
        *(96, {80: 0.3125, 90: 0.3125, 100: 0.3125, 120: 0.416}),
        dynamic={80: 68160, 90: 68160, 100: 68160, 120: 42560},
        threads=320,
        has="HMMA>=24 LDSM>=8 LDGSTS",
    ),
    Rule(
        rf"velocity_gram_increments_kernel<{LOW}, false>",
        *(96, {80: 0.3125, 90: 0.3125, 100: 0.3125, 120: 0.416}),
        dynamic=42560,
        threads=320,
        has="HMMA>=24 LDSM>=8 LDGSTS",
    ),
    Rule(
        r"velocity_gram_increments_kernel<float, true>",
        *(104, TWO_BLOCKS),
        dynamic={80: 165952, 90: 165952, 100: 165952, 120: 99904},
        has="HMMA>=24 LDSM>=8 LDGSTS",
    ),
    Rule(
        rf"velocity_gram_increments_kernel<{LOW}, true>",
        *(104, TWO_BLOCKS),
        dynamic=99904,
        has="HMMA>=24 LDSM>=8 LDGSTS",
    ),
    # secants of states differ in few digits
    Rule(r"velocity_gram_rows_kernel<float, .*>", 112, 0.25, double=True),
    Rule(r"velocity_gram_rows_kernel<double, double>", 128, 0.25),
    # the sums of the blocks are added up in float64; times are float64
    Rule(r"velocity_gram_sum_kernel<.*>", 40, 1.0, double=True),
    Rule(r"velocity_gram_knots_kernel", 16, 1.0, threads=256, double=True),
    # By samples of a tile; those of 32 have a multiprocessor to themselves. Products of float32 are spelled out:
    # no tensor cores. The wide ones have their rows in device memory.
    Rule(r"mlp_sample_kernel<Fma<1, 1>, false>", 88, {**TWO_BLOCKS, 120: 0.166}, tile(1, 4), "FFMA LDGSTS HMMA<=0"),
    Rule(r"mlp_sample_kernel<Fma<4, 1>, false>", 128, {**TWO_BLOCKS, 120: 0.166}, tile(4, 4), "FFMA LDGSTS HMMA<=0"),
    Rule(r"mlp_sample_kernel<Fma<8, 1>, false>", 112, TWO_WITH_HOPPER, tile(8, 4), "FFMA LDGSTS HMMA<=0"),
    Rule(r"mlp_sample_kernel<Fma<8, 2>, false>", 112, TWO_WITH_HOPPER, tile(16, 4), "FFMA>=128 LDGSTS HMMA<=0"),
    Rule(r"mlp_sample_kernel<Fma<8, 4>, false>", 128, ONE_BLOCK, tile(32, 4), "FFMA>=256 LDGSTS HMMA<=0"),
    Rule(r"mlp_sample_kernel<Fma<8, 1>, true>", 128, {**TWO_BLOCKS, 120: 0.166}, 64 << 10, "FFMA LDGSTS HMMA<=0"),
    Rule(r"mlp_sample_kernel<Mma<1>, false>", 104, TWO_WITH_HOPPER, tile(8, 2), "HMMA>=14 LDSM LDGSTS"),
    Rule(r"mlp_sample_kernel<Mma<2>, false>", 104, TWO_WITH_HOPPER, tile(16, 2), "HMMA>=28 LDSM LDGSTS"),
    Rule(r"mlp_sample_kernel<Mma<4>, false>", 128, ONE_BLOCK, tile(32, 2), "HMMA>=56 LDSM LDGSTS"),
    Rule(r"mlp_sample_kernel<Mma<1>, true>", 120, {**TWO_BLOCKS, 120: 0.166}, 64 << 10, "HMMA LDGSTS"),
    Rule(r"mlp_upload_kernel", 16, 1.0, threads=256, has="STG.128"),
    # all float64
    Rule(r"cost_from_gram_kernel<.*>", 64, 0.5, double=True),
    Rule(r"bellman_kernel", 64, 0.5, double=True, has="DMUL DFMA<=0"),  # a product is rounded, then the sum
    Rule(r"bellman_pairs_(check|start|step)_kernel", 48, 0.62, double=True),
]
