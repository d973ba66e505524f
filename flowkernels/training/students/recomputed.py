"""Students whose activations are not kept for the backward pass, but computed again in it."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flowkernels._checks import describe, expect
from flowkernels.ops.library import is_transformed
from flowkernels.runtime.torch_private import (
    COMPILED,
    COMPILED_CALL,
    COMPILED_MODULE,
    tree_flatten,
    tree_unflatten,
)
from flowkernels.velocity.composite import Composite
from flowkernels.velocity.field import VelocityField
from flowkernels.velocity.hashes import IN_PLACE, unwrapped

SWITCHES = (  # on, off, whether it is on: of diffusers, of transformers
    ("enable_gradient_checkpointing", "disable_gradient_checkpointing", "is_gradient_checkpointing"),
    ("gradient_checkpointing_enable", "gradient_checkpointing_disable", "is_gradient_checkpointing"),
)
SWITCHED = ("gradient_checkpointing", "_gradient_checkpointing_func")  # what they set, of each module
ARGUMENT = "gradient_checkpointing"


@contextlib.contextmanager
def recomputed(student: nn.Module, wanted: bool = True) -> Iterator[list[str]]:
    """A context in which the student keeps no more for its backward pass than it has to: by its network's own switch,
    where it has one, else what goes into each of its repeated blocks, else what goes into the network. All is as it was
    afterwards. It yields the names of what is computed again, nothing
    where it is not `wanted`.

    Raises ValueError, naming the argument, for a network that was compiled in place.
    """
    with contextlib.ExitStack() as stack:
        done = []
        for network in networks(student) if wanted else ():
            switched = [part for part in _outermost(network, _has_switch) if _switch(part, stack)]
            if switched:
                done += [f"{type(part).__name__}, by its own switch" for part in switched]
                continue
            blocks = repeated_blocks(network) or [network]
            for block in blocks:
                stack.enter_context(_without_activations(block))
            many = {type(block).__name__: sum(type(b) is type(block) for b in blocks) for block in blocks}
            done += [name if n == 1 else f"{n} {name}" for name, n in many.items()]
        yield done


def networks(student: nn.Module) -> list[nn.Module]:
    """Those that a student evaluates: without fields around them and what makes a velocity of several, without
    DistributedDataParallel's and the like, but with the compiler's."""
    if _is_compiled(student):
        return [student]
    if (inner := unwrapped(student, 1, IN_PLACE)) is not student:
        return networks(inner)
    if isinstance(student, VelocityField):
        return networks(student.net) if isinstance(student.net, nn.Module) else []
    if isinstance(student, Composite):
        return [network for part in student.parts() for network in networks(part)]
    return [student]


def repeated_blocks(network: nn.Module) -> list[nn.Module]:
    """The outermost entries of lists of modules that have modules of their own, of a class of which a list has two or
    more, and that are called themselves."""
    found: list[nn.Module] = []

    def look(part: nn.Module) -> None:
        entries = [*part.children()] if isinstance(part, (nn.ModuleList, nn.Sequential)) else []
        kinds = [type(entry) for entry in entries]
        for child in part.children():
            is_list = isinstance(child, (nn.ModuleList, nn.ModuleDict, nn.Sequential))
            is_called = type(child).forward is not nn.Module.forward
            many = kinds.count(type(child)) > 1 and next(child.children(), None) is not None
            if many and is_called and not is_list:
                found.append(child)
            else:
                look(child)

    if not _is_compiled(network):
        look(network)
    return found


def _outermost(network: nn.Module, wanted) -> list[nn.Module]:
    if wanted(network):
        return [network]
    return [] if _is_compiled(network) else [part for child in network.children() for part in _outermost(child, wanted)]


def _is_compiled(network: nn.Module) -> bool:
    return unwrapped(network, 1, {COMPILED: COMPILED_MODULE}) is not network


def _has_switch(part: nn.Module) -> bool:
    return not _is_compiled(part) and any(callable(getattr(part, on, None)) for on, _, _ in SWITCHES)


def _switch(part: nn.Module, stack: contextlib.ExitStack) -> bool:
    """Turn a model's own switch on, to be turned back with the stack; whether it has one that works."""
    on, off, is_on = next(names for names in SWITCHES if callable(getattr(part, names[0], None)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of a newer name
        if getattr(part, is_on, False) is True:
            return True
    before = [(m, {k: vars(m)[k] for k in SWITCHED if k in vars(m)}) for m in part.modules()]
    more = dict(gradient_checkpointing_kwargs=dict(use_reentrant=False)) if on == SWITCHES[1][0] else {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of a newer name
            getattr(part, on)(**more)
    except ValueError:  # that it supports none
        return False

    def back() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            getattr(part, off)()
        for module, values in before:
            for key in SWITCHED:
                if key in values:
                    vars(module)[key] = values[key]
                else:
                    vars(module).pop(key, None)

    stack.callback(back)
    return True


@contextlib.contextmanager
def _without_activations(module: nn.Module) -> Iterator[None]:
    expected = "a network that is not compiled in place (torch.compile(net) in place of net.compile())"
    expect(vars(module).get(COMPILED_CALL) is None, ARGUMENT, expected, describe(module))
    own = vars(module).get("forward")
    vars(module)["forward"] = _Recomputed(module, module.forward)
    try:
        yield
    finally:
        if own is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = own


class _Recomputed:
    """The forward of a module, of which the arguments are kept alone: `torch.utils.checkpoint`, which looks at whether
    they are what they were, with the values that buffers had: a batch norm's change."""

    def __init__(self, module: nn.Module, forward: Any):
        self.module, self.forward = module, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or is_transformed():
            return self.forward(*args, **kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        buffers = [
            (part, name, buffer, buffer._version, buffer.clone())
            for part in self.module.modules()
            for name, buffer in part._buffers.items()
            if isinstance(buffer, Tensor) and not buffer.is_inference()
        ]
        changed: list[tuple[nn.Module, str, Tensor]] = []

        def run(*leaves: Any) -> Any:
            args, kwargs = tree_unflatten(leaves, spec)
            return self.forward(*args, **kwargs)

        @contextlib.contextmanager
        def again() -> Iterator[None]:
            now = [(part, name, part._buffers[name]) for part, name, _ in changed]
            for part, name, before in changed:
                part._buffers[name] = before.clone()
            try:
                yield
            finally:
                for part, name, buffer in now:
                    part._buffers[name] = buffer

        found = checkpoint(run, *leaves, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), again()))
        for part, name, buffer, version, before in buffers:
            # a kernel of batch norms does not count what it writes
            is_same = part._buffers[name] is buffer and buffer._version == version
            if not is_same or getattr(part, "running_mean", None) is not None:
                changed.append((part, name, before))
        return found
