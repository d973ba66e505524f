"""The benchmark of samples: its distances, what it counts and writes, and the page that is made of it."""

import csv
import math

import pytest
import quality_report
import torch
from _flows import normal

import flowkernels as fk
from flowkernels.bench import suite
from flowkernels.cli import main
from flowkernels.evaluation.distances import Energy

data_sets, fits, quality_rows, quality = (
    suite.module(f"quality.{name}") for name in ("data", "gradient_fits", "rows", "command")
)
KNOWN = "uniform,shifted,cosine,boss,ab2,ab3,boss_ab2,boss_ab3,heun"
STOCK = [f"{name}{shift}" for shift in ("", "_shift3") for name in ("dpmpp_2m", "unipc_3", "deis_2", "flow_heun")]
STOCK += [f"{name}{shift}" for shift in ("", "_shift3") for name in ("dpmpp_3m", "unipc_2", "deis_3")]
OURS = (
    ",ld3,bespoke,"
    + ",".join([*STOCK, *quality_report.ONE_CALL])
    + ",gits,oss,norm,endpoint,free,pairs,fitted,fitted3,polished,straightened"
)


# ---- the data ----


def test_policy_against_monte_carlo():
    """E[x_1 - x_0 | x_t = x] of an observation's chunks, each sample weighed by the density of the x_0 that leads to x.

    Chunks have 112 coordinates, so that few samples would weigh anything late: an early time.
    """
    net = data_sets.load("policy", pytest.fail).network
    g, t = data_sets.generator(3), 0.1
    observation = net.observe(1, g)["observation"]
    x1 = net.sample(observation.expand(20_000, -1), g).flatten(1).double()
    x = normal(2, *net.sample(observation, g).shape[1:], dtype=torch.float64)
    found = net.double()(x, torch.full((2,), t), observation.expand(2, -1)).flatten(1)
    for point, v in zip(x.flatten(1), found, strict=True):
        x0 = (point - t * x1) / (1 - t)
        weights = (-x0.square().sum(1) / 2).softmax(0)
        expected = weights @ (x1 - x0)
        spread = ((weights**2) @ (x1 - x0 - expected).square()).sqrt()
        assert ((v - expected).abs() < 5 * spread).all()
        assert spread.max() < 0.2


def test_conditioning_is_of_its_samples():
    """Each sample's row goes to it, of the seed and use; the first few of a set keep theirs."""
    data = data_sets.load("policy", pytest.fail)
    x, t = normal(6, *data.shape), torch.full((6,), 0.5)
    rows = data.observe(6, data_sets.generator(10**6 + 7))["observation"]
    v = data.given(data.velocity, 6, 7)(x, t)
    assert torch.equal(v, data.velocity(x, t, rows))
    few = data.given(data.velocity, 6, 7).rows(slice(2), 6)
    assert torch.allclose(few(x[:2], t[:2]), v[:2], atol=1e-5)
    assert not torch.allclose(data.given(data.velocity, 6, 8)(x, t), v, atol=1e-2)
    other = data_sets.load("mixture2", pytest.fail)
    assert other.given(other.velocity, 6, 7) is other.velocity


def test_scales_are_heavy_tailed():
    """Of Student's t with two degrees of freedom: fourth moments far above a normal's, and most samples in the bulk."""
    data = data_sets.load("scales", pytest.fail)
    of_each = data.network.stds.log10()
    assert of_each.max() - of_each.min() > 2.5
    x = data.network.sample(20_000, data_sets.generator(4))
    off = x - x.median(0).values
    assert (off.pow(4).mean(0) / off.square().mean(0) ** 2).median() > 10


# ---- the rows ----


def test_schedules_in_use_elsewhere():
    data = data_sets.load("mixture2", pytest.fail)
    run = quality_rows.Run(data, data_sets.SIZES["mixture2"], 0, quality_rows.Counted(data.velocity), None)
    shifted, cosine = (quality_rows.ROWS[name].make(run) for name in ("shifted", "cosine"))
    sigma = 1 - torch.linspace(0, 1, 5, dtype=torch.float64)
    assert torch.allclose(1 - shifted[4].times, 3 * sigma / (1 + 2 * sigma))
    angle = torch.linspace(0, 1, 5, dtype=torch.float64) * math.pi / 2
    t = cosine[4].times
    # the signal-to-noise ratio of cosine schedules, tan^2
    assert torch.allclose((t / (1 - t))[:-1], angle.tan()[:-1])
    assert t[0] == 0
    assert t[-1] == 1


def test_velocities_in_batches_of_one_size():
    sizes = []

    def velocity(x, t):
        sizes.append(len(x))
        return x * t[:, None]

    x, t = normal(10, 3), torch.linspace(0, 1, 10)
    batches = data_sets.InBatches(velocity, lambda x, t: x * 2, 4)
    assert torch.equal(batches(x, t), x * t[:, None])
    assert sizes == [4, 4, 4]
    assert torch.equal(batches(x.requires_grad_(), t), x * 2)


def test_a_red_gate_shows_no_figures(monkeypatch, capsys):
    monkeypatch.setattr(quality, "GATE", 0)
    assert main.main(["bench", "quality", "--quick", "--threads", "1", "--rows", "uniform"]) == 1
    out = capsys.readouterr().out
    assert "gate: RED, no figures: float32 teacher to float64" in out
    assert "\n  uniform" not in out


def test_the_gate_knows_a_wrong_solver(monkeypatch):
    data = data_sets.load("mixture2", pytest.fail)
    assert all(off <= quality.GATE for _, off in quality.gate(data, 20))
    right = fk.Solver.adams_bashforth

    def wrong(schedule, order):
        solver = right(schedule, order)
        b = solver.coefficients.clone()
        b[-1, 0] += 0.01
        return fk.Solver(solver.times, solver.model_times, b, solver.name)

    def sums(velocity, noise, solver):  # of the right coefficients
        return original(velocity, noise, right(solver.steps, 3) if "adams" in solver.name else solver)

    original = quality.summed
    monkeypatch.setattr(quality, "summed", sums)
    monkeypatch.setattr(fk.Solver, "adams_bashforth", wrong)
    red = [what for what, off in quality.gate(data, 20) if not off <= quality.GATE]
    assert red == ["adams-bashforth 3 to its sums in float64"]


def pairs(n=64):
    data = data_sets.load("mixture2", pytest.fail)
    noise = torch.randn(n, 2, generator=data_sets.generator(5))
    return fits.Pairs(lambda index: data.velocity, noise, fk.sample(data.velocity, noise, 40)), data.velocity


@pytest.mark.parametrize("order", [1, 2])
def test_learned_times_begin_as_uniform_ones(order):
    plan, (known, velocity) = fits.Times(4, order), pairs()
    solver = fk.Solver.adams_bashforth(4, order)
    for found, table in zip(plan.tables(), (solver.model_times, torch.ones(4), solver.coefficients), strict=True):
        assert torch.allclose(found.detach(), table.double(), atol=1e-14)
    with torch.no_grad():
        plan.sizes += torch.tensor([0.3, -0.2, 0.5, 0.0])
        plan.moved += torch.tensor([9.0, 9.0, 0.01, -9.0])
    h = torch.tensor([0.3, -0.2, 0.5, 0.0], dtype=torch.float64).softmax(0)
    knots = torch.cat([torch.zeros(1), h.cumsum(0)])
    given, _, b = (table.detach() for table in plan.tables())
    assert torch.allclose(b, fk.Solver.adams_bashforth([*knots[:-1].tolist(), 1.0], order).coefficients)
    away = torch.stack([h.min() * 0, h.min() / 2, torch.tensor(0.01, dtype=h.dtype), -h.min() / 2])
    assert torch.allclose(given, knots[:-1] + away)
    x = fits.run(velocity, known.noise, *(table.detach() for table in plan.tables()))
    assert torch.allclose(x, fk.sample(velocity, known.noise, plan.solver("mine")), atol=1e-5)


@pytest.mark.parametrize("method", ["ld3", "bespoke"])
def test_gradient_fits_get_nearer(method):
    """Than what they begin from, on the samples that choose; the same again from the same seed."""
    known, velocity = pairs(128)
    how = fits.Descent(40, 32)
    first, again = (getattr(fits, method)(known, 3, how, data_sets.generator(0)) for _ in range(2))
    assert first.to_dict() == again.to_dict()
    index = known.chosen_by

    def error(solver):
        off = fk.sample(velocity, known.noise[index], solver) - known.ends[index]
        return off.square().sum(1).mean()

    begun = min(error(fk.Solver.adams_bashforth(3, order)) for order in (1, 2))
    assert error(first) < (0.8 if method == "ld3" else 0.6) * begun
    assert first.keeps_start == (method == "ld3")


def test_noise_near_a_sample():
    """Within the radius, moved where the error falls and nowhere else."""
    known, _ = pairs()
    near, plan, index = fits.Near(known, 2), fits.Times(2, 1), known.fitted
    noise = near.noise[index].clone().requires_grad_()
    errors = known.errors(plan, index, noise)
    errors.mean().backward()
    near.move(plan, index, errors.detach(), noise)
    away = (near.noise - known.noise).norm(dim=1)
    assert near.radius == 0.001 * 2 / 4
    assert not away[known.chosen_by].any()
    assert away.max() <= near.radius * (1 + 1e-3)
    moved = away[index] > 0
    assert moved.float().mean() > 0.5
    after = known.errors(plan, index, near.noise[index])
    assert (after[moved] < errors[moved]).all()
    assert torch.equal(after[~moved], errors[~moved].detach())


@pytest.mark.parametrize("name", ["mixture64", "scales", "policy", "digits"])
def test_gate_of_each_data_set(name):
    assert quality.is_green(data_sets.load(name, lambda text: None), 20)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A folder with the results of a quick run."""
    folder = tmp_path_factory.mktemp("quality")
    options = ["--quick", "--threads", "1", "--seeds", "2", "--rows", KNOWN + OURS, "--out", str(folder)]
    assert main.main(["bench", "quality", *options]) == 0
    return folder


def rows_of(folder):
    with open(folder / "quality.csv", newline="") as f:
        return {(r["data"], r["seed"], r["row"], r["N"]): r for r in csv.DictReader(f)}


def test_what_is_written(measured):
    found = rows_of(measured)
    steps = ("1", "2", "4")
    assert {*(KNOWN + OURS).split(",")} == {*quality_rows.ROWS}
    odd = ("heun", "flow_heun", "flow_heun_shift3")
    expected = {(name, N) for name in quality_rows.ROWS for N in steps if name not in (*odd, "straightened")}
    expected |= {(name, "1") for name in odd}
    expected |= {("heun", "3"), ("straightened", "2"), ("teacher", "20")}
    assert set(found) == {("mixture2", seed, *key) for seed in "01" for key in expected}
    for (_, _, name, N), r in found.items():
        assert tuple(r) == quality.FIELDS
        assert r["evaluations"] == N
        assert float(r["rms"]) ** 2 == pytest.approx(float(r["endpoint_error"]), rel=1e-4)
        assert r["gate"] == "ok"
        assert r["metric"] == "energy distance"
        assert r["settings"] == "closed form, float32; K 20, calibration 64, held out 128, data 4096"
        assert all(r[k] for k in ("hardware", "versions", "threads", "date", "teacher_distance_to_data"))
        if name != "teacher":
            # K of the calibration; straightening has 32 trajectories, a trial and 8 iterations of 16, there and back
            known = {"straightened": 20 + (32 * 20 + 3 * (1 + 8) * 16) / 64}
            known |= dict.fromkeys(("boss", "boss_ab2", "boss_ab3", "gits", "norm", "pairs"), 20)
            known |= dict.fromkeys(("uniform", "shifted", "cosine", "ab2", "ab3", "heun", *STOCK), 0)
            # a rollout; for each N twice 5 iterations of 16, there and back, and 6 looks at 16; LD3's noise once more
            known["bespoke"] = 20 + 7 * 2 * (5 * 16 * 3 + 6 * 16) / 64
            known["ld3"] = 20 + (1 + 2 * 6) * (5 * 16 * 4 + 6 * 16) / 64
            parts = [float(part) for part in r["parts"].split()]
            assert sum(parts) / 16 == pytest.approx(float(r["endpoint_error"]), rel=1e-4)
            cost = float(r["calibration_evaluations"])
            assert cost == known.get(name, cost)
            assert cost > 20 or name in known
            assert name != "fitted" or cost <= 20 + 2 * (1 + 2 + 4)


def test_figures_are_those_of_the_samples(measured):
    data = data_sets.load("mixture2", pytest.fail)
    noise = torch.randn(128, 2, generator=torch.Generator().manual_seed(1001))  # seed 1, held out
    teacher = fk.sample(data.velocity, noise, 20)
    x = fk.sample(data.velocity, noise, fk.Solver.adams_bashforth(4, 2))
    row = rows_of(measured)["mixture2", "1", "ab2", "4"]
    assert float(row["endpoint_error"]) == pytest.approx((x - teacher).square().sum(1).mean().item(), rel=1e-4)
    energy = Energy()
    to_teacher = energy.between(energy.describe(x), energy.describe(teacher))
    assert float(row["distance_to_teacher"]) == pytest.approx(to_teacher, rel=1e-4)
    to_data = energy.between(energy.describe(x), energy.describe(data.real))
    assert float(row["distance_to_data"]) == pytest.approx(to_data, rel=1e-4)


def test_what_is_there_is_not_computed_again(measured, tmp_path, capsys, monkeypatch):
    text = (measured / "quality.csv").read_text()
    short = [line for line in text.splitlines() if not line.startswith("mixture2,1,ab2,4,")]
    (tmp_path / "quality.csv").write_text("\n".join(short) + "\n")
    made = []
    for name in ("uniform", "ab2"):
        old = quality_rows.ROWS[name]
        make = lambda run, old=old, name=name: made.append((name, run.seed)) or old.make(run)  # noqa: E731
        new = quality_rows.Row(old.title, make, calibrated=old.calibrated)
        monkeypatch.setitem(quality_rows.ROWS, name, new)
    options = ["--quick", "--threads", "1", "--seeds", "2", "--rows", "uniform,ab2", "--out", str(tmp_path)]
    assert main.main(["bench", "quality", *options]) == 0
    assert made == [("ab2", 1)]
    assert "mixture2, seed 0: all there" in capsys.readouterr().out
    again = rows_of(tmp_path)
    assert again.keys() == rows_of(measured).keys()
    for key in ("endpoint_error", "distance_to_data"):
        assert again["mixture2", "1", "ab2", "4"][key] == rows_of(measured)["mixture2", "1", "ab2", "4"][key]
    assert [p.name for p in tmp_path.iterdir()] == ["quality.csv"]
    # other settings are other figures
    changed = (tmp_path / "quality.csv").read_text().replace("held out 128", "held out 64")
    (tmp_path / "quality.csv").write_text(changed)
    assert main.main(["bench", "quality", *options, "--seeds", "1"]) == 0
    assert made[1:] == [("uniform", 0), ("ab2", 0)]


def test_a_row_that_fails_does_not_stop_the_others(monkeypatch, capsys):
    def fails(run):
        raise RuntimeError("no solver")

    monkeypatch.setitem(quality_rows.ROWS, "ab2", quality_rows.Row("", fails))
    assert main.main(["bench", "quality", "--quick", "--threads", "1", "--rows", "ab2,ab3"]) == 1
    out = capsys.readouterr().out
    assert "mixture2, seed 0: ab2 failed" in out
    assert "RuntimeError: no solver" in out
    assert "\n  ab3 " in out


def test_missing_data_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("FASHION_MNIST_DIR", str(tmp_path))
    said = []
    assert data_sets._there(lambda: data_sets.fashion("t10k")[0], said.append) is None
    assert "no distances to data: " in said[0]
    assert str(tmp_path) in said[0]


def test_list(capsys):
    assert main.main(["bench", "quality", "--list", "--data", "digits", "--rows", "boss,heun"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "quality: digits: boss (BOSS's schedule, Euler)",
        "quality: digits: heun (uniform, Heun)",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["quality", "--data", "digits,letters"],
            "--data: expected some of mixture2, mixture64, scales, policy, digits, fashion, got",
        ),
        (["quality", "--rows", "euler"], "--rows: expected some of uniform, shifted, "),
        (["quality", "--seeds", "0"], "--seeds: expected an integer of at least 1, got '0'"),
        (["quality", "bellman"], "quality: expected no other ENTRY"),
        (["bellman", "--rows", "boss"], "--rows: expected the ENTRY quality or straightening, got bellman"),
    ],
)
def test_bad_input(options, message, capsys):
    assert main.main(["bench", *options]) == 2
    assert message in capsys.readouterr().err


# ---- the page ----


def test_report(measured, tmp_path):
    page = tmp_path / "quality.md"
    page.write_text("# Quality\n\nBy hand.\n\n<!-- below this line: scripts/quality_report.py -->\nold\n")
    quality_report.write(measured / "quality.csv", page)
    text = page.read_text()
    assert text.startswith("# Quality\n\nBy hand.\n\n<!-- below this line")
    assert "old" not in text
    assert (tmp_path / "quality/mixture2.png").stat().st_size > 10_000
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["mixture2.png", "quality", "quality.md"]
    rows = rows_of(measured)

    def mean(name, N, key="endpoint_error"):
        return sum(float(rows["mixture2", seed, name, N][key]) for seed in "01") / 2

    lost = {
        (quality_rows.ROWS[name].title, N)
        for _, _, name, N in rows
        if name != "teacher" and N in "124" and mean(name, N) > (1 + 1e-4) * mean("uniform", N)
    }
    assert {title for title, _ in lost} >= {"shifted by 3, Euler"}
    told = {
        (line.partition(", ")[2].partition(": ")[0], part.rpartition(" ")[2])
        for line in text[text.index("## Losses") : text.index("Rows published elsewhere")].splitlines()
        if line.startswith("- ")
        for part in line.partition(": ")[2].split(", ")
    }
    assert told == lost
    table = text[text.index("| row | N = 1") :].splitlines()
    cells = next(line for line in table if line.startswith("| uniform, Adams-Bashforth 2 ")).split(" | ")
    assert cells[3].startswith(f"{mean('ab2', '4', 'rms'):.3g} ± ") or cells[3].startswith("**")
    there = [
        name for name in quality_rows.ROWS if name not in ("straightened", "heun", "flow_heun", "flow_heun_shift3")
    ]
    best = min((mean(name, "4", "rms"), name) for name in there)
    winner = next(line for line in table if line.startswith(f"| {quality_rows.ROWS[best[1]].title} |"))
    assert f"| **{best[0]:.3g}** ± " in winner
    for N in "124":
        known = {name: mean(name, N) for name in there if quality_rows.ROWS[name].known}
        ours = min(mean(name, N) for name in there if name not in known)
        peer = min(known, key=known.get)
        assert (f"- mixture2, N = {N}: {quality_rows.ROWS[peer].title}; the best of ours" in text) == (
            known[peer] < ours
        )
    # one call against the best row, with the parts' bootstrap
    one = next(line for line in text.splitlines() if line.startswith("| mixture2 | 4 | "))
    by_error = {name: mean(name, "4") for name in there if name not in quality_report.ONE_CALL}
    other = min(by_error, key=by_error.get)
    _, _, _, ratio, interval, title, _ = (cell.strip() for cell in one.split("|")[:7])
    assert float(ratio) == pytest.approx((mean(quality_report.ONE_CALL[0], "4") / mean(other, "4")) ** 0.5, rel=0.01)
    assert float(interval.split(" to ")[0]) < float(ratio) < float(interval.split(" to ")[1])
    assert title == quality_rows.ROWS[other].title
    assert "| fashion, N = 8: Frechet distance, of the teacher's | <= 1.05 |  | not measured |" in text
