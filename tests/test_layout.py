"""The picture of the package in CONTRIBUTING.md: imports point down, in no circle, and wings keep what is private."""

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flowkernels

PACKAGE = Path(flowkernels.__file__).parent
ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("structure", ROOT / "scripts/structure.py")
structure = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(structure)

# from the top floor down; "" is the package's own __init__, the door for those above it
ORDER = (
    *("__main__", "cli", "bench", ""),
    *("integrations", "training", "calibration", "evaluation", "sampling", "fusion", "ops"),
    *("solver", "models", "velocity", "_weights", "runtime"),
)
GROUND = (
    "schedule",
    "_casts",
    "_checks",
    "_entry",
    "_files",
    "_guidance",
    "_options",
    "_version",
    "_warnings",
)
ARROWS = structure.graph(PACKAGE)
SOURCES = {name: path.read_text(encoding="utf-8") for name, path in structure.modules(PACKAGE).items()}


def wing(name: str) -> str:
    return ([*name.split("."), ""])[1]


def floor(name: str) -> int:
    return ORDER.index(wing(name)) if wing(name) in ORDER else len(ORDER)


def test_every_room_has_its_place():
    assert {wing(name) for name in ARROWS} == {*ORDER, *GROUND}


def test_imports_point_down():
    up = [f"{name} -> {to}" for name, targets in ARROWS.items() for to in targets if floor(to) < floor(name)]
    assert not up


def test_there_is_no_circle():
    assert not structure.circles(ARROWS)
    assert not structure.circles(structure.rooms(ARROWS))
    assert max(structure.floors(structure.rooms(ARROWS)).values()) <= 12


def test_a_circle_and_an_arrow_up_are_found(tmp_path):
    package = tmp_path / "made"
    for wing_name in ("a", "b"):
        (package / wing_name).mkdir(parents=True)
        (package / wing_name / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "a/one.py").write_text("from made.b.two import f\n")
    (package / "b/two.py").write_text("def f():\n    from ..a import one\n    return one\n")
    arrows = structure.graph(package)
    assert arrows["made.a.one"] == {"made.b.two": {"f"}}
    assert arrows["made.b.two"] == {"made.a.one": {""}}
    assert structure.circles(arrows) == [["made.a.one", "made.b.two"]]
    assert structure.floors({"a": ["b", "c"], "b": ["c"], "c": []}) == {"a": 3, "b": 2, "c": 1}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def test_no_private_name_crosses_a_wing():
    crossing = []
    for name, targets in ARROWS.items():
        for to, taken in targets.items():
            if wing(to) != wing(name):
                inside = is_private(to.split(".")[-1]) and to.count(".") > 1
                crossing += [f"{name}: {to}.{n}".rstrip(".") for n in taken if is_private(n) or inside]
    assert not crossing


def private_names(tree: ast.Module) -> set[str]:
    """What a module calls private: functions, classes, methods, fields, and attributes that it sets."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            found.add(node.id if isinstance(node, ast.Name) else node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "object.__setattr__":
            found.add(getattr(node.args[1], "value", ""))
    return set(filter(is_private, found))


def test_private_members_are_used_where_they_are_defined():
    """`something._x` names a private of the wing that it stands in, or of nobody in the package: of torch, say."""
    of_torch = {*dir(torch.Tensor), *dir(torch.nn.Module()), *dir(torch.ops.aten.add.Tensor)}
    trees = {name: ast.parse(text) for name, text in SOURCES.items()}
    own = {name: private_names(tree) for name, tree in trees.items()}
    found = []
    for name, tree in trees.items():
        elsewhere = {p for other, names in own.items() if wing(other) != wing(name) for p in names}
        here = {p for other, names in own.items() if wing(other) == wing(name) for p in names}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in elsewhere - here - of_torch:
                found.append(f"{name}:{node.lineno}: {ast.unparse(node)}")
    assert not found


@pytest.mark.parametrize("name", [n for n in SOURCES if "." in n and not n.endswith("__main__")])
def test_a_module_is_reached_by_its_name(name):
    """Never a function in its place."""
    module = importlib.import_module(name)
    found = flowkernels
    for part in name.split(".")[1:]:
        found = getattr(found, part)
    assert found is module


def test_wings_hold_nothing_themselves():
    wings = [path for path in PACKAGE.glob("*/__init__.py") if "__pycache__" not in str(path)]
    assert len(wings) >= 10
    assert not [str(path) for path in wings if path.read_text()]


@pytest.mark.parametrize("folder", ["benchmarks", "scripts", "flowkernels"])
def test_nothing_takes_from_the_tests(folder):
    modules = {path.stem for path in (ROOT / "tests").rglob("*.py")}
    taken = []
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            taken += [f"{path.name}: {n}" for n in names if n.split(".")[0] in {"tests", *modules}]
        if re.search(r"""["']tests["']""", path.read_text(encoding="utf-8")):
            taken.append(f"{path.name}: the folder's name")
    assert not taken


def test_an_ecosystem_s_door_holds_its_public_names_alone():
    found = importlib.import_module("flowkernels.integrations.diffusers")
    functions = {name for name, thing in vars(found).items() if callable(thing) and name != "__getattr__"}
    assert functions == set(found.__all__)
    code = "import sys, flowkernels.integrations.diffusers; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
