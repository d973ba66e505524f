"""The benchmark harness: gates, ratios, what it writes and refuses. No test looks at a speed."""

import csv
import math
import time

import pytest
import torch

from flowkernels import backends, bench, cli
from flowkernels.bench import Ceilings, Measured, Work, measure, rows

CPU = torch.device("cpu")


def wait(seconds):
    return lambda: time.sleep(seconds) or torch.zeros(1)


@pytest.fixture(scope="module")
def ceilings():
    return Ceilings(CPU)


def table(work, ceilings):
    found = rows("entry", bench.Case("case", 1, lambda: work), work, *measure(work, CPU, 1, ceilings, 0.1))
    return {row["provider"]: row for row in found}


def test_a_red_gate_prints_no_speed(ceilings, capsys):
    calls = {"flowkernels cpu": lambda: torch.ones(1), "torch eager": lambda: torch.zeros(1)}
    found = table(Work(calls, lambda got: (got.item(), 0.5), moved=8, flops=8), ceilings)
    red, green = found["flowkernels cpu"], found["torch eager"]
    assert (red["gate"], red["error"], red["bound"], green["gate"]) == ("RED", 1.0, 0.5, "ok")
    figures = ("p20_us", "p50_us", "p80_us", "ratio", "gb_s", "gflop_s", "stream_percent", "fma_percent")
    assert all(red[k] == "" for k in figures)
    assert all(green[k] > 0 for k in figures)
    for row in found.values():
        row["threads"] = 1
    bench.print_case(list(found.values()))
    line = next(line for line in capsys.readouterr().out.splitlines() if "flowkernels cpu" in line)
    assert line.endswith("RED 1 > 0.5")


@pytest.mark.parametrize("error", [math.nan, math.inf, 0.6])
def test_only_an_error_within_the_bound_is_ok(error):
    assert not Measured(error, 0.5).ok
    assert Measured(0.5, 0.5).ok


def test_ratios_are_to_the_best_torch_provider_round_by_round():
    measured = {
        "flowkernels cpu": Measured(0, 1, seconds=[1.0, 2.0, 4.0]),
        "torch eager": Measured(0, 1, seconds=[9.0, 9.0, 9.0]),
        "torch compile": Measured(0, 1, seconds=[3.0, 8.0, 20.0]),
        "published loop": Measured(0, 1, seconds=[50.0, 50.0, 50.0]),
    }
    work = Work({}, lambda got: (0, 1), moved=1e9, flops=2e9)
    stream, fma = [2e9, 2e9, 1e9], [4e9, 4e9, 4e9]
    found = {r["provider"]: r for r in rows("e", bench.Case("c", 1, lambda: work), work, measured, stream, fma)}
    mine = found["flowkernels cpu"]
    assert mine["best_torch"] == "torch compile"
    assert mine["ratio"] == 4  # the median of 3, 4 and 5
    assert found["torch compile"]["ratio"] == 1
    assert mine["p50_us"] == 2e6
    assert mine["gb_s"] == 0.5
    assert mine["stream_percent"] == pytest.approx(25)  # of 50, 25 and 25
    assert mine["fma_percent"] == pytest.approx(25)  # of 50, 25 and 12.5


def test_providers_take_turns_in_an_order_that_rotates(ceilings):
    order = []
    calls = {name: (lambda name=name: order.append(name) or wait(0.004)()) for name in ("flowkernels cpu", "torch a")}
    measured, stream, fma = measure(Work(calls, lambda got: (0, 1)), CPU, 1, ceilings, 0.2)
    rounds = len(stream)
    assert rounds == len(fma) >= 3
    assert {len(m.seconds) for m in measured.values()} == {rounds}
    timed = order[-2 * rounds :]
    assert timed[:4] == ["flowkernels cpu", "torch a", "torch a", "flowkernels cpu"]
    assert all(s >= 0.004 for m in measured.values() for s in m.seconds)


def test_slow_providers_run_three_rounds_only(ceilings):
    calls = {"flowkernels cpu": wait(0.001), "torch eager": wait(0.05)}
    measured, *_ = measure(Work(calls, lambda got: (0, 1)), CPU, 1, ceilings, 0.2)
    assert len(measured["torch eager"].seconds) == 3
    assert len(measured["flowkernels cpu"].seconds) >= 3


def test_extra_memory():
    size = 64 << 20

    def call():
        scratch = torch.ones(size // 4)
        return scratch.sum() + torch.ones(size // 8)  # a result of half the size, which does not count

    found = bench.extra_memory(call, CPU)
    assert found != found or 0.9 * size / 1e6 < found < 1.9 * size / 1e6


def test_every_backend_of_ours_is_a_provider():
    seen = []
    calls = bench.ours(lambda: seen.append(backends.choose("bellman", "cpu")), CPU)
    for call in calls.values():
        call()
    assert list(calls) == [f"flowkernels {name}" for name in seen] == ["flowkernels cpu", "flowkernels reference"]


def test_entries_name_their_cases_before_any_work():
    for entry in bench.ENTRIES:
        found = bench.cases(entry, CPU)
        names = [case.name for case in found]
        assert len(set(names)) == len(names) > 0
        assert any(case.quick for case in found)
    assert {"velocity_gram", "bellman", "euler_step", "linear_update", "segment_points", "straighten_loss"} < {
        *bench.ENTRIES
    }


@pytest.mark.parametrize("entry", ["bellman", "overhead"])
def test_command(entry, tmp_path, capsys):
    assert cli.main(["bench", entry, "--quick", "--threads", "1", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    with open(tmp_path / f"{entry}.csv", newline="") as f:
        found = list(csv.DictReader(f))
    assert tuple(found[0]) == bench.FIELDS
    assert {row["case"] for row in found} == {case.name for case in bench.cases(entry, CPU) if case.quick}
    for row in found:
        assert row["gate"] == "ok"
        assert float(row["p20_us"]) <= float(row["p50_us"]) <= float(row["p80_us"])
        assert row["threads"] == "1"
        assert all(row[k] for k in ("device", "isa", "cpu", "torch", "python", "flowkernels", "date"))
        assert row["case"] in out
    assert list(tmp_path.iterdir()) == [tmp_path / f"{entry}.csv"]


def test_list_runs_nothing(capsys):
    assert cli.main(["bench", "velocity_gram", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"velocity_gram: {case.name}" for case in bench.cases("velocity_gram", CPU)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["gram"], "ENTRY: expected one of velocity_gram, "),
        (["bellman", "--device", "abacus"], "--device: expected a device of this torch build, got 'abacus'"),
        (["bellman", "--threads", "0"], "--threads: expected at least 1, got 0"),
        (["bellman", "--out", "nowhere"], "--out: expected a folder that exists, got nowhere"),
    ],
)
def test_bad_input(options, message, capsys):
    assert cli.main(["bench", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_failing_case_and_a_red_gate_are_failures(monkeypatch, capsys):
    def fails():
        raise RuntimeError("no inputs")

    red = Work({"flowkernels cpu": lambda: torch.ones(1)}, lambda got: (1.0, 0.5))
    green = Work({"flowkernels cpu": lambda: torch.ones(1), "torch eager": wait(0)}, lambda got: (0.0, 0.5))
    for make, code in ((fails, 1), (lambda: red, 1), (lambda: green, 0)):
        monkeypatch.setattr(bench, "cases", lambda entry, device, make=make: [bench.Case("c", 1, make, quick=True)])
        assert cli.main(["bench", "bellman", "--quick"]) == code
    assert "RuntimeError: no inputs" in capsys.readouterr().out
