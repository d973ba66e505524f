"""Processes of torch.distributed that do one piece of work together: ranks of a group, each with a slice of it."""

import contextlib
import functools
import hashlib
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from flowkernels._casts import without_gradients
from flowkernels._checks import describe, expect
from flowkernels._warnings import held_warnings
from flowkernels.runtime import roll_call
from flowkernels.runtime.exchange import INLINE, Exchange, Message

Group = Any  # a torch.distributed.ProcessGroup; torch without distributed has no such name
F, T = TypeVar("F", bound=Callable), TypeVar("T")

WELL, FAILED, INTERRUPTED, LEFT = range(4)  # how a rank comes to an exchange; LEFT: it is not coming back
KINDS = ("done", "gathered", "total", "from the first", "of each")  # of exchanges
TOLD = "_flowkernels_told"  # an attribute of errors that every rank raises
ONE = 1.0  # seconds within which two Ctrl-C are one
TEXT = 2000  # characters of an error that others are told of


class Ranks:
    """The processes of a group, in which every one makes the same calls in the same order.

        ranks = Ranks(group)
        with ranks.together("a roll-out"):
            ends = ranks.shared(len(noise), lambda rows: run(noise[rows]))  # of each rank its slice, and then all

    group: a `torch.distributed.ProcessGroup`, such as `torch.distributed.group.WORLD`; None is this process alone, of
    which nothing is sent. size, rank: the number of processes, and which of them this is. exchanges, seconds: how
    many there were, and the time they took, with what was waited for slower ranks; processor_seconds: of the processor,
    with none of that.
    What comes back is the same on every rank, bit for bit, on this rank's device, or, for numbers and other plain
    values, on the CPU.

    Raises:
        ConnectionError, on every rank that still runs, where one has ended or raised an error by itself, which is
        named, and where ranks have come to different calls. TimeoutError where one has not come within the group's
        timeout.
    """

    def __init__(self, group: Group | None = None, name: str = "group"):
        self.seconds, self.processor_seconds, self.exchanges, self._lost = 0.0, 0.0, 0, None
        self._raised: Exception | None = None
        self._interrupted, self._interrupted_at, self._sending = False, -ONE, False
        if group is None:
            self.group, self.size, self.rank = None, 1, 0
            return
        there = dist.is_available() and dist.is_initialized()
        expected = "a torch.distributed.ProcessGroup (torch.distributed.init_process_group() makes the first), or None"
        expect(there and isinstance(group, dist.ProcessGroup), name, expected, describe(group), TypeError)
        self.group, self.size, self.rank = group, dist.get_world_size(group), dist.get_rank(group)
        expect(self.rank >= 0, name, "a group that this process is in", f"one without rank {dist.get_rank()}")
        if self.size > 1:
            self._exchange = Exchange(group, self.size)

    @property
    def is_alone(self) -> bool:
        return self.size == 1

    @property
    def is_first(self) -> bool:
        """Whether this one writes files, warns and shows progress."""
        return self.rank == 0

    def part(self, n: int, rank: int | None = None) -> slice:
        """Of n samples in order those of a rank, None this one."""
        r = self.rank if rank is None else rank
        return slice(n * r // self.size, n * (r + 1) // self.size)

    def shared(self, n: int, make: Callable[[slice], Tensor], dim: int = 0) -> Tensor:
        """What `make` makes of all n samples, each rank of its part of them, along a dimension of it. A rank without
        samples makes nothing; what one raises, every one does."""
        if self.is_alone:
            return make(slice(0, n))
        rows = self.part(n)
        return self.gathered(self.tried(lambda: make(rows) if rows.stop > rows.start else None), n, dim)

    def gathered(self, rows: Tensor | None, n: int, dim: int = 0) -> Tensor:
        """All n samples, of which `rows` are those of this rank, along a dimension, in the order of ranks; None for a
        rank that has none, if another has some."""
        if self.is_alone:
            return rows
        mine = None if rows is None else rows.movedim(dim, 0)
        found = [m.t.view(m.shape) for m in self._all("gathered", mine) if m.t is not None]
        kinds = {(t.dtype, t.shape[1:]) for t in found}
        total = sum(len(t) for t in found)
        if total != n or len(kinds) != 1:
            self._apart(f"{n} samples of one shape and dtype", f"{total} of {sorted(map(str, kinds))}")
        return torch.cat(found).movedim(0, dim)

    def total(self, t: Tensor) -> Tensor:
        """The sum over the ranks, added in their order."""
        if self.is_alone:
            return t
        found = [m.t.view(m.shape) for m in self._all("total", t)]
        if len({(f.dtype, f.shape) for f in found}) != 1:
            self._apart("tensors of one shape and dtype", ", ".join(describe(f) for f in found))
        return functools.reduce(torch.add, found)

    def from_first(self, value: T) -> T:
        """What the first rank has, plain values and tensors on the CPU."""
        return value if self.is_alone else self._objects("from the first", value if self.is_first else None)[0]

    def first(self, make: Callable[[], T]) -> T:
        """What `make` makes on the first rank, plain values and tensors on the CPU; what it raises, every one does."""
        if self.is_alone:
            return make()
        return self.from_first(self.tried(make) if self.is_first else None)

    def of_each(self, value: T) -> list[T]:
        """What each rank has, plain values."""
        return [value] if self.is_alone else self._objects("of each", value)

    def expect_same(self, settings: Mapping[str, Any]) -> None:
        """ValueError, on every rank, naming the first of the settings, in plain values, that is not everywhere what it
        is on the first rank."""
        each = self.of_each({key: repr(value) for key, value in settings.items()})
        for key in sorted(set().union(*each)):
            for rank, of in enumerate(each):
                got, first = of.get(key, "nothing"), each[0].get(key, "nothing")
                if got != first:
                    expected = f"the same on every rank, {_short(first)} as on rank 0"
                    raise _told(ValueError(f"{key}: expected {expected}, got {_short(got)} on rank {rank}"))

    def wait(self) -> None:
        """Until every rank is here."""
        if not self.is_alone:
            self._all("done")

    @contextlib.contextmanager
    def together(self, what: str) -> Iterator["Ranks"]:
        """A block that every rank enters, and leaves in the same way: an error of one in it is told to the others, who
        raise ConnectionError at their next exchange, and Ctrl-C of one is KeyboardInterrupt on all there.

        what: the work, for errors. Warnings of stages in it (`_warnings.warn`) are the first rank's alone.
        TimeoutError, before the block, where a rank does not come within the group's timeout.
        """
        if self.is_alone:
            yield self
            return
        roll_call.answered(self.group, self.rank, self.size, what)
        with contextlib.nullcontext() if self.is_first else held_warnings(), self._interrupts():
            try:
                yield self
                self.wait()
            except BaseException as e:
                if not getattr(e, TOLD, False):
                    self._leave(e)
                raise

    def tried(self, make: Callable[[], T]) -> T:
        """What `make` makes, each rank for itself before an exchange: what one raises, every one does, there."""
        if self.is_alone:
            return make()
        try:
            return make()
        except KeyboardInterrupt:
            self._interrupted = True
            self._all("done")
            raise
        except Exception as e:
            self._raised = e
            self._all("done", _as_bytes(_picklable(e)), FAILED)
            raise

    def _leave(self, e: BaseException) -> None:
        with contextlib.suppress(Exception):
            self._all("done", _as_bytes(f"{type(e).__name__}: {e}"[:TEXT]), LEFT)

    def _all(self, kind: str, t: Tensor | None = None, status: int = WELL) -> list[Message]:
        """A message of each rank; raises on every one if one comes with an error, or to another exchange."""
        if self._lost is not None:  # a group that has lost a rank is of no use
            raise self._lost
        began, worked = time.perf_counter(), time.process_time()
        self.exchanges, self._sending = self.exchanges + 1, True
        if status == WELL and self._interrupted:
            status = INTERRUPTED
        try:
            found = self._exchange.of_all(status, self.exchanges, KINDS.index(kind), t)
        except Exception as e:
            missing = roll_call.silent(self.group, self.rank, self.size)
            who = f"rank {', '.join(map(str, missing))} does not answer" if missing else "a rank has ended or hangs"
            late = "timed out" in str(e).lower() or "timeout" in str(e).lower()
            text = f"group: expected every rank to go on, but {who} ({type(e).__name__}: {f'{e}'[:TEXT]})"
            self._lost = _told((TimeoutError if late else ConnectionError)(text))
            raise self._lost from e
        finally:
            self._sending = False
            self.seconds += time.perf_counter() - began
            self.processor_seconds += time.process_time() - worked
        if status == LEFT:
            return found
        by_status = {s: [(rank, m) for rank, m in enumerate(found) if m.status == s] for s in range(4)}
        for rank, m in by_status[LEFT]:
            raise _told(ConnectionAbortedError(f"group: rank {rank} ended the work with an error: {_value(m)}"))
        for rank, _ in by_status[INTERRUPTED]:
            self._interrupted, self._interrupted_at = False, time.monotonic()
            raise _told(KeyboardInterrupt(f"on rank {rank}"))
        for rank, m in by_status[FAILED]:
            e = self._raised if rank == self.rank else _value(m)
            e.__notes__ = [f"on rank {rank} of {self.size}"]  # which tracebacks show, since Python 3.11
            raise _told(e)
        if len({(m.turn, m.kind) for m in found}) != 1:
            told = ", ".join(f"rank {rank}: {KINDS[m.kind]!r} as its {m.turn}th" for rank, m in enumerate(found))
            self._apart("all ranks in one exchange", told)
        return found

    def _apart(self, expected: str, got: str) -> None:
        raise _told(ConnectionError(f"group: expected {expected}, got {got}: ranks have made different calls"))

    def _objects(self, kind: str, value: Any) -> list:
        return [_value(m) for m in self._all(kind, _as_bytes(value))]

    @contextlib.contextmanager
    def _interrupts(self) -> Iterator[None]:
        """Ctrl-C waits for the next exchange, where every rank is told; a second one does not, outside of exchanges."""
        mine = threading.current_thread() is threading.main_thread()
        if not mine or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            yield
            return

        def interrupt(number, frame):
            if self._interrupted and not self._sending:
                signal.default_int_handler(number, frame)
            # one Ctrl-C of a terminal comes to all processes, to some after the others' exchange
            self._interrupted = time.monotonic() > self._interrupted_at + ONE

        signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self._interrupted:
            raise KeyboardInterrupt


def ranks_of(group: "Group | Ranks | None", name: str = "group") -> Ranks:
    """Those of a group, or what are ranks already."""
    return group if isinstance(group, Ranks) else Ranks(group, name)


def by_ranks(stage: F) -> F:
    """`no_grad` of a stage that the ranks of its argument `group` may go through together; where they do, that is what
    `Ranks` the stage is given."""

    @functools.wraps(stage)
    def run(*args, **kwargs):
        ranks, block = kwargs.get("group"), contextlib.nullcontext()
        if ranks is not None and not isinstance(ranks, Ranks):
            kwargs["group"] = ranks = Ranks(ranks)
            block = ranks.together(stage.__name__)
        with without_gradients(), block:
            return stage(*args, **kwargs)

    return run


def _told(e: BaseException) -> BaseException:
    setattr(e, TOLD, True)
    return e


def _picklable(e: Exception) -> Exception:
    """Itself, or what says the same and others can make again."""
    try:
        known = pickle.dumps(e)
        again = pickle.loads(known)
        if type(again) is type(e) and str(again) == str(e) and len(known) <= INLINE:
            return e
    except Exception:  # whatever such a class does
        pass
    return RuntimeError(f"{type(e).__name__}: {e}"[:TEXT])


def _as_bytes(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)


def _value(m: Message) -> Any:
    return pickle.loads(m.t.cpu().numpy().tobytes())


def _short(text: str) -> str:
    return text if len(text) < 100 else f"{text[:60]}.. (sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]})"
