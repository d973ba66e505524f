"""What is held out of a bank: how much, and the seed of what is drawn for it."""

from flowkernels._checks import expect
from flowkernels.training.objective import StraightenLoss

APART = 0x9E3779B97F4A7C15  # from the seed of the training
HELD_OUT = range(8, 257)  # trajectories that a solver's student is compared on before and after
HELD_OUT_PART = 8  # of the bank, one in so many


def own_held_out(objective: StraightenLoss, size: int) -> int:
    """How many trajectories are held out where nobody says."""
    count = min(HELD_OUT[-1], size // HELD_OUT_PART)
    return count if objective.refits and count in HELD_OUT else 0


def expect_held_out(count: int, size: int) -> None:
    expect(count < size, "held_out", f"fewer than the {size} trajectories, or pairs, of the bank", f"{count}")


def seed_apart(seed: int) -> int:
    return (seed + APART) % 2**63
