"""The benchmark of an iteration of `straighten`: which part has what, what is written, the page."""

import csv

import pytest
import straightening_report

from flowkernels.bench import suite
from flowkernels.cli import main

shares, command = (suite.module(f"straighten_loop.{name}") for name in ("shares", "command"))


def test_a_part_inside_another_counts_as_its_own_alone():
    now = [0.0]
    spent = shares.Spent(lambda: now[0])

    def work(seconds, *calls):
        now[0] += seconds
        for call in calls:
            call()
            now[0] += seconds

    def failing():
        now[0] += 100
        raise KeyError

    network = spent.part("forward", lambda: work(3))
    loss = spent.part("loss", lambda: work(0.5, network))
    with pytest.raises(KeyError):
        spent.part("batch", failing)()
    network()  # before the first iteration
    for scale in (1, 9, 1, 1, 1):
        spent.begin()
        work(0.25 * scale, loss)
    assert [parts["forward"] for parts in spent.iterations] == [3] * 5
    assert [parts["loss"] for parts in spent.iterations] == [1] * 5
    assert [parts[shares.OTHER] for parts in spent.iterations] == [0.5, 4.5, 0.5, 0.5, 0.25]  # the last is under way
    assert sum(spent.iterations[0].values()) == 4.5
    assert spent.middle(left_out=0) == dict.fromkeys(shares.PARTS, 0.0) | dict(forward=3, loss=1, other=0.5)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("measured")
    options = ["--quick", "--threads", "1", "--iterations", "40", "--out", str(folder)]
    assert main.main(["bench", "straighten_loop", *options]) == 0
    return folder


def test_the_parts_of_an_iteration_are_written(measured):
    with open(measured / "straighten_loop.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [row["part"] for row in rows] == list(shares.PARTS)
    assert {(row["data"], row["threads"], row["iterations"], row["batch"]) for row in rows} == {
        ("digits", "1", "40", "8")
    }
    assert sum(float(row["share"]) for row in rows) == pytest.approx(1, abs=1e-4)
    assert sum(float(row["ms"]) for row in rows) == pytest.approx(float(rows[0]["iteration_ms"]), rel=1e-4)
    assert all(float(row["ms"]) > 0 for row in rows)
    assert all(row[name] for row in rows for name in ("hardware", "versions", "date"))


def test_what_takes_longer_shows_in_its_part(monkeypatch):
    """Of a clock that one part alone moves."""
    now, step, Spent = [0.0], shares.Descent.step, shares.Spent

    def slow(*args):
        now[0] += 1
        return step(*args)

    monkeypatch.setattr(shares.Descent, "step", slow)
    monkeypatch.setattr(shares, "Spent", lambda: Spent(lambda: now[0]))
    of = command.measured("digits", command.QUICK["digits"])
    assert of == dict.fromkeys(shares.PARTS, 0.0) | {"gradient norm": 1}


def test_the_page_has_them(measured, tmp_path):
    page = tmp_path / "straightening.md"
    straightening_report.write(measured / "straightening.csv", page)
    text = page.read_text()
    table = text[text.index("## What an iteration costs") :]
    assert "| part | digits, batch 8, threads 1 |" in table
    assert all(f"\n| {part} | " in table for part in (*shares.PARTS, "**all**"))
    (tmp_path / "none").mkdir()
    straightening_report.write(tmp_path / "none/straightening.csv", page)
    assert "iteration costs" not in page.read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "mixture2"], "--data: expected some of digits, fashion, got mixture2"),
        (["--iterations", "2"], "--iterations: expected one number, at least 4, for straighten_loop, got 2"),
        (["--iterations", "20,40"], "--iterations: expected one number"),
        (["--minutes", "1"], "--minutes: expected none for straighten_loop (--iterations), got 1"),
        (["--rows", "boss"], "--rows: expected the ENTRY quality or straightening, got straighten_loop"),
    ],
)
def test_bad_input(options, message, capsys):
    assert main.main(["bench", "straighten_loop", *options]) == 2
    assert message in capsys.readouterr().err
