"""Numbered checkpoints beside the last one: run.pt is the newest, run-000500.pt the one after iteration 500."""

import contextlib
import os
import re
import shutil
from pathlib import Path

from flowkernels._files import whole_file


def numbered_path(path: Path, iteration: int) -> Path:
    return path.with_name(f"{path.stem}-{iteration:06d}{path.suffix}")


def numbered(path: Path) -> dict[int, Path]:
    """Those that are beside a checkpoint, by their iteration, rising."""
    pattern = re.compile(rf"{re.escape(path.stem)}-(\d{{6,}}){re.escape(path.suffix)}")
    with contextlib.suppress(OSError):  # no folder, or one that cannot be listed
        found = [(pattern.fullmatch(name), name) for name in os.listdir(path.parent)]
        of = {int(match[1]): path.with_name(name) for match, name in found if match and path.with_name(name).is_file()}
        return dict(sorted(of.items()))
    return {}


def keep_numbered(path: Path, iteration: int, keep: int | None) -> None:
    """Give the checkpoint that is there, of this iteration, its number too, in no more room where the file system has
    hard links; of those up to it the last `keep` stay, None all."""
    new = numbered_path(path, iteration)
    new.unlink(missing_ok=True)
    try:
        os.link(os.path.realpath(path), new)
    except OSError:  # of another file system, or one without links
        with whole_file(new) as partial:
            shutil.copyfile(path, partial)
    if keep is not None:
        for old in [file for it, file in numbered(path).items() if it <= iteration][:-keep]:
            old.unlink(missing_ok=True)
