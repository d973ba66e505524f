"""The examples in the public docstrings run, and every public function has one; so do the scripts of examples/."""

import ast
import doctest
import inspect
import os
import re
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import _fastgen
import pytest
import torch

import flowkernels as fk
from flowkernels.integrations import diffusers, host_loops, k_diffusion, torchdiffeq

EXAMPLES = Path(__file__).parents[1] / "examples"
# what a caller neither makes nor calls
WITHOUT = ("BackendError", "Denoiser", "FusedHead", "FusedSampler", "HasTimeEmbedding", "Inversion", "LoadedWeights",
           "NotFusable", "Straightened", "Trajectory", "Velocity", "__version__")  # fmt: skip
PUBLIC = {name: getattr(fk, name) for name in fk.__all__ if name not in WITHOUT}
# pipeline_velocity's is run by tests/pipelines: diffusers has few pipelines without transformers
PUBLIC |= {name: getattr(diffusers, name) for name in diffusers.__all__ if name != "pipeline_velocity"}

PUBLIC |= {name: getattr(module, name) for module in (host_loops, k_diffusion, torchdiffeq) for name in module.__all__}


@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_the_example_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    text, module = inspect.getdoc(PUBLIC[name]), inspect.getmodule(PUBLIC[name])
    modules = diffusers, host_loops, k_diffusion, torchdiffeq
    names = dict(fk=fk, torch=torch) | {k: getattr(module, k) for module in modules for k in module.__all__}
    example = doctest.DocTestParser().get_doctest(text, names, name, module.__file__, None)
    assert example.examples, f"{name} has no example"
    out = []
    failed = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example, out=out.append).failed
    assert not failed, "".join(out)


# ---- examples/: whole scripts, on little data ----


def script(name):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


def test_every_script_is_tried():
    pipelines = Path(__file__).parent / "pipelines"
    files = [Path(__file__), pipelines / "test_example.py", pipelines / "test_trainers.py"]
    tried = {name for file in files for name in re.findall(r'script\("(\w+)"\)', file.read_text())}
    assert tried == {path.stem for path in EXAMPLES.glob("*.py")}


def test_image_model():
    arguments = ["--data", "digits", "--samples", "48", "--grid", "20", "--iterations", "5"]
    errors = script("image_model")(arguments)
    assert errors["fitted solver"] < errors["Bellman"] < 1.2 * errors["uniform"]
    assert len(errors) == 5


def test_policy():
    actions = script("policy")(["--grid", "12", "--calls", "2"])
    assert actions.shape == (1, 56)
    assert actions.isfinite().all()


def test_tabular():
    errors = script("tabular")(["--iterations", "40", "--grid", "20"])
    assert all(fitted < uniform for uniform, fitted in errors.values())


def test_prompt_schedules():
    errors = script("prompt_schedules")(["--grid", "30", "--samples", "8"])
    assert {objective for objective, _ in errors} == {"squared", "student", "oss"}
    assert all(0.5 * shared < own < 1.5 * shared for (_, N), (shared, own) in errors.items() if N == 2)


@pytest.mark.parametrize(
    "options",
    [
        ["--storage", "shards", "--t-sampling", "uniform"],
        ["--target", "solver", "--accumulate", "2", "--autocast"],
        ["--target", "on_policy"],
    ],
)
def test_own_trainer(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, last = script("own_trainer")(["--iterations", "30", "--grid", "20", *options])
    assert last < first
    assert (tmp_path / "shards").exists() == ("shards" in options)


def test_fsdp2_trainer(tmp_path, monkeypatch):
    """Two ranks, killed half way, and one that goes on from their checkpoint, end where one rank alone ends."""
    path, options = EXAMPLES / "fsdp2_trainer.py", ["--size", "64", "--batch", "32", "--grid", "16"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", path, *options]
    command += ["--iterations", "12", "--checkpoint", tmp_path / "killed", "--checkpoint-every", "7"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "killed").iterdir()] == ["step-000012"]

    found = {}
    for name in ("killed", "alone"):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = str(free.getsockname()[1])
        told = dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT=port)
        for key, value in told.items():
            monkeypatch.setenv(key, value)
        its = ["--iterations", "20", "--checkpoint", str(tmp_path / name), "--out", str(tmp_path / f"{name}.pt")]
        found[name] = script("fsdp2_trainer")([*options, *its])
    assert found["alone"]["trained"] < 0.9 * found["alone"]["untrained"]
    assert found["killed"]["loss"] == pytest.approx(found["alone"]["loss"], rel=1e-5)
    killed, alone = (torch.load(tmp_path / f"{name}.pt") for name in ("killed", "alone"))
    for key, weight in alone.items():
        torch.testing.assert_close(killed[key], weight, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["straighten", "kd"])
def test_fastgen_trainer(method, tmp_path, monkeypatch):
    """With a stand-in for FastGen."""
    _fastgen.install(monkeypatch)
    options = ["--grid", "16", "--size", "64", "--iterations", "150", "--method", method, "--out", str(tmp_path)]
    found = script("fastgen_trainer")(options)
    monkeypatch.delattr("flowkernels.integrations.fastgen.StraightenModel")
    assert found["difference"] < 1e-5
    assert method == "kd" or found["trained"] < 0.9 * found["untrained"]


def test_lpips_loss():
    """With a small random network in the place of LPIPS, and squared error, whose schedule is the least squares one."""
    torch.manual_seed(3)
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 16, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv2d(16, 16, 3))
    net.requires_grad_(False)
    options = ["--samples", "16", "--grid", "8", "--size", "256", "--batch", "32", "--iterations"]
    found = script("lpips_loss")([*options, "80"], distance=lambda a, b: (net(a) - net(b)).square().flatten(1).mean(1))
    assert found["1 step, trained by distance"][1] < 0.8 * found["1 step"][1]
    found = script("lpips_loss")([*options, "3"], distance=lambda a, b: (a - b).square().flatten(1).mean(1))
    for what in ("1 step, trained by {}", "4 steps, knots by {}"):
        squared, by_distance = found[what.format("squared error")], found[what.format("distance")]
        assert by_distance == pytest.approx(squared, rel=1e-3)


OURS = "fk flowkernels bank objective cal pipeline_velocity solver_scheduler PathLoader StraightenModel t_list"


def test_trainers_lines_are_counted():
    """Those of the scripts in the table of docs/trainers.md."""
    page = (EXAMPLES.parent / "docs/trainers.md").read_text()
    rows = re.findall(r"\| examples/(\w+).py \| (\d+) \| (\d+) \|", page)
    ours = re.compile(rf"\b({'|'.join(OURS.split())})\b")
    assert len(rows) == 6
    for name, *told in rows:
        text = (EXAMPLES / f"{name}.py").read_text()
        body = text.splitlines()[ast.parse(text).body[0].end_lineno :]
        code = [line for line in body if line.strip() and not line.strip().startswith("#")]
        assert [name, *map(int, told)] == [name, len(code), sum(bool(ours.search(line)) for line in code)]


@pytest.mark.parametrize(("name", "option"), [("policy", "--calls"), ("own_trainer", "--iterations")])
def test_no_work_is_refused(name, option, capsys):
    with pytest.raises(SystemExit):
        script(name)([option, "0"])
    assert f"{option}: expected 1 or more, got 0" in capsys.readouterr().err
