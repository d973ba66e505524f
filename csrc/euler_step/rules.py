"""What the machine code of the kernels of euler_step is like, and what they have to move and compute at least."""

from machine_code.rules import Floor, Rule

CUDA = [
    # 16-byte accesses where there are vectors, and one element at a time for what is left; the instances of one element
    # take tensors that cannot be aligned together
    Rule(r"euler_step_kernel<.*, [248]>", 40, 1.0, has="LDG.128>=2 LDG.narrow<=3 STG.128 STG.narrow<=2"),
    Rule(r"euler_step_kernel<.*, 1>", 24, 1.0),
]

TRITON = [
    # 16 bytes of a float32 or float64 state at once, and as many elements of the rest; one at a time in the last block
    Rule(r"euler_step_kernel<x=float32.*", 32, 1.0, has="LDG.128 STG.128"),
    Rule(r"euler_step_kernel<x=float64.*", 40, 0.75, has="LDG.128 STG.128"),
]

FLOORS = [
    Floor(
        case="65536 Ki elements, guided, bfloat16 velocities and copy, given",
        sizes=dict(n=64 << 20),
        moves="n * (4 + 2 + 2 + 4 + 2)",
        computes="n * 5",
        unit="fp32",
        elements="n",
        kernel="euler_step_kernel<float, __nv_bfloat16, __nv_bfloat16, true, 4>",
        blocks="ceil(n, 256 * 8)",
        issues="n * 3 / 32 * FP32",
    ),
    Floor(
        case="16384 Ki elements, float32",
        sizes=dict(n=16 << 20),
        moves="n * (4 + 4 + 4)",
        computes="n * 2",
        unit="fp32",
        elements="n",
        kernel="euler_step_kernel<float, float, float, false, 4>",
        blocks="ceil(n, 256 * 4)",
        issues="n / 32 * FP32",
    ),
]
