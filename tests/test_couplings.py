"""Pairs of noise and data: the plans against other solvers and brute force, the weights, and what they train."""

import itertools
import math
import sys

import pytest
import torch
from _flows import linear_field, normal
from scipy.optimize import linear_sum_assignment
from torch import nn

import flowkernels as fk
from flowkernels.training.pairs.couplings import NAMES

POWERS = {"squared": 2, "euclidean": 1}


def costs(noise, data, power=2):
    """In float64, one by one."""
    left, right = noise.double().flatten(1).tolist(), data.double().flatten(1).tolist()
    return torch.tensor([[math.dist(a, b) ** power for b in right] for a in left], dtype=torch.float64)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def sets(n, *shape, dtype=torch.float32):
    return normal(n, *shape, seed=1, dtype=dtype), 1 + 2 * normal(n, *shape, seed=2, dtype=dtype)


def best(cost):
    """Of each column its row, by scipy."""
    rows, columns = linear_sum_assignment(cost.numpy())
    index = torch.empty(len(rows), dtype=torch.int64)
    index[torch.from_numpy(columns)] = torch.from_numpy(rows)
    return index


# ---- plans ----


@pytest.mark.parametrize("cost", POWERS)
@pytest.mark.parametrize("n", [1, 2, 6])
def test_the_optimal_coupling_is_the_best_of_all_permutations(n, cost):
    noise, data = sets(n, 3)
    each = costs(noise, data, POWERS[cost])
    index = fk.couple(noise, data, "ot", cost=cost).index
    least = min(sum(each[p[j], j].item() for j in range(n)) for p in itertools.permutations(range(n)))
    assert sorted(index.tolist()) == list(range(n))
    assert sum(each[index[j], j].item() for j in range(n)) == pytest.approx(least, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_optimal_coupling_is_scipys(dtype):
    noise, data = sets(60, 2, 3, dtype=dtype)
    pairs = fk.couple(noise, data, "ot")
    assert torch.equal(pairs.index, best(costs(noise, data)))
    assert pairs.states.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(pairs.noise, noise[pairs.index].to(pairs.states.dtype))
    assert torch.equal(pairs.data, data.to(pairs.states.dtype))
    assert (pairs.weight, pairs.effective_size, len(pairs)) == (None, 60, 60)


def test_equal_samples_are_coupled_by_a_permutation():
    """Where plans are not unique."""
    noise = torch.zeros(9, 2)
    for data in (torch.ones(9, 2), torch.arange(3.0).repeat(3)[:, None].expand(9, 2)):
        assert sorted(fk.couple(noise, data, "ot").index.tolist()) == list(range(9))


def test_minibatches_and_groups_are_coupled_each_by_itself():
    noise, data = sets(50, 2)
    index = fk.couple(noise, data, "ot", batch=16, generator=seeded(5)).index
    expected = torch.empty_like(index)
    for rows in torch.randperm(50, generator=seeded(5)).split(16):
        expected[rows] = rows[best(costs(noise[rows], data[rows]))]
    assert torch.equal(index, expected)

    groups = torch.tensor([0, 7, 7, -2, 0] * 10)
    index = fk.couple(noise, data, "ot", groups=groups).index
    assert torch.equal(groups[index], groups)
    for g in (0, 7, -2):
        rows = (groups == g).nonzero()[:, 0]
        assert torch.equal(index[rows], rows[best(costs(noise[rows], data[rows]))])
    both = fk.couple(noise, data, "ot", groups=groups, batch=4, generator=seeded()).index
    assert torch.equal(groups[both], groups)
    assert sorted(both.tolist()) == list(range(50))


def plan_of(cost, reg):
    """Sinkhorn's iterations, in float64 and without logarithms."""
    n = len(cost)
    kernel, u = [[math.exp(-c / reg) for c in row] for row in cost.tolist()], [1.0] * n
    for _ in range(2000):
        v = [1 / n / sum(kernel[i][j] * u[i] for i in range(n)) for j in range(n)]
        u = [1 / n / sum(kernel[i][j] * v[j] for j in range(n)) for i in range(n)]
    return torch.tensor([[u[i] * kernel[i][j] * v[j] for j in range(n)] for i in range(n)], dtype=torch.float64)


@pytest.mark.parametrize(("relative", "cost"), [(True, "squared"), (False, "squared"), (True, "euclidean")])
def test_sinkhorn_draws_from_the_entropic_plan(relative, cost):
    noise, data = sets(5, 2)
    each = costs(noise, data, POWERS[cost])
    reg = 0.3 if relative else 2.0
    plan = plan_of(each, reg * each.mean().item() if relative else reg)
    generator, found, draws = seeded(), torch.zeros(5, 5, dtype=torch.float64), 400
    for _ in range(draws):
        pairs = fk.couple(noise, data, "sinkhorn", reg=reg, relative=relative, cost=cost, generator=generator)
        found[pairs.index, torch.arange(5)] += 1 / draws
    p = 5 * plan  # of the noise of each datum
    assert torch.allclose(p.sum(0), torch.ones(5, dtype=torch.float64))
    away = (found - p) / (p * (1 - p) / draws).sqrt()
    assert away.abs().max() < 4
    assert away.square().mean() < 2.5


def test_sinkhorn_with_little_regularisation_is_the_optimal_coupling():
    """Of costs 4000 times as large as reg, whose exponentials are 0."""
    data = 3 * torch.arange(20.0)[:, None]
    noise = (data + normal(20, 1) / 3)[torch.randperm(20, generator=seeded())]
    assert torch.equal(fk.couple(noise, data, "sinkhorn", reg=2e-4).index, fk.couple(noise, data, "ot").index)


def test_sinkhorn_warns_where_its_iterations_do_not_converge():
    with pytest.warns(UserWarning, match=r"^reg: Sinkhorn's 1000 iterations have not converged") as told:
        fk.couple(*sets(40, 1), "sinkhorn", reg=1e-5)
    assert told[0].filename == __file__


def test_the_projection_is_the_nearest_coupling_with_real_data():
    """In the Wasserstein distance of couplings, by brute force over both permutations."""
    (noise, data), generated = sets(4, 2), normal(4, 2, seed=3) + 1

    def away(index):
        cost = costs(torch.cat([noise, generated], 1), torch.cat([noise[list(index)], data], 1))
        return min(sum(cost[p[j], j].item() for j in range(4)) for p in itertools.permutations(range(4)))

    pairs = fk.couple(noise, data, "ot", generated=generated)
    least = min(map(away, itertools.permutations(range(4))))
    assert away(pairs.index.tolist()) == pytest.approx(least, rel=1e-9)
    assert torch.equal(pairs.noise, noise[pairs.index])
    assert torch.equal(pairs.index, best(costs(generated, data)))


def test_a_function_couples():
    noise, data = sets(10, 2)
    pairs = fk.couple(noise, data, lambda x, y: torch.arange(len(y)).flip(0), groups=torch.arange(10) // 5)
    assert pairs.index.tolist() == [4, 3, 2, 1, 0, 9, 8, 7, 6, 5]


@pytest.mark.parametrize("coupling", NAMES)
def test_the_same_generator_gives_the_same_pairs(coupling):
    data = normal(24, 2)
    one, two, other = (fk.couple(None, data, coupling, reg=0.5, generator=seeded(s)) for s in (3, 3, 4))
    assert torch.equal(one.states, two.states)
    assert not torch.equal(one.states, other.states)
    assert torch.equal(one.data, data)


# ---- weights ----


@pytest.mark.parametrize(("relative", "cost"), [(True, "squared"), (False, "euclidean")])
def test_gibbs_weights_in_float64(relative, cost):
    noise, data = sets(12, 2, 2)
    pairs = fk.couple(noise, data, "gibbs", reg=2.0, relative=relative, cost=cost)
    each = costs(noise, data, POWERS[cost]).diagonal().tolist()
    reg = 2.0 * sum(each) / 12 if relative else 2.0
    w = [math.exp(-c / reg) for c in each]
    assert pairs.weight.tolist() == pytest.approx([12 * a / sum(w) for a in w], rel=1e-5)
    assert pairs.effective_size == pytest.approx(sum(w) ** 2 / sum(a * a for a in w), rel=1e-5)
    assert torch.equal(pairs.states, torch.stack([noise, data]))


def test_the_weighted_loss_is_the_formula():
    noise, data = sets(12, 3)
    pairs = fk.couple(noise, data, "gibbs", reg=0.5)
    student = fk.VelocityField(nn.Linear(4, 3), time_column=True)
    loss = fk.StraightenLoss(fk.Schedule([0, 1]), target="reflow", t_sampling=lambda n, g: torch.linspace(0, 1, n))
    total, weights = (
        0.0,
        torch.softmax(-(data - noise).square().sum(1) / (0.5 * (data - noise).square().sum(1).mean()), 0),
    )
    for i, u in enumerate(torch.linspace(0, 1, 12)):
        v = student((1 - u) * noise[i : i + 1] + u * data[i : i + 1], u[None])
        total += weights[i].item() * (v - (data[i] - noise[i])).square().mean().item()
    assert loss(student, pairs.batch()).loss.item() == pytest.approx(total, rel=1e-5)
    drawn = pairs.batch(200, seeded())
    assert torch.equal(drawn.weight, pairs.weight[drawn.sample])
    assert set(drawn.sample.tolist()) == set(range(12))


def test_a_few_pairs_with_all_the_weight_are_told():
    noise, data = sets(64, 8)
    with pytest.warns(UserWarning, match=r"^reg: 0.001 gives a few pairs all the weight: .* size is 1 of 64") as told:
        pairs = fk.couple(noise, data, "gibbs", reg=0.001)
    assert pairs.effective_size == pytest.approx(1)
    assert told[0].filename == __file__


# ---- of a teacher ----


def test_forward_pairs_are_of_the_data_and_the_noise_that_the_teacher_makes_them_of():
    teacher, data = linear_field(), normal(10, 4, dtype=torch.float64)
    inverse = fk.Solver.heun(60, inverse=True)
    pairs = fk.forward_pairs(teacher, data, inverse, resample_with=fk.Solver.heun(60))
    exact = data @ torch.linalg.matrix_exp(-teacher.matrix.detach().double()).T
    assert torch.allclose(pairs.noise, exact, rtol=1e-4, atol=1e-4)
    assert torch.equal(pairs.data, data)
    again = fk.sample(teacher, pairs.noise, fk.Solver.heun(60))
    assert torch.allclose(pairs.error, (again - data).square().sum(1))
    assert pairs.error.min() > 0
    assert fk.forward_pairs(teacher, data, inverse, round_trip=False).error is None


def test_chunks_of_forward_pairs_keep_their_conditioning():
    class Conditioned(nn.Module):
        def forward(self, x, t, c):
            assert len(x) <= 4
            return x * c[:, None]

    data, c = normal(10, 3), torch.linspace(-1, 1, 10)
    field = fk.VelocityField(Conditioned(), conditioning={"c": c})
    pairs = fk.forward_pairs(field, data, 200, chunk=4)
    assert torch.allclose(pairs.noise, data * torch.exp(-c)[:, None], rtol=1e-2)
    assert pairs.error.shape == (10,)


def test_pairs_are_put_together():
    backward, forward = fk.Pairs(normal(2, 3, 5)), fk.Pairs(normal(2, 4, 5, seed=1), torch.tensor([0.0, 1, 2, 3]))
    both = fk.Pairs.cat([backward, forward])
    assert torch.equal(both.states, torch.cat([backward.states, forward.states], 1))
    assert both.weight.tolist() == [1, 1, 1, 0, 1, 2, 3]
    assert fk.Pairs.cat([backward]).weight is None


# ---- what they train ----


def ring(n, generator):
    angle = torch.randint(8, (n,), generator=generator) * (math.pi / 4)
    return 3 * torch.stack([angle.cos(), angle.sin()], 1) + 0.2 * torch.randn(n, 2, generator=generator)


def trained(coupling, **settings):
    torch.manual_seed(0)
    generator = seeded()
    net = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))
    student, loss = fk.VelocityField(net, time_column=True), fk.StraightenLoss(fk.Schedule([0, 1]), target="reflow")
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    for _ in range(100):
        pairs = fk.couple(None, ring(128, generator), coupling, generator=generator, **settings)
        optimizer.zero_grad()
        loss(student, pairs.batch(), generator).loss.backward()
        optimizer.step()
    return student.eval()


def test_coupled_flows_need_fewer_steps():
    """Rectified flow of a mixture in the plane: how far one step, and four, end from a hundred."""
    noise, errors = normal(256, 2, seed=9), {}
    for coupling, settings in dict(independent={}, ot={}, sinkhorn={}, gibbs=dict(reg=0.3)).items():
        student = trained(coupling, **settings)
        fine = fk.sample(student, noise, 100)
        assert 2 < fine.norm(dim=1).mean() < 4  # near the ring
        errors[coupling] = [(fk.sample(student, noise, k) - fine).square().sum(1).mean().sqrt().item() for k in (1, 4)]
    for coupling in ("ot", "sinkhorn", "gibbs"):
        for got, independent in zip(errors[coupling], errors["independent"], strict=True):
            assert got < 0.6 * independent


@pytest.mark.parametrize("coupling", ["ot", "sinkhorn", "gibbs"])
def test_where_the_origin_is_does_not_matter(coupling):
    """Costs are differences of samples, whose products far from the origin have no digits left."""
    noise, data = (part.double() for part in sets(64, 3))
    noise, data = ((part * 2**10).round() / 2**10 for part in (noise, data))  # which 2^24 leaves as they are
    found = [
        fk.couple(noise + far, data + far, coupling, generator=torch.Generator().manual_seed(0), reg=0.5)
        for far in (0, 2**24)
    ]
    assert torch.equal(found[0].index, found[1].index)
    if coupling == "gibbs":
        torch.testing.assert_close(found[0].weight, found[1].weight)


# ---- what is refused ----

NOISE, DATA = sets(8, 2)
PAIRS = fk.Pairs(torch.ones(2, 3, 4))
REFUSED = {
    r"^noise: expected 8 samples, as many as the data, got 5$": lambda: fk.couple(NOISE[:5], DATA),
    r"^noise: expected the data's shape \[8, 2\]": lambda: fk.couple(normal(8, 3), DATA),
    r"^noise: expected finite values": lambda: fk.couple(NOISE / 0, DATA),
    r"^generated: expected 8 samples": lambda: fk.couple(NOISE, DATA, generated=DATA[:3]),
    r"^generated: expected None with coupling='gibbs'": lambda: fk.couple(NOISE, DATA, "gibbs", generated=DATA),
    r"^groups: expected None with coupling='independent'": lambda: fk.couple(
        NOISE, DATA, "independent", groups=torch.zeros(8, dtype=torch.int64)
    ),
    r"^groups: expected shape \[8\]": lambda: fk.couple(NOISE, DATA, groups=torch.zeros(7, dtype=torch.int64)),
    r"^batch: expected None with coupling='gibbs'": lambda: fk.couple(NOISE, DATA, "gibbs", batch=4),
    r"^batch: expected what fits into": lambda: fk.couple(
        torch.zeros(1, 1).expand(2**20, 1), torch.zeros(1, 1).expand(2**20, 1)
    ),
    r"^reg: expected a positive number, got 0": lambda: fk.couple(NOISE, DATA, "sinkhorn", reg=0),
    r"^coupling: expected 'independent', 'ot', ": lambda: fk.couple(NOISE, DATA, "emd"),
    r"^coupling: .* a place outside of them": lambda: fk.couple(NOISE, DATA, lambda x, y: torch.arange(1, 9)),
    r"^coupling: expected a function .* int64 \[8\], .* got None": lambda: fk.couple(NOISE, DATA, lambda x, y: None),
    r"^generator: expected a torch.Generator on the CPU": lambda: fk.couple(NOISE, DATA, generator=0),
    r"^states: expected shape \[2, n, \*shape\]": lambda: fk.Pairs(torch.ones(3, 4, 2)),
    r"^weight: expected finite factors": lambda: fk.Pairs(torch.ones(2, 2, 2), torch.tensor([1.0, -1.0])),
    r"^weight: expected shape \[2\]": lambda: fk.Pairs(torch.ones(2, 2, 2), torch.ones(3)),
    r"^pairs: expected states like those of the first": lambda: fk.Pairs.cat([PAIRS, fk.Pairs(torch.ones(2, 3, 5))]),
    r"^pairs, conditioning\['y'\]: expected rows of \[3\] torch.float32": lambda: fk.Pairs.cat(
        [fk.Pairs(PAIRS.states, conditioning={"y": torch.ones(3, k)}) for k in (3, 2)]
    ),
    r"^states: expected finite values, got NaN or Inf in sample 1": lambda: fk.Pairs(
        PAIRS.states.index_fill(1, torch.tensor(1), torch.nan)
    ),
    **{
        rf"^data: .* a finite number, got an overflow of float64(?#{coupling})$": lambda coupling=coupling: fk.couple(
            NOISE.double(), DATA.double() * 1e200, coupling
        )
        for coupling in ("ot", "sinkhorn", "gibbs")
    },
    **{
        rf"^reg: .* can be divided by, got 1e-30\d(?#{coupling})$": lambda coupling=coupling: fk.couple(
            NOISE, DATA * 1e9, coupling, reg=1e-300, relative=False
        )
        for coupling in ("sinkhorn", "gibbs")
    },
    r"^size: expected at least 1": lambda: PAIRS.batch(0),
    r"^resample_with: expected a schedule or solver for the way back": lambda: fk.forward_pairs(
        linear_field(2), DATA, fk.Solver.heun(4, inverse=True)
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_refused(message):
    with pytest.raises((TypeError, ValueError), match=message):
        REFUSED[message]()


@pytest.mark.parametrize("coupling", ["ot", "sinkhorn"])
def test_without_pot_it_is_said_how_to_get_it(coupling, monkeypatch):
    monkeypatch.setitem(sys.modules, "ot", None)
    with pytest.raises(ImportError, match=rf"^coupling: expected POT for coupling='{coupling}' \(pip install POT\), "):
        fk.couple(NOISE, DATA, coupling)
    fk.couple(NOISE, DATA, "gibbs", reg=1.0)


# ---- in one call, without a teacher ----

WHOLE = fk.Schedule([0, 1])
QUIET = dict(progress=False, target="reflow", warmup=0, clip=None, ema=None)


class Rational(nn.Module):
    """w x / (1 + c t): straight lines to (1 + w) x where c = w."""

    def __init__(self):
        super().__init__()
        self.w, self.c = (nn.Parameter(torch.zeros(())) for _ in range(2))

    def forward(self, x, t):
        return self.w * x / (1 + self.c * t[:, None])


def doubled(n, generator):
    """Pairs that a straight flow couples, in an order in which they are not."""
    noise = torch.randn(n, 2, generator=generator)
    data = 2 * noise[torch.randperm(n, generator=generator)]
    return fk.couple(noise, data, "ot", generator=generator)


@pytest.mark.parametrize("bank", [doubled(256, seeded()), doubled], ids=["fixed", "each batch"])
def test_a_flow_is_trained_without_a_teacher(bank):
    noise = normal(32, 2)
    result = fk.straighten(Rational(), None, WHOLE, bank=bank, iterations=600, batch=32, lr=0.1, **QUIET)
    for steps in (1, 3):
        assert torch.allclose(fk.sample(result.student, noise, steps), 2 * noise, rtol=5e-3, atol=5e-3)
    solver = fk.Solver.adams_bashforth(3)
    settings = QUIET | dict(target="endpoint", iterations=300, batch=32, lr=0.1)
    result = fk.straighten(Rational(), None, solver, bank=bank, **settings)
    assert torch.allclose(fk.sample(result.student, noise, result.solver), 2 * noise, rtol=5e-3, atol=5e-3)


def test_weights_and_conditioning_go_with_their_pairs():
    """Of pairs to 2x, to -x and, of no weight, to 100: the student is told which, by a label."""

    class Labelled(nn.Module):
        def __init__(self):
            super().__init__()
            self.fields = nn.ModuleList([Rational(), Rational()])

        def forward(self, x, t, label):
            return torch.where(label[:, None] > 0, self.fields[0](x, t), self.fields[1](x, t))

    noise = normal(90, 2)
    label = torch.arange(3).repeat(30)
    data = torch.where(label[:, None] == 0, 0.5 * noise, torch.where(label[:, None] == 1, 2 * noise, 100))
    weight = (label < 2).float()
    pairs = fk.Pairs(torch.stack([noise, data]), weight, {"label": label % 2})
    result = fk.straighten(Labelled(), None, WHOLE, bank=pairs, iterations=600, batch=64, lr=0.1, **QUIET)
    for value, factor in ((0, 0.5), (1, 2.0)):
        field = fk.VelocityField(result.student, conditioning={"label": torch.full((90,), value)})
        assert torch.allclose(fk.sample(field, noise, 1), factor * noise, rtol=5e-3, atol=5e-3)


def test_a_teacher_is_what_the_student_starts_from():
    teacher = fk.VelocityField(nn.Linear(3, 2), time_column=True)
    result = fk.straighten(None, teacher, WHOLE, bank=doubled, iterations=1, batch=8, lr=1e-30, **QUIET)
    assert torch.equal(result.student.net.weight, teacher.net.weight)


def test_each_batch_is_drawn_by_the_runs_generator():
    def first(seed):
        seen = []

        def bank(n, generator):
            seen.append(doubled(n, generator))
            return seen[-1]

        fk.straighten(Rational(), None, WHOLE, bank=bank, iterations=4, batch=8, seed=seed, **QUIET)
        return [pairs.states for pairs in seen[-4:]]

    one, again, other = first(3), first(3), first(4)
    assert all(map(torch.equal, one, again))
    assert not any(torch.equal(a, b) for a, b in itertools.combinations([*one, *other], 2))


def test_runs_on_other_weights_are_other_runs(tmp_path):
    pairs, settings = doubled(20, seeded()), QUIET | dict(iterations=2, batch=8, checkpoint=tmp_path / "run.pt")
    fk.straighten(Rational(), None, WHOLE, bank=pairs, **settings)
    weighted = fk.Pairs(pairs.states, torch.arange(20.0))
    with pytest.raises(ValueError, match=r"^checkpoint: expected "):
        fk.straighten(Rational(), None, WHOLE, bank=weighted, **settings)


STUDENTS = {
    "distill": lambda: field(2),
    "annealed_reflow": lambda: field(2),
    "noise": lambda: fk.NoisePrediction(field(2)),
    "acceleration": lambda: fk.Acceleration(field(2), field(4)),
}


def field(features):
    return fk.VelocityField(nn.Linear(features + 1, 2), time_column=True)


@pytest.mark.parametrize("target", STUDENTS)
def test_other_targets_of_the_whole_interval_take_pairs(target):
    settings = QUIET | dict(target=target, iterations=3, batch=8, log_every=1)
    for bank in (doubled(20, seeded()), doubled):
        history = fk.straighten(STUDENTS[target](), None, WHOLE, bank=bank, **settings).history
        assert len(history["loss"]) == 3
        assert all(map(math.isfinite, history["loss"]))


class Stopped(Exception):
    pass


@pytest.mark.parametrize("bank", [doubled(40, seeded()), doubled], ids=["fixed", "each batch"])
def test_runs_on_pairs_resume_bit_for_bit(bank, tmp_path):
    def run(stop=None, **settings):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 2))
        calls = []

        def hook(module, _):
            calls.append(module.training)
            if len(calls) == stop:
                raise Stopped

        net.register_forward_pre_hook(hook)
        student = fk.VelocityField(net, time_column=True)
        settings = QUIET | dict(ema=0.9, log_every=1, t_sampling="ten") | settings
        result = fk.straighten(
            student, None, WHOLE, bank=settings.pop("bank", bank), iterations=12, batch=16, **settings
        )
        return [result.history, [w.tolist() for w in result.student.parameters()]]

    path = tmp_path / "run.pt"
    with pytest.raises(Stopped):
        run(stop=10, checkpoint=path, checkpoint_every=4)
    assert path.exists()
    other = fk.Pairs(normal(2, 40, 2, seed=5)) if bank is doubled else doubled
    with pytest.raises(ValueError, match=r"^checkpoint: expected "):
        run(bank=other, checkpoint=path)
    assert run(checkpoint=path, checkpoint_every=4) == run()


def straightened(student=None, velocity=None, schedule=WHOLE, **settings):
    settings = dict(bank=doubled, iterations=1, batch=8) | QUIET | settings
    return fk.straighten(Rational() if student is None else student, velocity, schedule, **settings)


THREE = fk.Schedule([0, 0.5, 1])
OF_STRAIGHTEN = {
    r"^student: expected a module, where the teacher is not one": lambda: fk.straighten(
        None, None, WHOLE, bank=doubled, iterations=1, **QUIET
    ),
    r"^bank: expected a target of one whole interval, .* target='boss', of states at 3": lambda: straightened(
        schedule=THREE, target="boss"
    ),
    r"^bank: expected a target of one whole interval, .* target='solver'": lambda: straightened(
        schedule=fk.Solver.euler([0, 1]), target="solver"
    ),
    r"^bank: expected a target of one whole interval, .* target='next_knot', of states at 5": lambda: straightened(
        target="next_knot"
    ),
    r"^bank: expected a target of one whole interval, .* target='on_policy'": lambda: straightened(
        velocity=linear_field(2), target="on_policy", init="keep"
    ),
    r"^noise: expected None with a bank that has its own": lambda: straightened(noise=(2,)),
    r"^grid: expected None with a bank that has its own": lambda: straightened(grid=10),
    r"^refresh: expected None, for pairs": lambda: straightened(refresh=5),
    r"^bank: expected a function that returns Pairs of n = 8, got 5 pairs": lambda: straightened(
        bank=lambda n, g: doubled(5, g)
    ),
    r"^bank: expected a function that returns Pairs of n = 8, got a torch.float32 tensor": lambda: straightened(
        bank=lambda n, g: torch.zeros(2, n, 2)
    ),
    r"^bank: expected Pairs or a function \(n, generator\)": lambda: straightened(bank=lambda: 0),
    r"^init: expected a teacher with weights": lambda: straightened(init="teacher"),
    r"^conditioning\['c'\]: expected 3 rows on cpu": lambda: fk.Pairs(
        torch.ones(2, 3, 4), conditioning={"c": torch.ones(2)}
    ),
}


@pytest.mark.parametrize("message", OF_STRAIGHTEN)
def test_what_straighten_refuses(message):
    with pytest.raises((TypeError, ValueError), match=message):
        OF_STRAIGHTEN[message]()
