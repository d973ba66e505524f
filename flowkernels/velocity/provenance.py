"""What a network or a velocity is, in a record: hashes of weights, conditioning and attributes."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from flowkernels._warnings import warn
from flowkernels.velocity.hashes import Unknown, attributes_hash, modules_of, tensors_hash, weights_hash

NO_MODULE = "not a module"


@dataclass(frozen=True)
class Identity:
    """What a velocity is, as far as it can be read, in hashes: what is made of it carries them as its provenance.

    parameters: of the weights and the convention. of_state: that of what is in the state dict alone, which files of
    before have. attributes: of the classes of all modules and what they hold beside weights. conditioning,
    unconditional: of each of their values. None is unknown; `unknown` says why. unread: names of attributes and hooks
    that have no hash. shared: names of the conditioning that is not per sample. pipeline: `VelocityBase.provenance`.
    """

    parameters: str | None = None
    of_state: str | None = None
    attributes: str | None = None
    conditioning: dict[str, str | None] = field(default_factory=dict)
    unconditional: dict[str, str | None] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    pipeline: Mapping[str, Any] = field(default_factory=dict)

    def provenance(self) -> dict:
        """The entries of a file."""
        found = {"parameters_sha256": self.parameters, "attributes_sha256": self.attributes}
        found |= {"conditioning": self.conditioning, "unconditional": self.unconditional, "shared": list(self.shared)}
        found |= {"pipeline": dict(self.pipeline)} if self.pipeline else {}
        return found | ({"unknown": self.unknown} if self.unknown else {})

    def is_proven(self, recorded: Mapping[str, Any]) -> bool:
        """Whether a recorded provenance is for certain of this velocity: nothing differs, and nothing is unknown."""
        hashes = (self.parameters, self.attributes)
        same = (recorded.get("parameters_sha256"), recorded.get("attributes_sha256")) == hashes and None not in hashes
        return same and not self.unknown and not self.unread and not self.differences(recorded)

    def differences(self, recorded: Mapping[str, Any]) -> list[str]:
        """What differs from a recorded provenance, or cannot be compared, in words; older ones know less."""
        if "parameters_sha256" not in recorded:
            return []
        found, there = [], recorded["parameters_sha256"]
        before = "attributes_sha256" not in recorded and there == self.of_state
        said = recorded.get("unknown")
        reasons = [k.get("parameters", NO_MODULE) if isinstance(k, Mapping) else "" for k in (said or {}, self.unknown)]
        if there != self.parameters and not before:
            told = [
                d[:12] if d else f"unknown: {why}" for d, why in zip((there, self.parameters), reasons, strict=True)
            ]
            found.append(f"parameters {told[0]}, now {told[1]}")
        elif self.parameters is None and reasons != [NO_MODULE] * 2:
            found.append(f"parameters unknown: {reasons[1]}")
        attributes = recorded.get("attributes_sha256")
        if attributes and self.attributes and attributes != self.attributes:
            found.append("attributes of its modules")
        for name in ("conditioning", "unconditional"):
            then, now = recorded.get(name), getattr(self, name)
            if isinstance(then, Mapping):
                keys = sorted(k for k in then.keys() | now.keys() if then.get(k) != now.get(k) or then[k] is None)
                found += [f"{name} {k!r}{'' if then.get(k) and now.get(k) else ' (unknown)'}" for k in keys]
        if "guidance" in self.unknown or (isinstance(said, Mapping) and "guidance" in said):
            found.append("guidance (unknown)")
        shared = recorded.get("shared")
        if isinstance(shared, list) and shared != list(self.shared):
            found.append(f"shared {shared}, now {list(self.shared)}")
        return found + pipeline_differences(recorded.get("pipeline"), self.pipeline)


INDIFFERENT = ("prompts", "prompts_sha256", "scheduler")  # of a pipeline: what the best schedules hardly depend on


def pipeline_differences(then: Any, now: Mapping[str, Any]) -> list[str]:
    """What a pipeline's settings (`VelocityBase.provenance`) differ in, in words, of those that both have."""
    then = then if isinstance(then, Mapping) else {}
    keys = [key for key in then if key in now and key not in INDIFFERENT and then[key] != now[key]]
    return [f"{key} {then[key]}, now {now[key]}" for key in keys]


def warn_of_another_pipeline(plan: Any, now: Mapping[str, Any], stacklevel: int) -> None:
    """Where a Schedule or Solver was made for a pipeline at other settings than it is used with."""
    if torch.compiler.is_compiling() or not now:
        return
    if differs := pipeline_differences(getattr(plan, "notes", {}).get("pipeline"), now):
        text = f"schedule: expected the pipeline that it was calibrated for, got another one ({'; '.join(differs)})"
        warn(f"{text}; it may not be the best for it", stacklevel)


def hash_of(value: Any, name: str, unknown: dict[str, str]) -> str | None:
    """Of any value; None if it has none, and then why, in `unknown`."""
    try:
        return tensors_hash({"": value})
    except Unknown as e:
        unknown[name] = str(e)


def network_identity(
    net: Any,
    convention: Mapping[str, Any],
    *,
    further: Sequence[tuple[str, nn.Module, Collection[str]]] = (),
    conditioning: Mapping[str, Any] | None = None,
    unconditional: Mapping[str, Any] | None = None,
    shared: Sequence[str] = (),
    weights: bool = True,
    unknown: Mapping[str, str] = MappingProxyType({}),
) -> Identity:
    """Of a network, wrappers aside, called by a convention; what is no module has no hash of its own.

    further: modules beside its own whose attributes count, as `hashes.attributes_hash` takes them. weights: False
    leaves out the hashes of weights, which take as long as these take to be read. unknown: of the convention.
    """
    digests, attributes, unknown = (None, None), (None, []), dict(unknown)
    if isinstance(net, nn.Module):
        try:
            digests = weights_hash(net, repr(sorted(convention.items()))) if weights else digests
        except Unknown as e:
            unknown["parameters"] = str(e)
        attributes = attributes_hash([*modules_of(net), *further])
    else:
        unknown["parameters"] = NO_MODULE
    kwargs = [
        {key: hash_of(value, f"{name}.{key}", unknown) for key, value in (given or {}).items()}
        for name, given in (("conditioning", conditioning), ("unconditional", unconditional))
    ]
    names = tuple(sorted(set(shared)))
    return Identity(*digests[::-1], attributes[0], *kwargs, unknown, tuple(attributes[1]), names)
