"""What the machine code of the kernels of cost_from_gram is like, and what they have to move and compute at least."""

from machine_code.rules import Floor, Rule

CUDA = [
    Rule(r"cost_from_gram_kernel<.*>", 64, 0.5, double=True),
]

TRITON = [
    Rule(r"cost_from_gram_kernel.*", 96, 0.31),
]

FLOORS = [
    # half of a symmetric matrix in, all costs out; two sums of products and three recursions for each pair
    Floor(
        case="K=256",
        sizes=dict(K=256),
        moves="K * (K - 1) // 2 * 8 + (K + 1) ** 2 * 8",
        computes="13 * K * (K + 1) // 2",
        unit="fp64",
        elements="K * K",
        kernel="cost_from_gram_kernel<false>",
        blocks="ceil(K + 1, 2 if sms > K / 2 else 4)",
        # of the first block, which has most, as if all were like it: 128 columns at a time
        issues="blocks * (32 * ceil(K + 1, 128) * 200 + K * (K + 32) / 64 * 2 * LDG)",
        longest=1.3,
        chain="ceil(K + 1, 128) * 1500",  # barriers and the prefix sums
    ),
]
