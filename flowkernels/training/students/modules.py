"""Modules copied, and their state dicts: under names without wrappers, checked before they are loaded."""

import contextlib
import copy
import functools
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from flowkernels._checks import describe, expect
from flowkernels.runtime.sharded import alike, class_of, reshard, whole
from flowkernels.velocity import hashes

SHARES = "_shares_weights"  # an attribute of students that do
unwrapped = functools.partial(hashes.unwrapped, of=hashes.IN_PLACE)  # what torch.compile or DDP wraps


def copied(module: nn.Module, known: Mapping[int, Any] = MappingProxyType({})) -> nn.Module:
    """A deep copy without wrappers, in it neither. What a module computed and holds, as weight_norm does, is copied
    without its graph, and tensors of inference mode become ordinary ones.

    known: by `id`, what takes the place of a copy, such as weights that are shared.
    """
    memo: dict[int, Any] = dict(known)
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


@contextlib.contextmanager
def unsynchronised(module: nn.Module, wanted: bool = True) -> Iterator[None]:
    """A context in which what has `no_sync`, as DistributedDataParallel, adds up gradients without sending them, if
    that is wanted."""
    with contextlib.ExitStack() as stack:
        for part in module.modules() if wanted else ():
            if callable(no_sync := getattr(part, "no_sync", None)):
                stack.enter_context(no_sync())
        yield


def shares_weights(module: nn.Module) -> bool:
    """Whether what is frozen in it is another module's, so that its state is what is trained alone."""
    return getattr(module, SHARES, False) is True


def plain_state(module: nn.Module) -> dict[str, Any]:
    """The state dict, under names without those of wrappers."""
    state = module.state_dict()
    if shares_weights(module):
        trained = {key for key, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}
        state = {key: value for key, value in state.items() if key in trained}
    return {plain_name(module, key): value for key, value in state.items()}


def whole_state(module: nn.Module) -> dict[str, Any]:
    """`plain_state` with sharded tensors gathered, on the CPU: on every rank, which all wait for one another."""
    return {key: whole(value) if isinstance(value, Tensor) else value for key, value in plain_state(module).items()}


def trained_by_name(module: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained of it, tied weights once, under names without those of wrappers; as optimisers have it, sharded
    where it is."""
    reshard(module)
    return {plain_name(module, name): p for name, p in module.named_parameters() if p.requires_grad}


def names_of_trained(module: nn.Module) -> list[tuple[str, str]]:
    """Names of what is trained, of tied weights all, each with the one by which `trained_by_name` has it."""
    first = {id(p): name for name, p in trained_by_name(module).items()}
    every = module.named_parameters(remove_duplicate=False)
    return [(plain_name(module, name), first[id(p)]) for name, p in every if id(p) in first]


def plain_name(module: nn.Module | None, key: str) -> str:
    parts = []
    for part in key.split("."):
        child = None if module is None else module._modules.get(part)
        if module is None or unwrapped(module) is module or child is None:
            parts.append(part)
        module = child
    return ".".join(parts)


def load_weights(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Load what `expect_weights` has found to fit."""
    state, own = without_prefix(module, state), plain_state(module)
    there = {key: (plain_name(module, key), value) for key, value in module.state_dict().items()}
    taken = {key: alike(state[name], value) for key, (name, value) in there.items() if name in own}
    module.load_state_dict(taken, strict=not shares_weights(module))


def expect_weights(module: nn.Module, state: Mapping[str, Any], name: str, exact: bool = False) -> None:
    """Raise unless the state dict has the module's names and shapes, and its dtypes, if not `exact` but for the width
    of floating-point ones."""
    expect(isinstance(state, Mapping), name, "a state dict", state)
    expect_fits(plain_state(module), without_prefix(module, state), name, exact)


def expect_fits(own: Mapping[str, Any], state: Any, name: str, exact: bool = False) -> None:
    """The same of a state dict in place of the module's."""
    expect(isinstance(state, Mapping), name, "a state dict", state)
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
        fits = have.dtype == want.dtype or (not exact and have.is_floating_point() and want.is_floating_point())
        expect(fits, name, expected, f"{key!r} of {have.dtype} for {want.dtype}")


def without_prefix(module: nn.Module, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state dict of a wrapped module as that of the module."""
    own = plain_state(module)
    for prefix in ("_orig_mod.", "module."):
        if state and not own.keys() & state.keys() and all(str(key).startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def architecture(module: nn.Module) -> str:
    """A hash of the modules' classes, torch's and those of students with their settings, and of the weights' names,
    shapes and dtypes."""
    parts = []
    for name, part in module.named_modules():
        if unwrapped(part) is part:
            kind = hashes.class_name(class_of(part))
            known = kind.startswith(("torch.nn.", "flowkernels.training."))
            parts.append(f"{plain_name(module, name)} {kind} {part.extra_repr() if known else ''}")
    weights = {k: [str(v.dtype), *v.shape] for k, v in plain_state(module).items() if isinstance(v, Tensor)}
    return hashes.tensors_hash({"modules": parts, "weights": weights})[:16]
