"""Students of all kinds of weights: they train, are averaged, kept, resumed and come back as the bare network does."""

import contextlib
import copy
import math
import threading

import pytest
import torch
from test_straighten import Stopped, compiled_in_place, old, stop_after
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import flowkernels as fk
from flowkernels._files import SUM
from flowkernels.runtime.sharded import local
from flowkernels.training.run.average import Average
from flowkernels.training.run.checkpoint import read_checkpoint, write_checkpoint
from flowkernels.training.run.descent import norm_of
from flowkernels.training.students.student import initialise
from flowkernels.training.students.unchanged import unchanged

RUN = dict(noise=(4,), iterations=9, bank=16, batch=8, grid=6, warmup=0, lr=0.01, log_every=1, progress=False)
SCHEDULE = fk.Schedule([0, 1 / 3, 1])


class Net(nn.Module):
    def __init__(self, seed, norm=lambda layer: layer):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.middle, self.last = norm(nn.Linear(5, 16)), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x, t):
        h = self.first(torch.cat([x, t[:, None].to(x.dtype)], 1))
        return self.last(self.middle(torch.tanh(h)).tanh())


class Tied(Net):
    """One weight under two names."""

    def __init__(self, seed):
        super().__init__(seed)
        self.again = nn.Linear(16, 16)
        self.again.weight = self.middle.weight

    def forward(self, x, t):
        h = self.first(torch.cat([x, t[:, None]], 1))
        return self.last(self.again(self.middle(torch.tanh(h)).tanh()).tanh())


class Normed(Net):
    """With numbers that training changes and that are no weights."""

    def __init__(self, seed):
        super().__init__(seed)
        self.norm, self.calls, self.seen = nn.BatchNorm1d(16), 0, []

    def forward(self, x, t):
        self.calls += 1
        self.seen.append(len(x))
        h = self.norm(self.first(torch.cat([x, t[:, None]], 1)))
        return self.last(self.middle(torch.tanh(h)).tanh())


class Functional(Net):
    """Whose last layer's weights are handed to a function."""

    def forward(self, x, t):
        h = self.middle(torch.tanh(self.first(torch.cat([x, t[:, None]], 1)))).tanh()
        return torch.func.functional_call(self.last, dict(self.last.named_parameters()), (h,))


class Extra(Net):
    """With state that is no tensor, which training changes."""

    def __init__(self, seed):
        super().__init__(seed)
        self.state = {"calls": 0, "kept": torch.arange(3)}

    def forward(self, x, t):
        self.state = self.state | {"calls": self.state["calls"] + self.training}
        return super().forward(x, t)

    def get_extra_state(self):
        return self.state

    def set_extra_state(self, state):
        self.state = state


class Locked(Net):
    """That cannot be copied."""

    def __init__(self, seed):
        super().__init__(seed)
        self.lock = threading.Lock()


def frozen(net):
    net.first.requires_grad_(False)
    return net


def sharded(net, *parts):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in (*(getattr(net, name) for name in parts), net):
        fully_shard(part, mesh=mesh)
    return net


def with_middle(net, wrap):
    net.middle = wrap(net.middle)
    return net


def compiled(net):
    return torch.compile(net, backend="eager")


def field(seed):
    return fk.VelocityField(Net(seed))


def low(net):
    return fk.VelocityField(net.bfloat16(), dtype=torch.bfloat16)


KINDS = {  # each with the bare one
    "compiled": (lambda seed: compiled(Net(seed)), Net),
    "compiled in place": (lambda seed: compiled_in_place(Net(seed)), Net),
    "DDP": (lambda seed: DistributedDataParallel(Net(seed)), Net),
    "DDP of compiled": (lambda seed: DistributedDataParallel(compiled(Net(seed))), Net),
    "DDP, its middle": (lambda seed: with_middle(Net(seed), DistributedDataParallel), Net),
    "DDP in a field": (lambda seed: fk.VelocityField(DistributedDataParallel(Net(seed))), field),
    "DDP of BatchNorm": (lambda seed: DistributedDataParallel(Normed(seed)), Normed),
    "FSDP2": (lambda seed: sharded(Net(seed), "first", "middle"), Net),
    "FSDP2, its middle": (lambda seed: with_middle(Net(seed), sharded), Net),
    "FSDP2 in a field": (lambda seed: fk.VelocityField(sharded(Net(seed), "first")), field),
    "FSDP2, compiled": (lambda seed: compiled(sharded(Net(seed))), Net),
    "FSDP2, tied": (lambda seed: sharded(Tied(seed)), Tied),
    "FSDP2, frozen": (lambda seed: sharded(frozen(Net(seed)), "first", "middle"), lambda seed: frozen(Net(seed))),
    "FSDP2, bfloat16": (lambda seed: low(sharded(Net(seed))), lambda seed: low(Net(seed))),
    "tied": (Tied, Tied),
    "BatchNorm": (Normed, Normed),
    "functional": (Functional, Net),
    "extra state": (Extra, Net),
    "a lock": (Locked, Net),
    "weight_norm": (lambda seed: Net(seed, nn.utils.parametrizations.weight_norm),) * 2,
    "weight_norm, old": (lambda seed: Net(seed, old(nn.utils.weight_norm)),) * 2,
}
ALONE = ("functional", "extra state", "a lock", "FSDP2, its middle")  # whose checkpoints are no others'
IN_PLACE = ("FSDP2", "a lock")  # what comes back is the student itself


@pytest.fixture(scope="module", autouse=True)
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def run(student, **settings):
    settings = RUN | dict(init="keep") | settings
    return fk.straighten(student, Net(0).eval(), SCHEDULE, **settings)


def answers(result):
    with torch.no_grad():
        x, t = torch.linspace(-2, 2, 24).view(6, 4), torch.linspace(0, 1, 6)
        return result.student(x, t).float()


def test_a_wrapper_that_waits_for_gradients_that_do_not_come_is_refused():
    student = Net(1)
    student.unused = nn.Linear(2, 2)
    with pytest.raises(
        ValueError, match=r"student: expected one whose parameters all .*none for unused\.weight, unused\."
    ):
        run(DistributedDataParallel(student), ema=None)
    run(DistributedDataParallel(student, find_unused_parameters=True), ema=None)


@pytest.mark.parametrize("ema", [None, 0.9])
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_students(kind, ema, tmp_path):
    make, bare = KINDS[kind]
    team = dict(group=dist.group.WORLD) if kind.startswith(("DDP", "FSDP2")) else {}  # which it brings
    path, expected = tmp_path / "run.pt", run(bare(1), ema=ema, **team)
    student = make(1)
    whole = run(student, ema=ema)
    exact = not kind.startswith("FSDP2")  # of which the norm of the gradient is rounded otherwise
    close = dict(rtol=0, atol=0) if exact else dict(rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(answers(whole), answers(expected), **close)
    assert whole.history["loss"] == pytest.approx(expected.history["loss"], rel=0 if exact else 1e-5)

    in_place = ema is None or kind.startswith(IN_PLACE)
    assert (whole.student is student) == in_place
    assert in_place or "torch" not in f"{type(whole.student)} {type(getattr(whole.student, 'net', None))}"
    assert not whole.student.training

    # one that is interrupted and goes on, in the same kind and in the bare one
    settings = dict(ema=ema, checkpoint=path, checkpoint_every=3)
    stopped = make(1)
    stopped.register_forward_pre_hook(stop_after(6))
    with pytest.raises(Stopped):
        run(stopped, **settings)
    saved = None if team else path.read_bytes()
    resumed = run(make(5), **settings)
    assert resumed.history == whole.history
    assert torch.equal(answers(resumed), answers(whole))
    if team:
        return  # tests/test_straighten_many.py
    names = torch.load(path, weights_only=True)["student"].keys()
    assert names - {"_extra_state"} == bare(1).state_dict().keys()
    if kind not in ALONE:
        path.write_bytes(saved)
        torch.testing.assert_close(answers(run(bare(5), **settings)), answers(expected), **close)


NORMED = nn.utils.parametrizations.weight_norm
STARTS = {  # a student, and a teacher whose weights have other names
    "weight_norm of plain": (lambda seed: Net(seed, NORMED), Net),
    "plain of weight_norm": (Net, lambda seed: Net(seed, NORMED)),
    "old weight_norm of plain": (lambda seed: Net(seed, old(nn.utils.weight_norm)), Net),
    "plain of old weight_norm": (Net, lambda seed: Net(seed, old(nn.utils.weight_norm))),
    "weight_norm of an old one": (lambda seed: Net(seed, NORMED), lambda seed: Net(seed, old(nn.utils.weight_norm))),
    "weight_norm, compiled in DDP": (lambda seed: DistributedDataParallel(compiled(Net(seed, NORMED))), Net),
    "extra state": (Extra, Net),
    "of extra state": (Net, Extra),
    "FSDP2": (lambda seed: sharded(Net(seed), "first"), Net),
    "of FSDP2": (Net, lambda seed: sharded(Net(seed), "first")),
    "FSDP2 of FSDP2": (lambda seed: sharded(Net(seed)), lambda seed: sharded(Net(seed), "first")),
}


@pytest.mark.parametrize("kind", STARTS)
def test_what_starts_from_its_teacher_answers_as_it(kind):
    """Also under other names; the teacher stays as it is."""
    make, of = STARTS[kind]
    student, teacher = make(1), of(2)
    before = {key: copy.deepcopy(value) for key, value in teacher.state_dict().items()}
    initialise(student, teacher, None)
    x, t = torch.linspace(-2, 2, 24).view(6, 4), torch.linspace(0, 1, 6)
    torch.testing.assert_close(student(x, t), of(2)(x, t), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(make(1)(x, t), student(x, t), atol=1e-2)
    assert all(repr(value) == repr(before[key]) for key, value in teacher.state_dict().items())


def test_weights_of_other_layers_do_not_start_a_student():
    teacher = Net(0, NORMED)
    teacher.middle = nn.Linear(5, 7)
    with pytest.raises(
        ValueError, match=r"^student: expected weights that fit .*'middle.bias' of shape \[7\] for \[16\]"
    ):
        initialise(Net(1), teacher, None)
    with pytest.raises(ValueError, match=r"^init: expected weights that fit .*original0"):
        initialise(Net(1, NORMED), Net(0), {"first.bias": torch.zeros(16)})


def test_wrapped_fields_and_teachers_that_cannot_be_copied_are_told():
    with pytest.raises(ValueError, match=r"^student: expected VelocityField\(.*the wrapper inside, got FSDPVelocity"):
        run(sharded(fk.VelocityField(Net(1))))
    with pytest.raises(ValueError, match=r"^student: expected a network of its own, .* FSDP does not support deepcopy"):
        fk.straighten(None, sharded(Net(1)), SCHEDULE, **RUN)


@pytest.mark.parametrize("kind", ["compiled", "DDP", "FSDP2", "FSDP2, its middle", "tied", "weight_norm"])
def test_kinds_of_students_and_teachers_in_a_loop_of_ones_own(kind):
    """The parts: a bank of a teacher of the kind, and losses and steps of a student of it."""
    make, bare = KINDS[kind]
    found = []
    for one in (make, bare):
        bank = fk.TrajectoryBank(one(3).eval(), SCHEDULE, noise=(4,), size=16, grid=6, progress=False).fill()
        student, objective = one(1), fk.StraightenLoss(SCHEDULE)
        optimizer, generator = torch.optim.SGD(student.parameters(), lr=0.1), torch.Generator().manual_seed(0)
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = objective(student, bank.sample(8, generator), generator).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        found.append(losses)
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert len(set(found[0])) == 3


@pytest.mark.parametrize("kind", ["tied", "BatchNorm", "frozen"])
def test_the_average_in_a_checkpoint(kind, tmp_path):
    """Has all that the student has, tied weights twice, and takes no room but for what is trained; one of what is
    trained alone goes on as well, and one that lacks something does not."""
    path, make = tmp_path / "run.pt", {"frozen": lambda seed: frozen(Net(seed))}.get(kind) or KINDS[kind][0]
    whole = run(make(1), ema=0.9)
    stopped = make(1)
    stopped.register_forward_pre_hook(stop_after(5))
    with pytest.raises(Stopped):
        run(stopped, ema=0.9, checkpoint=path, checkpoint_every=3)
    saved = read_checkpoint(path)
    average, trained = saved["average"], {f"module.{name}" for name in names_of(make(1))} | {"n_averaged"}
    assert average.keys() - {"n_averaged"} == {f"module.{key}" for key in saved["student"]}
    if not kind.startswith("FSDP2"):
        others = [key for key in average if key not in trained]
        assert all(average[k].data_ptr() == saved["student"][k.removeprefix("module.")].data_ptr() for k in others)
        fresh = Net(7) if kind == "frozen" else make(7)  # which may train what the run did not
        fk.load_weights(fresh, path)
        done = {key.removeprefix("module."): value for key, value in average.items()}
        assert all(torch.equal(value, done[key]) for key, value in fresh.state_dict().items())
    for kept in (average, {key: value for key, value in average.items() if key in trained}):
        write_checkpoint(path, {key: value for key, value in saved.items() if key != SUM} | {"average": kept})
        resumed = run(make(5), ema=0.9, checkpoint=path, checkpoint_every=3)
        assert resumed.history == whole.history
        assert torch.equal(answers(resumed), answers(whole))
    average = {key: value for key, value in average.items() if "last.bias" not in key}
    write_checkpoint(path, {key: value for key, value in saved.items() if key != SUM} | {"average": average})
    with pytest.raises(ValueError, match=r"^checkpoint: expected weights that fit .*'module.last.bias' of shape none"):
        run(make(5), ema=0.9, checkpoint=path, checkpoint_every=3)


def names_of(net):
    return [name for name, p in net.named_parameters(remove_duplicate=False) if p.requires_grad]


AVERAGED = {
    "plain": Net,
    "tied": Tied,
    "bfloat16": lambda seed: low(Net(seed)),
    "FSDP2": lambda seed: sharded(Net(seed), "first"),
    "FSDP2, bfloat16": lambda seed: low(sharded(Net(seed))),
}


@pytest.mark.parametrize("kind", AVERAGED)
def test_an_average_in_a_block(kind):
    """The student has it there, and after it its own weights, bit for bit, whatever happened."""
    student = AVERAGED[kind](1)
    average, parameters = Average(student, 0.9), list(student.parameters())  # without a pass, sharded
    first = [local(p).detach().clone() for p in parameters]

    def answer():
        with torch.no_grad():
            return student(torch.ones(3, 4), torch.zeros(3))

    average.update()
    with torch.no_grad():
        for p in parameters:
            local(p).add_(0.5)
    average.update()
    last, own = answer(), [local(p).detach().clone() for p in parameters]
    kept = average.state_dict()
    with contextlib.suppress(ZeroDivisionError), average.applied():
        for p, a, b in zip(parameters, first, own, strict=True):
            expected = torch.lerp(a.float(), b.float(), 1 - 2 / 11).to(p.dtype)
            assert torch.equal(local(p), expected)
        assert not torch.equal(answer(), last)
        raise ZeroDivisionError
    assert torch.equal(answer(), last)
    assert all(torch.equal(local(p), before) for p, before in zip(parameters, own, strict=True))
    assert all(torch.equal(value, kept[name]) for name, value in average.state_dict().items())


@pytest.mark.parametrize("kind", ["plain", "FSDP2"])
def test_a_pass_that_leaves_a_student_as_it_was(kind):
    """Gradients, buffers, modes, and what a module counts and keeps."""
    student = Normed(1) if kind == "plain" else sharded(Normed(1), "first")
    x, t = torch.ones(3, 4), torch.zeros(3)
    student(x, t).sum().backward()
    student.norm.eval()
    gradients = [p.grad for p in student.parameters()]
    buffers = {name: b.clone() for name, b in student.named_buffers()}
    with contextlib.suppress(ZeroDivisionError), unchanged(student):
        assert all(p.grad is None for p in student.parameters())
        student.train()
        student(2 * x, t).square().sum().backward()
        student.number = 3
        raise ZeroDivisionError
    assert all(p.grad is g for p, g in zip(student.parameters(), gradients, strict=True))
    assert all(torch.equal(b, buffers[name]) for name, b in student.named_buffers())
    assert (student.calls, student.seen, student.norm.training, student.training) == (1, [3], False, True)
    assert not hasattr(student, "number")


def test_the_norm_of_gradients_that_are_sharded_and_not():
    net = with_middle(Net(1), sharded)
    net(torch.ones(3, 4), torch.zeros(3)).sum().backward()
    gradients = [p.grad for p in net.parameters()]
    assert {isinstance(g, DTensor) for g in gradients} == {True, False}
    expected = math.sqrt(sum(local(g).double().square().sum() for g in gradients))
    assert norm_of(gradients, torch.device("cpu")).item() == pytest.approx(expected, rel=1e-6)
    assert norm_of([g for g in gradients if isinstance(g, DTensor)], torch.device("cpu")).item() < expected
