"""Adapters in networks: which layers of peft's there are, a network without them, and evaluating it so.

peft is imported where a network that is given may have such layers, that is where someone has imported it already.
"""

import contextlib
import copy
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from flowkernels._checks import expect, expect_shown
from flowkernels.training.students.modules import SHARES, copied, unwrapped
from flowkernels.velocity.field import VelocityField
from flowkernels.velocity.hashes import unwrapped as bare_of
from flowkernels.velocity.protocol import VelocityBase
from flowkernels.velocity.provenance import Identity

CONFIGS = "peft_config"  # of a network: the configurations of its adapters by name
LOADED = "_hf_peft_config_loaded"  # of diffusers' models


def adapter_layers(module: nn.Module) -> dict[str, Any]:
    """The layers of peft's that hold adapters, by name."""
    if sys.modules.get("peft") is None:
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: part for name, part in module.named_modules() if isinstance(part, BaseTunerLayer)}


def network_of(velocity: nn.Module) -> nn.Module:
    """The network of a velocity, without wrappers, peft's own among them."""
    net = bare_of(velocity)
    while isinstance(net, VelocityField):
        net = bare_of(net.net)
    return net


def adapter_name(net: nn.Module, name: str | None) -> str:
    """The adapter of that name, or the one that is trained; ValueError where there is none, or are several."""
    there = list(getattr(net, CONFIGS, {}))
    expect(len(there) > 0, "student", "a network with an adapter of peft's (fk.add_lora)", type(net).__name__)
    if name is not None:
        expect_shown(name in there, "name", f"one of the adapters {there}", name)
        return name
    trained = [key for key in there if any(p.requires_grad for p in adapter_parameters(net, key).values())]
    found = there if len(there) == 1 else trained
    expect(len(found) == 1, "name", f"one of the adapters {there}", "None, where it is not one that is trained")
    return found[0]


def adapter_parameters(net: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The parameters of one adapter, by their names in the network."""
    found = {}
    for path, layer in adapter_layers(net).items():
        for kind in layer.adapter_layer_names:
            part = getattr(layer, kind)
            if name in part:
                held = part[name]
                inside = {"": held} if isinstance(held, nn.Parameter) else dict(held.named_parameters())
                found |= {".".join(filter(None, (path, kind, name, key))): p for key, p in inside.items()}
    return found


def _switched(net: nn.Module) -> list[Any]:
    """What adapters are switched off by: their layers, and what peft trains whole beside them (`modules_to_save`), the
    inner ones first."""
    if sys.modules.get("peft") is None:
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    kinds = BaseTunerLayer, AuxiliaryTrainingWrapper
    return [part for part in reversed(list(net.modules())) if isinstance(part, kinds)]


def _is_layer(part: Any) -> bool:
    """Whether it holds adapters; else it is what peft trains whole."""
    return callable(getattr(type(part), "get_base_layer", None))


def without_adapters_copied(net: nn.Module) -> nn.Module:
    """The network as it was before adapters were put in, of the same weights, not of copies; to be looked at."""
    memo: dict[int, Any] = {id(t): t for t in (*net.parameters(), *net.buffers())}
    for part in _switched(net):
        memo[id(part)] = copy.deepcopy(part.get_base_layer() if _is_layer(part) else part.original_module, memo)
    return _plain(net, memo)


def _plain(net: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A copy whose layers with adapters are in `memo`, and which knows of none."""
    memo[id(getattr(net, CONFIGS, None))] = None
    found = copied(net, memo)
    for name in (CONFIGS, LOADED, SHARES):
        found.__dict__.pop(name, None)
    return found


def merge_lora(student: nn.Module) -> nn.Module:
    """The student as a network without adapters: those that are on are added to the weights, for stages that look at a
    network's layers, such as `fk.fuse`, and for steps that cost what the teacher's cost.

    Of the weights only those that adapters change are new; the student stays as it is. Sums are rounded to the dtype of
    the weights, so that samples differ by that.

    Args:
        student: a network or `VelocityField` with adapters of peft's.

    Returns:
        One of the same class, in the modes that the student is in.

    Raises:
        TypeError, ValueError: naming the argument.

    Examples:
        >>> fk.merge_lora(torch.nn.Linear(2, 2))
        Traceback (most recent call last):
        ValueError: student: expected a network with adapters of peft's, got Linear
    """
    field = _adapted(student)
    inner = unwrapped(student)
    net = network_of(field)
    memo: dict[int, Any] = {id(t): t for t in (*net.parameters(), *net.buffers())}
    for part in _switched(net):
        memo[id(part)] = (_merged if _is_layer(part) else _chosen)(part, memo)
    found = _plain(net, memo)
    return copied(inner, {id(part): found for part in inner.modules() if bare_of(part) is net})


def _merged(layer: Any, memo: dict[int, Any]) -> nn.Module:
    """A copy of what a layer computes, without adapters."""
    alone = copy.deepcopy(layer)
    base = alone.get_base_layer()
    if not alone.disable_adapters:
        _as_parameters(base)
        alone.merge()
    return base.requires_grad_(False)


def _chosen(wrapper: Any, memo: dict[int, Any]) -> nn.Module:
    """A copy of the module that peft's wrapper calls."""
    if hasattr(wrapper, "token_adapter"):
        return memo[id(wrapper.token_adapter)]
    active = [] if wrapper.disable_adapters else wrapper.active_adapters
    module = wrapper.modules_to_save[active[0]] if active else wrapper.original_module
    own = {id(t) for t in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, {k: v for k, v in memo.items() if k not in own}).requires_grad_(False)


def _as_parameters(layer: nn.Module) -> None:
    """Weights that a layer computes at each call, as weight_norm and spectral_norm do, become what they are now: a sum
    with the computed ones would be lost at the next call."""
    if parametrize.is_parametrized(layer):  # its class, which others of its kind share, has their properties
        now = {name: getattr(layer, name).detach().clone() for name in layer.parametrizations}
        layer.__class__ = parametrize.type_before_parametrizations(layer)
        del layer.parametrizations
        for name, value in now.items():
            layer.register_parameter(name, nn.Parameter(value))
    for hook in list(layer._forward_pre_hooks.values()):
        if isinstance(hook, WeightNorm):
            nn.utils.remove_weight_norm(layer, hook.name)
        elif isinstance(hook, SpectralNorm):
            nn.utils.remove_spectral_norm(layer, hook.name)
    computed = [name for name in ("weight", "bias") if name not in layer._parameters and hasattr(layer, name)]
    expected = "adapters on layers whose weights are parameters, weight_norm and spectral_norm aside"
    expect(not computed, "student", expected, f"a {type(layer).__name__} that computes its {', '.join(computed)}")


def _adapted(student: nn.Module) -> VelocityField:
    """The field of a student with adapters, inside of wrappers."""
    expect(isinstance(student, nn.Module), "student", "an nn.Module", student, TypeError)
    inner = unwrapped(student)
    several = isinstance(inner, VelocityBase) and not isinstance(inner, VelocityField)
    expect(not several, "student", "a network, or a VelocityField of one", type(inner).__name__)
    field = VelocityField.of(inner)
    layers = adapter_layers(network_of(field))
    expect(len(layers) > 0, "student", "a network with adapters of peft's", type(network_of(field)).__name__)
    merged = next((name for name, layer in layers.items() if layer.merged), None)
    expect(merged is None, "student", "adapters that are not merged (unmerge_adapter)", f"{merged!r}, which is")
    return field


@contextlib.contextmanager
def adapters_off(net: nn.Module) -> Iterator[None]:
    """In the block the network computes what it did before adapters were put in, in eval mode. Its modes, and which of
    the weights have gradients, are then what they were."""
    layers = [part for part in _switched(net) if not part.disable_adapters]
    training = [part for part in net.modules() if part.training]
    needed = [(p, p.requires_grad) for layer in layers for p in layer.parameters()]
    for part in training:
        part.training = False
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for p, gradient in needed:
            p.requires_grad_(gradient)
        for part in training:
            part.training = True


class _Off:
    """A network called without its adapters."""

    def __init__(self, net: nn.Module):
        self.net, self.inside = net, unwrapped(net)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with adapters_off(self.inside):
            return self.inside(*args, **kwargs)


class _Teacher(VelocityField):
    """A field whose network is an `_Off`: its identity is that of the field before adapters were put in."""

    def identify(self, weights: bool = True) -> Identity:
        try:
            net = without_adapters_copied(network_of(self.net.net))
        except ValueError:  # sharded weights are not copied
            return super().identify(weights)
        return VelocityField(net, **self.settings()).identify(weights)


def without_adapters(student: nn.Module) -> VelocityField:
    """The teacher in a student with adapters: the same network, of the same weights, with its adapters off.

    For loops of one's own whose student is a network that adapters were put into in place, as diffusers' `add_adapter`
    and `peft.get_peft_model` do: there is one copy of the weights, sharded or not, and whatever is asked of the teacher
    is computed with all adapters off and in eval mode (dropout off too), while the student's modes and the adapters'
    gradients stay as they are. A student of `fk.add_lora` has no need of it: there the velocity that it was made of is
    the teacher still.

    Not for two threads at once, and not between a student's forward and backward pass with gradient checkpointing
    inside of this one's call.

    Args:
        student: a network or `VelocityField` with adapters of peft's; it may be wrapped, as by accelerate or
            DistributedDataParallel.

    Returns:
        A VelocityField of the student's convention and conditioning. Of the same identity (`TrajectoryBank`,
        checkpoints) as the network had before.

    Raises:
        TypeError, ValueError: naming the argument: a network without adapters, with ones that are merged, or of which
            more is trained than adapters and the copies of peft's `modules_to_save`, such as biases (`bias`): there
            what the network was before is nowhere.

    Examples:
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.SiLU(), torch.nn.Linear(8, 2))
        >>> fk.without_adapters(fk.VelocityField(net, time_column=True))
        Traceback (most recent call last):
        ValueError: student: expected a network with adapters of peft's, got Sequential
    """
    field = _adapted(student)
    plain = type(field) is VelocityField
    expect(plain, "student", "a network, or a VelocityField of one", type(field).__name__)
    net = network_of(field)
    biased = next((name for name, c in getattr(net, CONFIGS, {}).items() if getattr(c, "bias", "none") != "none"), None)
    expected = "a network whose own weights stay as they are (bias='none')"
    expect(biased is None, "student", expected, f"one whose biases the adapter {biased!r} trains")
    beside: set[int] = set()
    for part in _switched(net):
        base = part.get_base_layer() if _is_layer(part) else part.original_module
        beside |= set(map(id, part.parameters())) - set(map(id, base.parameters()))
    trained = next((name for name, p in net.named_parameters() if p.requires_grad and id(p) not in beside), None)
    expect(trained is None, "student", "a network of which adapters alone are trained", f"one that trains {trained!r}")
    return _Teacher(_Off(field.net), **field.settings())
