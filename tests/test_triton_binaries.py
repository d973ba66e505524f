"""Every op's Triton kernels compile for every target, and their machine code keeps the rules of _triton_rules.py."""

import dataclasses
import re

import _binaries
import _triton_binaries
import pytest
from _triton_compile import FORMS, TARGETS
from _triton_rules import RULES

from flowkernels.ops import OPS

NVIDIA = [t for t, (kind, *_) in TARGETS.items() if kind == "cuda"]


def atomics(kernels) -> list[str]:
    return [f"sm_{k.arch} {k.name}: atomics" for k in kernels if k.count("atomics")]


@pytest.mark.parametrize("op", OPS)
def test_every_kernel_keeps_its_rule(op):
    kernels, _ = _triton_binaries.read(op)
    rules = [r for r in RULES if r.name.startswith(f"{op}_")]
    assert rules
    aligned = [k for k in kernels if k.name.endswith(">")]
    found = _binaries.problems(aligned, rules) + atomics(kernels)
    for k in kernels:
        if k not in aligned:  # sizes and memory that fit no vectors: no more than that nothing is spilled
            own = [r for r in rules if re.fullmatch(r.name, k.name)]
            plain = [dataclasses.replace(r, registers=255, occupancy=0.0, has="") for r in own]
            found += _binaries.problems([k], plain)
    assert not found, "\n".join(found)


def test_odd_sizes_are_compiled_too():
    kernels, _ = _triton_binaries.read("euler_step")
    forms = {(k.arch, k.name.rpartition(">")[2]) for k in kernels}
    assert forms == {("80", form) for form in FORMS} | {(t, "") for t in NVIDIA}


@pytest.mark.parametrize("op", OPS)
def test_every_target_has_every_kernel(op):
    """AMD's GPUs among them; by name, since what a launch passes may depend on the target."""
    _, variants = _triton_binaries.read(op)
    names = {t: {v["label"].split("<")[0] for v in variants if v["target"] == t} for t in TARGETS}
    assert names["80"]
    assert all(of == names["80"] for of in names.values())
