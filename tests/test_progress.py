"""Calibrations that are interrupted and go on from their file, and those of parts of the noise, merged."""

import contextlib
import functools
import warnings

import pytest
import torch
from _flows import normal
from torch import nn

import flowkernels as fk
from flowkernels.cli.main import main


class Stopped(Exception):
    pass


class Net(nn.Module):
    """Raises once it has been called as often as it may."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.linear = nn.Linear(5, 4, dtype=dtype)
        nn.init.normal_(self.linear.weight, generator=torch.Generator().manual_seed(1))
        nn.init.zeros_(self.linear.bias)
        self.eval()

    def forward(self, x, t):
        Net.left -= 1
        if Net.left < 0:
            raise Net.error
        return torch.tanh(self.linear(torch.cat([x, t[:, None]], 1)))


@pytest.fixture(autouse=True)
def _budget():
    Net.left, Net.error = 10**9, Stopped


def contents(cal):
    tables = [getattr(cal, k) for k in ("times", "cost", "gram", "norm_cost")]
    kept = [] if cal.kept is None else [cal.kept.x, cal.kept.v]
    solvers = {N: s.to_dict() for N, s in cal.solvers.items()}
    intervals = {N: s.cost_interval for N, s in cal.items()}
    of_rows = cal.sample_costs.grams, cal.sample_costs.sizes
    plain = [dict(cal), solvers, cal.verified, intervals, {**cal.provenance, "attributes_sha256": None}]
    return [t.tolist() for t in (*tables, *kept, *of_rows) if t is not None], plain


SETTINGS = {
    "whole": dict(effort="fit", verify_noise=normal(17, 4, seed=9, dtype=torch.float64)),
    "some kept": dict(effort="fit", keep_bytes=21 * 4 * 8 * 11),
    "none kept": dict(keep_bytes=0, verify_noise=normal(5, 4, seed=9, dtype=torch.float64)),
    "until stable": dict(max_regret=0.5),
    "all used": dict(max_regret=1e-9),
    "float32": dict(effort="fit", dtype=torch.float32),
}


@pytest.mark.filterwarnings("ignore:(verify_noise|fit_solver)")
@pytest.mark.parametrize(("name", "error"), list(zip(SETTINGS, [Stopped, KeyboardInterrupt] * 3, strict=True)))
def test_interrupted_again_and_again_it_ends_as_the_uninterrupted(name, error, tmp_path):
    settings = dict(SETTINGS[name])
    dtype = settings.pop("dtype", torch.float64)
    net, noise = Net(dtype), normal(40, 4, dtype=dtype)
    settings = dict(grid=10, steps=[2, 3], chunk=8, progress=False) | settings
    whole, calls = fk.calibrate(net, noise, **settings), 10**9 - Net.left
    budget, path, total, tries = 33, tmp_path / "calibrating.safetensors", 0, 0
    Net.error, cal = error, None
    while cal is None:
        Net.left, tries = budget, tries + 1
        with contextlib.suppress(error):
            cal = fk.calibrate(net, noise, **settings, checkpoint=path)
        total += min(budget, budget - Net.left)
    assert contents(cal) == contents(whole)
    assert tries > 1
    assert total < 2 * calls  # what a part had done is done again, and no more
    Net.left = 0  # of a calibration that is done, nothing is evaluated
    assert contents(fk.calibrate(net, noise, **settings, checkpoint=path)) == contents(whole)


@pytest.mark.parametrize("evaluations", range(0, 31, 3))
def test_one_interruption_anywhere(evaluations, tmp_path):
    net, noise, path = Net(), normal(6, 4, dtype=torch.float64), tmp_path / "c"
    settings = dict(grid=6, steps=[2], chunk=2, effort="fit", progress=False)
    whole = fk.calibrate(net, noise, **settings)
    Net.left = evaluations
    try:
        fk.calibrate(net, noise, **settings, checkpoint=path)
    except Stopped:
        assert path.exists() == (evaluations >= 6)
    Net.left = 10**9
    assert contents(fk.calibrate(net, noise, **settings, checkpoint=path)) == contents(whole)


def begun(path, net=None, **settings):
    settings = dict(grid=6, steps=[2], chunk=2, progress=False) | settings
    net = Net() if net is None else net
    noise = settings.pop("noise", normal(6, 4, dtype=torch.float64))
    with settings.pop("within", contextlib.nullcontext()):
        return fk.calibrate(net, noise, checkpoint=path, **settings)


def weighted(weight, cond, uncond, t):
    return cond


class Labelled(Net):
    def forward(self, x, t, y):
        return super().forward(x, t)


def other_weights():
    net = Net()
    net.linear.weight.data[0, 0] += 1
    return net


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (dict(noise=normal(6, 4, seed=3, dtype=torch.float64)), "noise_sha256"),
        (dict(noise=normal(7, 4, dtype=torch.float64)), "n = 7"),
        (dict(grid=7), "K = 7"),
        (dict(grid=[0, 0.1, 0.2, 0.5, 0.6, 0.7, 1]), "times"),
        (dict(chunk=3), "chunk = 3"),
        (dict(keep_bytes=0), "kept = 0"),
        (dict(max_regret=0.1), "max_regret = 0.1"),
        (dict(net=other_weights()), "parameters_sha256"),
        (dict(within=torch.autocast("cpu", torch.bfloat16)), "autocast = 'torch.bfloat16'"),
        (dict(net=fk.VelocityField(Net(), time_scale=1000.0)), "convention"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_of_another_calibration_is_refused(change, key, tmp_path):
    path = tmp_path / "c"
    begun(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"^checkpoint: expected one of this calibration .*{key}.*{path}"):
        begun(path, **change)
    assert path.read_bytes() == before
    begun(path, **change, resume=False)
    assert path.read_bytes() != before


def test_other_steps_and_a_fit_go_on_from_the_same_rollout(tmp_path):
    begun(tmp_path / "c")
    Net.left = 1 + 1 + 2 * 2  # what fits of 2 and 3 steps may take: N - 1 and their held-out comparisons
    with pytest.raises(Stopped):
        begun(tmp_path / "c", steps=[1, 2, 3], effort="fit")
    Net.left = 10**9
    cal = begun(tmp_path / "c", steps=[1, 2, 3], effort="fit")
    assert contents(cal) == contents(begun(None, steps=[1, 2, 3], effort="fit"))
    for forced in ([1 / 6], [], [0.5]):  # which a solver of before does not have, or has needlessly
        settings = dict(steps=[2, 3], effort="fit", forced_knots=forced, grid=6)
        assert contents(begun(tmp_path / "c", **settings)) == contents(begun(None, **settings))


def test_what_has_no_hash_and_what_was_edited_is_said(tmp_path):
    begun(tmp_path / "f", lambda x, t: -x)
    with pytest.warns(UserWarning, match="checkpoint: expected the velocity that .* got one that has no hash"):
        begun(tmp_path / "f", lambda x, t: -x)
    one = dict(
        conditioning={"y": 1}, packed=False, unconditional={"y": 0}, guidance=functools.partial(weighted, object())
    )
    for missing, settings in (("guidance", {}), ("conditioning.y, guidance", dict(conditioning={"y": object()}))):
        begun(path := tmp_path / missing, fk.VelocityField(Labelled(), **one | settings))
        with pytest.warns(UserWarning, match=f"got one with no hash of {missing}$") as told:
            begun(path, fk.VelocityField(Labelled(), **one | settings))
        assert told[0].filename == __file__
    begun(tmp_path / "n")
    scaled, hooked, replaced = Net(), Net(), Net()
    scaled.scale = 2.0
    hooked.register_forward_hook(lambda module, args, out: 2 * out)
    replaced.forward = lambda x, t: -x
    for net in (scaled, hooked, replaced):
        with pytest.warns(UserWarning, match="got other attributes of its modules"):
            begun(tmp_path / "n", net)
        begun(tmp_path / "n", resume=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        begun(tmp_path / "n")


def test_a_file_that_cannot_be_written_costs_a_warning_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("flowkernels._weights.write", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.warns(UserWarning, match="checkpoint: .* could not be written .OSError: disk full.; the calibration"):
        cal = begun(tmp_path / "c")
    monkeypatch.undo()
    assert contents(cal) == contents(begun(None))


# Parts, merged


@pytest.mark.parametrize("sizes", [[60], [20, 20, 20], [1, 57, 2], [5] * 12], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_parts_merged_are_one_calibration(sizes, dtype):
    net, noise = Net(dtype), normal(60, 4, dtype=dtype)
    settings = dict(grid=20, steps=[2, 3, 7], progress=False)
    whole = fk.calibrate(net, noise, **settings)
    merged = fk.Calibration.merge(fk.calibrate(net, part, **settings) for part in noise.split(sizes))
    exact = dict(rtol=1e-12, atol=0) if dtype == torch.float64 else dict(rtol=1e-5, atol=0)
    pairs = torch.ones(21, 21, dtype=torch.bool).triu(2)
    for name in ("cost", "norm_cost"):
        assert torch.allclose(getattr(merged, name)[pairs], getattr(whole, name)[pairs], **exact)
    assert [s.indices for s in merged.values()] == [s.indices for s in whole.values()]
    assert merged.provenance["n"] == merged.sample_costs.count == 60
    for N, schedule in merged.items():  # the scatter of other groups of the same samples
        ends = zip(schedule.cost_interval, whole[N].cost_interval, strict=True)
        assert all(0.8 < a / b < 1.25 for a, b in ends)
    if dtype == torch.float64:
        assert torch.allclose(merged.kept.x, whole.kept.x, rtol=1e-12, atol=1e-12)
        solvers = [fk.fit_solver(net, cal, 3) for cal in (merged, whole)]
        assert torch.allclose(solvers[0].coefficients, solvers[1].coefficients, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("effort", ["schedule", "fit", "best"])
def test_parts_from_files_are_merged_and_saved(effort, tmp_path):
    net, noise = Net(), normal(60, 4, dtype=torch.float64)
    budgets = [dict(evaluations=900 + 100 * i) if effort == "best" else {} for i in range(3)]
    parts = [
        fk.calibrate(net, part, 20, [2, 3], effort=effort, progress=False, **budget)
        for part, budget in zip(noise.split(20), budgets, strict=True)
    ]
    for i, part in enumerate(parts):
        part.save(tmp_path / f"{i}.boss.json")
    merged = fk.Calibration.merge([fk.Calibration.load(tmp_path / f"{i}.boss.json") for i in range(3)])
    assert torch.equal(merged.cost, fk.Calibration.merge(parts).cost)
    merged.save(tmp_path / "merged.boss.json")
    again = fk.Calibration.load(tmp_path / "merged.boss.json", net)
    assert [s.indices for s in again.values()] == [s.indices for s in merged.values()]
    assert [part["n"] for part in again.provenance["parts"]] == [20, 20, 20]
    assert [part.get("effort") for part in again.provenance["parts"]] == [p.provenance.get("effort") for p in parts]
    assert again.provenance.get("effort") is None


def test_kept_trajectories_end_where_a_part_has_dropped_some():
    """What is evaluated on them has the rows of the first samples of all."""
    net, noise = Net(), normal(30, 4, dtype=torch.float64)
    keeps = [1 << 20, 21 * 4 * 8 * 4, 1 << 20]
    parts = [
        fk.calibrate(net, part, 10, [2], keep_bytes=keep, progress=False)
        for part, keep in zip(noise.split(10), keeps, strict=True)
    ]
    assert [part.kept.x.shape[1] for part in parts] == [10, 4, 10]
    assert torch.equal(fk.Calibration.merge(parts).kept.x[0], noise[:14])


def small(seed=0, net=None, **settings):
    return fk.calibrate(net or Net(), normal(4, 4, seed=seed, dtype=torch.float64), progress=False, **settings)


def merged(*seeds):
    return fk.Calibration.merge([small(seed) for seed in seeds])


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        (lambda: [], "some Calibrations"),
        (lambda: ["a.boss.json"], "some Calibrations, of files what Calibration.load makes of each"),
        (lambda: [small(grid=10), small(1, grid=12)], "the same K in all"),
        (lambda: [small(grid=2, steps=2), small(1, grid=[0, 0.3, 1], steps=2)], "one grid"),
        (lambda: [small(), small(1), small()], "other noise in each, got numbers 0 and 2"),
        (lambda: [merged(0, 1), small(2), merged(3, 1)], "other noise in each, got numbers 0 and 2"),
        (lambda: [small(), small(1, other_weights())], "the same parameters_sha256"),
        (lambda: [small(), small(1, fk.VelocityField(Net(), time_scale=2.0))], "the same convention"),
        (lambda: [small(forced_knots=[0.5], steps=2), small(1, steps=2)], "the same forced knots"),
    ],
)
def test_parts_that_do_not_belong_together(parts, said):
    with pytest.raises((ValueError, TypeError), match=f"^calibrations: expected {said}"):
        fk.Calibration.merge(parts())


def test_the_command_line_goes_on_and_merges(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def calibrate(*more):
        words = "calibrate --model digits --grid 8 --steps 2,4 -n 8 --chunk 4 --out c.boss.json"
        return main([*words.split(), *more])

    assert calibrate("--state", "s", "--seed", "1") == 0
    first = fk.Calibration.load("c.boss.json")
    assert calibrate("--state", "s", "--seed", "1") == 2
    assert "--resume goes on" in capsys.readouterr().err
    assert calibrate("--state", "s", "--seed", "2", "--resume") == 2
    assert "--state: expected one of this calibration (noise_sha256" in capsys.readouterr().err
    assert calibrate("--state", "s", "--seed", "1", "--resume") == 0
    assert torch.equal(fk.Calibration.load("c.boss.json").cost, first.cost)
    (tmp_path / "c.boss.json").rename("1.boss.json")
    assert calibrate() == 0
    assert main(["merge", "1.boss.json", "c.boss.json", "--out", "m.boss.json"]) == 0
    assert "2 schedules from 16 noises of 2 files" in capsys.readouterr().out
    assert main(["merge", "1.boss.json", "1.boss.json", "--out", "m.boss.json"]) == 2
    assert "FILE: expected other noise in each" in capsys.readouterr().err
    assert main(["merge", "1.boss.json", "c.boss.json", "--out", "c.boss.json"]) == 2
