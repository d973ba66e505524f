"""The benchmark of training: BOSS's published procedure beside the library's, what is counted and written, the page."""

import csv
import dataclasses
import importlib.util
import math
import re
import time
from pathlib import Path

import numpy as np
import pytest
import straightening_report
import torch
from _flows import normal
from torch import nn

import flowkernels as fk
from flowkernels.bench import suite
from flowkernels.cli import main
from flowkernels.training.targets.table import TARGETS

published, clocks, rows, reached, command = (
    suite.module(f"straightening.{name}") for name in ("published", "clock", "rows", "reached", "command")
)
ROOT = Path(__file__).parents[1]
GRID, STEPS = 13, (1, 2)  # uniform steps miss its times


# ---- the published procedure ----


@pytest.fixture
def flow():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.SiLU(), nn.Linear(16, 3)).double()
    return fk.VelocityField(net, time_column=True)


def test_costs_and_paths_are_the_librarys(flow):
    noise = normal(150, 3, dtype=torch.float64)  # more than a chunk, and K more than a stack
    times = torch.linspace(0, 1, 61, dtype=torch.float64)
    costs = published.step_costs(flow, noise, times)
    cal = fk.calibrate(flow, noise, 60, [1, 2, 5, 60], progress=False)
    upper = np.triu_indices(61, 1)
    assert np.allclose(costs[upper], cal.cost.numpy()[upper], rtol=1e-9, atol=1e-15)
    for N in cal:
        assert published.shortest_path(costs, N) == list(cal[N].indices)


def test_examples_and_loss_are_the_librarys(flow, tmp_path):
    noise = normal(130, 3, dtype=torch.float64)
    path, times = [0, 3, 4, 12], torch.linspace(0, 1, 13, dtype=torch.float64)
    published.write_examples(flow, noise, times, path, tmp_path)
    assert sorted(p.name for p in tmp_path.rglob("*.npy")) == sorted(f"{n}.npy" for n in published.FILES * 2)
    z0, z1, t0, t1 = published.read_examples(tmp_path)
    states = fk.rollout(flow, noise, 12).x[path].detach()
    # of each chunk one interval after another
    order = [(k, i) for part in (range(128), range(128, 130)) for k in range(3) for i in part]
    k, i = map(torch.tensor, zip(*order, strict=True))
    assert torch.allclose(z0, states[k, i], rtol=0, atol=1e-12)
    assert torch.allclose(z1, states[k + 1, i], rtol=0, atol=1e-12)
    assert torch.allclose(t0.double(), times[path][k], rtol=0, atol=1e-7)
    assert torch.allclose(t1.double(), times[path][k + 1], rtol=0, atol=1e-7)

    student = fk.VelocityField(nn.Linear(4, 3).double(), time_column=True)
    places = torch.randperm(len(z0))[:32]
    drawn = z0[places], z1[places], times[path][k][places], times[path][k + 1][places]
    ours = fk.StraightenLoss(fk.Schedule(times[path]))(student, fk.BankBatch(states, k[places], i[places])).loss
    theirs = published.loss(student, *drawn)
    assert torch.allclose(ours, theirs, rtol=1e-12, atol=0)
    found = [torch.autograd.grad(value, list(student.parameters())) for value in (ours, theirs)]
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-14) for a, b in zip(*found, strict=True))


def test_the_loop_trains_and_averages():
    torch.manual_seed(0)
    x = torch.randn(64, 2)
    examples = x, x @ torch.tensor([[0.5, 1.0], [-1.0, 0.5]]), torch.zeros(64), torch.full((64,), 0.5)
    student = fk.VelocityField(nn.Linear(3, 2), time_column=True)
    first = published.loss(student, *examples).item()
    kept = [[p.detach().double().clone() for p in student.parameters()]]
    training = published.training(student, examples, batch=16, lr=0.05, warmup=10, seed=0)
    for _ in range(200):
        means = next(training)
        kept.append([p.detach().double().clone() for p in student.parameters()])
    # the first step of Adam is its rate, a tenth of lr there, wherever there is a gradient
    for before, after in zip(*kept[:2], strict=True):
        assert (after - before).abs().max().item() == pytest.approx(0.005, rel=1e-3)
    assert published.loss(student, *examples).item() < 0.01 * first
    # an average is the sum of all weights so far, each with what its own and the later decays leave of it
    decays = [min(0.999, (1 + n) / (10 + n)) for n in range(1, 201)]
    left = [math.prod(decays), *((1 - d) * math.prod(decays[n + 1 :]) for n, d in enumerate(decays))]
    for at, mean in enumerate(means):
        expected = sum(share * weights[at] for share, weights in zip(left, kept, strict=True))
        assert torch.allclose(mean.double(), expected, atol=1e-5)


def test_a_clock_that_stands_still():
    clock = clocks.Clock()
    with clock:
        time.sleep(0.02)
    stopped = clock.wall, clock.processor
    time.sleep(0.02)
    assert (clock.wall, clock.processor) == stopped
    with clock:
        assert clock.now()[0] >= stopped[0]
        time.sleep(0.01)
    assert clock.wall >= stopped[0] + 0.01 >= 0.03
    assert clock.processor < clock.wall
    both = clocks.Clock(1, 2)
    both.add(clock)
    assert (both.wall, both.processor) == (1 + clock.wall, 2 + clock.processor)


# ---- the time to an error ----


def a_row(row, rms, seconds, N=2, iterations=9, curve="", data="digits"):
    costs = dict(seconds=str(seconds), processor_seconds=str(2 * seconds), curve=curve)
    return dict(data=data, seed="0", row=row, N=str(N), iterations=str(iterations), rms=str(rms)) | costs


def test_reached():
    """The baseline's time ends where it has its last error for the first time; others have to be as near."""
    base = a_row("published", 0.5, 9, curve="3 3 6 0.7;6 6 12 0.4;9 9 18 0.5")
    found = [
        base,
        a_row("boss", 0.51, 0.1),
        a_row("fitted", 0.4, 2, iterations=0),
        a_row("solver", 0.5, 1.5),
        a_row("solver", 0.1, 1, N=4),
        a_row("solver", 0.1, 1, data="fashion"),
    ]
    got = list(reached.reached(found))
    assert [(r.row, r.iterations, r.theirs, r.ours) for r in got] == [
        ("solver", 9, (6, 12), (1.5, 3)),
        ("fitted", 0, (6, 12), (2, 4)),
    ]
    assert [got[0].share(), got[0].share(1)] == [0.25, 0.25]


# ---- what is measured ----


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A folder with the results of a quick run."""
    folder = tmp_path_factory.mktemp("straightening")
    assert main.main(["bench", "straightening", "--quick", "--threads", "1", "--out", str(folder)]) == 0
    return folder


def rows_of(folder):
    with open(folder / "straightening.csv", newline="") as f:
        return {(r["row"], int(r["N"]), int(r["iterations"])): r for r in csv.DictReader(f)}


def test_every_target_has_a_row():
    settings = (ROOT / "benchmarks/straightening/rows.py").read_text()
    assert {"boss", *re.findall(r'target="(\w+)"', settings)} == set(TARGETS)


def test_what_is_written(measured):
    found = rows_of(measured)
    expected = set()
    for name, row in rows.ROWS.items():
        if row.float32 or (row.needs and importlib.util.find_spec(row.needs) is None):  # digits are float32
            continue
        for N in STEPS:
            numbers = ((4, 8) if row.fewer and N == 2 else (8,)) if row.trained else (0,)
            expected |= {(name, N, i) for i in numbers if row.only is None or N in row.only}
    assert set(found) == expected
    before = 32 * GRID
    for (name, _, iterations), r in found.items():
        assert tuple(r) == command.FIELDS
        assert all(r[k] for k in command.FIELDS if k not in ("commit", "curve", "memory_mb", "seed")
                   and not k.startswith("iteration_"))  # fmt: skip
        assert r["gate"] == "ok"
        trained = rows.ROWS[name].trained
        assert bool(r["iteration_seconds"]) is trained
        assert float(r["processor_seconds"]) > 0
        # K of the calibration; 48 trajectories, a trial and the iterations of 16, there and back
        known = {"schedule": before, "published": before + 48 * GRID + 3 * 8 * 16}
        straight = (
            "boss",
            "boss_uniform",
            "reflow",
            "improved_reflow",
            "simple_reflow",
            "distill",
            "blockwise",
            "lora",
        )
        known |= dict.fromkeys((*straight, "blockwise"), before + 48 * GRID + 3 * (1 + iterations) * 16)
        assert int(r["evaluations"]) == known.get(name, int(r["evaluations"])), name
        assert int(r["evaluations"]) > before or name in known
        if name == "published":
            points = reached.curve(r)
            assert [p[0] for p in points] == [4, 8]
            assert points[-1][3] == pytest.approx(float(r["rms"]), rel=1e-4)
            assert 0 < points[0][1] < points[1][1] <= float(r["seconds"]) * (1 + 1e-5)


def test_figures_are_those_of_the_samples(measured):
    teacher = fk.models.bundled.BUNDLED["digits"].load()
    noise = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    cal = fk.calibrate(teacher, torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(0)), GRID, [2])
    ends = fk.sample(teacher, noise, GRID)
    error = (fk.sample(teacher, noise, cal[2]) - ends).square().flatten(1).sum(1).mean().sqrt().item()
    assert float(rows_of(measured)["schedule", 2, 0]["rms"]) == pytest.approx(error, rel=1e-4)
    solver = fk.fit_solver(teacher, cal, 2)
    error = (fk.sample(teacher, noise, solver) - ends).square().flatten(1).sum(1).mean().sqrt().item()
    assert float(rows_of(measured)["fitted", 2, 0]["rms"]) == pytest.approx(error, rel=1e-3)


def test_what_is_there_is_not_measured_again(measured, tmp_path, monkeypatch):
    lines = (measured / "straightening.csv").read_text().splitlines()
    short = [line for line in lines if not line.startswith("digits,0,boss,2,8,")]
    assert len(short) == len(lines) - 1
    (tmp_path / "straightening.csv").write_text("\n".join(short) + "\n")
    made = []
    for name in ("boss", "fitted"):
        old = rows.ROWS[name]
        make = lambda run, old=old, name=name: made.append((name, run.steps, run.iterations)) or old.make(run)  # noqa: E731
        monkeypatch.setitem(rows.ROWS, name, dataclasses.replace(old, make=make))
    options = ["--quick", "--threads", "1", "--rows", "boss,fitted", "--out", str(tmp_path)]
    assert main.main(["bench", "straightening", *options]) == 0
    assert made == [("boss", (2,), 8)]
    again, before = (rows_of(folder)["boss", 2, 8] for folder in (tmp_path, measured))
    assert again["rms"] == before["rms"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["straightening", "--data", "mixture2"], "--data: expected some of digits, fashion, got mixture2"),
        (["straightening", "--rows", "euler"], "--rows: expected some of schedule, fitted, "),
        (["straightening", "--steps", "2,x"], "--steps: expected numbers such as 2,4, got 2,x"),
        (["straightening", "--iterations", "0"], "--iterations: expected numbers"),
        (["straightening", "bellman"], "straightening: expected no other ENTRY"),
        (["quality", "--steps", "2"], "--steps: expected the ENTRY straightening, got quality"),
        (["bellman", "--rows", "boss"], "--rows: expected the ENTRY quality or straightening, got bellman"),
    ],
)
def test_bad_input(options, message, capsys):
    assert main.main(["bench", *options]) == 2
    assert message in capsys.readouterr().err


# ---- the page ----


def test_report(measured, tmp_path):
    page = tmp_path / "straightening.md"
    page.write_text("# Straightening\n\nBy hand.\n\n<!-- below this line: scripts/straightening_report.py -->\nold\n")
    straightening_report.write(measured / "straightening.csv", page)
    text, found = page.read_text(), rows_of(measured)
    assert text.startswith("# Straightening\n\nBy hand.\n\n<!-- below this line")
    assert "old" not in text
    table = text[text.index("Rms distance to the teacher's endpoint") :]
    for name in ("boss", "solver", "published"):
        line = next(line for line in table.splitlines() if line.startswith(f"| {rows.ROWS[name].title} |"))
        cells = [cell.strip().strip("*") for cell in line.strip("|").split("|")][1:]
        assert cells == [f"{float(found[name, N, 8]['rms']):.3g}" for N in STEPS]
    best = {name: float(found[name, 2, i]["rms"]) for name, N, i in found if N == 2 and i != 4}
    untrained = min(v for name, v in best.items() if not rows.ROWS[name].trained)
    lost = {name for name, value in best.items() if rows.ROWS[name].trained and value > untrained}
    told = re.search(r"^- digits, N = 2, rms .*?: (.*)$", text, re.MULTILINE)
    assert lost == ({part.split()[0] for part in told[1].split(", ")} if told else set())
    assert "| fashion, N = 4: rms, of `boss`'s with Euler | <= 0.6 |  | not measured |" in text


MEASURED = ("straightening.csv", "straighten_loop.csv")


@pytest.mark.skipif(
    not any((ROOT / "benchmarks/results" / name).exists() for name in MEASURED), reason="nothing is measured yet"
)
def test_the_page_is_that_of_the_results(tmp_path):
    page = tmp_path / "straightening.md"
    page.write_text((ROOT / "docs/straightening.md").read_text())
    straightening_report.write(ROOT / "benchmarks/results/straightening.csv", page)
    assert page.read_text() == (ROOT / "docs/straightening.md").read_text()
