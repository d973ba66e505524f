"""Pairs of noise and data, which targets of the whole interval are trained on: their weights, and batches of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowkernels._casts import no_grad
from flowkernels._checks import (
    FLOATS,
    expect,
    expect_finite,
    expect_int,
    expect_list,
    expect_mapping,
    expect_noise,
    expect_positive_int,
    expect_room,
    expect_values,
)
from flowkernels.sampling.invert import invert
from flowkernels.sampling.loop import initial_state
from flowkernels.schedule import Schedule
from flowkernels.solver import Solver, expect_inverse
from flowkernels.training.bank.batch import BankBatch, generator_on
from flowkernels.velocity.protocol import Velocity, resolve


@dataclass(frozen=True, eq=False)
class Pairs:
    """Noise and data in pairs: what rectified flow (`target="reflow"`) and other targets of the whole interval are
    trained on, in the place of a teacher's trajectories.

    Made by `fk.couple` and `fk.forward_pairs`, or of any states: those of a teacher are `fk.Pairs(torch.stack([noise,
    fk.sample(teacher, noise, 100)]))`.

    states: noise and data, `[2, n, *shape]`, float32 or float64.
    weight: factors on the losses of the pairs, `[n]`, at least 0 and not all 0; None weighs all alike.
    conditioning: keyword arguments of the student's network by name, tensors with a row for each pair, such as labels;
        they take the place of a `VelocityField`'s own. None where it has none, or rows of its own for the pairs.
    index: of each pair the place of its noise among what `couple` was given, int64 `[n]`; None of others.
    error: of `forward_pairs`, the squared distance of each datum from what its noise is made into again, float64 `[n]`.

    Raises TypeError, ValueError, naming the argument.

    Examples:
        >>> pairs = fk.Pairs(torch.randn(2, 16, 3), weight=torch.arange(16.0))
        >>> loss = fk.StraightenLoss(fk.Schedule([0, 1]), target="reflow")
        >>> student = fk.VelocityField(torch.nn.Linear(4, 3), time_column=True)
        >>> loss(student, pairs.batch()).loss.backward()
    """

    states: Tensor
    weight: Tensor | None = None
    conditioning: Mapping[str, Tensor] | None = None
    index: Tensor | None = None
    error: Tensor | None = None

    def __post_init__(self):
        states = expect_values(self.states, "states", (torch.float32, torch.float64))
        good = states.dim() >= 3 and len(states) == 2 and states.numel() > 0
        expect(good, "states", "shape [2, n, *shape], noise and data", states)
        if states.is_cpu:  # a GPU would have to be waited for, in each batch of a function's
            self.expect_finite()
        for name, dtypes in (("weight", FLOATS), ("index", (torch.int64,)), ("error", (torch.float64,))):
            if (value := getattr(self, name)) is not None:
                expect_values(value, name, dtypes)
                fits = value.shape == (len(self),) and value.device == states.device
                expect(fits, name, f"shape [{len(self)}] on {states.device}, an entry for each pair", value)
        if self.conditioning is not None:
            expect_rows(self.conditioning, len(self), states.device)
        if self.weight is not None:
            good = bool(torch.isfinite(self.weight).all() and (self.weight >= 0).all() and self.weight.any())
            expect(good, "weight", "finite factors >= 0, and not all 0", self.weight)

    def expect_finite(self) -> None:
        """ValueError, naming the pair, for NaN or Inf in the states."""
        expect_finite(self.states.transpose(0, 1), "states")

    def __len__(self) -> int:
        return self.states.shape[1]

    @property
    def noise(self) -> Tensor:
        """`[n, *shape]`."""
        return self.states[0]

    @property
    def data(self) -> Tensor:
        """`[n, *shape]`."""
        return self.states[1]

    @property
    def effective_size(self) -> float:
        """The effective sample size of the weights, `(sum w)^2 / sum w^2`: n where all weigh alike, 1 where one pair
        has all the weight (Kong 1992)."""
        if self.weight is None:
            return float(len(self))
        w = self.weight.double() / self.weight.max().double()
        return (w.sum().square() / w.square().sum()).item()

    def batch(
        self, size: int | None = None, generator: torch.Generator | None = None, *, held_out: int = 0
    ) -> BankBatch:
        """A batch for `fk.StraightenLoss`: every pair once, or `size` of them drawn uniformly, with their weights.

        Args:
            size: how many; None takes every pair, in order.
            generator: what draws, on the CPU; None is torch's own.
            held_out: so many of the last pairs are left out.
        """
        held_out = expect_int(held_out, "held_out", f"fewer than the {len(self)} pairs", 0, len(self) - 1)
        device, n = self.states.device, len(self) - held_out
        generator = expect_generator(generator)
        if size is None:
            sample = torch.arange(n, dtype=torch.int64, device=device)
        else:
            size = expect_positive_int(size, "size")
            expect_room(2 * 8 * size, "size", "places", f"{size}")
            drawing = generator_on(device, generator)
            sample = torch.randint(n, (size,), generator=drawing, dtype=torch.int64, device=device)
        weight = None if self.weight is None else self.weight[sample]
        given = None if self.conditioning is None else {key: rows[sample] for key, rows in self.conditioning.items()}
        return BankBatch(self.states, torch.zeros_like(sample), sample, weight=weight, conditioning=given)

    @classmethod
    def cat(cls, pairs: Sequence["Pairs"]) -> "Pairs":
        """All pairs of several in one: forward pairs beside a teacher's, say. Weights are kept as they are, and are 1
        where there were none; conditioning has the same names in all; places and errors are left out."""
        parts = expect_list(pairs, "pairs", "a list of Pairs")
        expect(len(parts) > 0, "pairs", "at least one", "none")
        for part in parts:
            expect(isinstance(part, Pairs), "pairs", "a list of Pairs", part, TypeError)
            first, here = parts[0].states, part.states
            alike = first.shape[2:] == here.shape[2:] and first.device == here.device and first.dtype == here.dtype
            expect(alike, "pairs", f"states like those of the first, {list(first.shape)} {first.dtype}", here)
            names = [sorted(one.conditioning or {}) for one in (parts[0], part)]
            expect(names[0] == names[1], "pairs", f"conditioning {names[0]}, as the first", f"{names[1]}")
            for key in names[0]:
                first, here = (one.conditioning[key] for one in (parts[0], part))
                alike = first.shape[1:] == here.shape[1:] and first.dtype == here.dtype
                expected = f"rows of {list(first.shape[1:])} {first.dtype}, as of the first"
                expect(alike, f"pairs, conditioning[{key!r}]", expected, here)
        weight = None
        if any(part.weight is not None for part in parts):
            each = (part.states.new_ones(len(part)) if part.weight is None else part.weight for part in parts)
            weight = torch.cat([w.to(parts[0].states.dtype) for w in each])
        given = parts[0].conditioning
        if given is not None:
            given = {key: torch.cat([part.conditioning[key] for part in parts]) for key in given}
        return cls(torch.cat([part.states for part in parts], 1), weight, given)


def expect_rows(conditioning, n: int, device: torch.device) -> None:
    """Conditioning of n samples."""
    for key, rows in expect_mapping(conditioning, "conditioning").items():
        name = f"conditioning[{key!r}]"
        expect_values(rows, name)
        fits = rows.dim() > 0 and len(rows) == n and rows.device == device
        expect(fits, name, f"{n} rows on {device}, one for each pair", rows)


def expect_generator(generator) -> torch.Generator:
    """One on the CPU; torch's own for None."""
    expected = "a torch.Generator on the CPU, or None"
    if generator is None:
        return torch.default_generator
    expect(isinstance(generator, torch.Generator), "generator", expected, generator, TypeError)
    expect(generator.device.type == "cpu", "generator", expected, f"one on {generator.device}")
    return generator


@torch.inference_mode(False)
@no_grad
def forward_pairs(
    velocity: Velocity,
    data: Tensor,
    schedule: Schedule | Solver | int | Sequence[float] | Tensor,
    *,
    round_trip: bool = True,
    resample_with: Schedule | Solver | int | Sequence[float] | Tensor | None = None,
    chunk: int | None = None,
    progress: bool = False,
) -> Pairs:
    """Pairs of real data and the noise that a teacher makes them of, by `fk.invert`: the data are exact, and what the
    teacher gets wrong is in the noise. A teacher's own samples are the other way round.

    Args:
        velocity: the teacher, with its guidance and conditioning.
        data: `[n, *shape]`.
        schedule: how it is inverted, as `fk.invert` takes it: fine steps, such as 100, or a Solver made for inversion,
            `fk.Solver.heun(50, inverse=True)`, which needs far fewer.
        round_trip: sample from the noise again, and report how far from the data that ends, in `Pairs.error`.
        resample_with: what samples on the way back; None: the schedule itself.
        chunk: samples evaluated at once; None evaluates all.
        progress: show a progress bar of each chunk.

    Returns:
        Pairs, in the data's order.

    Raises:
        TypeError, ValueError: naming the argument; for NaN or Inf, the sample and the step.

    Source: Simple ReFlow (arXiv 2410.07815), which trains on a teacher's pairs and forward ones: `Pairs.cat`.

    Examples:
        >>> pairs = fk.forward_pairs(lambda x, t: -x, torch.ones(4, 2), 100)
        >>> torch.allclose(pairs.noise, torch.full((4, 2), torch.e), rtol=0.01)
        True
        >>> bool((pairs.error < 1e-3).all())
        True
    """
    n = len(expect_noise(data, "data"))
    step = n if chunk is None else expect_positive_int(chunk, "chunk")
    begins = expect_inverse(schedule).times[0].item()
    expect(abs(begins - 1) <= 1e-12, "schedule", "times that end at 1, where the data are", f"{begins:.6g}")
    field, found = resolve(velocity), []
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        part = velocity if step >= n else field.rows(rows, n)
        how = dict(round_trip=round_trip, resample_with=resample_with, progress=progress)
        found.append(invert(part, data[rows], schedule, **how))
    noise = torch.cat([part.noise for part in found])
    error = torch.cat([part.error for part in found]) if found[0].error is not None else None
    return Pairs(torch.stack([noise, initial_state(data)]), error=error)
