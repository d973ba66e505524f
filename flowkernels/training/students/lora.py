"""LoRA students: the teacher's network with adapters of peft's, on the teacher's own weights."""

import copy
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from flowkernels._checks import LOW, expect, expect_positive_int, expect_shown, expect_text
from flowkernels.training.students.adapters import (
    CONFIGS,
    adapter_layers,
    adapter_name,
    adapter_parameters,
    network_of,
)
from flowkernels.training.students.lora_files import LoraFile, expect_adapter, load_adapter, read_lora
from flowkernels.training.students.modules import SHARES, copied
from flowkernels.velocity.field import VelocityField
from flowkernels.velocity.hashes import tensors_hash
from flowkernels.velocity.protocol import Velocity, VelocityBase, as_given, resolve

if TYPE_CHECKING:
    from peft import LoraConfig

Lora = Any  # LoraConfig | Mapping[str, Any] | int, where peft is not there to name the first
EXPECTED = "a rank, a peft.LoraConfig, a dict of its settings, or the path of a saved adapter"
EXACT_INITS = (True, False, "gaussian", "orthogonal")  # that leave the weights of the network as they are
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
READ = (nn.MultiheadAttention, nn.TransformerEncoderLayer)  # which read the weights of their layers, uncalled


@torch.inference_mode(False)
def add_lora(velocity: Velocity, lora: Lora, *, name: str | None = None) -> nn.Module:
    """A student for LoRA: the velocity's network with low-rank adapters, on the same weights.

    Only the adapters are new. All other weights are the velocity's own storage: what is held, and what is read at a
    step, is there once. The velocity is left as it is and stays the teacher, bit for bit; before it is trained the
    student computes the same, its adapters being zero (but for an `init_lora_weights` that says otherwise).

    `fk.straighten(lora=...)` does this itself; this is for loops of one's own, with `fk.TrajectoryBank` and
    `fk.StraightenLoss`. An optimiser is given `[p for p in student.parameters() if p.requires_grad]`. Move the velocity
    to its device and dtype before: what is moved later is no longer shared.

    Args:
        velocity: a network, or a `VelocityField` of one. Of a guided one the student is the conditional field. Adapters
            that it has already, and that are on, stay on, and are not trained.
        lora: a rank; a `peft.LoraConfig`, with DoRA and rsLoRA by it; a dict of its settings; or the path of an adapter
            that `fk.save_lora` wrote, which is loaded. A rank, and a dict without these: `lora_alpha` is the rank, and
            the targets are all linear layers whose adapter is smaller than their weight, or where there are none the
            convolutions. Adapters of bfloat16 and float16 networks are float32.
        name: of the adapter; None is "default", or a new one where that is taken.

    Returns:
        A velocity of the same class, in the modes that the velocity is in; its buffers are copies.

    Raises:
        ImportError: without peft (`pip install 'flowkernels[lora]'`).
        TypeError, ValueError: naming the argument: targets that match nothing, settings that train or change weights of
            the network itself (`modules_to_save`, `bias`, `init_lora_weights="pissa"` and the like), an adapter of
            another network.

    Source: LoRA (arXiv 2106.09685), by peft.

    Examples:
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.SiLU(), torch.nn.Linear(8, 2))
        >>> teacher = fk.VelocityField(net, time_column=True)
        >>> student = fk.add_lora(teacher, 0)
        Traceback (most recent call last):
        ValueError: lora: expected at least 1, got 0
    """
    lora = expect_lora(lora)
    if name is not None:
        expect_text(name, "name", "a name for the adapter")
        expect_shown("." not in name, "name", "a name without dots", name)
    velocity = as_given(resolve(velocity).unfused().without_guidance())
    expect(isinstance(velocity, nn.Module), "velocity", "a network that is a module", velocity, TypeError)
    return with_lora(velocity, lora, "velocity", name)


def expect_lora(lora: Lora) -> Lora:
    """What was given, looked at without peft as far as it can be."""
    wrong = isinstance(lora, bool) or lora is None
    if isinstance(lora, int) and not wrong:
        return expect_positive_int(lora, "lora")
    if isinstance(lora, (str, Path)):
        return read_lora(lora, "lora")
    known = isinstance(lora, (Mapping, LoraFile)) or any(k.__name__ == "LoraConfig" for k in type(lora).__mro__)
    expect(known and not wrong, "lora", EXPECTED, lora, TypeError)
    if isinstance(lora, Mapping) and "r" in lora:
        expect_positive_int(lora["r"], "lora['r']")
    return lora


def with_lora(velocity: nn.Module, lora: Lora, argument: str, name: str | None = None) -> nn.Module:
    """The student on the weights of a module. argument: the name of that one, for errors."""
    peft = expect_peft()
    several = isinstance(velocity, VelocityBase) and not isinstance(velocity, VelocityField)
    expect(not several, argument, "a network, or a VelocityField of one, for lora", type(velocity).__name__)
    student = copied(velocity, _shared(velocity))
    net = network_of(VelocityField.of(student))
    expect(isinstance(net, nn.Module), argument, "a field of a network that is a module", net)
    before = adapter_layers(net)
    merged = next((key for key, layer in before.items() if layer.merged), None)
    expect(merged is None, argument, "adapters that are not merged (unmerge_adapter)", f"{merged!r}, which is")
    active = {a: None for layer in before.values() if not layer.disable_adapters for a in layer.active_adapters}
    config = _config(peft, lora, net)
    name = _free_name(net, name)
    _inject(peft, config, net, name)
    layers = adapter_layers(net)
    for path, layer in layers.items():
        layer.set_adapter([*active, name])
        if path not in before:
            layer.train(layer.get_base_layer().training)
    own = {id(p) for p in adapter_parameters(net, name).values()}
    for key, p in net.named_parameters():
        if id(p) in own:
            p.requires_grad_(True)
            p.data = p.data.float() if p.dtype in LOW else p.data
        else:
            expected = "settings that train adapters alone, not weights of the network (modules_to_save, bias, ...)"
            expect(not p.requires_grad or key in _frozen(before), "lora", expected, f"ones that train {key!r}")
            p.requires_grad_(False)
    _expect_called(net)
    if isinstance(lora, LoraFile):
        expect_adapter(net, name, lora, "lora")
        load_adapter(net, name, lora)
    setattr(student, SHARES, True)
    return student


def expect_peft() -> Any:
    try:
        import peft
    except ImportError as e:
        raise ImportError("lora: expected peft to be installed (pip install 'flowkernels[lora]')") from e
    return peft


def lora_identity(lora: Lora) -> str:
    """What determines the adapters beside their shapes, in a text."""
    if isinstance(lora, int):
        return str(lora)
    if isinstance(lora, LoraFile):
        return f"{lora_identity(lora.config)} {tensors_hash(lora.state)[:16]}"
    settings = lora if isinstance(lora, Mapping) else lora.to_dict()
    kept = {k: sorted(v) if isinstance(v, (set, frozenset)) else v for k, v in settings.items()}
    return repr(sorted((k, v) for k, v in kept.items() if k not in ("peft_version", "runtime_config")))


def told(student: nn.Module) -> str:
    """What was chosen, in a line."""
    net = network_of(VelocityField.of(student))
    trained = [p for p in net.parameters() if p.requires_grad]
    layers = [layer for layer in adapter_layers(net).values() if any(p.requires_grad for p in layer.parameters())]
    kinds = Counter(type(layer.get_base_layer()).__name__ for layer in layers)
    count, whole = sum(p.numel() for p in trained), sum(p.numel() for p in net.parameters())
    ranks = sorted({layer.r[adapter_name(net, None)] for layer in layers})
    what = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
    share = 100 * count / max(1, whole - count)
    return f"lora: rank {', '.join(map(str, ranks))} on {what}: {count:,} parameters, {share:.2g} % of the network's"


# ---- how ----


def _shared(velocity: nn.Module) -> dict[int, Any]:
    """The weights of its copy: parameters of their own, which may be frozen, on the same storage."""
    memo: dict[int, Any] = {}
    for p in velocity.parameters():
        plain = type(p) is nn.Parameter or p.requires_grad  # frozen weights of another class, quantised ones, are one
        memo[id(p)] = nn.Parameter(p.detach(), requires_grad=False) if plain else p
        expect(not p.is_inference(), "velocity", "weights made outside of torch.inference_mode", "some made in it")
    return memo


def _free_name(net: nn.Module, name: str | None) -> str:
    there = set(getattr(net, CONFIGS, {}))
    if name is not None:
        expect_shown(name not in there, "name", f"another one than those of its adapters {sorted(there)}", name)
        return name
    return next(n for i in range(len(there) + 1) if (n := f"default_{i}" if i else "default") not in there)


def _config(peft: Any, lora: Lora, net: nn.Module) -> "LoraConfig":
    """The configuration, a copy, with targets."""
    if isinstance(lora, LoraFile):
        lora = lora.config
    if isinstance(lora, int):
        lora = dict(r=lora)
    if isinstance(lora, Mapping):
        try:
            config = peft.LoraConfig(**({"lora_alpha": lora.get("r", 8)} | dict(lora)))
        except (TypeError, ValueError) as e:
            raise type(e)(f"lora: expected settings of peft.LoraConfig, got {type(e).__name__}: {e}") from e
    else:
        expect(isinstance(lora, peft.LoraConfig), "lora", EXPECTED, lora, TypeError)
        config = copy.deepcopy(lora)
    kind = getattr(config.peft_type, "value", config.peft_type)
    expect(kind == "LORA", "lora", "a configuration of LoRA", f"one of {kind}")
    expect_positive_int(config.r, "lora.r")
    for key, wanted in (("bias", "none"), *((k, None) for k in REFUSED)):
        value = getattr(config, key, None)
        ours = value == wanted or (wanted is None and not value)
        expected = f"{key}={wanted!r}, so that the network's own weights stay the teacher's"
        expect_shown(ours, f"lora.{key}", expected, value)
    init = config.init_lora_weights
    known = any(init is ok or (isinstance(init, str) and init == ok) for ok in EXACT_INITS)
    expected = "True, False, 'gaussian' or 'orthogonal', which leave the network's own weights as they are"
    expect_shown(known, "lora.init_lora_weights", expected, init)
    if config.target_modules is None:
        config.target_modules = default_targets(net, config.r)
    elif not isinstance(config.target_modules, str):
        _expect_matched(config.target_modules, net)
    return config


REFUSED = ("modules_to_save", "layer_replication", "trainable_token_indices", "target_parameters")


def _expect_matched(targets: Any, net: nn.Module) -> None:
    names = [name for name, _ in net.named_modules() if name]
    for target in targets:
        ok = any(name == target or name.endswith(f".{target}") for name in names)
        shown = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name, m in net.named_modules() if _is_target(m, 1)))
        expect_shown(ok, "lora.target_modules", f"names of layers of the network ({shown:.200})", target)


def default_targets(net: nn.Module, rank: int) -> list[str] | str:
    """All linear layers whose adapter is smaller than their weight, or where there are none the convolutions: names,
    or, where those would match others beside, an expression that matches them alone."""
    layers, inside = adapter_layers(net), set()
    for part in net.modules():
        if isinstance(part, READ) or part in layers.values():
            inside |= set(part.modules()) - {part}
    every = dict(net.named_modules())
    fit: dict[str, nn.Module] = {}
    for name, part in every.items():
        base = part.get_base_layer() if name in layers else part
        if name and part not in inside and _is_target(base, rank):
            fit[name] = base
    found = [name for name, base in fit.items() if isinstance(base, nn.Linear)] or list(fit)
    expect(len(found) > 0, "lora", f"a network with linear or convolution layers larger than adapters of rank {rank}",
           type(net).__name__)  # fmt: skip
    others = [name for name in every if name not in found and any(name.endswith(f".{key}") for key in found)]
    return f"({'|'.join(map(re.escape, found))})" if others else found


def _is_target(layer: nn.Module, rank: int) -> bool:
    if isinstance(layer, nn.Linear):
        return rank * (layer.in_features + layer.out_features) < layer.weight.numel()
    if isinstance(layer, CONVOLUTIONS) and layer.groups == 1:
        area = layer.weight[0, 0].numel()
        return rank * (layer.in_channels * area + layer.out_channels) < layer.weight.numel()
    return False


def _inject(peft: Any, config: "LoraConfig", net: nn.Module, name: str) -> None:
    diffusers = any(kind.__module__ == "diffusers.loaders.peft" for kind in type(net).__mro__)
    try:
        with warnings.catch_warnings(), torch.device("cpu"):  # whatever the caller's default device
            warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)
            if diffusers:
                net.add_adapter(config, adapter_name=name)
            else:
                peft.inject_adapter_in_model(config, net, adapter_name=name)
    except (ValueError, TypeError, AttributeError, RuntimeError, NotImplementedError) as e:
        got = f"{type(e).__name__}: {' '.join(str(e).split()):.300}"
        raise ValueError(f"lora: expected adapters that fit {type(net).__name__}, got {got}") from e
    made = any(name in layer.r for layer in adapter_layers(net).values())
    expect(made, "lora.target_modules", "names of layers of the network", str(config.target_modules))


def _frozen(before: Mapping[str, nn.Module]) -> set[str]:
    """Parameters of the adapters that were there, which peft may have made trainable again."""
    return {f"{path}.{key}" for path, layer in before.items() for key, _ in layer.named_parameters()}


def _expect_called(net: nn.Module) -> None:
    layers = adapter_layers(net)
    for name, part in net.named_modules():
        if isinstance(part, READ):
            key = next((path for path in layers if path.startswith(f"{name}.") or path == name), None)
            got = f"{key!r}, whose weights {type(part).__name__} reads without a call"
            expect(key is None, "lora.target_modules", "layers that are called", got)
        elif name in layers and isinstance(part.get_base_layer(), READ):
            expect(False, "lora.target_modules", "linear or convolution layers", f"{name!r}")
