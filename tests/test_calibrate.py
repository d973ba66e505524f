"""Calibration: the streamed stages against the single ones, and the file that keeps the result."""

import base64
import json
import math
import platform
import tracemalloc
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from _flows import (
    Counted,
    ElementwiseField,
    RowField,
    digits_teacher,
    direct_cost,
    even_grid,
    linear_field,
    normal,
    relative_error,
    uneven_grid,
)
from torch import nn

import flowkernels as fk
from flowkernels._files import sealed, whole_file
from flowkernels.calibration import sample_costs
from flowkernels.models.bundled import BUNDLED


def same(a, b):
    """Everything that the files of two calibrations hold, exactly."""
    tables = all(torch.equal(getattr(a, k), getattr(b, k)) for k in ("cost", "times", "gram", "norm_cost"))
    known = all(getattr(a[n], k) == getattr(b[n], k) for n in a for k in ("cost_interval", "samples_needed", "notes"))
    solvers = [{n: s.to_dict() for n, s in cal.solvers.items()} for cal in (a, b)]
    return a == b and tables and known and a.provenance == b.provenance and solvers[0] == solvers[1]


def small(seed=0, **settings):
    settings = dict(grid=12, steps=[2, 4], progress=False) | settings
    return fk.calibrate(linear_field(seed=seed), normal(6, 4), **settings)


@pytest.mark.parametrize("grid", [even_grid(30), uneven_grid(25)], ids=["even", "uneven"])
@pytest.mark.parametrize(
    "make", [digits_teacher, lambda: lambda x, t: x, BUNDLED["digits"].load], ids=["closed", "x", "net"]
)
def test_the_three_stages_in_one_call(make, grid):
    velocity, noise = make(), normal(9, 1, 8, 8)
    cal = fk.calibrate(velocity, noise, grid, range(1, 8), progress=False)
    traj = fk.rollout(velocity, noise, grid)
    gram = torch.stack([fk.velocity_gram(v) for v in traj.v.split(1, 1)]).sum(0) / 9  # groups of one sample
    cost = fk.cost_from_gram(gram, traj.times)
    assert torch.equal(cal.gram, gram)
    assert torch.equal(cal.cost, cost)
    assert torch.equal(cal.times, grid)
    assert dict(cal) == fk.least_cost_schedules(cost, traj.times, range(1, 8))


def test_defaults():
    velocity = Counted(ElementwiseField())
    cal = fk.calibrate(velocity, normal(4, 3))
    assert velocity.calls == 100
    assert list(cal) == list(range(1, 11))
    assert torch.equal(cal.times, even_grid(100))


@pytest.mark.parametrize("n", [9, 31, 32, 100, 200, 300])
@pytest.mark.parametrize("chunk", [None, 7])
def test_one_gram_matrix_of_each_group(n, chunk, monkeypatch):
    """Every velocity is read once, and the groups' sum keeps to the float64 reference."""
    noise, seen, velocity_gram = normal(n, 3), [], fk.velocity_gram
    monkeypatch.setattr(sample_costs, "velocity_gram", lambda v: seen.append(v.shape[1]) or velocity_gram(v))
    cal = fk.calibrate(ElementwiseField(), noise, 20, 4, chunk=chunk, progress=False)
    assert sum(seen) == n
    groups = cal.sample_costs.groups
    assert groups == {9: 9, 31: 31, 32: 16, 100: 17, 200: 34, 300: 34}[n]
    assert len(seen) == groups if chunk is None else len(seen) <= groups + -(-n // chunk)
    v = torch.cat([fk.rollout(ElementwiseField(), part, 20).v for part in noise.split(chunk or n)], 1).double()
    a = v.diff(dim=0).flatten(1)
    assert relative_error(cal.gram, a @ a.T / n) <= 1e-5


@pytest.mark.parametrize("chunk", [1, 3, 4, 8, 100])
def test_chunks_give_the_same_costs(chunk):
    noise = normal(8, 4, dtype=torch.float64)
    velocity = Counted(linear_field())
    whole = fk.calibrate(velocity, noise, 20, progress=False)
    calls, velocity.calls = velocity.calls, 0
    chunked = fk.calibrate(velocity, noise, 20, chunk=chunk, progress=False)
    assert (calls, velocity.calls) == (20, 20 * -(-8 // chunk))
    pairs = torch.ones(21, 21, dtype=torch.bool).triu(2)
    assert torch.allclose(chunked.cost[pairs], whole.cost[pairs], rtol=1e-10, atol=0)
    assert [s.indices for s in chunked.values()] == [s.indices for s in whole.values()]
    assert chunked.provenance == whole.provenance


def test_chunks_of_a_network_agree_with_float64():
    velocity, noise = BUNDLED["digits"].load(), normal(10, 1, 8, 8)
    cal = fk.calibrate(velocity, noise, 20, chunk=4, progress=False)
    v = torch.cat([fk.rollout(velocity, part, 20).v for part in noise.split(4)], 1)
    expected = direct_cost(v, cal.times)
    expected.diagonal(1).zero_()
    assert relative_error(cal.cost, expected) <= 1e-5


@pytest.mark.parametrize("packed", [True, False])
def test_conditioning_follows_the_chunks(packed):
    class Turning(nn.Module):
        def forward(self, x, t, turn):
            return (x + turn * t[:, None]).sin() * turn

    turns = normal(8, 3, seed=5, dtype=torch.float64)
    field = fk.VelocityField(
        Turning(),
        **dict(conditioning={"turn": turns}, unconditional={"turn": torch.zeros(1, 3, dtype=torch.float64)}),
        **dict(guidance=1.5, packed=packed),
    )
    noise = normal(8, 3, dtype=torch.float64)
    whole = fk.calibrate(field, noise, 15, chunk=8, progress=False)
    pairs = torch.ones(16, 16, dtype=torch.bool).triu(2)
    for chunk in (1, 3, 7):
        chunked = fk.calibrate(field, noise, 15, chunk=chunk, progress=False)
        assert torch.allclose(chunked.cost[pairs], whole.cost[pairs], rtol=1e-10, atol=0)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    shuffled = fk.calibrate(field, noise[order], 15, progress=False)
    assert not torch.allclose(shuffled.cost[pairs], whole.cost[pairs], rtol=1e-3)
    moved = fk.calibrate(field.rows(order, 8), noise[order], 15, progress=False)
    assert torch.allclose(moved.cost[pairs], whole.cost[pairs], rtol=1e-10, atol=0)


def test_a_straight_flow_costs_nothing():
    rows = normal(6, 4)
    cal = fk.calibrate(fk.VelocityField(RowField(), conditioning={"rows": rows}), normal(6, 4), 10, 3, progress=False)
    assert cal[3].cost == cal[3].uniform_cost == 0
    assert cal[3].ratio == 1
    assert cal[3].indices == (0, 1, 2, 10)


def test_never_worse_than_uniform():
    for cal in (small(), fk.calibrate(digits_teacher(), normal(16, 1, 8, 8), 40, progress=False)):
        assert all(s.cost <= s.uniform_cost for s in cal.values())
    assert cal[4].ratio < 0.99


def test_mapping_and_table():
    cal = small()
    assert len(cal) == 2
    assert 4 in cal
    assert 3 not in cal
    with pytest.raises(KeyError, match=r"expected one of \[2, 4\], got 3; find\(3\) adds it"):
        cal[3]
    lines = str(cal).splitlines()
    assert lines[0].split() == ["N", "cost", "95", "%", "interval", "needed", "uniform", "ratio", "knots"]
    assert [int(line.split()[0]) for line in lines[1:]] == [2, 4]
    columns = lines[2].split()
    low, high = map(float, columns[2].split(".."))
    assert low <= float(columns[1]) <= high
    assert int(columns[3]) == cal[4].samples_needed
    assert float(columns[5]) == pytest.approx(cal[4].ratio, abs=1e-3)
    assert columns[6:] == [f"{t:.3g}" for t in cal[4].times]


def test_what_there_is_for_a_number_of_steps():
    cal = small()
    assert cal.choices(4) == {"uniform": fk.Schedule.uniform(4), "bellman": cal[4]}
    cal.solvers[4] = cal.solvers[3] = fk.Solver.heun(2)
    assert list(cal.choices(4)) == ["uniform", "bellman", "fitted"]
    assert list(cal.choices(3)) == ["uniform", "fitted"]
    assert str(cal).endswith("\na solver for N = 3, 4, not verified: cal.best(N)")
    with pytest.raises(KeyError, match=r"expected one of \[2, 4\], got 5"):
        cal.choices(5)
    cal.add_verified({4: {"uniform": 2.0, "bellman": 1.0, "fitted": 3.0}, 2: {"uniform": 1.0, "bellman": math.nan}})
    assert cal.best(4) is cal[4]
    assert "a solver for N = 3, not verified" in str(cal)
    assert cal.best(2) == fk.Schedule.uniform(2)
    cal.schedules[4] = fk.Schedule(cal.times[[0, 1, 2, 3, 12]], cal.times, (0, 1, 2, 3, 12))
    assert cal.best(4) == fk.Schedule.uniform(4)  # of which there is an error, as there is not of the new one
    assert repr(cal) == "Calibration(K=12, n=6, schedules of 2, 4 steps)"


def test_find():
    cal = small()
    assert cal.find([3, 4]) == {n: small(steps=[n])[n] for n in (3, 4)}
    assert sorted(cal) == [2, 3, 4]
    assert cal[3] == small(steps=3)[3]
    with pytest.raises(ValueError, match=r"^steps: expected at most K = 12"):
        cal.find(13)
    assert sorted(cal) == [2, 3, 4]


def test_provenance():
    net = BUNDLED["digits"].load()
    noise = normal(5, 1, 8, 8)
    cal = fk.calibrate(net, noise, 10, 2, seed=17, progress=False)
    expected = dict(K=10, n=5, seed=17, shape=[1, 8, 8], device="cpu", guidance=1.0)
    assert {key: cal.provenance[key] for key in expected} == expected
    assert cal.provenance["state_dtype"] == cal.provenance["velocity_dtype"] == "torch.float32"
    versions = dict(flowkernels=fk.__version__, torch=torch.__version__, python=platform.python_version())
    assert cal.provenance["versions"] == versions
    assert len(cal.provenance["parameters_sha256"]) == 64


def test_provenance_of_an_adapted_network():
    class Labelled(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x, time, label):
            return (x * self.weight.to(x.dtype) * label[:, None]).to(x.dtype)

    field = fk.VelocityField(
        Labelled(),
        **dict(reverse_time=True, time_scale=1000, time_name="time", dtype=torch.bfloat16, guidance=3.0),
        **dict(conditioning={"label": torch.ones(1)}, unconditional={"label": torch.zeros(1)}),
    )
    found = fk.calibrate(field, normal(4, 3, dtype=torch.float64), 5, 2, progress=False).provenance
    assert found["guidance"] == 3.0
    assert found["convention"] == field.convention()
    assert found["convention"]["time_scale"] == 1000
    assert (found["state_dtype"], found["velocity_dtype"]) == ("torch.float64", "torch.float64")
    assert json.loads(json.dumps(found)) == found


def test_parameter_hash_tells_models_apart():
    def digest(velocity):
        return fk.calibrate(velocity, normal(3, 4), 4, 2, progress=False).provenance["parameters_sha256"]

    field = linear_field()
    first = digest(field)
    assert first == digest(linear_field()) == digest(fk.VelocityField(field))  # plain is the default convention
    assert first != digest(linear_field(seed=9))
    assert first != digest(fk.VelocityField(field, sign=-1))
    with torch.no_grad():
        field.matrix[0, 0] += 1e-6
    assert first != digest(field)
    assert digest(lambda x, t: x) is None


@pytest.mark.parametrize("grid", [even_grid(12), uneven_grid(31)], ids=["even", "uneven"])
def test_round_trip_is_exact(tmp_path, grid):
    cal = small(grid=grid, steps=range(1, 11), seed=5)
    path = tmp_path / "model.boss.json"
    cal.save(path)
    again = fk.Calibration.load(path)
    assert same(cal, again)
    assert again[3].samples_needed >= 1
    assert (again.kept, again.sample_costs) == (None, None)
    assert again.find(11) == cal.find(11)
    again.save(str(path))
    loaded = fk.Calibration.load(str(path))
    assert loaded[11].cost_interval is None  # planned from the costs alone
    assert cal[11].cost_interval is not None
    assert same(again, loaded)


def test_solvers_and_notes_in_the_file(tmp_path):
    cal = small()
    cal.solvers[4] = fk.Solver.adams_bashforth(cal[4])
    cal.schedules[2] = replace(cal[2], notes={"objective": "squared"})
    cal.save(tmp_path / "a.json")
    again = fk.Calibration.load(tmp_path / "a.json")
    assert same(cal, again)
    assert torch.equal(again.solvers[4].coefficients, cal.solvers[4].coefficients)


def test_files_of_before_intervals_load(tmp_path):
    """Written by the release before there were any; the schedules and costs are those of today."""
    with pytest.warns(UserWarning, match=r"calibration_1.boss.json has no sha256, as files of earlier") as warned:
        again = fk.Calibration.load(Path(__file__).parent / "data" / "calibration_1.boss.json")
    cal = small(steps=[2, 4])
    assert [w.filename for w in warned] == [__file__]
    assert {n: s.indices for n, s in again.items()} == {n: s.indices for n, s in cal.items()}
    assert torch.allclose(again.cost, cal.cost, rtol=1e-5, atol=0)
    assert (again.gram, again.norm_cost, again[2].cost_interval, again[2].samples_needed) == (None,) * 4
    assert again.solvers == {}
    assert str(again).splitlines()[1].split()[2:4] == ["-", "-"]
    again.save(tmp_path / "a.json")
    assert dict(fk.Calibration.load(tmp_path / "a.json")) == dict(again)


def test_saving_overwrites(tmp_path):
    path = tmp_path / "a.json"
    small().save(path)
    longer = small(steps=range(1, 11))
    longer.save(path)
    assert same(fk.Calibration.load(path), longer)
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_saved_file_has_the_permissions_of_any_other(tmp_path):
    small().save(tmp_path / "a.json")
    (tmp_path / "b.json").write_text("")
    assert (tmp_path / "a.json").stat().st_mode == (tmp_path / "b.json").stat().st_mode


def test_saving_into_a_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        small().save(tmp_path / "missing" / "a.json")


@pytest.mark.parametrize("old", [True, False], ids=["over an old file", "new file"])
@pytest.mark.parametrize("failing", ["dumps", "write", "fsync", "rename"])
def test_a_crash_while_saving_leaves_the_old_file(tmp_path, monkeypatch, failing, old):
    path = tmp_path / "a.json"
    if old:
        small().save(path)
    before = path.read_bytes() if old else None
    cal = small(steps=range(1, 11))

    def fail(*_):
        raise OSError("no space left on device")

    def half(self, text):
        with open(self, "w") as f:
            f.write(text[: len(text) // 2])
        fail()

    target, name, action = {
        "dumps": (json, "dumps", lambda *_, **__: fail()),
        "write": (Path, "write_text", half),
        "fsync": ("flowkernels._files.os", "fsync", fail),
        "rename": (Path, "replace", fail),
    }[failing]
    with monkeypatch.context() as patch:
        patch.setattr(f"{target}.{name}", action) if isinstance(target, str) else patch.setattr(target, name, action)
        with pytest.raises(OSError, match="no space left"):
            cal.save(path)
    assert [p.name for p in tmp_path.iterdir()] == (["a.json"] if old else [])
    if old:
        assert path.read_bytes() == before
        assert same(fk.Calibration.load(path), small())


def test_an_interrupt_while_saving_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    small().save(path)
    before = path.read_bytes()

    def interrupted():
        with whole_file(path) as partial:
            partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "model.boss.json"
    small().save(path)
    return path


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_truncated_file(saved, kept):
    whole = saved.read_bytes()
    saved.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(ValueError, match=r"^path: expected a whole calibration file, .*model.boss.json is truncated"):
        fk.Calibration.load(saved)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x89PNG\r\n\x1a\n\x00\x00\xff\xfe", "not JSON"),
        (b"schedule: [0, 1]", "not JSON"),
        (b"[1, 2, 3]", "of format 'list'"),
        (b"null", "of format 'NoneType'"),
        (b"{}", "of format None"),
        (b'{"format": "another", "version": 1}', "of format 'another'"),
        (b'{"format": "flowkernels.calibration"}', "of version None"),
        (b'{"format": "flowkernels.calibration", "version": 4}', "expected version 1, 2 or 3, got .* of version 4"),
        (
            b'{"format": "flowkernels.calibration", "version": true}',
            "expected version 1, 2 or 3, got .* of version True",
        ),
        (b'{"format": "flowkernels.calibration", "version": 1}', "is damaged"),
        (b'{"format": "flowkernels.calibration", "version": 2}', "is damaged"),
    ],
)
def test_foreign_file(tmp_path, content, message):
    path = tmp_path / "model.boss.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^path: .*model.boss.json.*{message}|^path: {message}"):
        fk.Calibration.load(path)


def change(*keys, to):
    def edit(data):
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = to

    return edit


def remove(*keys):
    def edit(data):
        for key in keys[:-1]:
            data = data[key]
        del data[keys[-1]]

    return edit


def entries(values):
    return base64.b64encode(np.array(values, "<f8").tobytes()).decode()


SOLVER = fk.Solver.euler(4).to_dict()


@pytest.mark.parametrize(
    "damage",
    [
        remove("times"),
        remove("cost"),
        remove("cost", "data"),
        remove("schedules"),
        remove("provenance"),
        remove("schedules", "4", "indices"),
        remove("schedules", "4", "cost"),
        remove("schedules", "4", "samples_needed"),
        change("schedules", "4", "cost_interval", to=[1.0]),
        change("schedules", "4", "notes", to="all"),
        change("gram", "data", to=base64.b64encode(bytes(8)).decode()),
        change("norm_cost", to=3),
        change("solvers", to={"4": {}}),
        change("times", to=None),
        change("times", to=[0, 0.5, 0.2, 1]),
        change("times", to=[0, "a", 1]),
        change("times", to=[0, 0.5, 1]),
        change("cost", to=3),
        change("cost", "data", to="not base64"),
        change("cost", "data", to=base64.b64encode(b"1234567").decode()),
        change("cost", "data", to=base64.b64encode(bytes(8 * 77)).decode()),
        change("schedules", to=[1]),
        change("schedules", "two", to={"indices": [0, 12], "cost": 1, "uniform_cost": 1}),
        change("schedules", "4", to=None),
        change("schedules", "4", "indices", to=[]),
        change("schedules", "4", "indices", to=[0, 1, 2, 12]),
        change("schedules", "4", "indices", to=[0, 1, 3, 2, 12]),
        change("schedules", "4", "indices", to=[0, 1, 2, 3, 13]),
        change("schedules", "4", "indices", to=[1, 2, 3, 4, 12]),
        change("schedules", "4", "indices", to=[0, 1, 2, float("inf"), 12]),
        change("schedules", "4", "indices", to=[0, 1, 2, None, 12]),
        change("schedules", "4", "cost", to="much"),
        change("provenance", to="me"),
        change("provenance", to=4),
        change("provenance", to=[]),
        change("provenance", "shape", to=[0]),
        change("provenance", "shape", to=4),
        change("provenance", "K", to=11),
        change("provenance", "parameters_sha256", to=7),
        change("provenance", "seed", to=float("nan")),
        change("times", to=12),
        change("times", to=[0, True]),
        change("cost", "encoding", to="base64"),
        change("cost", "data", to=entries([-1.0] + [0.0] * 77)),
        change("cost", "data", to=entries([float("nan")] + [0.0] * 77)),
        change("norm_cost", "data", to=entries([-1.0] + [0.0] * 77)),
        change("gram", "data", to=entries([-1.0] + [0.0] * 65)),
        change("gram", "data", to=entries([0.0, float("inf")] + [0.0] * 64)),
        change("schedules", "04", to={"indices": [0, 12], "cost": 1, "uniform_cost": 1}),
        change("schedules", "1", to={"indices": [0, 12], "cost": -1, "uniform_cost": 1}),
        change("schedules", "4", "indices", to=[0, 1.0, 2, 3, 12]),
        change("schedules", "4", "indices", to=[0, 1.5, 2, 3, 12]),
        change("schedules", "4", "indices", to=[False, 1, 2, 3, 12]),
        change("schedules", "4", "indices", to="01234"),
        change("schedules", "4", "cost", to=True),
        change("schedules", "4", "cost", to=-1e-9),
        change("schedules", "4", "cost", to=float("nan")),
        change("schedules", "4", "uniform_cost", to=float("inf")),
        change("schedules", "4", "uniform_cost", to=10**400),
        change("schedules", "4", "cost_interval", to=[2.0, 1.0]),
        change("schedules", "4", "cost_interval", to=[-1.0, 1.0]),
        change("schedules", "4", "samples_needed", to=0),
        change("schedules", "4", "samples_needed", to=1.5),
        change("solvers", to={"4": SOLVER | {"name": 4}}),
        change("solvers", to={"3": SOLVER}),
        change("solvers", to={"4": SOLVER | {"notes": None}}),
        change("solvers", to={"4": SOLVER | {"times": 4}}),
        change("solvers", to={"4": SOLVER | {"model_times": [0, 0.25, 0.5, "1"]}}),
        change("solvers", to={"4": SOLVER | {"model_times": [False, 0.25, 0.5, 0.75]}}),
        change("solvers", to={"4": SOLVER | {"coefficients": [[0.25]] * 4}}),
        change("solvers", to=[SOLVER]),
        change("verified", to={"4": {"uniform": {"error": -1.0}}}),
        change("verified", to={"4": {"uniform": {"error": "1"}}}),
        change("verified", to={"4": {"uniform": {}}}),
        change("verified", to={"4": {"uniform": 1.0}}),
        change("verified", to={"4": {"another": {"error": 1.0}}}),
        change("verified", to={"4.0": {"uniform": {"error": 1.0}}}),
        change("verified", to={"4": [1.0]}),
        change("verified", to={"4": {"uniform": {"error": 1.0, "sha256": 7}}}),
        change("verified", to={"4": {"uniform": {"error": 1.0, "interval": [2.0, 1.0]}}}),
        change("verified", to={"4": {"uniform": {"error": 1.0, "interval": [-1.0, 1.0]}}}),
        change("schedules", "4", "times", to=[0, 0.25, 0.5, 0.75, 1]),
        change("schedules", "4", "sigmas", to=None),
        change("forced_knots", to=[2.0]),
        change("forced_knots", to=0.5),
        remove("forced_knots"),
        remove("solvers"),
        remove("verified"),
        remove("schedules", "4", "sigmas"),
    ],
)
def test_damaged_file(saved, damage):
    data = json.loads(saved.read_text())
    damage(data)
    saved.write_text(json.dumps(data | {"sha256": "0"}))
    with pytest.raises(ValueError, match=r"^path: expected a whole calibration file, .*model.boss.json is damaged"):
        fk.Calibration.load(saved)
    del data["sha256"]  # of before there were any: each entry is looked at all the same
    saved.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"^path: expected a whole calibration file, .*model.boss.json is damaged"):
        fk.Calibration.load(saved)


@pytest.mark.parametrize("depth", [10, 100_000])
def test_json_that_is_none_of_ours(saved, depth):
    for text in (
        "[" * depth,
        '{"a": 1, "a": 2}',
        '{"a":' * depth,
        "9" * 5000,
        saved.read_text().replace("times", "cost"),
    ):
        saved.write_text(text)
        with pytest.raises(ValueError, match=r"^path: expected a whole calibration file, .*model.boss.json is trunc"):
            fk.Calibration.load(saved)


def test_a_file_of_many_small_values_is_refused_before_it_is_parsed(saved):
    saved.write_text("[" + "[]," * 3_000_000 + "0]")
    with pytest.raises(ValueError, match="of more values than its 9000003 bytes"):
        fk.Calibration.load(saved)


def test_lengths_are_compared_before_anything_is_made_of_them(saved):
    """A grid of as many times as a small file holds would have 0.8 GB of costs."""
    data = json.loads(saved.read_text())
    data |= {"times": [i / 10_000 for i in range(10_001)]}
    data.pop("sha256"), data["provenance"].pop("K")
    saved.write_text(json.dumps(data))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"is damaged .cost: expected 50005000 entries"):
            fk.Calibration.load(saved)
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("times", ["K = 1", "K = 2"])
def test_the_smallest_grids(tmp_path, times):
    cal = small(grid=int(times[-1]), steps=1)
    cal.save(tmp_path / "a.json")
    assert same(cal, fk.Calibration.load(tmp_path / "a.json"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda cal: cal.solvers.update({4: fk.Solver.euler(7)}),
            "solvers.4: expected a solver of 4 steps, got one",
        ),
        (lambda cal: cal.schedules.update({4: fk.Schedule.uniform(4)}), "schedules: expected schedules on the grid"),
        (lambda cal: cal.verified.update({4: {"uniform": math.nan}}), "verified.4.uniform.error: expected a number"),
        (lambda cal: cal.cost.fill_(-1), "cost: expected costs of at least 0"),
    ],
)
def test_nothing_is_saved_that_would_not_load(saved, spoil, message):
    before, cal = saved.read_bytes(), small()
    spoil(cal)
    with pytest.raises(ValueError, match=f"^{message}"):
        cal.save(saved)
    assert saved.read_bytes() == before


def test_what_json_has_not_is_saved_as_it_has_it(tmp_path):
    cal = small()
    cal.provenance.update(seed=np.int64(3), loss=math.inf, where=Path("a"), at=torch.ones(2), flag=np.bool_(True))
    cal.save(tmp_path / "a.json")
    found = fk.Calibration.load(tmp_path / "a.json").provenance
    assert [found[k] for k in ("seed", "loss", "where", "at", "flag")] == [3, "inf", "a", [1.0, 1.0], True]


def test_what_later_versions_add_is_left_aside(saved):
    data = json.loads(saved.read_text())
    data["added"] = {"4": 1}
    data["schedules"]["4"]["added"], data["provenance"]["added"] = [1], None
    del data["sha256"]
    saved.write_text(json.dumps(sealed(data)))
    found = fk.Calibration.load(saved)
    assert found.provenance.pop("added", 1) is None
    assert same(found, small())


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        fk.Calibration.load(tmp_path / "none.json")


def test_loading_for_a_model(saved):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for velocity in (None, linear_field(seed=0), fk.VelocityField(linear_field(seed=0))):
            assert same(fk.Calibration.load(saved, velocity), small())
    for other in (linear_field(seed=1), fk.VelocityField(linear_field(seed=0), sign=-1), lambda x, t: x):
        with pytest.warns(UserWarning, match=r"^velocity: expected the model that .* was made for") as seen:
            assert same(fk.Calibration.load(saved, other), small())
        assert seen[0].filename == __file__


def test_loading_for_another_guidance(tmp_path):
    class Scaled(nn.Module):
        def forward(self, x, t, scale):
            return scale * x

    def field(guidance):
        return fk.VelocityField(
            Scaled(), conditioning={"scale": 1.0}, unconditional={"scale": 0.5}, guidance=guidance, packed=False
        )

    path = tmp_path / "a.json"
    fk.calibrate(field(2.0), normal(4, 4), 5, 2, progress=False).save(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fk.Calibration.load(path, field(2.0))
    with pytest.warns(UserWarning, match="got another one"):
        fk.Calibration.load(path, field(3.0))


def test_a_calibration_without_a_module_says_so(tmp_path):
    path = tmp_path / "a.json"
    fk.calibrate(lambda x, t: x, normal(4, 4), 5, 2, progress=False).save(path)
    with pytest.warns(UserWarning, match="unknown: not a module"):
        fk.Calibration.load(path, linear_field())


def test_gradients_stay_out():
    field = linear_field()
    cal = fk.calibrate(field, normal(4, 4).requires_grad_(), 5, 2, progress=False)
    assert field.matrix.grad is None
    assert not cal.cost.requires_grad


def test_progress_bar_changes_nothing(capsys):
    assert same(small(progress=True), small())
    assert "calibrate" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("2", fk.Solver.adams_bashforth(2, 2), "solvers: .*keys"),
        (2, fk.Schedule.uniform(2), r"solvers\[2\]: .*a Solver"),
    ],
)
def test_what_is_no_solver_of_a_number_of_steps_is_not_written(key, value, message, tmp_path):
    cal = fk.calibrate(lambda x, t: x, torch.randn(4, 2), 4, [2], progress=False)
    cal.solvers[key] = value
    with pytest.raises(TypeError, match=message):
        cal.save(tmp_path / "a.json")
    assert not list(tmp_path.iterdir())


def test_more_noise_to_verify_on_than_conditioning_has_rows_is_refused_first():
    calls, labels = [], torch.arange(8.0)

    def net(x, t, y):
        calls.append(len(x))
        return x * y[:, None]

    noise, more = torch.randn(8, 2), torch.randn(9, 2)
    velocity = fk.VelocityField(net, conditioning={"y": labels})
    with pytest.raises(ValueError, match=r"verify_noise: expected at most 8 samples.*conditioning\['y'\].*got 9"):
        fk.calibrate(velocity, noise, 4, [2], verify_noise=more, progress=False)
    assert not calls
    for given in (fk.VelocityField(net, conditioning={"y": labels[:1]}), lambda x, t: x):  # one row for all, none
        assert fk.calibrate(given, noise, 4, [2], verify_noise=more, progress=False).verified
