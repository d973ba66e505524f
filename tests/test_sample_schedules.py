"""A schedule for each sample or condition: found as for that one alone, and sampled as each alone."""

import itertools
import json

import pytest
import torch
from _flows import Counted, ElementwiseField, Turning, normal, uneven_grid

import flowkernels as fk
from flowkernels.calibration.objectives import OBJECTIVES

N, DIM = 7, 3


def tables(n=N, steps=4, seed=5, same_start=True):
    """Times of n schedules: three different ones, in turn; others begin later."""
    inner = 0.05 + 0.9 * torch.rand(3, steps - 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    begin = torch.zeros(3, 1, dtype=torch.float64) if same_start else torch.tensor([[0.0], [0.01], [0.04]]).double()
    rows = torch.cat([begin, inner.sort().values, torch.ones(3, 1, dtype=torch.float64)], 1)
    return rows[torch.arange(n) % 3]


class OfFirst(ElementwiseField):
    """Takes one time for the batch, the first row's, without a word."""

    def forward(self, x, t):
        return super().forward(x, t[:1].expand(len(x)))


class OfMean(ElementwiseField):
    def forward(self, x, t):
        return super().forward(x, t.mean().expand(len(x)))


class Refusing(ElementwiseField):
    """Takes one time for the batch, and says so."""

    def forward(self, x, t):
        if (t != t[0]).any():
            raise ValueError("one time, please")
        return super().forward(x, t)


class Weakly(OfFirst):
    """As OfFirst, and the time matters by a ten-thousandth."""

    def forward(self, x, t):
        return (3 * x).sin() + 1e-4 * super().forward(x, t)


class Pushed(torch.nn.Module):
    def forward(self, x, t, push):
        return (3 * x + push * t.to(x.dtype)[:, None]).sin() * push


def guided(n=N, dtype=torch.float64):
    push = normal(n, DIM, seed=1, dtype=dtype)
    return fk.VelocityField(Pushed(), conditioning={"push": push}, unconditional={"push": -push}, guidance=1.5)


def alone(velocity, noise, plans):
    """Each sample by itself."""
    field = velocity if isinstance(velocity, fk.VelocityBase) else None
    parts = []
    for i, plan in enumerate(plans):
        row = torch.tensor([i])
        parts.append(fk.sample(velocity if field is None else field.rows(row, len(noise)), noise[row], plan))
    return torch.cat(parts)


KINDS = {
    "rows": (ElementwiseField, 4),
    "guided": (guided, None),
    "of the first": (OfFirst, None),
    "of the mean": (OfMean, None),
    "refusing": (Refusing, None),
    "weakly": (Weakly, None),
}


@pytest.mark.parametrize("same_start", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_those_of_each_alone(kind, dtype, same_start):
    make, _ = KINDS[kind]
    velocity = make(dtype=dtype) if kind == "guided" else make()
    noise, plans = normal(N, DIM, dtype=dtype), fk.SampleSchedules(tables(same_start=same_start))
    found = fk.sample(velocity, noise, plans)
    assert found.dtype == dtype
    assert torch.allclose(found, alone(velocity, noise, plans), rtol=1e-12 if dtype == torch.float64 else 1e-5)


def test_a_network_that_takes_times_is_called_once_a_step_for_all():
    velocity = Counted(ElementwiseField())
    fk.sample(velocity, normal(N, DIM), fk.SampleSchedules(tables()))
    calls = velocity.calls
    assert calls == 4 + 4  # the look at two samples alone, each at two times


def test_one_schedule_for_all_is_that_schedule():
    times = torch.tensor([0, 0.3, 0.7, 1], dtype=torch.float64)
    noise, plans = normal(N, DIM), fk.SampleSchedules(times.expand(N, -1))
    assert torch.allclose(fk.sample(Turning().float(), noise, plans), fk.sample(Turning().float(), noise, times))


def test_a_bfloat16_network_of_one_time_is_not_taken_for_one_of_many():
    class Low(OfFirst):
        def forward(self, x, t):
            return super().forward(x.bfloat16(), t)

    noise, plans = normal(N, DIM), fk.SampleSchedules(tables())
    assert torch.equal(fk.sample(Low(), noise, plans), alone(Low(), noise, plans))


@pytest.mark.parametrize("ambient", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu")])
def test_ambient_states_change_nothing(ambient):
    noise, plans = normal(N, DIM), fk.SampleSchedules(tables())
    expected = fk.sample(ElementwiseField(), noise, plans)
    with ambient():
        assert torch.equal(fk.sample(ElementwiseField(), noise, plans), expected)


def test_bad_velocities_are_told_by_sample_and_step():
    class Broken(ElementwiseField):
        def forward(self, x, t):
            return torch.where((t == 0.625)[:, None], torch.nan, super().forward(x, t))

    times = torch.tensor([0, 0.2, 0.4, 1]).repeat(N, 1)
    times[2] = torch.tensor([0, 0.1, 0.625, 1])
    noise = normal(N, DIM)
    with pytest.raises(ValueError, match=r"velocity: .*sample 2 at step 2 \(t = 0.625\)"):
        fk.sample(Broken(), noise, fk.SampleSchedules(times))
    assert fk.sample(Broken(), noise, fk.SampleSchedules(times), check=False)[2].isnan().all()
    noise[1, 0] = torch.inf
    with pytest.raises(ValueError, match=r"noise: .*sample 1"):
        fk.sample(Broken(), noise, fk.SampleSchedules(times))


# ---- finding them ----

OBJECTIVE = pytest.mark.parametrize("objective", ["squared", "norm", "student", "oss"])
CONDITIONS = ["cat", "dog", "cat", "dog", "dog", "owl"]


def calibrated(n=6, forced=(), teacher="euler"):
    velocity, noise, times = Turning(), normal(n, DIM, dtype=torch.float64), uneven_grid(7)
    settings = dict(progress=False, forced_knots=times[list(forced)], teacher_solver=teacher)
    return velocity, noise, lambda x: fk.calibrate(velocity, x, times, max(2, len(forced) + 1), **settings)


def options(objective, velocity):
    return {"velocity": velocity} if objective in ("student", "oss") else {}


def knots_of(plan, objective):
    """Of "oss" from the first evaluation's knot on, which its solver has in its notes."""
    if objective != "oss":
        return plan.times
    return torch.cat([plan.model_times, plan.times[-1:]])


@pytest.mark.parametrize("teacher", ["euler", "heun"])
@pytest.mark.parametrize("forced", [(), (2, 5)], ids=str)
@pytest.mark.parametrize("each", [True, CONDITIONS], ids=["samples", "conditions"])
@OBJECTIVE
def test_each_is_what_a_calibration_of_its_samples_alone_finds(objective, each, forced, teacher):
    velocity, noise, calibrate = calibrated(forced=forced, teacher=teacher)
    steps = [3, 4]
    found = calibrate(noise).find(steps, objective=objective, each=each, **options(objective, velocity))
    names = range(len(noise)) if each is True else dict.fromkeys(CONDITIONS)
    for row, name in enumerate(names):
        mine = [row] if each is True else [i for i, of in enumerate(CONDITIONS) if of == name]
        own = calibrate(noise[mine]).find(steps, objective=objective, **options(objective, velocity))
        for n in steps:
            plans, plan = found[n], own[n]
            assert torch.equal(plans[name].times, knots_of(plan, objective))
            cost = plan.cost if isinstance(plan, fk.Schedule) else plan.notes["cost"]
            assert plans.cost[row].item() == pytest.approx(cost, rel=1e-9)


def test_no_path_of_a_small_grid_costs_a_sample_less():
    _, noise, calibrate = calibrated()
    cal = calibrate(noise)
    plans, t, x, v = cal.find(3, each=True)[3], cal.times, cal.kept.x, cal.kept.v
    for i, plan in enumerate(plans):
        costs = {}
        for inner in itertools.combinations(range(1, 7), 2):
            path = (0, *inner, 7)
            errors = (x[k, i] - x[j, i] - (t[k] - t[j]) * v[j, i] for j, k in itertools.pairwise(path))
            costs[path] = sum(e.square().sum().item() for e in errors)
        best = min(costs, key=costs.get)
        assert torch.equal(plan.times, t[list(best)])
        assert plans.cost[i].item() == pytest.approx(costs[best])
        shared = tuple((t[:, None] == cal[3].times if 3 in cal else t[:, None] == plans.shared.times).nonzero()[:, 0])
        assert plans.shared_cost[i].item() == pytest.approx(costs[tuple(map(int, shared))])
    assert plans.ratio == pytest.approx((plans.cost.sum() / plans.shared_cost.sum()).item())
    assert plans.ratio < 1


def test_a_schedule_of_each_is_not_added_to_the_calibrations():
    _, noise, calibrate = calibrated()
    cal = calibrate(noise)
    before = dict(cal.schedules)
    cal.find(3, each=True)
    assert cal.schedules == before


def test_a_batch_of_conditions():
    velocity, noise, calibrate = calibrated()
    plans = calibrate(noise).find(3, each=CONDITIONS)[3]
    assert plans.names == ("cat", "dog", "owl")
    batch = plans.of(["owl", "cat", "owl"])
    assert torch.equal(batch.times, plans.times[[2, 0, 2]])
    groups = batch.groups()
    assert sorted(i for _, rows in groups for i in rows.tolist()) == [0, 1, 2]
    assert all(torch.equal(batch.times[i], plan.times) for plan, rows in groups for i in rows)
    assert len(groups) == len({plan for plan, _ in groups})
    x = normal(3, DIM, dtype=torch.float64)
    together = fk.sample(velocity, x, batch)
    for plan, rows in groups:
        assert torch.allclose(together[rows], fk.sample(velocity, x[rows], plan))
    labels = torch.tensor([3, 1, 3, 1, 1, 7])
    by_label = calibrate(noise).find(3, each=labels)[3]
    assert by_label.names == (3, 1, 7)
    assert torch.equal(by_label.of(labels[:2]).times, plans.of(["cat", "dog"]).times)


def test_they_are_kept_as_json():
    _, noise, calibrate = calibrated()
    plans = calibrate(noise).find(3, each=CONDITIONS)[3]
    again = fk.SampleSchedules.from_dict(json.loads(json.dumps(plans.to_dict())))
    for name in ("times", "cost", "shared_cost"):
        assert torch.equal(getattr(again, name), getattr(plans, name))
    assert (again.names, again.notes, again.ratio) == (plans.names, plans.notes, plans.ratio)
    assert torch.equal(again.shared.times, plans.shared.times)
    assert repr(again) == repr(plans)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda cal, v: cal.find(2, each=["a"] * 5), r"each: .* 6 kept samples.*got 5"),
        (lambda cal, v: cal.find(2, each=3), "each: .*sequence of texts or integers.*3"),
        (lambda cal, v: cal.find(2, each=[0.5] * 6), "each: .*0.5"),
        (lambda cal, v: cal.find(2, objective="pairs", each=True), r"objective: .*'oss'.*got pairs"),
        (lambda cal, v: cal.find(2, each=True, groups=1), r"options: .*groups"),
        (
            lambda cal, v: cal.find(2, objective="oss", velocity=v, each=CONDITIONS, samples=5),
            r"samples: .*without one of \['owl'\]",
        ),
        (lambda cal, v: cal.find(2, each=CONDITIONS)[2].of(["cat", "cow"]), r"names: .*, got 'cow'$"),
        (lambda cal, v: cal.find(2, each=True)[2].of([0, 6]), r"names: .*rows, 0 to 5, got 6$"),
        (
            lambda cal, v: fk.sample(v, normal(3, DIM), cal.find(2, each=CONDITIONS)[2]),  # of three conditions
            r"schedule: .*3 rows.*`of` picks them by names.*got SampleSchedules\(3 conditions",
        ),
        (
            lambda cal, v: fk.sample(v, normal(3, DIM), cal.find(2, each=CONDITIONS)[2].of(["cat"])),
            r"schedule: .*3 rows",
        ),
        (
            lambda cal, v: fk.sample(v, normal(6, DIM), cal.find(2, each=True)[2], capture="compile"),
            "capture: .*each sample",
        ),
        (lambda cal, v: fk.invert(v, normal(6, DIM), cal.find(2, each=True)[2]), "schedule: "),
        (lambda cal, v: fk.rollout(v, normal(6, DIM), cal.find(2, each=True)[2]), "grid: "),
        (lambda cal, v: fk.export(cal.find(2, each=True)[2], "json"), "plan: "),
    ],
)
def test_what_is_refused(call, match):
    velocity, noise, calibrate = calibrated()
    with pytest.raises((ValueError, TypeError), match=match):
        call(calibrate(noise), velocity)


def test_a_fused_sampler_is_refused():
    net = torch.nn.Sequential(torch.nn.Linear(DIM + 1, 8), torch.nn.SiLU(), torch.nn.Linear(8, DIM))
    with pytest.raises(ValueError, match=r"velocity: .*FusedSampler"):
        fk.sample(fk.fuse(net, 4), normal(N, DIM), fk.SampleSchedules(tables()))


def test_a_file_without_samples_is_refused(tmp_path):
    _, noise, calibrate = calibrated()
    calibrate(noise).save(tmp_path / "a.json")
    with pytest.raises(ValueError, match=r"each: .*keeps samples"):
        fk.Calibration.load(tmp_path / "a.json").find(2, each=True)


def test_all_objectives_say_whether_they_have_each():
    velocity, noise, calibrate = calibrated()
    cal = calibrate(noise)
    for objective in OBJECTIVES:
        call = lambda objective=objective: cal.find(  # noqa: E731
            2, objective=objective, each=True, **options(objective, velocity)
        )
        if objective in ("squared", "norm", "student", "oss"):
            assert isinstance(call()[2], fk.SampleSchedules)
        else:
            with pytest.raises(ValueError, match="objective: "):
                call()
