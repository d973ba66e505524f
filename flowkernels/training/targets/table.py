"""What a student may learn. Another target is

1. a row of `TARGETS`, with the function that asks the student, in a file of its family;
2. a paragraph in the docstring of `StraightenLoss` (objective.py), with its source; cli/main.py offers it where a
   calibration is all that it needs; docs/mathematics.md, "Straightening", has the formula;
3. in tests its formula once more, in float64, written from the paper, its resuming in `VARIANTS` of
   tests/test_straighten.py, and a flow that it learns;
4. a row of benchmarks/straightening/rows.py.

A student that is of a class of its own is said by `Target.expect_student`, which refuses others.

A setting that only one target has is an argument of `StraightenLoss` and `straighten`, with a default, and is in
`StraightenLoss.identity` where it differs from that: a checkpoint of a run with another is refused, and those of before
go on. A loss or a distribution of times is a row of its own table: losses.py, t_sampling.py.
"""

from flowkernels.training.targets.acceleration import acceleration, expect_acceleration
from flowkernels.training.targets.along_the_teacher import next_knot, velocity_matching
from flowkernels.training.targets.annealed_reflow import annealed_reflow
from flowkernels.training.targets.average_velocity import average_velocity, expect_two_times, of_two_times
from flowkernels.training.targets.base import Target
from flowkernels.training.targets.blockwise import blockwise, expect_blockwise, in_blocks
from flowkernels.training.targets.endpoint import endpoint
from flowkernels.training.targets.noise import expect_noise_prediction, noise
from flowkernels.training.targets.on_a_solver import on_a_solver
from flowkernels.training.targets.on_policy import on_policy
from flowkernels.training.targets.straight_line import straight_line

TARGETS: dict[str, Target] = {
    "boss": Target(straight_line),
    "reflow": Target(straight_line, whole=True, t_sampling="uniform"),
    "distill": Target(straight_line, whole=True, only=True),
    "next_knot": Target(next_knot, only=True, between=True),
    "velocity_matching": Target(velocity_matching, t_sampling="uniform", only=True, between=True, teacher=True),
    "on_policy": Target(on_policy, t_sampling="uniform", own=True, teacher=True),
    "annealed_reflow": Target(annealed_reflow, whole=True, t_sampling="uniform", from_noise=True, progress=True),
    "acceleration": Target(acceleration, whole=True, t_sampling="uniform", expect_student=expect_acceleration),
    "noise": Target(noise, whole=True, t_sampling="uniform", expect_student=expect_noise_prediction),
    "average_velocity": Target(
        average_velocity, t_sampling="uniform", expect_student=expect_two_times, made=of_two_times
    ),
    "blockwise": Target(blockwise, expect_student=expect_blockwise, made=in_blocks),
    "solver": Target(on_a_solver, only=True, solver=True, own=True),
    "endpoint": Target(endpoint, whole=True, only=True, loss="huber", solver=True),
}


def has_states_between(target) -> bool:
    """Whether the bank of a target, if it is one, has states between the knots too."""
    return isinstance(target, str) and target in TARGETS and TARGETS[target].between
