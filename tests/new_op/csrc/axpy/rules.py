"""What the machine code of the kernels of axpy is like, and what they have to move and compute at least."""

from machine_code.rules import Floor, Rule

CUDA = [Rule(r"axpy_kernel", 16, 1.0)]
TRITON = [Rule(r"axpy_kernel.*", 32, 1.0)]
FLOORS = [
    Floor(
        case="256 Ki elements",
        sizes=dict(n=1 << 18),
        moves="n * (4 + 4 + 4)",
        computes="n * 2",
        unit="fp32",
        elements="n",
        kernel="axpy_kernel",
        blocks="ceil(n, 256)",
        issues="n / 32 * FP32",
    )
]
