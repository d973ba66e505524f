"""Importing: light, quiet, and enough without the compiled module."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from _flows import ElementwiseField, normal

import flowkernels as fk
from flowkernels.runtime import backends


def run(program, **environment):
    """A program in a fresh interpreter; what it prints last, as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(Path(__file__).parent)],
        **dict(env=os.environ | environment, capture_output=True, text=True, timeout=120),
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_import_is_light_and_touches_no_driver():
    found = run("""
        import json, sys, torch
        before = set(sys.modules)
        import flowkernels
        new = sorted(set(sys.modules) - before)
        print(json.dumps(dict(new=new, cuda=torch.cuda.is_initialized())))
    """)
    roots = {name.split(".")[0] for name in found["new"]}
    assert not {"triton", "matplotlib", "sklearn", "PIL", "pandas", "scipy"} & roots
    assert not {f"flowkernels.{name}" for name in ("cli", "cli.demo", "cli.report", "bench", "integrations")} & set(
        found["new"]
    )
    assert "flowkernels.training.straighten" in found["new"]
    assert found["cuda"] is False


@pytest.mark.parametrize("installed", [False, True])
def test_an_unbuilt_checkout_says_so_and_the_way_out(tmp_path, installed):
    """Python started in a checkout imports its sources, whatever is installed: never in silence."""
    package = Path(fk.__file__).parent
    checkout, site = tmp_path / "checkout", tmp_path / "site"
    without = shutil.ignore_patterns("*.so", "__pycache__", "data")
    shutil.copytree(package, checkout / "flowkernels", ignore=without)
    (checkout / "CMakeLists.txt").touch()
    if installed:
        shutil.copytree(package, site / "flowkernels", ignore=shutil.ignore_patterns("__pycache__", "data"))
    program = "import flowkernels; print(flowkernels.explain('bellman', 'cpu'))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        **dict(env=os.environ | {"PYTHONPATH": str(site)}, cwd=checkout, capture_output=True, text=True, timeout=120),
    )
    assert done.returncode == 0, done.stderr
    assert "RuntimeWarning: flowkernels._C, the compiled module, is missing" in done.stderr
    for said in (done.stderr, done.stdout):
        assert f"flowkernels comes from the checkout {checkout}, which is not built for this Python" in said
        assert f"pip install -e {checkout}" in said
        assert (f"start Python elsewhere to use {site / 'flowkernels'}" in said) is installed
    assert "bellman on cpu: reference" in done.stdout


def test_a_built_package_imports_in_silence():
    done = subprocess.run([sys.executable, "-W", "error", "-c", "import flowkernels"], capture_output=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_every_public_name_exists():
    assert len(set(fk.__all__)) == len(fk.__all__)
    assert all(getattr(fk, name) is not None for name in fk.__all__)


def pipeline():
    """Calibrate and sample; the knots, costs and samples."""
    noise = normal(16, 6, dtype=torch.float64)
    cal = fk.calibrate(ElementwiseField(), noise, 40, progress=False)
    return dict(
        backend=backends.choose("bellman", "cpu"),
        schedules=[[n, *s.indices] for n, s in cal.items()],
        costs=[s.cost for s in cal.values()],
        samples=fk.sample(ElementwiseField(), noise, cal[4]).flatten().tolist(),
    )


def test_without_the_compiled_module():
    found = run("""
        import json, sys
        sys.modules["flowkernels._C"] = None
        sys.path.insert(0, sys.argv[1])
        import flowkernels as fk
        from test_import import pipeline
        out = pipeline()
        try:
            with fk.backend("cpu"):
                pipeline()
        except fk.BackendError as e:
            out["error"] = str(e)
        print(json.dumps(out))
    """)
    expected = pipeline()
    assert (expected["backend"], found["backend"]) == ("cpu", "reference")
    assert found["schedules"] == expected["schedules"]
    assert found["costs"] == pytest.approx(expected["costs"], rel=1e-10)
    assert found["samples"] == pytest.approx(expected["samples"], rel=1e-10, abs=1e-12)
    assert "backend 'cpu' was asked for, but the compiled module is missing (ModuleNotFoundError: " in found["error"]
    assert "reinstall flowkernels" in found["error"]
