"""A bank in a folder: safetensors files of a chunk of trajectories each, mapped into memory, and a JSON file that says
of which bank they are."""

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowkernels import _weights
from flowkernels._checks import expect, expect_path
from flowkernels._files import SUM, damaged, expect_file, expect_unchanged, read_json, sealed, whole_file
from flowkernels.sampling.teacher_solver import ENTRY
from flowkernels.training.bank.by_rank import spread
from flowkernels.training.bank.starts import Layout
from flowkernels.training.bank.storage import staged

FORMAT, VERSION = "flowkernels.trajectories", 1
MANIFEST, TABLES = "bank.json", "tables.safetensors"
STATES, COLUMN = "states", "conditioning."
DTYPES = {str(d): d for d in (torch.float32, torch.float64, torch.bfloat16)}


class Shards:
    """As `Memory`, in a folder. manifest: what the bank is, in plain values (docs/bank.md)."""

    kind = "folder"

    def __init__(self, folder: Path, device: torch.device, manifest: Mapping[str, Any], tables: Mapping[str, Tensor]):
        self.folder, self.device, self.manifest, self.tables = folder, device, dict(manifest), tables
        self.size, self.chunk = manifest["size"], manifest["chunk"]
        self.shape, self.dtype = tuple(manifest["shape"]), DTYPES[manifest["dtype"]]
        self.tickets: list[int | None] = [None] * -(-self.size // self.chunk)
        self._maps: dict[int, dict[str, Tensor]] = {}
        self._arrays: dict[int, dict[str, np.ndarray]] = {}

    def __getstate__(self) -> dict:
        return vars(self) | {"_maps": {}, "_arrays": {}}  # another process makes its own

    @property
    def id(self) -> str:
        return self.manifest[SUM]

    def path(self, k: int) -> Path:
        return self.folder / f"shard-{k:06}.safetensors"

    def about(self) -> dict[str, Any]:
        """What the bank is, without what its file has beside."""
        return {key: value for key, value in self.manifest.items() if key not in ("format", "version", SUM)}

    def adopt(self, about: Mapping[str, Any]) -> bool:
        """Take what the folder has, if it has any: of the bank that it is `about`, the attributes of the teacher's
        modules aside. ValueError, naming what differs, for another; and for a shard that is none of it."""
        if not (self.folder / MANIFEST).exists():
            return False
        manifest, _ = read_manifest(self.folder)
        unknown = {ENTRY: None, "order": None}  # of Euler's steps, and of chunks one after the other, nothing is said
        for key, value in (unknown | about).items():
            expected = f"a folder of this bank ({key} = {_short(value)})"
            same = key == "attributes" or manifest.get(key, unknown.get(key, _short)) == value
            expect(same, "storage", expected, f"{self.folder}, where {key} = {_short(manifest.get(key))}")
        self.manifest = manifest
        self.scan(check=True)
        return True

    def _begin(self) -> None:
        """Write what is there beside the shards, the manifest last."""
        self.folder.mkdir(exist_ok=True)
        if self.tables:
            _weights.write(self.folder / TABLES, {key: t.cpu() for key, t in self.tables.items()}, bank=self.id)
        with whole_file(self.folder / MANIFEST) as partial:
            partial.write_text(json.dumps(self.manifest, indent=1))

    def layout(self) -> Layout:
        columns = [t for name, t in self.tensors(0).items() if name != STATES]
        row = sum(t[:1].numel() * t.element_size() for t in columns)
        return Layout(self.shape, self.dtype, row, tuple(self.manifest["columns"]))

    def drawn_hash(self, k: int) -> str:
        """Of what a shard was made of."""
        return _mapped(self.path(k))[0]["start"]

    def scan(self, check: bool) -> None:
        """Look at all shards that are there; ValueError, naming one, for what is none of this bank. check: at every
        byte, else at the sizes and headers."""
        self._maps.clear(), self._arrays.clear()  # another rank may have put files in the place of those
        for k in range(len(self.tickets)):
            self.tickets[k] = self._ticket(k, check) if self.path(k).exists() else None

    def _ticket(self, k: int, check: bool) -> int:
        path, wanted = self.path(k), f"a shard of the bank in {self.folder}"
        how = "is not one, or truncated (without it, fill() makes it anew)"
        with damaged("storage", wanted, path, how):
            metadata, tensors = _mapped(path)
            if check:
                metadata, tensors = _weights.read(path, "storage", wanted)[1], tensors
            m = min(self.chunk, self.size - k * self.chunk)
            states = tensors[STATES]
            if metadata.get("bank") != self.id or metadata.get("chunk") != str(k):
                raise ValueError("of another bank or place")
            if states.shape != (len(self.manifest["times"]), m, *self.shape) or states.dtype != self.dtype:
                raise ValueError(f"states of {states.dtype}, {list(states.shape)}")
            wanted_columns = {STATES, *(COLUMN + key for key in self.manifest["columns"])}
            if tensors.keys() != wanted_columns or any(len(tensors[name]) != m for name in wanted_columns - {STATES}):
                raise ValueError(f"{sorted(tensors)}, or of other than {m} rows")
            for key, table in self.tables.items():
                index = tensors[COLUMN + key]
                if index.dtype != torch.int64 or not bool(((index >= 0) & (index < len(table))).all()):
                    raise ValueError(f"places outside of the {len(table)} rows of the table {key}")
            ticket, C = int(metadata["ticket"]), len(self.tickets)
            if ticket < 0 or (spread(ticket, C) if "order" in self.manifest else ticket % C) != k:
                raise ValueError(f"ticket {ticket}")
        return ticket

    def expect_space(self, nbytes: int, todo: int) -> None:
        """That there is room for the chunks still to be made; a shard that replaces another is written beside it."""
        free = shutil.disk_usage(self.folder if self.folder.exists() else self.folder.parent).free
        told = f"{todo / 2**30:.3g} GiB of trajectories for {self.folder}"
        expect(todo <= free, "storage", f"what fits into {free / 2**30:.3g} GiB of the disk", told)

    def into(self, k: int, rows: slice, knots: int, like: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.empty(knots, rows.stop - rows.start, *like.shape[1:], dtype=dtype, device="cpu")

    def put(self, k: int, rows: slice, states: Tensor, columns: dict[str, Tensor], ticket: int, start: str) -> None:
        """Write a shard; OSError naming it, with those before kept, where that fails."""
        tensors = {STATES: states} | {COLUMN + key: column.cpu() for key, column in columns.items()}
        try:
            if not (self.folder / MANIFEST).exists():
                self._begin()
            _weights.write(self.path(k), tensors, bank=self.id, chunk=str(k), ticket=str(ticket), start=start)
        except OSError as e:
            told = (
                f"storage: {self.path(k)} could not be written ({e}); the shards before are whole, fill() goes on there"
            )
            raise OSError(e.errno, told) from e
        self.tickets[k] = ticket
        self._maps.pop(k, None), self._arrays.pop(k, None)

    def settle(self) -> None:
        """Nothing is left to wait for."""

    def tensors(self, k: int) -> dict[str, Tensor]:
        """Of a shard, mapped: what is read of it is what is looked at."""
        if k not in self._maps:
            with damaged("storage", f"a shard of the bank in {self.folder}", self.path(k), "is not one, or truncated"):
                self._maps[k] = _mapped(expect_file(self.path(k), "storage"))[1]
        return self._maps[k]

    def _bytes(self, k: int) -> dict[str, np.ndarray]:
        """The same as bytes, those of a trajectory, or of one of its states, in the last dimension: rows are copied one
        by one, for a batch has few in a shard."""
        if k not in self._arrays:
            self._arrays[k] = {name: _as_bytes(t, 2 if name == STATES else 1) for name, t in self.tensors(k).items()}
        return self._arrays[k]

    def ends(self, first: Tensor, last: Tensor, sample: Tensor) -> Tensor:
        out = staged(self.device, self.dtype, 2, len(sample), *self.shape)
        (begins, ends), places = _as_bytes(out, 2), zip(sample.tolist(), first.tolist(), last.tolist(), strict=True)
        for i, (s, a, b) in enumerate(places):
            k, row = divmod(s, self.chunk)
            states = self._bytes(k)[STATES]
            begins[i], ends[i] = states[a, row], states[b, row]
        return out

    def rows(self, sample: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, column in self.tensors(0).items():
            if name == STATES:
                continue
            out = staged(self.device, column.dtype, len(sample), *column.shape[1:])
            into, found[name.removeprefix(COLUMN)] = _as_bytes(out, 1), out
            for i, s in enumerate(sample.tolist()):
                k, row = divmod(s, self.chunk)
                into[i] = self._bytes(k)[name][row]
        return found

    def knots(self, places: list[int], count: int, dtype: torch.dtype) -> Tensor:
        found = torch.empty(len(places), count, *self.shape, dtype=dtype, device=self.device)
        for k in range(-(-count // self.chunk)):
            rows = slice(k * self.chunk, min((k + 1) * self.chunk, count))
            part = self.tensors(k)[STATES][:, : rows.stop - rows.start]
            found[:, rows] = part[places].to(self.device, dtype)
        return found


def sealed_manifest(about: Mapping[str, Any]) -> dict[str, Any]:
    """What a folder says of its bank, whose checksum is the bank's identity there."""
    return sealed({"format": FORMAT, "version": VERSION, **about})


def read_manifest(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """That of a folder, and its tables; ValueError, naming `storage`, for what is none."""
    path, wanted = folder / MANIFEST, "the manifest of a bank"
    manifest = read_json(path, "storage", wanted)
    with damaged("storage", wanted, path):
        known = (manifest["format"], manifest["version"])
        if known != (FORMAT, VERSION):
            raise ValueError(f"of format {known}")
        expect_unchanged(manifest[SUM], sealed(manifest)[SUM])
        size, chunk, shape = manifest["size"], manifest["chunk"], manifest["shape"]
        if not (math.prod([size, chunk, *shape]) >= 1 and manifest["dtype"] in DTYPES):
            raise ValueError("no sizes of a bank")
    if not manifest["tables"]:
        return manifest, {}
    tables, metadata = _weights.read(folder / TABLES, "storage", "the tables of a bank")
    of_it = metadata.get("bank") == manifest[SUM] and sorted(tables) == manifest["tables"]
    expect(of_it, "storage", f"the tables of the bank in {folder}", f"{folder / TABLES}, of another")
    return manifest, tables


def expect_folder(value) -> Path:
    """A folder that is there or can be made."""
    folder = expect_path(value, "storage").absolute()  # wherever the process goes later
    expect(folder.exists() or not folder.is_symlink(), "storage", "a folder", f"{folder}, a link to nothing")
    expect(folder.parent.is_dir(), "storage", "a folder, or the name of one in a folder that exists", str(folder))
    expect(folder.is_dir() or not folder.exists(), "storage", "a folder", f"the file {folder}")
    others = (
        folder.is_dir()
        and not (folder / MANIFEST).exists()
        and any(not p.name.startswith(".") and p.name != TABLES for p in folder.iterdir())
    )
    expect(
        not others, "storage", f"an empty folder, or that of a bank ({MANIFEST})", f"{folder}, which holds other files"
    )
    return folder


def _mapped(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata of a safetensors file, and its tensors as views of the file, mapped copy-on-write. ValueError where
    the file is not as long as its header says."""
    _weights.expect_header(path)
    size = path.stat().st_size
    with open(path, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if 8 + length > size:
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        header = json.loads(f.read(length))
    data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    metadata, tensors, end = header.pop("__metadata__", {}), {}, 0
    kinds = {name: kind for kind, name in _weights.CODES.items()}
    for name, about in header.items():
        begin, stop = about["data_offsets"]
        dtype, shape = kinds[about["dtype"]], about["shape"]
        if stop - begin != math.prod(shape) * dtype.itemsize or not 0 <= begin <= stop:
            raise ValueError(f"{name} of {stop - begin} bytes for {dtype}, {shape}")
        tensors[name] = data[8 + length + begin : 8 + length + stop].view(dtype).view(shape)
        end = max(end, stop)
    if size != 8 + length + end:
        raise ValueError(f"{size} bytes, where its header says {8 + length + end}")
    return metadata, tensors


def _as_bytes(t: Tensor, rows: int) -> np.ndarray:
    """A contiguous tensor on the CPU as bytes, of so many leading dimensions and one more."""
    return t.reshape(*t.shape[:rows], -1).view(torch.uint8).numpy()


def _short(value) -> str:
    return f"{value!r:.80}"
