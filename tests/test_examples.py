"""The examples in the public docstrings run, and every public function has one."""

import doctest
import inspect

import pytest
import torch

import flowkernels as fk
from flowkernels.integrations import diffusers

# what a caller neither makes nor calls
WITHOUT = ("BackendError", "FusedHead", "FusedSampler", "HasTimeEmbedding", "Inversion", "NotFusable", "Straightened",
           "Trajectory", "Velocity", "__version__")  # fmt: skip
PUBLIC = {name: getattr(fk, name) for name in fk.__all__ if name not in WITHOUT}
PUBLIC["solver_scheduler"] = diffusers.solver_scheduler


@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_the_example_runs(name, tmp_path):
    torch.manual_seed(0)
    text, module = inspect.getdoc(PUBLIC[name]), inspect.getmodule(PUBLIC[name])
    names = dict(fk=fk, torch=torch, folder=tmp_path, solver_scheduler=diffusers.solver_scheduler)
    example = doctest.DocTestParser().get_doctest(text, names, name, module.__file__, None)
    assert example.examples, f"{name} has no example"
    out = []
    failed = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example, out=out.append).failed
    assert not failed, "".join(out)
