"""Batches in parts, activations computed again, autocast and torch's schedulers of the learning rate: what `straighten`
learns is what it learns without them."""

import contextlib
import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
from _flows import even_grid, normal
from _pairs import pairs
from _transformers import field_of
from test_straighten import QUIET, Stopped, same_result, schedule_on, small_net, stop_after, trained
from test_straighten_memory import Memory
from torch import nn
from torch.optim import lr_scheduler as torchs

import flowkernels as fk
from flowkernels.models.networks import DiT, ResidualMLP, UNet
from flowkernels.training import objective as objective_module
from flowkernels.training.bank import batch as batch_module
from flowkernels.training.run.average import Average
from flowkernels.training.run.loop import losses
from flowkernels.training.run.team import Team
from flowkernels.training.students.recomputed import SWITCHES, networks, recomputed, repeated_blocks
from flowkernels.training.targets import base
from flowkernels.training.targets.table import TARGETS

B, D, N = 10, 6, 7  # examples of a batch, features, trajectories


class Block(nn.Module):
    """With what a second forward could do otherwise: dropout, batch statistics."""

    def __init__(self, width, dropout, norm):
        super().__init__()
        self.first, self.last = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.drop, self.norm = nn.Dropout(dropout), nn.BatchNorm1d(width) if norm else nn.Identity()

    def forward(self, h, shift=None):
        return h + self.drop(self.last(torch.tanh(self.first(self.norm(h) + shift))))


class Deep(nn.Module):
    def __init__(self, blocks=3, width=8, dropout=0.0, norm=False, features=D, alone=False):
        super().__init__()
        self.read, self.more = nn.Linear(features, width), nn.Linear(features, width)
        self.time, self.label = nn.Linear(2, width), nn.Embedding(3, width)
        made = [Block(width, dropout, norm) for _ in range(blocks)]
        self.blocks = nn.ModuleList(made) if not alone else None
        self.only = made[0] if alone else None
        self.write = nn.Linear(width, features)

    def forward(self, x, t, s=None, v0=None, y=None):
        times = torch.stack([t, t if s is None else s], 1).to(self.read.weight.dtype)
        h = self.read(x) + (0 if v0 is None else self.more(v0)) + (0 if y is None else self.label(y))
        for block in self.blocks or [self.only]:
            h = block(h, shift=self.time(times))
        return self.write(h)


STUDENTS = {
    "acceleration": lambda make: fk.Acceleration(make(), make(), v0_name="v0"),
    "average_velocity": lambda make: fk.AverageVelocity(make(), second_name="s"),
    "blockwise": lambda make: fk.Blockwise([make(), make(), make()], fk.Schedule([0, 0.3, 0.6, 1])),
    "noise": lambda make: fk.NoisePrediction(make()),
}
PLANS = {"solver": fk.Solver.adams_bashforth([0, 0.3, 0.6, 1]), "endpoint": fk.Solver.adams_bashforth([0, 0.3, 0.6, 1])}
OWN = dict(loss=lambda v, target: (v - target).abs().flatten(1).mean(1))
LOSSES = {"l2": dict(loss="l2"), "cauchy": dict(loss="cauchy"), "own": OWN}
CASES = {name: {} for name in TARGETS} | {"average_velocity, derivative": dict(consistency="derivative")}


def student_of(target, seed=0, **settings):
    torch.manual_seed(seed)
    return STUDENTS.get(target, lambda make: fk.VelocityField(make()))(lambda: Deep(**settings)).double()


def problem(case, student, kind="whole", conditioned=False, dtype=torch.float64, **settings):
    """A loss and a batch for it."""
    target = case.split(",")[0]
    plan = PLANS.get(
        target, schedule_on(even_grid(6), 0, 2, 4, 6) if target != "blockwise" else fk.Schedule([0, 0.3, 0.6, 1])
    )
    found = fk.StraightenLoss(
        plan, target=target, teacher=lambda x, t, y=None: -x + t[:, None], **CASES[case], **settings
    )
    states = normal(len(found.times), N, D, seed=1, dtype=dtype)
    interval, sample = torch.arange(B) * 7 % (len(found.times) - 1), torch.arange(B) * 5 % N
    more = dict(weight=normal(B, seed=2, dtype=dtype).abs())
    if found.needs_roll_out:
        found.roll_out(student, states)
        return found, fk.BankBatch(states, interval, sample, **more)
    if conditioned:
        more["conditioning"] = dict(y=torch.arange(B) % 3)
    if kind == "ends":
        states = torch.stack([states[interval, sample], states[interval + 1, sample]])
        more |= dict(ends=True, size=N)
    return found, fk.BankBatch(states, interval, sample, **more)


def gradients(student, objective, batch, parts=1, seed=5):
    """And the generator's state behind it, and the number of times that examples were counted."""
    counted, generator = [], torch.Generator().manual_seed(seed)
    state = SimpleNamespace(iteration=1, generator=generator, count=lambda i, each: counted.append(len(i)))
    state.team = Team(None, student, objective, len(batch.interval))
    student.zero_grad()
    total = 0
    for loss in losses(state, SimpleNamespace(objective=objective, iterations=10, accumulate=parts), batch):
        loss.backward()
        total += loss.item()
    found = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    return total, found, generator.get_state(), sum(counted)


def apart(found, expected):
    """The relative distance of gradients."""
    assert found.keys() == expected.keys()
    scale = max(g.abs().max() for g in expected.values())
    return max((found[k] - expected[k]).abs().max() / scale for k in found).item()


# ---- in parts ----


@pytest.mark.parametrize(
    ("case", "kind", "loss", "weighting", "far", "parts"),
    pairs(CASES, ["whole", "ends"], LOSSES, [None, "per_sample_normalised", "adaptive"], [False, True], [2, 3, 4, 12]),
)
def test_parts_are_the_batch(monkeypatch, case, kind, loss, weighting, far, parts):
    """far: draws as on a GPU, by a generator there of a seed that the run's draws."""
    if far:

        def on_device(device, generator):
            seed = torch.randint(2**63 - 1, (), generator=generator).item()
            return torch.Generator().manual_seed(seed)

        for module in (batch_module, base, objective_module):
            monkeypatch.setattr(module, "generator_on", on_device)
    student = student_of(case.split(",")[0])
    row = TARGETS[case.split(",")[0]]
    own_u = {} if row.only else dict(t_sampling=lambda n, g: torch.rand(n, generator=g) ** 2)
    conditioned = case.split(",")[0] not in ("velocity_matching", "average_velocity")
    found, batch = problem(case, student, kind, conditioned, weighting=weighting, **LOSSES[loss], **own_u)
    whole = gradients(student, found, batch)
    divided = gradients(student, found, batch, parts)
    assert divided[0] == pytest.approx(whole[0], rel=1e-12)
    assert apart(divided[1], whole[1]) < 1e-12
    assert torch.equal(divided[2], whole[2])
    assert whole[3] == divided[3] == B


class Sending(nn.Module):
    """As DistributedDataParallel: told when not to send, forward and backward."""

    def __init__(self, net):
        super().__init__()
        self.net, self.quiet, self.seen = net, False, []

    @contextlib.contextmanager
    def no_sync(self):
        self.quiet = True
        yield
        self.quiet = False

    def forward(self, x, t):
        v = self.net(x, t)
        self.seen.append(("forward", self.quiet))
        v.register_hook(lambda _: self.seen.append(("backward", self.quiet)))
        return v


@pytest.mark.parametrize("field", [False, True])
def test_gradients_are_sent_with_the_last_part_alone(field):
    net = Sending(small_net(1))
    student = fk.VelocityField(net) if field else net
    fk.straighten(student, lambda x, t: -x, fk.Schedule.uniform(2), noise=(4,), bank=8, batch=6, accumulate=3, grid=4,
                  iterations=2, ema=None, **QUIET)  # fmt: skip
    one = [(what, quiet) for quiet in (True, True, False) for what in ("forward", "backward")]
    assert net.seen == one * 2


# ---- activations ----


KINDS = {
    "blocks": dict(),
    "dropout": dict(dropout=0.3),
    "batch norm": dict(norm=True),
    "one network": dict(alone=True, norm=True, dropout=0.3),
}


@pytest.mark.parametrize(("case", "kind", "parts"), pairs([c for c in CASES if "derivative" not in c], KINDS, [1, 2]))
def test_activations_computed_again_give_the_same_gradients(case, kind, parts):
    """And the same random states, and the same statistics."""
    results = []
    for wanted in (False, True):
        student = student_of(case, **KINDS[kind])
        found, batch = problem(case, student)
        torch.manual_seed(11)
        before = [vars(part).copy() for part in student.modules()]
        with recomputed(student, wanted) as names:
            results.append(gradients(student, found, batch, parts))
        count = 1 if kind == "one network" else 3
        assert len(names) == (len(networks(student)) if wanted else 0)
        assert all(name == ("Deep" if count == 1 else "3 Block") for name in names)
        assert [vars(part).keys() for part in student.modules()] == [values.keys() for values in before]
        results[-1] += (torch.get_rng_state(), student.state_dict())
    whole, again = results
    assert again[0] == pytest.approx(whole[0], rel=1e-12)
    assert apart(again[1], whole[1]) < 1e-12
    assert torch.equal(again[4], whole[4])
    for name, value in whole[5].items():
        assert torch.equal(again[5][name], value)


@pytest.mark.parametrize(
    ("target", "make", "most"),
    [
        ("boss", lambda: DiT(size=8, width=32, blocks=12), 0.5),
        ("endpoint", lambda: DiT(size=8, width=32, blocks=12), 0.4),
        ("endpoint", lambda: UNet(widths=(8, 8, 8)), 0.6),
    ],
)
def test_activations_take_less_memory(target, make, most):
    """Of a network without blocks where it is evaluated several times, three times here."""
    used, plan = [], fk.Solver.euler([0, 0.3, 0.6, 1]) if target == "endpoint" else fk.Schedule.uniform(3)
    objective = fk.StraightenLoss(plan, target=target)
    states, sample = normal(len(objective.times), 8, 1, 8, 8), torch.arange(8)
    for wanted in (False, True):
        net = make()
        with recomputed(net, wanted), Memory() as memory:
            for p in net.parameters():
                p.grad = torch.zeros_like(p)
            memory.most = begin = memory.now()
            objective(net, fk.BankBatch(states, sample % (len(states) - 1), sample)).loss.backward()
        used.append(memory.most - begin)
    assert used[1] < most * used[0], used


class Switched(nn.Module):
    """A model with a switch of its own, as diffusers and transformers have them; supports: whether it works."""

    def __init__(self, of, supports=True):
        super().__init__()
        self.net, self.supports, self.gradient_checkpointing, self.told = Deep(features=4), supports, False, []
        on, off = SWITCHES[of == "transformers"][:2]
        setattr(self, on, self.turn_on), setattr(self, off, self.turn_off)

    @property
    def is_gradient_checkpointing(self):
        return self.gradient_checkpointing

    def turn_on(self, **how):
        if not self.supports:
            raise ValueError("does not support gradient checkpointing")
        self.gradient_checkpointing, self._gradient_checkpointing_func = True, how
        self.told.append(how)

    def turn_off(self):
        self.gradient_checkpointing = False
        self.told.append("off")

    def forward(self, x, t):
        return self.net(x, t)


def test_a_model_of_diffusers():
    field, noise = field_of("sd3", n=4)
    student, results = field.double(), []
    states = torch.stack([noise.double(), normal(*noise.shape, seed=1, dtype=torch.float64)])
    batch = fk.BankBatch(states, torch.zeros(4, dtype=torch.int64), torch.arange(4))
    before = [vars(part).keys() for part in student.modules()]
    for wanted in (False, True):
        with recomputed(student.train(), wanted) as names:
            assert names == ["SD3Transformer2DModel, by its own switch"] * wanted
            assert student.net.is_gradient_checkpointing == wanted
            results.append(gradients(student, fk.StraightenLoss(fk.Schedule.uniform(1)), batch))
    assert apart(results[1][1], results[0][1]) < 1e-12
    assert [vars(part).keys() for part in student.modules()] == before
    assert not student.net.is_gradient_checkpointing


@pytest.mark.parametrize("of", ["diffusers", "transformers"])
@pytest.mark.parametrize("state", ["off", "on", "not supported"])
def test_a_models_own_switch(of, state):
    net = Switched(of, supports=state != "not supported")
    if state == "on":
        net.turn_on()
        net.told.clear()
    before = {k: v for k, v in vars(net).items() if k != "told"}
    with recomputed(fk.VelocityField(net)) as names:
        assert names == (["Switched, by its own switch"] if net.supports else ["3 Block"])
        assert net.gradient_checkpointing == net.supports
    how = {} if of == "diffusers" else dict(gradient_checkpointing_kwargs=dict(use_reentrant=False))
    assert net.told == ([how, "off"] if state == "off" else [])
    assert {k: v for k, v in vars(net).items() if k != "told"} == before


def test_which_networks_and_blocks():
    deep, compiled = Deep(), torch.compile(Deep(), backend="eager")
    assert networks(nn.DataParallel(deep)) == networks(fk.VelocityField(deep)) == [deep]
    assert networks(fk.VelocityField(compiled)) == [compiled]
    assert repeated_blocks(compiled) == []
    outer = nn.ModuleList(
        [nn.Sequential(Block(4, 0, True), Block(4, 0, True)), nn.Sequential(nn.Linear(2, 2), nn.SiLU())]
    )
    assert repeated_blocks(outer) == [*outer[0]]
    assert repeated_blocks(ResidualMLP(4)) == []  # its blocks are not called


class WritesOn(nn.Module):
    """To what its first block was given, after it."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(4, 0, False) for _ in range(2)])

    def forward(self, x, t):
        h = x * 1.0
        out = self.blocks[0](h, shift=0)
        h += 1
        return self.blocks[1](out, shift=0) + h


def test_what_cannot_be_computed_again():
    settings = dict(noise=(4,), bank=8, batch=4, grid=4, iterations=2, gradient_checkpointing=True, **QUIET)
    calls = []
    teacher, plan = lambda x, t: calls.append(x) or -x, fk.Schedule.uniform(2)
    with pytest.raises(ValueError, match=r"^student: expected a velocity that can be differentiated, .* inplace"):
        fk.straighten(WritesOn(), teacher, plan, **settings)
    net = small_net()
    net.compile(backend="eager")
    with pytest.raises(ValueError, match=r"^gradient_checkpointing: expected a network that is not compiled in place"):
        fk.straighten(net, teacher, plan, **settings)
    student = fk.AverageVelocity(Deep(features=4), second_name="s")
    with pytest.raises(ValueError, match=r"^gradient_checkpointing: expected False with consistency='derivative'"):
        fk.straighten(student, teacher, plan, target="average_velocity", consistency="derivative", **settings)
    assert not calls


@pytest.mark.parametrize("net", ["blocks", "compiled"])
def test_a_run_with_activations_computed_again(tmp_path, net):
    """Bit for bit that without, also resumed with it or without; the student is as it was."""

    def student():
        torch.manual_seed(2)
        deep = Deep(features=4, dropout=0.2, norm=True)
        return fk.VelocityField(torch.compile(deep, backend="eager") if net == "compiled" else deep)

    settings = dict(init="keep", iterations=6)
    whole = trained(student(), **settings)
    kept = student()
    assert same_result(whole, trained(kept, gradient_checkpointing=True, **settings))
    assert "forward" not in vars(getattr(kept.net, "_orig_mod", kept.net).blocks[0])
    path = tmp_path / "run.pt"
    trained(student(), checkpoint=path, gradient_checkpointing=True, **settings | dict(iterations=6))
    assert same_result(whole, trained(student(), checkpoint=path, **settings))


# ---- autocast ----


class Told(nn.Module):
    """What it is evaluated in."""

    def __init__(self, net):
        super().__init__()
        self.net, self.seen = net, []

    def forward(self, x, t, **given):
        v = self.net(x, t, **given)
        self.seen.append((torch.is_grad_enabled(), v.dtype))
        return v


@pytest.mark.parametrize(("target", "caller"), pairs(TARGETS, [None, torch.bfloat16, False]))
def test_autocast_is_the_students_alone(target, caller):
    """But for a caller's context, which the teacher is in too. The exact difference of velocity_matching is not."""
    student = student_of(target).float()
    for network in networks(student):
        network.forward = Told(copy.copy(network)).forward
    told = [network.forward.__self__ for network in networks(student)]
    teacher = Told(Deep())
    found, batch = problem(target, student, dtype=torch.float32)
    found._teacher = (teacher,)
    found.autocast = torch.bfloat16
    for one in told:
        one.seen.clear()
    within = (
        contextlib.nullcontext()
        if caller is None
        else torch.autocast("cpu", caller or torch.bfloat16, enabled=bool(caller))
    )
    with within:
        if found.needs_roll_out:
            found.roll_out(student, batch.states)
        loss = found(student, batch, torch.Generator(), 0.5).loss
    loss.backward()
    assert loss.dtype == torch.float32
    seen = [each for one in told for each in one.seen]
    exact = [dtype for grad, dtype in seen if dtype == torch.float32]
    assert len(exact) == (2 if target == "velocity_matching" else 0)
    assert {dtype for grad, dtype in seen if grad} == {torch.bfloat16}
    in_teacher = {dtype for _, dtype in teacher.seen}
    assert in_teacher <= {torch.bfloat16 if caller else torch.float32}
    assert bool(in_teacher) == (TARGETS[target].teacher or target == "average_velocity")
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in student.parameters())


def test_autocast_is_torchs():
    """A run with it is a caller's context around the student, whose bank is of float32."""
    teacher = small_net(0).eval()
    bank = fk.TrajectoryBank(teacher, schedule_on(even_grid(6), 0, 2, 6), noise=(4,), size=24, **QUIET).fill()
    settings = dict(bank=bank, noise=None, init="keep")
    found = trained(autocast=torch.bfloat16, **settings)
    with torch.autocast("cpu", torch.bfloat16):
        assert same_result(found, trained(**settings))
        assert same_result(found, trained(autocast=torch.bfloat16, **settings))
    plain = trained(**settings)
    assert found.history["loss"] != plain.history["loss"]
    assert found.history["loss"] == pytest.approx(plain.history["loss"], rel=0.05)
    assert all(p.dtype == torch.float32 for p in found.student.parameters())


def test_a_student_of_bfloat16_in_autocast(tmp_path):
    """Its average is of float32; resumed bit for bit, and with another autocast refused."""
    settings = dict(autocast=torch.bfloat16, init="keep", checkpoint_every=5)
    whole = trained(small_net(1).bfloat16(), **settings)
    assert whole.history["loss"][-1] < whole.history["loss"][0]
    assert all(p.dtype == torch.float32 for p in Average(small_net(1).bfloat16(), 0.9).weights.values())
    path = tmp_path / "run.pt"
    net = small_net(1).bfloat16()
    net.register_forward_pre_hook(stop_after(15))
    with pytest.raises(Stopped):
        trained(net, checkpoint=path, **settings)
    assert same_result(whole, trained(small_net(4).bfloat16(), checkpoint=path, **settings))
    with pytest.raises(ValueError, match=r"^checkpoint: expected one of this run .*got autocast = 'torch.bfloat16'"):
        trained(small_net(1).bfloat16(), checkpoint=path, **settings | dict(autocast=None))


# ---- torch's schedulers ----


SCHEDULERS = {
    "LambdaLR": lambda o: torchs.LambdaLR(o, lambda i: 1 / (1 + i)),
    "MultiplicativeLR": lambda o: torchs.MultiplicativeLR(o, lambda i: 0.9),
    "StepLR": lambda o: torchs.StepLR(o, 3),
    "MultiStepLR": lambda o: torchs.MultiStepLR(o, [2, 5, 11], gamma=0.3),
    "ConstantLR": lambda o: torchs.ConstantLR(o, total_iters=4),
    "LinearLR": lambda o: torchs.LinearLR(o, total_iters=6),
    "ExponentialLR": lambda o: torchs.ExponentialLR(o, 0.8),
    "SequentialLR": lambda o: torchs.SequentialLR(
        o, [torchs.LinearLR(o, 0.1, total_iters=4), torchs.CosineAnnealingLR(o, 9)], [4]
    ),
    "CosineAnnealingLR": lambda o: torchs.CosineAnnealingLR(o, 13),
    "ChainedScheduler": lambda o: torchs.ChainedScheduler(
        [torchs.ConstantLR(o, total_iters=3), torchs.ExponentialLR(o, 0.9)], optimizer=o
    ),
    "ReduceLROnPlateau": lambda o: torchs.ReduceLROnPlateau(o, factor=0.5, patience=0, threshold=0.5),
    "CyclicLR": lambda o: torchs.CyclicLR(o, 1e-4, 1e-2, step_size_up=3, cycle_momentum=True),
    "CosineAnnealingWarmRestarts": lambda o: torchs.CosineAnnealingWarmRestarts(o, 4),
    "OneCycleLR": lambda o: torchs.OneCycleLR(o, 1e-2, total_steps=13),
    "PolynomialLR": lambda o: torchs.PolynomialLR(o, 13, power=2),
}


def test_all_of_torchs_schedulers_are_tried():
    assert set(SCHEDULERS) == set(torchs.__all__) - {"LRScheduler"}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_torchs_schedulers(tmp_path, name):
    """The rates are those of the scheduler by itself, and a run that was stopped goes on bit for bit."""
    settings = dict(lr_scheduler=SCHEDULERS[name], warmup=100, iterations=13, log_every=2, lr=3e-3)
    whole = trained(**settings)
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=3e-3)
    scheduler, rates, rows = SCHEDULERS[name](optimizer), [], iter(whole.history["loss"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i in range(13):
            is_row = i % 2 == 0
            rates += [optimizer.param_groups[0]["lr"]] if is_row else []
            if name != "ReduceLROnPlateau":
                scheduler.step()
            elif is_row:
                scheduler.step(next(rows))
    assert whole.history["lr"] == rates
    assert len(set(rates)) > 1
    path = tmp_path / "run.pt"
    settings |= dict(checkpoint=path, checkpoint_every=3)
    net = small_net(1)
    net.register_forward_pre_hook(stop_after(9))
    with pytest.raises(Stopped):
        trained(net, **settings)
    assert same_result(whole, trained(small_net(5), torch_seed=12, **settings))
    if name != "StepLR":
        with pytest.raises(ValueError, match=r"^checkpoint: expected one of this run \(lr_scheduler = "):
            trained(small_net(5), **settings | dict(lr_scheduler=SCHEDULERS["StepLR"]))


def test_a_scheduler_is_the_schedule_of_the_settings():
    """A cosine by hand is that of `decay`, and of an optimiser of one's own its rates are kept."""
    cosine = lambda o: torchs.CosineAnnealingLR(o, 24)  # noqa: E731
    found, own = trained(lr_scheduler=cosine, warmup=100, clip=None), trained(warmup=0, clip=None)
    assert found.history["lr"] == pytest.approx(own.history["lr"], rel=1e-9, abs=1e-15)
    assert found.history["loss"] == pytest.approx(own.history["loss"], rel=1e-5)
    result = trained(
        lr_scheduler=lambda o: torchs.StepLR(o, 100), warmup=100, optimizer=lambda p: torch.optim.SGD(p, lr=0.07)
    )
    assert set(result.history["lr"]) == {0.07}


BAD_SCHEDULERS = {
    "no scheduler": (lambda o: 3, TypeError, r"^lr_scheduler: expected a function .*, got one that returns 3"),
    "of another": (
        lambda o: torchs.StepLR(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), 3),
        ValueError,
        r"^lr_scheduler: expected a function that returns a scheduler of the optimiser that it is given",
    ),
    "too short": (
        lambda o: torchs.OneCycleLR(o, 1.0, total_steps=5),
        ValueError,
        r"^lr_scheduler: expected a schedule of 24 iterations, got ValueError: .* at iteration 5",
    ),
    "no rate": (
        lambda o: torchs.LambdaLR(o, lambda i: 1.0 if i < 9 else float("nan")),
        ValueError,
        r"^lr_scheduler: expected a schedule of 24 iterations, got ValueError: a rate of nan, at iteration 9",
    ),
}


@pytest.mark.parametrize("bad", BAD_SCHEDULERS)
def test_bad_schedulers(bad):
    make, error, message = BAD_SCHEDULERS[bad]
    with pytest.raises(error, match=message):
        trained(lr_scheduler=make, warmup=100)


def test_other_bad_arguments(tmp_path):
    bad = {
        r"^warmup: expected 100 with an lr_scheduler": dict(lr_scheduler=SCHEDULERS["StepLR"]),
        r"^decay: expected 'cosine' with an lr_scheduler": dict(
            lr_scheduler=SCHEDULERS["StepLR"], warmup=100, decay="none"
        ),
        r"^autocast: expected torch.bfloat16 or None .* a scaled loss": dict(autocast=torch.float16),
        r"^autocast: expected torch.bfloat16 or None, got torch.int64": dict(autocast=torch.int64),
        r"^autocast: expected None, for a student of float64": dict(
            student=small_net().double(), autocast=torch.bfloat16
        ),
        r"^accumulate: expected at least 1, got 0": dict(accumulate=0),
        r"^gradient_checkpointing: expected True or False": dict(gradient_checkpointing=1),
    }
    for message, settings in bad.items():
        with pytest.raises((TypeError, ValueError), match=message):
            trained(**settings)
    path = tmp_path / "run.pt"
    trained(iterations=3, checkpoint=path, warmup=100)
    with pytest.raises(ValueError, match=r"^checkpoint: expected one of this run \(lr_scheduler = "):
        trained(iterations=3, checkpoint=path, lr_scheduler=SCHEDULERS["StepLR"], warmup=100)
