"""The optimiser of a run, and what determines its steps."""

import inspect
from collections.abc import Callable

import torch
from torch import nn

from flowkernels._checks import describe, expect
from flowkernels.runtime.sharded import is_sharded
from flowkernels.velocity.hashes import tensors_hash

OPTIMIZER = "a function of parameters that returns an optimiser, or None"
PLACES = ("lr", "initial_lr", "params")  # of a group of parameters: what is no setting of the optimiser


def own_optimizer(make: Callable | None, parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """The caller's optimiser of the parameters, or Adam."""
    if make is None:  # one kernel a step: 4 ms less a step for the digits network on 2 cores
        sharded = [p for p in parameters if is_sharded(p)]
        plain = [p for p in parameters if not is_sharded(p)]
        groups = [{"params": part} for part in (plain, sharded) if part]  # one kernel does not take both
        return torch.optim.Adam(groups, lr=lr, fused=parameters[0].device.type in ("cpu", "cuda"))
    opt = make(parameters)
    if not (isinstance(opt, torch.optim.Optimizer) and hasattr(opt, "param_groups")):
        expect(False, "optimizer", OPTIMIZER, f"one that returns {describe(opt)}", TypeError)
    closure = inspect.signature(opt.step).parameters.get("closure")
    expect(closure is None or closure.default is None, "optimizer", "one whose step takes no closure", opt, TypeError)
    sparse = isinstance(opt, torch.optim.SparseAdam)
    expect(not sparse, "optimizer", "one for gradients that are not sparse", opt, TypeError)
    expected = "a function that returns a torch.optim.Optimizer of the parameters that it is given"
    found = {id(p) for group in opt.param_groups for p in group["params"]}
    others = found - {id(p) for p in parameters}
    expect(len(found) > 0, "optimizer", expected, "one of no parameters")
    expect(not others, "optimizer", expected, f"one of {len(others)} other parameters")
    if has_modes(opt):
        opt.train()
    return opt


def has_modes(opt: torch.optim.Optimizer) -> bool:
    """Whether it puts other weights into the parameters to train than to evaluate, as schedule-free ones do."""
    return callable(getattr(opt, "train", None)) and callable(getattr(opt, "eval", None))


def shares_of_rate(opt: torch.optim.Optimizer) -> list[float]:
    """For each group its learning rate as it was made with, over the largest of all."""
    rates = [float(group["lr"]) for group in opt.param_groups]
    return [rate / max(rates) if max(rates) > 0 else 1.0 for rate in rates]


def counted_in_groups(opt: torch.optim.Optimizer) -> set[str]:
    """Names of what it keeps in its groups of its own, such as a number of steps: no constructor takes them."""
    taken = set(PLACES)
    for kind in type(opt).__mro__[: type(opt).__mro__.index(torch.optim.Optimizer)]:
        taken |= set(inspect.signature(kind.__init__).parameters)
    return {key for group in opt.param_groups for key in group} - taken


def optimizer_identity(opt) -> dict:
    """What determines an optimiser's steps beside the learning rate: its class, the settings of its groups, and how
    their learning rates differ."""
    groups = [{k: v for k, v in g.items() if k not in PLACES} for g in opt.state_dict()["param_groups"]]
    shares = shares_of_rate(opt)
    return {
        "kind": f"{type(opt).__module__}.{type(opt).__qualname__}",
        "groups": tensors_hash({"groups": groups})[:16],
    } | ({"rates": shares} if min(shares) < 1 else {})
