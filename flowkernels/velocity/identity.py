"""What a velocity is, and warnings where it is another one than the one of a record."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowkernels._warnings import warn
from flowkernels.velocity.protocol import Velocity, resolve
from flowkernels.velocity.provenance import Identity


def identity(velocity: Velocity) -> Identity:
    """Of any velocity; about as long as its weights take to be read, and never an error."""
    return resolve(velocity).identify()


def warn_if_another(velocity: Velocity, recorded: Mapping[str, Any], stacklevel: int) -> bool:
    """Warn if a velocity is not the one of a calibration's provenance; whether it is for certain."""
    now = identity(velocity)
    if differs := now.differences(recorded):
        text = f"velocity: expected the model that the calibration was made with, got another ({', '.join(differs)})"
        warn(text, stacklevel=stacklevel)
    return now.is_proven(recorded)


def parameter_hash(velocity: Velocity) -> str | None:
    """The hash of a module's weights and its convention; None where they cannot be read, or for what is no module."""
    return identity(velocity).parameters


def warn_of_doubts(name: str, path: Path, attributes: str | None, teacher: Identity, stacklevel: int) -> None:
    """Say what cannot tell whether the teacher is the one that it was."""
    doubts = [f"{what} unknown ({why})" for what, why in teacher.unknown.items()]
    if attributes is not None and teacher.attributes is not None and attributes != teacher.attributes:
        doubts.append("other attributes of its modules")
    if doubts:
        text = f"{name}: expected the teacher that {path} was made with, got {', '.join(doubts)}"
        warnings.warn(text, UserWarning, stacklevel=stacklevel)
