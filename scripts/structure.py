"""The structure of the package as its imports and its calls show it: `python scripts/structure.py [FOLDER]`.

Rooms are the package's folders and the files beside them. Floors (the longest chain of rooms, each of which imports the
next), arrows between rooms, circles of files; and for `calibrate` of 64 samples with fit and verification the Python
calls inside the package, and how many of them go from one file to another. tests/test_layout.py holds what must be so.
"""

import ast
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def modules(package: Path) -> dict[str, Path]:
    """Dotted name -> file, of all modules of a package."""
    names = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def imports(name: str, path: Path, known: Iterable[str]) -> dict[str, set[str]]:
    """Module -> the names taken from it ("" for the module itself), of what a file imports of its own package, be it
    only when a function runs; what type checkers alone import is none of it."""
    package, found = name.split(".")[0], {}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_checkers = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in for_checkers:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == package:
                    found.setdefault(alias.name, set()).add("")
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # relative
                here = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
                base = ".".join([*here[: len(here) - node.level + 1], *([node.module] if node.module else [])])
            if base.split(".")[0] != package:
                continue
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.setdefault(inner if inner in known else base, set()).add("" if inner in known else alias.name)
    found.pop(name, None)
    return found


def graph(package: Path) -> dict[str, dict[str, set[str]]]:
    """Module -> what it imports of the package."""
    names = modules(package)
    return {name: imports(name, path, names) for name, path in names.items()}


def rooms(arrows: dict[str, Iterable[str]]) -> dict[str, set[str]]:
    """The same between rooms; the package's own `__init__` is one."""
    found: dict[str, set[str]] = {}
    for name, targets in arrows.items():
        here = room(name)
        found.setdefault(here, set()).update(there for t in targets if (there := room(t)) != here)
    return found


def room(name: str) -> str:
    return ".".join(name.split(".")[:2])


def circles(arrows: dict[str, Iterable[str]]) -> list[list[str]]:
    """Groups of modules that reach each other (Tarjan's strongly connected components of more than one)."""
    number, low, stack, on_stack, found = {}, {}, [], set(), []

    def visit(v: str) -> None:
        number[v] = low[v] = len(number)
        stack.append(v)
        on_stack.add(v)
        for w in arrows.get(v, ()):
            if w not in number:
                visit(w)
                low[v] = min(low[v], low[w])
            elif w in on_stack:
                low[v] = min(low[v], number[w])
        if low[v] == number[v]:
            group = []
            while not group or group[-1] != v:
                group.append(stack.pop())
                on_stack.discard(group[-1])
            if len(group) > 1:
                found.append(sorted(group))

    for v in arrows:
        if v not in number:
            visit(v)
    return found


def floors(arrows: dict[str, Iterable[str]]) -> dict[str, int]:
    """Module -> its floor: 1 for what imports nothing of the package. A circle counts as one floor."""
    group = {name: name for name in arrows}
    for circle in circles(arrows):
        group.update(dict.fromkeys(circle, circle[0]))
    below: dict[str, set[str]] = {}
    for name, targets in arrows.items():
        below.setdefault(group[name], set()).update(
            group[t] for t in targets if group.get(t, group[name]) != group[name]
        )
    height: dict[str, int] = {}

    def of(g: str) -> int:
        if g not in height:
            height[g] = 1 + max((of(h) for h in below[g]), default=0)
        return height[g]

    return {name: of(group[name]) for name in arrows}


def moves(package: Path) -> tuple[int, int, int]:
    """Calls inside the package, calls from one of its files to another, and files, of one `calibrate`."""
    sys.path.insert(0, str(package.parent))
    import inspect

    import torch

    import flowkernels as fk

    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(9, 32), torch.nn.SiLU(), torch.nn.Linear(32, 8)).eval()
    velocity = fk.VelocityField(net, time_column=True)
    noise, other = torch.randn(64, 8), torch.randn(64, 8)
    name = next(n for n in ("verify_noise", "verify") if n in inspect.signature(fk.calibrate).parameters)
    counted = {"calls": 0, "moves": 0}
    files, folder = set(), f"{package}/"

    def see(frame, event, _):
        if event != "call" or not frame.f_code.co_filename.startswith(folder):
            return
        file, caller = frame.f_code.co_filename, frame.f_back
        while caller is not None and not caller.f_code.co_filename.startswith(folder):
            caller = caller.f_back
        counted["calls"] += 1
        counted["moves"] += caller is not None and caller.f_code.co_filename != file
        files.add(file)

    def run():
        fk.calibrate(velocity, noise, 32, [2, 4, 8], effort="fit", progress=False, **{name: other})

    run()  # what only a first call does
    sys.setprofile(see)
    try:
        run()
    finally:
        sys.setprofile(None)
    return counted["calls"], counted["moves"], len(files)


def main(folder: Path) -> None:
    package = folder / "flowkernels"
    arrows = graph(package)
    between = rooms(arrows)
    count, height = sum(map(len, between.values())), max(floors(between).values())
    print(f"{len(arrows)} files in {len(between)} rooms, {count} arrows between rooms, {height} floors")
    print("circles:", circles(arrows) or "none")
    calls, crossing, files = moves(package)
    print(f"calibrate of 64 samples with fit and verification: {calls} calls, {crossing} moves between {files} files")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT)
