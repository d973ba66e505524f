"""The ops: one folder each, with the public function, its registration and its torch reference."""

from flowkernels.ops.bellman import bellman
from flowkernels.ops.bellman_pairs import bellman_pairs
from flowkernels.ops.cost_from_gram import cost_from_gram
from flowkernels.ops.euler_step import euler_step
from flowkernels.ops.linear_euler import linear_euler
from flowkernels.ops.linear_update import linear_update
from flowkernels.ops.mlp_sample import mlp_sample
from flowkernels.ops.segment_points import segment_points
from flowkernels.ops.straighten_loss import StraightenLoss, straighten_loss
from flowkernels.ops.velocity_gram import velocity_gram

OPS = (
    "velocity_gram",
    "cost_from_gram",
    "bellman",
    "bellman_pairs",
    "euler_step",
    "linear_euler",
    "linear_update",
    "segment_points",
    "straighten_loss",
    "mlp_sample",
)

__all__ = [
    "OPS",
    "StraightenLoss",
    "bellman",
    "bellman_pairs",
    "cost_from_gram",
    "euler_step",
    "linear_euler",
    "linear_update",
    "mlp_sample",
    "segment_points",
    "straighten_loss",
    "velocity_gram",
]
