"""What a velocity is, in a record: hashes of weights, conditioning and attributes, and warnings where they differ."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from flowkernels._warnings import warn
from flowkernels.velocity.field import VelocityField
from flowkernels.velocity.hashes import Unknown, attributes_hash, modules_of, tensors_hash, unwrapped, weights_hash


@dataclass(frozen=True)
class Identity:
    """What a velocity is, as far as it can be read, in hashes: what is made of it carries them as its provenance.

    parameters: of the weights and the convention. of_state: that of what is in the state dict alone, which files of
    before have. attributes: of the classes of all modules and what they hold beside weights. conditioning,
    unconditional: of each of their values. None is unknown; `unknown` says why. unread: names of attributes and hooks
    that have no hash.
    """

    parameters: str | None
    of_state: str | None
    attributes: str | None
    conditioning: dict[str, str | None]
    unconditional: dict[str, str | None]
    unknown: dict[str, str]
    unread: tuple[str, ...] = ()

    def provenance(self) -> dict:
        """The entries of a file."""
        found = {"parameters_sha256": self.parameters, "attributes_sha256": self.attributes}
        found |= {"conditioning": self.conditioning, "unconditional": self.unconditional}
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
        return found


NO_MODULE = "not a module"


def _field_and_network(velocity) -> tuple["VelocityField | None", Any]:
    """Wrappers around either aside, a sampler being one."""
    from flowkernels.fusion.sampler import FusedSampler  # which imports this module

    velocity = unwrapped(velocity.velocity if isinstance(velocity, FusedSampler) else velocity)
    field = velocity if isinstance(velocity, VelocityField) else None
    return field, unwrapped(velocity if field is None else field.net)


def attributes_of(velocity) -> tuple[str | None, list[str]]:
    """(the hash of the modules' classes and attributes, names of what has none); of no module (None, [])."""
    field, net = _field_and_network(velocity)
    if not isinstance(net, nn.Module):
        return None, []
    modules = modules_of(net)
    if field is not None and not type(field).__module__.startswith("flowkernels."):  # with what it adds
        modules.append(("field.", field, vars(VelocityField(net))))
    return attributes_hash(modules)


def hash_of(value: Any, name: str, unknown: dict[str, str]) -> str | None:
    """Of any value; None if it has none, and then why, in `unknown`."""
    try:
        return tensors_hash({"": value})
    except Unknown as e:
        unknown[name] = str(e)


def identity(velocity) -> Identity:
    """Of any velocity; about as long as its weights take to be read, and never an error."""
    field, net = _field_and_network(velocity)
    digests, unknown = (None, None), {}
    if isinstance(net, nn.Module):
        convention = (VelocityField(net) if field is None else field).convention()
        try:
            digests = weights_hash(net, repr(sorted(convention.items())))
        except Unknown as e:
            unknown["parameters"] = str(e)
    else:
        unknown["parameters"] = NO_MODULE
    attributes, unread = attributes_of(velocity)
    kwargs = [
        {key: hash_of(value, f"{name}.{key}", unknown) for key, value in getattr(field, name, {}).items()}
        for name in ("conditioning", "unconditional")
    ]
    return Identity(*digests[::-1], attributes, *kwargs, unknown, tuple(unread))


def warn_if_another(velocity, recorded: Mapping[str, Any], stacklevel: int) -> bool:
    """Warn if a velocity is not the one of a calibration's provenance; whether it is for certain."""
    now = identity(velocity)
    if differs := now.differences(recorded):
        text = f"velocity: expected the model that the calibration was made with, got another ({', '.join(differs)})"
        warn(text, stacklevel=stacklevel)
    return now.is_proven(recorded)


def parameter_hash(velocity) -> str | None:
    """The hash of a module's weights and its convention; None where they cannot be read, or for what is no module."""
    return identity(velocity).parameters
