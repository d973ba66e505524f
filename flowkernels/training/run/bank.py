"""The bank of a run of `straighten`: its own, or one that the caller gives."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from flowkernels._checks import describe, expect, expect_room
from flowkernels.runtime.ranks import Ranks
from flowkernels.sampling.loop import initial_state
from flowkernels.training.bank.batch import BankBatch
from flowkernels.training.bank.starts import Noise, source_identity, source_of
from flowkernels.training.bank.trajectory_bank import TrajectoryBank
from flowkernels.training.objective import StraightenLoss
from flowkernels.training.run.apart import expect_held_out, own_held_out
from flowkernels.velocity.hashes import tensors_hash
from flowkernels.velocity.protocol import Velocity, as_given, resolve
from flowkernels.velocity.provenance import Identity


class RunBank:
    """What a run asks of its bank.

    bank: a caller's, whose draws have seeds of their own; or with `source` the run's, all noise of which the run's
        generator draws at once, as in checkpoints of before there were others.
    batch: examples of a batch. fraction: of a bank that is refreshed.
    rng, noise_hash: with these a checkpoint's noise is drawn again: the generator's state before it was, and, of what a
        function draws, the hash. drawn: in their place, of a caller's bank, how much has been drawn.
    held_out: trajectories, the last ones, that are not trained on; None is 0, or of a run whose solver goes with its
        student one in 8, at most 256.
    """

    def __init__(
        self,
        bank: TrajectoryBank,
        objective: StraightenLoss,
        batch: int,
        noise: Noise | None,
        fraction: float,
        held_out: int | None = None,
    ):
        self.bank, self.batch, self.fraction = bank, batch, fraction
        self._objective, self._noise = objective, noise
        if held_out is None:
            held_out = own_held_out(objective, bank.size) if bank.by_rank is None else bank.by_rank.held_out
        self.held_out = held_out
        expect_held_out(self.held_out, bank.size)
        self._source = None if noise is None else source_of(noise, "noise")
        self._begun: Tensor | None = None  # noise that has been drawn for `roll_out`
        self.rng: Tensor | None = None
        self.noise_hash: str | None = None
        self._whole: Tensor | None = None

    @classmethod
    def of(
        cls,
        given: TrajectoryBank | int,
        teacher: Velocity,
        objective: StraightenLoss,
        *,
        noise: Noise | None,
        grid: Tensor,
        batch: int,
        fraction: float,
        held_out: int | None = None,
        seed: int,
        device: torch.device,
        progress: bool,
        ranks: Ranks | None = None,
    ) -> "RunBank":
        """Of the arguments of `straighten`; TypeError, ValueError naming them, for a size that does not fit into memory
        before anything is drawn."""
        if isinstance(given, TrajectoryBank):
            given.expect_for(objective)
            if objective.needs_roll_out and given.carries_conditioning:
                expected = f"one without conditioning for target={objective.target!r}, whose student makes samples of"
                expect(False, "bank", f"{expected} its own (a VelocityField may have it, a row for each)", given)
            expect(given.device == device, "bank", f"one on the student's device {device}", f"one on {given.device}")
            given.expect_shared_by(ranks, held_out)
            return cls(given, objective, batch, None, fraction, held_out)
        if isinstance(noise, Tensor):
            expect(noise.device == device, "noise", f"a tensor on the student's device {device}", noise)
        source_of(noise, "noise")
        fixed = isinstance(noise, Tensor)
        _expect_memory(noise, given, batch, objective)
        settings = dict(
            noise=noise,
            size=None if fixed else given,
            grid=grid,
            chunk=batch,
            seed=seed,
            device=device,
            progress=progress,
        )
        if ranks is not None:  # of which each draws its part
            size = len(noise) if fixed else given
            held_out = own_held_out(objective, size) if held_out is None else held_out
            expect_held_out(held_out, size)
            settings |= dict(group=ranks, held_out=held_out)
        bank = TrajectoryBank(teacher, objective, **settings)
        whole = noise if fraction == 1 and ranks is None else None
        return cls(bank, objective, batch, whole, fraction, held_out)

    @property
    def size(self) -> int:
        return self.bank.size

    @property
    def held_of(self) -> int:
        """How many there are of which the last ones are held out."""
        return self.size

    @property
    def drawn(self) -> int | None:
        return self.bank.drawn if self._source is None else None

    @property
    def nbytes(self) -> int:
        """Of what is kept."""
        if self._begun is None:
            return self.bank.nbytes
        return self.bank.size * len(self.bank.times) * self.state_nbytes  # a function is not asked to draw once more

    @property
    def state_nbytes(self) -> int:
        """Of a state in a batch."""
        if self._begun is None:
            return self.bank.state_nbytes
        return initial_state(self._begun[:1]).nbytes

    @property
    def identity(self) -> str:
        """What a resumed run must share of where the trajectories begin, in a text."""
        if self._noise is not None:
            return source_identity(self._noise)
        about = {key: value for key, value in self.bank.identity().items() if key != "attributes"}
        return f"bank {tensors_hash(about)[:16]}"

    def expect_teacher(self, known: Identity) -> None:
        """That a caller's bank is of the run's teacher, as far as both can be told."""
        of = None if self._noise is not None else self.bank.identity()["teacher"]
        same = None in (of, known.parameters) or of == known.parameters
        expect(same, "bank", f"one of this teacher (parameters {known.parameters})", f"one of another ({of})")

    def draw(self, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor] | None]:
        """What the student can be tried on, states `[m, *shape]` of the first trajectories and their conditioning."""
        self.rng = generator.get_state()
        if self._source is None:
            return self.bank.first(self.batch)
        noise = self._source(slice(0, self.size), generator)
        self.noise_hash = tensors_hash({"noise": noise})[:16] if callable(self._noise) else None
        self._begun = noise.to(self.bank.device)
        return initial_state(self._begun[: self.batch]), None

    def roll_out(self, drawn: int | None = None) -> None:
        """Put the trajectories of what was drawn in place of those that are there. drawn: of a caller's bank, how much
        had been, when it was as it is to be."""
        self._whole = None
        if self._source is None:
            self.bank.fill(drawn)
        else:
            self.bank.roll_out(self._begun)
            self._begun = None

    def refresh(self, generator: torch.Generator) -> None:
        self._whole = None
        if self._source is None:
            self.bank.refresh(self.fraction)
        else:
            self.draw(generator)
            self.roll_out()

    def to_roll_out(self, refreshes: int) -> tuple[int, int]:
        """(calls, evaluations of single trajectories) of the teacher, to make what is not there and then refresh it so
        often. Kernels that make all steps at once are no calls."""
        bank, C = self.bank, self.bank.chunks
        made = [*(range(C) if self._source is not None else bank.to_make)]
        drawn, part = bank.drawn, max(1, math.ceil(self.fraction * C - 1e-9))
        made += range(drawn, drawn + refreshes * part)
        return bank.evaluations_of([ticket % C for ticket in made])

    @property
    def states(self) -> Tensor:
        if self._whole is None:
            self._whole = self.bank.states(self._objective)
        return self._whole

    def sample(self, generator: torch.Generator, n: int | None = None) -> BankBatch:
        """n: examples, in place of `batch`."""
        batch = self.bank.sample(n or self.batch, generator, self._objective, held_out=self.held_out)
        return batch._replace(states=self.states, ends=False) if self._objective.needs_roll_out else batch

    def learner(self, student: nn.Module) -> nn.Module:
        """The student on the trajectories of `states`."""
        if self.bank.by_rank is None:
            return student
        rows = self.bank.by_rank.trajectories(self.bank.device)
        return as_given(resolve(student).rows(rows, self.size))

    def ends(self) -> BankBatch:
        """Of the trajectories that are held out, of a bank with a group those of this rank: from `ends_begin` on."""
        return self.bank.ends(self.held_out, self._objective)

    @property
    def ends_begin(self) -> int:
        by_rank = self.bank.by_rank
        return 0 if by_rank is None else by_rank.aside.start - (self.size - self.held_out)

    def first(self, count: int) -> tuple[Tensor, dict[str, Tensor] | None]:
        """What the first trajectories begin with, and their conditioning."""
        return self.bank.first(count)

    def each(self, start: int, stop: int) -> BankBatch:
        """Every interval of the trajectories from start to stop, one after the other; of whole states theirs alone."""
        batch = self.bank.each(start, stop, self._objective)
        if self._objective.needs_roll_out:
            batch = BankBatch(self.states, *batch[1:3], first=batch.first)
        if batch.ends:
            return batch
        rows = slice(start, stop) if self.bank.by_rank is None else self.bank.by_rank.place(slice(start, stop))
        return batch._replace(states=batch.states[:, rows], first=start, size=self.size)


def _expect_memory(noise: Any, size: int, batch: int, objective: StraightenLoss) -> None:
    """That the bank, of its N + 1 knots, the student's own states beside it, where they are taken, and what an
    iteration draws fit, as far as that is known beforehand."""
    fixed, steps = isinstance(noise, Tensor), objective.schedule.steps
    features = noise[0].numel() if fixed else 1 if callable(noise) else math.prod(noise)
    expect_room(4 * features, "noise", "one sample", f"{describe(noise)}")
    if not fixed:
        expect_room(4 * features * size * (steps + 1), "bank", "trajectories", f"{size}")
    if objective.needs_roll_out:
        size, own = len(noise) if fixed else size, steps + 1 + 2 * steps * objective.refits
        expect_room(
            4 * features * size * (steps + 1 + own), "bank", "the teacher's states and the student's", f"{size}"
        )
    expect_room((4 * features + 32) * batch, "batch", "samples", f"{batch}")
