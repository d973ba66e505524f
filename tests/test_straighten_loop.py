"""The loop of `straighten`: what it waits for, what it keeps, and where it stops."""

import contextlib
import copy
import functools
import itertools
import math
import re
import sys

import pytest
import torch
from _far_device import FAR, FarGenerator, Waits, far_module
from _flows import even_grid
from _pairs import beside, pairs
from test_straighten import ENDPOINT, RUN, SOLVER, STUDENT_OF, VARIANTS, same_result, schedule_on, small_net, trained
from torch import nn
from torch.utils._pytree import tree_leaves

import flowkernels as fk
from flowkernels import _checks
from flowkernels.training.bank import trajectory_bank as bank
from flowkernels.training.run import descent
from flowkernels.training.run.descent import Descent
from flowkernels.training.run.state import State
from flowkernels.training.students import student as students
from flowkernels.training.targets.table import TARGETS


@pytest.fixture
def queue_of(monkeypatch):
    """Whether values are read only where they have to be, as those of a GPU are."""

    @contextlib.contextmanager
    def waits(there: bool):
        with monkeypatch.context() as patch:
            patch.setattr(descent, "has_queue", lambda device: there)
            yield

    return waits


# ---- what it waits for ----


class Lion(torch.optim.Optimizer):
    """An optimiser of one's own."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, dict(lr=lr))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    m = self.state[p].setdefault("m", torch.zeros_like(p))
                    p.add_(m.lerp(p.grad, 0.1).sign(), alpha=-group["lr"])
                    m.lerp_(p.grad, 0.01)


OPTIMIZERS = {
    "fused Adam": functools.partial(torch.optim.Adam, fused=True),
    "fused AdamW": functools.partial(torch.optim.AdamW, fused=True, amsgrad=True),
    "fused SGD": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, fused=True),
    "fused Adagrad": functools.partial(torch.optim.Adagrad, fused=True),
    "Adam of a tensor": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.1), foreach=False),
    "momentum": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "own": Lion,
}
LOSSES = ["l2", "huber", "huber_per_element", "cauchy", "own"]
OF_TARGET = {
    "reflow": dict(t_sampling="u_shaped", weighting="per_sample_normalised"),
    "on_policy": dict(rollout_every=2),
    "solver": SOLVER,
    "endpoint": ENDPOINT,
}
CASES = {name: dict(target=name) | OF_TARGET.get(name, {}) for name in TARGETS} | {
    "boss, uniform": dict(t_sampling="uniform"),
    "boss, weighted": dict(weighting=[1.0, 2.0]),
    "reflow, own": dict(target="reflow", t_sampling=lambda n, g: torch.rand(n, generator=g, device=FAR)),
    "noise, by the noise": dict(target="noise", compared="noise"),
}  # average_velocity's other form is left out: torch.func's derivatives do not take such tensors


@pytest.fixture
def far(monkeypatch):
    """`straighten` on a device far away: (iteration, call, wait) of all that the host waits for after the first row."""
    module, waits, found = sys.modules["torch.optim.optimizer"], Waits(), []
    supported, log = module._get_fused_kernels_supported_devices, State.log

    def logged(state, **row):
        waits.during(log)(state, **row)
        found.append((row["iteration"], list(waits.found)))
        waits.found.clear()

    monkeypatch.setattr(module, "_get_fused_kernels_supported_devices", lambda: [*supported(), "meta"])
    monkeypatch.setattr(torch, "Generator", FarGenerator)
    in_autocast = torch.is_autocast_enabled
    monkeypatch.setattr(
        torch, "is_autocast_enabled", lambda kind=None: kind != FAR.type and in_autocast(kind or "cuda")
    )
    monkeypatch.setattr(students, "_trainable", lambda student: student)  # which refuses what has no values
    expect = _checks.expect
    for file in (_checks, bank):  # as do these
        monkeypatch.setattr(
            file, "expect", lambda ok, name, what, *got: expect(ok or " data" in what, name, what, *got)
        )
    monkeypatch.setattr(Descent, "read", waits.during(Descent.read))
    monkeypatch.setattr(State, "roll_out", waits.during(State.roll_out))
    monkeypatch.setattr(State, "log", logged)

    def run(student, **settings):
        settings = RUN | dict(schedule=schedule_on(even_grid(6), 0, 2, 6)) | settings
        with waits:
            fk.straighten(far_module(student), lambda x, t: -x, **settings)
        return found

    return run


STUDENTS = STUDENT_OF | {"average_velocity": fk.AverageVelocity.of_network}
OWN_LOSS = dict(own=lambda v, target: (v - target).abs().flatten(1).mean(1))


@pytest.mark.parametrize(
    ("case", "loss", "optimizer", "clip", "ema"),
    beside(pairs(CASES, LOSSES), pairs(OPTIMIZERS, [None, 0.5], [None, 0.9])),
)
def test_nothing_waits_but_for_the_history(far, case, loss, optimizer, clip, ema):
    """After the first iteration, which copies what a loss needs, but for the student's own samples, and
    but for what decides which network has an example of a `Blockwise`: once a batch."""
    settings = dict(loss=OWN_LOSS.get(loss, loss), optimizer=OPTIMIZERS[optimizer], clip=clip, ema=ema)
    settings = settings | CASES[case]
    student = STUDENTS.get(CASES[case].get("target"), lambda net: net)(small_net(1))
    rows = far(student, **settings, iterations=6, log_every=3, lr=1e-4)
    assert [it for it, _ in rows] == [0, 3, 5]
    for (before, _), (it, waits) in itertools.pairwise(rows):
        calls = [call for call, _ in waits if call != "roll_out"]
        others = ["None"] * (it - before) if case == "blockwise" else []  # how many examples each network has
        assert sorted(map(str, calls)) == [*others, "log", "read", "read"], waits


@pytest.mark.parametrize("variant", [*VARIANTS, *OPTIMIZERS])
def test_a_queue_changes_nothing(queue_of, variant):
    settings = VARIANTS.get(variant) or dict(optimizer=OPTIMIZERS.get(variant), clip=0.05)
    student = STUDENT_OF.get(variant, lambda net: net)
    with queue_of(False):
        expected = trained(student(small_net(1)), **settings)
    with queue_of(True):
        assert same_result(trained(student(small_net(1)), **settings), expected)


# ---- where it stops ----


class FailingOnce(nn.Module):
    """A network whose velocities, or whose gradients, are not finite in one call of training; it keeps its weights of
    before each."""

    def __init__(self, bad=None, value=math.nan, in_gradient=False):
        super().__init__()
        self.net, self.bad, self.value, self.in_gradient, self.before = small_net(1), bad, value, in_gradient, []

    def forward(self, x, t):
        v = self.net(x, t)
        if self.training:
            if len(self.before) == self.bad and self.in_gradient:
                v.register_hook(lambda gradient: gradient * self.value)
            elif len(self.before) == self.bad:
                v = v * self.value
            self.before.append([p.detach().clone() for p in self.net.parameters()])
        return v


@pytest.mark.parametrize(
    ("optimizer", "bad", "value", "in_gradient", "log_every", "waits"),
    pairs(OPTIMIZERS, [0, 1, 8, 11], [math.nan, math.inf], [False, True], [1, 5, 100], [True, False]),
)
def test_the_first_bad_iteration_is_found_again(
    tmp_path, queue_of, optimizer, bad, value, in_gradient, log_every, waits
):
    """It is named, with what it found; the weights are those before its step, and so is what optimisers with a switch
    keep; no checkpoint is of a later one."""
    path, kept = tmp_path / "run.pt", []

    def run(student, **settings):
        def make(parameters):
            kept.append(OPTIMIZERS[optimizer](parameters))
            whole = kept[-1].step

            def step(*args):
                whole(*args)
                kept.append(copy.deepcopy(kept[0].state_dict()["state"]))

            kept[-1].step = step
            return kept[-1]

        kept.clear()
        settings = dict(init="keep", iterations=12, log_every=log_every, checkpoint_every=4) | settings
        trained(student, optimizer=make, **settings)

    whole, student = FailingOnce(), FailingOnce(bad, value, in_gradient)
    run(whole)
    states = kept[1:]
    with queue_of(waits), pytest.raises(ValueError, match=r"^student: expected a finite loss and grad") as error:
        run(student, checkpoint=path)
    text = str(error.value)
    assert text.endswith(f" at iteration {bad}")
    assert bool(re.search(r"loss (nan|inf)", text)) != in_gradient
    assert re.search(r"norm (nan|inf)", text)
    assert all(torch.equal(p, q) for p, q in zip(student.net.parameters(), whole.before[bad], strict=True))
    if optimizer.startswith("fused") and bad:
        there = zip(tree_leaves(kept[-1]), tree_leaves(states[bad - 1]), strict=True)
        assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in there)
    last = bad // 4 * 4
    assert path.exists() == (last > 0)
    assert not last or torch.load(path, weights_only=True)["iteration"] == last
