"""fk.fuse: networks recorded, lowered to mlp_sample and compared with themselves run by torch."""

import gc
import itertools
import math
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import flowkernels as fk
from flowkernels.fusion import lowering
from flowkernels.fusion import recorded as recorded_module
from flowkernels.fusion import sampler as sampler_module
from flowkernels.fusion.lowering import Lowering
from flowkernels.models.bundled import BUNDLED
from flowkernels.models.networks import ResidualMLP, TimeEmbedding
from flowkernels.ops.mlp_sample.samples import error_and_bound
from flowkernels.ops.samples import Sample, generator
from flowkernels.runtime.backends import backend

ACTIVATIONS = {
    "relu": nn.ReLU,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "leaky relu": lambda: nn.LeakyReLU(0.2),
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu tanh": lambda: nn.GELU(approximate="tanh"),
    "elu": lambda: nn.ELU(0.7),
    "selu": nn.SELU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "mish": nn.Mish,
}


def randomised(net: nn.Module, seed: int = 0) -> nn.Module:
    """The network with all parameters random, zero-initialised ones too."""
    g = generator(seed)
    for p in net.parameters():
        width = p.shape[-1] if p.dim() > 1 else 4
        p.data = torch.randn(p.shape, generator=g) / width**0.5
    return net.eval()


def noise(n: int, *shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, *shape, generator=generator(seed))


def assert_same(sampler: fk.FusedSampler, velocity, x: torch.Tensor, schedule) -> None:
    """States and velocities of the fused sampler are those of the network in float64.

    Within the op's bound on the layers that the network became, which has their tables off by ulps, as the network's
    own parts make them in float32; and so is the op on those very tables.
    """
    fused, exact = fk.rollout(sampler, x, schedule), float64(velocity, x, schedule)
    batch, steps = sampler._batch, sampler._steps
    guided = {} if batch.unconditional is None else dict(unconditional=batch.unconditional, guidance=velocity.guidance)
    layers = x.flatten(1), steps.tolist() if isinstance(steps, torch.Tensor) else steps, batch.layers
    got = [v.flatten(1 - x.dim()) for v in sampler.run(x, states=True, velocities=True)]
    error, bound = error_and_bound(Sample("", layers, dict(trajectory=True, **guided)), got)
    assert error <= bound
    for got, truth in ((fused.x, exact.x), (fused.v, exact.v)):
        assert got.shape == truth.shape
        assert (got - truth).abs().max() <= bound * truth.abs().max()
    assert torch.equal(fk.sample(sampler, x, schedule), fused.x[-1])


def float64(velocity, x, schedule) -> fk.Trajectory:
    field = velocity if isinstance(velocity, fk.VelocityField) else fk.VelocityField(velocity)
    kept = {k: v.clone() for k, v in field.net.state_dict().items()}
    casts = field.conditioning, field.unconditional
    field.conditioning, field.unconditional = (
        {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in kw.items()}
        for kw in casts
    )
    try:
        field.net.double()
        return fk.rollout(field, x.double(), schedule)
    finally:
        field.net.float().load_state_dict(kept)
        field.conditioning, field.unconditional = casts


def mlp(dims, activation=nn.SiLU, bias=True):
    layers = []
    for a, b in itertools.pairwise(dims):
        layers += [nn.Linear(a, b, bias=bias), activation()]
    return nn.Sequential(*layers[:-1])


class TorchcfmMLP(nn.Module):
    """The architecture of torchcfm's MLP(dim, time_varying=True): one input, SELU."""

    def __init__(self, dim, w=64):
        super().__init__()
        self.net = mlp([dim + 1, w, w, w, dim], nn.SELU)

    def forward(self, x):
        return self.net(x)


class Policy(nn.Module):
    """A flow of actions conditioned on an observation: concatenation, time embedding, Mish."""

    def __init__(self, actions=7, obs=11, w=48):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(16, 32), nn.Mish(), nn.Linear(32, 16))
        self.net = mlp([actions + obs + 16, w, w, actions], nn.Mish)

    def forward(self, x, t, obs):
        angles = t.to(x.dtype)[:, None] * torch.exp(-torch.arange(8, device=t.device) / 2).to(x.dtype)
        emb = self.time(torch.cat([angles.sin(), angles.cos()], -1))
        return self.net(torch.cat([x, obs, emb], dim=-1))


class ClassConditional(nn.Module):
    """Labels and time in one embedding that scales and shifts every block."""

    def __init__(self, dim=10, w=33, classes=5):
        super().__init__()
        self.embed, self.time = nn.Embedding(classes + 1, 24), nn.Linear(1, 24)
        self.inp, self.out = nn.Linear(dim, w), nn.Linear(w, dim)
        self.norm = nn.LayerNorm(w)
        self.films = nn.ModuleList(nn.Linear(24, 2 * w) for _ in range(2))
        self.mids = nn.ModuleList(nn.Linear(w, w) for _ in range(2))

    def forward(self, x, t, label):
        emb = F.silu(self.time(t[:, None].to(x.dtype)) + self.embed(label))
        h = self.inp(x)
        for film, mid in zip(self.films, self.mids, strict=True):
            scale, shift = film(emb).chunk(2, -1)
            h = h + F.gelu(mid(self.norm(h) * (1 + scale) + shift))
        return self.out(h)


class Gated(nn.Module):
    """Slices, gates, GLU, skip connections by concatenation, differences, numbers, shapes of other rank."""

    def __init__(self, dim=6, w=20):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(dim + 1, 2 * w), nn.Linear(w, 2 * w), nn.Linear(2 * w + dim, w, bias=False)
        self.out, self.scale = nn.Linear(w, dim), nn.Parameter(torch.ones(w))

    def forward(self, x, t):
        time = torch.full((len(x), 1), 0.5, dtype=x.dtype) * t[:, None].to(x.dtype)
        g, u = self.a(torch.cat([x, time], 1)).chunk(2, dim=1)
        h = F.silu(g) * u
        y = F.glu(self.b(h), dim=-1)
        z = self.c(torch.cat([h, x, 1.0 - y], dim=1)).view(len(x), 4, -1).flatten(1)
        z = torch.tanh(z) - 2 * h * self.scale / 3.0
        return -self.out(z[:, :]).reshape(x.shape)


@pytest.mark.parametrize("name", ["cuda", "triton"])
@pytest.mark.parametrize("weights", [None, torch.bfloat16])
def test_on_the_kernels_of_gpus(weights, name):
    """Their programs are made from the same layers; on the host they take them on the CPU's tensors."""
    net, x = randomised(ClassConditional()), noise(7, 10)
    label, none = torch.arange(7) % 5, torch.tensor([5])
    field = fk.VelocityField(net, conditioning={"label": label}, guidance=2.5, unconditional={"label": none})
    policy = fk.VelocityField(randomised(Policy()), conditioning={"obs": noise(1, 11)})
    close = dict(rtol=0.05, atol=0.05) if weights else dict(rtol=1e-5, atol=1e-5)
    for velocity, dim in ((field, 10), (policy, 7), (randomised(Gated()), 6)):
        sampler, x = fk.fuse(velocity, 4, weights=weights), noise(7, dim)
        expected = sampler.run(x, states=True, velocities=True)
        with backend(name):
            got = sampler.run(x, states=True, velocities=True)
            again = sampler(x)
        assert torch.equal(again, got[0])
        assert len(sampler._batch._prepared) == 2
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, **close)
    sampler = fk.fuse(policy, 4, weights=weights)
    for n in (1, 3, 20):
        x, obs = noise(n, 7), noise(n, 11, seed=n)
        expected = sampler(x, obs=obs)
        with backend(name):
            torch.testing.assert_close(sampler(x, obs=obs), expected, **close)


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_what_is_not_finite_shows_in_the_result_of_kernels_of_gpus(name):
    """Nothing waits for a GPU to look for it."""
    sampler, x = fk.fuse(randomised(mlp([9, 16, 8])), 4), noise(30, 8)
    x[17, 3] = math.nan
    with backend(name):
        found = sampler(x).isfinite().all(1)
        with pytest.raises(ValueError, match="noise: expected finite values"):
            fk.calibrate(sampler, x, 4, 2, progress=False)
    assert (~found).nonzero().tolist() == [[17]]
    obs = noise(10, 11)
    field = fk.VelocityField(randomised(Policy()), conditioning={"obs": obs})
    sampler = fk.fuse(field, 4)
    field.conditioning["obs"] = obs.index_fill(0, torch.tensor([7]), math.inf)
    with backend(name), pytest.raises(ValueError, match=r"expected finite velocities, .* sample 7 at step 0"):
        fk.calibrate(sampler, noise(10, 7), 4, 2, chunk=10, progress=False)


def test_sequential_takes_time_as_its_last_column():
    net = randomised(mlp([65, 96, 96, 64]))
    field = fk.VelocityField(net, time_column=True)
    sampler = fk.fuse(net, 8)
    for n in (1, 2, 7, 50):
        assert_same(sampler, field, noise(n, 64), 8)
    by_hand = x = noise(3, 64)
    for i in range(8):
        with torch.no_grad():
            by_hand = by_hand + net(torch.cat([by_hand, torch.full((3, 1), i / 8)], 1)) / 8
    torch.testing.assert_close(sampler(x), by_hand, rtol=1e-5, atol=1e-5)


def test_arguments_that_an_activation_does_not_read(monkeypatch):
    monkeypatch.setattr(lowering, "ACTIVATED", lowering.ACTIVATED | {"threshold"})
    with pytest.raises(fk.NotFusable, match="threshold with arguments is not known to mlp_sample"):
        fk.fuse(mlp([5, 8, 4], lambda: nn.Threshold(0.1, 0.1)), 2)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    net = randomised(mlp([18, 37, 40, 17], ACTIVATIONS[activation]))
    assert_same(fk.fuse(net, 3), fk.VelocityField(net, time_column=True), noise(13, 17), 3)


def test_torchcfm_mlp():
    net = randomised(TorchcfmMLP(2))
    assert_same(fk.fuse(net, 10), fk.VelocityField(net, time_column=True), noise(100, 2), 10)


def test_bundled_digits_model():
    net = BUNDLED["digits"].load()
    sampler = fk.fuse(net, 20)
    assert_same(sampler, net, noise(9, 1, 8, 8), 20)
    kinds = [layer.map for layer in sampler._prepare(9, None).layers]
    assert kinds == ["linear", *["layer_norm", "linear", "linear"] * 3, "linear"]  # nothing runs on its own


def test_structures():
    net = randomised(Gated())
    assert_same(fk.fuse(net, 5), net, noise(23, 6), 5)


def test_schedules_share_one_network():
    net = randomised(ResidualMLP(12, 24, 2, 16))
    sampler, x = fk.fuse(net, 4), noise(5, 12)
    cal = fk.calibrate(sampler, x, 12, range(1, 5), progress=False)
    expected = fk.calibrate(net, x, 12, range(1, 5), progress=False)
    assert {n: s.indices for n, s in cal.items()} == {n: s.indices for n, s in expected.items()}
    torch.testing.assert_close(cal.cost, expected.cost, rtol=1e-4, atol=1e-9)
    assert cal.provenance["parameters_sha256"] == expected.provenance["parameters_sha256"]
    assert_same(sampler, net, x, cal[3].times)
    assert sampler.on(cal[3]) is sampler.on(cal[3].times)
    assert sampler.on(4) is sampler
    assert sampler.on(7)._network is sampler._network


def test_calibrate_in_chunks_with_conditioning():
    net, x = randomised(Policy()), noise(10, 7)
    field = fk.VelocityField(net, conditioning={"obs": noise(10, 11, seed=2)})
    got = fk.calibrate(fk.fuse(field, 6), x, 6, 3, chunk=4, progress=False)
    expected = fk.calibrate(field, x, 6, 3, progress=False)
    torch.testing.assert_close(got.cost, expected.cost, rtol=1e-4, atol=1e-9)


def test_conditioning_of_each_sample():
    net, x, obs = randomised(Policy()), noise(10, 7), noise(10, 11, seed=2)
    field = fk.VelocityField(net, conditioning={"obs": obs})
    sampler = fk.fuse(field, 5)
    assert_same(sampler, field, x, 5)
    other = noise(10, 11, seed=3)
    expected = fk.sample(fk.VelocityField(net, conditioning={"obs": other}), x, 5)
    torch.testing.assert_close(sampler(x, obs=other), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sampler(x), fk.sample(field, x, 5), rtol=1e-5, atol=1e-5)
    obs.mul_(-1)  # written in place: seen
    torch.testing.assert_close(sampler(x), fk.sample(field, x, 5), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("first", [1, 4])
def test_conditioning_of_other_numbers_of_samples(first):
    net = randomised(Policy())
    sampler = fk.fuse(fk.VelocityField(net, conditioning={"obs": noise(first, 11)}), 3)
    for n, rows in [(1, 1), (6, 1), (6, 6), (1, 1), (3, 3), (2, 1)]:
        x, obs = noise(n, 7), noise(rows, 11, seed=n)
        expected = fk.sample(fk.VelocityField(net, conditioning={"obs": obs}), x, 3)
        torch.testing.assert_close(sampler(x, obs=obs), expected, rtol=1e-5, atol=1e-5)


def test_many_samples_with_tables_of_their_own_run_in_parts(monkeypatch):
    net, x = randomised(ClassConditional()), noise(20, 10)
    label, none = torch.arange(20) % 5, torch.full((20,), 5)
    field = fk.VelocityField(net, conditioning={"label": label}, guidance=2.0, unconditional={"label": none})
    sampler = fk.fuse(field, 3)
    whole = sampler.run(x, {"label": label.flip(0)}, states=True, velocities=True)
    monkeypatch.setattr(sampler_module, "MOST_BYTES", 8 * 3 * 2 * (2 * 3 * 33) * 7)  # 7 samples
    recorded = []
    monkeypatch.setattr(recorded_module, "Lowering", lambda *args: recorded.append(1) or Lowering(*args))
    parts = sampler.run(x, {"label": label.flip(0)}, states=True, velocities=True)
    assert len(recorded) == 3
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)  # torch multiplies tables of other heights otherwise


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("labels", "nones"), [([1, 2, 3, 0, 4, 1], [5]), ([2], [5]), ([2], [5] * 6), ([1] * 6, [5] * 6)]
)
def test_labels_film_and_guidance(labels, nones, packed):
    net, x = randomised(ClassConditional()), noise(6, 10)
    label, none = torch.tensor(labels), torch.tensor(nones)
    field = fk.VelocityField(
        net, conditioning={"label": label}, guidance=2.5, unconditional={"label": none}, packed=packed
    )
    assert_same(fk.fuse(field, 4), field, x, 4)


def test_conventions_of_the_field():
    net = randomised(ResidualMLP(9, 24, 1, 16))
    for settings in (
        dict(reverse_time=True, time_scale=1000),
        dict(sign=-1),
        dict(time_name="t"),
        dict(x_name="x", time_name="t", time_scale=0.5),
    ):
        field = fk.VelocityField(net, **settings)
        assert_same(fk.fuse(field, 6), field, noise(4, 9), 6)


class RandomNet(nn.Module):
    """A network drawn from what is supported."""

    def __init__(self, seed: int):
        super().__init__()
        r = self.random = generator(seed)
        draw = self.draw = lambda *options: options[int(torch.randint(len(options), (), generator=r))]
        self.dim, self.cond = draw(1, 2, 5, 16, 31), draw(0, 0, 3, 8)
        self.time_mode, self.emb_width = draw("column", "film", "added", "none"), draw(4, 9)
        self.emb = nn.Sequential(nn.Linear(1, 8), nn.SiLU(), nn.Linear(8, self.emb_width))
        self.cond_mode = draw("concatenated", "in embedding") if self.cond else "none"
        self.to_emb = nn.Linear(self.cond, self.emb_width) if self.cond_mode == "in embedding" else None
        width = self.dim + (self.time_mode == "column") + (self.cond if self.cond_mode == "concatenated" else 0)
        self.steps, self.parts = [], nn.ModuleList()
        first = draw(3, 17, 32, 50)
        self.inp = nn.Linear(width, first, bias=draw(True, False))
        width = first
        for _ in range(draw(1, 2, 3)):
            kind = draw("plain", "residual", "gated", "skip")
            out = width if kind == "residual" else draw(5, 16, 33, 64)
            norm = draw(None, "plain", "affine")
            part = nn.Module()
            part.norm = nn.LayerNorm(width, elementwise_affine=norm == "affine") if norm else None
            film = self.time_mode == "film" or self.cond_mode == "in embedding"
            part.film = nn.Linear(self.emb_width, 2 * width) if film else None
            part.add = nn.Linear(self.emb_width, width) if self.time_mode == "added" else None
            part.linear = nn.Linear(width, 2 * out if kind == "gated" else out, bias=draw(True, False))
            part.act = ACTIVATIONS[draw(*ACTIVATIONS)]()
            self.parts.append(part)
            self.steps.append(kind)
            width = out + (width if kind == "skip" else 0)
        self.out = nn.Linear(width, self.dim)
        randomised(self, seed)

    def forward(self, x, t, c=None):
        emb = self.emb(t[:, None].to(x.dtype))
        if self.to_emb is not None:
            emb = emb * torch.tanh(self.to_emb(c))
        columns = [x]
        if self.time_mode == "column":
            columns.append(t[:, None].to(x.dtype))
        if self.cond_mode == "concatenated":
            columns.insert(1, c)
        h = self.inp(torch.cat(columns, 1))
        for kind, part in zip(self.steps, self.parts, strict=True):
            y = part.norm(h) if part.norm is not None else h
            if part.film is not None:
                scale, shift = part.film(F.silu(emb)).chunk(2, dim=-1)
                y = y * (1 + scale) + shift
            if part.add is not None:
                y = y + part.add(emb)
            y = part.linear(y)
            if kind == "gated":
                a, b = y.chunk(2, -1)
                y = part.act(a) * b
            else:
                y = part.act(y)
            h = h + y if kind == "residual" else torch.cat([y, h], -1) if kind == "skip" else y
        return self.out(h)


@pytest.mark.parametrize("seed", range(40))
def test_random_networks(seed):
    net = RandomNet(seed)
    n, steps = net.draw(1, 2, 6, 7, 33), net.draw(1, 2, 5)
    kwargs = {}
    if net.cond:
        kwargs["conditioning"] = {"c": noise(net.draw(1, n), net.cond, seed=seed)}
        if net.draw(True, False):
            kwargs |= dict(guidance=1.7, unconditional={"c": torch.zeros(1, net.cond)})
    field = fk.VelocityField(net, **kwargs)
    assert_same(fk.fuse(field, steps, shape=(net.dim,)), field, noise(n, net.dim, seed=seed), steps)


def test_bfloat16_weights_on_digits():
    """The endpoint differs from the network's own by less than a hundredth of the teacher's error at N = 8."""
    net, x = BUNDLED["digits"].load(), noise(256, 1, 8, 8)
    teacher = fk.sample(net, x, 100)
    eager = fk.sample(net, x, 8)
    fused = fk.fuse(net, 8, weights=torch.bfloat16)

    def error(a, b):
        return (a - b).double().square().flatten(1).sum(1).mean().item()

    assert fused.weights == torch.bfloat16
    assert 0 < error(fused(x), eager) < 0.01 * error(eager, teacher)


def test_bfloat16_network():
    net = randomised(ResidualMLP(16, 32, 2, 16))
    exact, x = fk.sample(net, noise(20, 16), 4), noise(20, 16)
    net.bfloat16()
    field = fk.VelocityField(net, dtype=torch.bfloat16)
    sampler = fk.fuse(field, 4)
    assert sampler.weights == torch.bfloat16
    error, of_torch = ((t - exact).abs().max() for t in (sampler(x), fk.sample(field, x, 4)))
    assert error <= 1.5 * of_torch  # the state and what lies between the layers is kept in float32 here
    assert fk.fuse(field, 4, weights=torch.float32).weights == torch.float32


def test_weights_that_change():
    net = randomised(mlp([9, 16, 8]))
    field, sampler, x = fk.VelocityField(net, time_column=True), fk.fuse(net, 3), noise(4, 8)

    def same():
        return torch.allclose(sampler(x), fk.sample(field, x, 3), atol=1e-5)

    assert same()
    assert not sampler.stale
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    net(torch.randn(5, 9)).square().sum().backward()
    optimizer.step()
    assert sampler.stale
    assert same()
    assert not sampler.stale
    net.load_state_dict({k: v * 0.9 for k, v in net.state_dict().items()})
    assert sampler.stale
    assert same()
    net.load_state_dict({k: v * 0.9 for k, v in net.state_dict().items()}, assign=True)
    assert sampler.stale
    assert same()
    net[0].weight = nn.Parameter(net[0].weight * 2)
    assert sampler.stale
    assert same()
    on_another = sampler.on(2)
    net[0].weight.data.mul_(0.5)  # leaves no trace
    assert not sampler.stale
    assert not same()
    sampler.refresh()
    assert same()
    torch.testing.assert_close(on_another(x), fk.sample(field, x, 2), rtol=1e-5, atol=1e-5)


def test_student_of_straighten():
    net, x = randomised(ResidualMLP(8, 16, 1, 8)), noise(32, 8)
    schedule = fk.calibrate(net, x, 10, 2, progress=False)[2]
    result = fk.straighten(None, net, schedule, noise=x, iterations=5, batch=8, progress=False)
    torch.testing.assert_close(
        fk.fuse(result.student, schedule)(x), fk.sample(result.student, x, schedule), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layouts_and_dtypes_of_noise(dtype):
    net = BUNDLED["digits"].load()
    sampler = fk.fuse(net, 2)
    x = noise(3, 8, 8, 1).to(dtype).permute(0, 3, 1, 2)
    got = sampler(x)
    assert got.dtype == torch.float32
    assert got.shape == (3, 1, 8, 8)
    assert got.is_contiguous()
    torch.testing.assert_close(got, fk.sample(net, x, 2), rtol=1e-4, atol=1e-5)


OTHER_NOISE = {
    "of another dtype": lambda x: x.bfloat16(),
    "strided": lambda x: x.T.contiguous().T,
    "a subclass": nn.Parameter,
    "with a gradient": lambda x: x.clone().requires_grad_(),
    "negated": lambda x: torch.complex(x, -x).conj().imag,
    "in another shape": lambda x: x[:, None],
}


@torch.no_grad()
def test_plain_noise_takes_the_short_way_and_other_noise_does_not(monkeypatch):
    sampler, x = fk.fuse(randomised(nn.Sequential(nn.Linear(4, 16), nn.SiLU(), nn.Linear(16, 3))), 4), noise(6, 3)
    expected, taken = sampler.run(x)[0], []
    for other in OTHER_NOISE.values():
        assert torch.equal(sampler(other(x)), sampler.run(other(x))[0])
    monkeypatch.setattr(sampler, "run", lambda noise, conditioning: taken.append(noise) or [noise])
    for rows in (slice(None), slice(1, 4)):
        assert torch.equal(sampler(x[rows]), expected[rows])
        assert torch.equal(fk.sample(sampler, x[rows], 4), expected[rows])
    assert not taken
    others = [other(x) for other in OTHER_NOISE.values()]
    others += [x[:0], x[0], x[:, :2], x.double(), x.to_sparse(), x / 0, [1.0], None]
    for other in others:
        sampler(other)
    with backend("reference"):
        sampler(x)
    with torch.profiler.profile():
        sampler(x)
    with fk.profile_ranges():
        sampler(x)
    torch.func.vmap(sampler)(x)
    sampler.velocity.net[0].bias.add_(1)
    sampler(x)
    assert len(taken) == len(others) + 5


def test_times_are_the_callers():
    net = randomised(nn.Sequential(nn.Linear(4, 16), nn.SiLU(), nn.Linear(16, 3)))
    sampler, x = fk.fuse(net, 4), noise(6, 3)
    expected = sampler(x)
    for made in (sampler, sampler.on(4), fk.fuse(net, 4)):
        made.times.zero_()
    fk.rollout(sampler, x, 4).times.zero_()
    for made in (sampler, sampler.on(4), fk.fuse(net, 4)):
        assert made.times.tolist() == [0, 0.25, 0.5, 0.75, 1]
        assert torch.equal(made(x), expected)
    assert torch.equal(fk.sample(sampler, x, 4), expected)


def test_reference_backend_agrees():
    net, x = BUNDLED["digits"].load(), noise(3, 1, 8, 8)
    sampler = fk.fuse(net, 5)
    with backend("reference"):
        expected = sampler(x)
        trajectory = fk.rollout(sampler, x, 5)
    torch.testing.assert_close(sampler(x), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(trajectory.x[-1], expected)


def test_says_what_stops_it():
    unet = BUNDLED["fashion"].load()
    with pytest.raises(fk.NotFusable, match=r"stem \(Conv2d\): convolution.*capture="):
        fk.fuse(unet, 4, shape=(1, 28, 28))
    attention = nn.Sequential(nn.Linear(9, 8), nn.Softmax(-1))
    with pytest.raises(fk.NotFusable, match=r"1 \(Softmax\): _?softmax"):
        fk.fuse(attention, 4)

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 4)

        def forward(self, x, t):
            return self.net(x) if x.sum() > 0 else x

    with pytest.raises(fk.NotFusable, match="expected a"):
        fk.fuse(Branches(), 4)

    class WholeTime(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 4)

        def forward(self, x, t):
            return self.net(x) * t[0]

    with pytest.raises(fk.NotFusable, match="made of several samples or several times"):
        fk.fuse(WholeTime(), 1)

    class AcrossSamples(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 4)

        def forward(self, x, t):
            return self.net(x - x.mean(0))

    with pytest.raises(fk.NotFusable, match="mean"):
        fk.fuse(AcrossSamples(), 4)
    with pytest.raises(fk.NotFusable, match="does not depend on x"):
        fk.fuse(lambda x, t: torch.zeros_like(x), 4, shape=(3,))


def test_clear_errors():
    net = randomised(mlp([9, 16, 8]))
    with pytest.raises(fk.NotFusable, match=r"shape: expected the shape of one sample.*without nn.Linear"):
        fk.fuse(lambda x, t: x, 4)
    with pytest.raises(fk.NotFusable, match=r"shape: expected the shape of one sample.*mat1"):
        fk.fuse(net, 4, shape=(5,))
    with pytest.raises(TypeError, match=r"weights: expected float32, bfloat16 or None, got torch.float16"):
        fk.fuse(net, 4, weights=torch.float16)
    with pytest.raises(ValueError, match="velocity: expected a network in float32 or bfloat16, got float64"):
        fk.fuse(fk.VelocityField(randomised(mlp([9, 16, 8])).double(), time_column=True, dtype=torch.float64), 4)
    with pytest.raises(ValueError, match="schedule: expected strictly increasing"):
        fk.fuse(net, [0.0, 0.7, 0.2, 1.0])
    sampler = fk.fuse(net, 4)
    for bad in (noise(3, 7), torch.randn(8), torch.empty(0, 8)):
        with pytest.raises(ValueError, match=r"noise: expected shape \[n, 8\]"):
            sampler(bad)
    with pytest.raises(TypeError, match=r"noise: expected torch.float32"):
        sampler(noise(3, 8).double())
    with pytest.raises(ValueError, match="noise: expected no gradient"):
        sampler(noise(3, 8).requires_grad_())
    with pytest.raises(ValueError, match="conditioning: expected names of the VelocityField's conditioning"):
        sampler(noise(3, 8), obs=1)
    policy = fk.fuse(fk.VelocityField(randomised(Policy()), conditioning={"obs": noise(1, 11)}), 3)
    with pytest.raises(ValueError, match=r"obs: expected shape \[1, 11\]"):
        policy(noise(3, 7), obs=noise(1, 12))
    with pytest.raises(TypeError, match=r"obs: expected a torch.Tensor"):
        policy(noise(3, 7), obs=None)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite(value):
    net = randomised(mlp([9, 16, 8]))
    sampler, x = fk.fuse(net, 4), noise(30, 8)
    x[17, 3] = value
    for call in (sampler, lambda x: fk.rollout(sampler, x, 4)):
        with pytest.raises(ValueError, match="noise: expected finite values, got NaN or Inf in sample 17"):
            call(x)
    with torch.no_grad():
        net[0].bias[0] = value
    finite = "velocity: expected finite velocities, got NaN or Inf in sample 0 at step 0"
    with pytest.raises(ValueError, match=finite):
        sampler(noise(3, 8))
    net = randomised(Policy())
    obs = noise(10, 11)
    obs[7] = value
    sampler = fk.fuse(fk.VelocityField(net, conditioning={"obs": obs.clamp(-1e3, 1e3).nan_to_num()}), 4)
    sampler.velocity.conditioning["obs"] = obs
    with pytest.raises(ValueError, match=r"velocity: expected finite velocities, got NaN or Inf in sample 7 at step 0"):
        fk.calibrate(sampler, noise(10, 7), 4, 2, chunk=3, progress=False)


def test_training_mode_warns_as_elsewhere():
    net = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 4))
    with pytest.warns(UserWarning, match="eval mode"), pytest.raises(fk.NotFusable):
        fk.fuse(net, 2)
    fk.fuse(net.eval(), 2)


def test_nothing_is_left_behind():
    """No hooks on modules, no gradients, no reference that keeps the network alive."""
    net = randomised(mlp([9, 16, 8]))
    modules = torch.nn.modules.module
    before = len(modules._global_forward_hooks), len(modules._global_forward_pre_hooks)
    sampler = fk.fuse(net, 4)
    with pytest.raises(fk.NotFusable):
        fk.fuse(nn.Sequential(nn.Linear(9, 8), nn.Softmax(-1)), 4)
    assert (len(modules._global_forward_hooks), len(modules._global_forward_pre_hooks)) == before
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    gone = weakref.ref(net)
    del net, sampler
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("call", [lambda s, x: s(x), lambda s, x: fk.sample(s, x, 4), lambda s, x: s.on(3)(x)])
def test_inside_compiled_functions(call):
    """It breaks the graph and runs as it is, after a change of the weights too."""
    net, x = randomised(mlp([9, 16, 8])), noise(3, 8)
    sampler = fk.fuse(net, 4)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: 2 * call(sampler, x), backend="eager")
    before = compiled(x)
    assert torch.equal(before, 2 * call(sampler, x))
    with torch.no_grad():
        net[0].weight.mul_(2)
    after = compiled(x)
    assert not torch.equal(after, before)
    assert torch.equal(after, 2 * call(sampler, x))


def test_several_threads():
    net = randomised(Policy())
    sampler = fk.fuse(fk.VelocityField(net, conditioning={"obs": noise(1, 11)}), 4)
    inputs = [(noise(3, 7, seed=i), noise(3, 11, seed=i + 9)) for i in range(4)]
    expected = [sampler(x, obs=obs) for x, obs in inputs]
    failed = []

    def work(i):
        for _ in range(50):
            if not torch.equal(sampler(inputs[i][0], obs=inputs[i][1]), expected[i]):
                failed.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failed


def test_time_embedding_is_evaluated_once_a_schedule():
    net = randomised(ResidualMLP(8, 16, 1, 8))
    calls = []
    net.time.register_forward_hook(lambda module, args, out: calls.append(len(args[0])))
    sampler, x = fk.fuse(net, 5), noise(3, 8)
    before = len(calls)
    for _ in range(3):
        sampler(x)
    assert len(calls) == before
    assert isinstance(net.time, TimeEmbedding)


def test_teacher_of_straighten():
    """The bank of a fused teacher is the teacher's, and so is the training."""
    net, x = randomised(ResidualMLP(8, 16, 1, 8)), noise(32, 8)
    sampler = fk.fuse(net, 10)
    schedule = fk.calibrate(sampler, x, 10, 2, progress=False)[2]
    settings = dict(noise=x, iterations=4, batch=8, log_every=1, progress=False)
    fused = fk.straighten(None, sampler, schedule, **settings)
    plain = fk.straighten(None, net, schedule, **settings)
    assert type(fused.student) is ResidualMLP
    torch.testing.assert_close(fused.history["loss"], plain.history["loss"], rtol=1e-3, atol=1e-6)


def test_inference_mode_autocast_and_gradients():
    """What the caller has set changes nothing; conditioning that does not count writes is read at every call."""
    net = randomised(Policy())
    x, obs = noise(4, 7), noise(4, 11, seed=2)
    field = fk.VelocityField(net, conditioning={"obs": obs})
    expected = fk.fuse(field, 3)(x)
    with torch.inference_mode():
        inside = fk.fuse(field, 3)
        assert torch.equal(inside(x), expected)
        own = obs.clone()
        assert torch.equal(inside(x, obs=own), expected)
        own.mul_(-1)
        assert torch.equal(inside(x, obs=own), fk.fuse(field, 3)(x, obs=-obs))
    assert torch.equal(inside(x), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = fk.fuse(field, 3)
        assert low.weights == torch.float32
        assert torch.equal(low(x), expected)
    layers = inside._prepare(4, None).layers
    assert not any(t.requires_grad for a in layers for t in (a.weight, *a.tables) if t is not None)
    with torch.inference_mode():
        made_inside = randomised(mlp([9, 16, 8]))
        sampler = fk.fuse(made_inside, 2)
        before = sampler(noise(2, 8))
        made_inside[0].weight.mul_(2)
        sampler.refresh()
        assert not torch.equal(sampler(noise(2, 8)), before)


class By(nn.Module):
    """A linear layer, and what a function makes of it, the time and the conditioning."""

    def __init__(self, function, dim=6):
        super().__init__()
        self.linear, self.function = nn.Linear(dim, dim), function

    def forward(self, x, t, **conditioning):
        return self.function(self.linear, x, t, **conditioning)


@pytest.mark.parametrize(
    "function",
    [
        lambda net, x, t, c: net(x * float(c.max())),
        lambda net, x, t, c: net(x * c[:, :1]) if c.max() > 1 else net(x),
        lambda net, x, t, c: net(x) * (2.0 if t.mean() > 0.9 else 1.0),
        lambda net, x, t, c: net(x) + t[0].expand(len(x), 1),
        lambda net, x, t, c: net(x) + (t - t.mean() + t.max())[:, None],
        lambda net, x, t, c: net(x) + (c - c.mean(0))[:, :1],
        lambda net, x, t, c: net(x) + c[:, :1] / c.norm(),
    ],
)
def test_what_depends_on_values_or_mixes_samples_is_refused(function):
    field = fk.VelocityField(randomised(By(function)), conditioning={"c": noise(5, 3)})
    with pytest.raises(fk.NotFusable, match=r"reads a value|made of several samples"):
        fk.fuse(field, 1, shape=(6,))


def by_recurrence(net, x, t, c):
    return net(x) + net.encoder(c)[1][0][-1]


def by_folding(net, x, t, c):
    return net(x) + net.encoder(c.flatten(0, 1)).view(len(x), -1)


@pytest.mark.parametrize(
    ("encoder", "function"),
    [(nn.LSTM(3, 6, batch_first=True), by_recurrence), (nn.Linear(3, 2), by_folding)],
)
def test_encoders_of_sequences(encoder, function):
    """Their samples are not always in the first dimension, or are folded into it together with the steps."""
    net = By(lambda linear, x, t, c: None)
    net.linear.encoder = encoder
    net.function = function
    randomised(net)
    for n in (5, 2, 97, 1):
        c = noise(n, 3, 3, seed=n)
        field = fk.VelocityField(net, conditioning={"c": c})
        x = noise(n, 6)
        torch.testing.assert_close(fk.fuse(field, 3, shape=(6,))(x), fk.sample(field, x, 3), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [11, 97])
def test_numbers_that_look_like_a_batch(steps):
    def embed(t, half):
        angles = t[:, None] * torch.arange(1.0, half + 1)
        return torch.cat([angles.sin(), angles.cos()], -1)

    net = By(lambda linear, x, t: linear(x) * torch.sin(t * 11)[:, None] + embed(t, 11)[:, 5:11])
    randomised(net)
    sampler = fk.fuse(net, steps, shape=(6,))
    for n, others in ((3, steps), (97, 7), (11, 20)):
        x = noise(n, 6)
        torch.testing.assert_close(sampler.on(others)(x), fk.sample(net, x, others), rtol=1e-4, atol=1e-5)


def test_tensors_of_the_shape_of_time_and_conditioning():
    def function(linear, x, t, c, y):
        e = torch.where((y == 0)[:, None], torch.zeros_like(c), c)
        return linear(x) + torch.stack([t, torch.ones_like(t), torch.full_like(t, 0.5)], -1) @ e.new_ones(3, 6) + e

    field = fk.VelocityField(randomised(By(function)), conditioning={"c": noise(4, 6), "y": torch.tensor([0, 1, 0, 2])})
    assert_same(fk.fuse(field, 3, shape=(6,)), field, noise(4, 6), 3)


def test_what_changes_beside_the_weights():
    """Settings of the field, modules that are replaced, tensors that are no parameters, the type of conditioning."""
    net = By(lambda linear, x, t, c: linear(x) + c.float() / (255 if c.dtype == torch.uint8 else 1) + net.extra)
    net.extra = torch.zeros(6)
    randomised(net)
    x, c = noise(4, 6), noise(4, 6, seed=5)
    field = fk.VelocityField(net, conditioning={"c": c}, guidance=2.0, unconditional={"c": torch.zeros(1, 6)})
    sampler = fk.fuse(field, 3, shape=(6,))

    def same():
        return torch.allclose(sampler(x), fk.sample(field, x, 3), atol=1e-4)

    assert same()
    for change in (
        lambda: setattr(field, "guidance", 5.0),
        lambda: setattr(field, "time_scale", 3.0),
        lambda: setattr(net, "linear", randomised(nn.Linear(6, 6), 7)),
        lambda: net.extra.add_(0.5),
    ):
        change()
        assert same()
    bytes_ = (c.abs() * 50).to(torch.uint8)
    plain = fk.VelocityField(net, conditioning={"c": c})
    again = fk.fuse(plain, 3, shape=(6,))
    expected = fk.sample(fk.VelocityField(net, conditioning={"c": bytes_}), x, 3)
    torch.testing.assert_close(again(x, c=bytes_), expected, rtol=1e-4, atol=1e-4)
    closed = randomised(nn.Linear(6, 6))
    function = fk.fuse(lambda x, t: closed(x), 3, shape=(6,))
    with torch.no_grad():
        closed.weight.mul_(2)
    torch.testing.assert_close(function(x), fk.sample(lambda x, t: closed(x), x, 3), rtol=1e-4, atol=1e-5)


def test_conditioning_that_cannot_be_exchanged_is_refused_by_name():
    def function(linear, x, t, c=None, drop=False):
        return linear(x)

    net, c = randomised(By(function)), noise(4, 3)
    for given, other in (({"c": c}, {"c": None}), ({"drop": False}, {"drop": True})):
        field = fk.VelocityField(net, conditioning=given, unconditional=other, guidance=2.0, packed=False)
        with pytest.raises(fk.NotFusable, match=rf"unconditional\['{next(iter(given))}'\]: expected"):
            fk.fuse(field, 3, shape=(6,))
    with pytest.raises(fk.NotFusable, match=r"conditioning\['c'\]: expected a tensor, got a container"):
        fk.fuse(fk.VelocityField(net, conditioning={"c": {"a": c}}), 3, shape=(6,))


def test_noise_of_another_shape():
    net = randomised(By(lambda linear, x, t: linear(x.flatten(1)).view(x.shape), 12))
    sampler = fk.fuse(net, 2, shape=(4, 3))
    assert sampler(noise(5, 4, 3)).shape == (5, 4, 3)
    with pytest.raises(ValueError, match=r"noise: expected shape \[n, 4, 3\]"):
        sampler(noise(5, 3, 4))


def test_recording_leaves_other_threads_alone():
    busy = nn.Sequential(nn.Sequential(nn.Sequential(nn.Identity())))
    stop, failed = threading.Event(), []

    def work():
        try:
            while not stop.is_set():
                busy(torch.zeros(1))
        except Exception as e:
            failed.append(e)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for t in threads:
        t.start()
    net = randomised(mlp([9, 16, 8]))
    for _ in range(20):
        fk.fuse(net, 2)
    stop.set()
    for t in threads:
        t.join()
    assert not failed


MEANWHILE = {
    "attribute": lambda net: setattr(net, "factor", 2.0),
    "tensor": lambda net: setattr(net, "gain", torch.tensor(3.0)),
    "parameter": lambda net: setattr(net.b, "bias", nn.Parameter(torch.ones(6))),
    "module": lambda net: setattr(net, "a", randomised(nn.Linear(6, 16), 7)),
    "hook": lambda net: net.a.register_forward_hook(lambda module, args, out: 2 * out),
}


class Changing(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 6)
        self.gain, self.factor = torch.tensor(1.5), 1.0

    def forward(self, x, t):
        return self.b(torch.tanh(self.a(x)) * self.gain) * self.factor


@pytest.mark.parametrize("name", MEANWHILE)
def test_what_another_thread_changes_while_a_network_is_recorded(name, monkeypatch):
    net, x, look, left = randomised(Changing()), noise(4, 6), recorded_module.Recorded.look, [MEANWHILE[name]]
    sampler = fk.fuse(net, 3, shape=(6,))
    with torch.no_grad():
        net.b.weight.mul_(2)

    def changed_before(recorded):
        if left:
            left.pop()(net)
        look(recorded)

    monkeypatch.setattr(recorded_module.Recorded, "look", changed_before)
    sampler(x)
    assert not left
    torch.testing.assert_close(sampler(x), fk.sample(net, x, 3), rtol=1e-4, atol=1e-5)
    assert not sampler.stale


class OfWeights(nn.Parameter):
    pass


def test_memory_of_a_subclass_that_is_exchanged():
    net, x = randomised(Changing()), noise(4, 6)
    net.b.bias = OfWeights(torch.ones(6))
    sampler = fk.fuse(net, 3, shape=(6,))
    for other in (torch.zeros(6), torch.ones(12)[::2], torch.full((1,), 2.0).expand(6)):
        net.b.bias.data = other
        torch.testing.assert_close(sampler(x), fk.sample(net, x, 3), rtol=1e-4, atol=1e-5)


def test_memory_that_is_read_as_another_type():
    net, x = randomised(Changing()), noise(4, 6)
    net.gain = torch.ones(1)
    sampler = fk.fuse(net, 3, shape=(6,))
    sampler(x)
    net.gain.data = net.gain.data.view(torch.int32)
    torch.testing.assert_close(sampler(x), fk.sample(net, x, 3), rtol=1e-4, atol=1e-5)


class OfResults(torch.Tensor):
    pass


def test_networks_that_cannot_be_recorded():
    net, x = randomised(Changing()), noise(4, 6)
    sampler = fk.fuse(net, 3, shape=(6,))
    net.to("meta")
    with pytest.raises(ValueError, match="velocity: expected a network with values, on the CPU or a GPU, got one on"):
        sampler(x)
    with pytest.raises(ValueError, match="velocity: expected a network with values, on the CPU or a GPU, got one on"):
        fk.fuse(net, 3, shape=(6,))
    net = randomised(Changing())
    net.gain = net.gain.as_subclass(OfResults)
    with pytest.raises(fk.NotFusable, match=r"velocity: .*none of the operations made, such as a tensor of a subclass"):
        fk.fuse(net, 3, shape=(6,))


# Devices. There is one here that holds values; tensors that would be made on the default device show on "meta".


class WithNumbers(nn.Module):
    """Numbers where tables are: with a table beside them, and alone."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 32), nn.Linear(32, 6)

    def forward(self, x, t):
        return 1 - (self.b(torch.relu(self.a(x)) * 2.0) / 3 + 1.0) + t[:, None]


def test_everything_is_made_where_the_network_is():
    torch.manual_seed(0)
    net, noise = WithNumbers().eval(), torch.randn(5, 6)
    expected = fk.sample(net, noise, 4)
    with torch.device("meta"):
        sampler = fk.fuse(net, 4, shape=(6,))
        got = sampler(noise)
        calibration = fk.calibrate(sampler, noise, grid=10, steps=[2, 3])
    assert torch.allclose(got, expected, atol=1e-5)
    assert calibration.schedules == fk.calibrate(sampler, noise, grid=10, steps=[2, 3]).schedules


def test_noise_where_the_network_is_not():
    sampler = fk.fuse(WithNumbers().eval(), 4, shape=(6,))
    with pytest.raises(ValueError, match="noise: expected a tensor on cpu, where the network is, got one on meta"):
        sampler(torch.zeros(5, 6, device="meta"))
