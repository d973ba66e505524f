"""flowkernels: few-step sampling of flow-matching models, on kernels of its own.

cal = fk.calibrate(velocity, noise)            # the best schedule for each number of steps
x1 = fk.sample(velocity, noise, cal[4])        # four evaluations
result = fk.straighten(None, velocity, cal[4], noise=(3, 32, 32), iterations=2000)
"""

from flowkernels import _entry, backends, ops  # noqa: F401, _entry first: it sees to Ctrl-C
from flowkernels._ranges import profile_ranges
from flowkernels._version import __version__
from flowkernels.backends import BackendError, backend, explain
from flowkernels.calibrate import Calibration, calibrate, load
from flowkernels.calls import record_calls
from flowkernels.fit import fit_solver, polish
from flowkernels.fuse import FusedSampler, NotFusable, fuse
from flowkernels.fuse_head import FusedHead, fuse_head
from flowkernels.inversion import Inversion, invert
from flowkernels.ops import (
    euler_step,
    linear_euler,
    linear_update,
    mlp_sample,
    segment_points,
    straighten_loss,
    velocity_gram,
)
from flowkernels.rollout import Trajectory, rollout
from flowkernels.sample import sample
from flowkernels.schedule import Schedule, StepCost, bellman, step_cost
from flowkernels.solver import Solver
from flowkernels.straighten import Straightened, straighten
from flowkernels.velocity_field import VelocityField

__all__ = [
    "BackendError",
    "Calibration",
    "FusedHead",
    "FusedSampler",
    "Inversion",
    "NotFusable",
    "Schedule",
    "Solver",
    "StepCost",
    "Straightened",
    "Trajectory",
    "VelocityField",
    "__version__",
    "backend",
    "bellman",
    "calibrate",
    "euler_step",
    "explain",
    "fit_solver",
    "fuse",
    "fuse_head",
    "invert",
    "linear_euler",
    "linear_update",
    "load",
    "mlp_sample",
    "ops",
    "polish",
    "profile_ranges",
    "record_calls",
    "rollout",
    "sample",
    "segment_points",
    "step_cost",
    "straighten",
    "straighten_loss",
    "velocity_gram",
]

if _problem := backends.not_built():
    import warnings

    warnings.warn(_problem, RuntimeWarning, stacklevel=2)
