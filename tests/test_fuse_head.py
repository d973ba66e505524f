import copy
import itertools
import pickle
from pathlib import Path

import pytest
import torch
from _flows import normal
from _transformers import TRANSFORMERS, dit, field_of, randomised
from torch import nn

import flowkernels as fk
from flowkernels.fusion import head as head_module
from flowkernels.models.bundled import BUNDLED
from flowkernels.models.networks import UNet
from flowkernels.ops.linear_euler import reference

BF16, F64 = torch.bfloat16, torch.float64
EACH = pytest.mark.parametrize("name", ["sd3", "flux", "dit"])
PAGE = Path(__file__).parents[1] / "docs/diffusers.md"
PROOF = 2  # comparisons before a first step


class Perceptron(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(13, 40), nn.SiLU(), nn.Linear(40, 40), nn.GELU(), nn.Linear(40, 12))

    def forward(self, x, t):
        return self.layers(torch.cat([x.flatten(1), t[:, None].to(x.dtype)], 1)).view_as(x)


class Counting:
    """How often `linear_euler` runs, and what it is given."""

    def __init__(self, monkeypatch):
        self.calls, op = [], head_module.linear_euler

        def counted(*args, **kwargs):
            self.calls.append(kwargs)
            return op(*args, **kwargs)

        monkeypatch.setattr(head_module, "linear_euler", counted)


@pytest.fixture
def steps(monkeypatch):
    return Counting(monkeypatch).calls


def hooks(net):
    return [h for m in net.modules() for h in (*m._forward_pre_hooks.items(), *m._forward_hooks.items())]


def close(got, expected, tolerance):
    """To a relative error of the whole tensor."""
    assert got.shape == expected.shape
    error = (got.double() - expected.double()).norm() / expected.double().norm()
    assert error <= tolerance, f"relative error {error:.3g}"


# ---- the unfused numbers ----


@pytest.mark.parametrize(
    ("name", "guidance", "packed"), [("sd3", None, True), ("flux", 3.0, True), ("dit", 3.0, False)]
)
def test_transformers_give_the_unfused_numbers(name, guidance, packed, steps):
    field, noise = field_of(name, 3, guidance, packed)
    fused = fk.fuse_head(field)
    expected, trajectory = fk.sample(field, noise, 5), fk.rollout(field, noise, 5)
    close(fk.sample(fused, noise, 5), expected, 2e-6)
    assert len(steps) == PROOF + 5
    assert all((s["velocity_out"] is None) == (i >= PROOF) for i, s in enumerate(steps))
    assert all(s["guidance"] == guidance for s in steps[PROOF:])
    assert all(s["norm"] == 1e-6 and (s["patch"] == (None if name == "flux" else 2)) for s in steps)
    got = fk.rollout(fused, noise, 5)
    close(got.x, trajectory.x, 2e-6)
    close(got.v, trajectory.v, 5e-6)
    assert torch.equal(got.times, trajectory.times)
    assert not hooks(field.net)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_families(name, steps):
    """Of all families: guided, in one call or in two; and in bfloat16."""
    packed = len(name) % 2 == 0 and name != "hidream"  # whose layers of text come before its samples
    field, noise = field_of(name, 3, guidance=3.0, packed=packed)
    fused = fk.fuse_head(field)
    close(fk.sample(fused, noise, 3), fk.sample(field, noise, 3), 2e-6)
    assert len(steps) == PROOF + 3
    kind = "ZImageTransformer2DModel" if name == "zimage" else type(field.net).__name__
    stop = fused.layer.stop.removeprefix("net.")
    row = "| " + " | ".join((f"`{kind}`", f"`{stop}`", *fused.proven.parts.split("; outputs "))) + " |"
    assert row in PAGE.read_text().splitlines()
    fuses = ["scale"] + ["norm"] * (name != "auraflow") + ["shift"] * (name not in ("lumina2", "zimage"))
    assert all(s[key] is not None for s in steps for key in fuses)
    assert not hooks(field.net)
    if name not in ("hunyuanimage", "kandinsky5"):  # which take no times of another dtype than their weights
        low, noise = field_of(name, 2, dtype=BF16)
        close(fk.sample(fk.fuse_head(low), noise, 2), fk.sample(low, noise, 2), 0.03)
        assert {s["low"].dtype for s in steps[-2:]} == {BF16}


def test_a_final_layer_that_no_linear_layer_ends():
    """AceStep's is a convolution."""
    field, noise = field_of("acestep", 2)
    with pytest.raises(fk.NotFusable, match=r"^head 'layers.0.mlp.down_proj' of AceStepTransformer1DModel: expected"):
        fk.sample(fk.fuse_head(field), noise, 2)


@pytest.mark.parametrize(("name", "on"), [("sd3", "cuda"), ("flux", "cuda"), ("dit", "triton"), ("flux", "triton")])
def test_kernels_of_a_gpu_give_the_unfused_numbers(name, on, steps):
    field, noise = field_of(name, 2, guidance=3.0)
    expected = fk.rollout(field, noise, 2)
    with fk.backend(on):
        got = fk.rollout(fk.fuse_head(field), noise, 2)
    assert len(steps) == PROOF + 2
    close(got.x, expected.x, 2e-6)
    close(got.v, expected.v, 5e-6)


@EACH
def test_calibrations_agree(name, steps):
    """In chunks, with each sample's own conditioning; proven once for all chunks of one size."""
    field, noise = field_of(name, 5, guidance=2.0)
    fused = fk.fuse_head(field)
    got, expected = (fk.calibrate(v, noise, 6, range(1, 5), chunk=2, progress=False) for v in (fused, field))
    assert len(steps) == 3 * 6 + 2 * PROOF
    assert {n: s.indices for n, s in got.items()} == {n: s.indices for n, s in expected.items()}
    finite = expected.cost.isfinite()
    torch.testing.assert_close(got.cost[finite], expected.cost[finite], rtol=1e-4, atol=1e-9)
    for key in ("guidance", "convention", "parameters_sha256"):
        assert got.provenance[key] == expected.provenance[key]


@pytest.mark.parametrize(("name", "guidance"), [("sd3", 2.0), ("flux", None), ("dit", 2.0)])
def test_bfloat16_networks_with_a_float32_state(name, guidance, steps):
    """Nearer to the same weights in float32 than the unfused network, which rounds the final layer to bfloat16 too."""
    field, noise = field_of(name, 3, guidance, dtype=BF16)
    got, unfused = fk.sample(fk.fuse_head(field), noise, 4), fk.sample(field, noise, 4)
    assert got.dtype == torch.float32
    close(got, unfused, 0.02)
    assert {s["z"].dtype for s in steps} == {s["weight"].dtype for s in steps} == {BF16}
    assert all(s["low"].dtype == BF16 for s in steps[-4:])
    wide = fk.VelocityField(copy.deepcopy(field.net).float(), **field.settings() | dict(dtype=None))
    for kwargs in (wide.conditioning, wide.unconditional):
        kwargs.update({k: v.float() for k, v in kwargs.items() if v.is_floating_point()})
    truth = fk.sample(wide, noise, 4)
    assert (got - truth).norm() <= 1.05 * (unfused - truth).norm()


@pytest.mark.parametrize(("name", "dtype"), [("sd3", torch.float32), ("flux", F64), ("dit", torch.float32)])
def test_float64_states(name, dtype):
    field, noise = field_of(name, 2, dtype=dtype)
    got, expected = fk.rollout(fk.fuse_head(field), noise.double(), 3), fk.rollout(field, noise.double(), 3)
    assert got.x.dtype == got.v.dtype == F64
    close(got.x, expected.x, 2e-6 if dtype == torch.float32 else 1e-14)
    close(got.v, expected.v, 2e-6 if dtype == torch.float32 else 1e-13)


def test_a_dit_that_learned_sigma():
    """Its output has twice the channels; the first half is the velocity."""
    net, convention, rows, _, shape = dit(3, out_channels=8)
    randomised(net)
    noise = normal(3, *shape)

    class FirstHalf(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, hidden_states, **kwargs):
            return self.net(hidden_states, **kwargs).sample[:, :4]

    expected = fk.sample(fk.VelocityField(FirstHalf(), **convention, conditioning=rows), noise, 4)
    for whole in (net, FirstHalf()):
        fused = fk.fuse_head(fk.VelocityField(whole, **convention, conditioning=rows))
        close(fk.sample(fused, noise, 4), expected, 2e-6)


def test_a_transformer_inside_a_network_and_by_its_path():
    field, noise = field_of("sd3", 2)

    class Wrapped(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.embed, self.inner = nn.Linear(3, 3), nn.ModuleDict({"transformer": net})

        def forward(self, **kwargs):
            return self.inner["transformer"](**kwargs)

    outer = fk.VelocityField(Wrapped(field.net), **field.settings())
    expected = fk.sample(field, noise, 3)
    for head in (None, "inner.transformer", "inner.transformer.proj_out"):
        fused = fk.fuse_head(outer, head)
        close(fk.sample(fused, noise, 3), expected, 2e-6)
        assert fused.layer.linear == "inner.transformer.proj_out"


# ---- a plain Linear head ----


@pytest.mark.parametrize("head", [None, "output"])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_bundled_residual_mlp(head, sign, steps):
    net = BUNDLED["digits"].load()
    field = fk.VelocityField(net, sign=sign, reverse_time=sign == -1)
    noise = normal(20, 1, 8, 8)
    fused = fk.fuse_head(field, head)
    close(fk.sample(fused, noise, 8), fk.sample(field, noise, 8), 2e-6)
    assert len(steps) == PROOF + 8
    close(fk.rollout(fused, noise, 8).v, fk.rollout(field, noise, 8).v, 2e-6)
    cal, expected = (fk.calibrate(v, noise, 10, range(1, 5), progress=False) for v in (fused, field))
    assert [s.indices for s in cal.values()] == [s.indices for s in expected.values()]


def test_a_network_without_a_field(caplog):
    net, noise = Perceptron().eval(), normal(7, 3, 4)
    fused = fk.fuse_head(net)
    with caplog.at_level("INFO", "flowkernels"):
        close(fk.sample(fused, noise, 6), fk.sample(net, noise, 6), 2e-6)
    said = "fuse_head, of a Perceptron from 'layers.4' on: linear layer alone; outputs as they come; torch.compile of"
    assert caplog.text.count(said) == 1
    assert fused.layer.linear == "layers.4"
    x, t = noise, torch.full((7,), 0.25)
    assert torch.equal(fused(x, t), net(x, t))  # called, it is the network


def test_a_sequential_and_a_network_that_is_its_head():
    """v = A x: what the Linear reads is the state itself, which the step writes."""
    net, noise = nn.Sequential(nn.Linear(12, 12)), normal(5, 12)

    class Field(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, t):
            return self.net(x)

    for dtype in (None, BF16):
        field = fk.VelocityField(Field().to(dtype or torch.float32), dtype=dtype)
        close(fk.sample(fk.fuse_head(field), noise, 5), fk.sample(field, noise, 5), 2e-6 if dtype is None else 0.02)


@pytest.mark.parametrize("order", ["pqc", "cpq"])
def test_a_linear_head_with_patches(order):
    class Patches(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Conv2d(3, 16, 2, stride=2), nn.Linear(16, 12)

        def forward(self, x, t):
            tokens = (self.embed(x) + t.view(-1, 1, 1, 1)).flatten(2).transpose(1, 2)
            return reference.unpatchify(self.head(tokens.sin()), x, 2, order)

    net, noise = Patches().eval(), normal(3, 3, 6, 10)
    fused = fk.fuse_head(net)
    close(fk.sample(fused, noise, 4), fk.sample(net, noise, 4), 2e-6)
    assert [(p.patch, p.order) for p in fused.proven.places.values()] == [(2, order)]


def test_tokens_of_all_samples_in_a_row():
    """A network that folds its tokens into the batch before the head, without a bias."""

    class Folded(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 30), nn.Linear(30, 4, bias=False)

        def forward(self, x, t):
            return self.head((self.body(x) + t[:, None, None]).tanh().flatten(0, 1)).unflatten(0, x.shape[:2])

    net, noise = Folded().eval(), normal(3, 5, 4)
    close(fk.sample(fk.fuse_head(net), noise, 4), fk.sample(net, noise, 4), 2e-6)


# ---- weights, copies, state of the network ----


@EACH
def test_weights_are_read_at_every_call(name):
    field, noise = field_of(name, 2)
    fused = fk.fuse_head(field)
    before = fk.sample(fused, noise, 3)
    with torch.no_grad():
        for p in field.net.parameters():
            p.mul_(1.1)
    expected = fk.sample(field, noise, 3)
    close(fk.sample(fused, noise, 3), expected, 2e-6)
    assert (before - expected).norm() > 1e-3 * expected.norm()


def test_a_head_of_zeros():
    """Zeros match any head; what is done with them says which one it is."""
    net, noise = Perceptron().eval(), normal(4, 12)
    saved = copy.deepcopy(net.layers[4])
    nn.init.zeros_(net.layers[4].weight), nn.init.zeros_(net.layers[4].bias)
    with pytest.raises(fk.NotFusable, match=r"^head 'layers.2' of Perceptron: expected the network's own velocity"):
        fk.sample(fk.fuse_head(net, "layers.2"), noise, 2)  # 40 outputs: another head than the velocity's
    fused = fk.fuse_head(net)
    assert torch.equal(fk.sample(fused, noise, 2), noise)
    net.layers[4].load_state_dict(saved.state_dict())
    close(fk.sample(fused, noise, 2), fk.sample(net, noise, 2), 2e-6)


def test_copies_and_moves():
    field, noise = field_of("dit", 2, guidance=2.0)
    fused = fk.fuse_head(field)
    expected = fk.sample(fused, noise, 3)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), fused.to("cpu"), fk.fuse_head(fused)):
        assert isinstance(other, fk.FusedHead)
        assert torch.equal(fk.sample(other, noise, 3), expected)
    one = fk.sample(fused.rows(slice(1, 2), 2), noise[1:], 3)
    close(one, expected[1:], 2e-6)
    plain = fused.without_guidance()
    assert isinstance(plain, fk.FusedHead)
    close(fk.sample(plain, noise, 3), fk.sample(field.without_guidance(), noise, 3), 2e-6)


def test_the_noise_stays_as_it_is_and_results_are_apart():
    net, noise = Perceptron().eval(), normal(4, 12)
    fused, before = fk.fuse_head(net), noise.clone()
    first, second = fk.sample(fused, noise, 3), fk.sample(fused, noise, 3)
    assert torch.equal(noise, before)
    assert torch.equal(first, second)
    assert first.data_ptr() not in (second.data_ptr(), noise.data_ptr())
    assert not first.requires_grad
    trajectory = fk.rollout(fused, noise, 3)
    assert torch.equal(trajectory.x[0], noise)
    for i, (a, b) in enumerate(itertools.pairwise(trajectory.x)):
        close(b - a, (trajectory.times[i + 1] - trajectory.times[i]) * trajectory.v[i], 1e-5)


# ---- errors, after which nothing is left hooked ----


class Late(Perceptron):
    """NaN in sample 2 from a time on."""

    def __init__(self, time):
        super().__init__()
        self.time = time

    def forward(self, x, t):
        late = (t >= self.time) & (torch.arange(len(x)) == 2)
        return super().forward(x.masked_fill(late[:, None], float("nan")), t)


def test_what_is_not_finite_names_the_sample_and_the_step():
    fused = fk.fuse_head(Late(0.6).eval())
    with pytest.raises(
        ValueError, match=r"^velocity: expected finite velocities, got NaN or Inf in sample 2 at step 2"
    ):
        fk.rollout(fused, normal(4, 12), 3)


@pytest.mark.parametrize(("name", "where"), [("sd3", "trunk"), ("flux", "head"), ("dit", "trunk")])
def test_nothing_stays_hooked_after_an_exception(name, where, monkeypatch):
    field, noise = field_of(name, 2)
    fused = fk.fuse_head(field)
    expected = fk.sample(fused, noise, 2)

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    blocks = field.net.transformer_blocks
    with monkeypatch.context() as broken:
        if where == "trunk":
            broken.setattr(blocks[0], "forward", fail)
        else:
            broken.setattr(head_module, "linear_euler", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            fk.sample(fused, noise, 2)
    assert not hooks(field.net)
    assert torch.equal(fk.sample(fused, noise, 2), expected)
    with torch.no_grad():
        assert field(noise, torch.zeros(2)).shape == noise.shape  # a whole forward pass again


def test_a_network_that_catches_exceptions():
    class Careful(Perceptron):
        def forward(self, x, t):
            try:
                return super().forward(x, t)
            except Exception:
                return torch.zeros_like(x)

    net, noise = Careful().eval(), normal(4, 12)
    close(fk.sample(fk.fuse_head(net), noise, 3), fk.sample(net, noise, 3), 2e-6)


class Scaled(Perceptron):
    def forward(self, x, t):
        return 1.01 * super().forward(x, t)


class Twice(Perceptron):
    def forward(self, x, t):
        return self.layers[4](self.layers[4](x.repeat(1, 4)[:, :40]).repeat(1, 4)[:, :40])


@pytest.mark.parametrize("net", [Scaled(), Twice()], ids=["scaled", "twice"])
def test_a_head_that_is_not_the_velocity(net):
    noise = normal(4, 12)
    for head in (None, "layers.4"):
        with pytest.raises(
            ValueError, match=r"^head 'layers.4' of \w+: expected the network's own velocity, to .*head="
        ):
            fk.sample(fk.fuse_head(net.eval(), head), noise, 3)
    assert not hooks(net)


def test_a_convolutional_head():
    net = UNet(widths=(8, 16, 16)).eval()
    with pytest.raises(fk.NotFusable, match=r"^head 'up1.film' of UNet: expected .* of a UNet; head= names another"):
        fk.sample(fk.fuse_head(net), normal(2, 1, 8, 8), 2)
    with pytest.raises(ValueError, match=r"^velocity: expected a network with an nn.Linear .*, got a Sequential"):
        fk.fuse_head(nn.Sequential(nn.Conv2d(1, 1, 3)))


def test_a_transformer_with_another_final_layer():
    """What it does counts, not where: an RMSNorm runs as it is, before the linear layer."""
    field, noise = field_of("sd3", 2)
    field.net.proj_out = nn.Sequential(field.net.proj_out)
    fused = fk.fuse_head(field)
    close(fk.sample(fused, noise, 3), fk.sample(field, noise, 3), 2e-6)
    assert (fused.layer.stop, fused.layer.linear) == ("norm_out.norm", "proj_out.0")
    field.net.norm_out.norm = nn.RMSNorm(24)
    close(fk.sample(fused, noise, 3), fk.sample(field, noise, 3), 2e-6)
    assert (fused.layer.stop, fused.layer.linear) == ("proj_out.0", "proj_out.0")


@pytest.mark.parametrize("head", [None, "layers.4"])
def test_compiled_networks(head):
    """Blocks of the trunk may be compiled; the final layer and the network around it may not."""
    net, noise = Perceptron().eval(), normal(4, 12)
    expected = fk.sample(net, noise, 3)
    whole = torch.compile(copy.deepcopy(net), backend="eager")
    in_place, last = copy.deepcopy(net), copy.deepcopy(net)
    in_place.compile(backend="eager")
    last.layers.compile(backend="eager")
    for velocity, which in ((whole, "OptimizedModule"), (in_place, "Perceptron"), (last, "'layers'")):
        path = f"_orig_mod.{head}" if head and velocity is whole else head
        with pytest.raises(
            ValueError, match=rf"^velocity: expected .* at most blocks are compiled, got {which}, compiled"
        ):
            fk.sample(fk.fuse_head(velocity, path), noise, 3)
    net.layers[2].compile(backend="eager")
    close(fk.sample(fk.fuse_head(net, head), noise, 3), expected, 2e-6)


def test_a_head_that_is_not_called():
    class Idle(Perceptron):
        def __init__(self):
            super().__init__()
            self.spare = nn.Linear(40, 12)

    net = Idle().eval()
    with pytest.raises(ValueError, match=r"^velocity: expected a network that calls its module 'spare'.*got an? Idle"):
        fk.sample(fk.fuse_head(net, "spare"), normal(4, 12), 2)


@pytest.mark.parametrize(
    ("error", "message", "args", "kwargs"),
    [
        (TypeError, r"velocity: expected a callable", (1.0,), {}),
        (TypeError, r"velocity: expected an nn.Module or a VelocityField of one, got", (lambda x, t: x,), {}),
        (ValueError, r"head: expected the path of a module in Perceptron, got 'head'", (Perceptron(), "head"), {}),
        (
            ValueError,
            r"head: expected a module with an nn.Linear that gives the velocity, got a SiLU",
            (Perceptron(), "layers.1"),
            {},
        ),
    ],
)
def test_errors(error, message, args, kwargs):
    with pytest.raises(error, match=rf"^{message}"):
        fk.fuse_head(*args, **kwargs)
