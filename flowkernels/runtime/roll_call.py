"""Whether all ranks of a group have come, told by the store that they met by: who is missing has a number."""

import contextlib
import time
from datetime import timedelta
from typing import Any

from flowkernels.runtime import torch_private

STEP, GRACE = 0.5, 5.0  # seconds: of waiting, between which Ctrl-C is heard; for an answer of what may have ended
PREFIX = "flowkernels"


def answered(group: Any, rank: int, size: int, what: str) -> None:
    """Wait until every rank has called this as often as this one; TimeoutError, naming those that have not within the
    group's timeout, or that have given up on this one. Nothing where torch does not tell the store."""
    known = torch_private.store_of(group)
    if known is None:
        return
    store, timeout = known
    turn = store.add(f"{PREFIX}/calls/{rank}", 1)
    store.set(f"{PREFIX}/{turn}/{rank}", "here")
    missing = _missing(store, [f"{PREFIX}/{turn}/{r}" for r in range(size)], timeout.total_seconds())
    if missing:
        store.set(f"{PREFIX}/{turn}/gone", str(rank))
        there = [r for r in range(size) if r not in missing]
        raise TimeoutError(
            f"group: expected {size} ranks in {what}, got {there}: rank {', '.join(map(str, missing))} did not come "
            f"within {timeout.total_seconds():g} s, the group's timeout"
        )
    if store.check([f"{PREFIX}/{turn}/gone"]):
        by = store.get(f"{PREFIX}/{turn}/gone").decode()
        raise TimeoutError(f"group: expected all {size} ranks in {what} in time, but rank {by} has given up waiting")


def silent(group: Any, rank: int, size: int) -> list[int]:
    """The ranks that do not say within a few seconds that they too have lost the others; none where it is not known."""
    known = torch_private.store_of(group)
    if known is None:
        return []
    store, _ = known
    try:
        turn = store.add(f"{PREFIX}/losses/{rank}", 1)
        store.set(f"{PREFIX}/lost {turn}/{rank}", "here")
        return _missing(store, [f"{PREFIX}/lost {turn}/{r}" for r in range(size)], GRACE)
    except Exception:  # the store was in the process that has ended
        return []


def _missing(store: Any, keys: list[str], seconds: float) -> list[int]:
    end = time.monotonic() + seconds
    while not store.check(keys):
        left = end - time.monotonic()
        if left <= 0:
            return [r for r, key in enumerate(keys) if not store.check([key])]
        with contextlib.suppress(Exception):  # what it raises when it has waited, by kind of store
            store.wait(keys, timedelta(seconds=min(STEP, left)))
    return []
