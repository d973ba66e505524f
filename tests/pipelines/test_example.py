"""examples/diffusers_pipeline.py on its tiny model, and the example in pipeline_velocity's docstring."""

import doctest
import runpy
from pathlib import Path

import torch

import flowkernels as fk
from flowkernels.integrations import diffusers

EXAMPLES = Path(__file__).parents[2] / "examples"


def script(name):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


def test_diffusers_pipeline(tmp_path):
    errors = script("diffusers_pipeline")(["--grid", "16", "--samples", "8", "--out", str(tmp_path)])
    assert errors["fitted"] < errors["uniform"]
    assert (tmp_path / "scheduler/scheduler_config.json").exists()


def test_the_docstrings_example():
    names = dict(fk=fk, torch=torch, pipeline_velocity=diffusers.pipeline_velocity)
    (example,) = doctest.DocTestFinder(recurse=False).find(diffusers.pipeline_velocity, globs=names)
    out = []
    failed = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example, out=out.append).failed
    assert example.examples
    assert not failed, "".join(out)
