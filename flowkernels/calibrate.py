"""Calibrate: roll out, step costs and schedules in one streamed call, and the file that keeps them."""

import base64
import itertools
import json
import platform
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from flowkernels._checks import expect, expect_finite_flow, expect_noise, expect_positive_int, expect_times
from flowkernels._files import whole_file
from flowkernels._version import __version__
from flowkernels.fuse import FusedSampler
from flowkernels.ops._library import fresh
from flowkernels.ops.euler_step.reference import guided
from flowkernels.rollout import euler, initial_state
from flowkernels.schedule import Schedule, StepCost, bellman, expect_steps
from flowkernels.velocity_field import VelocityField, parameter_hash, velocity_rows, warn_if_training

FORMAT = "flowkernels.calibration"
CHUNK_BYTES = 256 << 20  # velocities of one chunk of samples


@dataclass(frozen=True, eq=False)
class Calibration(Mapping):
    """The schedules of a model, by number of steps: `cal[4]`.

    times: the fine grid, float64 `[K+1]`. cost: all step costs, float64 `[K+1, K+1]`, Inf where k <= j.
    schedules: {N: Schedule}. All of it on the CPU. provenance: where the calibration comes from (K, n, seed, dtype,
    shape, guidance, the model's parameter hash, library versions).
    """

    times: Tensor
    cost: Tensor
    schedules: dict[int, Schedule]
    provenance: dict = field(default_factory=dict)

    def __getitem__(self, steps: int) -> Schedule:
        if steps not in self.schedules:
            raise KeyError(f"steps: expected one of {sorted(self.schedules)}, got {steps!r}; plan({steps!r}) adds it")
        return self.schedules[steps]

    def __iter__(self) -> Iterator[int]:
        return iter(self.schedules)

    def __len__(self) -> int:
        return len(self.schedules)

    def plan(self, steps: int | Iterable[int]) -> dict[int, Schedule]:
        """Schedules for further numbers of steps, from the same step costs. Adds them to this calibration."""
        plans = bellman(self.cost, self.times, steps)
        self.schedules.update(plans)
        return plans

    def __str__(self) -> str:
        lines = [f"{'N':>3} {'cost':>11} {'uniform':>11} {'ratio':>6}  knots"]
        for n, s in sorted(self.schedules.items()):
            knots = " ".join(f"{t:.3g}" for t in s.times)
            lines.append(f"{n:>3} {s.cost:>11.4g} {s.uniform_cost:>11.4g} {s.ratio:>6.3f}  {knots}")
        return "\n".join(lines)

    def save(self, path: str | Path) -> None:
        """Write a JSON file; whole or not at all."""
        row, column = torch.triu_indices(len(self.times), len(self.times), 1, device="cpu")
        data = {
            "format": FORMAT,
            "version": 1,
            "provenance": self.provenance,
            "times": self.times.tolist(),
            "schedules": {
                str(n): {"indices": list(s.indices), "cost": s.cost, "uniform_cost": s.uniform_cost}
                for n, s in sorted(self.schedules.items())
            },
            "cost": {
                "encoding": "base64 of little-endian float64, entries k > j row by row",
                "data": base64.b64encode(self.cost[row, column].numpy().astype("<f8").tobytes()).decode(),
            },
        }
        with whole_file(path) as partial:
            partial.write_text(json.dumps(data, indent=1))


def load(path: str | Path, velocity=None) -> Calibration:
    """Read a calibration written by `Calibration.save`.

    Args:
        path: the file.
        velocity: the model it is to be used with; a warning says so if it was made for another one.

    Raises:
        FileNotFoundError; ValueError if the file is truncated or something else.
    """
    text = Path(path).read_bytes()
    try:
        data = json.loads(text)
    except ValueError as e:
        raise ValueError(f"path: expected a whole calibration file, {path} is truncated or not JSON ({e})") from e
    kind = data.get("format") if isinstance(data, dict) else type(data).__name__
    expect(kind == FORMAT, "path", f"a file of format {FORMAT!r}", f"{path} of format {kind!r}")
    expect(data.get("version") == 1, "path", "version 1", f"{path} of version {data.get('version')!r}")
    try:
        times = expect_times(data["times"], "times")
        K = len(times) - 1
        cost = torch.full((K + 1, K + 1), torch.inf, dtype=torch.float64, device="cpu")
        values = np.frombuffer(base64.b64decode(data["cost"]["data"], validate=True), "<f8")
        expect(len(values) == K * (K + 1) // 2, "cost", f"{K * (K + 1) // 2} entries", str(len(values)))
        row, column = torch.triu_indices(K + 1, K + 1, 1, device="cpu")
        cost[row, column] = torch.from_numpy(values.astype(np.float64))
        schedules = {}
        for n, s in data["schedules"].items():
            indices = tuple(int(i) for i in s["indices"])
            rising = all(a < b for a, b in itertools.pairwise(indices))
            expect(
                len(indices) == int(n) + 1 and indices[0] == 0 and indices[-1] == K and rising,
                f"schedules[{n}]",
                f"{int(n) + 1} rising indices from 0 to {K}",
                indices,
            )
            schedules[int(n)] = Schedule(
                times[list(indices)], times, indices, float(s["cost"]), float(s["uniform_cost"])
            )
        cal = Calibration(times, cost, schedules, dict(data["provenance"]))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as e:
        raise ValueError(f"path: expected a whole calibration file, {path} is damaged ({e})") from e
    if velocity is not None:
        made_for, given = cal.provenance.get("parameters_sha256"), parameter_hash(velocity)
        if made_for != given:
            warnings.warn(
                f"velocity: expected the model that {path} was made for (parameters {_short(made_for)}), "
                f"got another one ({_short(given)}); its schedules may not be the best for it",
                UserWarning,
                stacklevel=2,
            )
    return cal


def _short(digest: str | None) -> str:
    return digest[:12] if digest else "unknown: not a module"


@torch.no_grad()
def calibrate(
    velocity,
    noise: Tensor,
    grid: int | Sequence[float] | Tensor = 100,
    steps: int | Iterable[int] = range(1, 11),
    *,
    chunk: int | None = None,
    progress: bool = True,
    seed: int | None = None,
) -> Calibration:
    """The schedule of least cost for each number of steps: roll out, step costs and Bellman, streamed in chunks.

    Args:
        velocity: callable `velocity(x, t)` with x `[n, *shape]`, t `[n]`, a `VelocityField` or a `FusedSampler`; the
            teacher.
        noise: `[n, *shape]`, as many samples as wanted; a few hundred settle most schedules.
        grid: K for K uniform fine steps, or K+1 increasing times from 0 to 1. Costs K evaluations a sample.
        steps: the numbers of steps N wanted, each 1..K.
        chunk: samples rolled out at once; None chooses so that their velocities take at most 256 MiB.
        progress: show a progress bar.
        seed: the seed that `noise` was made with, for the provenance.

    Returns:
        Calibration. No schedule costs more than the uniform one on the same grid.

    Raises:
        TypeError, ValueError: naming the argument; for NaN or Inf, the sample and the step.
    """
    times = expect_times(grid, "grid")
    expect_noise(noise)
    K, n = len(times) - 1, len(noise)
    wanted = expect_steps(steps, K)
    if chunk is None:
        chunk = max(1, min(n, CHUNK_BYTES // (K * noise[0].numel() * 4)))
    expect_positive_int(chunk, "chunk")
    fused = velocity.on(times) if isinstance(velocity, FusedSampler) else None
    velocity = velocity if fused is None else fused.velocity
    warn_if_training(velocity)

    costs, velocities = StepCost(times, device=noise.device), None
    with tqdm(total=-(-n // chunk) * K, desc="calibrate", disable=not progress, leave=False, unit="eval") as bar:
        for start in range(0, n, chunk):
            rows = slice(start, min(start + chunk, n))
            if fused is not None:
                x, _, velocities = fused.rows(rows, n).run(noise[rows], velocities=True, first=start)
                expect_finite_flow(x, velocities, times, first=start)  # not looked at by the kernel on a GPU
                costs.update(velocities)
                bar.update(K)
                continue
            flow = euler(velocity_rows(velocity, rows, n), initial_state(noise[rows]), times)
            for i, (x, v, v_uncond, w) in enumerate(flow):
                v = v if v_uncond is None else guided(v, v_uncond, w, x.dtype)
                if velocities is None:
                    velocities = fresh(torch.empty(K, chunk, *v.shape[1:], dtype=v.dtype, device=v.device))
                velocities[i, : len(x)] = v
                bar.update()
            chunk_v = velocities[:, : len(x)]
            expect_finite_flow(x, chunk_v, times, first=start)
            costs.update(chunk_v)
    cost = costs.cost()
    schedules = bellman(cost, times, wanted)
    return Calibration(times, cost.cpu(), schedules, _provenance(velocity, noise, velocities, K, seed))


def _provenance(velocity, noise: Tensor, velocities: Tensor, K: int, seed: int | None) -> dict:
    return {
        "K": K,
        "n": len(noise),
        "seed": seed,
        "shape": list(noise.shape[1:]),
        "state_dtype": str(initial_state(noise[:0]).dtype),
        "velocity_dtype": str(velocities.dtype),
        "device": noise.device.type,
        "guidance": velocity.guidance if isinstance(velocity, VelocityField) else 1.0,
        "convention": velocity.convention() if isinstance(velocity, VelocityField) else None,
        "parameters_sha256": parameter_hash(velocity),
        "versions": {"flowkernels": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
