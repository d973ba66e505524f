"""What the machine code of the kernels of bellman is like, and what they have to move and compute at least."""

from machine_code.rules import Floor, Rule

CUDA = [
    # a product is rounded, then the sum
    Rule(r"bellman_kernel<[48]>", 40, 0.75, double=True, has="DMUL DFMA<=0"),
    Rule(r"bellman_kernel<16>", 64, 0.5, double=True, has="DMUL DFMA<=0"),
    Rule(r"bellman_step_kernel<(false|true)>", 40, 0.75, double=True, has="DMUL DFMA<=0"),
    Rule(r"bellman_(start|refused)_kernel", 32, 1.0, double=True),
]

TRITON = [
    Rule(r"bellman_kernel<.*BLOCK=32.*>.*", 72, 0.37, double=True),
    Rule(r"bellman_kernel<.*BLOCK=64.*>.*", 112, 0.25, double=True),
    Rule(r"bellman_check_kernel.*", 32, 1.0),
    Rule(r"bellman_step_kernel.*", 80, 0.37, double=True),
]

FLOORS = [
    # a sum and a comparison for each pair and step
    Floor(
        case="K=1000, N=1..20",
        sizes=dict(K=1000, N=20),
        moves="K * (K + 1) // 2 * 8 + (N + 1) * (K + 1) * 16",
        computes="N * K * (K + 1)",
        unit="fp64",
        elements="N * K * K / 2",
        kernel="bellman_step_kernel<false>",
        blocks="ceil(K + 1, 8)",
        l2="(N - 1) * K * K / 2 * 8",
        issues="(N - 1) * (K * K / 2 / 32 * DADD + blocks * 16 * 100)",
        longest=2,  # that of the last knots
        chain="(N - 1) * 600",  # the sums of a block's warps
        launches=20,
    ),
]
