"""What the command line reads: the user's model, checkpoints, calibrations and noise."""

import contextlib
import importlib
import math
import os
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

import flowkernels as fk
from flowkernels import _weights
from flowkernels._checks import expect, expect_numbers, expect_room
from flowkernels._files import damaged, expect_target, read_json
from flowkernels.models.bundled import BUNDLED
from flowkernels.models.checkpoints import WANTED, find_weights
from flowkernels.velocity.field import VelocityField
from flowkernels.velocity.protocol import as_given, resolve

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


class InputError(Exception):
    """What the user gave cannot be worked with; the message names the option."""


def own_line(e: BaseException) -> str:
    """The place in the user's own code that an error came through, if any."""
    ours = [Path(module.__file__).parent for module in (fk, torch, np, importlib)]
    frames = [f for f in traceback.extract_tb(e.__traceback__) if not f.filename.startswith("<")]
    own = [f for f in frames if not any(Path(f.filename).is_relative_to(folder) for folder in ours)]
    own = [f for f in own if Path(f.filename).parent != Path(os.__file__).parent]
    return f" at {own[-1].filename}:{own[-1].lineno}, `{own[-1].line}`" if own else ""


@contextlib.contextmanager
def in_its_words(words: dict[str, str]) -> Iterator[None]:
    """Errors of the library, or of another option, with the command line's words for its own."""
    try:
        yield
    except (ValueError, InputError) as e:
        text = str(e)
        for word, of_command in words.items():
            text = text.replace(word, of_command)
        if text == str(e):
            raise
        raise InputError(text) from e


# What is checked before any work starts


def require(ok: bool, message: str) -> None:
    if not ok:
        raise InputError(message)


def check_paths(args, *suffixes: str) -> None:
    """The input files exist, and the output files can be written and are none of them: args.targets, whatever folder
    the user's model goes to."""
    args.targets = {}
    inputs = [(f"--{option}", getattr(args, option, None)) for option in ("checkpoint", "schedule", "student", "data")]
    inputs.append(("FILE", getattr(args, "file", None)))
    inputs += [("FILE", path) for path in getattr(args, "parts", ())]
    for option, path in inputs:
        there = path is None or path.is_file() or (option == "--checkpoint" and path.is_dir())
        require(there, f"{option}: expected a file, got {path}, which is not one")
    for option in ("state", "out"):
        path = getattr(args, option, None)
        if path is not None:
            try:
                args.targets[option] = expect_target(path, f"--{option}", inputs)
            except (OSError, ValueError) as e:
                raise InputError(str(e)) from e
            inputs.append((f"--{option}", path))
    known = not suffixes or args.out is None or args.out.suffix in suffixes
    require(known, f"--out: expected a file name ending in {' or '.join(suffixes)}, got {args.out}")


def read_calibration(path: Path, option: str) -> fk.Calibration:
    try:
        return fk.Calibration.load(path)
    except ValueError as e:
        raise InputError(str(e).replace("path:", f"{option}:", 1)) from e


def load_calibration(args) -> fk.Calibration:
    calibration = read_calibration(args.schedule, "--schedule")
    there = args.steps in calibration
    require(there, f"--steps: expected one of {sorted(calibration)}, those of {args.schedule}, got {args.steps}")
    return calibration


def load_scheduler(folder: Path) -> "SchedulerMixin":
    """Of a pipeline of diffusers, from its folder."""
    try:
        diffusers = importlib.import_module("diffusers")
    except ImportError as e:
        raise InputError(f"--like: expected diffusers to be installed, for {folder} ({e})") from e
    if not (folder / "scheduler_config.json").exists() and (folder / "model_index.json").exists():
        folder /= "scheduler"  # of a saved pipeline
    config = read_json(folder / "scheduler_config.json", "--like", "the folder of a scheduler")
    name = config.get("_class_name") if isinstance(config, dict) else None
    kind = getattr(diffusers, name, None) if isinstance(name, str) and name.endswith("Scheduler") else None
    require(kind is not None, f"--like: expected the folder of a scheduler of diffusers, got {folder} of {name!r:.100}")
    return kind.from_pretrained(folder)


def load_model(args, calibration: fk.Calibration | None = None):
    """(velocity, shape of one sample, notes of its checkpoint), tried on one sample."""
    model = _build_model(args.model)
    notes = load_checkpoint(network_of(model), args.checkpoint, args.prefer) if args.checkpoint else {}
    if notes.get("straightened_from") and getattr(model, "is_guided", False):  # a student has learned guidance
        print(f"{args.checkpoint} was straightened with guidance, which is not applied once more")
        model = as_given(resolve(model).without_guidance())
    if isinstance(model, nn.Module):
        with _of_model(f"{args.model} cannot be put on {args.device}"):
            model = model.to(args.device).eval()
    shape = args.shape or (BUNDLED[args.model].shape if args.model in BUNDLED else None)
    shape = shape or tuple(calibration.provenance.get("shape") or () if calibration else ())
    require(len(shape) > 0, f"--shape: expected the shape of one sample, for the model {args.model}")
    for option, samples in (("-n", getattr(args, "n", 1)), ("--bank", getattr(args, "bank", 1))):
        expect_room(4 * math.prod(shape) * samples, option, "noise", f"{samples} samples of shape {list(shape)}")
    with _of_model(f"{args.model} failed on one sample of shape {list(shape)}"):
        fk.rollout(model, draw_noise(1, shape, 0).to(args.device), 1)
    return model, shape, notes


def _build_model(spec: str):
    """The bundled network of this name, or what `module:function` returns."""
    if spec in BUNDLED:
        return BUNDLED[spec].load()
    module, _, function = spec.partition(":")
    names = " or ".join(sorted(BUNDLED))
    require(bool(module and function), f"--model: expected {names} or module:function, got {spec!r}")
    if os.getcwd() not in sys.path:  # an installed command does not look in the current folder
        sys.path.insert(0, os.getcwd())
    with _of_model(f"cannot import {spec!r}"):
        build = getattr(importlib.import_module(module), function)
    with _of_model(f"{spec} failed when it was called"):
        model = build()
    require(callable(model), f"--model: expected {spec} to return a callable, got {type(model).__name__}")
    return model


@contextlib.contextmanager
def _of_model(failed: str) -> Iterator[None]:
    """Whatever the user's own code raises, as an error of --model with the place in it."""
    try:
        yield
    except (Exception, SystemExit) as e:
        raise InputError(f"--model: {failed}: {type(e).__name__}: {e}{own_line(e)}") from e


def network_of(model) -> nn.Module | None:
    """The module whose weights a checkpoint holds."""
    net = VelocityField.of(model).net
    return net if isinstance(net, nn.Module) else None


def load_checkpoint(net: nn.Module | None, path: Path, prefer: str = "ema") -> dict:
    """Put the file's weights into the network, and say which, where there is more than one state dict in it. Returns
    the notes that a straightened student carries, else {}."""
    require(net is not None, f"--checkpoint: expected a model that is a torch.nn.Module for the weights of {path}")
    try:
        found, state = find_weights(net, path, prefer, "--checkpoint", lambda value: f"--prefer {value}")
        with damaged("--checkpoint", WANTED, path):
            notes = _notes(found.metadata)
    except (ValueError, OSError) as e:
        raise InputError(re.sub("^prefer:", "--prefer:", str(e))) from e
    net.load_state_dict(state)
    if found.source or found.others:
        print(found)
    return notes


def _notes(metadata: dict[str, str]) -> dict:
    """What `straighten` wrote about its student."""
    notes = _weights.parsed(metadata, "notes")
    teacher = notes.get("straightened_from")
    expect(teacher is None or isinstance(teacher, str), "straightened_from", "a text", teacher)
    expect_numbers(notes.get("times", []), "times")
    return notes


def draw_noise(n: int, shape: tuple[int, ...], seed: int | torch.Generator) -> Tensor:
    """Standard normal noise, made on the CPU so that a seed means the same on every device."""
    generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
    return torch.randn(n, *shape, generator=generator, dtype=torch.float32, device="cpu")
