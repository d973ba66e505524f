"""The bugs of tests/seeded/bugs.py are changes of what is there; whether tests find them, seeded/run.py tries."""

from pathlib import Path

from seeded.bugs import BUGS, KINDS

ROOT = Path(__file__).parents[1]


def test_every_bug_changes_one_place():
    for _, files, bug in BUGS:
        (file,) = (path for name in files.split("|") if (path := ROOT / name).exists())
        assert file.read_text().count(bug.old) == 1, f"{file}: {bug.old!r}"
        assert bug.new != bug.old
    assert {kind: sum(k == kind for k, _, _ in BUGS) >= 10 for kind in KINDS} == dict.fromkeys(KINDS, True)
