"""fk.plot: what its panels show is what the calibration holds; stock schedules are those of their sources."""

import warnings

import numpy as np
import pytest
import torch
from _flows import linear_field, normal

import flowkernels as fk
from flowkernels.calibration.figure import stock_sigmas
from flowkernels.cli.main import main


def calibration(**options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fk.calibrate(linear_field(), normal(24, 4), 13, [1, 2, 4, 8], progress=False, **options)


def lines(ax):
    return {line.get_label(): line.get_ydata() for line in ax.get_lines()}


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 50])
def test_stock_schedules_by_their_sources(steps):
    from diffusers import FlowMatchEulerDiscreteScheduler

    found = stock_sigmas(steps)
    u = np.linspace(1, 0, steps + 1)[:-1]
    sd3 = FlowMatchEulerDiscreteScheduler(shift=3.0)
    sd3.set_timesteps(sigmas=u.tolist())
    np.testing.assert_allclose(found["shift 3 (SD3)"], sd3.sigmas, atol=1e-6)
    if steps > 1:  # the one parabola from the line's end, with its slope, to 1; diffusers' Mochi has the same numbers
        t, half = 1 - found["linear-quadratic"], steps // 2
        np.testing.assert_allclose(t[: half + 1], np.linspace(0, 0.025, half + 1), atol=1e-12)
        steeper = np.diff(t[half - 1 :], 2)  # half of what it is within the parabola, at its beginning
        np.testing.assert_allclose(steeper, [steeper[0], *[2 * steeper[0]] * (len(steeper) - 1)], atol=1e-12)
    ratio = np.tan(u[1:] * np.pi / 2)
    np.testing.assert_allclose(found["cosine"][1:-1], ratio / (1 + ratio), atol=1e-12)
    for sigmas in found.values():
        assert (sigmas[0], sigmas[-1]) == pytest.approx((1, 0))
        assert (np.diff(sigmas) < 0).all()


@pytest.mark.parametrize("verified", [True, False])
def test_panels_show_what_the_calibration_holds(verified, tmp_path):
    of_heun = dict(teacher_solver="heun", teacher_error=4, effort="fit", verify_noise=normal(8, 4, seed=1))
    cal = calibration(**of_heun) if verified else calibration()
    figure = fk.plot(cal, tmp_path / "a.png", steps=2)
    sigmas, costs, errors = figure.axes[:3]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    shown = lines(sigmas)
    np.testing.assert_array_equal(shown["Bellman"], cal[2].sigmas)
    np.testing.assert_array_equal(shown["uniform"], [1, 0.5, 0])
    assert set(stock_sigmas(2)) < set(shown)
    mesh = costs.collections[0].get_array()
    assert mesh.compressed().sum() == pytest.approx(cal.cost[cal.cost.isfinite()].sum().item())
    np.testing.assert_array_equal(lines(costs)["Bellman, N = 2"], np.repeat(cal[2].times.numpy(), 2)[1:])
    bars = {c.get_label(): c for c in errors.containers}
    mean = {n: (cal.verified[n]["bellman"], cal.verified_interval[n]["bellman"]) for n in cal} if verified else {
        n: (s.cost, s.cost_interval) for n, s in cal.items()}  # fmt: skip
    np.testing.assert_allclose(bars["Bellman"][0].get_ydata(orig=False), [m for m, _ in mean.values()])
    ends = [segment[:, 1] for segment in bars["Bellman"][2][0].get_segments()]
    np.testing.assert_allclose(ends, [e for _, e in mean.values()])
    assert ("solver" in bars) == verified
    own = [cal.teacher_error.error] * 2 if verified else None
    assert lines(errors).get("the teacher's own error") == own


def test_what_was_tried_is_shown_where_nothing_was_verified():
    cal = calibration(effort="fit", teacher_error=4)
    axes = fk.plot(cal).axes[2]
    bars = {c.get_label(): c[0].get_ydata(orig=False) for c in axes.containers}
    best = [cal.tried[n][0].error for n in sorted(cal.tried)]
    uniform = [c.error for n in sorted(cal.tried) for c in cal.tried[n] if c.name == "uniform"]
    np.testing.assert_allclose(bars["the best of what was tried"], best)
    np.testing.assert_allclose(bars["uniform"], uniform)
    assert axes.get_title("left").startswith("Error by cross-validation")
    assert "the teacher's own error" in lines(axes)


def test_odd_calibrations_are_drawn(tmp_path):
    """Of no costs, of one N, with forced knots and a late start, of more steps than are labelled."""
    still = fk.calibrate(lambda x, t: 0 * x, normal(4, 3), 6, [3], progress=False)
    grid = torch.linspace(0.1, 1, 31, dtype=torch.float64)
    late = fk.calibrate(linear_field(), normal(4, 4), grid, [20], forced_knots=[0.4], progress=False)
    for name, cal in {"a.svg": still, "b.pdf": late}.items():
        fk.plot(cal, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000
    assert any(label.startswith("forced knot, 0.6") for label in lines(fk.plot(late).axes[0]))
    empty = fk.Calibration(still.times, still.cost, {})
    for call, message in {
        (lambda: fk.plot(empty)): "calibration: expected a calibration with a schedule",
        (lambda: fk.plot(late, steps=4)): r"steps: expected one of \[20\], got 4",
        (lambda: fk.plot(late, tmp_path / "a.gif")): "path: expected a file name ending in .png or .svg or .pdf",
    }.items():
        with pytest.raises(ValueError, match=f"^{message}"):
            call()


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    calibration().save("m.boss.json")
    assert main(["plot", "m.boss.json", "--out", "p.svg", "--steps", "8"]) == 0
    assert "Sigmas of N = 8" in (tmp_path / "p.svg").read_text()
    for line, message in {
        "m.boss.json --out p.gif": "--out: expected a file name ending in .png",
        "m.boss.json --out p.png --steps 3": "--steps: expected one of",
        "none --out p.png": "FILE: expected a file, got none",
    }.items():
        assert main(["plot", *line.split()]) == 2
        assert message in capsys.readouterr().err
