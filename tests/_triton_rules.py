"""What the machine code of every Triton kernel must be like, as _kernel_rules.py says it of those in CUDA C++.

For all: no stack, no local memory, no double precision unless an argument is float64 or `double` says so, no atomics.
Ceilings of registers are what Triton 3.9 needs, up to the next multiple of 8.
"""

from _binaries import Rule

LOW = "(float16|bfloat16)"

RULES = [
    # 16 bytes of a float32 or float64 state at once, and as many elements of the rest; one at a time in the last block
    Rule(r"euler_step_kernel<x=float32.*", 32, 1.0, has="LDG.128 STG.128"),
    Rule(r"euler_step_kernel<x=float64.*", 40, 0.75, has="LDG.128 STG.128"),
    Rule(r"bellman_check_kernel.*", 32, 1.0),
    Rule(r"bellman_step_kernel.*", 72, 0.37, double=True),
    Rule(r"cost_from_gram_kernel.*", 96, 0.31),
    # tokens and weights come asynchronously; the state of a token's 64 outputs 16 bytes at once, that of patches not
    Rule(r"linear_euler_kernel<x=float32.*BLOCK_O=(32|64).*", 136, 0.1, has="HMMA LDGSTS LDG.128 STG.128"),
    Rule(r"linear_euler_kernel<x=float32.*BLOCK_O=16.*", 104, 0.1, has="HMMA LDGSTS"),
    Rule(r"linear_euler_kernel<x=float64.*", 128, 0.1, has="LDGSTS"),
]
