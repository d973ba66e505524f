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


def save(figure, path: Path) -> None:
    """A matplotlib figure as PNG, the same bytes for the same figure; it is closed."""
    from matplotlib import pyplot

    figure.tight_layout()
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=90, format="png", metadata={"Software": None})
    pyplot.close(figure)
