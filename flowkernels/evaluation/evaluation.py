"""`Evaluation`, what `evaluate_sampler` returns: rows of figures, as a table and as a file."""

import csv
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from flowkernels._checks import expect, expect_path
from flowkernels._files import expect_target, plain, whole_file
from flowkernels.evaluation.likelihood import Likelihood

FORMATS = (".json", ".csv")


@dataclass(frozen=True)
class EvaluationRow:
    """The figures of one sampler; None where one was not asked for or does not exist.

    name: of the plan. steps: N; None of an adaptive method. evaluations: of the velocity, of each sample.
    network_evaluations: of the network; with guidance two of each.
    rms: root of the mean over samples of the squared L2 distance to the teacher's sample of the same noise;
        rms_interval: of 95 %, by bootstrap over samples.
    straightness: the mean over time of `intervals`, with its standard error over samples; intervals: of each step the
        mean over samples and u of `|(x_b - x_a) / (t_b - t_a) - v(x_u, t_u)|^2`; interval_errors: standard errors.
    energy, energy_error: the energy distance and its standard error. frechet: the Frechet distance.
    paired: of each distance of one's own (mean, standard error) over samples.
    rk45_evaluations: the fewest with which dopri5, at one of the tolerances tried, ends as near to the teacher.
    failed: why there are no figures.
    samples: `[n, *shape]`, where they are kept.
    """

    name: str
    steps: int | None
    evaluations: int
    network_evaluations: int
    rms: float | None = None
    rms_interval: tuple[float, float] | None = None
    straightness: float | None = None
    straightness_error: float | None = None
    intervals: tuple[float, ...] | None = None
    interval_errors: tuple[float, ...] | None = None
    energy: float | None = None
    energy_error: float | None = None
    frechet: float | None = None
    paired: Mapping[str, tuple[float, float | None]] = field(default_factory=dict)
    rk45_evaluations: int | None = None
    failed: str | None = None
    samples: Tensor | None = field(default_factory=lambda: None, compare=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, without samples, and without what there is none of."""
        found = {k: v for k, v in vars(self).items() if k != "samples" and v is not None and v != {}}
        return plain(found)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """How good samplers are: a row for each, in the order of the plans, those of an adaptive method last.

    rows: `EvaluationRow`s. settings: what they were measured with: numbers of samples, the teacher and its steps, what
    distances are to and in. likelihoods: by the name of each velocity. teacher_samples: where they are kept.

    Examples:
        >>> velocity, noise = (lambda x, t: x * t[:, None] ** 4), torch.randn(64, 2)
        >>> found = fk.evaluate_sampler(velocity, [2, 4], noise)
        >>> found.save("evaluation.csv")
        >>> [row.steps for row in found.rows], found.rows[0].rms > found.rows[1].rms
        ([2, 4], True)
    """

    rows: tuple[EvaluationRow, ...]
    settings: Mapping[str, Any]
    likelihoods: Mapping[str, Likelihood] = field(default_factory=dict)
    teacher_samples: Tensor | None = field(default_factory=lambda: None, repr=False)

    def report(self) -> str:
        """The table, with what it was measured with above it, and the likelihoods below."""
        columns = [c for c in _columns(self.rows) if any(c.cell(row) for row in self.rows)]
        cells = [[c.head for c in columns], *([c.cell(row) or "-" for c in columns] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        text = [f"{k.replace('_', ' ')}: {v}" for k, v in self.settings.items()] + [""]
        for row, line in zip([None, *self.rows], cells, strict=True):
            shown = [
                cell.ljust(width) if c.is_text else cell.rjust(width)
                for cell, width, c in zip(line, widths, columns, strict=True)
            ]
            failed = "" if row is None or row.failed is None else f"  failed: {row.failed:.200}"
            text.append(("  ".join(shown) + failed).rstrip())
        text += ["", *(f"{name}: {found}" for name, found in self.likelihoods.items())] if self.likelihoods else []
        return "\n".join(text)

    def __str__(self) -> str:
        return self.report()

    def to_dict(self) -> dict[str, Any]:
        """Settings, rows and likelihoods, for JSON."""
        likelihoods = {
            name: dict(
                **dict(nats=found.mean, nats_error=found.standard_error, bits_per_dim=found.bits_per_dim),
                **dict(bits_error=found.bits_error, samples=len(found.nats), probes=found.probes),
                **dict(evaluations=found.evaluations, offset=found.offset),
            )
            for name, found in self.likelihoods.items()
        }
        rows = [row.to_dict() for row in self.rows]
        return plain({"settings": self.settings, "rows": rows, "likelihoods": likelihoods})

    def save(self, path: str | Path) -> None:
        """Write a .json file of `to_dict`, or a .csv file of the rows: whole or not at all.

        Raises:
            TypeError, ValueError, OSError: naming `path`.
        """
        path = expect_path(path, "path")
        expect(path.suffix in FORMATS, "path", f"a file name ending in {' or '.join(FORMATS)}", f"{path}")
        expect_target(path)
        with whole_file(path) as partial:
            if path.suffix == ".json":
                partial.write_text(json.dumps(self.to_dict(), indent=1))
                return
            table = [_flat(row) for row in self.rows]
            names = list(dict.fromkeys(key for row in table for key in row))
            with open(partial, "w", newline="") as file:
                writer = csv.DictWriter(file, names)
                writer.writeheader()
                writer.writerows(table)


@dataclass(frozen=True)
class _Column:
    """head: its title. cell: a row's text, "" where there is none."""

    head: str
    cell: Any
    is_text: bool = False


def _columns(rows: tuple[EvaluationRow, ...]) -> list[_Column]:
    guided = any(row.network_evaluations != row.evaluations for row in rows)
    return [
        _Column("name", lambda row: row.name, True),
        _Column("N", lambda row: "" if row.steps is None else str(row.steps)),
        _Column("evaluations", lambda row: str(row.evaluations) if row.evaluations else ""),
        _Column("of the network", lambda row: str(row.network_evaluations) if guided and row.evaluations else ""),
        _Column("rms error", lambda row: _number(row.rms)),
        _Column("95 % interval", lambda row: _interval(row.rms_interval), True),
        _Column("straightness", lambda row: _with_error(row.straightness, row.straightness_error)),
        _Column("energy distance", lambda row: _with_error(row.energy, row.energy_error)),
        _Column("Frechet distance", lambda row: _number(row.frechet)),
        *(
            _Column(name, lambda row, name=name: _with_error(*row.paired.get(name, (None, None))))
            for name in dict.fromkeys(name for row in rows for name in row.paired)
        ),
        _Column("RK45 takes", lambda row: "" if row.rk45_evaluations is None else str(row.rk45_evaluations)),
    ]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _with_error(value: float | None, error: float | None) -> str:
    return _number(value) if error is None else f"{value:.4g} +- {error:.1g}"


def _interval(ends: tuple[float, float] | None) -> str:
    return "" if ends is None else "{:.3g}..{:.3g}".format(*ends)


def _flat(row: EvaluationRow) -> dict[str, Any]:
    """Cells of a CSV file: each number in one of its own."""
    found: dict[str, Any] = {}
    for key, value in asdict(row).items():
        if key in ("samples", "paired"):
            continue
        if key == "rms_interval":
            found |= dict(zip(("rms_low", "rms_high"), value or ("", ""), strict=True))
        else:
            found[key] = "" if value is None else " ".join(map(repr, value)) if isinstance(value, tuple) else value
    for name, (mean, error) in row.paired.items():
        found |= {name: mean, f"{name}_error": "" if error is None else error}
    return found
