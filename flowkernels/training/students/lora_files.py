"""Adapters in files: in diffusers' layout, which its pipelines load, or in peft's."""

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowkernels import _weights
from flowkernels._checks import describe, expect, expect_choice, expect_path, expect_text
from flowkernels._files import expect_target, whole_file
from flowkernels.runtime.sharded import whole
from flowkernels.training.students.adapters import (
    CONFIGS,
    adapter_name,
    network_of,
    without_adapters_copied,
)
from flowkernels.velocity.field import VelocityField
from flowkernels.velocity.hashes import Unknown, weights_hash

DIFFUSERS, PEFT, PEFT_CONFIG = "pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_config.json"
METADATA, BASE = "lora_adapter_metadata", "base_sha256"  # diffusers' key, and ours
PEFT_PREFIX = "base_model.model"
WANTED = "an adapter that fk.save_lora, diffusers or peft wrote"


@dataclass(frozen=True)
class LoraFile:
    """An adapter that was read: the settings of its configuration, its weights by peft's names without a prefix, the
    hash of the network that it was trained on, where that is known, and what it was read from."""

    config: dict[str, Any] = field(repr=False)
    state: dict[str, Tensor] = field(repr=False)
    base: str | None
    path: str


def save_lora(student: nn.Module, folder: str | Path, *, name: str | None = None, layout: str | None = None) -> Path:
    """Write a student's adapter, in the layout of diffusers or peft.

    Layouts: "diffusers", `pytorch_lora_weights.safetensors` with the metadata of diffusers' own files, which
    `pipe.load_lora_weights(folder)` reads; "peft", `adapter_model.safetensors` and `adapter_config.json`, which
    `peft.PeftModel.from_pretrained(network, folder)` reads. Either is read by `fk.add_lora(velocity, folder)`. Beside
    the weights is a hash of the network they were trained on. Each file is whole or not there.

    Adapters that are sharded (`fully_shard`) are gathered: every process makes the call, into one folder or several.
    Pipelines round adapters to the dtype of their network: loaded into one of float32, the student's samples come out
    again exactly.

    Args:
        student: what `fk.straighten(lora=...)` or `fk.add_lora` made, or any network with adapters of peft's.
        folder: made where it is not there; a file of the same name in it is replaced.
        name: of the adapter, where the network has several; None is the one that is trained.
        layout: None is "diffusers" for a network of diffusers', else "peft".

    Returns:
        The path of the weights.

    Raises:
        TypeError, ValueError, OSError: naming the argument.

    Examples:
        >>> fk.save_lora(torch.nn.Linear(2, 2), "folder")
        Traceback (most recent call last):
        ValueError: student: expected a network with an adapter of peft's (fk.add_lora), got Linear
    """
    expect(isinstance(student, nn.Module), "student", "an nn.Module", student, TypeError)
    folder = expect_path(folder, "folder")
    expect(not folder.is_file(), "folder", "a folder", f"the file {folder}", NotADirectoryError)
    if name is not None:
        expect_text(name, "name", "the name of an adapter")
    if layout is not None:
        expect_choice(layout, "layout", ("diffusers", "peft"))
    net = network_of(VelocityField.of(student))
    name, layout = adapter_name(net, name), layout or ("diffusers" if _is_diffusers(net) else "peft")
    state = {key: whole(t.detach()).cpu() for key, t in _state(net, name).items()}
    config = _plain(getattr(net, CONFIGS)[name])
    about = {"format": "pt"} | ({} if (base := base_hash(net)) is None else {BASE: base})
    folder.mkdir(parents=True, exist_ok=True)
    if layout == "diffusers":
        prefix = "unet" if "UNet" in type(net).__name__ else "transformer"
        packed = {f"{prefix}.{key}": value for key, value in config.items()}
        about[METADATA] = json.dumps(packed, indent=2, sort_keys=True)
        path = folder / DIFFUSERS
    else:
        prefix, path = PEFT_PREFIX, folder / PEFT
        expect_target(path, "folder")
        with whole_file(folder / PEFT_CONFIG) as partial:
            partial.write_text(json.dumps(config | {"inference_mode": True}, indent=2, sort_keys=True))
    _weights.write(path, {f"{prefix}.{key}": t for key, t in state.items()}, **about)
    return path


def read_lora(path: str | Path, name: str) -> LoraFile:
    """An adapter of a folder, or of its file of weights. name: of the argument."""
    path = expect_path(path, name)
    if path.is_dir():
        there = [path / file for file in (DIFFUSERS, PEFT) if (path / file).is_file()]
        expect(len(there) == 1, name, f"a folder with {DIFFUSERS} or {PEFT}", f"{path}, with {len(there)} of them")
        path = there[0]
    state, metadata = _weights.read(path, name, WANTED, stacklevel=4)
    prefixes = {key.split(".lora_")[0].split(".")[0] for key in state}
    if METADATA in metadata:
        packed = _json(metadata[METADATA], name, path)
        prefix = next(iter(packed), "").partition(".")[0]
        config = {key.removeprefix(f"{prefix}."): value for key, value in packed.items()}
    else:
        prefix, beside = PEFT_PREFIX, path.parent / PEFT_CONFIG
        got = f"{path}, of {', '.join(sorted(prefixes)) or 'nothing'}"
        expect(beside.is_file(), name, f"{WANTED}, with its configuration ({PEFT_CONFIG} beside it)", got)
        config = _json(beside.read_text(), name, beside)
    alone = all(key.startswith(f"{prefix}.") for key in state)
    expect(alone and len(state) > 0, name, f"weights of one network, {prefix}.*", f"{path}, of {sorted(prefixes)}")
    state = {key.removeprefix(f"{prefix}."): t for key, t in state.items()}
    return LoraFile(config, state, metadata.get(BASE), str(path))


def expect_adapter(net: nn.Module, name: str, given: LoraFile, argument: str) -> None:
    """Raise unless the adapter that was read is one of this network, and has the names and shapes of the one there."""
    if given.base is not None and (base := base_hash(net)) is not None:
        got = f"{given.path}, of a network whose weights are {given.base[:12]}"
        expect(given.base == base, argument, f"an adapter of this network (weights {base[:12]})", got)
    own = _state(net, name)
    for key in sorted(own.keys() | given.state.keys()):
        have, want = given.state.get(key), own.get(key)
        shapes = ["none" if t is None else str(list(t.shape)) for t in (have, want)]
        fits = isinstance(have, Tensor) and want is not None and have.shape == want.shape and have.is_floating_point()
        expected = f"the adapter of this network and of these settings, {shapes[1]} for {key!r}"
        expect(fits, argument, expected, f"{shapes[0]} in {given.path}")


@torch.no_grad()
def load_adapter(net: nn.Module, name: str, given: LoraFile) -> None:
    """Take the weights of what `expect_adapter` has found to fit."""
    for key, own in _state(net, name).items():
        own.copy_(given.state[key])


def base_hash(net: nn.Module) -> str | None:
    """Of the network's weights without adapters; None where they cannot be read."""
    try:
        return weights_hash(without_adapters_copied(net))[0]
    except (Unknown, ValueError):
        return None


def _state(net: nn.Module, name: str) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(net, adapter_name=name, save_embedding_layers=False)


def _plain(config: Any) -> dict[str, Any]:
    """The settings of a configuration, ready for JSON."""
    said = copy.deepcopy(config.to_dict())
    return {key: sorted(value) if isinstance(value, (set, frozenset)) else value for key, value in said.items()}


def _is_diffusers(net: nn.Module) -> bool:
    return any(kind.__module__.startswith("diffusers.") for kind in type(net).__mro__)


def _json(text: str, name: str, path: Path) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as e:
        raise ValueError(f"{name}: expected {WANTED}, got {path}, whose configuration is no JSON ({e})") from e
    expect(isinstance(found, dict), name, f"{WANTED}, with a configuration", f"{path}, with {describe(found)}")
    return found
