"""Files that are whole or not there, and JSON that says so when it is not what was written: docs/files.md."""

import contextlib
import errno
import functools
import hashlib
import json
import numbers
import os
import re
import secrets
import shutil
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from flowkernels._checks import expect, expect_shown

try:
    import fcntl
except ImportError:  # not on Windows: what killed runs leave there stays
    fcntl = None

SUM = "sha256"
VALUES = 100 << 20  # bytes that the values of a JSON file may take whatever its size
KINDS = {
    **{stat.S_IFDIR: "folder", stat.S_IFCHR: "device", stat.S_IFBLK: "device"},
    **{stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"},
}


# Writing


def expect_target(path: str | Path, name: str = "path", inputs: Iterable[tuple[str, str | Path | None]] = ()) -> Path:
    """The file that `whole_file(path)` makes or replaces, links followed, as an absolute path.

    inputs: (name, path) of files that are read for what is written, and so are not to be replaced.

    Raises:
        FileNotFoundError, IsADirectoryError, PermissionError, ValueError: naming the argument, if it cannot be written.
    """
    text = os.fspath(path) if isinstance(path, (str, os.PathLike)) else path
    expect_shown(isinstance(text, str), name, "a path", path, TypeError)
    expect(bool(text) and "\0" not in text, name, "the name of a file", repr(text))
    expect(not text.endswith(os.sep), name, "a file", f"the folder {text}", IsADirectoryError)
    there, target = _stat(path, name), Path(os.path.realpath(path))
    if there is not None:
        kind = KINDS.get(stat.S_IFMT(there.st_mode))
        expect(kind != "folder", name, "a file", f"the folder {path}", IsADirectoryError)
        expect(kind is None, name, "a regular file, or a name for a new one", f"the {kind} {path}")
        lost = os.path.islink(path) and not target.exists()  # of /proc/self/fd, whose file has been deleted
        expect(not lost, name, "a file with a name", f"{path}, which leads to {target}")
    folder = target.parent
    shown = folder if os.path.islink(path) else Path(path).parent
    expect(folder.is_dir(), name, "a folder that exists and can be written to", str(shown), FileNotFoundError)
    writable = os.access(folder, os.W_OK | os.X_OK)
    expect(writable, name, "a folder that exists and can be written to", str(shown), PermissionError)
    writable = there is None or (os.access(target, os.W_OK) and _may_replace(folder.stat(), there))
    expect(writable, name, "a file that can be written to", str(path), PermissionError)
    for option, other in inputs:
        if other is not None:
            of_other = _stat(other, option)
            same = target == Path(os.path.realpath(other))
            same = same or (there is not None and of_other is not None and os.path.samestat(there, of_other))
            expect(not same, name, f"another file than {option}", f"{path}, which is {other}")
    return target


def _stat(path: str | Path, name: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as e:  # a name that is too long, links in a circle, a zero byte
        raise ValueError(f"{name}: expected the name of a file, got {path!s:.200} ({e!s:.200})") from e


def _may_replace(folder: os.stat_result, there: os.stat_result) -> bool:
    """Whether the folder's sticky bit, if it has one, lets this process replace the file."""
    if not folder.st_mode & stat.S_ISVTX or not hasattr(os, "geteuid"):
        return True
    return os.geteuid() in (0, folder.st_uid, there.st_uid)


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A temporary file beside the target; it replaces the target when the block ends without an error.

    The block writes to the file that is there, and does not put another one in its place: a lock on it says that it is
    being written. Links are followed; of a file that is replaced, permissions are kept and, where this process may,
    owner and group. Its other hard links keep what they have. What killed runs left of the same target is removed.

    Raises:
        FileNotFoundError, IsADirectoryError, PermissionError, ValueError: of `expect_target`.
    """
    target = expect_target(path)
    _clear(target)
    before = _stat(target, "path")
    with _locked_partial(target, functools.partial(_new_file, mode=0o666 if before is None else 0o600)) as partial:
        yield partial
        _sync(partial)
        if before is not None:
            _take_over(partial, before)
        partial.replace(target)
        with contextlib.suppress(OSError):  # not every file system syncs folders
            _sync(target.parent)


def write_or_keep(path: str | Path, name: str, save: Callable[[Path], None]) -> None:
    """`save(path)`, or where that fails, `save` into a new folder elsewhere: the error says where it is."""
    path = Path(path)
    try:
        return save(path)
    except (OSError, ValueError, RuntimeError) as e:
        problem = e
    for folder in (tempfile.gettempdir(), os.getcwd(), "/var/tmp", "/dev/shm"):
        kept = None
        try:
            kept = Path(tempfile.mkdtemp(prefix="flowkernels-", dir=folder))
            save(kept / path.name)
        except (OSError, ValueError, RuntimeError):  # full as well, or not there
            if kept is not None:
                shutil.rmtree(kept, ignore_errors=True)
        else:
            raise OSError(
                f"{name}: {path} could not be written ({problem}); it is kept as {kept / path.name}"
            ) from problem
    raise OSError(f"{name}: {path} could not be written, nor kept anywhere else ({problem})") from problem


@contextlib.contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder beside the target; it replaces the target when the block ends without an error."""
    target = Path(os.path.realpath(path))
    _clear(target)
    with _locked_partial(target, Path.mkdir) as partial:
        new = partial / "new"
        new.mkdir()
        yield new
        for file in new.rglob("*"):
            _sync(file)
        _sync(new)
        if target.exists():
            shutil.copymode(target, new)
            target.rename(partial / "previous")
        new.rename(target)
        with contextlib.suppress(OSError):
            _sync(target.parent)


@contextlib.contextmanager
def _locked_partial(target: Path, make) -> Iterator[Path]:
    """What `make(path)` makes beside the target, under a name and a lock that say that it is being written. Removed
    when the block ends, if it is still there."""
    stem, boot = _stem(target), _boot() or "0" * 12
    while True:
        partial = target.with_name(f".{stem}.{boot}-{secrets.token_hex(6)}.partial")
        make(partial)
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(partial, os.O_RDONLY)
            _lock(lock, wait=True)
            if os.path.exists(partial):
                break
            os.close(lock)
        # before it was locked, another process took it for one of a killed run: once more
    try:
        yield partial
    finally:
        _remove(partial, target)
        os.close(lock)


def _new_file(path: Path, mode: int) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))  # less the umask, which only the system knows


def _remove(partial: Path, target: Path) -> None:
    if partial.is_dir() and not partial.is_symlink():
        previous = partial / "previous"
        if previous.exists() and not target.exists():  # ended between two renames
            previous.rename(target)
        shutil.rmtree(partial, ignore_errors=True)
    else:
        partial.unlink(missing_ok=True)


def _stem(target: Path) -> str:
    """The target's name, or a hash of it where there is no room for more than the name."""
    try:
        room = os.pathconf(target.parent, "PC_NAME_MAX")
    except (AttributeError, OSError, ValueError):
        room = 255
    fits = len(os.fsencode(target.name)) + len(f"..{'0' * 25}.partial") <= room
    return target.name if fits else hashlib.sha256(os.fsencode(target.name)).hexdigest()[:32]


@functools.cache
def _boot() -> str | None:
    """Names this machine since it was started: only then are the locks of all its processes seen here."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", "")[:12]
    except OSError:
        return None


def _lock(fd: int, wait: bool) -> bool | None:
    """Whether the lock was got; None where there are none."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return True
    except OSError as e:
        return False if e.errno in (errno.EWOULDBLOCK, errno.EACCES) else None


def _clear(target: Path) -> None:
    """Remove what killed runs left of this target: files of this boot whose lock nobody holds."""
    boot = _boot()
    if boot is None:
        return
    ours = re.compile(rf"\.{re.escape(_stem(target))}\.{boot}-[0-9a-f]{{12}}\.partial")
    with contextlib.suppress(OSError):  # a folder that cannot be listed
        for entry in [e for e in os.scandir(target.parent) if ours.fullmatch(e.name)]:
            with contextlib.suppress(OSError):  # gone by now, or another user's
                fd = os.open(entry.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
                try:
                    if _lock(fd, wait=False):
                        _remove(Path(entry.path), target)
                finally:
                    os.close(fd)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _take_over(partial: Path, before: os.stat_result) -> None:
    """Permissions, and as far as this process may, owner and group of the file that is replaced."""
    mode, made = stat.S_IMODE(before.st_mode), partial.stat()
    if (made.st_uid, made.st_gid) != (before.st_uid, before.st_gid):
        try:
            os.chown(partial, before.st_uid, before.st_gid)
        except OSError:
            mode &= 0o777  # set-user-ID is not for another user
            try:
                os.chown(partial, -1, before.st_gid)
            except OSError:  # a group that may do no more than all others
                mode = mode & ~0o070 | (mode & 0o007) << 3
    partial.chmod(mode)


# Reading


def expect_file(path: str | Path, name: str = "path") -> Path:
    """A regular file; FileNotFoundError or ValueError, naming the argument, of anything else."""
    there = _stat(path, name)
    expect(there is not None, name, "a file", f"{path}, which is not there", FileNotFoundError)
    kind = KINDS.get(stat.S_IFMT(there.st_mode))
    expect(kind is None, name, "a file", f"the {kind} {path}", IsADirectoryError if kind == "folder" else ValueError)
    return Path(path)


@contextlib.contextmanager
def damaged(name: str, wanted: str, path: str | Path, how: str = "is damaged") -> Iterator[None]:
    """Whatever the reader of a damaged file raises, as one ValueError that names it."""
    try:
        yield
    except Exception as e:  # of foreign bytes, readers raise anything
        if isinstance(e, MemoryError) or getattr(e, "filename", None) is not None:  # of the system, about the file
            raise
        text = " ".join(str(e).split())
        why = text if type(e) is ValueError and text else f"{type(e).__name__}: {text}"
        raise ValueError(f"{name}: expected {wanted}, {path} {how} ({why[:300]})") from e


def read_json(path: str | Path, name: str, wanted: str) -> Any:
    """What a JSON file holds, no key of an object twice.

    Raises:
        OSError if it cannot be read; ValueError, naming the argument, if it is no JSON.
    """
    data = expect_file(path, name).read_bytes()
    try:
        # what so many values take as objects, at least
        takes = {b"[": 72, b"{": 72, b":": 150, b",": 32, b'"': 26}
        takes = sum(size * data.count(mark) for mark, size in takes.items())
        if takes > 2 * len(data) + VALUES:
            raise ValueError(f"of more values than its {len(data)} bytes can be meant to hold")
        return json.loads(data, object_pairs_hook=_once)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{name}: expected {wanted}, {path} is truncated or not JSON ({e})") from e


def _once(pairs: list[tuple[str, Any]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(k for k in keys if keys.count(k) > 1)!r} twice")
    return found


def plain(value) -> Any:
    """A value as JSON has it: numbers, arrays and tensors as Python's, paths and numbers that are not finite as texts.
    TypeError for anything else."""
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):  # tensors and arrays, and numpy's numbers
        return plain(value.tolist())
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        number = float(value)
        return number if abs(number) < float("inf") else str(number)
    expect_shown(isinstance(value, os.PathLike), "notes", "what JSON can hold", value, TypeError)
    return os.fspath(value)


def digest(data: dict, *parts) -> str:
    """SHA-256 of plain values and of bytes after them; ValueError for a number that is not finite."""
    known = {k: v for k, v in data.items() if k != SUM}
    text = json.dumps(known, sort_keys=True, separators=(",", ":"), allow_nan=False)
    found = hashlib.sha256(text.encode())
    for part in parts:
        found.update(part)
    return found.hexdigest()


def sealed(data: dict) -> dict:
    """Plain values with their digest."""
    return {**data, SUM: digest(data)}


def expect_unchanged(stored, found: str, way_out: str = "") -> None:
    """Raise unless the digest in a file is that of what is in it. way_out: for who changed it on purpose."""
    if stored != found:
        told = f"; {way_out}" if way_out else ""
        raise ValueError(f"its {SUM} is that of other contents: changed since it was written{told}")


def warn_of_no_sum(path: str | Path, stacklevel: int = 2) -> None:
    """Say, as the caller's caller, that a file could not be checked."""
    text = f"{path} has no {SUM}, as files of earlier versions and edited ones: damage to it would not be noticed"
    warnings.warn(f"{text}; save it again", UserWarning, stacklevel=stacklevel + 1)
