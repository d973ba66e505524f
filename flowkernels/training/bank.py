"""The bank of the teacher's trajectories that straightening trains on."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from flowkernels._casts import no_grad
from flowkernels._checks import describe, expect, expect_noise, expect_room, expect_shape, expect_takes, expect_times
from flowkernels.fusion.sampler import FusedSampler
from flowkernels.ops._library import fresh
from flowkernels.sampling.loop import euler, initial_state, replay
from flowkernels.sampling.rollout import expect_finite_flow
from flowkernels.schedule import Schedule
from flowkernels.velocity.evaluate import velocity_rows
from flowkernels.velocity.hashes import tensors_hash


@no_grad
def knots(velocity, noise: Tensor, grid: Tensor, indices: Sequence[int], chunk: int, progress: bool = False) -> Tensor:
    """The teacher's states at the knots `[N+1, n, *shape]`, rolled out on the fine grid, `chunk` samples at a time."""
    n, places = len(noise), {k: i for i, k in enumerate(indices)}
    dtype = initial_state(noise[:0]).dtype
    kept = fresh(torch.empty(len(indices), *noise.shape, dtype=dtype, device=noise.device))
    kept[0] = noise
    bar = tqdm(total=-(-n // chunk) * (len(grid) - 1), desc="teacher", disable=not progress, leave=False, unit="eval")
    with bar:
        for start in range(0, n, chunk):
            rows = slice(start, min(start + chunk, n))
            if isinstance(velocity, FusedSampler):
                _, x, _ = velocity.on(grid).rows(rows, n).run(kept[0, rows], states=True, first=start)
                kept[:, rows] = x[list(indices)]
                bar.update(len(grid) - 1)
                continue
            teacher, x0 = velocity_rows(velocity, rows, n), kept[0, rows]
            for k, (x, *_) in enumerate(euler(teacher, x0, grid), start=1):
                if k in places:
                    kept[places[k], rows] = x
                bar.update()
            expect_finite_flow(x, replay(teacher, x0, grid), grid, first=start)
    return kept


def _teacher_grid(schedule: Schedule, grid) -> tuple[Tensor, list[int]]:
    """The fine grid, and the places of the schedule's knots in it."""
    if grid is None:
        expect(schedule.grid is not None, "grid", "the teacher's fine grid, for a schedule that has none", "None")
        return schedule.grid, list(schedule.indices)
    fine = expect_times(grid, "grid")
    distance, nearest = (fine[None] - schedule.times[:, None]).abs().min(1)
    expect(bool((distance < 1e-9).all()), "grid", "a grid that contains every time of the schedule", fine)
    return fine, nearest.tolist()


def _noise_source(noise, device: torch.device) -> Callable[[int, torch.Generator], Tensor]:
    if isinstance(noise, Tensor):
        expect(expect_noise(noise).device == device, "noise", f"a tensor on the student's device {device}", noise)
        return lambda n, generator: noise
    if callable(noise):
        expect_takes(noise, "noise", "a tensor, a shape or a function (n, generator)", 1, None)

        def drawn(n: int, generator: torch.Generator) -> Tensor:
            x = expect_noise(noise(n, generator), "noise(n, generator)")
            expect(len(x) == n, "noise", f"a function that returns n = {n} samples", x)
            return x.to(device)

        return drawn
    shape = expect_shape(noise, "noise", "a tensor, a shape or a function (n, generator)")

    def normal(n: int, generator: torch.Generator) -> Tensor:
        return torch.randn(n, *shape, generator=generator, dtype=torch.float32, device="cpu").to(device)

    return normal


def _expect_memory(noise, bank: int, batch: int, steps: int) -> None:
    """That the bank, of its N + 1 knots, and what an iteration draws fit, as far as that is known beforehand."""
    given = isinstance(noise, Tensor)
    features = noise[0].numel() if given else 1 if callable(noise) else math.prod(noise)
    expect_room(4 * features, "noise", "one sample", f"{describe(noise)}")
    expect_room(4 * features * (0 if given else bank) * (steps + 1), "bank", "trajectories", f"{bank}")
    expect_room((4 * features + 32) * batch, "batch", "samples", f"{batch}")


def _noise_identity(noise) -> str:
    """What a resumed run must share; a function's output is not known beforehand."""
    if isinstance(noise, Tensor):
        return f"{list(noise.shape)} {tensors_hash({'noise': noise})[:16]}"
    return "function" if callable(noise) else str([int(d) for d in noise])
