"""Students that accelerate has prepared, and with adapters of peft's: they train, are averaged, kept and resumed."""

import copy

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import flowkernels as fk

RUN = dict(noise=(4,), iterations=6, bank=16, batch=8, grid=6, warmup=0, lr=0.01, log_every=1, progress=False)
SCHEDULE = fk.Schedule([0, 1 / 3, 1])


class Net(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.middle, self.last = nn.Linear(5, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x, t):
        h = torch.tanh(self.first(torch.cat([x, t[:, None].to(x.dtype)], 1)))
        return self.last(self.middle(h).tanh())


def adapted(seed):
    net = Net(seed)
    torch.manual_seed(0)
    return get_peft_model(net, LoraConfig(r=2, target_modules=["first", "middle"], init_lora_weights=False))


def prepared(net, precision="no"):
    AcceleratorState._reset_state(True)
    return Accelerator(cpu=True, mixed_precision=precision).prepare(net)


def sharded(net):
    return fully_shard(net, mesh=init_device_mesh("cpu", (1,)))


KINDS = {  # each with what it is of
    "accelerate": (lambda seed: prepared(Net(seed)), Net),
    "accelerate in a field": (lambda seed: fk.VelocityField(prepared(Net(seed))), Net),
    "accelerate, DDP": (lambda seed: prepared(DistributedDataParallel(Net(seed))), Net),
    "accelerate, bfloat16": (lambda seed: prepared(Net(seed), "bf16"), None),
    "peft, compiled": (lambda seed: torch.compile(adapted(seed), backend="eager"), adapted),
    "peft, DDP": (lambda seed: DistributedDataParallel(adapted(seed)), adapted),
    "peft, accelerate": (lambda seed: prepared(adapted(seed)), adapted),
    "peft in a field": (lambda seed: fk.VelocityField(adapted(seed)), adapted),
    "peft, FSDP2": (lambda seed: sharded(adapted(seed)), adapted),
}


@pytest.fixture(scope="module", autouse=True)
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    AcceleratorState._reset_state(True)


class Stopped(Exception):
    pass


def stopping_at(step):
    """Adam that ends the process's work before a step."""

    class Stopping(torch.optim.Adam):
        done = 0

        def step(self, closure=None):
            self.done += not self.param_groups[0]["params"][0].is_meta
            if self.done == step:
                raise Stopped
            return super().step(closure)

    return Stopping


def adam(parameters):
    return stopping_at(-1)(parameters)


def run(student, optimizer=adam, **settings):
    return fk.straighten(student, Net(0).eval(), SCHEDULE, optimizer=optimizer, **(RUN | settings))


def answers(result):
    with torch.no_grad():
        x, t = torch.linspace(-2, 2, 24).view(6, 4), torch.linspace(0, 1, 6)
        return result.student(x, t).float()


@pytest.mark.parametrize("ema", [None, 0.9])
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_students(kind, ema, tmp_path):
    """From the teacher's weights, under names that are others where there are adapters."""
    make, bare = KINDS[kind]
    path, student = tmp_path / "run.pt", make(1)
    frozen = {name: p.detach().clone() for name, p in student.named_parameters() if not p.requires_grad}
    whole = run(student, ema=ema)
    if bare is not None:
        exact = "FSDP2" not in kind
        close = dict(rtol=0, atol=0) if exact else dict(rtol=1e-4, atol=1e-5)
        team = dict(group=dist.group.WORLD) if "DDP" in kind or "FSDP2" in kind else {}  # which such a student has
        expected = run(bare(1), ema=ema, **team)
        torch.testing.assert_close(answers(whole), answers(expected), **close)
        assert whole.history["loss"] == pytest.approx(expected.history["loss"], rel=0 if exact else 1e-4)
    assert (whole.student is student) == (ema is None or "FSDP2" in kind)
    assert not isinstance(whole.student, DistributedDataParallel) or ema is None
    for name, p in whole.student.named_parameters() if frozen and "FSDP2" not in kind else ():
        bare_name = name.partition("base_model.model.")[2].replace("base_layer.", "")
        if "lora_" not in name:  # the teacher's
            assert torch.equal(p, dict(Net(0).named_parameters())[bare_name])

    settings = dict(ema=ema, checkpoint=path, checkpoint_every=2)
    with pytest.raises(Stopped):
        run(make(1), optimizer=stopping_at(6), **settings)  # after 4, of which one is of size zero where it goes on
    assert path.is_dir() or torch.load(path, weights_only=True)["iteration"] == 4
    resumed = run(make(5) if bare is Net else make(1), **settings)
    assert resumed.history == whole.history
    assert torch.equal(answers(resumed), answers(whole))


def test_adapters_that_are_trained_leave_their_teacher(tmp_path):
    """Whose weights are copied into the student: from a state dict too."""
    teacher, state = Net(0).eval(), Net(3).state_dict()
    before = copy.deepcopy(teacher.state_dict())
    result = fk.straighten(adapted(1), teacher, SCHEDULE, init=state, **RUN)
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert torch.equal(result.student.base_model.model.last.weight, state["last.weight"])
    with result.student.disable_adapter():
        x, t = torch.ones(3, 4), torch.zeros(3)
        assert torch.equal(result.student(x, t), (lambda net: (net.load_state_dict(state), net(x, t))[1])(Net(1)))
