"""Tries the bugs of bugs.py, one after another, on the tests as they are and, if asked, on those of another commit.

    python tests/seeded/run.py FOLDER                     # a clone in FOLDER, where what is found is kept too
    python tests/seeded/run.py FOLDER --old COMMIT        # beside the tests of that commit, on that commit's package:
                                                          # those that are not what found the bug here word for word
    python tests/seeded/run.py FOLDER --only CUDA bellman # of a kind, a file or a name with one of these texts
    python tests/seeded/run.py FOLDER --table             # what has been found so far

The files that are likely to find a bug run first, and all tests only where they do not (--likely: never). A build is
made for each bug of C++ and CUDA, of its op alone; run it with few of them at a time, or overnight.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from bugs import BUGS

ROOT = Path(__file__).resolve().parents[2]
LONGEST = 1800  # seconds of a run of pytest

# the emulation that the clone has built, for both suites; and the test that is running, for one that ends the process
PLUGIN = """
import functools, importlib.util, os, sys
from pathlib import Path
def pytest_configure(config):
    sys.path.insert(0, str(Path.cwd() / "tests"))
    import _host_cuda
    build, built = Path(os.environ["SEEDED_BUILD"]), _host_cuda.module
    @functools.cache
    def module(name="host_cuda"):
        if name != "host_cuda":
            return built(name)
        (path,) = build.glob("host_cuda.*.so")
        spec = importlib.util.spec_from_file_location(name, path)
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
        return loaded
    _host_cuda.module = module
def pytest_runtest_logstart(nodeid, location):
    Path(os.environ["SEEDED_AT"]).write_text(nodeid)
"""


def call(*command, cwd: Path, **env: str) -> None:
    done = subprocess.run([*map(str, command)], cwd=cwd, env=os.environ | env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{shlex.join(map(str, command))}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")


class Tree:
    """A clone of a commit, whose tests run with what another one has built where that is given."""

    def __init__(self, path: Path, commit: str, builder: "Tree | None" = None):
        self.path, self.builder, self.work = path, builder or self, path.parent
        if not path.exists():
            call("git", "clone", "-q", ROOT, path, cwd=self.work)
        call("git", "fetch", "-q", ROOT, commit, cwd=path)
        call("git", "checkout", "-q", "-f", commit, cwd=path)

    def build(self, kind: str) -> None:
        """The extension, or the emulation of the CUDA kernels: what has changed of it."""
        if kind == "C++":
            env = dict(CMAKE_ARGS="-DFLOWKERNELS_CUDA=OFF")
            call(sys.executable, "setup.py", "-q", "build_ext", "--inplace", cwd=self.path, **env)
        else:
            code = "import _host_cuda; _host_cuda.module()"
            call(sys.executable, "-c", code, cwd=self.path, PYTHONPATH=f"{self.path}:{self.path / 'tests'}")

    def take(self, builder: "Tree") -> None:
        for file in (builder.path / "flowkernels").glob("_C*.so") if builder is not self else ():
            shutil.copy2(file, self.path / "flowkernels")

    def first_failure(self, arguments: str) -> str | None:
        """The first test that fails; None if all pass."""
        given = shlex.split(arguments)
        given = [a for a in given if not a.startswith("tests/") or (self.path / a.split("::")[0]).exists()]
        at = self.work / f"{self.path.name}.at"
        at.write_text("")
        env = dict(PYTHONPATH=f"{self.path}:{self.work}", SEEDED_AT=str(at), OMP_NUM_THREADS="2")
        env["SEEDED_BUILD"] = str(self.builder.path / "build/host_cuda")
        command = [sys.executable, "-m", "pytest", "-x", "-p", "seeded_plugin", "-p", "no:cacheprovider"]
        command += ["--deselect", "tests/test_seeded.py", *given]
        try:
            done = subprocess.run(command, cwd=self.path, env=os.environ | env, capture_output=True, text=True,
                                  timeout=LONGEST)  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"{at.read_text()} (does not end)"
        if done.returncode in (0, 5):
            return None
        failed = re.search(r"^(?:FAILED|ERROR) (\S.*?)(?: - |$)", done.stdout, re.MULTILINE)
        if failed and done.returncode > 0:
            return failed[1]
        if not at.read_text():  # no test has begun
            sys.exit(done.stdout[-3000:] + done.stderr[-3000:])
        return f"{at.read_text()} (ends there)"


def is_there(test: str, commit: str) -> bool:
    """Whether that commit has the test word for word, its parameters aside: then it finds there what it finds here."""
    file, _, name = test.partition("[")[0].partition("::")
    pattern = rf"^(?:@.*\n(?:[ )\]].*\n)*)*def {re.escape(name)}\(.*\n(?:(?: .*)?\n)*"
    then = subprocess.run(["git", "show", f"{commit}:{file}"], cwd=ROOT, capture_output=True, text=True).stdout
    ours, theirs = (re.findall(pattern, text, re.MULTILINE) for text in ((ROOT / file).read_text(), then))
    return bool(ours) and [t.strip() for t in ours] == [t.strip() for t in theirs]


class Changed:
    """A bug in a tree, for the `with` block. Objects that were compiled of the file come back with it."""

    def __init__(self, tree: Tree, files: str, bug):
        self.file = next(f for name in files.split("|") if (f := tree.path / name).exists())
        self.bug, op = bug, self.file.parent.name
        build = tree.path / "build"
        self.kept = [f for f in build.rglob("*.o") if op in f.relative_to(build).parts[-3:] or f.name == f"{op}.cpp.o"]
        self.kept += [self.file, *(tree.path / "flowkernels").glob("_C*.so"), *build.glob("host_cuda/*.so")]

    def __enter__(self):
        self.before = [(f, f.read_bytes(), f.stat()) for f in self.kept]
        text = self.file.read_text()
        assert text.count(self.bug.old) == 1, f"{self.file}: {self.bug.old!r}"
        self.file.write_text(text.replace(self.bug.old, self.bug.new))

    def __exit__(self, *_):
        for file, data, stat in self.before:
            file.unlink(missing_ok=True)  # a library that is loaded stays what it is
            file.write_bytes(data)
            os.chmod(file, stat.st_mode)
            os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def table(found: dict, old: str | None) -> str:
    suites = [s for s in ("old", "new") if any(s in entry for entry in found.values())]
    lines = [f"| bug | breaks | {' | '.join(f'first test of the {s} suite | s' for s in suites)} |"]
    lines.append("|---|---|" + "---|---:|" * len(suites))
    for kind, files, bug in BUGS:
        entry = found.get(key(files, bug))
        if entry is None:
            continue
        cells = []
        for suite in suites:
            test, seconds = entry.get(suite, ["not tried", 0])
            name = (test or "").removeprefix("tests/")
            cells += [f"`{name}`" if "::" in name else name or "**none**", f"{seconds:.0f}" if seconds else ""]
        where = Path(files.split("|")[0])
        name = f"{where.parent.name}: {bug.name}" if kind != "Python" else f"{where.stem}: {bug.name}"
        lines.append(f"| {kind}, {name} | {bug.breaks} | {' | '.join(cells)} |".replace("](", "] ("))
    return "\n".join(lines)


def key(files: str, bug) -> str:
    return f"{files.split('|')[0]}: {bug.name}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--old", metavar="COMMIT")
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT")
    parser.add_argument("--likely", action="store_true", help="not the whole suite for what the likely files miss")
    parser.add_argument("--again", action="store_true", help="also those that have been tried")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    work = args.folder.resolve()
    work.mkdir(parents=True, exist_ok=True)
    (work / "seeded_plugin.py").write_text(PLUGIN)
    results = work / "found.json"
    found = json.loads(results.read_text()) if results.exists() else {}
    if args.table:
        print(table(found, args.old))
        return

    head = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True).strip()
    trees = {"new": Tree(work / "new", head)}
    if args.old:
        trees["old"] = Tree(work / "old", args.old, trees["new"])
        same = subprocess.run(["git", "diff", "--quiet", args.old, head, "--", "csrc"], cwd=ROOT).returncode == 0
        if not same:
            sys.exit("csrc has changed between the commits: one build does not serve both suites")
    asked = [b for b in BUGS if any(text in f"{b[0]} {key(*b[1:])}" for text in args.only)]
    compiled = {kind for kind, _, _ in asked} & {"C++", "CUDA"}
    for kind, built in (("C++", "flowkernels/_C*.so"), ("CUDA", "build/host_cuda/host_cuda.*.so")):
        if compiled or not list(trees["new"].path.glob(built)):
            trees["new"].build(kind)
    for kind, files, bug in asked:
        entry = found.setdefault(key(files, bug), {})
        todo = [suite for suite in trees if args.again or suite not in entry]

        def run(suite: str, entry=entry, files=files, bug=bug) -> None:
            began = time.time()
            of_new = entry.get("new", [None])[0]
            if suite == "old" and of_new and is_there(of_new, args.old):
                entry["old"] = ["the same", 0.0]
                return
            test = trees[suite].first_failure(bug.likely)
            if test is None and not args.likely:
                test = trees[suite].first_failure("")
            if test is not None or not args.likely:
                entry[suite] = [test, time.time() - began]
            print(f"{key(files, bug)} | {suite} | {test} | {time.time() - began:.0f} s", flush=True)
            results.write_text(json.dumps(found, indent=1))

        if kind in ("C++", "CUDA") and todo:  # one build serves both suites
            with Changed(trees["new"], files, bug):
                trees["new"].build(kind)
                for suite in todo:
                    trees[suite].take(trees["new"])
                    run(suite)
        elif todo:
            for suite in todo:
                trees[suite].take(trees["new"])
                with Changed(trees[suite], files, bug):
                    run(suite)


if __name__ == "__main__":
    main()
