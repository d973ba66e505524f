"""What a run takes, told beforehand, beside what it took."""

import logging

import pytest
import torch
from _flows import even_grid, normal
from _pairs import pairs
from test_straighten import QUIET, schedule_on
from test_straighten_precision import PLANS, STUDENTS, Deep
from torch import nn

import flowkernels as fk
from flowkernels.training import straighten as straighten_module
from flowkernels.training.run.state import State
from flowkernels.training.students.recomputed import networks
from flowkernels.training.targets.table import TARGETS

D = 4


class Counted(nn.Module):
    """calls: (with a graph, examples) of each; a copy has a list of its own."""

    def __init__(self, net):
        super().__init__()
        self.net, self.calls = net, []

    def forward(self, x, t, **given):
        v = self.net(x, t, **given)
        self.calls.append((torch.is_grad_enabled(), len(x)))
        return v


def counted(networks, graph):
    found = [n for net in networks for with_graph, n in net.calls if with_graph == graph]
    return len(found), sum(found)


def deep():
    return Counted(Deep(features=D, blocks=1))


def student_of(target):
    torch.manual_seed(0)
    if target == "blockwise":
        return fk.Blockwise([deep() for _ in range(3)], fk.Schedule([0, 0.3, 0.6, 1]))
    return STUDENTS.get(target, lambda make: fk.VelocityField(make()))(deep)


CASES = {name: {} for name in TARGETS} | {"average_velocity, derivative": dict(consistency="derivative")}
TEACHERS = {
    "plain": dict(),
    "guided": dict(conditioning=dict(y=torch.tensor([1])), unconditional=dict(y=torch.tensor([2])), guidance=2.0),
    "guided, apart": dict(
        conditioning=dict(y=torch.tensor([1])), unconditional=dict(y=torch.tensor([2])), guidance=2.0, packed=False
    ),
}


def arguments(case):
    target = case.split(",")[0]
    plan = PLANS.get(target, schedule_on(even_grid(10), 0, 3, 6, 10))
    plan = fk.Schedule([0, 0.3, 0.6, 1]) if target == "blockwise" else plan
    return plan, dict(
        target=target, grid=None if plan is not PLANS.get(target) and target != "blockwise" else 10
    ) | CASES[case]


@pytest.mark.parametrize(
    ("case", "guidance", "accumulate", "refresh", "autocast", "watched"),
    pairs(
        CASES,
        TEACHERS,
        [1, 3],
        [{}, dict(refresh=3), dict(refresh=2, refresh_fraction=0.4)],
        [None, torch.bfloat16],
        [{}, dict(held_out=0), dict(held_out=20, evaluate_every=3), dict(held_out=14, evaluate_every=7)],
    ),
)
def test_every_call_is_counted(monkeypatch, case, guidance, accumulate, refresh, autocast, watched):
    """But for those of the trial, of a copy of the student, and of the polish. Shares of average_velocity are whole."""
    monkeypatch.setattr(straighten_module, "polish_on", lambda student, solver, *_: solver)
    plan, settings = arguments(case)
    settings |= dict(noise=(D,), bank=70, batch=12, iterations=7, rollout_every=3, ema=None, init="keep", seed=2)
    settings |= dict(accumulate=accumulate, autocast=autocast, **refresh, **watched)
    teacher, student = fk.VelocityField(deep(), **TEACHERS[guidance]).eval(), student_of(case.split(",")[0])
    cost = fk.training_cost(student, teacher, plan, **settings)
    nets = networks(student)
    assert cost.iterations == 7
    assert all(not net.calls for net in nets)
    tried = straighten_module.try_student

    def trial(*args, **kwargs):
        found = tried(*args, **kwargs)
        teacher.net.calls.clear()
        return found

    monkeypatch.setattr(straighten_module, "try_student", trial)
    fk.straighten(student, teacher, plan, **settings, **QUIET)
    found = cost.counts
    for told, graph in ((found.with_graph, True), (found.without_graph, False)):
        calls, evaluations = counted(nets, graph)
        assert told.evaluations == evaluations
        assert told.calls >= calls if case == "blockwise" else told.calls == calls
    assert found.teacher + found.bank == counted([teacher.net], False)
    assert cost.seconds > 0


def test_banks_of_ones_own():
    """Of one that is there already nothing is made, of data Heun's steps back, and pairs take nothing."""
    plan, teacher = fk.Schedule.uniform(2), fk.VelocityField(deep()).eval()
    for kind in (dict(noise=(D,)), dict(data=normal(30, D))):
        bank = fk.TrajectoryBank(teacher, plan, size=None if "data" in kind else 30, grid=8, chunk=8, **kind, **QUIET)
        settings = dict(bank=bank, batch=6, iterations=3, init="keep")
        for _ in range(2):
            teacher.net.calls.clear()
            cost = fk.training_cost(student_of("boss"), teacher, plan, **settings)
            assert cost.memory["bank"] == bank.nbytes == 3 * 30 * D * 4
            bank.fill()
            assert cost.counts.bank == counted([teacher.net], False)
        assert cost.counts.bank == (0, 0)
    given = fk.Pairs(normal(2, 20, D), weight=torch.ones(20))
    cost = fk.training_cost(
        student_of("boss"), None, fk.Schedule.uniform(1), bank=given, target="reflow", batch=6, iterations=3
    )
    assert cost.counts.bank == cost.counts.teacher == (0, 0)
    assert cost.memory["bank"] == 2 * 20 * D * 4 + 20 * 4


OPTIMIZERS = {
    "Adam": None,
    "AdamW": lambda p: torch.optim.AdamW(p, fused=False, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adafactor": torch.optim.Adafactor,
    "RMSprop": lambda p: torch.optim.RMSprop(p, momentum=0.1, centered=True),
}


@pytest.mark.parametrize(
    ("optimizer", "ema", "frozen", "dtype", "target"),
    pairs(OPTIMIZERS, [None, 0.9], [False, True], [torch.float32, torch.bfloat16], ["boss", "solver", "on_policy"]),
)
def test_bytes_are_those_of_the_tensors(monkeypatch, optimizer, ema, frozen, dtype, target):
    """frozen: all but a few weights are, as of adapters; and the student has a buffer."""
    student = student_of(target).to(dtype)
    student.net.net.register_buffer("scale", torch.ones(5))
    student.dtype = dtype
    for name, p in student.named_parameters():
        p.requires_grad_(not frozen or "write" in name)
    kept, gradients, made = [], {}, State.__init__

    def init(state, *args, **kwargs):
        made(state, *args, **kwargs)
        kept.append(state)

    monkeypatch.setattr(State, "__init__", init)
    hooks = [
        p.register_post_accumulate_grad_hook(lambda p: gradients.update({id(p): p.grad.nbytes}))
        for p in student.parameters()
        if p.requires_grad
    ]
    teacher, (plan, settings) = fk.VelocityField(deep()).eval(), arguments(target)
    settings |= dict(noise=(D,), bank=16, batch=4, iterations=1, ema=ema, init="keep", optimizer=OPTIMIZERS[optimizer])
    memory = fk.training_cost(student, teacher, plan, **settings).memory
    gradients.clear()
    fk.straighten(student, teacher, plan, **settings, **QUIET)
    for hook in hooks:
        hook.remove()
    (state,) = kept
    sizes = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)  # noqa: E731
    state_of_all = [t for each in state.optimizer.state.values() for t in each.values() if isinstance(t, torch.Tensor)]
    assert memory["optimizer"] == sizes(state_of_all)
    assert memory["gradients"] == sum(gradients.values())
    assert memory["student"] == sizes([*student.parameters(), *student.buffers()])
    assert memory["teacher"] == sizes(teacher.parameters())
    assert memory["bank"] == state.bank.bank.nbytes
    if ema is None:
        assert "average" not in memory
    else:
        assert memory["average"] == sizes(state.average.weights.values())
    rolled = state.bank._objective.rolled_out
    if rolled is not None:
        own = [rolled.states] + ([rolled.pairs] if rolled.pairs is not None else [])
        assert memory["student's own states"] == sizes(own)


def test_activations_are_those_kept():
    """Of linear layers what they were given, counted by hand; less with a batch in parts or computed again."""
    student = fk.VelocityField(nn.Sequential(nn.Linear(D + 1, 6), nn.Tanh(), nn.Linear(6, D)), time_column=True)
    settings = dict(noise=(D,), bank=16, batch=8, iterations=1, grid=4, loss=lambda v, w: (v - w).sum(1))
    cost = lambda **more: fk.training_cost(student, lambda x, t: -x, fk.Schedule.uniform(2), **settings, **more)  # noqa: E731
    for examples, more in ((8, {}), (4, dict(accumulate=2))):
        kept = cost(**more).memory["activations"] - 4 * examples * (D + 1 + 6)  # what tanh answers is given to the last
        assert 0 <= kept <= 16 * examples  # a few numbers of the loss
    assert cost(measure=False).memory["activations"] is cost(measure=False).seconds is None


def test_it_is_told_before_the_bank(caplog):
    plan, settings = arguments("boss")
    settings |= dict(noise=(D,), bank=40, batch=8, iterations=3, init="keep")
    with caplog.at_level(logging.INFO, "flowkernels"):
        fk.straighten(student_of("boss"), fk.VelocityField(deep()).eval(), plan, **settings, **QUIET)
    told = [record.getMessage() for record in caplog.records]
    assert told[0].startswith("straighten: 3 iterations, ")
    assert "400 evaluations of the teacher, 24 of the student with a gradient, about " in told[0]
    assert told[1].startswith("bank: 40 trajectories")


def test_it_prints_itself():
    plan, settings = arguments("velocity_matching")
    text = str(
        fk.training_cost(student_of("boss"), fk.VelocityField(deep()), plan, noise=(D,), iterations=1000, **settings)
    )
    for part in ("1,000 iterations", "teacher, for the bank", "optimizer", "assuming", "polish", "about"):
        assert part in text


BAD = {
    "unknown": (dict(steps=3), TypeError, r"^steps: expected an argument of straighten"),
    "iterations": (dict(iterations=None), (TypeError, ValueError), r"^iterations: expected"),
    "lora": (dict(lora=3), ValueError, r"^lora: expected None, for a training_cost"),
    "measure": (dict(measure=1), TypeError, r"^measure: expected True or False"),
    "scheduler": (dict(lr_scheduler=lambda optimizer: 3), TypeError, r"^lr_scheduler: expected a function of an optim"),
    "held_out": (
        dict(held_out=1, evaluate_every=3),
        ValueError,
        r"^held_out: expected at least 2 trajectories or pairs",
    ),
    "setting": (dict(batch=0), ValueError, r"^batch: expected at least 1, got 0"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments(bad):
    change, error, message = BAD[bad]
    settings = dict(noise=(D,), iterations=3, grid=4) | change
    with pytest.raises(error, match=message):
        fk.training_cost(None, fk.VelocityField(deep()), fk.Schedule.uniform(2), **settings)
