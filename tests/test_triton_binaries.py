"""Every op's Triton kernels compile for every target, and their machine code keeps the rules of _triton_rules.py."""

import _binaries
import _triton_binaries
import pytest
from _triton_compile import TARGETS
from _triton_rules import RULES

from flowkernels.ops import OPS

NVIDIA = [t for t, (kind, *_) in TARGETS.items() if kind == "cuda"]


@pytest.mark.parametrize("op", OPS)
def test_every_kernel_keeps_its_rule(op):
    kernels, _ = _triton_binaries.read(op)
    rules = [r for r in RULES if r.name.startswith(f"{op}_")]
    assert rules
    found = _binaries.problems(kernels, rules)
    found += [f"sm_{k.arch} {k.name}: atomics" for k in kernels if k.count("atomics")]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("op", OPS)
def test_every_target_has_every_kernel(op):
    """AMD's GPUs among them; by name, since what a launch passes may depend on the target."""
    _, variants = _triton_binaries.read(op)
    names = {t: {v["label"].split("<")[0] for v in variants if v["target"] == t} for t in TARGETS}
    assert names["80"]
    assert all(of == names["80"] for of in names.values())
