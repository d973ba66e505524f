"""The pairs of a run of `straighten`, in the place of a bank: the same ones throughout, or drawn for each batch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flowkernels._checks import describe, expect, expect_takes
from flowkernels.training.bank.batch import BankBatch
from flowkernels.training.objective import StraightenLoss
from flowkernels.training.pairs.pairs import Pairs
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

    Raises ValueError, naming `bank`, for a target of other states than those of noise and data.
    """

    drawn: int | None = None
    noise_hash: str | None = None
    held_out: int = 0

    def __init__(self, given: PairsSource, objective: StraightenLoss, batch: int, device: torch.device):
        self.given, self.batch, self._device = given, batch, device
        ends = len(objective.times) == 2 and not objective.needs_roll_out
        got = f"target={objective.target!r}, of states at {len(objective.times)} times"
        expect(ends, "bank", "a target of one whole interval, such as 'reflow', for pairs", got)
        self.rng: Tensor | None = None
        if isinstance(given, Pairs):
            self._expect_here(given).expect_finite()

    @property
    def size(self) -> int:
        return len(self.given) if isinstance(self.given, Pairs) else self.batch

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
            return self.given.batch(n or self.batch, generator)
        return self._made(generator, n).batch()

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
