"""The bank of the teacher's trajectories that straightening trains on."""

import logging
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from flowkernels._casts import no_grad
from flowkernels._checks import (
    expect,
    expect_bool,
    expect_device,
    expect_dtype,
    expect_int,
    expect_noise,
    expect_path,
    expect_positive_int,
    expect_real,
    expect_room,
    expect_text,
    expect_values,
)
from flowkernels._files import damaged, plain
from flowkernels.runtime.ranks import Group, Ranks, ranks_of
from flowkernels.sampling.loop import initial_state
from flowkernels.sampling.teacher_solver import entry_of
from flowkernels.schedule import Schedule
from flowkernels.solver import Solver
from flowkernels.training.bank.batch import BankBatch, generator_on
from flowkernels.training.bank.by_rank import ByRank, spread
from flowkernels.training.bank.knots import Knots
from flowkernels.training.bank.shards import DTYPES, MANIFEST, Shards, expect_folder, read_manifest, sealed_manifest
from flowkernels.training.bank.starts import Columns, Conditioning, Layout, Noise, Starts, generator_of, looked_up
from flowkernels.training.bank.storage import MEMORIES, Memory
from flowkernels.training.bank.teacher_states import TeacherStates
from flowkernels.training.students.student import field_identity
from flowkernels.velocity.evaluate import warn_if_training
from flowkernels.velocity.field import VelocityField
from flowkernels.velocity.identity import identity, warn_of_doubts
from flowkernels.velocity.protocol import Velocity, VelocityBase, as_given, resolve

log = logging.getLogger("flowkernels")
ORDER = "spread"  # of the chunks of a bank with a group, in `bank.json`


class TrajectoryBank:
    """A teacher's states at the knots of a schedule, or of several at once, for n trajectories: what straightening
    trains on.

    The teacher is rolled out on its fine grid once, whatever the number of schedules, a chunk of trajectories at a
    time, and of its states those at the knots are kept: where and in what dtype is the caller's choice. Beside them
    there is never more than one chunk of the teacher's work, and a batch.

    Args:
        velocity: the teacher; any velocity. Of a `VelocityField` whose conditioning has a row for each trajectory, each
            takes its own.
        schedules: a Schedule, Solver or StraightenLoss, or several: a list, a Calibration.
        noise: where the trajectories begin: a tensor `[size, *shape]`, a shape (standard normal noise of it, float32),
            or a function `(n, generator) -> [n, *shape]`, the generator on the CPU. data: in its place the states at
            t = 1, a tensor or such a function: the teacher goes back from them by Heun's method on the grid, whose
            states are kept, so that the last ones are the data themselves.
        size: n, where neither is a tensor; None is 1024.
        grid: the teacher's fine grid, a number of steps or times, of which the knots have to be some; None is the
            schedules' own.
        teacher_solver: the teacher's steps on the grid from noise, "euler", "heun" or a Solver, as for `calibrate`;
            None is what the schedules were calibrated with, Euler's where they say nothing.
        storage: "device"; "pinned", the host's memory, page-locked where the device is a GPU; "shared", memory that
            other processes can be handed; or a folder, for safetensors files that are mapped into memory. From all but
            "device" a batch takes the two ends of each of its intervals alone.
        dtype: of the kept states: torch.float32, torch.bfloat16 (half the bytes; each state x is rounded by up to
            |x| / 256, a secant over h by up to `(|x_a| + |x_b|) / (256 h)`), torch.float64; None is float32, of float64
            noise float64. Batches are float32, or float64.
        chunk: trajectories that the teacher is evaluated on at once, that a file has, and that a refresh replaces.
        conditioning: keyword arguments of the teacher's network beside or in place of a `VelocityField`'s own, which
            batches carry to the student: a dict of tensors with a row for each trajectory, or of pairs (table
            `[P, ...]`, index int64 `[size]`), such as embeddings of P prompts, which are kept once; or a function
            `(n, generator) ->` dict of tensors with n rows, which draws them with the noise.
        guidance: the name of the conditioning that is the teacher's weight of guidance, for a `VelocityField` with
            `unconditional`: the teacher is guided by it, its network does not get it, the student does.
        seed: of all that is drawn: each chunk has a generator of its own.
        device: of the teacher, and of batches; None is that of the noise or of the teacher's weights.
        progress: show a progress bar of the teacher's evaluations, and the bank's size.
        group: a `torch.distributed.ProcessGroup` whose W ranks make the same calls and share the bank: each rolls out
            n / W of the trajectories and keeps these, or writes them to a folder for all; and `sample` is its part of a
            batch that is the same whatever W is, with a trajectory of each B-th of the bank, where the generators of
            all ranks have the same seed.
        held_out: with a group, how many of the last trajectories `sample` does not draw: of them too each rank has 1/W.

    Nothing is evaluated before `fill`. A bank in a folder that holds a part of it already goes on where that ended, bit
    for bit; what is there of another bank is refused. A bank that is pickled, for other processes, leaves the teacher
    behind.

    size, chunk, dtype, device, storage: as above. by_rank: which trajectories this rank has; None
        without a group. times: of the kept states, float64 `[M]`, rising. schedules: a list.
    inversion_error: of data, the root mean square distance of the first chunk's from what Heun's method makes of their
        noise again; None before `fill`.

    Raises:
        TypeError, ValueError: naming the argument, before any work; a bank that does not fit, where it can be told.

    Source: rectified flow (arXiv 2209.03003), whose pairs these are between; BOSS (arXiv 2312.16414), whose own code
    writes both ends of every interval to disk for each N anew.

    Examples:
        >>> plans = [fk.Schedule.uniform(n) for n in (2, 4, 5)]
        >>> bank = fk.TrajectoryBank(lambda x, t: -x, plans, noise=(3,), size=256, grid=20, progress=False).fill()
        >>> len(bank.times), bank.nbytes  # 256 trajectories, 9 knots, 3 features of 4 bytes
        (9, 27648)
        >>> batch = bank.sample(32, schedule=4)
        >>> losses = fk.StraightenLoss(plans[1])(fk.VelocityField(torch.nn.Linear(4, 3), time_column=True), batch)
    """

    def __init__(
        self,
        velocity: Velocity,
        schedules: Any,
        *,
        noise: Noise | None = None,
        data: Noise | None = None,
        size: int | None = None,
        grid: int | Sequence[float] | Tensor | None = None,
        teacher_solver: str | Solver | None = None,
        storage: str | Path = "device",
        dtype: torch.dtype | None = None,
        chunk: int = 128,
        conditioning: Conditioning | None = None,
        guidance: str | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
        progress: bool = True,
        group: Group | None = None,
        held_out: int = 0,
    ):
        self._ranks = None if group is None else ranks_of(group)
        self._velocity = resolve(velocity)
        self._knots = Knots.of(schedules, grid)
        expect(teacher_solver is None or data is None, "teacher_solver", "None with data", teacher_solver)
        unfused = self._velocity.unfused()
        self._solver = None if data is not None else self._knots.teacher_solver(teacher_solver, unfused)
        self._starts = Starts(noise, data, size, conditioning, seed)
        self.size, self._progress = self._starts.size, expect_bool(progress, "progress")
        self.chunk = min(expect_positive_int(chunk, "chunk"), self.size)
        self.by_rank = self._shared_by(self._ranks, self.size, held_out)
        self._is_spread = self.by_rank is not None  # the order of its chunks
        expect_room(64 * self.chunks, "size", "trajectories", f"{self.size}")
        self._dtype = None if dtype is None else expect_dtype(dtype, "dtype", tuple(DTYPES.values()))
        self.device = expect_device(device) or _device_of(self._velocity, self._starts.given)
        expect(self.device.type != "meta", "device", "one that holds data", self.device)
        self.guidance = _expect_guidance(guidance, self._velocity, self._starts.columns)
        given = self._starts.columns.names
        self._teacher = TeacherStates(velocity, self._knots, self.size, self.chunk, self._solver, self.guidance, given)
        self.inversion_error: float | None = None
        memory = isinstance(storage, str) and storage in MEMORIES
        here = self.device if memory and storage == "device" else "cpu"
        self._tables = {key: table.to(here) for key, table in self._starts.columns.tables.items()}
        self._places: dict[tuple[int, ...], Tensor] = {}
        self._layout: Layout | None = None
        self._own = self.by_rank if memory and self.by_rank is not None else ByRank(self.size)  # what the store has
        self._store = Memory(storage, self.device, self._own.count, self.chunks) if memory else self._folder(storage)
        if not self._starts.is_function:
            self._expect_space(self._missing())

    @classmethod
    def open(
        cls,
        storage: str | Path,
        *,
        device: torch.device | str | None = None,
        check: bool = True,
        group: Group | None = None,
        held_out: int = 0,
    ) -> "TrajectoryBank":
        """A bank that is whole in a folder, without its teacher: batches are streamed from the files.

        Args:
            storage: the folder.
            device: of batches; None is the CPU.
            check: look at every byte of the shards, against their checksums; else at their sizes and headers.
            group, held_out: as of the bank; batches are a rank's part.

        Raises:
            TypeError, ValueError, OSError: naming the folder and what is missing in it, truncated or of another bank.
        """
        folder = expect_path(storage, "storage").absolute()
        manifest, tables = read_manifest(folder)
        bank = cls.__new__(cls)
        bank._ranks = None if group is None else ranks_of(group)
        bank._velocity = bank._starts = bank._teacher = bank.inversion_error = None
        bank._progress, bank._places, bank._tables = False, {}, tables
        bank.size, bank.chunk, bank.guidance = manifest["size"], manifest["chunk"], manifest["guidance"]
        bank.by_rank = cls._shared_by(bank._ranks, bank.size, held_out)
        bank._is_spread = "order" in manifest
        bank.device = expect_device(device) or torch.device("cpu")
        with damaged("storage", "the manifest of a bank", folder / MANIFEST):
            bank._knots = Knots.of([Schedule(times) for times in manifest["schedules"]], manifest["grid"])
        bank._store = Shards(folder, bank.device, manifest, tables)
        bank._store.scan(expect_bool(check, "check"))
        bank._dtype = bank._store.dtype
        missing = bank._missing()
        got = f"{len(missing)} missing, {bank._store.path(bank._place(missing[0])) if missing else ''} the first"
        expected = f"the {bank.chunks} shards of a bank in {folder} (fill() of one with its teacher makes them)"
        expect(not missing, "storage", expected, got)
        bank._layout, bank._own = bank._store.layout(), ByRank(bank.size)
        return bank

    # ---- what it is ----

    @property
    def times(self) -> Tensor:
        return self._knots.times

    @property
    def grid(self) -> Tensor:
        """The teacher's fine grid, float64 `[K+1]`."""
        return self._knots.grid

    @property
    def is_drawn(self) -> bool:
        """Whether it draws what it begins with, and so can be refreshed."""
        return self._starts is not None and self._starts.is_drawn

    @property
    def carries_conditioning(self) -> bool:
        """Whether its batches have conditioning."""
        return self._starts.columns.is_any if self._starts is not None else len(self._known_layout().columns) > 0

    @property
    def schedules(self) -> list[Schedule]:
        return list(self._knots.schedules)

    @property
    def storage(self) -> str:
        """ "device", "pinned", "shared" or the folder."""
        return str(self._store.folder) if isinstance(self._store, Shards) else self._store.kind

    @property
    def dtype(self) -> torch.dtype:
        """Of the states that are kept."""
        return self._dtype or self._known_layout().dtype

    @property
    def nbytes(self) -> int:
        """Of the bank, when it is filled, the tables of its conditioning included; of one in memory with a group, what
        this rank has."""
        shape, _, row, _ = self._known_layout()
        state = math.prod(shape) * self.dtype.itemsize
        trajectory = len(self._knots.places) * state + row
        return self._own.count * trajectory + sum(t.nbytes for t in self._tables.values())

    @property
    def state_nbytes(self) -> int:
        """Of a state in a batch."""
        return math.prod(self._known_layout().shape) * self._state_dtype.itemsize

    @property
    def chunks(self) -> int:
        """In how many parts it is made."""
        return -(-self.size // self.chunk)

    @property
    def is_filled(self) -> bool:
        return None not in self._store.tickets

    @property
    def to_make(self) -> list[int]:
        """The draws that `fill` would make."""
        return self._missing()

    def evaluations_of(self, chunks: Sequence[int]) -> tuple[int, int]:
        """(calls, evaluations of single trajectories) of the teacher that these chunks take; one call of it evaluates a
        chunk, and kernels that make all steps at once are none."""
        if not chunks:
            return 0, 0
        self._expect_teacher("count")
        n = [self._rows(k).stop - self._rows(k).start for k in chunks]
        calls, evaluations = len(n) * self._teacher.evaluations, sum(n) * self._teacher.evaluations
        if self._starts.is_data and self.inversion_error is None:
            again = Solver.heun(self.grid).evaluations
            calls, evaluations = calls + again, evaluations + again * n[0]
        return (0 if self._teacher.is_fused else calls), evaluations

    @property
    def drawn(self) -> int:
        """How many chunks have been drawn, all refreshes counted: with the seed, what tells which trajectories are
        there. The n-th is at place n modulo `chunks`, with a group at one that spreads those of a refresh over all."""
        return max([self.chunks, *(ticket + 1 for ticket in self._store.tickets if ticket is not None)])

    def identity(self) -> dict[str, Any]:
        """What determines it, in plain values, `drawn` aside; where it is kept does not. None is unknown."""
        return self._store.about() if self._starts is None else self._about()

    # ---- its trajectories ----

    def fill(self, drawn: int | None = None) -> "TrajectoryBank":
        """Make what is not there yet; the bank itself. An interrupted one goes on where it was.

        drawn: make it what it was when that many chunks had been drawn, as a checkpoint says.
        """
        if drawn is not None:
            drawn = expect_int(drawn, "drawn", f"a number of chunks, at least {self.chunks}", self.chunks)
        if self._ranks is not None:
            self._ranks.expect_same(self.identity())
        self._make(self._missing(drawn))
        return self

    def refresh(self, fraction: float = 1.0) -> int:
        """Draw a part of the trajectories anew, the oldest ones: as many chunks as make up the fraction, and one at
        least. As many refreshes as it takes make all of them new. What a dict gives as conditioning stays.

        Returns:
            The number of trajectories that are new.
        """
        fraction = expect_real(fraction, "fraction", "a number in (0, 1]", lambda a: 0 < a <= 1)
        self._expect_teacher("refresh")
        expect(
            self._starts.is_drawn, "noise", "a shape or a function, for a bank that is refreshed", self._starts.given
        )
        self._expect_filled()
        begin = self.drawn
        tickets = list(range(begin, begin + max(1, math.ceil(fraction * self.chunks - 1e-9))))
        self._make(tickets)
        rows = [self._rows(self._place(ticket)) for ticket in tickets]
        return sum(part.stop - part.start for part in rows)

    @torch.inference_mode(False)
    @no_grad
    def roll_out(self, noise: Tensor) -> None:
        """Put the trajectories of given starts `[size, *shape]` in place of all that are there."""
        self._expect_teacher("roll_out")
        expect(len(expect_noise(noise)) == self.size, "noise", f"{self.size} samples", noise)
        self._layout = Layout(tuple(noise.shape[1:]), initial_state(noise[:0]).dtype)
        tickets = self._rolled_out_here(range(self.chunks))
        with self._bar(len(tickets)) as bar:
            for ticket in tickets:
                k = self._place(ticket)
                columns = self._starts.columns.rows(self._rows(k), generator_of(self._starts.seed, ticket))
                self._roll_out(k, initial_state(noise[self._rows(k)]), columns, ticket, bar)
        self._store.settle()

    def sample(
        self,
        batch: int = 128,
        generator: torch.Generator | None = None,
        schedule: Any = None,
        *,
        held_out: int | None = None,
    ) -> BankBatch:
        """A batch: intervals and trajectories, drawn uniformly.

        Args:
            batch: its number of examples.
            generator: on the CPU; None is torch's own. On a GPU, for a bank that is there, indices are drawn by one
                there whose seed this one draws: nothing waits.
            schedule: whose intervals, of several: a number of steps, or a Schedule, Solver or StraightenLoss whose
                knots the bank keeps.
            held_out: so many of the last trajectories are not drawn: `ends` has these. None is 0, with a group what the
                bank says.

        Returns:
            BankBatch, on the device: the states themselves where they are there as they are needed, float and of this
            schedule alone, and else the ends of the intervals, gathered. With a group, the rank's part of the batch.
        """
        batch, places = expect_positive_int(batch, "batch"), self._knots.choose(schedule)
        known = generator is None or isinstance(generator, torch.Generator)
        expect(known, "generator", "a torch.Generator or None", generator, TypeError)
        held_out = self._expect_held_out(self._held_out if held_out is None else held_out)
        self._expect_filled()
        expect_room(2 * 8 * batch, "batch", "examples", f"{batch}")
        here = self.device if self._store.kind == "device" else torch.device("cpu")
        drawn_by = generator_on(here, torch.default_generator if generator is None else generator)
        interval, part = torch.randint(len(places) - 1, (batch,), generator=drawn_by, device=here), None
        if self.by_rank is None:
            sample = torch.randint(self.size - held_out, (batch,), generator=drawn_by, device=here)
        else:
            rows = self.by_rank.of_batch(batch)
            sample = self.by_rank.draw(batch, drawn_by, here)[rows]
            interval, part = interval[rows], (rows.start, rows.stop, batch)
        return self._batch(places, interval, sample, here, part)

    def each(self, start: int, stop: int, schedule: Any = None) -> BankBatch:
        """Every interval of the trajectories from start to stop, one trajectory after the other, as a batch: for the
        losses of those that `sample(held_out=)` does not draw."""
        expect_int(start, "start", f"the first of {self.size} trajectories", 0, self.size - 1)
        expect_int(stop, "stop", f"the end of trajectories from {start} on, of {self.size}", start + 1, self.size)
        places = self._knots.choose(schedule)
        self._expect_filled()
        here = self.device if self._store.kind == "device" else torch.device("cpu")
        J = len(places) - 1
        sample = torch.arange(start, stop, device=here).repeat_interleave(J)
        return self._batch(places, torch.arange(J, device=here).repeat(stop - start), sample, here)

    def _batch(
        self,
        places: tuple[int, ...],
        interval: Tensor,
        sample: Tensor,
        here: torch.device,
        part: tuple[int, int, int] | None = None,
    ) -> BankBatch:
        times = tuple(self.times[list(places)].tolist())
        more = dict(conditioning=self._conditioning(sample), guidance=self.guidance, times=times)
        more |= dict(part=part, first=self._own.drawn.start)
        if self._is_whole(places):
            size = None if self.by_rank is None else self.size
            return BankBatch(self._store.states, interval, sample, size=size, **more)
        knots = self._on(places, here)
        return self._batch_of_ends(knots[interval], knots[interval + 1], interval, sample, more)

    def ends(self, count: int, schedule: Any = None) -> BankBatch:
        """The ends of the last `count` trajectories, from the first knot of a schedule to its last, as one interval:
        those that `sample(held_out=count)` does not draw. Their states are `[2, count, *shape]`; with a group those of
        this rank, ceil(count / W) on each."""
        expect_int(count, "count", f"of {self.size} trajectories", 1, self.size)
        places = self._knots.choose(schedule)
        self._expect_filled()
        here = self.device if self._store.kind == "device" else torch.device("cpu")
        if self.by_rank is not None:
            self._expect_held_out(count, "count")
        rows = slice(self.size - count, self.size) if self.by_rank is None else self.by_rank.aside
        sample, count = torch.arange(rows.start, rows.stop, device=here), rows.stop - rows.start
        knots = self._on(places, here)
        times = tuple(self.times[[places[0], places[-1]]].tolist())
        more = dict(conditioning=self._conditioning(sample), guidance=self.guidance, times=times)
        first, last = knots[0].expand(count), knots[-1].expand(count)
        return self._batch_of_ends(first, last, torch.zeros_like(sample), sample, more)

    def _batch_of_ends(self, first: Tensor, last: Tensor, interval: Tensor, sample: Tensor, more: dict) -> BankBatch:
        """Of the states at these knots of samples, gathered."""
        ends = self._there(self._store.ends(first, last, self._own.places(sample))).to(self._state_dtype)
        return BankBatch(ends, self._there(interval), self._there(sample), True, size=self.size, **more)

    def trajectories(self, sample: Tensor, schedule: Any = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Some of them, for a trainer that makes its own batches: their states at the knots of one schedule
        `[N+1, B, *shape]`, float32 or float64, and their conditioning, on the device.

        sample: int64 `[B]`, of `size`; with a group of `own` alone.
        """
        places = self._knots.choose(schedule)
        expect_values(sample, "sample", (torch.int64,))
        kept = self._own.trajectories("cpu")
        inside = sample.dim() == 1 and bool(torch.isin(sample.cpu(), kept).all())
        expect(inside, "sample", f"an index [B] of {self.size} trajectories, those that are here", sample)
        self._expect_filled()
        here = self.device if self._store.kind == "device" else torch.device("cpu")
        sample = sample.to(here)
        knots, found = self._on(places, here), []
        for k in range(0, len(places), 2):  # two at a time
            last = min(k + 1, len(places) - 1)
            first, second = (knots[i].expand(len(sample)) for i in (k, last))
            found.append(self._store.ends(first, second, self._own.places(sample))[: last - k + 1])
        states = self._there(torch.cat(found)).to(self._state_dtype)
        return states, self._conditioning(sample)

    def states(self, schedule: Any = None, count: int | None = None) -> Tensor:
        """All states at the knots of one schedule, `[N+1, n, *shape]`, float32 or float64, on the device: those that
        are kept, or a copy; of a bank in memory with a group this rank's, of `own`. For what goes
        along whole trajectories, as `StraightenLoss.roll_out` does, whose batches are then
        `batch._replace(states=states, ends=False)`. count: of the first trajectories alone."""
        places = self._knots.choose(schedule)
        here = self._own.count
        count = here if count is None else min(expect_positive_int(count, "count"), here)
        self._expect_filled()
        if self._is_whole(places):
            return self._store.states if count == here else self._store.states[:, :count]
        return self._store.knots(list(places), count, self._state_dtype)

    def expect_for(self, objective: Any) -> None:
        """That it keeps the knots of a StraightenLoss, or of what else has some; ValueError, naming `bank`."""
        self._knots.choose(objective, "bank")

    def expect_shared_by(self, ranks: Ranks | None, held_out: int | None = None) -> None:
        """That it is this process's alone, of ranks each of which has one, or shared by them; ValueError, naming
        `bank`. held_out: how many are to be, where that is said."""
        if self.by_rank is None:
            return
        mine, others = (self.by_rank.rank, self.by_rank.size), None if ranks is None else (ranks.rank, ranks.size)
        expected = "one of this group" if ranks is not None else "one without a group, or group="
        expect(mine == others, "bank", expected, f"one that is shared: rank {mine[0]} of {mine[1]}")
        if held_out is not None:
            self._expect_held_out(held_out)

    def first(self, count: int) -> tuple[Tensor, dict[str, Tensor] | None]:
        """The states that the first trajectories have at the first knot, or begin with, and their conditioning."""
        rows = slice(0, min(count, self.chunk, self._own.count))
        if self.is_filled:
            sample = self._own.trajectories(self.device if self._store.kind == "device" else "cpu")[rows]
            knot = torch.zeros_like(sample)
            x = self._there(self._store.ends(knot, knot, self._own.places(sample))[0]).to(self._state_dtype)
            return x, self._conditioning(sample)
        x, columns = self._starts.draw(self._rows(0), 0)
        given = {key: c[rows].to(self.device) for key, c in looked_up(columns, self._tables).items()}
        return x[rows].to(self.device), given or None

    def __repr__(self) -> str:
        steps = ", ".join(str(s.steps) for s in self._knots.schedules)
        told = f"size={self.size}, steps=[{steps}], knots={len(self._knots.places)}, storage={self.storage!r}"
        return f"TrajectoryBank({told})"

    def __getstate__(self) -> dict:
        self._known_layout()
        return vars(self) | {"_velocity": None, "_teacher": None, "_starts": None, "_progress": False, "_ranks": None}

    # ---- its parts ----

    def _about(self) -> dict[str, Any]:
        knots, known = self._knots, identity(as_given(self._velocity.unfused()))
        about = {"size": self.size, "chunk": self.chunk, "shape": self._known_layout().shape, "dtype": str(self.dtype)}
        about |= {"times": knots.times, "grid": knots.grid, "schedules": [s.times for s in knots.schedules]}
        if self._solver is not None and not self._solver.is_euler:
            about |= entry_of(self._solver)
        about |= {
            "guidance": self.guidance,
            "columns": self._known_layout().columns,
            "tables": sorted(self._tables),
            **self._starts.identity(),
        }
        if self._is_spread:
            about["order"] = ORDER
        field = field_identity(as_given(self._velocity.unfused()))
        return plain(about | {"teacher": known.parameters, "field": field, "attributes": known.attributes})

    def _folder(self, storage: str | Path) -> Shards:
        """That of the folder, with what is there of this bank."""
        about = self._about()
        store = Shards(expect_folder(storage), self.device, sealed_manifest(about), self._tables)
        if not store.adopt(about):
            return store
        known = identity(as_given(self._velocity.unfused()))
        warn_of_doubts("storage", store.folder, store.manifest["attributes"], known, stacklevel=5)
        there = next((ticket for ticket in store.tickets if ticket is not None), None)
        if self._starts.is_function and there is not None:  # whose output no identity tells
            k = self._place(there)
            same = self._starts.hash(*self._starts.draw(self._rows(k), there)) == store.drawn_hash(k)
            expected = "functions that draw what they drew before, from the same generator"
            expect(same, "storage", expected, f"other values than in {store.path(k)}")
        return store

    def _rows(self, k: int) -> slice:
        return slice(k * self.chunk, min((k + 1) * self.chunk, self.size))

    def _missing(self, drawn: int | None = None) -> list[int]:
        """The draws that are not there, of a bank of which so many chunks have been drawn."""
        last, C = self.drawn if drawn is None else drawn, self.chunks
        return [c for c in range(last - C, last) if self._store.tickets[self._place(c)] != c]

    def _place(self, ticket: int) -> int:
        """Of the ticket-th chunk that is drawn."""
        return spread(ticket, self.chunks) if self._is_spread else ticket % self.chunks

    def _here(self, k: int) -> list[slice]:
        """Of a chunk's trajectories those that this rank rolls out."""
        if self.by_rank is None or self._store.kind != "folder":
            return self._own.of(self._rows(k))
        mine = self.by_rank.part(self.chunks)  # a file is one rank's
        return [self._rows(k)] if mine.start <= k < mine.stop else []

    @staticmethod
    def _shared_by(ranks: Ranks | None, size: int, held_out: int) -> ByRank | None:
        if ranks is None:
            expect_int(held_out, "held_out", "0 without a group (sample(held_out=))", 0, 0)
            return None
        held_out = expect_int(held_out, "held_out", f"fewer than the {size} trajectories", 0, size - 1)
        return ByRank(size, held_out, ranks.rank, ranks.size)

    @property
    def _held_out(self) -> int:
        return 0 if self.by_rank is None else self.by_rank.held_out

    def _expect_held_out(self, count: int, name: str = "held_out") -> int:
        count = expect_int(count, name, f"fewer than the {self.size} trajectories", 0, self.size - 1)
        same = self.by_rank is None or count == self._held_out
        expect(same, name, f"{self._held_out}, as the bank says that ranks share", f"{count}")
        return count

    @torch.inference_mode(False)
    @no_grad
    def _make(self, tickets: list[int]) -> None:
        if not tickets:
            return
        self._expect_teacher("fill")
        warn_if_training(as_given(self._velocity), stacklevel=6)
        self._expect_space(tickets)
        mine = self._rolled_out_here(tickets)
        with self._bar(len(mine)) as bar:
            for ticket in mine:
                k = self._place(ticket)
                self._roll_out(k, *self._starts.draw(self._rows(k), ticket), ticket, bar)
        self._store.settle()
        if self.by_rank is not None and self._store.kind == "folder":
            self._ranks.wait()
            self._store.scan(check=False)
            missing = [self._store.path(self._place(c)).name for c in self._missing(max(tickets) + 1)]
            expected = f"a folder that all {self._ranks.size} ranks write to"
            expect(not missing, "storage", expected, f"{self._store.folder} without {', '.join(missing[:3])}")

    def _rolled_out_here(self, tickets: Iterable[int]) -> list[int]:
        """Those of whose chunks this rank has trajectories; the others' are there as they are on other ranks."""
        mine = []
        for ticket in tickets:
            k = self._place(ticket)
            if self._here(k):
                mine.append(ticket)
            elif self._store.kind != "folder":
                self._store.tickets[k] = ticket
        return mine

    def _roll_out(self, k: int, x: Tensor, columns: dict[str, Tensor], ticket: int, bar: tqdm) -> None:
        """Of what a chunk begins with, what is this rank's."""
        hash, first = self._starts.hash(x, columns) if self._store.kind == "folder" else "", self._rows(k).start
        for rows in self._here(k):
            part = slice(rows.start - first, rows.stop - first)
            own = {key: column[part] for key, column in columns.items()}
            self._roll_out_rows(k, rows, x[part].to(self.device), own, ticket, hash, bar)

    def _roll_out_rows(
        self, k: int, rows: slice, x: Tensor, columns: dict[str, Tensor], ticket: int, hash: str, bar: tqdm
    ) -> None:
        given = {key: c.to(self.device) for key, c in looked_up(columns, self._tables).items()}
        there = self._own.place(rows)
        into = self._store.into(k, there, len(self._knots.places), x, self._dtype or x.dtype)
        state = x
        for place, state in self._teacher.flow(x, rows, given):
            if place is not None:
                into[place].copy_(state, non_blocking=True)
            bar.update()
        if torch.finfo(into.dtype).max < torch.finfo(x.dtype).max and not bool(torch.isfinite(into).all()):
            most = torch.finfo(into.dtype).max
            expect(False, "dtype", "one that holds the teacher's states", f"{into.dtype}, whose largest is {most:.3g}")
        if self._starts.is_data and self.inversion_error is None:
            self.inversion_error = (self._teacher.back(state, rows, given) - x).double().square().mean().sqrt().item()
        self._store.put(k, there, into, columns, ticket, hash)

    def _bar(self, chunks: int) -> tqdm:
        """With what is about to be made, told before it is."""
        shape = "x".join(map(str, self._known_layout().shape))
        size = f"{self.nbytes / 2**30:.3g} GiB" if self.nbytes >= 2**28 else f"{self.nbytes / 2**20:.3g} MiB"
        what = f"{self.size} trajectories, {len(self._knots.places)} knots of {shape}, {self.dtype}"
        log.info("bank: %s: %s, storage %s", what, size, self.storage)
        total = chunks * (self._teacher.evaluations + 1)
        return tqdm(total=total, desc=f"teacher, bank of {size}", disable=not self._progress, leave=False, unit="eval")

    def _conditioning(self, sample: Tensor) -> dict[str, Tensor] | None:
        columns = looked_up(self._store.rows(self._own.places(sample)), self._tables)
        return {key: self._there(column) for key, column in columns.items()} or None

    def _is_whole(self, places: tuple[int, ...]) -> bool:
        """Whether the states as they are kept are those of a batch."""
        every = len(places) == len(self._knots.places)
        return self._store.kind == "device" and every and self.dtype == self._state_dtype

    @property
    def _state_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def _on(self, places: tuple[int, ...], device: torch.device) -> Tensor:
        if places not in self._places:  # once: a GPU waits for such a copy
            self._places[places] = torch.tensor(places, device=device)
        return self._places[places]

    def _there(self, t: Tensor) -> Tensor:
        """On the device; from the host without waiting for it."""
        if t.device == self.device:
            return t
        t = t.pin_memory() if self.device.type == "cuda" and t.is_cpu and not t.is_pinned() else t
        return t.to(self.device, non_blocking=True)

    def _known_layout(self) -> Layout:
        if self._layout is None:
            self._layout = self._starts.layout(self._rows(0))
        return self._layout

    def _expect_space(self, tickets: list[int]) -> None:
        """That there is room for what is to be made: for chunks that are not there, and one beside those that are."""
        new = sum(self._store.tickets[self._place(c)] is None for c in tickets)
        todo = min(self.size, self.chunk * (new + (new < len(tickets))))
        self._store.expect_space(self.nbytes, self.nbytes * todo // self.size)

    def _expect_filled(self) -> None:
        missing = f"{self._store.tickets.count(None)} of {self.chunks} chunks missing"
        expect(self.is_filled, "bank", "one that is filled: bank.fill()", missing)

    def _expect_teacher(self, what: str) -> None:
        expect(self._teacher is not None, "bank", f"one with its teacher, to {what}", "one that was opened or pickled")


def _device_of(velocity: VelocityBase, given) -> torch.device:
    if isinstance(given, Tensor):
        return given.device
    weights = as_given(velocity.unfused())
    found = next(weights.parameters(), None) if isinstance(weights, nn.Module) else None
    return torch.device("cpu") if found is None else found.device


def _expect_guidance(guidance, velocity: VelocityBase, columns: Columns) -> str | None:
    if guidance is None:
        return None
    expect_text(guidance, "guidance", "the name of conditioning, or None")
    names = sorted(columns.given) if not columns.is_function else None
    expect(names is None or guidance in names, "guidance", f"a name of conditioning {names}", repr(guidance))
    field = velocity.unfused()
    guided = isinstance(field, VelocityField) and len(field.unconditional) > 0
    expect(guided, "velocity", "a VelocityField with `unconditional`, to be guided", field)
    return guidance
