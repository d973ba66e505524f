"""`--write-matrix` writes what the tests found below the marks of two pages: of test_matrix.py in docs/pipelines.md, of
the other codebases (test_host_*.py) in docs/integrations/index.md."""

import importlib.machinery
import importlib.util
import platform
import sys
import types
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE, HOSTS = ROOT / "docs/pipelines.md", ROOT / "docs/integrations/index.md"
EXAMPLES = ROOT / "examples/integrations"
COLUMNS = ("times", "sigmas", "fitted", "stock", "image", "saved", "bfloat16", "compiled")
# of packages that scripts/hosts.txt cannot hold, by hand where they are: their pages say how, and what came of it
BY_HAND = {"test_host_f5_tts.py": "f5_tts", "test_host_lerobot.py": "lerobot"}
collect_ignore = [file for file, package in BY_HAND.items() if importlib.util.find_spec(package) is None]


def pytest_addoption(parser):
    parser.addoption("--write-matrix", action="store_true", help="write docs/pipelines.md from this run")


@pytest.fixture
def found(request, record_property):
    """`found(column, value)`: what a test says of its family in the matrix, the largest difference or "yes"."""
    name = request.node.callspec.params["name"]
    return lambda column, value: record_property("matrix", (name, column, value))


@pytest.fixture
def host_row(record_property):
    """`host_row(package, ran, example, difference)`: a test says of another codebase what of it ran, by which example,
    and the largest difference to its own way, relative to the largest value."""

    def told(package: str, ran: str, example: Path | str, difference: float) -> None:
        path = EXAMPLES / f"{example}.py" if isinstance(example, str) else example
        record_property("host", (package, version(package), ran, path.stem, len(user_lines(path)), difference))

    return told


class Empty(types.ModuleType):
    """In the place of a package that is imported and not called."""

    def __init__(self, name: str):
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)  # which packages that look for it ask for

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return Empty(name)


@pytest.fixture(scope="module")
def torchvision():
    """torchvision; empty where there is none, or one built for another torch, for packages that import it and call
    nothing of it here."""
    try:
        import torchvision

        yield torchvision
    except Exception:  # of another torch it raises RuntimeError
        with pytest.MonkeyPatch.context() as patch:
            for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
                patch.delitem(sys.modules, name)
            for name in ("", ".utils", ".models", ".transforms", ".transforms.functional"):
                patch.setitem(sys.modules, f"torchvision{name}", Empty(f"torchvision{name}"))
            yield sys.modules["torchvision"]


def user_lines(path: Path) -> list[str]:
    """The lines of an example that are not its host's own: those between "# with flowkernels" and "# ----"."""
    lines = [line.strip() for line in path.read_text().splitlines()]
    begin = lines.index("# with flowkernels") + 1
    return [line for line in lines[begin : lines.index("# ----", begin)] if line]


def host_rows(cells: list[tuple[str, str, str, str, int, float]]):
    yield f"torch {version('torch')}, Python {platform.python_version()}, CPU."
    yield ""
    yield "| package | version | what ran | example | lines | largest difference |"
    yield "|---|---|---|---|---|---|"
    for package, number, ran, example, lines, difference in sorted(cells):
        yield f"| {package} | {number} | {ran} | `{example}.py` | {lines} | {difference:.0e} |"


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
        terminalreporter.write_line("the pages stay as they were: not everything passed")
        return
    for page, name, made in ((PAGE, "matrix", rows), (HOSTS, "host", host_rows)):
        cells = [value for report in done["passed"] for key, value in report.user_properties if key == name]
        if cells:
            pages.write(page, "test_pipelines --write-matrix", made(cells))
            terminalreporter.write_line(f"written: {page.relative_to(ROOT)}")
