"""Every op's Triton kernels compile for every target, and their machine code keeps the rules of csrc/<op>/rules.py."""

import dataclasses
import os
import re
import subprocess
import sys
import types

import pytest
from machine_code import binaries, rules, triton_binaries
from machine_code.triton_compile import FORMS, TARGETS

from flowkernels.ops.public import OPS

NVIDIA = [t for t, (kind, *_) in TARGETS.items() if kind == "cuda"]


def atomics(kernels) -> list[str]:
    return [f"sm_{k.arch} {k.name}: atomics" for k in kernels if k.count("atomics")]


@pytest.mark.parametrize("op", OPS)
def test_every_kernel_keeps_its_rule(op):
    kernels, _ = triton_binaries.read(op)
    of_op = rules.triton(op)
    assert of_op
    aligned = [k for k in kernels if k.name.endswith(">")]
    found = rules.problems(aligned, of_op) + atomics(kernels)
    for k in kernels:
        if k not in aligned:  # sizes and memory that fit no vectors: no more than that nothing is spilled
            own = [r for r in of_op if re.fullmatch(r.name, k.name)]
            plain = [dataclasses.replace(r, registers=255, occupancy=0.0, has="") for r in own]
            found += rules.problems([k], plain)
    assert not found, "\n".join(found)


def test_odd_sizes_are_compiled_too():
    kernels, _ = triton_binaries.read("euler_step")
    forms = {(k.arch, k.name.rpartition(">")[2]) for k in kernels}
    assert forms == {("80", form) for form in FORMS} | {(t, "") for t in NVIDIA}


@pytest.mark.parametrize("op", OPS)
def test_every_target_has_every_kernel(op):
    """AMD's GPUs among them; by name, since what a launch passes may depend on the target."""
    _, variants = triton_binaries.read(op)
    names = {t: {v["label"].split("<")[0] for v in variants if v["target"] == t} for t in TARGETS}
    assert names["80"]
    assert all(of == names["80"] for of in names.values())


@pytest.mark.parametrize(("release", "registers", "occupancy"), [("3.9", 64, 0.5), ("3.6", 72, 0.5), ("4.0", 255, 0.0)])
def test_rules_are_of_the_release(release, registers, occupancy, monkeypatch):
    """Those of a release that none was read on hold no kernel to figures of another one."""
    one = rules.Rule("a_kernel", 64, 0.5, has="LDG", older={"3.6": 72})
    monkeypatch.setattr(rules, "version", lambda name: f"{release}.1")
    monkeypatch.setattr(rules, "of_op", lambda op: types.SimpleNamespace(TRITON=[one]))
    (found,) = rules.triton("an op")
    assert (found.registers, found.occupancy, found.has) == (registers, occupancy, "LDG")


def test_stack_is_left_to_releases_that_need_it(monkeypatch):
    kernel = dataclasses.replace(triton_binaries.read("euler_step")[0][0], stack=8)
    rule = rules.Rule(".*", 255, 0.0, spilled={"3.6": 8})
    for release, expected in (("3.6", 0), ("3.9", 1)):
        monkeypatch.setattr(rules, "version", lambda name, release=release: f"{release}.0")
        assert len(rules.problems([kernel], [rule])) == expected


# ---- the checks, on kernels that are not as they should be ----
BAD = """
import triton
import triton.language as tl

@triton.jit
def atomic_kernel(p):
    tl.atomic_add(p + tl.arange(0, 128), 1.0)

@triton.jit
def double_kernel(p):
    i = tl.arange(0, 128)
    tl.store(p + i, (tl.load(p + i).to(tl.float64) * 2.7).to(tl.float32))

@triton.jit
def spilling_kernel(p):
    i = tl.arange(0, 16384)
    x = tl.load(p + i)  # 512 values a thread
    tl.store(p + i, x * tl.sum(x))

@triton.jit
def fine_kernel(p):
    i = tl.arange(0, 128)
    tl.store(p + i, tl.load(p + i) * 2.7)
"""
COMPILE = """
import sys
import bad, torch, triton
from machine_code import triton_compile
triton.runtime.driver.set_active(triton_compile.Driver("80"))
for name in "atomic", "double", "spilling", "fine":
    compiled = getattr(bad, name + "_kernel").warmup(torch.empty(32), grid=(1,), num_warps=1)
    with open(name + ".cubin", "wb") as file:
        file.write(compiled.asm["cubin"])
"""


@pytest.fixture(scope="module")
def bad_cubins(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    (folder / "bad.py").write_text(BAD)
    environment = dict(PYTHONPATH=f"{triton_binaries.ROOT / 'scripts'}:{folder}", TRITON_INTERPRET="0",
                       TRITON_CACHE_DIR=str(folder / "cache"))  # fmt: skip
    command = [sys.executable, "-c", COMPILE]
    subprocess.run(command, check=True, cwd=folder, env=os.environ | environment)
    return sorted(folder.glob("*.cubin"))


@pytest.fixture(scope="module")
def bad(bad_cubins):
    return {k.name: k for (k,) in binaries.read_cubins(bad_cubins, "80")}


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("fine_kernel", None),
        ("atomic_kernel", "atomics"),
        ("double_kernel", r"[1-9]\d* double-precision instructions"),
        ("spilling_kernel", r"[1-9]\d* bytes of stack"),
    ],
)
def test_checks(bad, name, problem):
    found = rules.problems([bad[name]], [rules.Rule(name, 255, 0.0)]) + atomics([bad[name]])
    assert len(found) == (problem is not None), found
    assert not found or re.search(f"^sm_80 {name}: {problem}", found[0])


def test_cubins_are_read_together_as_one_by_one(bad, bad_cubins):
    for path in bad_cubins:
        (alone,) = binaries.read_cubin(path)
        assert alone == bad[alone.name]
