"""What a calibration has done so far, in a file that a later call goes on from."""

import json
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowkernels import _weights
from flowkernels._checks import FLOATS, describe, expect, expect_finite, expect_int, expect_values
from flowkernels._files import damaged, plain
from flowkernels._warnings import warn
from flowkernels.calibration.sample_costs import SampleCosts
from flowkernels.calibration.tried import Tried, from_dict, to_dict, tried_of
from flowkernels.runtime.ranks import Ranks
from flowkernels.schedule import Schedule
from flowkernels.solver import Solver
from flowkernels.velocity.hashes import tensors_hash

FORMAT, VERSION = "flowkernels.calibrating", "2"
WANTED = "the progress of a calibration"
PART = 0.05  # of the time goes into writing, at most
COSTS, ERRORS, TRIED = "costs.", "errors.", "tried."  # what names of tensors begin with

Plans = Mapping[int, Mapping[str, Schedule | Solver]]


class Progress:
    """A calibration's progress: samples rolled out, what was tried, and endpoint errors.

    It is written after the first part of the work, then as often as takes 5 % of the time, and when the work ends or is
    interrupted. Without a path nothing is written. Of several ranks the first has a path, and reads for all.

    samples: how many are in the costs. tried: {key: [Candidate]}. fitted: what these depend on beside the setting.
    """

    def __init__(
        self,
        path: Path | None,
        setting: Mapping[str, Any],
        attributes: str | None,
        fitted: Mapping[str, Any],
        ranks: Ranks | None = None,
    ):
        self.ranks = ranks or Ranks()
        self.is_kept = self.ranks.from_first(path is not None)
        self.path, self.setting, self.attributes = path, json.loads(json.dumps(plain(dict(setting)))), attributes
        self.samples, self.velocity_dtype, self.tried, self.fitted = 0, "", {}, fitted
        self._costs: dict[str, Tensor] = {}
        self._kept: tuple[Tensor, Tensor] | None = None
        self._verified_as, self._errors = "", {}
        self._written, self._took, self._unsaved, self._changing = None, 0.0, False, False

    @contextmanager
    def changes(self) -> Iterator[None]:
        """While this and what it is of are not of one part of the work; written at the end, where it is time to."""
        self._changing = True
        yield
        self._changing, self._unsaved = False, True
        if self._written is None or time.monotonic() - self._written >= self._took / PART:
            self._save()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """What has not been written is, when the block ends or is interrupted."""
        try:
            yield
        finally:
            if not self._changing:
                self._save()

    def add_samples(self, costs: SampleCosts, kept: tuple[Tensor, Tensor] | None, dtype: torch.dtype) -> None:
        """kept: states and velocities, of which those of the first samples are there."""
        self.samples, self._kept, self.velocity_dtype = costs.count, kept, str(dtype)
        self._costs = costs.state() if self.is_kept else {}

    def verify(self, plans: Plans, noise: Tensor) -> int:
        """Begin with endpoint errors of these on this noise, or go on: the number of samples that there are already."""
        as_text = {str(N): {name: Solver.of(plan).to_dict() for name, plan in of.items()} for N, of in plans.items()}
        verified_as = "" if not self.is_kept else tensors_hash({"plans": plain(as_text), "noise": noise})
        there = {(N, name) for N, of in self._errors.items() for name in of}
        if self._verified_as != verified_as or there != {(N, name) for N, of in plans.items() for name in of}:
            self._verified_as, self._errors = verified_as, {N: {name: [] for name in of} for N, of in plans.items()}
        parts = next(part for of in self._errors.values() for part in of.values())
        return sum(len(part) for part in parts)

    def add_errors(self, errors: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Those of the next samples, float64 `[rows]`, of each N and name."""
        for N, of in errors.items():
            for name, part in of.items():
                self._errors[N][name].append(part.cpu())

    def errors(self) -> dict[int, dict[str, Tensor]]:
        return {N: {name: torch.cat(parts) for name, parts in of.items() if parts} for N, of in self._errors.items()}

    def _save(self) -> None:
        """Write what is new; where that fails, as on a full disk, say so: the work goes on."""
        if self.path is None or not self._unsaved:
            return
        began = time.monotonic()
        tensors = {COSTS + name: t for name, t in self._costs.items()}
        for name, t in zip("xv", self._kept or (), strict=False):
            tensors[name] = t[:, : self.samples]
        tensors |= {f"{ERRORS}{N}.{name}": e for N, of in self.errors().items() for name, e in of.items()}
        tried = {key: [to_dict(tried_of(c)) for c in of] for key, of in self.tried.items()}
        tensors |= {f"{TRIED}{key}.{i}": c.errors for key, of in self.tried.items() for i, c in enumerate(of)}
        about = dict(samples=str(self.samples), velocity_dtype=self.velocity_dtype, verified_as=self._verified_as)
        about |= dict(setting=self.setting, attributes=self.attributes or "", tried=tried, fitted=self.fitted)
        try:
            _weights.write(self.path, tensors, format=FORMAT, version=VERSION, **about)
        except Exception as e:
            told = f"checkpoint: {self.path} could not be written ({type(e).__name__}: {e}); the calibration goes on"
            warnings.warn(told, UserWarning, stacklevel=6)
        self._unsaved, self._written = False, time.monotonic()
        self._took = self._written - began

    def load(self, costs: SampleCosts, states: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Take over what the file holds, and put its samples into `costs`: (states, velocities) of those kept.

        states: `[K+1, most, *shape]`, such as are to be kept; None if none are. ValueError, naming the file, where it
        is of another calibration or none that was written.
        """
        if self.ranks.is_alone:
            tensors, about = _weights.read(self.path, "checkpoint", WANTED, stacklevel=5)
        else:
            self.path = self.ranks.from_first(self.path)
            tensors, about = self.ranks.first(lambda: _weights.read(self.path, "checkpoint", WANTED, stacklevel=7))
        kind, version = about.get("format"), about.get("version")
        expect(kind == FORMAT, "checkpoint", f"a file of format {FORMAT!r}", f"{self.path} of format {describe(kind)}")
        expect(version in ("1", VERSION), "checkpoint", f"version 1 or {VERSION}", f"{self.path} of version {version}")
        with damaged("checkpoint", WANTED, self.path):
            there = _weights.parsed(about, "setting")
        self._expect_setting(there)
        with damaged("checkpoint", WANTED, self.path):
            self.samples = expect_int(int(about["samples"]), "samples", "a number of them", 1, self.setting["n"])
            self.velocity_dtype, self._verified_as = about["velocity_dtype"], about["verified_as"]
            self._costs = {name: tensors[COSTS + name] for name in ("grams", "total", "sizes")}
            costs.set_state(self._costs)
            expect(costs.count == self.samples, "samples", f"{costs.count}, those of the costs", self.samples)
            if version == VERSION and _weights.parsed(about, "fitted") == self.fitted:
                self.tried = self._tried(_weights.parsed(about, "tried"), tensors, costs.times)
            for name, errors in tensors.items():
                if name.startswith(ERRORS):
                    N, what = name.removeprefix(ERRORS).split(".", 1)
                    self._errors.setdefault(int(N), {})[what] = [expect_values(errors, name, (torch.float64,))]
            lengths = {len(parts[0]) for of in self._errors.values() for parts in of.values()}
            expect(len(lengths) <= 1, "errors", "as many of each", sorted(lengths))
            if states is not None:
                rows, found = min(self.samples, states.shape[1]), (tensors["x"], tensors["v"])
                for name, t, length, dtypes in zip(
                    "xv", found, (len(states), len(states) - 1), ((states.dtype,), FLOATS), strict=True
                ):
                    expect_finite(expect_values(t, name, dtypes).flatten(0, 1), name)
                    shape = [length, rows, *states.shape[2:]]
                    expect(list(t.shape) == shape, name, f"shape {shape}", t)
                self._kept = found
        unknown = sorted(self.setting.get("unknown", ()))
        if self.attributes is None or unknown or about.get("attributes") != self.attributes:
            why = f"one with no hash of {', '.join(unknown)}" if unknown else "other attributes of its modules"
            why = why if self.attributes else "one that has no hash"
            warn(f"checkpoint: expected the velocity that {self.path} was made with, got {why}", stacklevel=4)
        if not self.ranks.is_first:
            self.path = None
        return self._kept

    @staticmethod
    def _tried(data: Mapping[str, Any], tensors: Mapping[str, Tensor], grid: Tensor) -> dict[str, list[Tried]]:
        """With the errors of single samples."""
        found = {}
        for key, of in data.items():
            known = [from_dict(entry, f"tried.{key}", grid) for entry in of]
            names = [f"{TRIED}{key}.{i}" for i in range(len(known))]
            errors = [expect_values(tensors[name], name, (torch.float64,)) for name in names]
            found[key] = [replace(c, errors=e) for c, e in zip(known, errors, strict=True)]
        return found

    def _expect_setting(self, there: Mapping[str, Any]) -> None:
        keys = self.setting.keys() | there.keys()
        pairs = {key: (self.setting.get(key, "nothing"), there.get(key, "nothing")) for key in sorted(keys)}
        differ = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
        now, then = (", ".join(f"{key} = {_shown(pair[i])}" for key, pair in differ.items()) for i in (0, 1))
        expected = f"one of this calibration ({now}); resume=False starts anew"
        expect(not differ, "checkpoint", expected, f"{self.path} with {then}")


def _shown(value: Any) -> str:
    return f"{value[:12]}.." if isinstance(value, str) and len(value) == 64 else f"{value!r:.200}"
