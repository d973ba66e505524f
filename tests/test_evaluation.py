"""`evaluate_sampler`: every figure by a computation of its own, what may not change them, and what is refused."""

import csv
import functools
import itertools
import json
import sys
import types

import numpy as np
import pytest
import torch
from _flows import normal
from torch import nn

import flowkernels as fk
from flowkernels.cli.main import main
from flowkernels.evaluation.distances import Energy, Frechet
from flowkernels.evaluation.endpoint import endpoint_error, endpoint_errors
from flowkernels.evaluation.images import levels
from flowkernels.models.bundled import BUNDLED
from flowkernels.ops.samples import generator


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(5, 3), (4, 1, 3, 2)])
def test_squared_distances(shape, dtype):
    g = generator(0)
    x, teacher = (torch.randn(shape, generator=g).to(dtype) for _ in range(2))
    errors = endpoint_errors(x, teacher)
    assert errors.dtype == torch.float64
    differences = (x - teacher).double().reshape(len(x), -1)
    expected = [sum(d * d for d in row) for row in differences.tolist()]
    assert errors.tolist() == pytest.approx(expected, rel=1e-15 * x[0].numel())
    assert endpoint_error(x, teacher) == errors.mean().item()
    assert endpoint_error(x, x) == 0.0


def bent(x, t):
    """A curved flow, another at each sample."""
    s = t.to(x.dtype).view(-1, *[1] * (x.dim() - 1))
    return x.flip(1) * torch.cos(3 * s) - x * s


NOISE = normal(40, 3, dtype=torch.float64)
DATA = normal(30, 3, seed=1, dtype=torch.float64) + 0.5
ALL = ("endpoint", "straightness", "energy", "frechet", "rk45", "likelihood")
PLANS = {
    "uniform": fk.Schedule.uniform(3),
    "schedule": fk.Schedule([0, 0.1, 0.6, 1]),
    "adams-bashforth": fk.Solver.adams_bashforth(4, 2),
    "heun": fk.Solver.heun(3),
}


@functools.cache
def fine():
    return fk.sample(bent, NOISE, fk.Solver.heun(400))


def at(t, x):
    return torch.full((len(x),), t, dtype=torch.float64)


def states_of(plan, x):
    """States at the knots, step by step, with nothing of the library's loops."""
    solver = fk.Solver.of(plan)
    if plan is PLANS["heun"]:
        states, times = [x], solver.times.tolist()
        for k, (a, b) in enumerate(itertools.pairwise(times)):
            v = bent(x, at(a, x))
            w = bent(x + (b - a) * v, at(b, x)) if k + 2 < len(times) else v
            x = x + (b - a) * (v + w) / 2
            states.append(x)
        return states, times
    v, states = [], [x]
    for i, t in enumerate(solver.model_times.tolist()):
        v.append(bent(states[-1], at(t, x)))
        states.append(x + sum(b * u for b, u in zip(solver.coefficients[i].tolist(), v, strict=False)))
    return states, solver.times.tolist()


@pytest.mark.parametrize("name", PLANS)
def test_figures_of_a_plan(name):
    row, *_ = fk.evaluate_sampler(bent, PLANS[name], NOISE, data=DATA, columns=ALL[:4], points=5).rows
    states, times = states_of(PLANS[name], NOISE)
    assert row.rms == pytest.approx((states[-1] - fine()).square().sum(1).mean().sqrt().item(), abs=2e-3)
    assert row.rms_interval[0] < row.rms < row.rms_interval[1]
    each = []
    for (a, x), (b, y) in itertools.pairwise(zip(times, states, strict=True)):
        middles = [(i + 0.5) / 5 for i in range(5)]
        off = [((y - x) / (b - a) - bent((1 - u) * x + u * y, at(a + u * (b - a), NOISE))) for u in middles]
        each.append(torch.stack([o.square().sum(1) for o in off]).mean(0))
    assert row.intervals == pytest.approx([e.mean().item() for e in each], rel=1e-9)
    assert row.interval_errors == pytest.approx([e.std().item() / 40**0.5 for e in each], rel=1e-9)
    total = sum((b - a) * e for a, b, e in zip(times[:-1], times[1:], each, strict=True))
    assert row.straightness == pytest.approx(total.mean().item(), rel=1e-9)
    assert row.straightness_error == pytest.approx(total.std().item() / 40**0.5, rel=1e-9)
    energy, frechet = Energy(), Frechet()
    assert row.energy == pytest.approx(energy.between(energy.describe(states[-1]), energy.describe(DATA)), rel=1e-9)
    assert row.frechet == pytest.approx(frechet.between(frechet.describe(states[-1]), frechet.describe(DATA)))
    made = fk.Solver.of(PLANS[name]).evaluations
    assert (row.steps, row.evaluations, row.network_evaluations) == (len(times) - 1, made, made)


def test_a_straight_flow_has_no_error():
    """Of v = x_1 - x_0 along straight lines, here `x / (1 + t)`, one Euler step is exact."""
    found = fk.evaluate_sampler(lambda x, t: x / (1 + t)[:, None], [1, 4], NOISE, columns=("endpoint", "straightness"))
    for row in found.rows:
        assert row.straightness < 1e-28
        assert row.rms < 2e-5  # of Heun's 50 steps


def test_the_teacher_is_the_calibration_s_and_samples_are_those_of_sample():
    net = BUNDLED["digits"].load()
    cal = fk.calibrate(net, normal(16, 1, 8, 8), 12, (2, 3), teacher_solver="heun", effort="fit", progress=False)
    noise = normal(9, 1, 8, 8, seed=1)
    found = fk.evaluate_sampler(net, {"a": cal, "b": cal.schedules, "c": (net, 3)}, noise, keep_samples=True, chunk=4)
    assert [(row.name, row.steps) for row in found.rows] == [*(("a", n) for n in (2, 3)), ("b", 2), ("b", 3), ("c", 3)]
    plans = [cal.best(2), cal.best(3), cal[2], cal[3], 3]
    for row, plan in zip(found.rows, plans, strict=True):
        torch.testing.assert_close(row.samples, fk.sample(net, noise, plan), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.teacher_samples, fk.sample(net, noise, cal.teacher_solver), rtol=1e-5, atol=1e-5)
    given = fk.evaluate_sampler(net, cal, noise, teacher=found.teacher_samples)
    assert [row.rms for row in given.rows] == pytest.approx([row.rms for row in found.rows[:2]], rel=1e-4)
    fused = fk.evaluate_sampler(fk.fuse(net, 2), cal, noise, columns=("endpoint", "straightness"))
    for a, b in zip(fused.rows, found.rows, strict=False):
        assert (a.rms, a.straightness) == pytest.approx((b.rms, b.straightness), rel=1e-3)


def test_plans_that_begin_late():
    """From the states at their first time, the teacher's and dopri5's too."""
    options = dict(columns=("endpoint", "rk45"), tolerances=[1e-6])
    found = fk.evaluate_sampler(bent, fk.Schedule([0.4, 0.7, 1]), NOISE, keep_samples=True, **options)
    x = NOISE
    for t, h in ((0.4, 0.3), (0.7, 0.3)):
        x = x + h * bent(x, at(t, x))
    torch.testing.assert_close(found.rows[0].samples, x)
    torch.testing.assert_close(found.teacher_samples, found.rows[1].samples, rtol=0, atol=1e-3)
    assert found.rows[0].rms > 0.05


def figures(found):
    skipped = ("name", "samples")
    return [{k: v for k, v in row.to_dict().items() if k not in skipped} for row in found.rows]


def same(a, b, rel):
    assert [f.keys() for f in a] == [f.keys() for f in b]
    for x, y in zip(a, b, strict=True):
        for key in x:
            assert x[key] == pytest.approx(y[key], rel=rel, abs=1e-12), key


def test_what_changes_nothing():
    """The order of samples, the size of chunks, the caller's autocast, gradients and default dtype."""
    plans, options = [2, PLANS["heun"]], dict(data=DATA, columns=ALL[:5], tolerances=[1e-2, 1e-4])
    known = figures(fk.evaluate_sampler(bent, plans, NOISE, **options))
    same(figures(fk.evaluate_sampler(bent, plans, NOISE, chunk=7, **options)), known, 1e-12)
    order = torch.randperm(40, generator=generator(1))
    turned = figures(fk.evaluate_sampler(bent, plans, NOISE[order], **options))
    for row in [*turned, *known]:
        row.pop("rms_interval")  # of resamples that are drawn by place
    same(turned, known, 1e-9)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
            again = figures(fk.evaluate_sampler(bent, plans, NOISE, **options))
    finally:
        torch.set_default_dtype(before)
    for row in again:
        row.pop("rms_interval")
    same(again, known, 1e-12)


def test_of_an_adaptive_method():
    """By torchdiffeq itself, with calls counted."""
    from torchdiffeq import odeint

    steps = [1e-2, 1e-3, 1e-5]
    found = fk.evaluate_sampler(bent, [2, 6, 200], NOISE, columns=("endpoint", "rk45"), tolerances=steps)
    rows = found.rows[3:]
    counts = []
    for tolerance, row in zip(steps, rows, strict=True):
        calls = []

        def counted(t, x, calls=calls):
            calls.append(t)
            return bent(x, t.expand(len(x)))

        x = odeint(counted, NOISE, torch.tensor([0.0, 1.0], dtype=torch.float64), rtol=tolerance, atol=tolerance)[-1]
        assert (row.name, row.steps, row.evaluations) == (f"dopri5 {tolerance:g}", None, len(calls))
        assert row.rms == pytest.approx((x - fine()).square().sum(1).mean().sqrt().item(), abs=2e-3)
        counts.append(len(calls))
    assert [row.rms for row in rows] == sorted((row.rms for row in rows), reverse=True)
    for row in found.rows[:3]:
        near = [n for n, a in zip(counts, rows, strict=True) if a.rms <= row.rms]
        assert row.rk45_evaluations == (min(near) if near else None)
    assert found.rows[0].rk45_evaluations == counts[0]


def test_distances_of_one_s_own_and_guidance():
    field = fk.VelocityField(bent_given, conditioning={"y": 1.0}, unconditional={"y": 0.0}, guidance=2.0, packed=False)
    l1 = lambda x, y: (x - y).abs().sum(1)[:, None, None]  # noqa: E731, [n, 1, 1], as LPIPS's
    (row,) = fk.evaluate_sampler(field, 3, NOISE, columns=["endpoint"], distances={"l1": l1}, keep_samples=True).rows
    each = (row.samples - fk.sample(field, NOISE, fk.Solver.heun(50))).abs().sum(1)
    assert row.paired["l1"] == pytest.approx((each.mean().item(), each.std().item() / 40**0.5), rel=1e-2)
    assert (row.evaluations, row.network_evaluations) == (3, 6)


def bent_given(x, t, y):
    return y * bent(x, t)


@pytest.mark.parametrize("n", [1, 2])
def test_few_samples(n):
    found = fk.evaluate_sampler(bent, 2, NOISE[:n], data=DATA)
    (row,) = found.rows
    errors = (row.rms_interval, row.straightness_error, row.energy_error, row.interval_errors)
    assert [e is None for e in errors] == [n == 1] * 4
    assert row.energy > 0
    assert "+-" in found.report() or n == 1


def test_samples_that_are_not_finite_are_named():
    def broken(x, t):
        return torch.where((t > 0.4)[:, None] & (torch.arange(len(x)) == 5)[:, None], torch.nan, bent(x, t))

    found = fk.evaluate_sampler(bent, {"good": 2, "bad": (broken, 4)}, NOISE, columns=ALL[:4], data=DATA)
    good, bad = found.rows
    assert good.failed is None
    assert bad.failed == "velocity: expected finite velocities, got NaN or Inf in sample 5 at step 2 (t = 0.5)"
    assert bad.rms is bad.energy is None
    assert f"failed: {bad.failed}" in found.report()
    with pytest.raises(ValueError, match="sample 5"):
        fk.evaluate_sampler(broken, 4, NOISE, chunk=40)
    between = lambda x, t: torch.where((t == 0.25)[:, None], torch.nan, bent(x, t))  # noqa: E731
    (row,) = fk.evaluate_sampler(between, 2, NOISE, columns=["straightness"], points=1).rows
    assert "NaN or Inf in sample 0 at t = 0.25, on the chord of step 0" in row.failed


@pytest.mark.parametrize("data", [None, DATA])
def test_features_and_distances_may_write_into_samples(data):
    def figures(features, distance):
        settings = dict(columns=ALL[:4], features=features, distances={"off": distance}, keep_samples=True)
        teacher, given = fk.sample(bent, NOISE, 50), None if data is None else data.clone()
        found = fk.evaluate_sampler(bent, [2, 3], NOISE, teacher=teacher, data=given, **settings)
        return found.to_dict(), [row.samples for row in found.rows], found.teacher_samples, given

    plain = figures(lambda x: 2 * x, lambda x, y: (3 * x - 3 * y).square().sum(1))
    in_place = figures(lambda x: x.mul_(2), lambda x, y: x.mul_(3).sub_(y.mul_(3)).square_().sum(1))
    assert plain[0]["rows"] == in_place[0]["rows"]
    for a, b in zip([*plain[1], *plain[2:]], [*in_place[1], *in_place[2:]], strict=True):
        assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize("error", [ValueError, AssertionError, ArithmeticError, KeyboardInterrupt])
@pytest.mark.parametrize("columns", [["endpoint"], ["rk45"]])
def test_errors_of_a_velocity_s_own_are_no_rows(error, columns):
    def failing(x, t):
        if t[0] > 0.4:
            raise error("labels are missing")
        return bent(x, t)

    velocity, student = (failing, bent) if "rk45" in columns else (bent, failing)
    with pytest.raises(error, match=r"^labels are missing$"):
        fk.evaluate_sampler(velocity, {"student": (student, 4)}, NOISE, teacher=NOISE, columns=columns)


@pytest.mark.parametrize("velocity", [lambda x, t: x.where(t[:, None] < 0.999, torch.inf), lambda x, t: x * torch.inf])
def test_flows_that_an_adaptive_method_cannot_follow(velocity):
    settings = dict(teacher=NOISE, columns=["rk45"], tolerances=[0.1])
    *_, row = fk.evaluate_sampler(velocity, {"a": (bent, 2)}, NOISE, **settings).rows
    assert row.failed.startswith("velocity: expected finite velocities that dopri5 can follow, got ")


def test_each_velocity_has_its_likelihood_whatever_its_name():
    student = lambda x, t: 2 * x  # noqa: E731
    plans = {"velocity": (student, 2), "uniform": 2}
    found = fk.evaluate_sampler(lambda x, t: x, plans, NOISE, data=DATA, columns=["likelihood"]).likelihoods
    assert found["velocity"].mean == fk.log_likelihood(student, DATA).mean
    assert found["velocity of all"].mean == fk.log_likelihood(lambda x, t: x, DATA).mean
    assert len(found) == 2


@pytest.mark.parametrize("far", [1e3, 1e8])
def test_an_energy_distance_is_the_same_everywhere(far):
    a, b = (normal(n, 4, seed=n).double() for n in (60, 50))
    energy, moved = Energy(), [far + x for x in (a, b)]
    there = energy.between(*map(energy.describe, moved))
    assert there == pytest.approx(energy.between(*map(energy.describe, (a, b))), rel=1e-7)


def test_files_and_the_table(tmp_path):
    found = fk.evaluate_sampler(bent, [1, 2], NOISE, data=DATA, columns=ALL, tolerances=[0.1])
    found.save(tmp_path / "a.json"), found.save(tmp_path / "a.csv")
    assert json.loads((tmp_path / "a.json").read_text()) == found.to_dict()
    with open(tmp_path / "a.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["uniform", "uniform", "dopri5 0.1"]
    for row, of in zip(rows, found.rows, strict=True):
        assert float(row["rms"]) == of.rms
        assert (float(row["rms_low"]), float(row["rms_high"])) == of.rms_interval
        assert float(row["energy"]) == of.energy
    lines = str(found).splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("name"))
    assert [line.split()[0] for line in lines[head + 1 : head + 4]] == ["uniform", "uniform", "dopri5"]
    assert lines[-1].startswith("velocity: log p ")
    with pytest.raises(ValueError, match=r"path: expected a file name ending in \.json or \.csv"):
        found.save(tmp_path / "a.txt")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.csv", "a.json"]


# ---- features ----


def test_features_of_a_callable():
    features = lambda x: x[:, :2].square()  # noqa: E731
    (row,) = fk.evaluate_sampler(bent, 2, NOISE, data=DATA, columns=("energy", "frechet"), features=features).rows
    x = fk.sample(bent, NOISE, 2)
    for name, distance in (("energy", Energy(features)), ("frechet", Frechet(features))):
        assert getattr(row, name) == pytest.approx(distance.between(distance.describe(x), distance.describe(DATA)))
    with pytest.raises(ValueError, match="features: expected finite features, got NaN or Inf of sample 0"):
        fk.evaluate_sampler(bent, 2, NOISE, features=lambda x: x * torch.nan)
    with pytest.raises(ValueError, match=r"features: expected features of shape \[40, d\]"):
        fk.evaluate_sampler(bent, 2, NOISE, features=lambda x: x[:3])


class StandIn(nn.Module):
    """In the place of a package's network, which downloads its weights."""

    seen = None

    def __init__(self, name, features_list):
        super().__init__()
        assert (name, features_list) == ("inception-v3-compat", ["2048"])

    def forward(self, x):
        type(self).seen = x
        return (x.double().flatten(1)[:, :4],)


def stand_ins(monkeypatch):
    """With the names and calls that clean-fid 0.1.35 and torch-fidelity 0.4.0 have in their sources."""
    seen = {}

    def build_resizer(mode):
        assert mode == "clean"
        return lambda image: np.repeat(np.repeat(image, 3, 0), 3, 1).astype(np.float32)  # [H, W, 3], whatever the size

    def build_feature_extractor(mode, device=torch.device("cuda"), use_dataparallel=True):  # noqa: B008
        assert (mode, device.type, use_dataparallel) == ("clean", "cpu", False)

        def network(x):
            seen["clean-fid"] = x
            return x.flatten(1)[:, :4]

        return network

    package = types.ModuleType("cleanfid")
    for name, function in (("features", build_feature_extractor), ("resize", build_resizer)):
        module = types.ModuleType(f"cleanfid.{name}")
        setattr(module, function.__name__, function)
        monkeypatch.setitem(sys.modules, f"cleanfid.{name}", module)
    monkeypatch.setitem(sys.modules, "cleanfid", package)
    fidelity = types.ModuleType("torch_fidelity")
    fidelity.FeatureExtractorInceptionV3 = StandIn
    monkeypatch.setitem(sys.modules, "torch_fidelity", fidelity)
    return seen


@pytest.mark.parametrize("channels", [1, 3])
def test_packages_see_images_of_8_bits(channels, monkeypatch):
    seen = stand_ins(monkeypatch)
    noise = normal(6, channels, 4, 5)
    options = dict(columns=("energy", "frechet"), teacher=noise, value_range=(-2, 2))
    zero = lambda x, t: torch.zeros_like(x)  # noqa: E731, whose samples are the noise
    expected = levels(noise, -2, 2).expand(-1, 3, -1, -1)
    for name in ("clean-fid", "torch-fidelity"):
        (row,) = fk.evaluate_sampler(zero, 1, noise, features=name, **options).rows
        assert (row.energy, row.frechet) == pytest.approx((0, 0), abs=1e-9)
    assert torch.equal(StandIn.seen, expected)
    assert StandIn.seen.dtype == torch.uint8
    larger = expected.repeat_interleave(3, 2).repeat_interleave(3, 3).float()
    assert torch.equal(seen["clean-fid"], larger)


@pytest.mark.parametrize(("name", "module"), [("clean-fid", "cleanfid"), ("torch-fidelity", "torch_fidelity")])
def test_a_package_that_is_not_there_is_named(name, module, monkeypatch):
    for part in ("", ".features", ".resize"):
        monkeypatch.setitem(sys.modules, module + part, None)
    with pytest.raises(ImportError, match=f"^features: expected {name} for .*pip install {name}"):
        fk.evaluate_sampler(bent, 1, normal(2, 3, 4, 4), features=name)
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(ImportError, match=r"^columns: expected torchdiffeq for .*pip install torchdiffeq"):
        fk.evaluate_sampler(bent, 1, NOISE, columns=["rk45"])


# ---- what is refused ----


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        (dict(plans=[]), ValueError, "plans: expected at least one plan"),
        (dict(plans=[0.0, 0.5, 1.0]), TypeError, "plans: expected Schedules, Solvers, numbers"),
        (dict(plans={"a": (bent, "x")}), TypeError, "plans: expected Schedules"),
        (dict(plans=0), ValueError, "plans: expected numbers of steps from 1 to"),
        (dict(plans=fk.Solver.heun(2, inverse=True)), ValueError, "plans: expected solvers from noise to data"),
        (dict(plans=[2, fk.Schedule([0.5, 1])]), ValueError, "plans: expected plans from one first time, 0, got one"),
        (dict(teacher=nn.Linear(3, 3)), TypeError, "teacher: expected a callable velocity"),
        (dict(plans={"a": 2, "b": (nn.Linear(3, 3), 2)}), TypeError, r"plans\['b'\]: expected a callable velocity"),
        (dict(columns="endpoint"), TypeError, "columns: expected some of"),
        (dict(columns=["rms"]), ValueError, "columns: expected some of"),
        (dict(columns=["likelihood"]), ValueError, "data: expected samples of the data"),
        (dict(columns=["frechet"], data=DATA[:1]), ValueError, "data: expected at least 2 samples for 'frechet'"),
        (
            dict(columns=["likelihood"], data=DATA.float()),
            ValueError,
            "data: expected the noise's dtype, torch.float64",
        ),
        (dict(data=DATA[:, :2]), ValueError, "data: expected samples of the noise's shape"),
        (dict(data=DATA * torch.nan), ValueError, "data: expected finite values, got NaN or Inf in sample 0"),
        (dict(teacher=NOISE[:3]), ValueError, "teacher: expected a velocity, or samples of the noise's shape"),
        (dict(teacher=NOISE, teacher_solver=3), ValueError, "teacher_solver: expected None"),
        (dict(features="inception"), ValueError, "features: expected a callable samples -> "),
        (dict(features="clean-fid"), ValueError, "noise: expected images of shape"),
        (dict(distances={"rms": endpoint_errors}), ValueError, "distances: expected names that are no figure's"),
        (dict(distances={"a": 3}), TypeError, r"distances\['a'\]: expected a callable"),
        (dict(points=0), ValueError, "points: expected an integer from 1 to 10,000"),
        (dict(tolerances=[0.1, 0]), ValueError, "tolerances: expected positive numbers"),
        (dict(tolerances=[]), ValueError, "tolerances: expected at least one"),
        (dict(value_range=(1, 0)), ValueError, "value_range: expected two finite numbers"),
    ],
)
def test_what_is_refused_before_any_work(changes, error, said):
    calls = []

    def counted(x, t):
        calls.append(t)
        return bent(x, t)

    with pytest.raises(error, match=f"^{said}"):
        fk.evaluate_sampler(counted, **(dict(plans=2, noise=NOISE) | changes))
    assert not calls


def test_the_likelihood_of_another_s_conditioning_is_refused():
    field = fk.VelocityField(bent_given, conditioning={"y": torch.ones(40, 1)})
    fk.evaluate_sampler(field, 2, NOISE)
    for velocity, plans in ((field, 2), (bent, {"student": (field, 2)})):
        with pytest.raises(ValueError, match=r"velocity: expected a velocity without conditioning for each .*'y'"):
            fk.evaluate_sampler(velocity, plans, NOISE, data=DATA, columns=["likelihood"])


# ---- the command line ----


def test_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    net, noise = BUNDLED["digits"].load(), normal(16, 1, 8, 8)
    cal = fk.calibrate(net, noise, 10, (2, 3), effort="fit", progress=False)
    cal.save("c.json")
    line = "straighten --model digits --schedule c.json --steps 3 --iterations 2 --batch 4 --bank 8 --out s.safetensors"
    assert main(line.split()) == 0
    data = normal(20, 1, 8, 8, seed=2)
    np.save("d.npy", data.numpy().astype(">f4"))  # of a machine with the other byte order
    line = (
        "evaluate --model digits --schedule c.json --student s.safetensors --data d.npy -n 12 --out e.csv --png grids"
    )
    capsys.readouterr()
    assert main(line.split()) == 0
    out = capsys.readouterr().out
    with open("e.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    names = [(row["name"], row["steps"]) for row in rows]
    assert names == [*((n, str(k)) for n in ("uniform", "schedule", "best") for k in (2, 3)), ("student", "3")]
    drawn = torch.randn(12, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    expected = fk.evaluate_sampler(net, cal, drawn, data=data)
    for row, of in zip(rows[4:6], expected.rows, strict=True):
        assert (float(row["rms"]), float(row["energy"])) == pytest.approx((of.rms, of.energy), rel=1e-3)
        assert f"{float(row['rms']):.4g}" in out
    grids = sorted(p.name for p in (tmp_path / "grids").iterdir())
    assert grids == sorted(["teacher.png", "student_3.png", *(f"{n}_{k}.png" for n, k in names[:6])])
    assert main([*line.split(), "--columns", "frechet"]) == 0  # in the same folder
    assert main(["evaluate", "--model", "digits", "-n", "4", "--steps", "1-2"]) == 0


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--schedule c.json --steps 2,9", "--steps: expected some of [2, 3], those of c.json, got [9]"),
        ("--columns rms", "--columns: expected some of endpoint,"),
        ("--data none.npy", "--data: expected a file"),
        ("--data c.json", "--data: expected a file ending in .npy or .pt or .safetensors"),
        ("--data d.npy", "--data: expected floating-point samples of shape [m, 1, 8, 8]"),
        ("--data broken.npy", "--data: expected floating-point samples"),
        ("--columns likelihood", "--data: expected samples of the data"),
        ("--out a.txt", "--out: expected a file name ending in .json or .csv"),
        ("--out d.npy --data d.npy", "--out: expected another file than --data"),
        ("--png mine", "--png: expected a new folder"),
        ("--student c.json", "--student: expected"),
        ("-n 1 --columns frechet", "-n: expected at least 2 samples"),
    ],
)
def test_bad_options(line, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fk.calibrate(BUNDLED["digits"].load(), normal(4, 1, 8, 8), 5, (2, 3), progress=False).save("c.json")
    np.save("d.npy", np.zeros((4, 2)))
    (tmp_path / "broken.npy").write_bytes(b"\x93NUMPY")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/photo.png").touch()
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert main(["evaluate", "--model", "digits", "-n", "4", *line.split()]) == 2
    assert said in capsys.readouterr().err
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
