"""Schedules as the code of their authors found them: run on `Turning` from normal(6, 3) in float64, grids as here."""

import pytest
import torch
from _flows import Turning, even_grid, normal, uneven_grid

import flowkernels as fk

QUIET = dict(progress=False)

# what the cost matrix and `find_minimum_cost_path` of github.com/nguyenngocbaocmt02/BOSS (ImageGeneration/sampling.py,
# commit 0c170f9) gave, and the costs of its paths
BOSS = {
    "uneven": (
        uneven_grid(7),
        [[0, 7], [0, 4, 7], [0, 3, 5, 7], [0, 2, 4, 5, 7], [0, 1, 3, 4, 5, 7], [0, 1, 3, 4, 5, 6, 7]],
        [2.833235703827706, 0.5522919935346822, 0.14887403870665344, 0.04411178087828838, 0.01938400017498069,
         0.0058110006543634326],
    ),
    "even": (
        even_grid(12),
        [[0, 12], [0, 9, 12], [0, 6, 9, 12], [0, 5, 8, 10, 12], [0, 3, 6, 8, 10, 12], [0, 2, 4, 6, 8, 10, 12],
         [0, 2, 4, 6, 8, 10, 11, 12], [0, 2, 4, 6, 8, 9, 10, 11, 12]],
        [3.776808474623259, 0.7355226268668099, 0.2926280375987078, 0.13302989026590867, 0.0459830476019926,
         0.031218897283328044, 0.019107952413453828, 0.008207621736298227],
    ),
}  # fmt: skip


@pytest.mark.parametrize("grid", BOSS)
def test_boss_is_its_authors(grid):
    times, knots, costs = BOSS[grid]
    cal = fk.calibrate(Turning(), normal(6, 3, dtype=torch.float64), times, range(1, len(knots) + 1), **QUIET)
    assert [list(plan.indices) for plan in cal.schedules.values()] == knots
    assert [plan.cost for plan in cal.schedules.values()] == pytest.approx(costs, rel=1e-9)


# what `get_dp_list` of github.com/zju-pi/diff-sampler, gits-main (commit 68d5ce4), gave for `Turning` on an even grid
# of 12 steps from normal(6, 3), its Euler teacher's times being 1 - t and its denoiser x + (1 - t) v; and its
# `cost_mat` from the noise to the end
GITS = {
    "dev": (0.9892837056387864,
            [[0, 12], [0, 8, 12], [0, 7, 9, 12], [0, 7, 9, 11, 12], [0, 6, 8, 10, 11, 12], [0, 6, 8, 9, 10, 11, 12],
             [0, 5, 7, 8, 9, 10, 11, 12], [0, 5, 6, 7, 8, 9, 10, 11, 12]]),
    "l1": (3.0975593206826315,
           [[0, 12], [0, 9, 12], [0, 8, 10, 12], [0, 8, 10, 11, 12], [0, 7, 9, 10, 11, 12], [0, 3, 7, 9, 10, 11, 12],
            [0, 3, 6, 8, 9, 10, 11, 12], [0, 3, 6, 7, 8, 9, 10, 11, 12]]),
    "l2": (1.916694851250148,
           [[0, 12], [0, 9, 12], [0, 8, 10, 12], [0, 7, 9, 11, 12], [0, 7, 9, 10, 11, 12], [0, 3, 7, 9, 10, 11, 12],
            [0, 3, 6, 8, 9, 10, 11, 12], [0, 3, 6, 7, 8, 9, 10, 11, 12]]),
}  # fmt: skip


@pytest.mark.parametrize("metric", GITS)
def test_gits_is_its_authors(metric):
    cal = fk.calibrate(Turning(), normal(6, 3, dtype=torch.float64), 12, 2, **QUIET)
    whole, knots = GITS[metric]
    plans = cal.find(range(1, 9), objective="gits", metric=metric)
    assert [list(plan.indices) for plan in plans.values()] == knots
    assert plans[1].cost == pytest.approx(whole, rel=1e-9)
    if metric == "dev":  # their defaults
        assert cal.find(range(1, 9), objective="gits") == plans


# what `search_OSS` of github.com/bebebe666/OptimalSteps (commit ee35043) gave for `Turning` on these grids from
# normal(6, 3), all samples as the channels of one image, its indices counted from the noise; and the errors of
# `infer_OSS` on them
OSS = {
    "uneven": (
        uneven_grid(7),
        [[4], [1, 4], [1, 4, 5], [0, 2, 4, 5], [0, 1, 3, 4, 5], [0, 1, 3, 4, 5, 6]],
        [1.152637508763223, 0.4025295307741658, 0.18862716200248317, 0.11070750707254547, 0.03856967087990557,
         0.00787576427672348],
    ),
    "even": (
        even_grid(12),
        [[8], [3, 9], [2, 7, 10], [2, 6, 9, 11], [1, 4, 6, 8, 10], [1, 4, 6, 8, 10, 11], [1, 4, 6, 8, 9, 10, 11],
         [0, 2, 4, 6, 8, 9, 10, 11]],
        [1.4862455447553886, 0.6592206392528983, 0.2929328968639871, 0.17047612402061987, 0.08539886657490685,
         0.0411760481393481, 0.025108242035531733, 0.022838953081857623],
    ),
}  # fmt: skip


@pytest.mark.parametrize("grid", OSS)
def test_oss_is_its_authors(grid):
    times, paths, ends = OSS[grid]
    cal = fk.calibrate(Turning(), normal(6, 3, dtype=torch.float64), times, 2, **QUIET)
    plans = cal.find(range(1, len(paths) + 1), objective="oss", velocity=Turning())
    assert [plan.notes["evaluated"] for plan in plans.values()] == paths
    assert [plan.notes["cost"] for plan in plans.values()] == pytest.approx(ends, rel=1e-9)
