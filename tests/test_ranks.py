"""Ranks of a process group: what they share, and what becomes of errors, Ctrl-C, and ranks that differ or are lost."""

import datetime
import os
import signal
import time

import pytest
import torch
from _ranks import in_ranks
from torch import distributed as dist

import flowkernels as fk
from flowkernels.bench import suite
from flowkernels.runtime.ranks import Ranks


def raised(work) -> str:
    try:
        work()
    except BaseException as e:
        return f"{type(e).__name__}: {e} {' '.join(getattr(e, '__notes__', []))}"
    return "nothing"


def shares(rank: int) -> list[str]:
    """One process after another of what is to hold, in one group."""
    ranks, world = Ranks(dist.group.WORLD), dist.get_world_size()
    draw = torch.Generator("cpu").manual_seed(0)
    with ranks.together("a test"):
        for n in (1, 2, 7, 5000):  # fewer than ranks, uneven, and more than goes with a header
            for dtype in (torch.float32, torch.bfloat16, torch.bool, torch.float64, torch.complex64, torch.int64):
                x = torch.randn(3, n, 2, generator=draw).to(dtype)
                for dim, size in ((1, n), (0, 3), (2, 2)):
                    y = ranks.shared(size, lambda s, x=x, d=dim: x.narrow(d, s.start, s.stop - s.start), dim)
                    assert torch.equal(x, y)
                    assert y.dtype == dtype
        assert ranks.total(torch.tensor(1.5)) == 1.5 * world
        assert ranks.total(torch.zeros(0, 3)).shape == (0, 3)
        assert ranks.total(torch.ones(1).expand(4)[:1].as_strided((1,), (0,))) == world
        parts = torch.randn(world, 9, generator=draw)
        assert torch.equal(ranks.total(parts[rank]), sum(parts[1:], parts[0]))
        assert ranks.of_each(rank) == list(range(world))
        assert ranks.from_first((rank, "x" * 30000)) == (0, "x" * 30000)
        assert ranks.first(lambda: 3 if rank == 0 else 1 / 0) == 3
        with torch.inference_mode(), torch.device("meta"):
            assert ranks.total(torch.ones(2, device="cpu")).tolist() == [world, world]
        told = [raised(lambda: ranks.shared(5, lambda s: torch.ones(5)[s] if s.start == 0 else {}[rank]))]
        told += [raised(lambda: ranks.first(lambda: 1 / 0))]
        told += [raised(lambda: ranks.expect_same({"a": 1, "steps": [rank]}))]
    assert ranks.seconds > 0
    first = dist.new_group([0])  # numbers in a group are its own
    last = dist.new_group(list(range(1, world)))
    if rank == 0:
        assert Ranks(first).is_alone
        assert Ranks(first).shared(3, lambda s: torch.ones(3)[s]).tolist() == [1, 1, 1]
        told += [raised(lambda: Ranks(last))]
    else:
        of = Ranks(last)
        assert of.rank == rank - 1
        assert of.from_first(rank) == 1
        assert of.of_each(rank) == list(range(1, world))
        told += [raised(lambda: Ranks(first))]
    return told


def fails(rank: int) -> list[str]:
    """Each in a block of its own, in one group, which goes on."""

    def block(work):
        ranks = Ranks(dist.group.WORLD)
        with ranks.together("a test"):
            for _ in range(3):
                ranks.total(torch.zeros(2))
            work(ranks)
            for _ in range(3):
                ranks.wait()

    def apart(ranks):
        ranks.total(torch.zeros(2)) if rank else ranks.of_each(2)

    def interrupts(ranks):
        if rank == 1:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    told = [raised(lambda: block(lambda ranks: {}["mine"] if rank == 1 else None))]
    told += [raised(lambda: block(apart)), raised(lambda: block(interrupts))]
    told += [raised(lambda: block(lambda ranks: ranks.total(torch.zeros(2 + rank))))]
    told += [raised(lambda: block(lambda ranks: None))]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    return told


def misses(rank: int) -> list[str]:
    """The last rank comes too late, then to the next in time, and then ends."""
    group, last = dist.new_group(timeout=datetime.timedelta(seconds=1.5)), dist.get_world_size() - 1

    def late():
        with Ranks(group).together("a test"):
            pass

    def ends():
        with Ranks(group).together("another") as ranks:
            assert ranks.of_each(rank) == list(range(last + 1))
            if rank == last:
                os._exit(3)
            ranks.wait()

    if rank == last:
        time.sleep(3)
    return [raised(late), raised(ends)]


def all_of(rank: int) -> tuple[list[str], ...]:
    return shares(rank), fails(rank), misses(rank)


def expect_shared(told: list[str], world: int) -> None:
    assert told[0] == f"KeyError: 1 on rank 1 of {world}"
    assert told[1] == f"ZeroDivisionError: division by zero on rank 0 of {world}"
    assert told[2] == "ValueError: steps: expected the same on every rank, [0] as on rank 0, got [1] on rank 1 "
    assert told[3].startswith(("ValueError: group: expected a group that this process is in", "TypeError: group: "))


def test_two_ranks_share(tmp_path):
    for told in in_ranks(tmp_path, 2, shares):
        expect_shared(told, 2)


def test_three_ranks_share_and_fail_together(tmp_path):
    found = in_ranks(tmp_path, 3, all_of)
    assert found[2] is None
    for rank, (shared, failed, (late, lost)) in enumerate(found[:2]):
        expect_shared(shared, 3)
        by_itself = "KeyError: 'mine' "
        told = f"ConnectionAbortedError: group: rank 1 ended the work with an error: {by_itself}"
        assert failed[0] == (by_itself if rank == 1 else told)
        assert "rank 0: 'of each' as its 4th, rank 1: 'total' as its 4th" in failed[1]
        assert failed[2].startswith("KeyboardInterrupt: on rank 1")
        assert failed[3].startswith("ConnectionError: group: expected tensors of one shape and dtype")
        assert failed[4] == "nothing"
        assert late == (
            "TimeoutError: group: expected 3 ranks in a test, got [0, 1]: rank 2 did not come within 1.5 s, the "
            "group's timeout "
        )
        assert lost.startswith("ConnectionError: group: expected every rank to go on, but rank 2 does not answer")


def test_a_process_alone_sends_nothing():
    ranks, t = Ranks(), torch.ones(3)
    with ranks.together("a test"):
        assert ranks.total(t) is t
        assert ranks.gathered(t, 3) is t
        assert ranks.from_first(t) is t
        assert ranks.shared(3, lambda rows: t[rows]).tolist() == [1, 1, 1]
        assert ranks.of_each(2) == [2]
        ranks.expect_same({"a": 1})
        ranks.wait()
    assert ranks.is_alone
    assert ranks.part(7) == slice(0, 7)
    with pytest.raises(TypeError, match=r"group: expected a torch\.distributed\.ProcessGroup"):
        Ranks(3)


def test_noise_depends_on_the_seed_and_the_index_alone():
    whole = fk.noise(1000, (2, 3), 7, dtype=torch.float64)
    assert torch.equal(fk.noise(1000, (2, 3), 7), whole.float())
    for rows in (slice(0, 1), slice(15, 17), slice(100, 140), slice(990, None), slice(5, 5), slice(-3, None)):
        with torch.device("meta"):
            assert torch.equal(fk.noise(1000, (2, 3), 7, rows=rows), whole[rows].float())
    assert torch.equal(fk.noise(37, (2, 3), 7), whole[:37].float())
    assert len(set(whole.flatten().tolist())) == whole.numel()
    assert not set(whole.flatten().tolist()) & set(fk.noise(1000, (2, 3), 8, dtype=torch.float64).flatten().tolist())
    many = fk.noise(20000, (3,), 0, dtype=torch.float64).flatten()
    assert abs(many.mean()) < 5 / len(many) ** 0.5  # five standard errors
    assert abs(many.var() - 1) < 5 * (2 / len(many)) ** 0.5


def test_the_benchmark_of_exchanges_runs(tmp_path, capsys):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    threads = torch.get_num_threads()
    try:
        command = suite.module("many_devices.calibrate")
        assert command.main(["--network", "dit", "--samples", "2", "--grid", "8", "--rounds", "1"]) == 0
    finally:
        dist.destroy_process_group()
        torch.set_num_threads(threads)
    told = capsys.readouterr().out
    assert "one process" in told
    assert "0 exchanges: 0.00% of the processor's time, 0.00% of all" in told
