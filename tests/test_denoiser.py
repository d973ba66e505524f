"""from_denoiser: predictions of data, noise and v on every kind of path, of which the straight velocity is known."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from _flows import normal
from torch import nn

import flowkernels as fk
from flowkernels.models.closed_form import GaussianMixtureVelocity
from flowkernels.velocity.denoiser import Denoiser

F64 = torch.float64
QUIET = dict(progress=False)
MEAN, STD = 0.7, 0.4
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=F64) ** 2  # Stable Diffusion's
TABLE = (1 - BETAS).cumprod(0)
ZERO_SNR = torch.cat([TABLE[:-1] * (1 - torch.arange(999, dtype=F64) / 1000), torch.zeros(1, dtype=F64)])


# ---- alpha and sigma of a network's own time, written once more ----


def linear(s):
    alpha = torch.exp(-0.25 * 19.9 * s**2 - 0.05 * s)
    return alpha, (1 - alpha**2).sqrt()


def of_table(table):
    levels = 0.5 * np.log((1 - table[table > 0].numpy()) / table[table > 0].numpy())

    def path(s):
        level = torch.from_numpy(np.interp(s.numpy(), np.arange(len(levels)), levels))
        last = s > len(levels) - 0.5  # the zero at its end
        return torch.where(last, 0.0, (1 + (2 * level).exp()).rsqrt()), torch.where(
            last, 1.0, (1 + (-2 * level).exp()).rsqrt()
        )

    return path


def bent(s):
    """On no circle, and its time runs from noise to data."""
    return s + 0.3 * s * (1 - s), (1 - s) ** 1.5


PATHS = {  # the argument, time_range, alpha and sigma
    "edm": ("variance_exploding", (0.002, 80.0), lambda s: (torch.ones_like(s), s)),
    "edm to 0": ("variance_exploding", (0.0, 20.0), lambda s: (torch.ones_like(s), s)),
    "cosine": ("cosine", None, lambda s: (torch.cos(math.pi / 2 * s), torch.sin(math.pi / 2 * s))),
    "linear": ("linear", None, linear),
    "straight": ("straight", None, lambda s: (1 - s, s)),
    "table": (TABLE, None, of_table(TABLE)),
    "zero snr": (ZERO_SNR, None, of_table(ZERO_SNR)),
    "function": (bent, (1.0, 0.0), bent),
    "function on a circle": (lambda s: (torch.cos(s), torch.sin(s)), (0.02, 1.5), lambda s: (s.cos(), s.sin())),
}
LATE = {"cosine": (0.0, 0.99), "straight": (0.0, 0.99), "zero snr": (0, 998), "function": (1.0, 0.02)}  # for noise


class Gaussian(nn.Module):
    """What an exact network predicts of data N(mean, std^2), of its own time as it is told."""

    def __init__(self, predicts, path, own=lambda told: told):
        super().__init__()
        self.predicts, self.path, self.own = predicts, path, own
        self.mean = nn.Parameter(torch.tensor(MEAN, dtype=F64))

    def forward(self, z, time, shift=None):
        assert time.dtype == (F64 if z.dtype == F64 else torch.float32)
        alpha, sigma = (part[:, None] for part in self.path(self.own(time.double())))
        mean = self.mean if shift is None else self.mean + shift[:, None].double()
        off = (z.double() - alpha * mean) / (alpha**2 * STD**2 + sigma**2)
        data, noise = mean + alpha * STD**2 * off, sigma * off
        return dict(data=data, noise=noise, v=alpha * noise - sigma * data)[self.predicts].to(z.dtype)


def exact(x, t, mean=MEAN):
    t = t[:, None]
    return mean + (t * STD**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * STD**2) * (x - t * mean)


def made(name, predicts, own=lambda told: told, **more):
    argument, ends, path = PATHS[name]
    ends = LATE.get(name, ends) if predicts == "noise" else ends
    return fk.from_denoiser(Gaussian(predicts, path, own), predicts, argument, time_range=ends, **more)


def is_on_circle(name):
    return name in ("cosine", "linear", "table", "zero snr", "function on a circle")


EACH = [(n, p) for n, p in itertools.product(PATHS, ("data", "noise", "v")) if p != "v" or is_on_circle(n)]


def times_of(v):
    """Both ends, what is between, and the end of time."""
    first = max(v.start, v.path.first)
    inner = first + (v.end - first) * torch.tensor([0.0, 1e-6, 0.01, 0.2, 0.5, 0.77, 0.99, 1.0], dtype=F64)
    return torch.cat([torch.tensor([v.start], dtype=F64), inner.clamp(max=v.end), torch.ones(1, dtype=F64)])


@pytest.mark.parametrize(("name", "predicts"), EACH)
def test_the_velocity_is_exact(name, predicts):
    v = made(name, predicts)
    t = times_of(v)
    x = normal(len(t), 3, dtype=F64)
    torch.testing.assert_close(v(x, t), exact(x, t), rtol=1e-12, atol=1e-12)
    assert v(x[:0], t[:0]).shape == (0, 3)

    narrow = v(x.float(), t)
    assert narrow.dtype == torch.float32
    factor = v.coefficients(t)[2].abs()[:, None]
    off = (narrow - exact(x.float().double(), t)).abs()
    assert bool((off <= 2e-7 * (1 + 3 * factor) * (1 + x.abs())).all())


@pytest.mark.parametrize(("name", "predicts"), EACH)
def test_gradients(name, predicts):
    v = made(name, predicts)
    t = (v.start + (v.end - v.start) * torch.tensor([0.1, 0.45, 0.9], dtype=F64)).requires_grad_()
    if name in ("table", "zero snr"):
        t = t.detach()  # numpy's interpolation has no gradient
    x = normal(3, 2, dtype=F64).requires_grad_()
    assert torch.autograd.gradcheck(v, (x, t))
    v(x, t).sum().backward()
    assert v.net.mean.grad.isfinite()
    last = torch.ones(3, dtype=F64)
    assert torch.autograd.gradcheck(v, (x, last))  # no 0 / 0


@pytest.mark.parametrize(("time", "own"), [("sigma", lambda s: s), ("c_noise", lambda s: (4 * s).exp())])
def test_what_the_network_is_told(time, own):
    for name, predicts in (("edm", "data"), ("linear", "noise"), ("table", "v")):
        ends = (0.01, 1.0) if name == "linear" else PATHS[name][1]
        of_sigma = lambda s: ((1 + s**2).rsqrt(), (1 + s**-2).rsqrt()) if name != "edm" else (torch.ones_like(s), s)  # noqa: E731, B023
        v = fk.from_denoiser(Gaussian(predicts, of_sigma, own), predicts, PATHS[name][0], time=time, time_range=ends)
        t = times_of(v)[:-1]
        x = normal(len(t), 3, dtype=F64)
        torch.testing.assert_close(v(x, t), exact(x, t), rtol=1e-11, atol=1e-11)
    v = made("cosine", "data", lambda told: told / 1000, time=lambda s: 1000 * s)
    x, t = normal(9, 3, dtype=F64), torch.linspace(0, 1, 9, dtype=F64)
    torch.testing.assert_close(v(x, t), exact(x, t), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("predicts", ["data", "noise", "v"])
def test_steps_that_are_rounded_to(predicts):
    told = []

    def net(z, step):
        assert step.dtype == torch.int64
        told.append(step)
        return Gaussian(predicts, of_table(TABLE))(z, step.double())

    v = fk.from_denoiser(net, predicts, TABLE, rounded=True)
    for K in (1, 2, 50, 400, 1000):
        grid = v.grid(K)
        assert (len(grid), grid[0], grid[-1]) == (K + 1, v.start, 1)
        assert bool((grid.diff() > 0).all())
        x = normal(K, 3, dtype=F64)
        torch.testing.assert_close(v(x, grid[:-1]), exact(x, grid[:-1]), rtol=1e-10, atol=1e-10)
    t = v.times([417.0, 417.4, 417.6, 3.0])
    v(normal(4, 3, dtype=F64), t)
    assert told[-1].tolist() == [417, 417, 418, 3]
    with pytest.raises(ValueError, match=r"^steps: expected at most 1000, the steps of the table, got 1001"):
        v.grid(1001)


@pytest.mark.parametrize("name", PATHS)
def test_its_own_times_and_states(name):
    v = made(name, "data")
    least, most = v.path.least, v.path.most
    own = torch.linspace(least, most, 7, dtype=F64)
    t = v.times(own)
    alpha, sigma = PATHS[name][2](own)
    torch.testing.assert_close(t, alpha / (alpha + sigma), rtol=1e-12, atol=1e-15)
    kept = slice(None, -2) if name == "zero snr" else slice(None)
    torch.testing.assert_close(v.own_times(t)[kept], own[kept], rtol=1e-9, atol=1e-11)
    x = normal(2, 3, dtype=F64)
    for i in (1, 3):
        torch.testing.assert_close(v.state(x, t[i]), x / (alpha + sigma)[i])
        torch.testing.assert_close(v.own_state(v.state(x, t[i]), t[i]), x)
    torch.testing.assert_close(v.state(x), x / (alpha + sigma)[-1])
    torch.testing.assert_close(v.initial(x), (1 - t[-1]) * x)
    for outside in ([v.path.whole[0] - 0.5], [v.path.whole[1] + 0.5]):
        if math.isfinite(outside[0]):
            with pytest.raises(ValueError, match=r"^own: expected the path's times, from "):
                v.times(outside)
    with pytest.raises(ValueError, match=r"^t: expected times from .* to 1.*, got 1.5"):
        v(x, torch.tensor([0.9, 1.5]))
    grid = v.grid(10)
    assert (len(grid), grid[0], grid[-1]) == (11, v.start, 1)
    assert grid[-2] <= v.end


def test_after_the_end_the_noise_stays():
    """As an independent loop has it that clamps sigma; continuous in t, and no larger than at the end."""
    v = made("edm", "data")
    y, sigma = normal(4, 3, dtype=F64), torch.full((4,), 0.002, dtype=F64)
    noise = (y - v.net(y, sigma)) / 0.002
    for t in (v.end, (1 + v.end) / 2, 1 - 1e-9):
        at = torch.full((4,), t, dtype=F64)
        torch.testing.assert_close(v(t * y, at), (t * y - noise) / t, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("capture", [None, "compile"])
def test_a_start_before_its_own_is_refused(capture):
    v, x = made("edm", "data"), normal(4, 3)
    with pytest.raises(ValueError, match=r"^velocity: expected times from 0.0123457 to 1, as in .grid\(steps\)"):
        fk.sample(v, x, 4, capture=capture)
    with pytest.raises(ValueError, match=r"^t: expected times from 0.0123457 .* got 0.01"):
        v(x, torch.full((4,), 0.01))
    with pytest.raises(ValueError, match=r"^velocity: expected times from 0.0123457"):
        fk.calibrate(v, x, 10, 2, **QUIET)
    apart = made("zero snr", "data")
    with pytest.raises(ValueError, match=r"^t: expected times from 0, or "):
        apart(x, torch.full((4,), apart.path.first / 2))
    nan = torch.func.vmap(lambda x, t: v(x[None], t[None])[0])(x, torch.tensor([0.01, 0.5, 1.0, 0.02]))
    assert nan.isnan().any(1).tolist() == [True, False, False, False]


# ---- conditioning and guidance ----


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize(("name", "predicts"), [("edm", "data"), ("table", "noise"), ("cosine", "v")])
def test_guidance(name, predicts, inside, packed):
    argument, ends, path = PATHS[name]
    settings = dict(
        conditioning={"shift": torch.tensor([0.0, 1, 2])}, unconditional={"shift": torch.tensor([5.0])}, guidance=2.5
    )
    net = Gaussian(predicts, path)
    if inside:
        v = fk.from_denoiser(fk.VelocityField(net, packed=packed, **settings), predicts, argument, time_range=ends)
    else:
        v = fk.VelocityField(fk.from_denoiser(net, predicts, argument, time_range=ends), packed=packed, **settings)
    x, grid = normal(3, 2), torch.linspace(0.3, 1, 5, dtype=F64)

    def wanted(x, t):
        cond, uncond = (exact(x.double(), t.double(), MEAN + c) for c in (torch.tensor([[0.0], [1], [2]]), 5.0))
        return uncond + 2.5 * (cond - uncond)

    found, reference = fk.sample(v, x, grid), fk.sample(wanted, x.double(), grid)
    torch.testing.assert_close(found.double(), reference, rtol=2e-5, atol=2e-5)
    rows = v.rows(torch.tensor([2, 0]), 3)
    torch.testing.assert_close(fk.sample(rows, x[[2, 0]], grid), found[[2, 0]])
    cal = fk.calibrate(v, x, grid, [2], chunk=2, **QUIET)
    assert cal.provenance.get("parameters_sha256")


def test_dtypes_and_names_of_a_network():
    """A bfloat16 network of a diffusers-like call, by a VelocityField around it; the state stays float32."""

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(0.5, dtype=torch.bfloat16))

        def forward(self, sample, timestep):
            assert (sample.dtype, timestep.dtype) == (torch.bfloat16, torch.float32)
            return (self.weight * sample * (timestep[:, None] / 1000).bfloat16(),)

    net = fk.VelocityField(Named(), x_name="sample", time_name="timestep", dtype=torch.bfloat16)
    v = fk.from_denoiser(net, "noise", TABLE)
    x, grid = normal(4, 3), v.grid(8)
    found = fk.sample(v, x, grid)
    assert found.dtype == torch.float32
    wide = fk.from_denoiser(lambda z, s: 0.5 * z * (s / 1000)[:, None], "noise", TABLE)
    torch.testing.assert_close(found, fk.sample(wide, x, grid), rtol=0.05, atol=0.05)
    low = v(x.bfloat16(), torch.full((4,), 0.5))  # the time is not rounded with the state
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), v(x, torch.full((4,), 0.5)), rtol=0.02, atol=0.02)
    v.to(torch.float16)
    assert v.path.levels.dtype == F64


# ---- the stages ----

MIXTURE = GaussianMixtureVelocity(torch.tensor([[-2.0, 0.5], [1.0, 1.5], [1.5, -1.0]], dtype=F64), 0.3)


def posterior(z, alpha, sigma):
    """E[x_1 | z] of the mixture on any path."""
    means = MIXTURE.means[None]
    alpha, sigma = (torch.as_tensor(part, dtype=F64).view(-1, 1, 1) for part in (alpha, sigma))
    variance = (alpha * 0.3) ** 2 + sigma**2
    off = z[:, None] - alpha * means
    weight = (-(off**2) / (2 * variance)).sum(2).softmax(1)[:, :, None]
    return (weight * (means + alpha * 0.09 / variance * off)).sum(1)


def host_solution(name, z):
    """From s = most to least in the host's own variables: the probability flow's equation as its authors write it."""
    from scipy.integrate import solve_ivp

    _, ends, path = PATHS[name]

    def slope(s, flat):
        z = torch.from_numpy(flat.reshape(-1, 2))
        alpha, sigma = (part.item() for part in path(torch.tensor([s], dtype=F64)))
        data = posterior(z, alpha, sigma)
        noise = (z - alpha * data) / sigma
        if name == "edm":  # dz/dsigma = (z - D) / sigma
            d = (z - data) / s
        elif name == "linear":  # -beta/2 (z + score), score = -noise / sigma
            d = -(0.1 + 19.9 * s) / 2 * (z - noise / sigma)
        else:  # cosine: v, along the angle
            d = math.pi / 2 * (alpha * noise - sigma * data)
        return d.numpy().ravel()

    least, most = (0.002, 80.0) if ends else (1e-4, 0.999)
    found = solve_ivp(slope, (most, least), z.numpy().ravel(), rtol=1e-8, atol=1e-9, method="DOP853")
    return torch.from_numpy(found.y[:, -1].reshape(-1, 2)), least, most


@pytest.mark.parametrize(("name", "predicts"), [("edm", "data"), ("linear", "noise"), ("cosine", "v")])
def test_calibrate_and_sample_against_the_host_s_own_equation(name, predicts):
    argument, _, path = PATHS[name]

    def net(z, s):
        alpha, sigma = (part[:, None].to(z) for part in path(s.double()))
        data = posterior(z, alpha, sigma)
        noise = (z - alpha * data) / sigma
        return dict(data=data, noise=noise, v=alpha * noise - sigma * data)[predicts]

    e = normal(64, 2, dtype=F64)
    first = 80 * e if name == "edm" else e
    end, least, most = host_solution(name, first)
    v = fk.from_denoiser(net, predicts, argument, time_range=(least, most))
    x = v.state(first)
    grid = v.grid(400)
    fine = fk.sample(v, x, fk.Solver.heun(grid))
    torch.testing.assert_close(fine, end, rtol=0, atol=0.01)  # of a step of data's width / 400, and least's noise
    cal = fk.calibrate(v, x, v.grid(100), [6], effort="fit", **QUIET)
    few = [(fk.sample(v, x, plan) - end).square().sum(1).mean().sqrt() for plan in (cal.best(6), cal[6], v.grid(6))]
    assert few[0] < min(0.3, few[2])
    assert few[1] < 1.05 * few[2]


def test_straightened():
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(3, 32), nn.SiLU(), nn.Linear(32, 2))

        def forward(self, z, s):
            return z - s[:, None] * self.body(torch.cat([z / (1 + s[:, None]), s.log()[:, None] / 4], 1))

    teacher = fk.from_denoiser(Net(), time_range=(0.01, 10.0))
    draw = lambda n, g: teacher.initial(torch.randn(n, 2, generator=g))  # noqa: E731
    cal = fk.calibrate(teacher, draw(64, torch.Generator().manual_seed(1)), teacher.grid(24), [2], **QUIET)
    settings = dict(noise=draw, grid=teacher.grid(24), iterations=150, bank=256, batch=64, lr=3e-3, held_out=64)
    result = fk.straighten(None, teacher, cal[2], **settings, **QUIET)
    assert isinstance(result.student, Denoiser)
    assert result.errors[1] < 0.5 * result.errors[0]
    assert all(a is not b for a, b in zip(result.student.parameters(), teacher.parameters(), strict=True))


def test_it_is_known_by_its_weights_and_settings(tmp_path):
    plain = Net2()
    v = fk.from_denoiser(plain, "noise", TABLE)
    x = v.initial(normal(8, 2))
    cal = fk.calibrate(v, x, v.grid(12), [2], **QUIET)
    cal.save(tmp_path / "a.boss.json")
    fk.Calibration.load(tmp_path / "a.boss.json", v)
    others = [
        fk.from_denoiser(plain, "v", TABLE),
        fk.from_denoiser(plain, "noise", TABLE**1.01),
        fk.from_denoiser(plain, "noise", TABLE, time="sigma"),
        fk.from_denoiser(plain, "noise", TABLE, time_range=(1, 999)),
        fk.from_denoiser(Net2(), "noise", TABLE),
    ]
    for other in others:
        with pytest.warns(UserWarning, match="got another"):
            fk.Calibration.load(tmp_path / "a.boss.json", other)
    twin = copy.deepcopy(v)
    torch.testing.assert_close(twin(x, torch.full((8,), 0.5)), v(x, torch.full((8,), 0.5)), rtol=0, atol=0)


class Net2(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 2)

    def forward(self, z, s):
        return torch.tanh(self.body(torch.cat([z, s[:, None] / 1000], 1)))


def test_inverted_and_its_likelihood():
    """From t = 1, where sigma is 0: both ask there first."""
    v = made("cosine", "data")
    noise, plan = normal(6, 2, dtype=F64), fk.Solver.heun(200)
    x = fk.sample(v, noise, plan)
    back = fk.invert(v, x, fk.Solver.heun(200, inverse=True), resample_with=plan)
    torch.testing.assert_close(back.noise, noise, rtol=2e-3, atol=2e-3)
    found = fk.log_likelihood(v, x, 200)
    wanted = -0.5 * ((x - MEAN) / STD).square().sum(1) - 2 * math.log(STD) - math.log(2 * math.pi)
    torch.testing.assert_close(found.nats, wanted, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(("name", "predicts"), [("edm", "data"), ("table", "noise"), ("cosine", "v")])
def test_compiled(name, predicts):
    torch._dynamo.reset()
    v = fk.from_denoiser(Plain(), predicts, PATHS[name][0], time_range=PATHS[name][1])
    x, grid = v.initial(normal(4, 3)), v.grid(3)
    one = torch.full((4,), 0.4)
    compiled = torch.compile(v, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, one), v(x, one), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fk.sample(compiled, x, grid), fk.sample(v, x, grid), rtol=1e-5, atol=1e-6)
    whole = torch.compile(lambda x: fk.sample(v, x, grid), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(whole(x), fk.sample(v, x, grid), rtol=1e-5, atol=1e-6)


class Plain(nn.Module):
    def forward(self, z, s):
        return z / (1 + s.square())[:, None]


# ---- what is refused ----

REFUSED = [
    (dict(path="karras"), "path: expected 'variance_exploding', 'cosine', 'linear' or 'straight', a table"),
    (dict(path=TABLE.flip(0)), "path: expected alphas_cumprod that fall within 1 and 0"),
    (dict(path=BETAS), r"path: expected alphas_cumprod .*\(1 - betas\).cumprod\(0\) of betas"),
    (dict(path=torch.tensor([1.0, 0.5])), "path: expected alphas_cumprod that fall"),
    (dict(path=TABLE.view(2, 500)), "path: expected a table alphas_cumprod of one dimension"),
    (dict(path=torch.tensor([0.9, math.nan, 0.1])), "path: expected alphas_cumprod that fall"),
    (dict(), "time_range: expected the model's times next to the data .* got None, and a model that has none"),
    (dict(time_range=(0.002, math.inf)), "time_range: expected"),
    (dict(time_range=(80, 0.002)), "time_range: expected"),
    (dict(time_range=(-1, 5)), "time_range: expected"),
    (dict(path=TABLE, time_range=(0, 1000)), "time_range: expected .* within 0 and 999"),
    (dict(path="straight", predicts="v"), "path: expected a path with alpha.2 . sigma.2 = 1 for v"),
    (dict(path="straight", predicts="noise"), "time_range: expected an end with alpha above 0"),
    (dict(path=ZERO_SNR, predicts="noise"), "time_range: expected an end with alpha above 0"),
    (dict(path=bent), "time_range: expected .* with a path that is a function"),
    (dict(path=bent, time_range=(0.0, 1.0)), "path: expected a sigma / alpha that rises"),
    (dict(path=lambda s: (s, s), time_range=(0.1, 1.0)), "path: expected a sigma / alpha that rises"),
    (dict(path=lambda s: s, time_range=(0.1, 1.0)), "path: expected a function of times"),
    (dict(path=TABLE, time="log"), "time: expected 'sigma', 'c_noise'"),
    (dict(path=TABLE, time=lambda s: 0.5), "time: expected a function that gives times"),
    (dict(time_range=(0, 80), time="c_noise"), "time: expected finite times for the network at both ends"),
    (dict(path="cosine", time="sigma"), "time: expected finite times for the network at both ends"),
    (dict(path="cosine", rounded=True), "rounded: expected False but with a table"),
    (dict(path=TABLE, rounded=True, time_range=(0.5, 900)), "time_range: expected steps of the table"),
]


@pytest.mark.parametrize(("settings", "said"), REFUSED)
def test_refused(settings, said):
    with pytest.raises((ValueError, TypeError), match=f"^{said}"):
        fk.from_denoiser(Plain(), **settings)


def test_sigmas_of_the_model_itself():
    class Bounded(Plain):
        sigma_min, sigma_max = torch.tensor(0.03), torch.tensor(14.6)

    v = fk.from_denoiser(Bounded())
    assert (v.path.least, v.path.most) == pytest.approx((0.03, 14.6))
    Bounded.sigma_min, Bounded.sigma_max = 0, float("inf")  # EDM's
    with pytest.raises(ValueError, match=r"time_range: expected .* a model whose own are \[0, inf\]"):
        fk.from_denoiser(Bounded())
    with pytest.raises(ValueError, match=r"^model: expected an answer of x's shape"):
        fk.from_denoiser(lambda z, s: torch.cat([z, z], 1), time_range=(0.1, 9))(normal(2, 3), torch.ones(2))
