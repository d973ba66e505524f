"""What the machine code of the kernels of linear_update is like, and what they have to move and compute at least."""

from machine_code.rules import Floor, Rule

CUDA = [
    # the loads of four terms are in flight together
    Rule(r"linear_update_kernel<.*, [248]>", 40, 0.75, has="LDG.128>=12 STG.128 STG.narrow<=2"),
    Rule(r"linear_update_kernel<.*, 1>", 40, 1.0),
]

TRITON = [
    Rule(r"linear_update_kernel<x=float32.*", 40, 0.75, has="LDG.128 STG.128"),
    Rule(r"linear_update_kernel<x=float64.*", 48, 0.62, has="LDG.128 STG.128"),
]

FLOORS = [
    Floor(
        case="4096 Ki elements, 16 terms, float32",
        sizes=dict(n=4 << 20, terms=16),
        moves="n * (4 + 4 * terms + 4)",
        computes="n * 2 * terms",
        unit="fp32",
        elements="n * terms",
        kernel="linear_update_kernel<float, float, float, 4>",
        blocks="ceil(n, 256 * 4)",
        issues="n / 32 * (terms * FP32 + 20)",
    ),
    Floor(
        case="4096 Ki elements, 16 terms, bfloat16",
        sizes=dict(n=4 << 20, terms=16),
        moves="n * (4 + 2 * terms + 4)",
        computes="n * 2 * terms",
        unit="fp32",
        elements="n * terms",
        kernel="linear_update_kernel<float, __nv_bfloat16, float, 8>",
        blocks="ceil(n, 256 * 8)",
        issues="n / 32 * (terms * FP32 + 20)",
    ),
]
