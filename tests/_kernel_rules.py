"""What the machine code of every kernel must be like. Each kernel has exactly one rule, and each rule has a kernel.

For all: no stack, no local memory, and no double precision unless a template argument or `double` says so.
"""

from _binaries import Rule

RULES = [
    # 16-byte accesses where there are vectors, and one element at a time for what is left; the instances of one element
    # take tensors that cannot be aligned together
    Rule(r"euler_step_kernel<.*, [248]>", 40, 1.0, has="LDG.128>=2 LDG.narrow<=3 STG.128 STG.narrow<=2"),
    Rule(r"euler_step_kernel<.*, 1>", 24, 1.0),
]
