"""A bank that ranks share: on any number of them the batches, the states and what is held out of one process."""

from types import SimpleNamespace

import pytest
import torch

import flowkernels as fk
from flowkernels.training.bank import trajectory_bank
from flowkernels.training.bank.by_rank import ByRank, spread

PLANS = [fk.Schedule([0, 0.25, 1]), fk.Schedule.uniform(4)]


@pytest.fixture
def of_rank(monkeypatch):
    """Banks of ranks one after the other, in this process: nothing of what they share is sent."""

    def ranks(group):
        return SimpleNamespace(rank=group[0], size=group[1], wait=lambda: None, expect_same=lambda settings: None)

    monkeypatch.setattr(trajectory_bank, "ranks_of", ranks)

    def made(rank, size, fill=True, **settings):
        bank = fk.TrajectoryBank(
            lambda x, t, **given: -x * (1 + sum(given.values())),
            PLANS,
            size=101,
            grid=8,
            chunk=16,
            progress=False,
            group=(rank, size),
            **{"noise": lambda n, generator: torch.randn(n, 3, generator=generator, dtype=torch.float64)} | settings,
        )
        return bank.fill() if fill else bank

    return made


def generator():
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("storage", ["device", "pinned", "folder"])
def test_ranks_have_the_batches_of_one(of_rank, tmp_path, size, storage):
    columns = {"a": torch.arange(101.0).view(101, 1), "b": (torch.tensor([[0.0], [3.0]]), torch.arange(101) % 2)}
    held_out = {"device": 0, "pinned": 13, "folder": 50}[storage]
    settings = dict(conditioning=columns, storage=storage, held_out=held_out)
    whole = of_rank(0, 1, **settings | {"storage": "device"})
    where = tmp_path / "bank" if storage == "folder" else storage
    banks = [of_rank(r, size, fill=False, **settings | {"storage": where}) for r in range(size)]

    def in_turn(act):  # of a folder the others have not written yet what a rank looks for
        errors = []
        for bank in banks:
            try:
                act(bank)
            except ValueError as e:
                errors.append(str(e))
        if storage == "folder":
            for bank in banks:
                bank._store.scan(check=True)
        return errors

    errors = in_turn(lambda bank: bank.fill())
    assert len(errors) == (size - 1 if storage == "folder" else 0)
    assert all("storage: expected a folder that all" in e for e in errors)
    for refreshed in (False, True):
        if refreshed:
            whole.refresh(0.3)
            in_turn(lambda bank: bank.refresh(0.3))
        assert all(bank.drawn == whole.drawn and bank.is_filled for bank in banks)
        for plan in (None, 4):
            expected = whole.sample(30, generator(), plan or PLANS[0])
            parts = [bank.sample(30, generator(), plan or PLANS[0]) for bank in banks]
            assert [part.part for part in parts] == [(30 * r // size, 30 * (r + 1) // size, 30) for r in range(size)]
            for name in ("interval", "sample"):
                assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(expected, name))
            states = whole.states(PLANS[1] if plan else PLANS[0])
            for part in parts:
                assert torch.equal(part.conditioning["a"], columns["a"][part.sample])
                assert torch.equal(part.conditioning["b"][:, 0], 3.0 * (part.sample % 2))
                ends = part.states if part.ends else part.states[:, part.columns]
                for knot in range(2):
                    mine = ends[knot] if part.ends else ends[part.interval + knot, torch.arange(len(part.sample))]
                    torch.testing.assert_close(mine, states[part.interval + knot, part.sample], rtol=1e-12, atol=0)
        if held_out:
            of_all = whole.ends(held_out, PLANS[0])
            found = [bank.ends(held_out, PLANS[0]) for bank in banks]
            assert {len(part.sample) for part in found} == {-(-held_out // size)}
            for r, part in enumerate(found):
                first = int(part.sample[0]) - (101 - held_out)
                mine = range(held_out * r // size, held_out * (r + 1) // size)
                assert set(mine) <= set(range(first, first + len(part.sample)))
                there = of_all.states[:, first : first + len(part.sample)]
                torch.testing.assert_close(part.states, there, rtol=1e-12, atol=0)
    if storage != "folder":
        m = 101 - held_out
        assert all(bank.nbytes <= whole.nbytes * (m / size + 2 + held_out / size + 1) / 101 + 16 for bank in banks)
    else:  # what they have written is a bank like any other, and not another's
        opened = fk.TrajectoryBank.open(where)
        torch.testing.assert_close(opened.states(4), whole.states(4), rtol=1e-12, atol=0)
        with pytest.raises(ValueError, match=r"storage: expected a folder of this bank \(order = None\)"):
            fk.TrajectoryBank(lambda x, t: -x, PLANS, noise=(3,), size=101, grid=8, chunk=16, storage=where)


@pytest.mark.parametrize(
    ("n", "held_out", "batch"), [(101, 0, 36), (101, 13, 36), (24, 4, 60), (64, 0, 12), (7, 5, 12)]
)
def test_draws_are_uniform_and_a_ranks_own(n, held_out, batch):
    m, rows, seeded = n - held_out, torch.zeros(n, dtype=torch.int64), generator()
    for _ in range(2000):
        sample = ByRank(n, held_out).draw(batch, seeded, torch.device("cpu"))
        rows += sample.bincount(minlength=n)
    assert not rows[m:].any()
    expected = 2000 * batch / m
    assert (rows[:m] - expected).abs().max() < 6 * expected**0.5 + 1e-9  # of stratified draws less
    for size in (1, 2, 3, 4, 6):
        every = [ByRank(n, held_out, r, size) for r in range(size)]
        assert len({one.count for one in every}) == 1
        for r, one in enumerate(every):
            b = torch.arange(batch * r // size, batch * (r + 1) // size)
            least, most = (b * m) // batch, ((b + 1) * m + batch - 1) // batch - 1
            assert least.min() >= one.drawn.start
            assert most.max() < one.drawn.stop
            kept = one.trajectories(torch.device("cpu"))
            assert torch.equal(one.places(kept), torch.arange(one.count))
            for rows_of in (slice(0, n), slice(3, 7), slice(m - 1, n)):
                for part in one.of(rows_of):
                    assert torch.equal(kept[one.place(part)], torch.arange(part.start, part.stop))
        for own in ("drawn", "aside"):
            there = sorted({i for one in every for i in range(n)[getattr(one, own)]})
            assert there == (list(range(m)) if own == "drawn" else list(range(m, n)))


def test_a_refresh_is_spread():
    for chunks in range(1, 70):
        places = [spread(ticket, chunks) for ticket in range(chunks)]
        assert sorted(places) == list(range(chunks))
        assert spread(chunks + 3, chunks) == places[3 % chunks]
    eighth = [spread(ticket, 64) for ticket in range(16)]
    assert [sum(16 * q <= place < 16 * (q + 1) for place in eighth) for q in range(4)] == [4, 4, 4, 4]


def test_bad_calls_name_it(of_rank):
    bank = of_rank(1, 3)
    with pytest.raises(ValueError, match="batch: expected a multiple of the 3 ranks"):
        bank.sample(32, schedule=4)
    with pytest.raises(ValueError, match="held_out: expected 0, as the bank says"):
        bank.sample(30, schedule=4, held_out=4)
    with pytest.raises(ValueError, match="held_out: expected 0 without a group"):
        fk.TrajectoryBank(lambda x, t: -x, PLANS, noise=(3,), grid=8, held_out=3)
    with pytest.raises(ValueError, match="held_out: expected fewer than the 101"):
        of_rank(0, 2, fill=False, held_out=101)
