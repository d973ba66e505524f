"""The card, .boss.json of version 3: its schema, its checksum, and what a reader without the library makes of it."""

import base64
import hashlib
import itertools
import json
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from _flows import linear_field, normal

import flowkernels as fk

SCHEMA = json.loads((Path(__file__).parents[1] / "docs/boss.schema.json").read_text())
OLD = Path(__file__).parent / "data/calibration_1.boss.json"


def calibration(**options):
    settings = dict(grid=12, steps=[1, 2, 4], progress=False) | options
    return fk.calibrate(linear_field(), normal(24, 4), **settings)


def rich():
    """With everything: a start below sigma = 1, a forced knot, solvers, and what was verified."""
    grid = torch.linspace(0.05, 1, 14, dtype=torch.float64)
    options = dict(grid=grid, steps=[2, 4], effort="fit", verify_noise=normal(8, 4, seed=1))
    options |= dict(forced_knots=[grid[6].item()])
    return calibration(**options)


def of_heun():
    """Of a teacher whose steps are not Euler's, its own error in it."""
    return calibration(teacher_solver="heun", teacher_error=4)


def free_start():
    """With a solver whose coefficients of the first state are not all 1."""
    cal = calibration()
    cal.solvers[4] = replace(fk.Solver.adams_bashforth(cal[4]), start_coefficients=[1.0, 0.9, 1.1, 0.7])
    return cal


def bare():
    """Without a Gram matrix, intervals or solvers, as one that a caller makes of costs."""
    cal = calibration()
    plans = fk.least_cost_schedules(cal.cost, cal.times, [3])
    return fk.Calibration(cal.times, cal.cost, plans, {"where": Path("é"), "loss": float("inf")})


@pytest.fixture
def saved(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cal = rich()
    cal.save(tmp_path / "card.boss.json")
    return tmp_path / "card.boss.json"


def validate(data):
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.Draft202012Validator(SCHEMA).validate(data)


@pytest.mark.parametrize(
    "make",
    [calibration, rich, of_heun, free_start, bare, lambda: fk.Calibration.load(OLD)],
    ids=["plain", "rich", "heun", "free start", "bare", "old"],
)
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_what_is_written_keeps_to_the_schema(make, tmp_path):
    cal = make()
    cal.save(tmp_path / "a.json")
    data = json.loads((tmp_path / "a.json").read_text())
    validate(data)
    again = fk.Calibration.load(tmp_path / "a.json")
    again.save(tmp_path / "b.json")
    second = json.loads((tmp_path / "b.json").read_text())
    assert {k for k in data if second[k] != data[k]} <= {"written", "sha256"}  # the day may have changed
    assert again.forced_knots == cal.forced_knots
    assert str(again) == str(cal)


DAMAGE = {
    "no version": lambda d: d.pop("version"),
    "another format": lambda d: d.update(format="another"),
    "no table": lambda d: d.pop("verified"),
    "text for a list": lambda d: d.update(times="0 1"),
    "no sigmas": lambda d: d["schedules"]["4"].pop("sigmas"),
    "half an interval": lambda d: d["schedules"]["4"].update(cost_interval=[0.5]),
    "an interval of no number": lambda d: d["schedules"]["4"].pop("samples_needed"),
    "N = 04": lambda d: d["schedules"].update({"04": d["schedules"]["4"]}),
    "a negative cost": lambda d: d["schedules"]["4"].update(cost=-1.0),
    "what was tried of no name": lambda d: d["tried"]["4"][0].pop("name"),
    "a plan of two kinds": lambda d: d["tried"]["4"][0]["plan"].update(schedule={}, solver={}),
    "a negative number of samples": lambda d: d["tried"]["4"][0].update(samples=-1),
    "skipped as a list": lambda d: d["provenance"]["effort"].update(skipped=["stock"]),
    "a number of samples as text": lambda d: d["provenance"]["effort"].update(samples="8"),
    "a negative error": lambda d: d["verified"]["4"]["fitted"].update(error=-1.0),
    "a solver of no name": lambda d: d["solvers"]["4"].pop("name"),
    "another encoding": lambda d: d["cost"].update(encoding="hex"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_what_the_schema_refuses_is_not_read(damage, saved):
    data = json.loads(saved.read_text())
    damage(data)
    del data["sha256"]
    saved.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"^path: expected .*card.boss.json"):
        fk.Calibration.load(saved)
    jsonschema = pytest.importorskip("jsonschema")
    with pytest.raises(jsonschema.ValidationError):
        validate(data)


def test_what_was_tried_has_the_evaluations_of_its_number(saved):
    data = json.loads(saved.read_text())
    data["tried"]["3"] = data["tried"]["4"]
    del data["sha256"]
    saved.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"tried.3\[0\].plan: expected one of 3 evaluations, got 4"):
        fk.Calibration.load(saved)


def test_a_card_is_edited_on_purpose(saved):
    """Refused as it is, with what to do; that works."""
    data = json.loads(saved.read_text())
    data["provenance"]["name"] = "mine"
    saved.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"boss.json is damaged .*edited on purpose .* without its entry 'sha256'"):
        fk.Calibration.load(saved)
    del data["sha256"]
    saved.write_text(json.dumps(data))
    with pytest.warns(UserWarning, match="has no sha256, as files of earlier versions and edited ones"):
        cal = fk.Calibration.load(saved)
    cal.save(saved)
    assert fk.Calibration.load(saved).provenance["name"] == "mine"


@pytest.mark.parametrize("free", [False, True], ids=["", "free start"])
def test_a_reader_without_the_library(saved, free):
    """As docs/card.md has it."""
    if free:
        free_start().save(saved)
    cal = fk.Calibration.load(saved)
    data = json.loads(saved.read_text())
    found = data.pop("sha256")
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(text.encode()).hexdigest() == found
    schedule, solver = data["schedules"]["4"], data["solvers"]["4"]
    assert schedule["sigmas"] == (1 - cal[4].times).tolist()
    assert free or data["best"]["4"] == min(cal.verified[4], key=cal.verified[4].get)
    field, x0, past = linear_field(), normal(3, 4), []
    x = x0.double()
    starts = solver.get("start_coefficients", [1.0] * len(solver["model_times"]))
    for row, t, a in zip(solver["coefficients"], solver["model_times"], starts, strict=True):
        past.append(field(x.float(), torch.full((3,), t)).double())
        x = a * x0 + sum(b * v for b, v in zip(row, past, strict=False))
    torch.testing.assert_close(x.float(), fk.sample(field, x0, cal.solvers[4]), rtol=1e-5, atol=1e-6)
    K = len(data["times"]) - 1
    cost = np.full((K + 1, K + 1), np.inf)
    cost[np.triu_indices(K + 1, 1)] = np.frombuffer(base64.b64decode(data["cost"]["data"]), "<f8")
    assert torch.from_numpy(cost).equal(cal.cost)
    steps = schedule["indices"]
    assert schedule["cost"] == pytest.approx(sum(cost[j, k] for j, k in itertools.pairwise(steps)))
