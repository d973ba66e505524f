"""Random states outside of a run's generator: dropout draws from them."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch


def global_rng() -> dict[str, Any]:
    return dict(cpu=torch.get_rng_state(), cuda=torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])


def restore_global_rng(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def seed_of_rank(seed: int, rank: int, iteration: int = 0) -> None:
    """Seed torch's own generators, on every rank otherwise."""
    digest = hashlib.sha256(f"{seed} {rank} {iteration}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
