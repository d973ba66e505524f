"""Weights into a network from the files that repositories write: EMA lists, nested dicts, prefixes, shards."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowkernels import _weights
from flowkernels._checks import expect, expect_path, expect_shown, expect_text
from flowkernels._files import read_json
from flowkernels.runtime.torch_private import COMPILED_MODULE
from flowkernels.velocity.field import VelocityField

WANTED = "a safetensors or torch file of tensors"
SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
WRAPPED = {"module", COMPILED_MODULE}  # of DataParallel, DDP and torch.compile, anywhere in a name
AVERAGED = re.compile(r"(^|[^a-z])(ema|swa)([^a-z]|$)|emamodel|modelema|shadow|averag|polyak")
NOT_WEIGHTS = re.compile(r"^opt$|optim|scheduler|scaler|collected_params|temp_stored_params|grad")
BOOKKEEPING = {"decay", "num_updates", "n_averaged", "initted", "step", "optimization_step"}
DEEPEST = 6  # dicts in dicts
TOLD = 4  # names in an error


@dataclass(frozen=True)
class LoadedWeights:
    """Which weights `load_weights` has taken.

    path: of the file or folder. source: where in it they were, "" for all of it. averaged: whether they are an average
    of weights (EMA). others: further weights there that would have fitted. filled: names of what these do not hold, and
    the raw weights beside them do. metadata: of safetensors.
    """

    path: Path
    source: str
    averaged: bool
    others: tuple[str, ...] = ()
    filled: tuple[str, ...] = ()
    metadata: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        said = f"{'averaged' if self.averaged else 'raw'} weights" + (f" {self.source!r}" if self.source else "")
        said = f"{self.path}: {said}"
        if self.filled:
            said += f", with {_few(self.filled)} of the raw ones"
        others = ", ".join(repr(source) if source else "the whole file" for source in self.others)
        return said + (f"; others there: {others}" if others else "")


@torch.no_grad()
def load_weights(net: nn.Module, path: str | Path, *, prefer: str = "ema") -> LoadedWeights:
    """Put the weights of a file into a network, whatever layout the file has; all of them or none.

    Taken are safetensors files, also in shards (the `.index.json` or its folder), and what `torch.save` wrote
    (`.pt`, `.pth`, `.ckpt`, `.bin`), which is read with `weights_only=True`: a state dict, or dicts that hold one
    ("state_dict", "model", "ema", ...), of Lightning too; names behind prefixes ("model.", "module.", "_orig_mod.",
    nested as they may be), with other networks beside them; averages (EMA) as dicts or as lists in the order of
    parameters (torch_ema, diffusers' `EMAModel`, score_sde), whose buffers and frozen parameters are those of the raw
    weights beside them.

    Args:
        net: a network, wrapped or not, or a VelocityField of one.
        path: a file, a folder of one, or an index of shards.
        prefer: "ema" takes an average where there is one, "raw" does not; any other text is the name of what to take,
            such as "ema_0.9999" or "student".

    Returns:
        LoadedWeights, which says what was taken; `print` it.

    Raises:
        OSError: if the file cannot be read.
        TypeError, ValueError: naming the argument, before any weight is written: no such file, one that would run code
            when it is read, names that are missing or unexpected, other shapes or kinds of numbers, a list of another
            length, several sets of weights among which `prefer` does not choose.

    Examples:
        >>> net = torch.nn.Linear(3, 2)
        >>> ema = {f"module.{k}": v / 2 for k, v in net.state_dict().items()}
        >>> torch.save({"model": net.state_dict(), "ema": ema, "step": 5}, "net.pt")
        >>> print(fk.load_weights(net, "net.pt"))
        net.pt: averaged weights 'ema'; others there: 'model'
    """
    net = net.net if isinstance(net, VelocityField) else net
    found, state = find_weights(net, path, prefer, "path", lambda value: f"prefer={value!r}")
    net.load_state_dict(state)
    return found


def find_weights(
    net: nn.Module, path: str | Path, prefer: str, name: str, told: Callable[[str], str]
) -> tuple[LoadedWeights, dict[str, Tensor]]:
    """What `load_weights` takes, as a state dict that fits, with a caller's words: the name of the path, and how one
    prefers."""
    expect_shown(isinstance(net, nn.Module), "net", "an nn.Module, or a VelocityField of one", net, TypeError)
    expect_text(prefer, "prefer", "'ema', 'raw' or the name of weights in the file")
    own = net.state_dict()
    meta = sorted(k for k, t in own.items() if isinstance(t, Tensor) and t.is_meta)
    expect(not meta, "net", "a network whose weights have memory (.to_empty)", f"{_few(meta)} on the meta device")
    path, content, metadata = _read(expect_path(path, name), name)
    sets = list(_sets(content, net, own))
    for one in sets:
        one.complete(sets, net, own, f"{type(net).__name__}, in {path}{one.shown}")
    chosen = _choose(sets, prefer, net, path, name, told)
    others = tuple(s.source for s in sets if s.problem is None and s is not chosen)
    found = LoadedWeights(path, chosen.source, chosen.averaged, others, tuple(sorted(chosen.filled)), metadata)
    return found, chosen.state


# ---- files ----


def _read(path: Path, name: str) -> tuple[Path, Any, dict[str, str]]:
    """(the file, what it holds, metadata)"""
    if path.is_dir():
        path = _file_in(path, name)
    if path.name.endswith(".index.json"):
        return path, *_shards(path, name)
    return path, *_file(path, name)


def _file(path: Path, name: str) -> tuple[Any, dict[str, str]]:
    if path.suffix == ".safetensors":
        return _weights.read(path, name, WANTED)
    try:
        return _weights.read_torch(path, name, WANTED), {}
    except ValueError as e:
        if "no tensor or plain value" not in str(e):
            raise
        remedy = (
            "it would run code of its own when it is read, which is not done: in a process that trusts it, save its "
            "tensors alone, c = torch.load(path, weights_only=False); torch.save(c['model'], 'weights.pt'), or of a "
            "whole module torch.save(c.state_dict(), 'weights.pt')"
        )
        raise ValueError(f"{e}; {remedy}") from e


def _file_in(folder: Path, name: str) -> Path:
    """The index or the file of weights in a folder, of which there is one."""
    files = sorted(p for p in folder.iterdir() if p.is_file())
    kinds = ([p for p in files if p.name.endswith(".safetensors.index.json")],
             [p for p in files if p.suffix == ".safetensors"],
             [p for p in files if p.name.endswith(".index.json") and p.name != "model_index.json"],
             [p for p in files if p.suffix in SUFFIXES])  # fmt: skip
    found = next((kind for kind in kinds if kind), [])
    got = f"{len(found)} in {folder} ({_few([p.name for p in found])}); name one of them"
    if not found:
        inside = [p.parent.name for p in sorted(folder.glob("*/*")) if p.suffix in SUFFIXES]
        got = f"none in {folder}" + (f"; name one of its folders: {_few(dict.fromkeys(inside))}" if inside else "")
    expect(len(found) == 1, name, f"a folder with one file of weights ({', '.join(SUFFIXES)}) or index", got)
    return found[0]


def _shards(index: Path, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    wanted = "an index of weights in shards"
    found = read_json(index, name, wanted)
    where = found.get("weight_map") if isinstance(found, dict) else None
    plain = isinstance(where, dict) and where and all(isinstance(f, str) and Path(f).name == f for f in where.values())
    expect(bool(plain), name, f'{wanted}, "weight_map" with the names of files beside it', f"another in {index}")
    files = {file: index.parent / file for file in sorted(set(where.values()))}
    gone = [file for file, path in files.items() if not path.is_file()]
    expect(not gone, name, f"the {len(files)} shards of {index}", f"{len(gone)} that are not there ({_few(gone)})")
    state: dict[str, Tensor] = {}
    for file, path in files.items():
        content, _ = _file(path, name)
        expect(isinstance(content, dict), name, "shards of names and tensors", f"something else in {path}")
        here = [key for key, of in where.items() if of == file]
        lost = [key for key in here if key not in content]
        expect(not lost, name, f"all of {index}", f"{file} without {len(lost)} of its weights ({_few(lost)})")
        state |= {key: content[key] for key in here}  # what the index has elsewhere may be here too, of before
    return state, {}


# ---- the sets of weights in a file ----


@dataclass
class _Set:
    """Weights for a network, by its own names.

    more: what is beside them, under the names that it has there. problem: why they do not fit; None where they do.
    """

    source: str
    averaged: bool
    state: dict[str, Tensor]
    more: dict[str, Tensor] = field(default_factory=dict)
    filled: list[str] = field(default_factory=list)
    problem: str | None = None

    @property
    def shown(self) -> str:
        return f" {self.source!r}" if self.source else ""

    def complete(self, sets: "list[_Set]", net: nn.Module, own: Mapping[str, Any], what: str) -> None:
        """Fill in what it need not hold, and see whether it fits then."""
        if self.problem is not None:
            return
        trained = {key for key, p in net.named_parameters() if p.requires_grad}
        places = {_place(own[key]): key for key in self.state}
        for key in own.keys() - self.state.keys():
            twin = places.get(_place(own[key]))
            if twin is not None and _place(own[key]) is not None:  # tied: safetensors keeps one of both
                self.state[key] = self.state[twin]
            elif self.averaged and key not in trained:
                beside = next((s for s in sets if not s.averaged and key in s.state), None)
                if beside is not None:
                    self.state[key] = beside.state[key]
                    self.filled.append(key)
        try:
            _weights.expect_fits(self.state | self.more, own, "", what)
        except ValueError as e:
            self.problem = str(e).removeprefix(": ")


def _sets(content: Any, net: nn.Module, own: Mapping[str, Any]) -> Iterator[_Set]:
    names = {_plain(key): key for key in own}
    plain = _plain if len(names) == len(own) else str  # a network with a module of such a name
    names = {plain(key): key for key in own}
    for path, tensors in _tensors(content):
        if isinstance(tensors, list):
            yield from _of_list(path, tensors, net)
        else:
            yield from _of_dict(path, tensors, names, plain)


def _tensors(value: Any, path: str = "", depth: int = DEEPEST) -> Iterator[tuple[str, Any]]:
    """(place, tensors by name or in a list) of all dicts and lists."""
    inside: list[tuple[str, Any]] = []
    if isinstance(value, Mapping):
        if tensors := {k: t for k, t in value.items() if isinstance(k, str) and isinstance(t, Tensor)}:
            yield path, tensors
        inside = [(k, v) for k, v in value.items() if isinstance(k, str) and not NOT_WEIGHTS.search(k.lower())]
    elif isinstance(value, (list, tuple)):
        if value and all(isinstance(t, Tensor) for t in value):
            yield path, list(value)
        else:
            inside = [(str(i), v) for i, v in enumerate(value[:64])]
    for key, v in inside if depth else ():
        if isinstance(v, (Mapping, list, tuple)):
            yield from _tensors(v, f"{path}.{key}" if path else key, depth - 1)


def _of_list(path: str, tensors: list[Tensor], net: nn.Module) -> Iterator[_Set]:
    """In the order of parameters, of all or of those that are trained."""
    everything = dict(net.named_parameters())
    trained = {key: p for key, p in everything.items() if p.requires_grad}
    problem = f"a list of {len(tensors)} tensors for {len(trained or everything)} parameters"
    for parameters in (trained, everything):
        if len(parameters) != len(tensors):
            continue
        odd = [(k, t) for (k, p), t in zip(parameters.items(), tensors, strict=True) if t.shape != p.shape]
        if not odd:
            yield _Set(path, _is_averaged(path), dict(zip(parameters, tensors, strict=True)))
            return
        key, t = odd[0]
        shapes = f"{list(t.shape)} for {key} {list(parameters[key].shape)}"
        problem = f"a list in another order or of another network, {len(odd)} of other shapes ({shapes})"
    if _is_averaged(path):
        expected = f"a list of the parameters of {type(net).__name__} in their order"
        yield _Set(path, True, {}, problem=f"expected {expected}, got {problem}, in {path!r}")


def _of_dict(path: str, tensors: dict[str, Tensor], names: dict[str, str], plain) -> Iterator[_Set]:
    """Under each prefix that leads to names of the network's."""
    keys: dict[str, str] = {}
    for key in tensors:
        keys.setdefault(plain(key), key)
    hits: Counter[str] = Counter()
    for key in keys:
        parts = key.split(".")
        hits.update(".".join(parts[:i]) for i in range(len(parts)) if ".".join(parts[i:]) in names)
    enough = min(len(names) / 2, max(hits.values(), default=0))
    for prefix in [p for p, count in hits.items() if count >= enough]:
        under = {k.removeprefix(f"{prefix}." if prefix else ""): k for k in keys if _is_under(k, prefix)}
        state = {names[k]: tensors[keys[of]] for k, of in under.items() if k in names}
        more = {keys[of]: tensors[keys[of]] for k, of in under.items() if k not in names}
        more |= {k: t for k, t in tensors.items() if keys[plain(k)] != k and _is_under(plain(k), prefix)}
        more = {k: t for k, t in more.items() if k.rpartition(".")[2] not in BOOKKEEPING or t.numel() > 1}
        source = ".".join(filter(None, (path, prefix)))
        yield _Set(source, _is_averaged(source), state, more)
    yield from _without_dots(path, tensors, names)


def _without_dots(path: str, tensors: dict[str, Tensor], names: dict[str, str]) -> Iterator[_Set]:
    """Averages whose names have lost their dots, as buffers of one module: "model_ema.blocks0weight"."""
    short = {k.replace(".", ""): of for k, of in names.items()}
    parents = dict.fromkeys(key.rpartition(".")[0] for key in tensors)
    for parent in parents if len(short) == len(names) else ():
        source = ".".join(filter(None, (path, parent)))
        held = {k.rpartition(".")[2]: t for k, t in tensors.items() if k.rpartition(".")[0] == parent}
        held = {k: t for k, t in held.items() if k not in BOOKKEEPING}
        if not _is_averaged(source) or not held or any(_plain(k) in names for k in held):
            continue
        first = max(held, key=len)
        for begin in (first.removesuffix(k) for k in short if first.endswith(k)):
            if all(k.startswith(begin) and k.removeprefix(begin) in short for k in held):
                yield _Set(source, True, {short[k.removeprefix(begin)]: t for k, t in held.items()})
                break


def _plain(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in WRAPPED)


def _place(t: Any) -> tuple | None:
    """Where a plain tensor's memory is, and its form."""
    plain = type(t) in (Tensor, nn.Parameter) and t.layout is torch.strided and t.numel() > 0
    return (t.data_ptr(), t.shape, t.stride()) if plain else None


def _is_under(key: str, prefix: str) -> bool:
    return not prefix or key.startswith(f"{prefix}.")


def _is_averaged(source: str) -> bool:
    parts = [bool(AVERAGED.search(part)) and "online" not in part for part in source.lower().split(".")]
    return any(parts) and "online" not in source.lower().rpartition(".")[2]


# ---- which one ----


def _choose(sets: list[_Set], prefer: str, net: nn.Module, path: Path, name: str, told: Callable[[str], str]) -> _Set:
    kind, listed = type(net).__name__, [repr(s.source) if s.source else "which has one state dict" for s in sets]
    expect(bool(sets), name, f"names and tensors, weights that fit {kind}", f"none in {path}")
    raw = [s for s in sets if not s.averaged]
    # an average with few of the network's names is one of another network, unless there is nothing else
    most = max(len(s.state) for s in sets)
    averaged = [s for s in sets if s.averaged and (not s.state or 2 * len(s.state) >= most)]
    pool = {"ema": averaged or raw, "raw": raw}.get(prefer)
    if pool is None:
        pool = [s for s in sets if f".{prefer}." in f".{s.source}."]
    expect(bool(pool), "prefer", f"'ema', 'raw' or the name of weights in {path}, {_few(listed)}", repr(prefer))
    fit = [s for s in pool if s.problem is None]
    fit = [s for i, s in enumerate(fit) if not any(_is_same(s, other) for other in fit[:i])]
    if len(fit) > 1:
        got = f"{_few([repr(s.source) for s in fit])} in {path} ({told(fit[0].source)} takes one)"
        expect(False, name, f"one set of weights that fit {kind}", got)
    if fit:
        return fit[0]
    nearest = max(pool, key=lambda s: len(s.state))
    others = [s for s in sets if s.problem is None]
    remedy = "build the network as it was for these weights"
    if others:
        word = "raw" if not others[0].averaged and prefer == "ema" else others[0].source
        remedy = f"{told(word)} takes {others[0].source or 'the others'!r}, which fit"
    where = "" if str(path) in nearest.problem else f" of {path}"
    raise ValueError(f"{name}: {nearest.problem}{where}; {remedy}")


def _is_same(a: _Set, b: _Set) -> bool:
    """Whether two sets are the same tensors, saved once."""
    return all(t.data_ptr() == b.state[k].data_ptr() for k, t in a.state.items() if k in b.state)


def _few(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:TOLD]) + (f" and {len(names) - TOLD} more" if len(names) > TOLD else "")
