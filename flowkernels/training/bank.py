"""The bank of the teacher's trajectories that straightening trains on."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from flowkernels._casts import no_grad
from flowkernels._checks import describe, expect, expect_noise, expect_room, expect_shape, expect_takes, expect_times
from flowkernels.ops.library import fresh
from flowkernels.sampling.loop import initial_state
from flowkernels.sampling.teacher import Teacher
from flowkernels.schedule import Schedule
from flowkernels.solver import Solver
from flowkernels.velocity.hashes import tensors_hash
from flowkernels.velocity.protocol import Velocity

Noise = Tensor | Sequence[int] | Callable[[int, torch.Generator], Tensor]
NOISE = "a tensor, a shape or a function (n, generator)"


class BankBatch(NamedTuple):
    """A batch of a bank: the teacher's states at the knots `[N+1, n, *shape]`, float32 or float64, and of each of its
    examples the interval, 0..N-1, and the sample, 0..n-1; int64 `[B]`, where the states are.

    ends: the states are those at the ends of the examples' intervals alone, `[2, B, *shape]`, of a bank that is
    somewhere else; size: its n, where that has to be known. weight: factors on the examples' losses, `[B]`.

    Examples:
        >>> states = fk.rollout(lambda x, t: -x, torch.randn(16, 2), 20).x[[0, 10, 20]]
        >>> batch = fk.BankBatch(states, torch.randint(2, (8,)), torch.randint(16, (8,)))
    """

    states: Tensor
    interval: Tensor
    sample: Tensor
    ends: bool = False
    weight: Tensor | None = None
    size: int | None = None


class Bank:
    """The teacher's states at the knots of a schedule, for n noises: what batches are drawn from.

    states: `[N+1, n, *shape]`, float32, of float64 noise float64; there once they are rolled out.
    times: the knots, float64 `[N+1]`; step_sizes `[N]`; steps: N; size: n.
    noise_identity: what a resumed run must share of the noise, in a text.
    rng, drawn: with these a checkpoint's noise is drawn again: the generator's state before it was, and, of what a
        function draws, the hash.

        noise = bank.draw(generator)
        bank.roll_out(noise)
        states, interval, sample = bank.sample(generator)

    Args:
        teacher: a velocity, or a `FusedSampler`.
        times, grid, indices: the knots, the teacher's fine grid, and their places in it (`knots_on_grid`).
        noise: a tensor `[n, *shape]`, a shape, or a function `(n, generator) -> [n, *shape]`.
        size: n, where noise is not a tensor.
        batch: samples of a batch, and of the teacher's evaluations.
        device: of the states; a tensor of noise is there already.
        progress: show a progress bar of the teacher's evaluations.

    Raises TypeError, ValueError naming the argument; for a size that does not fit into memory before it is filled.
    """

    def __init__(
        self,
        teacher,
        times: Tensor,
        grid: Tensor,
        indices: Sequence[int],
        *,
        noise: Noise,
        size: int = 1024,
        batch: int = 128,
        device: torch.device | str = "cpu",
        progress: bool = False,
    ):
        self._teacher, self._grid, self._indices, self._progress = teacher, grid, indices, progress
        self.times = times.to(device)
        self.step_sizes = self.times.diff()
        self._source, self._is_function = _noise_source(noise, self.times.device), callable(noise)
        given = isinstance(noise, Tensor)
        _expect_memory(noise, 0 if given else size, batch, self.steps)
        self.size, self.batch = len(noise) if given else size, batch
        self.noise_identity = _noise_identity(noise)
        self.rng: Tensor | None = None
        self.drawn: str | None = None

    @property
    def steps(self) -> int:
        return len(self.step_sizes)

    def draw(self, generator: torch.Generator) -> Tensor:
        """Noise `[n, *shape]` of the next trajectories, from a generator on the CPU."""
        self.rng = generator.get_state()
        noise = self._source(self.size, generator)
        self.drawn = tensors_hash({"noise": noise})[:16] if self._is_function else None
        return noise

    def roll_out(self, noise: Tensor) -> None:
        """Put the teacher's trajectories of the noise in place of those that are there."""
        self.states = knots(self._teacher, noise, self._grid, self._indices, self.batch, self._progress)

    def sample(self, generator: torch.Generator) -> BankBatch:
        """Intervals and samples drawn uniformly, from a generator on the CPU; see `generator_on`."""
        device = self.times.device
        generator = generator_on(device, generator)
        interval = torch.randint(self.steps, (self.batch,), generator=generator, device=device)
        sample = torch.randint(self.size, (self.batch,), generator=generator, device=device)
        return BankBatch(self.states, interval, sample)


def generator_on(device: torch.device, generator: torch.Generator) -> torch.Generator:
    """To draw with on a device, where a run's generator is on the CPU: that itself there. On a GPU, whose queue a copy
    of what the CPU draws would have to wait for, one whose seed that draws: all that a checkpoint has to keep."""
    if device == generator.device:
        return generator
    seed = torch.randint(2**63 - 1, (), generator=generator, device="cpu").item()
    return torch.Generator(device).manual_seed(seed)


@no_grad
def knots(
    velocity: Velocity, noise: Tensor, grid: Tensor, indices: Sequence[int], chunk: int, progress: bool = False
) -> Tensor:
    """The teacher's states at the knots `[N+1, n, *shape]`, rolled out on the fine grid, `chunk` samples at a time."""
    n, places = len(noise), {k: i for i, k in enumerate(indices)}
    teacher = Teacher(velocity, n, solver=Solver.euler(grid), chunk=chunk)
    dtype = initial_state(noise[:0]).dtype
    kept = fresh(torch.empty(len(indices), *noise.shape, dtype=dtype, device=noise.device))
    if 0 in places:
        kept[places[0]] = noise
    bar = tqdm(total=-(-n // chunk) * (len(grid) - 1), desc="teacher", disable=not progress, leave=False, unit="eval")
    with bar:
        for rows in teacher.chunks(n):
            x0 = initial_state(noise[rows])
            if teacher.fused is not None:
                _, x, _ = teacher.fused_flow(x0, rows.start, states=True)
                kept[:, rows] = x[list(indices)]
                bar.update(len(grid) - 1)
                continue
            for k, (x, _) in enumerate(teacher.flow(x0, rows.start), start=1):
                if k in places:
                    kept[places[k], rows] = x
                bar.update()
    return kept


def knots_on_grid(schedule: Schedule, grid) -> tuple[Tensor, tuple[int, ...]]:
    """The teacher's fine grid, the schedule's own where `grid` is None, and the places of the schedule's knots in it;
    ValueError or TypeError, naming `grid`, where there is none or it misses a knot."""
    if grid is None:
        expect(schedule.grid is not None, "grid", "the teacher's fine grid, for a schedule that has none", "None")
        return schedule.grid, schedule.indices
    fine = expect_times(grid, "grid")
    distance, nearest = (fine[None] - schedule.times[:, None]).abs().min(1)
    expect(bool((distance < 1e-9).all()), "grid", "a grid that contains every time of the schedule", fine)
    return fine, tuple(nearest.tolist())


def _noise_source(noise, device: torch.device) -> Callable[[int, torch.Generator], Tensor]:
    """The function (n, generator) that draws the noise, on the device."""
    if isinstance(noise, Tensor):
        expect(expect_noise(noise).device == device, "noise", f"a tensor on the student's device {device}", noise)
        return lambda n, generator: noise
    if callable(noise):
        expect_takes(noise, "noise", NOISE, 1, None)

        def drawn(n: int, generator: torch.Generator) -> Tensor:
            x = expect_noise(noise(n, generator), "noise(n, generator)")
            expect(len(x) == n, "noise", f"a function that returns n = {n} samples", x)
            return x.to(device)

        return drawn
    shape = expect_shape(noise, "noise", NOISE)

    def normal(n: int, generator: torch.Generator) -> Tensor:
        return torch.randn(n, *shape, generator=generator, dtype=torch.float32, device="cpu").to(device)

    return normal


def _expect_memory(noise, size: int, batch: int, steps: int) -> None:
    """That the bank, of its N + 1 knots, and what an iteration draws fit, as far as that is known beforehand."""
    features = noise[0].numel() if isinstance(noise, Tensor) else 1 if callable(noise) else math.prod(noise)
    expect_room(4 * features, "noise", "one sample", f"{describe(noise)}")
    expect_room(4 * features * size * (steps + 1), "bank", "trajectories", f"{size}")
    expect_room((4 * features + 32) * batch, "batch", "samples", f"{batch}")


def _noise_identity(noise) -> str:
    """What a resumed run must share; a function's output is not known beforehand."""
    if isinstance(noise, Tensor):
        return f"{list(noise.shape)} {tensors_hash({'noise': noise})[:16]}"
    return "function" if callable(noise) else str([int(d) for d in noise])
