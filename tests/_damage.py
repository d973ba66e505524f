"""Damaged files of every format that is read: `python tests/_damage.py --count 4000 --seed 1`, hours with more.

Each is one that was written, changed at random: bits, bytes, cuts, splices of other files, entries of its JSON, its
headers or its pickle, sizes that are claimed. Reading it gives what was written, or one ValueError or OSError that
names the file: no other exception, no other object, no more memory than 4x the file's size + 200 MB. Where the change
came with a new checksum, which damage does not, another object is one that somebody has written, and fine. This runs in
a process of its own, so that one that crashes is seen.
"""

import argparse
import collections
import contextlib
import copy
import ctypes
import io
import json
import os
import random
import resource
import struct
import sys
import tempfile
import traceback
import warnings
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

import flowkernels as fk
from flowkernels import _weights
from flowkernels._files import SUM, sealed
from flowkernels.cli import inputs
from flowkernels.models import bundled, networks
from flowkernels.ops import recorded_calls, tuned

MEMORY = 200 << 20
GPU = "Some GPU"


class Field(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x, t):
        return self.linear(x) * t[:, None]


def field():
    torch.manual_seed(0)
    return Field()


# Formats: what writes a file, and what reads it as plain values to compare


def _plain(value):
    if isinstance(value, torch.Tensor):
        return [str(value.dtype), list(value.shape), value.detach().contiguous().flatten().view(torch.uint8).tolist()]
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else repr(value)


def write_calibration(path):
    noise, other = torch.randn(8, 6), torch.randn(4, 6)
    cal = fk.calibrate(field(), noise, 6, [1, 2, 3], effort="fit", verify_noise=other, progress=False)
    cal.save(path)


def read_calibration(path):
    cal = fk.Calibration.load(path)
    numbers = ("indices", "cost", "uniform_cost", "cost_interval", "samples_needed", "notes")
    schedules = {n: [getattr(s, name) for name in numbers] for n, s in cal.items()}
    solvers = {n: s.to_dict() for n, s in cal.solvers.items()}
    return _plain(
        [cal.times, cal.cost, cal.gram, cal.norm_cost, schedules, solvers, cal.verified, json.dumps(cal.provenance)]
    )


def _progress(path):
    noise, other = torch.linspace(-1, 1, 48).view(8, 6), torch.linspace(-2, 2, 24).view(4, 6)
    rest = dict(keep_bytes=2000, chunk=3, effort="fit", verify_noise=other, progress=False)
    return fk.calibrate(field(), noise, 6, [1, 2, 3], checkpoint=path, **rest)


def read_progress(path):
    cal = _progress(path)
    solvers = {n: s.to_dict() for n, s in cal.solvers.items()}
    return _plain([cal.cost, cal.gram, cal.kept.x, cal.kept.v, solvers, cal.verified])


def write_old_calibration(path):
    path.write_bytes((Path(__file__).parent / "data" / "calibration_1.boss.json").read_bytes())


def write_network(path):
    torch.manual_seed(0)
    bundled.save_network(networks.ResidualMLP(6, 8, 2, 8), path, iterations=3)


def read_network(path):
    net = bundled.load_network(path)
    return _plain([net.config, net.state_dict(), bundled.network_notes(path)])


def read_checkpoint(path):
    net = field()
    notes = inputs.load_checkpoint(net, path)
    return _plain([net.state_dict(), notes])


def write_weights(path):
    _weights.write(path, field().state_dict(), notes={"straightened_from": "0", "times": [0.0, 1.0]})


def write_calls(path):
    with fk.record_calls("linear_update", path):
        x = torch.arange(12.0).view(3, 4)
        fk.linear_update(x, [x + 1, x[:, :4]], [0.5, 0.25])
        fk.linear_update(x.t()[:2], [torch.ones(2, 3)], [0.5], out=torch.empty(2, 3))


def read_calls(path):
    found = recorded_calls.open_calls(path)
    arguments = [call.arguments() for call in found.calls]
    for given, call in zip(arguments, found.calls, strict=True):
        for name in call.written:
            given.pop(name)  # holds nothing
    return _plain([found.op, found.made, [[c.op, c.count, a] for c, a in zip(found.calls, arguments, strict=True)]])


def write_tuned(path):
    shipped, _ = tuned.kernels("bellman")
    table = {"format": 1, "device": GPU, "date": "2026-01-02", "configs": shipped, "times": {"bellman_step": {"of": 4}}}
    path.write_text(json.dumps(sealed(table), indent=1))


def _straighten(path, **options):
    torch.manual_seed(0)
    schedule = fk.Schedule.uniform(2)
    settings = dict(noise=torch.randn(4, 6), iterations=3, batch=2, grid=4, progress=False, log_every=1)
    return fk.straighten(None, field(), schedule, **settings, checkpoint=path, **options)


def read_training(path):
    result = _straighten(path)
    return _plain([result.student.state_dict(), result.history])


FORMATS = {
    "calibration.boss.json": (write_calibration, read_calibration),
    "progress.safetensors": (_progress, read_progress),
    "old.boss.json": (write_old_calibration, read_calibration),
    "network.safetensors": (write_network, read_network),
    "weights.safetensors": (write_weights, read_checkpoint),
    "plain.safetensors": (lambda path: save_file(field().state_dict(), path), read_checkpoint),
    "weights.pt": (lambda path: torch.save(field().state_dict(), path), read_checkpoint),
    "calls.safetensors": (write_calls, read_calls),
    "tuned.json": (write_tuned, lambda path: _plain(tuned.read(path, GPU))),
    "training.pt": (lambda path: _straighten(path, resume=False), read_training),
}
UNCHECKED = {"old.boss.json", "plain.safetensors"}  # in these, nothing says what was written


# Changes. Each takes the bytes and gives others; those of `FORGED` may make a valid file


def flip(r, data, others):
    data = bytearray(data)
    for _ in range(r.choice([1, 1, 1, 2, 8])):
        data[r.randrange(len(data))] ^= 1 << r.randrange(8)
    return bytes(data)


def overwrite(r, data, others):
    at, length = r.randrange(len(data)), r.choice([1, 4, 8, 64, 512])
    block = r.choice([bytes(length), b"\xff" * length, r.randbytes(length)])
    return data[:at] + block + data[at + length :]


def truncate(r, data, others):
    return data[: r.choice([0, 1, 7, 8, 9, len(data) - 1, len(data) // 2, r.randrange(len(data))])]


def cut(r, data, others):
    a, b = sorted(r.randrange(len(data) + 1) for _ in range(2))
    return data[:a] + data[b:]


def repeat(r, data, others):
    a, b = sorted(r.randrange(len(data) + 1) for _ in range(2))
    return data[:b] + data[a:]


def swap(r, data, others):
    a, b, c = sorted(r.randrange(len(data) + 1) for _ in range(3))
    return data[:a] + data[b:c] + data[a:b] + data[c:]


def splice(r, data, others):
    other = r.choice(others)
    a = r.randrange(len(data) + 1)
    return r.choice([data[:a] + other, data[:a] + other[r.randrange(len(other)) :], other, data + other])


def lengthen(r, data, others):
    return r.choice([lambda: data + r.randbytes(r.choice([1, 8, 4096])), lambda: r.randbytes(8) + data])()


def number(r, data, others):
    """Eight or four bytes as a huge number: a length, an offset, a count."""
    at, huge = r.randrange(len(data)), r.choice([2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1])
    block = struct.pack("<Q", huge)[: r.choice([4, 8])]
    return data[:at] + block + data[at + len(block) :]


VALUES = [
    *(None, True, False, 0, -1, 1, 1.5, 2, -0.0, 1e308, -1e308, 10**30, 2**31, 2**40, 2**53, 2**63, 2**64, 10**400),
    *(float("nan"), float("inf"), "", "x", "0", "nan", "é\ud800", "/", [], {}, [[]], [0, 1], [0, 0.5, 1], {"a": 1}),
    *(list(range(200)), [0.5] * 3000, "A" * 4096, {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}),
]


def deep(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def edit(r, value):
    """Plain values with one entry of them changed."""
    places = []

    def walk(node):
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                walk(node[key])

    walk(value)
    if not places:
        return
    node, key = r.choice(places)
    how = r.randrange(6)
    if how == 0:
        del node[key]
    elif how == 1 and isinstance(node, dict):
        node[r.choice(["", "x", str(key).upper(), "04", "-1", "1e3", "99"])] = node.pop(key)
    elif how == 2:
        other, at = r.choice(places)
        with contextlib.suppress(LookupError):  # gone with what it was in
            node[key] = json.loads(dumps(other[at]))
    elif how == 3 and isinstance(node[key], (int, float)) and not isinstance(node[key], bool):
        n = node[key]
        node[key] = r.choice([-n, n + 1, n * 2**20, str(n), [n], 0.5 + n if abs(n) < 2**1000 else 0])
    else:
        node[key] = r.choice([*copy.deepcopy(VALUES), deep(r.choice([3, 200, 2000]))])


def dumps(value) -> bytes:
    return json.dumps(value).encode()


def edit_json(r, data, others, again=False):
    value = json.loads(data)
    for _ in range(r.choice([1, 1, 2, 5])):
        edit(r, value)
    if again and isinstance(value, dict):
        try:
            value = sealed(value)
        except (ValueError, RecursionError):
            value.pop(SUM, None)
    return dumps(value)


def nest(r, data, others):
    depth = r.choice([100, 5000, 200_000])
    return r.choice([b"[" * depth, b'{"a":' * depth, b"[" * depth + b"]" * depth, data[:-2] + b',"a":' + b"[" * depth])


def many(r, data, others):
    """Values that take far more memory than their text."""
    return b"[" + r.choice([b"[],", b"{},", b"0,", b'"ab",', b"1.5,"]) * r.choice([10_000, 4_000_000]) + b"0]"


def edit_header(r, data, others):
    """Of safetensors: the header, with its length made right or not."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for _ in range(r.choice([1, 1, 2])):
        edit(r, header)
    text = dumps(header)
    told = len(text) if r.random() < 0.9 else r.choice([0, len(text) + 9, 2**31, 2**63])
    return told.to_bytes(8, "little") + text + data[8 + length :]


def many_entries(r, data, others):
    """Of safetensors: a header of tensors that hold nothing."""
    entry = dict(dtype="F32", shape=[0], data_offsets=[0, 0])
    text = dumps({str(i): entry for i in range(r.choice([100, 400_000]))})
    return len(text).to_bytes(8, "little") + text


def edit_metadata(r, data, others):
    """Of safetensors: JSON inside its metadata, with the metadata's checksum made right where it is of a text."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    texts = header.get("__metadata__", {})
    inside = [k for k, v in texts.items() if v[:1] in "{["]
    if not inside:
        return edit_header(r, data, others)
    key = r.choice(inside)
    value = json.loads(texts[key])
    for _ in range(r.choice([1, 1, 3])):
        edit(r, value)
    texts[key] = dumps(value).decode() if r.random() < 0.95 else "[" * 100_000
    if key == "flowkernels":
        texts["sha256"] = recorded_calls._digest(texts[key])
    elif r.random() < 0.5:
        texts.pop(SUM, None)
    text = dumps(header)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def edit_archive(r, data, others):
    """Of torch.save: its records, with their checksums made right."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(made, "w") as target:
        infos = source.infolist()
        chosen, how = r.choice(infos), r.randrange(8)
        if r.random() < 0.6:
            chosen = next(info for info in infos if info.filename.endswith("data.pkl"))
        for info in infos:
            name, record = info.filename, source.read(info)
            kind = zipfile.ZIP_STORED
            if info is chosen:
                if how == 0:
                    continue
                if how == 1:
                    name = r.choice(["x", name + "0", r.choice(infos).filename])
                elif how == 2:
                    kind = zipfile.ZIP_DEFLATED
                elif how == 3:
                    record = record + bytes(r.choice([1, 1 << 10, 30 << 20]))
                    kind = zipfile.ZIP_DEFLATED
                elif how == 4 and name.endswith("data.pkl"):
                    record = b"\x80\x02(" + r.choice([b"]", b"}", b"X\2\0\0\0ab"]) * 3_000_000 + b"l."
                elif record:
                    record = r.choice([flip, flip, flip, truncate, cut, number, overwrite, integer])(r, record, others)
            target.writestr(name, record, kind)
    return made.getvalue()


def integer(r, data, others):
    """A small number of a pickle as a huge one."""
    at = [i for i in range(len(data) - 1) if data[i : i + 1] == b"K"]
    if not at:
        return data
    i = r.choice(at)
    return data[:i] + b"J" + struct.pack("<i", r.choice([-1, 10**6, 2**31 - 1])) + data[i + 2 :]


BYTES = [flip, flip, flip, overwrite, truncate, cut, repeat, swap, splice, lengthen, number]
OF_JSON = [edit_json, edit_json, nest, many]


def reseal(r, data, others):
    return edit_json(r, data, others, again=True)


def changes(name: str) -> tuple[list, list]:
    """Those of damage, and those of somebody who makes the checksum right."""
    if name.endswith(".json"):
        return [*BYTES, *OF_JSON], [reseal]
    if name.endswith(".pt"):
        return BYTES, [edit_archive]
    return [*BYTES, edit_header, edit_header, many_entries], [edit_metadata]


# What happens


def status(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(key))


def outcome(path: Path, read, expected, forged: bool, unchecked: bool) -> str:
    """One word, or what is wrong."""
    with contextlib.suppress(AttributeError):  # not of every libc
        ctypes.CDLL(None).malloc_trim(0)  # what is free is given back, or it would not count when it is used again
    Path("/proc/self/clear_refs").write_text("5")
    before, size = status("VmRSS"), path.stat().st_size
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            found = read(path)
        result = "equal" if found == expected else "other"
        foreign = SUM.encode() not in path.read_bytes()  # as another program writes it
        told = unchecked or foreign or any("has no sha256" in str(w.message) for w in warned)
        if result == "other" and not (forged or told):
            result = "WRONG: another object"
    except (ValueError, OSError, inputs.InputError) as e:
        result = "refused" if path.name in str(e) else f"WRONG: does not name the file: {type(e).__name__}: {e}"
    except Exception:
        result = f"WRONG: {traceback.format_exc()}"
    took = status("VmHWM") - before
    return result if took <= 4 * size + MEMORY else f"WRONG: {took >> 20} MB for {size} bytes ({result[:200]})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="formats with this in their name")
    parser.add_argument("--keep", type=Path, help="folder for files with a wrong outcome")
    args = parser.parse_args()
    limit = status("VmSize") + (8 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))  # the machine is not put at risk
    r, found, wrong = random.Random(args.seed), collections.Counter(), []
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        originals = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name, (write, read) in FORMATS.items():
                path = Path(folder) / name
                write(path)
                originals[name] = (path.read_bytes(), read(path))
        others = [data for data, _ in originals.values()]
        names = [name for name in FORMATS if args.only in name]
        for i in range(args.count):
            name = names[i % len(names)]
            data, expected = originals[name]
            damage, forgery = changes(name)
            forged = r.random() < 0.3
            change = r.choice(forgery if forged else damage)
            path = Path(folder) / f"{i}-{name}"
            limit = sys.getrecursionlimit()
            sys.setrecursionlimit(10_000)  # of what nests deep entries
            path.write_bytes(change(r, data, others))
            sys.setrecursionlimit(limit)
            print(f"{i} {name} {change.__name__}", file=sys.stderr, flush=True)  # the last line is of what crashes
            told = outcome(path, FORMATS[name][1], expected, forged, name in UNCHECKED)
            found[name, told.partition(":")[0]] += 1
            if told.startswith("WRONG"):
                wrong.append(f"{i} {name} {change.__name__}: {told}")
                if args.keep is not None:
                    args.keep.mkdir(exist_ok=True)
                    (args.keep / path.name).write_bytes(path.read_bytes())
            os.remove(path)
    print(
        json.dumps(
            {"files": args.count, "outcomes": {f"{n}, {o}": c for (n, o), c in sorted(found.items())}, "wrong": wrong}
        )
    )
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
