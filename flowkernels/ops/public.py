"""The ops' public functions, as `flowkernels` has them; importing this registers them. OPS: their names, in the order
of this file, as lists and tables have them.
"""

# isort: off
from flowkernels.ops.velocity_gram import velocity_gram as velocity_gram
from flowkernels.ops.cost_from_gram import cost_from_gram as cost_from_gram
from flowkernels.ops.bellman import bellman as bellman
from flowkernels.ops.bellman_pairs import bellman_pairs as bellman_pairs
from flowkernels.ops.euler_step import euler_step as euler_step
from flowkernels.ops.linear_euler import linear_euler as linear_euler
from flowkernels.ops.linear_update import linear_update as linear_update
from flowkernels.ops.segment_points import segment_points as segment_points
from flowkernels.ops.straighten_loss import straighten_loss as straighten_loss
from flowkernels.ops.mlp_sample import mlp_sample as mlp_sample

# isort: on
from flowkernels.ops.library import KERNELS as _KERNELS

OPS = tuple(name for name in list(globals()) if name in _KERNELS)
