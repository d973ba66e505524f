"""flowkernels/integrations/fastgen.py, beside a stand-in for FastGen's interface (_fastgen.py)."""

import doctest
import itertools
import sys
import types

import _fastgen
import pytest
import torch

import flowkernels as fk
from flowkernels.integrations import fastgen
from flowkernels.integrations.fastgen import PathLoader, t_list


@pytest.fixture
def stand_in(monkeypatch):
    _fastgen.install(monkeypatch)
    yield
    vars(fastgen).pop("StraightenModel", None)


@pytest.fixture
def bank():
    plans = [fk.Schedule([0.001, 0.25, 1]), fk.Schedule([0.001, 0.25, 0.5, 1])]
    index = torch.arange(10) % 3
    return fk.TrajectoryBank(
        fk.VelocityField(lambda x, t, y, w: -x * (y * w)[:, None], conditioning=dict(y=torch.ones(1), w=torch.ones(1))),
        plans,
        noise=(3,),
        size=10,
        chunk=4,
        grid=[0.001, 0.125, 0.25, 0.5, 1],
        conditioning=dict(y=(torch.tensor([1.0, 2, 3]), index), w=torch.ones(10)),
        progress=False,
    ).fill()


def test_batches(bank, tmp_path):
    """They are whole trajectories, the same from memory as from files; each rank has its share of a batch that does not
    depend on their number, and a run that is resumed goes on with what follows."""
    plan = bank.schedules[1]
    loader = PathLoader(bank, batch_size=4, schedule=plan, condition="y")
    batches = list(itertools.islice(loader, 3))
    states = bank.states(plan)
    for batch in batches:
        assert batch["path"].shape == (4, 3, 3)
        for i in range(4):
            (s,) = [s for s in range(10) if torch.equal(states[0, s], batch["noise"][i])]
            assert torch.equal(torch.cat([batch["path"][i], batch["real"][i][None]]), states[:, s])
            assert batch["condition"][i] == s % 3 + 1
    later = next(iter(PathLoader(bank, batch_size=4, schedule=plan, condition="y", sampler_start_idx=8)))
    assert all(torch.equal(later[key], batches[2][key]) for key in later)
    assert set(next(iter(PathLoader(bank, batch_size=2, schedule=2)))["condition"]) == {"y", "w"}

    kept = fk.TrajectoryBank(
        lambda x, t: -x, plan, noise=bank.states(plan)[0], chunk=4, grid=[0.001, 0.25, 0.5, 1], storage=tmp_path / "b"
    ).fill()
    found = next(iter(PathLoader(tmp_path / "b", batch_size=4)))
    assert "condition" not in found
    assert torch.equal(found["path"][:, 0], batches[0]["path"][:, 0])
    sample = torch.tensor([9, 0, 9])
    assert torch.equal(kept.trajectories(sample)[0], kept.states()[:, sample])


def test_ranks(bank, monkeypatch):
    whole = next(iter(PathLoader(bank, batch_size=4, schedule=3)))
    for rank in (0, 1):
        monkeypatch.setattr(fastgen, "_rank", lambda rank=rank: (rank, 2))
        part = next(iter(PathLoader(bank, batch_size=2, schedule=3)))
        assert torch.equal(part["path"], whole["path"][2 * rank : 2 * rank + 2])


@pytest.mark.parametrize(
    ("settings", "steps"), [({}, 4), (dict(t_sampling="uniform"), 4), (dict(target="reflow", t_sampling="start"), 1)]
)
def test_the_loss(stand_in, settings, steps):
    """Written once more: FastGen's flow, noise - data, against the slope of a step in its time."""
    torch.manual_seed(0)
    net = _fastgen.DiT(2, 1, 4, 0.0)
    times = [0.999, 0.7, 0.4, 0.2, 0.0]
    config = types.SimpleNamespace(
        net=types.SimpleNamespace(target=lambda: net, kwargs={}),
        device="cpu",
        student_sample_steps=4,
        student_sample_type="ode",
        sample_t_cfg=types.SimpleNamespace(t_list=times),
    )
    kind = type(
        "Other", (fastgen.StraightenModel,), dict(settings=settings, load_student_weights_and_ema=lambda s: None)
    )
    model = kind(config)
    assert dict(model.named_parameters()).keys() == {f"net.{name}" for name, _ in net.named_parameters()}
    states = torch.randn(5, 6, 1, 2, 2)
    data = {"path": states[:4].transpose(0, 1), "real": states[4], "condition": torch.eye(4)[[0, 1, 2, 3, 0, 1]]}
    torch.manual_seed(1)
    losses, outputs = model.single_train_step(data, 1)
    assert outputs["gen_rand"]().shape == (6, 1, 2, 2)

    torch.manual_seed(1)
    ends = torch.tensor(times if steps == 4 else [0.999, 0.0], dtype=torch.float64)
    if steps == 1:
        states = states[[0, 4]]
    i = torch.randint(steps, (6,))
    u = torch.rand(6) if settings.get("t_sampling") == "uniform" else torch.zeros(6)
    h, at = (ends[i] - ends[i + 1]).float().view(-1, 1, 1, 1), u.view(-1, 1, 1, 1)
    begin, end = states[i, torch.arange(6)], states[i + 1, torch.arange(6)]
    flow = net((1 - at) * begin + at * end, ends[i] - u * h.flatten(), condition=data["condition"])
    torch.testing.assert_close(losses["total_loss"], (flow - (begin - end) / h).square().mean(), rtol=1e-4, atol=1e-5)


def test_bad_calls(bank, stand_in, monkeypatch):
    with pytest.raises(ValueError, match=r"schedule: expected one that begins at 0.001 or later: calibrate with grid"):
        t_list(fk.Schedule([0, 0.5, 1]))
    with pytest.raises(TypeError, match=r"schedule: expected a Schedule"):
        t_list([0, 1])
    with pytest.raises(
        ValueError, match=r"condition: expected None, or a name of the bank's conditioning \['w', 'y'\]"
    ):
        PathLoader(bank, batch_size=2, schedule=2, condition="z")
    with pytest.raises(ValueError, match="batch_size"):
        PathLoader(bank, batch_size=0)
    with pytest.raises(ValueError, match=r"sample: expected an index \[B\] of 10 trajectories"):
        bank.trajectories(torch.tensor([10]), 2)

    def model(times, steps, kind="ode"):
        t_cfg = types.SimpleNamespace(t_list=times)
        made = dict(net=types.SimpleNamespace(target=torch.nn.Identity, kwargs={}), device="cpu", sample_t_cfg=t_cfg)
        made |= dict(student_sample_steps=steps, student_sample_type=kind)
        with monkeypatch.context() as m:
            m.setattr(_fastgen.FastGenModel, "load_student_weights_and_ema", lambda self: None)
            return fastgen.StraightenModel(types.SimpleNamespace(**made))

    for given, name in [((None, 4), "t_list"), (([0.9, 0], 2), "t_list"), (([0.9, 0.0], 1, "sde"), "sample_type")]:
        with pytest.raises(ValueError, match=name):
            model(*given)
    data = {"path": torch.zeros(2, 3, 1), "real": torch.zeros(2, 1)}
    with pytest.raises(ValueError, match=r"path: expected \[B, 1, \*shape\]"):
        model([0.9, 0.0], 1).single_train_step(data, 1)


@pytest.mark.parametrize("named", [t_list, PathLoader])
def test_the_docstrings_example(named):
    names = dict(fk=fk, t_list=t_list, PathLoader=PathLoader)
    (example,) = doctest.DocTestFinder(recurse=False).find(named, globs=names)
    out = []
    assert example.examples
    assert not doctest.DocTestRunner().run(example, out=out.append).failed, "".join(out)


def test_without_fastgen(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastgen.methods", None)
    vars(fastgen).pop("StraightenModel", None)
    with pytest.raises(ImportError, match="StraightenModel needs FastGen"):
        _ = fastgen.StraightenModel
    with pytest.raises(AttributeError):
        _ = fastgen.Other
