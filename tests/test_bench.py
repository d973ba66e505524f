"""The benchmark harness: gates, ratios, what it writes and refuses. No test looks at a speed."""

import contextlib
import csv
import dataclasses
import math
import re
import subprocess
import sys
import time
import types

import pytest
import torch
from machine_code import rules

from flowkernels.bench import command, harness, suite, tables, timers
from flowkernels.bench.case import Case, Work, ours
from flowkernels.bench.harness import Measured, Shares, measure, rows
from flowkernels.bench.tables import FIELDS, print_case, print_summary
from flowkernels.bench.timers import CudaEvents, WallClock
from flowkernels.cli import main
from flowkernels.ops.public import OPS
from flowkernels.runtime import backends, environment

CPU = torch.device("cpu")


def wait(seconds):
    return lambda: time.sleep(seconds) or torch.zeros(1)


@pytest.fixture(scope="module")
def clock():
    return WallClock(CPU)


def table(work, clock):
    found = rows("entry", Case("case", 1, lambda: work), work, *measure(work, clock, 1, 0.1))
    return {row["provider"]: row for row in found}


def test_a_red_gate_prints_no_speed(clock, capsys):
    calls = {"flowkernels cpu": lambda: torch.ones(1), "torch eager": lambda: torch.zeros(1)}
    found = table(Work(calls, lambda got: (got.item(), 0.5), moved=8, flops=8), clock)
    red, green = found["flowkernels cpu"], found["torch eager"]
    assert (red["gate"], red["error"], red["bound"], green["gate"]) == ("RED", 1.0, 0.5, "ok")
    figures = ("p20_us", "p50_us", "p80_us", "ratio", "gb_s", "gflop_s", "stream_percent", "fma_percent")
    assert all(red[k] == "" for k in figures)
    assert all(green[k] > 0 for k in figures)
    for row in found.values():
        row["threads"] = 1
    print_case(list(found.values()))
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
    found = {r["provider"]: r for r in rows("e", Case("c", 1, lambda: work), work, measured, stream, fma)}
    mine = found["flowkernels cpu"]
    assert mine["best_torch"] == "torch compile"
    assert mine["ratio"] == 4  # the median of 3, 4 and 5
    assert found["torch compile"]["ratio"] == 1
    assert mine["p50_us"] == 2e6
    assert mine["gb_s"] == 0.5
    assert mine["stream_percent"] == pytest.approx(25)  # of 50, 25 and 25
    assert mine["fma_percent"] == pytest.approx(25)  # of 50, 25 and 12.5


def test_providers_take_turns_in_an_order_that_rotates(clock):
    order = []
    calls = {name: (lambda name=name: order.append(name) or wait(0.004)()) for name in ("flowkernels cpu", "torch a")}
    measured, stream, fma = measure(Work(calls, lambda got: (0, 1)), clock, 1, 0.2)
    rounds = len(stream)
    assert rounds == len(fma) >= 3
    assert {len(m.seconds) for m in measured.values()} == {rounds}
    timed = order[-2 * rounds :]
    assert timed[:4] == ["flowkernels cpu", "torch a", "torch a", "flowkernels cpu"]
    assert all(s >= 0.004 for m in measured.values() for s in m.seconds)


def test_slow_providers_run_three_rounds_only(clock):
    calls = {"flowkernels cpu": wait(0.001), "torch eager": wait(0.05)}
    measured, *_ = measure(Work(calls, lambda got: (0, 1)), clock, 1, 0.2)
    assert len(measured["torch eager"].seconds) == 3
    assert len(measured["flowkernels cpu"].seconds) >= 3


def test_extra_memory(clock):
    size = 64 << 20

    def call():
        scratch = torch.ones(size // 4)
        return scratch.sum() + torch.ones(size // 8)  # a result of half the size, which does not count

    found = clock.extra_memory(call)
    assert found != found or 0.9 * size / 1e6 < found < 1.9 * size / 1e6


def test_the_loop_that_reads_reads_all_of_it_every_time():
    C, ones = backends.extension(), torch.ones(6400)
    once = C.read_again(ones.data_ptr(), 3200, 1, 1)  # a lane's share of the sum
    assert 0 < once <= 3200 / 4
    assert C.read_again(ones.data_ptr(), 6400, 5, 1) == 10 * once
    assert C.read_again(ones.data_ptr(), 6400, 5, 2) == 5 * once  # of the first thread


def test_every_backend_of_ours_is_a_provider():
    seen = []
    calls = ours(lambda: seen.append(backends.choose("bellman", "cpu")), CPU)
    for call in calls.values():
        call()
    assert list(calls) == [f"flowkernels {name}" for name in seen] == ["flowkernels cpu", "flowkernels reference"]


def test_entries_name_their_cases_before_any_work():
    for entry in suite.entries():
        found = suite.cases(entry, CPU)
        names = [case.name for case in found]
        assert len(set(names)) == len(names) > 0
        assert any(case.quick for case in found)
    assert {"velocity_gram", "bellman", "euler_step", "linear_update", "segment_points", "straighten_loss"} < {
        *suite.entries()
    }


def test_entries_are_the_files_that_are_there(tmp_path, monkeypatch):
    for name in ("whole_stage", "euler_step", "another_stage", "bellman"):
        (tmp_path / f"{name}.py").touch()
    (tmp_path / "quality").mkdir()
    (tmp_path / "quality/__init__.py").touch()
    monkeypatch.setattr(suite, "BENCHMARKS", tmp_path)
    assert suite.entries() == ("bellman", "euler_step", "another_stage", "whole_stage")


@pytest.fixture(autouse=True)
def small_arrays(monkeypatch):
    """Of which the bandwidth is nobody's: those of the benchmark take 400 MB."""
    monkeypatch.setattr(WallClock, "arrays", property(lambda clock: [torch.ones(1 << 14) for _ in range(3)]))


@pytest.mark.parametrize("entry", ["bellman", "overhead"])
def test_command(entry, tmp_path, capsys):
    assert main.main(["bench", entry, "--quick", "--seconds", "0.001", "--threads", "1", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    with open(tmp_path / f"{entry}.csv", newline="") as f:
        found = list(csv.DictReader(f))
    assert tuple(found[0]) == FIELDS
    assert {row["case"] for row in found} == {case.name for case in suite.cases(entry, CPU) if case.quick}
    for row in found:
        assert row["gate"] == "ok"
        assert float(row["p20_us"]) <= float(row["p50_us"]) <= float(row["p80_us"])
        assert row["threads"] == "1"
        assert all(row[k] for k in ("device", "isa", "cpu", "torch", "python", "flowkernels", "date"))
        assert row["case"] in out
    assert list(tmp_path.iterdir()) == [tmp_path / f"{entry}.csv"]


def test_list_runs_nothing(capsys):
    assert main.main(["bench", "velocity_gram", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"velocity_gram: {case.name}" for case in suite.cases("velocity_gram", CPU)]


def test_as_a_module(capsys):
    command = [sys.executable, "-m", "flowkernels.bench", "bellman", "--list"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert main.main(["bench", *command[3:]]) == 0
    assert done.stdout == capsys.readouterr().out != ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["gram"], "ENTRY: expected one of velocity_gram, "),
        (["bellman", "--device", "abacus"], "--device: expected a device of this torch build, got 'abacus'"),
        (["bellman", "--threads", "0"], "--threads: expected an integer of at least 1, got '0'"),
        (["bellman", "--seconds", "0"], "--seconds: expected a positive number, got '0'"),
        (["bellman", "--minutes", "nan"], "--minutes: expected a positive number, got 'nan'"),
        (["bellman", "--device", "cuda"], "--device: expected "),
        (["bellman", "--out", "nowhere"], "--out: expected a folder that exists, got nowhere"),
    ],
)
def test_bad_input(options, message, capsys):
    assert main.main(["bench", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_failing_case_and_a_red_gate_are_failures(monkeypatch, capsys):
    def fails():
        raise RuntimeError("no inputs")

    red = Work({"flowkernels cpu": lambda: torch.ones(1)}, lambda got: (1.0, 0.5))
    green = Work({"flowkernels cpu": lambda: torch.ones(1), "torch eager": wait(0)}, lambda got: (0.0, 0.5))
    for make, code in ((fails, 1), (lambda: red, 1), (lambda: green, 0)):
        monkeypatch.setattr(suite, "cases", lambda entry, device, make=make: [Case("c", 1, make, quick=True)])
        assert main.main(["bench", "bellman", "--quick", "--seconds", "0.001"]) == code
    assert "RuntimeError: no inputs" in capsys.readouterr().out


def test_the_summary_says_whose_gates_are_red(monkeypatch, capsys):
    """Of torch's, and of its arithmetic in our reference, they are no failure."""

    def one(*red):
        calls = {
            name: lambda name=name: name in red for name in ("flowkernels cpu", "flowkernels reference", "torch raw")
        }
        work = Work(calls, lambda got: (float(got), 0.5))
        monkeypatch.setattr(suite, "cases", lambda entry, device: [Case("c", 1, lambda: work, quick=True)])
        results = []
        monkeypatch.setattr(command, "print_case", lambda rows, titles: results.extend(rows))
        code = main.main(["bench", "bellman", "--quick", "--seconds", "0.001"])
        capsys.readouterr()
        print_summary(results, ("% copy", "% matmul"))
        return code, capsys.readouterr().out.splitlines()[-1].split("  ")[-1]

    assert one() == (0, "ok")
    assert one("torch raw") == (0, "RED: torch raw")
    assert one("flowkernels reference", "torch raw") == (0, "RED: reference, torch raw")
    assert one("flowkernels cpu") == (1, "RED: cpu")


# ---- a GPU's timer, on a stand-in for torch.cuda ----


class Event:
    """An event whose stream is the host."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


@pytest.fixture
def gpu(monkeypatch):
    """What `CudaEvents` asks of torch.cuda; counts how often the host waited."""
    waited = []
    for name, value in dict(
        **dict(
            Event=Event, device=lambda device: contextlib.nullcontext(), synchronize=lambda device: waited.append(1)
        ),
        get_device_properties=lambda device: types.SimpleNamespace(L2_cache_size=1 << 20, uuid="0-1"),
        reset_peak_memory_stats=lambda device: None,
        **dict(memory_allocated=lambda device: 1000, max_memory_allocated=lambda device: 3_000_000 + 1000),
        get_device_name=lambda device: "stand-in",
    ).items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(CudaEvents, "COPIED", 1 << 16)
    monkeypatch.setattr(CudaEvents, "OVERWRITTEN", 1 << 16)
    small = {unit: (dtype, 16, precision) for unit, (dtype, _, precision) in timers.UNITS.items()}
    monkeypatch.setattr(timers, "UNITS", small)
    return waited


def test_events_are_around_the_call_and_not_around_what_empties_the_cache(gpu):
    events = CudaEvents(CPU)
    assert events.other.nbytes == 2 << 20  # larger than the L2
    order = []
    events.other = types.SimpleNamespace(zero_=lambda: order.append("cold") or time.sleep(0.02))
    events.write = 0.02
    found = events.seconds(lambda: order.append("call") or time.sleep(0.002), 4)
    assert order == ["call"] + ["cold", "cold", "call"] * 4  # the first one says how long the host takes
    assert 0.002 <= found < 0.02
    assert len(gpu) == 2  # before the first and after the last call, not between them
    order.clear()
    assert 0.002 <= events.looped(lambda: order.append("call") or time.sleep(0.002), 0.001) < 0.02
    assert set(order) == {"call"}
    assert len(order) >= 3
    assert events.looped(lambda: order.append("call"), 0.1) is None


def test_a_launch_takes_no_part_in_the_time(gpu):
    """The buffer is written until the host has queued the call, however long that takes it; up to a limit."""
    events, order = CudaEvents(CPU), []
    events.other, events.write = types.SimpleNamespace(zero_=lambda: order.append("cold")), 1e-3
    assert 0.004 <= events.host(lambda: time.sleep(0.004), 3) < 0.05
    events.seconds(lambda: time.sleep(0.004), 1)
    assert 7 <= len(order) < events.MOST_WRITES
    order.clear()
    events.write = 1e-9
    events.seconds(lambda: time.sleep(0.001), 1)
    assert len(order) == events.MOST_WRITES
    assert WallClock(CPU).host(lambda: None) is None


def test_the_time_is_the_median_call(gpu, monkeypatch):
    events = CudaEvents(CPU)
    monkeypatch.setattr(events, "_events", lambda *_: [9.0, 1.0, 2.0])
    assert events.seconds(lambda: None, 3) == 2
    assert events.bandwidth(1) == 2 * (1 << 16) / 2
    assert events.operations(1, "float32") == 2 * 16**3 / 2


def test_calls_shorter_than_the_tick_of_events_take_one(gpu, monkeypatch):
    monkeypatch.setattr(Event, "elapsed_time", lambda *_: 0.0)
    assert CudaEvents(CPU).seconds(lambda: None, 3) == 5e-7


@pytest.mark.parametrize("unit", ["float32", "tf32", "bfloat16", "float16"])
def test_matrix_products_have_the_precision_of_their_unit(gpu, unit, monkeypatch):
    events, seen = CudaEvents(CPU), []
    product = torch.mm

    def mm(a, b, out=None):
        seen.append((a.dtype, torch.get_float32_matmul_precision()))
        return product(a, b) if out is None else product(a, b, out=out)

    monkeypatch.setattr(torch, "mm", mm)
    before = torch.get_float32_matmul_precision()
    assert events.operations(1, unit) > 0
    assert torch.get_float32_matmul_precision() == before
    dtype = torch.float32 if unit == "tf32" else getattr(torch, unit)
    assert set(seen) == {(dtype, "high" if unit == "tf32" else "highest")}
    assert set(timers.UNITS) == {"float32", "tf32", "bfloat16", "float16"}


def test_both_timers_measure_the_same_work(gpu):
    calls = {"flowkernels cpu": wait(0.001), "torch eager": wait(0.002), "torch red": lambda: torch.full((1,), 9.0)}
    work = Work(calls, lambda got: (got.item(), 0.5), moved=8, flops=8, unit="bfloat16")
    found = table(work, CudaEvents(CPU))
    mine = found["flowkernels cpu"]
    assert mine["gate"] == "ok"
    assert 1000 <= mine["p20_us"] <= mine["p50_us"] <= mine["p80_us"]
    assert mine["host_us"] >= 1000
    assert mine["began_s"] >= 0.001
    assert mine["looped_us"] == "" or mine["looped_us"] >= 1000  # none on a machine so busy that a call takes 2 ms
    assert mine["ratio"] > 0
    assert mine["stream_percent"] > 0
    assert mine["fma_percent"] > 0
    assert mine["extra_mb"] == pytest.approx(3 - 4e-6)
    assert found["torch red"]["gate"] == "RED"
    assert found["torch red"]["p50_us"] == found["torch red"]["looped_us"] == found["torch red"]["host_us"] == ""
    assert set(table(work, WallClock(CPU))) == set(found)


@pytest.fixture
def bench_on_the_stand_in(gpu, monkeypatch):
    """`flowkernels bench` takes the CPU for a GPU."""
    monkeypatch.setattr(command, "timer", CudaEvents)
    monkeypatch.setattr(environment, "is_gpu", lambda device: True)


def test_command_on_a_gpu(bench_on_the_stand_in, tmp_path, capsys):
    assert main.main(["bench", "bellman", "--match", "K=16", "--seconds", "0.001", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "% copy" in out
    assert all(f" {column} " in out for column in ("device us", "host us", "in a loop", "began in s"))
    table = out[out.index("x eager") :].splitlines()
    assert table[1].startswith("bellman: K=16, N=1..8 ")
    assert table[1].endswith("ok")
    assert re.fullmatch(
        r"copy \S+ GB/s \| torch.matmul float32 \S+, tf32 \S+, bfloat16 \S+, float16 \S+ TFLOP/s", table[2]
    )
    assert table[3].startswith("stand-in")
    with open(tmp_path / "bellman.csv", newline="") as f:
        row = next(csv.DictReader(f))
    assert row["device"] == "stand-in"
    assert row["looped_us"] == "" or float(row["looped_us"]) > 0
    assert float(row["host_us"]) > 0


def test_main_cases_come_first(bench_on_the_stand_in):
    entries = "bellman", "euler_step", "stages"
    chosen = {entry: suite.cases(entry, CPU) for entry in entries}
    order = command._in_order(chosen, True)
    kinds = [(case.main, case.quick) for _, case in order]
    assert kinds == sorted(kinds, key=lambda k: (not k[0], not k[1]))
    assert [entry for entry, case in order if case.main] == ["bellman", "euler_step", "euler_step", "stages"]
    assert len({entry for entry, _ in order[-4:]}) > 1  # of each entry one after the other
    assert [case for _, case in command._in_order(chosen, False)] == [case for of in chosen.values() for case in of]


@pytest.mark.parametrize("op", OPS)
def test_main_cases_are_those_of_the_model(op):
    """What a GPU gets first has a floor and a model in docs/gpu.md, and these have a measurement."""
    cases = suite.cases(op, torch.device("cuda"))
    main_cases, modelled = (
        {case.name for case in cases if case.main},
        {floor.case for floor in rules.floors()[op]},
    )
    assert main_cases
    assert main_cases <= modelled <= {case.name for case in cases}


def test_a_run_is_resumed(bench_on_the_stand_in, monkeypatch, tmp_path, capsys):
    """Cases that are there are kept; those of another commit, or that another run did not reach, are measured."""
    cases = [
        dataclasses.replace(case, main=i == 1, quick=False) for i, case in enumerate(suite.cases("bellman", CPU)[:3])
    ]
    monkeypatch.setattr(suite, "cases", lambda entry, device: cases)
    arguments = ["bench", "bellman", "--seconds", "0.001", "--out", str(tmp_path), "--resume"]
    now = iter([0, 0, 1e6, 1e6])
    monkeypatch.setattr(command, "time", types.SimpleNamespace(monotonic=lambda: next(now)))
    assert main.main(arguments) == 0
    assert "left out, 9 minutes being over (--minutes): bellman: K=16, N=1..8; " in capsys.readouterr().out
    first = tables.read_csv(tmp_path / "bellman.csv")
    assert {row["case"] for row in first} == {cases[1].name}
    monkeypatch.undo()
    monkeypatch.setattr(suite, "cases", lambda entry, device: cases)
    assert main.main([*arguments, "--device", "cpu"]) == 0  # of another device: measured again
    out = capsys.readouterr().out
    assert all(f"\nbellman: {case.name} (" in out for case in cases)
    second = tables.read_csv(tmp_path / "bellman.csv")
    assert main.main(arguments) == 0
    assert "\nbellman: K" not in capsys.readouterr().out
    assert tables.read_csv(tmp_path / "bellman.csv") == second
    with pytest.raises(ValueError, match="--resume: expected --out"):
        command.main(["bellman", "--resume"])


def test_rows_of_other_processors_stay(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(environment, "processor", lambda isa: "this one")
    arguments = ["bench", "bellman", "--quick", "--seconds", "0.001", "--threads", "1", "--out", str(tmp_path)]
    assert main.main(arguments) == 0
    path = tmp_path / "bellman.csv"
    first = tables.read_csv(path)
    assert {row["processor"] for row in first} == {"this one"}
    others = [row | {"processor": name} for name in ("another", "") for row in first]  # "": of an older version
    tables.write_csv(path, others + first)
    before = tables.read_csv(path)
    for more in ([], ["--resume"]):
        assert main.main([*arguments, *more]) == 0
        after = tables.read_csv(path)
        assert after[: len(others)] == before[: len(others)]
        assert [(row["case"], row["processor"]) for row in after[len(others) :]] == [
            (row["case"], "this one") for row in first
        ]
        assert f"{len(first)} rows, beside {len(others)} of other processors" in capsys.readouterr().out
    with open(path, "w") as f:
        f.write("entry,colour\nbellman,red\n")
    assert main.main(arguments) == 2
    assert f"--out: expected {path} with columns of this version, got colour" in capsys.readouterr().err
    assert path.read_text() == "entry,colour\nbellman,red\n"


@pytest.mark.parametrize(
    ("cpuinfo", "isa", "kind"),
    [
        ({"vendor_id": "AuthenticAMD", "cpu family": "25", "model": "1"}, "avx2", "AMD Zen 3 (avx2)"),
        ({"vendor_id": "AuthenticAMD", "cpu family": "25", "model": "33"}, "avx2", "AMD Zen 3 (avx2)"),
        ({"vendor_id": "AuthenticAMD", "cpu family": "25", "model": "17"}, "avx512", "AMD Zen 4 (avx512)"),
        ({"vendor_id": "AuthenticAMD", "cpu family": "25", "model": "160"}, "avx512", "AMD Zen 4 (avx512)"),
        ({"vendor_id": "AuthenticAMD", "cpu family": "26", "model": "2"}, "avx2", "AMD Zen 5 (avx2)"),
        (
            {"vendor_id": "AuthenticAMD", "cpu family": "99", "model": "2"},
            None,
            "AMD family 99 model 2 (no compiled module)",
        ),
        ({"vendor_id": "GenuineIntel", "cpu family": "6", "model": "143"}, "amx", "Intel Sapphire Rapids (amx)"),
        ({"vendor_id": "GenuineIntel", "cpu family": "6", "model": "144"}, "avx2", "Intel family 6 model 144 (avx2)"),
        ({"CPU implementer": "0x41", "CPU part": "0xd40"}, "baseline", "arm implementer 0x41 part 0xd40 (baseline)"),
        ({"model name": "A kind"}, "baseline", "A kind (baseline)"),
    ],
)
def test_processors_have_names(cpuinfo, isa, kind, monkeypatch):
    monkeypatch.setattr(environment, "_cpuinfo", lambda: cpuinfo)
    monkeypatch.setattr(environment.platform, "machine", lambda: "arm")
    assert environment.processor(isa) == kind


def test_what_there_is_no_time_for_is_named(bench_on_the_stand_in, capsys):
    assert main.main(["bench", "bellman", "--minutes", "1e-9"]) == 0
    out = capsys.readouterr().out
    left = next(line for line in out.splitlines() if line.startswith("left out, 1e-09 minutes being over"))
    assert all(f"bellman: {case.name}" in left for case in suite.cases("bellman", CPU))


def test_time_is_shared_out_by_cases(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(harness.time, "monotonic", lambda: now[0])
    shares = Shares(1, {"a": 1, "b": 2, "c": 3})
    shares.begin("a")
    assert shares.entry_end == 10
    now[0] = 30
    assert shares.spent()
    shares.begin("b")  # of what is left, although "a" took too long
    assert shares.entry_end == 30 + 30 * 2 / 5
    now[0] = 32
    assert not shares.spent()
    shares.begin("c")  # and all of the rest
    assert shares.entry_end == 60


def test_what_nvidia_smi_says(gpu, monkeypatch):
    asked = []
    answer = "580.1, 1200 MHz, 1980 MHz, 2619 MHz, 700.00 W\n"
    monkeypatch.setattr(environment.subprocess, "check_output", lambda c, **_: asked.append(c) or answer)
    found = environment._of_the_gpu(torch.device("cuda", 1))
    assert found["driver"] == "580.1"
    assert found["clocks"] == "SM 1200 MHz of 1980 MHz, memory 2619 MHz, power limit 700.00 W"
    assert "--id=GPU-0-1" in asked[0]

    def missing(*args, **kwargs):
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(environment.subprocess, "check_output", missing)
    assert environment._of_the_gpu(torch.device("cuda", 1)) == {**found, "driver": "", "clocks": ""}
