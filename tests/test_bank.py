"""`TrajectoryBank`: that its states are the teacher's, wherever they are kept and however they came there."""

import errno
import itertools
import json
import os
import pickle
import shutil
import signal
import time
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch
from _flows import Counted, ElementwiseField, RowField, even_grid, linear_field, normal, uneven_grid
from _pairs import pairs
from torch import nn

import flowkernels as fk
from flowkernels import _weights
from flowkernels.models.bundled import BUNDLED

F64 = torch.float64
QUIET = dict(progress=False)
PLANS = [fk.Schedule.uniform(2), fk.Schedule.uniform(3), fk.StraightenLoss(fk.Schedule.uniform(4), target="reflow")]
GRID = even_grid(12)
STORAGES = ("device", "pinned", "shared", "folder")


def bank_of(velocity=None, schedules=PLANS, storage="device", folder=None, **settings):
    velocity = linear_field() if velocity is None else velocity
    settings = dict(noise=(4,), size=22, chunk=5, grid=GRID) | QUIET | settings
    return fk.TrajectoryBank(velocity, schedules, storage=folder if storage == "folder" else storage, **settings)


def euler(velocity, x, grid):
    """{time: state} by a plain loop in float64."""
    x = x.double()
    found = {round(grid[0].item(), 9): x}
    for a, b in itertools.pairwise(grid.tolist()):
        x = x + (b - a) * velocity(x, torch.full((len(x),), a, dtype=F64))
        found[round(b, 9)] = x
    return found


def heun(velocity, x, times):
    """The same by Heun's method along times in either direction, whose last step is Euler's."""
    x = x.double()
    found = {round(times[0].item(), 9): x}
    for a, b in itertools.pairwise(times.tolist()):
        v = velocity(x, torch.full((len(x),), a, dtype=F64))
        if b != times[-1]:
            v = (v + velocity(x + (b - a) * v, torch.full((len(x),), b, dtype=F64))) / 2
        x = x + (b - a) * v
        found[round(b, 9)] = x
    return found


def at(states, plan):
    """Of by-hand states those at a schedule's knots, `[N+1, n, *shape]`."""
    return torch.stack([states[round(t, 9)] for t in plan.times.tolist()])


def noise_of(bank, noise=(4,)):
    """What a bank began with: a teacher that stands still keeps it."""
    still = bank_of(lambda x, t: torch.zeros_like(x), fk.Schedule([0, 1]), noise=noise, seed=3)
    return still.fill(bank.drawn).states()[0]


def expect_bank(bank, by_hand, tolerance):
    """All of its states, and the ends in its batches."""
    for plan in bank.schedules:
        expected = at(by_hand, plan)
        torch.testing.assert_close(bank.states(plan).double(), expected, **tolerance)
        assert torch.equal(bank.states(plan, 7), bank.states(plan)[:, :7])
        batch = bank.sample(64, torch.Generator().manual_seed(plan.steps), plan)
        assert set(batch.interval.tolist()) == set(range(plan.steps))
        places = torch.stack([batch.interval, batch.interval + 1])
        ends = batch.states if batch.ends else batch.states[places, batch.sample]
        assert torch.equal(ends, bank.states(plan)[places, batch.sample])
        assert batch.states.dtype == (F64 if bank.dtype == F64 else torch.float32)


# ---- the teacher's states ----


@pytest.mark.parametrize(
    ("storage", "dtype", "plans", "start"),
    pairs(STORAGES, (None, torch.bfloat16, F64), ("one", "several"), ("tensor", "shape", "function")),
)
def test_the_states_are_those_of_a_loop_in_float64(storage, dtype, plans, start, tmp_path):
    teacher, given = linear_field(), {}
    given["tensor"] = normal(22, 4, seed=1)
    given["shape"] = (4,)
    given["function"] = lambda n, generator: torch.rand(n, 4, generator=generator, dtype=F64).float()
    plans = PLANS if plans == "several" else PLANS[1]
    bank = bank_of(teacher, plans, storage, tmp_path / "bank", noise=given[start], dtype=dtype, seed=3)
    assert not bank.is_filled
    assert bank.fill() is bank
    assert bank.is_filled
    knots = {0, 4, 6, 8, 12} if plans is PLANS else {0, 4, 8, 12}
    assert bank.times.tolist() == GRID[sorted(knots)].tolist()
    assert bank.nbytes == 22 * len(knots) * 4 * (dtype or torch.float32).itemsize
    tolerance = dict(rtol=2**-8, atol=1e-5) if dtype is torch.bfloat16 else dict(rtol=1e-5, atol=1e-5)
    noise = noise_of(bank, given[start])
    if start != "tensor":
        assert len(noise.unique()) == noise.numel()  # no chunk begins as another
    expect_bank(bank, euler(teacher, noise, GRID), tolerance)


def test_states_of_an_uneven_grid_and_images():
    """In float64 to rounding, where the noise is; more than one axis; a grid given by the schedules."""
    grid = uneven_grid(9)
    plans = [fk.Schedule(grid[list(i)], grid, i) for i in ((0, 3, 9), (0, 1, 2, 9))]
    noise = normal(7, 2, 3, 3, dtype=F64)
    bank = bank_of(ElementwiseField(), plans, noise=noise, size=None, chunk=3, grid=None).fill()
    assert bank.dtype == F64
    expect_bank(bank, euler(ElementwiseField(), noise, grid), dict(rtol=1e-12, atol=1e-12))


def test_of_a_calibration_and_a_fused_teacher():
    """The schedules of a calibration; a sampler that makes all steps in one call."""
    net, noise = BUNDLED["digits"].load(), normal(6, 1, 8, 8)
    cal = fk.calibrate(net, noise, 10, [2, 3], **QUIET)
    plain, fused = (
        fk.TrajectoryBank(teacher, cal, noise=noise, chunk=4, **QUIET).fill()
        for teacher in (net, fk.fuse(net, cal.times, shape=(1, 8, 8)))
    )
    assert [plan.steps for plan in plain.schedules] == [2, 3]
    wide = BUNDLED["digits"].load().double()
    with torch.no_grad():
        expect_bank(plain, euler(wide, noise, cal.times), dict(rtol=1e-4, atol=1e-4))
        expect_bank(fused, euler(wide, noise, cal.times), dict(rtol=1e-4, atol=1e-4))


def test_what_is_interrupted_in_memory_goes_on():
    left = [20]

    def teacher(x, t):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return ElementwiseField()(x, t)

    bank = bank_of(teacher)
    with pytest.raises(KeyboardInterrupt):
        bank.fill()
    with pytest.raises(
        ValueError, match=r"^bank: expected one that is filled: bank.fill\(\), got 4 of 5 chunks missing"
    ):
        bank.states(2)
    assert same(bank.fill(), bank_of(ElementwiseField()).fill())
    left[0] = 20
    with pytest.raises(KeyboardInterrupt):
        bank.refresh()
    assert bank.drawn == 6
    assert same(bank.fill(), bank_of(ElementwiseField()).fill(6))


def test_a_teacher_in_training_is_said():
    with pytest.warns(UserWarning, match=r"^velocity: .*training") as seen:
        bank_of(DropoutField()).fill()
    assert [w.filename for w in seen] == [__file__]


class DropoutField(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.1)

    def forward(self, x, t):
        return self.drop(x)


def test_several_schedules_take_one_pass():
    teacher = Counted(linear_field())
    bank_of(teacher).fill()
    assert teacher.calls == 12 * 5  # steps, chunks


@pytest.mark.parametrize("storage", STORAGES)
def test_a_fraction_at_a_time(storage, tmp_path):
    """The oldest first; as many as it takes make a bank anew; each can be made again."""
    teacher = linear_field()
    bank = bank_of(teacher, storage=storage, folder=tmp_path / "bank", seed=3).fill()
    seen = []
    for _ in range(4):
        before = bank.states(3).clone()
        first = bank.drawn % 5
        new = bank.refresh(0.3)  # 2 of 5 chunks, the last of 2 trajectories
        changed = (bank.states(3) != before).flatten(2).any(2).all(0).nonzero().flatten().tolist()
        chunks = [first, (first + 1) % 5]
        assert changed == sorted(i for c in chunks for i in range(5 * c, min(5 * c + 5, 22)))
        assert new == len(changed)
        seen += chunks
        expect_bank(bank, euler(teacher, noise_of(bank), GRID), dict(rtol=1e-5, atol=1e-5))
    assert seen[:5] == list(range(5))
    again = bank_of(teacher, seed=3).fill(bank.drawn)
    assert all(torch.equal(again.states(n), bank.states(n)) for n in (2, 3))
    bank.refresh()
    assert bank.drawn == 5 + 8 + 5
    bank.fill(again.drawn)
    assert torch.equal(again.states(2), bank.states(2))


def test_the_loss_is_that_of_the_states_themselves(tmp_path):
    """Of all places alike, bit for bit between those that gather the ends."""
    plan, student, found = PLANS[1], nn.Linear(5, 4), []
    for storage in STORAGES:
        bank = bank_of(schedules=plan, storage=storage, folder=tmp_path / "bank").fill()
        objective = fk.StraightenLoss(plan, t_sampling="uniform", loss="huber")
        generator = torch.Generator().manual_seed(1)
        batch = bank.sample(40, generator)
        assert batch.ends == (storage != "device")
        found.append(objective(fk.VelocityField(student, time_column=True), batch, generator).per_sample)
    assert all(torch.equal(found[1], other) for other in found[2:])
    torch.testing.assert_close(found[0], found[1])


# ---- from data ----


@pytest.mark.parametrize("storage", ["device", "folder"])
def test_from_data(storage, tmp_path):
    """By Heun's method: the last states are the data, and its error falls with the square of the step."""
    teacher, data, errors = linear_field(), normal(22, 4, seed=5), []
    for K in (12, 24):
        grid = even_grid(K)
        bank = bank_of(teacher, storage=storage, folder=tmp_path / str(K), noise=None, data=data, grid=grid)
        bank.fill()
        assert torch.equal(bank.states(3)[-1], data)
        by_hand = heun(teacher, data, grid.flip(0))
        expect_bank(bank, by_hand, dict(rtol=1e-5, atol=1e-5))
        again = heun(teacher, by_hand[0.0][:5], grid)[1.0]
        assert bank.inversion_error == pytest.approx((again - data[:5]).square().mean().sqrt().item(), rel=1e-3)
        exact = linear_field().exact(data.double(), -1.0)
        errors.append((bank.states(2)[0] - exact).square().mean().sqrt().item())
    assert errors[1] < 0.35 * errors[0]
    drawn = bank_of(noise=None, data=lambda n, generator: torch.rand(n, 4, generator=generator)).fill()
    before = drawn.states(2)[-1].clone()
    drawn.refresh(0.2)
    assert torch.equal(drawn.states(2)[-1, 5:], before[5:])
    assert not torch.isin(drawn.states(2)[-1, :5], before[:5]).any()


# ---- conditioning ----


SEEN: list[dict] = []


class Conditioned(nn.Module):
    """a x + b, of each sample's own a and b."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, x, t, a, b):
        SEEN.append({"a": a, "b": b})
        return self.factor * (a.to(x.dtype).view(-1, 1) * x + b.to(x.dtype))


A, TABLE, INDEX = normal(22, seed=7), normal(3, 4, seed=8), torch.arange(22) % 3


def drawn_conditioning(n, generator):
    return {"a": torch.rand(n, generator=generator), "b": torch.rand(n, 4, generator=generator)}


GIVEN = {
    "rows": dict(conditioning={"a": A, "b": TABLE[INDEX]}),
    "table": dict(conditioning={"a": A, "b": (TABLE, INDEX)}),
    "function": dict(conditioning=drawn_conditioning),
}


@pytest.mark.parametrize(("given", "storage", "kind"), pairs(GIVEN, STORAGES, ("plain", "field", "data")))
def test_conditioning_goes_with_the_trajectories(given, storage, kind, tmp_path):
    """To the teacher, to the file and to the student, in the place of a field's own, which is of other samples."""
    net = Conditioned()
    teacher = (
        net if kind != "field" else fk.VelocityField(net, conditioning={"a": torch.zeros(5), "b": torch.zeros(5, 4)})
    )
    noise = normal(22, 4)
    begin = dict(noise=None, data=noise) if kind == "data" else dict(noise=noise)
    bank = bank_of(teacher, storage=storage, folder=tmp_path / "bank", **begin, **GIVEN[given]).fill()
    batch = bank.sample(64, torch.Generator().manual_seed(0), 2)
    rows = {}
    for sample, *values in zip(batch.sample.tolist(), *(batch.conditioning[key] for key in "ab"), strict=True):
        rows.setdefault(sample, dict(zip("ab", values, strict=True)))
        assert torch.equal(rows[sample]["b"], values[1])
    if given != "function":
        assert all(torch.equal(row["a"], A[s]) and torch.equal(row["b"], TABLE[s % 3]) for s, row in rows.items())
    for s, row in rows.items():
        one, start = Conditioned().double(), noise[s : s + 1]

        def velocity(x, t, one=one, row=row):
            return one(x, t, row["a"].double().view(1), row["b"].double().view(1, 4))

        by_hand = heun(velocity, start, GRID.flip(0)) if kind == "data" else euler(velocity, start, GRID)
        torch.testing.assert_close(bank.states(2)[:, s].double(), at(by_hand, PLANS[0])[:, 0], rtol=1e-5, atol=1e-5)
    student = Conditioned()
    learner = student if kind == "plain" else fk.VelocityField(student, conditioning={"a": A[:5], "b": TABLE[:1]})
    objective = fk.StraightenLoss(PLANS[0])
    objective(learner, batch).loss.backward()
    assert all(torch.equal(SEEN[-1][key], batch.conditioning[key]) for key in "ab")
    if storage == "folder":
        opened = fk.TrajectoryBank.open(tmp_path / "bank").sample(64, torch.Generator().manual_seed(0), 2)
        assert all(torch.equal(opened.conditioning[key], batch.conditioning[key]) for key in "ab")
        stored = set(_weights.read(tmp_path / "bank/shard-000000.safetensors", "x", "y")[0])
        assert stored == {"states", "conditioning.a", "conditioning.b"}
        assert (tmp_path / "bank/tables.safetensors").exists() == (given == "table")
    with pytest.raises(TypeError, match=r"^student: expected a network that takes a, b, which the bank carries, got"):
        objective(linear_field(), batch)


def test_conditioning_of_the_field_follows_its_rows():
    rows = normal(22, 4, seed=2)
    teacher = fk.VelocityField(RowField(), conditioning={"rows": rows})
    bank = bank_of(teacher, noise=normal(22, 4)).fill()
    torch.testing.assert_close(bank.states(2)[-1], normal(22, 4) + rows)
    with pytest.raises(ValueError, match=r"^conditioning\['rows'\]: expected 21 rows"):
        bank_of(teacher, size=21)


def test_a_weight_of_guidance_for_each_trajectory():
    """The teacher is guided by it, and the student is told it."""
    rows, weight = normal(22, 4, seed=2), torch.linspace(0, 4, 22)
    teacher = fk.VelocityField(RowField(), conditioning={"rows": rows}, unconditional={"rows": torch.ones(1, 4)})
    bank = bank_of(teacher, noise=normal(22, 4), conditioning={"w": weight}, guidance="w").fill()
    expected = normal(22, 4) + 1 + weight[:, None] * (rows - 1)
    torch.testing.assert_close(bank.states(2)[-1], expected)
    batch = bank.sample(16, schedule=2)
    assert batch.guidance == "w"
    assert torch.equal(batch.conditioning["w"], weight[batch.sample])
    with pytest.raises(ValueError, match=r"^velocity: expected a VelocityField with `unconditional`"):
        bank_of(conditioning={"w": weight}, guidance="w")
    with pytest.raises(ValueError, match=r"^guidance: expected a name of conditioning \['w'\], got 'v'"):
        bank_of(teacher, conditioning={"w": weight}, guidance="v")


# ---- in a folder ----


def same(bank, other):
    return all(torch.equal(bank.states(n), other.states(n)) for n in (1, 2, 3))


def files(folder):
    return sorted(p.name for p in folder.iterdir())


SHARDS = [f"shard-{k:06}.safetensors" for k in range(5)]


def killed(work, ready):
    """A process that does some work, killed when it is ready."""
    process = os.fork()
    if process == 0:
        try:
            work()
        finally:
            os._exit(0)
    while not ready() and os.waitpid(process, os.WNOHANG) == (0, 0):
        time.sleep(0.001)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


PAUSE, CALLS = [0.0], [0]


class SlowField(ElementwiseField):
    def forward(self, x, t):
        time.sleep(PAUSE[0])
        CALLS[0] += 1
        return super().forward(x, t)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_killed_fill_goes_on_where_it_was(dtype, tmp_path):
    """At any moment, and in a refresh: whole shards, no others, and in the end what nobody killed, bit for bit."""
    folder = tmp_path / "bank"

    def make():
        return bank_of(SlowField(), storage="folder", folder=folder, dtype=dtype)

    def slowly(work):
        PAUSE[0] = 0.003
        work(make())

    for some in (1, 3):
        killed(lambda: slowly(fk.TrajectoryBank.fill), lambda some=some: len(list(folder.glob("shard*"))) >= some)
        assert some <= len(list(folder.glob("shard*"))) < 5
        with pytest.raises(
            ValueError, match=r"^storage: expected the 5 shards of a bank in .*, got . missing, .*shard-"
        ):
            fk.TrajectoryBank.open(folder)
    left, CALLS[0] = 5 - len(list(folder.glob("shard*"))), 0
    bank = make().fill()
    assert CALLS[0] == 12 * left
    assert same(bank, bank_of(SlowField(), dtype=dtype).fill())
    assert files(folder) == ["bank.json", *SHARDS]

    def ticket():
        try:
            return _weights.read(folder / SHARDS[1], "x", "y")[1]["ticket"]
        except ValueError:  # replaced while it was read
            return None

    killed(lambda: slowly(lambda bank: bank.refresh(1.0)), lambda: ticket() == "6")
    bank = make()
    assert 7 <= bank.drawn < 10
    assert same(bank, bank_of(SlowField(), dtype=dtype).fill(bank.drawn))
    bank.refresh(0.2)
    assert files(folder) == ["bank.json", *SHARDS]
    assert same(make(), bank_of(SlowField(), dtype=dtype).fill(bank.drawn))


def test_a_full_disk_is_an_error_before_and_in_the_middle(tmp_path, monkeypatch):
    folder, settings = tmp_path / "bank", dict(storage="folder", folder=tmp_path / "bank", chunk=2)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(
        ValueError, match=r"^storage: expected what fits into .* GiB of the disk, got .* of trajectories"
    ):
        bank_of(**settings)
    assert not folder.exists()
    monkeypatch.undo()
    bank, whole = bank_of(**settings), _weights._bytes

    def full(t):
        if (folder / SHARDS[2]).exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return whole(t)

    monkeypatch.setattr(_weights, "_bytes", full)
    with pytest.raises(
        OSError, match=r"^\[Errno 28\] storage: .*shard-000003.* could not be written .*goes on there"
    ) as e:
        bank.fill()
    assert e.value.errno == errno.ENOSPC
    assert files(folder) == ["bank.json", *SHARDS[:3]]
    monkeypatch.undo()
    assert same(bank.fill(), bank_of(chunk=2).fill())


def changed(**entries):
    def change(folder):
        manifest = json.loads((folder / "bank.json").read_text()) | entries
        (folder / "bank.json").write_text(json.dumps(manifest))

    return change


def another_shard(folder):
    other = bank_of(seed=9, storage="folder", folder=folder.parent / "other").fill()
    shutil.copy(other._store.path(2), folder / SHARDS[2])


def bit(folder):
    path = folder / SHARDS[2]
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "truncated": (lambda f: os.truncate(f / SHARDS[2], 400), r"got|of .*shard-000002.* is not one, or truncated"),
    "empty": (lambda f: os.truncate(f / SHARDS[2], 0), r".*shard-000002.* is not one, or truncated"),
    "a bit": (bit, r".*shard-000002.*sha256 is that of other contents"),
    "of another bank": (another_shard, r".*shard-000002.*of another bank or place"),
    "another's place": (
        lambda f: shutil.copy(f / SHARDS[1], f / SHARDS[2]),
        r".*shard-000002.*of another bank or place",
    ),
    "manifest": (changed(size=21), r".*bank.json.*sha256 is that of other contents"),
    "version": (changed(version=2), r".*bank.json.*of format"),
    "no JSON": (lambda f: (f / "bank.json").write_text("{"), r".*bank.json is truncated or not JSON"),
    "tables": (lambda f: (f / "tables.safetensors").unlink(), r".*tables.safetensors, which is not there"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_is_not_of_the_bank_is_named_before_work(kind, tmp_path):
    folder, (damage, message) = tmp_path / "bank", DAMAGE[kind]
    settings = dict(storage="folder", folder=folder, velocity=Conditioned(), **GIVEN["table"])
    bank_of(**settings).fill()
    before = (folder / SHARDS[1]).read_bytes()
    damage(folder)
    for use in (lambda: bank_of(**settings), lambda: fk.TrajectoryBank.open(folder)):
        with pytest.raises((ValueError, FileNotFoundError), match=rf"^storage: expected .*{message}"):
            use()
    if kind in ("truncated", "empty", "of another bank", "another's place"):
        with pytest.raises(ValueError, match=r"^storage: .*shard-000002"):
            fk.TrajectoryBank.open(folder, check=False)
        (folder / SHARDS[2]).unlink()
        assert same(bank_of(**settings).fill(), bank_of(Conditioned(), **GIVEN["table"]).fill())
    assert (folder / SHARDS[1]).read_bytes() == before


OTHERS = {
    "seed": dict(seed=1),
    "size": dict(size=23),
    "grid": dict(grid=24),
    "schedules": dict(schedules=PLANS[:2]),
    "dtype": dict(dtype=torch.bfloat16),
    "noise": dict(noise=normal(22, 4)),
    "chunk": dict(chunk=6),
    "teacher": dict(velocity=linear_field(seed=4)),
    "field": dict(velocity=fk.VelocityField(linear_field(), conditioning={}, time_scale=2.0)),
    "conditioning": dict(velocity=Conditioned(), **GIVEN["rows"]),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_folder_of_another_bank_is_refused(what, tmp_path):
    folder = dict(storage="folder", folder=tmp_path / "bank")
    bank_of(**folder).fill()
    with pytest.raises(
        ValueError, match=r"^storage: expected a folder of this bank \(\w+ = .*\), got .*bank, where \w+ ="
    ):
        bank_of(**folder, **OTHERS[what])


def test_a_teacher_that_cannot_be_told_is_said(tmp_path):
    folder = dict(storage="folder", folder=tmp_path / "bank")
    bank_of(lambda x, t: x, **folder).fill()
    told = r"^storage: expected the teacher that .*bank was made with, got parameters unknown \(not a module\)"
    with pytest.warns(UserWarning, match=told) as seen:
        assert bank_of(lambda x, t: x, **folder).is_filled
    assert [w.filename for w in seen] == [__file__]
    with pytest.raises(ValueError, match=r"\(teacher = '\w+'\), got .*, where teacher = None"):
        bank_of(**folder)


def test_a_bank_is_streamed_without_its_teacher(tmp_path):
    bank = bank_of(storage="folder", folder=tmp_path / "bank", dtype=torch.bfloat16).fill()
    for check in (True, False):
        opened = fk.TrajectoryBank.open(tmp_path / "bank", check=check)
        assert same(opened, bank)
        assert (opened.nbytes, opened.dtype, opened.drawn) == (bank.nbytes, torch.bfloat16, 5)
        assert opened.identity() == bank.identity()
        first, second = (b.sample(9, torch.Generator().manual_seed(0), 2) for b in (bank, opened))
        assert all(torch.equal(a, b) for a, b in zip(first[:3], second[:3], strict=True))
        assert opened.fill() is opened
        with pytest.raises(ValueError, match=r"^bank: expected one with its teacher, to refresh"):
            opened.refresh()


def test_functions_are_told_by_what_they_draw(tmp_path):
    def uniform(n, generator):
        return torch.rand(n, 4, generator=generator)

    folder = dict(storage="folder", folder=tmp_path / "bank")
    bank_of(noise=uniform, **folder).fill()
    assert same(bank_of(noise=uniform, **folder), bank_of(noise=uniform).fill())
    with pytest.raises(ValueError, match=r"^storage: expected functions that draw what they drew before"):
        bank_of(noise=lambda n, generator: 2 * uniform(n, generator), **folder)


@pytest.mark.parametrize("storage", STORAGES)
def test_a_bank_goes_to_other_processes(storage, tmp_path):
    """Without its teacher; a shared one is no copy."""
    bank = bank_of(storage=storage, folder=tmp_path / "bank").fill()
    there = pickle.loads(ForkingPickler.dumps(bank))
    assert same(there, bank)
    assert repr(there) == repr(bank)
    if storage == "shared":
        bank._store.states.zero_()
        assert not there._store.states.any()
    with pytest.raises(ValueError, match=r"^bank: expected one with its teacher, to refresh"):
        there.refresh()


def test_memory_is_that_of_a_chunk(tmp_path):
    """Of a bank in a folder, 48 MB, made and read: less than a sixth of it."""

    def anonymous():
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) << 10

    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux's accounts of memory")
    peak = []

    def teacher(x, t):
        peak.append(anonymous())
        return -x

    bank = bank_of(teacher, storage="folder", folder=tmp_path / "bank", noise=(4096,), size=600, chunk=20)
    before = anonymous()
    bank.fill()
    assert bank.nbytes == 600 * 5 * 4096 * 4
    for i in range(20):
        bank.sample(16, torch.Generator().manual_seed(i), 3)
        peak.append(anonymous())
    assert max(peak) - before < bank.nbytes / 6


# ---- in `straighten` ----


def trained(teacher, bank=None, **settings):
    settings = dict(iterations=12, batch=8, lr=1e-2, warmup=1, log_every=2, ema=None, init="keep", seed=3) | settings
    student = settings.pop("student", None)
    if student is None:
        student = ElementStudent() if not isinstance(teacher, Conditioned) else Conditioned()
    if bank is not None:
        settings["bank"] = bank
    return fk.straighten(student, teacher, settings.pop("schedule", PLANS[1]), **settings, **QUIET)


class ElementStudent(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(2))

    def forward(self, x, t):
        return self.w[0] * x + self.w[1] * t[:, None]


def same_run(result, other):
    weights = zip(result.student.state_dict().values(), other.student.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in weights) and repr(result.history) == repr(other.history)


@pytest.mark.parametrize("storage", STORAGES)
def test_a_run_on_a_bank_of_the_callers(storage, tmp_path):
    """Filled in it; of several schedules; a run that stops goes on, with the bank as it was or without."""
    teacher, path = SlowField(), tmp_path / "run.pt"

    def bank(name="bank"):
        return bank_of(teacher, storage=storage, folder=tmp_path / name)

    settings = dict(refresh=3, refresh_fraction=0.4, checkpoint_every=4)
    whole = trained(teacher, bank("other"), **settings)
    kept, stop = bank(), [0]

    def stopping(v, target):
        stop[0] += 1
        if stop[0] == 12:  # one is that of the trial
            raise KeyboardInterrupt
        return (v - target).square().mean(1)

    with pytest.raises(KeyboardInterrupt):
        trained(teacher, kept, checkpoint=path, **settings, loss=stopping)
    assert kept.drawn == 5 + 3 * 2
    result = trained(teacher, bank(), checkpoint=path, **settings, loss=lambda v, target: (v - target).square().mean(1))
    own = trained(teacher, bank("third"), **settings, loss=lambda v, target: (v - target).square().mean(1))
    assert same_run(result, own)
    torch.testing.assert_close(result.student.w, whole.student.w, rtol=1e-4, atol=1e-5)


def test_a_run_s_own_bank_in_parts(tmp_path):
    """A share of it anew each time, and the same when it is resumed."""
    settings = dict(noise=(4,), grid=12, bank=22, refresh=2, refresh_fraction=0.3, checkpoint_every=5)
    whole = trained(SlowField(), **settings)
    assert not same_run(whole, trained(SlowField(), **settings | dict(refresh_fraction=1.0)))
    path = tmp_path / "run.pt"
    trained(SlowField(), **settings, checkpoint=path)
    state = torch.load(path, weights_only=True)
    assert (state["iteration"], state["bank_drawn"]) == (12, 3 + 5)
    with pytest.raises(ValueError, match=r"^checkpoint: expected one of this run \(refresh_fraction = 0.5\)"):
        trained(SlowField(), **settings | dict(refresh_fraction=0.5), checkpoint=path)


OTHER_ROWS, MATCHING = {"a": A[:5], "b": TABLE}, dict(target="velocity_matching", substeps=1)


@pytest.mark.parametrize(("storage", "target"), [("device", "boss"), ("folder", "boss"), ("folder", "reflow")])
def test_a_batch_of_other_intervals_is_refused(storage, target, tmp_path):
    """Of ends alone the states have the right shape, whatever their times are."""
    bank = bank_of(ElementwiseField(), storage=storage, folder=tmp_path / "bank").fill()
    loss = fk.StraightenLoss(PLANS[1], target=target)
    loss(ElementStudent(), bank.sample(8, schedule=loss)).loss.backward()
    with pytest.raises(
        ValueError, match=r"^batch: expected intervals between \[0.0, .*, got one between \[0.0, .*1.0\]"
    ):
        loss(ElementStudent(), bank.sample(8, schedule=PLANS[0]))


ENDPOINT = dict(target="endpoint", schedule=fk.Solver.euler(PLANS[0]))


@pytest.mark.parametrize(
    ("settings", "own"),
    [({}, None), (ENDPOINT, None), ({}, OTHER_ROWS), (ENDPOINT, OTHER_ROWS), (MATCHING, OTHER_ROWS)],
    ids=["boss", "endpoint", "boss of a field", "endpoint of a field", "velocity_matching of a field"],
)
def test_a_run_takes_conditioning_from_the_bank(settings, own):
    """Velocities that depend on it alone are learned exactly; without it they could not be."""
    net = Conditioned()
    with torch.no_grad():
        net.factor.fill_(2.0)
    student = Conditioned()
    teacher, student = (v if own is None else fk.VelocityField(v, conditioning=own) for v in (net, student))
    given = {"a": torch.zeros(22), "b": normal(22, 4, seed=2)}
    bank = bank_of(teacher, conditioning=given)
    result = trained(teacher, bank, student=student, iterations=150, lr=0.05, **dict(schedule=PLANS[0]) | settings)
    learned = result.student if own is None else result.student.net
    assert learned.factor.item() == pytest.approx(2, abs=0.02)
    assert result.history["loss"][-1] < 1e-3 * result.history["loss"][0]
    with pytest.raises(TypeError, match=r"^student: expected a network that takes a, b, which the bank carries"):
        fk.straighten(linear_field(), teacher, PLANS[0], bank=bank, iterations=1, init="keep", **QUIET)


def test_a_run_for_a_solver_takes_whole_trajectories(tmp_path):
    solver = fk.Solver.adams_bashforth([0, 0.5, 1])
    settings = dict(schedule=solver, target="solver", rollout_every=3)
    results = []
    for storage in ("device", "folder"):
        bank = bank_of(SlowField(), schedules=[solver, *PLANS], storage=storage, folder=tmp_path / "bank")
        results.append(trained(SlowField(), bank, **settings))
    assert same_run(*results)


BAD_RUNS = {
    "knots": (
        dict(schedule=fk.Schedule.uniform(5)),
        r"^bank: expected knots that the bank keeps, among \[0.0, .*, got S",
    ),
    "noise": (dict(noise=(4,)), r"^noise: expected None with a bank that has its own"),
    "grid": (dict(grid=12), r"^grid: expected None with a bank that has its own"),
    "no noise": (dict(bank=22), r"^noise: expected a tensor, a shape or a function, without a bank"),
    "refresh": (
        dict(bank=bank_of(ElementwiseField(), noise=normal(22, 4)), refresh=2),
        r"^bank: expected one that draws",
    ),
    "fraction": (dict(refresh_fraction=0.0), r"^refresh_fraction: expected a number in \(0, 1\]"),
    "teacher": (dict(bank=bank_of(linear_field())), r"^bank: expected one of this teacher"),
    "own samples": (
        dict(bank=bank_of(SlowField(), **GIVEN["rows"]), target="on_policy"),
        r"^bank: expected one without conditioning for target='on_policy', whose student makes samples of its own",
    ),
}


@pytest.mark.parametrize("what", BAD_RUNS)
def test_bad_input_of_a_run_is_named_before_work(what):
    settings, message = BAD_RUNS[what]
    CALLS[0] = 0
    with pytest.raises((ValueError, TypeError), match=message):
        trained(SlowField(), **dict(bank=bank_of(SlowField())) | settings)
    assert CALLS[0] == 0


class Taking(torch.nn.Module):
    def forward(self, x, t, a):
        return -x


BAD = {
    "a knot off the grid": (
        dict(grid=10),
        ValueError,
        r"^grid: expected a grid that contains every time of the schedule, got 10 steps without [\d.]+ \(the near",
    ),
    "no grid": (dict(grid=None), ValueError, r"^grid: expected the teacher's fine grid"),
    "no schedule": (dict(schedules=[]), ValueError, r"^schedules: expected a Schedule, a Solver"),
    "an inverse": (dict(schedules=fk.Solver.heun(2, inverse=True)), TypeError, r"^schedules: expected a Schedule"),
    "neither": (dict(noise=None), ValueError, r"^noise: expected noise, or data in its place, got neither"),
    "both": (dict(data=normal(22, 4)), ValueError, r"^noise: expected noise, or data in its place, got both"),
    "a shape of data": (dict(noise=None, data=(4,)), TypeError, r"^data: expected a tensor or a function"),
    "size": (dict(noise=normal(21, 4)), ValueError, r"^size: expected None, or the 21 of noise, got 22"),
    "storage": (dict(storage=3), TypeError, r"^storage: expected a path"),
    "dtype": (dict(dtype=torch.float16), TypeError, r"^dtype: expected torch.float32 or"),
    "rows": (
        dict(conditioning={"a": A[:21]}),
        ValueError,
        r"^conditioning\['a'\]: expected 22 rows, one for each traj",
    ),
    "index": (
        dict(conditioning={"a": (TABLE, INDEX + 1)}),
        ValueError,
        r"^conditioning\['a'\]: expected an index \[22\]",
    ),
    "drawn rows": (
        dict(conditioning=lambda n, g: {"a": A}),
        ValueError,
        r"^conditioning\(n, generator\)\['a'\]: expected 5",
    ),
    "fewer samples": (
        dict(noise=lambda n, g: normal(3, 4)),
        ValueError,
        r"^noise: expected a function that returns n = 5",
    ),
    "conditioning of no use": (
        dict(velocity=linear_field(), conditioning={"a": A}),
        TypeError,
        r"^velocity: expected a network that takes a, which the bank carries, got .*unexpected keyword argument 'a'",
    ),
    "drawn dtypes": (
        dict(noise=lambda n, g: normal(n, 4, dtype=[torch.float32, F64][n % 2])),
        ValueError,
        r"^noise: expected samples of shape \[4\], torch.float64, got a torch.float32 tensor",
    ),
    "drawn dtypes of rows": (
        dict(velocity=Taking(), conditioning=lambda n, g: {"a": torch.ones(n, dtype=[torch.int64, F64][n % 2])}),
        ValueError,
        r"^conditioning: expected rows of \{'a': \(\(\), torch.float64\)\}, as at first, got .*int64",
    ),
    **{
        f"overflow of {dtype}": (
            dict(velocity=lambda x, t: 0 * x, noise=large.expand(22, 4), dtype=dtype),
            ValueError,
            rf"^dtype: expected one that holds the teacher's states, got {dtype}, whose largest is 3\.\d+e\+38",
        )
        for dtype, large in (
            (torch.bfloat16, torch.tensor(3.4e38)),
            (torch.float32, torch.tensor(1e39, dtype=F64)),
        )
    },
    "memory": (
        dict(size=2**50),
        ValueError,
        r"^size: expected what fits into .* GiB of memory, got 1125899906842624: ",
    ),
    "NaN": (
        dict(velocity=lambda x, t: x / 0 * 0),
        ValueError,
        r"^velocity: expected finite velocities, got NaN or Inf in ",
    ),
}


def test_a_shard_that_is_replaced_while_it_is_read_is_read_again(tmp_path, monkeypatch):
    """As another process refreshes the bank: its header was that of the shard before."""
    banks = [bank_of(storage=tmp_path / name, chunk=22).fill() for name in "ab"]
    banks[0].refresh()
    path, header, calls = tmp_path / "b" / SHARDS[0], _weights.expect_header, []

    def replaced(path):
        header(path)
        calls.append(path)
        if len(calls) == 1:
            os.replace(tmp_path / "a" / SHARDS[0], path)
            raise ValueError("of other contents")

    monkeypatch.setattr(_weights, "expect_header", replaced)
    metadata = _weights.read(path, "x", "y")[1]
    assert len(calls) == 2
    assert metadata["ticket"] == "1"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"^x: expected y"):
        _weights.read(path, "x", "y")


def test_a_folder_is_the_same_from_everywhere(tmp_path, monkeypatch):
    """By a relative name, wherever the process goes, with its name's own letters; a shard that is gone is named."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    bank = bank_of(storage="ä b.ank", chunk=11)
    monkeypatch.chdir(tmp_path / "elsewhere")
    states = bank.fill().states(2)
    monkeypatch.chdir(tmp_path)
    opened = [fk.TrajectoryBank.open("ä b.ank") for _ in range(2)]
    monkeypatch.chdir("/")
    assert torch.equal(opened[0].states(2), states)
    (tmp_path / "ä b.ank" / "shard-000001.safetensors").unlink()
    with pytest.raises(ValueError, match=r"^storage: expected a shard of the bank in .*shard-000001.*not there"):
        opened[1].states(2)
    (tmp_path / "to nothing").symlink_to(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"^storage: expected a folder, got .*, a link to nothing"):
        bank_of(storage=tmp_path / "to nothing")


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_named(what):
    settings, error, message = BAD[what]
    with pytest.raises(error, match=message):
        bank_of(**settings).fill()


def test_bad_batches_are_named():
    bank = bank_of()
    with pytest.raises(
        ValueError, match=r"^bank: expected one that is filled: bank.fill\(\), got 5 of 5 chunks missing"
    ):
        bank.sample(4, schedule=2)
    bank.fill()
    for schedule, message in (
        (None, r"one of the bank's schedules, of 2, 3, 1 steps, got None"),
        (5, r"one of the bank's schedules, of 2, 3, 1 steps, got 5"),
        (fk.Schedule.uniform(5), r"knots that the bank keeps, among \[0.0, 0.333333, 0.5, .*, got Schedule"),
    ):
        with pytest.raises(ValueError, match=rf"^schedule: expected {message}"):
            bank.sample(4, schedule=schedule)
    with pytest.raises(ValueError, match=r"^noise: expected a shape or a function, for a bank that is refreshed"):
        bank_of(noise=normal(22, 4)).fill().refresh()


def test_its_size_is_told_before_work(caplog):
    def teacher(x, t):
        assert "22 trajectories, 5 knots of 4, torch.bfloat16: 0.000839 MiB, storage device" in caplog.text
        return x

    with caplog.at_level("INFO", "flowkernels"):
        bank_of(teacher, dtype=torch.bfloat16).fill()
