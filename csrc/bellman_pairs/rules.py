"""What the machine code of the kernels of bellman_pairs is like, and what they have to move and compute at least."""

from machine_code.rules import Floor, Rule

CUDA = [
    Rule(r"bellman_pairs_kernel", 64, 0.5, double=True),
    Rule(r"bellman_pairs_step_kernel<(false|true)>", 48, 0.62, double=True),
    Rule(r"bellman_pairs_(start|refused)_kernel", 32, 1.0, double=True),
]

TRITON = [
    Rule(r"bellman_pairs_check_kernel.*", 72, 0.43),
    Rule(r"bellman_pairs_step_kernel.*", 72, 0.43, double=True),
]

FLOORS = [
    # what is read of the costs is a sixth of them
    Floor(
        case="K=400, N=1..10",
        sizes=dict(K=400, N=10),
        moves="(K + 1) * K * (K - 1) // 6 * 8 + (N + 1) * (K + 1) ** 2 * 16",
        computes="2 * (N - 2) * (K + 1) * K * (K - 1) // 6",
        unit="fp64",
        elements="(N - 1) * (K + 1) * K * (K - 1) // 6",
        kernel="bellman_pairs_step_kernel<false>",
        blocks="16 * ceil(K + 1, 32) * (ceil(K + 1, 32) + 1)",
        memory="(N - 1) * (K + 1) * K * (K - 1) // 6 * 8 + (N + 1) * (K + 1) ** 2 * 16",
        l2="(N - 1) * ((K + 1) * K * (K - 1) // 6 * 8 + 3 * (K + 1) ** 2 * 8)",
        issues="(N - 1) * ((K + 1) * K * (K - 1) / 6 / 32 * DADD + blocks * 8 * 170)",
        launches=10,
    ),
]
