"""What every rank of a group is to be given alike, before any of them evaluates."""

from typing import Any

import torch
from torch import Tensor, nn

from flowkernels._checks import expect
from flowkernels._files import plain
from flowkernels._guidance import told
from flowkernels._warnings import warn
from flowkernels.calibration.measured import Measured
from flowkernels.calibration.tried import plan_to_dict
from flowkernels.runtime.ranks import Ranks
from flowkernels.schedule import Schedule
from flowkernels.solver import Solver
from flowkernels.velocity.identity import identity
from flowkernels.velocity.protocol import Velocity, as_given, resolve
from flowkernels.velocity.provenance import hash_of

# modules whose calls are collective themselves, as many on every rank
COLLECTIVE = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule")


def expect_agreed(ranks: Ranks, velocity: Velocity, name: str = "velocity", **given: Any) -> None:
    """Raise on every rank, naming the argument, where one was given another; tensors are compared by their hashes,
    calibrations by what was measured, a velocity as far as its hashes go. A warning where its attributes differ.

    A network whose weights are in parts on several ranks, or that synchronises them at each call, is refused: ranks
    evaluate as often as they have samples for.
    """
    if ranks.is_alone:
        return
    whole = "a network that every rank has whole and calls by itself (.module of one that DDP wraps)"
    network = as_given(velocity)
    for module in network.modules() if isinstance(network, nn.Module) else ():
        kind = next((k.__name__ for k in type(module).__mro__ if k.__name__ in COLLECTIVE), None)
        expect(kind is None, name, whole, kind or "")
    known = identity(velocity)
    expect(known.unknown.get("parameters") != "sharded weights", name, whole, "sharded weights")
    field = resolve(velocity)
    of = {k: v for k, v in known.provenance().items() if k != "attributes_sha256"}
    of |= {"guidance": told(field.guidance), "convention": field.convention(), "class": type(network).__name__}
    threads = torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
    types = [str(torch.get_autocast_dtype(d)) if on else None for d, on in zip(("cpu", "cuda"), threads, strict=True)]
    settings = {key: _comparable(value) for key, value in given.items()}
    settings |= {name: plain(of), "autocast": types, "float32 products": torch.get_float32_matmul_precision()}
    ranks.expect_same(settings)
    attributes = ranks.of_each(known.attributes)
    others = [rank for rank, of_rank in enumerate(attributes) if of_rank != attributes[0]]
    if others:
        told_of = f"the same attributes of its modules on every rank, got others on rank {others[0]} than on rank 0"
        warn(f"{name}: expected {told_of}", stacklevel=5)


def expect_agreed_fit(
    ranks: Ranks,
    velocity: Velocity,
    calibration: Measured,
    noise: Tensor | None,
    chunk: int | None,
    teacher: Velocity | None = None,
    **given: Any,
) -> None:
    """The same of what takes a calibration, and perhaps a student of its teacher."""
    if ranks.is_alone:
        return
    if teacher is not None:
        expect_agreed(ranks, teacher, "teacher")
    expect_agreed(ranks, velocity, calibration=calibration, noise=noise, chunk=chunk, **given)


def _comparable(value: Any) -> Any:
    if isinstance(value, Tensor):
        return [list(value.shape), str(value.dtype), hash_of(value, "", {})]
    if isinstance(value, (Schedule, Solver)):
        return plan_to_dict(value)
    if isinstance(value, Measured):
        kept = None if value.kept is None else [_comparable(t) for t in (value.kept.x, value.kept.v)]
        return [_comparable(value.times), _comparable(value.cost), list(value.forced), kept]
    return [_comparable(v) for v in value] if isinstance(value, (list, tuple)) else value
