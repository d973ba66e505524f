"""The command line, end to end on tiny settings, and the demo's report folder."""

import base64
import contextlib
import functools
import importlib
import importlib.metadata
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import _host_cuda
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import flowkernels as fk
from flowkernels._files import whole_folder
from flowkernels.cli import demo, inputs, report
from flowkernels.cli.main import main
from flowkernels.models.bundled import BUNDLED, load_network, network_notes
from flowkernels.ops import tuned
from flowkernels.ops.public import OPS
from flowkernels.runtime import backends

MODULE = """
import torch
import flowkernels as fk
from flowkernels.models.networks import ResidualMLP

def network():
    torch.manual_seed(0)
    return ResidualMLP(dim=12, width=16, blocks=1, time_width=8)

def field():
    return fk.VelocityField(network(), reverse_time=True, time_scale=1000)

def function():
    return lambda x, t: -x * t.view(-1, 1, 1, 1)

class Stateful(torch.nn.Linear):
    def forward(self, x, t):
        return super().forward(x)

    def get_extra_state(self):
        return {"version": 2}

    def set_extra_state(self, state):
        pass

def stateful():
    return Stateful(8, 8)

class Labelled(torch.nn.Linear):
    def forward(self, x, t, label):
        return super().forward(x) * t.view(-1, 1) * label

def guided():
    torch.manual_seed(0)
    labels = {"conditioning": {"label": torch.ones(1, 1)}, "unconditional": {"label": torch.zeros(1, 1)}}
    return fk.VelocityField(Labelled(8, 8), guidance=4.0, **labels)

def number():
    return 3

def breaks():
    def velocity(x, t):
        raise KeyError("no such layer")
    return velocity
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with a module of models in it."""
    (tmp_path / "some_models.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "some_models", raising=False)
    monkeypatch.delenv("FLOWKERNELS_DEBUG", raising=False)
    return tmp_path


@pytest.fixture
def run(folder, capsys):
    """Run a command line that succeeds; returns (stdout, stderr) without progress bars."""

    def run(line: str) -> tuple[str, str]:
        code = main(line.split())
        out, err = capsys.readouterr()
        assert code == 0, err
        return out, "\n".join(part for part in re.split(r"[\r\n]", err) if part.startswith("flowkernels"))

    return run


@pytest.fixture
def fails(folder, capsys):
    """Run a command line that fails; returns its one line on stderr."""

    def fails(line: str) -> str:
        assert main(line.split()) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("flowkernels: error: ")
        assert err.count("\n") == 1
        return err

    return fails


@pytest.fixture
def calibrated(run):
    return run("calibrate --model digits -n 16 --grid 10 --steps 1-3,5 --seed 3 --out a.boss.json")


# calibrate, straighten, sample


def test_calibrate_writes_the_calibration(calibrated):
    out, err = calibrated
    calibration = fk.Calibration.load("a.boss.json", BUNDLED["digits"].load())
    assert list(calibration) == [1, 2, 3, 5]
    assert str(calibration) in out
    assert not err
    assert calibration.provenance["seed"] == 3
    noise = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    direct = fk.calibrate(BUNDLED["digits"].load(), noise, 10, 3, progress=False)
    assert direct[3] == calibration[3]


@pytest.mark.parametrize("suffix", [".safetensors", ".npy", ".pt", ".png"])
def test_sample_formats(run, calibrated, suffix):
    run(f"sample --model digits --schedule a.boss.json --steps 3 -n 5 --seed 7 --chunk 2 --out x{suffix}")
    noise = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(7))
    expected = fk.sample(BUNDLED["digits"].load(), noise, fk.Calibration.load("a.boss.json")[3])
    if suffix == ".png":
        image = Image.open("x.png")
        assert image.size == (3 * 64 + 2 * 2, 2 * 64 + 2)
        first = np.asarray(image.convert("L"))[4:64:8, 4:64:8]
        assert np.abs(first - (expected[0, 0].clamp(-1, 1).numpy() + 1) * 127.5).max() <= 0.6
        return
    read = {
        ".safetensors": lambda: load_file("x.safetensors")["samples"],
        ".npy": lambda: torch.from_numpy(np.load("x.npy")),
        ".pt": lambda: torch.load("x.pt", weights_only=True),
    }
    torch.testing.assert_close(read[suffix](), expected, rtol=1e-5, atol=1e-5)


def test_sample_uniform_and_colour(run):
    run("sample --model some_models:network --shape 3,2,2 --steps 4 -n 3 --out x.png")
    assert Image.open("x.png").mode == "RGB"
    run("sample --model some_models:function --shape 3,2,2 --steps 4 -n 3 --out x.npy")
    noise = torch.randn(3, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    steps = torch.tensor([1, 15 / 16, 7 / 8, 13 / 16]).prod()
    np.testing.assert_allclose(np.load("x.npy"), noise * steps, rtol=1e-5)


def test_calibrate_fits_and_verifies(run, fails):
    of = "--grid 12 --steps 2,4 -n 48 --effort fit --verify-noise 24"
    out, _ = run(f"calibrate --model digits {of} --out fitted.boss.json")
    cal = fk.Calibration.load("fitted.boss.json")
    assert sorted(cal.solvers) == [2, 4]
    assert cal.verified[4]["fitted"] < cal.verified[4]["uniform"]
    assert str(cal) in out
    assert f"{cal.verified[4]['uniform']:.4g}" in out
    assert "2 schedules and 2 solvers from 48 noises" in out
    net, noise = BUNDLED["digits"].load(), torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    best = cal.best(4)
    assert best.name in ("fitted", "adams-bashforth 2")
    plans = {"best": best, "ab2": fk.Solver.adams_bashforth(cal[4], 2), "heun": fk.Solver.heun(cal[4])}
    for method, plan in plans.items():
        how = f"--schedule fitted.boss.json --steps 4 --method {method} -n 3 --out x.npy"
        out, _ = run(f"sample --model digits {how}")
        assert f"4 steps, {plan.evaluations} evaluations ({plan.name})" in out
        torch.testing.assert_close(torch.from_numpy(np.load("x.npy")), fk.sample(net, noise, plan))
    assert "--method: expected --schedule FILE" in fails("sample --model digits --steps 4 --method best --out x.npy")


def test_calibrate_with_a_budget(run, fails):
    command = "calibrate --model digits --grid 8 --steps 2 -n 16 --effort best"
    out, _ = run(f"{command} --evaluations 9000 --out best.boss.json")
    cal = fk.Calibration.load("best.boss.json")
    assert cal.report() in out
    assert cal.provenance["effort"]["evaluations"] <= 9000
    assert any(c.name.startswith("stock") for c in cal.tried[2])
    assert "--evaluations: expected at least 192" in fails(f"{command} --evaluations 100 --out x.json")
    assert "--minutes: expected None" in fails("calibrate --model digits --minutes 1 --out x.json")


def test_a_grid_that_begins_late_and_a_forced_knot(run, fails):
    calibrate = "calibrate --model digits -n 8 --grid 0.2,0.3,0.45,0.6,0.8,1"
    out, _ = run(f"{calibrate} --knot 0.45 --steps 2,3 --out late.json")
    assert "2 schedules from 8 noises and 5 fine steps" in out
    cal = fk.Calibration.load("late.json")
    assert cal.forced_knots == (0.45,)
    assert cal[2].times.tolist() == [0.2, 0.45, 1.0]
    run("sample --model digits --schedule late.json --steps 3 -n 2 --out x.npy")
    net, noise = BUNDLED["digits"].load(), torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.from_numpy(np.load("x.npy")), fk.sample(net, noise, cal[3]))
    assert "--knot: expected times of the grid, got 0.5" in fails(f"{calibrate} --knot 0.5 --steps 2 --out x.json")
    told = "--steps: expected at least 2, one more than --knot, got 1"
    assert told in fails(f"{calibrate} --knot 0.45 --steps 1 --out x.json")
    assert "--grid: expected times from 0 (noise)" in fails("calibrate --model digits --grid 0.2,0.9 --out x.json")


def test_straighten_and_sample_the_student(run, calibrated):
    schedule = "--schedule a.boss.json --steps 3"
    out, err = run(
        f"straighten --model digits {schedule} --iterations 6 --batch 8 --bank 16 --lr 1e-3 --warmup 0 --ema 0.5 "
        "--out student.safetensors"
    )
    assert "student.safetensors: straightened for 3 steps" in out
    assert not err
    student, teacher = load_network("student.safetensors"), BUNDLED["digits"].load()
    assert any(not torch.equal(a, b) for a, b in zip(student.parameters(), teacher.parameters(), strict=True))
    # the teacher's schedule is the student's: no warning; other knots or another model: a warning
    sample = "sample --model digits --checkpoint student.safetensors"
    assert not run(f"{sample} {schedule} --out x.npy")[1]
    assert "straightened for the knots" in run(f"{sample} --steps 5 --out x.npy")[1]
    whole = f"straighten --model digits {schedule} --iterations 2 --batch 4 --bank 4"
    run(f"{whole} --target distill --loss huber_per_element --out distilled.safetensors")
    run(f"{whole} --target reflow --t-sampling u_shaped --loss cauchy --out reflowed.safetensors")
    run(f"{whole} --target next_knot --substeps 2 --out next.safetensors")
    assert not run(f"sample --model digits --checkpoint next.safetensors {schedule} --out x.npy")[1]
    told = [run(f"sample --model digits --checkpoint {f}.safetensors --steps 5 --out x.npy")[1] for f in
            ("distilled", "reflowed")]  # fmt: skip
    assert "straightened for the knots 0 1" in told[0]
    assert not told[1]
    save_file(student.state_dict(), "plain.safetensors")
    assert "another one" in run(f"sample --model digits --checkpoint plain.safetensors {schedule} --out x.npy")[1]


def test_guidance_that_a_student_has_learned_is_not_applied_again(run, folder):
    line = "--model some_models:guided --schedule g.json --steps 2"
    run("calibrate --model some_models:guided --shape 8 -n 16 --grid 8 --steps 2 --out g.json")
    run(f"straighten {line} --batch 8 --bank 16 --iterations 6 --warmup 0 --lr 1e-2 --out g.safetensors")
    out, _ = run(f"sample {line} --checkpoint g.safetensors -n 5 --seed 2 --out g.npy")
    assert "which is not applied once more" in out
    sys.path.insert(0, str(folder))
    field = importlib.import_module("some_models").guided()
    field.net.load_state_dict(load_file("g.safetensors"))
    field.guidance = 1.0
    expected = fk.sample(field, inputs.draw_noise(5, (8,), 2), fk.Calibration.load("g.json")[2])
    torch.testing.assert_close(torch.from_numpy(np.load("g.npy")), expected)


@pytest.mark.parametrize("model", ["network", "field"])
def test_own_model_from_calibration_to_samples(run, model):
    run(f"calibrate --model some_models:{model} --shape 3,2,2 -n 8 --grid 8 --steps 2,4 --out m.json")
    line = f"--model some_models:{model} --schedule m.json --steps 2"
    short = "--batch 4 --bank 8 --iterations 4"
    run(f"straighten {line} {short} --state t.pt --out s.safetensors")
    resumed = run(f"straighten {line} {short} --state t.pt --resume --out r.safetensors")[0]
    assert "straightened" in resumed
    assert all(torch.equal(v, load_file("r.safetensors")[k]) for k, v in load_file("s.safetensors").items())
    # the shape comes from the calibration, the weights from either kind of file
    run(f"sample {line} --checkpoint s.safetensors -n 3 --out a.npy")
    torch.save(load_file("s.safetensors"), "s.pt")
    run(f"sample {line} --checkpoint s.pt -n 3 --out b.npy")
    assert np.load("a.npy").shape == (3, 3, 2, 2)
    assert np.array_equal(np.load("a.npy"), np.load("b.npy"))
    # and from what repositories write: averages beside raw weights, and folders
    weights = load_file("s.safetensors")
    torch.save({"model": {k: v + 1 for k, v in weights.items()}, "ema": weights}, "e.ckpt")
    Path("shards").mkdir()
    save_file({f"model.{k}": v for k, v in weights.items()}, "shards/m.safetensors")
    for checkpoint, said in (("e.ckpt", "averaged weights 'ema'"), ("shards", "raw weights 'model'")):
        assert said in run(f"sample {line} --checkpoint {checkpoint} -n 3 --out c.npy")[0]
        assert np.array_equal(np.load("a.npy"), np.load("c.npy"))
    run(f"sample {line} --checkpoint e.ckpt --prefer raw -n 3 --out d.npy")
    assert not np.array_equal(np.load("a.npy"), np.load("d.npy"))


# Bad input


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("", "COMMAND"),
        ("nonsense", "nonsense"),
        ("calibrate --model digits", "--out"),
        ("calibrate --model digits --steps 4-2 --out x.json", "got '4-2'"),
        ("calibrate --model digits --steps 0 --out x.json", "at least 1, got '0'"),
        ("calibrate --model digits --grid 5 --out x.json", "--steps: expected at most --grid 5, got 10"),
        ("calibrate --model digits -n -3 --out x.json", "-n"),
        ("calibrate --model digits --out none/x.json", "--out: expected a folder that exists"),
        ("calibrate --model digits --out .", "--out: expected a file, got the folder"),
        ("calibrate --model digits --device nonsense --out x.json", "--device"),
        ("calibrate --model letters --out x.json", "--model: expected digits or fashion or module:function"),
        ("calibrate --model no_module:f --out x.json", "No module named 'no_module'"),
        ("calibrate --model some_models:none --out x.json", "has no attribute 'none'"),
        ("calibrate --model some_models:number --out x.json", "to return a callable, got int"),
        ("calibrate --model some_models:network --out x.json", "--shape: expected the shape"),
        ("calibrate --model some_models:network --shape 3,3 --out x.json", "failed on one sample of shape [3, 3]"),
        ("calibrate --model some_models:breaks --shape 3 --out x.json", "KeyError: 'no such layer'"),
        ("sample --model digits --steps 4 --out x.gif", "--out: expected a file name ending in .safetensors or"),
        ("sample --model some_models:network --shape 12 --steps 4 --out x.png", "[1 or 3, H, W]"),
        ("sample --model digits --steps 4 --schedule none.json --out x.npy", "--schedule: expected a file"),
        ("sample --model digits --steps 4 --schedule some_models.py --out x.npy", "truncated or not JSON"),
        ("sample --model digits --steps 4 --schedule a.json --out x.npy", "--steps: expected one of [2, 3]"),
        ("sample --model digits --steps 4 --checkpoint none.pt --out x.npy", "--checkpoint: expected a file"),
        ("sample --model digits --steps 4 --checkpoint some_models.py --out x.npy", "--checkpoint: expected a safe"),
        ("sample --model digits --steps 4 --checkpoint bad.safetensors --out x.npy", "--checkpoint: expected a safe"),
        ("sample --model some_models:function --checkpoint a.pt --steps 4 --out x.npy", "that is a torch.nn.Module"),
        ("straighten --model digits --schedule a.json --steps 3 --out x.pt", "ending in .safetensors"),
        ("straighten --model digits --schedule a.json --steps 3 --resume --out x.safetensors", "--resume: expected"),
        ("straighten --model digits --schedule a.json --steps 3 --state a.pt --out x.safetensors", "a.pt exists"),
        ("straighten --model digits --schedule a.json --steps 3 --lr -1 --out x.safetensors", "lr: expected"),
        ("straighten --model some_models:function --schedule a.json --steps 3 --out x.safetensors", "Module to train"),
        (
            "straighten --model some_models:stateful --schedule a.json --steps 3 --out x.safetensors",
            "'_extra_state' is",
        ),
        ("demo --out none/report", "out: expected a place in a folder that exists"),
        ("demo --out .", "expected a new folder or a previous report"),
        ("demo --out some_models.py", "out: expected a folder, got the file"),
    ],
)
def test_bad_input_is_one_line_before_any_work(fails, folder, monkeypatch, line, told):
    noise = torch.randn(4, 1, 8, 8)
    fk.calibrate(BUNDLED["digits"].load(), noise, 5, (2, 3), progress=False).save("a.json")
    torch.save({}, "a.pt")
    (folder / "bad.safetensors").write_bytes(b"\xff" * 40)
    before = sorted(folder.iterdir())

    def work(*args, **kwargs):
        raise AssertionError("work has started")

    monkeypatch.setattr(fk, "calibrate", work)
    monkeypatch.setattr(fk, "sample", work)
    monkeypatch.setattr("flowkernels.training.bank.teacher_states.TeacherStates.flow", work)
    assert told in fails(line)
    assert sorted(p for p in folder.iterdir() if p.name != "__pycache__") == before


def test_checkpoint_that_does_not_fit_names_the_keys(fails):
    state = BUNDLED["digits"].load().state_dict()
    state["extra"] = state.pop("input.bias")
    state["output.bias"] = torch.zeros(3)
    save_file(state, "x.safetensors")
    error = fails("sample --model digits --checkpoint x.safetensors --steps 2 --out x.npy")
    assert "1 missing (input.bias); 1 unexpected (extra); 1 mis-shaped (output.bias [3] for [64])" in error


def test_debug_shows_the_traceback(folder, monkeypatch):
    monkeypatch.setenv("FLOWKERNELS_DEBUG", "1")
    with pytest.raises(ValueError, match="out: expected a folder"):
        main(["demo", "--out", "some_models.py"])


def test_interrupt(folder, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", interrupt)
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == "flowkernels: interrupted\n"


REFUSED = {
    "calibrate": "--grid 99999999999 --grid 0 --max-regret nan --max-regret inf --max-regret 0 --seed 2e3 --chunk 0 "
    "-n 1e3",
    "straighten": "--lr nan --lr 0 --lr inf --ema 1.5 --ema nan --clip -1 --clip inf --warmup -5 --batch 0 --steps 0 "
    "--seed 1208925819614629174706176 --bank 10000000000 --refresh 0 --iterations 99999999999999999999999 --decay fast",
    "sample": "--steps 0 --seed x --chunk -1 --method rk4 --device nowhere -n 0 --shape 0",
    "bench": "--threads 0 --seconds nan --minutes -1 --seeds 0",
    "record": "--calls 0 --max-gb inf",
    "replay": "--threads 99999 --seconds 0",
    "tune": "--minutes 0",
}
GIVEN = {
    "calibrate": "--model digits --out x.json",
    "straighten": "--model digits --schedule a.json --steps 2 --out x.safetensors",
    "sample": "--model digits --steps 2 --out x.npy",
    "record": "euler_step --from some_models.py",
    "replay": "x.safetensors",
}


@pytest.mark.parametrize(
    "line",
    [
        f"{command} {GIVEN.get(command, '')} {option} {value}"
        for command, options in REFUSED.items()
        for option, value in zip(*[iter(options.split())] * 2, strict=True)
    ],
)
def test_an_option_is_refused_as_it_is_parsed(fails, monkeypatch, line):
    monkeypatch.setattr(inputs, "_build_model", lambda spec: pytest.fail("the model was loaded"))
    monkeypatch.setattr("flowkernels.cli.main.load_calibration", lambda args: pytest.fail("the calibration was loaded"))
    option, value = line.split()[-2:]
    assert re.match(
        rf"flowkernels: error: {option}: (expected .*got|invalid choice:) '{re.escape(value)}'", fails(line)
    )


FAILING = {  # a module of models -> (what is said, the place in it)
    "import": ("import torch\n1 / 0", "cannot import 'failing:build': ZeroDivisionError: division by zero", 2),
    "syntax": ("def build(:", "cannot import 'failing:build': SyntaxError: invalid syntax (failing.py, line 1)", None),
    "exit": ("raise SystemExit('no weights')", "cannot import 'failing:build': SystemExit: no weights", 1),
    "nothing": ("build = None", "failing:build failed when it was called: TypeError: 'NoneType' object is not", None),
    "build": ("def build():\n    return {}['net']", "failing:build failed when it was called: KeyError: 'net'", 2),
    "call": (
        "import torch\ndef build():\n    def f(x, t):\n        return torch.linalg.inv(x)\n    return f",
        "failing:build failed on one sample of shape [2, 3]: RuntimeError: linalg.inv",
        4,
    ),
    "signature": (
        "def build():\n    return lambda x: x",
        "TypeError: velocity: expected a callable velocity(x, t)",
        None,
    ),
}


@pytest.mark.parametrize("what", FAILING)
def test_a_failing_model_is_told_with_its_place(fails, folder, monkeypatch, what):
    code, told, line = FAILING[what]
    (folder / "failing.py").write_text(code)
    command = "sample --model failing:build --shape 2,3 --steps 2 --out x.npy"
    for debug in ("0", "1"):
        monkeypatch.delitem(sys.modules, "failing", raising=False)
        monkeypatch.setenv("FLOWKERNELS_DEBUG", debug)
        if debug == "1":
            with pytest.raises(inputs.InputError, match=re.escape(told)) as caught:
                main(command.split())
            assert caught.value.__cause__ is not None
            continue
        error = fails(command)
        assert error.startswith("flowkernels: error: --model: ")
        assert told in error
        assert line is None or f" at {folder / 'failing.py'}:{line}, `{code.splitlines()[line - 1].strip()}`" in error


def test_a_model_that_fails_later_is_told_with_its_place(folder, capsys):
    (folder / "later.py").write_text("def build():\n    return lambda x, t: x if len(x) < 2 else x[{}['rows']]")
    assert main(["sample", "--model", "later:build", "--shape", "3", "--steps", "2", "-n", "4", "--out", "x.npy"]) == 2
    error = capsys.readouterr().err  # after a progress bar
    assert "Traceback" not in error
    assert f"KeyError: 'rows' at {folder / 'later.py'}:2" in error


def test_another_state_is_told_in_the_words_of_the_command_line(run, fails, calibrated):
    line = (
        "straighten --model digits --schedule a.boss.json --steps 2 --batch 2 --bank 2 --state t.pt --out s.safetensors"
    )
    run(f"{line} --iterations 1")
    run(f"{line} --iterations 2 --resume")
    others = {
        "--iterations 1": "at most iterations = 1, of a run that has done no more",
        "--iterations 2 --lr 0.1": "one of this run (lr = 0.1)",
    }
    for other, told in others.items():
        error = fails(f"{line} {other} --resume")
        assert f"--state: expected {told}" in error
        assert "another --state, without --resume, starts anew" in error
        assert "resume=False" not in error
        assert "checkpoint" not in error


def of_process(command: list[str], folder, **env) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(folder), str(Path(fk.__file__).parents[1])])
    env = os.environ | dict(PYTHONPATH=path) | env
    # where the tests run in the background, Ctrl-C is ignored, and a child inherits that
    settings = dict(preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL), env=env, cwd=folder)
    return subprocess.run(command, capture_output=True, text=True, **settings)


@pytest.mark.parametrize("how", ["module", "script", "library"])
def test_ctrl_c_while_it_imports(tmp_path, how):
    stop = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(20)"
    (tmp_path / "torch.py").write_text(stop)
    name = {"script": "flowkernels", "library": "mine"}.get(how, "")
    script = tmp_path / "bin" / name
    script.parent.mkdir(exist_ok=True)
    if name:
        script.write_text("import sys\nfrom flowkernels.cli.main import main\nsys.exit(main())")
    done = of_process(
        [sys.executable, *(["-m", "flowkernels"] if how == "module" else [str(script)]), "info"], tmp_path
    )
    if how == "library":
        assert done.stderr.endswith("KeyboardInterrupt\n")
    else:
        assert (done.returncode, done.stdout, done.stderr) == (130, "", "flowkernels: interrupted\n")


@pytest.mark.parametrize("arguments", ["info", "--help"])
def test_a_closed_pipe_is_no_error(tmp_path, arguments):
    """What is printed is buffered, so that it is written when the command ends."""
    code = f"import sys; from flowkernels.cli.main import main; sys.exit(main({arguments.split()!r}))"
    reading, writing = os.pipe()
    os.close(reading)
    env = os.environ | dict(PYTHONPATH=str(Path(fk.__file__).parents[1]), PYTHONUNBUFFERED="")
    done = subprocess.run([sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, env=env, cwd=tmp_path)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


# info


def test_info(run):
    out, _ = run("info")
    assert fk.__version__ in out
    for op in OPS:  # the CUDA kernels are not those of the tests here; Triton's are interpreted
        assert re.search(rf"^{op} +no \(1\) +yes +yes +yes$", out, re.MULTILINE)
    assert re.search(r"^\(1\) (the driver shows no GPU|this build has no CUDA kernels)", out, re.MULTILINE)
    assert f"  triton          {backends.HAS_RUN['triton']}\n" in out
    assert "  euler_step on cpu: cpu\n" in out
    assert out.endswith(f"\nconfigurations of Triton kernels: {tuned.in_words()}\n")
    told = json.loads(run("info --json")[0])
    assert told["triton_configurations"] == tuned.in_words()
    assert told["environment"]["torch"] == torch.__version__
    assert told["environment"]["triton"] == importlib.metadata.version("triton")
    assert set(told["ops"]["bellman"]) == set(told["has_run"]) == set(backends.BACKENDS)
    assert told["ops"]["bellman"]["reference"] is None
    assert told["chosen"]["cpu"] == "euler_step on cpu: cpu"


def test_info_where_what_is_asked_for_cannot_run(run):
    """It says why, which is what it is for."""
    with _host_cuda.in_place(None), backends.backend("cuda"):
        out, _ = run("info")
    error = "euler_step: backend 'cuda' was asked for, but the tensors are on cpu; move them to a CUDA GPU"
    assert f"\nwhat a call takes, such as:\n  an error: {error}\n" in out


def test_info_without_the_compiled_module_and_without_triton(run, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(backends, "extension", lambda: None)
    monkeypatch.setattr(backends, "extension_error", lambda: "ImportError: no _C")
    monkeypatch.setattr(backends, "triton_error", lambda: "Triton cannot be imported")
    out, _ = run("info")
    assert re.search(r"^velocity_gram +no \(1\) +no \(2\) +no \(3\) +yes$", out, re.MULTILINE)
    assert "(2) Triton cannot be imported\n(3) the compiled module is missing (ImportError: no _C)" in out
    assert "  euler_step on cpu: reference (not cpu: the compiled module is missing" in out


def test_module_runs_and_imports_stay_light():
    heavy = (
        "import sys, flowkernels, flowkernels.cli.main; sys.exit(any(m in sys.modules for m in ('matplotlib', 'PIL')))"
    )
    assert subprocess.run([sys.executable, "-c", heavy]).returncode == 0
    done = subprocess.run([sys.executable, "-m", "flowkernels", "--version"], capture_output=True, text=True)
    assert done.stdout == f"flowkernels {fk.__version__}\n"


# demo

QUICK = demo.Settings(
    calibration=64,
    effort="fit",
    evaluations=None,
    held_out=16,
    iterations=30,
    batch=16,
    bank=256,
    lr=2e-5,
    ema=0.9,
    grid=20,
    pictured=4,
)


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """(folder, results, what it says) of a demo on reduced settings."""
    out = tmp_path_factory.mktemp("demo") / "report"
    with contextlib.redirect_stdout(io.StringIO()) as said:
        results = demo.run("digits", out, settings=QUICK)
    return out, results, said.getvalue()


def numbers(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [n for v in value for n in numbers(v)]
    return [value] if isinstance(value, (int, float)) else []


def test_report_folder_is_complete(reported):
    out, *_ = reported
    assert {p.name for p in out.iterdir()} == report.FILES
    assert [p.name for p in out.parent.iterdir()] == ["report"]
    student, calibration = load_network(out / "student.safetensors"), fk.Calibration.load(out / "schedule.boss.json")
    solver = fk.Solver.from_dict(network_notes(out / "student.safetensors")["solver"])
    assert solver.steps == 4
    assert sorted(calibration.tried) == [2, 3, 4, 6, 8]
    assert torch.isfinite(fk.sample(student, torch.randn(2, 1, 8, 8), solver)).all()


def test_report_json(reported):
    out, results, _ = reported
    told = json.loads((out / "report.json").read_text())
    assert told["table"] == results["table"]
    assert all(math.isfinite(n) for n in numbers(told))
    assert [row["steps"] for row in told["table"]] == [2, 3, 4, 6, 8]
    assert all(0 < row["cost_bellman"] <= row["cost_uniform"] for row in told["table"])
    assert told["table"][2]["error_straightened"] > 0
    assert all(row["error_fitted"] > 0 for row in told["table"])
    assert set(told["seconds"]) == {"load", "calibrate", "evaluate", "straighten", "sample", "report", "total"}
    assert str(out.parent) not in (out / "report.json").read_text()


def test_the_demo_samples_as_the_loop_does(reported, tmp_path, monkeypatch):
    """On a fused sampler, and on the network itself: the same numbers to rounding, carried through the training.

    But for the solver that is refined behind it: its steps are accepted or not."""
    assert isinstance(demo.fused(BUNDLED["digits"].load(), 4, (1, 8, 8)), fk.FusedSampler)
    net = BUNDLED["fashion"].load()
    assert demo.fused(net, 4, (1, 28, 28)) is net

    def refuse(*args, **kwargs):
        raise fk.NotFusable

    monkeypatch.setattr(fk, "fuse", refuse)
    by_loop = demo.run("digits", tmp_path / "report", settings=QUICK, progress=False)
    table, other = reported[1]["table"], by_loop["table"]
    assert [row.keys() for row in table] == [row.keys() for row in other]
    kept = [[n for k, n in row.items() if "straightened" not in k] for row in (*table, *other)]
    assert numbers(kept[: len(table)]) == pytest.approx(numbers(kept[len(table) :]), rel=1e-3)
    losses = reported[1]["history"]["loss"], by_loop["history"]["loss"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_endpoint_errors_are_those_of_the_samples(reported):
    out, results, _ = reported
    velocity, calibration = BUNDLED["digits"].load(), fk.Calibration.load(out / "schedule.boss.json")
    noise = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    student = load_network(out / "student.safetensors")
    teacher = fk.rollout(velocity, noise, 20).x[-1]
    row = results["table"][2]
    for name, net, schedule in (
        ("uniform", velocity, 4),
        ("bellman", velocity, calibration[4]),
        ("fitted", velocity, calibration.best(4)),
        ("straightened", student, fk.Solver.from_dict(results["solver"])),
    ):
        error = sum((a - b).norm() ** 2 for a, b in zip(fk.sample(net, noise, schedule), teacher, strict=True)) / 16
        assert row[f"error_{name}"] == pytest.approx(error.item(), rel=1e-4)


def test_page_is_self_contained_and_drawn(reported):
    out, *_ = reported
    page = (out / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|<script|<link|@import|url\(", page)
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == 5
    for source in sources:
        kind, data = re.fullmatch(r"data:image/(png|svg\+xml);base64,(.*)", source).groups()
        image = base64.b64decode(data, validate=True)
        if kind == "png":
            assert image == (out / "samples.png").read_bytes()
            assert np.asarray(Image.open(io.BytesIO(image)).convert("L")).std() > 20
            continue
        drawing = ElementTree.fromstring(image)
        links = [v for e in drawing.iter() for k, v in e.attrib.items() if k.endswith("href")]
        assert all(link.startswith(("#", "data:")) for link in links)
        assert sum(e.tag.endswith("}path") for e in drawing.iter()) > 20


def test_a_report_replaces_only_a_report(reported, tmp_path):
    out = tmp_path / "report"
    assert report.expect_report_folder(out) == out
    out.mkdir()
    (out / "report.html").write_text("old")

    def interrupted():
        with whole_folder(report.expect_report_folder(out)) as new:
            (new / "report.html").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (out / "report.html").read_text() == "old"
    with whole_folder(report.expect_report_folder(out)) as new:
        (new / "report.html").write_text("new")
    assert (out / "report.html").read_text() == "new"
    assert list(tmp_path.iterdir()) == [out]
    (out / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match=r"thesis\.tex"):
        report.expect_report_folder(out)


def test_demo_says_what_it_does(reported):
    _, results, said = reported
    assert report.table(results) in said
    assert [line.split()[0] for line in said.splitlines()[:7]] == [*results["seconds"]]
