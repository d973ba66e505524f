"""The ops: one folder each, with the public function, its registration and its torch reference."""

from flowkernels.ops.bellman import bellman
from flowkernels.ops.euler_step import euler_step
from flowkernels.ops.velocity_gram import velocity_gram

OPS = ("velocity_gram", "bellman", "euler_step")

__all__ = ["OPS", "bellman", "euler_step", "velocity_gram"]
