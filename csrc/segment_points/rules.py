"""What the machine code of the kernels of segment_points is like, and what they have to move and compute at least."""

from machine_code.rules import LOW, Floor, Rule

CUDA = [
    # Rows are read by 16 bytes of the bank's type, and what becomes of these is stored as one word, of 4 or 8 bytes
    # where it is narrower: neighbouring lanes fill whole sectors.
    Rule(
        r"segment_points_kernel<(float, float, .*, 4|double, double, .*, 2)>",
        48,
        0.62,
        has="LDG.128>=3 LDG.narrow<=1 STG.128>=4 STG.narrow<=0",
    ),
    Rule(rf"segment_points_kernel<float, {LOW}, .*, 4>", 48, 0.62, has="LDG.128>=3 LDG.narrow<=1 STG>=4 STG.narrow<=0"),
    Rule(rf"segment_points_kernel<double, {LOW}, .*, 2>", 48, 0.62, has="LDG.128>=3 LDG.narrow<=0"),
    Rule(r"segment_points_kernel<float, .*, 2>", 40, 0.75, has="LDG>=5 LDG.narrow<=1"),
    Rule(r"segment_points_kernel<.*, 1>", 40, 0.75),
]

TRITON = [
    # the points, where they are not of 16 bits, as wide as the bank
    Rule(r"segment_points_kernel<.*out=float(32|64).*", 40, 0.75, has="LDG.128 STG.128"),
    Rule(r"segment_points_kernel<.*out=b?float16.*", 32, 1.0, has="LDG.128 STG>=1"),
]

FLOORS = [
    Floor(
        case="n=256, D=65536",  # places all different
        sizes=dict(B=256, D=65536),
        moves="B * D * (4 + 4 + 4)",
        computes="B * D * 3",
        unit="fp32",
        elements="B * D",
        kernel="segment_points_kernel<float, float, true, 4>",
        blocks="B * D // 4096",
        issues="B * D / 4 / 32 * STG_128",
    ),
]
