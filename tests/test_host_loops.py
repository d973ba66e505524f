"""`host_loop` and `host_velocity` on loops that other codebases have, written small: each is followed, or refused."""

import itertools
import math
import threading
import types
from typing import ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import flowkernels as fk
from flowkernels.integrations.host_loops import host_loop, host_velocity

N = 4
SCHEDULES = {
    "knots": lambda: fk.Schedule([0, 0.1, 0.45, 0.8, 1]),
    "uniform": lambda: N,
    "Adams-Bashforth": lambda: fk.Solver.adams_bashforth(N),
    "fitted": lambda: fk.Solver(
        [0, 0.3, 1],  # two evaluations a step, past velocities, and x_0 in part
        [0, 0.2, 0.35, 0.8],
        torch.tensor([[0.2, 0, 0, 0], [0.1, 0.2, 0, 0], [0.3, -0.1, 0.6, 0], [0.2, 0.1, 0.3, 0.4]]),
        start_coefficients=[1, 0.9, 1.1, 0.95],
    ),
}


class Net(nn.Module):
    """dx/dt, of our time."""

    def __init__(self):
        super().__init__()
        self.inside, self.out = nn.Linear(4, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor, t) -> Tensor:
        t = torch.as_tensor(t, dtype=x.dtype).reshape(-1, *[1] * (x.dim() - 1)).expand(*x.shape[:-1], 1)
        return self.out(torch.tanh(self.inside(torch.cat([x, t], -1))))


# ---- loops of others: the function that is asked, and the loop ----


class Lerobot(nn.Module):
    """pi0 and SmolVLA: falling, times [n], -dx/dt."""

    name = "denoise_step"

    def __init__(self):
        super().__init__()
        self.net = Net()

    def denoise_step(self, masks, x_t, timestep):
        return -self.net(x_t, 1 - timestep)

    def sample(self, x, steps):
        dt = -1.0 / steps
        for step in range(steps):
            time = torch.tensor(1.0 + step * dt, dtype=torch.float32, device=x.device).expand(len(x))
            x = x + dt * self.denoise_step(x_t=x, masks=None, timestep=time)
        return x


class OpenPi(Lerobot):
    """Times that add up, and a state written in place."""

    def sample(self, x, steps):
        dt, time, x = torch.tensor(-1.0 / steps), torch.tensor(1.0), x.clone()
        while time >= -dt / 2:
            x += dt * self.denoise_step(None, x, time.expand(len(x)))
            time += dt
        return x


class Rising(Lerobot):
    name = "velocity"

    def velocity(self, sample, t, **kwargs):
        return self.net(sample, t), kwargs

    def sample(self, x, steps):
        for i in range(steps):
            x = x + self.velocity(x, i / steps, kept=True)[0] / steps
        return x


class Matcha(Lerobot):
    """solve_euler: a network in an attribute, and times of no dimension."""

    name = "estimator"

    class Estimator(Net):
        def forward(self, x, mask, mu, t):
            return super().forward(x, t) * mask

    def __init__(self):
        super().__init__()
        self.estimator = self.Estimator()

    def t_span(self, steps):
        return torch.linspace(0, 1, steps + 1)

    def sample(self, x, steps):
        span = self.t_span(steps)
        t, dt, mask = span[0], span[1] - span[0], torch.ones_like(x)
        for step in range(1, len(span)):
            x = x + dt * self.estimator(x, mask, None, t)
            t = t + dt
            if step < len(span) - 1:
                dt = span[step + 1] - t
        return x


class CosyVoice(Matcha):
    """Times by a cosine."""

    settings: ClassVar[dict] = dict(times=[1 - math.cos(i / N * math.pi / 2) for i in range(N + 1)])

    def t_span(self, steps):
        return 1 - torch.cos(super().t_span(steps) * 0.5 * math.pi)


class Buckets(Lerobot):
    """GR00T's times: integers up to 1000."""

    name: ClassVar[str] = "denoise_step"

    settings: ClassVar[dict] = dict(ends=(0, 1000))

    def denoise_step(self, noisy_actions, timesteps):
        return self.net(noisy_actions, timesteps.to(noisy_actions.dtype) / 1000)

    def sample(self, x, steps):
        for i in range(steps):
            bucket = torch.full((len(x),), int(i / steps * 1000), device=x.device)
            x = x + (1.0 / steps) * self.denoise_step(x, bucket)
        return x


class Sigmas(Lerobot):
    """Of 1000 as diffusers has them, [n, 1, 1]."""

    name: ClassVar[str] = "denoise_step"

    settings: ClassVar[dict] = dict(ends=(1000, 0), state="hidden", time="noise_level")

    def denoise_step(self, hidden, *, noise_level):
        return -self.net(hidden, 1 - noise_level / 1000)

    def sample(self, x, steps):
        sigmas = [1 - i / steps for i in range(steps + 1)]
        for now, after in itertools.pairwise(sigmas):
            x = x + (after - now) * self.denoise_step(x, noise_level=torch.full((len(x), 1, 1), now * 1000))
        return x


class Backwards(Lerobot):
    """Falling times, and steps along dx/dt: rectified flows with time from data to noise."""

    settings: ClassVar[dict] = dict(sign=-1)

    def denoise_step(self, x, t):
        return self.net(x, 1 - t)

    def sample(self, x, steps):
        for i in range(steps):
            x = x + self.denoise_step(x, torch.full((len(x), 1), 1 - i / steps)) * (1 / steps)
        return x


class Subtracts(Lerobot):
    settings: ClassVar[dict] = dict(sign=-1, ends=(0, 1))

    def denoise_step(self, x, t):
        return -self.net(x, t)

    def sample(self, x, steps):
        for i in range(steps):
            x = x - self.denoise_step(x, t=torch.tensor(i / steps)) * (1 / steps)
        return x


class LateStart(Lerobot):
    """From t = 0.001, as its schedules have it."""

    name: ClassVar[str] = "velocity"

    settings: ClassVar[dict] = dict(times=torch.linspace(0.001, 1, N + 1))

    def velocity(self, x, t):
        return self.net(x, t)

    def sample(self, x, steps):
        times = torch.linspace(0.001, 1, steps + 1)
        for t, after in itertools.pairwise(times):
            x = x + self.velocity(x, t) * (after - t)
        return x


HOSTS = [Lerobot, OpenPi, Rising, Matcha, CosyVoice, Buckets, Sigmas, Backwards, Subtracts]


def velocity_of(host):
    """dx/dt of the host's network, called here."""
    if isinstance(host, Matcha):
        return lambda x, t: host.estimator(x, 1.0, None, t)
    if isinstance(host, Buckets):
        return lambda x, t: host.net(x, (t * 1000).round() / 1000)
    return host.net


def made(kind, dtype=torch.float32):
    torch.manual_seed(0)
    return kind().to(dtype).eval(), torch.randn(5, 2, 3, dtype=dtype)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", HOSTS)
def test_a_loop_is_followed(kind, schedule):
    host, noise = made(kind)
    solver, settings = SCHEDULES[schedule](), getattr(kind, "settings", {})
    before = host.sample(noise, N)
    with host_loop(host, kind.name, solver, **settings) as loop:
        first = host.sample(noise, N)
        again = host.sample(noise, N)
    expected = fk.sample(velocity_of(host), noise, solver)
    torch.testing.assert_close(first, expected, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(loop.state, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(first, again)
    assert torch.equal(host.sample(noise, N), before)
    assert kind.name not in vars(host)
    if schedule == "uniform" and kind is not CosyVoice:
        torch.testing.assert_close(first, before, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("kind", [kind for kind in HOSTS if kind is not CosyVoice])
def test_what_a_host_asks_is_a_velocity(kind):
    """Calibrated, and sampled with alone or by the host."""
    host, noise = made(kind)
    settings = getattr(kind, "settings", {})
    v = host_velocity(host, kind.name, lambda: host.sample(noise, N), **settings)
    assert torch.equal(v.noise, noise)
    solver = fk.calibrate(v, v.noise, grid=12, steps=[N], effort="fit").best(N)
    alone = fk.sample(v, noise, solver)
    torch.testing.assert_close(alone, fk.sample(velocity_of(host), noise, solver), rtol=1e-5, atol=1e-6)
    with v.loop(solver):
        by_host = host.sample(noise, N)
    torch.testing.assert_close(by_host, alone, rtol=1e-5, atol=2e-6)


def test_a_loop_that_begins_late_is_followed():
    host, noise = made(LateStart)
    solver = fk.Solver.adams_bashforth([0.001, 0.2, 0.5, 0.8, 1])
    with host_loop(host, "velocity", solver, **LateStart.settings):
        x = host.sample(noise, N)
    torch.testing.assert_close(x, fk.sample(host.net, noise, solver), rtol=1e-5, atol=2e-6)
    with pytest.raises(ValueError, match=r"^solver: expected a solver from t = 0.001"):
        host_loop(host, "velocity", N, **LateStart.settings)
    told = r"^ends: expected the host's times of noise and of data.* of 0.001"
    with pytest.raises(ValueError, match=told), host_loop(host, "velocity", N):
        host.sample(noise, N)


# ---- loops that are none, or not such ones ----


class Clips(Lerobot):
    def sample(self, x, steps):
        for i in range(steps):
            x = (x - self.denoise_step(None, x, torch.full((len(x),), 1 - i / steps)) / steps).clamp(-0.5, 0.5)
        return x


class Renoises(Lerobot):
    def sample(self, x, steps):
        for i in range(steps):
            x = x - self.denoise_step(None, x, torch.full((len(x),), 1 - i / steps)) / steps
            x = x + 1e-3 * torch.randn_like(x)
        return x


class Inpaints(Lerobot):
    def sample(self, x, steps):
        for i in range(steps):
            x = x - self.denoise_step(None, x, torch.full((len(x),), 1 - i / steps)) / steps
            x = torch.cat([torch.zeros_like(x[:, :1]), x[:, 1:]], 1)
        return x


class TwoCalls(Lerobot):
    """Guidance by two calls a step."""

    def sample(self, x, steps):
        for i in range(steps):
            t = torch.full((len(x),), 1 - i / steps)
            v, uncond = (self.denoise_step(masks, x, t) for masks in (1, None))
            x = x - (uncond + 2 * (v - uncond)) / steps
        return x


class TwoRows(Lerobot):
    """Guidance by a batch of both, as CosyVoice has it."""

    def denoise_step(self, masks, x_t, timestep):
        return super().denoise_step(masks, x_t, timestep) * torch.tensor([1.0, 0.5]).repeat_interleave(5)[:, None, None]

    def sample(self, x, steps):
        for i in range(steps):
            both = torch.cat([x, x])
            v, uncond = self.denoise_step(None, both, torch.full((len(both),), 1 - i / steps)).chunk(2)
            x = x - (1.7 * v - 0.7 * uncond) / steps
        return x


class Guides(Lerobot):
    """A correction of the velocity, as real-time chunking makes it."""

    def sample(self, x, steps):
        for i in range(steps):
            v = self.denoise_step(None, x, torch.full((len(x),), 1 - i / steps))
            x = x - (v - 0.1 * x) / steps
        return x


class Heun(Lerobot):
    def sample(self, x, steps):
        for i in range(steps):
            t = torch.full((len(x),), 1 - i / steps)
            v = self.denoise_step(None, x, t)
            x = x - (v + self.denoise_step(None, x - v / steps, t - 1 / steps)) / (2 * steps)
        return x


class Midpoint(Lerobot):
    def sample(self, x, steps):
        for i in range(steps):
            t = torch.full((len(x),), 1 - i / steps)
            middle = x - self.denoise_step(None, x, t) / (2 * steps)
            x = x - self.denoise_step(None, middle, t - 1 / (2 * steps)) / steps
        return x


class Multistep(Lerobot):
    def sample(self, x, steps):
        past = None
        for i in range(steps):
            v = self.denoise_step(None, x, torch.full((len(x),), 1 - i / steps))
            x, past = x - (v if past is None else 1.5 * v - 0.5 * past) / steps, v
        return x


class OwnTimes(Lerobot):
    def sample(self, x, steps):
        times = (1 - torch.linspace(0, 1, steps + 1) ** 2).tolist()
        for t, after in itertools.pairwise(times):
            x = x + (after - t) * self.denoise_step(None, x, torch.full((len(x),), t))
        return x


class Fewer(Lerobot):
    def sample(self, x, steps):
        return super().sample(x, steps - 1)


class More(Lerobot):
    def sample(self, x, steps):
        return super().sample(x, steps + 1)


class EndsEarly(Lerobot):
    def sample(self, x, steps):
        for i in range(steps - 1):
            x = x - self.denoise_step(None, x, torch.full((len(x),), 1 - i / steps)) / steps
        return x


class Doubled(Lerobot):
    """One loop that ends early, and another one."""

    def sample(self, x, steps):
        return super().sample(EndsEarly.sample(self, x, steps), steps)


class Wide(Lerobot):
    """GR00T's network, from embedded actions to a hidden state: no velocity of a state."""

    def denoise_step(self, x, t):
        return torch.cat([x, x], -1)

    def sample(self, x, steps):
        return self.denoise_step(x, torch.ones(len(x)))


class OfArrays(Lerobot):
    def sample(self, x, steps):
        return self.denoise_step(None, x.numpy(), 1.0)


class PerToken(Lerobot):
    """A time for each action: diffusion forcing."""

    def sample(self, x, steps):
        for i in range(steps):
            times = torch.stack([torch.full((len(x),), 1 - i / steps), torch.ones(len(x))], 1)
            x = x - self.denoise_step(None, x, times[:, :1] if i == 0 else times) / steps
        return x


class Elsewhere(Lerobot):
    def sample(self, x, steps):
        return x


OTHER_STATE = r"^x_t: expected the state that denoise_step's velocity leads to at call 2: .*differs from it by"
OTHER_TIME = r"^timestep: expected 0.75 at call 2 of 4 steps, one call a step, .*, got "
REFUSED = {
    Clips: OTHER_STATE,
    Renoises: OTHER_STATE,
    Inpaints: OTHER_STATE,
    TwoCalls: rf"{OTHER_TIME}1$",
    TwoRows: OTHER_STATE,
    Guides: OTHER_STATE,
    Heun: r"^timestep: expected 0.5 at call 3 of 4 steps.*, got 0.75$",
    Midpoint: rf"{OTHER_TIME}0.875$",
    Multistep: r"^x_t: expected the state that denoise_step's velocity leads to at call 3",
    OwnTimes: rf"{OTHER_TIME}0.9375$",
    Fewer: rf"{OTHER_TIME}0.66",
    More: rf"{OTHER_TIME}0.8$",
    EndsEarly: r"^solver: expected 4 calls of denoise_step by each of the host's loops.*, got one that ended after 3",
    Doubled: r"^timestep: expected 0.25 at call 4 of 4 steps.*, got 1$",
    Wide: r"^denoise_step: expected a velocity of the state's shape",
    OfArrays: r"^x_t: expected a torch.Tensor, got ndarray",
    PerToken: r"^timestep: expected 0.75 at call 2 of 4 steps.*, got 0.75 to 1$",
    Elsewhere: r"^solver: expected 4 calls of denoise_step.*, got none at all",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_another_loop_is_refused(kind):
    """And the host is as it was."""
    host, noise = made(kind)
    with pytest.raises((TypeError, ValueError), match=REFUSED[kind]), host_loop(host, kind.name, N):
        host.sample(noise, N)
    assert kind.name not in vars(host)


@pytest.mark.parametrize("kind", [Lerobot, Rising])
def test_another_sign_is_refused(kind):
    host, noise = made(kind)
    told = r"expected the state .*of the other sign: `sign`.* differs from it by"
    with pytest.raises(ValueError, match=told), host_loop(host, kind.name, N, sign=-1):
        host.sample(noise, N)


class PerStep(Lerobot):
    """Conditioning that changes from step to step."""

    def denoise_step(self, masks, x_t, timestep):
        return super().denoise_step(masks, x_t, timestep) * masks

    def sample(self, x, steps):
        for i in range(steps):
            x = x - self.denoise_step(1 + i, x, torch.full((len(x),), 1 - i / steps)) / steps
        return x


def test_what_is_no_velocity_is_refused():
    host, noise = made(PerStep)
    with pytest.raises(ValueError, match=r"^call: expected a function of state and time .*the host's last call"):
        host_velocity(host, "denoise_step", lambda: host.sample(noise, N))
    with pytest.raises(ValueError, match=r"^call: expected a call in which denoise_step is called"):
        host_velocity(host, "denoise_step", lambda: None)
    host, noise = made(PerToken)
    with pytest.raises(ValueError, match=r"^timestep: expected one time for all"):
        host_velocity(host, "denoise_step", lambda: host.denoise_step(None, noise, torch.rand(len(noise))))


def test_nan_is_told_as_such():
    """After the last step too."""
    host, noise = made(Lerobot)
    noise[3] = float("nan")
    for steps in (N, 1):
        told = r"NaN or Inf in sample 3 at step 0"
        with pytest.raises(ValueError, match=told), host_loop(host, "denoise_step", steps):
            host.sample(noise, steps)


class Named(NamedTuple):
    velocity: torch.Tensor
    cache: int


@pytest.mark.parametrize("form", [lambda v: (v, 1), lambda v: [v, 1], lambda v: Named(v, 1)])
def test_what_is_returned_keeps_its_form(form):
    class Host:
        def velocity(self, x_t, time):
            return form(-x_t)

        def sample(self, x, steps):
            for i in range(steps):
                returned = self.velocity(x, i / steps)
                assert type(returned) is type(form(x))
                assert returned[1] == 1
                x = x + returned[0] / steps
            return x

    host, noise = Host(), torch.randn(3, 2)
    with host_loop(host, "velocity", [0, 0.2, 1]):
        torch.testing.assert_close(host.sample(noise, 2), fk.sample(lambda x, t: -x, noise, [0, 0.2, 1]))


# ---- caches, batches, copies ----


class Caches(Lerobot):
    """An object of its own that every call writes to."""

    class Cache:
        def __init__(self, keys):
            self.keys, self.calls = [keys], 0

    def denoise_step(self, past_key_values, x_t, timestep):
        past_key_values.keys[0] += 1  # in place, and undone by no one
        past_key_values.calls += 1
        shift = past_key_values.keys[0][:, None, None] - past_key_values.calls
        return -self.net(x_t + shift, 1 - timestep)

    def sample(self, x, steps, shift):
        cache = self.Cache(shift.clone())
        for i in range(steps):
            x = x - self.denoise_step(cache, x, torch.full((len(x),), 1 - i / steps)) / steps
        return x


def test_caches_that_calls_write_to_are_copied():
    host, noise = made(Caches)
    shift = torch.randn(5)
    v = host_velocity(host, "denoise_step", lambda: host.sample(noise, N, shift))
    expected = fk.sample(lambda x, t: host.net(x + shift[:, None, None], t), noise, N)
    for _ in range(2):
        torch.testing.assert_close(fk.sample(v, noise, N), expected)
    with v.loop(N):
        torch.testing.assert_close(host.sample(noise, N, shift), expected)


@pytest.mark.parametrize("index", [slice(2), torch.tensor([4, 1, 1, 0]), slice(0, 0)])
def test_each_sample_has_the_conditioning_of_its_row(index):
    """Whatever the batch, and with a time for each."""
    host, noise = made(Caches)
    shift = torch.randn(5)
    v = host_velocity(host, "denoise_step", lambda: host.sample(noise, N, shift))
    x, t = torch.randn(12, 2, 3), torch.rand(12)
    expected = host.net(x + shift.repeat(3)[:12, None, None], t)
    torch.testing.assert_close(v(x, t), expected)
    torch.testing.assert_close(v.rows(index, 12)(x[index], t[index]), expected[index])
    torch.testing.assert_close(v(x[:5], t[:1]), host.net(x[:5] + shift[:, None, None], t[:1]))
    with pytest.raises(ValueError, match=r"^x: expected the states of the velocity's 3 samples"):
        v.rows(slice(3), 5)(x, t)


# ---- where and how it runs ----


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("schedule", ["knots", "fitted"])
def test_other_dtypes(dtype, schedule):
    """The state beside a narrow host's is float32: the host's is off by the rounding of its last step."""
    host, noise = made(Lerobot, dtype)
    solver = SCHEDULES[schedule]()
    with host_loop(host, "denoise_step", solver) as loop:
        x = host.sample(noise, N)
    assert x.dtype == dtype
    rounded = lambda x, t: host.net(x.to(dtype), 1 - (1 - t).to(torch.float32))  # noqa: E731
    expected = fk.sample(rounded, noise, solver)
    assert loop.state.dtype == expected.dtype
    torch.testing.assert_close(loop.state, expected, rtol=1e-6, atol=1e-6)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(x.to(expected.dtype), loop.state, rtol=4 * eps, atol=4 * eps)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_ambient_states(context, autocast, default):
    host, noise = made(Lerobot)
    solver, before = fk.Solver.adams_bashforth(N), torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        with context(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            v = host_velocity(host, "denoise_step", lambda: host.sample(noise, N))
            expected = fk.sample(v, noise, solver)
            with host_loop(host, "denoise_step", solver):
                x = host.sample(noise, N)
    finally:
        torch.set_default_dtype(before)
    assert x.dtype == torch.float32
    assert not x.requires_grad
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=2e-6)
    assert noise.is_inference() is False


@pytest.mark.parametrize(
    ("kind", "schedule"), [(Lerobot, "fitted"), (Rising, "Adams-Bashforth"), (Matcha, "knots"), (Buckets, "fitted")]
)
def test_the_whole_loop_compiled(kind, schedule):
    """As one graph; and as the host was, before and after."""
    host, noise = made(kind)
    solver = SCHEDULES[schedule]()
    settings: ClassVar[dict] = dict(ends=(0, 1)) if kind is Matcha else dict(ends=(1, 0)) if kind is Lerobot else {}
    settings |= getattr(kind, "settings", {})
    torch.compiler.reset()
    backend = "aot_eager" if kind is Lerobot else "eager"
    sample = torch.compile(host.sample, backend=backend, fullgraph=True)
    with torch.no_grad():
        before = sample(noise, N)
        loop = host_loop(host, kind.name, solver, **settings)
        for _ in range(3):
            with loop:
                x = sample(noise, N)
        expected = fk.sample(velocity_of(host), noise, solver)
        torch.testing.assert_close(x, expected, rtol=1e-5, atol=2e-6)
        assert torch.equal(sample(noise, N), before)


def test_compiled_times_are_told():
    host, noise = made(Lerobot)
    torch.compiler.reset()
    sample = torch.compile(host.sample, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"ends") as caught, host_loop(host, "denoise_step", N):
        sample(noise, N)
    assert "Observed exception" in str(caught.value)
    eager = torch.compile(host.sample, backend="eager")  # which falls back, and looks
    with host_loop(host, "denoise_step", [0, 0.1, 0.45, 0.8, 1]) as loop:
        x = eager(noise, N)
    torch.testing.assert_close(x, fk.sample(host.net, noise, loop.solver), rtol=1e-5, atol=2e-6)


def test_blocks_are_nested_and_entered_again():
    host, noise = made(Lerobot)
    schedules = fk.Schedule([0, 0.1, 0.45, 0.8, 1]), fk.Schedule([0, 0.7, 1])
    expected = [fk.sample(host.net, noise, s) for s in schedules]
    outer, inner = (host_loop(host, "denoise_step", s) for s in schedules)
    plain = host.sample(noise, N)
    for _ in range(2):
        with outer:
            with inner:
                torch.testing.assert_close(host.sample(noise, 2), expected[1], rtol=1e-5, atol=2e-6)
            torch.testing.assert_close(host.sample(noise, N), expected[0], rtol=1e-5, atol=2e-6)
            with outer:
                torch.testing.assert_close(host.sample(noise, N), expected[0], rtol=1e-5, atol=2e-6)
            torch.testing.assert_close(host.sample(noise, N), expected[0], rtol=1e-5, atol=2e-6)
        assert torch.equal(host.sample(noise, N), plain)


def test_an_error_of_the_host_leaves_a_loop_behind():
    host, noise = made(Lerobot)
    with host_loop(host, "denoise_step", N) as loop:
        with pytest.raises(RuntimeError):
            host.denoise_step(None, torch.randn(5, 2, 7), torch.ones(5))
        x = host.sample(noise, N)
    assert torch.equal(loop.state, x) or (loop.state - x).abs().max() < 1e-6
    with pytest.raises(ZeroDivisionError), host_loop(host, "denoise_step", N):
        1 / len(host.denoise_step(None, noise, torch.ones(5))[:0])
    assert "denoise_step" not in vars(host)


def test_threads_have_loops_of_their_own():
    """Of one block, and of a block each, whichever ends first."""
    host, noise = made(Lerobot)
    plans = [fk.Schedule([0, 0.1 + 0.05 * i, 0.45, 0.8, 1]) for i in range(4)]
    expected = [fk.sample(host.net, noise, plan) for plan in plans]
    meet, found = threading.Barrier(4), {}

    def run(i, own):
        for _ in range(5):
            meet.wait(30)
            if own:
                with host_loop(host, "denoise_step", plans[i]):
                    meet.wait(30)
                    found[i] = host.sample(noise, N)
            else:
                found[i] = host.sample(noise, N)

    def all_of(own):
        threads = [threading.Thread(target=run, args=(i, own)) for i in range(4)]
        [thread.start() for thread in threads]
        [thread.join(60) for thread in threads]
        assert len(found) == 4

    all_of(True)
    for i in range(4):
        torch.testing.assert_close(found.pop(i), expected[i], rtol=1e-5, atol=2e-6)
    assert "denoise_step" not in vars(host)
    with host_loop(host, "denoise_step", plans[0]):
        all_of(False)
    for i in range(4):
        torch.testing.assert_close(found.pop(i), expected[0], rtol=1e-5, atol=2e-6)


def test_owners_of_other_kinds():
    """A module's function, a function that the object holds, a compiled network; a class and an object with slots are
    refused."""
    host, noise = made(Lerobot)
    module = types.ModuleType("theirs")
    exec(
        "def velocity(x, t):\n    return net(x, t)\n"
        "def sample(x, N):\n    for i in range(N):\n        x = x + velocity(x, i / N) / N\n    return x",
        vars(module),
    )
    module.net = host.net
    solver, velocity = fk.Solver.adams_bashforth(N), module.velocity
    expected = fk.sample(host.net, noise, solver)
    with host_loop(module, "velocity", solver):
        torch.testing.assert_close(module.sample(noise, N), expected, rtol=1e-5, atol=2e-6)
    assert module.velocity is velocity
    holder = types.SimpleNamespace(velocity=torch.compile(lambda x, t: -x, backend="eager"))
    held = holder.velocity
    with host_loop(holder, "velocity", 1):
        assert torch.equal(noise + holder.velocity(noise, 0.0), torch.zeros_like(noise))
    assert holder.velocity is held
    compiled = torch.compile(host.net, backend="eager")
    with host_loop(compiled, "forward", solver):
        x = noise
        for i in range(N):
            x = x + compiled(x, i / N) / N
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=2e-6)

    class Slots:
        __slots__ = ()

        def velocity(self, x, t):
            return x

    told = r"^owner: expected an object whose velocity can be replaced"
    with pytest.raises(TypeError, match=told), host_loop(Slots(), "velocity", N):
        pass
    with pytest.raises(TypeError, match=r"^owner: expected an object or a module, not a class"):
        host_loop(Lerobot, "denoise_step", N)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(name="nothing"), "name: expected the name of a function of "),
        (dict(state="q"), "state: expected the name of an argument, one of masks, x_t, timestep, got 'q'"),
        (dict(time="x_t"), "time: expected another argument than the state"),
        (dict(ends=(1, 1)), "ends: expected two numbers"),
        (dict(ends=[1]), "ends: expected two numbers"),
        (dict(times=[0, 1]), "times: expected 5 times"),
        (dict(times=[0, 0.5, 0.4, 0.8, 1]), "times: expected 5 times, one more .* all rising or all falling"),
        (dict(times=[0, 1, 2, 3, 4]), "times: expected times from 0 to 1, or `ends`"),
        (dict(sign=0), "sign: expected 1 or -1, got 0"),
        (dict(check=None), "check: expected True or False"),
        (dict(solver=[0.5, 1]), "solver: expected a solver from t = 0 to 1"),
        (dict(solver=[0, 0.5]), "solver: expected a solver from t = 0 to 1"),
        (dict(solver=fk.Solver.euler(4, inverse=True)), "solver: expected a solver from noise to data"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    host, _ = made(Lerobot)
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        host_loop(**(dict(owner=host, name="denoise_step", solver=N) | arguments))
