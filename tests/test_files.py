"""How files are written: whole or not there, through links, with the permissions that were there, and over nothing that
is read or is no file. Each test goes over every place that writes one."""

import contextlib
import errno
import json
import os
import re
import signal
import socket
import stat
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from _flows import linear_field, normal

import flowkernels as fk
from flowkernels import _files, _weights
from flowkernels._files import whole_file, whole_folder
from flowkernels.bench import tables, tune
from flowkernels.cli import main, outputs
from flowkernels.integrations.export import Export
from flowkernels.models import bundled, networks


def save_calibration(path):
    fk.calibrate(linear_field(), normal(6, 4), 5, [1, 2], progress=False).save(path)


def save_network(path):
    bundled.save_network(networks.ResidualMLP(4, 8, 1, 8), path)


def save_text(path):
    with whole_file(path) as partial:
        partial.write_text("new")


def record(path):
    with fk.record_calls("euler_step", path):
        fk.euler_step(torch.ones(3), torch.ones(3), 0.5)


def straighten(path):
    schedule = fk.calibrate(linear_field(), normal(4, 4), 4, 2, progress=False)[2]
    options = dict(noise=(4,), iterations=1, batch=2, bank=2, progress=False)
    fk.straighten(None, linear_field(), schedule, checkpoint=path, resume=False, **options)


WRITERS = {
    "calibration": save_calibration,
    "network": save_network,
    "weights": lambda path: _weights.write(path, {"a": torch.ones(3)}, notes={}),
    "text": save_text,
    "calls": record,
    "checkpoint": straighten,
    "tuned": lambda path: tune._write(Path(path), {"format": 1}),
    "exported": lambda path: Export([0, 0.3, 1], "comfy").write(Path(path)),
    "csv": lambda path: tables.write_csv(Path(path), []),
    **{f"samples{suffix}": lambda path, suffix=suffix: save_samples(path, suffix) for suffix in outputs.SAMPLE_FORMATS},
}
every_writer = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)


def save_samples(path, suffix):
    """Whatever the path's own suffix, by which `flowkernels sample` chooses."""

    class Named(str):
        pass

    named = Named(path)
    named.suffix = suffix
    outputs.save_samples(named, torch.zeros(2, 1, 2, 2))


@every_writer
@pytest.mark.parametrize("link", ["absolute", "relative", "of a link", "to nothing"])
def test_a_link_stays_and_its_target_is_written(write, link, tmp_path):
    (tmp_path / "there").mkdir()
    target, path = tmp_path / "there" / "a.x", tmp_path / "b.x"
    if link != "to nothing":
        target.write_text("old")
    if link == "of a link":
        (tmp_path / "there" / "c.x").symlink_to(target)
        path.symlink_to(tmp_path / "there" / "c.x")
    else:
        path.symlink_to("there/a.x" if link == "relative" else target)
    write(path)
    assert path.is_symlink()
    assert target.is_file()
    assert not target.is_symlink()
    assert target.stat().st_size != 3 or target.read_text() == "new"
    assert not [p for p in tmp_path.rglob("*") if "partial" in p.name]


@every_writer
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o755, 0o666])
def test_permissions_are_kept(write, mode, tmp_path):
    path = tmp_path / "a.x"
    path.write_text("old")
    path.chmod(mode)
    write(path)
    assert stat.S_IMODE(path.stat().st_mode) == mode


@every_writer
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o027, 0])
def test_a_new_file_has_the_permissions_of_any_other(write, umask, tmp_path, monkeypatch):
    before = os.umask(umask)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "umask", lambda _: pytest.fail("for a moment, files of other threads had other ones"))
            write(tmp_path / "a.x")
        (tmp_path / "b.x").write_text("")
        assert (tmp_path / "a.x").stat().st_mode == (tmp_path / "b.x").stat().st_mode
    finally:
        os.umask(before)


def test_the_contents_of_a_private_file_are_never_readable_by_others(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    path.chmod(0o600)
    with whole_file(path) as partial:
        partial.write_text("secret")
        assert stat.S_IMODE(partial.stat().st_mode) == 0o600


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("allowed", [True, False])
def test_owner_and_group_are_kept_where_they_can_be(tmp_path, monkeypatch, allowed):
    path = tmp_path / "a"
    path.write_text("old")
    path.chmod(0o4664)
    os.chown(path, 4321, 4322)
    path.chmod(0o4664)
    if not allowed:

        def chown(*_):
            raise PermissionError(errno.EPERM, "not permitted")

        monkeypatch.setattr(os, "chown", chown)
    save_text(path)
    found = path.stat()
    expected = (4321, 4322, 0o4664) if allowed else (0, 0, 0o644)  # no one may do more than before
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == expected


@every_writer
def test_the_other_hard_links_of_a_file_keep_what_they_have(write, tmp_path):
    (tmp_path / "a.x").write_text("old")
    os.link(tmp_path / "a.x", tmp_path / "b.x")
    write(tmp_path / "a.x")
    assert (tmp_path / "b.x").read_text() == "old"


@contextlib.contextmanager
def special(kind, path):
    """What is no regular file, and stays what it is."""
    with contextlib.ExitStack() as stack:
        if kind == "folder":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "socket":
            stack.enter_context(socket.socket(socket.AF_UNIX)).bind(str(path))
        else:
            try:
                os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))  # what /dev/null is; not that one itself
            except PermissionError:
                pytest.skip("cannot make devices here")
        before = path.stat()
        yield
        after = path.stat()
        assert (before.st_ino, before.st_mode) == (after.st_ino, after.st_mode)


@every_writer
@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("kind", ["folder", "pipe", "socket", "device"])
def test_what_is_no_file_is_refused(write, kind, linked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket's name is short
    with special(kind, Path("a.x")):
        path = Path("a.x")
        if linked:
            path = Path("b.x")
            path.symlink_to("a.x")
        with pytest.raises(
            (ValueError, IsADirectoryError), match=rf"(path|checkpoint): expected .*, got the {kind} .*{path}"
        ):
            write(path)
    assert len(list(tmp_path.iterdir())) == 1 + linked


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("", ValueError, "path: expected the name of a file, got ''"),
        ("a\0b", ValueError, "path: expected the name of a file"),
        ("a/", IsADirectoryError, "path: expected a file, got the folder a/"),
        (".", IsADirectoryError, "path: expected a file, got the folder"),
        ("..", IsADirectoryError, "path: expected a file, got the folder"),
        ("no/a", FileNotFoundError, "path: expected a folder that exists and can be written to, got no"),
        ("file/a", FileNotFoundError, "path: expected a folder that exists and can be written to, got file"),
        ("n" * 256, ValueError, "path: expected the name of a file, got n*"),
        ("circle", ValueError, "path: expected the name of a file, got circle"),
    ],
)
def test_names_that_are_refused(name, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    Path("circle").symlink_to("circle")
    before = sorted(tmp_path.iterdir())
    for write in (save_text, fk.calibrate(linear_field(), normal(6, 4), 5, [1], progress=False).save):
        with pytest.raises(error, match=f"^{message}"):
            write(name)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", ["n" * 255, "é" * 127, "a.b.partial", ".a", "-a", "a b\n", "n" * 230, "n" * 200])
def test_names_that_are_not(name, tmp_path):
    path = tmp_path / name
    for _ in range(2):
        save_text(path)
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@every_writer
def test_a_file_that_may_not_be_written_to_is_refused(write, tmp_path, monkeypatch):
    path = tmp_path / "a.x"
    path.write_text("old")
    monkeypatch.setattr(os, "access", lambda p, _: Path(p).name != "a.x")  # root may write to any
    with pytest.raises(PermissionError, match=r"(path|point): expected a file that can be written to, got"):
        write(path)
    monkeypatch.setattr(os, "access", lambda p, _: Path(p) != tmp_path)
    with pytest.raises(
        PermissionError, match=r"(path|point): expected a folder that exists and can be written to, got"
    ):
        write(path)
    assert path.read_text() == "old"


def test_the_folder_may_change_while_a_relative_path_is_written(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with whole_file("a") as partial:
        os.chdir("elsewhere")
        partial.write_text("new")
    os.chdir(tmp_path)
    with fk.record_calls("euler_step", "b"):
        fk.euler_step(torch.ones(3), torch.ones(3), 0.5)
        os.chdir("elsewhere")
    assert (tmp_path / "a").read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "elsewhere"]


def test_file_and_folder_are_synced(tmp_path, monkeypatch):
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.fstat(fd).st_ino), fsync(fd)))
    save_text(tmp_path / "a")
    assert synced == [(tmp_path / "a").stat().st_ino, tmp_path.stat().st_ino]


# what killed runs leave


def killed(path, kind=whole_file):
    """A process is killed that writes to the path."""
    process = os.fork()
    if process == 0:
        with kind(path) as partial:
            (partial / "file" if kind is whole_folder else partial).write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(process, 0)[1] == signal.SIGKILL


def test_files_of_killed_runs_are_removed_by_the_next_that_writes_the_same(tmp_path):
    a, b = tmp_path / "a", tmp_path / ("b" * 255)
    for path in (a, a, b):
        killed(path)
    assert len(list(tmp_path.iterdir())) == 2  # the second of a has removed what the first left
    others = [".a.0123456789ab-0123456789ab.partial", f".a.b.{_files._boot()}-0123456789ab.partial", ".a.x.partial"]
    for name in others:  # of another boot, of another target, of another program
        (tmp_path / name).write_text("")
    with whole_file(a) as mine:
        mine.write_text("mine")
        with whole_file(a) as yours:  # another that writes the same meanwhile
            yours.write_text("yours")
        assert a.read_text() == "yours"
        assert mine.read_text() == "mine"
    assert a.read_text() == "mine"
    left = {p.name for p in tmp_path.iterdir()} - {"a", *others}
    assert len(left) == 1  # of b
    save_text(b)
    assert {p.name for p in tmp_path.iterdir()} == {"a", b.name, *others}


def test_folders_of_killed_runs_are_removed_or_put_back(tmp_path):
    out = tmp_path / "report"
    with whole_folder(out) as new:
        (new / "file").write_text("old")
    killed(out, whole_folder)
    assert len(list(tmp_path.iterdir())) == 2
    (partial,) = set(tmp_path.iterdir()) - {out}
    out.rename(partial / "previous")  # as if killed between the two renames
    with contextlib.suppress(KeyError), whole_folder(out):
        assert (out / "file").read_text() == "old"
        raise KeyError
    assert list(tmp_path.iterdir()) == [out]


def test_many_threads_write_the_same_file(tmp_path):
    path, problems = tmp_path / "a", []

    def work(text):
        try:
            for _ in range(20):
                with whole_file(path) as partial:
                    partial.write_text(text * 1000)
                assert len(set(path.read_text())) == 1
        except BaseException as e:
            problems.append(e)

    threads = [threading.Thread(target=work, args=(text,)) for text in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_written_where_there_are_no_locks(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(_files.fcntl, "flock", none)
    save_text(tmp_path / "a")
    monkeypatch.setattr(_files, "fcntl", None)
    save_text(tmp_path / "a")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


# the command line


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FLOWKERNELS_DEBUG", raising=False)
    net = bundled.BUNDLED["digits"].load()
    fk.calibrate(net, torch.randn(4, 1, 8, 8), 5, (2, 3), progress=False).save("s.json")
    bundled.save_network(net, "w.safetensors")
    return tmp_path


def inputs_and_outputs():
    digits = "--model digits --steps 2"
    yield "w.safetensors", f"sample {digits} --checkpoint w.safetensors --out OUT", "--checkpoint"
    yield "s.json", f"sample {digits} --schedule s.json --out OUT", "--schedule"
    yield "w.safetensors", "calibrate --model digits --checkpoint w.safetensors --out OUT", "--checkpoint"
    line = f"straighten {digits} --schedule s.json --checkpoint w.safetensors"
    yield "w.safetensors", f"{line} --out OUT", "--checkpoint"
    yield "s.json", f"{line} --out OUT", "--schedule"
    yield "w.safetensors", f"{line} --state OUT --out x.safetensors", "--checkpoint"
    yield "s.json", f"{line} --state OUT --out x.safetensors", "--schedule"
    yield "t.pt", f"{line} --state t.pt --resume --out OUT", "--state"
    yield "new.safetensors", f"{line} --state new.safetensors --out OUT", "--state"
    yield "s.json", "export s.json --to json --steps 2 --out OUT", "FILE"
    yield "s.json", "plot s.json --out OUT", "FILE"
    yield "script.py", "record euler_step --from script.py --out OUT", "--from"


WAYS = ("itself", "another way", "link", "hard link")
CASES = [
    (*case, how)
    for case in inputs_and_outputs()
    for how in WAYS
    if (case[0], how) != ("new.safetensors", "hard link")  # of which there is nothing to link yet
]


@pytest.mark.parametrize(("name", "line", "option", "how"), CASES)
def test_an_input_is_not_overwritten(name, line, option, how, folder, capsys):
    if name in ("t.pt", "script.py"):
        Path(name).write_text("1")
    out = {"itself": name, "another way": f"../{folder.name}/{name}"}.get(how, f"z{Path(name).suffix}")
    if how == "link":
        Path(out).symlink_to(name)
    elif how == "hard link":
        os.link(name, out)
    before = {p: p.read_bytes() for p in folder.iterdir() if p.exists()}
    assert main.main(line.replace("OUT", out).split()) == 2
    assert f": expected another file than {option}, got {out}" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in folder.iterdir() if p.exists()} == before


LINES = {
    "calibrate": "calibrate --model digits -n 4 --grid 5 --steps 2 --out x.json",
    "sample.npy": "sample --model digits -n 2 --steps 2 --out x.npy",
    "sample.safetensors": "sample --model digits -n 2 --steps 2 --out x.safetensors",
    "sample.pt": "sample --model digits -n 2 --steps 2 --out x.pt",
    "sample.png": "sample --model digits -n 2 --steps 2 --out x.png",
    "export": "export s.json --to json --steps 2 --out x.json",
    "plot": "plot s.json --out x.png",
    "straighten": "straighten --model digits --schedule s.json --steps 2 --iterations 1 --batch 2 --bank 2 "
    "--out x.safetensors",
}
READERS = {
    "calibrate": lambda path: fk.Calibration.load(path)[2].steps,
    "sample.npy": lambda path: len(np.load(path)),
    "sample.safetensors": lambda path: len(_weights.read(path, "path", "samples")[0]["samples"]),
    "sample.pt": lambda path: len(torch.load(path)),
    "sample.png": lambda path: 2 * path.read_bytes().startswith(b"\x89PNG"),
    "export": lambda path: len(json.loads(path.read_text())["model_times"]),
    "plot": lambda path: 2 * path.read_bytes().startswith(b"\x89PNG"),
    "straighten": lambda path: 2 * isinstance(bundled.load_network(path), networks.ResidualMLP),
}


@pytest.mark.parametrize("command", LINES)
def test_a_full_disk_after_the_work_loses_nothing(command, folder, monkeypatch, capsys, tmp_path_factory):
    elsewhere, fsync = tmp_path_factory.mktemp("elsewhere"), os.fsync
    monkeypatch.setattr("tempfile.tempdir", str(elsewhere))

    def full(fd):
        if Path(os.readlink(f"/proc/self/fd/{fd}")).is_relative_to(folder):
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", full)
    before = sorted(folder.iterdir())
    assert main.main(LINES[command].split()) == 2
    err = [line for line in re.split(r"[\r\n]", capsys.readouterr().err) if line.startswith("flowkernels")]
    found = re.fullmatch(r".*: --out: .*/x\.\w+ could not be written \(.*No space.*\); it is kept as (\S+).*", err[-1])
    assert found, err
    assert Path(found[1]).parent.parent == elsewhere
    assert READERS[command](Path(found[1])) == 2
    assert sorted(folder.iterdir()) == before


def test_a_folder_that_cannot_be_put_in_place_is_kept(tmp_path, tmp_path_factory, monkeypatch):
    elsewhere, rename = tmp_path_factory.mktemp("elsewhere"), Path.rename
    monkeypatch.setattr("tempfile.tempdir", str(elsewhere))

    def full(path, target):
        if Path(target).parent == tmp_path:
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(path, target)

    def save(path):
        with whole_folder(path) as new:
            (new / "report.html").write_text("all of it")

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OSError, match=r"^out: .*report could not be written .*; it is kept as .*elsewhere.*report$"):
        _files.write_or_keep(tmp_path / "report", "out", save)
    (kept,) = elsewhere.glob("*/report")
    assert (kept / "report.html").read_text() == "all of it"
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_everywhere_is_still_no_traceback(folder, monkeypatch, capsys, tmp_path_factory):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path_factory.mktemp("elsewhere")))

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert main.main(LINES["calibrate"].split()) == 2
    assert (
        "x.json could not be written, nor kept anywhere else ([Errno 28] No space left on device)"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("command", LINES)
@pytest.mark.parametrize("kind", ["folder", "pipe", "socket", "device"])
def test_the_commands_refuse_what_is_no_file_before_any_work(command, kind, folder, monkeypatch, capsys):
    monkeypatch.setattr(main, "load_model", lambda *_: pytest.fail("work has started"))
    line = LINES[command].split()
    with special(kind, Path(line[-1])):
        assert main.main(line) == 2
    assert re.search(rf"error: --out: expected .*, got the {kind} ", capsys.readouterr().err)


def test_a_name_that_ends_in_a_slash(folder, capsys):
    assert main.main([*LINES["sample.npy"].split()[:-1], "x.npy/"]) == 2
    assert "--out: expected a file, got the folder 'x.npy/'" in capsys.readouterr().err


def test_a_key_that_is_there_twice_is_named(tmp_path):
    """JSON readers would take the last, and others the first."""
    path = tmp_path / "twice.boss.json"
    fk.calibrate(lambda x, t: -x, torch.ones(4, 2), 4, [2], progress=False).save(path)
    text = path.read_text()
    path.write_text(text.replace('"version": 3', '"version": 3, "version": 3', 1))
    with pytest.raises(ValueError, match=r"^path: .*twice.boss.json.*'version' twice"):
        fk.Calibration.load(path)
