"""Runs a function in several processes of a gloo group, for tests of many devices on one machine."""

import datetime
import multiprocessing
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

TIMEOUT = 60.0  # seconds, of the group


def in_ranks(folder: Path, world: int, work: Callable, *args: Any, timeout: float = TIMEOUT) -> list[Any]:
    """What `work(rank, *args)` returns in each of `world` new processes of one group, None of one that has ended by
    itself; an AssertionError with the traceback where it raised. work: of a module, not of a function."""
    context = multiprocessing.get_context("forkserver")  # which imports once what takes seconds
    context.set_forkserver_preload(["torch._dynamo", "torch.distributed.fsdp", "flowkernels"])
    meeting, common = folder / f"meeting-{len(list(folder.iterdir()))}", (world, timeout, work, args)
    ranks = [context.Process(target=_begin, args=(rank, str(meeting), *common)) for rank in range(world)]
    try:
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(240)
            assert not process.is_alive(), f"{work.__name__} hangs"
    finally:
        for process in ranks:
            process.kill()
    found = []
    for rank in range(world):
        path = Path(f"{meeting}.{rank}")
        result = torch.load(path, weights_only=False) if path.exists() else None
        assert not (isinstance(result, str) and result.startswith("Traceback")), f"on rank {rank}\n{result}"
        found.append(result)
    return found


def _begin(rank: int, meeting: str, world: int, timeout: float, work: Callable, args: tuple) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background ignores it
    torch.set_num_threads(1)
    within = datetime.timedelta(seconds=timeout)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=within)
    try:
        result = work(rank, *args)
    except BaseException:
        result = traceback.format_exc()
        print(result, file=sys.stderr)
    torch.save(result, f"{meeting}.{rank}")
