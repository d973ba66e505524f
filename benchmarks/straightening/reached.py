"""How soon rows have the error that BOSS's published procedure has at its end."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

BASELINES = ("published", "published_float32")


@dataclass(frozen=True)
class Reached:
    """A row that has the error of a baseline's end.

    error: that rms. theirs, ours: (seconds, seconds of processor), theirs until it was that near for the first time.
    """

    data: str
    seed: str
    N: int
    baseline: str
    error: float
    theirs: tuple[float, float]
    row: str
    iterations: int
    rms: float
    ours: tuple[float, float]

    def share(self, at: int = 0) -> float:
        """Of the baseline's time that the row takes."""
        return self.ours[at] / self.theirs[at]


def curve(row: Mapping) -> list[tuple[int, float, float, float]]:
    """(iterations, seconds, seconds of processor, rms) of a row that was looked at on its way."""
    points = (point.split() for point in row["curve"].split(";") if point)
    return [(int(float(i)), float(wall), float(processor), float(rms)) for i, wall, processor, rms in points]


def reached(rows: Iterable[Mapping]) -> Iterator[Reached]:
    """Of each baseline the rows that end as near to the teacher or nearer, with those that take least time first."""
    rows = list(rows)
    for base in (r for r in rows if r["row"] in BASELINES):
        error = float(base["rms"])
        first = next(point for point in curve(base) if point[3] <= error * (1 + 1e-5))
        same = ("data", "seed", "N")
        of = [r for r in rows if r["row"] not in BASELINES and all(str(r[k]) == str(base[k]) for k in same)]
        found = [
            Reached(
                *(base["data"], str(base["seed"]), int(base["N"]), base["row"], error, first[1:3]),
                *(r["row"], int(r["iterations"]), float(r["rms"])),
                (float(r["seconds"]), float(r["processor_seconds"])),
            )
            for r in of
            if float(r["rms"]) <= error
        ]
        yield from sorted(found, key=lambda r: r.ours[1])


def print_reached(found: Iterable[Reached]) -> None:
    """The quickest of each baseline."""
    seen = set()
    for r in found:
        if (which := (r.data, r.seed, r.N, r.baseline)) in seen:
            continue
        seen.add(which)
        theirs = f"{r.baseline} has rms {r.error:.4g} after {r.theirs[0]:.1f} s ({r.theirs[1]:.1f} s of processor)"
        ours = f"{r.row}, {r.iterations} iterations, {r.rms:.4g} after {r.ours[0]:.1f} s ({r.ours[1]:.1f})"
        share = f"{r.share():.3g} of the time, {r.share(1):.3g} of the processor's"
        print(f"{r.data}, N = {r.N}: {theirs}; {ours}: {share}")
