"""A teacher whose steps are not Euler's: by plain loops in float64, from the methods' textbooks."""

import itertools
import json

import pytest
import torch

import flowkernels as fk
from flowkernels.cli.main import main

K, F64 = 6, torch.float64


def velocity(x, t):
    """Curved, of each feature in its own way, and nowhere a polynomial."""
    s = t.to(x.dtype)[:, None]
    return torch.cos(3 * s) * x.roll(1, 1) - 0.7 * x * x.tanh() + torch.sin(5 * s)


def v_at(x, t):
    return velocity(x, torch.full((len(x),), t, dtype=F64))


def noise(n=24, seed=0, dtype=F64):
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


GRIDS = {"uniform": [i / K for i in range(K + 1)], "late": [0.2, 0.3, 0.35, 0.5, 0.7, 0.9, 1.0]}
FORCED = {"uniform": (), "late": (0.5,)}


# ---- the methods, one step after the other ----


def heun(t, forced=(), last="midpoint"):
    def states(x):
        found = [x]
        for i, h in enumerate(b - a for a, b in itertools.pairwise(t)):
            v, end = v_at(x, t[i]), t[i + 1]
            if end == 1.0 and last == "euler":
                x = x + h * v
            elif end == 1.0 or end in forced:
                x = x + h * v_at(x + h / 2 * v, t[i] + h / 2)
            else:
                x = x + h / 2 * (v + v_at(x + h * v, end))
            found.append(x)
        return found

    return states


def adams_bashforth_2(t):
    def states(x):
        found, before = [x], None
        for i, h in enumerate(b - a for a, b in itertools.pairwise(t)):
            v = v_at(x, t[i])
            slope = 0 if before is None else (v - before) / (t[i] - t[i - 1])
            x, before = x + h * v + h**2 / 2 * slope, v
            found.append(x)
        return found

    return states


def runge_kutta_4(t):
    def states(x):
        found = [x]
        for i, h in enumerate(b - a for a, b in itertools.pairwise(t)):
            k1 = v_at(x, t[i])
            k2 = v_at(x + h / 2 * k1, t[i] + h / 2)
            k3 = v_at(x + h / 2 * k2, t[i] + h / 2)
            k4 = v_at(x + h * k3, t[i + 1])
            x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
            found.append(x)
        return found

    return states


def euler_at_other_times(t, at):
    def states(x):
        found = [x]
        for i, h in enumerate(b - a for a, b in itertools.pairwise(t)):
            x = x + h * v_at(x, at[i])
            found.append(x)
        return found

    return states


def runge_kutta_4_solver(t):
    N, b, at, done = len(t) - 1, [], [], []
    for i, h in enumerate(b - a for a, b in itertools.pairwise(t)):
        for shares, c in (([], 0), ([0.5], 0.5), ([0, 0.5], 0.5), ([0, 0, 1], 1)):
            if shares:
                b.append(done + [h * share for share in shares])
            at.append(t[i] + c * h)
        done = [*done, h / 6, h / 3, h / 3, h / 6]
        b.append(done)
    M = 4 * N
    return fk.Solver(t, at, [row + [0.0] * (M - len(row)) for row in b], "runge-kutta 4")


def teachers(kind):
    """{name: (teacher_solver, its states by a loop, evaluations of a sample)} on a grid."""
    t, forced = GRIDS[kind], FORCED[kind]
    middle = [(a + b) / 2 for a, b in itertools.pairwise(t)]
    return {
        "heun": ("heun", heun(t, forced), 2 * K),
        "heun to the end": (fk.Solver.heun(t), heun(t, last="euler"), 2 * K - 1),
        "adams-bashforth": (fk.Solver.adams_bashforth(t, 2), adams_bashforth_2(t), K),
        "runge-kutta": (runge_kutta_4_solver(t), runge_kutta_4(t), 4 * K),
        "other times": (fk.Solver.euler(t, model_times=middle), euler_at_other_times(t, middle), 2 * K),
    }


NAMES = list(teachers("uniform"))


class Counted:
    def __init__(self):
        self.samples = 0

    def __call__(self, x, t):
        self.samples += len(x)
        return velocity(x, t)


def calibrated(name, kind="uniform", x=None, of=velocity, **options):
    given = {"forced_knots": FORCED[kind], "steps": [2, 3], "progress": False} | options
    return fk.calibrate(of, noise() if x is None else x, GRIDS[kind], teacher_solver=teachers(kind)[name][0], **given)


def true_errors(states, t, x):
    """|x_k - x_j - (t_k - t_j) v_j|^2 of each sample, `[K+1, K+1, n]`, Inf where k <= j."""
    found = torch.full((K + 1, K + 1, len(x)), torch.inf, dtype=F64)
    known = states(x)
    for j, k in itertools.combinations(range(K + 1), 2):
        found[j, k] = (known[k] - known[j] - (t[k] - t[j]) * v_at(known[j], t[j])).square().sum(1)
    return found


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_measured(name, kind):
    """States, velocities, costs of all steps, of squares and of norms, and the schedules' intervals."""
    t, (_, states, evaluations) = GRIDS[kind], teachers(kind)[name]
    counted = Counted()
    cal = calibrated(name, kind, of=counted, chunk=7)
    assert counted.samples == 24 * evaluations
    expected = states(noise())
    torch.testing.assert_close(cal.kept.x, torch.stack(expected), rtol=0, atol=1e-13)
    torch.testing.assert_close(cal.kept.v, torch.stack([v_at(x, s) for x, s in zip(expected[:K], t[:K], strict=True)]))
    errors = true_errors(states, t, noise())
    torch.testing.assert_close(cal.cost, errors.mean(2), rtol=1e-11, atol=1e-15)
    torch.testing.assert_close(cal.norm_cost, errors.sqrt().mean(2), rtol=1e-8, atol=1e-8)
    assert cal.gram.shape == (2 * K - 1, 2 * K - 1)
    along = cal.single_costs.along([cal[2], cal[3]])
    steps = [[errors[j, k] for j, k in itertools.pairwise(cal[N].indices)] for N in (2, 3)]
    torch.testing.assert_close(along, torch.stack([sum(of) for of in steps], 1), rtol=1e-9, atol=1e-14)
    norms = cal.single_costs.along([cal[2], cal[3]], norm=True)
    torch.testing.assert_close(norms, torch.stack([sum(e.sqrt() for e in of) for of in steps], 1), rtol=1e-6, atol=1e-7)
    allowed = errors.mean(2)
    for f in cal.forced:
        allowed[:f, f + 1 :] = torch.inf
    paths = [(0, m, K) for m in range(1, K)]
    least = min(paths, key=lambda p: sum(allowed[j, k] for j, k in itertools.pairwise(p)))
    assert cal[2].indices == least
    assert cal[2].cost_interval[0] < cal[2].cost < cal[2].cost_interval[1]
    assert cal.find(2, objective="norm")[2].cost_interval is not None


def test_float32_states_lose_little():
    t, (_, states, _) = GRIDS["uniform"], teachers("uniform")["heun"]
    cal = calibrated("heun", x=noise(dtype=torch.float32))
    errors = true_errors(states, t, noise(dtype=torch.float32).double())
    torch.testing.assert_close(cal.cost, errors.mean(2), rtol=1e-5, atol=1e-11)


def test_eulers_steps_are_what_they_were():
    plain = fk.calibrate(velocity, noise(), K, [2], progress=False)
    for given in ("euler", fk.Solver.euler(K)):
        cal = fk.calibrate(velocity, noise(), K, [2], teacher_solver=given, progress=False)
        assert cal.provenance == plain.provenance
        assert torch.equal(cal.cost, plain.cost)
        assert torch.equal(cal.gram, plain.gram)


@pytest.mark.parametrize("name", NAMES)
def test_merge_and_card(name, tmp_path):
    whole, x = calibrated(name), noise()
    parts = [calibrated(name, x=part) for part in x.split(9)]
    merged = fk.Calibration.merge(parts)
    torch.testing.assert_close(merged.cost, whole.cost, rtol=1e-12, atol=1e-15)
    assert torch.equal(merged.kept.x, whole.kept.x)
    assert merged[2].cost_interval is not None
    path = tmp_path / "model.boss.json"
    whole.save(path)
    assert json.loads(path.read_text())["version"] == 3
    loaded = fk.Calibration.load(path)
    assert torch.equal(loaded.gram, whole.gram)
    assert torch.equal(loaded.teacher_solver.coefficients, whole.teacher_solver.coefficients)
    assert torch.equal(loaded.teacher_solver.model_times, whole.teacher_solver.model_times)
    from_files = fk.Calibration.merge([loaded, calibrated(name, x=noise(5, 7))])
    assert from_files.provenance["n"] == 29
    with pytest.raises(ValueError, match=r"^calibrations: expected the same teacher_solver in all"):
        fk.Calibration.merge([whole, fk.calibrate(velocity, noise(5, 8), K, [2], progress=False)])


class Stop(Exception):
    pass


@pytest.mark.parametrize("name", ["heun", "other times"])
def test_resumed_is_uninterrupted(name, tmp_path):
    path, options = tmp_path / "progress", dict(chunk=6, keep_bytes=noise()[:13].nbytes * (2 * K + 1))
    whole, calls = calibrated(name, **options), 0

    def failing(x, t):
        nonlocal calls
        calls += 1
        if calls > 30:
            raise Stop
        return velocity(x, t)

    with pytest.raises(Stop):
        calibrated(name, of=failing, checkpoint=path, **options)
    with pytest.warns(UserWarning, match=r"^checkpoint: expected the velocity"):
        again = calibrated(name, checkpoint=path, **options)
    for part in ("cost", "gram"):
        assert torch.equal(getattr(again, part), getattr(whole, part))
    assert torch.equal(again.kept.x, whole.kept.x)
    assert torch.equal(again.kept.v, whole.kept.v)
    assert again[3].cost_interval == whole[3].cost_interval
    with pytest.raises(
        ValueError, match=r"^checkpoint: expected one of this calibration \(.*teacher_solver = 'nothing'"
    ):
        fk.calibrate(velocity, noise(), K, [2, 3], checkpoint=path, progress=False, **options)


@pytest.mark.filterwarnings("ignore:(fit_solver|verify_noise):UserWarning")
@pytest.mark.parametrize("name", NAMES)
def test_fits_and_what_is_verified_are_of_its_states(name):
    states, ends = teachers("uniform")[name][1], noise(16, 5)
    cal = calibrated(name, effort="fit", verify_noise=ends)
    for steps in (2, 3):
        for plan, what in ((cal[steps], "bellman"), (cal.solvers[steps], "fitted"), (cal.uniform(steps), "uniform")):
            error = (fk.sample(velocity, ends, plan) - states(ends)[-1]).square().sum(1).mean()
            assert cal.verified[steps][what] == pytest.approx(error.item(), rel=1e-9)
    known = fk.fit_solver(velocity, cal, 3)
    anew = fk.fit_solver(velocity, cal, 3, noise=noise())  # rolls the teacher out as it was
    torch.testing.assert_close(anew.coefficients, known.coefficients)
    evaluations = cal.teacher_solver.evaluations + (K if name == "other times" else 0)
    assert anew.notes["evaluations"] > evaluations
    assert cal.find(3, objective="student", velocity=velocity)[3].steps == 3


def net_of(seed):
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.SiLU(), torch.nn.Linear(16, 3))
    return fk.VelocityField(net, time_column=True)


def test_fused_samplers():
    field, x = net_of(0), noise(dtype=torch.float32)
    for name in NAMES:
        plain = calibrated(name, x=x, of=field, chunk=7, keep_bytes=x[:14].nbytes * (2 * K + 1))
        fused = calibrated(name, x=x, of=fk.fuse(field, K), chunk=7, keep_bytes=x[:14].nbytes * (2 * K + 1))
        torch.testing.assert_close(fused.kept.x, plain.kept.x, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(fused.kept.v, plain.kept.v, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(fused.cost, plain.cost, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("rk4", "expected 'euler', 'heun' or a Solver"),
        (fk.Solver.heun(K, inverse=True), "expected a solver from noise to data"),
        (
            fk.Solver.heun(K + 1),
            rf"expected a solver on the grid, of {K} steps \(grid=solver.times\), got one of 7 steps",
        ),
        (fk.Solver.heun([0, 0.1, 0.3, 0.5, 0.6, 0.9, 1]), "expected a solver whose times are the grid's"),
        (fk.Solver(GRIDS["uniform"], [0, 0.5], [[0.5, 0], [0.5, 0.5]]), "expected a solver of one eval"),
    ],
)
def test_what_is_refused(given, message):
    with pytest.raises(ValueError, match=f"^teacher_solver: {message}"):
        fk.calibrate(lambda x, t: 1 / 0, noise(), K, [2], teacher_solver=given, progress=False)
    with pytest.raises(TypeError, match=r"^teacher_solver: expected 'euler', 'heun' or a Solver, got 3"):
        fk.calibrate(lambda x, t: 1 / 0, noise(), K, [2], teacher_solver=3, progress=False)


def distance(a, b):
    return (a - b).square().sum(1)


@pytest.mark.parametrize("name", ["euler", *NAMES])
def test_the_teachers_own_error(name, tmp_path):
    """By plain loops, of three grids for Heun's method; and near to the distance to a far finer solution."""
    t, x, first = [i / 24 for i in range(25)], noise(), noise()[:9]
    given = {"euler": "euler", "heun": "heun", "heun to the end": fk.Solver.heun(t)}.get(name)
    if given is None:
        middle = [(a + b) / 2 for a, b in itertools.pairwise(t)]
        more = {"adams-bashforth": fk.Solver.adams_bashforth(t, 2), "runge-kutta": runge_kutta_4_solver(t)}
        given = more.get(name) or fk.Solver.euler(t, model_times=middle)
    counted = Counted()
    cal = fk.calibrate(counted, x, t, [2], teacher_solver=given, progress=False)
    assert cal.teacher_error is None
    before = counted.samples
    found = cal.measure_teacher(counted, samples=9, chunk=4)
    half = [i / 48 for i in range(49)]
    end, finer = cal.kept.x[-1, :9], heun(t if name == "euler" else half)(first)[-1]
    if name == "heun":
        twice = heun(t[::2])(first)[-1]
        r = (distance(twice, end).mean() / distance(end, finer).mean()).sqrt().item()
        assert found.order == pytest.approx(torch.tensor(r).log2().item(), rel=1e-5)
        assert 1.5 < found.order < 2.5
        assert found.factor == pytest.approx((r / (r - 1)) ** 2)
    else:
        assert (found.factor, found.order) == (1, None)
    assert found.error == pytest.approx(found.factor * distance(end, finer).mean().item(), rel=1e-9)
    assert found.interval[0] < found.error < found.interval[1]
    evaluations = {"euler": 48, "heun": 96 + 24}.get(name, 96)
    assert (found.samples, found.evaluations) == (9, evaluations)
    assert counted.samples - before == 9 * evaluations
    if name in ("euler", "heun"):
        truth = runge_kutta_4([i / 400 for i in range(401)])(first)[-1]
        assert found.error == pytest.approx(distance(end, truth).mean().item(), rel=0.15)
    assert str(found) in str(cal)
    cal.save(tmp_path / "model.boss.json")
    assert fk.Calibration.load(tmp_path / "model.boss.json").teacher_error == found
    assert (
        fk.calibrate(velocity, x, t, [2], teacher_solver=given, teacher_error=9, progress=False).teacher_error == found
    )
    loaded = fk.Calibration.load(tmp_path / "model.boss.json")  # which rolls the teacher out anew
    anew = loaded.measure_teacher(velocity, samples=9, noise=x)
    assert anew.error == pytest.approx(found.error)
    assert anew.evaluations == evaluations + cal.teacher_solver.evaluations


def test_the_best_effort_measures_it_within_its_budget():
    for budget, samples in ((4000, (4000 - 24 * 12 - 2 * 2 * 24) // (20 * 30)), (100_000, 24)):
        counted = Counted()
        options = dict(teacher_solver="heun", steps=[2], effort="best", evaluations=budget, progress=False)
        cal = fk.calibrate(counted, noise(), K, **options)
        assert cal.teacher_error.samples == samples
        assert cal.teacher_error.evaluations == 5 * K
        assert counted.samples <= budget
        assert cal.provenance["effort"]["evaluations"] <= budget
        assert "the teacher's own error (heun, K = 6)" in cal.report()
    cal = fk.calibrate(velocity, noise(), K, teacher_error=0, **options)
    assert cal.teacher_error is None


def test_where_nothing_converges_the_distance_is_not_extrapolated():
    cal = fk.calibrate(lambda x, t: torch.sign(torch.sin(40 * t))[:, None] + x, noise(), 8, [2], teacher_solver="heun",
                       teacher_error=4, progress=False)  # fmt: skip
    assert not 1 <= cal.teacher_error.order <= 3
    assert cal.teacher_error.factor == 1
    assert "do not converge yet" in str(cal)


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("name", NAMES)
def test_a_bank_has_the_states_that_its_schedules_were_calibrated_with(name, kind, tmp_path):
    cal, x = calibrated(name, kind), noise(10, 4)
    expected = teachers(kind)[name][1](x)
    cal.save(tmp_path / "model.boss.json")
    loaded = fk.Calibration.load(tmp_path / "model.boss.json")
    plans = [cal, loaded, cal[3], fk.StraightenLoss(cal[3]), fk.StraightenLoss(cal.find(3)[3])]
    solvers = [fk.fit_solver(velocity, cal, 3)]
    for plan in plans:
        bank = fk.TrajectoryBank(velocity, plan, noise=x, chunk=4, progress=False).fill()
        for steps in (3,) if plan not in (cal, loaded) else (2, 3):
            kept = torch.stack([expected[i] for i in cal[steps].indices])
            torch.testing.assert_close(bank.states(schedule=steps), kept, rtol=0, atol=1e-12)
    given = cal.teacher_solver
    for plan in solvers:  # a fit's own notes say nothing
        bank = fk.TrajectoryBank(velocity, plan, noise=x, grid=cal.times, teacher_solver=given, progress=False).fill()
        torch.testing.assert_close(bank.states()[-1], expected[-1], rtol=0, atol=1e-12)
    euler = fk.TrajectoryBank(velocity, cal, noise=x, teacher_solver="euler", progress=False).fill()
    assert not torch.allclose(euler.states(schedule=3)[-1], expected[-1], atol=1e-6)
    folder = tmp_path / "bank"
    fk.TrajectoryBank(velocity, cal, noise=x, storage=folder, progress=False).fill()
    with pytest.raises(ValueError, match=r"^storage: .*teacher_solver"):
        fk.TrajectoryBank(velocity, cal, noise=x, storage=folder, teacher_solver="euler", progress=False)


def test_a_fused_bank_and_straightening():
    field, x = net_of(4), noise(dtype=torch.float32)
    cal = calibrated("heun", x=x, of=field)
    plain = fk.TrajectoryBank(field, cal[2], noise=x, progress=False).fill()
    fused = fk.TrajectoryBank(fk.fuse(field, K), cal[2], noise=x, progress=False).fill()
    torch.testing.assert_close(fused.states(), plain.states(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(plain.states()[-1], cal.kept.x[-1], rtol=1e-5, atol=1e-6)
    knots = [t for t in GRIDS["uniform"][1:K] for t in (t, t)]
    for target, grid in (
        ("boss", None),
        ("next_knot", cal.times),
    ):  # the latter has states between the schedule's knots
        seen = []

        def teacher(x, t, seen=seen):
            seen.append(float(t.flatten()[0]))
            return field(x, t)

        options = dict(noise=x, grid=grid, target=target, iterations=1, batch=24, progress=False)
        fk.straighten(net_of(4), teacher, cal[2], **options)
        assert seen == pytest.approx([0.0, *knots, (GRIDS["uniform"][K - 1] + 1) / 2])


@pytest.mark.parametrize(
    ("name", "where"),
    [("heun", r"evaluation 5 \(t = 0.5\)"), ("other times", r"knot 3 \(t = 0.5\)"), ("adams-bashforth", r"step 3 \(t")],
)
def test_nan_is_named(name, where):
    def bad(x, t):
        return torch.where(((t - 0.5).abs() < 1e-6)[:, None] & (x[:, :1] == x[4, :1]), torch.nan, velocity(x, t))

    with pytest.raises(
        ValueError, match=f"^velocity: expected finite velocities, got NaN or Inf in sample 4 at {where}"
    ):
        calibrated(name, of=bad)


def test_what_a_bank_refuses():
    other = fk.calibrate(velocity, noise(), GRIDS["uniform"], [2], progress=False)
    with pytest.raises(
        ValueError, match=r"^schedules: expected schedules that were calibrated with one teacher's solver"
    ):
        fk.TrajectoryBank(velocity, [calibrated("heun")[3], other[2]], noise=noise())
    with pytest.raises(ValueError, match=r"^teacher_solver: expected a solver on the grid, of 12 steps"):
        fk.TrajectoryBank(velocity, calibrated("adams-bashforth"), noise=noise(), grid=2 * K)
    with pytest.raises(ValueError, match=r"^teacher_solver: expected None with data"):
        fk.TrajectoryBank(velocity, other, data=noise(), teacher_solver="heun")


def test_the_command(tmp_path, capsys):
    path = tmp_path / "model.boss.json"
    more = "--grid 6 --steps 2 -n 8 --teacher-solver heun --teacher-error 4"
    assert main(f"calibrate --model digits --out {path} {more}".split()) == 0
    assert "the teacher's own error (heun, K = 6)" in capsys.readouterr().out
    cal = fk.Calibration.load(path)
    assert cal.teacher_error.samples == 4
    assert cal[2].notes["teacher_solver"] == "heun"
