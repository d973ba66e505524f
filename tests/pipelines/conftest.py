"""`--write-matrix` writes what the tests of test_matrix.py found below the mark in docs/pipelines.md."""

import platform
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/pipelines.md"
COLUMNS = ("times", "sigmas", "fitted", "stock", "image", "saved", "bfloat16", "compiled")


def pytest_addoption(parser):
    parser.addoption("--write-matrix", action="store_true", help="write docs/pipelines.md from this run")


@pytest.fixture
def found(request, record_property):
    """`found(column, value)`: what a test says of its family in the matrix, the largest difference or "yes"."""
    name = request.node.callspec.params["name"]
    return lambda column, value: record_property("matrix", (name, column, value))


def rows(cells: list[tuple[str, str, float | str]]):
    import diffusers
    import tiny

    by_family = {}
    for name, column, value in cells:
        by_family.setdefault(name, {})[column] = f"{value:.0e}" if isinstance(value, float) else value
    packages = ", ".join(f"{name} {version(name)}" for name in ("diffusers", "transformers", "torch"))
    yield f"{packages}, Python {platform.python_version()}, CPU."
    yield ""
    yield "| family | pipeline | its scheduler | " + " | ".join(COLUMNS) + " |"
    yield "|" + "---|" * (3 + len(COLUMNS))
    for name, family in tiny.FAMILIES.items():
        what = family.scheduler[0].removesuffix("Scheduler")
        cells = [by_family.get(name, {}).get(column, "") for column in COLUMNS]
        yield f"| {name} | {getattr(diffusers, family.pipeline).__name__} | {what} | " + " | ".join(cells) + " |"


def pytest_terminal_summary(terminalreporter, config):
    """Here, where the results of all processes come together."""
    if not config.getoption("--write-matrix") or hasattr(config, "workerinput"):
        return
    import pages

    done = terminalreporter.stats
    if done.get("failed") or done.get("error"):
        terminalreporter.write_line("docs/pipelines.md stays as it was: not everything passed")
        return
    cells = [value for report in done["passed"] for key, value in report.user_properties if key == "matrix"]
    pages.write(PAGE, "test_pipelines --write-matrix", rows(cells))
    terminalreporter.write_line(f"written: {PAGE.relative_to(ROOT)}")
