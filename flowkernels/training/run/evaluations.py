"""What a run has measured on what it holds out, and the best weights so far: kept in checkpoints."""

import math
from collections.abc import Callable
from dataclasses import asdict, fields
from typing import Any

from torch import nn

from flowkernels._checks import describe, expect
from flowkernels.training.run.held_out import Evaluation
from flowkernels.training.run.settings import Settings
from flowkernels.training.students.modules import expect_weights

EVALUATIONS = "evaluations"  # of a checkpoint
COLUMNS = tuple(f.name for f in fields(Evaluation))
BEST = {"iteration", "error", "weights"}


class Evaluations:
    """Rows of `Straightened.evaluations`.

    every: iterations a row; one that is not at a multiple of it is the last of a run, and goes where that goes on.
    keeps_best: whether the weights of the row with the least endpoint error are kept, as `patience` needs them.
    best: of rows at multiples of `every`, {"iteration", "error", "weights"}.
    """

    def __init__(self, every: int, keeps_best: bool):
        self.every, self.keeps_best = every, keeps_best
        self.rows: dict[str, list] = {name: [] for name in COLUMNS}
        self.best: dict[str, Any] | None = None

    def add(self, found: Evaluation, weights: Callable[[], dict[str, Any]]) -> None:
        for name, value in asdict(found).items():
            self.rows[name].append(value)
        if self.keeps_best and self._is_regular(found.iteration) and self._is_better(found.endpoint_error):
            self.best = {"iteration": found.iteration, "error": found.endpoint_error, "weights": weights()}

    def has(self, iteration: int) -> bool:
        return self.rows["iteration"][-1:] == [iteration]

    @property
    def last(self) -> Evaluation | None:
        return Evaluation(*(column[-1] for column in self.rows.values())) if self.rows["iteration"] else None

    @property
    def since_best(self) -> int:
        """Rows at multiples of `every` since the best of them."""
        regular = sum(self._is_regular(it) for it in self.rows["iteration"])
        return 0 if self.best is None else regular - 1 - self.best["iteration"] // self.every

    @property
    def best_is_last(self) -> bool:
        """Whether no weights of before are better than the last."""
        return self.best is None or self.has(self.best["iteration"]) or self._is_better(self.last.endpoint_error)

    @property
    def best_iteration(self) -> int | None:
        if self.best is None:
            return None
        return self.last.iteration if self.best_is_last else self.best["iteration"]

    def go_on(self) -> None:
        """Forget the last row, where a run that goes on would not have made it."""
        if self.last is not None and not self._is_regular(self.last.iteration):
            for column in self.rows.values():
                column.pop()

    def contents(self) -> dict[str, Any]:
        return {"rows": self.rows, "best": self.best}

    def load(self, saved: dict[str, Any]) -> None:
        self.rows, self.best = saved["rows"], saved["best"]

    def _is_regular(self, iteration: int) -> bool:
        return iteration % self.every == 0

    def _is_better(self, error: float) -> bool:
        return self.best is None or error < self.best["error"] or math.isnan(self.best["error"])


def expect_evaluations(saved: dict, settings: Settings, student: nn.Module) -> None:
    """Raise unless what a checkpoint has of them is what such a run keeps."""
    every = settings.evaluate_every
    _expect((EVALUATIONS in saved) == (every is not None), f"{EVALUATIONS} where they are made", [*saved])
    if every is None:
        return
    kept, done, N = saved[EVALUATIONS], saved["iteration"], settings.objective.knots.steps
    _expect(isinstance(kept, dict) and kept.keys() == {"rows", "best"}, "evaluations: rows, best", kept)
    rows, best = kept["rows"], kept["best"]
    _expect(isinstance(rows, dict) and list(rows) == list(COLUMNS), f"evaluations of {list(COLUMNS)}", rows)
    regular = list(range(0, done + 1, every))
    known = [repr(regular), repr([*regular, done])] if regular[-1] < done else [repr(regular)]
    _expect(repr(rows["iteration"]) in known, f"evaluations after iterations 0, {every} .. {done}", rows["iteration"])
    for name in COLUMNS[1:]:
        column = rows[name]
        fits = isinstance(column, list) and len(column) == len(rows["iteration"])
        _expect(fits, f"{len(rows['iteration'])} evaluations", column)
        for value in column:
            numbers = value if name.startswith("interval") else [value]
            fits = isinstance(numbers, list) and len(numbers) == (N if numbers is value else 1)
            _expect(fits and all(type(number) is float for number in numbers), f"numbers as {name}", value)
    if settings.patience is None:
        _expect(best is None, "no best weights without patience", best)
        return
    _expect(isinstance(best, dict) and best.keys() == BEST, f"the best weights: {sorted(BEST)}", best)
    errors = rows["endpoint_error"][: len(regular)]
    numbers = [e for e in errors if not math.isnan(e)]
    place = errors.index(min(numbers)) if numbers else len(errors) - 1
    expected = regular[place], errors[place]
    _expect(repr((best["iteration"], best["error"])) == repr(expected), f"the best at {expected}", best["iteration"])
    expect_weights(student, best["weights"], "checkpoint")


def _expect(ok: bool, expected: str, got: Any) -> None:
    if not ok:
        expect(False, "checkpoint", expected, f"{describe(got)}")
