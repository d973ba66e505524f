"""Exports: what a receiver makes of them, by small readers that are written here as the receivers read and sample, and
by the packages themselves where they are there, is what `fk.sample` makes of the plan."""

import itertools
import json
import re
from functools import partial

import numpy as np
import pytest
import torch
from _flows import linear_field, normal
from numpy.polynomial import Polynomial

import flowkernels as fk
from flowkernels.cli.main import main
from flowkernels.integrations.export import RECEIVERS, Export

KNOTS = [0, 0.1, 0.3, 0.62, 1]
LATE = [0.02, 0.3, 0.62, 1]  # begins at sigma = 0.98
PLANS = {
    "euler": fk.Schedule(KNOTS),
    "late": fk.Schedule(LATE),
    "almost": fk.Schedule([1e-6, 0.1, 0.3, 1]),  # as UniPC's
    "small": fk.Schedule([0, 0.5, 1 - 3e-6, 1]),  # a sigma that is written with an exponent elsewhere
    "table": fk.Solver([0, 0.5, 1], [0, 0.5], [[0.5, 0], [0.5 + 1e-15, 0.5]]),  # Euler's, but for rounding
    "heun": fk.Solver.heun(KNOTS),
    "lms 2": fk.Solver.adams_bashforth(KNOTS, 2),
    "lms 4": fk.Solver.adams_bashforth(KNOTS, 4),
    "fitted": fk.Solver(KNOTS, KNOTS[:-1], torch.eye(4).cumsum(0).tril() / 4.0, "fitted"),
    "free start": fk.Solver([0, 0.5, 1], [0, 0.5], [[0.5, 0], [0.5, 0.5]], start_coefficients=[1.0, 0.8]),
    "model times": fk.Solver.euler(KNOTS, model_times=[0.01, 0.1, 0.3, 0.62]),
}


def k_samplers(model, x, sigmas, sampler):
    """Euler, Heun and LMS as k_diffusion.sampling has them, of a model that denoises."""
    past, order = [], int((re.findall(r"\d+", sampler) or [1])[0])
    for i, (s, end) in enumerate(itertools.pairwise(sigmas)):
        d = (x - model(x, s)) / s
        past.append(d)
        if sampler.startswith("heun") and end > 0:
            other = x + d * (end - s)
            d = (d + (other - model(other, end)) / end) / 2
        if sampler.startswith("lms"):
            p = min(i + 1, order)
            nodes = [float(sigmas[i - j]) for j in range(p)]
            for j in range(p):
                through = [Polynomial([-o, 1]) / (nodes[j] - o) for o in nodes if o != nodes[j]]
                integral = np.prod([Polynomial([1.0]), *through]).integ()
                x = x + past[i - j] * (integral(float(end)) - integral(float(s)))
        else:
            x = x + d * (end - s)
    return x


def denoiser(v):
    return lambda x, sigma: x + sigma * v(x, (1 - torch.as_tensor(sigma)).expand(len(x)))


def scaled(v, noise, sigmas, sampler):
    """ComfyUI and stable-diffusion.cpp: of an empty latent, sigma times the noise at first."""
    return k_samplers(denoiser(v), sigmas[0] * noise, sigmas, sampler)


def comfy(made, v, noise):
    sigmas = [float(i) for i in re.findall(r"[-+]?(?:\d*\.*\d+)", made.value)]  # ManualSigmas
    return scaled(v, noise, torch.FloatTensor(sigmas), made.sampler)


def sdcpp(made, v, noise):
    words = made.value.split()
    options = dict(zip(words[::2], words[1::2], strict=True))
    sigmas = torch.tensor([float(part) for part in options["--sigmas"].split(",")])
    assert int(options["--steps"]) == len(sigmas) - 1
    extra = dict(part.split("=") for part in options.get("--extra-sample-args", "lms_max_order=1").split(","))
    assert ("lms" in options["--sampling-method"]) == (extra.get("lms_shift") == "0")
    return scaled(v, noise, sigmas, options["--sampling-method"] + extra["lms_max_order"])


def k_diffusion(made, v, noise):
    assert made.value.dtype == torch.float32
    assert made.sampler in made.words
    return k_samplers(denoiser(v), noise, made.value, made.sampler)


def timegrid(made, v, noise):
    odeint = pytest.importorskip("torchdiffeq").odeint
    return odeint(lambda t, x: v(x, t.expand(len(x))), noise, made.value, method="euler")[-1]


def loop(made, v, noise):
    tables = made.value if made.to == "numpy" else json.loads(made.text)
    x, past = noise.double(), []
    rows = tables["model_times"], tables["start_coefficients"], np.asarray(tables["coefficients"])
    for t, a, row in zip(*rows, strict=True):
        past.append(v(x, torch.full((len(x),), t, dtype=x.dtype)).double())
        x = a * noise + sum(b * u for b, u in zip(row, past, strict=False))
    np.testing.assert_allclose(tables["sigmas"], 1 - np.asarray(tables["times"]))
    return x.float()


def scheduler(set_timesteps, v, noise, scheduler):
    set_timesteps()
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(-v(x, (1 - t / 1000).expand(len(x))), t, x).prev_sample  # which has noise - data
    return x


def diffusers(made, v, noise):
    return scheduler(partial(made.value.set_timesteps, made.solver.evaluations), v, noise, made.value)


PLANS_ALONE = [to for to, of in RECEIVERS.items() if not of.all_steps]  # comfy-nodes: test_comfy.py
READERS = dict(zip(PLANS_ALONE, (diffusers, comfy, sdcpp, k_diffusion, timegrid, loop, loop), strict=True))
RUN = {  # what each runs as it is
    **{to: list(PLANS) for to in ("diffusers", "numpy", "json")},
    "comfy": ["euler", "almost", "small", "table", "heun"],
    "sdcpp": ["euler", "almost", "small", "table", "heun", "lms 2", "lms 4"],
    "k-diffusion": ["euler", "late", "almost", "small", "table", "heun", "lms 2", "lms 4"],
    "timegrid": ["euler", "late", "almost", "small", "table"],
}


@pytest.mark.parametrize("to", PLANS_ALONE)
@pytest.mark.parametrize("name", PLANS)
def test_a_receiver_runs_the_plan_or_it_is_refused(to, name):
    plan, field, noise = PLANS[name], linear_field(), normal(5, 4)
    v = lambda x, t: (field(x.float(), t.float()) + torch.sin(3 * x.float())).to(x.dtype)  # noqa: E731
    if name in RUN[to]:
        torch.testing.assert_close(
            READERS[to](Export(plan, to), v, noise), fk.sample(v, noise, plan), rtol=1e-5, atol=2e-6
        )
        return
    with pytest.raises(
        ValueError, match=r"^plan: expected (a start at sigma = 1|a solver that .* has .*), got .*knots_only"
    ):
        fk.export(plan, to)
    made, start = Export(plan, to, knots_only=True), noise
    assert "left out" in made.words or "begins at sigma" in made.words
    if name == "late":
        start = 0.98 * noise if RECEIVERS[to].scales else noise
    expected = fk.sample(v, start, getattr(plan, "times", plan))
    torch.testing.assert_close(READERS[to](made, v, noise), expected, rtol=1e-5, atol=2e-6)


def calibration():
    cal = fk.calibrate(linear_field(), normal(32, 4), 12, [2, 4], progress=False)
    cal.solvers[4] = PLANS["fitted"]
    return cal


def test_the_best_of_a_calibration_and_how_much_is_lost():
    cal = calibration()
    with pytest.raises(ValueError, match=r"^steps: expected one of \[2, 4\], got None"):
        fk.export(cal, "comfy")
    assert fk.export(cal, "timegrid", steps=2).tolist() == cal[2].times.float().tolist()
    with pytest.raises(ValueError, match=r"^plan: .*'fitted' of 4 steps, .* lost .how much worse is not known"):
        fk.export(cal, "comfy", steps=4)
    assert fk.export(cal, "timegrid", steps=4, knots_only=True).tolist() == cal[4].times.float().tolist()
    cal.add_verified({4: {"uniform": 2.0, "bellman": 3.0, "fitted": 0.5}})
    with pytest.raises(ValueError, match=r"^plan: .*0.5 with it, 2 without: endpoint errors on the verification"):
        fk.export(cal, "comfy", steps=4)
    assert fk.export(cal, "comfy", steps=4, knots_only=True) == "1.0, 0.75, 0.5, 0.25, 0.0"
    fit = fk.Solver(
        KNOTS, KNOTS[:-1], PLANS["fitted"].coefficients, "fitted", {"held_out": {"fitted": 1.0, "euler": 4.0}}
    )
    with pytest.raises(ValueError, match=r"1 with it, 4 without: endpoint errors on the held-out"):
        fk.export(fit, "sdcpp")


def test_knots_are_of_a_schedule_whatever_solvers_were_tried(tmp_path):
    """Those that were verified too, among them the best under the name that it was tried by, as it is of a file."""
    options = dict(effort="fit", verify_noise=normal(16, 4, seed=5), progress=False)
    cal = fk.calibrate(linear_field(), normal(32, 4), 12, [4], **options)
    cal.save(tmp_path / "c.boss.json")
    for each in (cal, fk.Calibration.load(tmp_path / "c.boss.json")):
        assert list(each.choices(4)) == list(cal.choices(4))
        errors = each.errors(4)
        assert errors["fitted"] < errors["uniform, adams-bashforth 2"] < min(errors["uniform"], errors["bellman"])
        best = min(("bellman", "uniform"), key=errors.get)
        said = re.escape(f"{errors['fitted']:.3g} with it, {errors[best]:.3g} without")
        with pytest.raises(ValueError, match=said):
            fk.export(each, "timegrid", steps=4)
        knots = fk.export(each, "timegrid", steps=4, knots_only=True)
        assert torch.equal(knots, each.choices(4)[best].times.float())


@pytest.mark.parametrize(
    ("plan", "to", "message"),
    [
        (fk.Solver.heun(4, inverse=True), "numpy", "plan: expected a solver from noise to data"),
        (fk.Solver.euler(4, inverse=True), "comfy", "plan: expected a solver from noise to data"),
        ([0, 0.5, 0.5 + 1e-9, 1], "comfy", "plan: expected knots whose sigmas differ in float32"),
        ([0, 0.5, 0.5 + 1e-9, 1], "timegrid", "plan: expected knots that differ in float32"),
        ([0, 1], "a1111", "to: expected 'diffusers', 'comfy', .* or 'json', got a1111"),
    ],
)
def test_what_is_refused(plan, to, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        fk.export(plan, to)
    with pytest.raises(ValueError, match=r"^steps: expected None for a plan that is no Calibration, got 4"):
        fk.export(4, "comfy", steps=4)


@pytest.mark.parametrize("to", [to for to in PLANS_ALONE if to != "diffusers"])
def test_files(to, tmp_path):
    value = fk.export(KNOTS, to, path=tmp_path / f"a{RECEIVERS[to].suffixes[0]}")
    path = tmp_path / f"a{RECEIVERS[to].suffixes[0]}"
    if path.suffix == ".txt":
        assert path.read_text() == f"{value}\n"
    elif path.suffix == ".pt":
        assert torch.load(path, weights_only=True).equal(value)
    elif path.suffix == ".npz":
        assert {k: a.tolist() for k, a in np.load(path).items()} == {k: a.tolist() for k, a in value.items()}
    else:
        assert json.loads(path.read_text()) == value
    with pytest.raises(ValueError, match=f"^path: expected a file name ending in .*{path.suffix}.*, got .*a.x"):
        fk.export(KNOTS, to, path=tmp_path / "a.x")
    if to == "comfy":
        fk.export(KNOTS, to, path=tmp_path / "b.json")
        sigmas = torch.FloatTensor(json.loads((tmp_path / "b.json").read_text())["sigmas"])
        assert sigmas.equal((1 - torch.tensor(KNOTS, dtype=torch.float64)).float())


def test_a_scheduler_folder(tmp_path):
    """Loads again, beside it the sigmas for the stock scheduler; no other folder is replaced."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    from flowkernels.integrations import diffusers as ours

    field, noise, folder = linear_field(), normal(3, 4), tmp_path / "scheduler"
    for plan in (PLANS["fitted"], PLANS["euler"]):
        fk.export(plan, "diffusers", path=folder)
        again = ours.SolverScheduler.from_pretrained(folder)
        assert torch.equal(again.solver.coefficients, fk.Solver.of(plan).coefficients)
    assert sorted(p.name for p in folder.iterdir()) == ["scheduler_config.json", "sigmas.json"]
    stock, sigmas = FlowMatchEulerDiscreteScheduler(), json.loads((folder / "sigmas.json").read_text())["sigmas"]
    found = scheduler(partial(stock.set_timesteps, sigmas=sigmas), field, noise, stock)
    torch.testing.assert_close(found, fk.sample(field, noise, plan), rtol=1e-5, atol=1e-6)
    (tmp_path / "model_index.json").touch()
    with pytest.raises(ValueError, match=r"^path: expected a folder outside of a pipeline's .*scheduler, of a pip"):
        fk.export(plan, "diffusers", path=folder)
    (tmp_path / "model_index.json").unlink()
    (folder / "mine").touch()
    with pytest.raises(ValueError, match=r"^path: expected a new folder, or one .* alone, got .* with 'mine' in it"):
        fk.export(plan, "diffusers", path=folder)
    with pytest.raises(NotADirectoryError, match=r"^path: expected a folder, got the file"):
        fk.export(plan, "diffusers", path=folder / "mine")


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    calibration().save("m.boss.json")
    assert main(["export", "m.boss.json", "--to", "sdcpp", "--steps", "2"]) == 0
    out, err = capsys.readouterr()
    assert out == f"{fk.export(calibration()[2], 'sdcpp')}\n"
    assert err.startswith("sdcpp: arguments of stable-diffusion.cpp")
    assert main(["export", "m.boss.json", "--to", "diffusers", "--steps", "4", "--out", "scheduler"]) == 0
    assert capsys.readouterr().out == "scheduler: 4 steps, 4 evaluations (fitted)\n"
    from diffusers import FlowMatchEulerDiscreteScheduler as Stock

    Stock(shift=3.0, invert_sigmas=True).save_pretrained("stock/scheduler")  # as Mochi's
    (tmp_path / "stock/model_index.json").write_text("{}")
    assert main(["export", "m.boss.json", "--to", "diffusers", "--like", "stock", "--out", "scheduler"]) == 0
    assert capsys.readouterr().out == "scheduler: 2, 4 steps, the best of each\n"
    every = fk.export(calibration(), "diffusers", like=Stock(invert_sigmas=True))
    every.set_timesteps(4)
    assert every.timesteps.tolist() == pytest.approx([1000 * t for t in KNOTS[:-1]])
    config = json.loads((tmp_path / "scheduler/scheduler_config.json").read_text())
    assert sorted(config["solvers"]) == ["2", "4"]
    assert config["invert_sigmas"]
    for line, message in {
        "m.boss.json --to comfy --steps 4": "--to: expected a solver that 'comfy' has .*; --knots-only exports",
        "m.boss.json --to comfy --steps 3": "--steps: expected one of",
        "m.boss.json --to numpy --steps 4": "--out: expected a place for what numpy takes",
        "m.boss.json --to json --steps 4 --out m.boss.json": "--out: expected another file than FILE",
        "m.boss.json --to comfy --steps 2 --out a.png": "--out: expected a file name ending in .txt or .json",
        "m.boss.json --to diffusers --like none --out a": "--like: expected a file, got none/scheduler_config.json",
        "m.boss.json --to comfy --steps 2 --like stock": "--like: expected None for 'comfy'",
        "none --to comfy": "FILE: expected a file, got none",
        "scheduler/scheduler_config.json --to comfy": "FILE: expected a file of format",
    }.items():
        assert main(["export", *line.split()]) == 2
        assert re.search(f"error: {message}", capsys.readouterr().err), line
