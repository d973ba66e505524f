"""examples/diffusers_pipeline.py on its tiny model."""

import runpy
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def script(name):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


def test_diffusers_pipeline(tmp_path):
    errors = script("diffusers_pipeline")(["--grid", "16", "--samples", "8", "--out", str(tmp_path)])
    assert errors["fitted"] < errors["uniform"]
    assert (tmp_path / "scheduler/scheduler_config.json").exists()
