"""What `straighten` copies and keeps: modules, and a checkpoint of which everything is checked before it is used."""

import contextlib
import copy
import functools
import inspect
import math
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from flowkernels._checks import describe, expect
from flowkernels._files import SUM, VALUES, damaged, expect_unchanged, warn_of_no_sum, whole_file
from flowkernels.models.weights import read_torch
from flowkernels.velocity import hashes
from flowkernels.velocity.hashes import tensors_hash

FORMAT, VERSION = "flowkernels.straighten", 2
HISTORY = ("iteration", "loss", "lr", "grad_norm", "interval_loss")
KEYS = {
    *("setting", "iteration", "history", "student", "optimizer", "average"),
    *("bank_rng", "rng", "global_rng", "totals", "counts", "bank_noise"),
}
SINCE_2 = {"teacher_field", "student_field", "optimizer", "student"}  # settings that version 1 does not have
PLACES = ("lr", "initial_lr", "params")  # of a group of parameters: what is no setting of the optimiser


# Modules


unwrapped = functools.partial(hashes.unwrapped, of=hashes.IN_PLACE)  # what torch.compile or DDP wraps


def copied(module: nn.Module) -> nn.Module:
    """A deep copy without wrappers, in it neither. What a module computed and holds, as weight_norm does, is copied
    without its graph, and tensors of inference mode become ordinary ones."""
    memo: dict[int, Any] = {}
    try:
        for part in module.modules():
            for value in vars(part).values():
                if isinstance(value, Tensor) and value.grad_fn is not None:
                    memo[id(value)] = value.detach().clone()
        for part in reversed(list(module.modules())):  # the inner ones first
            if (inner := unwrapped(part)) is not part:
                memo[id(part)] = copy.deepcopy(inner, memo)
        return copy.deepcopy(module, memo)
    except Exception as e:
        got = f"{type(module).__name__} ({type(e).__name__}: {e})"
        raise ValueError(f"student: expected a module that copy.deepcopy copies, got {got}") from e


def plain_state(module: nn.Module) -> dict[str, Any]:
    """The state dict, under names without those of wrappers."""
    return {_plain(module, key): value for key, value in module.state_dict().items()}


def _plain(module: nn.Module | None, key: str) -> str:
    parts = []
    for part in key.split("."):
        child = None if module is None else module._modules.get(part)
        if module is None or unwrapped(module) is module or child is None:
            parts.append(part)
        module = child
    return ".".join(parts)


def load_weights(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Load what `expect_weights` has found to fit."""
    state = _without_prefix(module, state)
    module.load_state_dict({key: state[_plain(module, key)] for key in module.state_dict()})


def expect_weights(module: nn.Module, state: Mapping[str, Any], name: str, exact: bool = False) -> None:
    """Raise unless the state dict has the module's names and shapes, and its dtypes, if not `exact` but for the width
    of floating-point ones."""
    expect(isinstance(state, Mapping), name, "a state dict", state)
    own, state = plain_state(module), _without_prefix(module, state)
    way_out = "; init='keep' starts from the student's own weights" if name == "student" else ""
    expected = f"weights that fit the student{way_out}"
    for key in sorted(own.keys() | state.keys(), key=str):
        have, want = state.get(key), own.get(key)
        known = key in state and key in own
        if known and not isinstance(want, Tensor):  # of get_extra_state
            expect(not isinstance(have, Tensor), name, expected, f"{key!r}, a tensor, for {describe(want)}")
            continue
        if not known or not isinstance(have, Tensor) or have.shape != want.shape:
            got, wanted = ("none" if t is None else str(list(t.shape)) if isinstance(t, Tensor) else describe(t)
                           for t in (have, want))  # fmt: skip
            expect(False, name, expected, f"{key!r} of shape {got} for {wanted}")
        alike = have.dtype == want.dtype or (not exact and have.is_floating_point() and want.is_floating_point())
        expect(alike, name, expected, f"{key!r} of {have.dtype} for {want.dtype}")


def _without_prefix(module: nn.Module, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state dict of a wrapped module as that of the module."""
    own = plain_state(module)
    for prefix in ("_orig_mod.", "module."):
        if state and not own.keys() & state.keys() and all(str(key).startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def architecture(module: nn.Module) -> str:
    """A hash of the modules' classes, torch's with their settings, and of the weights' names, shapes and dtypes."""
    parts = []
    for name, part in module.named_modules():
        if unwrapped(part) is part:
            kind = f"{type(part).__module__}.{type(part).__qualname__}"
            parts.append(f"{_plain(module, name)} {kind} {part.extra_repr() if kind.startswith('torch.nn.') else ''}")
    weights = {k: [str(v.dtype), *v.shape] for k, v in plain_state(module).items() if isinstance(v, Tensor)}
    return tensors_hash({"modules": parts, "weights": weights})[:16]


# Optimisers


def expect_optimizer(opt, parameters: list[nn.Parameter]) -> None:
    """Raise unless it is an optimiser of these parameters."""
    expected = "a function that returns a torch.optim.Optimizer of the parameters that it is given"
    methods = ("step", "zero_grad", "state_dict", "load_state_dict")
    known = all(callable(getattr(opt, method, None)) for method in methods) and hasattr(opt, "param_groups")
    expect(known, "optimizer", expected, opt, TypeError)
    closure = inspect.signature(opt.step).parameters.get("closure")
    expect(closure is None or closure.default is None, "optimizer", "one whose step takes no closure", opt, TypeError)
    own = {id(p) for p in parameters}
    found = [id(p) for group in opt.param_groups for p in group["params"]]
    expect(len(found) > 0, "optimizer", expected, "one of no parameters")
    expect(set(found) <= own, "optimizer", expected, f"one of {len(set(found) - own)} other parameters")


def optimizer_identity(opt) -> dict:
    """What determines an optimiser's steps beside the learning rate: its class and the settings of its groups."""
    groups = [{k: v for k, v in g.items() if k not in PLACES} for g in opt.state_dict()["param_groups"]]
    return {
        "kind": f"{type(opt).__module__}.{type(opt).__qualname__}",
        "groups": tensors_hash({"groups": groups})[:16],
    }


def expect_optimizer_state(saved, opt, parameters: list[nn.Parameter]) -> None:
    """Raise unless the state is of the form that a step of the optimiser makes, which is what it is compared with: a
    step of size zero. Its kernels do not look at shapes."""
    for p in parameters:
        p.grad = torch.zeros_like(p)
    rates = [group["lr"] for group in opt.param_groups]
    for group in opt.param_groups:
        group["lr"] = 0.0
    opt.step()
    for group, rate in zip(opt.param_groups, rates, strict=True):
        group["lr"] = rate
    opt.zero_grad(set_to_none=True)
    own = opt.state_dict()
    _expect(isinstance(saved, dict) and {"state", "param_groups"} <= saved.keys(), "an optimiser's state", saved)
    groups = saved["param_groups"]
    fits = isinstance(groups, list) and len(groups) == len(own["param_groups"])
    _expect(fits and all(isinstance(g, dict) for g in groups), f"{len(own['param_groups'])} groups", groups)
    for have, want in zip(groups, own["param_groups"], strict=True):
        _expect(repr(have.get("params")) == repr(want["params"]), "the optimiser's parameters", have.get("params"))
        for key in (have.keys() & want.keys()) - set(PLACES):
            _expect(repr(have[key]) == repr(want[key]), f"an optimiser with {key} = {want[key]!r}", have[key])
    _expect(isinstance(saved["state"], dict), "the state of parameters", saved["state"])
    for i, have in saved["state"].items():
        want = own["state"].get(i)
        fits = type(i) is int and want is not None and isinstance(have, dict) and have.keys() == want.keys()
        _expect(fits, "the state of the optimiser's parameters", f"{describe(have)} of parameter {describe(i)}")
        for key, value in want.items():
            _expect_alike(have[key], value, f"{key!r} of parameter {i}")
            counts = key == "step" and not 0 <= float(have[key]) < math.inf
            _expect(not counts, "a number of steps", have[key])


def _expect_alike(have, want, what: str) -> None:
    if isinstance(want, Tensor):
        fits = isinstance(have, Tensor) and have.shape == want.shape and have.dtype == want.dtype
        _expect(fits, f"{what} as {describe(want)}", have)
    else:
        _expect(type(have) is type(want), f"{what} of type {type(want).__name__}", have)


# Checkpoints


def _expect(ok: bool, expected: str, got) -> None:
    if not ok:
        expect(False, "checkpoint", expected, f"{describe(got)}")


@contextlib.contextmanager
def checks_of(path: Path) -> Iterator[None]:
    """Errors of the block name the checkpoint; what else it raises is an error of that kind."""
    try:
        yield
    except Exception as e:
        text = e if isinstance(e, ValueError) else f"checkpoint: expected a whole one, got {type(e).__name__}: {e}"
        raise ValueError(f"{text} ({path})") from e


def expect_storable(state: dict) -> None:
    """Raise if a checkpoint of this state could not be read again; tensors, which can, are left out."""

    def small(leaf):
        return leaf.new_empty(0) if type(leaf) in (Tensor, nn.Parameter) else leaf

    try:
        state = tree_map(small, state)
        tensors_hash(state)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "state.pt"
            torch.save(state, path)
            read_torch(path, "state", "tensors and plain values")
    except Exception as e:  # whatever the state holds
        expected = "a student and an optimiser whose state is tensors and plain values (or checkpoint=None)"
        raise ValueError(f"checkpoint: expected {expected}, got {type(e).__name__}: {e}") from e


def write_checkpoint(path: Path, state: dict) -> None:
    state = {"format": FORMAT, "version": VERSION, **state}
    with whole_file(path) as partial:
        torch.save({**state, SUM: tensors_hash(state)}, partial)


def read_checkpoint(path: Path, stacklevel: int = 3) -> dict:
    """What a checkpoint holds; ValueError if it is not what was written. What its parts are is not looked at."""
    wanted, how = "a training checkpoint", "is truncated or not one"
    saved = read_torch(path, "checkpoint", wanted)
    with damaged("checkpoint", wanted, path, how):
        kind = saved["format"]
        if kind == FORMAT and saved.get("version") in (1, VERSION):
            _expect_plain_tensors(saved, path.stat().st_size)
            if saved["version"] == VERSION:
                expect_unchanged(saved.pop(SUM), tensors_hash(saved))
    expect(kind == FORMAT, "checkpoint", f"a file of format {FORMAT!r}", f"{path} of format {describe(kind)}")
    with checks_of(path):
        version = saved.get("version")
        expect(
            version in (1, VERSION), "checkpoint", f"version 1 or {VERSION}", f"{path} of version {describe(version)}"
        )
        if version == 1:
            saved.setdefault("bank_noise", None)
        _expect(saved.keys() - {"format", "version"} == KEYS, f"{sorted(KEYS)}", sorted(saved, key=str))
        _expect(isinstance(saved["setting"], dict), "settings", saved["setting"])
        _expect(type(saved["bank_noise"]) in (str, type(None)), "a hash of the bank's noise", saved["bank_noise"])
    if version == 1:
        warn_of_no_sum(path, stacklevel)
    return saved


def _expect_plain_tensors(saved, size: int) -> None:
    tensors = [leaf for leaf in tree_leaves(saved) if isinstance(leaf, Tensor)]
    for t in tensors:
        plain = type(t) in (Tensor, nn.Parameter) and t.layout is torch.strided and not t.is_quantized
        if not plain or t.device.type != "cpu":
            raise ValueError(f"{describe(t)} in it is not a plain one")
    if sum(t.numel() * t.element_size() for t in tensors) > 4 * size + VALUES:
        raise ValueError("its tensors are larger than the file")


def expect_setting(saved: dict, setting: dict) -> None:
    """Raise unless the checkpoint is of a run with this setting."""
    known = saved["setting"]
    for key, value in setting.items():
        there = key in known or saved["version"] == VERSION or key not in SINCE_2
        have = known.get(key, "nothing")
        if there and repr(have) != repr(value):  # of numbers exact, and of anything else no error
            got = f"{key} = {have!r}"
            expect(False, "checkpoint", f"one of this run ({key} = {value!r}); resume=False starts anew", got)


def expect_progress(saved: dict, iterations: int, log_every: int, N: int) -> None:
    """Raise unless the number of iterations, the history and the sums of losses are those of such a run."""
    done, history = saved["iteration"], saved["history"]
    _expect(type(done) is int and 1 <= done <= iterations, f"an iteration of 1 to {iterations}", done)
    rows = [it for it in range(done) if it % log_every == 0 or it == iterations - 1]
    _expect(isinstance(history, dict) and set(history) == set(HISTORY), f"a history of {list(HISTORY)}", history)
    for column in history.values():
        fits = isinstance(column, list) and len(column) == len(rows)
        _expect(fits, f"a history of {len(rows)} rows", column)
    _expect(repr(history["iteration"]) == repr(rows), f"rows of iterations 0 to {rows[-1]}", history["iteration"])
    for name in ("loss", "lr", "grad_norm"):
        plain = all(type(value) is float and math.isfinite(value) for value in history[name])
        _expect(plain, "a history of finite numbers", f"{name} = {describe(history[name])}")
    for row in history["interval_loss"]:
        fits = isinstance(row, list) and len(row) == N and all(type(value) is float for value in row)
        _expect(fits, f"a history of {N} losses a row", row)
    for name in ("totals", "counts"):
        _expect_alike(saved[name], torch.zeros(N, dtype=torch.float32, device="cpu"), name)
        _expect(bool(saved[name].isfinite().all()), f"finite {name}", saved[name].tolist())


def expect_random_states(saved: dict) -> None:
    everywhere = saved["global_rng"]
    known = isinstance(everywhere, dict) and set(everywhere) == {"cpu", "cuda"} and isinstance(everywhere["cuda"], list)
    _expect(known, "states of the random generators", everywhere)
    for state in (saved["bank_rng"], saved["rng"], everywhere["cpu"]):
        try:
            torch.Generator("cpu").set_state(state)
        except Exception as e:
            raise ValueError(
                f"checkpoint: expected the state of a random generator, got {describe(state)} ({e})"
            ) from e
    like = torch.zeros(16, dtype=torch.uint8, device="cpu")
    for state in everywhere["cuda"]:
        _expect_alike(state, like, "the state of a GPU's random generator")
