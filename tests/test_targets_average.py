"""Students of two times: what they answer, their losses in float64 as the papers have them, and flows that they learn
for any number of steps."""

import contextlib
import copy
import math
import pickle
import threading

import pytest
import torch
from _flows import normal
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import flowkernels as fk
from flowkernels.models.bundled import BUNDLED
from flowkernels.models.closed_form import GaussianMixtureVelocity
from flowkernels.models.networks import DiT, ResidualMLP, UNet

KNOTS = [0.0, 0.25, 0.75, 1.0]  # which are numbers in float32
QUIET = dict(progress=False)
FORMS = ("split", "derivative")


def times(*values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


def close(found, expected, rtol=1e-9, atol=1e-11):
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


class Rates(nn.Module):
    """The average velocity of x' = a x, of D features with rates of their own: exact where `a` is that."""

    def __init__(self, a):
        super().__init__()
        self.a = nn.Parameter(a.clone())

    def forward(self, x, t, s):
        h = (s - t)[:, None].to(x)
        small = h.abs() < 1e-9
        h = h.where(~small, 1.0)
        return x * torch.where(small, self.a, torch.expm1(self.a * h) / h)


class Linear(nn.Module):
    """u = x A + b t + c s + x s e: linear in its weights, whose gradient can be written down."""

    def __init__(self, features=3, seed=0):
        super().__init__()
        self.A = nn.Parameter(normal(features, features, seed=seed, dtype=torch.float64))
        self.b, self.c, self.e = (nn.Parameter(normal(features, seed=seed + k, dtype=torch.float64)) for k in (1, 2, 3))
        self.seen = []

    def forward(self, x, t, s):
        self.seen.append((x.detach(), t.detach(), s.detach()))
        t, s = t[:, None], s[:, None]
        return x @ self.A + self.b * t + self.c * s + self.e * x * s


# ---- the losses ----


def split_target(u, seen, i):
    """From the recorded evaluations of example i: (r, the two displacements added up)."""
    (x, t, r), (y, again, s) = ([part[i : i + 1] for part in call] for call in seen)
    first = u(x, t, r)
    close(again, r)
    close(y, x + (r - t)[:, None] * first, atol=1e-6)
    return r, ((r - t)[:, None] * first + (s - r)[:, None] * u(x + (r - t)[:, None] * first, r, s)) / (s - t)[:, None]


def derivative_target(u, v, x, t, s, eps=1e-6):
    """v + (s - t) du/dt along the flow, by central differences."""
    ahead, behind = u(x + eps * v, t + eps, s), u(x - eps * v, t - eps, s)
    return v + (s - t)[:, None] * (ahead - behind) / (2 * eps)


@pytest.mark.parametrize("with_teacher", [True, False], ids=["teacher", "pairs"])
@pytest.mark.parametrize("form", FORMS)
def test_the_loss_and_its_gradient_in_float64(form, with_teacher):
    net, B, n, share = Linear(), 80, 12, 0.3
    states = normal(4, n, 3, seed=5, dtype=torch.float64)
    interval, sample, weighting = torch.arange(B) % 3, torch.arange(B) % n, [1.0, 0.0, 2.5]

    def teacher(x, t):
        return torch.sin(2 * x) + t[:, None] ** 2

    objective = fk.StraightenLoss(
        fk.Schedule(KNOTS),
        target="average_velocity",
        consistency=form,
        instantaneous=share,
        weighting=weighting,
        teacher=teacher if with_teacher else None,
    )
    batch = fk.BankBatch(states, interval, sample)
    found = objective(fk.AverageVelocity(net), batch, torch.Generator().manual_seed(0))
    *before, (x, t, s) = net.seen
    assert len(before) == (2 if form == "split" else 1)
    first = B - len(before[0][0])  # those at one time come first
    assert share * B - 1 < first < share * B + 1
    assert torch.equal(t[:first], s[:first])
    assert bool((s[first:] > t[first:]).all())
    assert s[first:].max() <= 1
    u = Linear()
    grads, losses, places, spans = {k: 0 for k in "Abce"}, [], [], []
    for i in range(B):
        k, column, rows = interval[i].item(), sample[i], slice(i, i + 1)
        a, b = KNOTS[k], KNOTS[k + 1]
        places.append(((t[i] - a) / (b - a)).item())
        close(x[i], torch.lerp(states[k, column], states[k + 1, column], places[-1]), atol=1e-6)
        chord = (states[k + 1, column] - states[k, column])[None] / (b - a)
        v = teacher(x[rows], t[rows]) if with_teacher else chord
        with torch.no_grad():
            if i < first:
                target = v
            elif form == "derivative":
                target = derivative_target(u, v, x[rows], t[rows], s[rows])
            else:
                r, target = split_target(u, before, i - first)
                spans.append(((r - t[i]) / (s[i] - t[i])).item())
            e = (u(x[rows], t[rows], s[rows]) - target)[0]
        losses.append(e.square().mean())
        w = 2 * weighting[k] / (B * 3)
        inputs = dict(A=x[i][:, None] * e, b=t[i] * e, c=s[i] * e, e=x[i] * s[i] * e)
        for name, term in inputs.items():
            grads[name] = grads[name] + w * term
        close(found.per_sample[i], losses[-1], 1e-6, 1e-7)
    assert min(places) < 0.1
    assert max(places) > 0.9
    if spans:
        assert min(spans) < 0.1
        assert max(spans) > 0.9
    expected = sum(weighting[k] * each for k, each in zip(interval.tolist(), losses, strict=True)) / B
    close(found.loss, expected, 1e-6)
    found.loss.backward()
    for name, expected in grads.items():
        close(getattr(net, name).grad, expected, 1e-5, 1e-6)


RATES = normal(3, seed=2, dtype=torch.float64)


def loss_of(net, form, x0, generator=0, **settings):
    x = torch.stack([x0 * (RATES * k).exp() for k in KNOTS])
    objective = fk.StraightenLoss(
        fk.Schedule(KNOTS),
        target="average_velocity",
        consistency=form,
        teacher=lambda x, t: RATES * x,
        **settings,
    )
    batch = fk.BankBatch(x, torch.arange(60) % 3, torch.arange(60) % len(x0))
    return objective(fk.AverageVelocity(net), batch, torch.Generator().manual_seed(generator)).loss


@pytest.mark.parametrize("form", FORMS)
def test_the_average_velocity_of_a_linear_flow_is_the_fixed_point(form):
    """Of x' = a x it is (exp(a h) - 1) x / h: no loss, and no gradient; any other has some."""
    x0 = normal(20, 3, dtype=torch.float64)
    exact = Rates(RATES)
    loss = loss_of(exact, form, x0)
    assert loss < 1e-24
    loss.backward()
    assert exact.a.grad.abs().max() < 1e-11
    assert loss_of(Rates(RATES + 0.1), form, x0) > 1e-3
    for N in (1, 2, [0.0, 0.3, 1.0], fk.Schedule(KNOTS)):
        close(fk.sample(fk.AverageVelocity(exact).on(N), x0, N), x0 * RATES.exp())


@pytest.mark.parametrize("form", FORMS)
def test_shares_of_one_time(form):
    x0, exact = normal(20, 3, dtype=torch.float64), Rates(RATES)
    for share in (0.0, 1.0):
        assert loss_of(exact, form, x0, instantaneous=share) < 1e-24
    counts = []
    for k in range(40):
        net = Linear()
        loss_of(net, form, x0, generator=k, instantaneous=0.01)  # of 60: none, or one
        _, t, s = net.seen[-1]
        counts.append(int((t == s).sum()))
    assert set(counts) == {0, 1}
    assert 16 <= sum(counts) <= 32  # 24, give or take 2.5 standard deviations


# ---- what it learns ----


class MLP(nn.Module):
    """Of two times, from scratch."""

    def __init__(self, width=96):
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Linear(4, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)]
        self.net = nn.Sequential(*layers)

    def forward(self, x, t, dt):
        return self.net(torch.cat([x, t[:, None].to(x), dt[:, None].to(x)], 1))


def modes():
    """Three modes, off the centre: their flow bends."""
    return GaussianMixtureVelocity(torch.tensor([[1.5, 0.0], [-1.0, 1.2], [-0.5, -1.5]]), 0.4)


@pytest.mark.parametrize("form", FORMS)
def test_one_student_for_any_number_of_steps(form):
    """On noise that it has not seen, more steps are nearer; a step of the whole is far nearer than the teacher's."""
    teacher, noise = modes(), normal(512, 2, seed=9)
    run = dict(noise=(2,), bank=1024, batch=128, iterations=800, lr=5e-3, warmup=20, ema=0.99, grid=20, **QUIET)
    net = fk.AverageVelocity(MLP(), second_name="dt", second_is_size=True)
    schedule = fk.Schedule.uniform(2)
    settings = dict(target="average_velocity", consistency=form)
    student = fk.straighten(net, teacher, schedule, init="keep", **settings, **run).student
    end = fk.rollout(teacher, noise, 200).x[-1]

    def error(velocity, N):
        return (fk.sample(velocity, noise, N) - end).square().mean().sqrt().item()

    errors = [error(student.on(N), N) for N in (1, 2, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 0.3 * error(teacher, 1)
    assert errors[2] < 0.7 * error(teacher, 4)


def test_a_pretrained_network_learns_its_second_time():
    teacher = BUNDLED["digits"].load()
    noise = normal(256, 1, 8, 8, seed=99)
    end = fk.rollout(teacher, noise, 50).x[-1]
    run = dict(noise=(1, 8, 8), bank=256, batch=128, iterations=120, lr=1e-3, warmup=10, ema=0.97, grid=20, **QUIET)
    student = fk.straighten(None, teacher, fk.Schedule.uniform(2), target="average_velocity", **run).student

    def error(velocity, N):
        return (fk.sample(velocity, noise, N) - end).square().mean().sqrt().item()

    errors = [error(student.on(N), N) for N in (1, 2, 4)]
    print(errors, [error(teacher, N) for N in (1, 2, 4)])
    assert errors == sorted(errors, reverse=True)
    for N, found in zip((1, 2, 4), errors, strict=True):
        assert found < 0.85 * error(teacher, N)


# ---- the student ----


def moved(student):
    """With a second time that counts."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in student.net.embedding.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return student


TEACHERS = {
    "mlp": (lambda: ResidualMLP(4, 16, 1, 8), (4,)),
    "unet": (lambda: UNet(1, (8, 8, 16), 8), (1, 8, 8)),
    "dit": (lambda: DiT(1, 4, 2, 16, 1, 2, 8), (1, 4, 4)),
    "field": (lambda: fk.VelocityField(Backwards(), reverse_time=True, time_scale=1000.0), (4,)),
}


class Backwards(nn.Module):
    """A stranger's, in thousandths of the time from data to noise."""

    def __init__(self):
        super().__init__()
        self.time_embed = nn.Sequential(nn.Linear(1, 8), nn.SiLU(), nn.Linear(8, 12))
        self.last = nn.Linear(16, 4)

    def forward(self, x, t):
        return self.last(torch.cat([x, torch.tanh(self.time_embed(t[:, None] / 1000))], 1))


def random_weights(make):
    torch.manual_seed(0)
    net = make()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return net.eval()


@pytest.mark.parametrize("name", TEACHERS)
def test_a_student_of_two_times_starts_as_the_network_of_one(name):
    make, shape = TEACHERS[name]
    teacher, state = random_weights(make), torch.get_rng_state()
    student = fk.AverageVelocity.from_velocity(teacher)
    assert torch.equal(torch.get_rng_state(), state)
    assert not student.training
    x, t, s = normal(5, *shape), torch.linspace(0, 0.9, 5), torch.linspace(0.4, 1, 5)
    with torch.no_grad():
        v = teacher(x, t)
        assert torch.equal(student(x, t, s), v)
        assert torch.equal(teacher(x, t), v)  # which is not changed
        u = moved(student)(x, t, s)
        assert (u - v).abs().max() > 1e-3
        for same in (copy.deepcopy(student), pickle.loads(pickle.dumps(student))):
            assert torch.equal(same(x, t, s), u)
            moved(same)
            assert torch.equal(student(x, t, s), u)
        other = fk.AverageVelocity.from_velocity(random_weights(make))
        other.load_state_dict(student.state_dict())
        assert torch.equal(other(x, t, s), u)
        torch.testing.assert_close(student.on([0.25, 0.5, 1])(x, times(*[0.5] * 5)), student(x, x.new_full((5,), 0.5),
                                   x.new_ones(5)), rtol=0, atol=0)  # fmt: skip
        dense = fk.sample(student.on(4), x, 4)
        late = [fk.sample(student.on(plan), x, [0.5, 0.75, 1]) for plan in (4, [0.5, 0.75, 1])]
        assert torch.equal(*late)
        assert torch.equal(fk.rollout(student.on(4), x, 4).x[-1], dense)


@pytest.mark.parametrize(
    ("student", "plan"),
    [
        (lambda: fk.AverageVelocity(Rates(RATES.float())), fk.Schedule.uniform(4)),
        (lambda: moved(fk.AverageVelocity.from_velocity(ResidualMLP(3, 16, 1, 8))), fk.Solver.euler(4)),
    ],
    ids=["two times", "made of one"],
)
def test_a_compiled_loop(student, plan):
    on, x = student().on(4), normal(5, 3)

    @torch.compile(backend="eager", fullgraph=True)
    def loop(x):
        return fk.sample(on, x, plan)

    torch.testing.assert_close(loop(x), fk.sample(on, x, 4))


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_a_transformer_of_diffusers(family):
    transformers = pytest.importorskip("_transformers")
    field, noise = transformers.field_of(family, n=3, guidance=2.0)
    student = fk.AverageVelocity.from_velocity(field, time_embedding="time_text_embed")
    t, s = torch.full((3,), 0.2), torch.full((3,), 0.7)
    alone = field.without_guidance()
    with torch.no_grad():
        assert torch.equal(student(noise, t, s), alone(noise, t))
        u = moved(student)(noise, t, s)
        assert (u - alone(noise, t)).abs().max() > 1e-4
    found = student.derivative(noise, t, s, u)
    assert torch.isfinite(found).all()
    objective = fk.StraightenLoss(fk.Schedule(KNOTS), target="average_velocity", teacher=field)
    states = torch.stack([noise] * 4)
    batch = fk.BankBatch(states, torch.arange(4) % 3, torch.tensor([2, 0, 1, 1]))
    objective(student, batch, torch.Generator().manual_seed(0)).loss.backward()
    assert student.net.embedding.mlp[2].weight.grad.abs().max() > 0


class Recorder(nn.Module):
    """What a network of two times is called with."""

    def forward(self, z, r, t, y=0.0):
        self.seen = (r.clone(), t.clone())
        return (t - r).view(-1, 1) * z + y


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_conventions(guidance):
    """Of MeanFlow: from data to noise, z at the later time t, r the earlier; with conditioning and guidance."""
    net, rows = Recorder(), normal(4, 1, seed=3)
    convention = dict(reverse_time=True, time_scale=8.0, x_name="z", time_name="t", second_name="r")
    conditioning = dict(conditioning=dict(y=rows), unconditional=dict(y=torch.zeros(1, 1)), guidance=guidance)
    student = fk.AverageVelocity(net, **convention, **conditioning)
    x, t, s = normal(4, 2), torch.tensor([0.0, 0.25, 0.5, 0.5]), torch.tensor([1.0, 0.5, 0.5, 0.75])
    u = student(x, t, s)
    n = 8 if guidance != 1 else 4
    assert torch.equal(net.seen[0], (8 * (1 - s)).repeat(n // 4))
    assert torch.equal(net.seen[1], (8 * (1 - t)).repeat(n // 4))
    close(u, -(8 * (s - t))[:, None] * x - guidance * rows, 1e-5, 1e-6)
    part = student.rows(torch.tensor([2, 0]), 4)
    close(part(x[[2, 0]], t[[2, 0]], s[[2, 0]]), u[[2, 0]], 1e-5, 1e-6)
    sized = fk.AverageVelocity(lambda x, t, dt: dt.view(-1, 1) * x, second_name="dt", second_is_size=True, time_scale=8)
    close(sized(x, t, s), (8 * (s - t))[:, None] * x, 1e-6, 1e-7)
    one = student.on([0.0, 0.25, 1.0])
    close(one(x, times(0, 0.25, 0.25, 0)), student(x, times(0, 0.25, 0.25, 0), times(0.25, 1, 1, 0.25)))


def test_calls_in_several_threads_do_not_mix():
    student = moved(fk.AverageVelocity.from_velocity(random_weights(TEACHERS["mlp"][0])))
    x, found = normal(64, 4), {}

    def call(k):
        for _ in range(30):
            found[k] = student(x, torch.zeros(64), torch.full((64,), k / 4))

    threads = [threading.Thread(target=call, args=(k,)) for k in range(4)]
    for run in (threading.Thread.start, threading.Thread.join):
        for thread in threads:
            run(thread)
    for k in range(4):
        close(found[k], student(x, torch.zeros(64), torch.full((64,), k / 4)), 1e-6, 1e-6)


class Attention(nn.Module):
    """With torch's attention, or one that has no forward-mode derivative."""

    def __init__(self, kernel=False):
        super().__init__()
        self.qkv, self.kernel = nn.Linear(6, 12), kernel

    def forward(self, x, t, s):
        h = torch.cat([x, torch.stack([t, s], 1)[:, None].expand(-1, x.shape[1], -1).to(x)], 2)
        q, k, v = self.qkv(h)[:, None].chunk(3, -1)
        return (Kernel.apply(v) if self.kernel else scaled_dot_product_attention(q, k, v))[:, 0]


class Kernel(torch.autograd.Function):
    """A custom operation, of which only the backward is known."""

    generate_vmap_rule = True

    @staticmethod
    def forward(v):
        return v.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].cos()


def test_the_derivative_along_the_flow():
    """By forward mode, of attention too, compiled and not; without one it says so before a bank is rolled out."""
    torch.manual_seed(0)
    net = Attention().double()
    x, v = (normal(3, 5, 4, seed=k, dtype=torch.float64) for k in (0, 1))
    t, s, eps = times(0.1, 0.3, 0.5), times(0.2, 0.9, 0.5), 1e-6
    with torch.no_grad():
        expected = (net(x + eps * v, t + eps, s) - net(x - eps * v, t - eps, s)) / (2 * eps)
    for inside in (net, torch.compile(net, backend="eager"), nn.DataParallel(net)):
        close(fk.AverageVelocity(inside).derivative(x, t, s, v), expected, 1e-6, 1e-8)
    calls, student = [], fk.AverageVelocity(Attention(kernel=True))
    run = dict(noise=(5, 4), iterations=2, bank=8, batch=4, grid=4, target="average_velocity", init="keep", **QUIET)

    def teacher(x, t):
        calls.append(len(x))
        return -x

    with pytest.raises(ValueError, match=r"^net: expected a network whose operations have forward-mode derivatives"):
        fk.straighten(student, teacher, fk.Schedule.uniform(2), consistency="derivative", **run)
    assert sum(calls) < 8  # of the trial
    fk.straighten(student, teacher, fk.Schedule.uniform(2), **run)


# ---- the whole loop ----

RUN = dict(iterations=24, bank=24, batch=8, lr=1e-2, warmup=4, log_every=3, noise=(4,), grid=6, **QUIET)
VARIANTS = {
    "split": {},
    "derivative": dict(consistency="derivative", weighting="adaptive", instantaneous=0.25),
    "refreshed": dict(refresh=5, t_sampling="ten", loss="cauchy"),
}


def trained(student=None, **settings):
    teacher = random_weights(TEACHERS["mlp"][0])
    torch.manual_seed(7)
    return fk.straighten(student, teacher, fk.Schedule.uniform(2), target="average_velocity", **RUN | settings)


def same(a, b):
    there = b.student.state_dict()
    return all(torch.equal(v, there[k]) for k, v in a.student.state_dict().items()) and a.history == b.history


class Stopped(Exception):
    pass


@pytest.mark.parametrize("variant", VARIANTS)
def test_resuming_is_bit_for_bit(variant, tmp_path):
    settings = VARIANTS[variant]
    whole, path = trained(**settings), tmp_path / "run.pt"
    assert isinstance(whole.student, fk.AverageVelocity)
    student = fk.AverageVelocity.from_velocity(random_weights(TEACHERS["mlp"][0]))
    left = [40]

    def stop(module, _):
        left[0] -= 1
        if left[0] < 0:
            raise Stopped

    handle = student.net.register_forward_pre_hook(stop)
    with pytest.raises(Stopped):
        trained(student, checkpoint=path, checkpoint_every=7, **settings)
    handle.remove()
    assert path.exists()
    assert same(whole, trained(checkpoint=path, checkpoint_every=7, **settings))
    assert same(whole, trained(checkpoint=path, **settings))  # a finished run is only loaded
    for change in (dict(instantaneous=0.75), dict(consistency="split" if "consistency" in settings else "derivative")):
        with pytest.raises(ValueError, match=rf"^checkpoint: expected one of this run \(({'|'.join(change)}) = "):
            trained(checkpoint=path, **settings | change)


def test_what_the_student_starts_from():
    """The teacher's weights, where it is made of such a network; its own of two times with init="keep"."""
    teacher, rest = random_weights(TEACHERS["mlp"][0]), dict(iterations=1, lr=1e-12, warmup=0, ema=None)
    student = moved(fk.AverageVelocity.from_velocity(ResidualMLP(4, 16, 1, 8)))
    second = copy.deepcopy(student.net.embedding.state_dict())
    whole = copy.deepcopy(student.state_dict())
    for init in (None, "teacher", teacher.state_dict()):
        student.load_state_dict(whole)
        trained(student, init=init, **rest)
        close(student.net.net.state_dict()["output.weight"], teacher.output.weight.detach(), 1e-6, 1e-7)
        close(student.net.embedding.state_dict(), second, 1e-6, 1e-7)
    own = moved(copy.deepcopy(student))
    state = copy.deepcopy(own.net.state_dict())
    trained(student, init=state, **rest)
    close(student.net.state_dict(), state, 1e-6, 1e-7)
    with pytest.raises(ValueError, match=r"^student: expected weights that fit the student"):
        trained(fk.AverageVelocity(MLP(), second_name="dt"))


def test_autocast_and_a_compiled_network():
    with torch.autocast("cpu", torch.bfloat16):
        for form in FORMS:
            assert math.isfinite(trained(consistency=form, iterations=3).history["loss"][-1])
    net = MLP()
    student = fk.AverageVelocity(torch.compile(net, backend="eager"), second_name="dt", second_is_size=True)
    run = dict(init="keep", noise=(2,), iterations=3, bank=8, batch=8, grid=4, target="average_velocity", **QUIET)
    results = []
    for each in (student, fk.AverageVelocity(MLP(), second_name="dt", second_is_size=True)):
        results.append(fk.straighten(each, modes(), fk.Schedule.uniform(2), **run))
    close(results[0].history["loss"], results[1].history["loss"], 1e-5, 1e-7)


class Row(nn.Module):
    """Of two times, or of one, and a row a sample."""

    def __init__(self, p=0.7):
        super().__init__()
        self.p = nn.Parameter(torch.tensor(p))

    def forward(self, x, t, s=None, rows=0.0):
        s = t if s is None else s
        return self.p * x + rows * (1 + t + s).to(x.dtype)[:, None]


@pytest.mark.parametrize("form", FORMS)
def test_conditioning_of_fields_and_of_batches(form):
    """Follows the samples in every evaluation, the teacher's with guidance; that of a batch is as good as a field's."""
    n, rows, sample = 6, normal(6, 4, seed=1), torch.tensor([5, 0, 2, 2, 1, 3, 4, 0])
    states, interval, found = normal(4, n, 4), torch.arange(8) % 3, []
    guided = dict(unconditional={"rows": torch.zeros(1, 4)}, guidance=2.0)
    for of_batch in (False, True):
        given = {} if of_batch else dict(conditioning={"rows": rows})
        student = fk.AverageVelocity(Row(), **given)
        teacher = fk.VelocityField(Row(0.3), conditioning={"rows": rows[:1] if of_batch else rows}, **guided)
        objective = fk.StraightenLoss(
            fk.Schedule(KNOTS), target="average_velocity", consistency=form, teacher=teacher, instantaneous=0.4
        )
        batch = fk.BankBatch(states, interval, sample, conditioning={"rows": rows[sample]} if of_batch else None)
        losses = objective(student, batch, torch.Generator().manual_seed(0))
        losses.loss.backward()
        found.append((losses.per_sample.detach(), student.net.p.grad))
    assert found[0][0].mean() > 0.1
    for a, b in zip(*found, strict=True):
        close(a, b, 1e-5, 1e-6)


AMBIENT = {
    "default float64": lambda: default_float64(),
    "default meta": lambda: torch.device("meta"),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


@contextlib.contextmanager
def default_float64():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("state", AMBIENT)
def test_what_a_caller_has_set_does_not_count(state, form):
    noise, teacher = normal(6, 4), random_weights(TEACHERS["mlp"][0])
    settings = dict(noise=noise, iterations=3, batch=4, grid=4, consistency=form, lr=0.01, warmup=0, ema=None)

    def run():
        result = fk.straighten(None, teacher, fk.Schedule.uniform(2), target="average_velocity", **settings, **QUIET)
        return result.history["loss"], fk.sample(result.student.on(2), noise, 2)

    expected = run()
    with AMBIENT[state]():
        loss, x1 = run()
    assert loss == expected[0]
    assert torch.equal(x1, expected[1])


def test_pairs_without_a_teacher():
    """Of x_1 = e^a x_0 on straight lines: any step's average velocity is the line's."""
    torch.manual_seed(0)
    x0 = normal(64, 3)
    pairs = fk.Pairs(torch.stack([x0, x0 * RATES.float().exp()]))

    class Straight(nn.Module):
        """w x / (1 + w t): the velocity of straight lines to (1 + w) x, of any two times."""

        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(3))

        def forward(self, x, t, s):
            return self.w * x / (1 + self.w * t[:, None])

    settings = dict(iterations=300, batch=64, lr=0.05, warmup=0, ema=0.9, clip=None, target="average_velocity")
    student = fk.AverageVelocity(Straight())
    result = fk.straighten(student, None, fk.Schedule([0, 1]), bank=pairs, init="keep", **settings, **QUIET)
    for N in (1, 3):
        found = fk.sample(result.student.on(N), x0, N)
        torch.testing.assert_close(found, pairs.states[1], rtol=5e-3, atol=5e-3)


class OneTime(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(4))

    def forward(self, x, t):
        return self.w * x


WHO = r"^student: expected two times, an AverageVelocity"
BAD_RUNS = {
    "one time": (dict(student=OneTime()), TypeError, WHO + r".* got a module OneTime"),
    "a field of one": (dict(student=fk.VelocityField(OneTime())), TypeError, WHO),
    "consistency": (dict(consistency="both"), ValueError, r"^consistency: expected 'split' or 'derivative', got both"),
    "share": (dict(instantaneous=1.5), ValueError, r"^instantaneous: expected a share of the examples, in \[0, 1\]"),
    "nothing to add to": (
        dict(velocity=OneTime()),
        ValueError,
        r"^time_embedding: expected the name of the submodule that embeds the time .*None for a OneTime",
    ),
}


@pytest.mark.parametrize("bad", BAD_RUNS)
def test_a_run_that_cannot_be(bad):
    change, error, message = BAD_RUNS[bad]
    settings = dict(student=None, velocity=ResidualMLP(4, 16, 1, 8), schedule=fk.Schedule.uniform(2)) | RUN | change
    calls = []
    hook = nn.modules.module.register_module_forward_pre_hook(lambda module, _: calls.append(module))
    try:
        with pytest.raises(error, match=message):
            fk.straighten(target="average_velocity", **settings)
    finally:
        hook.remove()
    assert calls == []


class Tuple(nn.Module):
    """Whose embedding is no tensor."""

    def __init__(self):
        super().__init__()
        self.time_embed, self.other = Pair(), nn.Linear(2, 2)

    def forward(self, x, t):
        return x + self.time_embed(t[:, None])[0]


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(1, 2)

    def forward(self, t):
        return self.linear(t), t


def test_what_is_no_student_of_two_times():
    two, x, t = fk.AverageVelocity(Linear()), normal(2, 3, dtype=torch.float64), times(0, 0.5)
    made = fk.AverageVelocity.from_velocity
    for call, error, message in (
        (lambda: fk.AverageVelocity(OneTime()), TypeError, r"^net: expected a network of two times, net\(x, t, s=s\)"),
        (lambda: fk.AverageVelocity(Linear(), second_name="r"), TypeError, r"^net: .* net\(x, t, r=r\)"),
        (lambda: fk.AverageVelocity(Linear(), second_name=3), TypeError, r"^second_name: "),
        (lambda: fk.AverageVelocity(Linear(), conditioning={"s": 1}), ValueError, r"^second_name: expected another"),
        (lambda: two(x, t), ValueError, r"^s: expected the second time \(student.on\(schedule\)"),
        (lambda: two(x, t, times(1)), ValueError, r"^s: expected times of shape \[2\]"),
        (lambda: two(x, t, 1), TypeError, r"^s: expected a torch.Tensor"),
        (lambda: fk.sample(two, x, 2), ValueError, r"^s: expected the second time"),
        (lambda: fk.sample(two.on(2), x, 4), ValueError, r"^t: expected one of the knots \[0.0, 0.5\] .* got 0.25"),
        (lambda: fk.sample(two.on(4), x, 2), ValueError, r"^schedule: expected every knot .* got .* at \[0.0, 0.5\]"),
        (lambda: fk.sample(two.on(4), x, [0, 1]), ValueError, r"^schedule: expected every knot .* got .* at \[0.0\]"),
        (lambda: two.on(2)(x, times(0, 1)), ValueError, r"^t: expected one of the knots \[0.0, 0.5\] .* got 1"),
        (lambda: two.on([1, 0]), ValueError, r"^schedule: "),
        (lambda: made(lambda x, t: x), TypeError, r"^velocity: expected a network that is a module"),
        (
            lambda: made(Tuple(), time_embedding="nowhere"),
            ValueError,
            r"^time_embedding: expected a submodule of Tuple",
        ),
        (lambda: made(Tuple(), width=0), ValueError, r"^width: "),
        (
            lambda: made(Tuple())(x[:, :2].float(), t.float(), t.float()),
            ValueError,
            r"^time_embedding: .*shape \[2, 2\], got 'time_em",
        ),
        (
            lambda: made(Tuple(), time_embedding="other")(x[:, :2].float(), t.float(), t.float()),
            ValueError,
            r"^time_embedding: .* was not called",
        ),
    ):
        with pytest.raises(error, match=message):
            call()
