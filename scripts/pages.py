"""Pages of docs/ that the scripts here write. What stands above a page's mark is written by hand and stays."""

from collections.abc import Iterable
from pathlib import Path

from flowkernels._files import whole_file

MET = {True: "met", False: "**missed**", None: "not measured"}


def write(page: Path, script: str, lines: Iterable[str], new: str = "") -> None:
    """Replace what is below the mark of the script; `new`: what is above it on a page that does not exist yet."""
    mark = f"<!-- below this line: scripts/{script} -->"
    above = page.read_text().partition(mark)[0] if page.exists() else new
    with whole_file(page) as partial:
        partial.write_text("\n".join([above + mark, "", *lines, ""]))


def targets(found: Iterable[tuple[str, str, str, bool | None]]) -> list[str]:
    """The section of them: (what, target, figure, whether it is met, or None)."""
    rows = (f"| {what} | {target} | {figure} | {MET[met]} |" for what, target, figure, met in found)
    return ["## Targets", "", "| | target | measured | |", "|---|---|---|---|", *rows]


def where_it_ran(rows: Iterable[dict]) -> list[str]:
    """The section of the machines, versions and commits that results are of."""
    sources = dict.fromkeys(
        f"{x['hardware']}, {x['threads']} threads, {x['versions']}, commit {x['commit'] or 'none'}, {x['date']}"
        for x in rows
    )
    return ["", "## Where it ran", "", *(f"- {s}" for s in sources)]


def save(figure, path: Path) -> None:
    """A matplotlib figure as PNG, the same bytes for the same figure; it is closed."""
    from matplotlib import pyplot

    figure.tight_layout()
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=90, format="png", metadata={"Software": None})
    pyplot.close(figure)
