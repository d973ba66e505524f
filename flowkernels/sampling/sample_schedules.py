"""`SampleSchedules`: a schedule for each sample of a batch, or for each prompt; and Euler's steps on them."""

import numbers
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowkernels._checks import (
    FlowError,
    expect,
    expect_float64,
    expect_list,
    expect_mapping,
    expect_noise,
    expect_numbers,
    expect_shown,
    expect_times,
    expect_values,
)
from flowkernels.sampling.loop import initial_state
from flowkernels.sampling.teacher import Teacher
from flowkernels.schedule import Schedule
from flowkernels.velocity.protocol import VelocityBase

Name = str | int


@dataclass(frozen=True, eq=False)
class SampleSchedules:
    """Schedules of N steps, one for each sample, or for each condition such as a prompt: `Calibration.find(each=)`.

    times: the knots, float64 `[n, N+1]`, each row as a Schedule's: rising from 0, or later, to 1.
    names: of the n conditions, texts or integers; None where the rows are samples.
    cost: of each row's own schedule, float64 `[n]`; None where unknown.
    shared: the one schedule of least cost of all of them. shared_cost: what that costs each row, float64 `[n]`. Both
        None where unknown.
    notes: where they come from, ready for JSON.

    `fk.sample` takes one with a row for each sample of its noise, which `of` picks by the names.

    Examples:
        >>> plans = fk.SampleSchedules([[0, 0.5, 1], [0, 0.8, 1]], names=["cat", "dog"])
        >>> plans["dog"].times
        tensor([0.0000, 0.8000, 1.0000], dtype=torch.float64)
        >>> fk.sample(lambda x, t: -x, torch.ones(3, 1), plans.of(["dog", "cat", "dog"]))
        tensor([[0.1600],
                [0.2500],
                [0.1600]])
    """

    times: Tensor
    names: tuple[Name, ...] | None = None
    cost: Tensor | None = None
    shared: Schedule | None = None
    shared_cost: Tensor | None = None
    notes: dict = field(default_factory=dict)

    def __post_init__(self):
        times = expect_float64(self.times, "times", "a table of times, a row for each schedule")
        expect(times.dim() == 2 and times.shape[1] > 1, "times", "shape [n, N+1], at least two times a row", times)
        for i, row in enumerate(times):
            expect_times(row, f"times[{i}]")
        checked: dict[str, Any] = {"times": times, "notes": dict(expect_mapping(self.notes, "notes"))}
        if self.names is not None:
            checked["names"] = names = tuple(expect_names(self.names, "names"))
            fits = len(names) == len(times) and len(set(names)) == len(names)
            expect_shown(fits, "names", f"{len(times)} names, one for each row of times, none of them twice", names)
        for name in ("cost", "shared_cost"):
            if getattr(self, name) is not None:
                value = expect_float64(getattr(self, name), name, "numbers, one for each row of times")
                expect(value.shape == times.shape[:1], name, f"{len(times)} numbers, one for each row of times", value)
                checked[name] = value
        known = self.shared is None or isinstance(self.shared, Schedule)
        expect(known, "shared", "a Schedule or None", self.shared, TypeError)
        together = (self.shared is None) == (self.shared_cost is None)
        expect(together, "shared_cost", "what the shared schedule costs each, with one, and None without", "another")
        for name, value in checked.items():  # tensors of its own: the caller may write to what it gave
            object.__setattr__(self, name, value.clone() if isinstance(value, Tensor) else value)

    def __len__(self) -> int:
        return len(self.times)

    @property
    def steps(self) -> int:
        """N."""
        return self.times.shape[1] - 1

    @property
    def ratio(self) -> float | None:
        """What the rows' own schedules cost, as a share of what the shared one costs them; on what they were found on.
        None where that is unknown."""
        if self.cost is None or self.shared_cost is None:
            return None
        own, shared = self.cost.sum().item(), self.shared_cost.sum().item()
        return own / shared if shared > 0 else 1.0

    def __getitem__(self, name: Name) -> Schedule:
        """The schedule of a name; without names, of a row."""
        return Schedule(self.times[self._rows(expect_names([name], "name"), "name")[0]])

    def __iter__(self) -> Iterator[Schedule]:
        return map(Schedule, self.times)

    def of(self, names: Sequence[Name] | Tensor) -> "SampleSchedules":
        """A row for each of some samples, whose conditions these are, in any order and any number; without names, of
        these rows. ValueError for what has no schedule, naming it."""
        rows = self._rows(expect_names(names, "names"), "names")
        cost, shared_cost = (None if value is None else value[rows] for value in (self.cost, self.shared_cost))
        return SampleSchedules(self.times[rows], None, cost, self.shared, shared_cost, self.notes)

    def _rows(self, names: Sequence[Name], argument: str) -> list[int]:
        known = {name: row for row, name in enumerate(range(len(self)) if self.names is None else self.names)}
        lacking = sorted({repr(name) for name in names if name not in known})
        expected = f"rows, 0 to {len(self) - 1}" if self.names is None else f"some of {list(known)}"
        expect(not lacking, argument, expected, ", ".join(lacking))
        return [known[name] for name in names]

    def groups(self) -> list[tuple[Schedule, Tensor]]:
        """The schedules that differ, and the rows that have each, int64, rising: for networks that take one time for a
        batch, and loops elsewhere."""
        rows: dict[tuple[float, ...], list[int]] = {}
        for i, knots in enumerate(self.times.tolist()):
            rows.setdefault(tuple(knots), []).append(i)
        of = dict(dtype=torch.int64, device="cpu")
        return [(Schedule(knots), torch.tensor(which, **of)) for knots, which in rows.items()]

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` makes it of again, for JSON; the shared schedule as its times."""
        found: dict[str, Any] = {"times": self.times.tolist(), "notes": self.notes}
        if self.names is not None:
            found["names"] = list(self.names)
        for name in ("cost", "shared_cost"):
            if getattr(self, name) is not None:
                found[name] = getattr(self, name).tolist()
        return found if self.shared is None else found | {"shared": self.shared.times.tolist()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "SampleSchedules":
        """What `to_dict` gave. ValueError or TypeError if it is something else, naming the entry."""
        expect(isinstance(data, Mapping), "data", "a dict", data, TypeError)
        rows = data.get("times")
        expect_shown(isinstance(rows, list) and len(rows) > 0, "times", "some rows of times", rows)
        for row in rows:
            expect_numbers(row, "times", len(rows[0]) if isinstance(rows[0], list) else None)
        shared = data.get("shared")
        shared = None if shared is None else Schedule(expect_times(shared, "shared"))
        known = {name: data.get(name) for name in ("names", "cost", "shared_cost")}
        return cls(rows, shared=shared, notes=data.get("notes", {}), **known)

    def __repr__(self) -> str:
        of = "samples" if self.names is None else "conditions"
        ratio = "" if self.ratio is None else f", cost over that of one for all={self.ratio:.3g}"
        return f"SampleSchedules({len(self)} {of}, steps={self.steps}, different={len(self.groups())}{ratio})"


def expect_names(names: Any, argument: str) -> list[Name]:
    """Texts or integers, also of a tensor or an array."""
    expected = "a sequence of texts or integers"
    if isinstance(names, Tensor):
        integers = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
        names = expect_values(names, argument, integers).tolist()
    elif isinstance(names, np.ndarray):
        names = names.tolist()
    expect_shown(not isinstance(names, (str, bytes)), argument, expected, names, TypeError)
    found = expect_list(names, argument, expected)
    for name in found:
        known = isinstance(name, (str, numbers.Integral)) and not isinstance(name, bool)
        expect_shown(known, argument, expected, name, TypeError)
    return [name if isinstance(name, str) else int(name) for name in found]


def run_each(velocity: VelocityBase, noise: Tensor, plans: SampleSchedules, check: bool) -> Tensor:
    """The last states of Euler's steps of each sample on its own schedule."""
    expected = "a network, which is evaluated at a time for each sample"
    expect(not velocity.is_fused, "velocity", expected, type(velocity).__name__)
    x = initial_state(expect_noise(noise, look=check))
    expected = f"{len(noise)} rows, one for each sample of noise (`of` picks them by names)"
    got = f"{len(plans)}" if plans.names is None else f"{plans!r}"
    expect(plans.names is None and len(plans) == len(noise), "schedule", expected, got)
    for step in _steps(velocity, x, plans):
        x, _ = step
    if check and not torch.isfinite(x).all():
        _say_where(velocity, noise, plans, x)
    return x


def _steps(velocity: VelocityBase, x: Tensor, plans: SampleSchedules) -> Iterator[tuple[Tensor, Tensor]]:
    """The state after each step, and its velocities."""
    teacher, times = Teacher(velocity, len(x)), plans.times
    sizes = times.diff(dim=1).to(x.device, x.dtype)
    for i in range(plans.steps):
        v = teacher.at_each(x, times[:, i])
        x = torch.addcmul(x, v, sizes[:, i].view(-1, *[1] * (x.dim() - 1)))
        yield x, v


def _say_where(velocity: VelocityBase, noise: Tensor, plans: SampleSchedules, x: Tensor) -> None:
    sample = int((~torch.isfinite(x.flatten(1)).all(1)).nonzero()[0])
    of = (i for i, (_, v) in enumerate(_steps(velocity, initial_state(noise), plans)) if not v[sample].isfinite().all())
    step = next(of, None)
    where = ": the state overflows" if step is None else f" at step {step} (t = {plans.times[sample, step]:.6g})"
    expect(False, "velocity", "finite velocities", f"NaN or Inf in sample {sample}{where}", FlowError)
