"""Calls of an op with their real inputs, in a file: `record_calls` and `flowkernels record` write it, `open_calls` and
`flowkernels replay` read it.

The file is safetensors. A tensor in it is a region of memory, with all that lies between the elements of the views into
it: views that overlap share one, in the calls' tensors too, and regions of equal bytes are stored once. What is only
written to is not stored. The metadata has the rest under "flowkernels", as JSON: the op, what the calls were made with,
and for each call its schema, its arguments by name and where their regions were, up to a page.
"""

import contextlib
import hashlib
import json
import math
import re
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flowkernels._checks import (
    expect,
    expect_int,
    expect_path,
    expect_positive_int,
    expect_real,
    expect_room,
    expect_shown,
)
from flowkernels._files import damaged, expect_file, expect_target, whole_file, write_or_keep
from flowkernels._weights import CODES, expect_header
from flowkernels.ops.public import OPS
from flowkernels.runtime import environment, observers

FORMAT = 1
PAGE = 4096  # bytes; a region's place is kept up to a multiple of it
CHUNK = 64 << 20  # bytes that are read, hashed and written at once
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in CODES}
DEVICES = ("cpu", "cuda", "mps", "xpu")  # with memory of their own, where a call can have been


@contextlib.contextmanager
def record_calls(op: str, path: str | Path, *, calls: int = 8, max_gb: float = 4.0) -> Iterator["Recording"]:
    """Store the inputs of the calls of `op` inside the `with` block, from any thread, for `flowkernels replay`.

    Stored is the first call of each signature: shapes, strides, dtypes and which tensors overlap, and all other
    arguments but floating-point numbers. The inputs go to disk as they are seen; memory holds none of them. Calls by
    the stages, by a `FusedSampler` or a `FusedHead` and inside torch.compile count. None are seen where there are none:
    in a replayed CUDA graph, in torch.func's transforms and in the loop of `sample(capture="compile")`, which run as
    plain torch; nor in other processes, nor of a loop that was running before the block.

    Args:
        op: one of `ops.OPS`, its form that writes to a given tensor included.
        path: the safetensors file to write, at the end of the block or when an error leaves it; one that is there is
            replaced.
        calls: the largest number of calls to store.
        max_gb: the largest size of the file in GB. A call that does not fit is left out, and the recording says so.

    Yields:
        Recording; printed, it says what was seen and stored.

    Raises:
        ValueError: naming the argument; after the block, if no call was stored. OSError if the file cannot be written.

    Examples:
        >>> import os
        >>> with fk.record_calls("euler_step", "calls.safetensors"):  # `flowkernels replay` runs them again
        ...     x = fk.euler_step(torch.zeros(2), torch.ones(2), 0.5)
        >>> os.path.exists("calls.safetensors")
        True
    """
    expect_shown(isinstance(op, str) and op in OPS, "op", f"one of {', '.join(OPS)}", op)
    calls = expect_positive_int(calls, "calls")
    max_gb = expect_real(max_gb, "max_gb", "more than 0", lambda a: a > 0)
    path = expect_path(path, "path")
    expect(path.parent.is_dir(), "path", "a file in a folder that exists", str(path))
    target = expect_target(path)  # now: the program may go to another folder
    with tempfile.TemporaryFile(dir=target.parent) as spool:
        recording = Recording(op, path, target, calls, max_gb, spool)
        try:
            with observers.recorded(recording.see):
                yield recording
        except BaseException:
            recording.write()
            raise
        recording.write()
        if recording.problem is not None:
            raise recording.problem
        if not recording.calls:
            seen = "; ".join([f"none of {recording.seen}", *recording.left_out])
            expect(False, op, f"a call of it, to store in {path}", seen)


class Recording:
    """What `record_calls` has seen. calls: the stored ones, as in the file. seen: how many there were of the op."""

    def __init__(self, op: str, path: Path, target: Path, most: int, max_gb: float, spool):
        self.op, self.path, self.most, self.max_gb, self.spool = op, path, most, max_gb, spool
        self.target = target
        self.calls: list[dict] = []
        self.seen, self.left_out, self.problem = 0, [], None
        self._signatures: dict[tuple, dict | None] = {}
        self._stored: dict[str, dict] = {}  # regions by the hash of what is in them
        self._lock = threading.Lock()

    def __str__(self) -> str:
        size = sum(r["bytes"] for r in self._stored.values()) / 1e6
        text = f"{self.path}: {len(self.calls)} of {self.seen} calls of {self.op}, {size:.3g} MB"
        stopped = [] if self.problem is None else [f"stopped by {type(self.problem).__name__}: {self.problem}"]
        return "; ".join([text, *self.left_out, *stopped])

    def see(self, op: str, args: tuple) -> None:
        if op not in (self.op, f"{self.op}_out"):
            return
        with self._lock:
            self.seen += 1
            if self.problem is not None:
                return
            try:
                self._see(op, args)
            except Exception as e:  # the program goes on; `record_calls` raises it at the end
                self.problem = e

    def _see(self, op: str, args: tuple) -> None:
        signature = _signature(op, args)
        if signature in self._signatures:
            if (call := self._signatures[signature]) is not None:
                call["count"] += 1
            return
        if args[0].is_cuda and torch.cuda.is_current_stream_capturing():
            self._leave_out("calls in a CUDA graph being recorded, whose inputs hold no values yet")
            return
        self._signatures[signature] = None
        if len(self.calls) == self.most:
            self._leave_out(f"signatures beyond {self.most} calls (--calls)")
            return
        size, before = self.spool.seek(0, 2), dict(self._stored)
        try:
            call = self._stored_call(op, args)
        except BaseException as e:
            self.spool.truncate(size)
            self._stored = before
            if not isinstance(e, _TooLarge):
                raise
            self._leave_out(f"{e}, beyond {self.max_gb:g} GB in all (--max-gb)")
            return
        self.calls.append(call)
        self._signatures[signature] = call

    def _leave_out(self, reason: str) -> None:
        if f"left out: {reason}" not in self.left_out:
            self.left_out.append(f"left out: {reason}")

    def _stored_call(self, op: str, args: tuple) -> dict:
        schema = _schema(op)
        written = [a.name for a in schema.arguments if _is_written(a)]
        named = dict(zip((a.name for a in schema.arguments), args, strict=True))
        views = []  # (tensor, name, whether it is only written to)
        for name, value in named.items():
            if isinstance(value, Tensor):
                views.append((value, name, name in written))
            elif isinstance(value, (list, tuple)):
                views += [(t, f"{name}.{i}", False) for i, t in enumerate(value) if isinstance(t, Tensor)]
        regions, places = [], {}
        for t, name, _ in views:
            expect(t.data_ptr() % t.element_size() == 0, name, "a tensor aligned to its elements", t)
        for group in _overlapping([v for v in views if v[0].numel()]):
            begin, end = min(_span(t)[0] for t, *_ in group), max(_span(t)[1] for t, *_ in group)
            first, name, _ = group[0]
            dtypes = {t.dtype for t, *_ in group}
            dtype = first.dtype if len(dtypes) == 1 and (end - begin) % first.element_size() == 0 else torch.uint8
            read = not all(only_written for *_, only_written in group)
            where = first.untyped_storage().data_ptr() + begin
            regions.append(dict(bytes=end - begin, page=where % PAGE, device=str(first.device), data=None))
            if read:
                regions[-1]["data"] = self._store(f"{len(self.calls)}.{name}", first, begin, end, dtype, op)
            for t, name, _ in group:
                places[name] = len(regions) - 1, _span(t)[0] - begin

        def encode(value, name: str):
            if isinstance(value, Tensor):
                region, offset = places.get(name, (None, 0))
                layout = dict(shape=list(value.shape), stride=list(value.stride()), dtype=_name(value.dtype))
                return dict(tensor=region, offset=offset, device=str(value.device), **layout)
            if isinstance(value, (list, tuple)):
                return [encode(v, f"{name}.{i}") for i, v in enumerate(value)]
            return dict(dtype=_name(value)) if isinstance(value, torch.dtype) else value

        encoded = {name: encode(value, name) for name, value in named.items()}
        return dict(op=op, schema=str(schema), count=1, device=str(args[0].device), args=encoded, regions=regions)

    def _store(self, name: str, t: Tensor, begin: int, end: int, dtype: torch.dtype, op: str) -> str:
        """Append these bytes of t's storage to the spool, unless they are there already. The name they have there."""
        flat = torch.empty(0, dtype=torch.uint8, device=t.device)
        flat.set_(t.untyped_storage(), begin, (end - begin,), (1,))
        at = self.spool.seek(0, 2)
        fits = at + len(flat) <= 1e9 * self.max_gb
        digest = hashlib.sha256(CODES[dtype].encode())
        for chunk in flat.split(CHUNK):
            data = chunk.cpu().numpy()
            digest.update(data)
            if fits:
                self.spool.write(data)
        key = digest.hexdigest()
        if key in self._stored:
            self.spool.truncate(at)
            return self._stored[key]["name"]
        if not fits:
            raise _TooLarge(f"a call of {op} with {len(flat) / 1e9:.3g} GB for {name.partition('.')[2]}")
        self._stored[key] = dict(name=name, at=at, bytes=len(flat), dtype=dtype)
        return name

    def write(self) -> None:
        """The file, if there is anything to be in it."""
        if not self.calls:
            return
        # larger elements first, so that each begins at a multiple of its size
        stored = sorted(self._stored.items(), key=lambda item: -item[1]["dtype"].itemsize)
        header, end = {}, 0
        for _, r in stored:
            shape = [r["bytes"] // r["dtype"].itemsize]
            header[r["name"]] = dict(dtype=CODES[r["dtype"]], shape=shape, data_offsets=[end, end + r["bytes"]])
            end += r["bytes"]
        made = environment.provenance(torch.device(self.calls[0]["device"]))
        digests = {r["name"]: key for key, r in stored}
        about = json.dumps(dict(format=FORMAT, op=self.op, made=made, calls=self.calls, sha256=digests))
        header["__metadata__"] = dict(flowkernels=about, sha256=_digest(about))
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)

        def save(path: Path) -> None:
            with whole_file(path) as partial, open(partial, "wb") as f:
                f.write(len(text).to_bytes(8, "little") + text)
                for _, r in stored:
                    self.spool.seek(r["at"])
                    for begin in range(0, r["bytes"], CHUNK):
                        f.write(self.spool.read(min(CHUNK, r["bytes"] - begin)))

        write_or_keep(self.target, "path", save)


class _TooLarge(Exception):
    pass


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _schema(op: str):
    return getattr(torch.ops.flowkernels, op).default._schema


def _is_written(argument) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _signature(op: str, args: tuple) -> tuple:
    """What makes a call another kind of call: all but values in memory, addresses and floating-point numbers."""
    first: dict[int, int] = {}  # of each storage, where the first view into it begins

    def of(value):
        if isinstance(value, Tensor):
            at = value.data_ptr()
            storage = value.untyped_storage().data_ptr()
            layout = value.dtype, value.shape, value.stride(), value.device
            return *layout, list(first).index(storage) if storage in first else -1, at - first.setdefault(storage, at)
        if isinstance(value, (list, tuple)):
            return tuple(map(of, value))
        return float if isinstance(value, float) else value

    return op, *map(of, args)


def _span(t: Tensor) -> tuple[int, int]:
    """The first byte of the storage that the elements of t are in, and the one after the last."""
    size, begin = t.element_size(), t.storage_offset() * t.element_size()
    return begin, begin + size * (1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True)))


def _overlapping(views: list[tuple]) -> list[list[tuple]]:
    """The views in groups whose spans overlap, in the order of the arguments."""
    groups: list[list] = []  # [storage, begin, end, places of the views]
    for i, (t, *_) in enumerate(views):
        storage, (begin, end), members = t.untyped_storage().data_ptr(), _span(t), [i]
        for group in [g for g in groups if g[0] == storage and g[1] < end and begin < g[2]]:
            groups.remove(group)
            begin, end, members = min(begin, group[1]), max(end, group[2]), members + group[3]
        groups.append([storage, begin, end, members])
    ordered = sorted(sorted(members) for *_, members in groups)
    return [[views[i] for i in members] for members in ordered]


# Reading


@dataclass
class Call:
    """One call of the file. op: the registered op. count: how many of its kind the program made."""

    op: str
    count: int
    device: torch.device
    args: dict[str, Any]  # as in the file
    regions: list[dict]
    file: Any

    @property
    def written(self) -> list[str]:
        """The arguments that the op writes to."""
        return [a.name for a in _schema(self.op).arguments if _is_written(a)]

    @property
    def in_place(self) -> bool:
        """Whether it writes to what it reads."""
        written = [self.args[name]["tensor"] for name in self.written if self.args[name] is not None]
        return any(region is not None and self.regions[region]["data"] is not None for region in written)

    def arguments(self, device: torch.device | None = None) -> dict[str, Any]:
        """The registered op's arguments by name, in memory of their own, laid out and aligned as they were.

        device: where tensors go that were on the first argument's device; None puts them there again. Tensors that are
        only written to hold NaN, or -1.
        """
        target = self.device if device is None else device

        def place(recorded: str) -> torch.device:
            return target if torch.device(recorded) == self.device else torch.device(recorded)

        buffers = []
        expect_room(sum(r["bytes"] for r in self.regions), "FILE", "regions of a call", f"one of {self.op}")
        for r in self.regions:
            room = torch.empty(r["bytes"] + PAGE, dtype=torch.uint8, device=place(r["device"]))
            begin = (r["page"] - room.data_ptr()) % PAGE
            here = room[begin : begin + r["bytes"]]
            if r["data"] is None:
                here.fill_(255)
            else:
                here.copy_(self.file.get_tensor(r["data"]).view(torch.uint8))
            buffers.append((room, begin))

        def decode(value):
            if isinstance(value, list):
                return [decode(v) for v in value]
            if not isinstance(value, dict):
                return value
            dtype = DTYPES[value["dtype"]]
            if "tensor" not in value:
                return dtype
            shape, stride = value["shape"], value["stride"]
            if value["tensor"] is None:
                return torch.empty_strided(shape, stride, dtype=dtype, device=place(value["device"]))
            room, begin = buffers[value["tensor"]]
            t = torch.empty(0, dtype=dtype, device=room.device)
            return t.set_(room.untyped_storage(), (begin + value["offset"]) // dtype.itemsize, shape, stride)

        return {name: decode(value) for name, value in self.args.items()}


@dataclass
class Calls:
    """A file of recorded calls. made: with what and when, as the benchmark says it."""

    op: str
    made: dict[str, Any]
    calls: list[Call]


def open_calls(path: str | Path) -> Calls:
    """The calls of a file; their tensors are read when they are asked for.

    Raises:
        ValueError: if it is no such file, is damaged, or was made for another version of the op.
    """
    wanted = "a file of `flowkernels record`"
    try:
        expect_header(expect_file(path))
        file = safe_open(path, "pt")
        metadata = file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as e:
        raise ValueError(f"{path}: expected {wanted}, got {e}") from e
    expect("flowkernels" in metadata, str(path), wanted, "a safetensors file of something else")
    whole = _digest(metadata["flowkernels"]) == metadata.get("sha256")
    expect(whole, str(path), "the metadata that was written", "other metadata: the file is damaged")
    try:
        about = json.loads(metadata["flowkernels"])
        expect(about["format"] == FORMAT, str(path), f"{wanted} in format {FORMAT}", f"format {about['format']}")
        expect(about["op"] in OPS, str(path), f"calls of one of {', '.join(OPS)}", about["op"])
        forms, given = (about["op"], f"{about['op']}_out"), about["calls"]
        for c in given:
            installed = str(_schema(c["op"])) if c["op"] in forms else "no such op"
            now = f"{c['schema']}, and {c['op']} is {installed} now; record it again"
            expect(c["schema"] == installed, str(path), "calls of the op as this flowkernels has it", now)
        made, sizes = about["made"], _check_bytes(file, about["sha256"], path)
    except ValueError as e:
        if str(e).startswith(f"{path}: "):
            raise
        raise ValueError(f"{path}: expected {wanted}, got one that is damaged ({e})") from e
    except Exception as e:  # of foreign bytes
        raise ValueError(f"{path}: expected {wanted}, got one that is damaged ({type(e).__name__}: {e})") from e
    with damaged(str(path), wanted, path):
        expect(isinstance(given, list) and len(given) > 0, "calls", "a list of at least one call", given)
        simple = isinstance(made, dict) and all(isinstance(v, (str, int, float, type(None))) for v in made.values())
        expect(simple, "made", "texts and numbers by name", made)
        return Calls(about["op"], made, [_call(c, sizes, file) for c in given])


def _check_bytes(file, digests: dict[str, str], path) -> dict[str, int]:
    """The regions of the file, and how many bytes each has."""
    sizes = {}
    for name in file.keys():  # noqa: SIM118, it is no mapping
        t = file.get_tensor(name)
        expect(t.dim() == 1, str(path), "regions in one dimension", f"{name} of shape {list(t.shape)}")
        digest = hashlib.sha256(CODES[t.dtype].encode())
        for chunk in t.view(torch.uint8).split(CHUNK):
            digest.update(chunk.numpy())
        same = digest.hexdigest() == digests[name]
        expect(same, str(path), "the bytes that were written", f"others in {name}: the file is damaged")
        sizes[name] = t.nbytes
    return sizes


def _call(c: dict, sizes: dict[str, int], file) -> Call:
    """A call of the file, none of whose tensors is anywhere but in its regions."""
    schema, regions = _schema(c["op"]), c["regions"]
    expect(isinstance(regions, list), "regions", "a list", regions)
    for r in regions:
        _expect_size(r["bytes"], "regions.bytes", 1)
        expect_int(r["page"], "regions.page", f"an integer up to {PAGE - 1}", 0, PAGE - 1)
        _device(r["device"], "regions.device")
        stored = r["data"] is None or sizes.get(r["data"]) == r["bytes"]
        expect(stored, "regions.data", f"{r['bytes']} bytes of the file", f"{r['data']!r}")
    args, names = c["args"], [a.name for a in schema.arguments]
    expect(isinstance(args, dict) and list(args) == names, "args", f"{', '.join(names)}", args)
    for argument in schema.arguments:
        dtypes = re.search(rf"ScalarType\??(\[\])? {argument.name}\b", str(schema)) is not None
        _expect_value(args[argument.name], argument.type, argument.name, regions, dtypes)
    count = expect_int(c["count"], "count", "at least 1", 1)
    return Call(c["op"], count, _device(c["device"], "device"), args, regions, file)


def _expect_value(value, kind, name: str, regions: list[dict], dtypes: bool) -> None:
    """An argument of the kind that the schema has. dtypes: whether its integers are dtypes."""
    which = kind.kind()
    if which == "OptionalType":
        if value is not None:
            _expect_value(value, kind.getElementType(), name, regions, dtypes)
    elif which == "ListType":
        expect(isinstance(value, list), name, "a list", value)
        for i, v in enumerate(value):
            _expect_value(v, kind.getElementType(), f"{name}.{i}", regions, dtypes)
    elif which == "TensorType":
        _expect_view(value, name, regions)
    elif dtypes:
        known = isinstance(value, dict) and list(value) == ["dtype"] and value["dtype"] in DTYPES
        expect(known, name, f"one of {', '.join(DTYPES)}", value)
    else:
        types = {"FloatType": (float, int), "IntType": (int,), "BoolType": (bool,), "StringType": (str,)}[which]
        expect(type(value) in types, name, f"a {types[0].__name__}", value)


def _expect_view(value, name: str, regions: list[dict]) -> None:
    expect(isinstance(value, dict) and value.get("dtype") in DTYPES, f"{name}.dtype", f"one of {list(DTYPES)}", value)
    shape, stride, at, itemsize = value["shape"], value["stride"], value["tensor"], DTYPES[value["dtype"]].itemsize
    lists = isinstance(shape, list) and isinstance(stride, list) and len(shape) == len(stride)
    expect(lists, f"{name}.stride", "one for each dimension", stride)
    for n in (*shape, *stride, value["offset"]):
        _expect_size(n, name, 0)
    numel, device = math.prod(shape), _device(value["device"], f"{name}.device")
    if at is None:
        return expect(numel == 0, f"{name}.tensor", "a region", None)
    region = regions[expect_int(at, f"{name}.tensor", f"one of {len(regions)} regions", 0, len(regions) - 1)]
    end = value["offset"] + itemsize * (1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)))
    inside = _expect_size(numel, name, 1) and end <= region["bytes"] and device == torch.device(region["device"])
    expect(inside, name, f"elements inside a region of {region['bytes']} bytes", f"some up to byte {end}")
    aligned = (region["page"] + value["offset"]) % itemsize == 0
    expect(aligned, f"{name}.offset", f"a multiple of {itemsize} in memory", value["offset"])


def _expect_size(value, name: str, least: int) -> int:
    return expect_int(value, name, f"an integer of at least {least}", least, 2**62)


def _device(recorded, name: str) -> torch.device:
    expect(isinstance(recorded, str), name, "a device", recorded)
    device = torch.device(recorded)
    expect(device.type in DEVICES, name, f"one of {', '.join(DEVICES)}", recorded)
    return device
