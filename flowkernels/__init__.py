"""flowkernels: few-step sampling of flow-matching models, on kernels of its own.

cal = fk.calibrate(velocity, noise)            # the best schedule for each number of steps
x1 = fk.sample(velocity, noise, cal[4])        # four evaluations
result = fk.straighten(None, velocity, cal[4], noise=(3, 32, 32), iterations=2000)
"""

from typing import TYPE_CHECKING

from flowkernels import _entry  # noqa: F401, _entry first: it sees to Ctrl-C
from flowkernels._version import __version__
from flowkernels.calibration.bellman import least_cost_schedules
from flowkernels.calibration.calibrate import calibrate
from flowkernels.calibration.calibration import Calibration
from flowkernels.calibration.fit import fit_solver
from flowkernels.calibration.polish import polish
from flowkernels.calibration.step_cost import StepCost, step_costs
from flowkernels.calibration.stock import stock_solvers
from flowkernels.calibration.teacher_error import TeacherError
from flowkernels.evaluation.evaluate import evaluate_sampler
from flowkernels.evaluation.evaluation import Evaluation
from flowkernels.evaluation.images import save_images
from flowkernels.evaluation.likelihood import Likelihood, log_likelihood
from flowkernels.fusion.head import FusedHead, fuse_head
from flowkernels.fusion.sampler import FusedSampler, NotFusable, fuse
from flowkernels.models.checkpoints import LoadedWeights, load_weights
from flowkernels.ops.public import *  # noqa: F403, a function for each of OPS
from flowkernels.ops.public import OPS
from flowkernels.ops.recorded_calls import record_calls
from flowkernels.runtime.backends import BackendError, backend, explain, not_built
from flowkernels.runtime.observers import profile_ranges
from flowkernels.sampling.invert import Inversion, invert
from flowkernels.sampling.noise import noise
from flowkernels.sampling.rollout import Trajectory, rollout
from flowkernels.sampling.sample import sample
from flowkernels.sampling.sample_schedules import SampleSchedules
from flowkernels.schedule import Schedule
from flowkernels.solver import Solver
from flowkernels.training.bank.batch import BankBatch
from flowkernels.training.bank.trajectory_bank import TrajectoryBank
from flowkernels.training.objective import StraightenLoss
from flowkernels.training.pairs.couplings import couple
from flowkernels.training.pairs.pairs import Pairs, forward_pairs
from flowkernels.training.run.cost import TrainingCost
from flowkernels.training.run.events import TrainingEvent
from flowkernels.training.straighten import Straightened, straighten
from flowkernels.training.students.acceleration import Acceleration
from flowkernels.training.students.adapters import merge_lora, without_adapters
from flowkernels.training.students.average_velocity import AverageVelocity
from flowkernels.training.students.blockwise import Blockwise
from flowkernels.training.students.lora import add_lora
from flowkernels.training.students.lora_files import save_lora
from flowkernels.training.students.noise_prediction import NoisePrediction
from flowkernels.training.sweep import evaluate_checkpoints
from flowkernels.training.training_cost import training_cost
from flowkernels.training.training_plan import TrainingPlan, training_plan
from flowkernels.velocity.denoiser import Denoiser, from_denoiser
from flowkernels.velocity.field import VelocityField
from flowkernels.velocity.protocol import Velocity, VelocityBase
from flowkernels.velocity.time_embedding import HasTimeEmbedding

if TYPE_CHECKING:
    from flowkernels.calibration.figure import plot
    from flowkernels.integrations.export import export

__all__ = [
    "Acceleration",
    "AverageVelocity",
    "BackendError",
    "BankBatch",
    "Blockwise",
    "Calibration",
    "Denoiser",
    "Evaluation",
    "FusedHead",
    "FusedSampler",
    "HasTimeEmbedding",
    "Inversion",
    "Likelihood",
    "LoadedWeights",
    "NoisePrediction",
    "NotFusable",
    "Pairs",
    "SampleSchedules",
    "Schedule",
    "Solver",
    "StepCost",
    "StraightenLoss",
    "Straightened",
    "TeacherError",
    "TrainingCost",
    "TrainingEvent",
    "TrainingPlan",
    "Trajectory",
    "TrajectoryBank",
    "Velocity",
    "VelocityBase",
    "VelocityField",
    "__version__",
    "add_lora",
    "backend",
    "calibrate",
    "couple",
    "evaluate_checkpoints",
    "evaluate_sampler",
    "explain",
    "export",
    "fit_solver",
    "forward_pairs",
    "from_denoiser",
    "fuse",
    "fuse_head",
    "invert",
    "least_cost_schedules",
    "load_weights",
    "log_likelihood",
    "merge_lora",
    "noise",
    "plot",
    "polish",
    "profile_ranges",
    "record_calls",
    "rollout",
    "sample",
    "save_images",
    "save_lora",
    "step_costs",
    "stock_solvers",
    "straighten",
    "training_cost",
    "training_plan",
    "without_adapters",
]
__all__.extend(OPS)


def __getattr__(name: str):
    """What is imported where it is asked for: `export` with the integrations, `plot` with matplotlib."""
    if name == "plot":
        from flowkernels.calibration.figure import plot

        return plot
    if name == "export":
        from flowkernels.integrations.export import export

        return export
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if _problem := not_built():
    import warnings

    warnings.warn(_problem, RuntimeWarning, stacklevel=2)
