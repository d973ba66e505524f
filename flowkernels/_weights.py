"""Weights in files: safetensors with a digest, which this package writes, and what torch.save wrote: docs/files.md."""

import io
import json
import pickle
import pickletools
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from flowkernels._checks import FLOATS, expect
from flowkernels._files import (
    SUM,
    VALUES,
    damaged,
    digest,
    expect_file,
    expect_unchanged,
    plain,
    warn_of_no_sum,
    whole_file,
)
from flowkernels.runtime.torch_private import REBUILD_PARAMETER, REBUILD_TENSOR

CODES = {  # safetensors' names
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8"},
    **{torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8"},
    **{torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64", torch.bool: "BOOL"},
}


# safetensors


def expect_storable(state: Mapping[str, Any], name: str) -> None:
    """Raise unless `write` can store all of a state dict."""
    for key, t in state.items():
        fits = _is_plain(t) and t.dtype in CODES
        expect(fits, name, f"a state of plain tensors, to be written as safetensors ({key!r} is none)", t, TypeError)


def write(path: str | Path, tensors: Mapping[str, Tensor], **metadata) -> None:
    """A safetensors file of these tensors, whole or not there; what is no text in the metadata is written as JSON."""
    expect_storable(tensors, "tensors")
    texts = {k: v if isinstance(v, str) else json.dumps(plain(v), allow_nan=False) for k, v in metadata.items()}
    texts[SUM] = _digest(tensors, texts)
    # larger elements first, so that each tensor begins at a multiple of its elements' size
    stored = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header, end = {"__metadata__": texts}, 0
    for name, t in stored:
        begin, end = end, end + t.numel() * t.element_size()
        header[name] = dict(dtype=CODES[t.dtype], shape=list(t.shape), data_offsets=[begin, end])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with whole_file(path) as partial, open(partial, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for _, t in stored:
            f.write(_bytes(t))


def read(path: str | Path, name: str, wanted: str, stacklevel: int = 2) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file on the CPU, and its metadata.

    A file of ours without a digest is read with a warning; of other programs it need not have one.

    Raises:
        OSError if it cannot be read; ValueError, naming the argument, if it is no such file or was changed.
    """
    path = expect_file(path, name)
    with damaged(name, wanted, path, "is not one, or damaged"):
        state, metadata, known = _read_whole(path)
    if not known and "notes" in metadata:
        warn_of_no_sum(path, stacklevel + 1)
    return state, metadata


def _read_whole(path: Path) -> tuple[dict[str, Tensor], dict[str, str], bool]:
    """Tensors, metadata and whether there was a digest; again, where another process has replaced the file meanwhile:
    it is opened several times, safetensors' own included."""
    while True:
        before = _version(path)
        try:
            expect_header(path)
            with safe_open(path, "pt") as f:
                metadata, state = f.metadata() or {}, {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118
            if SUM in metadata:
                expect_unchanged(metadata.pop(SUM), _digest(state, metadata))
                return state, metadata, True
            return state, metadata, False
        except Exception:
            if _version(path) == before:
                raise


def _version(path: Path) -> tuple[int, ...]:
    about = path.stat()
    return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns


def expect_header(path: Path) -> None:
    """Raise if a safetensors file says that it has more tensors than its bytes can be meant to hold."""
    with open(path, "rb") as f:
        header = f.read(min(int.from_bytes(f.read(8), "little"), path.stat().st_size))
    if 600 * header.count(b"{") + 100 * header.count(b'"') > 2 * path.stat().st_size + VALUES:
        raise ValueError(f"a header of more entries than its {len(header)} bytes can be meant to hold")


def parsed(metadata: Mapping[str, str], key: str) -> dict:
    """An entry of the metadata that is a JSON object; empty where there is none."""
    found = json.loads(metadata.get(key, "{}"))
    expect(isinstance(found, dict), key, "a JSON object", found)
    return found


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    stored = sorted(tensors.items())
    about = {name: [CODES[t.dtype], list(t.shape)] for name, t in stored}
    return digest({"metadata": dict(metadata), "tensors": about}, *(_bytes(t) for _, t in stored))


def _bytes(t: Tensor):
    return t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


# torch.save

PLAIN = {"collections.OrderedDict", "torch.Size", REBUILD_PARAMETER}
REBUILT = set(REBUILD_TENSOR)
STORAGES = {  # bytes of an element
    **dict.fromkeys(("UntypedStorage", "ByteStorage", "CharStorage", "BoolStorage"), 1),
    **dict.fromkeys(("ShortStorage", "HalfStorage", "BFloat16Storage"), 2),
    **dict.fromkeys(("IntStorage", "FloatStorage"), 4),
    **dict.fromkeys(("LongStorage", "DoubleStorage", "ComplexFloatStorage"), 8),
    **dict.fromkeys(("ComplexDoubleStorage",), 16),
}
OPCODES = """
    PROTO STOP MARK POP POP_MARK DUP GLOBAL REDUCE BUILD BINPERSID NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2
    LONG LONG1 LONG4 BINFLOAT BINUNICODE SHORT_BINSTRING BINSTRING EMPTY_LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1
    TUPLE2 TUPLE3 EMPTY_DICT SETITEM SETITEMS BINPUT LONG_BINPUT BINGET LONG_BINGET
"""


def read_torch(path: str | Path, name: str, wanted: str) -> Any:
    """Tensors on the CPU and plain values in a file of `torch.save`, whose records are whole and as long as it says.

    torch.load itself looks at no checksum, and before 2.10 at no length.

    Raises:
        OSError if it cannot be read; ValueError, naming the argument, if it is something else or damaged.
    """
    path = expect_file(path, name)
    with damaged(name, wanted, path, "is not one, or damaged"):
        _expect_records(path)
        return torch.load(path, map_location="cpu", weights_only=True)


def _expect_records(path: Path) -> None:
    size = path.stat().st_size
    if not zipfile.is_zipfile(path):
        raise ValueError("no file of torch.save as of torch 1.6: truncated, or something else")
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: info for info in archive.infolist()}
        stored = all(info.compress_type == zipfile.ZIP_STORED for info in records.values())
        lengths = sum(info.file_size for info in records.values())
        if not stored or lengths > size or len(records) < len(archive.infolist()):
            raise ValueError(f"records of {lengths} bytes, compressed or twice, in a file of {size}")
        for info in records.values():
            info.CRC = info.CRC or None  # 0 where torch was told to make none
            with archive.open(info) as record:
                while record.read(1 << 20):  # raises at the end if the checksum is another
                    pass
        pickles = [record for record in records if record.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"expected one data.pkl, got {len(pickles)}")
        folder = pickles[0].removesuffix("data.pkl")
        for key, length in _claims(archive.read(pickles[0]), size).items():
            record = records.get(f"{folder}data/{key}")
            there = None if record is None else record.file_size
            if there != length:
                raise ValueError(f"data/{key}: expected {length} bytes, got {'none' if there is None else there}")


def _claims(data: bytes, size: int) -> dict[str, int]:
    """The storages that a pickle of torch.save refers to, and how many bytes each is said to have. Nothing in it is
    imported or called."""
    values, known, named = 0, set(OPCODES.split()), None
    for opcode, arg, _ in pickletools.genops(data):
        if opcode.name == "GLOBAL":
            named = arg.replace(" ", ".")
        if opcode.name not in known:
            made = f"{named}, which is no tensor or plain value" if opcode.name == "NEWOBJ" and named else None
            raise ValueError(made or f"a pickle with {opcode.name}")
        if opcode.name == "LONG_BINPUT" and arg > len(data):
            raise ValueError(f"a pickle of {len(data)} bytes with {arg} objects")
        values += 32 if opcode.name in ("BINFLOAT", "BININT", "BININT1", "BININT2") else 64
        if values > 2 * size + VALUES:
            raise ValueError(f"a pickle of more values than its {len(data)} bytes can be meant to hold")
    found = _Claims(data)
    found.load()
    return found.lengths


class _Claims(pickle.Unpickler):
    """Reads which storages there are, with stand-ins for all that is made of them."""

    def __init__(self, data: bytes):
        super().__init__(io.BytesIO(data))
        self.lengths: dict[str, int] = {}

    def find_class(self, module: str, name: str):
        known = f"{module}.{name}"
        if module in ("torch", "torch.storage") and name in STORAGES:
            return _Storage(STORAGES[name])
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if known in PLAIN | REBUILT:
            return _StandIn
        raise ValueError(f"{known}, which is no tensor or plain value")

    def persistent_load(self, pid):
        kind, storage, key, _, count = pid
        if kind != "storage" or not isinstance(storage, _Storage) or type(key) is not str or type(count) is not int:
            raise ValueError(f"a storage that is none: {pid!r:.80}")
        length = count * storage.bytes
        if self.lengths.setdefault(key, length) != length:
            raise ValueError(f"data/{key} in two lengths, {self.lengths[key]} and {length}")
        return _StandIn()


@dataclass
class _Storage:
    """A kind of storage. bytes: of one of its elements."""

    bytes: int


class _StandIn(dict):
    def __init__(self, *_):
        super().__init__()

    def __setstate__(self, state):
        pass


# What they are for


def expect_fits(state: Mapping[str, Any], own: Mapping[str, Any], name: str, what: str) -> None:
    """Raise unless a state with the names, shapes and kinds of numbers of `own` can be loaded from this one.

    Floating-point numbers of float64, float32, bfloat16 and float16 are rounded to each other; all else is not cast.
    """
    tensors = all(isinstance(key, str) and _is_plain(t) for key, t in state.items())
    expect(tensors, name, f"names and tensors, weights that fit {what}", "something else")
    both = [key for key in own if key in state]
    shaped = {key: list(getattr(own[key], "shape", [])) for key in both}
    kinds = {key: getattr(own[key], "dtype", None) for key in both}
    problems = {
        "missing": sorted(own.keys() - state.keys()),
        "unexpected": sorted(state.keys() - own.keys()),
        "mis-shaped": [
            f"{k} {list(state[k].shape)} for {shaped[k]}" for k in both if list(state[k].shape) != shaped[k]
        ],
        "of other numbers": [
            f"{k} {state[k].dtype} for {kind}" for k, kind in kinds.items() if not _converts(state[k].dtype, kind)
        ],
    }
    told = [f"{len(keys)} {kind} ({', '.join(keys[:4])})" for kind, keys in problems.items() if keys]
    expect(not told, name, f"weights that fit {what}", "; ".join(told))


def _is_plain(t) -> bool:
    plain = isinstance(t, Tensor) and t.layout is torch.strided and t.device.type != "meta"
    return plain and not t.is_quantized and not t.is_nested


def _converts(given: torch.dtype, own: torch.dtype | None) -> bool:
    return given == own or (given in FLOATS and own in FLOATS)
