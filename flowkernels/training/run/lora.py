"""The student of a run with `lora`: adapters on the weights of the teacher, or of the student that is given."""

import logging
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flowkernels._checks import expect, expect_shown
from flowkernels.training.objective import StraightenLoss
from flowkernels.training.students.adapters import adapter_name, network_of
from flowkernels.training.students.lora import Lora, told, with_lora
from flowkernels.training.students.lora_files import LoraFile, expect_adapter, load_adapter, read_lora
from flowkernels.training.students.student import expect_no_wrapped_field
from flowkernels.velocity.field import VelocityField
from flowkernels.velocity.protocol import Velocity, as_given, resolve

log = logging.getLogger("flowkernels")
STARTS = "None, 'keep', an adapter's state dict, or the path of a saved one, with lora"


def lora_student(
    student: nn.Module | None, velocity: Velocity | None, objective: StraightenLoss, lora: Lora, init: Any, seed: int
) -> nn.Module:
    """The module to train. seed: of the adapters' weights; the caller's generators stay as they are."""
    name, base = "student", student
    if student is None:
        name = "velocity"
        there = isinstance(velocity, nn.Module)
        expect(there, "student", "a module, where the teacher is not one to put adapters into", "None")
        got = f"target={objective.target!r}, whose student is another network (make it, and give it)"
        expect(not objective.makes_student, "lora", "a target whose student is the teacher's network", got)
        base = as_given(resolve(velocity).without_guidance())
    expect(isinstance(base, nn.Module), "student", "an nn.Module or None", base, TypeError)
    expect_no_wrapped_field(base, name)
    for key, part in base.named_modules():
        counts = getattr(part, "track_running_stats", False) is True and getattr(part, "running_mean", None) is not None
        expected = "a network whose adapters are all that training changes, for lora"
        expect(not counts, name, expected, f"one with statistics of batches, in the {type(part).__name__} {key!r}")
    start = _start(init)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        made = with_lora(base, lora, name)
    if start is not None:
        net = network_of(VelocityField.of(made))
        adapter = adapter_name(net, None)
        expect_adapter(net, adapter, start, "init")
        load_adapter(net, adapter, start)
    log.info("straighten: %s", told(made))
    return made


def _start(init: Any) -> LoraFile | None:
    """The adapter that a run starts from; None for a new one."""
    if init is None or (isinstance(init, str) and init == "keep"):
        return None
    if isinstance(init, Mapping):
        plain = all(isinstance(key, str) and isinstance(value, Tensor) for key, value in init.items())
        expect(plain and len(init) > 0, "init", STARTS, init)
        return LoraFile({}, _without_prefix(init), None, "the state dict")
    is_path = isinstance(init, (str, os.PathLike)) and init != "teacher"
    expect_shown(is_path, "init", STARTS, init)
    return read_lora(init, "init")


def _without_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for prefix in ("base_model.model.", "transformer.", "unet."):
        if all(key.startswith(prefix) for key in state):
            return {key.removeprefix(prefix): value for key, value in state.items()}
    return dict(state)
