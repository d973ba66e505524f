"""The pairs of a run of `straighten`, in the place of a bank: the same ones throughout, or drawn for each batch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flowkernels._checks import describe, expect, expect_takes
from flowkernels.training.bank.batch import BankBatch
from flowkernels.training.objective import StraightenLoss
from flowkernels.training.pairs.pairs import Pairs
from flowkernels.training.run.apart import expect_held_out, seed_apart
from flowkernels.velocity.hashes import tensors_hash
from flowkernels.velocity.provenance import Identity

PairsSource = Pairs | Callable[[int, torch.Generator], Pairs]
PAIRS = "Pairs or a function (n, generator) that returns n of them"


def are_pairs(given: Any) -> bool:
    """Whether a `bank` of `straighten` is pairs, or what draws them."""
    return isinstance(given, Pairs) or (callable(given) and not isinstance(given, type))


def expect_pairs(given: Any, name: str) -> PairsSource:
    if not isinstance(given, Pairs):
        expect_takes(given, name, PAIRS, 1, None)
    return given


class RunPairs:
    """What a run asks of its bank (`RunBank`), of pairs: there is nothing to roll out, and no teacher of theirs.

    given: Pairs, of which batches are drawn uniformly; or a function (n, generator) -> Pairs, the generator on the CPU,
    which makes each batch.
    held_out: pairs, the last ones, that are not trained on; of a function so many beside, drawn once.

    Raises ValueError, naming `bank`, for a target of other states than those of noise and data.
    """

    drawn: int | None = None
    noise_hash: str | None = None
    ends_begin: int = 0

    def __init__(
        self,
        given: PairsSource,
        objective: StraightenLoss,
        batch: int,
        device: torch.device,
        held_out: int | None,
        seed: int,
    ):
        self.given, self.batch, self._device = given, batch, device
        ends = len(objective.times) == 2 and not objective.needs_roll_out
        got = f"target={objective.target!r}, of states at {len(objective.times)} times"
        expect(ends, "bank", "a target of one whole interval, such as 'reflow', for pairs", got)
        self.rng: Tensor | None = None
        self.held_out, self._aside = held_out or 0, None
        if isinstance(given, Pairs):
            self._expect_here(given).expect_finite()
            expect_held_out(self.held_out, len(given))
            self._aside = given
        elif self.held_out:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                self._aside = self._made(torch.Generator("cpu").manual_seed(seed_apart(seed)), self.held_out)
            self._aside.expect_finite()

    @property
    def size(self) -> int:
        return len(self.given) if isinstance(self.given, Pairs) else self.batch

    @property
    def nbytes(self) -> int:
        """Of what is kept; of what a function draws nothing is."""
        if (kept := self._aside) is None:  # all of pairs that are given
            return 0
        more = (kept.weight, *(kept.conditioning or {}).values())
        return kept.states.nbytes + sum(t.nbytes for t in more if t is not None)

    def to_roll_out(self, refreshes: int) -> tuple[int, int]:
        return 0, 0

    @property
    def state_nbytes(self) -> int:
        """Of a state in a batch."""
        return self.given.states[0, 0].nbytes if isinstance(self.given, Pairs) else 0

    @property
    def identity(self) -> str:
        """What a resumed run must share of the pairs, in a text."""
        if not isinstance(self.given, Pairs):
            return "pairs of a function"
        parts = {"states": self.given.states, "weight": self.given.weight, "conditioning": self.given.conditioning}
        return f"pairs {tensors_hash(parts)[:16]}"

    def expect_teacher(self, known: Identity) -> None:
        """Any: pairs are of none."""

    def draw(self, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor] | None]:
        """What the student can be tried on: noise `[m, *shape]` of some pairs, and their conditioning. No generator
        moves."""
        self.rng = generator.get_state()
        if isinstance(self.given, Pairs):
            pairs = self.given
        else:
            with torch.random.fork_rng([self._device] if self._device.type == "cuda" else []):
                trial = torch.Generator("cpu")
                trial.set_state(self.rng)
                pairs = self._made(trial)
        rows = slice(0, self.batch)
        conditioning = pairs.conditioning
        return pairs.noise[rows], None if conditioning is None else {k: v[rows] for k, v in conditioning.items()}

    def roll_out(self, drawn: int | None = None) -> None:
        """Nothing."""

    def sample(self, generator: torch.Generator, n: int | None = None) -> BankBatch:
        """n: examples, in place of `batch`."""
        if isinstance(self.given, Pairs):
            return self.given.batch(n or self.batch, generator, held_out=self.held_out)
        return self._made(generator, n).batch()

    def ends(self) -> BankBatch:
        """Of the pairs that are held out, `[2, held_out, *shape]`."""
        batch = self.each(self.held_of - self.held_out, self.held_of)
        return batch._replace(ends=True, first=0)

    @property
    def held_of(self) -> int:
        """How many there are of which the last ones are held out."""
        return self.size if self._aside is None else len(self._aside)

    def each(self, start: int, stop: int) -> BankBatch:
        """The pairs from start to stop of those, as a bank has them."""
        rows, sample = slice(start, stop), torch.arange(start, stop, device=self._device)
        conditioning = self._aside.conditioning
        given = None if conditioning is None else {key: column[rows] for key, column in conditioning.items()}
        states, of = self._aside.states[:, rows], dict(size=self.held_of, first=start)
        return BankBatch(states, torch.zeros_like(sample), sample, conditioning=given, **of)

    def first(self, count: int) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Noise of the first pairs, and their conditioning; of a function always the same ones."""
        pairs = self.given
        if not isinstance(pairs, Pairs):
            pairs = self._made(torch.Generator("cpu").manual_seed(seed_apart(0)), count)
        given = pairs.conditioning
        return pairs.noise[:count], None if given is None else {key: rows[:count] for key, rows in given.items()}

    def _made(self, generator: torch.Generator, n: int | None = None) -> Pairs:
        n = n or self.batch
        pairs = self.given(n, generator)
        expected = f"a function that returns Pairs of n = {n}"
        expect(isinstance(pairs, Pairs), "bank", expected, describe(pairs))
        expect(len(pairs) == n, "bank", expected, f"{len(pairs)} pairs")
        return self._expect_here(pairs)

    def _expect_here(self, pairs: Pairs) -> Pairs:
        states = pairs.states
        expect(states.device == self._device, "bank", f"pairs on the student's device {self._device}", states)
        return pairs
