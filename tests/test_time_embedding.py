"""What depends on the time alone: evaluated once a schedule, and the same to rounding as at every step."""

import pytest
import torch
from _flows import digits_teacher, normal
from torch import nn

import flowkernels as fk
from flowkernels.models.bundled import BUNDLED
from flowkernels.models.networks import DiT, ResidualMLP, UNet
from flowkernels.velocity import time_embedding as time_embedding_module
from flowkernels.velocity.field import VelocityField
from flowkernels.velocity.protocol import resolve
from flowkernels.velocity.time_embedding import HasTimeEmbedding

NETWORKS = {
    "mlp": (lambda: ResidualMLP(12, width=16, blocks=2, time_width=8), (3, 4)),
    "unet": (lambda: UNet(channels=1, widths=(8, 8, 8), time_width=8), (1, 8, 8)),
    "dit": (lambda: DiT(size=4, width=16, blocks=2, heads=2, time_width=8), (1, 4, 4)),
}


def trained(name, dtype=torch.float32):
    """A network away from its initialisation, where no layer is zero, and noise for it."""
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    net = make()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net.to(dtype).eval(), normal(5, *shape, dtype=dtype if dtype == torch.float64 else torch.float32)


class Labelled(nn.Module, HasTimeEmbedding):
    """A bundled network whose input is moved by a label."""

    def __init__(self, body, dim):
        super().__init__()
        self.body, self.embed = body, nn.Embedding(4, dim)

    def time_embedding(self, t):
        return self.body.time_embedding(t)

    def forward(self, x, t, label, embedding=None):
        return self.body(x + self.embed(label).view(x.shape), t, embedding)


def fields(name, dtype=torch.float32):
    """{what: (field, the same field of a network that exposes nothing)}, and noise."""
    net, noise = trained(name, dtype)
    labelled = Labelled(net, noise[0].numel()).to(dtype).eval()
    guided = dict(conditioning={"label": torch.arange(5) % 3}, unconditional={"label": torch.full((1,), 3)}, guidance=2)
    settings = {
        "field": (net, dict(reverse_time=True, time_scale=0.7)),
        "guided, packed": (labelled, guided | dict(reverse_time=True)),
        "guided, two calls": (labelled, guided | dict(packed=False)),
    }

    def hidden(net):
        return lambda x, t, **conditioning: net(x, t, **conditioning)

    pairs = {what: (VelocityField(n, **kw), VelocityField(hidden(n), **kw)) for what, (n, kw) in settings.items()}
    return pairs | {"network": (net, hidden(net))}, net, noise


@pytest.mark.parametrize("name", NETWORKS)
def test_an_embedding_of_the_same_times_changes_no_bit(name):
    net, noise = trained(name)
    t = torch.linspace(0, 1, 5)
    assert torch.equal(net(noise, t, embedding=net.time_embedding(t)), net(noise, t))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NETWORKS)
def test_stages_call_the_time_mlp_once_a_schedule(name, dtype):
    pairs, net, noise = fields(name, dtype)
    calls = []
    net.time.register_forward_hook(lambda *_: calls.append(1))
    # N rows through a matrix product and one row for each sample may round apart, by so much a layer
    close = dict(rtol=1e3 * torch.finfo(dtype).eps, atol=1e3 * torch.finfo(dtype).eps)

    def count(stage, velocity):
        calls.clear()
        return stage(velocity), len(calls)

    stages = {
        "sample": lambda v: fk.sample(v, noise, [0, 0.1, 0.3, 1]),
        "rollout": lambda v: fk.rollout(v, noise, 4).x,
        "calibrate": lambda v: fk.calibrate(v, noise, 4, 2, progress=False).cost.triu(1).nan_to_num(posinf=0),
    }
    for exposed, hidden in pairs.values():
        assert resolve(exposed).has_time_embedding()
        assert not resolve(hidden).has_time_embedding()
        for stage in stages.values():
            (got, once), (expected, often) = count(stage, exposed), count(stage, hidden)
            assert once == 1
            assert often >= 3
            assert torch.allclose(got, expected, **close)


def test_once_for_every_chunk_of_a_calibration():
    net, noise = trained("mlp")
    calls = []
    net.time.register_forward_hook(lambda *_: calls.append(1))
    fk.calibrate(net, noise, 6, 2, chunk=2, progress=False)
    assert len(calls) == 3


def test_networks_in_bfloat16():
    net, noise = trained("mlp", torch.bfloat16)
    exposed = VelocityField(net, dtype=torch.bfloat16)
    hidden = VelocityField(lambda x, t: net(x, t), dtype=torch.bfloat16)
    got, expected = fk.rollout(exposed, noise, 4), fk.rollout(hidden, noise, 4)
    assert got.v.dtype == expected.v.dtype == torch.bfloat16
    assert (got.x - expected.x).abs().max() <= 2**-6 * expected.x.abs().max()  # two of its roundings


def test_the_bundled_checkpoints():
    for name in ("digits", "fashion"):
        net = BUNDLED[name].load()
        assert resolve(net).has_time_embedding()
        noise = normal(2, *BUNDLED[name].shape)
        assert torch.allclose(fk.sample(net, noise, 2), fk.sample(lambda x, t, net=net: net(x, t), noise, 2), atol=1e-4)


class Recorder(nn.Module, HasTimeEmbedding):
    """Embeds the time as `embed` says, and keeps what it is called with."""

    def __init__(self, embed):
        super().__init__()
        self.embed, self.times, self.rows = embed, [], []

    def time_embedding(self, t):
        self.times.append(t)
        return self.embed(t)

    def forward(self, x, t, embedding=None, **conditioning):
        self.rows.append((t, embedding))
        return torch.zeros_like(x)


TIMES = [0, 0.25, 0.5, 1]
EMBEDDINGS = {
    "tensor": lambda t: t[:, None] * torch.ones(3),
    "numbers": lambda t: t,
    "tuple": lambda t: (t, t[:, None, None] * torch.ones(1, 2)),
    "list": lambda t: [t, t + 1],
    "dict": lambda t: {"a": t, "b": (t, {"c": t[:, None]})},
}


def leaves(embedding):
    if isinstance(embedding, torch.Tensor):
        return [embedding]
    return [leaf for v in (embedding.values() if isinstance(embedding, dict) else embedding) for leaf in leaves(v)]


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_every_step_gets_its_row(kind, n):
    net = Recorder(EMBEDDINGS[kind])
    fk.sample(net, normal(n, 2), TIMES)
    assert torch.equal(torch.cat(net.times), torch.tensor(TIMES[:-1]))
    assert len(net.rows) == 3
    for t, embedding in net.rows:
        expected = EMBEDDINGS[kind](t)
        assert isinstance(embedding, dict) == isinstance(expected, dict)
        for got, want in zip(leaves(embedding), leaves(expected), strict=True):
            assert torch.equal(got, want)
            assert got.untyped_storage().nbytes() == 3 * want[0].nbytes  # N rows for any number of samples


@pytest.mark.parametrize("packed", [True, False])
def test_through_a_field(packed):
    net = Recorder(EMBEDDINGS["dict"])
    field = VelocityField(
        net,
        **dict(reverse_time=True, time_scale=1000, guidance=2.0, packed=packed),
        conditioning={"y": torch.ones(1)},
        unconditional={"y": torch.zeros(1)},
    )
    fk.sample(field, normal(4, 2), TIMES)
    assert torch.equal(torch.cat(net.times), 1000 * (1 - torch.tensor(TIMES[:-1])))
    assert len(net.rows) == (3 if packed else 6)
    for t, embedding in net.rows:
        assert len(t) == (8 if packed else 4)
        assert torch.equal(embedding["a"], t)
    outer = VelocityField(VelocityField(net, time_scale=2.0), time_scale=3.0)
    assert resolve(outer).has_time_embedding()
    net.times.clear()
    fk.sample(outer, normal(4, 2), TIMES)
    assert torch.equal(torch.cat(net.times), 6 * torch.tensor(TIMES[:-1]))


def test_times_are_float64_for_a_float64_state():
    net = Recorder(EMBEDDINGS["tensor"])
    fk.sample(net, normal(2, 2, dtype=torch.float64), 3)
    assert net.times[0].dtype == net.rows[0][0].dtype == torch.float64


class WithSubmodule(nn.Module, HasTimeEmbedding):
    def __init__(self):
        super().__init__()
        self.time_embedding = nn.Linear(7, 7)

    def forward(self, x, t, embedding=None):
        assert embedding is None
        return torch.zeros_like(x)


class Required(WithSubmodule):
    def __init__(self):
        nn.Module.__init__(self)

    def time_embedding(self, t):
        raise AssertionError

    def forward(self, x, t, embedding):
        return torch.zeros_like(x)


class Keywords(Required):
    def forward(self, x, t, **kwargs):
        assert not kwargs
        return torch.zeros_like(x)


def with_another_forward():
    net = Recorder(lambda t: t / 0)
    net.forward = lambda x, t: torch.zeros_like(x)
    return net


@pytest.mark.parametrize(
    "velocity",
    [
        WithSubmodule(),
        with_another_forward(),
        VelocityField(Required(), conditioning={"embedding": torch.ones(1)}),
        VelocityField(Recorder(lambda t: t / 0), conditioning={"embedding": torch.ones(1)}),
        Keywords(),
        digits_teacher(),
        torch.zeros_like,
    ],
    ids=["submodule", "another forward", "required", "conditioning", "keywords", "nothing", "builtin"],
)
def test_what_does_not_expose_a_time_embedding(velocity):
    assert not resolve(velocity).has_time_embedding()
    if velocity is not torch.zeros_like:
        assert fk.sample(velocity, normal(2, 1, 8, 8), 2).shape == (2, 1, 8, 8)


@pytest.mark.parametrize(
    ("embed", "error", "message"),
    [
        (lambda t: t[:2], ValueError, r"^time_embedding: expected tensors of 3 rows.*shape \[2\]"),
        (lambda t: (t, t.sum()), ValueError, r"^time_embedding: expected tensors of 3 rows.*shape \[\]"),
        (lambda t: {"a": 3.0}, TypeError, r"^time_embedding: expected tensors in tuples or dicts, got 3.0"),
        (lambda t: None, TypeError, r"^time_embedding: .*got None"),
    ],
)
def test_bad_embeddings(embed, error, message):
    with pytest.raises(error, match=message):
        fk.sample(Recorder(embed), normal(4, 2), 3)


@pytest.mark.parametrize("n", [1, 3])
def test_a_network_may_write_to_its_times(n):
    def in_place(x, t):
        t.mul_(2)
        return x * t[:, None]

    times, noise = torch.linspace(0, 1, 5, dtype=torch.float64), normal(n, 2, dtype=torch.float64)
    expected = fk.sample(lambda x, t: x * (2 * t)[:, None], noise, times)
    assert torch.equal(fk.sample(in_place, noise, times), expected)
    assert torch.equal(times, torch.linspace(0, 1, 5, dtype=torch.float64))


@pytest.mark.parametrize("rows", [1, 7, 10])
def test_times_are_expanded_to_the_samples_in_parts(monkeypatch, rows):
    net, noise = trained("mlp")
    expected = fk.rollout(net, noise, 7).x
    monkeypatch.setattr(time_embedding_module, "ROWS", rows)
    assert torch.equal(fk.rollout(net, noise, 7).x, expected)


def test_patches_go_back_in_diffusers_order():
    net = DiT(channels=3, size=6, patch=2, width=8, blocks=1, heads=2, time_width=8)
    with torch.no_grad():
        net.head.bias.copy_(torch.arange(12.0))  # a token's projection, its weights being zero
    tokens = net.head.bias.detach().expand(2, 3, 3, 12).reshape(2, 3, 3, 2, 2, 3)
    expected = torch.einsum("nhwpqc->nchpwq", tokens).reshape(2, 3, 6, 6)
    assert torch.equal(net(normal(2, 3, 6, 6), torch.zeros(2)), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(size=7, patch=2), r"^size: expected a multiple of patch = 2, got 7"),
        (dict(width=10, heads=4), r"^width: expected a multiple of heads = 4, got 10"),
    ],
)
def test_bad_sizes(settings, message):
    with pytest.raises(ValueError, match=message):
        DiT(**settings)
