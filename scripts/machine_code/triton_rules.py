"""What the machine code of every Triton kernel must be like, as _kernel_rules.py says it of those in CUDA C++.

For all: no stack, no local memory, no double precision unless an argument is float64 or `double` says so, no atomics.
Ceilings of registers are what Triton 3.9 needs, up to the next multiple of 8. Each release allocates them anew: of
others, the ceilings and the occupancy that follows from them are not asked; that nothing is spilled is, of all.
"""

import dataclasses
from importlib.metadata import version

from machine_code.binaries import Rule

LOW = "(float16|bfloat16)"

RULES = [
    # 16 bytes of a float32 or float64 state at once, and as many elements of the rest; one at a time in the last block
    Rule(r"euler_step_kernel<x=float32.*", 32, 1.0, has="LDG.128 STG.128"),
    Rule(r"euler_step_kernel<x=float64.*", 40, 0.75, has="LDG.128 STG.128"),
    Rule(r"linear_update_kernel<x=float32.*", 40, 0.75, has="LDG.128 STG.128"),
    Rule(r"linear_update_kernel<x=float64.*", 48, 0.62, has="LDG.128 STG.128"),
    # the points, where they are not of 16 bits, as wide as the bank
    Rule(r"segment_points_kernel<.*out=float(32|64).*", 40, 0.75, has="LDG.128 STG.128"),
    Rule(r"segment_points_kernel<.*out=b?float16.*", 32, 1.0, has="LDG.128 STG>=1"),
    Rule(r"straighten_loss_held_kernel<v=(float32|float64).*", 56, 0.56, has="LDG.128 STG.128"),
    Rule(r"straighten_loss_held_kernel<v=b?float16.*", 40, 1.0, has="LDG.128"),
    Rule(r"straighten_loss_part_kernel<.*", 56, 0.56, has="LDG.128"),
    Rule(r"straighten_loss_gradient_kernel<.*", 40, 0.75, has="LDG.128 STG.128"),
    Rule(r"straighten_loss_join_kernel<.*", 24, 1.0, has="LDG.128"),
    Rule(r"straighten_loss_mean_kernel<per_sample=float32.*", 48, 0.62, has="LDG.128"),
    Rule(r"straighten_loss_mean_kernel<per_sample=float64.*", 80, 0.37, has="LDG.128"),
    # Increments are formed of what comes asynchronously where rows are aligned. float64 has no tensor cores on sm_120.
    Rule(r"velocity_gram_kernel<v=float32.*", 168, 0.1, has="tensor_cores LDGSTS STG.128"),
    Rule(r"velocity_gram_kernel<v=b?float16.*", 128, 0.2, has="tensor_cores STG.128"),
    Rule(r"velocity_gram_kernel<v=float64.*", 120, 0.25, has="FP64 STG.128"),
    # secants of states differ in few digits; times are float64, and the slices are added up in float64
    Rule(r"velocity_gram_rows_kernel<.*", 48, 0.62, double=True, has="LDG.128 STG.128"),
    Rule(r"velocity_gram_sum_kernel<.*", 96, 0.31, double=True, has="LDG.128"),
    Rule(r"bellman_check_kernel.*", 32, 1.0),
    Rule(r"bellman_step_kernel.*", 80, 0.37, double=True),
    Rule(r"bellman_pairs_check_kernel.*", 72, 0.43),
    Rule(r"bellman_pairs_step_kernel.*", 72, 0.43, double=True),
    Rule(r"cost_from_gram_kernel.*", 96, 0.31),
    # tokens and weights come asynchronously; the state of a token's 64 outputs 16 bytes at once, that of patches not
    Rule(r"linear_euler_kernel<x=float32.*BLOCK_O=64.*", 136, 0.1, has="tensor_cores LDGSTS LDG.128 STG.128"),
    Rule(r"linear_euler_kernel<x=float32.*BLOCK_O=(16|32).*", 104, 0.1, has="tensor_cores LDGSTS"),
    Rule(r"linear_euler_kernel<x=float64.*", 128, 0.1, has="FP64 LDGSTS"),
    # Euler steps; and updates of a solver, whose places and factors are held as well
    Rule(r"mlp_sample_kernel<.*updates=None.*", 240, 0.12, has="tensor_cores LDGSTS"),
    Rule(r"mlp_sample_kernel<.*updates=int64.*", 255, 0.12, has="tensor_cores LDGSTS"),
]
if not version("triton").startswith("3.9."):
    RULES = [dataclasses.replace(rule, registers=255, occupancy=0.0) for rule in RULES]
