"""Checkpoints of a run on many devices: folders, in which torch.distributed.checkpoint has the tensors, of each rank
its shard, so that a run goes on with another number of ranks.

    checkpoint/00000500/run.pt           plain values, random states, and the checksums of the other files
                        __0_0.distcp ..  tensors; .metadata says which are where
    checkpoint/00001000/                 the next one, after which older ones are deleted
"""

import contextlib
import hashlib
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from flowkernels._checks import describe, expect
from flowkernels._files import SUM, damaged, expect_unchanged, whole_folder
from flowkernels._weights import read_torch
from flowkernels.runtime.ranks import Ranks
from flowkernels.runtime.sharded import is_sharded
from flowkernels.velocity.hashes import tensors_hash

FORMAT, VERSION = "flowkernels.straighten.ranks", 1
PLAIN, WANTED = "run.pt", "a checkpoint of a training with a group"
SHARED = ("student", "optimizer", "average", "rolled_out", "evaluations")  # of the contents, whose tensors are large
EACH = ("global_rng", "totals", "counts")  # which every rank has its own of
TENSOR = "tensor in a file: "
T = TypeVar("T")


def checkpoints_in(folder: Path) -> list[Path]:
    """Those that are whole, the last one last."""
    found = [p for p in folder.iterdir() if p.name.isdigit() and (p / PLAIN).exists()] if folder.is_dir() else []
    return sorted(found, key=lambda p: int(p.name))


def expect_folder(path: Path, name: str) -> None:
    """Raise for a file, or a folder of something else, in the place of the checkpoints of a group."""
    expect(path.is_dir() or not path.exists(), name, "with a group a folder, or the name of one", f"the file {path}")
    others = (
        [p.name for p in path.iterdir() if not (p.name.isdigit() or p.name.startswith("."))] if path.is_dir() else []
    )
    expect(not others, name, "a folder of checkpoints alone", f"{path}, with {', '.join(others[:3])}")


def write(folder: Path, iteration: int, contents: dict[str, Any], ranks: Ranks, keep: int | None = 1) -> None:
    """Write a checkpoint, whole or not at all, and then delete all but the last `keep`; on every rank an error where
    one cannot write, or cannot see what others have written."""
    from torch.distributed import checkpoint as dcp  # a tenth of a second, where it is needed

    tensors: dict[str, Tensor] = {}
    plain = {key: value for key, value in contents.items() if key not in EACH}
    for key in SHARED:
        if plain.get(key) is not None:
            plain[key] = _taken(plain[key], key, tensors)
    plain["ranks"] = ranks.of_each({key: contents[key] for key in EACH})
    with _new_folder(folder, iteration, ranks) as new:
        writer = dcp.FileSystemWriter(new)
        dcp.save(tensors, storage_writer=writer, process_group=ranks.group)
        names = ranks.first(lambda: sorted(p.name for p in new.iterdir()))
        mine = names[ranks.rank :: ranks.size]
        sums = _everywhere(ranks, lambda: {name: _sum(new / name) for name in mine})
        plain |= {"format": FORMAT, "version": VERSION, "files": {k: v for part in sums for k, v in part.items()}}
        ranks.first(lambda: torch.save({**plain, SUM: tensors_hash(plain)}, new / PLAIN))
        if ranks.is_first:  # what is farther is of a run that this one has not gone on from
            _remove(p for p in checkpoints_in(folder) if int(p.name) > iteration)
    if ranks.is_first and keep is not None:
        _remove(checkpoints_in(folder)[:-keep])


def _remove(folders: Iterable[Path]) -> None:
    for folder in folders:
        (folder / PLAIN).unlink(missing_ok=True)  # without which it is none
        shutil.rmtree(folder, ignore_errors=True)


def read(path: Path, student: Mapping[str, Any], trained: list[nn.Parameter], ranks: Ranks) -> dict[str, Any]:
    """What a checkpoint holds, tensors of the student, of its average and the optimiser's sharded as the student's are;
    ValueError, on every rank, if it is not what was written.

    student: its state dict, under names without wrappers. trained: the optimiser's parameters, in order.
    What a rank has of its own is there for as many ranks; of others the random states are missing.
    """
    from torch.distributed import checkpoint as dcp

    saved = ranks.first(lambda: _read_plain(path))
    names = sorted(saved["files"])
    _everywhere(
        ranks, lambda: [_expect_sum(path / name, saved["files"][name]) for name in names[ranks.rank :: ranks.size]]
    )
    reader = dcp.FileSystemReader(path)
    with damaged("checkpoint", WANTED, path):
        there = reader.read_metadata().state_dict_metadata
        wanted = set(_names({key: saved.get(key) for key in SHARED}))
        if wanted != set(there):
            raise ValueError(f"tensors {sorted(wanted ^ set(there))[:3]} in one of its files alone")
        like = {name: _like(name, student, trained) for name in wanted}
        tensors = {name: _made(there[name], like[name]) for name in wanted}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load(tensors, storage_reader=reader, process_group=ranks.group, no_dist=ranks.group is None)
    for key in SHARED:
        if saved.get(key) is not None:
            saved[key] = _put(saved[key], tensors)
    each = saved.pop("ranks")
    if len(each) == ranks.size:
        saved |= each[ranks.rank]
    else:  # sums are one rank's
        sums = {key: sum(of[key] for of in each) for key in ("totals", "counts")}
        saved |= {key: t if ranks.is_first else torch.zeros_like(t) for key, t in sums.items()}
        saved["global_rng"] = None
    return {key: value for key, value in saved.items() if key not in ("format", "version", "files", SUM)}


@contextlib.contextmanager
def _new_folder(folder: Path, iteration: int, ranks: Ranks) -> Iterator[Path]:
    """Where all ranks write; its name is the iteration's when the block ends without an error."""

    def begin() -> Path:
        folder.mkdir(exist_ok=True)
        return stack.enter_context(whole_folder(folder / f"{iteration:08}"))

    with contextlib.ExitStack() as stack:
        new = ranks.first(begin)
        _everywhere(ranks, lambda: expect(new.is_dir(), "checkpoint", "a folder that all ranks see", f"{new}"))
        yield new
    ranks.wait()


def _everywhere(ranks: Ranks, make: Callable[[], T]) -> list[T]:
    """What each rank makes; what one raises, every one does."""
    try:
        mine, problem = make(), None
    except Exception as e:
        mine, problem = None, (type(e) is ValueError, f"{e}")
    found = ranks.of_each((mine, problem))
    for _, problem in found:
        if problem is not None:
            raise (ValueError if problem[0] else OSError)(problem[1])
    return [value for value, _ in found]


def _taken(tree: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """The tree with a name in the place of each tensor, which are in `tensors`."""
    if isinstance(tree, Tensor):
        name = path if path not in tensors else f"{path}#{len(tensors)}"
        tensors[name] = tree.detach()
        return TENSOR + name
    if isinstance(tree, Mapping):
        return {key: _taken(value, f"{path}/{key}", tensors) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(_taken(value, f"{path}/{i}", tensors) for i, value in enumerate(tree))
    return tree


def _put(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(tree, str) and tree.startswith(TENSOR):
        return tensors[tree.removeprefix(TENSOR)]
    if isinstance(tree, dict):
        return {key: _put(value, tensors) for key, value in tree.items()}
    return type(tree)(_put(value, tensors) for value in tree) if type(tree) in (list, tuple) else tree


def _names(tree: Any) -> Iterator[str]:
    if isinstance(tree, str) and tree.startswith(TENSOR):
        yield tree.removeprefix(TENSOR)
    for value in tree.values() if isinstance(tree, dict) else tree if type(tree) in (list, tuple) else ():
        yield from _names(value)


def _like(name: str, student: Mapping[str, Any], trained: list[nn.Parameter]) -> Any:
    """The tensor of the student that one of the files goes with."""
    kind, _, key = name.partition("/")
    if kind == "optimizer":
        place = key.split("/")[1]
        return trained[int(place)] if place.isdigit() and int(place) < len(trained) else None
    return student.get(key.removeprefix("module.").removeprefix("best/weights/"))


def _made(about: Any, like: Any) -> Tensor:
    """What a tensor of the files is read into, sharded as the student's where it is of that shape."""
    shape, dtype = tuple(about.size), about.properties.dtype
    if is_sharded(like) and tuple(like.shape) == shape:
        return torch.empty_like(like, dtype=dtype, requires_grad=False)
    return torch.empty(shape, dtype=dtype, device="cpu")


def _read_plain(path: Path) -> dict[str, Any]:
    saved = read_torch(path / PLAIN, "checkpoint", WANTED)
    with damaged("checkpoint", WANTED, path / PLAIN):
        known = saved["format"], saved["version"]
        if known != (FORMAT, VERSION):
            raise ValueError(f"of format {describe(known)}")
        expect_unchanged(saved.pop(SUM), tensors_hash(saved))
    return saved


def _expect_sum(path: Path, wanted: str) -> None:
    with damaged("checkpoint", WANTED, path):
        if not path.exists():
            raise ValueError("it is not there, or this rank does not see it")
        expect_unchanged(_sum(path), wanted)


def _sum(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while part := f.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()
