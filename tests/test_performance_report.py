"""docs/performance.md: a part for each kind of processor, as its results are."""

import shutil
from pathlib import Path

import performance_report
import pytest

from flowkernels.bench import tables

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks/results", ROOT / "docs/performance.md"


def test_the_page_is_that_of_the_results(tmp_path):
    page = tmp_path / "performance.md"
    shutil.copy(PAGE, page)
    performance_report.write(RESULTS, page, plots=False)
    assert page.read_text() == PAGE.read_text()
    for row in performance_report.read(RESULTS):
        assert (ROOT / "docs" / performance_report.folder_of(row["processor"]) / f"{row['entry']}.png").is_file()


def test_each_processor_has_its_part(tmp_path):
    """A second one, at half the speed and slower than a peer, leaves the part of the first as it was."""
    page, first, both = tmp_path / "performance.md", tmp_path / "first", tmp_path / "both"
    mark = "<!-- below this line: scripts/performance_report.py -->"
    page.write_text(f"By hand.\n\n{mark}\nold\n")
    mine = [row for row in tables.read_csv(RESULTS / "bellman.csv") if row["processor"] == "Intel Xeon (amx)"]
    assert mine
    slower = [row | {"processor": "Slow & old (baseline)"} for row in mine]
    ours = next(row for row in slower if row["provider"] == performance_report.OURS)
    ours |= {"p50_us": 1e6, "ratio": 0.25, "best_torch": "torch eager"}
    for folder, rows in ((first, mine), (both, mine + slower)):
        folder.mkdir()
        tables.write_csv(folder / "bellman.csv", rows)
    performance_report.write(first, page, plots=False)
    alone = page.read_text()
    performance_report.write(both, page)
    text = page.read_text()
    assert text.startswith(f"By hand.\n\n{mark}\n")
    assert "old\n\n" not in text
    assert "| | target | Intel Xeon (amx) | Slow & old (baseline) |" in text

    def part(text, title):
        return text[text.index(title) :].partition("\n### ")[0].partition("\n## ")[0].strip()

    for title in ("where a peer is faster", "a call by layer", "every case"):
        assert part(text, f"### Intel Xeon (amx): {title}") == part(alone, f"### Intel Xeon (amx): {title}")
    told = part(text, "### Slow & old (baseline): where a peer is faster")
    assert told.endswith(f"- bellman, {ours['case']}: torch eager takes 0.25 of our time")
    assert "![bellman](performance/slow-old-baseline/bellman.png)" in text
    assert (tmp_path / "performance/slow-old-baseline/bellman.png").is_file()
    assert (tmp_path / "performance/intel-xeon-amx/bellman.png").is_file()


@pytest.mark.parametrize("figure", ["", "nan"])
def test_what_was_not_measured_is_no_figure(figure):
    found = performance_report.Results([])
    lines = list(performance_report.side_by_side({"A": found, "B": found}))
    assert lines[0] == "| | target | A | B |"
    assert all(line.endswith(" |  |  |") for line in lines[2:])
    assert performance_report.cell(float(figure) if figure else figure) == ""
